"""A sample is drawn: written into a model's params, for a while or for good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import Pair
from ..loop.swaps import DISCARDED, INTO_OWN
from ..terms.converting import convert
from ..terms.copying import write_once
from ..terms.draws import Draws
from ..terms.samples import Sample
from ..torch_private.modules import named_tensors
from . import launches
from .checks import overlaps
from .exchange import Exchange
from .plan import Plan, bump_versions

#: Returns what the normal numbers of a pair depend on, besides the sample's index.
DrawsOf = Callable[[Pair], Draws]


@dataclass(frozen=True)
class Drawing:
    """A sample, and the seed that its normal numbers go by."""

    sample: Sample
    seed: int
    draws_of: DrawsOf


def draw(plan: Plan, params: Sequence[Tensor], planes: Sequence[Tensor], drawing: Drawing) -> None:
    """Write a sample into the params that have a spread, and the averages or copies into all others."""
    for pair in reversed(plan.pairs(params, planes)):
        if not pair.spread_planes:
            _write(pair)
    for work in _prepared(plan, params, planes, drawing):
        given = [params[index] for index in work.indices] if work.takes_tensors else ()
        work.launch.draw(given, drawing.sample)


def draw_for_good(plan: Plan, params: Sequence[Tensor], planes: Sequence[Tensor], drawing: Drawing) -> None:
    """Do the same, and write what torch copies, too; autograd learns of all writes."""
    try:
        draw(plan, params, planes, drawing)
    finally:
        bump_versions([param.detach() for param in params])
    if plan.copies is not None:
        plan.copies.copy_to()


def _write(pair: Pair) -> None:
    if pair.format is None:
        write_once(pair.param, pair.average)
    else:
        convert(pair.planes, pair.format, (pair.param.detach(),), None)


def _prepared(
    plan: Plan, params: Sequence[Tensor], planes: Sequence[Tensor], drawing: Drawing
) -> Sequence[launches.Work]:
    """Return the work of a draw. The plan keeps that of the last seed: both fit tensors at the same addresses alone."""
    made = plan.drawn
    if made is None or made[0] != drawing.seed:
        pairs = plan.pairs(params, planes)
        chosen = drawn_indices(pairs)
        drawn = [replace(pairs[i], draws=drawing.draws_of(pairs[i])) for i in chosen]
        works = launches.prepare(drawn, plan.chosen) if drawn else []
        made = plan.drawn = (
            drawing.seed,
            [replace(work, indices=tuple(chosen[index] for index in work.indices)) for work in works],
        )
    return made[1]


def drawn_indices(pairs: Sequence[Pair]) -> list[int]:
    """Return the indices of the pairs of which a sample writes the param: those that have a spread."""
    # The model may tie params that the averaged module does not: the first average stays.
    second = {max(both) for both in overlaps([pair.param] for pair in pairs)}
    return [i for i, pair in enumerate(pairs) if pair.spread_planes and i not in second]


class DrawsSample(Exchange):
    """Puts a sample into the model. Its params and buffers are copied aside, once, and come back.

    The averages stay as they are. The model's buffers begin with those of the averages, and may be written: BatchNorm
    needs new statistics for each sample.
    """

    _in_place = False
    _end_of_params, _end_of_planes = DISCARDED, INTO_OWN
    _watches_buffers = False

    def __init__(self, drawing: Drawing, *args: Any, **options: Any) -> None:
        self._drawing = drawing
        super().__init__(*args, **options)

    @torch.no_grad()
    def _put(self) -> None:
        planes = self.tensors[len(self.tensors) - self._num_planes :]
        draw(self._plan, self._params, planes, self._drawing)


class PlacesPoint(DrawsSample):
    """Puts a point into the model as a sample, and sets the gradients of its params aside, for those at the point."""

    _gradients: Sequence[tuple[Tensor, Tensor | None]] = ()

    def there(self) -> None:
        root = self._binding.root
        params = [param for _, param in named_tensors(root)] if root is not None else []
        self._gradients = [(param, _kept(param.grad)) for param in params if param.is_leaf]
        for param, _ in self._gradients:
            param.grad = None
        super().there()

    def back(self) -> None:
        try:
            super().back()
        finally:
            for param, gradient in self._gradients:
                param.grad = _fitting(gradient, param)


def _fitting(gradient: Tensor | None, param: Tensor) -> Tensor | None:
    """Return a gradient for a param that was cast or moved meanwhile, or None if it has another shape now."""
    if gradient is None or gradient.shape != param.shape:
        return None
    return gradient.to(device=param.device, dtype=param.dtype)  # the gradient itself, if both are alike


def _kept(gradient: Tensor | None) -> Tensor | None:
    """Return a gradient, or a copy if it lies in a larger tensor: in its buckets DDP writes those at the point."""
    if type(gradient) is not Tensor or gradient.layout != torch.strided:
        return gradient
    return gradient.clone() if gradient.untyped_storage().nbytes() > gradient.nbytes else gradient
