"""Learning rates that come in cycles: FGE's, and fast-SWA's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..terms.pickling import pickled_from


@pickled_from("swafast.optim")
class Cycles(LRScheduler):
    """A scheduler of torch's whose rate, that of all groups, depends on the step alone.

    Args:
        rate: ``rate(step)`` for steps from 0; no part of the state dict.

    Raises:
        TypeError: ``optimizer`` is none.
    """

    def __init__(self, optimizer: Optimizer, rate: Callable[[int], float]) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._rate = rate
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [self._rate(max(self.last_epoch, 0)) for _ in self.optimizer.param_groups]

    _get_closed_form_lr = get_lr  # what SequentialLR begins with

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
    """Give FGE's schedule: from ``max_lr`` down to ``min_lr`` in half a cycle and back, over and over.

    Step it after each step of the optimizer. Models worth keeping are those half-way through a cycle, where the rate is
    least: ``averaged.attach(optimizer, start=cycle // 2, every=cycle)`` averages them.

    Args:
        cycle: steps, an even number.

    Raises:
        ValueError: ``cycle`` is no even int >= 2, or rates are not ``max_lr >= min_lr > 0``.

    Paper: Garipov et al. 2018, "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", arXiv:1802.10026,
    section 5.
    """
    if not isinstance(cycle, int) or cycle < 2 or cycle % 2:
        raise ValueError(f"cycle must be an even int >= 2, got {cycle!r}")
    if not max_lr >= min_lr > 0:
        raise ValueError(f"max_lr must be >= min_lr > 0, got {max_lr!r} and {min_lr!r}")

    return Cycles(optimizer, Triangle(max_lr, min_lr, cycle))


def cyclical_cosine_lr(optimizer: Optimizer, *, max_lr: float, anneal: int, until: int, cycle: int) -> Cycles:
    """Give fast-SWA's schedule: a cosine to 0 at step ``anneal``, whose last ``cycle`` steps before ``until`` repeat.

    Step it after each step of the optimizer. SWA averages the model at the end of each cycle,
    ``attach(optimizer, start=until, every=cycle)``; fast-SWA several within one, with a smaller ``every``.

    Args:
        max_lr: the rate at the start.
        anneal: the step at which the cosine would come to 0.
        until: the step from which on cycles repeat.
        cycle: steps.

    Raises:
        ValueError: not ``0 < cycle <= until <= anneal``, or ``max_lr`` is not above 0.

    Paper: Athiwaratkun et al. 2019, "There Are Many Consistent Explanations of Unlabeled Data: Why You Should Average",
    arXiv:1806.05594.
    """
    if not 0 < cycle <= until <= anneal:
        raise ValueError(
            f"cycle, until and anneal must be 0 < cycle <= until <= anneal, got {cycle}, {until}, {anneal}"
        )
    if not max_lr > 0:
        raise ValueError(f"max_lr must be > 0, got {max_lr!r}")

    return Cycles(optimizer, Cosine(max_lr, anneal, until, cycle))
