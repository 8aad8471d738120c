"""The cost of each public call, in counts that noise cannot change: the table of docs/costs.md.

``python -m tests.costs`` measures it and writes the table.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import swafast
from swafast import ExponentialAverage, FusedAveragedModel, FusedAverages, ShardedAveragedModel, Snapshots
from swafast.backends import library

PAGE = Path(__file__).parents[1] / "docs" / "costs.md"
SOURCES = str(Path(swafast.__file__).parent)
#: The models below have 20 params in 10 modules.
NUM_LAYERS, WIDTH = 10, 4


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
        elif not func.is_view and name not in ("aten::detach", "aten::empty", "aten::empty_strided"):
            self.ops += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Count calls of the native library's kernels, by launches that are prepared in the body."""
    counter: Counter[str] = Counter()
    native, loaded = library.loaded(), library.loaded

    class Counting:
        def __getattr__(self, name: str) -> Any:
            function = getattr(native, name)
            if name.rpartition("_")[2] not in ("update", "exchange", "nonfinite", "checksum"):
                return function

            def count(*args: Any) -> Any:
                counter[name] += 1
                return function(*args)

            return count

    library.loaded = lambda: Counting()  # type: ignore[assignment,return-value]
    try:
        yield counter
    finally:
        library.loaded = loaded


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


def memory_events(call: Callable[[], object]) -> list[int]:
    """Return the bytes of each allocation (positive) and release (negative) of one call, in order of time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_of(call: Callable[[], object]) -> int:
    """Return the peak of one call in bytes: tensors that it holds at once, beyond those from before."""
    return max(accumulate(memory_events(call), initial=0))


def cost_of(call: Callable[[], object], launches: Counter[str]) -> Cost:
    """Measure one call, after a first one that makes what is made on first use."""
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


def costs() -> dict[str, Cost]:
    """Return the cost of every public call in one process, by name."""
    model, states = make_model(), {}
    with counted_launches() as launches, tempfile.TemporaryDirectory() as folder:
        averaged = FusedAveragedModel(model)
        averages = FusedAverages(model, rules={"fast": ExponentialAverage(0.9), "slow": ExponentialAverage(0.99)})
        snapshots = Snapshots(folder)

        def swap() -> None:
            with averaged.swapped_into(model):
                pass

        averaged.update_parameters(model)
        states["one"], states["several"] = averaged.state_dict(), averages.state_dict()
        calls: dict[str, Callable[[], object]] = {
            "update_parameters": lambda: averaged.update_parameters(model),
            "update_parameters of two averages": lambda: averages.update_parameters(model),
            "swapped_into, there and back": swap,
            "copy_to": lambda: averaged.copy_to(model),
            "state_dict": averaged.state_dict,
            "load_state_dict": lambda: averaged.load_state_dict(states["one"]),
            "averaged_state_dict": averaged.averaged_state_dict,
            "load_state_dict of two averages": lambda: averages.load_state_dict(states["several"]),
            "Snapshots.save of two averages": lambda: snapshots.save(averages),
        }
        return {name: cost_of(call, launches) for name, call in calls.items()}


def rank_costs(mode: str) -> dict[str, Cost]:
    """Return the cost on this rank of every public call, by name, for a model wrapped as ``mode``. Collective."""
    from tests.sharded_models import make_model as make_spread
    from tests.sharded_models import wrap

    model = wrap(make_spread(mode), mode)
    with counted_launches() as launches:
        averaged = ShardedAveragedModel(model)

        def swap() -> None:
            with averaged.swapped_into(model):
                pass

        averaged.update_parameters(model)
        state = averaged.state_dict()
        calls: dict[str, Callable[[], object]] = {
            "update_parameters": lambda: averaged.update_parameters(model),
            "swapped_into, there and back": swap,
            "copy_to": lambda: averaged.copy_to(model),
            "state_dict": averaged.state_dict,
            "load_state_dict": lambda: averaged.load_state_dict(state),
            "full_state_dict": averaged.full_state_dict,
        }
        return {f"{name}, {mode.upper()}": cost_of(call, launches) for name, call in calls.items()}
