"""Arithmetic of the ``triton`` backend: ``csrc/weight.h`` and ``csrc/element.h`` said in Triton, step by step.

Elements are integers of their size until here, so that neither a cast of Triton's nor its interpreter's has a say in
what their bits mean. The compiler must not fuse a product into a sum (``triton.launch_options``).
"""

import struct

import triton
import triton.language as tl

from ...terms import weight


def _bits(value):
    """Return a float64 constant as its bits, an int64. Triton may round a float literal to float32."""
    return tl.constexpr(struct.unpack("<q", struct.pack("<d", value))[0])


LN2_HIGH, LN2_LOW = _bits(weight.LN2_HIGH), _bits(weight.LN2_LOW)
INV_LN2, SQRT_HALF, HALF_PI = _bits(weight.INV_LN2), _bits(weight.SQRT_HALF), _bits(weight.HALF_PI)
LOWEST_EXPONENT, LARGEST_LOG1P = _bits(weight.LOWEST_EXPONENT), _bits(weight.LARGEST_LOG1P)


@triton.jit
def double_of(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


#: Whether Triton interprets: both, if it was told to between its import and this one, and nothing can run then.
interpreted = {not isinstance(function, triton.runtime.JITFunction) for function in (tl.max, double_of)}


def _has_fma():
    """Return whether ``tl.fma`` rounds once. The interpreter of older releases rounds twice."""
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
    """Return ``log(1 + x)`` for ``x >= 0``."""
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
def exp_parts_of(x):
    """Return ``(scale, rest)`` with ``e**x = scale + scale * rest``, for ``x <= 0``."""
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
def sine_of(x):
    """Return ``sin(pi / 2 * x)`` for ``0 <= x <= 1``."""
    one = whole(1)
    r = literal(HALF_PI) * x
    z = r * r
    series = one
    for k in tl.static_range(24, 0, -2):
        series = one - (z * (one / whole(k * (k + 1)))) * series
    return r * series


@triton.jit
def clamp_weight(weight, low, high):
    return tl.where(weight < low, low, tl.where(weight > high, high, weight))


@triton.jit
def rule_weight(kind, term0, term1, term2, term3, num_averaged):
    """Return the weight of the newest model, a float64, by the terms of ``weight.KernelTerms``.

    The terms come as the int64 with the bits of each float64.
    """
    one = whole(1)
    n = tl.where(num_averaged > 0, num_averaged, 1).to(tl.float64)
    weight = double_of(term0)
    if kind == 1:
        weight = one / (n + one)
    elif kind == 2:
        scale, rest = exp_parts_of(-double_of(term3) * log1p_of(n / double_of(term2)))
        weight = clamp_weight(scale + scale * rest, double_of(term0), double_of(term1))
    elif kind == 3:
        weight = clamp_weight(whole(9) / (whole(10) + n), double_of(term0), double_of(term1))
    elif kind == 4:
        scale, rest = exp_parts_of(-(double_of(term0) + one) * log1p_of(one / n))
        weight = -((scale - one) + scale * rest)
    elif kind == 5:
        scale, rest = exp_parts_of(-(n / double_of(term2)))
        low = double_of(term0)
        weight = clamp_weight(low + (one - low) * (scale + scale * rest), low, double_of(term1))
    elif kind >= 6:
        updates = double_of(term1)
        left = tl.where(n < updates, updates - n, whole(0)) / updates
        sine = sine_of(left)
        weight = double_of(term0) * tl.where(kind == 6, sine * sine, left)
    # the first update copies, whatever the rule
    return tl.where(num_averaged == 0, one, weight)


# Elements: csrc/element.h. The formats have the numbers of csrc/swafast.h.

FLOAT32, EXACT, MIRRORED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
COMPACT, COMPENSATED, HALF = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)


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
def blend_of(weight):
    """Return the numbers that a lerp needs, for a float64 weight.

    That is the factor of the difference, whether the average is the nearer end, and whether to copy.
    """
    rounded = weight.to(tl.float32)
    near = rounded < 0.5
    return tl.where(near, rounded, rounded - 1.0), near, rounded == 1.0


@triton.jit
def lerp(average, param, factor, near, copy):
    """Return ``average + weight * (param - average)``, rounded as torch.lerp does; at weight 1, the param."""
    moved = fused_multiply_add(factor, param - average, tl.where(near, average, param))
    return tl.where(copy, param, moved)


@triton.jit
def lerp_precisely(average, param, weight):
    """Return the same for a float64 average. The product and the sum are each rounded."""
    newest = param.to(tl.float64)
    distance = weight * (newest - average)
    return tl.where(weight == whole(1), newest, average + distance)


@triton.jit
def value_of(bits, DTYPE: tl.constexpr):
    """Return the float32 value of a param's bits."""
    if DTYPE == 0:
        value = bits.to(tl.float32, bitcast=True)
    elif DTYPE == 1:
        value = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def joined(first, low):
    """Return the float32 with a bf16's bits as its upper half, plus a signed remainder."""
    high = first.to(tl.int32) << 16
    value = (high + low).to(tl.float32, bitcast=True)
    # No encoder makes a pair that reads as NaN where the bf16 is none: the remainder is stale.
    return tl.where(value == value, value, high.to(tl.float32, bitcast=True))


@triton.jit
def decode(first, second, FORMAT: tl.constexpr):
    """Return the average that the planes' bits hold: float32, or float64 for ``compensated``."""
    if FORMAT == FLOAT32:
        value = first.to(tl.float32, bitcast=True)
    elif FORMAT == EXACT:
        value = joined(first, second.to(tl.int32))
    elif FORMAT == MIRRORED:
        average = second.to(tl.float32, bitcast=True)
        copy = first.to(tl.float16, bitcast=True)
        own = average.to(tl.float16).to(tl.int16, bitcast=True)
        # A copy that is not the average's own was written behind our back, and is what the average is to be.
        value = tl.where(first == own, average, copy.to(tl.float32))
    elif FORMAT == COMPACT:
        value = joined(first, second.to(tl.int32) << 8)
    elif FORMAT == COMPENSATED:
        average = first.to(tl.float32, bitcast=True)
        both = average.to(tl.float64) + second.to(tl.float32, bitcast=True).to(tl.float64)
        # A compensation that the encoder would not have left: the first plane was written behind our back.
        value = tl.where(both.to(tl.float32) == average, both, average.to(tl.float64))
    else:
        value = (first.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def quiet_bits(value):
    """Return the bits of a float32; of a NaN only the sign is kept, since its payload could round up into the sign."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value == value, bits, (bits & -0x80000000) | 0x7FC00000)


@triton.jit
def round_at_random(value, random):
    """Return the bits of a float32 plus random bits, as many as are cut off later. A finite value stays finite."""
    bits = quiet_bits(value)
    rounded = bits + random.to(tl.int32)
    return tl.where((rounded & 0x7F800000) == 0x7F800000, bits, rounded)


@triton.jit
def cut_to_float(value):
    """Return a float64 without the mantissa bits that a float32 cannot hold."""
    return double_of(value.to(tl.int64, bitcast=True) & -0x20000000)


@triton.jit
def encode(value, random, FORMAT: tl.constexpr):
    """Return the bits of both planes; without a second plane, those of the first one twice.

    ``random`` has as many bits as a format that is rounded at random cuts off, as uint32.
    """
    if FORMAT == FLOAT32:
        first = value.to(tl.int32, bitcast=True)
        second = first
    elif FORMAT == EXACT:
        bits = quiet_bits(value)
        first, second = ((bits + 0x8000) >> 16).to(tl.int16), bits.to(tl.int16)
    elif FORMAT == MIRRORED:
        first, second = value.to(tl.float16).to(tl.int16, bitcast=True), value.to(tl.int32, bitcast=True)
    elif FORMAT == COMPACT:
        bits = round_at_random(value, random)
        first, second = ((bits + 0x8000) >> 16).to(tl.int16), (bits >> 8).to(tl.int8)
    elif FORMAT == COMPENSATED:
        average = value.to(tl.float32)
        # Cut, not rounded: rounded up to half a unit it could make the sum round to another float32 than the average.
        left_over = cut_to_float(value - average.to(tl.float64)).to(tl.float32)
        # An infinity or a NaN leaves nothing over.
        left_over = tl.where(average - average == 0.0, left_over, 0.0)
        first, second = average.to(tl.int32, bitcast=True), left_over.to(tl.int32, bitcast=True)
    else:
        first = (round_at_random(value, random) >> 16).to(tl.int16)
        second = first
    return first, second
