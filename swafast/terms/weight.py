"""The weight of the newest model, bit for bit the same on every machine; this module does not import torch.

Mathematics libraries differ in their last bits. So ``log1p``, ``exp``, ``expm1`` and ``sine`` use only ``+ - * /`` of
float64, each rounded once as in IEEE 754. ``csrc/weight.h`` (C++, CUDA) and ``backends/triton/arithmetic.py`` do the
same operations in the same order, without fused multiply-adds. Errors stay under two units in the last place.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

from .pickling import pickled_from

#: ln 2 in two parts. The first ends in 21 zero bits, so its product with an exponent is exact.
LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
INV_LN2 = float.fromhex("0x1.71547652b82fep+0")
SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
HALF_PI = float.fromhex("0x1.921fb54442d18p+0")

#: Below this, e**x is near the smallest normal float64, and 0 is used instead.
LOWEST_EXPONENT = -708.0
#: log1p clamps its argument to this, far above any count of models over any sensible scale.
LARGEST_LOG1P = 1e300

#: Coefficients of 2 atanh(s) = 2 s (1 + s**2 / 3 + s**4 / 5 + ...), the highest power first. With |s| <= 0.172 the
#: first term left out is under 2**-60 of the sum.
ATANH_TERMS = tuple(2.0 / k for k in range(21, 1, -2))
#: Coefficients of e**r - 1 = r + r**2 (1/2 + r / 6 + ...), the highest power first. With |r| <= 0.347: under 2**-61.
EXP_TERMS = tuple(1.0 / math.factorial(k) for k in range(14, 1, -1))
#: Ratios of neighbouring coefficients of sin(r) / r = 1 - z / (2 * 3) * (1 - z / (4 * 5) * (1 - ...)), z = r**2, the
#: highest power first. With r <= pi / 2 the first term left out is under 2**-66 of the sum.
SINE_TERMS = tuple(1.0 / (k * (k + 1)) for k in range(24, 0, -2))


def log1p(x: float) -> float:
    """Return ``log(1 + min(x, 1e300))`` for ``x >= 0``."""
    x = min(x, LARGEST_LOG1P)
    y = 1.0 + x
    part = y - 1.0
    lost = (1.0 - (y - part)) + (x - part)  # the rounding error of y
    mantissa, exponent = math.frexp(y)
    if mantissa < SQRT_HALF:
        mantissa, exponent = 2.0 * mantissa, exponent - 1
    f = mantissa - 1.0
    s = f / (2.0 + f)
    z = s * s
    series = 0.0
    for term in ATANH_TERMS:
        series = (series + term) * z
    near = f - s * (f - series)
    return exponent * LN2_HIGH + (near + (exponent * LN2_LOW + lost / y))


def exp_parts(x: float) -> tuple[float, float]:
    """Return ``(scale, rest)`` with ``e**x = scale + scale * rest``, for ``x <= 0``; scale is a power of two or 0."""
    if x < LOWEST_EXPONENT:
        return 0.0, 0.0
    k = math.floor(x * INV_LN2 + 0.5)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    series = 0.0
    for term in EXP_TERMS:
        series = series * r + term
    return math.ldexp(1.0, k), r + (r * r) * series


def exp(x: float) -> float:
    """Return ``e**x`` for ``x <= 0``."""
    scale, rest = exp_parts(x)
    return scale + scale * rest


def expm1(x: float) -> float:
    """Return ``e**x - 1`` for ``x <= 0``."""
    scale, rest = exp_parts(x)
    return (scale - 1.0) + scale * rest


def sine(x: float) -> float:
    """Return ``sin(pi / 2 * x)`` for ``0 <= x <= 1``."""
    r = HALF_PI * x
    z = r * r
    series = 1.0
    for term in SINE_TERMS:
        series = 1.0 - (z * term) * series
    return r * series


@pickled_from("swafast")
@dataclass(frozen=True)
class KernelTerms:
    """The kind and four numbers from which a kernel computes a rule's weight; see ``csrc/swafast.h``."""

    kind: int
    terms: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    CONSTANT: ClassVar[int] = 0
    EQUAL: ClassVar[int] = 1
    POWER_WARMUP: ClassVar[int] = 2
    RATIO_WARMUP: ClassVar[int] = 3
    POWER: ClassVar[int] = 4
    RAMP_WARMUP: ClassVar[int] = 5
    COSINE: ClassVar[int] = 6
    LINEAR: ClassVar[int] = 7

    def __post_init__(self) -> None:
        if self.kind not in range(8):
            raise ValueError(f"kind must be one of KernelTerms' eight, got {self.kind}")
        if len(self.terms) != 4 or not all(math.isfinite(term) for term in self.terms):
            raise ValueError(f"terms must be four finite numbers, got {self.terms}")
        first, second, scale, power = self.terms
        if self.kind in (self.CONSTANT, self.COSINE, self.LINEAR) and not 0.0 <= first <= 1.0:
            raise ValueError(f"terms must begin with a weight in [0, 1], got {first}")
        if self.kind in (self.COSINE, self.LINEAR) and not second > 0.0:
            raise ValueError(f"terms must go on with a number of updates > 0, got {second}")
        warmups = (self.POWER_WARMUP, self.RATIO_WARMUP, self.RAMP_WARMUP)
        if self.kind in warmups and not 0.0 <= first <= second <= 1.0:
            raise ValueError(f"terms must begin with the lowest and highest weight in [0, 1], got {first}, {second}")
        if self.kind == self.POWER_WARMUP and not (scale > 0.0 and power > 0.0):
            raise ValueError(f"terms must end with inv_gamma > 0 and power > 0, got {scale}, {power}")
        if self.kind == self.RAMP_WARMUP and not scale > 0.0:
            raise ValueError(f"terms must go on with tau > 0, got {scale}")
        if self.kind == self.POWER and not first >= 0.0:
            raise ValueError(f"terms must begin with gamma >= 0, got {first}")

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(kind: int, *terms: float) -> KernelTerms:
        """Return terms padded with zeros. They are cached, since every update asks for them."""
        return KernelTerms(kind, (*terms, *(0.0,) * (4 - len(terms))))  # type: ignore[arg-type]  # it checks their number

    @staticmethod
    def constant(weight: float) -> KernelTerms:
        return KernelTerms.of(KernelTerms.CONSTANT, weight)

    def weight(self, num_averaged: int) -> float:
        """Return the weight, in [0, 1], bit for bit as ``rule_weight`` in ``csrc/weight.h`` computes it."""
        if num_averaged == 0:
            return 1.0  # the first update copies, whatever the rule
        n = float(num_averaged)
        first, second, scale, power = self.terms
        if self.kind == self.EQUAL:
            return 1.0 / (n + 1.0)
        if self.kind == self.POWER_WARMUP:
            # (1 + n / inv_gamma) ** -power
            return min(max(exp(-power * log1p(n / scale)), first), second)
        if self.kind == self.RATIO_WARMUP:
            # 1 - (1 + n) / (10 + n), without the cancellation
            return min(max(9.0 / (10.0 + n), first), second)
        if self.kind == self.RAMP_WARMUP:
            # 1 - decay * (1 - exp(-n / tau)), without the cancellation
            return min(max(first + (1.0 - first) * exp(-(n / scale)), first), second)
        if self.kind == self.POWER:
            # 1 - (1 - 1 / (n + 1)) ** (gamma + 1), without the cancellation for large n
            return -expm1(-(first + 1.0) * log1p(1.0 / n))
        if self.kind in (self.COSINE, self.LINEAR):
            left = max(second - n, 0.0) / second
            # (1 + cos(pi * n / updates)) / 2, without the cancellation near the end
            return first * (sine(left) * sine(left) if self.kind == self.COSINE else left)
        return first
