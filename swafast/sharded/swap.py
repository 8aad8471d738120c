"""The exchange of a sharded model's params with their averages, there and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from ..loop.swaps import DISCARDED, broadcasts_buffers
from ..op.exchange import Exchange, Located
from ..terms.names import canonical, unwrap
from ..torch_private import distributed as private
from ..torch_private.modules import named_tensors
from .parts.all_gather import AllGather
from .parts.faults import LostPeerError
from .parts.holdings import Held, free_gathered, reshard, written_while_gathered
from .shard_matching import Bound, Views

NOT_WHOLE = (
    "this rank's averages and its own part of the params are whole; the params that other ranks average are not: load "
    "them from a checkpoint"
)


class ShardedExchange(Exchange):
    """Each rank exchanges its own part, then cut params are gathered from all their ranks.

    A rank sends the values in its own part of the params: the averages on the way there, the params on the way back.
    So no rank keeps a copy of the params that others average.

    Args:
        leave: waits until all ranks go back; None if the all-gathers do not need all of them.
    """

    _params: Views
    _call = "swapped_into"  # the user's

    def __init__(
        self,
        model: Module,
        bound: Bound,
        binding: Located,
        all_gathers: Sequence[AllGather],
        held: Mapping[str, Held],
        leave: Callable[[], object] | None,
    ) -> None:
        self._leave = leave
        # `held` keeps the current memory. If the body replaces a tensor on one rank, others must not get its values.
        self._model, self._all_gathers, self._held = unwrap(model), all_gathers, held
        self._is_zero = bound[1].locator.for_use
        if self._is_zero:
            self.written_elsewhere = self._written_while_gathered
            self._masters = bound[1].locator.masters()
            self.beside = [master for _, master in self._masters]
        super().__init__(*bound, binding, ignore_buffers=broadcasts_buffers(model))
        self._all_there = False  # while False, back() runs no collective

    def gather(self) -> None:
        """Gather all averages into the params of all ranks. Each rank must have called :meth:`there` before.

        Raises:
            LostPeerError: a rank was lost. The message says so if params are not whole.
        """
        self._versions = None  # also if it is broken off, writes are our own
        gather_all(self._all_gathers, self._held, self._call, "could not put all averages into the model")
        self._all_there = True
        self.watch()

    def _written_while_gathered(self) -> dict[str, str]:
        return dict.fromkeys(map(repr, written_while_gathered(self._model)), DISCARDED)

    def back(self) -> None:
        """Put the params back: this rank's own part and its averages in any case, then the parts of other ranks.

        Raises:
            RuntimeError: a rank was lost, or what was lost of this rank's own part is named.
        """
        if not self.is_back:
            try:
                private.end_forward(self._model)
                reshard(self._model)
                if self._is_zero:
                    free_gathered(self._model, lossless=False)
            finally:
                super().back()

    def _fill_in(self) -> None:
        if self._all_there:
            self._all_there = False
            failed = "could not put all params back"
            gather_all(self._all_gathers, self._held, self._call, failed, torn=True, meet=self._leave)

    def _bases(self) -> Sequence[Tensor]:
        return self._params.bases

    def _averaged(self) -> list[tuple[str, Tensor, bool]]:
        # Writes into DTensors and into the params of FSDP1 are not counted in the bases, nor those into local tensors
        # in the DTensors.
        own = self._params.averaged
        found = [
            (canonical(name), tensor, is_buffer)
            for is_buffer in (False, True)
            for name, tensor in named_tensors(self._model, buffers=is_buffer)
            if canonical(name) in own or name.endswith("_flat_param")
        ]
        if self._is_zero:
            found += [(name, base, False) for name, base in self._params.locator.runs(self._params.bases)]
            found += [(name, master, False) for name, master in self._masters]
        parted = [each for each in found if isinstance(each[1], DTensor)]
        local = private.local_tensors([tensor for _, tensor, _ in parted])  # type: ignore[misc]
        return [*found, *((name, each, is_buffer) for (name, _, is_buffer), each in zip(parted, local, strict=True))]

    def _addresses_of(self, watched: Sequence[Tensor]) -> list[int]:
        # A DTensor has no address of its own.
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in watched]
        return super()._addresses_of(local)

    def _params_in(self, bases: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._params.on(bases)

    def _views(self) -> Sequence[tuple[Any, ...]]:
        return [*self._params.base_views, *self._plan.plane_views]

    def _name(self, base: int) -> str:
        return repr(self._params.locator.share_in(base).name)

    def _is_copied_buffer(self, base: int) -> bool:
        share = self._params.locator.share_in(base)
        return share.format is None and share.holding.is_buffer


def gather_all(
    all_gathers: Sequence[AllGather],
    held: Mapping[str, Held],
    call: str,
    failed: str,
    *,
    torn: bool = False,
    meet: Callable[[], object] | None = None,
) -> None:
    """Run all all-gathers. If one fails and params are not whole afterwards, the error's message says so.

    Args:
        call, failed: the user's call and what it could not do, which begin that message.
        torn: whether params are not whole if nothing was received from other ranks either.
        meet: called before, to wait for other ranks.

    Raises:
        LostPeerError: a rank was lost. An interrupt keeps its type and has the same message.
    """
    done = 0
    try:
        if meet is not None:
            meet()
        with ExitStack() as ranks:
            for each in all_gathers:
                ranks.enter_context(each.ranks.in_lockstep())
                each.ranks.begin(call)
            for each in all_gathers:
                each.fill(held)
                done += 1
    except BaseException as error:
        if not (torn or done or any(each.torn for each in all_gathers)):
            raise
        kind = LostPeerError if isinstance(error, Exception) else type(error)
        raise kind(f"{call} {failed}: {error}; {NOT_WHOLE}") from error
