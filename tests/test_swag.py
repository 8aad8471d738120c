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

from swafast import FusedAveragedModel
from swafast.backends import cpu, reference
from swafast.terms.formats import Format
from swafast.terms.samples import Sample, make_sample
from tests.conftest import NO_LIBRARY
from tests.spreads import moments_of, sample_in_closed_form
from tests.support import run_example

# The weights were still on their way, to which a sample's warning points.
pytestmark = pytest.mark.filterwarnings("ignore:the deviations have")

RECORDED = load_file(Path(__file__).with_name("oracles") / "swag.safetensors")
STREAM = RECORDED["stream"]  # (60, 610) float32, a row for each update
COUNT = 20  # of deviations, K
#: The largest error of the mean, the median, the 99th percentile and the largest of the variance's relative errors, and
#: the largest error of a deviation. Errors of the mean and of deviations are relative to the largest of them.
BARS = {"mean": 5e-7, "variance, median": 5e-6, "variance, p99": 1e-4, "variance, max": 5e-4, "deviations": 5e-6}


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@torch.no_grad()
def put(net: nn.Module, values: Tensor) -> None:
    params = list(net.parameters())
    for param, value in zip(params, values.split([param.numel() for param in params]), strict=True):
        param.copy_(value.view_as(param))


def averaged_stream(backend: str, updates: int, deviations: int) -> tuple[nn.Module, FusedAveragedModel]:
    """Return a net with the last weights of the stream, and an average of its first weights."""
    net = make_net()
    averaged = FusedAveragedModel(net, deviations=deviations, backend=backend)
    for values in STREAM[:updates]:
        put(net, values)
        averaged.update_parameters(net)
    return net, averaged


def planes_of(backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and deviations after all updates, the oldest deviation first: it is in column 0 then."""
    net, averaged = averaged_stream(backend, len(STREAM), COUNT)
    state, names = averaged.state_dict(), [name for name, _ in net.named_parameters()]
    heads = ("module.", "variance.", *(f"deviation.{column}." for column in range(COUNT)))
    mean, variance, *columns = (flat(state[head + name] for name in names) for head in heads)
    return mean, variance, torch.stack(columns)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and cpu.unavailable() is not None:
        pytest.skip(f"{NO_LIBRARY}: {cpu.unavailable()}")
    return request.param


def truth_of_sample(updates: int, index: int, scale: float, columns: int, divisor: int) -> Tensor:
    """Return the sample in float64, with our random numbers."""
    names, params = zip(*make_net().named_parameters(), strict=True)
    models = dict(zip(names, STREAM[:updates].split([param.numel() for param in params], 1), strict=True))
    return flat(sample_in_closed_form(models, columns, index, scale, divisor=divisor).values())


def largest(found: Tensor, exact: Tensor) -> float:
    """Return the largest error, as a share of the largest value."""
    return float((found - exact).abs().max() / exact.abs().max())


def errors(mean: Tensor, variance: Tensor, deviations: Tensor) -> dict[str, float]:
    exact_mean, exact_variance, exact_deviations = moments_of(STREAM)
    of_variance = (variance - exact_variance).abs() / exact_variance
    return {
        "mean": largest(mean, exact_mean),
        "variance, median": float(of_variance.median()),
        "variance, p99": float(of_variance.quantile(0.99)),
        "variance, max": float(of_variance.max()),
        "deviations": largest(deviations, exact_deviations[-COUNT:]),
    }


def beyond(found: dict[str, float], bars: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in found.items() if not error <= bars[name]}


def test_against_float64(backend: str) -> None:
    assert beyond(errors(*planes_of(backend)), BARS) == {}


def test_authors_results(backend: str) -> None:
    """Their moments and deviations are ours. Their variance, E[w^2] - mean^2, is the difference of two close numbers.

    Its errors are 5.4e-5 in the median, 0.086 at the 99th percentile and 2.6 at most. Two are below 0, and their clamp
    makes 1e-30 of them.
    """
    mean, variance, deviations = planes_of(backend)
    assert largest(mean, RECORDED["mean"]) <= 1e-6
    assert largest(mean.double().square() + variance, RECORDED["sq_mean"].double()) <= 1e-6
    assert largest(deviations, RECORDED["deviations"]) <= 3e-6
    theirs = RECORDED["sq_mean"] - RECORDED["mean"] ** 2
    found = errors(RECORDED["mean"], theirs, RECORDED["deviations"])
    tenfold = {name: 10 * bar for name, bar in BARS.items()}
    assert {*beyond(found, tenfold)} == {"variance, median", "variance, p99", "variance, max"}
    assert int((theirs <= 0).sum()) == 2
    assert float(variance.min()) > 0


@pytest.mark.parametrize(
    ("name", "updates", "index", "scale"),
    [("swag", 60, 3, 0.5), ("swag", 15, 4, 0.5), ("diagonal", 60, 5, 1.0)],
)
def test_authors_samples(backend: str, name: str, updates: int, index: int, scale: float) -> None:
    """With our random numbers their samples are ours, but for the divisor: they divide by K - 1 from the first on."""
    columns = COUNT if name == "swag" else 0
    net, averaged = averaged_stream(backend, updates, columns)
    averaged.sample_to(net, index)
    drawn = flat(net.parameters())
    theirs = RECORDED[f"{name} after {updates}"]
    count = min(updates, COUNT)
    exact = truth_of_sample(updates, index, scale, columns, count - 1)
    assert largest(drawn, exact) <= 1e-6
    as_theirs = truth_of_sample(updates, index, scale, columns, COUNT - 1)
    assert largest(theirs, as_theirs) <= 5e-4  # the error of their variance
    assert (largest(theirs, exact) > 1e-2) == (count < COUNT)


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
        ("backends.reference._moved", of_old_mean),
        ("backends.reference._spread_", off_by_one),
        ("backends.reference._point", without_root),
        ("backends.reference._point", of_each_tensor),
        ("average.sampling.make_sample", by_count),
    ],
)
def test_planted_bugs_are_found(monkeypatch: pytest.MonkeyPatch, place: str, bug: Callable[..., Any]) -> None:
    monkeypatch.setattr(f"swafast.{place}", bug)
    check = functools.partial(test_authors_samples, "reference", "swag", 60, 3, 0.5)
    if bug in (of_old_mean, off_by_one):
        check = functools.partial(test_against_float64, "reference")
    with pytest.raises(AssertionError):
        check()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_examples_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """SWAG knows better than SWA how sure it may be, and MultiSWAG better than MultiSWA and than an ensemble."""
    pytest.importorskip("torchmetrics")
    example = run_example("swag", monkeypatch)
    scores = example["means"](example["measure"]())
    nll, ece = ({method: found[name] for method, found in scores.items()} for name in ("NLL", "ECE"))
    assert nll["SWAG"] <= nll["SWA"] - 0.10
    assert ece["SWAG"] <= ece["SWA"] - 0.02
    assert nll["MultiSWAG"] <= min(nll["MultiSWA"], nll["deep ensemble"]) - 0.06
    assert nll["SWAG-diagonal"] < nll["SWA"]
