"""How exact a spread is: closed form in float64 -> reference -> backends. The bounds are promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from swafast.backends import cpu, reference
from swafast.backends.contract import Pair
from swafast.terms.formats import COMPENSATED, EXACT, FLOAT32, MIRRORED, Format, with_spread
from swafast.terms.rules import EqualAverage, ExponentialAverage, PowerAverage, Rule
from swafast.terms.spread import Spread
from tests.conftest import NO_LIBRARY
from tests.kernels import update
from tests.spreads import moments_of

COLUMNS = 5
RULES_IN_CLOSED_FORM: list[Rule] = [
    EqualAverage(),
    ExponentialAverage(0.9),
    ExponentialAverage(0.3),
    ExponentialAverage(0.99, warmup="power", inv_gamma=2.0, power=0.75),
    ExponentialAverage(0.95, warmup="ratio"),
    ExponentialAverage(0.98, warmup="ramp", tau=10.0),
    PowerAverage(6.94),
    ExponentialAverage(0.9, schedule="cosine", updates=60),
    ExponentialAverage(0.9, schedule="linear", updates=60),
]


def spread_pair(numel: int, fmt: Format = FLOAT32, dtype: torch.dtype = torch.float32) -> Pair:
    fmt = with_spread(fmt, Spread(COLUMNS, torch.float32), dtype)
    planes = [torch.zeros(numel, dtype=dtype) for dtype in (fmt.dtype, *(dtype for _, dtype in fmt.further))]
    return Pair("", torch.zeros(numel, dtype=dtype), tuple(planes), fmt)


@pytest.mark.parametrize("rule", RULES_IN_CLOSED_FORM, ids=str)
@pytest.mark.parametrize(
    ("fmt", "dtype", "bound"),
    [
        (FLOAT32, torch.float32, 5e-6),
        (EXACT, torch.bfloat16, 5e-6),
        (MIRRORED, torch.float16, 5e-6),
        (COMPENSATED, torch.float32, 1e-6),
    ],
    ids=str,
)
def test_a_spread_equals_its_closed_form(rule: Rule, fmt: Format, dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(11)
    models = (1 + torch.randn(13, 200, generator=generator)).to(dtype)
    pair, counter = spread_pair(200, fmt, dtype), torch.tensor(0)
    launch = reference.prepare([pair])
    for model in models:
        pair.param.copy_(model)
        update(launch, [pair], [rule], [counter])
    mean, variance, deviations = moments_of(models, rule)
    found, *columns = pair.spread_planes
    value = fmt.decode(pair.mean_planes).double()
    assert float((value - mean).norm() / mean.norm()) <= bound
    assert float((found.double() - variance).norm() / variance.norm()) <= bound
    assert float(found.min()) > 0
    for n in range(len(models) - COLUMNS, len(models)):
        error = float((columns[n % COLUMNS].double() - deviations[n]).norm() / deviations[n].norm())
        assert error <= bound, f"the deviation of update {n} is wrong"


def test_the_first_model_has_no_spread_and_nor_has_one_that_replaces_all() -> None:
    pair, counter = spread_pair(8), torch.tensor(0)
    launch = reference.prepare([pair])
    rules: list[Rule] = [EqualAverage(), EqualAverage(), ExponentialAverage(0.0)]
    for n, rule in enumerate(rules):
        pair.param.normal_()
        update(launch, [pair], [rule], [counter])
        variance, *columns = pair.spread_planes
        assert bool((variance == 0).all()) is (n != 1)
        assert bool((columns[n] == 0).all()) is (n != 1)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{NO_LIBRARY}: {cpu.unavailable()}")
def test_a_variance_of_ten_thousand_models_is_exact_and_positive() -> None:
    generator = torch.Generator().manual_seed(12)
    ratios = torch.tensor([1e-2, 1e-3, 1e-4])  # of the standard deviation to the mean
    center = 0.5 + torch.rand(3, 128, generator=generator)
    models = center * (1 + ratios[:, None] * torch.randn(10_000, 3, 128, generator=generator))
    pair, counter = spread_pair(center.numel()), torch.tensor(0)
    launch = cpu.prepare([pair])
    for model in models.flatten(1):
        pair.param.copy_(model)
        update(launch, [pair], [EqualAverage()], [counter])
    truth = models.double().var(0, unbiased=False)  # quicker than `moments_of` with so many
    variance = pair.spread_planes[0].double().view(3, 128)
    errors = ((variance - truth) / truth).abs().median(1).values
    assert bool((errors <= torch.tensor([1e-5, 5e-5, 5e-4])).all()), f"median errors are {errors.tolist()}"
    assert float(variance.min()) > 0


def test_a_lerp_of_weights_never_makes_a_variance_negative() -> None:
    """Models that lie close together, where E[w2] - E[w]2 is often negative."""
    generator = torch.Generator().manual_seed(13)
    pair = spread_pair(2_000)
    launch, counter = reference.prepare([pair]), torch.tensor(0)
    for _, rule in itertools.product(range(20), (EqualAverage(), ExponentialAverage(0.3), ExponentialAverage(0.999))):
        pair.param.copy_(1 + 2.0**-22 * torch.randn(2_000, generator=generator))
        update(launch, [pair], [rule], [counter])
        assert float(pair.spread_planes[0].min()) >= 0
    assert math.isfinite(float(pair.spread_planes[0].max()))
