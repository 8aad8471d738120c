"""What updates hold at once, beside the phases of docs/costs.md."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages, ShardedAveragedModel
from swafast.op import buckets
from swafast.sharded import checkpoint
from swafast.terms import layout
from swafast.terms.converting import convert
from swafast.terms.formats import FLOAT32, Format, get_format
from swafast.terms.layout import MAX_BUCKET_NUMEL
from tests.costs import peak_of
from tests.support import differing

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


# Each phase takes at most one bucket beside params and averages, and what it returns

FORMATS = ("float32", "exact", "mirrored", "compact", "compensated", "half")
#: A bucket, and params of which the first is larger than one.
BUCKET_NUMEL, NUMELS = 2**15, (2**16, *(2**12,) * 8)
NUMEL = sum(NUMELS)
CASES = [*((torch.bfloat16, fmt) for fmt in FORMATS), (torch.float32, "exact"), (torch.float16, "mirrored")]


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_BUCKET_NUMEL", BUCKET_NUMEL)
    monkeypatch.setattr(buckets, "lay_out", partial(layout.lay_out, max_numel=BUCKET_NUMEL))
    monkeypatch.setattr(layout, "CPU_WINDOW_NUMEL", 2**10)


def make_model(dtype: torch.dtype) -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.randn(numel // 64, 64).to(dtype)) for numel in NUMELS])


def require(phase: str, call: Callable[[], object], own: int) -> None:
    """Check that a phase takes no more than ``own`` bytes and a bucket of float32."""
    peak, limit = peak_of(call), own + BUCKET_NUMEL * 4
    assert peak <= limit, f"{phase} takes {peak / NUMEL:.2f} bytes a param, at most {limit / NUMEL:.2f}"


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.filterwarnings("ignore:format='half'")
@pytest.mark.parametrize(("dtype", "fmt"), CASES, ids=str)
def test_no_phase_takes_more_than_a_bucket_beside(dtype: torch.dtype, fmt: str) -> None:
    model, made = make_model(dtype), []
    stored = get_format(fmt)
    nbytes = NUMEL * (stored.nbytes or 0)
    aside = 0 if stored.dtype == dtype else NUMEL * dtype.itemsize  # params that are set aside by a swap
    other = FusedAveragedModel(model, format="exact" if fmt == "float32" else "float32").state_dict()
    require("construction", lambda: made.append(FusedAveragedModel(model, format=fmt)), nbytes)
    averaged = made[0]
    assert sum(tensor.nbytes for tensor in (*averaged.parameters(), *averaged.buffers())) == nbytes + 8

    def swap() -> None:
        with averaged.swapped_into(model):
            pass

    for phase, call, own in (
        ("first update", lambda: averaged.update_parameters(model), 0),
        ("swapped_into", swap, aside),
        ("copy_to", lambda: averaged.copy_to(model), 0),
        ("averaged_state_dict", averaged.averaged_state_dict, NUMEL * 4),
        # Held as well until it is checked: a load that fails has changed nothing.
        ("load_state_dict of another format", lambda: averaged.load_state_dict(other), nbytes),
        # Only the largest param is there in both dtypes at once.
        ("double", averaged.double, NUMEL * 8 - nbytes + NUMELS[0] * (nbytes // NUMEL)),
    ):
        require(phase, call, own)
    doubled = model.double()
    require("first update in float64", lambda: averaged.update_parameters(doubled), BUCKET_NUMEL * 4)  # float64


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.filterwarnings("ignore:format='half'")
@pytest.mark.parametrize(("dtype", "fmt"), CASES, ids=str)
def test_nor_does_a_phase_of_several_averages(dtype: torch.dtype, fmt: str) -> None:
    model, rules, made = make_model(dtype), {"a": EqualAverage(), "b": ExponentialAverage(0.9)}, []
    nbytes = 2 * NUMEL * (get_format(fmt).nbytes or 0)
    require("construction", lambda: made.append(FusedAverages(model, rules=rules, format=fmt)), nbytes)
    require("first update", lambda: made[0].update_parameters(model), 0)


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("fmt", ["float32", "exact"])
def test_nor_does_a_phase_of_shards(fmt: str) -> None:
    model, made = make_model(torch.bfloat16), []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        require("construction", lambda: made.append(ShardedAveragedModel(model, format=fmt)), NUMEL * 4)
        averaged: ShardedAveragedModel = made[0]
        whole = averaged.full_state_dict()
        for phase, call, own in (
            ("first update", lambda: averaged.update_parameters(model), 0),
            ("copy_to", lambda: averaged.copy_to(model), 0),
            ("state_dict", averaged.state_dict, NUMEL * 4 + checkpoint._SAVE_ID_NUMEL * 8),
            ("load_state_dict", lambda: averaged.load_state_dict(whole), 0),
            ("full_state_dict", averaged.full_state_dict, NUMEL * 4),
        ):
            require(phase, call, own)
    finally:
        dist.destroy_process_group()


def test_windows_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.cat((torch.randn(3000) * 1e3, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])))
    for name in FORMATS:
        fmt: Format = get_format(name)
        sizes = []
        for window in (2**20, 100):
            monkeypatch.setattr(layout, "CPU_WINDOW_NUMEL", window)
            planes = [torch.empty(value.shape, dtype=dtype) for dtype in (fmt.dtype, *dict(fmt.extra).values())]
            back = torch.empty_like(value)
            convert((value,), None, planes, fmt)
            convert(planes, fmt, (back,), FLOAT32)
            sizes.append({str(index): tensor for index, tensor in enumerate((*planes, back))})
        fresh = fmt.encode(value.to(fmt.value_dtype))
        sizes.append({**sizes[0], **{str(index): plane for index, plane in enumerate(fresh)}})
        assert differing(sizes[0], sizes[1]) == differing(sizes[0], sizes[2]) == []


BEGINNING = """
import torch
from torch import nn
from swafast import FusedAveragedModel

def high_water() -> int:
    # Not ru_maxrss: a process begins with that of the one that started it.
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

model = nn.ParameterList([nn.Parameter(torch.ones(20 * 2**20)) for _ in range(8)])
small = nn.ParameterList([nn.Parameter(torch.ones(20))])
FusedAveragedModel(small).update_parameters(small)  # whatever is loaded at first use
before = high_water()
average = FusedAveragedModel(model)
average.update_parameters(model)
print(high_water() - before)
"""


def test_a_construction_and_a_first_update_take_the_averages_and_no_more() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGINNING], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    nbytes = 8 * 20 * 2**20 * 4
    assert 0.9 * nbytes < int(done.stdout) < 1.05 * nbytes


LARGE = """
import sys, torch
from torch import nn
from swafast import FusedAveragedModel

def high_water() -> int:
    # Not ru_maxrss: a process begins with that of the one that started it.
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

dtype, fmt, count = getattr(torch, sys.argv[1]), sys.argv[2], int(sys.argv[3])
small = nn.Linear(20, 20).to(dtype)
FusedAveragedModel(small, format=fmt).update_parameters(small)  # whatever is loaded at first use
numel = 2**30 // dtype.itemsize // count
before = high_water()
model = nn.ParameterList([nn.Parameter(torch.ones(numel, dtype=dtype)) for _ in range(count)])
average = FusedAveragedModel(model, format=fmt)
average.update_parameters(model)
tensors = (*model.parameters(), *average.parameters(), *average.buffers())
print(high_water() - before - sum(tensor.nbytes for tensor in tensors))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_gigabyte_takes_at_most_a_bucket_beside(dtype: str, fmt: str, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LARGE, dtype, fmt, str(count)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert int(done.stdout) < 1.1 * MAX_BUCKET_NUMEL * 4
