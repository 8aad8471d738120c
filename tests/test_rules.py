"""Rules: closed forms in exact arithmetic, and the libraries' own formulas."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
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

from swafast import (
    EqualAverage,
    ExponentialAverage,
    FusedAveragedModel,
    FusedAverages,
    PowerAverage,
    Rule,
    ShardedAveragedModel,
    ShardedAverages,
    Snapshots,
)
from swafast.terms.rules import rule_of
from swafast.torch_private import core

ALL_RULES = [
    EqualAverage(),
    ExponentialAverage(0.99),
    ExponentialAverage(0.9999, warmup="power"),
    ExponentialAverage(0.9999, warmup="power", inv_gamma=12.0, power=0.75, min_decay=0.3),
    ExponentialAverage(0.999, warmup="ratio"),
    ExponentialAverage.from_half_life(1000),
    ExponentialAverage(0.0),
    ExponentialAverage(1.0),
    ExponentialAverage(0.9999, warmup="ramp", tau=500.0, min_decay=0.25),
    ExponentialAverage(0.996, schedule="cosine", updates=100_000),
    ExponentialAverage(0.996, schedule="linear", updates=100_000),
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


@pytest.mark.parametrize("n", [1, 2, 499, 999, 1000, 1001, 10**6])
def test_decays_go_to_one_as_in_the_papers(n: int) -> None:
    k, base = min(n, 1000), 0.996
    byol = 1 - (1 - base) * (math.cos(math.pi * k / 1000) + 1) / 2
    dino = 1.0 + 0.5 * (base - 1.0) * (1 + math.cos(math.pi * k / 1000))
    ijepa = base + k * (1.0 - base) / 1000
    for schedule, decay in (("cosine", byol), ("cosine", dino), ("linear", ijepa)):
        rule = ExponentialAverage(base, schedule=schedule, updates=1000)
        assert 1 - rule.weight(n) == pytest.approx(decay, abs=2e-16)
        assert n < 1000 or rule.weight(n) == 0.0


@pytest.mark.parametrize("n", [1, 2, 1999, 10**5])
def test_a_ramp_is_that_of_ultralytics(n: int) -> None:
    decay = 0.9999 * (1 - math.exp(-n / 2000))
    assert 1 - ExponentialAverage(0.9999, warmup="ramp").weight(n) == pytest.approx(decay, abs=2e-16)
    assert 1 - ExponentialAverage(0.9999, warmup="ramp", min_decay=0.5).weight(n) == pytest.approx(max(decay, 0.5))


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
        (get_ema_avg_fn(0.5), get_swa_multi_avg_fn(), EqualAverage()),  # torch's class goes by the second
        (ExponentialAverage(0.5), lambda averages, params, n: None, None),
    ],
)
def test_torchs_functions_are_recognised(single: object, multi: object, expected: Rule | None) -> None:
    assert rule_of(single, multi) == expected


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.97, 0.999, 1.0])
@pytest.mark.parametrize("make", [get_ema_avg_fn, get_ema_multi_avg_fn])
def test_a_decay_is_found_under_another_name_too(monkeypatch: pytest.MonkeyPatch, make: Any, decay: float) -> None:
    found = core.closure_of

    def renamed(factory: Any, function: Any) -> Any:
        closure = found(factory, function)
        return closure if closure is None else {f"the_{name}": value for name, value in closure.items()}

    function = make(decay)
    monkeypatch.setattr(core, "closure_of", renamed)
    rule = rule_of(*((function, None) if make is get_ema_avg_fn else (None, function)))
    assert rule is not None
    assert rule.weight(1) == 1.0 - decay
    assert rule.decay == pytest.approx(decay, abs=1e-16)


OTHER_NUMBERS: list[Callable[[float], Any]] = [
    np.float64, np.float32, np.array, lambda x: np.array(x, np.float32), torch.tensor, Fraction,
]  # fmt: skip


@pytest.mark.parametrize("number", OTHER_NUMBERS)
@pytest.mark.parametrize(
    "make",
    [
        ExponentialAverage,
        lambda x: ExponentialAverage(0.75, warmup="power", inv_gamma=x, power=x, min_decay=x),
        lambda x: ExponentialAverage(warmup="ramp", tau=x),
        lambda x: ExponentialAverage(schedule="cosine", updates=x),
        ExponentialAverage.from_half_life,
        PowerAverage,
        lambda x: PowerAverage.from_sigma_rel(x / 2),
    ],
)
def test_numbers_of_numpy_and_torch_are_pythons(make: Callable[[Any], Rule], number: Callable[[float], Any]) -> None:
    rule = make(number(0.5))
    assert rule == make(0.5)
    assert repr(rule) == repr(make(0.5))


@pytest.mark.parametrize("updates", [np.int64(10), np.uint8(10), np.array(10), torch.tensor(10)])
def test_whole_numbers_stay_whole(updates: Any) -> None:
    rule = ExponentialAverage(0.5, schedule="linear", updates=updates)
    assert type(rule.updates) is int
    assert rule == ExponentialAverage(0.5, schedule="linear", updates=10)


def with_rule(decay: float) -> Any:
    return FusedAveragedModel(nn.Linear(2, 2), rule=ExponentialAverage(decay))


#: Averages that somebody makes with a decay.
MADE: dict[str, Callable[[float], object]] = {
    "a rule": with_rule,
    "torch's function": lambda decay: FusedAveragedModel(nn.Linear(2, 2), avg_fn=get_ema_avg_fn(decay)),
    "a rule as a function": lambda decay: FusedAveragedModel(nn.Linear(2, 2), None, None, ExponentialAverage(decay)),
    "a warm-up": lambda decay: FusedAveragedModel(nn.Linear(2, 2), rule=ExponentialAverage(decay, "ramp")),
    "several": lambda decay: FusedAverages(nn.Linear(2, 2), rules={"a": ExponentialAverage(decay)}),
    "shards": lambda decay: ShardedAveragedModel(nn.Linear(2, 2), rule=ExponentialAverage(decay)),
    "several of shards": lambda decay: ShardedAverages(nn.Linear(2, 2), rules={"a": ExponentialAverage(decay)}),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.parametrize("decay", [1e-9, 0.0999])
def test_a_decay_that_is_a_weight_warns(make: Callable[[float], object], decay: float) -> None:
    expected = f"decay={decay} is the weight of the old average.*pass ExponentialAverage\\({1 - decay:.6g}\\)"
    with pytest.warns(UserWarning, match=expected) as seen:
        make(decay)
    assert [each.filename for each in seen] == [__file__]  # once, at the user's line


def scheduled(setting: Callable[[Any, float], object]) -> object:
    averaged = with_rule(0.0)
    for step in range(3):
        setting(averaged, 0.01 * step)
        averaged.rule.weight(1)
    return averaged


def stored(folder: Path) -> object:
    averaged, snapshots = with_rule(0.5), Snapshots(folder)
    averaged.rule = ExponentialAverage(0.01)
    averaged.update_parameters(nn.Linear(2, 2))
    snapshots.save(averaged)
    return [*snapshots], snapshots.fit(EqualAverage())


#: What nobody has written as the decay of an average.
SILENT: dict[str, Callable[[Path], object]] = {
    "a schedule of rules": lambda _: scheduled(lambda a, decay: setattr(a, "rule", ExponentialAverage(decay))),
    "a schedule of functions": lambda _: scheduled(lambda a, decay: setattr(a, "avg_fn", get_ema_avg_fn(decay))),
    "a rule with a schedule": lambda _: FusedAveragedModel(
        nn.Linear(2, 2), rule=ExponentialAverage(0.01, schedule="cosine", updates=9)
    ),
    "a half-life": lambda _: FusedAveragedModel(nn.Linear(2, 2), rule=ExponentialAverage.from_half_life(0.2)),
    "an unpickled half-life": lambda _: FusedAveragedModel(
        nn.Linear(2, 2), rule=pickle.loads(pickle.dumps(ExponentialAverage.from_half_life(0.2)))
    ),
    "a pickle": lambda _: pickle.loads(pickle.dumps(ExponentialAverage(0.01))),
    "stored rules": stored,
    **{f"{decay!r}": lambda _, decay=decay: with_rule(decay) for decay in (0, 0.0, 0.1, 1.0)},  # type: ignore[misc]
}


@pytest.mark.parametrize("make", SILENT.values(), ids=SILENT)
def test_other_decays_are_silent(make: Callable[[Path], object], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path)


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
        (lambda: ExponentialAverage(np.True_), "decay"),
        (lambda: ExponentialAverage(torch.tensor(True)), "decay"),
        (lambda: ExponentialAverage(0.5 + 0j), "decay"),
        (lambda: ExponentialAverage(np.complex64(0.5)), "decay"),
        (lambda: ExponentialAverage(np.array([0.9, 0.99])), "decay"),
        (lambda: ExponentialAverage(0.9, schedule="exponential", updates=5), "schedule"),
        (lambda: ExponentialAverage(0.9, schedule="cosine"), "updates"),
        (lambda: ExponentialAverage(0.9, schedule="cosine", updates=0), "updates"),
        (lambda: ExponentialAverage(0.9, schedule="linear", updates=math.inf), "updates"),
        (lambda: ExponentialAverage(0.9, updates=5), "schedule"),
        (lambda: ExponentialAverage(0.9, "power", schedule="cosine", updates=5), "warmup"),
        (lambda: ExponentialAverage(0.9, warmup="ramp", tau=0), "tau"),
        (lambda: ExponentialAverage(0.9, tau=5.0), "warmup"),
        (lambda: ExponentialAverage(0.9, warmup="ramp", power=0.5), "warmup"),
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
