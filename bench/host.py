"""What an update costs the host: all of it but the kernel, which is a stub here.

The models are tiny, but as many modules hold as many tensors of as many dimensions as in the real ones. All ways take
turns: our update with the native pass, the same with its checks in Python, and parts of the first one alone. A second
time follows other memory that fills the caches, as a kernel's does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import increment_version

from bench import internals, names
from bench.machine import OthersCpu
from bench.providers import RULES
from bench.report import Row, count_text
from bench.timing import Call, Clock, Rotation, interleave
from bench.workloads import WORKLOADS, Workload, build, listed, shrunk
from swafast import FusedAveragedModel, FusedAverages

CPU = torch.device("cpu")
# Touched before each update, in the group with cold caches: about what the kernel of a ResNet-50 moves.
COLD_BYTES = 100 << 20
# Seconds of samples for each model, warm and cold.
BUDGET_S, QUICK_BUDGET_S = 8.0, 0.5


@dataclass(frozen=True)
class HostModel:
    """A model whose update is measured without its kernel."""

    workload: Workload
    averages: int = 1

    @property
    def name(self) -> str:
        return self.workload.name + (f"_x{self.averages}" if self.averages > 1 else "")

    @property
    def title(self) -> str:
        return self.workload.title + (f", {self.averages} averages" if self.averages > 1 else "")

    def build(self) -> nn.Module:
        return build(shrunk(self.workload), torch.float32, CPU)

    def average(self, model: nn.Module) -> internals.Averaged:
        """Return averages of ``model`` that are in use: the first update plans, the second is like all others."""
        averaged: internals.Averaged
        if self.averages == 1:
            averaged = FusedAveragedModel(model)
        else:
            averaged = FusedAverages(model, rules=dict(list(RULES.items())[: self.averages]))
        for _ in range(2):
            averaged.update_parameters(model)
        return averaged


MODELS = (
    HostModel(listed("one", "one tensor", ((64,),))),
    *(HostModel(WORKLOADS[name]) for name in ("resnet50", "gpt2_medium", "llama3_8b")),
    HostModel(WORKLOADS["3000x64"]),
    HostModel(listed("3000x64_modules", "3000 tensors of 64, each in a module", ((64,),) * 3000)),
    HostModel(WORKLOADS["gpt2_medium"], averages=3),
)


def python_way(made: HostModel, model: nn.Module) -> Call:
    """Return our update with its checks in Python."""
    averaged = made.average(model)
    internals.check_in_python(averaged)
    return partial(averaged.update_parameters, model)


def native_ways(made: HostModel, model: nn.Module) -> dict[str, Call]:
    """Return our update with the native pass, and its parts alone."""
    averaged = made.average(model)
    check, written = internals.native_pass(averaged), internals.written(averaged, model)
    return {
        names.OURS: partial(averaged.update_parameters, model),
        names.PASS: partial(check.find, internals.NUM_FOUND),
        names.TELLS: partial(internals.tell, written),
        names.TORCH_TELLS: partial(increment_version, written),
    }


def measure(*, quick: bool, progress: Callable[[str], object] = lambda step: None) -> list[Row]:
    """Measure all models, alone and in cold caches."""
    rows: list[Row] = []
    budget_s = QUICK_BUDGET_S if quick else BUDGET_S
    with internals.stubbed_c_call():
        for made in MODELS:
            progress(made.title)
            rows += _measure(made, budget_s)
    return rows


def _measure(made: HostModel, budget_s: float) -> list[Row]:
    model, rows = made.build(), []
    ways = {names.OURS_IN_PYTHON: python_way(made, model)}
    numels = [param.numel() for param in model.parameters()]
    num_tensors, note = len(numels) + len(list(model.buffers())), count_text(len(list(model.modules())), "module")
    base = Row(made.name, made.title, "float32", "", sum(numels), num_tensors, 0, averages=made.averages, note=note)
    if (reason := internals.native_pass_missing()) is not None:
        rows.append(replace(base, provider=names.OURS, group=names.HOST, status="skipped", reason=reason))
    else:
        ways |= native_ways(made, model)
    for group, clock in ((names.HOST, Clock(CPU)), (names.HOST_COLD, Clock(CPU, filler_bytes=COLD_BYTES))):
        others = OthersCpu()
        taken = interleave({name: Rotation(way) for name, way in ways.items()}, budget_s, clock)
        share = others.share()
        rows += [each.into(replace(base, provider=name, group=group, others_cpu=share)) for name, each in taken.items()]
    return rows
