"""Updates of a sharded model's averages, by `update_parameters` or by `attach`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from ..average.bindings import Bindings
from ..loop import swaps
from ..loop.attach import Attachable
from ..loop.runners import Ready
from ..op import choice
from ..op.plan import Plan
from ..terms import habits
from ..terms.copying import bytes_of
from ..terms.lazy import MadeOnUse
from ..torch_private.core import disable_dynamo
from .hosting import HostStaging, move_to_host, refuse_all_reduce
from .parts.ranks import Counting, Ranks
from .shard_matching import Bound, bind_shards
from .shard_side import ShardSide
from .staging import Staging


def _on_its_memory(bound: Bound, sides: Sequence[ShardSide]) -> Bound:
    """Return a bound plan, or a new one if memory has moved in its storage since, as ``share_memory()`` does."""
    plan, views, planes = bound
    counters = [side.n_averaged for side in sides]
    if plan.fits(views, planes, counters):
        return bound
    each = len(views) // len(sides)
    pairs = [
        sides[index // each]._pair(share, view, index // each)
        for index, (share, view) in enumerate(zip(views.shares, views, strict=True))
    ]
    backends = choice.choose_backends(vars(sides[0])["backend"], choice.device_types(pairs))
    made = Plan(pairs, backends, counters, frozenset(map(Tensor.data_ptr, planes)))
    made.copies = plan.copies
    return made, views, planes


class Flag:
    """Sets a flag on all ranks if it is set on one: a :class:`~swafast.backends.contract.ReduceFlag`.

    The averaged model's number is sent with it, so that no rank takes the flag of another average for its
    own, if ranks update averages in different orders.

    Args:
        number: from :meth:`Ranks.next_number`.
    """

    def __init__(self, ranks: Ranks, number: int) -> None:
        self._ranks, self._number = ranks, number

    def _reduced(self, flag: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether any rank has set it, and whether all ranks have sent this average's number."""
        self._ranks.begin("update_parameters")
        largest_and_smallest = torch.full((2,), 2 * self._number, dtype=torch.int64, device=flag.device)
        largest_and_smallest[1].neg_()
        largest_and_smallest[0].add_(flag != 0)
        self._ranks.max_(largest_and_smallest)
        largest, smallest = largest_and_smallest.unbind()
        return largest & 1, (largest >> 1 == self._number) & (smallest == -2 * self._number)

    def __call__(self, flag: Tensor) -> None:
        """Set ``flag`` if any rank has set it, or if any rank is in the update of another average. Collective."""
        if self._ranks.size > 1:
            is_set, is_ours = self._reduced(flag)
            flag.copy_(torch.where(is_ours, is_set, 1))

    def anywhere(self, found: bool, device: torch.device) -> bool:
        """Return whether ``found`` is true on any rank. Collective.

        Raises:
            RuntimeError: another rank was in the update of another average. Every rank raises it.
        """
        if self._ranks.size == 1:
            return found
        with self._ranks.in_lockstep():
            is_set, is_ours = self._reduced(torch.full((), found, device=device))
            if not is_ours:
                raise RuntimeError(
                    "ranks must update averages that share a process group in one order, got another average on "
                    "another rank: if threads update averages, give each thread a process group of its own"
                )
        return bool(is_set)


class AttachableShards(Attachable):
    """Base class of averages of shards. An overlapped update binds the shards before a forward gathers the params.

    ``attach`` is collective, since ranks that update after different steps would hold shards of different averages.
    """

    _bindings = MadeOnUse[Bindings](lambda self: Bindings())
    _meant = habits.OF_SHARDS
    _flag = MadeOnUse[Flag](lambda self: Flag(self._ranks, self._number))

    @disable_dynamo
    def update_parameters(self, model: Module) -> None:
        """Move this rank's averages towards ``model``'s parameters in one pass, and count the update.

        The first update copies. With the default ``nonfinite`` it is not collective, and with a rule of this package
        the host then does not wait for a GPU.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError: names, shapes, kinds of dtype, meshes or placements are not those of the construction; or, with
                ``nonfinite="raise"``, a parameter holds a NaN or an infinity on some rank. The message names the
                parameter, and nothing has changed.
            RuntimeError: averages are swapped into a model; or, with ``"raise"`` or ``"skip"``, a rank was lost.
        """
        with self._guard.hold("update_parameters", read=model):
            if swaps.in_force and isinstance(model, Module):
                swaps.refuse_model("update_parameters", model)
            self._update(self._bind(model), self.nonfinite)

    def _bind(self, model: Module, staging: Staging | None = None, *, for_use: bool = False) -> Bound:
        return bind_shards(self._bindings, model, self._updated, staging, for_use=for_use)

    def _update(self, bound: Bound, nonfinite: str) -> None:
        """Run an update of a bound plan. The calling thread holds the averages."""
        plan, params, planes = bound
        if nonfinite == "raise":
            self._refuse_nonfinite(plan, params)
        sides, skip = self._updated, nonfinite == "skip"
        rules = [side.rule for side in sides]
        plan.update(params, planes, rules, skip_nonfinite=skip, reduce_flag=self._flag if skip else None)
        for side in sides:
            if side._uncounted is not None and not side._uncounted.is_updated:
                side._note_update()

    def _refuse_nonfinite(self, plan: Plan, params: Sequence[Tensor]) -> None:
        """Raise ValueError on every rank if a param on one of them holds a NaN or an infinity; name it. Collective."""
        name = plan.first_nonfinite(params)
        if self._flag.anywhere(name is not None, self._updated[0].n_averaged.device):
            names = zip(self._ranks.ranks, self._ranks.gather(name), strict=True)
            rank, first = next((rank, name) for rank, name in names if name is not None)
            raise ValueError(
                f"{first!r} must be finite, got a NaN or an infinity on rank {rank}; the average has not changed"
            )

    @property
    def _counting(self) -> Counting:
        """The ranks, for actions that use the averages."""
        return Counting(self._ranks, [side.n_averaged for side in self._updated])

    @property
    def _saving(self) -> Counting:
        """The ranks, for actions that save the averages: they also compare which buffers were made anew."""
        anew = [f"{name} {what}" for side in self._updated for name, what in sorted(side._anew.items())]
        return Counting(self._ranks, [side.n_averaged for side in self._updated], ", ".join(anew))

    @property
    def nbytes(self) -> int:
        """The bytes of all averages and buffers on this rank."""
        all_planes = (planes for side in self._updated for _, planes in side._stored())
        return sum(bytes_of(plane) for planes in all_planes for plane in planes)

    def __reduce__(self) -> Any:
        name = f"a {type(self).__name__}"
        raise TypeError(f"{name} belongs to its process group and cannot be copied or pickled: save its state_dict()")

    def _on_all_ranks(self, action: str) -> AbstractContextManager[None]:
        return self._counting.settled(action)

    def _agree(self, described: Mapping[str, str]) -> None:
        self._ranks.agree("the arguments of attach", described)

    def _of_any_rank(self, states: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the states that ranks have found; tools that load on the first rank alone leave others without."""
        return {name: state for each in self._ranks.gather(states) for name, state in each.items()}

    def _own_tensors(self) -> list[Tensor]:
        planes = (plane for side in self._updated for _, planes in side._stored() for plane in planes)
        return [*planes, *(side.n_averaged for side in self._updated)]

    def _move_to_host(self) -> None:
        move_to_host(self, self._updated)

    def _beside(
        self, model: Module, device: torch.device | None = None, streams: Sequence[torch.cuda.Stream] = ()
    ) -> Ready:
        way: tuple[str, object, object] = ("overlap", False, True) if device is None else ("offload", None, "cpu")
        refuse_all_reduce(self.nonfinite, *way)
        staging = Staging() if device is None else HostStaging(streams)

        def ready() -> tuple[Callable[[], None], list[object]]:
            refuse_all_reduce(self.nonfinite, *way)  # it may have been set since
            with self._guard.hold("update_parameters"):
                plan, params, planes = bound = self._bind(model, staging)
            return partial(update, bound), [*plan.memory(params.bases, planes), *staging.read]

        def update(bound: Bound) -> None:
            with self._guard.hold("update_parameters"):
                self._update(_on_its_memory(bound, self._updated), "propagate")

        return ready

    if TYPE_CHECKING:
        nonfinite: str
        _ranks: Ranks
        _number: int

        @property
        def _updated(self) -> Sequence[ShardSide]: ...  # the averages that an update moves, one or several
