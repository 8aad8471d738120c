"""The gate before any time is printed: a provider's averages, after a few updates, against float64.

Each update sees the params multiplied by another power of two, which loses no bit in any dtype: every average is then
``factor * param`` with a factor known in float64, and no second copy of the model is needed to say so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bench.provider import Provider

# What each update finds the params multiplied by. The first is 1, so that providers which start from the model they
# are built with and providers which copy at the first update agree.
SCALES = (1.0, -0.5, 2.0)

# Relative L2 distance of the worst tensor. Three rounded updates measured at most 1e-7 for a float32 average and
# 3e-3 for a bf16 one; a skipped tensor or a weight of the next update gives 0.1 and more.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}

# Elements compared at once. On a CPU their float64 copies stay in the cache; elsewhere each piece costs some launches,
# and these take 0.5 GB.
COMPARED_NUMEL, COMPARED_NUMEL_ON_DEVICE = 1 << 17, 1 << 25


class WrongAverageError(Exception):
    """A provider's averages are not what its rule gives."""


@torch.no_grad()
def run_updates(provider: Provider, model: nn.Module) -> float:
    """Run an update for each of SCALES and give the factor that params end up averaged to; ``model`` is put back."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    counters = [buffer for buffer in model.buffers() if not buffer.is_floating_point()]
    before = 1.0
    for scale in SCALES:
        torch._foreach_mul_(tensors, scale / before)
        for counter in counters:
            counter.add_(1)
        provider.update()
        before = scale
    if provider.copies_buffers:
        check_buffers(provider, model)
    torch._foreach_mul_(tensors, 1 / before)
    return factor_of(provider.weight)


def factor_of(weight: Callable[[int], float]) -> float:
    """Give what params end up averaged to, as a multiple, by a rule that weighs the newest so."""
    factor = 0.0
    for num_averaged, scale in enumerate(SCALES):
        factor += weight(num_averaged) * (scale - factor) if num_averaged else scale
    return factor


def check_buffers(provider: Provider, model: nn.Module) -> None:
    for (name, buffer), kept in zip(model.named_buffers(), provider.buffers(), strict=True):
        if not torch.equal(buffer.to(kept.dtype), kept):
            raise WrongAverageError(f"buffer {name} differs from the model's")


def worst_error(averages: Iterable[Tensor], model: nn.Module, factor: float) -> tuple[float, str, float]:
    """Give the largest relative L2 distance of an average from ``factor * param``, that param's name, and what the
    averages' dtypes account for.
    """
    threads = torch.get_num_threads()
    # Pieces this small gain nothing from threads, and 20 times slower was seen where another process held a core.
    torch.set_num_threads(1)
    try:
        return _worst_error(averages, model, factor)
    finally:
        torch.set_num_threads(threads)


def _worst_error(averages: Iterable[Tensor], model: nn.Module, factor: float) -> tuple[float, str, float]:
    worst, where, tolerance = 0.0, "", 0.0
    for (name, param), average in zip(model.named_parameters(), averages, strict=True):
        tolerance = max(tolerance, TOLERANCE[average.dtype])
        error = _relative_l2(average.detach().reshape(-1), param.detach().reshape(-1), factor)
        # A NaN compares as False both ways, and must be the worst of all.
        if not error <= worst:
            worst, where = error, name
            if math.isnan(worst):
                break
    return worst, where, tolerance


def _relative_l2(average: Tensor, param: Tensor, factor: float) -> float:
    distance = norm = torch.zeros((), dtype=torch.float64, device=param.device)
    numel = COMPARED_NUMEL if param.device.type == "cpu" else COMPARED_NUMEL_ON_DEVICE
    for got, source in zip(average.split(numel), param.split(numel), strict=True):
        wanted = source.double().mul_(factor)
        norm = norm + wanted.square().sum()
        distance = distance + wanted.sub_(got).square_().sum()
    return math.sqrt(float(distance / norm))


def check_error(provider: Provider, model: nn.Module) -> float:
    """Run the gate's updates and give the worst relative error.

    Raises:
        WrongAverageError: an average is further from float64 than its dtype accounts for, or a buffer was not copied.
    """
    factor = run_updates(provider, model)
    return require(*worst_error(provider.each_average(), model, factor))


def require(error: float, name: str, tolerance: float) -> float:
    """Give ``error``, the relative L2 distance of the tensor ``name``; WrongAverageError where it is too large."""
    if not error <= tolerance:
        raise WrongAverageError(f"{name} is off by {error:.1e} (relative L2), {tolerance:.0e} allowed")
    return error


def check(provider: Provider, model: nn.Module) -> tuple[float, str]:
    """Run the gate's updates and give the worst relative error, and a digest of all bits of the averages of ours.

    Raises:
        WrongAverageError: an average is further from float64 than its dtype accounts for, or a buffer was not copied.
    """
    error = check_error(provider, model)
    return error, digest(provider.averages()) if provider.is_ours else ""


def digest(averages: list[Tensor]) -> str:
    """Hash all bits of all averages, so that two formats can be compared without holding both in full."""
    state = hashlib.sha256()
    for average in averages:
        state.update(average.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
