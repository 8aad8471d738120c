"""The kernels of the ``triton`` backend: ``csrc/cuda/kernels.cuh`` said in Triton, with the same bits in every plane.

A persistent grid of programs takes chunks in turn; one launch serves tensors of every dtype and format. Tensors come as
addresses in a table (``device.Table``). All arguments of the kernels are int64, and none is specialised on: no value
makes the compiler work anew.

The loops are written with ``while``, since ``range`` over a scalar fails in the interpreter of Triton 3.6 with a recent
numpy; the machine code is the same.
"""

import triton
import triton.language as tl

from .triton_arithmetic import decode, encode, interpreted, lerp, rule_weight, step_of, value_of

__all__ = ["VERSION", "exchange_kernel", "forget_nonfinite_kernel", "interpreted", "nonfinite_kernel", "update_kernel"]

VERSION = triton.__version__

# Elements in a tile of a wide path, 16 for each of 256 threads: 6 to 10 loads of 16 bytes a thread (4 where bytes are
# copied), all under way before the tile's first store, in the 64 registers that leave room for four programs on a
# multiprocessor.
TILE = tl.constexpr(4096)
# Elements in a tile of a path whose arrays are not aligned, and of the end of a chunk.
NARROW_TILE = tl.constexpr(1024)

INT64_MAX = tl.constexpr(2**63 - 1)


# Memory


@triton.jit
def pointer_to(address, BYTES: tl.constexpr):
    """Give the pointer to integers of this size at an address."""
    if BYTES == 8:
        pointer = address.to(tl.pointer_type(tl.int64))
    elif BYTES == 4:
        pointer = address.to(tl.pointer_type(tl.int32))
    elif BYTES == 2:
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.int8))
    return pointer


@triton.jit
def word(address, index):
    """Read an int64 of a table."""
    return tl.load(pointer_to(address, 8) + index)


@triton.jit
def places(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Give the indices of a tile's elements, consecutive ones along the rows.

    A path's tiles have a shape that no path with other sizes of elements has: the compiler gives accesses of one shape
    to one thread's elements in common, and 4-byte elements alone would be moved with gaps.
    """
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def tile_of(pointer, start, indices, WIDE: tl.constexpr):
    """Give pointers to the elements of a tile from ``start`` on."""
    pointer += start
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)  # told so, the compiler moves 16 bytes at a time
    return pointer + indices


@triton.jit
def store_halves(pointer, start, values, NUMEL: tl.constexpr):
    """Store a wide tile of 4-byte elements of which each thread holds 8 in a row, as beside 2-byte ones.

    The compiler stores 16 bytes a thread: not told how, it would carry every second four through shared memory.
    """
    near, far = tl.split(tl.permute(tl.reshape(values, (NUMEL // 8, 2, 4)), (0, 2, 1)))
    pointers = tile_of(pointer, start, tl.arange(0, NUMEL // 8)[:, None] * 8 + tl.arange(0, 4)[None, :], True)
    tl.store(pointers, near, cache_modifier=".cs")
    tl.store(pointers + 4, far, cache_modifier=".cs")


# One chunk. Params stay in the caches, where the next forward pass looks for them; averages leave them first.


@triton.jit
def update_tile(pointers, start, numel, step, indices, DTYPE: tl.constexpr, FORMAT: tl.constexpr, WIDE: tl.constexpr):
    param, first, second = pointers
    factor, near, copy = step
    params = tile_of(param, start, indices, WIDE)
    firsts = tile_of(first, start, indices, WIDE)
    seconds = tile_of(second, start, indices, WIDE)
    mask = None if WIDE else start + indices < numel
    newest = tl.load(params, mask=mask)
    old_first = tl.load(firsts, mask=mask, eviction_policy="evict_first")
    old_second = old_first if FORMAT == 0 else tl.load(seconds, mask=mask, eviction_policy="evict_first")
    average = decode(old_first, old_second, FORMAT)
    new_first, new_second = encode(lerp(average, value_of(newest, DTYPE), factor, near, copy), FORMAT)
    if WIDE and FORMAT == 0 and DTYPE != 0:
        store_halves(first, start, new_first, 4096)
    else:
        tl.store(firsts, new_first, mask=mask, cache_modifier=".cs")
    if WIDE and FORMAT == 2:
        store_halves(second, start, new_second, 4096)
    elif FORMAT != 0:
        tl.store(seconds, new_second, mask=mask, cache_modifier=".cs")


@triton.jit
def update_chunk(tensor, offset, numel, step, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """Update a chunk: whole tiles 16 bytes at a time where all arrays are aligned, the rest element by element."""
    PARAM_BYTES: tl.constexpr = 4 if DTYPE == 0 else 2
    FIRST_BYTES: tl.constexpr = 4 if FORMAT == 0 else 2
    SECOND_BYTES: tl.constexpr = 0 if FORMAT == 0 else 2 if FORMAT == 1 else 4
    param = word(tensor, 0) + offset * PARAM_BYTES
    first = word(tensor, 1) + offset * FIRST_BYTES
    second = word(tensor, 2) + offset * SECOND_BYTES
    pointers = (pointer_to(param, PARAM_BYTES), pointer_to(first, FIRST_BYTES), pointer_to(second, SECOND_BYTES))
    middle = tl.where(((param | first | second) & 15) == 0, numel // TILE * TILE, 0)
    indices = places(4, TILE // 4) if DTYPE == 0 and FORMAT == 0 else places(2, TILE // 2)
    start = middle * 0
    while start < middle:
        update_tile(pointers, start, middle, step, indices, DTYPE, FORMAT, True)
        start += TILE
    indices = places(1, NARROW_TILE)
    while start < numel:
        update_tile(pointers, start, numel, step, indices, DTYPE, FORMAT, False)
        start += NARROW_TILE


@triton.jit
def update_as(tensor, offset, numel, step, fmt, DTYPE: tl.constexpr):
    if fmt == 0:
        update_chunk(tensor, offset, numel, step, DTYPE, 0)
    elif fmt == 1:
        update_chunk(tensor, offset, numel, step, DTYPE, 1)
    else:
        update_chunk(tensor, offset, numel, step, DTYPE, 2)


@triton.jit
def move_tile(param, average, start, numel, indices, EXCHANGE: tl.constexpr, WIDE: tl.constexpr):
    params, averages = tile_of(param, start, indices, WIDE), tile_of(average, start, indices, WIDE)
    mask = None if WIDE else start + indices < numel
    newest = tl.load(params, mask=mask)
    if EXCHANGE:
        old = tl.load(averages, mask=mask, eviction_policy="evict_first")
        tl.store(params, old, mask=mask)
    tl.store(averages, newest, mask=mask, cache_modifier=".cs")


@triton.jit
def move_chunk(tensor, offset, numel, BYTES: tl.constexpr, EXCHANGE: tl.constexpr):
    """Copy the bytes of a chunk's param to its average, or exchange the two, whatever the bytes mean."""
    param, average = word(tensor, 0) + offset * BYTES, word(tensor, 1) + offset * BYTES
    num_words = tl.where(((param | average) & 15) == 0, numel * BYTES // (4 * TILE) * TILE, 0)
    indices = places(4, TILE // 4)
    start = num_words * 0
    while start < num_words:
        move_tile(pointer_to(param, 4), pointer_to(average, 4), start, num_words, indices, EXCHANGE, True)
        start += TILE
    start = num_words * 4 // BYTES
    indices = places(1, NARROW_TILE)
    while start < numel:
        move_tile(pointer_to(param, BYTES), pointer_to(average, BYTES), start, numel, indices, EXCHANGE, False)
        start += NARROW_TILE


@triton.jit
def has_all(bits, EXPONENT: tl.constexpr):
    return ((bits & EXPONENT) == EXPONENT).to(tl.int32)


@triton.jit
def holds_nonfinite(tensor, offset, numel, EXPONENT: tl.constexpr, BYTES: tl.constexpr):
    """Give 1 if a chunk of a param holds a NaN or an infinity, an exponent of all ones, else 0."""
    param = word(tensor, 0) + offset * BYTES
    num_words = tl.where((param & 15) == 0, numel * BYTES // (4 * TILE) * TILE, 0)
    indices = places(4, TILE // 4)
    bad = indices * 0
    start = num_words * 0
    while start < num_words:
        bits = tl.load(tile_of(pointer_to(param, 4), start, indices, True))
        bad |= has_all(bits, EXPONENT)
        if BYTES == 2:
            bad |= has_all(bits, EXPONENT << 16)
        start += TILE
    start = num_words * 4 // BYTES
    indices = places(1, NARROW_TILE)
    bad_end = indices * 0
    while start < numel:
        bits = tl.load(tile_of(pointer_to(param, BYTES), start, indices, False), mask=start + indices < numel, other=0)
        bad_end |= has_all(bits.to(tl.int32), EXPONENT)
        start += NARROW_TILE
    return tl.max(bad) | tl.max(bad_end)


# Launches. The tables' words are those of csrc/swafast.h: 5 for a tensor, 3 for a chunk, 3 for the state.


@triton.jit
def row_of(tensors, chunks, index):
    """Give (index of the tensor, address of its row, offset, numel, dtype, format) of a chunk."""
    tensor = word(chunks, 3 * index)
    row = tensors + 40 * tensor
    kinds = word(row, 4)
    return tensor, row, word(chunks, 3 * index + 1), word(chunks, 3 * index + 2), kinds & 0xFFFFFFFF, kinds >> 32


@triton.jit
def is_last_to_begin(state):
    """Count this program; say whether it is the last of its launch to have read the words that the launch changes.

    The count goes on from launch to launch, each of as many programs, as in ``csrc/cuda/kernels.cuh``.
    """
    tl.debug_barrier()  # every thread of the program has read
    begun = tl.atomic_add(pointer_to(state, 8), 1, sem="acq_rel", scope="gpu") + 1
    return begun % tl.num_programs(0) == 0


TABLE = ["tensors", "chunks", "num_chunks", "state"]
RULE = ["kind", "term0", "term1", "term2", "term3"]


@triton.jit(do_not_specialize=[*TABLE, "num_averaged", "advance", *RULE, "skip_nonfinite"])
def update_kernel(
    tensors: tl.int64,
    chunks: tl.int64,
    num_chunks: tl.int64,
    state: tl.int64,
    num_averaged: tl.int64,
    advance: tl.int64,
    kind: tl.int64,
    term0: tl.int64,
    term1: tl.int64,
    term2: tl.int64,
    term3: tl.int64,
    skip_nonfinite: tl.int64,
):
    """Move every average towards its param by the rule's weight, and count, as ``swafast_cuda_update`` does."""
    n = word(num_averaged, 0)
    stop = (n < 0) | (n == INT64_MAX) | ((skip_nonfinite != 0) & (word(state, 2) != 0))
    if is_last_to_begin(state) and not stop:
        tl.store(pointer_to(num_averaged, 8), n + advance)
    step = step_of(rule_weight(kind, term0, term1, term2, term3, n))
    end = tl.where(stop, 0, num_chunks)
    i = tl.program_id(0).to(tl.int64)
    while i < end:
        _tensor, row, offset, numel, dtype, fmt = row_of(tensors, chunks, i)
        if dtype == 0:
            update_as(row, offset, numel, step, fmt, 0)
        elif dtype == 1:
            update_as(row, offset, numel, step, fmt, 1)
        elif dtype == 2:
            update_as(row, offset, numel, step, fmt, 2)
        else:
            move_chunk(row, offset, numel, 1, False)
        i += tl.num_programs(0)


@triton.jit(do_not_specialize=[*TABLE, "wanted"])
def exchange_kernel(tensors: tl.int64, chunks: tl.int64, num_chunks: tl.int64, state: tl.int64, wanted: tl.int64):
    """Have every param and plane 0 change places, unless they are as ``wanted`` already."""
    end = tl.where(word(state, 1) == wanted, 0, num_chunks)
    if is_last_to_begin(state):
        tl.store(pointer_to(state, 8) + 1, wanted)
    i = tl.program_id(0).to(tl.int64)
    while i < end:
        _tensor, row, offset, numel, dtype, _fmt = row_of(tensors, chunks, i)
        if dtype == 0:
            move_chunk(row, offset, numel, 4, True)
        elif dtype == 3:
            move_chunk(row, offset, numel, 1, True)
        else:
            move_chunk(row, offset, numel, 2, True)
        i += tl.num_programs(0)


@triton.jit(do_not_specialize=["state"])
def forget_nonfinite_kernel(state: tl.int64):
    tl.store(pointer_to(state, 8) + 2, 0)


@triton.jit(do_not_specialize=[*TABLE, "num_tensors"])
def nonfinite_kernel(tensors: tl.int64, chunks: tl.int64, num_chunks: tl.int64, state: tl.int64, num_tensors: tl.int64):
    """Fill in the state's ``nonfinite``, which is 0 before. Copied tensors do not count."""
    i = tl.program_id(0).to(tl.int64)
    while i < num_chunks:
        tensor, row, offset, numel, dtype, _fmt = row_of(tensors, chunks, i)
        bad = 0
        if dtype == 0:
            bad = holds_nonfinite(row, offset, numel, 0x7F800000, 4)
        elif dtype == 1:
            bad = holds_nonfinite(row, offset, numel, 0x7F80, 2)
        elif dtype == 2:
            bad = holds_nonfinite(row, offset, numel, 0x7C00, 2)
        if bad != 0:
            tl.atomic_max(pointer_to(state, 8) + 2, num_tensors - tensor)
        i += tl.num_programs(0)
