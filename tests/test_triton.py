"""The Triton kernels' source with bugs in it, its weights and random bits, and the backend by itself.

Without a GPU Triton's interpreter runs them (``TRITON_INTERPRET``, which ``tests/conftest.py`` sets); with one they are
compiled and run there. ``tests/test_backends.py`` holds their bits to the reference, and ``tests/test_triton_code.py``
looks at the machine code.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import itertools
import math
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from swafast.backends import gpu
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
    Prepare,
    by_weights,
    check_bad_count,
    check_exchange,
    check_paces,
    check_updates,
    clone,
    make_pair,
    meet_at_each_line,
)
from tests.planting import Plant, read_plants
from tests.spreads import (
    Drawing,
    check_draws,
    drawing_of_each_path,
    drawing_of_places,
    pairs_of_each_path,
    spread_averages_of,
)
from tests.triton_source import import_kernels, patch_language_once, read_kernels

triton = pytest.importorskip("triton", reason="needs Triton")
from swafast.backends.triton.arithmetic import HAS_FMA  # noqa: E402

DEVICE = "cpu" if backend.is_interpreted() else "cuda"
#: Copy, either branch of torch.lerp, where they meet, and standstill.
WEIGHTS = by_weights(1.0, 0.3, 0.5, 0.9, 0.0)
#: A wide tile and an end in each chunk.
CHUNK = 5000


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "GPU_CHUNK_NUMELS", (CHUNK, CHUNK))


@pytest.fixture(autouse=True)
def language_patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        patch_language_once(monkeypatch)


def pair_of(numel: int, dtype: torch.dtype, fmt: Format, first_row: int = 0) -> Pair:
    """Return a pair whose random bits are those of the middle column of three, from ``first_row`` on."""
    box = Box((first_row, 1), (numel, 1), 0, (0, 1))
    draws = Draws(0x9E3779B97F4A7C15 ^ (numel << 40), (first_row + numel, 3), (box,))
    return replace(make_pair(numel, dtype, fmt), draws=draws if fmt.num_random_bits else None)


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
    return Pair(name, param, planes, fmt, draws if fmt.num_random_bits else None)


# Random bits


def differing_bits(random: ModuleType) -> list[tuple[int, int, int]]:
    """Return (key, count, index) of each draw that differs in a bit from Python's."""
    keys, counts = (1, 2**63, 2**64 - 1, 0x0123456789ABCDEF), (0, 1, 10, 2**31, 2**36 - 1, 2**53 + 1, INT64_MAX - 1)
    far = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 3 * 2**32 - 1, 2**40 + 2**31, 2**62 + 7]
    indices = torch.tensor([*far, *range(1000, 1022)])
    cases = list(itertools.product(keys, counts, indices.tolist()))
    expected = torch.cat([random_bits(key, n, indices) for key, n in itertools.product(keys, counts)]).tolist()
    got = torch.empty(1024, dtype=torch.int64, device=DEVICE)
    arguments = [torch.tensor([signed(case[i]) for case in cases] + [0] * (1024 - len(cases))) for i in range(3)]
    on = [argument.to(DEVICE) for argument in arguments]
    with backend._on_device(got.device):
        addresses = [tensor.data_ptr() for tensor in (*on, got)]
        random.bits_kernel[(1,)](*addresses, NUMEL=1024, **backend.launch_options("cuda"))
    return [case for case, bits, wanted in zip(cases, got.tolist(), expected, strict=False) if bits != wanted]


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def random_pairs() -> list[Pair]:
    """Return pairs whose chunks begin below, at and above an index where its upper half changes."""
    rows = (0, 2**32 // 3 - CHUNK - 1, 2**32 // 3, 5 * 2**32 + 12345)
    return [pair_of(2 * CHUNK + 3, torch.bfloat16, fmt, first_row=row) for row in rows for fmt in (COMPACT, HALF)]


def test_a_chunk_is_cut_where_the_upper_half_of_the_index_changes() -> None:
    pairs = random_pairs()
    assert backend.prepare(clone(pairs, DEVICE))._tables[0].head.num_chunks > 3 * len(pairs)


# Several averages of each param


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
    written = Written(backend._Paces(torch.device(DEVICE)))
    counter, other = (torch.tensor(0, device=DEVICE) for _ in range(2))
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


def test_paces_are_kept_for_each_stream_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator knows of the stream that a pace's words were made on, and of others only what it is told."""
    current, told = 1, []
    monkeypatch.setattr(torch, "empty", lambda size, **options: torch.zeros(size, dtype=options["dtype"]))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(Tensor, "record_stream", lambda words, stream: told.append((words.data_ptr(), stream)))
    counter, paces = torch.tensor(0), backend._Paces(torch.device("cuda"))
    made = [make_paces([KernelTerms.constant(0.5)], [counter]) for _ in range(2)]
    kept, expected = [], []
    for current, which, capturing in ((1, 0, False), (2, 0, False), (1, 0, False), (3, 0, True), (2, 1, False)):
        kept.append(paces.get(made[which], capturing, current, lambda *_: None))
        if current != 1 and which == 0:
            expected.append((kept[-1].data_ptr(), current))
    assert len({words.data_ptr() for words in kept}) == 2
    assert told == expected  # and not the second paces, which were made where they are used
    assert [words.data_ptr() for words in paces._captured] == [kept[0].data_ptr()]


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
    first, second, turn = draw_of(key, n, index)
    drawn = bits_of_draw(first, second, turn, index.to(tl.uint32))
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


def see_updates(prepare: Prepare) -> None:
    pairs = [pair_of(n, dtype, fmt) for n in (17, CHUNK) for dtype in DTYPES[:2] for fmt in (FLOAT32, EXACT)]
    check_updates(prepare, [*pairs, *special_pairs()], WEIGHTS, (1,), DEVICE)


def see_copies(prepare: Prepare) -> None:
    check_updates(prepare, [make_pair(CHUNK + 3, torch.uint8, None)], WEIGHTS[:1], (1,), DEVICE)


def see_counter(prepare: Prepare) -> None:
    """Run updates of more programs than one, by a rule whose weight follows the counter."""
    check_updates(prepare, [pair_of(4 * CHUNK, torch.float32, FLOAT32)], [EqualAverage()], range(4), DEVICE)


def see_exchange(prepare: Prepare) -> None:
    pairs = clone([pair_of(CHUNK, torch.float32, FLOAT32)], DEVICE)
    check_exchange(prepare(pairs), pairs)


def see_indices(prepare: Prepare) -> None:
    check_updates(prepare, random_pairs(), by_weights(0.3), (1,), DEVICE)


def see_spreads(prepare: Prepare) -> None:
    """Move spreads of two chunks: the paths of float32 and `exact` in wide tiles, and all others in an end."""
    pairs = [*pairs_of_each_path(4096 + 17, 2), *pairs_of_each_path(17)]
    check_updates(prepare, pairs, by_weights(0.3, 1.0), (7,), DEVICE)


def see_rings(prepare: Prepare) -> None:
    check_updates(prepare, pairs_of_each_path(17, 1), by_weights(0.3), (2**20 + 2**16, 2**33 + 5), DEVICE)


def see_draws(prepare: Prepare) -> None:
    check_draws(prepare, drawing_of_each_path(2048 + 17, 2), DEVICE)


def see_places(prepare: Prepare) -> None:
    drawing = drawing_of_places()
    last = slice(2, None)  # the sample without columns
    check_draws(prepare, Drawing(drawing.pairs, drawing.samples[last], drawing.expected[last]), DEVICE)


def see_weights(built: Build) -> None:
    assert [rule for rule in RULES if differing_weights(rule, built["arithmetic"])] == [], "weights are wrong"


def see_bits(built: Build) -> None:
    assert differing_bits(built["random"]) == [], "random bits are wrong"


#: Of launches, and of parts of the source.
CHECKS: dict[str, Callable[[Prepare], None]] = {
    "updates": see_updates,
    "copies": see_copies,
    "counter": see_counter,
    "exchange": see_exchange,
    "indices": see_indices,
    "spreads": see_spreads,
    "rings": see_rings,
    "draws": see_draws,
    "places": see_places,
    "spreads of several": lambda prepare: check_paces(prepare, 2, (5,), DEVICE, spread_averages_of),
    "paces": lambda prepare: check_paces(prepare, 3, (5,), DEVICE),
    "bad counts": lambda prepare: check_bad_count(prepare, 3, 1, -1, DEVICE),
}
CHECKS_OF_PARTS: dict[str, Callable[[Build], None]] = {"weights": see_weights, "bits": see_bits}


def run_check(check: str, built: Build) -> None:
    def prepare(pairs: Sequence[Pair]) -> backend.TritonLaunch:
        assert all(map(backend.serves, pairs))
        launch = backend.prepare(pairs)
        launch._kernels = built["kernels"]
        return launch

    if check in CHECKS_OF_PARTS:
        CHECKS_OF_PARTS[check](built)
    else:
        CHECKS[check](prepare)


BUGS = read_plants("triton")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_seen(bug: Plant, tmp_path: Path) -> None:
    if bug.name.startswith("a fused") and not HAS_FMA:
        pytest.skip("this Triton's interpreter has no fused multiply-add to plant")
    built = build(tmp_path, bug)
    with pytest.raises(AssertionError) as seen:
        run_check(bug.option, built)
    assert bug.expected in str(seen.value)


@pytest.mark.parametrize("check", [*CHECKS, *CHECKS_OF_PARTS])
def test_nothing_is_seen_where_nothing_is_planted(check: str, tmp_path: Path) -> None:
    run_check(check, build(tmp_path))


def test_a_triton_that_cannot_compile_warns_once_and_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> ModuleType:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(backend, "_kernels", fail)
    backend._load_kernels.cache_clear()
    device = torch.device("cuda", 0)
    with pytest.warns(RuntimeWarning, match="Triton kernels do not run on cuda:0: RuntimeError: Failed to find C"):
        assert not backend._is_usable(device)
    monkeypatch.undo()
    assert not backend._is_usable(device)  # it is not tried again
    backend._load_kernels.cache_clear()


@pytest.mark.parametrize("why", ["CUDA out of memory", "operation not permitted when stream is capturing"])
def test_a_failure_that_may_pass_is_tried_again(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def fail(device: torch.device) -> None:
        assert allowed == [True], "another thread may be capturing"
        tries.append(1)
        raise RuntimeError(why)

    @contextmanager
    def allowed_to_wait() -> Iterator[None]:
        allowed.append(True)
        try:
            yield
        finally:
            allowed.pop()

    allowed: list[bool] = []
    monkeypatch.setattr(backend, "allowed_to_wait", allowed_to_wait)
    monkeypatch.setattr(backend, "_kernels", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, device, **__: fail(device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    backend._load_kernels.cache_clear()
    gpu.warn_unusable.cache_clear()
    device = torch.device("cuda", 0)
    with pytest.warns(RuntimeWarning, match=f"Triton kernels do not run on cuda:0: RuntimeError: {why}") as seen:
        assert [backend._is_usable(device) for _ in range(3)] == [False] * 3
    assert len(seen) == 1
    assert len(tries) == 3


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
