"""Normal random numbers of the ``triton`` backend: ``swafast/terms/normals.py`` said in Triton, step by step.

A fused product and sum is asked for; the compiler makes none of its own (``triton.launch_options``).
"""

import triton
import triton.language as tl

from .arithmetic import fused_multiply_add


@triton.jit
def philox_of(c0, c1, c2, c3, k0, k1):
    """Return four words of Philox4x32-10. Everything is uint32."""
    for _ in tl.static_range(10):
        first, second = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (second >> 32).to(tl.uint32) ^ c1 ^ k0, second.to(tl.uint32)
        c2, c3 = (first >> 32).to(tl.uint32) ^ c3 ^ k1, first.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words_of(key, sample, upper, lower):
    """Return the four words of the elements whose index has these halves, but for its last two bits.

    The key is an int64, and all else is uint32.
    """
    bits = key.to(tl.uint64)
    # A block's index is that of its elements, divided by 4.
    low, high = (lower >> 2) | (upper << 30), upper >> 2
    return philox_of(low, high, sample, sample * 0, bits.to(tl.uint32), (bits >> 32).to(tl.uint32))


@triton.jit
def word_of_lane(w0, w1, w2, w3, lane):
    return tl.where((lane & 2) == 0, tl.where((lane & 1) == 0, w0, w1), tl.where((lane & 1) == 0, w2, w3))


@triton.jit
def real(NUMBER: tl.constexpr):
    return tl.full((), NUMBER, tl.float32)


@triton.jit
def horner(value, x, NUMBER: tl.constexpr):
    return fused_multiply_add(value, x, real(NUMBER))


@triton.jit
def negative_log(value):
    """Return ``-log(value)`` of float32 in (0, 1]."""
    bits = value.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    series = horner(real(7.0376836292e-2), f, -1.1514610310e-1)
    series = horner(series, f, 1.1676998740e-1)
    series = horner(series, f, -1.2420140846e-1)
    series = horner(series, f, 1.4249322787e-1)
    series = horner(series, f, -1.6668057665e-1)
    series = horner(series, f, 2.0000714765e-1)
    series = horner(series, f, -2.4999993993e-1)
    series = horner(series, f, 3.3333331174e-1)
    exponents = exponent.to(tl.float32)
    rest = fused_multiply_add(exponents, real(-2.12194440e-4), series * f * square)
    rest = fused_multiply_add(square, real(-0.5), rest)
    return -fused_multiply_add(exponents, real(0.693359375), f + rest)


@triton.jit
def normal_from(word):
    """Return a normal number, float32, for each word of 32 random bits, uint32."""
    bits = word.to(tl.int32, bitcast=True)
    negative = bits < 0
    magnitude = tl.where(negative, ~bits, bits)
    half = (magnitude.to(tl.float32) + 0.5) * 2.0**-32  # |p - 1/2|
    tail = (0x7FFFFFFF - magnitude).to(tl.float32) * 2.0**-32 + 2.0**-33  # 1/2 - that, not rounded away
    c = horner(-half, half, 0.180625)
    t = tl.sqrt_rn(negative_log(tail)) - 1.6
    inner = horner(real(5.9109374720e1), c, 1.5929113202e2)
    inner = horner(inner, c, 5.0434271938e1)
    inner = horner(inner, c, 3.3871327179) * half
    inner_divisor = horner(real(6.7187563600e1), c, 7.8757757664e1)
    inner_divisor = horner(inner_divisor, c, 1.7895169469e1)
    inner_divisor = horner(inner_divisor, c, 1.0)
    outer = horner(real(1.7023821103e-1), t, 1.3067284816)
    outer = horner(outer, t, 2.7568153900)
    outer = horner(outer, t, 1.4234372777)
    outer_divisor = horner(real(1.2021132975e-1), t, 7.3700164250e-1)
    outer_divisor = horner(outer_divisor, t, 1.0)
    # 0.425: the interpreter would compare with the float64.
    is_inner = half <= real(0.425)
    normal = tl.div_rn(tl.where(is_inner, inner, outer), tl.where(is_inner, inner_divisor, outer_divisor))
    return tl.where(negative, -normal, normal)
