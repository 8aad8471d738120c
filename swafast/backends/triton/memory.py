"""Memory as the kernels of the ``triton`` backend see it: addresses in tables, tiles of elements.

Elements are integers of their size.
"""

import inspect

import triton
import triton.language as tl

# Elements in a tile of a wide path, 16 for each of 256 threads: 4 to 10 loads of 16 bytes a thread, all under way
# before the tile's first store, in the 64 registers that leave room for four programs on a multiprocessor.
TILE = tl.constexpr(4096)
# Of 12 bytes an element, worked out in float64, half as many fit: 5 or 6 loads.
COMPENSATED_TILE = tl.constexpr(2048)
# Elements in a tile of a path whose arrays are not aligned, and of the end of a chunk.
NARROW_TILE = tl.constexpr(1024)


def launched(kernel):
    """Make a kernel of a function of int64, whose values it is not specialised on: one compilation serves them all."""
    return triton.jit(kernel, do_not_specialize=list(inspect.signature(kernel).parameters))


@triton.jit
def pointer_to(address, BYTES: tl.constexpr):
    """Return a pointer to integers of ``BYTES`` bytes at an address."""
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
def tile_indices(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the indices of a tile's elements; they count up along the rows.

    Paths with elements of different sizes have tiles of different shapes. The compiler distributes accesses of one
    shape over the threads in one way, and in a shared shape 4-byte elements would be moved with gaps.
    """
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def tile_of(pointer, start, indices, WIDE: tl.constexpr):
    """Return pointers to the elements of the tile that begins at ``start``."""
    pointer += start
    # Told so, the compiler moves 16 bytes at a time; 8 of bytes, as many elements as a thread has of 2 bytes each.
    if WIDE and pointer.dtype.element_ty == tl.int8:
        pointer = tl.multiple_of(pointer, 8)
    elif WIDE:
        pointer = tl.multiple_of(pointer, 16)
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


# The tables' words are those of csrc/swafast.h: 7 for a tensor, 5 for a chunk, 6 for a pace, 3 for the state.


@triton.jit
def row_of(tensors, index):
    return tensors + 56 * index


@triton.jit
def chunk_of(chunks, index):
    return chunks + 40 * index


@triton.jit
def pace_of(paces, index):
    return paces + 48 * index


@triton.jit
def low_of(pair):
    """Return the lower of the two int32 in a word."""
    return pair & 0xFFFFFFFF


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
def move_chunk(row, chunk, BYTES: tl.constexpr, EXCHANGE: tl.constexpr):
    """Copy the bytes of a chunk's param to its average, or exchange the two, whatever the bytes mean."""
    offset, numel = word(chunk, 1), word(chunk, 2)
    param, average = word(row, 0) + offset * BYTES, word(row, 1) + offset * BYTES
    num_words = tl.where(((param | average) & 15) == 0, numel * BYTES // (4 * TILE) * TILE, 0)
    indices = tile_indices(4, TILE // 4)
    start = num_words * 0
    while start < num_words:
        move_tile(pointer_to(param, 4), pointer_to(average, 4), start, num_words, indices, EXCHANGE, True)
        start += TILE
    start = num_words * 4 // BYTES
    indices = tile_indices(1, NARROW_TILE)
    while start < numel:
        move_tile(pointer_to(param, BYTES), pointer_to(average, BYTES), start, numel, indices, EXCHANGE, False)
        start += NARROW_TILE
