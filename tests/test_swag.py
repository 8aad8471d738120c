"""SWAG on the stream of a short training: against float64, and against the results of its authors' own code."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from swafast.backends import cpu, reference
from swafast.backends.contract import Backend, Pair, Update
from swafast.terms.draws import Draws, make_random_key
from swafast.terms.formats import FLOAT32, Format, with_spread
from swafast.terms.normals import COLUMNS, normals
from swafast.terms.rules import EqualAverage, terms_of
from swafast.terms.samples import Sample, make_sample
from swafast.terms.spread import Spread
from tests.conftest import NO_LIBRARY

RECORDED = load_file(Path(__file__).with_name("oracles") / "swag.safetensors")
STREAM = RECORDED["stream"]  # (60, 610) float32, a row for each update
SPREAD = Spread(20)
FORMAT = with_spread(FLOAT32, SPREAD, torch.float32)
DTYPES = (torch.float32, *(dtype for _, dtype in FORMAT.further))
#: The largest error of the mean, the median, the 99th percentile and the largest of the variance's relative errors, and
#: the largest error of a deviation. Errors of the mean and of deviations are relative to the largest of them.
BARS = {"mean": 5e-7, "variance, median": 5e-6, "variance, p99": 1e-4, "variance, max": 5e-4, "deviations": 5e-6}
#: Of the authors' code, measured.
THEIRS = {"mean": 6e-7, "variance, median": 6e-5, "variance, p99": 0.1, "variance, max": 3.0, "deviations": 2e-6}


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@torch.no_grad()
def put(net: nn.Module, values: Tensor) -> None:
    params = list(net.parameters())
    for param, value in zip(params, values.split([param.numel() for param in params]), strict=True):
        param.copy_(value.view_as(param))


class Averaged:
    """An average of the stream, kept by the launches of one backend."""

    def __init__(self, backend: Backend, updates: int) -> None:
        self.backend, self.updates, net = backend, updates, make_net()
        self.pairs = [
            Pair(name, param.detach(), tuple(torch.zeros(param.shape, dtype=dtype) for dtype in DTYPES), FORMAT)
            for name, param in net.named_parameters()
        ]
        self.params = [pair.param for pair in self.pairs]
        launch, counter = backend.prepare(self.pairs), torch.tensor(0)
        update = Update((terms_of(EqualAverage()),), (counter,))  # type: ignore[arg-type]
        for values in STREAM[:updates]:
            put(net, values)
            launch.update(self.params, update)

    def planes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and columns: the oldest deviation is in the first, after 60 updates."""
        mean, variance, *columns = (flat(planes) for planes in zip(*(p.planes for p in self.pairs), strict=True))
        return mean, variance, torch.stack(columns)

    def draw(self, index: int, scale: float, deviations: bool) -> Tensor:
        draws = [Draws(make_random_key(0, pair.name), tuple(pair.param.shape)) for pair in self.pairs]
        launch = self.backend.prepare([replace(pair, draws=each) for pair, each in zip(self.pairs, draws, strict=True)])
        spread = SPREAD if deviations else Spread(0)
        launch.draw(self.params, make_sample(spread, self.updates, index, scale, 0))
        return flat(self.params)


@pytest.fixture(params=[cpu, reference], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param.unavailable() is not None:
        pytest.skip(f"{NO_LIBRARY}: {request.param.unavailable()}")
    return request.param


def truth(updates: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and the last deviations, the oldest first, in float64."""
    values = STREAM[:updates].double()
    means = values.cumsum(0) / torch.arange(1, updates + 1)[:, None]
    return means[-1], (values - means[-1]).square().mean(0), (values - means)[-SPREAD.count :]


def truth_of_sample(updates: int, index: int, scale: float, deviations: bool, divisor: int) -> Tensor:
    """Return the sample in float64, with our random numbers."""
    mean, variance, of_columns = truth(updates)
    net = make_net()
    z = [normals(make_random_key(0, name), index, torch.arange(p.numel())) for name, p in net.named_parameters()]
    point = variance.sqrt() * flat(z)
    if deviations:
        # The column of the oldest deviation is 0 after 15, 20, 40 and 60 updates.
        of_each = normals(make_random_key(0, ""), index, torch.arange(len(of_columns)), COLUMNS)
        point += of_each.double() @ of_columns / math.sqrt(divisor)
    return mean + math.sqrt(scale) * point


def largest(found: Tensor, exact: Tensor) -> float:
    """Return the largest error, as a share of the largest value."""
    return float((found - exact).abs().max() / exact.abs().max())


def errors(mean: Tensor, variance: Tensor, deviations: Tensor) -> dict[str, float]:
    exact_mean, exact_variance, exact_deviations = truth(len(STREAM))
    of_variance = (variance - exact_variance).abs() / exact_variance
    return {
        "mean": largest(mean, exact_mean),
        "variance, median": float(of_variance.median()),
        "variance, p99": float(of_variance.quantile(0.99)),
        "variance, max": float(of_variance.max()),
        "deviations": largest(deviations, exact_deviations),
    }


def beyond(found: dict[str, float], bars: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in found.items() if not error <= bars[name]}


def test_against_float64(backend: Backend) -> None:
    assert beyond(errors(*Averaged(backend, len(STREAM)).planes()), BARS) == {}


def test_authors_results_and_how_far_they_are(backend: Backend) -> None:
    """Their mean and deviations are ours; of the variance they keep E[w^2], which loses what is small beside mean^2."""
    mean, variance, deviations = Averaged(backend, len(STREAM)).planes()
    assert largest(mean, RECORDED["mean"]) <= 1e-6
    assert largest(mean.double().square() + variance, RECORDED["sq_mean"].double()) <= 1e-6
    assert largest(deviations, RECORDED["deviations"]) <= 3e-6
    theirs = RECORDED["sq_mean"] - RECORDED["mean"] ** 2
    found = errors(RECORDED["mean"], theirs, RECORDED["deviations"])
    assert beyond(found, THEIRS) == {}
    assert {name for name in beyond(found, BARS) if name.startswith("variance")} == {n for n in BARS if "variance" in n}
    assert int((theirs <= 0).sum()) == 2  # their clamp makes 1e-30 of them
    assert float(variance.min()) > 0


@pytest.mark.parametrize(
    ("name", "updates", "index", "scale"),
    [("swag", 60, 3, 0.5), ("swag", 15, 4, 0.5), ("diagonal", 60, 5, 1.0)],
)
def test_authors_samples(backend: Backend, name: str, updates: int, index: int, scale: float) -> None:
    """With our random numbers their samples are ours, but for the divisor: they divide by K - 1 from the first on."""
    averaged, deviations = Averaged(backend, updates), name == "swag"
    drawn = averaged.draw(index, scale, deviations)
    theirs = RECORDED[f"{name} after {updates}"]
    count = min(updates, SPREAD.count)
    exact = truth_of_sample(updates, index, scale, deviations, count - 1)
    assert largest(drawn, exact) <= 1e-6
    as_theirs = truth_of_sample(updates, index, scale, deviations, SPREAD.count - 1)
    assert largest(theirs, as_theirs) <= 5e-4  # the error of their variance
    assert (largest(theirs, exact) > 1e-2) == (count < SPREAD.count)


def of_old_mean(planes: Sequence[Tensor], param: Tensor, fmt: Format, weight: float) -> Tensor:
    return fmt.decode(tuple(planes)).clone()


def off_by_one(*arguments: Any, spread: Any = reference._spread_) -> None:
    *rest, num_averaged = arguments
    spread(*rest, num_averaged + 1)


def without_root(
    value: Tensor, variance: Tensor, columns: Any, sample: Sample, *of_noise: Any, point: Any = reference._point
) -> Tensor:
    return point(value, variance.square(), columns, sample, *of_noise)


def of_each_tensor(
    value: Tensor,
    variance: Tensor,
    columns: Any,
    sample: Sample,
    key: int,
    index: Tensor,
    point: Any = reference._point,
) -> Tensor:
    turned = sample.coefficients[value.numel() % 3 :] + sample.coefficients[: value.numel() % 3]
    return point(value, variance, columns, replace(sample, coefficients=turned), key, index)


def by_count(*arguments: Any, make: Any = make_sample) -> Sample:
    sample = make(*arguments)
    divided = tuple(coefficient * math.sqrt(19 / 20) for coefficient in sample.coefficients)
    return replace(sample, coefficients=divided)


@pytest.mark.parametrize(
    ("place", "bug"),
    [
        ("reference._moved", of_old_mean),
        ("reference._spread_", off_by_one),
        ("reference._point", without_root),
        ("reference._point", of_each_tensor),
        ("make_sample", by_count),
    ],
)
def test_planted_bugs_are_found(monkeypatch: pytest.MonkeyPatch, place: str, bug: Callable[..., Any]) -> None:
    monkeypatch.setattr(f"{__name__}.{place}", bug)
    check = functools.partial(test_authors_samples, reference, "swag", 60, 3, 0.5)
    if bug in (of_old_mean, off_by_one):
        check = functools.partial(test_against_float64, reference)
    with pytest.raises(AssertionError):
        check()
