"""A GPU run without a GPU: a dry run, a kill in each part, the programs it runs, and their verdicts."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from bench import gpu, gpu_bench, loop, names, process, smoke
from bench.bars import SHARED, WALL_BARS
from bench.gpu import Run
from bench.gpu_bench import DEFAULTS, SEVERAL_ON, Case, GpuBench, Setting, cases_of
from bench.lookup import merged
from bench.process import Budget, Finished, judge_checker, read_junit, run_program, scrub, write_log
from bench.profiling import Activity
from bench.providers import CompiledForeach, Foreach, Ours, Provider, moved_bytes
from bench.report import Report, Row, item_line
from bench.steps import decoder_work
from bench.tables import share_of_copy
from bench.timing import Clock
from bench.workloads import GPU_WORKLOADS

CPU = torch.device("cpu")
FEW = Case("dry_few", "float32", "float32")
BACKENDS = ("cpu", "reference")
L2_BYTES = gpu.DRY_L2_BYTES
NUM_PARTS = 16


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measured(path: Path, *cases: Case, seconds: float = 60.0, profile: bool = False) -> list[Row]:
    setting = Setting(CPU, BACKENDS, L2_BYTES, 0.0, time.monotonic() + seconds, profile)
    with path.open("w") as lines:
        bench = GpuBench(setting, lines)
        for case in cases:
            bench.run(case)
    report = Report()
    for line in path.read_text().splitlines():
        report.add("rows", json.loads(line)["rows"])
    return merged(report.rows)


# The cases and what is measured of them


def test_cases_with_a_bar_come_first() -> None:
    largest, small, rest = (cases_of(part, dry=False) for part in ("largest", "small", "formats"))
    assert {case.workload for case in largest} == set(SHARED)
    assert {case.workload for case in (*largest, *small, *rest)} == set(GPU_WORKLOADS) >= set(WALL_BARS)
    assert {(case.workload, case.averages) for case in rest if case.averages > 1} == {(n, 3) for n in SEVERAL_ON}
    assert [case.dtype for case in small[:3]] == ["float32"] * 3
    assert not any(case.others for case in (*largest, *cases_of("ours", dry=False)))
    assert Case("1e9", "float32", "compact", averages=2).held_bytes == 4 + 3 * 2
    for part in ("largest", "small", "ours", "compiled", "formats"):
        assert {case.workload for case in cases_of(part, dry=True)} <= {"dry_one", "dry_few", "dry_many"}


def test_every_provider_of_a_case_is_timed_beside_a_copy(tmp_path: Path) -> None:
    rows = measured(tmp_path / "lines", FEW, Case("dry_one", *DEFAULTS[1]), Case("dry_one", *DEFAULTS[0], averages=3))
    assert {row.provider for row in rows if row.workload == "dry_few"} >= {"swafast cpu", names.TORCH_CLASS, names.COPY}
    for row in rows:
        assert row.status == "ok", row
        assert share_of_copy(row, [each for each in rows if each.key == row.key])
    one, three = (
        next(r for r in rows if r.provider == "swafast cpu" and r.group == g) for g in ("exact", "float32 x3")
    )
    assert (one.counted_bytes, three.counted_bytes) == (10 * 300_000, (4 + 8 * 3) * 300_000)
    assert one.counted_bytes == 300_000 * moved_bytes(torch.bfloat16, "exact")
    assert one.error is not None
    assert one.error < 1e-6
    assert one.wall
    assert one.host


def test_what_a_provider_does_wrong_is_its_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(self: Provider) -> None:
        raise torch.OutOfMemoryError("no room\nat all")

    average = Foreach.average
    monkeypatch.setattr(Foreach, "average", lambda self, weight: average(self, weight * 0.99))
    monkeypatch.setattr(Ours, "update", lambda self: 1 / 0)
    rows = {row.provider: row for row in measured(tmp_path / "lines", FEW)}
    assert (rows[Foreach.name].status, rows[Foreach.name].device) == ("wrong", None)
    assert rows["swafast cpu"].reason == "ZeroDivisionError: division by zero"
    assert rows[names.TORCH_CLASS].status == "ok"
    monkeypatch.setattr(Foreach, "update", refuse)
    rows = {row.provider: row for row in measured(tmp_path / "lines", FEW)}
    assert (rows[Foreach.name].status, rows[Foreach.name].reason) == ("skipped", "out of memory: no room")


def test_what_there_is_no_time_or_room_for_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {row.reason for row in measured(tmp_path / "lines", FEW, seconds=0.0)} == {"the time was up"}
    monkeypatch.setattr(Setting, "on_gpu", property(lambda self: True))
    monkeypatch.setattr(gpu_bench, "BIG_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(gpu_bench, "BESIDE_BYTES", 0)
    compiled = Case("dry_few", *DEFAULTS[0], compiled=True)
    (row,) = measured(tmp_path / "lines", compiled, seconds=gpu_bench.COMPILE_S / 2)
    assert (row.provider, row.status, "were left" in row.reason) == (CompiledForeach.name, "skipped", True)
    monkeypatch.setattr(gpu_bench, "available_bytes", lambda device: 1000)
    assert {row.reason for row in measured(tmp_path / "lines", FEW)} == {"does not fit the 0 GiB that are free"}


# A GPU's way, with stand-ins for torch.cuda


class FakeEvent:
    """An event on the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = math.nan

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1e3 * (other.at - self.at)


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that takes the GPU's way; the device does at once what it is given, but for a sleep of 10 us."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: time.sleep(1e-5))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    clock = Clock(CPU, apart=True, filler_bytes=1 << 12)
    clock.on_gpu = True
    clock._cycles_per_s = clock._measure_sleep()
    return clock


def test_the_clock_of_a_gpu(fake_clock: Clock) -> None:
    def complain() -> None:
        raise RuntimeError("called a synchronizing CUDA operation\nmore")

    contestant = loop.Contestant(decoder_work("tiny", loop.DRY_SHAPE, 2), loop.Way(loop.NONE), CPU)
    contestant._device = torch.device("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "synchronize", lambda device: None)
        patch.setattr(FakeEvent, "elapsed_time", lambda self, end: 30.0)
        assert contestant.sample() == pytest.approx(0.030 / 2)  # between two events, and of one step
    assert 1e-3 <= fake_clock.device_s(lambda: time.sleep(1e-3), 4, 1e-3) < 8e-3
    assert not fake_clock.waits(lambda: None, 1e-5)
    assert fake_clock.waits(lambda: time.sleep(0.02), 1e-5)
    assert fake_clock.sync_error(complain) == "called a synchronizing CUDA operation"
    assert fake_clock.sync_error(lambda: None) == ""


def test_a_gpus_way_through_a_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(self: Clock, rotation: object) -> list[float]:
        raise RuntimeError("capture failed\nmore")

    monkeypatch.setattr(Setting, "on_gpu", property(lambda self: True))
    for name, value in (("BIG_COPY_BYTES", 8_000_000), ("BESIDE_BYTES", 0)):
        monkeypatch.setattr(gpu_bench, name, value)
    monkeypatch.setattr(Clock, "waits", lambda self, call, host_s: False)
    monkeypatch.setattr(Clock, "sync_error", lambda self, call: "")
    monkeypatch.setattr(Clock, "graph_s", lambda self, rotation: [1e-6])
    rows = {row.provider: row for row in measured(tmp_path / "lines", FEW)}
    ours, theirs = rows["swafast cpu"], rows[names.TORCH_CLASS]
    assert (ours.waits, ours.sync_error, ours.graph and ours.graph.median, ours.remarks) == (False, "", 1e-6, [])
    assert (theirs.waits, theirs.sync_error, theirs.graph) == (False, None, None)
    monkeypatch.setattr(Clock, "graph_s", refuse)
    rows = {row.provider: row for row in measured(tmp_path / "lines", FEW)}
    assert rows["swafast cpu"].remarks == ["graph: RuntimeError: capture failed"]
    assert rows["swafast cpu"].device
    activity = Activity.of([("update", 5000), ("Memcpy DtoD", 2000), ("Context Sync", 9), ("[memory]", 0)])
    look = Mock(return_value=activity)
    monkeypatch.setattr(gpu_bench, "activity", look)
    found = measured(tmp_path / "lines", FEW, profile=True)
    assert {(row.launches, row.transfers, row.busy_s, row.wall) for row in found} == {(1, 1, 7e-6, None)}
    assert look.call_count == 1 + len(found)  # the first is the warm-up: the profiler's start may hide a launch
    assert Activity.of([("Stream Wait Event", 1)]) is None


@pytest.mark.gpu
def test_clock_on_a_gpu() -> None:
    tensor = torch.zeros(1 << 20, device="cuda")
    clock = Clock(tensor.device, apart=True, filler_bytes=1 << 26)
    assert 0 < clock.device_s(lambda: tensor.add_(1), 1, 1e-4) <= clock.wall_s(lambda: tensor.add_(1))
    assert not clock.waits(lambda: tensor.add_(1), 1e-4)
    assert clock.waits(lambda: tensor[0].item(), 1e-4)
    assert (clock.sync_error(lambda: tensor.add_(1)), bool(clock.sync_error(lambda: tensor[0].item()))) == ("", True)


@pytest.mark.gpu
def test_profiler_on_a_gpu() -> None:
    # In a process of its own: other tests make graphs, which do not go together with the profiler's library.
    script = (
        "import torch; from bench.profiling import activity\n"
        "tensor = torch.zeros(1 << 20, device='cuda')\n"
        "for _ in range(2): seen = activity(lambda: tensor.add_(1), tensor.device)\n"
        "assert (seen.launches, seen.transfers) == (1, 0), seen"
    )
    done = run_program([sys.executable, "-c", script], 60.0)
    assert done.code == 0, done.output


# A whole run


def make_run(out: Path, seconds: float = 60.0, **more: Any) -> Run:
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    return Run(out, work, "python -m bench gpu", True, Budget(seconds), **more)


def names_of(run: Run) -> list[str]:
    return [name for name, *_ in run.parts()]


def test_the_parts_come_in_their_order(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.dry = False
    assert names_of(run) == [
        "facts", "build", "bits of cuda", "largest", "small", "bits of triton", "times of triton", "launches",
        "tests of waiting and graphs", "the other gpu tests", "training loop", "memcheck", "racecheck",
        "compiled foreach", "other formats", "picture",
    ]  # fmt: skip
    limits = [limit for _, limit, _ in run.parts()]
    assert len(limits) == NUM_PARTS
    assert sum(limits[:9]) < gpu.TOTAL_S < 540  # what matters most is reached even if every part hangs
    assert len({*gpu.LOGS, "gpu.json", "gpu.png", run.lines.name, "failed.json"}) <= 8


@pytest.mark.parametrize("killed", range(NUM_PARTS))
def test_a_kill_in_any_part_leaves_what_was_measured(
    killed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The part under way has found a row, and hangs: that row is there too."""
    run = make_run(tmp_path)
    known, ready = names_of(run), tmp_path / "ready"

    def work(name: str, limit_s: float) -> None:
        found = Row(name, name, "float32", "swafast cpu", 1, 1, 12)
        with run.lines.open("a") as lines:
            lines.write(item_line("rows", found))
        if name == known[killed]:
            run.start(["sleep", "60"], 60.0, "bench.log", {})
        run.note(name, "ok")

    monkeypatch.setattr(process, "TICK_S", 0.02)
    monkeypatch.setattr(run, "parts", lambda: [(name, 30.0, work) for name in known])
    pid = os.fork()
    if pid == 0:  # no test goes on in here
        try:
            run.go()
        finally:
            os._exit(1)
    try:
        path, end = tmp_path / "dry.json", time.monotonic() + 20
        while time.monotonic() < end and not ready.exists():
            if path.is_file() and any(row.workload == known[killed] for row in Report.read(path).rows):
                ready.touch()
            time.sleep(0.01)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    report = Report.read(tmp_path / "dry.json")
    assert [part.name for part in report.parts] == known[:killed]
    assert [row.workload for row in report.rows] == known[: killed + 1]


def test_a_part_that_fails_or_hangs_is_recorded_and_the_run_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, seconds=30.0)

    def hang(name: str, limit_s: float) -> None:
        done = run.start(
            [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 1.0, "bench.log"
        )
        run.note(name, "failed", done.why, done.seconds)

    def fail(name: str, limit_s: float) -> None:
        raise OSError("no room in /a/b/c.txt")

    run.parts = lambda: [("hangs", 1.0, hang), ("fails", 9.0, fail), ("late", 9.0, fail)]  # type: ignore[method-assign]
    grant = run.budget.grant
    run.budget.grant = lambda wanted, kept: 0.0 if len(run.report.parts) == 2 else grant(wanted, kept)  # type: ignore
    run.go()
    found = [(part.name, part.status, part.detail) for part in Report.read(tmp_path / "dry.json").parts]
    assert found[0][:2] == ("hangs", "failed")
    assert "stopped after" in found[0][2]
    assert found[1:] == [("fails", "failed", "OSError: no room in c.txt"), ("late", "not run", "the time was up")]


def test_a_dry_run_from_end_to_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    parts = Run.parts
    slow = ("times of", "compiled", "other formats")
    monkeypatch.setattr(Run, "parts", lambda run: [part for part in parts(run) if not part[0].startswith(slow)])
    code = gpu.run(tmp_path, "python -m bench gpu", dry=True, checks=False)
    printed = capsys.readouterr().out
    assert code == 0, printed
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["bench.log", "dry.json", "dry.png", "dry.samples.jsonl"]
    report = Report.read(tmp_path / "dry.json")
    assert report.dry
    assert {row.provider for row in report.rows} >= {"swafast cpu", names.TORCH_CLASS, names.COPY}
    assert len(report.environment["source_sha256"]) == 64
    assert [(step.way, step.backend, step.differing) for step in report.steps] == [
        (loop.NONE, None, None),
        *((way, backend, 0) for backend in BACKENDS for way in (loop.ATTACHED, loop.OVERLAP)),
        (loop.OFFLOAD, None, 0),
    ]
    text = (tmp_path / "dry.json").read_text()
    assert str(tmp_path) not in text
    assert str(process.ROOT) not in text
    assert "no figure below is a GPU's" in printed


def test_a_carried_library_is_used_where_none_can_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu.internals, "native_build", lambda: {})
    monkeypatch.setenv("SWAFAST_LIBRARY", "")
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    carried = tmp_path / "libswafast.so"
    run = make_run(tmp_path, library=carried)
    run.dry = False
    run.report.environment["device_name"] = "x"
    monkeypatch.setattr(gpu.internals, "backend_in_use", lambda device: "cuda")
    run.build("build", 9.0)
    assert (run.report.parts[-1].status, run.report.parts[-1].detail) == ("failed", "there is no nvcc")
    carried.touch()
    run.build("build", 9.0)
    assert (run.report.parts[-1].status, run.env) == ("ok", {"SWAFAST_LIBRARY": str(carried)})
    assert "the carried library is used" in run.report.parts[-1].detail
    run.checker("memcheck", 9.0)
    assert run.report.parts[-1].detail == "there is no compute-sanitizer"


# Programs, logs and verdicts


@pytest.mark.parametrize("ours", [signal.SIG_IGN, signal.default_int_handler], ids=["in the background", "not"])
def test_a_program_that_takes_too_long_may_still_print_what_it_has(ours: Any) -> None:
    before = signal.signal(signal.SIGINT, ours)
    script = "try:\n import time; print('begun', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('counts')"
    ticks: list[int] = []
    try:
        done = run_program([sys.executable, "-c", script], 2.5, tick=lambda: ticks.append(1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.timed_out, done.last_line) == (True, "counts")
    assert done.seconds < 60
    assert len(ticks) >= 2
    assert run_program(["no-such-program"], 1.0).code == 127


def test_logs_name_no_folder_of_a_machine_and_keep_both_ends(tmp_path: Path) -> None:
    for text, scrubbed in (
        (f"{process.ROOT}/tests/test_gpu.py:3: at /usr/local/cuda-13.0/bin/nvcc", "tests/test_gpu.py:3: at nvcc"),
        ("-o /tmp/x-1/a_b/lib.so", "-o lib.so"),
        ("3 of 4/s and a/b/c", "3 of 4/s and a/b/c"),
        (f"cd {process.ROOT} && x", "cd . && x"),
    ):
        assert scrub(text) == scrubbed
    write_log(tmp_path / "log", "first" + "x" * 3 * process.LOG_CHARS + "last")
    text = (tmp_path / "log").read_text()
    assert len(text) < process.LOG_CHARS + 100
    assert (text[:5], text[-5:]) == ("first", "last\n")


SUMMARY = "========= ERROR SUMMARY: {} errors\n"
RACES = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("output", "code", "timed_out", "status", "detail"),
    [
        (SUMMARY.format(0), 0, False, "ok", "0 errors"),
        (RACES.format(0, 0), 0, False, "ok", "0 errors"),
        (RACES.format(2, 2), 86, False, "failed", "2 errors"),
        ("========= Invalid __global__ read of size 4\n" + SUMMARY.format(3), 86, False, "failed", "3 errors: Invalid"),
        ("========= Error: Race reported between Write\n", -9, True, "failed", "Race reported"),
        ("========= Error: Device not supported. Please\n", 1, False, "not run", "the tool refuses: Error: Device not"),
        ("begun\n", 0, True, "not run", "not done after"),
        (SUMMARY.format(0) + "2 of 3 cases equal\n", 1, False, "failed", "code 1: 2 of 3 cases equal"),
        ("Traceback\nnot supported by this\n", 1, False, "not run", "no summary: it ended with code 1: not supported"),
    ],
)
def test_memory_checkers_verdict(output: str, code: int, timed_out: bool, status: str, detail: str) -> None:
    part = judge_checker("memcheck", Finished(code, 1.0, output, timed_out))
    assert part.status == status
    assert detail in part.detail


def test_gpu_tests_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    junit = tmp_path / "work" / "junit.xml"
    commands: list[Sequence[str]] = []

    def pytest_fails(command: Sequence[str], *more: Any) -> Finished:
        commands.append(command)
        junit.write_text(
            '<t><testcase classname="tests.a" name="x"/><testcase classname="a" name="y"><failure message="assert 1 == '
            '2&#10;more"/></testcase><testcase classname="a" name="z"><skipped/></testcase></t>'
        )
        return Finished(1, 2.0, "1 failed")

    run = make_run(tmp_path)
    run.dry = False
    monkeypatch.setattr(gpu, "run_program", pytest_fails)
    run.tests(gpu.FIRST_TESTS)("tests", 9.0)
    (part,) = run.report.parts
    assert (part.status, part.facts["failing"]) == ("failed", ["a::y: assert 1 == 2"])
    assert {key: part.facts[key] for key in ("passed", "failed", "errors", "skipped")} == {
        "passed": 1, "failed": 1, "errors": 0, "skipped": 1
    }  # fmt: skip
    assert commands[0][commands[0].index("-k") + 1] == gpu.FIRST_TESTS
    assert read_junit(tmp_path / "none.xml") == ({}, [])


def test_smoke_compares_all_bits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    several = next(case for case in smoke.CASES if len(case.averages) == 3)
    monkeypatch.setattr(smoke, "CASES", [several, *(case for case in smoke.CASES if case.averages[0][1] == "compact")])
    monkeypatch.setattr(smoke, "NUMELS", (3, 64, 4097))
    arguments = ["--device", "cpu", "--backend", "reference"]
    assert smoke.main(arguments) == 0
    run_case = smoke.run_case

    def broken(case: smoke.SmokeCase, backend: str, device: str) -> dict[str, str]:
        found = run_case(case, backend, device)
        if backend == "reference":
            found[case.title] = found[case.title][::-1]
        return found

    monkeypatch.setattr(smoke, "run_case", broken)
    assert smoke.main(arguments) == 1
    assert "0 of" not in capsys.readouterr().out.splitlines()[0]
