"""One workload from end to end, the gate with a bug planted in each way of averaging, and the commands."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from typer.testing import CliRunner

from bench import command, gate, internals, measure, names, providers
from bench.cases import cpu_cases
from bench.lookup import find
from bench.measure import Bench, Setting
from bench.providers import Made, Provider, loop, moved_bytes, ours_on, providers_for
from bench.report import Report, Row
from bench.timing import COVER, MAX_TURNS, Clock, Rotation, interleave, rotation_size
from bench.workloads import GPU_WORKLOADS, LLAMA_LAYER_PARAMS, LLAMA_LAYERS, WORKLOADS, Workload, build

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
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the compiled provider out: it takes seconds, whatever the workload."""
    limited = [replace(each, max_tensors=each.max_tensors and 0) for each in providers.UPDATE_PROVIDERS]
    monkeypatch.setattr("bench.cases.providers_for", lambda dtype, *known: providers_for(dtype, *(known or [limited])))
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)
    monkeypatch.setattr(internals, "DECODED_NUMEL", 100)  # less than a param has


def measured(group: str, dtype: torch.dtype, **more: Any) -> dict[str, Row]:
    rows: list[Row] = []
    (case,) = (case for case in cpu_cases(group, ["tiny"]) if case.dtype == dtype)
    Bench(Setting(CPU, 0.0, rows.append, **more)).run(case)
    return {row.provider: row for row in rows}


def wrong(rows: dict[str, Row]) -> dict[str, str]:
    return {name: row.reason for name, row in rows.items() if row.status in ("wrong", "failed")}


@pytest.mark.parametrize("workload", GPU_WORKLOADS.values(), ids=lambda workload: workload.name)
def test_shapes_add_up_to_the_known_total(workload: Workload) -> None:
    entries = list(workload.params(workload.full_depth))
    assert sum(math.prod(shape) for _, shape in entries) == workload.num_params
    assert len({name for name, _ in entries}) == len(entries)


def test_a_wrong_total_is_refused_and_memory_decides_the_layers_of_llama() -> None:
    with pytest.raises(RuntimeError, match="tiny must have 4 params, got 262"):
        build(replace(TINY, num_params=4), torch.float32, CPU)
    llama, gpt2 = WORKLOADS["llama3_8b"], WORKLOADS["gpt2_medium"]
    assert sum(math.prod(shape) for _, shape in llama.params(1)) == LLAMA_LAYER_PARAMS
    affordable = {0: 0.1, 3: 3.5, LLAMA_LAYERS - 1: 36, LLAMA_LAYERS: 37}
    assert [llama.depth_within(1e9 + 16 * layers * LLAMA_LAYER_PARAMS, 16, 1e9) for layers in affordable.values()] == [
        *affordable
    ]
    assert (gpt2.depth_within(12e9, 16, 1e9), gpt2.depth_within(4e9, 16, 1e9)) == (gpt2.full_depth, 0)
    assert "3 of 32 layers" in llama.title_at(3)


@pytest.mark.parametrize("shared_from", [0, measure.SHARED_FROM_BYTES], ids=["shared", "not"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_provider_gets_a_row(dtype: torch.dtype, shared_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SHARED_FROM_BYTES", shared_from)
    rows = measured(names.UPDATES, dtype)
    assert set(rows) == {provider.name for provider in providers_for(dtype)} | {names.FLAT_LERP}
    assert all((row.status == "ok") == (row.wall is not None) for row in rows.values())
    assert not wrong(rows)
    own = find(rows.values(), names.OURS, names.OURS_EXACT)
    assert own is not None
    assert own.error is not None
    assert (own.held_bytes, own.error < 1e-6) == (4 * TINY.num_params, True)
    assert own.counted_bytes == (dtype.itemsize + 8) * TINY.num_params


def test_what_there_is_no_room_or_time_for_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {row.reason for row in measured(names.UPDATES, torch.float32, end=time.monotonic()).values()} == {
        "the time was up"
    }
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1000)
    rows = measured(names.UPDATES, torch.float32).values()
    assert {(row.status, row.reason) for row in rows} == {("skipped", "does not fit the 0 GiB that are free")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_our_passes_keep_and_move_the_bytes_of_the_docs(dtype: torch.dtype) -> None:
    size, numel = dtype.itemsize, TINY.num_params
    for format, row in measured(names.FORMATS, dtype).items():
        assert (row.status, row.held_bytes) == ("ok", KEPT[format] * numel)
        assert row.counted_bytes == (size + 2 * KEPT[format]) * numel
    rows = measured(names.SEVERAL, dtype)
    per_param = {name: ((row.held_bytes or 0) / numel, row.counted_bytes / numel) for name, row in rows.items()}
    assert list(per_param.items()) == [
        (names.ONE, (4, size + 8)),
        (names.TWO, (8, size + 16)),
        (names.THREE, (12, size + 24)),
        (names.THREE_APART, (12, 3 * (size + 8))),
    ]
    assert moved_bytes(torch.float16, "mirrored") == 2 + 2 * 6  # the float16 is read too


# The gate


FOREACH = next(each for each in providers.UPDATE_PROVIDERS if each.name == names.FOREACH)
THREE = ours_on("cpu", "float32", 3)


def cloned(made: Made) -> list[Tensor]:
    return [buffer.clone() for buffer in made.buffers or ()]


def lerp(part: slice, factor: float = 1.0) -> Callable[..., object]:
    return lambda kept, params, weight: torch._foreach_lerp_(kept[part], params[part], weight * factor)


# By what is planted: in whom, what the gate says, and the bug in what was made. ``ours`` updates all averages of ours.
PLANTED: dict[str, tuple[Provider, str, Callable[[Made, Any, Any], Made]]] = {
    "tensor": (FOREACH, "head.weight is off by", lambda made, model, ours: loop(lerp(slice(-1)))(model)),
    "weight": (FOREACH, "stem.weight is off by", lambda made, model, ours: loop(lerp(slice(None), 0.999))(model)),
    "buffers": (FOREACH, "buffer norm.running_mean", lambda made, model, ours: replace(made, buffers=cloned(made))),
    "our buffers": (THREE, "buffer norm.running_mean", lambda made, model, ours: replace(made, buffers=cloned(made))),
    "nan": (
        FOREACH, "stem.weight is off by nan",
        lambda made, model, ours: replace(made, update=lambda: [k.fill_(math.nan) for k in made.kept], buffers=None),
    ),
    "rule": (
        THREE, "mean.stem.weight is off by",
        lambda made, model, ours: replace(made, export=lambda: (("mean", *each[1:]) for each in relabelled(made))),
    ),
    "moved twice": (
        THREE, "fast.stem.weight is off by",
        lambda made, model, ours: replace(made, update=lambda: (made.update(), ours["fast"].update_parameters(model))),
    ),
    "left out": (
        THREE, "slow.stem.weight is off by nan",
        lambda made, model, ours: replace(
            made, update=lambda: [ours[name].update_parameters(model) for name in ("mean", "fast")]
        ),
    ),
}  # fmt: skip


def relabelled(made: Made) -> Iterator[Any]:
    """Yield the averages of the second rule under the weights of the first."""
    (_, weight, _), (_, _, others), _ = made.export()
    yield "mean", weight, others


@pytest.mark.parametrize("provider", [FOREACH, THREE], ids=["foreach", "ours"])
def test_the_gate_lets_right_averages_pass_and_puts_the_model_back(provider: Provider) -> None:
    model = build(TINY, torch.float32, CPU)
    before = [param.clone() for param in model.parameters()]
    assert gate.check(provider, provider.make(model), model)[0] < 1e-6
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(("provider", "message", "plant"), PLANTED.values(), ids=PLANTED)
def test_the_gate_stops_a_planted_bug(provider: Provider, message: str, plant: Any) -> None:
    model = build(TINY, torch.float32, CPU)
    made = provider.make(model)
    ours = getattr(getattr(made.update, "func", None), "__self__", None)  # what updates all averages of ours
    with pytest.raises(gate.WrongAverageError, match=message):
        gate.check(provider, plant(made, model, ours), model)


@pytest.mark.parametrize(
    ("group", "format", "spoil", "expected"),
    [
        (names.UPDATES, "exact", lambda one: (one.view(torch.int32) ^ 1).view(torch.float32), names.OURS_FLOAT32),
        (names.FORMATS, "compact", lambda one: one.bfloat16().float(), "compact"),
    ],
    ids=["one bit of exact", "a format of too few bits"],
)
def test_wrong_bits_have_no_time(
    group: str, format: str, spoil: Callable[[Tensor], Tensor], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = internals.decoded

    def spoiled(averaged: Any, of: str, model: torch.nn.Module) -> Iterator[Tensor]:
        return (spoil(one) if of == format else one for one in decoded(averaged, of, model))

    monkeypatch.setattr(internals, "decoded", spoiled)
    rows = measured(group, torch.bfloat16)
    assert list(wrong(rows)) == [expected]
    assert rows[expected].wall is None


def test_every_round_holds_every_contestant() -> None:
    calls: list[str] = []
    contestants = {name: Rotation(partial(calls.append, name)) for name in "abc"}
    taken = interleave(contestants, 0.0, Clock(CPU), min_rounds=4)
    turns = [len(each.samples["wall"]) / 4 for each in taken.values()]
    assert all(1 <= count <= MAX_TURNS and count == int(count) for count in turns)
    assert all(seconds > 0 for each in taken.values() for seconds in each.samples["wall"])


@pytest.mark.parametrize("copy_bytes", [100, 1 << 20, 60 << 20, 8 * 10**9])
def test_a_rotation_covers_the_cache_several_times(copy_bytes: int) -> None:
    l2_bytes, seen = 60 << 20, list[int]()
    copies, filler_bytes = rotation_size(copy_bytes, l2_bytes)
    assert copies in (1, 2)
    assert copies * copy_bytes + filler_bytes >= COVER * l2_bytes
    rotation = Rotation(*(partial(seen.append, at) for at in range(3)))
    for _ in range(4):
        rotation.step()
    rotation.once()
    assert seen == [0, 1, 2, 0, 0, 1, 2]
    assert Clock(CPU, filler_bytes=1 << 12).calls_per_sample(rotation, 1e-9) == 3


def test_command_writes_a_report_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "BUDGET_S", 0.0)
    run = partial(CliRunner().invoke, command.app)
    result = run(["--workload", "tiny", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report, text = Report.read(tmp_path / "cpu.json"), (tmp_path / "cpu.json").read_text()
    groups = (names.UPDATES, names.FORMATS, names.SEVERAL)
    expected = {(group, dtype) for group in groups for dtype in ("float32", "bfloat16")}
    assert {(row.group, row.dtype) for row in report.rows} == expected
    assert "samples" not in text
    assert str(tmp_path) not in text
    assert '"samples": [' in (tmp_path / "cpu.samples.jsonl").read_text()
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    result = run(["--workload", "resnet51"], env={"COLUMNS": "200"})
    assert (result.exit_code, "resnet51" in result.output) == (2, True)
    monkeypatch.setattr(internals, "decoded", lambda averaged, format, model: list(model.parameters()))
    result = run(["--workload", "tiny", "--no-others", "--out", str(tmp_path)])
    assert (result.exit_code, "wrong: " in result.output) == (1, True)


# pytest-benchmark's view of an update. The figures to quote come from ``python -m bench``, which interleaves.

CASES = [(dtype, each) for dtype in DTYPES for each in providers_for(dtype)]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in WORKLOADS if name not in ("3000x64", "llama3_8b")]


@pytest.mark.parametrize("name", ["3000x64", *SLOW])
@pytest.mark.parametrize(("dtype", "provider"), CASES, ids=lambda each: getattr(each, "name", str(each)))
def test_update(benchmark: BenchmarkFixture, name: str, dtype: torch.dtype, provider: Provider) -> None:
    model, missing = build(WORKLOADS[name], dtype, CPU), provider.missing()
    if missing is not None:
        pytest.skip(f"{provider.name}: {missing}")
    if provider.max_tensors is not None and len(list(model.parameters())) > provider.max_tensors:
        pytest.skip(f"{provider.name}: compiling more than {provider.max_tensors} tensors takes minutes")
    made = provider.make(model)
    benchmark.extra_info["error"] = gate.check(provider, made, model)[0]
    benchmark.pedantic(made.update, rounds=5, warmup_rounds=1)
