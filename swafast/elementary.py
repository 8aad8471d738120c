"""``log1p``, ``exp`` and ``expm1`` in nothing but ``+ - * /`` of float64, each rounded once as IEEE 754 has it.

Mathematics libraries differ in their last bits. Whoever writes these same operations, in this order and without fusing
a product into a sum, gets the same bits: Python here, C++ and CUDA in ``csrc/weight.h``, Triton in
``swafast/backends/triton_arithmetic.py``. Errors stay under two units in the last place.
"""

from __future__ import annotations

import math

#: ln 2 in two parts; the first ends in 21 zero bits, so that its product with an exponent is exact.
LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
INV_LN2 = float.fromhex("0x1.71547652b82fep+0")
SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")

#: Below this e**x is next to the smallest normal float64; we take it for 0.
LOWEST_EXPONENT = -708.0
#: log1p takes no more: far above any count of models over any sensible scale.
LARGEST_LOG1P = 1e300

#: Coefficients of 2 atanh(s) = 2 s (1 + s**2 / 3 + s**4 / 5 + ...), the highest power first. |s| <= 0.172: the first
#: term left out is under 2**-60 of the sum.
ATANH_TERMS = tuple(2.0 / k for k in range(21, 1, -2))
#: Coefficients of e**r - 1 = r + r**2 (1/2 + r / 6 + ...), the highest power first. |r| <= 0.347: likewise 2**-61.
EXP_TERMS = tuple(1.0 / math.factorial(k) for k in range(14, 1, -1))


def log1p(x: float) -> float:
    """Give ``log(1 + x)`` for ``x >= 0``."""
    x = min(x, LARGEST_LOG1P)
    y = 1.0 + x
    part = y - 1.0
    lost = (1.0 - (y - part)) + (x - part)  # what rounding took from the sum
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
    """Give ``(scale, rest)`` with ``e**x = scale + scale * rest``, for ``x <= 0``; scale is a power of two, or 0."""
    if x < LOWEST_EXPONENT:
        return 0.0, 0.0
    k = math.floor(x * INV_LN2 + 0.5)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    series = 0.0
    for term in EXP_TERMS:
        series = series * r + term
    return math.ldexp(1.0, k), r + (r * r) * series


def exp(x: float) -> float:
    """Give ``e**x`` for ``x <= 0``."""
    scale, rest = exp_parts(x)
    return scale + scale * rest


def expm1(x: float) -> float:
    """Give ``e**x - 1`` for ``x <= 0``."""
    scale, rest = exp_parts(x)
    return (scale - 1.0) + scale * rest
