"""Ranks that act together: a process group of our own over those of the user's, and what they settle in it."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ...loop.guard import ForkSafeLock
from ...terms.pickling import pickled_from
from ...torch_private.distributed import group_timeout, new_group

T = TypeVar("T")

#: torch 2.13 has a new name for it, and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: Waited for beyond the timeout of the user's group. A rank that left ``swapped_into`` early waits for its peers in our
#: group; one of them may wait for it in the user's, must give up there first, and then comes. Less than a second, since
#: torch's FileStore waits for a peer up to the next whole one.
GRACE = timedelta(seconds=0.9)


@pickled_from("swafast.sharded")
class LostPeerError(RuntimeError):
    """A collective of ours failed: a rank died, or did not come within the process group's timeout.

    From then on whatever needs the other ranks raises it at once; updates without a collective go on.
    """


@contextmanager
def losing_peers(ranks: Sequence[int]) -> Iterator[None]:
    """Raise LostPeerError for a RuntimeError in the body, in which ``ranks`` meet."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # a ValueError: the process group was destroyed
        raise LostPeerError(
            f"a rank of {list(ranks)} died, or did not come within the process group's timeout: all ranks must make "
            f"this call ({error})"
        ) from error


class _Fault:
    """Why no peer may be met any more, in a group of ours and its subgroups."""

    reason: str | None = None

    def refuse(self) -> None:
        if self.reason is not None:
            raise LostPeerError(self.reason)

    @contextmanager
    def noted(self, ranks: Sequence[int]) -> Iterator[None]:
        """Run what all ``ranks`` run alike; what breaks off here leaves peers waiting inside."""
        self.refuse()
        try:
            yield
        except BaseException as error:
            if len(ranks) > 1 and self.reason is None:
                self.reason = (
                    f"ranks {list(ranks)} went out of lockstep before, with {type(error).__name__}: {error}; "
                    "what is local still works, for the rest make the averaged model anew"
                )
            raise


class Ranks:
    """A process group over the ranks of the user's, in which nothing of ours can meet a collective of the user's.

    There is one for each of the user's groups: ``rendezvous.shared_ranks`` returns it. Making one is collective.

    Args:
        process_group: the user's; None: the default one.
        name: of the new group, the same on all its ranks, and not used before with this default group: a failed attempt
            leaves its addresses in the store, where the next one must not find them.
        ranks: make it over these of its ranks, this one among them; default: all.

    Raises:
        TypeError: ``process_group`` is none.
        ValueError: there is no such process group, or this rank is not in it.
        LostPeerError: a rank died, or did not come to make its own.
    """

    def __init__(self, process_group: ProcessGroup | None, name: str, ranks: Sequence[int] | None = None) -> None:
        parent = checked_group(process_group)
        self.rank = dist.get_rank()
        self.ranks = tuple(sorted(ranks)) if ranks is not None else tuple(dist.get_process_group_ranks(parent))
        if self.rank not in self.ranks:
            raise ValueError(f"process_group must hold this rank, {self.rank}, got one of {list(self.ranks)}")
        self.name = name
        #: Held for each collective, and for several that belong together: threads share the group.
        self.lock = ForkSafeLock()
        self._fault = _Fault()
        self._numbers = itertools.count()
        # Weakly: who destroys it may not be kept from it by what hangs on it.
        self._parent = weakref.ref(process_group) if process_group is not None else None
        self._subgroups: dict[tuple[int, ...], Ranks] = {self.ranks: self}
        timeout = group_timeout(parent)
        with self._heard():
            self.group: ProcessGroup | None = new_group(
                self.ranks,
                hashlib.sha256(self.name.encode()).hexdigest(),
                timeout=timeout + GRACE if timeout is not None else None,
                backend=dist.get_backend(parent) if ranks is not None or process_group is not None else None,
            )

    def subgroup(self, ranks: Sequence[int]) -> Ranks:
        """The group over some of these ranks, this one among them; made once, together with the others of them."""
        key = tuple(sorted(ranks))
        if key not in self._subgroups:
            parent = self._parent() if self._parent is not None else None
            with self._fault.noted(self.ranks):  # a subgroup that is not made is lost to all
                self._subgroups[key] = subgroup = Ranks(parent, f"{self.name} {key}", key)
            subgroup._fault, subgroup.lock = self._fault, self.lock
        return self._subgroups[key]

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def index(self) -> int:
        """This rank's index among them."""
        return self.ranks.index(self.rank)

    def device_for(self, device: torch.device) -> torch.device:
        """Give where a tensor has to be for these collectives, ``device`` if they take tensors there."""
        if device.type == "cpu" and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def next_number(self) -> int:
        """A number for an averaged model that uses this group: ranks make them in one order."""
        return next(self._numbers)

    @property
    def is_lost(self) -> bool:
        """Whether no peer may be met any more."""
        return self._fault.reason is not None

    # Collectives

    def gather(self, value: T) -> list[T]:
        """Give the values of all ranks, in their order: small objects, no tensors."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._heard():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def sum_(self, tensor: Tensor) -> None:
        self._run(tensor, partial(dist.all_reduce, op=dist.ReduceOp.SUM))

    def max_(self, tensor: Tensor) -> None:
        self._run(tensor, partial(dist.all_reduce, op=dist.ReduceOp.MAX))

    def sum_to_first_(self, tensor: Tensor) -> None:
        """Add up on the first rank; what the others have afterwards says nothing."""
        self._run(tensor, partial(dist.reduce, dst=self.ranks[0], op=dist.ReduceOp.SUM))

    def broadcast_(self, tensor: Tensor) -> None:
        """Write the first rank's values into every other rank's tensor."""

        def as_bytes(there: Tensor, group: ProcessGroup) -> None:
            # gloo refuses int16, float8 and the larger unsigned ones.
            dist.broadcast(there.view(-1).view(torch.uint8), self.ranks[0], group=group)

        if tensor.numel() > 0:
            self._run(tensor, as_bytes)

    def _run(self, tensor: Tensor, collective: Callable[..., object]) -> None:
        """Run a collective on a tensor, where it takes one, and copy back what it has made of it."""
        if self.size == 1:
            return
        with self._heard():
            there = tensor.to(self.device_for(tensor.device)).contiguous()
            collective(there, group=self.group)
        if there is not tensor:
            tensor.copy_(there)

    def sums(self, values: Iterable[int], device: torch.device | str = "cpu") -> list[int]:
        """Add up the int64 of all ranks, one by one, by a tensor on ``device``."""
        total = torch.tensor(list(values), dtype=torch.int64, device=device)
        self.sum_(total)
        return list(map(int, total.tolist()))

    def all_gather(self, received: Tensor, sent: Tensor) -> None:
        """Fill ``received`` with the ``sent`` of all ranks, in their order; of one size, on the device for these."""
        with self._heard():
            _all_gather(received, sent, group=self.group)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        with self.lock, self.in_lockstep(), losing_peers(self.ranks):
            yield

    @contextmanager
    def in_lockstep(self) -> Iterator[None]:
        """Run what all ranks run alike: what breaks off here leaves peers waiting inside, and meets none of them again.

        A collective that met another one of its peers would give wrong values, or end the process.

        Raises:
            LostPeerError: something has broken off before.
        """
        with self._fault.noted(self.ranks):
            yield

    # What they settle

    @contextmanager
    def settled(self, what: str, number: int | None = None) -> Iterator[None]:
        """Run the body on every rank, and raise on every rank if it failed on one.

        A rank raises its own error where it has one, and otherwise a RuntimeError that names the first that failed.

        Args:
            number: of the averaged model that it is about, from :meth:`next_number`.
        """
        self._fault.refuse()
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:  # an interrupt too: the peers wait
            error = raised
        try:
            calls = self.gather((what, number, None if error is None else f"{type(error).__name__}: {error}"))
        finally:
            if error is not None:
                raise error
        if len({(call, of) for call, of, _ in calls}) > 1:
            got = ", ".join(
                call + (f" of average {of}" if of is not None else "") + f" on rank {rank}"
                for rank, (call, of, _) in zip(self.ranks, calls, strict=True)
            )
            raise RuntimeError(f"all ranks must make the same call, got {got}")
        for rank, (_, _, message) in zip(self.ranks, calls, strict=True):
            if message is not None:
                raise RuntimeError(f"{what} failed on rank {rank}, and so on every rank: {message}")

    def agree(self, what: str, described: Mapping[str, object]) -> None:
        """Raise ValueError on every rank, naming the first difference, unless all describe the same.

        What goes round is a digest; the descriptions themselves only once they differ.
        """
        own = {key: str(value) for key, value in described.items()}
        digest = hashlib.sha256(repr(sorted(own.items())).encode()).digest()
        if len(set(self.gather(digest))) == 1:
            return
        everyone = self.gather(own)
        first = everyone[0]
        for rank, theirs in zip(self.ranks, everyone, strict=True):
            for key in {**first, **theirs}:
                ours, got = first.get(key, "nothing"), theirs.get(key, "nothing")
                if ours != got:
                    raise ValueError(
                        f"{what} must be the same on every rank, got for {key!r} {ours} on rank {self.ranks[0]} and "
                        f"{got} on rank {rank}"
                    )


def checked_group(process_group: object) -> ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "process_group must exist, got none: call torch.distributed.init_process_group before, or use "
            "FusedAveragedModel or FusedAverages in a single process"
        )
    if process_group is None:
        process_group = dist.group.WORLD
    elif process_group is dist.GroupMember.NON_GROUP_MEMBER:  # what new_group gives to ranks that it leaves out
        raise ValueError(f"process_group must hold this rank, {dist.get_rank()}, got one of others")
    if not isinstance(process_group, ProcessGroup):
        raise TypeError(f"process_group must be a ProcessGroup or None, got {type(process_group).__name__}")
    return process_group


class OneProcess(Ranks):
    """This process alone, without a process group."""

    def __init__(self) -> None:
        self.rank, self.ranks, self.group, self.lock, self._fault = 0, (0,), None, ForkSafeLock(), _Fault()
