"""Coefficients of checkpoints that are merged: closed forms, tables, sums, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from swafast import ExponentialAverage, PowerAverage
from swafast.posthoc.profiles import Profile
from swafast.terms import coefficients
from swafast.terms.coefficients import coefficients_of, decay, ema, equal, factors_of, given, power

ROOT = Path(__file__).parents[1]
COUNTS = (1, 2, 3, 8, 100, 5000)


def test_the_table_of_the_square_root_decay() -> None:
    table = [0.35355, 0.14645, 0.11237, 0.09473, 0.08346, 0.07546, 0.06939, 0.06459]  # oldest first
    assert decay(8, "1-sqrt") == decay(8, "minus-sqrt") == pytest.approx(table, abs=5e-6)
    assert decay(8, "linear") == pytest.approx(equal(8), rel=1e-15)
    assert decay(1, "1-sqrt") == [1.0]


@pytest.mark.parametrize("kind", ["linear", "minus-sqrt"])
@pytest.mark.parametrize("count", COUNTS)
def test_a_decay_weighs_each_update_by_its_rate(count: int, kind: str) -> None:
    # A merge of checkpoints weighs the update between checkpoints i - 1 and i by the sum of coefficients i to the last.
    found = decay(count, kind)
    for index in {1, count // 2, count - 1} - {0, count}:
        share = index / count
        rate = 1 - share if kind == "linear" else 1 - math.sqrt(share)
        assert math.fsum(found[index:]) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("count", COUNTS)
def test_an_ema_is_that_of_a_training_which_begins_with_the_oldest(count: int) -> None:
    own = Profile(ExponentialAverage(0.9), count).weights().tolist()
    assert ema(count, 0.9) == pytest.approx(own, rel=1e-10, abs=1e-300)
    assert ema(4, 0.5) == [0.125, 0.125, 0.25, 0.5]
    assert ema(3, 0.0) == [0.0, 0.0, 1.0]
    assert ema(3, 1.0) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25, 12**-0.5])
@pytest.mark.parametrize("count", COUNTS)
def test_a_power_average_is_that_of_the_rule(count: int, width: float) -> None:
    own = Profile(PowerAverage.from_sigma_rel(width), count).weights().tolist()
    assert power(count, width) == pytest.approx(own, rel=1e-9, abs=1e-300)


def test_a_power_average_does_not_cancel() -> None:
    exponent = 3  # gamma = 2
    width = math.sqrt(3.0) / (4.0 * math.sqrt(5.0))
    exact = [float(Fraction(i**exponent - (i - 1) ** exponent, 20000**exponent)) for i in (1, 2, 19999, 20000)]
    found = power(20000, width)
    assert [found[0], found[1], found[-2], found[-1]] == pytest.approx(exact, rel=1e-11)


@pytest.mark.parametrize(
    "of",
    [
        equal,
        lambda n: ema(n, 0.99),
        lambda n: power(n, 0.07),
        lambda n: decay(n, "1-sqrt"),
        lambda n: given(n, [1 / n] * n),
    ],
    ids=["equal", "ema", "power", "decay", "given"],
)
def test_coefficients_sum_to_one(of: Any) -> None:
    for count in COUNTS:
        found = of(count)
        assert len(found) == count
        assert abs(math.fsum(found) - 1) <= 4e-16


def test_the_narrowest_power_average_is_the_last_model() -> None:
    for width in (5e-324, 1e-310, 1e-300):
        assert power(3, width) == [0.0, 0.0, 1.0]


def test_a_mean_is_a_sum_that_is_divided() -> None:
    for count in COUNTS:
        for mean in (equal(count), decay(count, "linear")):
            assert factors_of(mean) == ([1.0] * count, float(count))
    assert factors_of([0.25, 0.75]) == ([0.25, 0.75], 1.0)
    assert factors_of([0.5]) == ([0.5], 1.0)  # not of a mean
    assert factors_of([]) == ([], 1.0)


def test_given_weights_keep_their_order_and_may_be_rounded() -> None:
    assert given(3, (0.5, 0.75, -0.25)) == [0.5, 0.75, -0.25]
    assert given(3, [0.33333, 0.33333, 0.33333]) == pytest.approx(equal(3), rel=1e-15)
    assert coefficients_of(2, [0.25, 0.75]) == [0.25, 0.75]
    assert coefficients_of(4, None) == coefficients_of(4, "equal") == coefficients_of(4, "linear") == equal(4)


REFUSED = {
    "a sum of 4": (lambda: given(3, [1, 2, 1]), ValueError, r"sum to 1, got 1, 2, 1 with 4: divide each by 4"),
    "a sum of 0": (lambda: given(2, [1, -1]), ValueError, r"sum to 1, got 1, -1 with 0$"),
    "too few": (lambda: given(3, [0.5, 0.5]), ValueError, "one for each of the 3 inputs, oldest first, got 2"),
    "a NaN": (lambda: given(1, [math.nan]), ValueError, "weights must be finite, got nan"),
    "a string": (lambda: given(1, ["1"]), TypeError, "weights must be numbers, got '1'"),
    "one number": (lambda: given(1, 1.0), TypeError, "a sequence of numbers, got 1.0"),  # type: ignore[arg-type]
    "a name": (lambda: coefficients_of(3, "sqrt"), ValueError, "one of 'equal', 'linear', 'minus-sqrt', '1-sqrt'"),
    "a kind": (lambda: decay(3, "cosine"), ValueError, "kind must be one of 'linear', 'minus-sqrt', '1-sqrt'"),
    "a decay": (lambda: ema(3, 1.5), ValueError, r"decay must be in \[0, 1\]"),
    "a width": (lambda: power(3, 0.3), ValueError, r"sigma_rel must be in \(0, 0.288675\], got 0.3"),
    "no count": (lambda: equal(0), ValueError, "count must be an int >= 1, got 0"),
    "no count of a decay": (lambda: decay(0, "1-sqrt"), ValueError, "count must be an int >= 1, got 0"),
    "no count of a power": (lambda: power(0, 0.1), ValueError, "count must be an int >= 1, got 0"),
    "half a count": (lambda: decay(2.5, "1-sqrt"), ValueError, "count must be an int >= 1, got 2.5"),  # type: ignore[arg-type]
    "a sum that overflows": (lambda: given(2, [1.7e308, 1.7e308]), ValueError, "sum to 1, got .* with inf$"),
    "a huge int": (lambda: given(2, [10**400, 1]), ValueError, "weights must be finite, got 1000"),
}


@pytest.mark.parametrize(("call", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


def test_coefficients_need_no_torch() -> None:
    code = "import sys, swafast.terms.coefficients as c; c.power(3, .1), c.ema(3, .5); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_a_reversed_decay_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coefficients, "_summing_to_one", lambda values: list(values)[::-1])
    with pytest.raises(AssertionError):
        test_the_table_of_the_square_root_decay()
