"""One workload from end to end, and the gate with a bug planted in each way of averaging."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from bench import command, gate, measure, names, profiling, providers
from bench.lookup import find
from bench.providers import CompiledForeach, Foreach, Ours, Provider, moved_bytes, ours_on, providers_for
from bench.report import Report, Row
from bench.timing import COVER, MAX_TURNS, Clock, Rotation, RotationSize, interleave
from bench.workloads import GPU_WORKLOADS, LLAMA_LAYER_PARAMS, LLAMA_LAYERS, WORKLOADS, Workload, build
from swafast import FusedAverages

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
TINY = Workload(
    "tiny",
    "Tiny",
    lambda depth: iter([("stem.weight", (33, 7)), ("stem.bias", (1,)), ("head.weight", (5, 3, 2))]),
    full_depth=1,
    num_params=33 * 7 + 1 + 30,
    buffers=lambda: iter([("norm.running_mean", (3,)), ("norm.num_batches_tracked", ())]),
)
# Bytes a param of each format: the table of docs/formats.md.
KEPT = {"float32": 4, "exact": 4, "compact": 3, "compensated": 8, "half": 2, "mirrored": 6}


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the compiled provider out: it takes seconds, whatever the workload."""
    monkeypatch.setattr(CompiledForeach, "refusal", classmethod(lambda cls, model: "not in tests"))


def measured(dtype: torch.dtype) -> list[Row]:
    return measure.measure(TINY, dtype, CPU, budget_s=0.0, memory_bytes=4e9)


def passes(group: str, dtype: torch.dtype) -> dict[str, Row]:
    return {row.provider: row for row in measure.measure_passes(group, TINY, dtype, CPU, 0.0, 4e9)}


def wrong(rows: dict[str, Row]) -> dict[str, str]:
    return {name: row.reason for name, row in rows.items() if row.wrong}


# Workloads


@pytest.mark.parametrize("workload", GPU_WORKLOADS.values(), ids=lambda workload: workload.name)
def test_shapes_add_up_to_the_known_total(workload: Workload) -> None:
    entries = list(workload.params(workload.full_depth))
    assert sum(math.prod(shape) for _, shape in entries) == workload.num_params
    assert len({name for name, _ in entries}) == len(entries)


def test_a_wrong_total_is_refused_and_memory_decides_the_layers_of_llama() -> None:
    with pytest.raises(RuntimeError, match="short must have 4 params, got 3"):
        build(Workload("short", "short", lambda depth: iter([("weight", (3,))]), 1, num_params=4), torch.float32, CPU)
    llama, gpt2 = WORKLOADS["llama3_8b"], WORKLOADS["gpt2_medium"]
    assert sum(math.prod(shape) for _, shape in llama.params(1)) == LLAMA_LAYER_PARAMS
    assert llama.depth_within(1e12) == LLAMA_LAYERS
    assert llama.depth_within(0.99 * 16 * llama.num_params, 16, 0) == LLAMA_LAYERS - 1
    assert 0 < llama.depth_within(12e9) < LLAMA_LAYERS
    assert llama.depth_within(1e9) == 0
    assert gpt2.depth_within(12e9) == gpt2.full_depth
    assert gpt2.depth_within(4e9) == 0
    assert "3 of 32 layers" in llama.title_at(3)


# A workload's rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_provider_gets_a_row(dtype: torch.dtype) -> None:
    rows = measured(dtype)
    assert {row.provider for row in rows} == {kind.name for kind in providers_for(dtype)} | {names.FLAT_LERP}
    for row in rows:
        assert (row.status == "ok") == (row.wall is not None), row
        assert not row.wrong, row
    own = find(rows, names.OURS, names.OURS_EXACT)
    assert own is not None
    assert own.error is not None
    assert (own.held_bytes, own.error < 1e-6) == (4 * TINY.num_params, True)
    assert own.counted_bytes == (dtype.itemsize + 8) * TINY.num_params
    (row, *_) = measure.measure(TINY, torch.float32, CPU, budget_s=0.0, memory_bytes=1e6)
    assert (row.status, "does not fit" in row.reason) == ("skipped", True)


def test_providers_share_memory_when_there_is_much_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SHARED_FROM_BYTES", 0)
    params = list(build(TINY, torch.float32, CPU).parameters())
    arena = measure.Arena(params, 12 * TINY.num_params)
    first, second = arena.averages(), arena.averages()
    assert [average.shape for average in first] == [param.shape for param in params]
    assert all(a.data_ptr() == b.data_ptr() and a.data_ptr() % 64 == 0 for a, b in zip(first, second, strict=True))
    for average, value in zip(first, (1.0, 2.0, 3.0), strict=True):
        average.fill_(value)
    assert [average.mean().item() for average in second] == [1.0, 2.0, 3.0]
    assert not any(row.wrong for row in measured(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_our_passes_keep_and_move_the_bytes_of_the_docs(dtype: torch.dtype) -> None:
    size, numel = dtype.itemsize, TINY.num_params
    for format, row in passes(names.FORMATS, dtype).items():
        assert (row.status, row.held_bytes) == ("ok", KEPT[format] * numel)
        assert row.counted_bytes == (size + 2 * KEPT[format]) * numel
    rows = passes(names.SEVERAL, dtype)
    per_param = {name: ((row.held_bytes or 0) / numel, row.counted_bytes / numel) for name, row in rows.items()}
    assert list(per_param.items()) == [
        (names.ONE, (4, size + 8)),
        (names.TWO, (8, size + 16)),
        (names.THREE, (12, size + 24)),
        (names.THREE_APART, (12, 3 * (size + 8))),
    ]
    assert moved_bytes(torch.float16, "mirrored") == 2 + 2 * 4 + 2


# The gate


class SkipsLastTensor(Foreach):
    def average(self, weight: float) -> None:
        torch._foreach_lerp_(self.kept[:-1], self.params[:-1], weight)


class WrongWeight(Foreach):
    def average(self, weight: float) -> None:
        super().average(weight * 0.999)


class ForgetsBuffers(Foreach):
    def update(self) -> None:
        before = [buffer.clone() for buffer in self.kept_buffers]
        super().update()
        torch._foreach_copy_(self.kept_buffers, before)


class YieldsNan(Foreach):
    def each(self) -> Iterator[Tensor]:
        yield from (average.clone().fill_(float("nan")) for average in self.kept)


def other_rule(made: FusedAverages, model: torch.nn.Module) -> None:
    FusedAverages.update_parameters(made, model)
    made["mean"].load_state_dict(made["fast"].state_dict())


def one_left_out(made: FusedAverages, model: torch.nn.Module) -> None:
    for name in list(made)[:-1]:
        made[name].update_parameters(model)


def one_moved_twice(made: FusedAverages, model: torch.nn.Module) -> None:
    FusedAverages.update_parameters(made, model)
    made["fast"].update_parameters(model)


@pytest.mark.parametrize("plant", [None, other_rule, one_left_out, one_moved_twice])
def test_the_gate_of_several_averages_kills_the_bug(plant: Callable[..., None] | None) -> None:
    model = build(TINY, torch.float32, CPU)
    before = [param.clone() for param in model.parameters()]
    provider = ours_on("cpu", "float32", 3)(model)
    if plant is None:
        assert gate.check(provider, model)[0] < 1e-6
        assert all(map(torch.equal, model.parameters(), before))
        return
    provider.update = lambda: plant(provider.made, model)  # type: ignore[method-assign]
    with pytest.raises(gate.WrongAverageError, match="is off by"):
        gate.check(provider, model)


@pytest.mark.parametrize("broken", [SkipsLastTensor, WrongWeight, ForgetsBuffers, YieldsNan])
def test_gate_stops_a_planted_bug(broken: type[Provider]) -> None:
    model = build(TINY, torch.float32, CPU)
    with pytest.raises(gate.WrongAverageError):
        gate.check(broken(model), model)


def test_exact_must_equal_float32_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    by_rule = Ours.by_rule

    def off_by_one_bit(self: Ours) -> Iterator:
        for rule, weight, averages in by_rule(self):
            kept = [average.clone() for average in averages]
            if self.format == "exact":
                kept[1].view(torch.int32)[0] ^= 1
            yield rule, weight, kept

    monkeypatch.setattr(Ours, "by_rule", off_by_one_bit)
    rows = {row.provider: row for row in measured(torch.bfloat16)}
    assert wrong(rows) == {names.OURS_FLOAT32: "bits of mean differ from those of swafast exact"}
    assert rows[names.OURS_FLOAT32].wall is None


def test_the_gate_stops_a_format_that_rounds_to_too_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = providers.internals.decoded

    def coarse(averaged: object, format: str, model: torch.nn.Module) -> Iterator[Tensor]:
        for average in decoded(averaged, format, model):  # type: ignore[arg-type]
            yield average.bfloat16().float() if format == "compact" else average

    monkeypatch.setattr(providers.internals, "decoded", coarse)
    assert set(wrong(passes(names.FORMATS, torch.float32))) == {"compact"}


def test_the_gate_stops_a_pass_whose_bits_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Ours.update

    def forgets_the_last(self: Ours) -> None:
        if not self.apart:
            update(self)
            return
        for name in list(providers.RULES)[:-1]:
            self.made[name].update_parameters(self.model)  # type: ignore[index]

    monkeypatch.setattr(Ours, "update", forgets_the_last)
    found = wrong(passes(names.SEVERAL, torch.bfloat16))
    assert list(found) == [names.THREE_APART]


@pytest.mark.parametrize("format", KEPT)
def test_averages_one_at_a_time_are_the_averages(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers.internals, "DECODED_NUMEL", 100)
    model = build(TINY, torch.float16 if format == "mirrored" else torch.bfloat16, CPU)
    provider = ours_on("cpu", format)(model)
    provider.update()
    provider.update()
    state = provider.made.averaged_state_dict()
    ((_, _, each),) = provider.by_rule()
    for (name, _), one in zip(model.named_parameters(), each, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, state[name].float())


# Times and memory


def test_every_round_holds_every_contestant() -> None:
    calls: list[str] = []
    contestants = {name: Rotation(partial(calls.append, name)) for name in "abc"}
    taken = interleave(contestants, 0.0, Clock(CPU), min_rounds=4)
    turns = [len(each.samples["wall"]) / 4 for each in taken.values()]
    assert all(1 <= count <= MAX_TURNS and count == int(count) for count in turns)
    assert all(seconds > 0 for each in taken.values() for seconds in each.samples["wall"])


@pytest.mark.parametrize("copy_bytes", [100, 1 << 20, 60 << 20, 8 * 10**9])
def test_a_rotation_covers_the_cache_several_times(copy_bytes: int) -> None:
    l2_bytes = 60 << 20
    size = RotationSize.covering(copy_bytes, l2_bytes)
    assert size.copies in (1, 2)
    assert size.copies * copy_bytes + size.filler_bytes >= COVER * l2_bytes
    seen: list[int] = []
    rotation = Rotation(*(partial(seen.append, at) for at in range(3)))
    for _ in range(4):
        rotation.step()
    rotation.once()
    assert seen == [0, 1, 2, 0, 0, 1, 2]
    assert Clock(CPU, filler_bytes=1 << 12).calls_per_sample(rotation, 1e-9) == 3


def test_allocated_peak_sees_a_temporary() -> None:
    source = torch.ones(1000)
    assert profiling.allocated_peak(lambda: source.add_(1), CPU) < 100
    assert 8000 <= profiling.allocated_peak(lambda: source.copy_(source * 2 + 1), CPU) < 9000


def test_resident_growth_sees_what_no_allocator_of_torch_reports() -> None:
    def take() -> None:
        # Fresh pages from the system: a heap may have free ones already, after other tests.
        with mmap.mmap(-1, 30 << 20) as pages:
            for _ in range(30):
                pages.write(b"1" * (1 << 20))

    grown = profiling.resident_growth(take)
    if grown is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert grown > 20_000_000


# The command


def run_command(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> tuple[int, str]:
    monkeypatch.setattr(command, "WORKLOADS", {"tiny": TINY})
    monkeypatch.setattr(command, "BUDGET_S", 0.0)
    result = CliRunner().invoke(command.app, ["--workload", "tiny", "--no-train", "--out", str(out), *options])
    return result.exit_code, result.output


def test_command_writes_a_report_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, output = run_command(monkeypatch, tmp_path)
    assert code == 0, output
    report = Report.read(tmp_path / "cpu.json")
    found = {(row.group, row.dtype) for row in report.rows}
    groups = (names.UPDATES, names.FORMATS, names.SEVERAL)
    assert found == {(group, dtype) for group in groups for dtype in ("float32", "bfloat16")}
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "samples" not in (tmp_path / "cpu.json").read_text()
    assert '"samples": [' in (tmp_path / "cpu.samples.jsonl").read_text()
    assert str(tmp_path) not in (tmp_path / "cpu.json").read_text()
    assert CliRunner().invoke(command.app, ["plot", str(tmp_path / "cpu.json")]).exit_code == 0


def test_command_fails_when_ours_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    update = Ours.update
    monkeypatch.setattr(Ours, "update", lambda self: None if self.made.n_averaged == 2 else update(self))
    code, output = run_command(monkeypatch, tmp_path, "--no-own")
    assert (code, "wrong: " in output) == (1, True)
    result = CliRunner().invoke(command.app, ["--workload", "resnet51"], env={"COLUMNS": "200"})
    assert (result.exit_code, "resnet51" in result.output) == (2, True)
