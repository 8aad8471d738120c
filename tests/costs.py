"""The cost of each public call, in counts that noise cannot change: the table of docs/costs.md.

``python -m tests.costs`` measures and prints both tables; with ``--write`` it fills them in.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import swafast
from bench.internals import counted_launches
from swafast import ExponentialAverage, FusedAveragedModel, FusedAverages, ShardedAveragedModel, Snapshots
from swafast.loop import attachment
from tests import sharded_models
from tests.ranks import run_ranks

# The profiler would print a line at each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

PAGE = Path(__file__).parents[1] / "docs" / "costs.md"
SOURCES = str(Path(swafast.__file__).parent)
#: The models below have 20 params in 10 modules.
NUM_LAYERS, WIDTH = 10, 4
#: Elements of each of the 8 params of the models whose memory is measured.
BIG_NUMEL = 2**18
NUM_DEVIATIONS = 2
#: How the models of the ranks are spread.
MODES = ("ddp", "fsdp2")


@dataclass
class Cost:
    """The cost of one call: the columns of the table."""

    calls: int = 0  # calls of the package's Python functions
    files: int = 0  # the files of these functions
    launches: int = 0  # launches of the package's kernels
    ops: int = 0  # torch's operations that compute or copy; on a GPU each is a launch
    allocations: int = 0  # allocations of tensors' memory
    collectives: int = 0


class _Ops(TorchDispatchMode):
    """Counts collectives and torch's operations that compute or copy. Views and empty tensors cost no launch."""

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.collectives = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        if "c10d" in name:
            self.collectives += 1
        elif not func.is_view and name not in (
            "aten::detach",
            "aten::empty",
            "aten::empty_like",
            "aten::empty_strided",
        ):
            self.ops += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _counted_calls() -> Iterator[Counter[str]]:
    """Count calls of the package's Python functions by file, as ``sys.setprofile`` reports them."""
    files: Counter[str] = Counter()

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(SOURCES):
            files[frame.f_code.co_filename] += 1

    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(None)


def python_calls(call: Callable[[], object]) -> int:
    """Return how many functions one call calls, of Python and of C, whosever they are."""
    events: Counter[str] = Counter()
    with _alone():
        sys.setprofile(lambda frame, event, _: events.update([event]))
        try:
            call()
        finally:
            sys.setprofile(None)
    return events["call"] + events["c_call"]


@contextmanager
def _alone() -> Iterator[None]:
    """Leave out what the rest of the process adds: attachments of other averages, and what is collected meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attachment, "_live", weakref.WeakValueDictionary())
        # What tests have torch fill takes a mask for some tensors.
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        gc.disable()
        try:
            yield
        finally:
            gc.enable()


def memory_events(call: Callable[[], object]) -> list[int]:
    """Return the bytes that torch's allocator gave (positive) and took back within one call, in order.

    Only those of the calling thread: what gloo's threads take depends on how ranks meet.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, record_function("the call"):
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    thread = next(event.start_thread_id() for event in events if event.name() == "the call")
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.start_thread_id() == thread]


def peak_of(call: Callable[[], object]) -> int:
    """Return the peak of one call in bytes: tensors that it holds at once, beyond those from before."""
    return max(accumulate(memory_events(call), initial=0))


def cost_of(call: Callable[[], object], launches: Counter[str]) -> Cost:
    """Measure one call, after a first one that makes what is made on first use."""
    with _alone():
        call()
        with _counted_calls() as files:
            call()
        launches.clear()
        with torch.no_grad(), _Ops() as ops:
            call()
        launched = launches.total()
        allocations = sum(nbytes > 0 for nbytes in memory_events(call))
    return Cost(files.total(), len(files), launched, ops.ops, allocations, ops.collectives)


def make_model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))


def swap(averaged: Any, model: nn.Module) -> None:
    with averaged.swapped_into(model):
        pass


def sample(averaged: Any, model: nn.Module) -> None:
    with averaged.sampled_into(model, 0):
        pass


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Change the params, so that the models of an average differ and span a subspace."""
    for param in model.parameters():
        param.add_(1)


def place(subspace: Any, model: nn.Module) -> None:
    with subspace.placed_into(model, [1.0]):
        pass


def _calls(averaged: Any, model: nn.Module) -> dict[str, Callable[[], object]]:
    """Return the public calls that all averaged models have, after a first update."""
    averaged.update_parameters(model)
    state = averaged.state_dict()
    return {
        "update_parameters": lambda: averaged.update_parameters(model),
        "swapped_into, there and back": lambda: swap(averaged, model),
        "copy_to": lambda: averaged.copy_to(model),
        "state_dict": averaged.state_dict,
        "load_state_dict": lambda: averaged.load_state_dict(state),
    }


def costs() -> dict[str, Cost]:
    """Return the cost of every public call in one process, by name."""
    model = make_model()
    with counted_launches() as launches, tempfile.TemporaryDirectory() as folder:
        averaged = FusedAveragedModel(model)
        averages = FusedAverages(model, rules={"fast": ExponentialAverage(0.9), "slow": ExponentialAverage(0.99)})
        snapshots, state = Snapshots(folder), averages.state_dict()
        swag = FusedAveragedModel(model, deviations=NUM_DEVIATIONS)
        swag.update_parameters(model)
        move(model)
        swag.update_parameters(model)
        plane = swag.subspace(1)
        calls = _calls(averaged, model) | {
            "averaged_state_dict": averaged.averaged_state_dict,
            "update_parameters of two averages": lambda: averages.update_parameters(model),
            "load_state_dict of two averages": lambda: averages.load_state_dict(state),
            "Snapshots.save of two averages": lambda: snapshots.save(averages),
            "placed_into, there and back": lambda: place(plane, model),  # the next update ends the plane
            "update_parameters, deviations": lambda: swag.update_parameters(model),
            "sampled_into, there and back": lambda: sample(swag, model),
            "sample_to": lambda: swag.sample_to(model, 0),
        }
        return {name: cost_of(call, launches) for name, call in calls.items()}


def rank_costs(mode: str) -> dict[str, Cost]:
    """Measure every public call on this rank, of a model that is spread in one way. Collective."""
    model = sharded_models.wrap(sharded_models.make_model(mode), mode)
    with counted_launches() as launches:
        averaged = ShardedAveragedModel(model)
        calls, state = _calls(averaged, model), averaged.full_state_dict()
        calls |= {
            "full_state_dict": averaged.full_state_dict,
            "averaged_state_dict": averaged.averaged_state_dict,
            "load_full_state_dict": lambda: averaged.load_full_state_dict(state, from_rank0=True),
        }
        spread = ShardedAveragedModel(model, deviations=NUM_DEVIATIONS)
        for _ in range(NUM_DEVIATIONS):
            spread.update_parameters(model)
            move(model)
        plane = spread.subspace(1)
        calls |= {
            "placed_into, there and back": lambda: place(plane, model),  # the next update ends the plane
            "update_parameters, deviations": lambda: spread.update_parameters(model),
            "sampled_into, there and back": lambda: sample(spread, model),
            "sample_to": lambda: spread.sample_to(model, 0),
        }
        return {f"{name}, {mode.upper()}": cost_of(call, launches) for name, call in calls.items()}


def peaks(dtype: torch.dtype) -> dict[str, float]:
    """Measure the most memory that each phase adds, in bytes of the model's params."""
    model = nn.ParameterList([nn.Parameter(torch.ones(BIG_NUMEL, dtype=dtype)) for _ in range(8)])
    return _peaks(model, FusedAveragedModel, ("first update", "update"), "averaged_state_dict")


def rank_peaks(mode: str) -> dict[str, float]:
    """Measure the same on this rank, in bytes of the whole model's params. Collective."""
    model: Any = nn.Sequential(*(nn.Linear(BIG_NUMEL // 512, 512, bias=False) for _ in range(8)))
    for param in model.parameters():
        nn.init.constant_(param, 0.5)
    if mode == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    measured = _peaks(model, ShardedAveragedModel, ("update",), "full_state_dict")
    spread = ShardedAveragedModel(model, deviations=NUM_DEVIATIONS)
    for _ in range(NUM_DEVIATIONS):
        spread.update_parameters(model)
    phases: dict[str, Callable[[], object]] = {
        "update, deviations": lambda: spread.update_parameters(model),
        "sampled_into, there and back": lambda: sample(spread, model),
    }
    return measured | _peaks_of(phases, model)


def _peaks(model: nn.Module, kind: Any, updates: Sequence[str], export: str) -> dict[str, float]:
    made: list[Any] = []
    state: dict[str, Any] = {}
    phases: dict[str, Callable[[], object]] = {
        "construction": lambda: made.append(kind(model)),
        **dict.fromkeys(updates, lambda: made[0].update_parameters(model)),
        "swapped_into, there and back": lambda: swap(made[0], model),
        "state_dict": lambda: state.update(made[0].state_dict()),
        "load_state_dict": lambda: made[0].load_state_dict(state),
        export: lambda: getattr(made[0], export)(),
    }
    return _peaks_of(phases, model)


def _peaks_of(phases: dict[str, Callable[[], object]], model: nn.Module) -> dict[str, float]:
    nbytes = sum(param.numel() * param.element_size() for param in model.parameters())
    return {name: round(peak_of(phase) / nbytes, 2) for name, phase in phases.items()}


def costs_table(costs: dict[str, Cost]) -> list[str]:
    names = [field.name for field in fields(Cost)]
    rows = [f"| call | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    return [
        *rows,
        *(f"| {call} | {' | '.join(str(getattr(cost, n)) for n in names)} |" for call, cost in costs.items()),
    ]


def peaks_table(measured: dict[str, dict[str, float]]) -> list[str]:
    phases = list(dict.fromkeys(phase for column in measured.values() for phase in column))
    rows = [f"| phase | {' | '.join(measured)} |", "|---|" + "---:|" * len(measured)]
    cell = "{:.2f}".format
    for phase in phases:
        cells = [cell(column[phase]) if phase in column else "" for column in measured.values()]
        rows.append(f"| {phase} | {' | '.join(cells)} |")
    return rows


def measured_costs() -> dict[str, Cost]:
    """Measure all calls, of one process and of one of two ranks: the larger count of the two."""
    measured = costs()
    for mode in MODES:
        ranks = run_ranks(2, rank_costs, mode)
        for name in ranks[0]:
            both = [asdict(rank[name]) for rank in ranks]
            measured[name] = Cost(**{key: max(each[key] for each in both) for key in both[0]})
    return measured


def measured_peaks() -> dict[str, dict[str, float]]:
    """Measure all phases, of one process by the model's dtype, and of the ranks that take most."""
    measured = {"float32": peaks(torch.float32), "bfloat16": peaks(torch.bfloat16)}
    for mode in MODES:
        ranks = run_ranks(2, rank_peaks, mode)
        measured[f"{mode.upper()}, 2 ranks"] = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    return measured


def read_table(name: str) -> dict[str, list[str]]:
    """Return the cells of a table of the page, by the first cell of each row."""
    lines = (
        PAGE.read_text().partition(f"<!-- table {name} -->\n")[2].partition(f"<!-- end of {name} -->")[0].splitlines()
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: cells for first, *cells in rows[:1] + rows[2:]}


def main() -> None:
    """Print both tables; with ``--write`` put them into the page as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"fill the tables of {PAGE.name} in")
    write = parser.parse_args().write
    torch.use_deterministic_algorithms(True, warn_only=True)  # as conftest.py has it: a few allocations more
    page = PAGE.read_text()
    for name, lines in (("costs", costs_table(measured_costs())), ("peaks", peaks_table(measured_peaks()))):
        print(*lines, "", sep="\n")
        begin, end = f"<!-- table {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        page = before + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
    if write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
