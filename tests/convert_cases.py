"""The recorded states of other tools, and what each must become in an averaged model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, Rule
from swafast.convert import Conversion, load
from tests.frameworks.record_states import FOLDER, LAST, SAVED, Net, put

EMA = ExponentialAverage(0.9)
RATIO = ExponentialAverage(0.9, warmup="ratio")

#: Continued averages may differ by so much, in the norm of all params together. 0.0: not in a bit.
CLOSE = 2e-7


class Wrapped(nn.Module):
    """The model of tools that have one around it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()


@dataclass(frozen=True)
class Case:
    """A recorded state."""

    kind: str
    num_averaged: int  # what the average must go on with
    rule: Rule  # and with which rule
    steps: int | None = SAVED
    lost: tuple[str, ...] = ()  # the beginning of each thing that is lost
    tells_rule: bool = False  # whether the state has it
    difference: float = CLOSE
    every: int = 1
    use_buffers: bool = False
    is_wrapped: bool = False
    in_groups: bool = False  # whether it has the order of an optimizer with two groups
    options: Mapping[str, Any] = field(default_factory=dict)  # for load


KEPT = ("decay",)
OWN_BUFFERS = ("buffers",)
COUNT_OF_ONE = "the number of models"
#: Each recorded state, by the name of its file.
CASES = {
    "torch_swa": Case("torch", 7, EqualAverage(), None, difference=0.0),
    "torch_ema_fn": Case("torch", 7, EMA, None),
    "timm_v2": Case("timm", 1, EMA, None, (*KEPT, COUNT_OF_ONE), use_buffers=True),
    "timm_v3": Case(
        "timm",
        5,
        ExponentialAverage(0.9, warmup="power"),
        None,
        KEPT,
        difference=0.0,
        use_buffers=True,
        options={"num_averaged": 5},
    ),
    "timm_train": Case("timm", 1, EMA, None, (*KEPT, "state_dict", COUNT_OF_ONE), difference=0.0, use_buffers=True),
    "ema_pytorch": Case(
        "ema_pytorch",
        3,
        ExponentialAverage(0.9, warmup="power", inv_gamma=0.5),
        lost=("beta", "online_model"),
        every=2,
        use_buffers=True,
        options={"num_averaged": 3},
    ),
    "diffusers_ratio": Case(
        "diffusers",
        5,
        ExponentialAverage(0.9, warmup="ratio", min_decay=0.3),
        lost=OWN_BUFFERS,
        tells_rule=True,
    ),
    "diffusers_power": Case(
        "diffusers",
        7,
        ExponentialAverage(0.9, warmup="power", inv_gamma=2.0, power=0.75),
        lost=OWN_BUFFERS,
        tells_rule=True,
    ),
    "diffusers_files": Case("diffusers", 7, RATIO, tells_rule=True),
    "torch_ema_ratio": Case("torch_ema", 8, RATIO, lost=OWN_BUFFERS, tells_rule=True),
    "torch_ema_constant": Case("torch_ema", 1, EMA, None, (*OWN_BUFFERS, COUNT_OF_ONE), tells_rule=True),
    "lightning": Case("lightning", 7, EMA, lost=("decay", "current_model_state"), use_buffers=True, is_wrapped=True),
    "mmengine_swa": Case(
        "mmengine",
        4,
        EqualAverage(),
        lost=("the kind",),
        difference=0.0,
        every=2,
        options={"num_averaged": 4},
    ),
    "mmengine_ema": Case("mmengine", 7, EMA, lost=("the kind",), difference=0.0),
    "mmengine_annealing": Case(
        "mmengine",
        7,
        ExponentialAverage(0.9, warmup="power", inv_gamma=4, power=1.0),
        lost=("the kind",),
        difference=0.0,
    ),
    "mmengine_hook": Case("mmengine", 7, EMA, lost=("the kind", "ema_state_dict"), difference=0.0, is_wrapped=True),
    "ignite": Case("ignite", 1, EMA, None, ("momentum", COUNT_OF_ONE)),
    "composer_ema": Case(
        "composer",
        1,
        EMA,
        lost=("smoothing", "the trained model", COUNT_OF_ONE),
        use_buffers=True,
        is_wrapped=True,
    ),
    "composer_swa": Case("composer", 5, EqualAverage(), lost=("swa_start",), is_wrapped=True),
    "nemo": Case("nemo", 5, EMA, lost=("buffers", "opt", "every_n_steps"), tells_rule=True, every=2, in_groups=True),
    "ultralytics": Case(
        "ultralytics",
        8,
        ExponentialAverage(0.9, warmup="ramp", tau=20.0),
        lost=KEPT,
        difference=0.0,
        use_buffers=True,
    ),
}


@functools.cache
def _recorded(name: str) -> Any:
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def state_of(name: str) -> dict[str, Any]:
    """Return what a tool has written, to be changed at will."""
    return dict(copy.deepcopy(_recorded(name)["state"]))


def continued(name: str) -> dict[str, Tensor]:
    """Return the average of the tool after the last step."""
    return dict(_recorded(name)["continued"])


class Loading:
    """A model, its average, and what a state is loaded with."""

    def __init__(self, name: str, **options: Any) -> None:
        self.case = CASES[name]
        self.model = Wrapped() if self.case.is_wrapped else Net()
        self.net: nn.Module = self.model.net if isinstance(self.model, Wrapped) else self.model
        put(self.net, 0)
        rule = EqualAverage() if self.case.tells_rule else self.case.rule
        self.averaged = FusedAveragedModel(self.model, rule=rule, use_buffers=self.case.use_buffers, **options)
        self.options = dict(self.case.options)
        if self.case.in_groups:
            first = list(self.net.second.parameters())  # type: ignore[operator, union-attr]
            others = [param for param in self.net.parameters() if all(param is not each for each in first)]
            self.options["optimizer"] = torch.optim.SGD([{"params": first}, {"params": others}])

    def load(self, state: Any, **options: Any) -> Conversion:
        return load(self.averaged, state, **{**self.options, **options})

    def go_on(self) -> dict[str, Tensor]:
        """Take the steps after the state, and return the average."""
        for step in range(SAVED + 1, LAST + 1):
            if (step - 1) % self.case.every == 0:  # all of these tools update after the first of so many steps
                put(self.net, step)
                self.averaged.update_parameters(self.model)
        return self.averaged.averaged_state_dict()


def difference(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """Return the difference of tensors in the norm of all of them together."""
    off = sum(float((got[name].double() - expected[name].double()).square().sum()) for name in names)
    whole = sum(float(expected[name].double().square().sum()) for name in names)
    return (off / whole) ** 0.5
