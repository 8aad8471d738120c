"""Samples of an averaged model with a spread: SWAG's, drawn into the model that is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from ..loop import swaps
from ..loop.guard import Guard, seamless
from ..op.checks import checked_seed
from ..op.drawing import Drawing, DrawsOf, DrawsSample, draw_for_good
from ..terms.draws import Draws, make_random_key
from ..terms.formats import Format
from ..terms.hints import hinted
from ..terms.plane_names import DEVIATION
from ..terms.rules import EqualAverage, Rule
from ..terms.samples import make_sample
from ..terms.spread import Spread
from ..terms.warn import warn_user
from ..torch_private.modules import own_children
from .bindings import Bound

#: Elements of all variances and deviations from which a drift is estimated.
_DRIFT_NUMEL = 2**18
#: The mean square of the deviations, in variances: it is 1 for models that stand still, and up to 3 for models that all
#: move one way.
_MOST_DRIFT = 1.2


def refuse_spread(spread: Spread | None) -> None:
    """Raise ValueError if there is a spread: a user's own averaging function runs updates, and moves none."""
    if spread is not None:
        raise ValueError(f"deviations must be None with an averaging function of your own, got {spread}: use a Rule")


def check_deviations(spread: Spread | None, rule: Rule | None, num_averaged: int) -> None:
    """Raise ValueError unless an average that begins so can have this spread."""
    if rule is None:
        refuse_spread(spread)
    if spread is not None and num_averaged:
        raise ValueError(
            f"num_averaged must be 0 with deviations, got {num_averaged}: weights alone have no variance. Load a state "
            "that has it"
        )


def refuse_complex(spread: Spread | None, params: Mapping[str, Tensor]) -> None:
    """Raise ValueError if one of the params, by name, is complex, and there is a spread: it would need another one."""
    for name, param in params.items() if spread is not None else ():
        if param.is_complex():
            raise ValueError(
                f"deviations must be None for complex parameters, got {spread} for {name!r} of {param.dtype}: leave it "
                "out by include"
            )


class HasSamples:
    """Base class of one averaged model of which samples may be drawn, if it has a spread."""

    _deviations: Spread | None = None  # on the class, because a subclass may not call our __init__
    _seen_drift: int | None = None  # the count at which it was last estimated; -1: a warning was given

    @property
    def deviations(self) -> Spread | None:
        """The variance and deviations that are kept besides the averages, as given at construction."""
        return self._deviations

    @deviations.setter
    def deviations(self, value: object) -> None:
        raise AttributeError(
            f"deviations must stay {self._deviations}, got {value!r}: construct another average with deviations={value}"
        )

    def _drop_deviations(self) -> bool:
        """Keep the variance alone, as deviations from another mean are wrong. Return whether there were any."""
        if self._deviations is None or not self._deviations.count:
            return False
        self._forget_columns()
        self._deviations = Spread(0)
        self._bindings.plan_anew()
        return True

    def _drawing(self, index: object, scale: object, seed: int | None) -> Drawing:
        """Return the sample with this index. Reads the count, so it waits for a GPU.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`~swafast.FusedAveragedModel.sampled_into`.
        """
        if self._deviations is None:
            raise RuntimeError(
                "a sample must be drawn of an average with a spread, got one without: construct it with deviations=20"
            )
        chosen = self.seed if seed is None else checked_seed(seed)
        sample = make_sample(self._deviations, int(self.n_averaged), index, scale, chosen)
        self._warn_of_drift()
        return Drawing(sample, chosen, self._draws_of(chosen))

    def _draws_of(self, seed: int) -> DrawsOf:
        return lambda pair: Draws(make_random_key(seed, pair.name), tuple(pair.param.shape))

    def _disregard_drift(self) -> None:
        """Warn of no drift from now on: a parameter that began late has less variance than its deviations."""
        self._seen_drift = -1
        self._times_set += 1  # some averages have begun anew

    def _warn_of_drift(self) -> None:
        count = int(self.n_averaged)
        # Other rules weight the variance and not the deviations, so a comparison says nothing.
        if self._seen_drift in (-1, count) or not isinstance(self.rule, EqualAverage):
            return
        self._seen_drift = count
        found = drift([*self._spread_planes()], count)
        if found > _MOST_DRIFT:  # at a scale of 1 / (1 + found), samples vary as much in all as the variance says
            self._seen_drift = -1
            warn_user(
                f"the deviations of the {type(self).__name__} have {found:.1f} times its variance, where weights that "
                "stand still have about 1 times: the weights were still moving one way while they were averaged, and "
                "samples spread along it. Average later, or with a constant learning rate. If the training is over, "
                f"draw with scale={1 / (1 + found):.2g} or less, whichever has the lowest NLL on held-out data, or "
                "load the state without its deviations into an average with deviations=0"
            )

    if TYPE_CHECKING:
        n_averaged: Tensor
        seed: int
        _times_set: int
        _bindings: Any
        rule: Rule | None

        def _spread_planes(self) -> Iterable[Sequence[Tensor]]: ...
        def _forget_columns(self) -> None: ...


@torch.no_grad()
def drift(spreads: Sequence[Sequence[Tensor]], num_averaged: int) -> float:
    """Return the mean square of the k deviations that are there, in variances: ``trace(D D^T) / k / trace(variance)``.

    It is estimated from some elements. The divisor is not k - 1, with which two deviations of models that stand still
    would have twice the variance.

    Args:
        spreads: variance and columns of each param, dense.
    """
    spreads = [[plane.detach() for plane in planes] for planes in spreads if planes[0].numel()]
    spreads = [planes[: 1 + num_averaged] for planes in spreads]
    step = -(-sum(planes[0].numel() * len(planes) for planes in spreads) // _DRIFT_NUMEL)
    device = spreads[0][0].device if spreads else None  # a model may be on several
    some = [
        [plane.as_strided((-(-plane.numel() // step),), (step,)).to(device) for plane in planes] for planes in spreads
    ]
    columns = [column for _, *of_param in some for column in of_param]
    if not columns:
        return 0.0
    variance = torch.cat([planes[0] for planes in some]).sum(dtype=torch.float64)
    mean_square = torch.cat(columns).to(torch.float64).square().sum() / (len(columns) // len(some))
    ratio = float(mean_square / variance) if variance > 0 else 0.0
    return ratio if math.isfinite(ratio) else 0.0  # an overflow is no drift


class Sampled(HasSamples):
    """Base class of one averaged model in one process: its samples."""

    @seamless
    @hinted
    def sampled_into(
        self, model: Module, index: int, *, scale: float | None = None, seed: int | None = None
    ) -> Iterator[Module]:
        """Run ``model`` on a sample of SWAG: ``with averaged.sampled_into(model, 3) as sample: predict(sample)``.

        The sample is ``average + sqrt(scale) * (sqrt(variance) * z1 + D z2 / sqrt(k - 1))`` with normal numbers z1 for
        each element and z2 for each of the k deviations D that are there. The same index and seed give the same bits on
        every backend and on any number of ranks. Each parameter is rounded once, to its own dtype.

        Buffers begin with those of the average and may be written in the body: BatchNorm needs new statistics for each
        sample, by ``update_bn(loader, sample)``. Params must not be written. On leaving, after an exception too, params
        and buffers are back, bit for bit. Until then the averaged model must not be used.

        Args:
            index: which sample, from 0 to 2^32 - 1. Members of a MultiSWAG with one seed share their random numbers,
                so go on with the index from one member to the next.
            scale: of the covariance; default: 1/2, as in the paper, and 1 without deviations (SWAG-diagonal).
            seed: of the normal numbers, any int, which is hashed; default: that of the construction, which is 0 by
                default. torch's random state is neither used nor changed.

        Raises:
            TypeError, ValueError: ``index``, ``scale`` or ``seed`` is not as above, or ``model`` does not fit the
                averages; nothing has changed.
            RuntimeError: the average has no spread or holds fewer than two models; the averages are swapped in already;
                or, on leaving, a param was written. The params are back then.
        """
        swap = swaps.Swap(self._guard, self, model, call="sampled_into")
        try:
            try:
                with self._guard.hold("sampled_into", written=model):
                    drawing = self._drawing(index, scale, seed)
                    plan, params, planes = self._bind(model)
                    plan.writable_pairs(params, planes)
                    swap.enter(DrawsSample(drawing, plan, params, planes, self._bindings.latest))
                yield model
            finally:
                swap.leave()
        finally:
            swap.finish()  # whatever an interrupt has left

    @hinted
    def sample_to(self, model: Module, index: int, *, scale: float | None = None, seed: int | None = None) -> None:
        """Write a sample into ``model`` for good, and the average's buffers. See :meth:`sampled_into`.

        Raises:
            TypeError, ValueError, RuntimeError: as there; nothing has changed.
        """
        with self._guard.hold("sample_to", written=model):
            drawing = self._drawing(index, scale, seed)
            plan, params, planes = self._bind(model)
            if swaps.in_force:
                swaps.refuse_model("sample_to", model)
            plan.writable_pairs(params, planes)
            draw_for_good(plan, params, planes, drawing)

    def _spread_planes(self) -> Iterator[Sequence[Tensor]]:
        for _, fmt, planes in self._planes():
            if fmt.spread is not None:
                yield planes[fmt.num_planes :]

    def _forget_columns(self) -> None:
        own_children(self).pop(DEVIATION, None)  # type: ignore[arg-type]  # a module

    if TYPE_CHECKING:
        _guard: Guard
        _bindings: Any

        def _bind(self, model: Module) -> Bound: ...
        def _planes(self) -> Iterator[tuple[str, Format, tuple[Tensor, ...]]]: ...
