"""The GPU run's machinery without a GPU: rotations, times, and tiny cases on the CPU with planted failures."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from bench.gpu import cases, measure, ours
from bench.gpu.bars import SHARED, WALL_BARS
from bench.gpu.cases import BILLION, DRY_WORKLOADS, SEVERAL_ON, SMALLER_AND_LARGER, Case
from bench.gpu.ours import SeveralOnBackend, ours_on
from bench.gpu.process import run_program
from bench.gpu.profile import sum_up
from bench.gpu.report import COPY, GpuRow, merged, share_of_copy
from bench.gpu.timing import COVER, MAX_TENSORS, Rotation, Stopwatch, rotation_size
from bench.provider import Provider
from bench.providers import CompiledForeach, Foreach, Ours
from bench.report import TORCH_CLASS
from bench.workloads import build
from swafast.terms.formats import get_format

CPU = torch.device("cpu")
H200_L2 = 60 << 20
FEW = Case("dry_few", "float32", "float32")
BACKENDS = ("cpu", "reference")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Recorder:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[GpuRow] = []
        self.begun: list[str] = []

    def wanted(self, case: Case, provider: str) -> bool:
        return True

    def begin(self, case: Case, provider: str) -> None:
        self.begun.append(provider)

    def emit(self, row: GpuRow) -> None:
        self.rows.append(row)


def setting(seconds: float = 60.0) -> measure.Setting:
    return measure.Setting(CPU, BACKENDS, measure.DRY_L2_BYTES, 0.0, time.monotonic() + seconds)


def measured(*cases: Case, seconds: float = 60.0) -> list[GpuRow]:
    recorder = Recorder()
    measure.measure_all(cases, setting(seconds), recorder)
    return merged(recorder.rows)


@pytest.mark.parametrize("copy_bytes", [100, 1 << 20, H200_L2, 8 * BILLION])
@pytest.mark.parametrize("num_tensors", [1, 161, 3000, 100_000])
def test_rotation_covers_the_cache_several_times(copy_bytes: int, num_tensors: int) -> None:
    size = rotation_size(copy_bytes, num_tensors, H200_L2)
    assert size.copies >= 1
    assert size.copies * copy_bytes + size.filler_bytes >= COVER * H200_L2
    assert size.copies * num_tensors <= max(MAX_TENSORS, num_tensors)
    assert size.filler_bytes == 0 or size.copies * copy_bytes < COVER * H200_L2


def test_rotation_visits_each_copy_in_turn() -> None:
    seen: list[int] = []
    rotation = Rotation([lambda at=at: seen.append(at) for at in range(3)])  # type: ignore[misc]
    for _ in range(4):
        rotation.step()
    rotation.once()
    assert seen == [0, 1, 2, 0, 0, 1, 2]


def test_a_filler_visits_each_copy_once_in_a_sample() -> None:
    watch = Stopwatch(CPU, filler_bytes=1 << 12)
    assert watch.calls_per_sample(Rotation([lambda: None] * 5)) == 5


def test_every_provider_of_a_case_is_timed_beside_a_copy() -> None:
    rows = measured(FEW, Case("dry_one", "bfloat16", "exact"))
    assert {row.provider for row in rows if row.workload == "dry_few"} >= {"swafast cpu", TORCH_CLASS, COPY}
    for row in rows:
        assert row.status == "ok", row
        assert row.device_s, row
        assert share_of_copy(row, [each for each in rows if each.key == row.key])
    ours = next(row for row in rows if row.provider == "swafast cpu" and row.dtype == "bfloat16")
    assert (ours.counted_bytes, ours.num_params) == (10 * 300_000, 300_000)
    assert ours.error is not None
    assert ours.error < 1e-6
    assert ours.samples
    assert ours.host_s


def test_a_wrong_provider_has_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    average = Foreach.average
    monkeypatch.setattr(Foreach, "average", lambda self, weight: average(self, weight * 0.99))
    row = next(row for row in measured(FEW) if row.provider == Foreach.name)
    assert (row.status, row.samples, row.device_s) == ("wrong", [], [])
    assert "off by" in row.reason


def test_what_a_provider_raises_is_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Provider) -> None:
        raise torch.OutOfMemoryError("no room\nat all")

    monkeypatch.setattr(Foreach, "update", refuse)
    monkeypatch.setattr(Ours, "update", lambda self: 1 / 0)
    rows = {row.provider: row for row in measured(FEW)}
    assert (rows[Foreach.name].status, rows[Foreach.name].reason) == ("skipped", "out of memory: no room")
    assert (rows["swafast cpu"].status, rows["swafast cpu"].reason) == ("failed", "ZeroDivisionError: division by zero")
    assert rows[TORCH_CLASS].status == "ok"


def test_when_the_time_is_up_the_rest_says_so() -> None:
    rows = measured(FEW, seconds=0.0)
    assert {(row.status, row.reason) for row in rows} == {("skipped", "the time was up")}
    assert len(rows) == 5


def test_a_compiler_is_not_begun_near_the_end() -> None:
    (row,) = measured(replace(FEW, compiled=True), seconds=measure.COMPILE_S / 2)
    assert (row.provider, row.status) == (CompiledForeach.name, "skipped")
    assert "were left" in row.reason


def test_what_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1000)
    assert {row.reason for row in measured(FEW)} == {"does not fit the 0 GiB that are free"}


@pytest.mark.parametrize("kind", [*cases.DEFAULTS, *cases.OTHERS, *SMALLER_AND_LARGER])
def test_averages_one_at_a_time_are_the_averages(kind: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "DECODED_NUMEL", 1000)
    model = build(DRY_WORKLOADS["dry_few"], cases.DTYPES[kind[0]], CPU)
    provider = ours_on("cpu", kind[1])(model)
    provider.update()
    provider.update()
    pairs = list(zip(provider.each_average(), provider.averages(), strict=True))
    assert all(one.dtype == torch.float32 and torch.equal(one, other) for one, other in pairs)


def test_bytes_are_those_of_the_formats() -> None:
    for (dtype, fmt), counted in cases.COUNTED_BYTES.items():
        item = cases.DTYPES[dtype].itemsize
        planes = get_format(fmt).nbytes
        assert planes is not None
        assert counted == item + 2 * planes - (2 if fmt == "mirrored" else 0)
        assert cases.HELD_BYTES[dtype, fmt] == item + planes
    moved = {case.averages: case.counted_bytes for case in cases.gpu_cases() if case.dtype == "bfloat16"}
    assert moved[3] == 2 + 8 * 3
    assert Case("1e9", "float32", "float32", averages=3).counted_bytes == 4 + 8 * 3
    assert Case("1e9", "float32", "compact", averages=2).held_bytes == 4 + 3 * 2


def test_cases_with_a_bar_come_first() -> None:
    listed = cases.gpu_cases()
    assert len(set(listed)) == len(listed)
    assert {case.workload for case in listed[:4]} == {"1e9", "llama3_8b"}
    assert {case.workload for case in listed[:8]} == {*SHARED, *WALL_BARS}
    assert {case.workload for case in listed} == set(cases.GPU_WORKLOADS)
    assert all(case.find_workload().num_params > 0 for case in listed)
    # Several averages stand beside one of the same kind, which is there by then.
    several = [at for at, case in enumerate(listed) if case.averages > 1]
    assert len(several) == 2 * len(SEVERAL_ON)
    assert all(replace(listed[at], averages=1) in listed[:at] for at in several)


def test_ours_is_gated_and_timed_in_each_format_and_several_at_once() -> None:
    listed = [Case("dry_one", *kind) for kind in SMALLER_AND_LARGER[2:4]]
    listed += [Case("dry_one", *kind, averages=3) for kind in (cases.DEFAULTS[0], SMALLER_AND_LARGER[0])]
    rows = [row for row in measured(*listed) if row.is_ours]
    assert len(rows) == 2 * len(listed)
    for row, case in zip(rows, (case for case in listed for _ in BACKENDS), strict=True):
        assert row.key == (case.workload, case.dtype, case.format, case.averages)
        assert (row.status, row.counted_bytes) == ("ok", 300_000 * case.counted_bytes)
        assert row.device_s
        assert row.error is not None


def one_by_the_rule_of_another(averages: SeveralOnBackend) -> None:
    held = averages.fused._modules
    held["mean"], held["fast"] = held["fast"], held["mean"]


def one_left_out(averages: SeveralOnBackend) -> None:
    update = averages.fused.update_parameters

    def without(model: torch.nn.Module) -> None:
        kept = copy.deepcopy(averages.fused["slow"].state_dict())
        update(model)
        averages.fused["slow"].load_state_dict(kept)

    averages.fused.update_parameters = without  # type: ignore[method-assign]


def one_moved_twice(averages: SeveralOnBackend) -> None:
    update = averages.fused.update_parameters

    def twice(model: torch.nn.Module) -> None:
        update(model)
        averages.fused["slow"].update_parameters(model)

    averages.fused.update_parameters = twice  # type: ignore[method-assign]


@pytest.mark.parametrize("plant", [one_by_the_rule_of_another, one_left_out, one_moved_twice])
def test_the_gate_of_several_averages_kills_the_bug(
    plant: Callable[[SeveralOnBackend], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = SeveralOnBackend._make

    def spoiled(self: SeveralOnBackend, model: torch.nn.Module) -> None:
        make(self, model)
        plant(self)

    monkeypatch.setattr(SeveralOnBackend, "_make", spoiled)
    rows = [row for row in measured(replace(FEW, averages=3)) if row.is_ours]
    assert {row.status for row in rows} == {"wrong"}
    assert all("off by" in row.reason for row in rows)


def test_what_is_not_whole_has_no_more_layers_than_there_are() -> None:
    llama = cases.GPU_WORKLOADS["llama3_8b"]
    for memory, depth in ((1e12, 32), (0.99 * 16 * llama.num_params, 31), (16 * 5 * 218_112_000, 5), (1.0, 0)):
        assert measure.depth_within(llama, memory, 16, 0) == depth


# A GPU's calls, with stand-ins for torch.cuda


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        self.at = math.nan

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1e3 * (other.at - self.at)


@pytest.fixture
def fake_watch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    """A stopwatch that takes the GPU's way; the device does at once what it is given, but for a sleep of 10 us."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: time.sleep(1e-5))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    watch = Stopwatch(CPU, filler_bytes=1 << 12)
    watch.on_gpu = True
    watch._cycles_per_s = watch._measure_sleep()
    return watch


def test_device_time_is_for_one_call(fake_watch: Stopwatch) -> None:
    assert 1e-3 <= fake_watch.device_s(lambda: time.sleep(1e-3), 4, 1e-3) < 4e-3


def test_a_call_that_takes_as_long_as_the_device_sleeps_has_waited(fake_watch: Stopwatch) -> None:
    assert not fake_watch.waits(lambda: None, 1e-5)
    assert fake_watch.waits(lambda: time.sleep(0.02), 1e-5)


def test_a_complaint_about_waiting_is_kept(fake_watch: Stopwatch) -> None:
    def complain() -> None:
        raise RuntimeError("called a synchronizing CUDA operation\nmore")

    assert fake_watch.sync_error(complain) == "called a synchronizing CUDA operation"
    assert fake_watch.sync_error(lambda: None) == ""


def test_the_profiler_counts_kernels_and_transfers_apart() -> None:
    seen = sum_up([("update", 5000), ("update", 3000), ("Memcpy DtoD", 2000), ("Context Sync", 9), ("[memory]", 0)])
    assert seen is not None
    assert (seen.launches, seen.transfers, seen.kernels, seen.seconds) == (2, 1, {"update": 2}, 1e-5)
    assert sum_up([("Stream Wait Event", 1)]) is None


@pytest.mark.gpu
def test_stopwatch_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    watch = Stopwatch(device, filler_bytes=1 << 26)
    tensor = torch.zeros(1 << 20, device=device)

    def add() -> None:
        tensor.add_(1)

    def read() -> None:
        tensor[0].item()

    rotation = Rotation([add])
    samples, _ = watch.measure(rotation, [], 0.0)
    assert 0 < min(samples.device) <= min(samples.wall)
    assert min(watch.graph_s(rotation)) > 0
    assert not watch.waits(add, 1e-4)
    assert watch.waits(read, 1e-4)
    assert watch.sync_error(add) == ""
    assert watch.sync_error(read)


@pytest.mark.gpu
def test_profiler_on_a_gpu() -> None:
    # In a process of its own: other tests make graphs, which do not go together with the profiler's library.
    script = (
        "import torch; from bench.gpu.profile import activity\n"
        "tensor = torch.zeros(1 << 20, device='cuda')\n"
        "for _ in range(2): seen = activity(lambda: tensor.add_(1), tensor.device)\n"
        "assert (seen.launches, seen.transfers) == (1, 0), seen"
    )
    done = run_program([sys.executable, "-c", script], 60.0)
    assert done.code == 0, done.output


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a GPU's way through a case, on the CPU, with stand-ins for what only a GPU answers."""
    monkeypatch.setattr(measure.Setting, "on_gpu", property(lambda self: True))
    monkeypatch.setattr(measure, "BIG_COPY_BYTES", measure.DRY_BIG_COPY_BYTES)
    monkeypatch.setattr(measure, "BESIDE_BYTES", measure.DRY_BESIDE_BYTES)
    monkeypatch.setattr(Stopwatch, "waits", lambda self, call, host_s: False)
    monkeypatch.setattr(Stopwatch, "sync_error", lambda self, call: "")
    monkeypatch.setattr(measure, "activity", lambda call, device: sum_up([("update_kernel", 7000)]))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_gpus_way_through_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "graph_s", lambda self, rotation: [1e-6])
    rows = {row.provider: row for row in measured(FEW)}
    ours, theirs = rows["swafast cpu"], rows[TORCH_CLASS]
    assert (ours.waits, ours.sync_error, ours.graph_s, ours.remarks) == (False, "", [1e-6], [])
    assert (theirs.waits, theirs.sync_error, theirs.graph_s) == (False, None, [])
    assert rows[Foreach.name].graph_s == [1e-6]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_what_a_tool_raises_is_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Stopwatch, rotation: Rotation) -> list[float]:
        raise RuntimeError("capture failed\nmore")

    monkeypatch.setattr(Stopwatch, "graph_s", refuse)
    row = next(row for row in measured(FEW) if row.provider == "swafast cpu")
    assert (row.status, row.remarks) == ("ok", ["graph: RuntimeError: capture failed"])
    assert row.device_s


@pytest.mark.usefixtures("as_on_a_gpu")
def test_profiling_counts_launches_and_takes_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    measure.measure_all([FEW], replace(setting(), profile=True), recorder)
    assert {(row.status, row.launches, row.busy_s) for row in recorder.rows} == {("ok", 1, 7e-6)}
    assert not any(row.samples or row.device_s for row in recorder.rows)
    monkeypatch.setattr(measure, "activity", lambda call, device: None)
    measure.measure_all([FEW], replace(setting(), profile=True), recorder)
    assert recorder.rows[-1].reason == "RuntimeError: the profiler recorded nothing of the device"
