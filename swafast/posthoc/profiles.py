"""The weight of each model in an average, and the best sum of stored averages for a wanted rule.

The *profile* of a rule after n updates is the weight of each of the n models in the average,

    p(i) = w_i (1 - w_{i+1}) ... (1 - w_n),   i = 1..n,   with w_i = rule.weight(i - 1) and w_1 = 1.

An average is linear in its profile. So the coefficients that sum profiles to another profile sum the averages to that
profile's average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..terms.numbers import as_int
from ..terms.rules import Rule, checked_weight, terms_of
from ..terms.weight import KernelTerms

#: Numbers per window: 8 MB each for weights, decays and their products.
_WINDOW_NUMEL = 2**20

#: Singular values below this share of the largest are dropped. Measured on a random walk with drift and noise, with
#: float32 averages. For ten nearly dependent power averages, sigma_rel 0.05 to 0.14 at 16 counts, and 0.02 wanted, the
#: relative error is 1.4 with 1e-15, 2.9e-3 with 1e-10, 1.8e-4 with 1e-8, 2.1e-5 with 1e-6 and 1.1e-4 with 1e-4. With
#: 0.05 and 0.10 alone, at 8 to 400 counts, nothing is dropped.
_CUTOFF = 1e-6


@dataclass(frozen=True)
class Profile:
    """The weights of models 1 to ``num_averaged`` in an average by ``rule``.

    For :class:`~swafast.PowerAverage` they are ``(i^(g+1) - (i-1)^(g+1)) / n^(g+1)``.

    Args:
        num_averaged: >= 1; number of updates, the first of which copies.

    Raises:
        TypeError: ``rule`` is not a :class:`~swafast.Rule`.
        ValueError: ``num_averaged`` is not an int >= 1.

    Paper: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696,
    appendix C.
    """

    rule: Rule
    num_averaged: int

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise TypeError(f"rule must be a swafast.Rule, got {type(self.rule).__name__}")
        count = as_int(self.num_averaged)
        if count is None or count < 1:
            raise ValueError(f"num_averaged must be an int >= 1, got {self.num_averaged!r}")
        object.__setattr__(self, "num_averaged", count)  # it is frozen

    def weights(self) -> Tensor:  # (num_averaged,) float64
        """Return the weights, float64 on the CPU.

        Raises:
            ValueError: the rule returns a weight that is not in [0, 1].
        """
        return _stretch(self.rule, 1, self.num_averaged)[0]


@dataclass(frozen=True, eq=False)
class Fit:
    """The sum of stored averages that is nearest to a wanted average.

    A synthesized average has two kinds of error. ``residual`` is the part of the wanted profile that is missed.
    ``gain`` is the factor by which the rounding errors of the stored averages grow.
    """

    coefficients: Tensor  # (num_stored,) float64; they sum to 1
    residual: float  # ||sum of x_i p_i - p|| / ||p||
    gain: float  # sum of |x_i|


def fit(stored: Sequence[Profile], wanted: Profile) -> Fit:
    """Fit a sum of ``stored`` profiles to ``wanted`` by least squares.

    Minimises ``||sum of x_i p_i - p||`` over x that sum to 1, so that params which never changed are reproduced
    exactly. Profiles of more models than ``wanted`` get the coefficient 0.

    Takes O(num_averaged) time for each distinct rule, and memory for a million numbers at a time.

    Raises:
        TypeError: an argument is not a :class:`Profile`.
        ValueError: ``stored`` is empty, or ``wanted`` has more models than every stored profile, or fewer.

    Paper: Karras et al. 2024, arXiv:2312.02696, section 3.2, which uses inner products of continuous profiles.
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
            f"wanted must be of {min(counts)} to {max(counts)} models, as the stored are, got {wanted.num_averaged}"
        )


# Least squares


def _solve(matrix: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Return the x with sum 1 that minimises |matrix x - goal|, and the minimum."""
    columns = matrix.size(1)
    # Every x with sum 1 is the mean plus a vector that is orthogonal to it.
    mean = torch.full((columns,), 1.0 / columns, dtype=torch.float64, device="cpu")
    across = torch.linalg.qr(mean.unsqueeze(1), mode="complete").Q[:, 1:]
    u, sizes, vh = torch.linalg.svd(matrix @ across, full_matrices=False)
    kept = sizes > _CUTOFF * torch.linalg.matrix_norm(matrix, 2)
    moves = (u[:, kept].mT @ (goal - matrix @ mean)) / sizes[kept]
    x = mean + across @ (vh[kept].mT @ moves)
    return x, (matrix @ x - goal).norm()


def _compressed(profiles: Sequence[Profile]) -> list[Tensor]:
    """Return one short vector for each profile, with the same inner products as the profiles.

    Between two neighbouring counts, all profiles of one rule are multiples of one stretch of weights. So R of a QR
    decomposition of one stretch per rule holds all inner products there. To compute the inner products themselves
    would lose half of the digits, since it squares the small differences between similar profiles.
    """
    rules: list[Rule] = []  # distinct; a list, since a user's rule may not be hashable
    for profile in profiles:
        if profile.rule not in rules:
            rules.append(profile.rule)
    own = [rules.index(profile.rule) for profile in profiles]
    counts = sorted({profile.num_averaged for profile in profiles})
    # For each profile, the log of the factor by which later models have reduced the current stretch.
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
    """Return R of the rules' stretches as columns, and each rule's log decay over models ``first`` to ``last``."""
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
    """Return the weights of models ``first`` to ``last`` in the average after ``last``, and the log of the weight that
    is left for earlier models.

    The log decays are summed from the end. Differences of sums from the start would cancel, and would be NaN after a
    weight of 1.
    """
    weights, log_decays = _weights(rule, first, last)
    sums = log_decays.flip(0).cumsum(0).flip(0)
    weights[:-1] *= sums[1:].exp_()
    return weights, float(sums[0])


def _weights(rule: Rule, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return ``rule.weight`` at models ``first`` to ``last``, and log(1 - weight); both float64."""
    terms = terms_of(rule)
    if terms is None:
        given = [checked_weight(rule, i - 1) for i in range(first, last + 1)]
        weights = torch.tensor(given, dtype=torch.float64, device="cpu")
        return weights, (-weights).log1p_()
    # ``KernelTerms.weight``, vectorised over counts.
    n = torch.arange(first - 1, last, dtype=torch.float64, device="cpu")
    copied = n == 0
    low, high, scale, power = terms.terms
    if terms.kind in (KernelTerms.EQUAL, KernelTerms.POWER):
        # log(1 - w) = -(gamma + 1) log1p(1 / (i - 1)), with gamma = 0 for the equal mean; -inf for the first model
        log_decays = n.reciprocal_().log1p_().mul_(-(low + 1.0 if terms.kind == KernelTerms.POWER else 1.0))
        return log_decays.expm1().neg_(), log_decays
    if terms.kind == KernelTerms.POWER_WARMUP:
        weights = n.div_(scale).log1p_().mul_(-power).exp_().clamp_(low, high)
    elif terms.kind == KernelTerms.RATIO_WARMUP:
        weights = n.add_(10.0).reciprocal_().mul_(9.0).clamp_(low, high)
    elif terms.kind == KernelTerms.RAMP_WARMUP:
        weights = n.div_(-scale).exp_().mul_(1.0 - low).add_(low).clamp_(low, high)
    elif terms.kind in (KernelTerms.COSINE, KernelTerms.LINEAR):
        left = n.neg_().add_(high).clamp_(min=0.0).div_(high)
        weights = (left.mul_(0.5 * math.pi).sin_().square_() if terms.kind == KernelTerms.COSINE else left).mul_(low)
    else:
        assert terms.kind == KernelTerms.CONSTANT, terms
        weights = n.fill_(low)
    weights.masked_fill_(copied, 1.0)
    return weights, (-weights).log1p_()
