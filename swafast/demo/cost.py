"""What an average of the demo's network costs, kept by torch's class and by ours: time per update, and bytes held."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from .. import EqualAverage, ExponentialAverage, FusedAveragedModel

# 400 rounds of 5 updates take about half a second; a median of fewer moves by a few percent on a busy machine.
ROUNDS = 400
WARM_UP = 20


@dataclass(frozen=True)
class Cost:
    """What one kind of averaged model costs on one network."""

    method: str  # "swa" or "ema"
    keeper: str  # the class, in words
    seconds: float  # of an update, the median
    nbytes: int  # of every tensor held


def update_costs(model: nn.Module, ema_decay: float, rounds: int = ROUNDS) -> list[Cost]:
    """Time updates from a copy of ``model`` by torch's class and by ours, and count the bytes they hold.

    One update of each in turn, so that a busy machine slows all alike. torch's class is timed as it comes and, since
    that is faster, with torch's own multi-tensor functions.
    """
    model = copy.deepcopy(model)
    plain, multi, ours = "AveragedModel", "AveragedModel, multi_avg_fn", "FusedAveragedModel"
    kept: list[tuple[str, str, AveragedModel]] = [
        ("swa", plain, AveragedModel(model)),
        ("swa", multi, AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())),
        ("swa", ours, FusedAveragedModel(model, rule=EqualAverage())),
        ("ema", multi, AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))),
        ("ema", ours, FusedAveragedModel(model, rule=ExponentialAverage(ema_decay))),
    ]
    times: list[list[float]] = [[] for _ in kept]
    for _ in range(WARM_UP + rounds):
        for (_, _, averaged), samples in zip(kept, times, strict=True):
            start = time.perf_counter()
            averaged.update_parameters(model)
            samples.append(time.perf_counter() - start)
    return [
        Cost(method, keeper, statistics.median(samples[WARM_UP:]), held_nbytes(averaged))
        for (method, keeper, averaged), samples in zip(kept, times, strict=True)
    ]


def held_nbytes(averaged: AveragedModel) -> int:
    """Count the bytes of every tensor that an averaged model keeps: averages, further planes, buffers, counter.

    A tensor that stands under two names counts once.
    """
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in averaged.state_dict().values()}
    return sum(tensors.values())
