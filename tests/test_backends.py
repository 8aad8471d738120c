"""The backends with kernels against ``reference`` on the CPU, bit for bit; only a NaN's sign and payload are their own.

Each test runs wherever it can: the CPU's kernels by each instruction set, the CUDA source through the shim and Triton
through its interpreter on CPU tensors, what nvcc and Triton compile of both by ``pytest -m kernels``, and both on a GPU
by ``pytest -m gpu``. ``tests/native`` holds the sources to an oracle without torch: every pair of planes, every byte
beside a buffer, and a forked child among it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages
from swafast.backends import cpu, cuda, library, rows
from swafast.backends import gpu as gpu_tables
from swafast.backends.contract import Backend, Launch, Pair
from swafast.backends.triton import launch as triton_launch
from swafast.op.launches import draws_of
from swafast.terms.formats import EXACT, FLOAT32, Format
from swafast.terms.layout import GPU_CHUNK_NUMELS
from tests.conftest import NO_LIBRARY, EveryKind, tensors_of
from tests.conftest import differing as differing_tensors
from tests.kernels import (
    DTYPES,
    EXCHANGED,
    FORMATS,
    INT64_MAX,
    PAIRS,
    RULES,
    Dispatched,
    averages_of,
    by_weights,
    check_bad_count,
    check_exchange,
    check_long_runs,
    check_paces,
    check_updates,
    clone,
    differing,
    make_pair,
    sizes_around,
    update,
)
from tests.spreads import (
    TURNS,
    check_draws,
    check_moves,
    drawing_of_all_kinds,
    drawing_of_places,
    spread_averages_of,
)
from tests.support import drift
from tests.triton_source import patch_language_once

#: A chunk of a GPU's tests: more than a wide tile, and not a multiple of any group.
CHUNK_NUMEL = 4100
WEIGHTS = by_weights(1.0, 0.3, 0.9, 0.0, 0.5, 1e-8, 1e-3, 0.25, 0.49999997, 0.75, 1 - 2**-24, 1 - 1e-12)


@dataclass(frozen=True)
class Subject:
    backend: Backend
    device: torch.device
    chunk_numel: int
    is_interpreted: bool = False  # each chunk takes some 10 ms

    def prepare(self, pairs: Sequence[Pair]) -> Launch:
        assert all(map(self.backend.serves, pairs))
        return self.backend.prepare(pairs)

    def put(self, pairs: Sequence[Pair]) -> list[Pair]:
        return clone(pairs, self.device)

    def counters(self, *counts: int) -> list[Tensor]:
        return [torch.tensor(n, device=self.device) for n in counts]

    def sized_pairs(self, dtype: torch.dtype, fmt: Format) -> list[Pair]:
        """Return pairs of sizes around the ends of groups, tiles and chunks, aligned in each way."""
        sizes = sizes_around(self.chunk_numel)
        if self.is_interpreted:
            sizes = [0, 1, 17, 1023, 1024, 1025, *sizes[9:]]
            return [make_pair(n, dtype, fmt, offset) for n, offset in zip(sizes, (0, 1, 0, 6, 0) * 2, strict=True)]
        if self.backend is not cpu:
            sizes = [*sizes_around(256), *sizes[9:]]
        return [make_pair(n, dtype, fmt, offset) for n in sizes for offset in (0, 1, 6)]

    @property
    def spread_sizes(self) -> tuple[int, ...]:
        """Sizes of params: the last ones end within a later chunk, and cross the windows of the CPU's kernels."""
        return (0, 1, 17, 33, self.chunk_numel + 11) if self.backend is not cpu else (0, 1, 33, 130, 2_600)


def everywhere(*names: str) -> list[object]:
    on_cpu = [pytest.param((name, "cpu"), id=f"{name} on cpu") for name in names]
    on_gpus = [name for name in names if name in ("cuda", "triton")]
    on_ptx = [pytest.param((name, "ptx"), id=f"{name} ptx on cpu", marks=pytest.mark.kernels) for name in on_gpus]
    on_gpu = [pytest.param((name, "cuda"), id=f"{name} on gpu", marks=pytest.mark.gpu) for name in on_gpus]
    return [*on_cpu, *on_ptx, *on_gpu]


ON_GPUS = pytest.mark.parametrize("tested", everywhere("cuda", "triton"), indirect=True)


@pytest.fixture(params=everywhere("generic", "avx2", "avx512", "cuda", "triton"))
def tested(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
    name, place = request.param
    if name in ("cuda", "triton"):
        yield gpu_backend(name, place, request, monkeypatch)
        return
    if cpu.unavailable() is not None:
        pytest.skip(f"{NO_LIBRARY}: {cpu.unavailable()}")
    before, threads = cpu.current_isa(), torch.get_num_threads()
    try:
        cpu.use_isa(name)
    except ValueError:
        pytest.skip(f"needs a processor with {name}")
    # Several threads, however small the tensors are, and chunks that end within a vector.
    torch.set_num_threads(2)
    monkeypatch.setattr(cpu, "_NUMEL_PER_THREAD", 1)
    monkeypatch.setattr(cpu, "CPU_CHUNK_NUMEL", 100)
    yield Subject(cpu, torch.device("cpu"), 100)  # type: ignore[arg-type]
    torch.set_num_threads(threads)
    cpu.use_isa(before)


def gpu_backend(name: str, place: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Subject:
    backend: Backend = {"cuda": cuda, "triton": triton_launch}[name]  # type: ignore[assignment]
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    if place == "ptx" or (name, place) == ("cuda", "cpu"):
        loaded = request.getfixturevalue(f"{name}_on_{place}")
        monkeypatch.setattr(ctypes.c_int.in_dll(loaded, "shim_alternating"), "value", 1)
    missing = backend.unavailable()
    assert missing is None, missing
    monkeypatch.setattr(gpu_tables, "gpu_chunk_numel", lambda numel, blocks: CHUNK_NUMEL)
    device = torch.device("cuda", 0) if place == "cuda" else torch.device("cpu")
    if (name, place) == ("triton", "cpu"):
        patch_language_once(monkeypatch)
    return Subject(backend, device, CHUNK_NUMEL, is_interpreted=(name, place) == ("triton", "cpu"))


@PAIRS
def test_updates_equal_the_reference(tested: Subject, dtype: torch.dtype, fmt: Format) -> None:
    pairs = tested.sized_pairs(dtype, fmt)
    if tested.is_interpreted:  # every size by one weight, and the others by few sizes: no kernel knows of both
        check_updates(tested.prepare, pairs, WEIGHTS[1:2], (1,), tested.device)
        pairs, weights = pairs[1:3], WEIGHTS[:3:2]
    else:
        weights = WEIGHTS[: 6 if tested.backend is not cpu else None]
    check_updates(tested.prepare, pairs, weights, (1,), tested.device)


def test_every_rule_gives_the_bits_of_the_reference(tested: Subject) -> None:
    kinds = EXCHANGED[1:2] if tested.is_interpreted else EXCHANGED  # a rule knows neither dtype nor format
    pairs = [make_pair(700, dtype, fmt) for dtype, fmt in kinds]
    counts = (0, 1, 3, 999, 2**40) if tested.is_interpreted else (0, 1, 2, 3, 10, 999, 10**6, 2**40)
    check_updates(tested.prepare, pairs, RULES[:8], counts, tested.device)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64])
def test_copies_equal_the_reference(tested: Subject, dtype: torch.dtype) -> None:
    sizes = (0, 1, 3, 15, 16, 17, tested.chunk_numel + 11)
    pairs = [make_pair(n, dtype, None, offset) for n in sizes for offset in (0, 1)]
    check_updates(tested.prepare, pairs, [EqualAverage()], (3,), tested.device)


def test_one_launch_serves_many_tensors_of_all_kinds(tested: Subject) -> None:
    kinds: list[tuple[torch.dtype, Format | None]] = [(d, f) for d in DTYPES for f in FORMATS]
    kinds.append((torch.int32, None))
    times = 5 if tested.is_interpreted else 60
    pairs = [make_pair(n % 7 * 5, dtype, fmt, n % 3) for n in range(times) for dtype, fmt in kinds]
    check_updates(tested.prepare, pairs, by_weights(0.3), (1,), tested.device)


# All but Triton's interpreter, which would take a minute.
@pytest.mark.parametrize(
    "tested", [*everywhere("generic", "avx2", "avx512", "cuda"), *everywhere("triton")[1:]], indirect=True
)
@PAIRS
def test_dense_layouts_equal_the_reference(tested: Subject, dtype: torch.dtype, fmt: Format) -> None:
    views = (
        lambda flat: flat.view(5, 7, 3, 4).permute(0, 3, 1, 2),  # channels_last
        lambda flat: flat.view(20, 21).t(),
        lambda flat: flat.view(4, 15, 7).permute(2, 0, 1),
        lambda flat: flat.view(1, 420, 1),
        lambda flat: flat[0],
        lambda flat: flat[:0].view(0, 4),
    )
    pairs = []
    for name, view in enumerate(views):
        flat = make_pair(420, dtype, fmt)
        param, planes = view(flat.param), tuple(map(view, flat.planes))
        pairs.append(Pair(str(name), param, planes, fmt, draws_of(0, str(name), param, fmt)))
    assert pairs[0].param.is_contiguous(memory_format=torch.channels_last)
    check_updates(tested.prepare, pairs, by_weights(0.3), (1,), tested.device)


def test_a_first_update_copies_every_bit(tested: Subject) -> None:
    (pair,) = tested.put([make_pair(1000, torch.float32, FLOAT32)])
    update(tested.prepare([pair]), [pair], [ExponentialAverage(0.9)], tested.counters(0))
    assert torch.equal(pair.average.view(torch.int32), pair.param.view(torch.int32))


@pytest.mark.parametrize("numel", [0, 10])
def test_an_update_may_count_by_another_number(tested: Subject, numel: int) -> None:
    pairs, counters = tested.put([make_pair(numel, torch.float32, FLOAT32)]), tested.counters(4)
    launch = tested.prepare(pairs)
    for advance in (0, 1, 5):
        update(launch, pairs, [EqualAverage()], counters, advance)
    assert list(map(int, counters)) == [10]


@pytest.mark.parametrize("num_paces", [1, 3, library.MAX_PACES])
def test_one_launch_moves_several_averages_of_each_param(tested: Subject, num_paces: int) -> None:
    assert rows.Rows(averages_of(num_paces, (9,))).most_followers == num_paces - 1
    sizes = (0, 9, GPU_CHUNK_NUMELS[0] + 1) if num_paces < 4 else (33,)
    check_paces(tested.prepare, num_paces, sizes, tested.device)


@pytest.mark.parametrize("count", [-1, -(2**63), INT64_MAX])
@pytest.mark.parametrize(("num_paces", "at"), [(1, 0), (3, 0), (3, 2)])
def test_a_count_that_is_none_leaves_everything_as_it_was(tested: Subject, num_paces: int, at: int, count: int) -> None:
    refusal = pytest.raises(ValueError, match="n_averaged must be >= 0") if tested.backend is cpu else nullcontext()
    check_bad_count(tested.prepare, num_paces, at, count, tested.device, refusal)


# Spreads and draws

#: Where spreads are moved and samples drawn: all but Triton's interpreter, which tests/test_triton.py runs by itself.
WITH_SPREAD = pytest.mark.parametrize(
    "tested", [*everywhere("generic", "avx2", "avx512", "cuda"), *everywhere("triton")[1:]], indirect=True
)


@WITH_SPREAD
@TURNS
def test_spreads_equal_the_reference(tested: Subject, turn: int) -> None:
    check_moves(tested.prepare, turn, tested.spread_sizes, tested.device)


@WITH_SPREAD
@pytest.mark.parametrize("num_paces", [1, 3, library.MAX_PACES])
def test_one_launch_moves_averages_with_a_spread_and_without(tested: Subject, num_paces: int) -> None:
    check_paces(tested.prepare, num_paces, (9, 33) if num_paces < 4 else (9,), tested.device, spread_averages_of)


@WITH_SPREAD
@TURNS
def test_draws_equal_the_reference(tested: Subject, turn: int) -> None:
    check_draws(tested.prepare, drawing_of_all_kinds(turn, tested.spread_sizes), tested.device)


@WITH_SPREAD
def test_normal_numbers_go_by_the_index_in_the_whole_param(tested: Subject) -> None:
    check_draws(tested.prepare, drawing_of_places(), tested.device)


# Bugs in the tables that all of these backends have


def shorten_a_run(patch: pytest.MonkeyPatch) -> None:
    spoil_runs(patch, lambda runs: runs[-1, 2].sub_(1))


def repeat_a_run(patch: pytest.MonkeyPatch) -> None:
    spoil_runs(patch, lambda runs: runs[1].copy_(runs[0]))


def spoil_runs(patch: pytest.MonkeyPatch, spoil: Callable[[Tensor], object]) -> None:
    runs_of = rows.Rows.runs
    patch.setattr(rows.Rows, "runs", lambda self: (runs := runs_of(self), spoil(runs))[0])


def mistake_the_dtype(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(rows._DTYPES, torch.bfloat16, 2)


def mistake_the_plane(patch: pytest.MonkeyPatch) -> None:
    row = rows._row
    patch.setattr(rows, "_row", lambda pair: row(replace(pair, planes=(pair.planes[0], *pair.planes[:1]))))


def drop_a_follower(patch: pytest.MonkeyPatch) -> None:
    init = rows.Rows.__init__

    def without(self: rows.Rows, pairs: Sequence[Pair], device: torch.device | None = None) -> None:
        init(self, pairs, device)
        for row in self.table:
            row.followers = min(row.followers, 1)

    patch.setattr(rows.Rows, "__init__", without)


def take_the_first_pace_for_all(patch: pytest.MonkeyPatch) -> None:
    row = rows._row
    patch.setattr(rows, "_row", lambda pair: row(replace(pair, pace=0)))


def keep_the_first_rules(patch: pytest.MonkeyPatch) -> None:
    first: list[Any] = []

    def make_paces(terms: Any, counters: Sequence[Tensor]) -> Any:
        first.extend([terms] if terms else [])
        return rows.make_paces(first[0] if terms else (), counters)

    for module in (cpu, gpu_tables):
        patch.setattr(module, "make_paces", make_paces)


def see_updates(tested: Subject) -> None:
    pairs = [replace(make_pair(30, torch.bfloat16, EXACT), name=f"pair {index}") for index in range(2)]
    check_updates(tested.prepare, pairs, by_weights(0.3), (1,), tested.device)


def see_paces(tested: Subject) -> None:
    check_paces(tested.prepare, 3, (33,), tested.device)


@pytest.mark.parametrize(
    ("plant", "check", "says"),
    [
        *((plant, see_updates, "pair 1, ") for plant in (shorten_a_run, repeat_a_run)),
        *((plant, see_updates, "pair 1, ") for plant in (mistake_the_dtype, mistake_the_plane)),
        *((plant, see_paces, "several averages") for plant in (drop_a_follower, take_the_first_pace_for_all)),
        (keep_the_first_rules, see_paces, "several averages"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_check_kills_the_bug(
    tested: Subject, plant: Callable[[pytest.MonkeyPatch], None], check: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(tested)
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=says):
        check(tested)


# NaNs and exchanges


def test_a_nonfinite_param_leaves_all_its_averages_as_they_were(tested: Subject) -> None:
    pairs = tested.put(averages_of(3, (17,)))
    for pair in pairs:
        if pair.format is not None:
            pair.param.normal_()
    params, launch, counters = [pair.param for pair in pairs], tested.prepare(pairs), tested.counters(4, 5, 6)
    params[1][-1] = math.nan
    before = clone(pairs)
    update(launch, pairs, [EqualAverage()] * 3, counters, skip_nonfinite=True)
    assert launch.first_nonfinite(params) == 1
    assert list(map(int, counters)) == [4, 5, 6]
    assert differing(pairs, before) == []
    params[1][-1] = 0.5
    update(launch, pairs, [EqualAverage()] * 3, counters, skip_nonfinite=True)
    assert list(map(int, counters)) == [5, 6, 7]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_nonfinite_param_is_found_and_may_stop_an_update(tested: Subject, bad: float) -> None:
    sizes = [(dtype, fmt, n) for dtype, fmt in zip(DTYPES, FORMATS[:3], strict=True) for n in (1, 17, 5000)]
    pairs = [make_pair(n, dtype, fmt, 1) for dtype, fmt, n in sizes]
    for pair in pairs:
        pair.param.normal_()
        pair.param[:1] = torch.finfo(pair.param.dtype).max
    copied = Pair("copied", torch.full((9,), bad), (torch.zeros(9),), None)
    pairs = tested.put([pairs[0], copied, *pairs[1:]])
    params, launch, counters = [pair.param for pair in pairs], tested.prepare(pairs), tested.counters(3)
    assert launch.first_nonfinite(params) is None
    for index in (9, 7, 4, 0):
        params[index][-1] = bad
        before = clone(pairs)
        assert launch.first_nonfinite(params) == index
        update(launch, pairs, [EqualAverage()], counters, skip_nonfinite=True)
        assert list(map(int, counters)) == [3]
        assert differing(pairs, before) == []
    for index in (9, 7, 4, 0):
        params[index][-1] = 0.5
    update(launch, pairs, [EqualAverage()], counters, skip_nonfinite=True)
    assert list(map(int, counters)) == [4]


@pytest.mark.parametrize(("dtype", "fmt"), [*EXCHANGED, (torch.int32, None)], ids=str)
def test_an_exchange_moves_every_bit_there_and_back(tested: Subject, dtype: torch.dtype, fmt: Format | None) -> None:
    sizes = (*sizes_around(min(tested.chunk_numel, 256)), 5000)
    pairs = tested.put([make_pair(n, dtype, fmt, offset) for n in sizes for offset in (0, 3)])
    check_exchange(tested.prepare(pairs), pairs)


# All but Triton's interpreter, which would take a minute.
@pytest.mark.parametrize("tested", [*everywhere("cuda"), *everywhere("triton")[1:]], indirect=True)
def test_long_runs_equal_the_reference(tested: Subject) -> None:
    check_long_runs(tested.prepare, tested.device)


# Whole models


def both_averages(tested: Subject, model: EveryKind, dtype: torch.dtype, **options: object) -> tuple[dict, dict]:
    """Return the states of two averages of the same params: on the device, and by ``reference`` on the CPU."""
    model.to(dtype)
    theirs = EveryKind().to(dtype).to(tested.device)
    ours = FusedAveragedModel(theirs, backend=tested.backend.name, **options)  # type: ignore[arg-type]
    expected = FusedAveragedModel(model, backend="reference", **options)  # type: ignore[arg-type]
    for _ in range(3):
        model.drift()
        with torch.no_grad():
            for side in (torch.nn.Module.parameters, torch.nn.Module.buffers):
                for tensor, source in zip(side(theirs), side(model), strict=True):
                    tensor.copy_(source)
        ours.update_parameters(theirs)
        expected.update_parameters(model)
    return {k: v.cpu() for k, v in ours.state_dict().items()}, dict(expected.state_dict())


@ON_GPUS
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((dtype, {"use_buffers": dtype != torch.float16}) for dtype in DTYPES),
        (torch.bfloat16, {"format": "compact", "use_buffers": True}),
        (torch.float32, {"format": "compensated"}),
    ],
    ids=str,
)
def test_a_whole_model_equals_the_reference(
    tested: Subject, every_kind: EveryKind, dtype: torch.dtype, options: dict[str, object]
) -> None:
    ours, expected = both_averages(tested, every_kind, dtype, rule=ExponentialAverage(0.9), **options)
    assert ours.keys() == expected.keys()
    assert [key for key in ours if not torch.equal(ours[key], expected[key])] == []


@ON_GPUS
@pytest.mark.parametrize(
    ("nonfinite", "rule"),
    [
        ("propagate", EqualAverage()),
        ("skip", EqualAverage()),
        ("skip", {"mean": EqualAverage(), "fast": ExponentialAverage(0.9)}),
    ],
    ids=["one", "skip", "two, skip"],
)
def test_a_planned_update_asks_torch_for_nothing(tested: Subject, nonfinite: str, rule: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7)).to(tested.device)
    options = {"backend": tested.backend.name, "nonfinite": nonfinite}
    several = isinstance(rule, dict)
    average: Any = (
        FusedAverages(model, rules=rule, **options) if several else FusedAveragedModel(model, rule=rule, **options)
    )
    average.update_parameters(model)
    with Dispatched() as dispatched:
        for _ in range(3):
            average.update_parameters(model)
    assert dispatched.ops == []
    counters = [value for key, value in average.state_dict().items() if key.endswith("n_averaged")]
    assert list(map(int, counters)) == [4] * (len(rule) if several else 1)
    binding = average._bindings.latest
    assert binding is not None
    assert binding.plan.backends == [tested.backend.name]


@ON_GPUS
def test_the_count_of_dispatched_ops_sees_a_host_read(tested: Subject) -> None:
    with Dispatched() as dispatched:
        int(torch.ones((), dtype=torch.int64, device=tested.device))
    assert "aten._local_scalar_dense.default" in dispatched.ops


@ON_GPUS
def test_a_swap_is_in_place_and_comes_back(tested: Subject, every_kind: EveryKind) -> None:
    model = every_kind.to(tested.device)
    average = FusedAveragedModel(model, backend=tested.backend.name)
    average.update_parameters(model)
    drift(model)
    before, state = tensors_of(model), average.averaged_state_dict()
    addresses = [param.data_ptr() for param in model.parameters()]
    with average.swapped_into(model):
        inside = tensors_of(model)
        assert [name for name in inside.keys() & state.keys() if not torch.equal(inside[name], state[name])] == []
    assert [param.data_ptr() for param in model.parameters()] == addresses
    assert differing_tensors(tensors_of(model), before) == []
    assert differing_tensors(average.averaged_state_dict(), state) == []
