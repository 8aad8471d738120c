"""Samples of SWAG: which point near an average an index stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import normals
from .draws import make_random_key
from .normals import float32
from .numbers import as_float, as_int
from .spread import Spread


@dataclass(frozen=True)
class Sample:
    """A point near an average: ``average + sum of coefficients[k] * column k + noise * sqrt(variance) * z``."""

    index: int = 0  # of the sample: z, one normal number for each element, goes by it
    coefficients: tuple[float, ...] = ()  # float32 values, of the first columns of deviations
    noise: float = 0.0  # a float32 value; 0: no random number is drawn


def make_sample(spread: Spread, num_averaged: int, index: object, scale: object, seed: int) -> Sample:
    """Return the sample with this index of an average of ``num_averaged`` models.

    Args:
        scale: of the covariance; None: 1/2 with deviations, which the paper's sample has, and 1 without.
        seed: of the normal numbers that multiply the columns: one for each column, the same for all tensors and ranks.

    Raises:
        TypeError: ``index`` is not an int, or ``scale`` not a number.
        ValueError: ``index`` is not from 0 to 2^32 - 1, or ``scale`` is negative or not finite in float32.
        RuntimeError: ``num_averaged`` is less than 2.
    """
    which, factor = as_int(index), as_float(0.5 if spread.count else 1.0) if scale is None else as_float(scale)
    if which is None:
        raise TypeError(f"index must be an int, got {index!r}")
    if not 0 <= which < 2**32:
        raise ValueError(f"index must be from 0 to 2^32 - 1, got {which}")
    if factor is None:
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    if not (math.isfinite(float32(factor)) and factor >= 0):
        raise ValueError(f"scale must be finite in float32 and >= 0, got {factor}")
    if num_averaged < 2:
        raise RuntimeError(
            f"a sample must wait until two models are in the average, got {num_averaged}: one has no variance"
        )
    noise = float32(math.sqrt(factor))
    count = min(num_averaged, spread.count) if noise else 0
    if not count:
        return Sample(which, (), noise)
    numbers = normals.normals(make_random_key(seed, ""), which, torch.arange(count, device="cpu"), normals.COLUMNS)
    factor = math.sqrt(factor / (count - 1))
    return Sample(which, tuple(float32(factor * number) for number in numbers.tolist()), noise)
