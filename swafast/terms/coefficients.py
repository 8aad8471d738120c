"""Coefficients by which checkpoints are merged, oldest first; this module does not import torch.

Each function returns one float for each of ``count`` checkpoints. They sum to 1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from .numbers import as_float, as_int, checked_number

#: The largest ``sigma_rel``, that of the equal mean.
WIDEST = 12.0**-0.5

#: How far the sum of given weights may be from 1: decimal fractions of seven digits, of thousands of checkpoints.
_TOLERANCE = 1e-4

#: For each decay of the learning rate, the rate that is left after a share ``x`` of it.
_RATES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "minus-sqrt": lambda x: 1.0 - math.sqrt(x),
}
_RATES["1-sqrt"] = _RATES["minus-sqrt"]  # as the paper writes it; a shell's user has the name without a digit

#: The names of :func:`decay`.
DECAYS = tuple(_RATES)


def equal(count: int) -> list[float]:
    """Return the coefficients of the mean. :func:`factors_of` says how to sum with them."""
    number = _checked(count)
    return [1.0 / number] * number


def factors_of(coefficients: Sequence[float]) -> tuple[list[float], float]:
    """Return what each checkpoint is multiplied by, and what the sum is divided by.

    For the mean these are 1 and the number of checkpoints. So the mean of equal values is this value, and ``1 / count``
    is not rounded.
    """
    count = len(coefficients)
    if count and {*coefficients} == {1.0 / count}:
        return [1.0] * count, float(count)
    return [*coefficients], 1.0


def ema(count: int, decay: float, *, argument: str = "decay") -> list[float]:
    """Return those of an exponential moving average (EMA) that begins with the first checkpoint.

    The first has ``decay ** (count - 1)``, and checkpoint i of 2 to count has ``(1 - decay) * decay ** (count - i)``.

    Args:
        argument: what an error calls ``decay``.

    Raises:
        ValueError: ``decay`` is not in [0, 1].
    """
    kept = checked_number(argument, decay, "in [0, 1], the share that the older ones keep", lambda x: 0.0 <= x <= 1.0)
    first, *others = (kept**age for age in reversed(range(_checked(count))))
    return _summing_to_one([first, *((1.0 - kept) * each for each in others)])


def power(count: int, sigma_rel: float, *, argument: str = "sigma_rel") -> list[float]:
    """Return those of :class:`~swafast.PowerAverage` after ``count`` models: ``(i^(g+1) - (i-1)^(g+1)) / count^(g+1)``.

    Raises:
        ValueError: ``sigma_rel`` is not in (0, 1 / sqrt(12)].

    Paper: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696,
    appendix C.
    """
    exponent, number = gamma_of(sigma_rel, argument=argument) + 1.0, _checked(count)
    first, *others = ((index / number) ** exponent for index in range(1, number + 1))
    # 1 - ((i - 1) / i) ** exponent, without the cancellation for large i
    newest = (-math.expm1(exponent * math.log1p(-1.0 / index)) for index in range(2, number + 1))
    return _summing_to_one([first, *(share * own for share, own in zip(others, newest, strict=True))])


def gamma_of(sigma_rel: float, *, argument: str = "sigma_rel") -> float:
    """Return the exponent of the power average with this relative width. :class:`~swafast.PowerAverage` explains it.

    Raises:
        ValueError: ``sigma_rel`` is not in (0, 1 / sqrt(12)].
    """
    width = checked_number(argument, sigma_rel, f"in (0, {WIDEST:.6f}]", lambda x: 0.0 < x <= WIDEST)
    # width < 1 / (gamma + 2), so gamma < high. The quotient overflows for the smallest widths.
    low, high = 0.0, min(2.0 / width, sys.float_info.max)
    while high - low > 1e-12 * (1.0 + low):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        wider = math.sqrt(middle + 1.0) / ((middle + 2.0) * math.sqrt(middle + 3.0)) > width
        low, high = (middle, high) if wider else (low, middle)
    return 0.5 * (low + high) if low > 0.0 else 0.0


def decay(count: int, kind: str, *, argument: str = "kind") -> list[float]:
    """Return those that stand for a decay of the learning rate, while the training went on at a constant rate.

    Let f be the decay: ``1 - x`` for ``"linear"``, ``1 - sqrt(x)`` for ``"minus-sqrt"``. The newest checkpoint has
    ``f((count - 1) / count)``, and checkpoint i of 1 to count - 1, from 0, has ``f(i / count) - f((i + 1) / count)``.
    The oldest has the rest. The linear decay is the mean.

    Raises:
        ValueError: ``kind`` is neither.

    Paper: Tian et al. 2025, "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM Pre-training",
    arXiv:2507.17634.
    """
    rate = _RATES.get(kind) if isinstance(kind, str) else None
    if rate is None:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, DECAYS))}, got {kind!r}")
    number = _checked(count)
    if kind == "linear":
        return equal(number)
    rates = [*(rate(index / number) for index in range(number)), 0.0]
    _, *others = (now - then for now, then in pairwise(rates))
    return _summing_to_one([1.0 - math.fsum(others), *others])


def window(earlier: int, later: int) -> list[float]:
    """Return the coefficients of two means, of ``earlier`` and of ``later`` models, whose sum is the mean of the rest.

    ``(later * m2 - earlier * m1) / (later - earlier)``: errors grow by up to the sum of their sizes.

    Raises:
        ValueError: ``later`` is not larger than ``earlier``.
    """
    if not later > earlier:
        raise ValueError(f"later must be of more models than earlier, {earlier}, got {later}")
    return [-earlier / (later - earlier), later / (later - earlier)]


def given(count: int, weights: Iterable[float]) -> list[float]:
    """Return the user's own weights, checked. A weight may be negative, as in a difference of two models.

    They must sum to 1: otherwise params that never changed would be scaled. A sum that is off by rounding is mended.

    Raises:
        TypeError: ``weights`` is not a sequence of numbers.
        ValueError: there are not ``count`` weights, one is not finite, or they do not sum to 1.
    """
    if isinstance(weights, (str, bytes)) or not isinstance(weights, Iterable):
        raise TypeError(f"weights must be a sequence of numbers, got {weights!r}")
    values = [*weights]
    numbers = [as_float(value) for value in values]
    for value, number in zip(values, numbers, strict=True):
        if number is None:
            raise TypeError(f"weights must be numbers, got {value!r}")
        if not math.isfinite(number):
            raise ValueError(f"weights must be finite, got {value!r}")
    found = [number for number in numbers if number is not None]
    if len(found) != _checked(count):
        raise ValueError(f"weights must be one for each of the {count} inputs, oldest first, got {len(found)}")
    try:
        total = math.fsum(found)
    except OverflowError:
        total = math.inf
    if abs(total - 1.0) > _TOLERANCE:
        divided = f": divide each by {total:g}" if _TOLERANCE < abs(total) < math.inf else ""
        raise ValueError(f"weights must sum to 1, got {', '.join(f'{x:g}' for x in found)} with {total:g}{divided}")
    return _summing_to_one(found)


def coefficients_of(count: int, weights: str | Sequence[float] | None) -> list[float]:
    """Return the coefficients that a user asks for in Python: None or ``"equal"``, a decay's name, or own weights.

    Raises:
        TypeError, ValueError: ``weights`` is none of these, or does not fit.
    """
    if weights is None or weights == "equal":
        return equal(count)
    if isinstance(weights, str):
        if weights not in DECAYS:
            known = ", ".join(map(repr, ("equal", *DECAYS)))
            raise ValueError(f"weights must be one of {known}, or a sequence of numbers, got {weights!r}")
        return decay(count, weights)
    return given(count, weights)


def _checked(count: int) -> int:
    number = as_int(count)
    if number is None or number < 1:
        raise ValueError(f"count must be an int >= 1, got {count!r}")
    return number


def _summing_to_one(values: Sequence[float]) -> list[float]:
    total = math.fsum(values)
    return [value / total for value in values]
