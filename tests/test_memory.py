"""What an update and a first update allocate."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from swafast import FusedAveragedModel
from swafast.backends.reference import _CPU_WINDOW_NUMEL
from swafast.terms.layout import MAX_BUCKET_NUMEL

MEGABYTE = 2**20


def allocated_by_torch(run) -> int:
    """Return the bytes that torch allocates in ``run``, freed ones included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update_allocates_nothing_to_speak_of(dtype: torch.dtype) -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(500_000).to(dtype)) for _ in range(8)])
    average = FusedAveragedModel(model)
    average.update_parameters(model)
    assert allocated_by_torch(lambda: average.update_parameters(model)) == 0
    assert allocated_by_torch(lambda: torch.zeros(1000)) >= 4000  # the measure measures


def test_the_list_of_3000_tensors_costs_less_than_a_megabyte() -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(64)) for _ in range(3000)])
    average = FusedAveragedModel(model)
    for _ in range(2):
        average.update_parameters(model)
    tracemalloc.start()
    average.update_parameters(model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MEGABYTE


def test_the_reference_works_in_windows() -> None:
    # All that one window allocates, freed or not, is more than is ever held at once; and no operation takes more of
    # the whole than of a window.
    whole = nn.ParameterList([nn.Parameter(torch.randn(3, 1_000_000).bfloat16())])
    window = nn.ParameterList([nn.Parameter(torch.randn(_CPU_WINDOW_NUMEL).bfloat16())])
    most = []
    for model in (window, whole):
        average = FusedAveragedModel(model, backend="reference")
        average.update_parameters(model)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            average.update_parameters(model)
        most.append(max(event.cpu_memory_usage for event in profiler.events()))
    assert 0 < most[1] <= most[0]
    average = FusedAveragedModel(window, backend="reference")
    average.update_parameters(window)
    assert allocated_by_torch(lambda: average.update_parameters(window)) < MEGABYTE


FIRST_UPDATE = """
import resource, torch
from torch import nn
from swafast import FusedAveragedModel

def high_water() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

model = nn.ParameterList([nn.Parameter(torch.ones(20 * 2**20)) for _ in range(8)])
average = FusedAveragedModel(model)
small = nn.ParameterList([nn.Parameter(torch.ones(20))])
FusedAveragedModel(small).update_parameters(small)  # whatever is loaded at first use
before = high_water()
average.update_parameters(model)
print(high_water() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's ru_maxrss in KiB")
def test_a_first_update_takes_one_bucket_more() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_UPDATE], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    bucket = MAX_BUCKET_NUMEL * 4
    # The bucket is touched slot by slot while the old tensors go, so it is one param rather than a whole bucket.
    assert 0.9 * 20 * 2**20 * 4 < int(done.stdout) < 1.05 * bucket
