"""pytest-benchmark's view of an update: each provider on a small list, or with ``-m slow`` on the others too.

The figures to quote come from ``python -m bench``, which interleaves the providers.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import gate
from bench.providers import Provider, dtype_name, providers_for
from bench.workloads import WORKLOADS, build

CPU = torch.device("cpu")
CASES = [(dtype, kind) for dtype in (torch.float32, torch.bfloat16) for kind in providers_for(dtype)]
IDS = [f"{dtype_name(dtype)}-{kind.name}" for dtype, kind in CASES]


def bench_update(benchmark: BenchmarkFixture, name: str, dtype: torch.dtype, kind: type[Provider], rounds: int) -> None:
    reason = kind.missing()
    if reason is not None:
        pytest.skip(f"{kind.name}: {reason}")
    model = build(WORKLOADS[name], dtype, CPU)
    reason = kind.refusal(model)
    if reason is not None:
        pytest.skip(f"{kind.name}: {reason}")
    provider = kind(model)
    error, _ = gate.check(provider, model)
    benchmark.group = f"{name}, {dtype}"
    benchmark.extra_info.update(error=error, counted_bytes=WORKLOADS[name].num_params * kind.counted_bytes(dtype))
    benchmark.pedantic(provider.update, rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=IDS)
def test_update_of_small_tensors(benchmark: BenchmarkFixture, dtype: torch.dtype, kind: type[Provider]) -> None:
    bench_update(benchmark, "3000x64", dtype, kind, rounds=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vit_l_16", "gpt2_medium", "2000x64x64"])
@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=IDS)
def test_update(benchmark: BenchmarkFixture, name: str, dtype: torch.dtype, kind: type[Provider]) -> None:
    bench_update(benchmark, name, dtype, kind, rounds=10)
