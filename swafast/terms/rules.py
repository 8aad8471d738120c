"""Averaging rules: the weight of the newest model as a function of the number of models already averaged.

An update is ``average += weight * (param - average)``, with one weight for all params. The kernels compute the weight
from :class:`KernelTerms` (``csrc/weight.h``), so the host need not read the counter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..torch_private.core import SWA_FACTORIES, closure_of, decay_of
from . import hints
from .coefficients import WIDEST, gamma_of
from .numbers import as_number, checked_number
from .pickling import pickled_from
from .spelled import spell_rule
from .warn import warn_user
from .weight import KernelTerms

_hinted = functools.partial(hints.hinted, makes_rule=True)


@pickled_from("swafast")
class Rule:
    """Base class of rules: how the weight of the newest model follows from the number of models averaged before it.

    For your own rule, subclass it and define :meth:`weight`. An instance also works as the ``multi_avg_fn`` of
    ``torch.optim.swa_utils.AveragedModel``.
    """

    def weight(self, num_averaged: int) -> float:
        """Return the weight of the newest model, in [0, 1], if ``num_averaged`` models are in the average.

        The first update (``num_averaged == 0``) always copies, whatever a rule returns. By default the weight is
        computed from :meth:`kernel_terms`; without them this raises NotImplementedError.
        """
        terms = self.kernel_terms()
        if terms is None:
            raise NotImplementedError(f"{type(self).__name__} must define weight(num_averaged), got no such method")
        return terms.weight(num_averaged)

    def kernel_terms(self) -> KernelTerms | None:
        """Return the terms from which a kernel computes the weight, or None if only :meth:`weight` can compute it.

        Without terms the host computes the weight, and on a GPU it waits for the device at each update.
        """
        return None

    @torch.no_grad()
    def __call__(self, averages: Sequence[Tensor], params: Sequence[Tensor], num_averaged: Tensor | int) -> None:
        """Update ``averages``, all of one device and dtype, in place, as a ``multi_avg_fn``. Integers are copied.

        The host reads ``num_averaged``, which waits for a GPU.
        """
        if not averages:
            return
        if averages[0].is_floating_point() or averages[0].is_complex():
            torch._foreach_lerp_(list(averages), list(params), self.weight(int(num_averaged)))
        else:
            torch._foreach_copy_(list(averages), list(params))


@pickled_from("swafast")
@hints.hinted_rule
@dataclass(frozen=True)
class EqualAverage(Rule):
    """The equal mean of all models so far, ``weight = 1 / (n + 1)``: stochastic weight averaging (SWA).

    Paper: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407.
    """

    def kernel_terms(self) -> KernelTerms:
        return KernelTerms.of(KernelTerms.EQUAL)


@pickled_from("swafast")
@hints.hinted_rule
@dataclass(frozen=True, repr=False)
class ExponentialAverage(Rule):
    """The exponential moving average (EMA), ``weight = 1 - decay``, with an optional warm-up or schedule of the decay.

    With a warm-up, the decay after n models is clamped to ``[min_decay, decay]`` and is

    - ``warmup="power"``: ``1 - (1 + n / inv_gamma) ** -power``, as in timm (and diffusers' ``use_ema_warmup``);
    - ``warmup="ratio"``: ``(1 + n) / (10 + n)``, as in TensorFlow's ``ExponentialMovingAverage`` and in diffusers;
    - ``warmup="ramp"``: ``decay * (1 - exp(-n / tau))``, as in Ultralytics' YOLO.

    With a schedule, the decay goes from ``decay`` to 1 in ``updates`` updates, and the average then stays as it is:

    - ``schedule="cosine"``: ``1 - (1 - decay) * (cos(pi * n / updates) + 1) / 2``, as in BYOL and DINO;
    - ``schedule="linear"``: ``decay + (1 - decay) * n / updates``, as in I-JEPA.

    Args:
        decay: in [0, 1]; the share that the old average keeps. An average that is made with a decay below 0.1, but
            not 0, gets a UserWarning.
        warmup: ``"power"``, ``"ratio"``, ``"ramp"`` or None.
        inv_gamma: > 0, in updates; the time scale of the power warm-up.
        power: > 0; 2/3 suits trainings of a million updates and more, 3/4 shorter ones.
        min_decay: in [0, decay]; the least decay during the warm-up.
        tau: > 0, in updates; the time scale of the ramp.
        schedule: ``"cosine"``, ``"linear"`` or None.
        updates: > 0; the number of updates that the schedule takes, usually all of the training.

    Raises:
        ValueError: an argument is out of its range, or not a number; or it belongs to a warm-up or a schedule that is
            not given.

    Papers: Grill et al. 2020, "Bootstrap Your Own Latent", arXiv:2006.07733, appendix; Caron et al. 2021, "Emerging
    Properties in Self-Supervised Vision Transformers", arXiv:2104.14294; Assran et al. 2023, "Self-Supervised Learning
    from Images with a Joint-Embedding Predictive Architecture", arXiv:2301.08243.
    """

    decay: float = 0.999
    warmup: Literal["power", "ratio", "ramp"] | None = None
    inv_gamma: float = 1.0
    power: float = 2.0 / 3.0
    min_decay: float = 0.0
    # By keyword only: snapshots and the names of attachments have these only if they are given.
    tau: float = field(default=2000.0, kw_only=True)
    schedule: Literal["cosine", "linear"] | None = field(default=None, kw_only=True)
    updates: float | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        return spell_rule(self, always=1)

    def __post_init__(self) -> None:
        _set_number(self, "decay", "in [0, 1], the share that the old average keeps", lambda x: 0.0 <= x <= 1.0)
        for option, choices in _CHOICES.items():
            if getattr(self, option) not in (None, *choices):
                raise ValueError(f"{option} must be {_either(*choices, None)}, got {getattr(self, option)!r}")
        for option in ("inv_gamma", "power", "tau"):
            _set_number(self, option, "> 0 and finite", lambda x: 0.0 < x < math.inf)
        _set_number(self, "min_decay", f"in [0, decay={self.decay}]", lambda x: 0.0 <= x <= self.decay)
        if self.schedule is not None or self.updates is not None:
            _set_number(self, "updates", "> 0 and finite with a schedule", lambda x: 0.0 < x < math.inf)
        if self.schedule is not None and self.warmup is not None:
            raise ValueError(f"warmup must be None with a schedule, got {self.warmup!r} and {self.schedule!r}")
        for option, (needed, values) in _NEEDS.items():
            if getattr(self, option) != getattr(ExponentialAverage, option) and getattr(self, needed) not in values:
                got = getattr(self, needed)
                raise ValueError(f"{needed} must be {_either(*values)} if {option} is given, got {got!r}")

    @classmethod
    @_hinted
    def from_half_life(
        cls,
        updates: float,
        *,
        warmup: Literal["power", "ratio", "ramp"] | None = None,
        inv_gamma: float = 1.0,
        power: float = 2.0 / 3.0,
        min_decay: float = 0.0,
        tau: float = 2000.0,
    ) -> ExponentialAverage:
        """Make the EMA in which a model's weight halves every ``updates`` updates: ``decay = 0.5 ** (1 / updates)``.

        Raises:
            ValueError: ``updates`` is not positive and finite, or another argument is out of its range.
        """
        half_life = checked_number("updates", updates, "> 0 and finite", lambda x: 0.0 < x < math.inf)
        made = cls(0.5 ** (1.0 / half_life), warmup, inv_gamma, power, min_decay, tau=tau)
        made.__dict__["_is_of_half_life"] = True  # the user has written no decay
        return made

    def kernel_terms(self) -> KernelTerms:
        low, high = 1.0 - self.decay, 1.0 - self.min_decay
        if self.updates is not None:
            kind = KernelTerms.COSINE if self.schedule == "cosine" else KernelTerms.LINEAR
            return KernelTerms.of(kind, low, self.updates)
        if self.warmup is None:
            return KernelTerms.of(KernelTerms.CONSTANT, low)
        if self.warmup == "power":
            return KernelTerms.of(KernelTerms.POWER_WARMUP, low, high, self.inv_gamma, self.power)
        if self.warmup == "ramp":
            return KernelTerms.of(KernelTerms.RAMP_WARMUP, low, high, self.tau)
        return KernelTerms.of(KernelTerms.RATIO_WARMUP, low, high)


def raised_to(min_decay: float, rule: ExponentialAverage) -> ExponentialAverage:
    """Return ``rule`` with a least decay that may be above its decay: then it is the decay from the first update on.

    timm and diffusers clamp in this order, ``max(min(warm-up, decay), min_decay)``.

    Raises:
        ValueError: ``min_decay`` is not in [0, 1], or not a number.
    """
    least = checked_number("min_decay", min_decay, "in [0, 1]", lambda x: 0.0 <= x <= 1.0)
    return ExponentialAverage(least) if least > rule.decay else replace(rule, min_decay=least)


_CHOICES = {"warmup": ("power", "ratio", "ramp"), "schedule": ("cosine", "linear")}
#: Which options of an EMA need which warm-up or schedule.
_NEEDS = {
    "inv_gamma": ("warmup", ("power",)),
    "power": ("warmup", ("power",)),
    "tau": ("warmup", ("ramp",)),
    "min_decay": ("warmup", _CHOICES["warmup"]),
    "updates": ("schedule", _CHOICES["schedule"]),
}

#: Decays in use are near 1. One below this is likely meant as the weight of the newest model.
_SMALL_DECAY = 0.1


def warn_of_small_decay(rule: Rule | None) -> None:
    """Warn of a decay that is likely meant as the weight of the newest model. Constructors of averages call this.

    A rule that is set later may be a step of a schedule that the user computes, whose decays may begin at 0.
    """
    if not isinstance(rule, ExponentialAverage) or rule.schedule is not None or hasattr(rule, "_is_of_half_life"):
        return
    if 0.0 < rule.decay < _SMALL_DECAY:
        rest = f"{1.0 - rule.decay:.6g}"
        warn_user(
            f"decay={rule.decay} is the weight of the old average, so the newest model gets {rest}: if "
            f"{rule.decay} is the weight of the newest model, pass ExponentialAverage({rest})"
        )


def _either(*choices: object) -> str:
    *first, last = map(repr, choices)
    return f"{', '.join(first)} or {last}" if first else last


@pickled_from("swafast")
@hints.hinted_rule
@dataclass(frozen=True)
class PowerAverage(Rule):
    """The power-function average, ``decay = (1 - 1/(n+1)) ** (gamma+1)``: its width is a fixed share of the training.

    ``gamma = 0`` is the equal mean. The larger gamma is, the faster old models are forgotten.

    Paper: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696,
    section 3.1 and appendix C.

    Args:
        gamma: >= 0; a model's weight in the average grows with its time in training to the power of gamma.

    Raises:
        ValueError: ``gamma`` is negative, infinite or NaN; or it is a likely ``sigma_rel``, and not given by its name.
    """

    gamma: float = 6.94

    def __post_init__(self) -> None:
        _set_number(self, "gamma", ">= 0 and finite", lambda x: 0.0 <= x < math.inf)

    @classmethod
    @_hinted
    def from_sigma_rel(cls, sigma_rel: float) -> PowerAverage:
        """Make the average of relative width ``sigma_rel``, the paper's parameter.

        ``sigma_rel`` is the standard deviation of the profile as a share of the training. Bisection solves
        ``sigma_rel = sqrt(gamma + 1) / ((gamma + 2) * sqrt(gamma + 3))`` for gamma.

        Raises:
            ValueError: ``sigma_rel`` is not in (0, 1 / sqrt(12)]; the upper end is the equal mean.
        """
        return cls(gamma=gamma_of(sigma_rel))

    def kernel_terms(self) -> KernelTerms:
        return KernelTerms.of(KernelTerms.POWER, self.gamma)


def _taking_no_sigma_rel(init: Callable[..., None]) -> Callable[..., None]:
    """Refuse a gamma that is meant as a ``sigma_rel``: ``PowerAverage(0.1)``, which is nearly the equal mean."""

    @functools.wraps(init)
    def checked(self: PowerAverage, *args: Any, **options: Any) -> None:
        given = as_number(args[0]) if args else None
        if given is not None and 0.0 < given <= WIDEST:
            raise ValueError(
                f"gamma must be given by its name if it is that small, got {args[0]!r}: write "
                f"PowerAverage.from_sigma_rel({given:.6g}) for a relative width, or PowerAverage(gamma={given:.6g})"
            )
        init(self, *args, **options)

    return checked


PowerAverage.__init__ = _taking_no_sigma_rel(PowerAverage.__init__)  # type: ignore[method-assign]


@pickled_from("swafast")
@dataclass(frozen=True)
class FixedWeight(Rule):
    """A rule with one weight, which the host has computed from a rule without kernel terms, for one update."""

    value: float

    def weight(self, num_averaged: int) -> float:
        return self.value

    def kernel_terms(self) -> KernelTerms:
        return KernelTerms.of(KernelTerms.CONSTANT, self.value)


def checked_weight(rule: Rule, num_averaged: int) -> float:
    """Return ``rule.weight(num_averaged)``, or 1 for the first update, which copies whatever the rule.

    Raises:
        ValueError: the weight is not in [0, 1].
    """
    if num_averaged == 0:
        return 1.0
    weight = float(rule.weight(num_averaged))
    if not 0 <= weight <= 1:
        raise ValueError(f"weight({num_averaged}) of the rule {rule!r} must be in [0, 1], got {weight}")
    return weight


def terms_of(rule: Rule) -> KernelTerms | None:
    """Return a rule's terms; None if it has none, or if a subclass overrides ``weight`` but inherits the terms."""
    return rule.kernel_terms() if _terms_speak_for_weight(cast(Any, type(rule))) else None


@functools.lru_cache(maxsize=256)
def _terms_speak_for_weight(kind: Any) -> bool:
    definers = {name: next(c for c in kind.__mro__ if name in c.__dict__) for name in ("weight", "kernel_terms")}
    return issubclass(definers["kernel_terms"], definers["weight"])


_DEFAULT = EqualAverage()


def rule_of(avg_fn: object, multi_avg_fn: object) -> Rule | None:
    """Return the rule for these two arguments of torch's class, or None for a user's own function.

    torch's four averaging functions are recognised, so code that was written for torch's class runs fused.
    """
    function = avg_fn if multi_avg_fn is None else multi_avg_fn
    if isinstance(function, Rule):
        return function
    if function is None or any(closure_of(factory, function) is not None for factory in SWA_FACTORIES):
        return _DEFAULT
    decay = decay_of(function)
    return ExponentialAverage(decay) if decay is not None else None


def _set_number(rule: Rule, argument: str, expected: str, holds: Callable[[float], bool]) -> None:
    number = checked_number(argument, getattr(rule, argument), expected, holds)
    object.__setattr__(rule, argument, number)  # it is frozen
