"""Averaging as a share of a real training step: forward, backward and optimizer of two small models.

Updates are timed inside the loop, where the step before them has filled the caches with something else; the blocks of
torch's class and ours take turns. Under DDP both get the wrapped model, as people do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from bench import names
from bench.report import Times, TrainingRow
from bench.steps import Shape, Training, Work, cnn_work, decoder_work
from bench.timing import collector_paused
from swafast import FusedAveragedModel
from tests.ranks import run_ranks

# An update at every step, and at every tenth; a block holds as many steps as the rarest update asks for.
EVERY = (1, 10)
STEPS_PER_BLOCK = 10
RANKS = 2
DDP_SETTING = f"DDP, {RANKS} ranks"
TRANSFORMER = Shape(vocabulary=4096, width=192, depth=4, heads=4, length=64, batch=8)


def works() -> list[Work]:
    return [decoder_work("transformer", TRANSFORMER, STEPS_PER_BLOCK), cnn_work()]


@dataclass(frozen=True)
class Budget:
    """How long one model in one setting is measured, between two bounds of rounds."""

    seconds: float
    min_rounds: int = 3
    max_rounds: int = 20


def block(training: Training, update: Callable[[nn.Module], None], every: int) -> tuple[float, float]:
    """Train one block with an update after each ``every`` steps. Return the seconds in steps and in updates."""
    step_s = update_s = 0.0
    for index in range(STEPS_PER_BLOCK):
        start = time.perf_counter()
        training.step()
        stepped = time.perf_counter()
        step_s += stepped - start
        if (index + 1) % every == 0:
            update(training.model)
            update_s += time.perf_counter() - stepped
    return step_s, update_s


def measure_share(work: Work, budget: Budget, *, distributed: bool = False) -> list[TrainingRow]:
    """Measure one model in this process, or in this rank of the default process group."""
    device = torch.device("cpu")
    training = Training(work, device, DistributedDataParallel) if distributed else Training(work, device)
    averaged = {names.TORCH_CLASS: AveragedModel(training.model), names.OURS: FusedAveragedModel(training.model)}
    for each in averaged.values():
        # The first update copies and plans, the second is like all others.
        block(training, each.update_parameters, every=STEPS_PER_BLOCK // 2)
    samples: dict[tuple[str, int], list[tuple[float, float]]] = {}
    end = time.perf_counter() + budget.seconds
    with collector_paused():
        for done in range(budget.max_rounds):
            if done >= budget.min_rounds and _all_past(end, distributed=distributed):
                break
            for every in EVERY:
                for provider, each in averaged.items():
                    samples.setdefault((provider, every), []).append(block(training, each.update_parameters, every))
    setting = DDP_SETTING if distributed else "alone"
    numel = sum(param.numel() for param in training.model.parameters())
    return [
        TrainingRow(work.title, setting, provider, every, numel, *_summed_up(taken, every))
        for (provider, every), taken in samples.items()
    ]


def _summed_up(taken: list[tuple[float, float]], every: int) -> tuple[Times, Times, Times]:
    """Return the times of a step and of an update, and the share of all time that went into updates."""
    return (
        Times.of(step / STEPS_PER_BLOCK for step, _ in taken),
        Times.of(update * every / STEPS_PER_BLOCK for _, update in taken),
        Times.of(update / (step + update) for step, update in taken),
    )


def _all_past(end: float, *, distributed: bool) -> bool:
    """Return whether the budget is spent. Every rank must agree, or one waits for gradients that nobody sends."""
    past = torch.tensor(float(time.perf_counter() > end))
    if distributed:
        dist.all_reduce(past, op=dist.ReduceOp.MIN)
    return bool(past)


def _rank(budget: Budget) -> list[TrainingRow]:
    return [row for work in works() for row in measure_share(work, budget, distributed=True)]


def measure_alone(budget: Budget) -> list[TrainingRow]:
    return [row for work in works() for row in measure_share(work, budget)]


def measure_ddp(budget: Budget) -> list[TrainingRow]:
    """Measure every model under DDP, on RANKS processes with one thread each. Return the rows of rank 0."""
    return run_ranks(RANKS, _rank, budget)[0]
