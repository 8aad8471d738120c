"""Random bits: even, without a pattern, and the same however a param lies in memory or is spread."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from swafast import ExponentialAverage, FusedAveragedModel
from swafast.backends import cpu, reference
from swafast.backends.contract import Pair
from swafast.terms.boxes import Box, boxes_of_run
from swafast.terms.draws import Draws, make_random_key, random_bits, runs_of
from swafast.terms.formats import COMPACT, HALF, Format
from swafast.terms.layout import cut_chunks
from tests.kernels import update

UPDATES = 256


def bits_of(key: int, updates: int, numel: int) -> Tensor:
    """Return the random bits as fractions of 1, (updates, numel)."""
    index = torch.arange(numel)
    return torch.stack([random_bits(key, n, index) for n in range(updates)]).double() / 2**32


def test_bits_are_even_over_elements_and_over_updates() -> None:
    bits = bits_of(make_random_key(0, "weight"), UPDATES, 4096)
    for along in (0, 1):
        bound = 4.5 / (12 * bits.shape[along]) ** 0.5  # sigma of a mean of uniform numbers, over all rows
        assert float((bits.mean(along) - 0.5).abs().max()) <= bound * 1.1
    # Bytes, as `compact` uses them: chi-squared of 255 degrees of freedom, of which 5 sigma is 113.
    counts = torch.bincount((bits * 256).long().flatten(), minlength=256).double()
    expected = bits.numel() / 256
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 255) <= 5 * 510**0.5


def test_bits_do_not_follow_from_those_beside_them() -> None:
    bits = bits_of(make_random_key(0, "weight"), UPDATES, 4096) - 0.5
    sigma = 1 / (12 * bits.numel() ** 0.5)
    for elements in (1, 2, 3, 7, 64, 1024):
        assert abs(float((bits[:, elements:] * bits[:, :-elements]).mean())) <= 5 * sigma
    for updates in (16, 17, 32, 64):
        assert abs(float((bits[updates:] * bits[:-updates]).mean())) <= 5 * sigma * 16**0.5
    for other in (make_random_key(1, "weight"), make_random_key(0, "bias")):
        assert abs(float((bits * (bits_of(other, UPDATES, 4096) - 0.5)).mean())) <= 5 * sigma


def test_sixteen_updates_in_a_row_take_a_sixteenth_each() -> None:
    bits = bits_of(make_random_key(0, "weight"), 64, 1000)
    # And so do the first and the second half of them, in eighths, and each pair, in halves.
    for length in (2, 4, 8, 16):
        for start in range(0, 64, length):
            part = (bits[start : start + length] * length).sort(0).values.floor()
            assert torch.equal(part, torch.arange(float(length), dtype=torch.float64)[:, None].expand(length, 1000))


def test_a_large_index_has_bits_of_its_own() -> None:
    index = torch.arange(1000)
    key = make_random_key(0, "weight")
    first = random_bits(key, 5, index)
    for block in (1, 2, 2**20):
        assert int((random_bits(key, 5, index + (block << 32)) == first).sum()) <= 3
    # across the border
    around = (1 << 32) - 500 + index
    assert torch.equal(random_bits(key, 5, around)[500:], random_bits(key, 5, (1 << 32) + index[:500]))


@pytest.mark.parametrize("fmt", [COMPACT, HALF], ids=repr)
@pytest.mark.parametrize("value", [1.0 + 2**-20, -3.3e-5, 1e30, 1.2345e-38])
def test_rounding_at_random_is_right_on_average(fmt: Format, value: float) -> None:
    """Over a million draws within 4 sigma: 1000 updates of 1000 elements, each a copy of one value."""
    param = torch.full((1000,), value)
    planes = tuple(torch.zeros(1000, dtype=dtype) for dtype in (torch.bfloat16, *(dtype for _, dtype in fmt.extra)))
    pair = Pair("w", param, planes, fmt, Draws(make_random_key(0, "w"), (1000,)))
    launch = cpu.prepare([pair])
    counter = torch.tensor(1)
    total = torch.zeros(1000, dtype=torch.float64)
    for _ in range(1000):
        update(launch, [pair], [ExponentialAverage(0.0)], [counter])  # a weight of 1
        total += fmt.decode(planes).double()
    kept = 24 - fmt.num_random_bits  # bits of the significand
    unit = 2.0 ** (max(torch.tensor(value).abs().double().log2().floor().item(), -126.0) - kept + 1)
    exact = float(torch.tensor(value).double())
    share = (abs(exact) / unit) % 1.0
    sigma = unit * (share * (1 - share) / 1e6) ** 0.5
    assert abs(float(total.sum()) / 1e6 - exact) <= 4 * sigma


LAYOUTS = {
    "rows": lambda: torch.randn(12, 35),
    "columns": lambda: torch.randn(35, 12).t(),
    "channels_last": lambda: torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(4, 3, 5, 7).permute(2, 0, 3, 1),
    "one": lambda: torch.randn(1, 420, 1),
    "number": lambda: torch.tensor(0.3),
    "empty": lambda: torch.randn(0, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_give_each_element_its_index(layout: str) -> None:
    tensor = LAYOUTS[layout]()
    runs = runs_of(Draws(0, tuple(tensor.shape)), tensor.stride())
    found = torch.full((tensor.numel(),), -1)
    for offset, numel, index, step in runs.tolist():
        found[offset : offset + numel] = index + step * torch.arange(numel)
    memory = torch.empty(tensor.numel(), dtype=torch.int64).as_strided(tensor.shape, tensor.stride())
    memory.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    assert torch.equal(found, memory.as_strided((tensor.numel(),), (1,)))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_runs_of_boxes_give_each_element_its_index(order: tuple[int, ...]) -> None:
    shape, offsets, sizes = (9, 8, 7), (2, 3, 1), (4, 5, 6)
    index = torch.arange(9 * 8 * 7).view(shape)
    for start, stop in ((0, 120), (7, 100), (31, 32), (5, 5)):
        boxes = boxes_of_run(sizes, start, stop, offsets, order)
        found = torch.full((stop - start,), -1)
        for offset, numel, first, step in runs_of(Draws(0, shape, boxes), (1,)).tolist():
            found[offset : offset + numel] = first + step * torch.arange(numel)
        whole = torch.empty(stop - start, dtype=torch.int64)
        for box in boxes:
            box.of_run(whole).copy_(box.of_whole(index))
        assert torch.equal(found, whole)


def test_no_chunk_crosses_where_the_upper_half_of_the_index_changes() -> None:
    runs = torch.tensor([[0, 0, 1000, (1 << 32) - 300, 1], [1, 5, 700, (3 << 32) - 3, (1 << 31) + 1], [2, 0, 9, 0, 1]])
    chunks = cut_chunks(runs, 64)
    for _, _, numel, index, step in chunks.tolist():
        assert index >> 32 == (index + (numel - 1) * step) >> 32
        assert 0 < numel <= 64

    def elements(rows: Tensor) -> list[tuple[int, int, int]]:
        return [(tensor, at + i, index + i * step) for tensor, at, n, index, step in rows.tolist() for i in range(n)]

    assert elements(chunks) == elements(runs)


def updated(backend: object, tensors: list[Tensor], all_draws: list[Draws], fmt: Format, updates: int) -> list[Tensor]:
    pairs = []
    for tensor, each in zip(tensors, all_draws, strict=True):
        dtypes = (fmt.dtype, *(dtype for _, dtype in fmt.extra))
        planes = tuple(torch.empty_like(tensor, dtype=dtype).zero_() for dtype in dtypes)
        pairs.append(Pair("w", tensor, planes, fmt, each))
    launch = backend.prepare(pairs)  # type: ignore[attr-defined]
    counter = torch.tensor(0)
    for _ in range(updates):
        update(launch, pairs, [ExponentialAverage(0.7)], [counter])
    return [fmt.decode(pair.planes) for pair in pairs]


@pytest.mark.parametrize("backend", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("fmt", [COMPACT, HALF], ids=repr)
def test_the_parts_of_a_param_are_rounded_as_the_whole(backend: object, fmt: Format) -> None:
    torch.manual_seed(5)
    whole = torch.randn(6, 8, 10)
    key = make_random_key(0, "w")
    (expected,) = updated(reference, [whole], [Draws(key, (6, 8, 10))], fmt, 5)
    boxes = [Box((0, 0, 0), (6, 8, 3), 0, (0, 1, 2)), Box((0, 0, 3), (6, 5, 7), 0, (0, 1, 2))]
    boxes.append(Box((0, 5, 3), (6, 3, 7), 0, (2, 1, 0)))  # its slowest dimension in memory is the last
    runs = []
    for box in boxes:
        run = torch.empty(box.numel)
        box.of_run(run).copy_(box.of_whole(whole))
        runs.append(run)
    found = updated(backend, runs, [Draws(key, (6, 8, 10), (box,)) for box in boxes], fmt, 5)
    for box, run in zip(boxes, found, strict=True):
        assert torch.equal(box.of_run(run), box.of_whole(expected))


def test_layouts_and_seeds(backend: str) -> None:
    """A model in another layout of memory is rounded alike; another seed is another average."""
    state = nn.Conv2d(5, 7, 3).state_dict()

    def average(seed: int, memory_format: torch.memory_format) -> dict[str, Tensor]:
        model = nn.Conv2d(5, 7, 3)
        model.load_state_dict(state)
        model.to(memory_format=memory_format)  # type: ignore[call-overload]
        averaged = FusedAveragedModel(model, rule=ExponentialAverage(0.9), format="compact", backend=backend, seed=seed)
        for step in range(3):
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(1.0 + 0.1 * step)
            averaged.update_parameters(model)
        return averaged.averaged_state_dict()

    plain, again = average(0, torch.contiguous_format), average(0, torch.channels_last)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert any(not torch.equal(plain[name], each) for name, each in average(1, torch.contiguous_format).items())
