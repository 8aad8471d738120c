"""The Triton kernels against the definition: ``torch.lerp`` between ``decode`` and ``encode``, bit for bit.

Without a GPU Triton's interpreter runs them (``TRITON_INTERPRET``, which ``tests/conftest.py`` sets); with one they are
compiled and run there. ``tests/test_triton_code.py`` looks at the machine code.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swafast import FusedAverages
from swafast.backends import library
from swafast.backends.contract import Pair
from swafast.backends.rows import make_paces
from swafast.backends.triton import launch as backend
from swafast.op import choice
from swafast.terms import layout
from swafast.terms.boxes import Box
from swafast.terms.draws import Draws, random_bits
from swafast.terms.formats import COMPACT, COMPENSATED, EXACT, FLOAT32, HALF, MIRRORED, Format
from swafast.terms.rules import EqualAverage, ExponentialAverage, PowerAverage, Rule
from tests.conftest import EveryKind, trained
from tests.test_native import DTYPES, differing, make_pair, same_bits
from tests.updates import run_update

triton = pytest.importorskip("triton", reason="needs Triton")
from swafast.backends.triton import kernels  # noqa: E402  # after the look for Triton
from swafast.backends.triton.arithmetic import HAS_FMA  # noqa: E402

FORMATS = (FLOAT32, EXACT, MIRRORED, COMPACT, COMPENSATED, HALF)
DEVICE = "cpu" if backend.is_interpreted() else "cuda"
#: Copy, either branch of torch.lerp, where they meet, and standstill.
WEIGHTS = (1.0, 0.3, 0.5, 0.9, 0.0)
#: A wide tile and an end in each chunk.
CHUNK = 5000
#: Around the ends of tiles and of chunks.
SIZES = (0, 1, 17, 1023, 1024, 1025, 4095, 4096, 4097, CHUNK, CHUNK + 1, 3 * 4096 + 7)
INT64_MAX = 2**63 - 1

RULES: list[Rule] = [
    EqualAverage(),
    ExponentialAverage(0.999),
    ExponentialAverage(0.9999, warmup="power"),
    ExponentialAverage(0.9999, warmup="power", inv_gamma=0.37, power=0.75, min_decay=0.1),
    ExponentialAverage(1.0, warmup="power", inv_gamma=1e-320),
    ExponentialAverage(0.9999, warmup="ratio", min_decay=0.2),
    PowerAverage(0.0),
    PowerAverage(6.94),
    PowerAverage(16.97),
]


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
    """Give the same elements on the device, as far from a 16-byte boundary."""
    if DEVICE == "cpu":
        return tensor
    memory = torch.empty(tensor.storage_offset() + tensor.numel(), dtype=tensor.dtype, device=DEVICE)
    return memory[tensor.storage_offset() :].copy_(tensor)


def pair_of(numel: int, dtype: torch.dtype, fmt: Format | None, offset: int = 0, first_row: int = 0) -> Pair:
    """Give a pair whose param is a column of three in a whole param, from ``first_row`` on, for what that matters."""
    pair = make_pair(numel, dtype, fmt, offset)
    draws = None
    if fmt is not None and fmt.num_random_bits:
        box = Box((first_row, 1), (numel, 1), 0, (0, 1))
        draws = Draws(0x9E3779B97F4A7C15 ^ (numel << 40), (first_row + numel, 3), (box,))
    return Pair(pair.name, on_device(pair.param), tuple(map(on_device, pair.planes)), fmt, draws)


def clone(pairs: Sequence[Pair]) -> list[Pair]:
    return [replace(p, param=p.param.clone(), planes=tuple(plane.clone() for plane in p.planes)) for p in pairs]


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
    first_row = pair.draws.boxes[0].offsets[0] if pair.draws.boxes else 0
    index = (torch.arange(len(param)) + first_row) * 3 + 1
    return fmt.encode(moved, random_bits(pair.draws.random_key, n, index) >> (32 - fmt.num_random_bits))


def check_planes(pairs: Sequence[Pair], before: Sequence[Pair], weights: Sequence[float], ns: Sequence[int]) -> None:
    """Hold what an update has left to the definition, by each pace's weight and count."""
    expected = [
        replace(old, param=old.param.cpu(), planes=expected_planes(old, weights[old.pace], ns[old.pace]))
        for old in before
    ]
    got = [replace(pair, param=pair.param.cpu(), planes=tuple(p.cpu() for p in pair.planes)) for pair in pairs]
    wrong = [
        f"{pair.name} {pair.format} {pair.pace}"
        for pair, right in zip(got, expected, strict=True)
        if differing([pair], [right])
    ]
    assert wrong == [], f"weights {weights}"


def check_updates(pairs: Sequence[Pair], weights: Sequence[float], kernels: ModuleType | None = None) -> None:
    """Hold updates to the definition: by each weight from the same averages."""
    assert all(map(backend.serves, pairs))
    initial = clone(pairs)
    launch = backend.prepare(pairs)
    launch._kernels = kernels or launch._kernels
    counter = counter_of(7)
    for n, weight in enumerate(weights, 7):
        for pair, start in zip(pairs, initial, strict=True):
            for plane, value in zip(pair.planes, start.planes, strict=True):
                plane.copy_(value)
        rule = ExponentialAverage(1.0 - weight)
        run_update(launch, [], [rule], [counter], 1)
        check_planes(pairs, initial, [rule.weight(n)], [n])
    assert counter == 7 + len(weights)


@pytest.mark.parametrize(("dtype", "fmt"), [(d, f) for d in DTYPES for f in FORMATS], ids=str)
def test_updates_equal_the_definition(dtype: torch.dtype, fmt: Format) -> None:
    aligned = [pair_of(n, dtype, fmt) for n in SIZES]
    shifted = [pair_of(n, dtype, fmt, offset) for n, offset in ((1, 1), (17, 6), (CHUNK + 1, 1), (4096, 4))]
    check_updates([*aligned, *shifted], (1.0, 0.3, 0.9))


def test_one_launch_serves_many_tensors_of_all_kinds() -> None:
    pairs = [pair_of(n % 9, dtype, fmt, n % 3) for n in range(9) for dtype in DTYPES for fmt in FORMATS]
    check_updates([*pairs, *(pair_of(n, torch.int32, None) for n in range(9))], (0.3,))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64])
def test_copies_are_of_bytes(dtype: torch.dtype) -> None:
    check_updates([pair_of(n, dtype, None, offset) for n in (0, 1, 17, CHUNK + 1) for offset in (0, 1)], (0.3,))
    check_updates([pair_of(16 * 1024 + 3, dtype, None)], (0.3,))


SPECIAL = [0.0, 1.0, 1 + 2**-23, 3.1, 2**-126, 2**-149, 2**-24, 2**-25, 65504.0, 65520.0, 3.4028234e38, math.inf]


def special_values() -> tuple[Tensor, Tensor]:
    """Give every special value beside every other, once as the average and once as the param."""
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
    """Give what splitmix64 makes of a number."""
    x = (start + word) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def bits_in_ints(key: int, n: int, index: int) -> int:
    """Give an element's random bits, worked out in integers of Python."""
    upper, lower = divmod(index, 2**32)
    second, first = divmod(mixed(mixed(key, (n // 16 + 1) * 0x9E3779B97F4A7C15), upper), 2**32)
    turn = int(f"{n % 16:04b}"[::-1], 2)  # of 16 updates each takes another sixteenth of the range
    x = lower ^ first
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32 ^ second
    return ((x ^ x >> 15) * 0x846CA68B + turn * 2**28) % 2**32


def differing_bits(random: ModuleType) -> list[tuple[int, int, int]]:
    """Give (key, count, index) of draws that are not, to the last bit, those worked out in integers."""
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


def test_random_bits_equal_those_of_integers(tmp_path: Path) -> None:
    assert differing_bits(build(tmp_path).random) == []


def random_pairs() -> list[Pair]:
    """Give pairs whose chunks begin below, at and beyond an index where its upper half changes."""
    rows = (0, 2**32 // 3 - CHUNK - 1, 2**32 // 3, 5 * 2**32 + 12345)
    return [pair_of(2 * CHUNK + 3, torch.bfloat16, fmt, first_row=row) for row in rows for fmt in (COMPACT, HALF)]


def test_rounding_at_random_goes_by_the_index_in_the_whole_param() -> None:
    pairs = random_pairs()
    check_updates(pairs, (0.3,))
    chunks = backend.prepare(pairs)._tables[0].head.num_chunks
    assert chunks > 3 * len(pairs)  # one was cut where the upper half changes


# Several averages of each param


def paces_of(num_paces: int) -> tuple[list[Rule], list[int]]:
    """Give rules and counts, each unlike the others."""
    rules = [RULES[k % len(RULES)] for k in range(num_paces)]
    return rules, [(0, 1, 7, 10**6, 2**40)[k % 5] + k for k in range(num_paces)]


def averages_of(params: Sequence[Tensor], num_paces: int) -> list[Pair]:
    """Give pairs of each param with averages of mixed formats: as models hand them in, one average of all at a time."""
    pairs = []
    for pace, (index, param) in itertools.product(range(num_paces), enumerate(params)):
        fmt = FORMATS[(pace + index) % len(FORMATS)] if param.is_floating_point() else None
        pair = pair_of(len(param), param.dtype, fmt, pace % 3)
        pairs.append(replace(pair, name=f"param {index}", param=param, pace=pace))
    return pairs


def check_paces(num_paces: int, sizes: Sequence[int], kernels: ModuleType | None = None) -> None:
    """Hold two updates of several averages of each param to the definition."""
    dtypes = (*DTYPES, torch.int32)
    params = [
        pair_of(size, dtype, FLOAT32 if dtype.is_floating_point else None).param for size in sizes for dtype in dtypes
    ]
    pairs, (rules, ns) = averages_of(params, num_paces), paces_of(num_paces)
    counters = list(map(counter_of, ns))
    launch = backend.prepare(pairs)
    launch._kernels = kernels or launch._kernels
    for advance in (1, 2):
        before = clone(pairs)
        run_update(launch, [], rules, counters, advance)
        check_planes(pairs, before, [rule.weight(n) for rule, n in zip(rules, ns, strict=True)], ns)
        ns = [n + advance for n in ns]
        assert list(map(int, counters)) == ns
        rules = [*rules[1:], EqualAverage()]


@pytest.mark.parametrize("num_paces", [1, 2, 3, 16])
def test_one_launch_moves_several_averages_of_each_param(num_paces: int) -> None:
    check_paces(num_paces, (0, 33) if num_paces == 16 else (9, 4097))


@pytest.mark.parametrize("n", [-1, -(2**63), INT64_MAX])
def test_one_bad_count_of_several_leaves_everything_as_it_was(n: int) -> None:
    check_bad_count(n)


def check_bad_count(n: int, kernels: ModuleType | None = None) -> None:
    pairs = averages_of([pair_of(9, dtype, FLOAT32).param for dtype in DTYPES], 3)
    before, counters = clone(pairs), list(map(counter_of, (4, n, 0)))
    launch = backend.prepare(pairs)
    launch._kernels = kernels or launch._kernels
    run_update(launch, [], [EqualAverage()] * 3, counters, 1)
    assert differing(pairs, before) == []
    assert list(map(int, counters)) == [4, n, 0]


def test_a_nonfinite_param_leaves_all_its_averages_as_they_were() -> None:
    params = [pair_of(9, dtype, FLOAT32).param.fill_(2.0) for dtype in DTYPES]
    pairs, counters = averages_of(params, 3), list(map(counter_of, (4, 5, 6)))
    launch = backend.prepare(pairs)
    params[1][8] = math.nan
    before = clone(pairs)
    run_update(launch, [], [EqualAverage()] * 3, counters, 1, skip_nonfinite=True)
    assert differing(pairs, before) == []
    assert list(map(int, counters)) == [4, 5, 6]
    assert launch.first_nonfinite([]) == 1


class Written:
    """What was written where, in the place of the kernel that writes paces."""

    def __init__(self, paces: backend._Paces) -> None:
        self.paces, self.at = paces, []
        self.last: tuple[object, Any] = (None, None)  # what the paces given last are of, and these

    def get(self, decay: float, counter: Tensor, capturing: bool = False) -> int:
        if self.last[0] != (decay, counter.data_ptr()):
            made = make_paces([ExponentialAverage(decay).kernel_terms()], [counter])
            self.last = (decay, counter.data_ptr()), made
        return self.paces.get(self.last[1], capturing, self._write).data_ptr()

    def _write(self, address: int, index: int, *words: int) -> None:
        assert index == 0
        assert len(words) == 6
        self.at.append(address)


def test_paces_are_written_when_they_change_and_never_where_a_graph_reads() -> None:
    written, counter = Written(backend._Paces(torch.device(DEVICE))), counter_of(0)
    first = written.get(0.9, counter)
    assert [written.get(0.9, counter), written.get(0.8, counter), written.get(0.8, counter)] == [first] * 3
    assert written.at == [first] * 2
    assert written.get(0.8, counter_of(0)) == first
    other = counter_of(0)
    assert written.get(0.8, other) == first
    assert len(written.at) == 4
    # A graph reads what is there; from then on it stays.
    assert written.get(0.8, other, capturing=True) == first
    assert written.get(0.8, other) == first
    assert len(written.at) == 4
    second = written.get(0.7, other)
    assert second != first
    # What a graph writes is not there before it runs.
    third = written.get(0.6, other, capturing=True)
    assert written.get(0.7, other) == second
    assert written.get(0.6, other) == second
    assert third not in (first, second)
    assert written.at == [*[first] * 4, second, third, second, second]


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


@dataclass
class Build:
    """The modules of the kernels, made anew from their source."""

    arithmetic: ModuleType  # with weights_kernel beside the rest
    random: ModuleType  # with bits_kernel
    memory: ModuleType
    paces: ModuleType
    kernels: ModuleType


def build(folder: Path, *edits: tuple[str, str]) -> Build:
    """Import the kernels' source with each (old, new) of ``edits`` put in; ``old`` must stand there once."""
    parts = tuple(Build.__dataclass_fields__)
    place = Path(kernels.__file__).parent
    sources = {part: (place / f"{part}.py").read_text() + PROBES.get(part, "") for part in parts}
    for old, new in edits:
        assert sum(source.count(old) for source in sources.values()) == 1, f"not once: {old!r}"
        sources = {part: source.replace(old, new) for part, source in sources.items()}
    suffix = f"_{folder.name}"
    made = {}
    for part, source in sources.items():
        for other in parts:
            source = source.replace(f"from .{other} import", f"from .{other}{suffix} import")
        made[part] = load(folder / f"{part}{suffix}.py", source)
    return Build(**made)


def load(path: Path, source: str) -> ModuleType:
    """Import ``source`` as a module of ``swafast.backends.triton``; Triton reads the file again."""
    path.write_text(source)
    name = f"swafast.backends.triton.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Weights


def differing_weights(rule: Rule, arithmetic: ModuleType) -> list[int]:
    """Give the counts at which the kernels' weight is not, to the last bit, the rule's."""
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


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_weights_equal_those_of_python(rule: Rule, tmp_path: Path) -> None:
    assert differing_weights(rule, build(tmp_path).arithmetic) == []


# The counter


@pytest.mark.parametrize("rule", [EqualAverage(), PowerAverage(), ExponentialAverage(0.99, warmup="power")], ids=str)
def test_updates_read_and_advance_the_counter(rule: Rule) -> None:
    check_rule(rule)


def check_rule(rule: Rule, kernels: ModuleType | None = None) -> None:
    """Run updates of more programs than one, by a rule whose weight follows the counter."""
    pair, counter = pair_of(4 * CHUNK, torch.float32, FLOAT32), counter_of(0)
    pair.average.zero_()
    pair.param.copy_(torch.randn(4 * CHUNK))
    launch = backend.prepare([pair])
    launch._kernels = kernels or launch._kernels
    assert launch._tables[0].head.num_chunks > 3
    terms = rule.kernel_terms()
    assert terms is not None
    for n in range(4):
        expected = expected_planes(pair, terms.weight(n), n)
        run_update(launch, [], [rule], [counter], 2 if n == 3 else 1)
        assert same_bits(pair.average.cpu(), expected[0]), f"update {n}"
    assert counter == 5
    table = launch._tables[0]
    begun = table.words[-library.MAX_PACES - 3]
    assert begun == 4 * min(table.head.num_chunks, table.head.num_blocks)  # every program of every launch


def unchanged_by(update: Callable[[backend.TritonLaunch, Tensor], None], n: int, pairs: Sequence[Pair]) -> None:
    before, counter = clone(pairs), counter_of(n)
    update(backend.prepare(pairs), counter)
    assert differing(pairs, before) == []
    assert counter == n


@pytest.mark.parametrize("n", [-1, -(2**63), INT64_MAX])
def test_no_count_leaves_everything_as_it_was(n: int) -> None:
    pairs = [pair_of(CHUNK + 1, torch.bfloat16, EXACT), pair_of(9, torch.int64, None)]
    unchanged_by(lambda launch, counter: run_update(launch, [], [EqualAverage()], [counter], 1), n, pairs)


def test_a_nonfinite_param_can_leave_everything_as_it_was() -> None:
    pairs = [pair_of(n, torch.float16, MIRRORED) for n in (CHUNK + 1, 5)]
    for pair in pairs:
        pair.param.fill_(2.0)
    pairs[1].param[3] = math.inf
    unchanged_by(lambda launch, n: run_update(launch, [], [EqualAverage()], [n], 1, skip_nonfinite=True), 3, pairs)
    pairs[1].param[3] = 2.0
    before, launch, counter = clone(pairs), backend.prepare(pairs), counter_of(3)
    run_update(launch, [], [EqualAverage()], [counter], 1, skip_nonfinite=True)
    assert differing(pairs, before) != []
    assert counter == 4


def test_a_launch_without_chunks_counts() -> None:
    counter = counter_of(4)
    run_update(backend.prepare([pair_of(0, torch.float32, FLOAT32)]), [], [EqualAverage()], [counter], 1)
    assert counter == 5


# Exchanges and what is not finite


def check_exchange(pairs: Sequence[Pair], kernels: ModuleType | None = None) -> None:
    before, launch = clone(pairs), backend.prepare(pairs)
    launch._kernels = kernels or launch._kernels
    for wanted in (False, True, True, False, False, True):
        launch.exchange(wanted)
        for pair, old in zip(pairs, before, strict=True):
            param, average = (old.average, old.param) if wanted else (old.param, old.average)
            assert torch.equal(pair.param.view(torch.int8), param.view(torch.int8)), f"{pair.name} {wanted}"
            assert torch.equal(pair.average.view(torch.int8), average.view(torch.int8)), f"{pair.name} {wanted}"
            assert all(map(same_bits, pair.planes[1:], old.planes[1:]))


@pytest.mark.parametrize(("dtype", "fmt"), [*zip(DTYPES, FORMATS[:3], strict=True), (torch.int32, None)], ids=str)
def test_an_exchange_moves_every_bit_there_and_back(dtype: torch.dtype, fmt: Format | None) -> None:
    check_exchange([pair_of(n, dtype, fmt, offset) for n in (1, 17, 2 * CHUNK + 7) for offset in (0, 3)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_nonfinite_param_is_found(dtype: torch.dtype) -> None:
    pairs = [pair_of(n, dtype, FLOAT32, offset) for n, offset in ((0, 0), (9, 1), (4 * CHUNK, 0), (3, 0))]
    pairs.append(pair_of(9, torch.int32, None))
    pairs[-1].param.fill_(-1)
    for pair in pairs[:-1]:
        pair.param.fill_(torch.finfo(dtype).max)
    launch = backend.prepare(pairs)
    assert launch.first_nonfinite([]) is None
    for index, place, value in ((3, 2, math.nan), (2, 4 * CHUNK - 1, -math.inf), (2, 101, math.inf), (1, 8, math.nan)):
        pairs[index].param[place] = value
        assert launch.first_nonfinite([]) == index
    for pair in pairs[:-1]:
        pair.param.fill_(0.0)
    assert launch.first_nonfinite([]) is None


# Whole models


@pytest.mark.skipif(DEVICE != "cpu", reason="the model trains on the CPU here")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float16, {}),
        (torch.bfloat16, {"format": "float32"}),
        (torch.bfloat16, {"format": "compact"}),
    ],
    ids=str,
)
def test_a_model_is_averaged_as_by_the_reference(dtype: torch.dtype, options: dict[str, str]) -> None:
    states = []
    for name in ("triton", "reference"):
        torch.manual_seed(3)
        average = trained(EveryKind(), dtype, backend=name, use_buffers=True, **options)
        states.append(average.state_dict())
    assert states[0].keys() == states[1].keys()
    assert [key for key in states[0] if not same_bits(states[0][key], states[1][key])] == []


@pytest.mark.skipif(DEVICE != "cpu", reason="the model trains on the CPU here")
def test_several_averages_of_a_model_are_those_of_the_reference() -> None:
    rules = {"fast": ExponentialAverage(0.5), "slow": ExponentialAverage(0.99), "mean": EqualAverage()}
    states = []
    for name in ("triton", "reference"):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.BatchNorm1d(11)).to(torch.bfloat16)
        formats = {"fast": "compact", "slow": "float32"}
        averages = FusedAverages(model, rules=rules, format=formats, use_buffers=True, backend=name)
        for _ in range(3):
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    tensor.copy_(torch.randn(tensor.shape) * 9)
            averages.update_parameters(model)
        states.append(averages.state_dict())
    assert len(states[0]) > 3 * len(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert [key for key in states[0] if not same_bits(states[0][key], states[1][key])] == []


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_launch_calls_no_op_of_torch() -> None:
    pair, counter = pair_of(100, torch.bfloat16, EXACT), counter_of(1)
    launch = backend.prepare([pair])
    with CountOps() as counted:
        run_update(launch, [], [EqualAverage()], [counter], 1, skip_nonfinite=True)
        run_update(launch, [], [PowerAverage()], [counter], 1)
        launch.exchange(True)
    assert counted.ops == []


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
    check_updates([*pairs, *special_pairs()], WEIGHTS, built.kernels)


def see_copies(built: Build) -> None:
    check_updates([pair_of(CHUNK + 3, torch.uint8, None)], (0.3,), built.kernels)


def see_counter(built: Build) -> None:
    check_rule(EqualAverage(), built.kernels)


def see_weights(built: Build) -> None:
    assert [rule for rule in RULES if differing_weights(rule, built.arithmetic)] == []


def see_exchange(built: Build) -> None:
    check_exchange([pair_of(CHUNK, torch.float32, FLOAT32)], built.kernels)


def see_bits(built: Build) -> None:
    assert differing_bits(built.random) == []


def see_indices(built: Build) -> None:
    check_updates([pair for pair in random_pairs() if pair.format is COMPACT], (0.3,), built.kernels)


def see_paces(built: Build) -> None:
    check_paces(3, (5,), built.kernels)


def see_bad_counts(built: Build) -> None:
    check_bad_count(-1, built.kernels)


FUSED = ("near = f - s * (f - series)", "near = tl.fma(-s, f - series, f)")
PLANTED = {
    "rounding half down": (
        see_updates,
        "((bits + 0x8000) >> 16).to(tl.int16), bits.to",
        "((bits + 0x7FFF) >> 16).to(tl.int16), bits.to",
    ),
    "a NaN keeps its payload": (see_updates, "tl.where(value == value, bits,", "tl.where(value == value, bits, bits +"),
    "the other branch at 0.5": (see_updates, "rounded < 0.5", "rounded <= 0.5"),
    "no copy at weight 1": (see_updates, "return tl.where(copy, param, moved)", "return moved"),
    "a stale remainder": (
        see_updates,
        "tl.where(value == value, value, high",
        "tl.where(value == value, value, value + high",
    ),
    "a stale average": (see_updates, "tl.where(first == own, average, copy.to(tl.float32))", "average"),
    "an end one element short": (
        see_updates,
        "mask = None if WIDE else start + indices < numel\n    newest = tl.load(params, mask=mask)\n    old_first",
        "mask = None if WIDE else start + indices < numel - 1\n    newest = tl.load(params, mask=mask)\n    old_first",
    ),
    "halves in each other's place": (see_updates, "near, far = tl.split", "far, near = tl.split"),
    "an end of bytes one too late": (
        see_copies,
        "move_tile(pointer_to(param, BYTES), pointer_to(average, BYTES), start, numel,",
        "move_tile(pointer_to(param, BYTES), pointer_to(average, BYTES), start + 1, numel,",
    ),
    "the first program counts": (see_counter, "% tl.num_programs(0) == 0", "% tl.num_programs(0) == 1"),
    "one launch counts": (see_counter, "begun % tl.num_programs(0) == 0", "begun == tl.num_programs(0)"),
    "an exchange too many": (see_exchange, "tl.where(word(state, 1) == wanted, 0, num_chunks)", "num_chunks"),
    "float32 constants": (
        see_weights,
        "tl.full((), BITS, tl.int64).to(tl.float64, bitcast=True)",
        "tl.full((), BITS, tl.int64).to(tl.float64, bitcast=True).to(tl.float32).to(tl.float64)",
    ),
    "another order": (
        see_weights,
        "(near + (e * literal(LN2_LOW) + lost / y))",
        "near + (e * literal(LN2_LOW) + lost / y)",
    ),
    "a fused product": (see_weights, *FUSED),
    "a fused distance": (
        see_updates,
        "distance = weight * (newest - average)\n    return tl.where(weight == whole(1), newest, average + distance)",
        "return tl.where(weight == whole(1), newest, tl.fma(newest * 0 + weight, newest - average, average))",
    ),
    "no copy in float64": (see_updates, "tl.where(weight == whole(1), newest, average", "(average"),
    "a float32 weight in float64": (
        see_updates,
        "distance = weight * (newest",
        "distance = weight.to(tl.float32).to(tl.float64) * (newest",
    ),
    "a stale compensation": (see_updates, "tl.where(both.to(tl.float32) == average, both, ", "(both + 0 * "),
    "what an infinity leaves over": (
        see_updates,
        "left_over = tl.where(average - average == 0.0, left_over, 0.0)",
        "pass",
    ),
    "a remainder without its sign": (see_updates, "second.to(tl.int32) << 8", "(second.to(tl.int32) & 0xFF) << 8"),
    "an infinity by rounding": (
        see_updates,
        "tl.where((rounded & 0x7F800000) == 0x7F800000, bits, rounded)",
        "rounded",
    ),
    "one bit of 8 not drawn": (see_updates, ">> (32 - CUT_BITS)", ">> (33 - CUT_BITS)"),
    "an arithmetic shift": (see_bits, "x = index ^ first", "x = (index ^ first).to(tl.int32, bitcast=True)"),
    "an arithmetic shift of 64 bits": (
        see_bits,
        "(x ^ (x >> 30))",
        "(x ^ (x.to(tl.int64, bitcast=True) >> 30).to(tl.uint64, bitcast=True))",
    ),
    "a count in 32 bits": (
        see_bits,
        "n = num_averaged.to(tl.uint64)",
        "n = num_averaged.to(tl.uint32).to(tl.uint64)",
    ),
    "a turn that is not reversed": (see_bits, "((n & 1) << 31) | ((n & 2) << 29)", "((n & 1) << 28) | ((n & 2) << 29)"),
    "what is left over rounded": (
        see_updates,
        "left_over = cut_to_float(value - average.to(tl.float64))",
        "left_over = (value - average.to(tl.float64))",
    ),
    "one half of a draw": (see_bits, "x = x ^ second", "x = x ^ first"),
    "indices of one chunk alone": (see_indices, "index = first_index + ", "index = "),
    "indices of one tile alone": (see_indices, "(start.to(tl.uint32) + indices", "(start.to(tl.uint32) * 0 + indices"),
    "a step of one": (see_indices, "indices.to(tl.uint32)) * index_step", "indices.to(tl.uint32))"),
    "one draw for all indices": (
        see_indices,
        "draw_of(word(row, 5), num_averaged, first_index)",
        "draw_of(word(row, 5), num_averaged, 0 * first_index)",
    ),
    "one draw for all params": (see_indices, "draw_of(word(row, 5), ", "draw_of(0 * word(row, 5), "),
    "one pace for all averages": (see_paces, "weights, low_of(word(row, 6)))", "weights, 0 * low_of(word(row, 6)))"),
    "another pace's count": (see_paces, "return value_at(counts, index), ", "return value_at(counts, index * 0), "),
    "one follower alone": (
        see_paces,
        "row_of(row, word(row, 6) >> 32)",
        "row_of(row, tl.minimum(word(row, 6) >> 32, 1))",
    ),
    "one counter counts": (see_paces, "used = indices < num_paces", "used = (indices < num_paces) & (indices < 1)"),
    "a bad count goes unseen": (see_bad_counts, "(counts < 0) | ", ""),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_seen(bug: str, tmp_path: Path) -> None:
    check, old, new = PLANTED[bug]
    if bug.startswith("a fused") and not HAS_FMA:
        pytest.skip("this Triton's interpreter has no fused multiply-add to plant")
    built = build(tmp_path, (old, new))
    with pytest.raises(AssertionError):
        check(built)


@pytest.mark.parametrize(
    "check",
    [see_updates, see_copies, see_counter, see_weights, see_exchange, see_bits, see_indices, see_paces, see_bad_counts],
)
def test_nothing_is_seen_where_nothing_is_planted(check: Callable[[Build], None], tmp_path: Path) -> None:
    check(build(tmp_path))


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
