"""Arithmetic of the ``triton`` backend: ``csrc/weight.h`` and ``csrc/element.h`` said in Triton, step by step.

Elements are integers of their size until here, so that neither a cast of Triton's nor its interpreter's has a say in
what their bits mean. The compiler must not fuse a product into a sum (``triton.launch_options``).
"""

import struct

import triton
import triton.language as tl

from .. import elementary


def _bits(value):
    """Give a float64 as the int64 with its bits: as a literal it might be truncated to float32 on its way."""
    return tl.constexpr(struct.unpack("<q", struct.pack("<d", value))[0])


LN2_HIGH, LN2_LOW = _bits(elementary.LN2_HIGH), _bits(elementary.LN2_LOW)
INV_LN2, SQRT_HALF = _bits(elementary.INV_LN2), _bits(elementary.SQRT_HALF)
LOWEST_EXPONENT, LARGEST_LOG1P = _bits(elementary.LOWEST_EXPONENT), _bits(elementary.LARGEST_LOG1P)


@triton.jit
def double_of(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


#: Whether Triton interprets: both, if it was told to between its import and this one, and nothing can run then.
interpreted = {not isinstance(function, triton.runtime.JITFunction) for function in (tl.max, double_of)}


def _has_fma():
    """Say whether ``tl.fma`` rounds once: not in the interpreter of older releases (3.6, say)."""
    if interpreted != {True}:
        return True
    from triton._C.libtriton import interpreter

    return hasattr(interpreter, "fma_fp32")


HAS_FMA = tl.constexpr(_has_fma())


# The weight: rule_weight in csrc/weight.h


@triton.jit
def literal(BITS: tl.constexpr):
    return tl.full((), BITS, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def whole(NUMBER: tl.constexpr):
    return tl.full((), NUMBER, tl.int64).to(tl.float64)


@triton.jit
def log1p_of(x):
    """Give ``log(1 + x)`` for ``x >= 0``."""
    one = whole(1)
    x = tl.where(x < literal(LARGEST_LOG1P), x, literal(LARGEST_LOG1P))
    y = one + x
    part = y - one
    lost = (one - (y - part)) + (x - part)
    bits = y.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) - 1022
    mantissa = double_of((bits & 0xFFFFFFFFFFFFF) | (1022 << 52))
    low = mantissa < literal(SQRT_HALF)
    mantissa = tl.where(low, mantissa + mantissa, mantissa)
    e = tl.where(low, exponent - 1, exponent).to(tl.float64)
    f = mantissa - one
    s = f / (whole(2) + f)
    z = s * s
    series = whole(0)
    for k in tl.static_range(21, 1, -2):
        series = (series + whole(2) / whole(k)) * z
    near = f - s * (f - series)
    return e * literal(LN2_HIGH) + (near + (e * literal(LN2_LOW) + lost / y))


@triton.jit
def exp_scale(k):
    return double_of((k.to(tl.int64) + 1023) << 52)


@triton.jit
def exp_parts(x):
    """Give ``(scale, rest)`` with ``e**x = scale + scale * rest`` for ``x <= 0``."""
    tiny = x < literal(LOWEST_EXPONENT)
    x = tl.where(tiny, whole(0), x)
    k = tl.floor(x * literal(INV_LN2) + whole(1) / whole(2))
    r = (x - k * literal(LN2_HIGH)) - k * literal(LN2_LOW)
    series = whole(0)
    factorial = whole(87178291200)  # 14!
    for n in tl.static_range(14, 1, -1):
        series = series * r + whole(1) / factorial
        factorial = factorial / whole(n)
    rest = r + (r * r) * series
    return tl.where(tiny, whole(0), exp_scale(k)), tl.where(tiny, whole(0), rest)


@triton.jit
def clamp_weight(weight, low, high):
    return tl.where(weight < low, low, tl.where(weight > high, high, weight))


@triton.jit
def rule_weight(kind, term0, term1, term2, term3, num_averaged):
    """Give the weight of the newest model as float64, for a rule of ``rules.KernelTerms``.

    The terms come as the int64 with the bits of each float64.
    """
    one = whole(1)
    n = tl.where(num_averaged > 0, num_averaged, 1).to(tl.float64)
    weight = double_of(term0)
    if kind == 1:
        weight = one / (n + one)
    elif kind == 2:
        scale, rest = exp_parts(-double_of(term3) * log1p_of(n / double_of(term2)))
        weight = clamp_weight(scale + scale * rest, double_of(term0), double_of(term1))
    elif kind == 3:
        weight = clamp_weight(whole(9) / (whole(10) + n), double_of(term0), double_of(term1))
    elif kind == 4:
        scale, rest = exp_parts(-(double_of(term0) + one) * log1p_of(one / n))
        weight = -((scale - one) + scale * rest)
    # the first update copies, whatever the rule
    return tl.where(num_averaged == 0, one, weight)


# Elements: csrc/element.h


@triton.jit
def fused_multiply_add(a, b, c):
    if HAS_FMA:
        return tl.fma(a, b, c)
    # The product is exact in float64. Where the sum is not, it gets an odd last bit, and float32 then rounds as if it
    # had seen all of it.
    product, c = a.to(tl.float64) * b.to(tl.float64), c.to(tl.float64)
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    bits = total.to(tl.int64, bitcast=True)
    beyond = ((lost < 0) & (total > 0)) | ((lost > 0) & (total < 0))
    odd = (bits - beyond.to(tl.int64)) | 1
    return double_of(tl.where((lost < 0) | (lost > 0), odd, bits)).to(tl.float32)


@triton.jit
def step_of(weight):
    """Give (factor of the difference, whether the average is the nearer end, whether to copy) for a float64 weight."""
    rounded = weight.to(tl.float32)
    near = rounded < 0.5
    return tl.where(near, rounded, rounded - 1.0), near, rounded == 1.0


@triton.jit
def lerp(average, param, factor, near, copy):
    """Give ``average + weight * (param - average)`` as torch.lerp rounds it; at weight 1 a copy."""
    moved = fused_multiply_add(factor, param - average, tl.where(near, average, param))
    return tl.where(copy, param, moved)


@triton.jit
def value_of(bits, DTYPE: tl.constexpr):
    """Give the float32 value of a param's bits."""
    if DTYPE == 0:
        value = bits.to(tl.float32, bitcast=True)
    elif DTYPE == 1:
        value = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def decode(first, second, FORMAT: tl.constexpr):
    """Give the float32 average that planes hold as bits."""
    if FORMAT == 0:
        value = first.to(tl.float32, bitcast=True)
    elif FORMAT == 1:
        high = first.to(tl.int32) << 16
        joined = (high + second.to(tl.int32)).to(tl.float32, bitcast=True)
        # No encoder makes a pair that reads as NaN where the bf16 is none: the remainder is stale.
        value = tl.where(joined == joined, joined, high.to(tl.float32, bitcast=True))
    else:
        average = second.to(tl.float32, bitcast=True)
        copy = first.to(tl.float16, bitcast=True)
        own = average.to(tl.float16).to(tl.int16, bitcast=True)
        # A copy that is not the average's own was written behind our back, and is what the average is to be.
        value = tl.where(first == own, average, copy.to(tl.float32))
    return value


@triton.jit
def encode(value, FORMAT: tl.constexpr):
    """Give the bits of both planes; without a second plane, the first one's again."""
    bits = value.to(tl.int32, bitcast=True)
    if FORMAT == 0:
        first, second = bits, bits
    elif FORMAT == 1:
        # A NaN keeps its sign and nothing else: rounding its payload up could run over into the sign.
        bits = tl.where(value == value, bits, (bits & -0x80000000) | 0x7FC00000)
        first, second = ((bits + 0x8000) >> 16).to(tl.int16), bits.to(tl.int16)
    else:
        first, second = value.to(tl.float16).to(tl.int16, bitcast=True), bits
    return first, second
