"""The GPU run's machinery without a GPU: the programs it runs, their logs and verdicts, and bits."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import loop, parts, process, run, smoke
from bench.gpu.parts import Parts, judge_checker, read_junit
from bench.gpu.process import Budget, Finished, run_program, scrub, write_log
from bench.gpu.report import merged
from bench.gpu.run import Run
from bench.gpu.test_report import FEW, fabricated_loop, fabricated_row
from bench.gpu.worker import Key, Lines, Plan, Writer, key_of, read_lines
from bench.providers import Foreach
from bench.report import TORCH_CLASS


def test_a_worker_that_breaks_off_is_followed_by_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plans: list[Plan] = []

    def first(writer: Writer) -> Finished:
        writer.begin(FEW, "swafast cpu")
        writer.emit(fabricated_row("dry_few", "float32", "swafast cpu", 1e-3))
        writer.begin(FEW, TORCH_CLASS)
        return Finished(-11, 1.0, "a fault in some/where")

    def second(writer: Writer) -> Finished:
        assert not writer.wanted(FEW, TORCH_CLASS)
        assert writer.wanted(FEW, Foreach.name)
        writer.begin(FEW, Foreach.name)
        writer.emit(fabricated_row("dry_few", "float32", Foreach.name, 1e-3))
        return Finished(0, 1.0, "")

    def run_worker(command: Sequence[str], limit_s: float) -> Finished:
        plans.append(Plan.read(Path(command[-2])))
        with Path(command[-1]).open("a") as file:
            return (first, second)[len(plans) - 1](Writer(file, plans[-1].done))

    monkeypatch.setattr(run, "run_program", run_worker)
    whole = Run(tmp_path, tmp_path, "", True, False, [FEW], Budget(60.0))
    whole._measure(1 << 20)
    rows = {row.provider: row for row in whole.report.rows}
    assert plans[1].done == [("dry_few", "float32", "float32", 1, name) for name in ("swafast cpu", TORCH_CLASS)]
    assert {name: row.status for name, row in rows.items()} == {
        "swafast cpu": "ok", TORCH_CLASS: "failed", Foreach.name: "ok",
    }  # fmt: skip
    assert rows[TORCH_CLASS].reason == "the process ended with code -11: a fault in some/where"


@pytest.mark.parametrize(
    ("written", "done", "status", "detail"),
    [
        (True, Finished(0, 9.0, "plain 5.0%, 0 elements off"), "ok", "plain 5.0%, 0 elements off"),
        (True, Finished(1, 9.0, "plain 5.0%, 7 elements off"), "failed", "plain 5.0%, 7 elements off"),
        (
            False,
            Finished(0, 9.0, "6 trainings take 64 GiB, 16 are free"),
            "not run",
            "6 trainings take 64 GiB, 16 are free",
        ),
        (False, Finished(1, 9.0, "no kernel"), "failed", "ended with code 1: no kernel"),
    ],
)
def test_the_training_loop_is_measured_in_a_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: bool, done: Finished, status: str, detail: str
) -> None:
    def run_loop(command: Sequence[str], limit_s: float, env: object) -> Finished:
        if written:
            rows = [asdict(row) for row in fabricated_loop(0.01)]
            Path(command[command.index("--out") + 1]).write_text(json.dumps(rows))
        return done

    monkeypatch.setattr(parts, "run_program", run_loop)
    part, rows = Parts(tmp_path, tmp_path, Budget(100.0), ("cuda", "triton"), dry=False).loop(12.0)
    assert (part.name, part.status, part.detail) == ("training loop", status, detail)
    assert rows == (fabricated_loop(0.01) if written else [])


def test_a_training_loop_for_which_no_time_is_left_is_not_run(tmp_path: Path) -> None:
    part, rows = Parts(tmp_path, tmp_path, Budget(40.0), ("cuda",), dry=False).loop(12.0)
    assert (part.status, part.detail, rows) == ("not run", "the time was up", [])


def test_trainings_that_do_not_fit_are_not_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(loop, "available_bytes", lambda device: 16 << 30)
    arguments = ["--backend", "cuda", "--backend", "triton", "--out", str(tmp_path / "loop.json")]
    assert loop.main(arguments) == 0
    assert capsys.readouterr().out == "6 trainings take 64 GiB, 16 are free\n"
    assert not list(tmp_path.iterdir())


def test_a_worker_that_never_begins_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "run_program", lambda command, limit_s: Finished(1, 0.1, "no module named x"))
    whole = Run(tmp_path, tmp_path, "", True, False, [FEW], Budget(60.0))
    whole._measure(1 << 20)
    assert whole.report.failures()[0] == "times: the process ended with code 1: no module named x"


def test_a_row_of_several_averages_is_not_that_of_one() -> None:
    several = replace(FEW, averages=3)
    rows = [fabricated_row("dry_few", "float32", "swafast cpu", 1e-3, averages=count) for count in (1, 3)]
    lines = [json.dumps({"begin": key_of(several, "swafast cpu")}), json.dumps(asdict(rows[0]))]
    assert read_lines(lines).under_way == (*rows[1].key, "swafast cpu")
    assert read_lines([*lines, json.dumps(asdict(rows[1]))]).under_way is None
    assert merged(rows) == rows


def test_lines_that_are_cut_off_are_left_out() -> None:
    key: Key = ("w", "float32", "float32", 1, "p")
    assert read_lines([json.dumps({"begin": key}), '{"workload": "w", "ti']) == Lines([], [key], key)


def test_budget_keeps_what_later_parts_need() -> None:
    budget = Budget(100.0)
    assert budget.grant(30.0, kept_s=50.0) == 30.0
    assert 39 < budget.grant(60.0, kept_s=60.0) <= 40
    assert budget.grant(60.0, kept_s=200.0) == 0.0


@pytest.mark.parametrize("ours", [signal.SIG_IGN, signal.default_int_handler], ids=["in the background", "not"])
def test_a_program_that_takes_too_long_may_still_say_what_it_has(ours: Any) -> None:
    before = signal.signal(signal.SIGINT, ours)
    script = "try:\n import time; print('begun', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('counts')"
    try:
        done = run_program([sys.executable, "-c", script], 1.5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.timed_out
    assert done.seconds < 60
    assert done.last_line == "counts"


def test_a_program_that_is_not_there_is_a_failure() -> None:
    assert run_program(["no-such-program"], 1.0).code == 127


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        (f"{process.ROOT}/tests/test_gpu.py:3: at /usr/local/cuda-13.0/bin/nvcc", "tests/test_gpu.py:3: at nvcc"),
        ("-o /tmp/x-1/a_b/lib.so", "-o lib.so"),
        ("3 of 4/s and a/b/c", "3 of 4/s and a/b/c"),
        (f"cd {process.ROOT} && x", "cd . && x"),
    ],
)
def test_logs_name_no_folder_of_a_machine(text: str, scrubbed: str, tmp_path: Path) -> None:
    assert scrub(text) == scrubbed
    write_log(tmp_path / "log", text)
    assert (tmp_path / "log").read_text() == f"{scrubbed}\n"


def test_a_long_log_keeps_both_ends(tmp_path: Path) -> None:
    write_log(tmp_path / "log", "first" + "x" * 3 * process.LOG_CHARS + "last")
    text = (tmp_path / "log").read_text()
    assert len(text) < process.LOG_CHARS + 100
    assert text.startswith("first")
    assert text.endswith("last\n")


SUMMARY = "========= ERROR SUMMARY: {} errors\n"


@pytest.mark.parametrize(
    ("output", "code", "timed_out", "status", "detail"),
    [
        (SUMMARY.format(0), 0, False, "ok", "0 errors"),
        ("========= Invalid __global__ read of size 4\n" + SUMMARY.format(3), 86, False, "failed", "3 errors: Invalid"),
        ("========= Error: Device not supported. Please\n", 1, False, "not run", "the tool refuses: Error: Device not"),
        ("begun\n", 0, True, "not run", "not done after"),
        ("========= Uninitialized __global__ read\nbegun\n", -9, True, "failed", "Uninitialized"),
        (SUMMARY.format(0) + "2 of 3 cases equal\n", 1, False, "failed", "code 1: 2 of 3 cases equal"),
        ("Traceback\nnot supported by this\n", 1, False, "not run", "no summary: it ended with code 1: not supported"),
    ],
)
def test_memory_checkers_verdict(output: str, code: int, timed_out: bool, status: str, detail: str) -> None:
    part = judge_checker("memcheck", Finished(code, 1.0, output, timed_out))
    assert part.status == status
    assert detail in part.detail


def test_junit_is_counted(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite hostname="h"><testcase classname="tests.a" name="x"/><testcase classname="a" name="y">'
        '<failure message="assert 1 == 2&#10;more"/></testcase><testcase classname="a" name="z"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    counts = {"passed": 1, "failed": 1, "errors": 0, "skipped": 1}
    assert read_junit(junit) == (counts, ["a::y: assert 1 == 2"])
    assert read_junit(tmp_path / "none.xml") == ({}, [])


def test_a_failing_test_does_not_stop_the_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = Parts(tmp_path, tmp_path, Budget(900.0), ("cuda",), dry=False)

    def pytest_fails(command: Sequence[str], limit_s: float, env: Any = None) -> Finished:
        junit = next(option for option in command if option.startswith("--junitxml")).partition("=")[2]
        Path(junit).write_text('<t><testcase classname="a" name="y"><failure message="no"/></testcase></t>')
        return Finished(1, 2.0, "1 failed")

    monkeypatch.setattr(parts, "run_program", pytest_fails)
    part = given.tests()
    assert (part.status, part.facts["failing"]) == ("failed", ["a::y: no"])
    monkeypatch.setattr(parts, "find_tool", lambda name: None)
    assert given.build().status == "failed"
    assert given.checker("memcheck").detail == "there is no compute-sanitizer"


# The smoke run


def test_smoke_compares_all_bits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    several = next(case for case in smoke.CASES if len(case.averages) == 3)
    monkeypatch.setattr(smoke, "CASES", [several, *(case for case in smoke.CASES if case.averages[0][1] == "compact")])
    monkeypatch.setattr(smoke, "NUMELS", (3, 64, 4097))
    arguments = ["--device", "cpu", "--backend", "reference"]
    assert smoke.main(arguments) == 0
    monkeypatch.setattr(smoke, "CASES", smoke.CASES[:1])
    run_case = smoke.run_case
    assert run_case(smoke.CASES[0], "cpu", "cpu") == run_case(smoke.CASES[0], "cpu", "cpu")

    def broken(case: smoke.SmokeCase, backend: str, device: str) -> dict[str, str]:
        if backend == "reference":
            raise RuntimeError("launch failed")
        return run_case(case, backend, device)

    monkeypatch.setattr(smoke, "run_case", broken)
    assert smoke.main(arguments) == 1
    assert "launch failed" in capsys.readouterr().out
