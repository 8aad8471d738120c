"""One workload from end to end, the gate with a bug planted in each way of averaging, and the command."""

from __future__ import annotations

import json
import mmap
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from bench import command, gate, memory, suite
from bench.machine import OthersCpu
from bench.provider import Provider
from bench.providers import CompiledForeach, Foreach, Ours, OursExact, providers_for
from bench.report import FLAT_LERP, OURS, OURS_EXACT, TORCH_CLASS, Report, Row, find
from bench.timing import MAX_TURNS, interleave
from bench.workloads import Workload, build

CPU = torch.device("cpu")
TINY = Workload(
    "tiny",
    "Tiny",
    lambda depth: iter([("stem.weight", (33, 7)), ("stem.bias", (1,)), ("head.weight", (5, 3, 2))]),
    full_depth=1,
    num_params=33 * 7 + 1 + 30,
    buffers=lambda: iter([("norm.running_mean", (3,)), ("norm.num_batches_tracked", ())]),
)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the compiled provider out: it takes seconds, whatever the workload."""
    monkeypatch.setattr(CompiledForeach, "refusal", classmethod(lambda cls, model: "not in tests"))


def measure(dtype: torch.dtype) -> list[Row]:
    return suite.measure(TINY, dtype, CPU, budget_s=0.0, memory_bytes=4e9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_provider_gets_a_row(dtype: torch.dtype) -> None:
    rows = measure(dtype)
    assert {row.provider for row in rows} == {kind.name for kind in providers_for(dtype)} | {FLAT_LERP}
    for row in rows:
        assert (row.status == "ok") == bool(row.samples), row
        assert not row.wrong, row
    ours = find(rows, OURS if dtype == torch.float32 else OURS_EXACT)
    assert ours is not None
    assert ours.held_bytes == 4 * TINY.num_params
    assert ours.error is not None
    assert ours.error < 1e-6


def test_providers_share_memory_when_there_is_much_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "SHARED_FROM_BYTES", 0)
    params = list(build(TINY, torch.float32, CPU).parameters())
    arena = suite.Arena(params, 12 * TINY.num_params)
    first, second = arena.averages(), arena.averages()
    assert [average.shape for average in first] == [param.shape for param in params]
    assert all(a.data_ptr() == b.data_ptr() and a.data_ptr() % 64 == 0 for a, b in zip(first, second, strict=True))
    for average, value in zip(first, (1.0, 2.0, 3.0), strict=True):
        average.fill_(value)
    assert [average.mean().item() for average in second] == [1.0, 2.0, 3.0]
    rows = measure(torch.float32)
    assert not any(row.wrong for row in rows)


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


class GivesNan(Foreach):
    def averages(self) -> list[Tensor]:
        return [average.clone().fill_(float("nan")) for average in self.kept]


@pytest.mark.parametrize("broken", [SkipsLastTensor, WrongWeight, ForgetsBuffers, GivesNan])
def test_gate_stops_a_planted_bug(broken: type[Provider]) -> None:
    model = build(TINY, torch.float32, CPU)
    with pytest.raises(gate.WrongAverageError):
        gate.check(broken(model), model)


def test_gate_puts_the_model_back() -> None:
    model = build(TINY, torch.bfloat16, CPU)
    before = [param.clone() for param in model.parameters()]
    gate.check(OursExact(model), model)
    assert all(torch.equal(param, kept) for param, kept in zip(model.parameters(), before, strict=True))


def test_exact_must_equal_float32_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one_bit(self: OursExact) -> list[Tensor]:
        averages = [average.clone() for average in Ours.averages(self)]
        averages[1].view(torch.int32)[0] ^= 1
        return averages

    monkeypatch.setattr(OursExact, "averages", off_by_one_bit)
    row = next(row for row in measure(torch.bfloat16) if row.provider == OURS_EXACT)
    assert (row.status, row.samples) == ("wrong", [])


def test_what_does_not_fit_is_skipped_with_a_reason() -> None:
    rows = suite.measure(TINY, torch.float32, CPU, budget_s=0.0, memory_bytes=1e6)
    assert {row.status for row in rows} == {"skipped"}
    assert "does not fit" in rows[0].reason


def test_every_round_holds_every_contestant() -> None:
    calls: list[str] = []
    contestants = {name: partial(calls.append, name) for name in "abc"}
    timings = interleave(contestants, 0.0, CPU, min_rounds=4)
    turns = [len(timing.samples) / 4 for timing in timings.values()]
    assert all(1 <= count <= MAX_TURNS and count == int(count) for count in turns)
    assert all(seconds > 0 for timing in timings.values() for seconds in timing.samples)


def test_allocated_peak_sees_a_temporary() -> None:
    source = torch.ones(1000)

    def in_place() -> None:
        source.add_(1)

    def by_temporaries() -> None:
        source.copy_(source * 2 + 1)

    assert memory.allocated_peak(in_place, CPU) < 100
    assert 8000 <= memory.allocated_peak(by_temporaries, CPU) < 9000


def test_resident_growth_sees_what_no_allocator_of_torch_reports() -> None:
    def take() -> None:
        # Fresh pages from the system: a heap may have free ones already, after other tests.
        with mmap.mmap(-1, 30 << 20) as pages:
            for _ in range(30):
                pages.write(b"1" * (1 << 20))

    grown = memory.resident_growth(take)
    if grown is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert grown > 20_000_000


def test_share_of_others_is_a_share() -> None:
    share = OthersCpu().share()
    assert share is None or 0 <= share <= 1


def run_command(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> tuple[int, str]:
    monkeypatch.setattr(command, "WORKLOADS", {"tiny": TINY})
    monkeypatch.setattr(command, "BUDGET_S", 0.0)
    result = CliRunner().invoke(command.app, ["--workload", "tiny", "--no-train", "--out", str(out), *options])
    return result.exit_code, result.output


def test_command_writes_a_report_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, output = run_command(monkeypatch, tmp_path)
    assert code == 0, output
    report = Report.read(tmp_path / "cpu.json")
    assert report.row("tiny", "float32", TORCH_CLASS) is not None
    assert {row.dtype for row in report.formats} == {row.dtype for row in report.several} == {"float32", "bfloat16"}
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in json.dumps(report.to_dict())
    assert CliRunner().invoke(command.app, ["plot", str(tmp_path / "cpu.json")]).exit_code == 0


def test_command_fails_when_ours_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    update = Ours.update
    monkeypatch.setattr(Ours, "update", lambda self: None if self.averaged.n_averaged == 2 else update(self))
    code, output = run_command(monkeypatch, tmp_path, "--no-own")
    assert code == 1
    assert "wrong: " in output


def test_command_names_the_workloads_it_knows() -> None:
    result = CliRunner().invoke(command.app, ["--workload", "resnet51"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "resnet51" in result.output
