"""The Triton kernels against the definition: ``torch.lerp`` between ``decode`` and ``encode``, bit for bit.

Without a GPU Triton's interpreter runs them (``TRITON_INTERPRET``, which ``tests/conftest.py`` sets); with one they are
compiled and run there. ``tests/test_triton_code.py`` looks at the machine code.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swafast import bucket, choice
from swafast.backends import Pair
from swafast.backends import triton as backend
from swafast.formats import EXACT, FLOAT32, MIRRORED, Format
from swafast.rules import EqualAverage, ExponentialAverage, PowerAverage, Rule
from tests.conftest import EveryKind, trained
from tests.test_native import DTYPES, FORMATS, PAIRS, clone, differing, make_pair, same_bits, sizes_around

triton = pytest.importorskip("triton", reason="needs Triton")
from swafast.backends import triton_arithmetic, triton_kernels  # noqa: E402  # after the look for Triton

DEVICE = "cpu" if backend.is_interpreted() else "cuda"
#: Copy, either branch of torch.lerp, where they meet, and standstill.
WEIGHTS = (1.0, 0.3, 0.5, 0.9, 0.0)
#: A wide tile and an end in each chunk.
CHUNK = 5000
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
    monkeypatch.setattr(bucket, "GPU_CHUNK_NUMELS", (CHUNK, CHUNK))


def on_device(tensor: Tensor) -> Tensor:
    """Give the same elements on the device, as far from a 16-byte boundary."""
    if DEVICE == "cpu":
        return tensor
    memory = torch.empty(tensor.storage_offset() + tensor.numel(), dtype=tensor.dtype, device=DEVICE)
    return memory[tensor.storage_offset() :].copy_(tensor)


def pair_of(numel: int, dtype: torch.dtype, fmt: Format | None, offset: int = 0) -> Pair:
    pair = make_pair(numel, dtype, fmt, offset)
    return Pair(pair.name, on_device(pair.param), tuple(map(on_device, pair.planes)), fmt)


def counter_of(n: int) -> Tensor:
    return torch.tensor(n, device=DEVICE)


def expected_planes(pair: Pair, weight: float) -> tuple[Tensor, ...]:
    """Work out what an update by ``weight`` has to leave in the planes, on the CPU."""
    param, planes = pair.param.cpu(), tuple(plane.cpu() for plane in pair.planes)
    if pair.format is None:
        return (param,)
    rounded = torch.tensor(weight, dtype=torch.float32).item()
    newest = param.float()
    return pair.format.encode(newest if rounded == 1.0 else torch.lerp(pair.format.decode(planes), newest, rounded))


def check_updates(pairs: Sequence[Pair], weights: Sequence[float], kernels: ModuleType | None = None) -> None:
    """Hold updates to the definition: by each weight from the same averages."""
    assert all(map(backend.serves, pairs))
    initial = clone(pairs)
    launch = backend.prepare(pairs)
    launch._kernels = kernels or launch._kernels
    counter = counter_of(7)
    for weight in weights:
        for pair, start in zip(pairs, initial, strict=True):
            for plane, value in zip(pair.planes, start.planes, strict=True):
                plane.copy_(value)
        launch.update([], ExponentialAverage(1.0 - weight), counter, 1)
        expected = [
            Pair(start.name, start.param.cpu(), expected_planes(start, weight), start.format) for start in initial
        ]
        got = [Pair(pair.name, pair.param.cpu(), tuple(p.cpu() for p in pair.planes), pair.format) for pair in pairs]
        assert differing(got, expected) == [], f"weight {weight}"
    assert counter == 7 + len(weights)


@PAIRS
def test_updates_equal_the_definition(dtype: torch.dtype, fmt: Format) -> None:
    aligned = [pair_of(n, dtype, fmt) for n in sizes_around(CHUNK)]
    shifted = [pair_of(n, dtype, fmt, offset) for n, offset in ((1, 1), (17, 6), (CHUNK + 1, 1), (4096, 4))]
    check_updates([*aligned, *shifted], WEIGHTS[:2] if dtype == torch.float16 else WEIGHTS)


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
        Pair(f"{dtype} {fmt}", on_device(params.to(dtype)), tuple(map(on_device, fmt.encode(averages.clone()))), fmt)
        for dtype in DTYPES
        for fmt in FORMATS
    ]
    # Somebody has written into the module's own parameter: the other plane is stale.
    highs = torch.tensor([0, 0x8000, 0x7F80, 0xFF80, 1, 0x7F7F, 0x3F80, 0x7FC0]).to(torch.int16)
    lows = torch.tensor([0, 1, -1, 2**15 - 1, -(2**15), 77, -77, 256]).to(torch.int16)
    planes = (highs.repeat_interleave(8).view(torch.bfloat16), lows.repeat(8))
    pairs.append(Pair("stale", on_device(torch.linspace(-2, 2, 64)), tuple(map(on_device, planes)), EXACT))
    return [*pairs, Pair("stale copy", on_device(params), (on_device(params.half()), on_device(averages)), MIRRORED)]


def test_special_values_equal_the_definition() -> None:
    check_updates(special_pairs(), WEIGHTS)


# The kernels' source, with or without a bug

WEIGHTS_KERNEL = """

@triton.jit
def weights_kernel(
    counts: tl.int64, weights: tl.int64, kind: tl.int64,
    term0: tl.int64, term1: tl.int64, term2: tl.int64, term3: tl.int64, NUMEL: tl.constexpr,
):
    places = tl.arange(0, NUMEL)
    n = tl.load(counts.to(tl.pointer_type(tl.int64)) + places)
    weight = rule_weight(kind, term0, term1, term2, term3, n)
    tl.store(weights.to(tl.pointer_type(tl.float64)) + places, weight)
"""


@dataclass
class Build:
    """The modules of the kernels, made anew from their source."""

    arithmetic: ModuleType  # with weights_kernel beside the rest
    kernels: ModuleType


def build(folder: Path, *edits: tuple[str, str]) -> Build:
    """Import the kernels' source with each (old, new) of ``edits`` put in; ``old`` must stand there once."""
    sources = {
        "triton_arithmetic": Path(triton_arithmetic.__file__).read_text() + WEIGHTS_KERNEL,
        "triton_kernels": Path(triton_kernels.__file__).read_text(),
    }
    for old, new in edits:
        assert [source.count(old) for source in sources.values()] in ([0, 1], [1, 0]), f"not once: {old!r}"
        sources = {name: source.replace(old, new) for name, source in sources.items()}
    suffix = f"_{folder.name}"
    sources["triton_kernels"] = sources["triton_kernels"].replace("triton_arithmetic", f"triton_arithmetic{suffix}")
    return Build(*(load(folder / f"{name}{suffix}.py", source) for name, source in sources.items()))


def load(path: Path, source: str) -> ModuleType:
    """Import ``source`` as a module of ``swafast.backends``; Triton reads the file again."""
    path.write_text(source)
    name = f"swafast.backends.{path.stem}"
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
    arguments = (table.data_ptr(), weights.data_ptr(), *backend.rule_words(terms))
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
    assert launch._tables[0].num_chunks > 3
    terms = rule.kernel_terms()
    assert terms is not None
    for n in range(4):
        expected = expected_planes(pair, terms.weight(n))
        launch.update([], rule, counter, 2 if n == 3 else 1)
        assert same_bits(pair.average.cpu(), expected[0]), f"update {n}"
    assert counter == 5
    table = launch._tables[0]
    assert table.words[-4] == 4 * min(table.num_chunks, table.num_blocks)  # every program of every launch


def unchanged_by(update: Callable[[backend.TritonLaunch, Tensor], None], n: int, pairs: Sequence[Pair]) -> None:
    before, counter = clone(pairs), counter_of(n)
    update(backend.prepare(pairs), counter)
    assert differing(pairs, before) == []
    assert counter == n


@pytest.mark.parametrize("n", [-1, -(2**63), INT64_MAX])
def test_no_count_leaves_everything_as_it_was(n: int) -> None:
    pairs = [pair_of(CHUNK + 1, torch.bfloat16, EXACT), pair_of(9, torch.int64, None)]
    unchanged_by(lambda launch, counter: launch.update([], EqualAverage(), counter, 1), n, pairs)


def test_a_nonfinite_param_can_leave_everything_as_it_was() -> None:
    pairs = [pair_of(n, torch.float16, MIRRORED) for n in (CHUNK + 1, 5)]
    for pair in pairs:
        pair.param.fill_(2.0)
    pairs[1].param[3] = math.inf
    unchanged_by(lambda launch, n: launch.update([], EqualAverage(), n, 1, skip_nonfinite=True), 3, pairs)
    pairs[1].param[3] = 2.0
    before, launch, counter = clone(pairs), backend.prepare(pairs), counter_of(3)
    launch.update([], EqualAverage(), counter, 1, skip_nonfinite=True)
    assert differing(pairs, before) != []
    assert counter == 4


def test_a_launch_without_chunks_counts() -> None:
    counter = counter_of(4)
    backend.prepare([pair_of(0, torch.float32, FLOAT32)]).update([], EqualAverage(), counter, 1)
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


@pytest.mark.parametrize(("dtype", "fmt"), [*zip(DTYPES, FORMATS, strict=True), (torch.int32, None)], ids=str)
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
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.float16, {}), (torch.bfloat16, {"format": "float32"})],
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
        launch.update([], EqualAverage(), counter, 1, skip_nonfinite=True)
        launch.update([], PowerAverage(), counter, 1)
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
    monkeypatch.setitem(sys.modules, "swafast.backends.triton_kernels", None)
    monkeypatch.delattr("swafast.backends.triton_kernels")
    why = load_anew()
    assert "did not load: " in why.reason
    assert not why.expected


# Planted bugs


def see_updates(built: Build) -> None:
    pairs = [pair_of(n, dtype, fmt) for n in (17, CHUNK) for dtype in DTYPES for fmt in (FLOAT32, EXACT)]
    check_updates([*pairs, *special_pairs()], WEIGHTS, built.kernels)


def see_copies(built: Build) -> None:
    check_updates([pair_of(CHUNK + 3, torch.uint8, None)], (0.3,), built.kernels)


def see_counter(built: Build) -> None:
    check_rule(EqualAverage(), built.kernels)


def see_weights(built: Build) -> None:
    assert [rule for rule in RULES if differing_weights(rule, built.arithmetic)] == []


def see_exchange(built: Build) -> None:
    check_exchange([pair_of(CHUNK, torch.float32, FLOAT32)], built.kernels)


FUSED = ("near = f - s * (f - series)", "near = tl.fma(-s, f - series, f)")
PLANTED = {
    "rounding half down": (see_updates, "(bits + 0x8000)", "(bits + 0x7FFF)"),
    "a NaN keeps its payload": (see_updates, "tl.where(value == value, bits,", "tl.where(value == value, bits, bits +"),
    "the other branch at 0.5": (see_updates, "rounded < 0.5", "rounded <= 0.5"),
    "no copy at weight 1": (see_updates, "return tl.where(copy, param, moved)", "return moved"),
    "a stale remainder": (
        see_updates,
        "tl.where(joined == joined, joined, ",
        "tl.where(joined == joined, joined, joined + ",
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
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_seen(bug: str, tmp_path: Path) -> None:
    check, old, new = PLANTED[bug]
    if bug == "a fused product" and not triton_arithmetic.HAS_FMA:
        pytest.skip("this Triton's interpreter has no fused multiply-add to plant")
    built = build(tmp_path, (old, new))
    with pytest.raises(AssertionError):
        check(built)


@pytest.mark.parametrize("check", [see_updates, see_copies, see_counter, see_weights, see_exchange])
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
