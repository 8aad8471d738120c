"""Our own process group over the ranks of a user's group: its collectives, and how ranks share errors."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ...loop.guard import ForkSafeLock
from ...torch_private.distributed import group_timeout, new_group, taken_devices
from .faults import Fault, losing_peers

T = TypeVar("T")

#: torch 2.13 has a new name and warns about the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: Extra timeout of our group beyond the user's. A rank that left ``swapped_into`` early waits in our group, while a
#: peer may wait for it in the user's group. The peer must time out first, and then joins. Less than a second, since
#: torch's FileStore rounds timeouts up to whole seconds.
GRACE = timedelta(seconds=0.9)


class Ranks:
    """Our own process group over the ranks of a user's group, so that our collectives cannot mix with the user's.

    There is one for each of the user's groups; get it from ``rendezvous.shared_ranks``. Construction is collective.

    Args:
        process_group: the user's group; None: the default group.
        name: the name of the new group, the same on all ranks. It must be new, since a failed attempt leaves addresses
            under its name in the store.
        ranks: only these of its ranks, this one included; default: all.
        call: the user's call that makes it, for the message of an error.

    Raises:
        TypeError: ``process_group`` is not a process group.
        ValueError: ``torch.distributed`` is not initialised, or this rank is not in the group.
        LostPeerError: a rank died, or did not make its own.
    """

    def __init__(
        self, process_group: ProcessGroup | None, name: str, ranks: Sequence[int] | None = None, call: str = "this"
    ) -> None:
        parent = checked_group(process_group)
        self.rank = dist.get_rank()
        self.ranks = tuple(sorted(ranks)) if ranks is not None else tuple(dist.get_process_group_ranks(parent))
        if self.rank not in self.ranks:
            raise ValueError(f"process_group must hold this rank, {self.rank}, got one of {list(self.ranks)}")
        self.name = name
        #: Held during a collective, or several that belong together, since threads share the group.
        self.lock = ForkSafeLock()
        self._fault = Fault(call)
        self._numbers = itertools.count()
        # A weak reference, so that we do not keep alive a group that the user has destroyed.
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
        # A group that does not tell, such as one that a package wraps, takes all of them.
        self._device_types = taken_devices(self.group) or ["cpu"]

    def subgroup(self, ranks: Sequence[int]) -> Ranks:
        """Return the group over some of these ranks, this one included; made on first use. Collective among them."""
        key = tuple(sorted(ranks))
        if key not in self._subgroups:
            parent = self._parent() if self._parent is not None else None
            with self._fault.noted(self.ranks):  # if this fails, all ranks are out of lockstep
                self._subgroups[key] = subgroup = Ranks(parent, f"{self.name} {key}", key, self._fault.call)
            subgroup._fault, subgroup.lock = self._fault, self.lock
        return self._subgroups[key]

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def index(self) -> int:
        """This rank's index in ``ranks``."""
        return self.ranks.index(self.rank)

    def device_for(self, device: torch.device) -> torch.device:
        """Return the device on which the collectives take a tensor: ``device``, or a GPU if a group takes no others.

        NCCL does not, for averages that are in the host's memory.
        """
        if device.type != "cpu":
            return device
        try:
            dist.get_backend(self.group)  # raises if the group is gone
        except TypeError as error:  # torch 2.6; later ones raise a ValueError
            raise ValueError("the process group was destroyed") from error
        if "cpu" in self._device_types:
            return device
        other = self._device_types[0]
        return torch.device(other, torch.get_device_module(other).current_device())

    def next_number(self) -> int:
        """Return a new number for an averaged model; it is the same on all ranks, which construct in one order."""
        return next(self._numbers)

    @property
    def is_lost(self) -> bool:
        """Whether collectives of this group have failed, so that no more may run."""
        return self._fault.reason is not None

    # Collectives

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of ranks; for small picklable objects, not for tensors."""
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
        """Sum in place on the first rank; the tensors of other ranks are undefined afterwards."""
        self._run(tensor, partial(dist.reduce, dst=self.ranks[0], op=dist.ReduceOp.SUM))

    def broadcast_(self, tensor: Tensor) -> None:
        """Write the first rank's values into every other rank's tensor."""

        def as_bytes(there: Tensor, group: ProcessGroup) -> None:
            # gloo does not take int16, float8 and the wider unsigned dtypes.
            dist.broadcast(there.view(-1).view(torch.uint8), self.ranks[0], group=group)

        if tensor.numel() > 0:
            self._run(tensor, as_bytes)

    def _run(self, tensor: Tensor, collective: Callable[..., object]) -> None:
        """Run an in-place collective on a tensor, if needed on a copy on another device that is copied back."""
        if self.size == 1:
            return
        with self._heard():
            there = tensor.to(self.device_for(tensor.device)).contiguous()
            collective(there, group=self.group)
        if there is not tensor:
            tensor.copy_(there)

    def sums(self, values: Iterable[int], device: torch.device | str = "cpu") -> list[int]:
        """Return the sums of int64 values over all ranks, element by element, computed on ``device``."""
        total = torch.tensor(list(values), dtype=torch.int64, device=device)
        self.sum_(total)
        return list(map(int, total.tolist()))

    def all_gather(self, received: Tensor, sent: Tensor) -> None:
        """Fill ``received`` with ``sent`` of all ranks, in order. All have one size, on :meth:`device_for`'s device."""
        with self._heard():
            _all_gather(received, sent, group=self.group)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        with self.lock, self.in_lockstep(), losing_peers(self.ranks, self._fault.call):
            yield

    def begin(self, call: str) -> None:
        """Note the user's call that runs the next collectives, for the message of an error. So does :meth:`settled`."""
        self._fault.call = call

    @contextmanager
    def in_lockstep(self) -> Iterator[None]:
        """Run a body with collectives that all ranks run alike. After an error in it, no more collectives run.

        After the error, peers wait in another collective than this rank's next one. If the two met, values would be
        wrong, or the process would end.

        Raises:
            LostPeerError: such an error has happened before.
        """
        with self._fault.noted(self.ranks):
            yield

    # Agreement of ranks

    def settled(self, what: str, number: int | None = None) -> AbstractContextManager[None]:
        """Run the body on every rank, and raise on every rank if it failed on one. Collective.

        A rank raises its own error if it has one, else a RuntimeError that names the first rank that failed.

        Args:
            what: the name of the call, which must be the same on all ranks.
            number: of the averaged model, from :meth:`next_number`; likewise.
        """
        return self._settled(what, number, (), "")

    @contextmanager
    def _settled(self, what: str, number: int | None, counters: Sequence[Tensor], anew: str) -> Iterator[None]:
        """Do the same, and raise RuntimeError on every rank if counts of ``counters``, or ``anew``, differ."""
        self._fault.refuse()
        self.begin(what)
        error: BaseException | None = None
        counts: list[int] = []
        try:
            counts = list(map(int, counters))
            yield
        except BaseException as raised:  # an interrupt too, since peers wait
            error = raised
        try:
            message = None if error is None else f"{type(error).__name__}: {error}"
            calls = self.gather((what, number, (counts, anew), message))
        finally:
            if error is not None:
                raise error
        if len({(call, of) for call, of, _, _ in calls}) > 1:
            got = ", ".join(
                call + (f" of average {of}" if of is not None else "") + f" on rank {rank}"
                for rank, (call, of, _, _) in zip(self.ranks, calls, strict=True)
            )
            raise RuntimeError(f"all ranks must make the same call, got {got}")
        for rank, (_, _, _, message) in zip(self.ranks, calls, strict=True):
            if message is not None:
                raise RuntimeError(f"{what} failed on rank {rank}, and so on every rank: {message}")
        self._require_same_counts(what, [tuple(counts) for _, _, (counts, _), _ in calls])
        buffers = [theirs for _, _, (_, theirs), _ in calls]
        if len(set(buffers)) > 1:
            got = ", ".join(
                f"{theirs or 'none'} on rank {rank}" for rank, theirs in zip(self.ranks, buffers, strict=True)
            )
            raise RuntimeError(
                f"{what} needs the same buffers on every rank, got as made anew since construction {got}: leave them "
                "out of states with persistent=False"
            )

    def leave(self, what: str, number: int) -> None:
        """Wait until all ranks leave the same context of an averaged model. Collective.

        A rank whose body has raised comes early. If its peers make another call meanwhile, that raises on them, as the
        ranks do not make the same call. Then they leave too.

        Raises:
            RuntimeError: another rank leaves another context.
        """
        self.begin(what)
        call = f"leaving {what}"
        with self.in_lockstep():
            while True:
                others = {(theirs, of) for theirs, of, *_ in self.gather((call, number, ((), ""), None))}
                if others == {(call, number)}:
                    return
                if others - {(call, number)} <= {each for each in others if each[0] == call}:
                    raise RuntimeError(f"all ranks must leave the same average, got {sorted(of for _, of in others)}")

    def _require_same_counts(self, what: str, everyone: Sequence[tuple[int, ...]]) -> None:
        ranks_of: dict[tuple[int, ...], list[int]] = {}
        for rank, counts in zip(self.ranks, everyone, strict=True):
            ranks_of.setdefault(counts, []).append(rank)
        if len(ranks_of) > 1:
            got = " and ".join(
                f"{', '.join(map(str, counts))} on {f'rank {ranks[0]}' if len(ranks) == 1 else f'ranks {ranks}'}"
                for counts, ranks in ranks_of.items()
            )
            raise RuntimeError(
                f"{what} needs the same n_averaged on every rank, got {got}: call update_parameters on every rank, not "
                "on the first alone"
            )

    def agree(self, what: str, described: Mapping[str, object]) -> None:
        """Raise ValueError with the first difference on every rank unless all descriptions are equal. Collective.

        Ranks exchange digests, and the descriptions themselves only if digests differ.
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


class Counting:
    """Ranks that compare the counts of their averages in the actions that they take together.

    It is a :class:`~swafast.loop.guard.Together`, for actions that use averages. A load sets the counts, so it does not
    compare them.

    Args:
        anew: the copied buffers that the models have made anew, which must be the same too.
    """

    def __init__(self, ranks: Ranks, counters: Sequence[Tensor], anew: str = "") -> None:
        self.lock, self._ranks, self._counters, self._anew = ranks.lock, ranks, counters, anew

    def settled(self, what: str, number: int | None = None) -> AbstractContextManager[None]:
        return self._ranks._settled(what, number, self._counters, self._anew)


def checked_group(process_group: object) -> ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("process_group must exist, got none: call torch.distributed.init_process_group before")
    if process_group is None:
        process_group = dist.group.WORLD
    elif process_group is dist.GroupMember.NON_GROUP_MEMBER:  # new_group returns it on ranks outside the group
        raise ValueError(f"process_group must hold this rank, {dist.get_rank()}, got one of others")
    if not isinstance(process_group, ProcessGroup):
        raise TypeError(f"process_group must be a ProcessGroup or None, got {type(process_group).__name__}")
    return process_group


class OneProcess(Ranks):
    """The ranks of a single process without a process group: this one, which meets nobody."""

    def __init__(self) -> None:
        self.rank, self.ranks, self.name, self.group = 0, (0,), "", None
        self.lock, self._fault, self._numbers = ForkSafeLock(), Fault("this"), itertools.count()
        self._subgroups = {self.ranks: self}

    def device_for(self, device: torch.device) -> torch.device:
        return device
