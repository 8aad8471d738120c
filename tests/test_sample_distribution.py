"""Many samples have the mean and the covariance that the weights of a training give, worked out in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swafast import FusedAveragedModel
from swafast.average import sampling
from swafast.backends import cpu, reference
from swafast.op import drawing, launches
from swafast.terms.samples import Sample
from tests.conftest import NO_LIBRARY

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{NO_LIBRARY}: {cpu.unavailable()}")

#: The z2 of a sample takes a millisecond of plain torch, and is the same for all tests.
_make_sample = functools.cache(sampling.make_sample)


@pytest.fixture(autouse=True)
def _samples_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "make_sample", _make_sample)


@dataclass(frozen=True)
class Stream:
    """The weights of a training that stands still: a point, noise along a few directions, and noise of each element."""

    sizes: tuple[int, ...]  # of the params
    updates: int

    def __iter__(self) -> Iterator[Tensor]:
        numel, source = sum(self.sizes), torch.Generator().manual_seed(7)
        point, scales = torch.randn(numel, generator=source), torch.rand(numel, generator=source) + 0.1
        directions = torch.randn(3, numel, generator=source)
        for _ in range(self.updates):
            along = torch.randn(3, generator=source) @ directions
            yield point + scales * (0.5 * along + torch.randn(numel, generator=source))


@dataclass(frozen=True)
class Bars:
    """How far samples may be from what they should be, in standard errors. The share is of covariances beyond 4."""

    mean: float = 4.5
    covariance: float = 6.0
    share: float = 2e-4
    rms: tuple[float, float] = (0.98, 1.02)


def drawn(stream: Stream, columns: int, count: int) -> Tensor:
    """Return so many samples of the stream's average, a row each. ``reference`` collects, ``cpu`` draws."""
    flat = torch.zeros(sum(stream.sizes))
    model = nn.ParameterList([nn.Parameter(part) for part in flat.split(stream.sizes)])
    averaged = FusedAveragedModel(model, deviations=columns, backend="reference")
    for weights in stream:
        flat.copy_(weights)
        averaged.update_parameters(model)
    averaged.backend = "cpu"
    rows = []
    for index in range(count):
        averaged.sample_to(model, index)
        rows.append(flat.clone())
    return torch.stack(rows).double()


def expected(stream: Stream, columns: int) -> tuple[Tensor, Tensor]:
    """Return mean and covariance: the mean of the weights, ``diag(variance) / 2 + D D^T / (2 (k - 1))``."""
    weights = torch.stack([*stream]).double()
    counts = torch.arange(1, len(weights) + 1)[:, None]
    running = weights.cumsum(0) / counts
    deviations = (weights - running)[-columns:]
    of_deviations = deviations.T @ deviations / (2 * (len(deviations) - 1))
    return running[-1], torch.diag(weights.var(dim=0, correction=0) / 2) + of_deviations


def require(stream: Stream, columns: int, count: int, bars: Bars) -> None:
    samples, (mean, covariance) = drawn(stream, columns, count), expected(stream, columns)
    of_mean = (samples.mean(0) - mean) / (covariance.diag() / count).sqrt()
    around = samples - mean
    error = ((covariance.diag().outer(covariance.diag()) + covariance.square()) / count).sqrt()
    z = ((around.T @ around / count - covariance) / error)[torch.triu(torch.ones_like(error)).bool()]
    found = f"means max z {of_mean.abs().max():.2f}; covariances max z {z.abs().max():.2f}"
    share, rms = (z.abs() > 4).double().mean().item(), z.square().mean().sqrt().item()
    found += f", share beyond 4 {share:.1e}, rms {rms:.3f}"
    print(found)
    assert of_mean.abs().max() <= bars.mean, f"means: {found}"
    assert z.abs().max() <= bars.covariance, f"covariances: {found}"
    assert share <= bars.share, f"share: {found}"
    assert bars.rms[0] <= rms <= bars.rms[1], f"rms: {found}"


@pytest.mark.slow
@pytest.mark.parametrize("updates", [139, 60], ids=["the ring is full", "the ring is not full"])
def test_ten_thousand_samples_of_903_params(updates: int) -> None:
    require(Stream((700, 7, 196), updates), 100, 10_000, Bars())


#: Few samples of few params after few updates, where each bug changes much. The last two bars are wide, since
#: covariances of so few are hardly independent.
FEW = (Stream((40, 20, 5), 3), 20, 400, Bars(covariance=4.5, share=1e-2, rms=(0.7, 1.4)))


def test_samples_have_mean_and_covariance() -> None:
    require(*FEW)


# Each kills a bug


def one_z2_for_each_tensor(patch: pytest.MonkeyPatch) -> None:
    draw = cpu.NativeLaunch.draw

    def prepare(pairs: Any, backends: object) -> list[launches.Work]:
        return [launches.Work(cpu, (i,), cpu.prepare([pair])) for i, pair in enumerate(pairs)]  # type: ignore[arg-type]

    def draw_with_own(self: cpu.NativeLaunch, params: Any, sample: Sample) -> None:
        source = torch.Generator().manual_seed(sample.index * 1000 + self._tensors[0].numel)
        z2 = torch.randn(len(sample.coefficients), generator=source) * math.sqrt(0.5 / (len(sample.coefficients) - 1))
        draw(self, params, replace(sample, coefficients=tuple(z2.tolist())))

    patch.setattr(drawing.launches, "prepare", prepare)
    patch.setattr(cpu.NativeLaunch, "draw", draw_with_own)


def sd_for_variance(patch: pytest.MonkeyPatch) -> None:
    draw = drawing.draw

    def squared(plan: Any, params: Any, planes: Any, made: Any) -> None:
        pairs = plan.pairs(params, planes)
        kept = [pair.spread_planes[0].clone() for pair in pairs]
        for pair in pairs:
            pair.spread_planes[0].square_()
        draw(plan, params, planes, made)
        for pair, variance in zip(pairs, kept, strict=True):
            pair.spread_planes[0].copy_(variance)

    patch.setattr(drawing, "draw", squared)


def k_for_k_less_1(patch: pytest.MonkeyPatch) -> None:
    make = sampling.make_sample

    def shrunk(*args: Any) -> Sample:
        sample = make(*args)
        k = len(sample.coefficients)
        return replace(sample, coefficients=tuple(math.sqrt((k - 1) / k) * each for each in sample.coefficients))

    patch.setattr(sampling, "make_sample", shrunk)


def old_mean(patch: pytest.MonkeyPatch) -> None:
    move = reference._spread_

    def against_the_old(planes: Any, spread: Any, param: Tensor, fmt: Any, weight: float, count: int) -> None:
        old = fmt.decode(planes).clone()
        move(planes, spread, param, fmt, weight, count)
        if count:
            spread[1 + count % (len(spread) - 1)].copy_(param - old)

    patch.setattr(reference, "_spread_", against_the_old)


def ring_off_by_one(patch: pytest.MonkeyPatch) -> None:
    move = reference._spread_
    patch.setattr(reference, "_spread_", lambda *args: move(*args[:-1], args[-1] + 1))


@pytest.mark.filterwarnings("ignore:the deviations have")
@pytest.mark.parametrize("plant", [one_z2_for_each_tensor, sd_for_variance, k_for_k_less_1, old_mean, ring_off_by_one])
def test_the_gate_kills_the_bug(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="covariances: "):
        require(*FEW)
