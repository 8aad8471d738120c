"""A 64-bit checksum of a tensor that does not depend on how it is cut: the checksums of its boxes sum to its own.

    checksum = sum of mix(i, bits) over the elements, modulo 2^64

``i`` is the element's row-major index in the whole tensor, and ``bits`` its bit pattern as an unsigned number. An
element of 16 bytes counts as two of 8 bytes, at ``2 i`` and ``2 i + 1``. ``mix`` is output number ``i + 1`` of the
generator splitmix64 that starts at ``bits`` (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators",
2014). It is invertible, so the checksum always changes if a single element changes. It does not protect against
intentional changes.

Checksums are signed, as in ``torch.int64``. torch's sums of them wrap around; apply :func:`wrap_int64` to Python's.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import Unavailable, library
from .checks import check_plain

#: The constants of splitmix64, as in csrc/checksum.h.
_INDEX_FACTOR = 0x9E3779B97F4A7C15
_SHIFTS_AND_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))

#: Words for each thread. With fewer, a second thread costs more time than it saves.
_NUMEL_PER_THREAD = 32 * 2**10

#: Words that plain torch processes at a time, with two int64 temporaries for each. On a CPU, these temporaries stay in
#: the cache and torch in one thread: 0.5 GB/s on 8 Mi float32, but 0.06 GB/s with windows of 2**20. Elsewhere a window
#: must take longer than its launches.
_WINDOW_NUMEL = 2**15
_DEVICE_WINDOW_NUMEL = 2**21


@dataclass(frozen=True)
class _Words:
    """A tensor's elements as integers in its own memory, and the index of each in the whole tensor."""

    memory: Tensor  # any strides; uint8, int16, int32 or int64
    index_strides: tuple[int, ...]  # one for each dimension of memory
    first_index: int


def checksum(
    tensor: Tensor,  # any strides; elements of 1, 2, 4, 8 or 16 bytes
    shape: Sequence[int] | None = None,  # the whole tensor's
    offsets: Sequence[int] | None = None,  # where ``tensor`` starts in the whole, by dimension
) -> int:
    """Return the checksum of a tensor, or of a box: its summand of the whole tensor's checksum.

    The native library computes it on a CPU. Otherwise torch computes it, and waits for the device once.

    Args:
        shape, offsets: pass both for a box, neither for a whole tensor.

    Raises:
        TypeError: ``tensor`` is not a tensor, or ``shape`` or ``offsets`` is not a sequence of ints.
        ValueError: ``tensor`` is not dense, or has no data; or it is not inside ``shape`` at ``offsets``.
    """
    words = _words(tensor, shape, offsets)
    native = library.load()
    if isinstance(native, Unavailable) or words.memory.device.type != "cpu":
        return _torch_sum(words)
    return _native_sum(native, words)


def wrap_int64(value: int) -> int:
    """Return the int64 that equals ``value`` modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63


def _words(tensor: Tensor, shape: Sequence[int] | None, offsets: Sequence[int] | None) -> _Words:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor must be a torch.Tensor, got {type(tensor).__name__}")
    check_plain("tensor", tensor)
    whole, corner = _locate(tuple(tensor.shape), shape, offsets)
    memory = _as_integers(tensor.detach())
    if memory.dim() > tensor.dim():  # a complex128 is two adjacent words
        whole, corner = (*whole, 2), (*corner, 0)
    strides = tuple(math.prod(whole[d + 1 :]) for d in range(len(whole)))
    return _Words(memory, strides, sum(map(operator.mul, corner, strides)))


def _locate(
    sizes: tuple[int, ...], shape: Sequence[int] | None, offsets: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the whole tensor's shape, and the offsets in it of a tensor of these sizes."""
    if shape is None and offsets is None:
        return sizes, (0,) * len(sizes)
    if shape is None or offsets is None:
        given, missing = ("offsets", "shape") if shape is None else ("shape", "offsets")
        raise ValueError(f"{missing} must be given together with {given}, got None")
    whole, corner = _ints("shape", shape), _ints("offsets", offsets)
    for name, values in (("shape", whole), ("offsets", corner)):
        if len(values) != len(sizes):
            raise ValueError(f"{name} must have {len(sizes)} entries, one for each dimension, got {values}")
    if any(size > most for size, most in zip(sizes, whole, strict=True)):
        raise ValueError(f"tensor must fit into shape {whole}, got one of shape {sizes}")
    if any(not 0 <= start <= most - size for start, size, most in zip(corner, sizes, whole, strict=True)):
        raise ValueError(f"offsets must place a tensor of shape {sizes} inside shape {whole}, got {corner}")
    return whole, corner


def _ints(name: str, values: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, values))
    except TypeError as error:
        raise TypeError(f"{name} must be a sequence of ints, got {values!r}") from error


def _as_integers(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as integers; for a lazy conjugate or negative, the memory of its values."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.dtype == torch.complex128:
        return torch.view_as_real(tensor).view(torch.int64)
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _native_sum(native: ctypes.CDLL, words: _Words) -> int:
    memory, ndim = words.memory, words.memory.dim()
    array = ctypes.c_int64 * ndim
    native_words = library.BoxWords(
        words=memory.data_ptr(),
        word_size=memory.element_size(),
        ndim=ndim,
        sizes=array(*memory.shape),
        strides=array(*memory.stride()),
        index_strides=array(*map(wrap_int64, words.index_strides)),
        first_index=wrap_int64(words.first_index),
    )
    total = ctypes.c_int64()
    threads = min(torch.get_num_threads(), max(1, memory.numel() // _NUMEL_PER_THREAD))
    status = native.swafast_cpu_checksum(ctypes.byref(native_words), threads, ctypes.byref(total))
    assert status == 0, f"the native library must take any box, got status {status}"
    return total.value


def _torch_sum(words: _Words) -> int:
    total = torch.zeros((), dtype=torch.int64, device=words.memory.device)
    for window in _windows(words):
        total += _window_sum(window)
    return int(total)


def _windows(words: _Words) -> Iterator[_Words]:
    """Cut words into windows of limited size, along the dimension with the largest stride."""
    memory = words.memory
    most = _WINDOW_NUMEL if memory.device.type == "cpu" else _DEVICE_WINDOW_NUMEL
    if memory.numel() <= most:
        yield words
        return
    axis = max((d for d in range(memory.dim()) if memory.size(d) > 1), key=memory.stride)
    length = max(1, memory.size(axis) * most // memory.numel())
    for start in range(0, memory.size(axis), length):
        narrowed = memory.narrow(axis, start, min(length, memory.size(axis) - start))
        yield from _windows(
            _Words(narrowed, words.index_strides, words.first_index + start * words.index_strides[axis])
        )


def _window_sum(words: _Words) -> Tensor:
    memory = words.memory
    x = memory.to(torch.int64, copy=True)
    if memory.element_size() < 8:
        x &= 2 ** (8 * memory.element_size()) - 1
    x += wrap_int64((words.first_index + 1) * _INDEX_FACTOR)
    for axis, stride in enumerate(words.index_strides):
        along = torch.arange(memory.size(axis), device=memory.device) * wrap_int64(stride * _INDEX_FACTOR)
        x += along.view(-1, *(1,) * (memory.dim() - axis - 1))
    for shift, factor in _SHIFTS_AND_FACTORS:
        shifted = x >> shift
        shifted &= 2 ** (64 - shift) - 1  # torch's shift copies the sign bit
        x ^= shifted
        x *= wrap_int64(factor)
    return x.sum()
