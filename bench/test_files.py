"""Averages of files: every way in a process of its own, what each must reach, and bugs that the gate must see."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import file_scripts, files, plot_files, tables
from bench.files import LIMIT, OURS, RUNNING_SUM, STACK, Model
from bench.report import FileRow, Report

TINY = Model("float32", 1, 8, 12, 30)
ROWS = [
    FileRow(OURS, "float32", 5, 500 * 10**6, wall_s=1.0, cpu_s=0.5, peak_bytes=40 * 10**6, rounds=5, differing=0.0),
    FileRow(RUNNING_SUM, "float32", 5, 500 * 10**6, wall_s=3.0, cpu_s=4.0, peak_bytes=1600 * 10**6, rounds=5),
    FileRow(LIMIT, "float32", 5, 500 * 10**6, wall_s=0.8, cpu_s=0.3, peak_bytes=18 * 10**6, rounds=5),
    FileRow(files.MERGEKIT, "float32", 5, 500 * 10**6, status="not installed", reason="pip install it"),
]


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return files.write_inputs(TINY, tmp_path, 3)


def test_the_ways_of_torch_average(inputs: list[Path], tmp_path: Path) -> None:
    exact = torch.stack([load_file(path)["lm_head.weight"].double() for path in inputs]).mean(0)
    for way in (file_scripts.running_sum, file_scripts.stack_and_mean):
        way(str(tmp_path / "out"), list(map(str, inputs)))
        share, worst = files.differing(inputs, tmp_path / "out")
        assert share < 0.5
        assert worst < 1e-6
        assert torch.allclose(load_file(tmp_path / "out")["lm_head.weight"].double(), exact)
    file_scripts.read_and_write(str(tmp_path / "out"), list(map(str, inputs)))
    assert (tmp_path / "out").read_bytes() == inputs[-1].read_bytes()


def test_differing_elements_are_counted(inputs: list[Path], tmp_path: Path) -> None:
    states = [load_file(path) for path in inputs]
    mean = {name: torch.stack([state[name].double() for state in states]).mean(0).float() for name in states[0]}
    mean["model.norm.weight"][3] += 1e-6
    save_file(mean, tmp_path / "out")
    share, worst = files.differing(inputs, tmp_path / "out")
    assert share * sum(value.numel() for value in mean.values()) == pytest.approx(1)
    assert 1e-8 < worst < 1e-6


def test_a_process_is_measured_alone() -> None:
    ballast = bytearray(300 << 20)  # of the measuring process: it must not count
    ballast[::4096] = b"x" * len(ballast[::4096])
    taken, printed = files.launch([sys.executable, "-S", "-c", "x = b'x' * (50 << 20); print('said {}')"])
    assert taken["code"] == 0
    assert "said {}" in printed
    assert 50 << 20 < taken["peak_bytes"] < 100 << 20
    assert 0 < taken["cpu_s"] < taken["wall_s"] * 2
    assert files.launch([sys.executable, "-S", "-c", "raise SystemExit(7)"])[0]["code"] == 7


def test_a_wrong_average_has_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Model, inputs: list[Path], folder: Path, mergekit: Path | None) -> dict[str, list[str]]:
        def copy(way: str) -> list[str]:
            return ["cp", str(inputs[0]), str(files.output_of(folder, way))]

        return {OURS: copy(OURS), RUNNING_SUM: ["false"], LIMIT: copy(LIMIT)}

    monkeypatch.setattr(files, "commands", wrong)
    rows = {row.way: row for row in files.measure([TINY], tmp_path, count=2)}
    assert [*rows] == [OURS, RUNNING_SUM, LIMIT, files.MERGEKIT]
    assert {way: row.status for way, row in rows.items()} == {
        OURS: "wrong", RUNNING_SUM: "failed", LIMIT: "ok", files.MERGEKIT: "not installed"
    }  # fmt: skip
    assert rows[OURS].reason.startswith("1.0e+00 of the elements differ")
    assert (rows[OURS].rounds, rows[LIMIT].rounds) == (0, 2)
    assert rows[LIMIT].cpu_s > 0
    assert [*tmp_path.iterdir()] == []


def test_bars_are_ratios_within_a_run() -> None:
    found = {work: (limit, value) for work, limit, value in files.bars(ROWS)}
    assert found == {
        "float32: CPU seconds, of torch, running sum": (0.25, 0.125),
        "float32: seconds": (pytest.approx(1.68), 1.0),
        "float32: peak memory, MB": (64, 40.0),
    }
    assert files.bars([replace(ROWS[0], rounds=0, status="failed"), *ROWS[1:]]) == []


def test_a_report_of_files_survives_and_is_shown(tmp_path: Path) -> None:
    about = {"command": "python -m bench files", "device_name": "some CPU", "threads": 2, "versions": {"torch": "2"}}
    report = Report({**about, "date": "2026-01-02T03:04:05+00:00"}, files=ROWS)
    report.write(tmp_path / "files.json")
    assert Report.read(tmp_path / "files.json") == report
    block = tables.files_block(report)
    assert "| 5 x 500 MB, fp32 | `swafast average` | 0.50 | 1.0x | 1.00 | 40 |" in block
    assert "| 5 x 500 MB, fp32 | torch, running sum | 4.00 | 8.0x | 3.00 | 1600 |" in block
    assert "| 5 x 500 MB, fp32 | mergekit, linear | not installed |" in block
    assert plot_files.plot_files(report, tmp_path / "files.png")
    assert (tmp_path / "files.png").stat().st_size > 5000
    assert not plot_files.plot_files(Report(), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.slow
def test_every_way_runs(tmp_path: Path) -> None:
    rows = {row.way: row for row in files.measure([TINY, replace(TINY, dtype="bfloat16")], tmp_path, count=1)}
    assert {way: row.status for way, row in rows.items() if way != files.MERGEKIT} == dict.fromkeys(
        (OURS, RUNNING_SUM, STACK, LIMIT), "ok"
    )
    assert rows[OURS].peak_bytes < rows[RUNNING_SUM].peak_bytes
