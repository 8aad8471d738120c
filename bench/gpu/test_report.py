"""The GPU run's machinery without a GPU: the report from planted numbers, and all of it from end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.gpu import cases, process, run
from bench.gpu.bars import BackendBars, bars
from bench.gpu.cases import Case, dry_cases
from bench.gpu.parts import Parts
from bench.gpu.report import COPY, GpuReport, GpuRow, Part, merged, with_profiles
from bench.gpu.run import Run, failed_row, left_out
from bench.gpu.tables import bars_table, workloads_table
from bench.loop import ATTACHED, NONE, OFFLOAD, OVERLAP, Followed
from bench.providers import CompiledForeach, Foreach
from bench.report import LERP_FLOAT, MUL_ADD, TORCH_CLASS

FEW = Case("dry_few", "float32", "float32")


def fabricated_row(workload: str, dtype: str, provider: str, seconds: float, **more: Any) -> GpuRow:
    """Give a row of a model of 1e9 params whose update takes this long; no figure of any machine."""
    samples = [seconds, seconds * 9, seconds / 9]
    fmt = more.pop("format", "exact" if dtype == "bfloat16" else "float32")
    return GpuRow(
        workload, all_titles().get(workload, workload), dtype, provider, 10**9, 10, 12 * 10**9, samples=samples,
        device_s=more.pop("device_s", samples), host_s=[more.pop("host", 1e-5)], format=fmt, **more,
    )  # fmt: skip


def all_titles() -> dict[str, str]:
    return {name: workload.title for name, workload in cases.GPU_WORKLOADS.items()}


def fabricated_report(scale: Callable[[int], float] = lambda at: 1.0) -> GpuReport:
    """Give a whole report of invented numbers; ``scale`` bends our times, case by case."""
    rows = []
    for at, case in enumerate(case for case in cases.gpu_cases() if not case.compiled):
        ours = 1e-3 * scale(at)
        kind: dict[str, Any] = {"dtype": case.dtype, "format": case.format, "averages": case.averages}
        times = {COPY: 0.97e-3, "swafast cuda": ours, "swafast triton": ours * 1.3}
        if case.averages > 1:
            pass
        elif case.format == "float32" == case.dtype:
            times |= {TORCH_CLASS: 12e-3, Foreach.name: 2e-3, CompiledForeach.name: 1.5e-3}
        elif case.format == "exact":
            times |= {TORCH_CLASS: 3e-3, MUL_ADD: 8e-3, LERP_FLOAT: 7e-3}
        for name, seconds in times.items():
            facts: dict[str, Any] = {}
            if name.startswith("swafast"):
                facts = {"launches": 1, "transfers": 0, "waits": False, "sync_error": "", "allocated_bytes": 0}
            rows.append(fabricated_row(case.workload, provider=name, seconds=seconds, **kind, **facts))
    about = {"gpu": "an invented GPU", "driver": "0", "versions": {"torch": "0", "triton": "0"}, "date": "2026-01-02"}
    bits = {"float32, float32": {"cpu": "a", "cuda": "a", "triton": "a"}}
    loop = fabricated_loop(0.002 * scale(0))
    return GpuReport(about, False, [Part("build", "ok", "for sm_90")], rows, bits, loop=loop)


def fabricated_loop(exposed: float, differing: int = 0) -> list[Followed]:
    """Give invented steps of a second or so, of which overlap leaves ``exposed``."""

    def followed(way: str, backend: str | None, part: float, off: int | None) -> Followed:
        return Followed("GPT-2 medium", way, backend, 10**9, 4, [step * (1 + part) for step in (1.0, 1.1, 5.0)], off)

    ours = [followed(OVERLAP, backend, exposed, differing) for backend in ("cuda", "triton")]
    return [followed(NONE, None, 0.0, None), followed(ATTACHED, "cuda", 0.05, 0), *ours]


def by_work(report: GpuReport) -> dict[str, BackendBars]:
    return {bar.work: bar for bar in bars(report)}


def verdicts(report: GpuReport, backend: str) -> dict[str, bool | None]:
    found = {}
    for work, each in by_work(report).items():
        bar = each.bar(backend)
        found[work] = None if bar is None else bar.met
    return found


def test_all_bars_are_met_by_numbers_that_meet_them() -> None:
    report = fabricated_report()
    assert set(verdicts(report, "cuda").values()) == {True}
    assert len(by_work(report)) == 24
    assert report.failures() == []


def test_bars_are_computed_from_the_medians() -> None:
    found = by_work(fabricated_report())
    measured = {work: bar.measured for work, bar in found.items()}
    assert measured["Llama-3-8B, bf16 exact: of the device copy"]["cuda"] == pytest.approx(97)
    assert measured["Llama-3-8B, bf16 exact: of the device copy"]["triton"] == pytest.approx(97 / 1.3)
    assert measured["ResNet-50, fp32: torch's class, wall time"]["cuda"] == pytest.approx(12)
    assert measured["compiled foreach, wall time, least"]["cuda"] == pytest.approx(1.5)
    assert measured["host time, of 20 us + 0.5 us a tensor, most"]["cuda"] == pytest.approx(40)


def test_each_bar_can_be_missed() -> None:
    slow = verdicts(fabricated_report(lambda at: 20.0 * (1 + at)), "cuda")  # several averages come after one
    assert [work for work, met in slow.items() if met] == [
        "a training step of GPT-2 medium: elements off with overlap",
        "launches and transfers of an update, most",
        "host time, of 20 us + 0.5 us a tensor, most",
        "allocated by an update, most",
        "an update that waits for the device (1: there is)",
        "cases of 1 whose bits are not the CPU's",
    ]
    good = fabricated_report()
    costly = {"launches": 1, "transfers": 1, "host_s": [1e-3], "allocated_bytes": 512, "waits": True}
    rows = [replace(row, **costly) if row.provider == "swafast cuda" else row for row in good.rows]  # type: ignore[arg-type]
    bad = replace(good, rows=rows, bits={"a": {"cpu": "x", "cuda": "y", "triton": "x"}})
    assert list(verdicts(bad, "cuda").values())[-5:] == [False] * 5
    assert set(verdicts(bad, "triton").values()) == {True, False}  # it is at 75 % of the copy
    assert bad.failures() == ["bits of 1 cases differ, the first is a"]


def test_several_averages_are_held_to_their_bytes_at_the_rate_of_one() -> None:
    work = "GPT-2 medium, bf16 exact: 3 averages, time/bytes"
    good = fabricated_report()
    assert by_work(good)[work].measured["cuda"] == pytest.approx(1.0)
    key = ("gpt2_medium", "bfloat16", "exact", 3)
    for factor, met in ((1.1, True), (1.2, False)):
        rows = [
            replace(row, device_s=[factor * s for s in row.device_s])
            if (row.key, row.provider) == (key, "swafast cuda")
            else row
            for row in good.rows
        ]
        found = by_work(replace(good, rows=rows))[work]
        assert found.measured == pytest.approx({"cuda": factor, "triton": 1.0})  # each beside its own
        assert verdicts(replace(good, rows=rows), "cuda")[work] is met
    rows = [row for row in good.rows if row.key != (*key[:3], 1)]
    assert verdicts(replace(good, rows=rows), "cuda")[work] is None


def test_overlap_is_held_to_a_share_of_the_step_and_to_the_bits() -> None:
    exposed, off = (f"a training step of GPT-2 medium: {what}" for what in (
        "what overlap leaves exposed", "elements off with overlap"
    ))  # fmt: skip
    for part, differing, verdict in ((0.009, 0, (True, True)), (0.011, 0, (False, True)), (-0.001, 3, (True, False))):
        report = replace(fabricated_report(), loop=fabricated_loop(part, differing))
        found = by_work(report)
        assert found[exposed].measured == pytest.approx({"cuda": 100 * part, "triton": 100 * part})
        assert (verdicts(report, "triton")[exposed], verdicts(report, "triton")[off]) == verdict
    without = verdicts(replace(fabricated_report(), loop=[]), "cuda")
    assert [work for work, met in without.items() if met is None] == [
        "a training step: what overlap leaves exposed",
        "a training step: elements off with overlap",
    ]


def test_what_was_not_measured_is_no_verdict() -> None:
    good = fabricated_report()
    report = replace(good, rows=[row for row in good.rows if row.workload != "llama3_8b"], bits={})
    missing = [work for work, met in verdicts(report, "cuda").items() if met is None]
    assert len(missing) == 5
    rows = [replace(row, launches=None, waits=None) for row in good.rows]
    assert list(verdicts(replace(good, rows=rows), "cuda").values()).count(None) == 2


def test_failures_name_parts_and_rows_of_ours() -> None:
    good = fabricated_report()
    wrong = replace(good.rows[1], status="wrong", reason="off", samples=[], device_s=[])
    others = replace(good.rows[3], status="failed", reason="theirs", samples=[], device_s=[])
    report = replace(good, parts=[Part("gpu tests", "failed", "1 failed")], rows=[*good.rows, wrong, others])
    assert report.failures() == [
        "gpu tests: 1 failed",
        "swafast cuda on 1e9 params in one tensor, float32: wrong: off",
    ]
    assert replace(good, rows=[]).failures() == ["no update of swafast was timed"]


def test_report_survives_its_json(tmp_path: Path) -> None:
    report = fabricated_report()
    report.write(tmp_path / "gpu.json")
    read = GpuReport.read(tmp_path / "gpu.json")
    assert read == GpuReport.from_dict(read.to_dict())
    assert read.rows[0].device_s == pytest.approx(report.rows[0].device_s, rel=1e-4)
    assert verdicts(read, "cuda") == verdicts(report, "cuda")
    assert [row.way for row in read.loop] == [NONE, ATTACHED, OVERLAP, OVERLAP]
    with pytest.raises(ValueError, match="schema must be 1, got 2"):
        GpuReport.from_dict({**read.to_dict(), "schema": 2})


def test_copies_are_joined_and_profiles_put_beside_the_times() -> None:
    copy = fabricated_row("1e9", "float32", COPY, 1.0)
    (joined,) = merged([copy, replace(copy, device_s=[5.0])])
    assert joined.device_s == [*copy.device_s, 5.0]
    row = fabricated_row("1e9", "float32", "swafast cuda", 1.0)
    (seen,) = with_profiles([row], [replace(row, samples=[], launches=1, busy_s=0.5)])
    assert (seen.launches, seen.busy_s, seen.samples) == (1, 0.5, row.samples)
    (unseen,) = with_profiles([row], [replace(row, status="failed", reason="no CUPTI")])
    assert (unseen.launches, unseen.status, unseen.remarks) == (None, "ok", ["profiler: no CUPTI"])


def test_tables_fit_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    report = fabricated_report(lambda at: 1.2 if at == 0 else 1.0)
    console = Console(width=run.WIDTH)
    for table in (workloads_table(report), bars_table(report)):
        console.print(table)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 110
        assert not any("…" in line for line in lines), lines
    assert "1e9 params in one tensor, fp32: of the device copy" in lines[2]
    assert "80.8% SHORT" in lines[2]
    assert "97.0% ok" in lines[3]


def test_a_dry_runs_tables_give_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [replace(row, provider=row.provider.replace("cuda", "cpu")) for row in fabricated_report().rows]
    Console(width=run.WIDTH).print(bars_table(replace(fabricated_report(), rows=rows, dry=True)))
    printed = capsys.readouterr().out
    assert "these are not GPU figures" in printed
    assert not {"ok", "SHORT"} & set(printed.split())


def test_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.gpu.plot import plot

    assert plot(fabricated_report(), tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "gpu.png").stat().st_size < 900_000
    assert not plot(replace(fabricated_report(), rows=[]), tmp_path / "none.png")


def test_left_out_says_what_and_why() -> None:
    row = fabricated_row("llama3_8b", "float32", TORCH_CLASS, 1.0)
    cut = replace(row, title="Llama-3-8B, 20 of 32 layers, no embeddings", status="skipped", reason="no room")
    report = replace(fabricated_report(), rows=[cut], parts=[Part("memcheck", "not run", "refused")])
    assert left_out(report) == [
        "memcheck: refused",
        f"{cut.title}: shortened to the memory that was free",
        f"{cut.title}, float32: {TORCH_CLASS}: no room",
    ]


def test_failed_row_has_its_case() -> None:
    row = failed_row(("1e9", "float32", "float32", 3, "swafast cuda"), fabricated_report().rows, "ended")
    assert (row.title, row.status, row.samples) == ("1e9 params in one tensor", "failed", [])
    assert (row.kind, row.num_params) == ("float32 x3", 10**9)
    assert failed_row(("new", "float32", "compact", 1, "p"), [], "ended").kind == "float32 compact"


# All of it


def test_dry_run_from_end_to_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run, "dry_cases", lambda: [case for case in dry_cases() if case == FEW])
    code = run.run(tmp_path, "python -m bench gpu", dry=True, with_parts=False)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.log", "dry.json", "dry.png"]
    report = GpuReport.read(tmp_path / "dry.json")
    assert report.dry
    assert {row.provider for row in report.rows} >= {"swafast cpu", "swafast reference", TORCH_CLASS, COPY}
    assert len(report.environment["source_sha256"]) == 64
    assert [(row.way, row.backend, row.differing) for row in report.loop] == [
        (NONE, None, None),
        *((way, backend, 0) for backend in ("cpu", "reference") for way in (ATTACHED, OVERLAP)),
        (OFFLOAD, None, 0),
    ]
    text = (tmp_path / "dry.json").read_text()
    assert str(tmp_path) not in text
    assert str(process.ROOT) not in text
    assert "no figure below is a GPU's" in printed
    assert "every time on a GPU" in printed


def test_a_run_survives_what_its_parts_raise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no room in /a/b/c.txt")

    pytest.importorskip("matplotlib")
    of_run, of_parts = ("_measure", "_describe"), ("build", "tests", "smoke", "loop")
    for where, name in (*((Run, name) for name in of_run), *((Parts, name) for name in of_parts)):
        monkeypatch.setattr(where, name, fail)
    assert run.run(tmp_path, "python -m bench gpu", dry=True, with_parts=True) == 1
    report = GpuReport.read(tmp_path / "dry.json")
    failed = {part.name: part.detail for part in report.parts if part.failed}
    assert set(failed) == {"build", "gpu tests", "bits", "environment", "times", "training loop", "picture"}
    assert failed["build"] == "OSError: no room in c.txt"
