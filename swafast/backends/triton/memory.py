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


# The tables' words are those of csrc/swafast.h: 8 for a descriptor, 6 for a pace, 4 for the state.


@triton.jit
def descriptor_of(descriptors, index):
    return descriptors + 64 * index


@triton.jit
def pace_of(paces, index):
    return paces + 48 * index


@triton.jit
def low_of(pair):
    """Return the lower of the two 32-bit numbers in a word."""
    return pair & 0xFFFFFFFF


@triton.jit
def high_of(pair):
    """Return the upper one."""
    return (pair >> 32) & 0xFFFFFFFF


@triton.jit
def kind_of(kinds, index):
    """Return a byte of a descriptor's last word: dtype, format, pace."""
    return (kinds >> (8 * index)) & 0xFF
