"""SWAG on a CPU: a collect and a sample by the authors' algorithm, by careful torch, and by ours.

All follow one model, and take turns. Before any time, each has collected the model times some powers of two, so that
its mean, variance and newest deviation are known in float64 for every element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from bench import names
from bench.gate import SCALES, WrongAverageError
from bench.machine import OthersCpu
from bench.report import Row
from bench.timing import Clock, Rotation, interleave
from bench.workloads import Workload, build
from swafast import FusedAveragedModel

COLLECT, SAMPLE = "swag collect", "swag sample"
AUTHORS, CAREFUL, OURS, PLAIN = "the authors' algorithm", "torch foreach", names.OURS, "swafast, no deviations"
DEVIATIONS, QUICK_DEVIATIONS = 20, 3
WORKLOAD, QUICK_WORKLOAD = "resnet50", "2000x64x64"
# Seconds of samples for each of the two calls: about 10 rounds on 2 cores.
BUDGET_S, QUICK_BUDGET_S = 30.0, 1.0
# Relative L2 distance of the worst tensor. The authors' variance, a difference of squares, has 2e-7.
TOLERANCE = 1e-6
# Collects beside a plain update may take so much more than their bytes do.
MOST_OVER_BYTES = 1.3

#: Mean, variance and newest deviation of each param.
State = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


class Way(Protocol):
    def __init__(self, model: nn.Module, deviations: int) -> None: ...
    def collect(self) -> object: ...
    def sample(self) -> object: ...
    def state(self) -> State: ...


def _params(model: nn.Module) -> list[Tensor]:
    return [param.detach() for param in model.parameters()]


class Authors:
    """Means of the weights and of their squares, and deviations that each collect concatenates anew."""

    def __init__(self, model: nn.Module, deviations: int) -> None:
        self._params, self._most, self._count = _params(model), deviations, 0
        self._means = [torch.zeros_like(param) for param in self._params]
        self._squares = [torch.zeros_like(param) for param in self._params]
        self._columns = [param.new_empty(0, param.numel()) for param in self._params]

    def collect(self) -> None:
        count = self._count
        for index, param in enumerate(self._params):
            mean, square = self._means[index], self._squares[index]
            self._means[index] = mean = mean * (count / (count + 1)) + param / (count + 1)
            self._squares[index] = square * (count / (count + 1)) + param**2 / (count + 1)
            columns = torch.cat((self._columns[index], (param - mean).reshape(1, -1)))
            self._columns[index] = columns[1:] if count >= self._most else columns
        self._count += 1

    def sample(self) -> None:
        mean, square = (torch.cat([each.reshape(-1) for each in tensors]) for tensors in (self._means, self._squares))
        columns = torch.cat(self._columns, dim=1)
        diagonal = (square - mean**2).clamp(min=1e-30).sqrt() * torch.randn_like(mean)
        along = columns.t().matmul(torch.randn(len(columns))) / math.sqrt(self._most - 1)
        drawn = mean + math.sqrt(0.5) * (diagonal + along)
        for param, part in zip(self._params, drawn.split([param.numel() for param in self._params]), strict=True):
            param.copy_(part.view_as(param))

    def state(self) -> State:
        variances = [square - mean**2 for mean, square in zip(self._means, self._squares, strict=True)]
        return self._means, variances, [columns[-1] for columns in self._columns]


class Careful:
    """The same moments as ours, with a ring that is allocated once, by torch's operations on lists of tensors."""

    def __init__(self, model: nn.Module, deviations: int) -> None:
        self._params, self._count, self._newest = _params(model), 0, 0
        self._means = [param.clone() for param in self._params]
        self._variances = [torch.zeros_like(param) for param in self._params]
        self._ring = [[torch.zeros_like(param) for param in self._params] for _ in range(deviations)]

    def collect(self) -> None:
        weight, self._newest = 1.0 / (self._count + 1), self._count % len(self._ring)
        newest = self._ring[self._newest]
        distances = torch._foreach_sub(self._params, self._means)
        torch._foreach_lerp_(self._means, self._params, weight)
        torch._foreach_copy_(newest, self._params)
        torch._foreach_sub_(newest, self._means)
        torch._foreach_mul_(distances, newest)
        torch._foreach_lerp_(self._variances, distances, weight)
        self._count += 1

    def sample(self) -> None:
        count = min(self._count, len(self._ring))
        torch._foreach_copy_(self._params, self._means)
        numbers = torch.randn(count).tolist()
        for column, number in zip(self._ring, numbers, strict=False):
            torch._foreach_add_(self._params, column, alpha=number * math.sqrt(0.5 / (count - 1)))
        deviations = torch._foreach_sqrt(self._variances)
        noise = [torch.randn_like(param) for param in self._params]
        torch._foreach_addcmul_(self._params, deviations, noise, math.sqrt(0.5))

    def state(self) -> State:
        return self._means, self._variances, self._ring[self._newest]


class Ours:
    def __init__(self, model: nn.Module, deviations: int | None) -> None:
        self._model, self._index = model, -1
        self.averaged = FusedAveragedModel(model, deviations=deviations)

    def collect(self) -> None:
        self.averaged.update_parameters(self._model)

    def sample(self) -> None:
        self._index += 1
        self.averaged.sample_to(self._model, self._index)

    def state(self) -> State:
        state, given = self.averaged.state_dict(), self.averaged.deviations
        assert given is not None
        newest = (int(self.averaged.n_averaged) - 1) % given.count
        heads = ("module", "variance", f"deviation.{newest}")
        mean, variance, deviation = ([state[f"{h}.{n}"] for n, _ in self._model.named_parameters()] for h in heads)
        return mean, variance, deviation


WAYS: dict[str, type[Way]] = {AUTHORS: Authors, CAREFUL: Careful, OURS: Ours}


def check(name: str, way: Way, model: nn.Module) -> float:
    """Have ``way`` collect the model times :data:`SCALES`, and put it back. Return the worst relative error.

    Raises:
        WrongAverageError: mean, variance or newest deviation of a tensor is further from float64 than allowed.
    """
    params = _params(model)
    own = [param.clone() for param in params]
    for scale in SCALES:
        torch._foreach_copy_(params, own)
        torch._foreach_mul_(params, scale)
        way.collect()
    torch._foreach_copy_(params, own)
    scales = torch.tensor(SCALES, dtype=torch.float64)
    mean = scales.mean()
    # The factor of each, and the power of the param that it multiplies.
    known = {"mean": (mean, 1), "variance": (scales.var(correction=0), 2), "deviation": (scales[-1] - mean, 1)}
    worst = 0.0
    for (what, (factor, power)), tensors in zip(known.items(), way.state(), strict=True):
        for index, (param, tensor) in enumerate(zip(own, tensors, strict=True)):
            expected = param.double() ** power * factor
            error = float((tensor.double().view_as(param) - expected).norm() / expected.norm())
            if not error <= TOLERANCE:  # a NaN compares as False
                raise WrongAverageError(f"{name}: the {what} of tensor {index} is off by {error:.1e} (relative L2)")
            worst = max(worst, error)
    return worst


def measure(workload: Workload, deviations: int, budget_s: float, progress: Callable[[str], object]) -> list[Row]:
    """Check all ways, let each fill its ring, and time their collects and samples."""
    model = build(workload, torch.float32, torch.device("cpu"))
    ways: dict[str, Way] = {name: kind(model, deviations) for name, kind in WAYS.items()}
    plain, rows = Ours(model, None), []
    errors = {name: check(name, way, model) for name, way in ways.items()}
    for way in ways.values():
        for _ in range(deviations):
            way.collect()
    calls: dict[str, dict[str, Callable[[], object]]] = {
        COLLECT: {**{name: way.collect for name, way in ways.items()}, PLAIN: plain.collect},
        SAMPLE: {name: way.sample for name, way in ways.items()},
    }
    per_param = {COLLECT: 24, SAMPLE: 12 + 4 * deviations}
    for group, contestants in calls.items():
        progress(group)
        others = OthersCpu()
        rotations = {name: Rotation(call) for name, call in contestants.items()}
        taken = interleave(rotations, budget_s, Clock(torch.device("cpu")))
        share = others.share()
        for name, each in taken.items():
            moved = 12 if name == PLAIN else per_param[group]
            row = Row(
                workload.name, workload.title, "float32", name, workload.num_params, len(list(model.parameters())),
                moved * workload.num_params, group, error=errors.get(name), others_cpu=share,
            )  # fmt: skip
            rows.append(each.into(row))
    return rows


def bars(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Return each requirement, the least that is asked, and what was measured."""
    seconds = {(row.group, row.provider): row.seconds for row in rows}
    least = {(COLLECT, AUTHORS): 40.0, (COLLECT, CAREFUL): 2.5, (SAMPLE, AUTHORS): 10.0, (SAMPLE, CAREFUL): 1.5}
    found = [
        (f"{group}: times as fast as {way}", bar, seconds[group, way] / seconds[group, OURS])
        for (group, way), bar in least.items()
    ]
    over = seconds[COLLECT, OURS] / seconds[COLLECT, PLAIN] / (24 / 12)
    return [*found, (f"{COLLECT}: a plain update with as many bytes, of it", 1 / MOST_OVER_BYTES, 1 / over)]
