"""All that the demo measures: accuracies, what an average of its network costs, and the loss between solutions.

The cost is time per update and bytes, with torch's class and with ours. The test loss is sampled on a plane through
three solutions, as in section 3.3 of Izmailov et al. 2018 (arXiv:1803.05407).
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from .. import EqualAverage, ExponentialAverage, FusedAveragedModel
from .task import Settings, digits_split
from .training import SeedResult, score, train_seed

# 400 rounds of 5 updates take about half a second. On a busy machine the median of fewer moves by a few percent.
ROUNDS = 400
WARM_UP = 20
# The plane passes through these solutions of the first seed. The first is the origin, and x points to the second.
PLANE_METHODS = ("swa", "sgd", "ema")
# The margin around the solutions, as a share of their extent.
MARGIN = 0.45


@dataclass(frozen=True)
class Cost:
    """The cost of one kind of averaged model for one network."""

    method: str  # "swa" or "ema"
    keeper: str  # the class, in words
    seconds: float  # median of an update
    nbytes: int  # of all its tensors


@dataclass(frozen=True)
class Plane:
    """A square slice of the loss surface; distances are Euclidean, over all params."""

    x: list[float]  # of the columns
    y: list[float]  # of the rows
    loss: list[list[float]]  # [row][column], mean cross-entropy on the test images
    points: dict[str, tuple[float, float]]  # (x, y) of each solution; all lie exactly in the plane
    seed: int


@dataclass(frozen=True)
class DemoResult:
    """All that one run of the demo has measured."""

    settings: Settings
    seeds: list[SeedResult]
    costs: list[Cost]
    plane: Plane
    seconds: float  # wall time, without imports

    def accuracies(self, method: str) -> list[float]:
        """Return the final test accuracy of each seed, in [0, 1]."""
        return [seed.curves[method][-1].accuracy for seed in self.seeds]


def measure(settings: Settings) -> DemoResult:
    """Train all seeds, time the updates and sample the loss surface, with a progress bar on stderr."""
    start = time.perf_counter()
    seeds = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=settings.num_seeds * (2 * settings.epochs - settings.start_epoch))
        for seed in range(settings.num_seeds):
            progress.update(task, description=f"Training, seed {seed + 1} of {settings.num_seeds}")
            seeds.append(train_seed(seed, digits_split(seed, settings), settings, lambda *_: progress.advance(task)))
        costs = update_costs(seeds[0].models["iterate"], settings.ema_decay)
        rows = progress.add_task("Sampling the loss surface", total=settings.plane_points)
        plane = loss_plane(seeds[0], settings.plane_points, lambda: progress.advance(rows))
    return DemoResult(settings, seeds, costs, plane, time.perf_counter() - start)


def update_costs(model: nn.Module, ema_decay: float) -> list[Cost]:
    """Time updates by torch's class and by ours from a copy of ``model``, and count the bytes that they hold.

    The classes take turns, so that a busy machine slows all of them alike. torch's class is timed by default and with
    its multi-tensor functions, which are faster.
    """
    model = copy.deepcopy(model)
    kept: list[tuple[str, str, AveragedModel, list[float]]] = [
        ("swa", "AveragedModel", AveragedModel(model), []),
        ("swa", "AveragedModel, multi_avg_fn", AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn()), []),
        ("swa", "FusedAveragedModel", FusedAveragedModel(model, rule=EqualAverage()), []),
        ("ema", "AveragedModel, multi_avg_fn", AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)), []),
        ("ema", "FusedAveragedModel", FusedAveragedModel(model, rule=ExponentialAverage(ema_decay)), []),
    ]
    for _ in range(WARM_UP + ROUNDS):
        for _, _, averaged, times in kept:
            start = time.perf_counter()
            averaged.update_parameters(model)
            times.append(time.perf_counter() - start)
    return [
        Cost(method, keeper, statistics.median(times[WARM_UP:]), held_nbytes(averaged))
        for method, keeper, averaged, times in kept
    ]


def held_nbytes(averaged: AveragedModel) -> int:
    """Count the bytes of an averaged model's tensors: averages, further planes, buffers and counter.

    A tied tensor counts once.
    """
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in averaged.state_dict().values()}.values())


def loss_plane(result: SeedResult, num_points: int, on_row: Callable[[], object] = lambda: None) -> Plane:
    """Test models on a ``num_points`` x ``num_points`` grid, a square around the solutions of ``PLANE_METHODS``.

    BatchNorm statistics are computed anew at each point. ``on_row`` is called after each row.
    """
    vectors = [parameters_to_vector(result.models[method].parameters()).detach() for method in PLANE_METHODS]
    origin, second, third = vectors
    # If two solutions are equal, as with an average of one model, a direction has length 0 and the plane is a line.
    x_axis = F.normalize(second - origin, dim=0)
    y_axis = F.normalize(third - origin - torch.dot(third - origin, x_axis) * x_axis, dim=0)
    points = {
        method: (torch.dot(vector - origin, x_axis).item(), torch.dot(vector - origin, y_axis).item())
        for method, vector in zip(PLANE_METHODS, vectors, strict=True)
    }
    limits = [(min(values), max(values)) for values in zip(*points.values(), strict=True)]
    half = (max(high - low for low, high in limits) or 1.0) * (0.5 + MARGIN)
    centres = [(high + low) / 2 for low, high in limits]
    x, y = (torch.linspace(centre - half, centre + half, num_points).tolist() for centre in centres)
    model = copy.deepcopy(result.models[PLANE_METHODS[0]])
    loss: list[list[float]] = []
    for b in y:
        loss.append([])
        for a in x:
            vector_to_parameters(origin + a * x_axis + b * y_axis, model.parameters())
            loss[-1].append(score(model, result.split, epoch=0).loss)
        on_row()
    return Plane(x, y, loss, points, result.seed)
