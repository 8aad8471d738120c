"""Normal numbers: known answers, how exact they are, how they are distributed, and the kernels' against torch's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from swafast.backends import cpu
from swafast.backends.contract import Pair
from swafast.terms.boxes import Box
from swafast.terms.draws import Draws, make_random_key
from swafast.terms.formats import FLOAT32, with_spread
from swafast.terms.normals import COLUMNS, normal_of, normals, philox, random_words, square_root
from swafast.terms.samples import Sample
from swafast.terms.spread import Spread
from tests.conftest import instruction_set
from tests.kernels import same_bits

MASK = 2**32 - 1


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (MASK, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_known_answers(counter: int, key: int, words: tuple[int, ...]) -> None:
    word = torch.tensor(counter)
    assert tuple(map(int, philox((word, word, word, word), key))) == words


def test_the_words_of_an_element_go_by_its_index_the_sample_and_the_stream() -> None:
    key, index = 2**63 + 11, torch.tensor([0, 1, 2, 3, 4, 2**34 + 6])
    blocks = [philox(tuple(map(torch.tensor, (i >> 2 & MASK, i >> 34, 9, 0))), key)[i & 3] for i in index.tolist()]  # type: ignore[arg-type]
    assert random_words(key, 9, index).tolist() == list(map(int, blocks))
    others = [(key + 1, 9, 0), (key, 8, 0), (key, 9, COLUMNS)]
    assert not any((random_words(key, 9, index) == random_words(k, sample, index, s)).any() for k, sample, s in others)


def exact_normal(words: Tensor) -> Tensor:
    """Return the inverse of the distribution function in float64, from the end that loses no digits."""
    lower = torch.where(words < 2**31, words, MASK - words)
    p = 0.5 + (lower.double() + 0.5) / 2**32
    # ndtri of p near 1 has few digits: take 1 - p, which is exact, and the other sign.
    beyond = ((2**31 - 1 - lower).double() + 0.5) / 2**32
    upper = torch.where(p > 0.9, -torch.special.ndtri(beyond), torch.special.ndtri(p))
    return torch.where(words < 2**31, upper, -upper)


def hard_words() -> Tensor:
    """Return words at the ends, at the middle, where the one formula follows the other, and many others."""
    at = [0, 2**31 - 1, round(0.425 * 2**32), round(0.075 * 2**32)]
    near = torch.tensor([word + step for word in at for step in range(-500, 501)])
    generator = torch.Generator().manual_seed(5)
    words = torch.cat((near % 2**31, torch.randint(0, 2**31, (30_000,), generator=generator)))
    return torch.cat((words, MASK - words))


def test_a_normal_number_is_exact_to_4e_7() -> None:
    words = hard_words()
    exact = exact_normal(words)
    found = normal_of(words)
    assert float(((found.double() - exact) / exact).abs().max()) <= 4e-7
    assert bool((found == -normal_of(MASK - words)).all()), "words 2^32 - 1 - w and w must be opposite"


def test_square_roots_are_rounded_once() -> None:
    values = torch.rand(50_000, generator=torch.Generator().manual_seed(2)) * 10
    roots = square_root(values)
    # Half way to the next float32 on either side, which float64 has exactly, and the squares of that too.
    below, above = ((roots.double() + roots.nextafter(torch.tensor(end))) / 2 for end in (0.0, math.inf))
    assert bool(((below**2 <= values) & (values <= above**2)).all())


def test_normal_numbers_are_normal() -> None:
    count = 100_000
    z = normals(make_random_key(0, "weight"), 1, torch.arange(count)).double()
    assert abs(float(z.mean())) <= 4.5 / count**0.5
    assert abs(float(z.var()) - 1) <= 4.5 * (2 / count) ** 0.5
    assert abs(float((z**3).mean())) <= 4.5 * (15 / count) ** 0.5
    assert abs(float((z**4).mean()) - 3) <= 4.5 * (96 / count) ** 0.5
    for bound in (0.5, 1.0, 2.0, 3.0, 4.0):
        share = math.erfc(bound / 2**0.5) / 2
        for beyond in (z > bound, z < -bound):
            assert abs(float(beyond.double().mean()) - share) <= 4.5 * (share * (1 - share) / count) ** 0.5


def test_normal_numbers_do_not_follow_from_those_beside_them() -> None:
    count, key = 50_000, make_random_key(0, "weight")
    index = torch.arange(count)
    z = normals(key, 0, index).double()
    for lag in (1, 2, 3, 4, 1024):
        assert abs(float((z[lag:] * z[:-lag]).mean())) <= 4.5 / count**0.5
    others = [normals(make_random_key(0, "bias"), 0, index), normals(key, 1, index), normals(key, 0, index, COLUMNS)]
    assert max(abs(float((z * other.double()).mean())) for other in others) <= 4.5 / count**0.5


# The kernels'


@pytest.fixture(params=["generic", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with instruction_set(request.param):
        yield request.param


def drawn_normals(key: int, sample: int, start: int, count: int, step: int = 1) -> Tensor:
    """Return normal numbers from a draw: of an average of 0 with a variance of 1."""
    fmt = with_spread(FLOAT32, Spread(0), torch.float32)
    box = Box((0, start), (count, 1), 0, (1, 0)) if step != 1 else Box((start,), (count,), 0, (0,))
    draws = Draws(key, (2**40 // step, step) if step != 1 else (2**40,), (box,))
    param = torch.full((count,), math.nan)
    planes = (torch.zeros(count), torch.ones(count))
    cpu.prepare([Pair("", param, planes, fmt, draws)]).draw([param], Sample(sample, (), 1.0))
    return param


@pytest.mark.parametrize("start", [0, 1, 2, 3, 2**32 - 1000, 2**34 - 1001, 2**36 + 2])
def test_a_kernel_draws_the_normal_numbers_of_a_run(isa: str, start: int) -> None:
    key, count = make_random_key(3, "weight"), 2100
    expected = normals(key, 2**32 - 1, torch.arange(start, start + count))
    assert same_bits(drawn_normals(key, 2**32 - 1, start, count), expected)


@pytest.mark.parametrize("step", [2, 5, 4096])
def test_a_kernel_draws_the_normal_numbers_of_elements_apart(isa: str, step: int) -> None:
    key, count = make_random_key(3, "weight"), 1100
    expected = normals(key, 0, torch.arange(count) * step + 1)
    assert same_bits(drawn_normals(key, 0, 1, count, step), expected)
