"""The kernels of the ``triton`` backend: ``csrc/cuda/kernels.cuh`` said in Triton, with the same bits in every plane.

A persistent grid of programs takes chunks in turn. Tensors come as addresses in a table (``device.Table``), and every
element is loaded and stored as an integer of its size: what the bits mean is worked out here, so that neither a cast of
Triton's nor its interpreter's has a say in it. All arguments of the kernels are int64.
"""

import struct

import triton
import triton.language as tl

from .. import elementary

# Elements in a tile of a wide path, 16 and 8 for each of 256 threads: 4 to 8 loads of 16 bytes a thread, all under way
# before the tile's first store, in the 64 registers that leave room for four programs on a multiprocessor.
TILE = tl.constexpr(4096)
# Elements in a tile of a path whose arrays are not aligned, and of the end of a chunk.
NARROW_TILE = tl.constexpr(1024)

INT64_MAX = tl.constexpr(2**63 - 1)


def _bits(value):
    """Give a float64 as the int64 with its bits: as a literal it might be truncated to float32 on its way."""
    return tl.constexpr(struct.unpack("<q", struct.pack("<d", value))[0])


LN2_HIGH, LN2_LOW = _bits(elementary.LN2_HIGH), _bits(elementary.LN2_LOW)
INV_LN2, SQRT_HALF = _bits(elementary.INV_LN2), _bits(elementary.SQRT_HALF)
LOWEST_EXPONENT, LARGEST_LOG1P = _bits(elementary.LOWEST_EXPONENT), _bits(elementary.LARGEST_LOG1P)


def _has_fma():
    """Say whether ``tl.fma`` rounds once: not in the interpreter of older releases."""
    if not triton.knobs.runtime.interpret:
        return True
    from triton._C.libtriton import interpreter

    return hasattr(interpreter, "fma_fp32")


HAS_FMA = tl.constexpr(_has_fma())


# The weight: rule_weight in csrc/weight.h, operation by operation


@triton.jit
def double_of(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


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
    n = num_averaged.to(tl.float64)
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


# Memory


@triton.jit
def pointer_to(address, BYTES: tl.constexpr):
    """Give the pointer to integers of this size at an address."""
    if BYTES == 4:
        pointer = address.to(tl.pointer_type(tl.int32))
    elif BYTES == 2:
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.int8))
    return pointer


@triton.jit
def tile_of(address, start, BYTES: tl.constexpr, NUMEL: tl.constexpr, WIDE: tl.constexpr):
    """Give pointers to NUMEL elements from ``start`` on; told that they are aligned, the compiler moves 16 bytes."""
    pointer = pointer_to(address + start * BYTES, BYTES)
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + tl.arange(0, NUMEL)


@triton.jit
def store_tile(address, start, values, mask, BYTES: tl.constexpr, NUMEL: tl.constexpr, WIDE: tl.constexpr, PAIRED: tl.constexpr):
    if PAIRED:
        low, high = tl.split(tl.permute(tl.reshape(values, (NUMEL // 8, 2, 4)), (0, 2, 1)))
        pointer = tl.multiple_of(pointer_to(address + start * BYTES, BYTES), 16)
        pointers = pointer + (tl.arange(0, NUMEL // 8)[:, None] * 8 + tl.arange(0, 4)[None, :])
        tl.store(pointers, low)
        tl.store(pointers + 4, high)
    else:
        tl.store(tile_of(address, start, BYTES, NUMEL, WIDE), values, mask=mask)


@triton.jit
def word(address, index):
    """Read an int64 of a table."""
    return tl.load(address.to(tl.pointer_type(tl.int64)) + index)


@triton.jit
def is_aligned(addresses):
    return (addresses & 15) == 0


# Updates of one chunk


@triton.jit
def update_tile(param, first, second, start, numel, step, DTYPE: tl.constexpr, FORMAT: tl.constexpr,
                NUMEL: tl.constexpr, WIDE: tl.constexpr):
    factor, near, copy = step
    P: tl.constexpr = 4 if DTYPE == 0 else 2
    A: tl.constexpr = 4 if FORMAT == 0 else 2
    B: tl.constexpr = 2 if FORMAT == 1 else 4
    params = tile_of(param, start, P, NUMEL, WIDE)
    firsts = tile_of(first, start, A, NUMEL, WIDE)
    seconds = tile_of(second, start, B, NUMEL, WIDE)
    mask = None if WIDE else start + tl.arange(0, NUMEL) < numel
    newest = tl.load(params, mask=mask)
    old_first = tl.load(firsts, mask=mask)
    old_second = old_first if FORMAT == 0 else tl.load(seconds, mask=mask)
    average = decode(old_first, old_second, FORMAT)
    new_first, new_second = encode(lerp(average, value_of(newest, DTYPE), factor, near, copy), FORMAT)
    store_tile(first, start, new_first, mask, A, NUMEL, WIDE, WIDE and A == 4 and P == 2)
    if FORMAT != 0:
        store_tile(second, start, new_second, mask, B, NUMEL, WIDE, WIDE and B == 4)


@triton.jit
def update_chunk(tensor, offset, numel, step, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    param = word(tensor, 0) + offset * (4 if DTYPE == 0 else 2)
    first = word(tensor, 1) + offset * (4 if FORMAT == 0 else 2)
    second = word(tensor, 2) + (0 if FORMAT == 0 else offset * (2 if FORMAT == 1 else 4))
    middle = tl.where(is_aligned(param | first | second), numel // TILE * TILE, 0)
    for start in range(0, middle, TILE):
        update_tile(param, first, second, start, numel, step, DTYPE, FORMAT, TILE, True)
    for start in range(middle, numel, NARROW_TILE):
        update_tile(param, first, second, start, numel, step, DTYPE, FORMAT, NARROW_TILE, False)


@triton.jit
def update_as(tensor, offset, numel, step, fmt, DTYPE: tl.constexpr):
    if fmt == 0:
        update_chunk(tensor, offset, numel, step, DTYPE, 0)
    elif fmt == 1:
        update_chunk(tensor, offset, numel, step, DTYPE, 1)
    else:
        update_chunk(tensor, offset, numel, step, DTYPE, 2)


@triton.jit
def is_last_to_begin(state):
    tl.debug_barrier()
    pointer = state.to(tl.pointer_type(tl.int64))
    last = tl.atomic_add(pointer, 1, sem="acq_rel", scope="gpu") + 1 == tl.num_programs(0)
    if last:
        tl.store(pointer, 0)
    return last

ARGS = [f"{x}" for x in "tensors chunks num_chunks state num_averaged advance kind term0 term1 term2 term3 skip_nonfinite".split()]

@triton.jit(do_not_specialize=ARGS)
def update_kernel(tensors: tl.int64, chunks: tl.int64, num_chunks: tl.int64, state: tl.int64, num_averaged: tl.int64, advance: tl.int64, kind: tl.int64, term0: tl.int64, term1: tl.int64, term2: tl.int64, term3: tl.int64, skip_nonfinite: tl.int64):
    n = word(num_averaged, 0)
    stop = (n < 0) | (n == INT64_MAX)
    if skip_nonfinite != 0:
        stop |= word(state, 2) != 0
    last = is_last_to_begin(state)
    if last:
        if not stop:
            tl.store(num_averaged.to(tl.pointer_type(tl.int64)), n + advance)
    weight = rule_weight(kind, term0, term1, term2, term3, n).to(tl.float32)
    near = weight < 0.5
    copy = weight == 1.0
    factor = tl.where(near, weight, weight - 1.0)
    step = (factor, near, copy)
    num_chunks = tl.where(stop, 0, num_chunks)
    for i in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        tensor = tensors + word(chunks, 3 * i) * 40
        offset = word(chunks, 3 * i + 1)
        numel = word(chunks, 3 * i + 2)
        kinds = word(tensor, 4)
        dtype = kinds & 0xFFFFFFFF
        fmt = kinds >> 32
        if dtype == 0:
            update_as(tensor, offset, numel, step, fmt, 0)
        elif dtype == 1:
            update_as(tensor, offset, numel, step, fmt, 1)
        elif dtype == 2:
            update_as(tensor, offset, numel, step, fmt, 2)
