"""Rules: closed forms in exact arithmetic, and the libraries' own formulas."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

from swafast import EqualAverage, ExponentialAverage, PowerAverage, Rule
from swafast.terms.rules import rule_of

ALL_RULES = [
    EqualAverage(),
    ExponentialAverage(0.99),
    ExponentialAverage(0.9999, warmup="power"),
    ExponentialAverage(0.9999, warmup="power", inv_gamma=12.0, power=0.75, min_decay=0.3),
    ExponentialAverage(0.999, warmup="ratio"),
    ExponentialAverage.from_half_life(1000),
    ExponentialAverage(0.0),
    ExponentialAverage(1.0),
    PowerAverage(6.94),
    PowerAverage(0.0),
]


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
def test_first_update_copies_and_weights_are_weights(rule: Rule) -> None:
    assert rule.weight(0) == 1.0 or rule in (ExponentialAverage(1.0),)
    assert all(0.0 <= rule.weight(n) <= 1.0 for n in (1, 2, 10, 10**4, 10**9))


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
def test_rules_pickle_print_and_compare(rule: Rule) -> None:
    again = pickle.loads(pickle.dumps(rule))
    assert again == rule
    assert eval(repr(rule)) == rule
    assert hash(again) == hash(rule)


def test_equal_average_gives_every_model_the_same_share() -> None:
    shares = [Fraction(1)]
    for n in range(1, 40):
        weight = Fraction(EqualAverage().weight(n)).limit_denominator(1000)
        shares = [share * (1 - weight) for share in shares] + [weight]
    assert shares == [Fraction(1, 40)] * 40


@pytest.mark.parametrize("n", [1, 2, 9, 100, 12345])
def test_warmups_follow_the_formulas_people_know(n: int) -> None:
    timm = max(min(1 - (1 + n / 2.0) ** -0.7, 0.9995), 0.1)
    rule = ExponentialAverage(0.9995, warmup="power", inv_gamma=2.0, power=0.7, min_decay=0.1)
    assert 1 - rule.weight(n) == pytest.approx(timm, abs=1e-15)
    ratio = min(0.9995, (1 + n) / (10 + n))
    assert 1 - ExponentialAverage(0.9995, warmup="ratio").weight(n) == pytest.approx(ratio, abs=1e-15)


def test_half_life_halves() -> None:
    rule = ExponentialAverage.from_half_life(250)
    assert (1 - rule.weight(1)) ** 250 == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 6.94, 16.97])
def test_power_average_weighs_by_a_power_of_time(gamma: float) -> None:
    # Karras et al. 2024, eq. 5: theta_hat(t) = (gamma+1)/t^(gamma+1) * sum of tau^gamma theta(tau), in the limit of
    # long runs.
    rule, shares = PowerAverage(gamma), [1.0]
    for n in range(1, 2000):
        weight = rule.weight(n)
        shares = [share * (1 - weight) for share in shares] + [weight]
    total = sum((tau + 0.5) ** gamma for tau in range(2000))
    for tau in (500, 1000, 1500, 1999):
        assert shares[tau] == pytest.approx((tau + 0.5) ** gamma / total, rel=2e-2)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25, 12**-0.5])
def test_power_average_from_its_width(sigma_rel: float) -> None:
    gamma = PowerAverage.from_sigma_rel(sigma_rel).gamma
    assert math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3)) == pytest.approx(sigma_rel, rel=1e-9)
    if sigma_rel == 0.1:
        assert gamma == pytest.approx(6.94, abs=0.01)  # the figure of the paper
    if sigma_rel == 12**-0.5:
        assert gamma == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("single", "multi", "expected"),
    [
        (None, get_swa_multi_avg_fn(), EqualAverage()),
        (None, get_ema_multi_avg_fn(0.97), ExponentialAverage(0.97)),
        (None, None, EqualAverage()),
        (None, lambda averages, params, n: None, None),
        (get_swa_avg_fn(), None, EqualAverage()),
        (get_ema_avg_fn(0.5), None, ExponentialAverage(0.5)),
        (lambda average, param, n: param, None, None),
    ],
)
def test_torchs_functions_are_recognised(single: object, multi: object, expected: Rule | None) -> None:
    assert rule_of(single, multi) == expected


def test_a_rule_works_inside_torchs_class() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ours = AveragedModel(model, multi_avg_fn=ExponentialAverage(0.9), use_buffers=True)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for i in range(5):
        with torch.no_grad():
            model[0].weight.add_(1.0)
            model[1].num_batches_tracked.fill_(i)
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert torch.equal(ours.module[0].weight, theirs.module[0].weight)
    assert ours.module[1].num_batches_tracked == 4


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: ExponentialAverage(-0.1), "decay"),
        (lambda: ExponentialAverage(1.1), "decay"),
        (lambda: ExponentialAverage(math.nan), "decay"),
        (lambda: ExponentialAverage("0.9"), "decay"),
        (lambda: ExponentialAverage(True), "decay"),
        (lambda: ExponentialAverage(0.9, warmup="linear"), "warmup"),
        (lambda: ExponentialAverage(0.9, inv_gamma=0.0), "inv_gamma"),
        (lambda: ExponentialAverage(0.9, power=math.inf), "power"),
        (lambda: ExponentialAverage(0.9, min_decay=0.95), "min_decay"),
        (lambda: ExponentialAverage(0.9, min_decay=0.5), "warmup"),
        (lambda: ExponentialAverage(0.9, warmup="ratio", inv_gamma=5.0), "warmup"),
        (lambda: ExponentialAverage.from_half_life(0), "updates"),
        (lambda: PowerAverage(-1.0), "gamma"),
        (lambda: PowerAverage(math.nan), "gamma"),
        (lambda: PowerAverage.from_sigma_rel(0.3), "sigma_rel"),
        (lambda: PowerAverage.from_sigma_rel(0.0), "sigma_rel"),
    ],
)
def test_bad_arguments_are_named(make, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must be .*, got "):
        make()
