"""Elliptical slice sampling: samples of a density times a normal prior, without a step size or a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..terms.numbers import as_float, as_int, checked_number
from ..terms.warn import warn_user

#: How often a bracket may shrink. Each time it loses a part of its angle, half in the mean; after 60 the angle moves no
#: coordinate in float64, so the density there is that of the point before, which is above the threshold.
_MOST_SHRINKS = 200

_STEADY = "switch dropout off by model.eval(), take all of the data in the same batches, and draw nothing at random"


def elliptical_slice(
    log_likelihood: Callable[[Tensor], object],
    start: Tensor,  # (rank,) float64, on the CPU
    prior_std: float,
    count: int,
    generator: torch.Generator | None = None,
) -> Tensor:  # (count, rank) float64, on the CPU
    """Draw ``count`` samples, each from the one before, of ``exp(log_likelihood(t)) * N(t; 0, prior_std^2)``.

    A sample lies on the ellipse through the one before and a point of the prior, at an angle whose range shrinks until
    the likelihood is above a random threshold. The likelihood is that of a point, so it must not change between two
    evaluations. It is evaluated twice at ``start``, and a difference is warned of.

    Raises:
        TypeError: ``log_likelihood`` is not callable or returns no number, ``count`` is not an int, or ``generator`` is
            not a generator.
        ValueError: ``prior_std`` is not a positive number, or ``count`` negative; or ``log_likelihood`` returns a NaN,
            or at ``start`` an infinity.
        RuntimeError: no point has a likelihood above the threshold, since ``log_likelihood`` changes.

    Paper: Murray, Adams and MacKay 2010, "Elliptical Slice Sampling", arXiv:1001.0175.
    """
    if not callable(log_likelihood):
        raise TypeError(
            f"log_likelihood must be a function of t, got {log_likelihood!r}: write one that places t in the model and "
            "returns the sum of log-likelihoods over the data"
        )
    number = as_int(count)
    if number is None:
        raise TypeError(f"count must be an int, got {count!r}")
    if number < 0:
        raise ValueError(f"count must be >= 0, got {number}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {generator!r}: torch.Generator().manual_seed(0)"
        )
    std = checked_number("prior_std", prior_std, "a positive number", lambda value: 0 < value < math.inf)
    device = generator.device if generator is not None else torch.device("cpu")

    def height_of(t: Tensor) -> float:
        value = as_float(log_likelihood(t.clone()))
        if value is None:
            raise TypeError("log_likelihood must return a number, got something else: return loss.item() or a float")
        if math.isnan(value) or value == math.inf:
            raise ValueError(f"log_likelihood must return a finite number or -inf, got {value} at t = {t.tolist()}")
        return value

    def uniform() -> float:
        return float(torch.rand((), dtype=torch.float64, device=device, generator=generator))

    at, samples = start.clone(), start.new_empty(number, len(start))
    height = height_of(at)
    if height == -math.inf:
        raise ValueError(f"log_likelihood must be finite where sampling starts, got -inf at t = {at.tolist()}")
    if (again := height_of(at)) != height:
        warn_user(
            f"log_likelihood must be the same each time, got {height} and {again} for one t, so the samples are of no "
            f"density: {_STEADY}"
        )
    for row in samples:
        other = std * torch.randn(len(at), dtype=at.dtype, device=device, generator=generator).cpu()
        threshold = height + math.log1p(-uniform())  # 1 - u is never 0
        angle = 2 * math.pi * uniform()
        least, most = angle - 2 * math.pi, angle
        for _ in range(_MOST_SHRINKS):
            moved = at * math.cos(angle) + other * math.sin(angle)
            if (found := height_of(moved)) >= threshold:
                break
            least, most = (angle, most) if angle < 0 else (least, angle)
            angle = least + (most - least) * uniform()
        else:
            raise RuntimeError(
                f"log_likelihood must be the same each time, got none above {threshold} near a point that had {height}"
                f": {_STEADY}"
            )
        at, height = moved, found
        row.copy_(at)
    return samples
