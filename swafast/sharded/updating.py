"""Updates of averages of a model that is spread over ranks, called or by `attach`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from ..average.matching import Bindings
from ..loop.attach import Attachable
from ..loop.runners import Ready
from ..op.plan import Plan
from ..terms.lazy import MadeOnUse
from ..torch_private.core import disable_dynamo
from .parts.ranks import Ranks
from .shard_matching import Bound, ShardSide, Staging, bind_shards


class Flag:
    """What makes a flag that is set on one rank so on all: a :class:`~swafast.backends.contract.ReduceFlag`.

    The number of the averaged model goes round in the same element: flags of two averages that ranks update in
    different orders must not be taken for each other.

    Args:
        number: from :meth:`Ranks.next_number`.
    """

    def __init__(self, ranks: Ranks, number: int) -> None:
        self._ranks, self._number = ranks, number

    def _reduced(self, flag: Tensor) -> Tensor:
        reduced = (flag != 0) + 2 * self._number
        self._ranks.max_(reduced)
        return reduced

    def __call__(self, flag: Tensor) -> None:
        """Collective. Where it is the flag of another average on another rank, it is set: nothing is updated then."""
        if self._ranks.size > 1:
            reduced = self._reduced(flag)
            flag.copy_(torch.where(reduced >> 1 == self._number, reduced & 1, 1))

    def anywhere(self, found: bool, device: torch.device) -> bool:
        """Return whether any rank has found it. Collective.

        Raises:
            RuntimeError: on some rank: another one was in the update of another average.
        """
        if self._ranks.size == 1:
            return found
        with self._ranks.in_lockstep():
            number, is_set = divmod(int(self._reduced(torch.full((), int(found), dtype=torch.int64, device=device))), 2)
            if number != self._number:
                raise RuntimeError(
                    "ranks must update averages that share a process group in one order, got another average on "
                    "another rank: give each thread averages of a process group of its own"
                )
        return bool(is_set)


class AttachableShards(Attachable):
    """Averages of what this rank owns: an update is bound to the shards, before a forward gathers them.

    To attach is collective: ranks that updated after other steps would end with shards of other averages.
    """

    _bindings = MadeOnUse[Bindings](lambda self: Bindings())
    _flag = MadeOnUse[Flag](lambda self: Flag(self._ranks, self._number))

    @disable_dynamo
    def update_parameters(self, model: Module) -> None:
        """Move this rank's averages towards ``model``'s parameters in one pass and count the update.

        The first one copies. No collective, unless ``nonfinite`` asks for its one flag, and nothing is read back to the
        host.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: names, shapes, kinds of dtype, meshes or placements are not those at construction; or, with
                ``nonfinite="raise"``, a parameter holds a NaN or an infinity on some rank. It names the parameter, and
                nothing has changed.
            RuntimeError: averages are swapped into a model.
        """
        with self._guard.hold("update_parameters"):
            self._update(self._bind(model))

    def _bind(self, model: Module, staging: Staging | None = None) -> Bound:
        return bind_shards(self._bindings, model, self._updated, staging)

    def _update(self, bound: Bound) -> None:
        """Update what is bound, by the thread that holds the averages."""
        plan, params, planes = bound
        if self.nonfinite == "raise":
            self._refuse_nonfinite(plan, params)
        rules, skip = [side.rule for side in self._updated], self.nonfinite == "skip"
        plan.update(params, planes, rules, skip_nonfinite=skip, reduce_flag=self._flag if skip else None)

    def _refuse_nonfinite(self, plan: Plan, params: Sequence[Tensor]) -> None:
        """Raise ValueError on every rank, naming a param with a NaN or an infinity on one of them. Collective."""
        name = plan.first_nonfinite(params)
        if self._flag.anywhere(name is not None, self._updated[0].n_averaged.device):
            names = zip(self._ranks.ranks, self._ranks.gather(name), strict=True)
            rank, first = next((rank, name) for rank, name in names if name is not None)
            raise ValueError(
                f"{first!r} must be finite, got a NaN or an infinity on rank {rank}; the average is as it was"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the averages and buffers that this rank keeps."""
        all_planes = (planes for side in self._updated for planes in side._planes.values())
        return sum(plane.nbytes for planes in all_planes for plane in planes)

    def __reduce__(self) -> Any:
        name = f"a {type(self).__name__}"
        raise TypeError(f"{name} belongs to its process group and cannot be copied or pickled: save its state_dict()")

    def _on_all_ranks(self, action: str) -> AbstractContextManager[None]:
        return self._ranks.settled(action)

    def _agree(self, described: Mapping[str, str]) -> None:
        self._ranks.agree("the arguments of attach", described)

    def _beside(
        self, model: Module, device: torch.device | None = None, streams: Sequence[torch.cuda.Stream] = ()
    ) -> Ready:
        if device is not None:
            raise NotImplementedError("offload must be None for a model that is spread over ranks, got 'cpu'")
        if self.nonfinite != "propagate":
            raise ValueError(
                f"overlap must be False with nonfinite={self.nonfinite!r}, got True: what ranks settle in an update "
                "would meet the collectives of the next forward"
            )
        staging = Staging()

        def ready() -> Callable[[], None]:
            with self._guard.hold("update_parameters"):
                return partial(update, self._bind(model, staging))

        def update(bound: Bound) -> None:
            with self._guard.hold("update_parameters"):
                self._update(bound)

        return ready

    if TYPE_CHECKING:
        nonfinite: str
        _ranks: Ranks
        _number: int

        @property
        def _updated(self) -> Sequence[ShardSide]: ...  # what an update moves: this average, or several
