"""Natural mistakes get Python's usual error, and in it the line that was meant."""

from __future__ import annotations

import importlib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import swafast
from swafast import (
    EqualAverage,
    ExponentialAverage,
    FusedAveragedModel,
    FusedAverages,
    PowerAverage,
    ShardedAveragedModel,
    ShardedAverages,
    Snapshots,
    Spread,
    update_bn,
)
from swafast.backends import cpu, library
from swafast.integrations.weight_average import Contract
from swafast.op import choice, torch_op
from swafast.optim import SWA, LowPrecision
from swafast.sharded import checkpoint
from swafast.terms import habits
from tests.conftest import NO_LIBRARY
from tests.support import refused, step_with_ones

LOADER: Any = torch.utils.data.DataLoader(torch.zeros(4, 3))  # type: ignore[arg-type]


def make() -> nn.Module:
    return nn.Linear(3, 2)


RULES = {"fast": EqualAverage()}
EMA = "rule=ExponentialAverage"
#: A call that somebody makes, the type of the error, and what its message must have.
CALLS: dict[str, tuple[Callable[[Any], object], type[Exception], str]] = {
    "a decay by position": (lambda m: FusedAveragedModel(m, 0.999), TypeError, f"{EMA}(0.999)"),
    "a decay by name": (lambda m: FusedAveragedModel(m, decay=0.99), TypeError, f"write {EMA}(0.99)"),
    "SWAG's columns": (lambda m: FusedAveragedModel(m, max_num_models=20), TypeError, "write deviations=20"),
    "SWAG's rank": (lambda m: ShardedAveragedModel(m, rank=10), TypeError, "write deviations=10"),
    "SWAG by name": (lambda m: FusedAverages(m, rules=RULES, swag=True), TypeError, "deviations=20 for SWAG, or dev"),
    "no covariance": (lambda m: FusedAveragedModel(m, no_cov_mat=True), TypeError, "deviations=0 for the variance"),
    "SWAG's sample": (lambda m: FusedAveragedModel(m).sample(0.5), AttributeError, "sampled_into(model, index, scale="),
    "SWAG's sample at 0": (lambda m: FusedAveragedModel(m).sample(0.0), AttributeError, "averaged.swapped_into(model)"),
    "a column alone": (lambda m: FusedAveragedModel(m, max_num_models=1), TypeError, ": write deviations=20 for SWAG,"),
    "columns that are none": (lambda m: FusedAveragedModel(m, max_num_models="a"), TypeError, ": write deviations=20"),
    "deviations by position": (lambda m: FusedAveragedModel(m, 10), RuntimeError, ": for SWAG, write deviations=10, w"),
    "SWAG's models": (lambda m: FusedAveragedModel(m, num_models=20), TypeError, "averaged.n_averaged counts the mode"),
    "SWAG's clamp": (lambda m: FusedAveragedModel(m, var_clamp=1e-6), TypeError, "the variance is never negative"),
    "torch-uncertainty's start": (lambda m: FusedAveragedModel(m, cycle_start=5), TypeError, 'start="5ep", every="1ep'),
    "its cycle": (lambda m: FusedAveragedModel(m, cycle_length=2), TypeError, 'attach(optimizer, every="2ep", steps_p'),
    "its samples": (lambda m: FusedAveragedModel(m, num_estimators=9), TypeError, "sampled_into(model, index, scale=."),
    "its update": (lambda m: FusedAveragedModel(m).update_wrapper(1), AttributeError, "update_parameters(model)"),
    "SWAG's count": (lambda m: FusedAveragedModel(m).n_models, AttributeError, "read averaged.n_averaged"),
    "SWAG's moments": (lambda m: FusedAveragedModel(m).generate_mean_var_covar(), AttributeError, "variance.<name> an"),
    "SWAG's export": (lambda m: FusedAveragedModel(m).export_numpy_params(), AttributeError, "averaged_state_dict(),"),
    "a sample's cov": (lambda m: swag(m).sampled_into(m, 0, cov=True), TypeError, "the covariance of all deviations:"),
    "a sample's block": (lambda m: swag(m).sampled_into(m, 0, block=True), TypeError, "for all parameters together"),
    "a sample's rank": (lambda m: swag(m).sample_to(m, 0, fullrank=True), TypeError, "leave it out, or construct the"),
    "a sample's noise": (lambda m: swag(m).sampled_into(m, 0, diag_noise=False), TypeError, "has the noise of the var"),
    "a sample's generator": (lambda m: swag(m).sampled_into(m, 0, generator=1), TypeError, "write seed=, any int"),
    "a scale by position": (lambda m: swag(m).sampled_into(m, 0, 0.5), TypeError, "write sampled_into(model, index, s"),
    "a scale for good": (lambda m: swag(m).sample_to(m, 0, 0.5), TypeError, ": write sample_to(model, index, scale=0."),
    "SWAG's collect": (lambda m: FusedAveragedModel(m).collect_model(m), AttributeError, "update_parameters(model)"),
    "SWAG's class": (lambda m: swafast.SWAG, AttributeError, "FusedAveragedModel(model, deviations=20)"),
    "timm's warm-up": (lambda m: FusedAveragedModel(m, use_warmup=True), TypeError, 'warmup="power"'),
    "diffusers' warm-up": (lambda m: FusedAveragedModel(m, use_ema_warmup=True), TypeError, 'warmup="power"'),
    "timm's buffers": (lambda m: FusedAveragedModel(m, exclude_buffers=True), TypeError, "buffers are copied by def"),
    "diffusers' schedule": (lambda m: FusedAveragedModel(m, update_after_step=9), TypeError, "(optimizer, start=10)"),
    "Composer's half-life": (lambda m: FusedAveragedModel(m, half_life=50), TypeError, ".from_half_life(50)"),
    "Composer's smoothing": (lambda m: FusedAveragedModel(m, smoothing=0.9), TypeError, f"{EMA}(0.9)"),
    "a misspelt name": (lambda m: FusedAveragedModel(m, formats="half"), TypeError, "did you mean format=?"),
    "several rules": (lambda m: FusedAveragedModel(m, rules={}), TypeError, "FusedAverages(model, rules=...)"),
    "a word": (lambda m: FusedAveragedModel(m, rule="ema"), TypeError, f"write {EMA}(0.999)"),
    "another word": (lambda m: FusedAveragedModel(m, rule="SWA"), TypeError, "write rule=EqualAverage()"),
    "a number": (lambda m: FusedAveragedModel(m, rule=0.9), TypeError, f"write {EMA}(0.9)"),
    "a class": (lambda m: FusedAveragedModel(m, rule=EqualAverage), TypeError, "rule=EqualAverage(...)"),
    "a rule by position": (lambda m: FusedAveragedModel(m, EqualAverage()), TypeError, "pass a rule as rule="),
    "params": (lambda m: FusedAveragedModel(m.parameters()), TypeError, "pass the model itself, not its parameters"),
    "a model's class": (lambda m: FusedAveragedModel(nn.Linear), TypeError, "write an instance"),
    "a state for a model": (lambda m: FusedAveragedModel(m.state_dict()), TypeError, "pass the model, not its state"),
    "a filter by name": (lambda m: FusedAveragedModel(m, include=lambda n: True), TypeError, "include=lambda name, p"),
    "names": (lambda m: FusedAveragedModel(m, include=["weight"]), TypeError, "lambda name, param: name in {...}"),
    "a dtype": (lambda m: FusedAveragedModel(m, format=torch.float32), ValueError, 'write format="float32"'),
    "a narrow dtype": (lambda m: FusedAveragedModel(m, format="bf16"), ValueError, 'write format="half"'),
    "one rule for several": (lambda m: FusedAverages(m, rule=EqualAverage()), TypeError, 'rules={"name": EqualAver'),
    "decays for several": (lambda m: FusedAverages(m, rules=[0.9, 0.99]), TypeError, 'rules={"fast": Exponential'),
    "decays by position": (lambda m: FusedAverages(m, [0.9, 0.99]), TypeError, 'rules={"fast": Exponential'),
    "a mapping by position": (lambda m: FusedAverages(m, {"a": EqualAverage()}), TypeError, 'rules={"a": Equal'),
    "decays by names": (lambda m: FusedAverages(m, rules={"a": 0.9}), TypeError, "write ExponentialAverage(0.9)"),
    "a decay for several": (lambda m: FusedAverages(m, decay=0.9), TypeError, 'rules={"ema": ExponentialAverage(0.9)}'),
    "a decay for shards": (lambda m: ShardedAveragedModel(m, 0.99), TypeError, f"write {EMA}(0.99)"),
    "a rule for shards": (lambda m: ShardedAveragedModel(m, EqualAverage()), TypeError, "write rule=EqualAverage()"),
    "a function for shards": (lambda m: ShardedAveragedModel(m, avg_fn=min), TypeError, "write rule="),
    "a device for shards": (lambda m: ShardedAveragedModel(m, device="cpu"), TypeError, "leave it out"),
    "a decay for several shards": (lambda m: ShardedAverages(m, decay=0.9), TypeError, 'rules={"ema": Exp'),
    "a sigma": (lambda m: PowerAverage(0.1), ValueError, "PowerAverage.from_sigma_rel(0.1)"),
    "a sigma as a tensor": (lambda m: PowerAverage(torch.tensor(0.1)), ValueError, ".from_sigma_rel(0.1)"),  # type: ignore[arg-type]
    "a sigma as an array": (lambda m: PowerAverage(np.array(0.1)), ValueError, ".from_sigma_rel(0.1)"),  # type: ignore[arg-type]
    "a sigma as a Decimal": (lambda m: PowerAverage(Decimal("0.1")), ValueError, ".from_sigma_rel(0.1)"),  # type: ignore[arg-type]
    "a sigma by name": (lambda m: PowerAverage(std=0.1), TypeError, "PowerAverage.from_sigma_rel(0.1)"),
    "sigma": (lambda m: PowerAverage(sigma=0.1), TypeError, ": write PowerAverage.from_sigma_rel(0.1)"),
    "sigma_rel": (lambda m: PowerAverage(sigma_rel=0.1), TypeError, ": write PowerAverage.from_sigma_rel(0.1)"),
    "std": (lambda m: PowerAverage.from_sigma_rel(std=0.1), TypeError, ": write PowerAverage.from_sigma_rel(0.1)"),
    "a gamma for a sigma": (lambda m: PowerAverage.from_sigma_rel(gamma=5), TypeError, "write PowerAverage(gamma=5)"),
    "beta": (lambda m: ExponentialAverage(beta=0.99), TypeError, ": write ExponentialAverage(0.99)"),
    "an old alpha": (lambda m: ExponentialAverage(alpha=0.99), TypeError, ": write ExponentialAverage(0.99)"),
    "mmengine's momentum": (lambda m: ExponentialAverage(momentum=0.001), TypeError, "write ExponentialAverage(0.999)"),
    "a half-life": (lambda m: ExponentialAverage(half_life=9), TypeError, "write ExponentialAverage.from_half_life(9)"),
    "half_life of it": (lambda m: ExponentialAverage.from_half_life(half_life=9), TypeError, ".from_half_life(9)"),
    "a decay of none": (lambda m: EqualAverage(decay=0.9), TypeError, ": write ExponentialAverage(0.9)"),
    "a decay after a device": (lambda m: FusedAveragedModel(m, "cpu", 0.999), TypeError, f": write {EMA}(0.999)"),
    "a decay as avg_fn": (lambda m: FusedAveragedModel(m, avg_fn=0.999), TypeError, f": write {EMA}(0.999)"),
    "a class as avg_fn": (lambda m: FusedAveragedModel(m, avg_fn=EqualAverage), TypeError, "rule=EqualAverage(...)"),
    "a tensor as a decay": (lambda m: FusedAveragedModel(m, torch.tensor(0.99)), TypeError, f"{EMA}(0.99)"),
    "a word by position": (lambda m: FusedAveragedModel(m, "ema"), RuntimeError, f"{EMA}(0.999)"),
    "start": (lambda m: FusedAveragedModel(m, start=9), TypeError, "write averaged.attach(optimizer, start=9)"),
    "every": (lambda m: FusedAverages(m, every=9, rules=RULES), TypeError, "averaged.attach(optimizer, every=9)"),
    "Polyak's tau": (lambda m: FusedAveragedModel(m, tau=0.005), TypeError, f": write {EMA}(0.995)"),
    "BYOL's tau": (lambda m: FusedAveragedModel(m, tau=0.996), TypeError, f": write {EMA}(0.996)"),
    "YOLO's tau": (lambda m: FusedAveragedModel(m, tau=2000), TypeError, 'warmup="ramp", tau=2000)'),
    "no warm-up": (lambda m: FusedAveragedModel(m, use_warmup=False), TypeError, "'use_warmup': leave it out"),
    "no warm-up of diffusers": (lambda m: FusedAveragedModel(m, use_ema_warmup=False), TypeError, ": leave it out"),
    "no warm-up at all": (lambda m: FusedAveragedModel(m, warmup=None), TypeError, "'warmup': leave it out"),
    "another warm-up": (lambda m: FusedAveragedModel(m, warmup="ramp"), TypeError, '(0.9999, warmup="ramp")'),
    "batches": (lambda m: FusedAveragedModel(m, half_life="1000ba"), TypeError, ".from_half_life(1000), and averaged."),
    "epochs": (lambda m: FusedAveragedModel(m, half_life="2ep"), TypeError, 'every="1ep", steps_per_epoch=...)'),
    "decays": (lambda m: FusedAveragedModel(m, decays=[0.9, 0.99]), TypeError, 'FusedAverages(model, rules={"fast": '),
    "decays of three": (lambda m: FusedAverages(m, decays=[0.9] * 3), TypeError, ': write rules={"average0": Expon'),
    "sigma_rels": (lambda m: FusedAverages(m, sigma_rels=[0.05, 0.1]), TypeError, '"slow": PowerAverage.from_sigma'),
    "a CPU": (lambda m: FusedAveragedModel(m, cpu=True), TypeError, ': write device="cpu"'),
    "no CPU": (lambda m: FusedAveragedModel(m, cpu=False), TypeError, ": leave it out"),
    "SA of a whole model": (lambda m: FusedAverages(m, rules=RULES, mesh=1), TypeError, "write ShardedAverages(model"),
    "a word for several": (lambda m: FusedAverages(m, rule="ema"), TypeError, '{"name": ExponentialAverage(0.999)}'),
    "a mean for several": (lambda m: FusedAverages(m, rule="swa"), TypeError, 'rules={"name": EqualAverage()}'),
    "a number for several": (lambda m: FusedAverages(m, rule=0.99), TypeError, '{"name": ExponentialAverage(0.99)}'),
    "a class for several": (lambda m: FusedAverages(m, rule=PowerAverage), TypeError, '{"name": PowerAverage(...)}'),
    "words by name": (lambda m: FusedAverages(m, rules={"a": "ema"}), TypeError, ": write ExponentialAverage(0.999)"),
    "classes by name": (lambda m: FusedAverages(m, rules={"a": EqualAverage}), TypeError, ": write EqualAverage(...)"),
    "a word as rules": (lambda m: FusedAverages(m, rules="ema"), TypeError, '{"name": ExponentialAverage(0.999)}'),
    "a word as rules, by position": (lambda m: FusedAverages(m, "ema"), TypeError, 'rules={"name": ExponentialAv'),
    "words for several shards": (lambda m: ShardedAverages(m, rule="ema"), TypeError, '{"name": ExponentialAverage(0'),
    "decays for shards": (lambda m: ShardedAveragedModel(m, decays=[0.9, 0.9]), TypeError, "ShardedAverages(model, "),
    "a function as the rule": (lambda m: ShardedAveragedModel(m, rule=min), TypeError, "but a Rule of your own"),
    "set_decay": (lambda m: FusedAveragedModel(m).set_decay(0.9), AttributeError, "averaged.rule = ExponentialAverage"),
    "ema_decay": (lambda m: FusedAveragedModel(m).ema_decay, AttributeError, "read averaged.rule"),
    "ema of several": (lambda m: several(m).ema, AttributeError, 'read averages["name"].module'),
    "model of several": (lambda m: several(m).model, AttributeError, 'read averages["name"].module'),
    "a count of several": (lambda m: several(m).num_updates, AttributeError, 'read averages["name"].n_averaged'),
    "reset of several": (lambda m: several(m).reset(), AttributeError, 'averages["name"].n_averaged.zero_()'),
    "a swap of several": (lambda m: several(m).swap(), AttributeError, 'averages["name"].swapped_into(model)'),
    "torchcontrib's start": (lambda m: SWA(sgd(m), start=9), TypeError, "write swa_start=9"),
    "torchcontrib's freq": (lambda m: SWA(sgd(m), freq=9), TypeError, "write swa_freq=9"),
    "torchcontrib's rate": (lambda m: SWA(sgd(m), lr=0.1), TypeError, "write swa_lr=0.1"),
    "torchcontrib's update": (lambda m: SWA(sgd(m)).update(), AttributeError, "optimizer.update_swa()"),
    "torchcontrib's swap": (lambda m: SWA(sgd(m)).swapped_into(m), AttributeError, "optimizer.swap_swa_sgd()"),
    "update": (lambda m: FusedAveragedModel(m).update(m), AttributeError, "averaged.update_parameters(model)"),
    "step": (lambda m: FusedAveragedModel(m).step(), AttributeError, "averaged.update_parameters(model)"),
    "step of several": (lambda m: several(m).step(), AttributeError, "averaged.update_parameters(model)"),
    "torch_ema's context": (lambda m: FusedAveragedModel(m).average_parameters(), AttributeError, "swapped_into"),
    "diffusers' store": (lambda m: FusedAveragedModel(m).store(), AttributeError, "swapped_into(model):"),
    "diffusers' shadow": (lambda m: FusedAveragedModel(m).shadow_params, AttributeError, "averaged.module"),
    "Composer's model": (lambda m: FusedAveragedModel(m).ema_model, AttributeError, "averaged.module"),
    "torch_ema's count": (lambda m: FusedAveragedModel(m).num_updates, AttributeError, "averaged.n_averaged"),
    "timm's decay": (lambda m: FusedAveragedModel(m).decay, AttributeError, "averaged.rule"),
    "update with params": (lambda m: FusedAveragedModel(m).update_parameters(m.parameters()), TypeError, "not its par"),
    "copy to params": (lambda m: averaged_once(m).copy_to([*m.parameters()]), TypeError, "not its parameters"),
    "a scheduler": (
        lambda m: FusedAveragedModel(m).attach(torch.optim.lr_scheduler.LambdaLR(sgd(m), lambda _: 1)),
        TypeError,
        "pass the optimizer of the scheduler",
    ),
    "a schedule's name": (lambda m: FusedAveragedModel(m).attach(sgd(m), update_every=2), TypeError, "write every=2"),
    "optimizers by name": (
        lambda m: FusedAveragedModel(m).attach({"all": torch.optim.SGD(m.parameters(), 0.1)}),
        TypeError,
        "got dict: write attach([*optimizers.values()])",
    ),
    "the model first": (lambda m: FusedAveragedModel(m).attach(m), TypeError, "write attach(optimizer, model)"),
    "remove": (lambda m: FusedAveragedModel(m).attach(sgd(m)).remove(), AttributeError, "attachment.detach()"),
    "update_bn turned round": (lambda m: update_bn(m, LOADER), TypeError, "update_bn(loader, model)"),
    "snapshots' load": (lambda m: Snapshots("absent").load(), AttributeError, "snapshots.synthesize(rule)"),
    "EMA": (lambda m: swafast.EMA, AttributeError, "FusedAveragedModel(model, rule=ExponentialAverage(0.999))"),
    "timm's class": (lambda m: swafast.ModelEmaV3, AttributeError, "from swafast.integrations.timm import ModelEma"),
    "diffusers' class": (lambda m: exec("from swafast import EMAModel"), ImportError, "swafast.integrations.diffusers"),
    "Lightning's class": (lambda m: swafast.EMAWeightAveraging, AttributeError, "integrations.lightning import Weight"),
    "the callback": (lambda m: exec("from swafast import WeightAverage"), ImportError, "integrations.lightning import"),
    "the callback of none": (
        lambda m: exec("from swafast.integrations import WeightAverage"),
        ImportError,
        "write from swafast.integrations.lightning import WeightAverage, or from swafast.integrations.transformers",
    ),
    "EMA by import": (lambda m: exec("from swafast import EMA"), ImportError, "FusedAveragedModel(model, rule="),
    "torch's class": (lambda m: exec("from swafast import AveragedModel"), ImportError, "import FusedAveragedModel"),
    "SWALR elsewhere": (lambda m: exec("from swafast import SWALR"), ImportError, "from swafast.optim import SWALR"),
    "update_bn elsewhere": (lambda m: exec("from swafast.optim import update_bn"), ImportError, "from swafast import"),
}  # fmt: skip


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def swag(model: nn.Module) -> Any:
    return FusedAveragedModel(model, deviations=2)


def averaged_once(model: nn.Module) -> FusedAveragedModel:
    return FusedAveragedModel(model, num_averaged=1)


def several(model: nn.Module) -> FusedAverages:
    return FusedAverages(model, rules={"fast": EqualAverage(), "slow": ExponentialAverage(0.9)})


@pytest.mark.parametrize(("call", "kind", "hint"), CALLS.values(), ids=CALLS)
def test_a_mistake_gets_the_line_that_was_meant(
    call: Callable[[Any], object], kind: type[Exception], hint: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(kind) as raised:
            call(make())
    assert type(raised.value) is kind
    assert hint in str(raised.value)


def weights() -> dict[str, torch.Tensor]:
    return make().state_dict()


#: A state, and what the error must have.
STATES: dict[str, tuple[Callable[[], Any], str]] = {
    "an export": (lambda: averaged_once(make()).averaged_state_dict(), "save averaged.state_dict()"),
    "timm's ModelEmaV3": (lambda: {f"module.{k}": v for k, v in weights().items()}, "state, num_averaged=n)"),
    "diffusers' EMAModel": (lambda: {"decay": 0.9, "shadow_params": [*weights().values()]}, "convert.load(averaged, s"),
    "a checkpoint": (
        lambda: {"epoch": 1, "averaged": FusedAveragedModel(make()).state_dict()},
        "load_state_dict(state['averaged'])",
    ),
    "Lightning's checkpoint": (lambda: {"epoch": 1, "state_dict": weights()}, "whole checkpoint, of 'epoch', 'state_"),
    "several averages": (lambda: several(make()).state_dict(), "load it into FusedAverages"),
    "swa_gaussian's SWAG": (
        lambda: {f"base.{k}{end}": v for k, v in weights().items() for end in ("_mean", "_sq_mean", "_cov_mat_sqrt")},
        "this is a state of swa_gaussian's SWAG",
    ),
    "a sharded state": (lambda: {**weights(), "checksum.module.weight": torch.zeros(2)}, "save full_state_dict()"),
}  # fmt: skip


#: Mistakes for which no line is right, and the end of the error.
BARE: dict[str, tuple[Callable[[Any], object], str]] = {
    "a warm-up of another kind": (lambda m: FusedAveragedModel(m, warmup=100), "argument 'warmup'"),
    "a share of Composer": (lambda m: FusedAveragedModel(m, smoothing="1ba"), "argument 'smoothing'"),
    "a decay that is none": (lambda m: FusedAveragedModel(m, decay=2), "argument 'decay'"),
    "a sigma that is none": (lambda m: PowerAverage(sigma=5), "argument 'sigma'"),
    "a rule of a folder": (lambda m: Snapshots("absent", decay=0.9), "argument 'decay'"),
    "a device of another kind": (lambda m: FusedAveragedModel(m, device=1.5), "got 1.5"),
    "a number as the rule": (lambda m: FusedAveragedModel(m, rule=5), "multi_avg_fn="),
}


@pytest.mark.parametrize(("call", "end"), BARE.values(), ids=BARE)
def test_where_no_line_is_right_there_is_none(call: Callable[[Any], object], end: str) -> None:
    with pytest.raises(TypeError, match=re.escape(end) + "$"):
        call(make())


@pytest.mark.parametrize(("state", "hint"), STATES.values(), ids=STATES)
def test_a_state_of_another_kind_gets_the_line_that_was_meant(state: Callable[[], Any], hint: str) -> None:
    averaged = FusedAveragedModel(make())
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for FusedAveragedModel") as raised:
        averaged.load_state_dict(state())
    assert hint in str(raised.value)
    with pytest.raises(RuntimeError, match="Missing key"):  # several are told too
        several(make()).load_state_dict(state() if "fast.n_averaged" not in state() else {})


#: States of other packages with the weights that they average.
FOREIGN: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "Lightning": lambda own: {"averaging_state": {"n_averaged": torch.tensor(7)}, "state_dict": own, "epoch": 1},
    "timm": lambda own: {f"module.{name}": value for name, value in own.items()},
    "ema_pytorch": lambda own: {
        **{"initted": torch.tensor(True), "step": torch.tensor(7), "online_model.weight": torch.zeros(2, 3)},
        **{f"ema_model.{name}": value for name, value in own.items()},
    },
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_line_for_a_state_of_another_package_loads_it(one_rank: None, kind: str) -> None:
    model, own = make(), weights()
    state, rules = FOREIGN[kind](own), {"name": EqualAverage()}
    for averaged in (
        *(FusedAveragedModel(model), FusedAverages(model, rules=rules)),
        *(ShardedAveragedModel(model), ShardedAverages(model, rules=rules)),
    ):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            averaged.load_state_dict(state)
        line = str(raised.value).rpartition(" write ")[2]
        exec(line, {"averaged": averaged, "averages": averaged, "state": state, "swafast": swafast, "n": 7})
        one: Any = averaged["name"] if isinstance(averaged, (FusedAverages, ShardedAverages)) else averaged
        assert one.n_averaged == 7
        assert all(torch.equal(value, own[name]) for name, value in one.averaged_state_dict().items())


#: A state, the class that shall load it, and what the error must have, or lack after a "-".
LOADED: dict[str, tuple[str, str, str]] = {
    "one into several": ("one", "several", ': write averages["name"].load_state_dict(state)'),
    "an export into several": ("export", "several", "save averages.state_dict(). To go on"),
    "exports into several": ("exports", "several", "save averages.state_dict(). To go on"),
    "an export into shards": ("export", "shards", "save averaged.state_dict(). To go on"),
    "an export into several shards": ("export", "several shards", "write ShardedAverages(model, rules=..., num_av"),
    "one into several shards": ("one", "several shards", ': write averages["name"].load_full_state_dict(state)'),
    "a part into several shards": ("part", "several shards", ': write averages["name"].load_state_dict(state)'),
    "a part into one": ("part", "one", "save full_state_dict() for this class"),
    "a part into several": ("part", "several", 'save full_state_dict(), and write averages["name"].load_state_dict'),
    "parts into one": (
        "parts",
        "one",
        "state of the averages 'e', for torch.distributed.checkpoint: save averages['e']",
    ),
    "parts into several": ("parts", "several", ": save full_state_dict() for this class"),
    "parts into shards": (
        "parts",
        "shards",
        "averages, 'e': load it into ShardedAverages, or keys that begin with 'e.'",
    ),
    "several into one": ("members", "one", "averages, 'fast', 'slow': load it into FusedAverages, or"),
    "a part of another model": ("another part", "shards", "-this is a"),
    "whole of another model": ("another", "shards", "-this is a"),
    "less than whole": ("less", "shards", "-averaged_state_dict"),
    "less than one": ("less", "one", "-averaged_state_dict"),
}


@pytest.mark.parametrize(("kind", "loader", "hint"), LOADED.values(), ids=LOADED)
def test_a_state_of_ours_is_told_by_its_kind(one_rank: None, kind: str, loader: str, hint: str) -> None:
    model, other = make(), nn.Sequential(make())
    one = averaged_once(model)
    less = one.state_dict()
    del less["module.weight"]
    states: dict[str, Callable[[], Any]] = {
        "one": one.state_dict,
        "less": lambda: less,
        "export": one.averaged_state_dict,
        "exports": lambda: {"fast": one.averaged_state_dict(), "slow": one.averaged_state_dict()},
        "members": lambda: several(model).state_dict(),
        "another": lambda: averaged_once(other).state_dict(),
        "part": lambda: ShardedAveragedModel(model).state_dict(),
        "another part": lambda: ShardedAveragedModel(other).state_dict(),
        "parts": lambda: ShardedAverages(model, rules={"e": EqualAverage()}).state_dict(),
    }
    loaders: dict[str, Callable[[], Any]] = {
        "one": lambda: one,
        "several": lambda: several(model),
        "shards": lambda: ShardedAveragedModel(model),
        "several shards": lambda: ShardedAverages(model, rules={"a": EqualAverage()}),
    }
    with pytest.raises((RuntimeError, ValueError)) as raised:
        loaders[loader]().load_state_dict(states[kind]())
    assert (hint.removeprefix("-") in str(raised.value)) is not hint.startswith("-")
    if loader == "shards":
        with pytest.raises((TypeError, ValueError)) as raised:
            loaders[loader]().load_full_state_dict(states[kind]())
        assert not hint.startswith("-") or hint[1:] not in str(raised.value)


def test_a_state_without_a_count_loads_as_the_hint_says() -> None:
    averaged, state = FusedAveragedModel(make()), {f"module.{key}": value for key, value in weights().items()}
    averaged.load_state_dict({**state, "n_averaged": torch.tensor(7)})
    assert averaged.n_averaged == 7
    assert torch.equal(averaged.module.weight, state["module.weight"])


def test_dumps_of_keys_end_after_three_names() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    averaged = FusedAveragedModel(model)
    with pytest.raises(RuntimeError) as raised:
        averaged.load_state_dict({f"other.{name}": value for name, value in averaged.state_dict().items()})
    assert str(raised.value).splitlines()[1:] == [
        '\tMissing key(s) in state_dict: "n_averaged", "module.0.weight", "module.0.bias" and 78 more. ',
        '\tUnexpected key(s) in state_dict: "other.n_averaged", "other.module.0.weight", "other.module.0.bias" and 78 '
        "more: this is a state of several averages, 'other': load it into FusedAverages, or keys that begin with "
        "'other.', without that, into one average",
    ]
    wide = FusedAveragedModel(nn.Sequential(*(nn.Linear(3, 3) for _ in range(40))))
    with pytest.raises(RuntimeError, match=r"and 77 more size mismatches: if the model has") as raised:
        averaged.load_state_dict(wide.state_dict())
    assert str(raised.value).count("size mismatch for") == 3
    with pytest.raises(ValueError, match=r"missing \['a', 'b', 'c'\]; unexpected \['x'\]$"):
        checkpoint._require_keys([*"abcde"], {"x": 1}, [])
    with pytest.raises(ValueError, match="one of timm's ModelEmaV3"):
        checkpoint._require_keys(["n_averaged", "module.a"], {"module.a": torch.zeros(1)}, [])


def test_means_of_batchnorm_are_not_taken_for_those_of_swag() -> None:
    model = nn.Sequential(make(), nn.BatchNorm1d(2))
    with pytest.raises(RuntimeError) as raised:
        FusedAveragedModel(model).load_state_dict(model.state_dict())
    assert "swa_gaussian" not in str(raised.value)
    assert "save averaged.state_dict()" in str(raised.value)


# A sharded average is no module


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_shards_tell_who_takes_them_for_a_module(one_rank: None) -> None:
    model = make()
    averaged: Any = ShardedAveragedModel(model, rule=EqualAverage())
    averages: Any = ShardedAverages(model, rules={"a": EqualAverage()})
    for call, hint in (
        (lambda: get_model_state_dict(averaged), "its state is averaged.state_dict()"),
        (lambda: averaged.module, "holds no copy of one"),
        (lambda: averages.named_parameters(), "holds no copy of one"),
        (lambda: averaged.sampled_into(model, 0, 0.5), "write sampled_into(model, index, scale=0.5)"),
        (lambda: averaged.sample_to(model, 0, cov=True), "the covariance of all deviations"),
        (lambda: averaged.full_state_dict(rank0=True), "write rank0_only=True"),
        (lambda: averages.full_state_dict(rank_0_only=True), "write rank0_only=True"),
        (lambda: averaged.full_state_dict(offload_to_cpu=True), "write cpu_offload=True"),
        (lambda: averaged.full_state_dict(True), "write rank0_only=True"),
        (lambda: averaged.full_state_dict(torch.bfloat16), "write averaged.averaged_state_dict(torch.bfloat16)"),
        (lambda: averaged.full_state_dict(dtype=torch.float32), "write averaged.averaged_state_dict(torch.float32)"),
        (lambda: averages.full_state_dict(dtype=torch.float32), 'averages["name"].averaged_state_dict(torch.float32)'),
        (lambda: averaged.averaged_state_dict(torch.bfloat16, True), "write rank0_only=True"),
        (lambda: averaged.load_full_state_dict({}, rank0=True), "write from_rank0=True"),
        (lambda: averages.load_full_state_dict({}, rank_0_only=True), "write from_rank0=True"),
        (lambda: averages.load_full_state_dict({}, True), "write from_rank0=True"),
        (lambda: averages.load_full_state_dict({}, rank0_only=True), "write from_rank0=True"),
        (lambda: averaged.state_dict(rank0_only=True), "write averaged.full_state_dict(rank0_only=True)"),
        (lambda: averages.state_dict(cpu=True), "write averaged.full_state_dict(cpu_offload=True)"),
        (lambda: averages.num_updates, 'read averages["name"].n_averaged'),
        (lambda: averages.reset(), 'averages["name"].n_averaged.zero_()'),
        (lambda: averages.module, 'with averages["name"].swapped_into(model)'),
        (lambda: averaged.update(model), "averaged.update_parameters(model)"),
        (lambda: averaged.load_state_dict(model.state_dict()), "save averaged.state_dict()"),
        (lambda: ShardedAveragedModel(model, rule="ema"), "write rule=ExponentialAverage(0.999)"),
    ):
        with pytest.raises((AttributeError, TypeError, ValueError), match=re.escape(hint)):
            call()
    backend = choice.choose_backends(device_types={"cpu"})[0].name
    shard = f"ShardedAveragedModel(rank 0 of 1, rule=EqualAverage, format='float32', backend={backend!r}, updates=0"
    shard += ", 2 tensors of 8 elements on cpu, 32 bytes)"
    assert repr(averaged) == shard
    assert repr(averages).splitlines() == ["ShardedAverages(", f"  'a': {shard}", ")"]
    assert (averaged.format, averaged.backend) == ("float32", backend)
    averaged.update_parameters(model.bfloat16().float())
    assert averaged.format == "float32"


# What hints must not change


def test_own_attributes_and_errors_of_the_users_stay() -> None:
    class Own(FusedAveragedModel):
        @property
        def shadow(self) -> str:
            return "own"

        @property
        def broken(self) -> int:
            raise ValueError("of the user")

    averaged = Own(make())
    averaged.ema_model = nn.Linear(1, 1)
    assert averaged.shadow == "own"
    assert isinstance(averaged.ema_model, nn.Linear)
    assert not hasattr(averaged, "update")
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'$"):
        averaged.nothing  # noqa: B018

    def include(name: str, param: torch.Tensor) -> bool:
        raise TypeError("of the user")

    with pytest.raises(TypeError, match=r"^of the user$"):
        FusedAveragedModel(make(), include=include)
    assert FusedAveragedModel(make(), include=lambda *_: True).n_averaged == 0


def test_small_gammas_by_name_and_from_sigma_rel_stay() -> None:
    assert PowerAverage(gamma=0.1).gamma == 0.1
    assert 0 < PowerAverage.from_sigma_rel(0.28).gamma < 0.28
    assert PowerAverage(0.0) == PowerAverage(gamma=0)
    assert PowerAverage(0.5).gamma == 0.5


def test_no_hint_names_what_is_there() -> None:
    averaged, averages = FusedAveragedModel(make()), several(make())
    assert [name for name in habits.OF_MODULES if hasattr(averaged, name) or hasattr(averages, name)] == []
    assert [name for name in habits.OF_SHARDS if hasattr(ShardedAveragedModel, name)] == []
    assert [name for name in habits.OF_SNAPSHOTS if hasattr(Snapshots, name)] == []
    assert {*habits.NAMES}.isdisjoint({*dir(swafast)} - {*swafast.__all__})
    assert all(callable(get_model_state_dict) and hint for hint in habits.NAMES.values())


def test_swalr_is_torchs_own() -> None:
    from swafast.optim import SWALR

    assert SWALR is torch.optim.swa_utils.SWALR


# What was chosen


@pytest.mark.parametrize(
    ("dtype", "format", "backend", "chosen"),
    [
        (torch.float32, None, None, "float32"),
        (torch.bfloat16, None, None, "exact"),
        (torch.float16, None, "reference", "mirrored"),
        (torch.float64, None, None, "own"),
        (torch.float32, "compact", "reference", "compact"),
    ],
)
def test_format_and_backend_say_what_was_chosen(
    dtype: torch.dtype, format: str | None, backend: str | None, chosen: str
) -> None:
    model = make().to(dtype)
    averaged = FusedAveragedModel(model, format=format, backend=backend)
    assert averaged.format == chosen
    averaged.update_parameters(model)
    fast = choice.choose_backends(backend, {"cpu"})[0].name
    expected = "reference" if dtype == torch.float64 else fast
    assert averaged.backend == expected
    nbytes = sum(tensor.nbytes for name, tensor in averaged.state_dict().items() if name != "n_averaged")
    assert averaged.nbytes == nbytes
    params = list(model.parameters())
    numel = sum(param.numel() for param in params)
    assert repr(averaged) == (
        f"FusedAveragedModel(rule=EqualAverage, format={chosen!r}, backend={expected!r}, updates=1, "
        f"{len(params)} tensors of {numel} elements on cpu, {nbytes} bytes)"
    )


@pytest.mark.parametrize(
    ("asked", "change", "chosen"),
    [
        ("compensated", nn.Module.half, "mirrored"),
        ("float32", nn.Module.bfloat16, "exact"),
        ("compact", nn.Module.float, "float32"),
        ("exact", nn.Module.double, "own"),
    ],
)
def test_what_was_asked_for_is_not_taken_for_what_was_chosen(asked: str, change: Any, chosen: str) -> None:
    averaged = FusedAveragedModel(make(), format=asked)
    change(averaged)
    assert averaged.format == chosen


@pytest.mark.parametrize("kind", [FusedAveragedModel, ShardedAveragedModel])
@pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the native library")
def test_a_backend_that_serves_a_part_is_not_taken_for_all(kind: Any, one_rank: None) -> None:
    model = nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2))
    averaged = kind(model, backend="cpu")
    averaged.update_parameters(model)
    assert (averaged.format, averaged.backend) == ("own, float32", "reference, cpu")


def test_format_and_backend_may_be_assigned_and_are_pickled_as_asked() -> None:
    model = make()
    averaged = FusedAveragedModel(model)
    assert averaged.__getstate__()["format"] is None
    averaged.format, averaged.backend = "compact", "reference"
    averaged.update_parameters(model)
    assert (averaged.format, averaged.backend) == ("float32", "reference")  # until a cast
    assert averaged.__getstate__()["format"] == "compact"
    averaged.bfloat16()
    assert averaged.format == "compact"
    averaged.format = averaged.backend = None
    averaged.bfloat16()
    averaged.update_parameters(model.bfloat16())
    assert averaged.format == "exact"


def test_a_print_hides_planes_and_waits_for_no_device() -> None:
    averaged = FusedAveragedModel(make().bfloat16(), rule=ExponentialAverage(0.9))
    averages = several(make())
    assert "\n" not in repr(averaged)
    assert "rule=ExponentialAverage(decay=0.9)" in repr(averaged)
    assert repr(averages).splitlines()[1] == f"  'fast': {averages['fast']!r}"
    averaged.to("meta")
    assert "updates counted on meta" in repr(averaged)  # as on a GPU, where reading it would wait
    attachment = FusedAveragedModel(model := make()).attach(sgd(model))
    attachment.detach()
    assert repr(attachment).endswith(", detached)")
    assert repr(Snapshots("absent")).endswith("absent', 0 snapshots)")


def test_prints_of_what_users_hold_are_short_lines_without_addresses(tmp_path: Path) -> None:
    model = make()
    of_swag = FusedAveragedModel(model, deviations=9)
    for _ in range(9):
        step_with_ones(sgd(model), model.parameters())
        model.weight.data.add_(torch.randn_like(model.weight))
        of_swag.update_parameters(model)
    subspace = of_swag.subspace(7)
    assert repr(subspace).endswith(", ...])")
    averages, snapshots = several(model), Snapshots(tmp_path)
    averages.update_parameters(model)
    snapshots.save(averages)
    assert repr(snapshots).endswith(", 1 snapshot)")
    average, many = Contract(ExponentialAverage(0.99), start="0.25dur"), Contract(rules={"fast": EqualAverage()})
    assert repr(many) == "Contract(rules=['fast'], start=0, every=1, no averages yet)"
    assert repr(average) == ("Contract(rule=ExponentialAverage(decay=0.99), start='0.25dur', every=1, no averages yet)")
    average.make(model)
    attachment = average.follow([sgd(model)], model, duration=8)
    assert repr(average) == (
        "Contract(rule=ExponentialAverage(decay=0.99), schedule=Schedule(start=2, every=1, end=8), step=0, "
        "averaged=FusedAveragedModel)"
    )
    low_precision = LowPrecision(sgd(make()), bits=5)
    own = FusedAveragedModel(model, avg_fn=lambda average, param, n: param)
    rules = (PowerAverage(6.5), ExponentialAverage(0.9, warmup="ratio"), Spread(3))
    held = (subspace, snapshots, average, many, attachment, attachment.schedule, low_precision, own, of_swag, *rules)
    for each in held:
        assert "\n" not in str(each)
        assert " at 0x" not in str(each)
        assert len(str(each).replace(str(tmp_path), "")) < 200
    average.unfollow()
    assert repr(average).endswith(", detached)")


def test_help_says_what_to_import_and_where_to_read() -> None:
    described = swafast.__doc__ or ""
    code = re.findall(r"^    (?:from swafast import .*|averaged = .*)$", described, re.M)
    names = {"model": make()}
    exec("\n".join(line.strip() for line in code), names)
    assert isinstance(names["averaged"], FusedAveragedModel)
    named = re.findall(r"^(?:swafast\.)?([A-Za-z_]\w+)(?:, (\w+))?  +\S", described, re.M)
    assert len(named) > 10
    for name in (name for pair in named for name in pair if name):
        assert importlib.import_module(f"swafast.{name}") if name == "integrations" else getattr(swafast, name)


@pytest.mark.parametrize(
    ("dtype", "deviations", "told"),
    [
        (torch.float32, Spread(4, dtype=torch.bfloat16), "4 (bfloat16)"),
        (torch.bfloat16, Spread(4, dtype=torch.float32), "4 (float32)"),
        (torch.float32, Spread(4, dtype=torch.float32), "4"),
        (torch.bfloat16, Spread(4, dtype=torch.bfloat16), "4"),
        (torch.bfloat16, 4, "4"),
        (torch.float32, Spread(0, dtype=torch.bfloat16), "0"),
    ],
)
def test_a_print_shows_a_dtype_of_deviations_that_is_another(dtype: torch.dtype, deviations: Any, told: str) -> None:
    averaged = FusedAveragedModel(make().to(dtype), deviations=deviations)
    assert f", deviations={told}, " in repr(averaged)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is logged, once the test sets the level."""
    logged: list[str] = []
    handler, logger = logging.Handler(logging.INFO), logging.getLogger("swafast")
    monkeypatch.setattr(handler, "emit", lambda record: logged.append(record.getMessage()))
    logger.addHandler(handler)
    yield logged
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_one_log_line_says_what_was_chosen(lines: list[str]) -> None:
    model = nn.ModuleList([make(), nn.Linear(2, 2).double()])
    FusedAveragedModel(model).update_parameters(model)
    assert lines == []  # unless the user asks
    logging.getLogger("swafast").setLevel(logging.INFO)
    averaged = FusedAveragedModel(model)
    for _ in range(3):
        averaged.update_parameters(model)
    FusedAveragedModel(model, backend="reference").update_parameters(model)
    FusedAveragedModel(model, avg_fn=lambda average, param, n: param).update_parameters(model)
    first, second, third = lines
    if cpu.unavailable() is None:
        assert first == (
            "swafast averages 4 tensors: backend reference (2 tensors), cpu (2 tensors); format float32, own; 80 bytes"
            "; passed over: cpu: does not take '1.weight' (torch.float64) and 1 more"
        )
        assert second.endswith("passed over: cpu: another one was asked for")
        assert third.endswith("passed over: cpu: an averaging function of your own runs in torch")


@pytest.mark.parametrize("kind", [FusedAveragedModel, ShardedAveragedModel])
@pytest.mark.parametrize("options", [{}, {"offload": "cpu"}, {"overlap": True}], ids=str)
def test_a_training_logs_one_line(kind: Any, options: dict[str, Any], lines: list[str]) -> None:
    logging.getLogger("swafast").setLevel(logging.INFO)
    model = nn.Sequential(make(), nn.BatchNorm1d(2))
    optimizer, averaged = sgd(model), kind(model)
    with averaged.attach(optimizer, **options):
        for _ in range(3):
            step_with_ones(optimizer, model.parameters())
    with averaged.swapped_into(model):
        pass
    averaged.load_state_dict(averaged.state_dict())
    averaged.update_parameters(model)
    (line,) = lines
    assert line.startswith("swafast averages 4 tensors and copies 3: backend ")
    assert f"format float32; {averaged.nbytes} bytes" in line


# A wrapper of the optimizer


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's: a subclass whose base class is not initialised, around the optimizer that steps."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Plain(Wrapper):
    """As Lightning's: no optimizer by its class."""

    __class__ = object  # type: ignore[assignment]


@pytest.mark.parametrize("wrap", [Wrapper, Plain, lambda optimizer: Wrapper(Plain(optimizer))])
def test_attach_follows_the_optimizer_inside_a_wrapper(wrap: Callable[[Any], Any]) -> None:
    model = make()
    optimizer = sgd(model)
    wrapper, averaged = wrap(optimizer), FusedAveragedModel(model)
    with averaged.attach(wrapper):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        wrapper.step()
        assert averaged.n_averaged == 1
        assert "swafast" in str(optimizer.state_dict()["param_groups"][0].keys())


class Writes(Wrapper):
    """As Lookahead: it has a state of its own, and writes params after the step of the optimizer inside."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.state: Any = {}


def test_a_wrapper_with_a_state_of_its_own_is_refused() -> None:
    model = make()
    with refused(
        TypeError, "must run torch's hooks, got Writes: pass the optimizer inside it. If Writes writes params"
    ):
        FusedAveragedModel(model).attach(Writes(sgd(model)))


# What stands beside


def test_a_second_copy_of_the_package_does_not_define_the_op_again(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("swafast.op.another_copy", torch_op.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copy)
    spec.loader.exec_module(copy)
    average = torch.zeros(4)
    torch.ops.swafast.update_([average], [], [torch.ones(4)], torch.tensor(0), "float32", 0, [0.0] * 4)
    assert torch.equal(average, torch.ones(4))


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{NO_LIBRARY}: {cpu.unavailable()}")
@pytest.mark.parametrize("kept", [100, 5000, -1])
@pytest.mark.parametrize("is_named", [True, False])
def test_a_library_that_is_cut_short_is_told(
    kept: int, is_named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(library.loaded()._name).read_bytes()
    path = tmp_path / "libswafast.so"
    path.write_bytes(whole[:kept])
    if is_named:
        monkeypatch.setenv("SWAFAST_LIBRARY", str(path))
    else:
        monkeypatch.delenv("SWAFAST_LIBRARY", raising=False)
        monkeypatch.setattr(library, "_candidates", lambda: [path])
        monkeypatch.setattr(choice, "_warned", set())
    library.load.cache_clear()
    missing = f"is cut short, its last {len(whole) - len(whole[:kept])} bytes are missing: install it again"
    try:
        if is_named:
            with pytest.raises(RuntimeError, match=rf"SWAFAST_LIBRARY: .*{missing}. Set SWAFAST_LIBRARY to"):
                FusedAveragedModel(make())
            assert FusedAveragedModel(make(), backend="reference").n_averaged == 0
        else:
            with pytest.warns(RuntimeWarning, match=missing):
                FusedAveragedModel(make())
    finally:
        library.load.cache_clear()
