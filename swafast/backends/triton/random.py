"""Random bits of the ``triton`` backend: ``csrc/random.h`` said in Triton, for formats that are rounded at random.

Everything here is unsigned, so that shifts to the right bring in zeros, and wraps around as it does in C.
"""

import triton
import triton.language as tl


@triton.jit
def mix(start, word):
    """Mix two uint64, as ``mix`` in ``csrc/checksum.h`` does."""
    x = start + word
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def draw_of(key, num_averaged, first_index):
    """Return the three uint32 that all elements of one chunk share. The arguments are int64."""
    n = num_averaged.to(tl.uint64)
    start = ((n >> 4) + 1) * 0x9E3779B97F4A7C15
    bits = mix(mix(key.to(tl.uint64), start), first_index.to(tl.uint64) >> 32)
    return bits.to(tl.uint32), (bits >> 32).to(tl.uint32), turn_of(n.to(tl.uint32))


@triton.jit
def turn_of(n):
    """Return the sixteenth of the range that the random bits of this update lie in, relative to the draw."""
    return ((n & 1) << 31) | ((n & 2) << 29) | ((n & 4) << 27) | ((n & 8) << 25)


@triton.jit
def bits_of_draw(first, second, turn, index):
    """Return 32 random bits for each element, from the lower 32 bits of its index. Use the upper 16 only."""
    x = index ^ first
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ second
    return (x ^ (x >> 15)) * 0x846CA68B + turn
