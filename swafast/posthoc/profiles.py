"""Which models an average is made of, and an average of any rule put together from others that were kept.

The *profile* of a rule after n updates is the weight that each of the n models has in the average,

    p(i) = w_i (1 - w_{i+1}) ... (1 - w_n),   i = 1..n,   with w_i = rule.weight(i - 1) and w_1 = 1.

An average is linear in its profile: what adds up profiles to another one adds up the averages to that one's.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..terms.rules import Rule, checked_weight, terms_of
from ..terms.weight import KernelTerms

#: Numbers that are worked on at a time: 8 MB each for weights, decays and their products.
_WINDOW_NUMEL = 2**20

#: Singular values below this share of the largest are left out. Measured on a random walk with drift and noise, its
#: averages kept as float32. Ten power averages of sigma_rel 0.05 to 0.14 at 16 counts, nearly dependent, and 0.02
#: wanted: relative errors 1.4 with 1e-15, 2.9e-3 with 1e-10, 1.8e-4 with 1e-8, 2.1e-5 with 1e-6, 1.1e-4 with 1e-4. Of
#: 0.05 and 0.10 alone, at 8 to 400 counts, it leaves nothing out.
_CUTOFF = 1e-6


@dataclass(frozen=True)
class Profile:
    """The weights that models 1 to ``num_averaged`` have in an average of ``rule``.

    For :class:`~swafast.PowerAverage` they are ``(i^(g+1) - (i-1)^(g+1)) / n^(g+1)``.

    Args:
        num_averaged: >= 1; updates so far, the first of which copied.

    Raises:
        TypeError: ``rule`` is no rule.
        ValueError: ``num_averaged`` is no int >= 1.

    Paper: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696,
    appendix C.
    """

    rule: Rule
    num_averaged: int

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise TypeError(f"rule must be a swafast.Rule, got {type(self.rule).__name__}")
        count = self.num_averaged
        if not isinstance(count, numbers.Integral) or isinstance(count, bool) or count < 1:
            raise ValueError(f"num_averaged must be an int >= 1, got {count!r}")

    def weights(self) -> Tensor:  # (num_averaged,) float64
        """Give the weights themselves, on the CPU: 8 bytes for each model.

        Raises:
            ValueError: the rule gives something that is not a number in [0, 1].
        """
        return _stretch(self.rule, 1, self.num_averaged)[0]


@dataclass(frozen=True, eq=False)
class Fit:
    """The sum of stored averages that comes nearest to a wanted one, and how near that is.

    The error of what is synthesized has two parts: ``residual`` says how much of the wanted profile is missed, and
    ``gain`` by how much the rounding of the stored averages is amplified.
    """

    coefficients: Tensor  # (stored,) float64, one for each profile given; they add up to 1
    residual: float  # ||sum of x_i p_i - p|| / ||p||
    gain: float  # sum of |x_i|


def fit(stored: Sequence[Profile], wanted: Profile) -> Fit:
    """Give the coefficients with which ``stored`` profiles add up to ``wanted``, by least squares.

    Minimises ``||sum of x_i p_i - p||`` over x that add up to 1, so that models that did not change average to what
    they are. Stored profiles of more models than ``wanted`` has take no part: their coefficients are 0.

    Takes O(num_averaged) time for each distinct rule, and memory for a million numbers at a time.

    Raises:
        TypeError: an argument is none of the above.
        ValueError: nothing is stored, or ``wanted`` is of more models than any of ``stored``, or of fewer than each.

    Paper: Karras et al. 2024, arXiv:2312.02696, section 3.2; it has the inner products of continuous profiles.
    """
    _check(stored, wanted)
    used = [k for k, profile in enumerate(stored) if profile.num_averaged <= wanted.num_averaged]
    *columns, goal = _compressed([*(stored[k] for k in used), wanted])
    solution, missed = _solve(torch.stack(columns, 1), goal)
    coefficients = torch.zeros(len(stored), dtype=torch.float64, device="cpu")
    coefficients[used] = solution
    return Fit(coefficients, float(missed / goal.norm()), float(solution.abs().sum()))


def _check(stored: Sequence[Profile], wanted: Profile) -> None:
    if not isinstance(wanted, Profile):
        raise TypeError(f"wanted must be a Profile, got {type(wanted).__name__}")
    for profile in stored:
        if not isinstance(profile, Profile):
            raise TypeError(f"stored must be Profiles, got {type(profile).__name__}")
    if not stored:
        raise ValueError("stored must be at least one profile, got none")
    counts = [profile.num_averaged for profile in stored]
    if not min(counts) <= wanted.num_averaged <= max(counts):
        raise ValueError(
            f"wanted must be of {min(counts)} to {max(counts)} models, as stored ones are, got {wanted.num_averaged}"
        )


# Least squares


def _solve(matrix: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Return the x with sum 1 that minimises |matrix x - goal|, and the minimum."""
    columns = matrix.size(1)
    # All x with sum 1: their mean, and what lies across it.
    mean = torch.full((columns,), 1.0 / columns, dtype=torch.float64, device="cpu")
    across = torch.linalg.qr(mean.unsqueeze(1), mode="complete").Q[:, 1:]
    u, sizes, vh = torch.linalg.svd(matrix @ across, full_matrices=False)
    kept = sizes > _CUTOFF * torch.linalg.matrix_norm(matrix, 2)
    moves = (u[:, kept].mT @ (goal - matrix @ mean)) / sizes[kept]
    x = mean + across @ (vh[kept].mT @ moves)
    return x, (matrix @ x - goal).norm()


def _compressed(profiles: Sequence[Profile]) -> list[Tensor]:
    """Give short vectors, one for each profile, that have the inner products of the profiles.

    Between two neighbouring counts the profiles of one rule are multiples of one stretch of weights. So there all are
    combinations of as many stretches as there are rules, and the R of a QR decomposition of these has their geometry.
    Inner products would say the same with half the digits: they square what is small between profiles nearly alike.
    """
    rules: list[Rule] = []  # each once; one of the user's own need not hash
    for profile in profiles:
        if profile.rule not in rules:
            rules.append(profile.rule)
    own = [rules.index(profile.rule) for profile in profiles]
    counts = sorted({profile.num_averaged for profile in profiles})
    # By profile: the log of what models after the stretch have left of it.
    left = [0.0] * len(profiles)
    stretches: list[list[Tensor]] = [[] for _ in profiles]
    for start, stop in reversed(list(zip([0, *counts], counts, strict=False))):
        triangle, log_decays = _triangle(rules, start + 1, stop)
        for k, profile in enumerate(profiles):
            if profile.num_averaged >= stop:
                stretches[k].append(triangle[:, own[k]] * math.exp(left[k]))
                left[k] += log_decays[own[k]]
            else:
                stretches[k].append(torch.zeros_like(triangle[:, 0]))
    return [torch.cat(own) for own in stretches]


def _triangle(rules: Sequence[Rule], first: int, last: int) -> tuple[Tensor, list[float]]:
    """Give R of the rules' stretches side by side, and each rule's log decay over models ``first`` to ``last``."""
    log_decays = [0.0] * len(rules)
    triangle = torch.empty(0, len(rules), dtype=torch.float64, device="cpu")
    length = max(1, _WINDOW_NUMEL // len(rules))
    while last >= first:
        start = max(first, last - length + 1)
        columns = []
        for k, rule in enumerate(rules):
            stretch, log_decay = _stretch(rule, start, last)
            columns.append(stretch.mul_(math.exp(log_decays[k])))
            log_decays[k] += log_decay
        triangle = torch.linalg.qr(torch.cat([triangle, torch.stack(columns, 1)]), mode="r").R
        last = start - 1
    return triangle, log_decays


# Weights


def _stretch(rule: Rule, first: int, last: int) -> tuple[Tensor, float]:
    """Give what models ``first`` to ``last`` weigh in the average once ``last`` has come, and the log of what is left
    of those before.

    Added up from the end, where the weight is: differences of sums from the start would cancel, and be NaN past a
    weight of 1, which forgets all before it.
    """
    weights, log_decays = _weights(rule, first, last)
    sums = log_decays.flip(0).cumsum(0).flip(0)
    weights[:-1] *= sums[1:].exp_()
    return weights, float(sums[0])


def _weights(rule: Rule, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return the weights of models ``first`` to ``last`` as they come, and log(1 - weight); both float64."""
    terms = terms_of(rule)
    if terms is None:
        given = [checked_weight(rule, i - 1) for i in range(first, last + 1)]
        weights = torch.tensor(given, dtype=torch.float64, device="cpu")
        return weights, (-weights).log1p_()
    # As ``KernelTerms.weight`` has it, for many counts at once.
    n = torch.arange(first - 1, last, dtype=torch.float64, device="cpu")
    copied = n == 0
    low, high, inv_gamma, power = terms.terms
    if terms.kind in (KernelTerms.EQUAL, KernelTerms.POWER):
        # log(1 - w) = -(gamma + 1) log1p(1 / (i - 1)), with gamma = 0 for the equal mean; -inf for the first model
        log_decays = n.reciprocal_().log1p_().mul_(-(low + 1.0 if terms.kind == KernelTerms.POWER else 1.0))
        return log_decays.expm1().neg_(), log_decays
    if terms.kind == KernelTerms.POWER_WARMUP:
        weights = n.div_(inv_gamma).log1p_().mul_(-power).exp_().clamp_(low, high)
    elif terms.kind == KernelTerms.RATIO_WARMUP:
        weights = n.add_(10.0).reciprocal_().mul_(9.0).clamp_(low, high)
    else:
        assert terms.kind == KernelTerms.CONSTANT, terms
        weights = n.fill_(low)
    weights.masked_fill_(copied, 1.0)
    return weights, (-weights).log1p_()
