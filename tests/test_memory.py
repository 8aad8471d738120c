"""What updates hold at once, beside the phases of docs/costs.md."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import torch
from torch import nn

from swafast import FusedAveragedModel
from swafast.terms.layout import MAX_BUCKET_NUMEL
from tests.costs import peak_of

MEGABYTE = 2**20


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
    model = nn.ParameterList([nn.Parameter(torch.randn(3, 1_000_000).bfloat16())])
    average = FusedAveragedModel(model, backend="reference")
    average.update_parameters(model)
    assert 0 < peak_of(lambda: average.update_parameters(model)) < MEGABYTE


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


def test_a_first_update_takes_one_bucket_more() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_UPDATE], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    bucket = MAX_BUCKET_NUMEL * 4
    # The bucket is touched slot by slot while the old tensors go, so it is one param rather than a whole bucket.
    assert 0.9 * 20 * 2**20 * 4 < int(done.stdout) < 1.05 * bucket
