"""What the tests of the backends share: pairs of any bits, rules, and how launches are run and compared."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swafast.backends import reference
from swafast.backends.contract import Launch, Pair, Update
from swafast.op.launches import draws_of
from swafast.terms.formats import COMPACT, COMPENSATED, EXACT, FLOAT32, HALF, MIRRORED, Format
from swafast.terms.grids import Grid, use_grid
from swafast.terms.rules import EqualAverage, ExponentialAverage, FixedWeight, PowerAverage, Rule, terms_of
from tests.support import same_bits as same_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (FLOAT32, EXACT, MIRRORED, COMPACT, COMPENSATED, HALF)
#: Params that can change places with an average's first plane.
EXCHANGED = [(dtype, fmt) for dtype in DTYPES for fmt in FORMATS if fmt.dtype == dtype]
PAIRS = pytest.mark.parametrize(("dtype", "fmt"), [(d, f) for d in DTYPES for f in FORMATS], ids=str)
INT64_MAX = 2**63 - 1
#: A kind of rule each, then their edges.
RULES: list[Rule] = [
    EqualAverage(),
    ExponentialAverage(0.999),
    ExponentialAverage(0.99999, warmup="power", inv_gamma=37.0, power=0.75, min_decay=0.1),
    ExponentialAverage(0.9999, warmup="ratio", min_decay=0.2),
    PowerAverage(6.94),
    ExponentialAverage(0.9999, warmup="ramp", tau=2000.0, min_decay=0.2),
    ExponentialAverage(0.996, schedule="cosine", updates=3900),
    ExponentialAverage(0.996, schedule="linear", updates=3900),
    ExponentialAverage(0.9999, warmup="power"),
    ExponentialAverage(1.0, warmup="power", inv_gamma=1e-320),
    ExponentialAverage(0.999, warmup="ratio"),
    ExponentialAverage(1.0, warmup="ramp", tau=1e-320),
    ExponentialAverage(0.5, schedule="cosine", updates=1e-320),
    ExponentialAverage(0.0, schedule="cosine", updates=1e300),
    ExponentialAverage(1.0),
    ExponentialAverage(0.0),
    PowerAverage(0.0),
    PowerAverage(16.97),
]


def any_floats(numel: int) -> Tensor:
    """Return float32 values of which half are near 1, where a lerp rounds, and half are any bits at all."""
    bits = torch.randint(-(2**31), 2**31, (numel,)).to(torch.int32).view(torch.float32)
    return torch.where(torch.rand(numel) < 0.5, bits, torch.randn(numel))


def any_values(numel: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        return any_floats(numel)
    bits = torch.randint(-(2**15), 2**15, (numel,)).to(torch.int16).view(dtype)
    return torch.where(torch.rand(numel) < 0.5, bits, torch.randn(numel).to(dtype))


def any_planes(numel: int, fmt: Format) -> tuple[Tensor, ...]:
    """Return planes of which a quarter hold in ``planes[0]`` what somebody else wrote there."""
    value = any_floats(numel)
    if fmt.value_dtype == torch.float64:
        value = value.double() * (1.0 + 2.0**-26 * torch.rand(numel, dtype=torch.float64))
    planes = fmt.encode(value)
    if fmt.extra and numel:
        planes[0].copy_(torch.where(torch.rand(numel) < 0.25, any_values(numel, planes[0].dtype), planes[0]))
    return planes


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """Return a copy that starts ``offset`` elements into its storage."""
    return torch.empty(offset + tensor.numel(), dtype=tensor.dtype)[offset:].copy_(tensor)


def make_pair(numel: int, dtype: torch.dtype, fmt: Format | None, offset: int = 0) -> Pair:
    if fmt is None:
        param, average = (torch.randint(-128, 128, (numel,)).to(dtype) for _ in range(2))
        return Pair(f"copied {numel}", at_offset(param, offset), (at_offset(average, offset // 2),), None)
    planes = any_planes(numel, fmt)
    shifted = tuple(at_offset(plane, (offset * factor) % 8) for plane, factor in zip(planes, (3, 5), strict=False))
    name, param = f"{numel} elements", at_offset(any_values(numel, dtype), offset)
    return Pair(name, param, shifted, fmt, draws_of(0, name, param, fmt))


def sizes_around(chunk_numel: int) -> list[int]:
    return [0, 1, 7, 8, 15, 16, 17, 31, 33, chunk_numel - 1, chunk_numel, chunk_numel + 1, 3 * chunk_numel + 7]


# Several averages of each param


def averages_of(num_paces: int, sizes: Sequence[int]) -> list[Pair]:
    """Return pairs of each param with averages of mixed formats.

    They come as models hand them in, one average of all params at a time, and so a param's averages stand apart.
    """
    params = [
        make_pair(size, dtype, FLOAT32 if dtype.is_floating_point else None, 1).param
        for size in sizes
        for dtype in (*DTYPES, torch.int32)
    ]
    pairs = []
    for pace in range(num_paces):
        for index, param in enumerate(params):
            fmt = FORMATS[(pace + index) % len(FORMATS)] if param.is_floating_point() else None
            pair, name = make_pair(len(param), param.dtype, fmt, pace % 3), f"param {index}"
            pairs.append(replace(pair, name=name, param=param, draws=draws_of(0, name, param, fmt), pace=pace))
    return pairs


def paces_of(num_paces: int) -> tuple[list[Rule], list[int]]:
    """Return rules and counts, each unlike the others."""
    rules = [RULES[k % len(RULES)] for k in range(num_paces)]
    return rules, [(0, 1, 7, 10**6, 2**40)[k % 5] + k for k in range(num_paces)]


# Running and comparing


def update(
    launch: Launch,
    pairs: Sequence[Pair],
    rules: Sequence[Rule],
    counters: Sequence[Tensor],
    advance: int = 1,
    **more: Any,
) -> None:
    """Update by a launch of these pairs, by rules that have kernel terms. Other options are those of `Update`."""
    terms = tuple(terms_of(rule) for rule in rules)
    assert None not in terms
    launch.update([pair.param for pair in pairs], Update(terms, tuple(counters), advance, **more))  # type: ignore[arg-type]


def clone(pairs: Sequence[Pair], device: torch.device | str | None = None) -> list[Pair]:
    """Return copies on the device, or where the pairs are, aligned as before. One param stays one param."""
    params = {id(pair.param): _copy(pair.param, device) for pair in pairs}
    return [
        replace(pair, param=params[id(pair.param)], planes=tuple(_copy(plane, device) for plane in pair.planes))
        for pair in pairs
    ]


def _copy(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    start = tensor.storage_offset()
    flat = torch.empty(start + tensor.numel(), dtype=tensor.dtype, device=device or tensor.device)
    return flat[start:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def differing(a: Sequence[Pair], b: Sequence[Pair]) -> list[str]:
    """Return the names of the pairs that differ in a bit; all NaNs are alike."""
    return [
        f"{x.name}, {x.format}, pace {x.pace}"
        for x, y in zip(a, b, strict=True)
        if not all(map(same_bits, (x.param, *x.planes), (y.param, *y.planes)))
    ]


def require_same_pairs(a: Sequence[Pair], b: Sequence[Pair], about: str) -> None:
    found = differing(a, b)
    assert not found, f"{about}: {found}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.cpu(), b.cpu()
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.contiguous().view(integer) == b.contiguous().view(integer)
    return bool((same | (a.isnan() & b.isnan())).all())


# Checks. ``prepare`` is a backend's, whose launches are held to those of ``reference`` on the CPU.

Prepare = Callable[[Sequence[Pair]], Any]


def by_weights(*weights: float) -> list[Rule]:
    return [FixedWeight(weight) for weight in weights]


def check_updates(
    prepare: Prepare,
    pairs: Sequence[Pair],
    rules: Sequence[Rule],
    counts: Sequence[int] = (1,),
    device: torch.device | str = "cpu",
) -> None:
    """Hold updates by each rule and from each count, always of the same averages, to the reference."""
    ours, expected = clone(pairs, device), clone(pairs)
    launches = prepare(ours), reference.prepare(expected)
    counters = torch.tensor(0, device=device), torch.tensor(0)
    for rule, n in itertools.product(rules, counts):
        for launch, on, counter in zip(launches, (ours, expected), counters, strict=True):
            counter.fill_(n)
            for pair, start in zip(on, pairs, strict=True):
                for plane, value in zip(pair.planes, start.planes, strict=True):
                    plane.copy_(value)
            update(launch, on, [rule], [counter])
        require_same_pairs(ours, expected, f"{rule}, n = {n}")
        assert list(map(int, counters)) == [n + 1] * 2, "the counter is wrong"


def check_paces(
    prepare: Prepare,
    num_paces: int,
    sizes: Sequence[int],
    device: torch.device | str = "cpu",
    averages: Callable[[int, Sequence[int]], list[Pair]] = averages_of,
) -> None:
    """Hold updates of several averages of each param, from counts and by rules of their own, to the reference."""
    pairs, (rules, counts) = averages(num_paces, sizes), paces_of(num_paces)
    ours, expected = clone(pairs, device), clone(pairs)
    launches = prepare(ours), reference.prepare(expected)
    counters = [[torch.tensor(n, device=place) for n in counts] for place in (device, "cpu")]
    for advance in (1, 2):
        for launch, on, counted in zip(launches, (ours, expected), counters, strict=True):
            update(launch, on, rules, counted, advance)
        counts = [n + advance for n in counts]
        require_same_pairs(ours, expected, "an update of several averages is wrong")
        assert [list(map(int, counted)) for counted in counters] == [counts] * 2, "the counters are wrong"
        rules = [*rules[1:], PowerAverage(16.97)]


def check_bad_count(
    prepare: Prepare,
    num_paces: int,
    at: int,
    count: int,
    device: torch.device | str = "cpu",
    refusal: AbstractContextManager[object] = nullcontext(),  # noqa: B008
) -> None:
    """Check that an update changes nothing if the count of one pace is none; with a count it is one again."""
    pairs = clone(averages_of(num_paces, (9,)), device)
    counts = list(range(4, 4 + num_paces))
    counts[at] = count
    before, counters = clone(pairs), [torch.tensor(n, device=device) for n in counts]
    launch = prepare(pairs)
    with refusal:
        update(launch, pairs, [EqualAverage()] * num_paces, counters)
    require_same_pairs(pairs, before, "an update after a bad count changed something")
    assert list(map(int, counters)) == counts
    counters[at].fill_(0)
    update(launch, pairs, [EqualAverage()] * num_paces, counters)
    assert list(map(int, counters)) == [1 if n == count else n + 1 for n in counts]
    assert differing(pairs, before) != []


def check_exchange(launch: Any, pairs: Sequence[Pair]) -> None:
    """Hold exchanges, asked for once or again, to what they say: every bit of params and first planes there or back."""
    before = clone(pairs)
    for wanted in (False, True, True, False, False, True):
        launch.exchange(wanted)
        for pair, old in zip(pairs, before, strict=True):
            there = (old.average, old.param) if wanted else (old.param, old.average)
            assert all(map(same_bytes, (pair.param, pair.average), there)), f"{pair.name}, {wanted}"
            assert all(map(same_bytes, pair.planes[1:], old.planes[1:])), f"{pair.name}, {wanted}"


#: Elements that take each wide loop of a GPU's kernels twice and more, and leave a long tail: their tiles have up to
#: 4096 elements, or 16384 bytes where the elements do not matter.
LONG_NUMEL = 2 * 16384 + 3000


def check_long_runs(prepare: Prepare, device: torch.device | str = "cpu") -> None:
    """Hold updates, copies, exchanges and searches of long params to the reference, a chunk each.

    A search is for a value in the first tile, there in the last warp and beyond, in the second tile, and in the tail.
    """
    # Copied tensors are cut by their bytes.
    with use_grid(Grid(chunk_numel=4 * LONG_NUMEL)):
        _check_long_runs(prepare, device)


def _check_long_runs(prepare: Prepare, device: torch.device | str) -> None:
    whole = [make_pair(LONG_NUMEL, dtype, fmt) for dtype in DTYPES for fmt in FORMATS]
    copies = [make_pair(LONG_NUMEL, dtype, None) for dtype in (torch.uint8, torch.int32)]
    check_updates(prepare, [*whole, *copies], by_weights(0.3), (1,), device)
    exchanged = clone([make_pair(LONG_NUMEL, dtype, fmt) for dtype, fmt in EXCHANGED] + copies, device)
    check_exchange(prepare(exchanged), exchanged)
    searched = clone([make_pair(LONG_NUMEL, dtype, FLOAT32) for dtype in DTYPES], device)
    for pair in searched:
        pair.param.normal_()
    launch, params = prepare(searched), [pair.param for pair in searched]
    assert launch.first_nonfinite(params) is None, "finite params were called nonfinite"
    places = (1000, 3000, 4096 + 5, 32768 + 5, LONG_NUMEL - 1)
    for (index, param), place in itertools.product(enumerate(params), places):
        kept = param[place].clone()
        param[place] = torch.inf
        found = launch.first_nonfinite(params)
        assert found == index, f"{param.dtype}: element {place} is not finite, and {found} was found"
        param[place] = kept


class Dispatched(TorchDispatchMode):
    """Counts what torch is asked to do: a host read of the device is an op, and so is every kernel of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def check_captured_paces(prepare: Any, pairs: Sequence[Pair], capture: Any, replay: Any) -> None:
    """Hold replays of a graph to the rules that were captured, whatever an update between them goes by.

    ``capture`` is a context in which updates go into the graph, and ``replay`` runs it.
    """
    expected, device = clone(pairs), pairs[0].param.device
    launch, eager = prepare(pairs), prepare(expected)
    rules: list[Rule] = [EqualAverage(), ExponentialAverage(0.9), PowerAverage(6.94)]
    others: list[Rule] = [ExponentialAverage(0.5), EqualAverage(), ExponentialAverage(0.1)]
    counters, counted = ([torch.tensor(n, device=device) for n in (3, 1, 7)] for _ in range(2))
    update(launch, pairs, others, counters)  # outside a graph, as the first update has to be
    update(eager, expected, others, counted)
    with capture:
        update(launch, pairs, rules, counters)
    assert launch.captured
    for by in (rules, others, rules):
        if by is rules:
            replay()
        else:
            update(launch, pairs, by, counters)
        update(eager, expected, by, counted)
        assert list(map(int, counters)) == list(map(int, counted))
        require_same_pairs(pairs, expected, "a replay is wrong")


def meet_at_each_line(one: Callable[[], object], other: Callable[[], object], files: Collection[str]) -> Iterator[int]:
    """Run ``one``, and at one of its lines ``other`` as a whole, as another thread may. Yield after each line in turn.

    Args:
        files: ends of the names of the files whose lines count.
    """
    for line in itertools.count():
        passed = itertools.count()

        def trace(frame: Any, event: str, _: object, passed: Any = passed, line: int = line) -> Any:
            if not frame.f_code.co_filename.endswith(tuple(files)):
                return None
            if event == "line" and next(passed) == line:
                other()  # Python does not trace what a trace function does
            return trace

        sys.settrace(trace)
        try:
            one()
        finally:
            sys.settrace(None)
        if next(passed) <= line:
            assert line > 0, "no line was seen"
            return
        yield line
