"""The GPU backends against ``reference`` on the CPU, bit for bit; only a NaN's sign and payload are their own.

Each test runs wherever it can: the CUDA source through the shim and Triton through its interpreter on CPU tensors, and
both on a GPU, by ``pytest -m gpu``.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages, PowerAverage
from swafast.backends import cuda, library, reference, rows
from swafast.backends import gpu as gpu_tables
from swafast.backends.contract import Backend, Launch, Pair, Update
from swafast.backends.triton import launch as triton_launch
from swafast.terms.formats import EXACT, FLOAT32, Format
from swafast.terms.layout import GPU_CHUNK_NUMELS
from swafast.terms.rules import Rule
from tests.conftest import EveryKind, tensors_of
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
    check_exchange,
    clone,
    differing,
    make_pair,
    paces_of,
    sizes_around,
    update,
)

WEIGHTS = (1.0, 0.0, 0.3, 0.5, 0.9)
#: A chunk of the tests: more than a tile of the CUDA kernels' narrowest groups, and not a multiple of any group.
CHUNK_NUMEL = 4100


@dataclass(frozen=True)
class Gpu:
    backend: Backend
    device: torch.device

    def put(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Return the pairs on the device, aligned as before. One param stays one param."""
        params = {id(p.param): self._put(p.param) for p in pairs}
        return [replace(p, param=params[id(p.param)], planes=tuple(map(self._put, p.planes))) for p in pairs]

    def _put(self, tensor: Tensor) -> Tensor:
        start = tensor.storage_offset()
        flat = torch.empty(start + tensor.numel(), dtype=tensor.dtype, device=self.device)
        return flat[start:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    @property
    def is_interpreted(self) -> bool:
        """Whether each chunk takes some 10 ms; ``tests/test_triton.py`` then goes through more of them."""
        return self.backend is triton_launch and self.device.type == "cpu"

    def prepare(self, pairs: Sequence[Pair]) -> Launch:
        assert all(map(self.backend.serves, pairs))
        return self.backend.prepare(pairs)


def everywhere() -> list[object]:
    on_cpu = [pytest.param((name, "cpu"), id=f"{name} on cpu") for name in ("cuda", "triton")]
    on_gpu = [pytest.param((name, "cuda"), id=f"{name} on gpu", marks=pytest.mark.gpu) for name in ("cuda", "triton")]
    return [*on_cpu, *on_gpu]


@pytest.fixture(params=everywhere())
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    name, device = request.param
    backend: Backend = {"cuda": cuda, "triton": triton_launch}[name]  # type: ignore[assignment]
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    if (name, device) == ("cuda", "cpu"):
        request.getfixturevalue("cuda_on_cpu")
    missing = backend.unavailable()
    assert missing is None, missing
    monkeypatch.setattr(gpu_tables, "gpu_chunk_numel", lambda numel, blocks: CHUNK_NUMEL)
    return Gpu(backend, torch.device(device, 0) if device == "cuda" else torch.device(device))


def check_updates(gpu: Gpu, pairs: Sequence[Pair], rule: Rule, counts: Sequence[int]) -> None:
    """Hold updates of the backend and of ``reference`` together, one after the other, from the given counts."""
    ours, expected = gpu.put(pairs), clone(pairs)
    launches = gpu.prepare(ours), reference.prepare(expected)
    for n in counts:
        counters = torch.tensor(n, device=gpu.device), torch.tensor(n)
        for launch, on, counter in zip(launches, (ours, expected), counters, strict=True):
            update(launch, on, [rule], [counter])
        assert counters[0].item() == counters[1].item() == n + 1
        assert differing(ours, expected) == [], f"{rule}, n = {n}"


@PAIRS
def test_updates_equal_the_reference(gpu: Gpu, dtype: torch.dtype, fmt: Format) -> None:
    sizes = [*sizes_around(256), *sizes_around(CHUNK_NUMEL)[9:]]
    pairs = [make_pair(n, dtype, fmt, offset) for n in sizes for offset in (0, 1, 6)]
    if gpu.is_interpreted:
        pairs = pairs[::7]  # every other size or so, with one of the offsets in turn
    for weight in WEIGHTS[::2] if gpu.is_interpreted else WEIGHTS:
        check_updates(gpu, pairs, ExponentialAverage(1.0 - weight), (1,))


def test_every_rule_gives_the_bits_of_the_reference(gpu: Gpu) -> None:
    kinds = EXCHANGED[1::2] if gpu.is_interpreted else EXCHANGED  # a rule knows neither dtype nor format
    pairs = [make_pair(700, dtype, fmt) for dtype, fmt in kinds]
    counts = (0, 1, 3, 999, 2**40) if gpu.is_interpreted else (0, 1, 2, 3, 10, 999, 10**6, 2**40)
    for rule in RULES[:5]:
        check_updates(gpu, pairs, rule, counts)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64])
def test_copies_equal_the_reference(gpu: Gpu, dtype: torch.dtype) -> None:
    pairs = [make_pair(n, dtype, None, offset) for n in (0, 1, 3, 15, 16, 17, 4111) for offset in (0, 1)]
    check_updates(gpu, pairs, EqualAverage(), (3,))


def test_one_launch_serves_many_tensors_of_all_kinds(gpu: Gpu) -> None:
    kinds: list[tuple[torch.dtype, Format | None]] = [(d, f) for d in DTYPES for f in FORMATS]
    kinds.append((torch.int32, None))
    pairs = [make_pair(n % 7 * 5, dtype, fmt, n % 3) for n in range(5) for dtype, fmt in kinds]
    check_updates(gpu, pairs, ExponentialAverage(0.7), (1,))


def test_a_first_update_copies_every_bit(gpu: Gpu) -> None:
    (pair,) = gpu.put([make_pair(1000, torch.float32, FLOAT32)])
    update(gpu.prepare([pair]), [pair], [ExponentialAverage(0.9)], [torch.tensor(0, device=gpu.device)])
    assert torch.equal(pair.average.view(torch.int32), pair.param.view(torch.int32))


@pytest.mark.parametrize("count", [-1, -(2**63), INT64_MAX])
def test_a_count_that_is_none_leaves_everything_as_it_was(gpu: Gpu, count: int) -> None:
    pairs = gpu.put([make_pair(1000, torch.bfloat16, EXACT), make_pair(9, torch.int64, None)])
    before, counter = clone(pairs), torch.tensor(count, device=gpu.device)
    launch = gpu.prepare(pairs)
    update(launch, pairs, [EqualAverage()], [counter])
    assert differing(pairs, before) == []
    assert counter.item() == count
    counter.fill_(0)
    update(launch, pairs, [EqualAverage()], [counter])
    assert counter.item() == 1
    assert torch.equal(pairs[1].average, pairs[1].param)


def test_an_update_may_count_by_another_number(gpu: Gpu) -> None:
    pairs = gpu.put([make_pair(10, torch.float32, FLOAT32)])
    launch, counter = gpu.prepare(pairs), torch.tensor(4, device=gpu.device)
    for advance in (0, 1, 5):
        update(launch, pairs, [EqualAverage()], [counter], advance)
    assert counter.item() == 10


# Several averages of each param


def check_paces(gpu: Gpu, num_paces: int, sizes: Sequence[int]) -> None:
    """Hold updates of several averages of each param to ``reference``, from counts and by rules of their own."""
    pairs = averages_of(num_paces, sizes)
    ours, expected = gpu.put(pairs), clone(pairs)
    assert rows.Rows(ours).most_followers == num_paces - 1
    launches = gpu.prepare(ours), reference.prepare(expected)
    rules, counts = paces_of(num_paces)
    counters = [[torch.tensor(n, device=device) for n in counts] for device in (gpu.device, torch.device("cpu"))]
    for advance in (1, 2):
        for launch, on, counted in zip(launches, (ours, expected), counters, strict=True):
            update(launch, on, rules, counted, advance)
        assert list(map(int, counters[0])) == list(map(int, counters[1]))
        assert differing(ours, expected) == []
        rules = [*rules[1:], PowerAverage(16.97)]
    assert list(map(int, counters[0])) == [n + 3 for n in counts]


@pytest.mark.parametrize("num_paces", [1, 3, library.MAX_PACES])
def test_one_launch_moves_several_averages_of_each_param(gpu: Gpu, num_paces: int) -> None:
    check_paces(gpu, num_paces, (0, 9, GPU_CHUNK_NUMELS[0] + 1) if num_paces < 4 else (33,))


def drop_a_follower(patch: pytest.MonkeyPatch) -> None:
    init = rows.Rows.__init__

    def without(self: rows.Rows, pairs: Sequence[Pair]) -> None:
        init(self, pairs)
        for row in self.table:
            row.followers = min(row.followers, 1)

    patch.setattr(rows.Rows, "__init__", without)


def take_the_first_pace_for_all(patch: pytest.MonkeyPatch) -> None:
    row = rows._row
    patch.setattr(rows, "_row", lambda pair: row(replace(pair, pace=0)))


def keep_the_first_rules(patch: pytest.MonkeyPatch) -> None:
    paces_of = gpu_tables.Table.paces_of
    first: list[Update] = []

    def kept(self: gpu_tables.Table, update: Update, counters: Sequence[Tensor]) -> object:
        first.append(update)
        return paces_of(self, replace(update, terms=first[0].terms), counters)

    patch.setattr(gpu_tables.Table, "paces_of", kept)


@pytest.mark.parametrize("plant", [drop_a_follower, take_the_first_pace_for_all, keep_the_first_rules])
def test_the_check_of_several_averages_kills_the_bug(
    gpu: Gpu, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="param"):
        check_paces(gpu, 3, (33,))


@pytest.mark.parametrize("count", [-1, INT64_MAX])
@pytest.mark.parametrize("at", [0, 2])
def test_one_count_of_several_that_is_none_leaves_everything_as_it_was(gpu: Gpu, count: int, at: int) -> None:
    pairs = gpu.put(averages_of(3, (9,)))
    counts = [4, 5, 6]
    counts[at] = count
    before, counters = clone(pairs), [torch.tensor(n, device=gpu.device) for n in counts]
    launch = gpu.prepare(pairs)
    update(launch, pairs, [EqualAverage()] * 3, counters)
    assert differing(pairs, before) == []
    assert list(map(int, counters)) == counts
    counters[at].fill_(0)
    update(launch, pairs, [EqualAverage()] * 3, counters)
    assert list(map(int, counters)) == [n + 1 if n != count else 1 for n in counts]
    assert differing(pairs, before) != []


def test_a_nonfinite_param_leaves_all_its_averages_as_they_were(gpu: Gpu) -> None:
    pairs = gpu.put(averages_of(3, (17,)))
    for pair in pairs:
        if pair.format is not None:
            pair.param.normal_()
    launch, counters = gpu.prepare(pairs), [torch.tensor(n, device=gpu.device) for n in (4, 5, 6)]
    pairs[1].param[-1] = math.nan
    before = clone(pairs)
    update(launch, pairs, [EqualAverage()] * 3, counters, skip_nonfinite=True)
    assert launch.first_nonfinite([]) == 1
    assert list(map(int, counters)) == [4, 5, 6]
    assert differing(pairs, before) == []
    pairs[1].param[-1] = 0.5
    update(launch, pairs, [EqualAverage()] * 3, counters, skip_nonfinite=True)
    assert list(map(int, counters)) == [5, 6, 7]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_nonfinite_param_is_found_and_may_stop_an_update(gpu: Gpu, bad: float) -> None:
    sizes = [(dtype, fmt, n) for dtype, fmt in zip(DTYPES, FORMATS[:3], strict=True) for n in (1, 17, 5000)]
    pairs = [*(make_pair(n, dtype, fmt, 1) for dtype, fmt, n in sizes), make_pair(4, torch.int32, None)]
    for pair in pairs[:-1]:
        pair.param.normal_()
        pair.param[:1] = torch.finfo(pair.param.dtype).max
    pairs = gpu.put(pairs)
    launch, counter = gpu.prepare(pairs), torch.tensor(3, device=gpu.device)
    assert launch.first_nonfinite([]) is None
    for index in (6, 0, 8, 3):
        param = pairs[index].param
        old = param[-1].clone()
        param[-1] = bad
        before = clone(pairs)
        assert launch.first_nonfinite([]) == index
        update(launch, pairs, [EqualAverage()], [counter], skip_nonfinite=True)
        assert counter.item() == 3
        assert differing(pairs, before) == []
        param[-1] = old
    update(launch, pairs, [EqualAverage()], [counter], skip_nonfinite=True)
    assert counter.item() == 4


@pytest.mark.parametrize(("dtype", "fmt"), [*EXCHANGED, (torch.int32, None)], ids=str)
def test_an_exchange_moves_every_bit_there_and_back(gpu: Gpu, dtype: torch.dtype, fmt: Format | None) -> None:
    pairs = gpu.put([make_pair(n, dtype, fmt, offset) for n in (*sizes_around(256), 4111) for offset in (0, 3)])
    check_exchange(gpu.prepare(pairs), pairs)


def both_averages(gpu: Gpu, model: EveryKind, dtype: torch.dtype, **options: object) -> tuple[dict, dict]:
    """Return the states of two averages of the same params: on the device, and by ``reference`` on the CPU."""
    model.to(dtype)
    theirs = EveryKind().to(dtype).to(gpu.device)
    ours = FusedAveragedModel(theirs, backend=gpu.backend.name, **options)  # type: ignore[arg-type]
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
    gpu: Gpu, every_kind: EveryKind, dtype: torch.dtype, options: dict[str, object]
) -> None:
    ours, expected = both_averages(gpu, every_kind, dtype, rule=ExponentialAverage(0.9), **options)
    assert ours.keys() == expected.keys()
    assert [key for key in ours if not torch.equal(ours[key], expected[key])] == []


@pytest.mark.parametrize(
    ("nonfinite", "rule"),
    [
        ("propagate", EqualAverage()),
        ("skip", EqualAverage()),
        ("skip", {"mean": EqualAverage(), "fast": ExponentialAverage(0.9)}),
    ],
    ids=["one", "skip", "two, skip"],
)
def test_a_planned_update_asks_torch_for_nothing(gpu: Gpu, nonfinite: str, rule: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7)).to(gpu.device)
    options = {"backend": gpu.backend.name, "nonfinite": nonfinite}
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
    assert binding.plan.backends == [gpu.backend.name]


def test_the_count_of_dispatched_ops_sees_a_host_read(gpu: Gpu) -> None:
    with Dispatched() as dispatched:
        int(torch.ones((), dtype=torch.int64, device=gpu.device))
    assert "aten._local_scalar_dense.default" in dispatched.ops


def test_a_swap_is_in_place_and_comes_back(gpu: Gpu, every_kind: EveryKind) -> None:
    model = every_kind.to(gpu.device)
    average = FusedAveragedModel(model, backend=gpu.backend.name)
    average.update_parameters(model)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)
    before, state = tensors_of(model), average.averaged_state_dict()
    addresses = [param.data_ptr() for param in model.parameters()]
    with average.swapped_into(model):
        inside = tensors_of(model)
        assert [name for name in inside.keys() & state.keys() if not torch.equal(inside[name], state[name])] == []
    assert [param.data_ptr() for param in model.parameters()] == addresses
    assert differing_tensors(tensors_of(model), before) == []
    assert differing_tensors(average.averaged_state_dict(), state) == []
