"""The sharded report: its bars, its table, and one look at real ranks on a small workload."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import readme, sharded
from tests.ranks import run_ranks

ENVIRONMENT = {"command": "python -m bench sharded", "device_name": "a CPU", "date": "2026-11-21", "versions": {}}


def report(seconds: float, *, above: float = 0.0) -> sharded.Report:
    """Give a report in which torch's class takes a second and ours ``seconds``."""
    timed = [
        sharded.Timed(workload.title, name, [taken, taken, 9.0])
        for workload in sharded.WORKLOADS
        for name, taken in ((sharded.TORCH_MULTI, 1.0), (sharded.OURS, seconds))
    ]
    return sharded.Report(ENVIRONMENT, timed, [sharded.Planned("FSDP2", 0, 0.1, 10**6, 1.0 + above)])


def test_bars_are_met_or_short() -> None:
    assert [met for *_, met in report(0.04).bars()] == [True] * 5
    assert [met for *_, met in report(0.5, above=0.002).bars()] == [False, True, False, True, True]


def test_a_report_reads_back_as_it_was_written(tmp_path: Path) -> None:
    report(0.5).write(tmp_path / "sharded.json")
    assert sharded.Report.read(tmp_path / "sharded.json") == report(0.5)


def test_the_readmes_table_is_put_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before {readme.SHARDED_BEGIN} old {readme.SHARDED_END} after")
    readme.put_between(page, readme.SHARDED_BEGIN, readme.SHARDED_END, readme.sharded_table(report(0.05)))
    text = page.read_text()
    assert "old" not in text
    assert f"{sharded.TORCH_MULTI} 1000, {sharded.OURS} 50 |" in text


@pytest.mark.distributed
def test_every_contestant_is_timed_on_every_rank() -> None:
    for samples in run_ranks(2, sharded._time_updates, ((7, 3), (5, 2))):
        assert list(samples) == [sharded.TORCH_CLASS, sharded.TORCH_MULTI, sharded.FOREACH, sharded.OURS]
        assert {len(times) for times in samples.values()} == {sharded.SAMPLES}
