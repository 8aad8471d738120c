"""A 64-bit checksum of a tensor that is the same however the tensor is cut: those of its boxes add up to the whole's.

    checksum = sum of mix(i, bits) over the elements, modulo 2^64

where ``i`` is the element's row-major index in the whole tensor and ``bits`` its bit pattern as an unsigned number; an
element of 16 bytes counts as two of 8, at ``2 i`` and ``2 i + 1``. ``mix`` is splitmix64: its state after ``i + 1``
rounds from ``bits``, mixed (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014). It can be
undone, so an element that alone has changed always changes the sum. It is no protection against somebody who means to
deceive.

Numbers are signed, as ``torch.int64`` holds them: a sum of several by torch wraps around as it should, and one by
Python is brought back by :func:`wrap_int64`.
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

#: splitmix64's, as in csrc/checksum.h.
_INDEX_FACTOR = 0x9E3779B97F4A7C15
_SHIFTS_AND_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))

#: Below this many words a second thread costs more than it brings.
_NUMEL_PER_THREAD = 32 * 2**10

#: Words that plain torch works on at a time; its temporaries are two int64 for each. On a processor they stay in the
#: cache and in one thread (8 Mi float32: 0.5 GB/s, and 0.06 GB/s with 2**20), elsewhere a kernel has to be worth its
#: launch.
_WINDOW_NUMEL = 2**15
_DEVICE_WINDOW_NUMEL = 2**21


@dataclass(frozen=True)
class _Words:
    """What is summed: integers that lie in memory as the tensor's elements do, and where each is in the whole."""

    memory: Tensor  # any strides; uint8, int16, int32 or int64
    index_strides: tuple[int, ...]  # one for each dimension of memory
    first_index: int


def checksum(
    tensor: Tensor,  # any strides; elements of 1, 2, 4, 8 or 16 bytes
    shape: Sequence[int] | None = None,  # the whole tensor's
    offsets: Sequence[int] | None = None,  # where in the whole `tensor` starts, by dimension
) -> int:
    """Give the checksum of a tensor, or what ``tensor`` adds to that of the whole tensor of which it is a box.

    Worked out by the native library for a tensor on a CPU, by torch elsewhere, which waits for the device once.

    Args:
        shape: Given together with ``offsets``; without them ``tensor`` is the whole.

    Raises:
        TypeError: ``tensor`` is no tensor, or ``shape`` or ``offsets`` no sequence of ints.
        ValueError: ``tensor`` holds no plain dense data, or does not stand inside ``shape`` at ``offsets``.
    """
    words = _words(tensor, shape, offsets)
    native = library.load()
    if isinstance(native, Unavailable) or words.memory.device.type != "cpu":
        return _torch_sum(words)
    return _native_sum(native, words)


def wrap_int64(value: int) -> int:
    """Give the int64 that is equal to ``value`` modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63


def _words(tensor: Tensor, shape: Sequence[int] | None, offsets: Sequence[int] | None) -> _Words:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor must be a torch.Tensor, got {type(tensor).__name__}")
    check_plain("tensor", tensor)
    whole, corner = _locate(tuple(tensor.shape), shape, offsets)
    memory = _as_integers(tensor.detach())
    if memory.dim() > tensor.dim():  # a complex128 is two words, side by side
        whole, corner = (*whole, 2), (*corner, 0)
    strides = tuple(math.prod(whole[d + 1 :]) for d in range(len(whole)))
    return _Words(memory, strides, sum(map(operator.mul, corner, strides)))


def _locate(
    sizes: tuple[int, ...], shape: Sequence[int] | None, offsets: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give the whole tensor's shape, and the corner at which a tensor of these sizes stands in it."""
    if shape is None and offsets is None:
        return sizes, (0,) * len(sizes)
    if shape is None or offsets is None:
        given, missing = ("offsets", "shape") if shape is None else ("shape", "offsets")
        raise ValueError(f"{missing} must be given together with {given}, got None")
    whole, corner = _ints("shape", shape), _ints("offsets", offsets)
    for name, values in (("shape", whole), ("offsets", corner)):
        if len(values) != len(sizes):
            raise ValueError(f"{name} must have {len(sizes)} entries, as tensor has dimensions, got {values}")
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
    """Give the memory of a tensor as integers; a conjugate or negative that is put off is worked out."""
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
    assert status == 0, f"the native library refused a box that torch has (status {status})"
    return total.value


def _torch_sum(words: _Words) -> int:
    total = torch.zeros((), dtype=torch.int64, device=words.memory.device)
    for window in _windows(words):
        total += _window_sum(window)
    return int(total)


def _windows(words: _Words) -> Iterator[_Words]:
    """Cut words into windows that are small enough, where their memory is furthest apart."""
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
        shifted &= 2 ** (64 - shift) - 1  # torch shifts the sign in
        x ^= shifted
        x *= wrap_int64(factor)
    return x.sum()
