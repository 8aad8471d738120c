"""Normal random numbers, the same bits on every machine and backend.

They depend only on a key, the sample's index and the element's row-major index in the whole param: neither ranks nor
chunks nor the order of memory matter. ``csrc/normal.h`` has the same functions for the kernels.

The bits are Philox4x32-10's: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3",
https://doi.org/10.1145/2063384.2063405. They become normal by the inverse of the distribution function: Wichura 1988,
"Algorithm AS 241", https://doi.org/10.2307/2347330, of which this is PPND7.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_MASK = 2**32 - 1

#: Streams of one key: of the elements of a param, and of the columns of deviations.
ELEMENTS, COLUMNS = 0, 1


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four words of Philox4x32-10 for each counter of four words: all int64 with values below 2^32.

    Args:
        key: 64 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32
    for _ in range(10):
        # int64 wraps: the bits of the unsigned product are right all the same.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((second >> 32) & _MASK) ^ c1 ^ k0, second & _MASK
        c2, c3 = ((first >> 32) & _MASK) ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def random_words(key: int, sample: int, index: Tensor, stream: int = ELEMENTS) -> Tensor:
    """Return 32 random bits, as int64, for each element of ``index``: int64 row-major indices in the whole param."""
    block = index >> 2
    same = torch.zeros_like(index)
    words = philox((block & _MASK, block >> 32, same + sample, same + stream), key)
    lane = index & 3
    return torch.where(lane < 2, torch.where(lane == 0, *words[:2]), torch.where(lane == 2, *words[2:]))


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Return ``a * b + c`` of float32, rounded once.

    The product is exact in float64. Where the sum is not, it gets an odd last bit, and float32 then rounds as if it had
    seen all of it.
    """
    product = a.to(torch.float64) * (b.to(torch.float64) if isinstance(b, Tensor) else b)
    addend = c.to(torch.float64) if isinstance(c, Tensor) else torch.full_like(product, c)
    total = product + addend
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    bits = total.contiguous().view(torch.int64)
    beyond = ((lost < 0) & (total > 0)) | ((lost > 0) & (total < 0))
    odd = ((bits - beyond.to(torch.int64)) | 1).view(torch.float64)
    return torch.where((lost < 0) | (lost > 0), odd, total).to(torch.float32)


def square_root(value: Tensor) -> Tensor:
    """Return the square root of float32, rounded once.

    torch's own of float32 is off by a unit in the last place for some values, on a CPU. float64 has more than twice the
    digits, so rounding its square root again changes nothing.
    """
    return value.to(torch.float64).sqrt().to(torch.float32)


def float32(value: float) -> float:
    """Return a number as the kernels have it: rounded to float32."""
    return ctypes.c_float(value).value


def _polynomial(x: Tensor, *coefficients: float) -> Tensor:
    """Return the polynomial of these coefficients, the highest first, by Horner's rule with one fma each."""
    value = torch.full_like(x, float32(coefficients[0]))
    for coefficient in coefficients[1:]:
        value = fma(value, x, float32(coefficient))
    return value


def _negative_log(value: Tensor) -> Tensor:
    """Return ``-log(value)`` of float32 in (0, 1], with the polynomial of Cephes' logf (https://netlib.org/cephes)."""
    bits = value.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    square = f * f
    series = _polynomial(
        f,
        *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
        *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
    )
    exponents = exponent.to(torch.float32)
    rest = fma(exponents, float32(-2.12194440e-4), series * f * square)
    rest = fma(square, -0.5, rest)
    return -fma(exponents, 0.693359375, f + rest)


def normal_of(words: Tensor) -> Tensor:
    """Return a normal number, float32, for each word: int64 with 32 random bits. Words 2^32 - 1 - w and w are opposite.

    The relative error is at most 4e-7. Both ends of the distribution are worked out, and one is chosen.
    """
    negative = words >= 2**31
    magnitude = torch.where(negative, _MASK - words, words)
    half = (magnitude.to(torch.float32) + 0.5) * 2.0**-32  # |p - 1/2|
    tail = (0x7FFFFFFF - magnitude).to(torch.float32) * 2.0**-32 + 2.0**-33  # 1/2 - that, not rounded away
    c = fma(-half, half, float32(0.180625))
    t = square_root(_negative_log(tail)) - float32(1.6)
    inner = _polynomial(c, 5.9109374720e1, 1.5929113202e2, 5.0434271938e1, 3.3871327179) * half
    inner_divisor = _polynomial(c, 6.7187563600e1, 7.8757757664e1, 1.7895169469e1, 1.0)
    outer = _polynomial(t, 1.7023821103e-1, 1.3067284816, 2.7568153900, 1.4234372777)
    outer_divisor = _polynomial(t, 1.2021132975e-1, 7.3700164250e-1, 1.0)
    is_inner = half <= float32(0.425)
    normal = torch.where(is_inner, inner, outer) / torch.where(is_inner, inner_divisor, outer_divisor)
    return torch.where(negative, -normal, normal)


def normals(key: int, sample: int, index: Tensor, stream: int = ELEMENTS) -> Tensor:
    """Return a normal number, float32, for each element of ``index``, as :func:`random_words`."""
    return normal_of(random_words(key, sample, index, stream))
