"""The share of a training step: every loop runs, and adds up."""

from __future__ import annotations

import pytest

from bench import training
from bench.report import OURS, TORCH_CLASS, TrainingRow

BRIEF = training.Budget(0.0, min_rounds=1)


def check_rows(rows: list[TrainingRow], setting: str, models: list[str]) -> None:
    expected = {(model, provider, every) for model in models for provider in (TORCH_CLASS, OURS) for every in (1, 10)}
    assert {(row.model, row.provider, row.every) for row in rows} == expected
    assert {row.setting for row in rows} == {setting}
    assert all(0 < row.share < 1 and row.update_ms > 0 for row in rows)


def test_share_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.ConvNet, "batch", 2)
    check_rows(training.measure_share("CNN", BRIEF), "alone", ["CNN"])


@pytest.mark.slow
def test_share_under_ddp() -> None:
    check_rows(training.measure_ddp(BRIEF), training.DDP_SETTING, list(training.MODELS))
