"""The checksum: Python's integers as the oracle of plain torch, and of the native library on every instruction set.

``tests/native`` holds the kernels to an oracle without torch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from swafast.backends import Unavailable, cpu, library
from swafast.op import checksum as module
from swafast.op.checksum import checksum, wrap_int64
from tests.conftest import NO_LIBRARY, instruction_set
from tests.support import any_bits
from tests.test_bad_input import _subclass

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

Way = Callable[..., int]

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.int16, torch.bfloat16, torch.float16),
    *(torch.int32, torch.float32, torch.complex32, torch.int64, torch.float64, torch.complex64, torch.complex128),
)
#: Words that one task of the native library takes.
CHUNK = 32768


def checksum_reference(tensor: Tensor, shape: Sequence[int] | None = None, offsets: Sequence[int] | None = None) -> int:
    """Return what ``checksum`` returns, by plain torch on the tensor's device."""
    return module._torch_sum(module._words(tensor, shape, offsets))


@pytest.fixture(params=["reference", "generic", "avx2", "avx512"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """Each way to the checksum, on two threads however small the tensor; the reference in windows of 100 words."""
    if request.param == "reference":
        monkeypatch.setattr(module, "_WINDOW_NUMEL", 100)
        yield checksum_reference
        return
    with instruction_set(request.param):
        monkeypatch.setattr(module, "_NUMEL_PER_THREAD", 1)
        monkeypatch.setattr(module, "_torch_sum", lambda box: pytest.fail("the native library was passed by"))
        yield checksum


def mixed(index: int, bits: int) -> int:
    mask = 2**64 - 1
    x = (bits + (index + 1) * 0x9E3779B97F4A7C15) & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def oracle(tensor: Tensor, shape: Sequence[int] | None = None, offsets: Sequence[int] | None = None) -> int:
    data = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    whole, corner = tuple(shape or tensor.shape), tuple(offsets or (0,) * tensor.dim())
    return _oracle(data, tensor.element_size(), tuple(tensor.shape), whole, corner)


@functools.lru_cache(1024)  # every way asks for the same tensors
def _oracle(
    data: bytes, itemsize: int, sizes: tuple[int, ...], shape: tuple[int, ...], offsets: tuple[int, ...]
) -> int:
    total = 0
    for place, coordinates in enumerate(itertools.product(*map(range, sizes))):
        index = 0
        for size, offset, coordinate in zip(shape, offsets, coordinates, strict=True):
            index = index * size + offset + coordinate
        element = data[place * itemsize : (place + 1) * itemsize]
        words = (element,) if itemsize < 16 else (element[:8], element[8:])
        for k, word in enumerate(words):
            total += mixed(index * len(words) + k, int.from_bytes(word, "little"))
    return wrap_int64(total)


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    block = any_bits((6, 5, 4, 7), dtype)
    return {
        "contiguous": block,
        "channels_last": block.permute(0, 3, 1, 2),
        "transposed": block.view(30, 28).t(),
        "gaps": block[::2, 1:4, :, ::3],
        "permuted with gaps": block[:, ::2].permute(3, 1, 0, 2)[1:],
        "five dimensions": block.view(2, 3, 5, 4, 7)[:, :2, 1:, :, 2:].permute(2, 4, 0, 3, 1),
        "narrow rows": block.view(120, 7)[:, 1:3],
        "expanded": block[:, :1, :, :1].expand(6, 5, 4, 9),
        "one element expanded": any_bits((1,), dtype).expand(3, 50),
        "windows that overlap": block.view(-1).unfold(0, 20, 3),
        "no dimension": any_bits((), dtype),
        "ones": any_bits((1, 1, 3, 1), dtype),
        "empty": block[:, :0],
    }


def check_layouts(way: Way, dtype: torch.dtype) -> None:
    """Compare with the oracle, of which the summands of any parts add up to the whole's."""
    for name, tensor in layouts(dtype).items():
        assert way(tensor) == oracle(tensor), name
        whole, corner = [size + 3 for size in tensor.shape], [d % 4 for d in range(tensor.dim())]
        assert way(tensor, whole, corner) == oracle(tensor, whole, corner), f"{name} as a part"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_is_the_oracles(way: Way, dtype: torch.dtype) -> None:
    check_layouts(way, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_a_vector_and_a_chunk_are_the_oracles(
    way: Way, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    chunk = CHUNK // 2 if dtype == torch.complex128 else CHUNK
    around_chunk = (chunk - 1, chunk, chunk + 1, 2 * chunk + 7) if dtype in (torch.bfloat16, torch.complex128) else ()
    for numel in (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 99, 100, 101, 1000, *around_chunk):
        monkeypatch.setattr(module, "_WINDOW_NUMEL", 5000 if numel > 1000 else 100)
        tensor = any_bits((numel,), dtype)
        assert way(tensor) == oracle(tensor), numel


def test_the_definition_does_not_change(way: Way) -> None:
    """Checksums outlive a release: they stand in checkpoints."""
    assert way(torch.zeros(1, dtype=torch.uint8)) == -2152535657050944081
    assert way(torch.arange(10)) == 8536416354395855385
    assert way(torch.arange(9.0).view(3, 3), (3, 6), (0, 3)) == 6256696307395645166


def _forget_the_corner(patch: pytest.MonkeyPatch) -> None:
    locate = module._locate
    patch.setattr(module, "_locate", lambda *args: (locate(*args)[0], (0,) * len(args[0])))


def _index_within_the_part(patch: pytest.MonkeyPatch) -> None:
    locate = module._locate
    patch.setattr(module, "_locate", lambda *args: (args[0], locate(*args)[1]))


def _forget_the_strides(patch: pytest.MonkeyPatch) -> None:
    as_integers = module._as_integers
    strides_of = functools.partial(torch.empty, device="meta")
    patch.setattr(
        module,
        "_as_integers",
        lambda tensor: (w := as_integers(tensor)).as_strided(w.shape, strides_of(w.shape).stride()),
    )


@pytest.mark.parametrize("plant", [_forget_the_corner, _index_within_the_part, _forget_the_strides])
def test_the_gate_kills_the_bug(
    way: Way, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"channels_last|contiguous as a part"):
        check_layouts(way, torch.int16)


@pytest.mark.parametrize("start", [2**31 - 3, 2**32 - 3, 2**40])
def test_indices_have_64_bits(way: Way, start: int) -> None:
    tensor = any_bits((50, 7), torch.float32)
    for shape, offsets in (
        ((50, start + 7), (0, start)),
        ((start + 50, 2**33), (start, 2**33 - 7)),
        ((50, start + 7), (0, 0)),
    ):
        assert way(tensor, shape, offsets) == oracle(tensor, shape, offsets)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{NO_LIBRARY}: {cpu.unavailable()}")
def test_a_box_has_more_words_than_32_bits_count() -> None:
    """One element of memory stands for all of them; two boxes differ by words that the oracle knows."""
    element = any_bits((1,), torch.float32)
    short, long = 2**31 - 20, 2**31 + 30
    assert checksum(element.expand(long)) == wrap_int64(
        checksum(element.expand(short)) + oracle(element.expand(long - short), (long,), (short,))
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_the_number_of_threads_has_no_say(way: Way, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(module, "_WINDOW_NUMEL", 50_000)
    tensor = any_bits((40, 20, 501), dtype)
    before = torch.get_num_threads()
    try:
        sums = set()
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            sums |= {way(tensor), way(tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1))}
    finally:
        torch.set_num_threads(before)
    assert len(sums) == 1


def test_several_threads_may_ask_at_once(way: Way) -> None:
    tensors = [any_bits((700, 101), dtype)[:, :100] for dtype in (torch.bfloat16, torch.float32) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(way, tensors)) == list(map(way, tensors))


def test_memory_need_not_be_aligned(way: Way) -> None:
    data = bytearray(torch.randint(0, 256, (809,)).tolist())
    tensor = torch.frombuffer(data, dtype=torch.float32, offset=1)
    assert tensor.data_ptr() % 4
    assert way(tensor) == oracle(torch.frombuffer(data[1:], dtype=torch.float32))


def test_what_is_put_off_is_worked_out(way: Way) -> None:
    for dtype in (torch.complex64, torch.complex128):
        tensor = torch.randn(30, dtype=dtype)
        assert way(tensor.conj()) == way(tensor.conj().resolve_conj()) != way(tensor)
        assert way(tensor.conj().imag) == way(-tensor.imag)


def test_params_of_a_model_are_tensors_too(way: Way) -> None:
    layer = torch.nn.Linear(5, 3)
    assert way(layer.weight) == way(layer.weight.detach().clone()) == oracle(layer.weight.detach())
    with torch.inference_mode():
        assert way(layer.weight * 1) == way(layer.weight)


def test_without_the_library_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = any_bits((70_000,), torch.float32)
    expected = oracle(tensor)
    assert checksum(tensor) == expected
    monkeypatch.setattr(library, "load", lambda: Unavailable("for this test"))
    assert checksum(tensor) == expected


def test_sums_wrap_around_as_those_of_torch_do() -> None:
    values = [2**63 - 1, 1, -(2**63), -1, 2**62, 2**62, 5]
    assert wrap_int64(sum(values)) == int(torch.tensor(values).sum())
    assert [wrap_int64(value) for value in (2**63, 2**64, -(2**63), -(2**63) - 1)] == [-(2**63), 0, -(2**63), 2**63 - 1]


MATRIX = torch.zeros(2, 3)
REFUSED: list[tuple[Callable[[], tuple[Any, ...]], type[Exception], str]] = [
    (lambda: ([1.0],), TypeError, "tensor must be .*, got list"),
    (lambda: (MATRIX.to_sparse(),), ValueError, "tensor must be dense"),
    (lambda: (torch.quantize_per_tensor(MATRIX, 0.1, 0, torch.qint8),), ValueError, "tensor must not be quantised"),
    (lambda: (_subclass(MATRIX),), ValueError, "tensor must be a plain tensor, got TwoTensor"),
    (lambda: (MATRIX.to("meta"),), ValueError, "tensor must hold data"),
    (lambda: (torch.nn.UninitializedParameter(),), ValueError, "tensor must be initialised"),
    (lambda: (MATRIX, (2, 3), None), ValueError, "offsets must be .*, got None"),
    (lambda: (MATRIX, None, (0, 0)), ValueError, "shape must be .*, got None"),
    (lambda: (MATRIX, (2, 3, 1), (0, 0)), ValueError, r"shape must .* got \(2, 3, 1\)"),
    (lambda: (MATRIX, (2, 3), (0,)), ValueError, r"offsets must .* got \(0,\)"),
    (lambda: (MATRIX, (9, 2), (0, 0)), ValueError, r"tensor must fit into shape \(9, 2\)"),
    (lambda: (MATRIX, (-1, 3), (0, 0)), ValueError, r"tensor must fit into shape \(-1, 3\)"),
    (lambda: (MATRIX, (4, 3), (3, 0)), ValueError, r"offsets must .* got \(3, 0\)"),
    (lambda: (MATRIX, (4, 3), (-1, 0)), ValueError, r"offsets must .* got \(-1, 0\)"),
    (lambda: (MATRIX[:0], (4, 3), (5, 0)), ValueError, r"offsets must .* got \(5, 0\)"),
    (lambda: (MATRIX, (4.0, 3), (0, 0)), TypeError, r"shape must .* got \(4\.0, 3\)"),
    (lambda: (MATRIX, (4, 3), 0), TypeError, "offsets must .* got 0"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_is_no_plain_tensor_or_no_part_is_refused(
    make: Callable[[], tuple[Any, ...]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        checksum(*make())


def test_an_empty_part_may_stand_at_the_end(way: Way) -> None:
    assert way(MATRIX[:0], (4, 3), (4, 0)) == 0
    assert way(MATRIX[:0], (0, 3), (0, 0)) == 0
