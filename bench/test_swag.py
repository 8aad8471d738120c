"""SWAG's ways of a collect and of a sample: a short run, and the bugs that must be seen before any time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bench import swag, timing
from bench.gate import SCALES, WrongAverageError
from bench.swag import AUTHORS, CAREFUL, COLLECT, OURS, PLAIN, SAMPLE, Authors, Careful, Ours, Way
from bench.workloads import Workload, build
from swafast import FusedAveragedModel

TINY = Workload("tiny", "2 tensors", lambda depth: iter((("a.weight", (5, 3)), ("b.bias", (7,)))), 1, 22)
SAMPLES = 100


def collected(kind: type[Way]) -> tuple[Way, list[Tensor]]:
    """Return a way that has passed the gate, and the params of its model, which it writes samples into."""
    model = build(TINY, torch.float32, torch.device("cpu"))
    way = kind(model, len(SCALES))
    assert swag.check("a way", way, model) <= swag.TOLERANCE
    return way, [param.detach() for param in model.parameters()]


def test_every_way_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SAMPLE_S", 1e-6)
    rows = swag.measure(TINY, len(SCALES), 0.0, lambda text: None)
    assert [(row.group, row.provider) for row in rows] == [
        *((COLLECT, name) for name in (AUTHORS, CAREFUL, OURS, PLAIN)),
        *((SAMPLE, name) for name in (AUTHORS, CAREFUL, OURS)),
    ]
    assert {row.provider for row in rows[: len(swag.WAYS) + 1] if row.error is None} == {PLAIN}
    assert min(row.seconds for row in rows) > 0
    assert len(swag.bars(rows)) == 5


def spread_over_expected(kind: type[Way]) -> float:
    """Return the mean square of samples' distances from the mean, as a share of what was collected."""
    torch.manual_seed(0)
    way, params = collected(kind)
    own = torch.cat([param.flatten() for param in params])
    models = torch.tensor(SCALES)
    means = models.cumsum(0) / torch.arange(1, len(models) + 1)
    factor = models.var(correction=0) + (models - means).square().sum() / (len(models) - 1)
    expected = 0.5 * factor * own.square().sum()
    found = torch.zeros(())
    for _ in range(SAMPLES):
        way.sample()
        found += (torch.cat([param.flatten() for param in params]) - means[-1] * own).square().sum()
    return float(found / SAMPLES / expected)


@pytest.mark.parametrize("kind", swag.WAYS.values(), ids=swag.WAYS)
def test_samples_lie_as_far_from_the_mean_as_what_was_collected(kind: type[Way]) -> None:
    assert abs(spread_over_expected(kind) - 1) < 0.3


class WithoutNoise(Careful):
    """Its samples lie in the span of the columns alone."""

    def sample(self) -> None:
        self._variances = [torch.zeros_like(variance) for variance in self._variances]
        super().sample()


def stands_still(averaged: FusedAveragedModel, model: nn.Module) -> None:
    """Update nothing."""


class OfOldMean(Authors):
    """Its deviations are from the mean before the model."""

    def collect(self) -> None:
        before = [mean.flatten() for mean in self._means]
        super().collect()
        for columns, param, mean in zip(self._columns, self._params, before, strict=True):
            columns[-1] = param.flatten() - mean


class WithoutVariance(Careful):
    """It forgets the variances of all models but the last."""

    def collect(self) -> None:
        self._variances = [torch.zeros_like(variance) for variance in self._variances]
        super().collect()


@pytest.mark.parametrize(("kind", "part"), [(Ours, "mean"), (WithoutVariance, "variance"), (OfOldMean, "deviation")])
def test_the_gate_sees(kind: type[Way], part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind is Ours:
        monkeypatch.setattr(FusedAveragedModel, "update_parameters", stands_still)
    with pytest.raises(WrongAverageError, match=f"a way: the {part} of tensor 0 is off by"):
        collected(kind)


def test_samples_without_noise_are_seen() -> None:
    with pytest.raises(AssertionError):
        test_samples_lie_as_far_from_the_mean_as_what_was_collected(WithoutNoise)
