"""Profiles against the weights written out in float64, and least squares against plain ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from swafast.posthoc import profiles
from swafast.posthoc.profiles import Profile, fit
from swafast.terms.rules import EqualAverage, ExponentialAverage, PowerAverage, Rule

NARROW, WIDE = PowerAverage.from_sigma_rel(0.05), PowerAverage.from_sigma_rel(0.10)


class Alternating(Rule):
    """A rule in Python alone, that now and then forgets all before, or takes nothing in."""

    def weight(self, num_averaged: int) -> float:
        return (0.3, 0.0, 0.1)[num_averaged % 3] if num_averaged != 40 else 1.0


class Doubled(EqualAverage):
    """Inherits terms that say nothing of its weight."""

    def weight(self, num_averaged: int) -> float:
        return min(1.0, 2.0 / (num_averaged + 1))


RULES = [
    EqualAverage(),
    ExponentialAverage(0.99),
    ExponentialAverage(0.0),
    ExponentialAverage(1.0),
    ExponentialAverage(0.999, warmup="power", inv_gamma=3.0, power=0.7, min_decay=0.1),
    ExponentialAverage(0.99, warmup="ratio"),
    ExponentialAverage(0.999, warmup="ramp", tau=50.0, min_decay=0.1),
    ExponentialAverage(0.9, schedule="cosine", updates=90),
    ExponentialAverage(0.9, schedule="linear", updates=90),
    PowerAverage(0.0),
    NARROW,
    PowerAverage(4000.0),
    Alternating(),
    Doubled(),
]


def written_out(rule: Rule, count: int) -> Tensor:
    """Average unit vectors one after the other: what is left is the profile."""
    average = torch.zeros(count, dtype=torch.float64)
    for n in range(count):
        weight = 1.0 if n == 0 else rule.weight(n)
        average *= 1.0 - weight
        average[n] += weight
    return average


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("count", [1, 2, 100, 1999])
def test_a_profile_is_what_averaging_gives(rule: Rule, count: int) -> None:
    expected = written_out(rule, count)
    weights = Profile(rule, count).weights()
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-15)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-13)


def test_the_profile_of_a_power_average_telescopes() -> None:
    for gamma in (0.0, 6.94, 3000.0):
        i = torch.arange(1, 2001, dtype=torch.float64)
        expected = (i / 2000) ** (gamma + 1) - ((i - 1) / 2000) ** (gamma + 1)
        torch.testing.assert_close(Profile(PowerAverage(gamma), 2000).weights(), expected, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("block", [7, 2**20])
def test_inner_products_are_those_of_the_profiles(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(profiles, "_WINDOW_NUMEL", block * len(RULES))
    wanted = [Profile(rule, count) for rule in RULES for count in (1, 39, 41, 41, 300)]
    explicit = torch.zeros(len(wanted), 300, dtype=torch.float64)
    for row, profile in zip(explicit, wanted, strict=True):
        row[: profile.num_averaged] = written_out(profile.rule, profile.num_averaged)
    short = torch.stack(profiles._compressed(wanted))
    torch.testing.assert_close(short @ short.mT, explicit @ explicit.mT, rtol=1e-11, atol=1e-14)


def test_inner_products_come_near_those_of_continuous_profiles() -> None:
    """Of profiles (g + 1) t^g / T^(g + 1): (a + 1)(b + 1) / (a + b + 1) min^.. / max^.. ."""
    a, b, early, late = 6.94, 16.97, 40_000, 100_000
    short = profiles._compressed([Profile(PowerAverage(a), early), Profile(PowerAverage(b), late)])
    continuous = (a + 1) * (b + 1) / (a + b + 1) * early**b / late ** (b + 1)
    assert float(short[0] @ short[1]) == pytest.approx(continuous, rel=1e-3)


def brute_fit(stored: list[Profile], wanted: Profile) -> tuple[Tensor, float]:
    """Least squares with sum 1 by a Lagrange multiplier, on profiles written out."""
    count = wanted.num_averaged
    matrix = torch.zeros(count, len(stored), dtype=torch.float64)
    for column, profile in zip(matrix.T, stored, strict=True):
        column[: profile.num_averaged] = written_out(profile.rule, profile.num_averaged)
    target = written_out(wanted.rule, count)
    ones = torch.ones(len(stored), 1, dtype=torch.float64)
    system = torch.cat([torch.cat([matrix.T @ matrix, ones], 1), torch.cat([ones.T, torch.zeros(1, 1)], 1)])
    x = torch.linalg.solve(system, torch.cat([matrix.T @ target, torch.ones(1)]))[:-1]
    return x, float((matrix @ x - target).norm() / target.norm())


@pytest.mark.parametrize("sigma_rel", [0.05, 0.07, 0.15, 0.25])
def test_a_fit_is_that_of_profiles_written_out(sigma_rel: float) -> None:
    stored = [Profile(rule, 50 * k) for k in range(1, 9) for rule in (NARROW, WIDE)]
    wanted = Profile(PowerAverage.from_sigma_rel(sigma_rel), 400)
    coefficients, residual = brute_fit(stored, wanted)
    found = fit(stored, wanted)
    torch.testing.assert_close(found.coefficients, coefficients, rtol=1e-7, atol=1e-9)
    assert found.residual == pytest.approx(residual, rel=1e-6, abs=1e-11)
    assert found.gain == pytest.approx(float(coefficients.abs().sum()), rel=1e-7)
    assert float(found.coefficients.sum()) == pytest.approx(1.0, abs=1e-13)


def test_what_is_stored_is_given_back_and_the_residual_says_so() -> None:
    stored = [Profile(rule, 31_250 * k) for k in range(1, 33) for rule in (NARROW, WIDE)]
    found = fit(stored, Profile(WIDE, 500_000))
    expected = torch.tensor([float(profile == Profile(WIDE, 500_000)) for profile in stored], dtype=torch.float64)
    torch.testing.assert_close(found.coefficients, expected, rtol=0, atol=1e-11)
    assert found.residual < 1e-12


def test_later_profiles_take_no_part() -> None:
    stored = [Profile(rule, 50 * k) for k in (3, 1, 2, 4) for rule in (NARROW, WIDE)]
    found = fit(stored, Profile(PowerAverage.from_sigma_rel(0.08), 150))
    assert found.coefficients[6:].tolist() == [0.0, 0.0]
    alone = fit([profile for profile in stored if profile.num_averaged <= 150], Profile(stored[0].rule, 150))
    assert alone.residual < 1e-12


def test_nearly_dependent_profiles_do_not_blow_up() -> None:
    """Untruncated, coefficients come to 1e8, and float32 snapshots give errors larger than the average."""
    stored = [Profile(PowerAverage.from_sigma_rel(0.05 + 0.01 * r), 125 * k) for k in range(1, 17) for r in range(10)]
    found = fit(stored, Profile(PowerAverage.from_sigma_rel(0.02), 2000))
    assert found.gain < 1e4
    assert found.residual < 0.01


@pytest.mark.parametrize(
    "rule", [EqualAverage(), Alternating(), ExponentialAverage(1.0)], ids=lambda rule: type(rule).__name__
)
def test_any_rule_may_be_wanted_or_stored(rule: Rule) -> None:
    stored = [Profile(each, 20 * k) for k in range(1, 6) for each in (NARROW, rule)]
    coefficients, residual = brute_fit(stored, Profile(WIDE, 100)) if rule == EqualAverage() else (None, None)
    found = fit(stored, Profile(WIDE, 100))
    assert found.residual < 0.7
    if coefficients is not None:
        torch.testing.assert_close(found.coefficients, coefficients, rtol=1e-6, atol=1e-8)
        assert found.residual == pytest.approx(residual, rel=1e-6)
    assert fit(stored, Profile(rule, 100)).residual < 1e-12


class Broken(Rule):
    def weight(self, num_averaged: int) -> float:
        return 1.5


NO_COUNT = "num_averaged must be an int >= 1, got"
BETWEEN = [Profile(WIDE, 5), Profile(WIDE, 9)]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: fit([], Profile(WIDE, 3)), ValueError, "stored must be at least one profile, got none"),
        (lambda: fit(BETWEEN, Profile(WIDE, 10)), ValueError, "wanted must be of 5 to 9 models, .*, got 10"),
        (lambda: fit(BETWEEN, Profile(WIDE, 4)), ValueError, "wanted must be of 5 to 9 models, .*, got 4"),
        (lambda: fit(BETWEEN, WIDE), TypeError, "wanted must be a Profile, got PowerAverage"),
        (lambda: fit([WIDE], Profile(WIDE, 3)), TypeError, "stored must be Profiles, got PowerAverage"),
        (lambda: Profile(0.9, 3), TypeError, r"rule must be a swafast\.Rule, got float"),
        (lambda: Profile(WIDE, 0), ValueError, NO_COUNT),
        (lambda: Profile(WIDE, -1), ValueError, NO_COUNT),
        (lambda: Profile(WIDE, 1.5), ValueError, NO_COUNT),
        (lambda: Profile(WIDE, True), ValueError, NO_COUNT),
        (lambda: Profile(WIDE, "3"), ValueError, NO_COUNT),
        (
            lambda: Profile(Broken(), 3).weights(),
            ValueError,
            r"weight\(\d+\) of the rule .*Broken.* must be in \[0, 1\], got 1\.5",
        ),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()
