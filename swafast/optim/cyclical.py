"""The cyclical learning rates of FGE and fast-SWA."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..terms.numbers import as_int, checked_number
from ..terms.pickling import pickled_from


@pickled_from("swafast.optim")
class Cycles(LRScheduler):
    """A torch scheduler that gives all groups one rate, which depends only on the step.

    Args:
        rate: returns the rate of a step, counted from 0; not part of the state dict.

    Raises:
        TypeError: ``optimizer`` is not an optimizer.
    """

    def __init__(self, optimizer: Optimizer, rate: Callable[[int], float]) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._rate = rate
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [self._rate(max(self.last_epoch, 0)) for _ in self.optimizer.param_groups]

    _get_closed_form_lr = get_lr  # SequentialLR calls it at the start

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "_rate"}


@pickled_from("swafast.optim")
@dataclass(frozen=True)
class Triangle:
    max_lr: float
    min_lr: float
    cycle: int

    def __call__(self, step: int) -> float:
        t = (step % self.cycle + 1) / self.cycle
        if t <= 0.5:
            return (1 - 2 * t) * self.max_lr + 2 * t * self.min_lr
        return (2 - 2 * t) * self.min_lr + (2 * t - 1) * self.max_lr


@pickled_from("swafast.optim")
@dataclass(frozen=True)
class Cosine:
    max_lr: float
    anneal: int
    until: int
    cycle: int

    def __call__(self, step: int) -> float:
        at = step if step < self.until else self.until - self.cycle + (step - self.until) % self.cycle
        return 0.5 * self.max_lr * (1 + math.cos(math.pi * at / self.anneal))


def cyclical_lr(optimizer: Optimizer, *, max_lr: float, min_lr: float, cycle: int) -> Cycles:
    """Make FGE's learning rate schedule: linear from ``max_lr`` to ``min_lr`` in half a cycle, and back, repeatedly.

    Call ``step()`` after each step of the optimizer. FGE keeps the model in the middle of each cycle, where the rate is
    lowest. ``averaged.attach(optimizer, start=cycle // 2, every=cycle)`` averages these models.

    Args:
        max_lr, min_lr: the highest and the lowest rate, of all groups.
        cycle: steps in a cycle, an even number.

    Raises:
        TypeError: ``optimizer`` is not an optimizer.
        ValueError: ``cycle`` is not an even int >= 2, or not ``max_lr >= min_lr > 0``.

    Paper: Garipov et al. 2018, "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", arXiv:1802.10026,
    section 5.
    """
    steps = as_int(cycle)
    if steps is None or steps < 2 or steps % 2:
        raise ValueError(f"cycle must be an even int >= 2, got {cycle!r}")
    checked_number("max_lr", max_lr, ">= min_lr", lambda rate: rate >= 0)
    checked_number("min_lr", min_lr, "> 0", lambda rate: rate > 0)
    if not max_lr >= min_lr:
        raise ValueError(f"max_lr must be >= min_lr > 0, got {max_lr!r} and {min_lr!r}")

    return Cycles(optimizer, Triangle(max_lr, min_lr, steps))


def cyclical_cosine_lr(optimizer: Optimizer, *, max_lr: float, anneal: int, until: int, cycle: int) -> Cycles:
    """Make fast-SWA's learning rate schedule: a cosine whose ``cycle`` steps before ``until`` repeat from there on.

    Call ``step()`` after each step of the optimizer. SWA averages the model at the end of each cycle:
    ``attach(optimizer, start=until, every=cycle)``. fast-SWA averages several models in one, with a smaller ``every``.

    Args:
        max_lr: the rate of all groups at the start.
        anneal: the step at which the cosine would reach 0.
        until: the step from which on the cycle repeats.
        cycle: steps in a cycle.

    Raises:
        TypeError: ``optimizer`` is not an optimizer.
        ValueError: not ``0 < cycle <= until <= anneal``, or ``max_lr`` is not above 0.

    Paper: Athiwaratkun et al. 2019, "There Are Many Consistent Explanations of Unlabeled Data: Why You Should Average",
    arXiv:1806.05594.
    """
    steps = {"cycle": cycle, "until": until, "anneal": anneal}
    for name, value in steps.items():
        checked_number(name, value, "a number of steps above 0", lambda number: number > 0)
    if not cycle <= until <= anneal:
        raise ValueError(
            f"cycle, until and anneal must be 0 < cycle <= until <= anneal, got {cycle}, {until}, {anneal}"
        )
    checked_number("max_lr", max_lr, "> 0", lambda rate: rate > 0)

    return Cycles(optimizer, Cosine(max_lr, anneal, until, cycle))
