"""The Triton kernels against the definition: ``torch.lerp`` between ``decode`` and ``encode``, bit for bit.

Without a GPU Triton's interpreter runs them (``TRITON_INTERPRET``, which ``tests/conftest.py`` sets); with one they are
compiled and run there. ``tests/test_triton_code.py`` looks at the machine code.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import itertools
import math
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from swafast.backends import library
from swafast.backends.contract import Pair
from swafast.backends.rows import make_paces
from swafast.backends.triton import launch as backend
from swafast.op import choice
from swafast.terms import layout
from swafast.terms.boxes import Box
from swafast.terms.draws import Draws, random_bits
from swafast.terms.formats import COMPACT, COMPENSATED, EXACT, FLOAT32, HALF, MIRRORED, Format
from swafast.terms.rules import EqualAverage, ExponentialAverage, Rule
from swafast.terms.weight import KernelTerms
from tests.kernels import (
    DTYPES,
    FORMATS,
    INT64_MAX,
    RULES,
    averages_of,
    check_exchange,
    clone,
    differing,
    make_pair,
    meet_at_each_line,
    paces_of,
    same_bits,
    update,
)
from tests.planting import Plant, read_plants
from tests.triton_source import import_kernels, read_kernels

triton = pytest.importorskip("triton", reason="needs Triton")
from swafast.backends.triton.arithmetic import HAS_FMA  # noqa: E402

DEVICE = "cpu" if backend.is_interpreted() else "cuda"
#: Copy, either branch of torch.lerp, where they meet, and standstill.
WEIGHTS = (1.0, 0.3, 0.5, 0.9, 0.0)
#: A wide tile and an end in each chunk.
CHUNK = 5000
#: Around the ends of tiles and of chunks.
SIZES = (0, 1, 17, 1023, 1024, 1025, 4095, 4096, 4097, CHUNK, CHUNK + 1, 3 * 4096 + 7)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "GPU_CHUNK_NUMELS", (CHUNK, CHUNK))


@pytest.fixture(autouse=True)
def language_patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter put its functions into the language at each launch, and not at each call within one.

    That took two thirds of the time of these tests, and puts in what is there already.
    """
    if DEVICE != "cpu":
        return
    interpreted_function = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    call = interpreted_function.__call__

    def call_ours(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        if self.fn.__module__.startswith("swafast."):
            return self.rewrite()(*args, **kwargs)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreted_function, "__call__", call_ours)


def on_device(tensor: Tensor) -> Tensor:
    """Return the same elements on the device, as far from a 16-byte boundary."""
    if DEVICE == "cpu":
        return tensor
    memory = torch.empty(tensor.storage_offset() + tensor.numel(), dtype=tensor.dtype, device=DEVICE)
    return memory[tensor.storage_offset() :].copy_(tensor)


def pair_of(numel: int, dtype: torch.dtype, fmt: Format | None, offset: int = 0, first_row: int = 0) -> Pair:
    """Return a pair whose random bits are those of the middle column of three, from ``first_row`` on."""
    pair = make_pair(numel, dtype, fmt, offset)
    draws = None
    if fmt is not None and fmt.num_random_bits:
        box = Box((first_row, 1), (numel, 1), 0, (0, 1))
        draws = Draws(0x9E3779B97F4A7C15 ^ (numel << 40), (first_row + numel, 3), (box,))
    return Pair(pair.name, on_device(pair.param), tuple(map(on_device, pair.planes)), fmt, draws)


def prepare(pairs: Sequence[Pair], kernels: ModuleType | None = None) -> backend.TritonLaunch:
    launch = backend.prepare(pairs)
    launch._kernels = kernels or launch._kernels
    return launch


def put(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs on the device; what was one param is one there."""
    params = {id(pair.param): on_device(pair.param) for pair in pairs}
    return [replace(p, param=params[id(p.param)], planes=tuple(map(on_device, p.planes))) for p in pairs]


def counter_of(n: int) -> Tensor:
    return torch.tensor(n, device=DEVICE)


def expected_planes(pair: Pair, weight: float, n: int) -> tuple[Tensor, ...]:
    """Work out what an update by ``weight`` after ``n`` models has to leave in the planes, on the CPU."""
    param, planes, fmt = pair.param.cpu(), tuple(plane.cpu() for plane in pair.planes), pair.format
    if fmt is None:
        return (param,)
    average, newest = fmt.decode(planes), param.to(fmt.value_dtype)
    if fmt.value_dtype == torch.float64:
        return fmt.encode(newest if weight == 1.0 else average + weight * (newest - average))
    rounded = torch.tensor(weight, dtype=torch.float32).item()
    moved = newest if rounded == 1.0 else torch.lerp(average, newest, rounded)
    if pair.draws is None:
        return fmt.encode(moved)
    index = torch.arange(len(param))
    if pair.draws.boxes:
        index = (index + pair.draws.boxes[0].offsets[0]) * 3 + 1
    return fmt.encode(moved, random_bits(pair.draws.random_key, n, index) >> (32 - fmt.num_random_bits))


def check_planes(pairs: Sequence[Pair], before: Sequence[Pair], weights: Sequence[float], ns: Sequence[int]) -> None:
    """Hold what an update has left to the definition, by each pace's weight and count."""
    expected = [
        replace(old, param=old.param.cpu(), planes=expected_planes(old, weights[old.pace], ns[old.pace]))
        for old in before
    ]
    assert differing(pairs, expected) == [], f"wrong at weights {weights}"


def check_updates(pairs: Sequence[Pair], weights: Sequence[float], kernels: ModuleType | None = None) -> None:
    """Hold updates to the definition: by each weight from the same averages."""
    assert all(map(backend.serves, pairs))
    initial = clone(pairs)
    launch = prepare(pairs, kernels)
    counter = counter_of(7)
    for n, weight in enumerate(weights, 7):
        for pair, start in zip(pairs, initial, strict=True):
            for plane, value in zip(pair.planes, start.planes, strict=True):
                plane.copy_(value)
        rule = ExponentialAverage(1.0 - weight)
        update(launch, pairs, [rule], [counter])
        check_planes(pairs, initial, [rule.weight(n)], [n])
    assert counter == 7 + len(weights)


@pytest.mark.parametrize(("dtype", "fmt"), [(d, f) for d in DTYPES for f in FORMATS], ids=str)
def test_updates_equal_the_definition(dtype: torch.dtype, fmt: Format) -> None:
    aligned = [pair_of(n, dtype, fmt) for n in SIZES]
    shifted = [pair_of(n, dtype, fmt, offset) for n, offset in ((1, 1), (17, 6), (CHUNK + 1, 1), (4096, 4))]
    check_updates([*aligned, *shifted], (1.0, 0.3, 0.9))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64])
def test_copies_are_of_bytes(dtype: torch.dtype) -> None:
    check_updates([pair_of(n, dtype, None, offset) for n in (0, 1, 17, CHUNK + 1) for offset in (0, 1)], (0.3,))
    check_updates([pair_of(16 * 1024 + 3, dtype, None)], (0.3,))


SPECIAL = [0.0, 1.0, 1 + 2**-23, 3.1, 2**-126, 2**-149, 2**-24, 2**-25, 65504.0, 65520.0, 3.4028234e38, math.inf]


def special_values() -> tuple[Tensor, Tensor]:
    """Return (averages, params) in which every special value meets every other."""
    values = torch.tensor([sign * value for value in SPECIAL for sign in (1, -1)] + [math.nan])
    return values.repeat_interleave(len(values)), values.repeat(len(values))


def special_pairs() -> list[Pair]:
    averages, params = special_values()
    pairs = [
        pair_at(f"{dtype} {fmt}", params.to(dtype), fmt.encode(averages.to(fmt.value_dtype)), fmt)
        for dtype in DTYPES
        for fmt in FORMATS
    ]
    # Somebody has written into the module's own parameter: the other plane is stale.
    highs = torch.tensor([0, 0x8000, 0x7F80, 0xFF80, 1, 0x7F7F, 0x3F80, 0x7FC0]).to(torch.int16)
    lows = torch.tensor([0, 1, -1, 2**15 - 1, -(2**15), 77, -77, 256]).to(torch.int16)
    high, low = highs.repeat_interleave(8).view(torch.bfloat16), lows.repeat(8)
    stale: list[tuple[Format, Tensor, tuple[Tensor, ...]]] = [
        (EXACT, torch.linspace(-2, 2, 64), (high, low)),
        (COMPACT, torch.linspace(-2, 2, 64), (high.clone(), (low % 256 - 128).to(torch.int8))),
        (MIRRORED, params, (params.half(), averages)),
        (COMPENSATED, params, (params, averages)),
        (COMPENSATED, params, (params, torch.ones_like(averages) / 3)),
    ]
    for fmt, param, planes in stale:
        pairs.append(pair_at(f"stale {fmt}", param, planes, fmt))
    return pairs


def pair_at(name: str, param: Tensor, planes: tuple[Tensor, ...], fmt: Format) -> Pair:
    draws = Draws(2**63 + 5, (len(param), 3), (Box((0, 1), (len(param), 1), 0, (0, 1)),))
    planes = tuple(on_device(plane.clone()) for plane in planes)
    return Pair(name, on_device(param), planes, fmt, draws if fmt.num_random_bits else None)


def test_special_values_equal_the_definition() -> None:
    check_updates(special_pairs(), WEIGHTS)


# Random bits


def mixed(start: int, word: int) -> int:
    """Mix a number as splitmix64 does."""
    x = (start + word) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def bits_in_ints(key: int, n: int, index: int) -> int:
    """Compute an element's random bits in Python's integers."""
    upper, lower = divmod(index, 2**32)
    second, first = divmod(mixed(mixed(key, (n // 16 + 1) * 0x9E3779B97F4A7C15), upper), 2**32)
    turn = int(f"{n % 16:04b}"[::-1], 2)  # of 16 updates each takes another sixteenth of the range
    x = lower ^ first
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32 ^ second
    return ((x ^ x >> 15) * 0x846CA68B + turn * 2**28) % 2**32


def differing_bits(random: ModuleType) -> list[tuple[int, int, int]]:
    """Return (key, count, index) of each draw that differs in a bit from Python's."""
    keys, counts = (1, 2**63, 2**64 - 1, 0x0123456789ABCDEF), (0, 1, 10, 2**31, 2**36 - 1, 2**53 + 1, INT64_MAX - 1)
    indices = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 3 * 2**32 - 1, 2**40 + 2**31, 2**62 + 7]
    cases = list(itertools.product(keys, counts, [*indices, *range(1000, 1022)]))
    got = torch.empty(1024, dtype=torch.int64, device=DEVICE)
    arguments = [torch.tensor([signed(case[i]) for case in cases] + [0] * (1024 - len(cases))) for i in range(3)]
    on = [argument.to(DEVICE) for argument in arguments]
    with backend._on_device(got.device):
        addresses = [tensor.data_ptr() for tensor in (*on, got)]
        random.bits_kernel[(1,)](*addresses, NUMEL=1024, **backend.launch_options("cuda"))
    return [case for case, bits in zip(cases, got.tolist(), strict=False) if bits != bits_in_ints(*case)]


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def random_pairs() -> list[Pair]:
    """Return pairs whose chunks begin below, at and above an index where its upper half changes."""
    rows = (0, 2**32 // 3 - CHUNK - 1, 2**32 // 3, 5 * 2**32 + 12345)
    return [pair_of(2 * CHUNK + 3, torch.bfloat16, fmt, first_row=row) for row in rows for fmt in (COMPACT, HALF)]


def test_rounding_at_random_goes_by_the_index_in_the_whole_param() -> None:
    pairs = random_pairs()
    check_updates(pairs, (0.3,))
    chunks = backend.prepare(pairs)._tables[0].head.num_chunks
    assert chunks > 3 * len(pairs)  # one was cut where the upper half changes


# Several averages of each param


def check_paces(num_paces: int, sizes: Sequence[int], kernels: ModuleType | None = None) -> None:
    """Hold two updates of several averages of each param to the definition."""
    pairs, (rules, ns) = put(averages_of(num_paces, sizes)), paces_of(num_paces)
    counters, launch = list(map(counter_of, ns)), prepare(pairs, kernels)
    for advance in (1, 2):
        before = clone(pairs)
        update(launch, pairs, rules, counters, advance)
        check_planes(pairs, before, [rule.weight(n) for rule, n in zip(rules, ns, strict=True)], ns)
        ns = [n + advance for n in ns]
        assert list(map(int, counters)) == ns, "the counters are wrong"
        rules = [*rules[1:], EqualAverage()]


def check_bad_count(n: int, kernels: ModuleType | None = None) -> None:
    pairs, counters = put(averages_of(3, (9,))), list(map(counter_of, (4, n, 0)))
    before = clone(pairs)
    update(prepare(pairs, kernels), pairs, [EqualAverage()] * 3, counters)
    assert differing(pairs, before) == [], "an update after a bad count changed something"
    assert list(map(int, counters)) == [4, n, 0]


class Written:
    """What was written where, in the place of the kernel that writes paces."""

    def __init__(self, paces: backend._Paces) -> None:
        self.paces, self.at = paces, []
        self.kept: list[Tensor] = []  # so that no address is handed out twice
        self.last: tuple[object, Any] = (None, None)  # what the paces given last are of, and these

    def get(self, decay: float, counter: Tensor, capturing: bool = False) -> int:
        if self.last[0] != (decay, counter.data_ptr()):
            made = make_paces([ExponentialAverage(decay).kernel_terms()], [counter])
            self.last = (decay, counter.data_ptr()), made
        self.kept.append(self.paces.get(self.last[1], capturing, 0, self._write))
        return self.kept[-1].data_ptr()

    def _write(self, address: int, index: int, *words: int) -> None:
        assert index == 0
        assert len(words) == backend._PACE_WORDS
        self.at.append(address)


def test_paces_are_written_when_they_change_and_never_where_others_read() -> None:
    written, counter, other = Written(backend._Paces(torch.device(DEVICE))), counter_of(0), counter_of(0)
    first = [written.get(0.9, counter) for _ in range(2)]
    second = [written.get(0.8, counter) for _ in range(2)]
    third = [written.get(0.8, other), written.get(0.8, other, capturing=True), written.get(0.8, other)]
    fourth = [written.get(0.7, other)]
    # What a graph writes is not there before it runs.
    fifth = [written.get(0.6, other, capturing=True)]
    sixth = [written.get(0.6, other) for _ in range(2)]
    groups = (first, second, third, fourth, fifth, sixth)
    assert all(len(set(group)) == 1 for group in groups)
    assert written.at == [group[0] for group in groups]
    assert len(set(written.at)) == 6
    assert [words.data_ptr() for words in written.paces._captured] == [third[0], fifth[0]]


# The kernels' source, with or without a bug

PROBES = {
    "arithmetic": """

@triton.jit
def weights_kernel(
    counts: tl.int64, weights: tl.int64, kind: tl.int64,
    term0: tl.int64, term1: tl.int64, term2: tl.int64, term3: tl.int64, NUMEL: tl.constexpr,
):
    places = tl.arange(0, NUMEL)
    n = tl.load(counts.to(tl.pointer_type(tl.int64)) + places)
    weight = rule_weight(kind, term0, term1, term2, term3, n)
    tl.store(weights.to(tl.pointer_type(tl.float64)) + places, weight)
""",
    "random": """

@triton.jit
def bits_kernel(keys: tl.int64, counts: tl.int64, indices: tl.int64, bits: tl.int64, NUMEL: tl.constexpr):
    places = tl.arange(0, NUMEL)
    key = tl.load(keys.to(tl.pointer_type(tl.int64)) + places)
    n = tl.load(counts.to(tl.pointer_type(tl.int64)) + places)
    index = tl.load(indices.to(tl.pointer_type(tl.int64)) + places)
    drawn = bits_of_draw(draw_of(key, n, index), index.to(tl.uint32))
    tl.store(bits.to(tl.pointer_type(tl.int64)) + places, drawn.to(tl.int64))
""",
}


Build = dict[str, ModuleType]


def build(folder: Path, *bugs: Plant) -> Build:
    """Import the kernels' source with these bugs in it: arithmetic has weights_kernel then, and random bits_kernel."""
    sources = read_kernels()
    for bug in bugs:
        sources = bug.apply(sources)
    for part, probe in PROBES.items():
        sources[f"{part}.py"] += probe
    return import_kernels(folder / "built", sources)


# Weights


def differing_weights(rule: Rule, arithmetic: ModuleType) -> list[int]:
    """Return the counts at which the kernels' weight differs in a bit from the rule's."""
    counts = [*range(4000), *(10**k + d for k in range(4, 13) for d in (-1, 0, 1)), 2**53 + 1, INT64_MAX]
    counts += range(10**6 + 2, 10**6 + 2 + 4096 - len(counts))
    table = torch.tensor(counts, device=DEVICE)
    weights = torch.empty(4096, dtype=torch.float64, device=DEVICE)
    terms = rule.kernel_terms()
    assert terms is not None
    arguments = (
        table.data_ptr(),
        weights.data_ptr(),
        terms.kind,
        *struct.unpack("<4q", struct.pack("<4d", *terms.terms)),
    )
    with backend._on_device(table.device):
        arithmetic.weights_kernel[(1,)](*arguments, NUMEL=4096, **backend.launch_options("cuda"))
    return [n for n, weight in zip(counts, weights.tolist(), strict=True) if weight != terms.weight(n)]


# The counter


def check_counter(kernels: ModuleType | None = None) -> None:
    """Run updates of more programs than one, by a rule whose weight follows the counter."""
    pair, counter, rule = pair_of(4 * CHUNK, torch.float32, FLOAT32), counter_of(0), EqualAverage()
    pair.average.zero_()
    pair.param.copy_(torch.randn(4 * CHUNK))
    launch = prepare([pair], kernels)
    table = launch._tables[0]
    assert table.head.num_chunks > 3
    for n in range(4):
        expected = expected_planes(pair, rule.weight(n), n)
        update(launch, [pair], [rule], [counter], 2 if n == 3 else 1)
        assert same_bits(pair.average.cpu(), expected[0]), f"update {n} is wrong"
    assert counter == 5, "the counter is wrong"
    begun = table.words[-library.MAX_PACES - 3]
    assert begun == 4 * min(table.head.num_chunks, table.head.num_blocks)  # every program of every launch


def test_a_launch_without_chunks_counts() -> None:
    counter, pairs = counter_of(4), [pair_of(0, torch.float32, FLOAT32)]
    update(prepare(pairs), pairs, [EqualAverage()], [counter])
    assert counter == 5


# The backend


def test_it_says_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.unavailable() is None
    assert triton.__version__ in backend.describe()
    monkeypatch.setattr(backend, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    why = backend.unavailable()
    assert why is not None
    assert (why.reason, why.expected) == ("torch finds no CUDA device", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if DEVICE == "cpu":  # the modules are there, made for the interpreter
        monkeypatch.setattr(backend, "_load", backend._load.__wrapped__)
        why = backend.unavailable()
        assert why is not None
        assert why.reason.startswith("TRITON_INTERPRET was changed")


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU for the kernels")
def test_the_interpreter_serves_only_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWAFAST_BACKEND", raising=False)
    assert backend not in choice.choose_backends(device_types={"cpu"})
    assert backend in choice.choose_backends("triton", {"cpu"})
    pair = pair_of(3, torch.float32, FLOAT32)
    assert backend.serves(pair)
    assert not backend.serves(Pair("", pair.param.to("meta"), (pair.average.to("meta"),), FLOAT32))


def test_a_triton_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load_anew = backend._load.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        missing = backend.unavailable()
        assert missing is not None
        assert missing.expected
    monkeypatch.setitem(sys.modules, "swafast.backends.triton.kernels", None)
    monkeypatch.delattr("swafast.backends.triton.kernels")
    why = load_anew()
    assert "did not load: " in why.reason
    assert not why.expected


# Planted bugs


def see_updates(built: Build) -> None:
    pairs = [pair_of(n, dtype, fmt) for n in (17, CHUNK) for dtype in DTYPES[:2] for fmt in (FLOAT32, EXACT)]
    check_updates([*pairs, *special_pairs()], WEIGHTS, built["kernels"])


def see_weights(built: Build) -> None:
    assert [rule for rule in RULES if differing_weights(rule, built["arithmetic"])] == [], "weights are wrong"


def see_bits(built: Build) -> None:
    assert differing_bits(built["random"]) == [], "random bits are wrong"


def see_indices(built: Build) -> None:
    check_updates([pair for pair in random_pairs() if pair.format is COMPACT], (0.3,), built["kernels"])


def see_exchange(built: Build) -> None:
    pairs = [pair_of(CHUNK, torch.float32, FLOAT32)]
    check_exchange(prepare(pairs, built["kernels"]), pairs)


CHECKS: dict[str, Callable[[Build], None]] = {
    "updates": see_updates,
    "copies": lambda built: check_updates([pair_of(CHUNK + 3, torch.uint8, None)], (0.3,), built["kernels"]),
    "counter": lambda built: check_counter(built["kernels"]),
    "weights": see_weights,
    "exchange": see_exchange,
    "bits": see_bits,
    "indices": see_indices,
    "paces": lambda built: check_paces(3, (5,), built["kernels"]),
    "bad counts": lambda built: check_bad_count(-1, built["kernels"]),
}
BUGS = read_plants("triton")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_seen(bug: Plant, tmp_path: Path) -> None:
    if bug.name.startswith("a fused") and not HAS_FMA:
        pytest.skip("this Triton's interpreter has no fused multiply-add to plant")
    built = build(tmp_path, bug)
    with pytest.raises(AssertionError) as seen:
        CHECKS[bug.option](built)
    assert bug.expected in str(seen.value)


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_seen_where_nothing_is_planted(check: str, tmp_path: Path) -> None:
    CHECKS[check](build(tmp_path))


def test_a_triton_that_cannot_compile_warns_once_and_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> ModuleType:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(backend, "_kernels", fail)
    backend._is_usable.cache_clear()
    device = torch.device("cuda", 0)
    with pytest.warns(RuntimeWarning, match="Triton kernels do not run on cuda:0: RuntimeError: Failed to find C"):
        assert not backend._is_usable(device)
    assert not backend._is_usable(device)
    backend._is_usable.cache_clear()


@pytest.mark.parametrize("capturing", [False, True])
def test_two_threads_may_meet_at_each_line_of_paces(capturing: bool) -> None:
    """A launch reads the words of its own rule and counter, whatever another thread writes meanwhile."""
    words: dict[float, Tensor] = {}

    def write(address: int, index: int, *values: int) -> None:
        (ctypes.c_int64 * 6).from_address(address + 48 * index)[:] = values

    def get(weight: float, capturing: bool = False) -> None:
        made = paces_by_weight[weight]
        words[weight] = cached.get(made, capturing, 0, write)

    counter = torch.tensor(1)
    paces_by_weight = {weight: make_paces([KernelTerms.constant(weight)], [counter]) for weight in (0.5, 0.75)}
    cached = backend._Paces(torch.device("cpu"))
    get(0.75)
    for line in meet_at_each_line(lambda: get(0.5, capturing), lambda: get(0.75), ("triton/launch.py",)):
        read = {weight: of[1:2].view(torch.float64).item() for weight, of in words.items()}
        assert read == {0.5: 0.5, 0.75: 0.75}, f"line {line}"
