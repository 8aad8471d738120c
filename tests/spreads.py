"""What the tests of spreads share: their closed form, averages with a spread of any bits, samples, compared draws."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from swafast.backends import reference
from swafast.backends.contract import Pair
from swafast.terms.boxes import Box, boxes_of_run
from swafast.terms.draws import Draws, make_random_key
from swafast.terms.formats import COMPACT, COMPENSATED, EXACT, FLOAT32, MIRRORED, Format, with_spread
from swafast.terms.normals import COLUMNS, normals
from swafast.terms.rules import EqualAverage, Rule
from swafast.terms.samples import Sample
from swafast.terms.spread import Spread
from tests.kernels import (
    DTYPES,
    FORMATS,
    Prepare,
    any_floats,
    any_values,
    at_offset,
    averages_of,
    by_weights,
    clone,
    make_pair,
    require_same_pairs,
    update,
)

#: Every dtype of the columns, their default, and numbers of columns that are added one by one and four at a time.
SPREADS = (Spread(0), Spread(3), Spread(20, torch.bfloat16), Spread(2, torch.float16), Spread(6, torch.float32))
TURNS = pytest.mark.parametrize("turn", range(len(SPREADS)), ids=lambda turn: str(SPREADS[turn]))
#: A weight for each branch of a lerp. This many models in an average are no multiple of any number of columns.
MOVES, NUM_AVERAGED = by_weights(1.0, 0.3, 0.9), 7


# The closed form, in float64


def moments_of(models: Tensor, rule: Rule | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance of all models, and how far each was from the mean after it, (updates, ...) float64.

    Args:
        models: (updates, ...).
        rule: by which they weigh; default: all alike.
    """
    # In row n, how much each model weighs in the average after the update of n models.
    shares = torch.zeros(len(models), len(models), dtype=torch.float64)
    for n in range(len(models)):
        weight = (rule or EqualAverage()).weight(n)
        shares[n] = (1 - weight) * shares[n - 1]
        shares[n, n] = weight
    means = torch.tensordot(shares, models.double(), 1)
    variance = torch.tensordot(shares[-1], (models.double() - means[-1]).square(), 1)
    return means[-1], variance, models.double() - means


def sample_in_closed_form(
    models: Mapping[str, Tensor], columns: int, index: int, scale: float, *, seed: int = 0, divisor: int | None = None
) -> dict[str, Tensor]:
    """Return a sample of an equal average, with our random numbers.

    Args:
        models: (updates, ...) of each param.
        columns: the number of deviations that are kept; 0: the sample is of the variance alone.
        divisor: of the deviations' covariance; default: one less than there are.
    """
    found = {}
    for name, values in models.items():
        mean, variance, deviations = moments_of(values)
        noise = normals(make_random_key(seed, name), index, torch.arange(mean.numel())).view(mean.shape)
        point, kept = variance.sqrt() * noise, min(len(values), columns)
        if kept:
            # The update of n models writes the column n % columns, and numbers go by the column.
            of_columns = {n % columns: deviation for n, deviation in enumerate(deviations)}
            numbers = normals(make_random_key(seed, ""), index, torch.arange(kept), COLUMNS).tolist()
            along = sum(of_columns[column] * number for column, number in enumerate(numbers))
            point = point + along / math.sqrt(divisor or kept - 1)
        found[name] = mean + math.sqrt(scale) * point
    return found


# Averages of any bits


def make_spread_pair(numel: int, dtype: torch.dtype, fmt: Format, spread: Spread, offset: int = 0) -> Pair:
    """Return a pair as `make_pair` does, whose average has a spread of any bits; but no variance is negative."""
    return add_spread(make_pair(numel, dtype, fmt, offset), spread, offset)


def add_spread(pair: Pair, spread: Spread, offset: int = 0) -> Pair:
    assert pair.format is not None
    fmt, numel = with_spread(pair.format, spread, pair.average.dtype), pair.param.numel()
    variance = any_floats(numel).abs()
    columns = [any_values(numel, column) for _, column in fmt.spread_planes[1:]]
    planes = [at_offset(plane, offset * (index + 1) % 8) for index, plane in enumerate((variance, *columns))]
    return replace(pair, name=f"{pair.name}, {spread}", planes=(*pair.planes, *planes), format=fmt)


#: Dtype, format and spread of each path of its own that a kernel may have.
OF_EACH_PATH = (
    (torch.float32, FLOAT32, Spread(9)),
    (torch.bfloat16, EXACT, Spread(9)),
    (torch.float16, MIRRORED, Spread(9)),
    (torch.bfloat16, COMPACT, Spread(9, torch.float32)),
    (torch.float32, COMPENSATED, Spread(9)),
)


@functools.cache
def pairs_of_each_path(numel: int, count: int = len(OF_EACH_PATH)) -> list[Pair]:
    """Return aligned pairs, whose accesses are as wide as they get."""
    pairs = [make_spread_pair(numel, *kind) for kind in OF_EACH_PATH[:count]]
    for pair in pairs:
        pair.param[::3] = pair.average[::3]  # what is left between them is in a further plane
    return [drawn(replace(pair, name=f"{pair.name}, {pair.format}")) for pair in pairs]


@functools.cache
def drawing_of_each_path(numel: int, count: int = len(OF_EACH_PATH)) -> Drawing:
    pairs = [pair for pair in pairs_of_each_path(numel, count) if len(pair.spread_planes) > 1]
    return draw_by_reference(pairs, [Sample(5, tuple(0.25 * k - 1.125 for k in range(9)), 0.75)])


@functools.cache
def pairs_of_all_kinds(turn: int, sizes: tuple[int, ...]) -> list[Pair]:
    """Return a pair of each dtype and format with the spread of this turn. Each has another size in each turn."""
    kinds = itertools.product(DTYPES, FORMATS)
    pairs = [
        make_spread_pair(sizes[(index + turn) % len(sizes)], dtype, fmt, SPREADS[turn], (0, 1, 6)[index % 3])
        for index, (dtype, fmt) in enumerate(kinds)
    ]
    return [replace(pair, name=f"{index}: {pair.name}") for index, pair in enumerate(pairs)]


def spread_averages_of(num_paces: int, sizes: Sequence[int]) -> list[Pair]:
    """Return several averages of each param, as `averages_of`: two of three have a spread."""
    return [
        pair
        if pair.format is None or (pair.pace + index) % 3 == 0
        else replace(add_spread(pair, SPREADS[index % len(SPREADS)]), name=pair.name)
        for index, pair in enumerate(averages_of(num_paces, sizes))
    ]


# The reference takes longer than any other backend, so it works each case out once for all of them.


@functools.cache
def moved_by_reference(turn: int, sizes: tuple[int, ...]) -> list[list[Pair]]:
    """Return pairs of all kinds after an update by each of `MOVES`."""
    expected = [clone(pairs_of_all_kinds(turn, sizes)) for _ in MOVES]
    for pairs, rule in zip(expected, MOVES, strict=True):
        update(reference.prepare(pairs), pairs, [rule], [torch.tensor(NUM_AVERAGED)])
    return expected


def check_moves(prepare: Prepare, turn: int, sizes: tuple[int, ...], device: torch.device | str = "cpu") -> None:
    """Hold updates of averages with this turn's spread, always of the same ones, to those of the reference."""
    start = pairs_of_all_kinds(turn, sizes)
    ours = clone(start, device)
    launch, counter = prepare(ours), torch.tensor(0, device=device)
    for rule, expected in zip(MOVES, moved_by_reference(turn, sizes), strict=True):
        for pair, before in zip(ours, start, strict=True):
            for plane, value in zip(pair.planes, before.planes, strict=True):
                plane.copy_(value)
        update(launch, ours, [rule], [counter.fill_(NUM_AVERAGED)])
        require_same_pairs(ours, expected, str(rule))


# Draws


def drawn(pair: Pair, draws: Draws | None = None) -> Pair:
    """Return the pair as a draw takes it: its normal numbers are those of a whole param, or of what ``draws`` says."""
    return replace(pair, draws=draws or Draws(make_random_key(0, pair.name), tuple(pair.param.shape)))


@dataclass(frozen=True)
class Drawing:
    """Samples of these pairs, and the params that the reference makes of each."""

    pairs: list[Pair]
    samples: list[Sample]
    expected: list[list[Pair]]


def draw_by_reference(pairs: list[Pair], samples: list[Sample]) -> Drawing:
    expected = [clone(pairs) for _ in samples]
    for on, sample in zip(expected, samples, strict=True):
        reference.prepare(on).draw([pair.param for pair in on], sample)
    return Drawing(pairs, samples, expected)


@functools.cache
def drawing_of_all_kinds(turn: int, sizes: tuple[int, ...]) -> Drawing:
    pairs = [drawn(pair) for pair in pairs_of_all_kinds(turn, sizes)]
    return draw_by_reference(pairs, samples_of(SPREADS[turn]))


@functools.cache
def drawing_of_places() -> Drawing:
    """Return pairs whose elements have indices of every kind: from any lane on, with a step, and beyond 2^34.

    The indices of the last two pass a multiple of 2^32, where a chunk ends, and of 2^34, where the upper word of the
    counter changes.
    """
    spread = Spread(2)

    def flat(name: str, numel: int, dtype: torch.dtype = torch.float32, fmt: Format = FLOAT32) -> Pair:
        return replace(make_spread_pair(numel, dtype, fmt, spread), name=name)

    pairs = [
        drawn(flat(f"from {start}", 37), Draws(7 + start, (100,), boxes_of_run((100,), start, start + 37)))
        for start in range(1, 5)
    ]
    pairs.append(drawn(flat("cut", 331, torch.bfloat16, EXACT), Draws(1, (9, 57), boxes_of_run((9, 57), 100, 431))))
    transposed = flat("transposed", 420, torch.float16, MIRRORED)
    planes = tuple(plane.view(20, 21).t() for plane in transposed.planes)
    pairs.append(drawn(replace(transposed, param=transposed.param.view(20, 21).t(), planes=planes)))
    for multiple in (2**32, 2**34):
        first = multiple - 18
        pairs.append(drawn(flat(f"at {first}", 41), Draws(2**63 + 5, (2**40,), (Box((first,), (41,), 0, (0,)),))))
    return draw_by_reference(pairs, samples_of(spread))


def samples_of(spread: Spread) -> list[Sample]:
    """Return samples of all columns, of the first ones without noise, and of none."""
    generator = torch.Generator().manual_seed(3)
    coefficients = tuple(torch.randn(spread.count, generator=generator).tolist())
    noise = torch.tensor(0.7).item()
    return [Sample(0, coefficients, noise), Sample(1, coefficients[:5]), Sample(2**32 - 1, (), noise)]


def check_draws(prepare: Prepare, drawing: Drawing, device: torch.device | str = "cpu") -> None:
    """Hold samples to those of the reference. No plane may change."""
    ours = clone(drawing.pairs, device)
    launch = prepare(ours)
    for sample, expected in zip(drawing.samples, drawing.expected, strict=True):
        launch.draw([pair.param for pair in ours], sample)
        require_same_pairs(ours, expected, f"{sample}")
