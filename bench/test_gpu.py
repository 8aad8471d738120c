"""A GPU run without a GPU: a dry run, a kill in each part, the programs it runs, and their verdicts."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from bench import device as closer
from bench import gpu, internals, loop, measure, names, process, smoke, timing
from bench.bars import WALL_BARS
from bench.cases import DEFAULTS, LARGEST, SEVERAL_ON, SWEPT, gpu_case, gpu_cases, spread_case, swept_case
from bench.device import launches_among, waits
from bench.gpu import Run
from bench.gpu.predictions import PREDICTIONS
from bench.lookup import merged
from bench.measure import Bench, Case, Setting
from bench.process import Finished, run_program
from bench.providers import moved_bytes
from bench.report import Part, Report, Row, Times, item_line
from bench.tables import gpu_table, share_of_copy, swept_table
from bench.timing import Clock
from bench.workloads import GPU_WORKLOADS
from swafast import FusedAveragedModel

CPU = torch.device("cpu")
BACKENDS = ("cpu", "reference")
NUM_PARTS = 18


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def few(backends: Sequence[str] = BACKENDS) -> Case:
    return gpu_case("dry_few", *DEFAULTS[0], backends)


def measured(*of: Case, seconds: float = 60.0, profile: bool = False) -> list[Row]:
    rows: list[Row] = []
    end = time.monotonic() + seconds
    bench = Bench(Setting(CPU, 0.0, rows.append, l2_bytes=gpu.DRY_L2_BYTES, end=end, profile=profile))
    for case in of:
        bench.run(case)
    return merged(rows)


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.provider: row for row in rows}


def test_cases_with_a_bar_come_first() -> None:
    parts = {part: gpu_cases(part, (), dry=False) for part in ("largest", "small", "formats", "ours", "compiled")}
    largest, small, rest, ours, compiled = parts.values()
    assert {case.workload.name for case in largest} == set(LARGEST)
    assert {case.workload.name for case in (*largest, *small, *rest)} == set(GPU_WORKLOADS) >= set(WALL_BARS)
    assert {(case.workload.name, case.averages) for case in rest if case.averages > 1} == {(n, 3) for n in SEVERAL_ON}
    assert [case.dtype for case in small[:3]] == [torch.float32] * 3
    assert not any(case.providers for case in (*largest, *ours))  # ours alone, here on no backend
    assert {each.name for case in compiled for each in case.providers} == {names.COMPILED}
    assert gpu_case("1e9", torch.float32, "compact", (), averages=2).held_bytes == 4 + 3 * 2
    dry = [case.workload.name for part in parts for case in gpu_cases(part, BACKENDS, dry=True)]
    assert set(dry) == {"dry_one", "dry_few", "dry_many"}


def test_every_provider_of_a_case_is_timed_beside_a_copy() -> None:
    one, three = (gpu_case("dry_one", *kind, BACKENDS, averages=n) for kind, n in ((DEFAULTS[1], 1), (DEFAULTS[0], 3)))
    rows = measured(few(), one, three)
    assert by_name(rows).keys() >= {"swafast cpu", names.TORCH_CLASS, names.COPY}
    for row in rows:
        assert row.status == "ok", row
        assert share_of_copy(row, [each for each in rows if each.key == row.key])
    ours = {row.group: row for row in rows if row.provider == "swafast cpu" and row.workload == "dry_one"}
    assert ours["exact"].counted_bytes == 10 * 300_000 == 300_000 * moved_bytes(torch.bfloat16, "exact")
    assert ours["float32 x3"].counted_bytes == (4 + 8 * 3) * 300_000
    assert all(row.error is not None and row.error < 1e-6 and row.wall and row.host for row in ours.values())


def test_what_a_provider_does_wrong_is_its_row() -> None:
    def failing(error: Exception | None) -> Callable[[torch.nn.Module], Any]:
        def make(model: torch.nn.Module) -> Any:
            if error is not None:
                raise error
            return replace(ours.make(model), update=lambda: None)

        return make

    case = few()
    ours, _, *rest = case.providers
    for error, status, reason in (
        (torch.OutOfMemoryError("no room\nat all"), "skipped", "out of memory: no room"),
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
        (None, "wrong", "0.weight is off by nan (relative L2), 1e-06 allowed"),
    ):
        rows = by_name(measured(replace(case, providers=[replace(ours, make=failing(error)), *rest])))
        assert (rows[ours.name].status, rows[ours.name].reason, rows[ours.name].device) == (status, reason, None)
        assert rows[names.TORCH_CLASS].status == "ok"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a GPU's way, with stand-ins for what only a GPU has."""
    monkeypatch.setattr(Setting, "on_gpu", property(lambda self: True))
    for name, value in (("BIG_COPY_BYTES", 8_000_000), ("BESIDE_BYTES", 0)):
        monkeypatch.setattr(measure, name, value)
    for name, found in (("waits", False), ("allocated_total", 512)):
        monkeypatch.setattr(closer, name, Mock(return_value=found))


@pytest.mark.usefixtures("on_gpu")
def test_a_compiler_gets_no_time_that_is_not_there() -> None:
    (row,) = measured(gpu_cases("compiled", (), dry=True)[0], seconds=measure.COMPILE_S / 2)
    assert (row.provider, row.status, "were left" in row.reason) == (names.COMPILED, "skipped", True)


def test_the_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device does at once what it is given, but for a sleep of 10 us."""
    monkeypatch.setattr(timing, "between_events", lambda call: Clock(CPU).host_s(call))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: time.sleep(1e-5))
    clock = Clock(CPU, apart=True, filler_bytes=1 << 12)
    clock.on_gpu, clock._cycles_per_s = True, clock._measure_sleep()
    assert 1e-3 <= clock.device_s(lambda: time.sleep(1e-3), 4, 1e-3) < 8e-3
    assert (waits(clock, lambda: None, 1e-5), waits(clock, lambda: time.sleep(0.02), 1e-5)) == (False, True)


@pytest.mark.usefixtures("on_gpu")
def test_a_gpus_way_through_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = by_name(measured(few()))
    ours, theirs = rows["swafast cpu"], rows[names.TORCH_CLASS]
    assert (ours.waits, ours.remarks) == (False, [])
    assert (theirs.waits, theirs.allocated_bytes) == (False, 512)
    monkeypatch.setattr(closer, "waits", Mock(side_effect=RuntimeError("it broke\nmore")))
    ours = by_name(measured(few()))["swafast cpu"]
    assert (ours.remarks, ours.device is None) == (["waiting: RuntimeError: it broke"], False)
    look = Mock(return_value=launches_among(["update", "Memcpy DtoD", "Context Sync", "[memory]"]))
    monkeypatch.setattr(closer, "activity", look)
    profiled = measured(few(), profile=True)
    assert {(row.launches, row.transfers, row.wall) for row in profiled} == {(1, 1, None)}
    assert look.call_count == 1 + len(profiled)  # the first is the warm-up: the profiler's start may hide a launch
    assert launches_among(["Stream Wait Event"]) == {}


@pytest.mark.gpu
def test_clock_and_profiler_on_a_gpu() -> None:
    tensor = torch.zeros(1 << 20, device="cuda")
    clock = Clock(tensor.device, apart=True, filler_bytes=1 << 26)
    assert 0 < clock.device_s(lambda: tensor.add_(1), 1, 1e-4) <= clock.wall_s(lambda: tensor.add_(1))
    assert not waits(clock, lambda: tensor.add_(1), 1e-4)
    assert waits(clock, lambda: tensor[0].item(), 1e-4)
    # In a process of its own: other tests make graphs, which do not go together with the profiler's library.
    script = (
        "import torch; from bench.device import activity\n"
        "tensor = torch.zeros(1 << 20, device='cuda')\n"
        "for _ in range(2): seen = activity(lambda: tensor.add_(1), tensor.device)\n"
        "assert seen == {'launches': 1, 'transfers': 0}, seen"
    )
    done = run_program([sys.executable, "-c", script], 60.0)
    assert done.code == 0, done.output


def make_run(out: Path, dry: bool = True, **more: Any) -> Run:
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    return Run(out, work, "python -m bench gpu", dry, time.monotonic() + 60.0, **more)


def test_the_parts_come_in_their_order(tmp_path: Path) -> None:
    run = make_run(tmp_path, dry=False)
    assert [name for name, *_ in run.parts()] == [
        "facts", "build", "bits of cuda", "largest", "small", "bits of triton", "times of triton", "launches",
        "tests of waiting and graphs", "the other gpu tests", "training loop", "memcheck", "racecheck",
        "compiled foreach", "grids and chunks", "spreads", "other formats", "picture",
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
    known = [name for name, *_ in run.parts()]

    def work(name: str, limit_s: float) -> None:
        with run.lines.open("a") as lines:
            lines.write(item_line("rows", Row(name, name, "float32", "swafast cpu", 1, 1, 12)))
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
    path, end, found = tmp_path / "dry.json", time.monotonic() + 20, list[str]()
    while time.monotonic() < end and known[killed] not in found:
        time.sleep(0.01)
        found = [row.workload for row in Report.read(path).rows] if path.is_file() else []
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    report = Report.read(path)
    assert [part.name for part in report.parts] == known[:killed]
    assert [row.workload for row in report.rows] == known[: killed + 1]


def test_a_part_that_fails_or_hangs_is_recorded_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)

    def hang(name: str, limit_s: float) -> None:
        done = run.start([sys.executable, "-c", "import time; time.sleep(60)"], limit_s, "bench.log")
        run.note(name, "failed", done.why, done.seconds)

    def fail(name: str, limit_s: float) -> None:
        run.end = 0.0
        raise OSError("no room in /a/b/c.txt")

    monkeypatch.setattr(run, "parts", lambda: [("hangs", 1.0, hang), ("fails", 9.0, fail), ("late", 9.0, fail)])
    run.go()
    found = [(part.name, part.status, part.detail) for part in Report.read(tmp_path / "dry.json").parts]
    assert found[0][:2] == ("hangs", "failed")
    assert "stopped after" in found[0][2]
    assert found[1:] == [("fails", "failed", "OSError: no room in c.txt"), ("late", "not run", "the time was up")]


@pytest.mark.slow
def test_a_dry_run_from_end_to_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, slow = Run.parts, ("build", "bits", "tests", "the other", "times of", "compiled", "grids", "other formats")
    monkeypatch.setattr(Run, "parts", lambda run: [part for part in parts(run) if not part[0].startswith(slow)])
    code = gpu.run(tmp_path, "python -m bench gpu", dry=True)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bench.log", "dry.json", "dry.png", "dry.samples.jsonl"
    ]  # fmt: skip
    report, text = Report.read(tmp_path / "dry.json"), (tmp_path / "dry.json").read_text()
    assert report.dry
    assert by_name(report.rows).keys() >= {"swafast cpu", names.TORCH_CLASS, names.COPY}
    assert [(step.way, step.backend, step.differing) for step in report.steps] == [
        (loop.NONE, None, None),
        *((way, backend, 0) for backend in BACKENDS for way in (loop.ATTACHED, loop.OVERLAP)),
        (loop.OFFLOAD, None, 0),
    ]
    assert str(tmp_path) not in text
    assert str(process.ROOT) not in text
    assert "no figure below is a GPU's" in printed
    assert printed.count("not measured") >= len(PREDICTIONS)


def test_a_carried_library_is_used_where_none_can_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    carried = tmp_path / "carried.so"
    monkeypatch.setenv("SWAFAST_LIBRARY", os.environ.get("SWAFAST_LIBRARY", ""))  # put back afterwards
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    monkeypatch.setattr(internals, "backend_in_use", lambda device: "cuda")
    run = make_run(tmp_path, dry=False, library=carried)
    run.build("build", 9.0)
    carried.touch()
    run.build("build", 9.0)
    run.checker("memcheck", 9.0)
    assert run.env == {"SWAFAST_LIBRARY": str(carried)}
    assert [(part.status, part.detail) for part in run.report.parts] == [
        ("failed", "there is no nvcc"),
        ("ok", "there is no nvcc; the carried library is used"),
        ("not run", "there is no compute-sanitizer"),
    ]


@pytest.mark.parametrize(
    ("code", "last", "status"),
    [(1, "1 failed, 1 passed in 2.00s", "failed"), (0, "1 passed in 2.00s", "ok"), (0, "1 skipped", "failed")],
)
def test_gpu_tests_are_counted(
    code: int, last: str, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, ran = make_run(tmp_path, dry=False), Mock(return_value=Finished(code, 2.0, f"FAILED a::y - assert 1\n{last}"))
    monkeypatch.setattr(gpu, "run_program", ran)
    run.tests(gpu.FIRST_TESTS)("tests", 9.0)
    (part,) = run.report.parts
    assert (part.status, last in part.detail, part.facts) == (status, True, {"failing": ["FAILED a::y - assert 1"]})
    assert gpu.FIRST_TESTS in ran.call_args[0][0]


# Sweeps and bits


def test_collects_and_draws_are_timed_in_groups_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(FusedAveragedModel, "sample_to", lambda self, model, index: drawn.append(index))
    rows = measured(*(spread_case("dry_few", *DEFAULTS[0], "cpu", work) for work in names.SPREADS))
    ours = [(row.group, row.status, row.counted_bytes // row.num_params) for row in rows if row.is_ours]
    assert ours == [("float32, collect", "ok", 24), ("float32, draw", "ok", 92)]
    assert len(drawn) > 1
    assert "fp32, draw |" in gpu_table(Report(rows=rows, dry=True))


def test_grids_and_chunks_are_swept_in_a_group_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    use = Mock(side_effect=internals.use_grid)
    monkeypatch.setattr(internals, "use_grid", use)
    rows = measured(swept_case("dry_one", *DEFAULTS[0], "cpu"))
    ours = [row for row in rows if row.is_ours]
    assert [row.provider for row in ours] == ["swafast cpu", *(f"swafast cpu, {label}" for label, _ in SWEPT)]
    assert {row.group for row in rows} == {"float32 swept"}
    assert {row.status for row in rows} == {"ok"}
    assert {call.args[0] for call in use.call_args_list} == {grid for _, grid in SWEPT}
    report = Report(rows=rows)
    assert len(swept_table(report).splitlines()[2:-2]) >= len(ours)
    assert "dry_one" not in gpu_table(report)
    assert "one tensor" not in gpu_table(report)


@pytest.mark.parametrize("multiprocessors", [108, 132, 144, 170])
def test_the_label_of_a_swept_grid_is_true_on_every_gpu(multiprocessors: int) -> None:
    for label, grid in SWEPT:
        if grid.chunk_numel is not None:
            assert label == f"chunks of {grid.chunk_numel}"
            continue
        said, rest = label.split("% ")
        assert rest == f"of the blocks of {grid.num_threads} threads"
        most = multiprocessors * 1024 // grid.num_threads
        assert grid.num_blocks(most) == pytest.approx(int(said) / 100 * most, abs=0.5 + 0.005 * most)
    base = Row("1e9", "1e9", "float32", "", 1, 1, 12, "float32 swept", device=Times.of([1.0]))
    rows = [replace(base, provider=name) for name in ("swafast cuda", f"swafast cuda, {SWEPT[0][0]}", names.COPY)]
    text = swept_table(Report({"multiprocessors": multiprocessors}, rows))
    assert f"multiprocessor, of {multiprocessors}." in " ".join(text.split())


def test_a_run_prints_whole_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = Report(dry=True, parts=[Part("training loop", "ok", f"{'overlap 1.00%, ' * 12}0 elements off")])
    gpu.show(report, tmp_path / "dry")
    printed = capsys.readouterr().out
    assert "0 elements off" in " ".join(printed.split())
    assert "…" not in printed
    assert {"cpu", "reference"} < set(gpu_table(report).replace("|", " ").split())


def test_smoke_compares_all_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    several = next(case for case in smoke.CASES if len(case.averages) == 3)
    monkeypatch.setattr(smoke, "CASES", [several, *(case for case in smoke.CASES if case.averages[0][0] == "compact")])
    monkeypatch.setattr(smoke, "NUMELS", (3, 64, 4097))
    emit, run_case = Mock(), smoke.run_case
    differ, line = smoke.compare(["reference"], "cpu", emit)
    assert (differ, line) == (False, "6 of 6 cases equal in all bits on cpu, reference")
    assert next(iter(emit.call_args[0][0].values())).keys() == {"reference"}

    def broken(case: smoke.SmokeCase, backend: str, device: str) -> dict[str, str]:
        found = run_case(case, backend, device)
        return {title: value[::-1] if backend == "reference" else value for title, value in found.items()}

    monkeypatch.setattr(smoke, "run_case", broken)
    differ, text = smoke.compare(["reference"], "cpu", emit)
    assert (differ, text.splitlines()[-1]) == (True, "3 of 6 cases equal in all bits on cpu, reference")
