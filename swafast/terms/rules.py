"""Averaging rules: the weight of the newest model as a function of how many the average holds already.

Every rule here is one number per update, ``average += weight * (param - average)``. The kernels evaluate the same
functions from :class:`KernelTerms` (``csrc/weight.h``), so that nothing is read back to the host.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..torch_private.core import EMA_FACTORIES, SWA_FACTORIES, closure_of
from .pickling import pickled_from
from .weight import KernelTerms


@pickled_from("swafast")
class Rule:
    """How the weight of the newest model follows from the number of models averaged before it.

    Subclass it and define :meth:`weight` for a rule of your own. A rule is also a ``multi_avg_fn``: an instance can be
    handed to ``torch.optim.swa_utils.AveragedModel`` as it is.
    """

    def weight(self, num_averaged: int) -> float:
        """Give the weight of the newest model, in [0, 1], when ``num_averaged`` models are in the average.

        The first update (``num_averaged == 0``) is always an exact copy, so a rule returns 1 there. A rule with kernel
        terms has it from them.
        """
        terms = self.kernel_terms()
        if terms is None:
            raise NotImplementedError(f"{type(self).__name__} must define weight(num_averaged)")
        return terms.weight(num_averaged)

    def kernel_terms(self) -> KernelTerms | None:
        """Give the terms from which a kernel evaluates this rule by itself, or None where only Python can.

        Without terms the weight is worked out on the host, which on a GPU waits for the device at each update.
        """
        return None

    @torch.no_grad()
    def __call__(self, averages: Sequence[Tensor], params: Sequence[Tensor], num_averaged: Tensor | int) -> None:
        """Update ``averages`` in place, as a ``multi_avg_fn`` of torch's class; integer tensors are copied."""
        if not averages:
            return
        if averages[0].is_floating_point() or averages[0].is_complex():
            torch._foreach_lerp_(list(averages), list(params), self.weight(int(num_averaged)))
        else:
            torch._foreach_copy_(list(averages), list(params))


@pickled_from("swafast")
@dataclass(frozen=True)
class EqualAverage(Rule):
    """The equal mean of all models so far, ``weight = 1 / (n + 1)``: stochastic weight averaging.

    Paper: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407.
    """

    def kernel_terms(self) -> KernelTerms:
        return KernelTerms.of(KernelTerms.EQUAL)


@pickled_from("swafast")
@dataclass(frozen=True)
class ExponentialAverage(Rule):
    """The exponential moving average, ``weight = 1 - decay``, with the warm-ups people use.

    With a warm-up the decay of the n-th update is clamped to ``[min_decay, decay]``, from

    - ``warmup="power"``: ``1 - (1 + n / inv_gamma) ** -power``, as in timm and diffusers;
    - ``warmup="ratio"``: ``(1 + n) / (10 + n)``, as in TensorFlow's ``ExponentialMovingAverage``.

    Args:
        decay: in [0, 1]; the share that the old average keeps.
        warmup: ``"power"``, ``"ratio"`` or None.
        inv_gamma: > 0, updates; the scale of the power warm-up.
        power: > 0; 2/3 suits runs of a million updates and more, 3/4 shorter ones.
        min_decay: in [0, decay]; the least decay that a warm-up may give.

    Raises:
        ValueError: an argument is out of its range, or not a number.
    """

    decay: float = 0.999
    warmup: Literal["power", "ratio"] | None = None
    inv_gamma: float = 1.0
    power: float = 2.0 / 3.0
    min_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_number("decay", self.decay, "in [0, 1]", lambda x: 0.0 <= x <= 1.0)
        if self.warmup not in (None, "power", "ratio"):
            raise ValueError(f"warmup must be 'power', 'ratio' or None, got {self.warmup!r}")
        _check_number("inv_gamma", self.inv_gamma, "> 0 and finite", lambda x: 0.0 < x < math.inf)
        _check_number("power", self.power, "> 0 and finite", lambda x: 0.0 < x < math.inf)
        _check_number("min_decay", self.min_decay, f"in [0, decay={self.decay}]", lambda x: 0.0 <= x <= self.decay)
        if self.warmup != "power" and (self.inv_gamma, self.power) != (1.0, 2.0 / 3.0):
            raise ValueError(f"warmup must be 'power' for inv_gamma and power to have a say, got {self.warmup!r}")
        if self.warmup is None and self.min_decay != 0.0:
            raise ValueError("warmup must be 'power' or 'ratio' for min_decay to have a say, got None")

    @classmethod
    def from_half_life(
        cls,
        updates: float,
        *,
        warmup: Literal["power", "ratio"] | None = None,
        inv_gamma: float = 1.0,
        power: float = 2.0 / 3.0,
        min_decay: float = 0.0,
    ) -> ExponentialAverage:
        """Make the EMA in which a model counts half as much once ``updates`` further ones have come.

        Raises:
            ValueError: ``updates`` is not a positive, finite number.
        """
        _check_number("updates", updates, "> 0 and finite", lambda x: 0.0 < x < math.inf)
        return cls(0.5 ** (1.0 / updates), warmup, inv_gamma, power, min_decay)

    def kernel_terms(self) -> KernelTerms:
        low, high = 1.0 - self.decay, 1.0 - self.min_decay
        if self.warmup is None:
            return KernelTerms.of(KernelTerms.CONSTANT, low)
        if self.warmup == "power":
            return KernelTerms.of(KernelTerms.POWER_WARMUP, low, high, self.inv_gamma, self.power)
        return KernelTerms.of(KernelTerms.RATIO_WARMUP, low, high)


@pickled_from("swafast")
@dataclass(frozen=True)
class PowerAverage(Rule):
    """The power-function average, as wide as a fixed share of the training: ``decay = (1 - 1/(n+1)) ** (gamma+1)``.

    ``gamma = 0`` is the equal mean; a larger gamma forgets the past sooner.

    Paper: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696,
    section 3.1 and appendix C.

    Args:
        gamma: >= 0; the exponent of the profile.

    Raises:
        ValueError: ``gamma`` is negative, infinite or NaN.
    """

    gamma: float = 6.94

    def __post_init__(self) -> None:
        _check_number("gamma", self.gamma, ">= 0 and finite", lambda x: 0.0 <= x < math.inf)

    @classmethod
    def from_sigma_rel(cls, sigma_rel: float) -> PowerAverage:
        """Make the average whose profile has the relative standard deviation ``sigma_rel``, as the paper names widths.

        Solves ``sigma_rel = sqrt(gamma + 1) / ((gamma + 2) * sqrt(gamma + 3))`` for gamma by bisection.

        Raises:
            ValueError: ``sigma_rel`` is not in (0, 1 / sqrt(12)]; the upper end is the equal mean.
        """
        widest = 12.0**-0.5
        _check_number("sigma_rel", sigma_rel, f"in (0, {widest:.6f}]", lambda x: 0.0 < x <= widest)
        low, high = 0.0, 2.0 / sigma_rel  # sigma_rel < 1 / (gamma + 2), so gamma lies below the upper end
        while high - low > 1e-12 * (1.0 + low):
            middle = 0.5 * (low + high)
            if middle in (low, high):
                break
            wider = math.sqrt(middle + 1.0) / ((middle + 2.0) * math.sqrt(middle + 3.0)) > sigma_rel
            low, high = (middle, high) if wider else (low, middle)
        return cls(0.5 * (low + high) if low > 0.0 else 0.0)

    def kernel_terms(self) -> KernelTerms:
        return KernelTerms.of(KernelTerms.POWER, self.gamma)


@pickled_from("swafast")
@dataclass(frozen=True)
class FixedWeight(Rule):
    """A weight worked out beforehand: what a rule in Python alone gave for one update."""

    value: float

    def weight(self, num_averaged: int) -> float:
        return self.value

    def kernel_terms(self) -> KernelTerms:
        return KernelTerms.of(KernelTerms.CONSTANT, self.value)


def checked_weight(rule: Rule, num_averaged: int) -> float:
    """Give the weight of a rule worked out in Python; a first update copies, whatever the rule.

    Raises:
        ValueError: the rule gives something that is not a number in [0, 1].
    """
    if num_averaged == 0:
        return 1.0
    weight = float(rule.weight(num_averaged))
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight that {rule!r} gives at n = {num_averaged} must be in [0, 1], got {weight}")
    return weight


def terms_of(rule: Rule) -> KernelTerms | None:
    """Give a rule's terms; None where a subclass has a ``weight`` of its own that inherited terms know nothing of."""
    return rule.kernel_terms() if _terms_speak_for_weight(cast(Any, type(rule))) else None


@functools.lru_cache(maxsize=256)
def _terms_speak_for_weight(kind: Any) -> bool:
    definers = {name: next(c for c in kind.__mro__ if name in c.__dict__) for name in ("weight", "kernel_terms")}
    return issubclass(definers["kernel_terms"], definers["weight"])


_DEFAULT = EqualAverage()


def rule_of(avg_fn: object, multi_avg_fn: object) -> Rule | None:
    """Give the rule that these two arguments of torch's class stand for, or None for a function of the user's own.

    torch's own four averaging functions are recognised, so that code written for torch's class runs fused as it is.
    """
    for given in (multi_avg_fn, avg_fn):
        if isinstance(given, Rule):
            return given
    function = avg_fn if multi_avg_fn is None else multi_avg_fn
    if function is None:
        return _DEFAULT
    if any(closure_of(factory, function) is not None for factory in SWA_FACTORIES):
        return _DEFAULT
    for factory in EMA_FACTORIES:
        closure = closure_of(factory, function)
        if closure is not None:
            return ExponentialAverage(float(closure["decay"]))
    return None


def _check_number(argument: str, value: object, expected: str, holds: Callable[[float], bool]) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        good = number and holds(float(value))  # type: ignore[arg-type]  # NaN holds no comparison
    except OverflowError:  # an int beyond all floats
        good = False
    if not good:
        raise ValueError(f"{argument} must be {expected}, got {value!r}")
