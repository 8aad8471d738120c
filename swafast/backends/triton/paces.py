"""Paces of the ``triton`` backend: ``swafast_pace`` in device memory, written and read by kernels.

A program reads the counts when it begins, as the last one to begin has them advanced, and holds them and the weights
from then on: each pace's with an index of its own over the program's threads, in two registers of each and no memory.
"""

import triton
import triton.language as tl

from .. import library
from .arithmetic import double_of, rule_weight
from .memory import launched, pace_of, pointer_to, word

MAX_PACES = tl.constexpr(library.MAX_PACES)

INT64_MAX = tl.constexpr(2**63 - 1)


@launched
def pace_kernel(
    paces: tl.int64,
    index: tl.int64,
    kind: tl.int64,
    term0: tl.int64,
    term1: tl.int64,
    term2: tl.int64,
    term3: tl.int64,
    num_averaged: tl.int64,
):
    """Write a pace. A launch in its turn waits for nothing, so a rule may change with every update."""
    pointer = pointer_to(pace_of(paces, index), 8)
    tl.store(pointer, kind)
    tl.store(pointer + 1, term0)
    tl.store(pointer + 2, term1)
    tl.store(pointer + 3, term2)
    tl.store(pointer + 4, term3)
    tl.store(pointer + 5, num_averaged)


@triton.jit
def counters_of(paces, num_paces):
    """Return (pointers to the counters, which indices have one)."""
    indices = tl.arange(0, MAX_PACES)
    used = indices < num_paces
    addresses = tl.load(pointer_to(paces, 8) + indices * 6 + 5, mask=used, other=0)
    return pointer_to(addresses, 8), used


@triton.jit
def any_bad(counts):
    """Return whether any count is negative or exhausted."""
    return tl.max(((counts < 0) | (counts == INT64_MAX)).to(tl.int32), 0) != 0


@triton.jit
def value_at(values, index):
    """Return the int64 with this index."""
    return tl.sum(tl.where(tl.arange(0, MAX_PACES) == index, values, 0), 0)


@triton.jit
def weights_of(paces, num_paces, counts):
    """Return the bits of each pace's weight, a float64."""
    weights = counts * 0
    i = num_paces * 0
    while i < num_paces:
        pace = pace_of(paces, i)
        kind, term0, term1, term2, term3 = word(pace, 0), word(pace, 1), word(pace, 2), word(pace, 3), word(pace, 4)
        weight = rule_weight(kind, term0, term1, term2, term3, value_at(counts, i))
        weights = tl.where(tl.arange(0, MAX_PACES) == i, weight.to(tl.int64, bitcast=True), weights)
        i += 1
    return weights


@triton.jit
def pace_at(counts, weights, index):
    """Return (count, float64 weight) of a pace."""
    return value_at(counts, index), double_of(value_at(weights, index))
