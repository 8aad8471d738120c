"""The gate before any time is printed: a provider's averages, after a few updates, against float64.

Each update sees the params multiplied by another power of two, which loses no bit in any dtype: every average is then
``factor * param`` with a factor known in float64, and no second copy of the model is needed.
"""

from __future__ import annotations

import hashlib
import math
import warnings

import torch
from torch import Tensor, nn

from bench.providers import Made, Provider, Weight

# What each update finds the params multiplied by. The first is 1, so that providers which start from the model they
# are built with and providers which copy at the first update agree.
SCALES = (1.0, -0.5, 2.0)
# Relative L2 distance of the worst tensor. Three rounded updates measured at most 1e-7 for a float32 average and
# 3e-3 for a bf16 one; a skipped tensor or a weight of the next update gives 0.1 and more. A format's is another where
# it is not that of its dtype: compact measured at most 1.3e-5, half 3e-3, and compensated, exported in float32, 4e-8.
TOLERANCE: dict[object, float] = {
    torch.float32: 1e-6, torch.bfloat16: 1e-2, "compact": 5e-5, "half": 1e-2, "compensated": 1e-7
}  # fmt: skip
# Formats that hold a float32 average bit for bit.
BIT_EXACT = ("float32", "exact", "mirrored")
# Elements compared at once. On a CPU their float64 copies stay in the cache; elsewhere each piece costs some launches,
# and these take 0.5 GB.
COMPARED_NUMEL, COMPARED_NUMEL_ON_DEVICE = 1 << 17, 1 << 25


class WrongAverageError(Exception):
    """A provider's averages are not what its rule gives."""


def check(provider: Provider, made: Made, model: nn.Module) -> tuple[float, dict[str, str]]:
    """Run the gate's updates and put ``model`` back. Return the worst relative error.

    Return too, by rule, a hash of the bits of each average that must equal the float32 one; on a CPU only.

    Raises:
        WrongAverageError: an average is further from float64 than its dtype accounts for, or a buffer was not copied.
    """
    _run_updates(made, model)
    worst, digests, threads = 0.0, {}, torch.get_num_threads()
    # Pieces this small gain nothing from threads, and 20 times slower was seen where another process held a core.
    torch.set_num_threads(1)
    try:
        for rule, weight, averages in made.export():
            state, hashed = hashlib.sha256(), provider.format in BIT_EXACT
            for (name, param), average in zip(model.named_parameters(), averages, strict=True):
                error = _relative_l2(average.detach().reshape(-1), param.detach().reshape(-1), factor_of(weight))
                tolerance = TOLERANCE.get(provider.format) or TOLERANCE[average.dtype]
                # A NaN compares as False.
                if not error <= tolerance:
                    where = f"{rule}.{name}" if provider.averages > 1 else name
                    raise WrongAverageError(f"{where} is off by {error:.1e} (relative L2), {tolerance:.0e} allowed")
                worst = max(worst, error)
                if hashed and average.device.type == "cpu":
                    state.update(average.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
                    digests[rule] = state.hexdigest()
    finally:
        torch.set_num_threads(threads)
    return worst, digests


@torch.no_grad()
def _run_updates(made: Made, model: nn.Module) -> None:
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    counters = [buffer for buffer in model.buffers() if not buffer.is_floating_point()]
    made.restart()
    before = 1.0
    with warnings.catch_warnings():
        # A restart leaves poison that counts no model.
        warnings.filterwarnings("ignore", "the first update overwrites", UserWarning)
        for scale in SCALES:
            torch._foreach_mul_(tensors, scale / before)
            for counter in counters:
                counter.add_(1)
            made.update()
            before = scale
    if made.buffers is not None:
        for (name, buffer), kept in zip(model.named_buffers(), made.buffers, strict=True):
            if not torch.equal(buffer.to(kept.dtype), kept):
                raise WrongAverageError(f"buffer {name} differs from the model's")
    torch._foreach_mul_(tensors, 1 / before)


def factor_of(weight: Weight) -> float:
    """Return what params are averaged to, as a multiple, by a rule with these weights."""
    factor = 0.0
    for num_averaged, scale in enumerate(SCALES):
        factor += weight(num_averaged) * (scale - factor) if num_averaged else scale
    return factor


def _relative_l2(average: Tensor, param: Tensor, factor: float) -> float:
    distance = norm = torch.zeros((), dtype=torch.float64, device=param.device)
    numel = COMPARED_NUMEL if param.device.type == "cpu" else COMPARED_NUMEL_ON_DEVICE
    for got, source in zip(average.split(numel), param.split(numel), strict=True):
        wanted = source.double().mul_(factor)
        norm = norm + wanted.square().sum()
        distance = distance + wanted.sub_(got).square_().sum()
    return math.sqrt(float(distance / norm))
