"""Our own passes beside each other: the bytes they keep and move, the gates, and the blocks made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import passes
from bench.numbers import bars
from bench.readme import passes_block, rewrite_passes
from bench.report import ONE, THREE, THREE_APART, TWO, Report, Row
from bench.tables import pass_figures
from bench.workloads import Workload, build
from swafast import FusedAveragedModel, FusedAverages

CPU = torch.device("cpu")
TINY = Workload(
    "tiny",
    "Tiny",
    lambda depth: iter([("stem.weight", (33, 7)), ("stem.bias", (1,)), ("head.weight", (5, 3, 2))]),
    full_depth=1,
    num_params=33 * 7 + 1 + 30,
)
# Bytes a param of each format: the table of docs/formats.md.
KEPT = {"float32": 4, "exact": 4, "compact": 3, "compensated": 8, "half": 2, "mirrored": 6}
ENVIRONMENT = {
    "command": "python -m bench",
    "device_name": "some CPU",
    "threads": 2,
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0"},
}


def formats_of(dtype: torch.dtype) -> list[Row]:
    return passes.measure_formats(TINY, dtype, CPU, budget_s=0.0, memory_bytes=4e9)


def several_of(dtype: torch.dtype) -> list[Row]:
    return passes.measure_several(TINY, dtype, CPU, budget_s=0.0, memory_bytes=4e9)


@pytest.mark.parametrize("dtype", passes.FORMATS, ids=str)
def test_each_format_keeps_the_bytes_of_the_table(dtype: torch.dtype) -> None:
    rows = formats_of(dtype)
    assert [row.provider for row in rows] == [kind.name for kind in passes.FORMATS[dtype]]
    for row in rows:
        assert row.samples, row
        assert row.held_bytes == KEPT[row.provider] * TINY.num_params
        assert row.counted_bytes == (dtype.itemsize + 2 * KEPT[row.provider]) * TINY.num_params


def test_mirrored_keeps_the_bytes_of_the_table() -> None:
    class Mirrored(passes.OneFormat):
        name = format = "mirrored"

    provider = Mirrored(build(TINY, torch.float16, CPU))
    provider.update()
    assert passes.held_bytes(provider.held()) == KEPT["mirrored"] * TINY.num_params


@pytest.mark.parametrize("dtype", passes.FORMATS, ids=str)
def test_several_averages_keep_and_move_what_they_are(dtype: torch.dtype) -> None:
    rows = {row.provider: row for row in several_of(dtype)}
    assert list(rows) == [ONE, TWO, THREE, THREE_APART]
    assert all(row.samples for row in rows.values())
    per_param = {name: (row.held_bytes or 0) / TINY.num_params for name, row in rows.items()}
    assert per_param == {ONE: 4, TWO: 8, THREE: 12, THREE_APART: 12}
    moved = {name: row.counted_bytes / TINY.num_params for name, row in rows.items()}
    size = dtype.itemsize
    assert moved == {ONE: size + 8, TWO: size + 16, THREE: size + 24, THREE_APART: 3 * (size + 8)}


def test_the_gate_stops_a_format_that_rounds_to_too_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(self: passes.OneFormat) -> list[Tensor]:
        return [average.bfloat16().float() for average in passes.Ours.each_average(self)]

    monkeypatch.setattr(passes.InCompact, "each_average", coarse)
    wrong = {row.provider for row in formats_of(torch.float32) if row.wrong}
    assert wrong == {"compact"}


def test_the_gate_stops_an_average_that_moves_by_the_rule_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    update = FusedAverages.update_parameters

    def all_alike(self: FusedAverages, model: torch.nn.Module) -> None:
        update(self, model)
        for averaged in self.values():
            averaged.load_state_dict(self["mean"].state_dict())

    monkeypatch.setattr(FusedAverages, "update_parameters", all_alike)
    wrong = {row.provider: row.reason for row in several_of(torch.float32) if row.wrong}
    assert set(wrong) == {ONE, TWO, THREE, THREE_APART}
    assert wrong[THREE].startswith("fast.")


def test_the_gate_stops_a_pass_whose_bits_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_the_last(self: passes.ThreeApart) -> None:
        for averaged in list(self.fused.values())[:-1]:
            averaged.update_parameters(self.model)

    monkeypatch.setattr(passes.ThreeApart, "update", forgets_the_last)
    wrong = {row.provider: row.reason for row in several_of(torch.bfloat16) if row.wrong}
    assert wrong == {THREE_APART: f"bits of slow differ from those of {THREE}"}


def test_one_pass_is_one_launch_over_the_averages_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """The averages that three passes move are those that one pass moves, where they lie, and neither plans anew."""
    model = build(TINY, torch.float32, CPU)
    together = passes.ThreeTogether(model)
    apart = passes.ThreeApart(model, together.fused)
    for provider in (together, apart):
        provider.update()
    addresses = [plane.data_ptr() for plane in together.held()]
    plans = [together.fused._bind(model)[0], *(averaged._bind(model)[0] for averaged in apart.fused.values())]
    for provider in (together, apart, together):
        provider.update()
    assert [plane.data_ptr() for plane in together.held()] == addresses
    again = [together.fused._bind(model)[0], *(averaged._bind(model)[0] for averaged in apart.fused.values())]
    assert all(a is b for a, b in zip(plans, again, strict=True))
    assert isinstance(together.fused["fast"], FusedAveragedModel)


def row(provider: str, seconds: float, counted: int, held: int) -> Row:
    samples = [seconds, seconds * 9, seconds / 9]
    return Row("gpt2_medium", "GPT-2", "float32", provider, 100, 2, counted, samples=samples, held_bytes=held)


@pytest.fixture
def report() -> Report:
    formats = [row("float32", 0.1, 1200, 400), row("compact", 0.12, 1000, 300)]
    several = [row(ONE, 0.1, 1200, 400), row(THREE, 0.28, 2800, 1200)]
    return Report(ENVIRONMENT, [], formats=formats, several=several)


def test_own_passes_survive_the_json(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "cpu.json")
    assert Report.read(tmp_path / "cpu.json") == report
    older = {key: value for key, value in report.to_dict().items() if key not in ("formats", "several")}
    assert Report.from_dict(older).formats == []


def test_figures_are_over_the_first_row(report: Report) -> None:
    base, compact = report.formats
    assert pass_figures(compact, base) == ("3", "10", "1.20x", "0.83x", "1.44")


def test_the_bar_is_of_time_over_bytes(report: Report) -> None:
    (bar,) = bars(report)
    assert (bar.measured_text, bar.met) == ("1.20x", False)


def test_pages_get_the_blocks_that_the_report_has(report: Report, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for part in ("formats", "several"):
        page = tmp_path / passes_page(part)
        page.write_text(f"a\n<!-- {part}:begin -->\nold\n<!-- {part}:end -->\nb\n")
    assert len(rewrite_passes(report, tmp_path)) == 2
    text = (tmp_path / passes_page("formats")).read_text()
    assert text == f"a\n<!-- formats:begin -->\n{passes_block(report, 'formats')}\n<!-- formats:end -->\nb\n"
    assert "| GPT-2, fp32 | compact | 120 | 3 | 10 | 1.20x | 0.83x |" in text
    assert rewrite_passes(Report(ENVIRONMENT, []), tmp_path) == []


def passes_page(part: str) -> str:
    return {"formats": "docs/formats.md", "several": "docs/averages.md"}[part]
