"""The errors of all formats: short runs against bounds, the file, and the picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import accuracy
from bench.accuracy import EQUAL, FORMATS, STREAMS, TORCH_BF16, AccuracyReport, measure, points
from bench.accuracy_plot import _spread, plot
from swafast.backends import cpu

ENVIRONMENT = {"command": "python -m bench accuracy", "date": "2026-01-02T03:04:05+00:00", "versions": {}}


@pytest.fixture(scope="module")
def report() -> AccuracyReport:
    missing = cpu.unavailable()
    if missing is not None:
        pytest.skip(f"needs the native library: {missing}")
    return measure(ENVIRONMENT, updates=300, numel=256)


def test_points_are_spread_and_end_with_the_last_update() -> None:
    assert points(1) == [1]
    assert points(300)[:5] == [1, 2, 3, 4, 6]
    assert points(300)[-2:] == [237, 300]
    assert len(points(100_000)) < 40


def test_every_average_has_its_curve(report: AccuracyReport) -> None:
    rules = (EQUAL, *(f"EMA {decay:g}" for decay in accuracy.DECAYS))
    for stream in STREAMS:
        for rule in rules:
            for kind in (*FORMATS, TORCH_BF16):
                assert len(report.errors(stream, rule, kind)) == len(report.updates)
    assert len(report.curves) == len(STREAMS) * len(rules) * (len(FORMATS) + 1)


@pytest.mark.parametrize("stream", STREAMS)
def test_formats_stand_in_the_order_of_their_bits(report: AccuracyReport, stream: str) -> None:
    last = {kind: report.errors(stream, EQUAL, kind)[-1] for kind in FORMATS}
    assert report.errors(stream, EQUAL, "exact") == report.errors(stream, EQUAL, "float32")
    assert last["compensated"] <= 6e-8
    assert last["float32"] <= 0.2 * 300 * 2.0**-24
    assert last["compact"] <= 1e-5 * 300**0.5
    # A wrong weight would show in all of them, a format mistaken for another in one.
    assert last["float32"] < last["compact"] < last["half"] / 20


def test_torch_freezes_where_params_drift(report: AccuracyReport) -> None:
    assert report.errors("drifting", EQUAL, TORCH_BF16)[-1] > 2 * report.errors("drifting", EQUAL, "half")[-1]
    assert report.errors("constant", EQUAL, TORCH_BF16) == [0.0] * len(report.updates)


def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch, report: AccuracyReport) -> None:
    update = accuracy._Ours.update

    def late(self: accuracy._Ours) -> None:
        update(self)
        for counter in self._update.counters:
            if counter == 2:
                counter.add_(1)

    monkeypatch.setattr(accuracy._Ours, "update", late)
    wrong = measure(ENVIRONMENT, updates=20, numel=64)
    assert wrong.errors("jumping", EQUAL, "float32")[-1] > 1e-3


def test_the_file_and_the_picture(report: AccuracyReport, tmp_path: Path) -> None:
    report.write(tmp_path / "accuracy.json")
    assert AccuracyReport.read(tmp_path / "accuracy.json") == report
    plot(report, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text('{"schema": 2}')
    with pytest.raises(ValueError, match="schema must be 1, got 2"):
        AccuracyReport.read(tmp_path / "other.json")


def test_labels_do_not_overlap() -> None:
    spread = _spread({"a": 0.5, "b": 0.51, "c": 0.1, "d": 0.5}, 0.05)
    heights = sorted(spread.values())
    assert spread["c"] == 0.1
    assert all(b - a >= 0.05 - 1e-12 for a, b in pairwise(heights))


def test_threads_are_put_back() -> None:
    if cpu.unavailable() is not None:
        pytest.skip("needs the native library")
    before = torch.get_num_threads()
    measure(ENVIRONMENT, updates=1, numel=8)
    assert torch.get_num_threads() == before
