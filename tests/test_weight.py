"""The elementary functions against 50 decimal digits; the kernels' twins of them are held to these bits elsewhere."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest

from swafast.terms import weight

Function = Callable[[float], float]

#: pi / 2, to 50 digits.
HALF_PI = Decimal("1.5707963267948966192313216916397514420985846996876")


def sine(x: Decimal) -> Decimal:
    term, total = x, x
    for k in range(2, 60, 2):
        term *= -x * x / (k * (k + 1))
        total += term
    return total


CASES: list[tuple[Function, Callable[[Decimal], Decimal], Callable[[random.Random], float]]] = [
    (weight.log1p, lambda x: (1 + x).ln(), lambda r: math.exp(r.uniform(-30, 60))),
    (weight.exp, lambda x: x.exp(), lambda r: -math.exp(r.uniform(-30, 6.5))),
    (weight.expm1, lambda x: x.exp() - 1, lambda r: -math.exp(r.uniform(-30, 6.5))),
    (weight.sine, lambda x: sine(HALF_PI * x), lambda r: r.choice((1.0, r.random(), math.exp(r.uniform(-30, 0))))),
]


def worst_ulps(
    function: Function, exact: Callable[[Decimal], Decimal], draw: Callable[[random.Random], float]
) -> float:
    rng, worst = random.Random(3), Decimal(0)
    with localcontext() as context:
        context.prec = 50
        for _ in range(3000):
            x = draw(rng)
            wanted = exact(Decimal(x))
            worst = max(worst, abs(Decimal(function(x)) - wanted) / Decimal(math.ulp(float(wanted))))
    return float(worst)


@pytest.mark.parametrize(("function", "exact", "draw"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_errors_stay_under_two_units_in_the_last_place(
    function: Function, exact: Callable[[Decimal], Decimal], draw: Callable[[random.Random], float]
) -> None:
    assert worst_ulps(function, exact, draw) < 2


def test_a_term_too_few_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight, "ATANH_TERMS", weight.ATANH_TERMS[3:])
    monkeypatch.setattr(weight, "EXP_TERMS", weight.EXP_TERMS[3:])
    monkeypatch.setattr(weight, "SINE_TERMS", weight.SINE_TERMS[4:])
    assert all(worst_ulps(*case) > 2 for case in CASES)


@pytest.mark.parametrize("function", [weight.log1p, weight.exp, weight.expm1])
def test_zero_and_the_far_ends(function: Function) -> None:
    assert function(0.0) == (1.0 if function is weight.exp else 0.0)
    far = {weight.log1p: math.log1p(1e300), weight.exp: 0.0, weight.expm1: -1.0}[function]
    for x in (1e305, math.inf):
        assert function(x if function is weight.log1p else -x) == far
