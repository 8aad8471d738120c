"""A report survives its JSON, and the README's table and the bars come from it alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import report as names
from bench.numbers import bars
from bench.readme import BEGIN, END, readme_table, rewrite
from bench.report import Report, Row, TrainingRow

ENVIRONMENT = {
    "command": "python -m bench",
    "device_name": "some CPU",
    "threads": 2,
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0"},
}


def row(workload: str, dtype: str, provider: str, seconds: float, allocated: int = 0) -> Row:
    # The median is the middle one, so the two others must not show.
    samples = [seconds, seconds * 9, seconds / 9]
    return Row(workload, workload, dtype, provider, 100, 2, 1200, samples=samples, allocated_bytes=allocated)


@pytest.fixture
def report() -> Report:
    rows = [
        row("gpt2_medium", "float32", names.TORCH_CLASS, 0.5),
        row("gpt2_medium", "float32", names.OURS, 0.1, allocated=8),
        row("gpt2_medium", "float32", names.FLAT_LERP, 0.08),
        row("gpt2_medium", "bfloat16", names.TORCH_CLASS, 0.1),
        row("gpt2_medium", "bfloat16", names.MUL_ADD, 0.64),
        row("gpt2_medium", "bfloat16", names.LERP_FLOAT, 0.56),
        row("gpt2_medium", "bfloat16", names.OURS_EXACT, 0.08, allocated=2_000_000),
        row("gpt2_medium", "bfloat16", names.OURS_FLOAT32, 0.08),
        row("gpt2_medium", "bfloat16", names.FLAT_LERP, 0.07),
        Row("3000x64", "3000x64", "float32", names.OURS, 1, 1, 12, status="wrong", reason="off"),
    ]
    training = [TrainingRow("CNN", "alone", names.OURS, 10, 5, 10, [0.9, 1.8], [0.1, 0.2])]
    return Report(ENVIRONMENT, rows, training)


def test_report_survives_its_json(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "cpu.json")
    assert Report.read(tmp_path / "cpu.json") == report


def test_report_of_another_schema_is_refused(report: Report) -> None:
    with pytest.raises(ValueError, match="schema must be 1, got 2"):
        Report.from_dict({**report.to_dict(), "schema": 2})


def test_bars_are_reported_truthfully(report: Report) -> None:
    found = [(bar.measured_text, bar.met) for bar in bars(report)]
    assert found == [("5.00x", True), ("1.25x", False), ("7.00x", True), ("1.00x", True), ("2.000 MB", False)]


def test_training_share(report: Report) -> None:
    assert report.training[0].share == pytest.approx(0.1)
    assert report.training[0].update_ms == pytest.approx(150)
    assert report.training[0].step_ms == pytest.approx(135)


def test_readme_table_has_the_medians(report: Report) -> None:
    lines = readme_table(report.to_dict()).splitlines()
    assert lines[2] == "| gpt2_medium, fp32 | 500 |  | 100 | 5.0x | 80% |"
    assert lines[3] == "| gpt2_medium, bf16, `exact` | 560 |  | 80 | 7.0x | 88% |"
    assert "`python -m bench` on some CPU, 2 threads, torch 2.13.0, 2026-01-02" in lines[-1]


def test_rewrite_changes_the_block_and_nothing_else(report: Report, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    rewrite(readme, report.to_dict())
    rewrite(readme, report.to_dict())
    assert readme.read_text() == f"before\n{BEGIN}\n{readme_table(report.to_dict())}\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_rewrite_refuses_a_readme_without_its_markers(report: Report, tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md must hold"):
        rewrite(readme, report.to_dict())
    assert readme.read_text() == text
