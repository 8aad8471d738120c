"""Subspaces of the deviations of one averaged model of shards: made by all ranks, and gradients over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from ..average.subspace import (
    Subspace,
    checked_rank,
    gram,
    in_order_of,
    made_of_deviations,
    principal_directions,
    products,
    refuse_without_gradients,
)
from .parts.holdings import Held, is_fsdp1, is_zero
from .shard_use import UsableShards


class PlaceableShards(UsableShards):
    """Base class of one averaged model of shards of whose deviations a subspace may be made."""

    def subspace(self, rank: int) -> Subspace:
        """Return the subspace in which the deviations vary most, as :meth:`~swafast.FusedAveragedModel.subspace` does.

        Each rank multiplies its own part of the deviations, and one all-reduce adds up the k x k products. Collective,
        and so are :meth:`~swafast.average.subspace.Subspace.placed_into` and
        :meth:`~swafast.average.subspace.Subspace.gradient`: all ranks pass the same arguments. The scales may differ in
        their last bits from those of an unsharded average, since the sums have another order.

        Args:
            rank: how many directions, such as 5. It is no rank of a process group.

        Raises:
            TypeError, ValueError, RuntimeError: as there, on every rank; or a rank was lost.
        """
        call = f"subspace({rank!r})"
        with self._guard.hold(call, self._counting):
            with self._counting.settled(call, self._number):
                wanted = checked_rank(rank)
                of_columns = gram(self._own_columns(self._check_spans()), self._check_spans())
            with self._ranks.in_lockstep():
                self._ranks.sum_(of_columns)
            with self._counting.settled(call, self._number):
                mixture, scales = principal_directions(of_columns, wanted)
                made = torch.cat((mixture, scales[None]))
            with self._ranks.in_lockstep():
                self._ranks.broadcast_(made)  # another library on one rank may compute other last bits
            return made_of_deviations(self, made[:-1], made[-1], int(self.n_averaged))

    def _own_columns(self, count: int) -> Iterator[Sequence[Tensor]]:
        """Yield the columns of this rank's shares, of those that several ranks average on the first of them alone."""
        for share in self._shares:
            if share.format is not None and share.format.spread is not None and share.counts_on(self._ranks.rank):
                first = share.format.num_planes + 1
                yield self._planes[share.name][first : first + count]

    @torch.no_grad()
    def _products_with_gradients(self, model: Module, count: int) -> Tensor:
        with self._guard.locked(self._ranks.lock):
            with self._counting.settled("gradient", self._number):
                self._refuse_unplaced(model)
                if is_fsdp1(model) or is_zero(model):
                    kind = (
                        "ZeRO-3, which partitions them" if is_zero(model) else "FSDP1, which keeps them in flat params"
                    )
                    raise NotImplementedError(
                        f"gradient must be of a model whose params have gradients of their own, got {kind}: wrap the "
                        "model by fully_shard (FSDP2) or DDP"
                    )
                found = self._own_gradients(model, count)
                own = products(found, count)
                some = torch.tensor(float(len(found)), dtype=torch.float64)
            total = torch.cat((own, some[None]))
            with self._ranks.in_lockstep():
                self._ranks.sum_(total)
            refuse_without_gradients(bool(total[-1] > 0))
            return total[:-1]

    def _own_gradients(self, model: Module, count: int) -> list[tuple[Tensor, Sequence[Tensor]]]:
        """Return this rank's part of each gradient, and of the columns."""
        held = self._find_held(model)
        found: list[tuple[Tensor, Sequence[Tensor]]] = []
        for share in self._shares:
            fmt, each = share.format, held[share.name]
            param = each.found_in
            if fmt is None or fmt.spread is None or share.holding.is_buffer or not isinstance(param, Tensor):
                continue
            gradient = param.grad
            if isinstance(gradient, DTensor) and isinstance(param, DTensor):
                # It may still be a part of a sum. All ranks of the mesh come here, as all have a gradient or none.
                gradient = gradient.redistribute(placements=param.placements).to_local()
            if gradient is not None and share.numel and share.counts_on(self._ranks.rank):
                first = fmt.num_planes + 1
                columns = self._planes[share.name][first : first + count]
                found.append((share.of(in_order_of(gradient, each.local.detach())), columns))
        return found

    if TYPE_CHECKING:

        def _find_held(self, model: Module) -> dict[str, Held]: ...
