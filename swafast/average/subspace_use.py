"""Subspaces of an averaged model's deviations: made, placed in the model that is trained, and gradients there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Module

from ..loop import swaps
from ..loop.guard import Guard, seamless
from ..op.drawing import Drawing, PlacesPoint, drawn_indices
from ..terms.samples import Sample
from .bindings import Bound
from .sampling import HasSamples, Sampled
from .subspace import (
    Subspace,
    checked_rank,
    gram,
    in_order_of,
    made_of_deviations,
    principal_directions,
    products,
    refuse_without_gradients,
)


class HasSubspaces(HasSamples):
    """Base class of one averaged model of whose deviations a subspace may be made."""

    def _check_spans(self) -> int:
        """Return how many deviations are there.

        Raises:
            RuntimeError: there are fewer than two.
        """
        if self._deviations is None or not self._deviations.count:
            kind = (
                "without deviations"
                if self._deviations is None
                else "that has dropped them, or keeps the variance alone"
            )
            raise RuntimeError(
                f"a subspace must be of an average with deviations, got one {kind}: construct it with deviations=20"
            )
        count = int(self.n_averaged)
        if count < 2:
            raise RuntimeError(
                f"a subspace must wait until two models are in the average, got {count}: the first deviation is 0. "
                "Call update_parameters(model) once an epoch"
            )
        return min(count, self._deviations.count)

    def _spans(self) -> object:
        """Return what changes whenever the columns do, or the mean. Reads the count, so it waits for a GPU."""
        return int(self.n_averaged), self._times_set, self._deviations

    def _gram(self, count: int) -> Tensor:
        return gram((planes[1 : 1 + count] for planes in self._spread_planes()), count)

    def _placing(self, sample: Callable[[], Sample]) -> Drawing:
        return Drawing(sample(), self.seed, self._draws_of(self.seed))

    def _refuse_unplaced(self, model: Module) -> None:
        guard = self._guard
        if guard.model is not model or guard._call != "placed_into":
            raise RuntimeError(
                "gradient must be called while the model is placed, got a model that is not: write it inside `with "
                "subspace.placed_into(model, t):`, after loss.backward()"
            )

    if TYPE_CHECKING:
        _guard: Guard


class Placed(HasSubspaces, Sampled):
    """Base class of one averaged model in one process: its subspaces."""

    def subspace(self, rank: int) -> Subspace:
        """Return the subspace of the ``rank`` directions in which the deviations vary most: their principal components.

        ``params = average + sum of t[i] * s[i] * v[i]``, with the largest singular values s and vectors v of
        ``D / sqrt(k - 1)`` for the k deviations D that are there. They come from the k x k inner products of the
        deviations, in float64; a point takes no memory. The next update or load ends the subspace. Waits for a GPU.

        Args:
            rank: how many directions, such as 5.

        Raises:
            TypeError: ``rank`` is not an int.
            ValueError: ``rank`` is less than 1, or more than the number of independent deviations; or they are not
                finite.
            RuntimeError: there are no deviations, or fewer than two models; or the averages are swapped into a model.

        Paper: Izmailov et al. 2019, "Subspace Inference for Bayesian Deep Learning", arXiv:1907.07504.
        """
        with self._guard.hold("subspace"):
            wanted = checked_rank(rank)
            of_columns = self._gram(self._check_spans())
            return made_of_deviations(self, *principal_directions(of_columns, wanted), int(self.n_averaged))

    @seamless
    def _placed_into(self, model: Module, sample: Callable[[], Sample], spelled: str) -> Iterator[Module]:
        swap = swaps.Swap(self._guard, self, model, call="placed_into")
        try:
            try:
                with self._guard.hold("placed_into", written=model):
                    drawing = self._placing(sample)
                    plan, params, planes = self._bind(model)
                    plan.writable_pairs(params, planes)
                    swap.enter(PlacesPoint(drawing, plan, params, planes, self._bindings.latest))
                yield model
            finally:
                swap.leave()
        finally:
            swap.finish()  # whatever an interrupt has left

    def _products_with_gradients(self, model: Module, count: int) -> Tensor:
        with self._guard.locked():
            self._refuse_unplaced(model)
            plan, params, planes = self._bind(model)
            pairs = plan.pairs(params, planes)
            drawn = [pairs[index] for index in drawn_indices(pairs)]
            refuse_without_gradients(any(pair.param.grad is not None for pair in drawn))
            return products(
                (
                    (in_order_of(pair.param.grad, pair.param.detach()), pair.spread_planes[1 : 1 + count])
                    for pair in drawn
                    if pair.param.grad is not None
                ),
                count,
            )

    if TYPE_CHECKING:
        _bindings: Any

        def _bind(self, model: Module) -> Bound: ...
