"""pytest-benchmark's view of an update: each provider on a small list, or with ``-m slow`` on the others too.

The figures to quote come from ``python -m bench``, which interleaves the providers.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import gate
from bench.providers import Provider, providers_for
from bench.workloads import WORKLOADS, build

CASES = [(dtype, each) for dtype in (torch.float32, torch.bfloat16) for each in providers_for(dtype)]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in WORKLOADS if name not in ("3000x64", "llama3_8b")]


@pytest.mark.parametrize("name", ["3000x64", *SLOW])
@pytest.mark.parametrize(("dtype", "provider"), CASES, ids=lambda each: getattr(each, "name", str(each)))
def test_update(benchmark: BenchmarkFixture, name: str, dtype: torch.dtype, provider: Provider) -> None:
    model, missing = build(WORKLOADS[name], dtype, torch.device("cpu")), provider.missing()
    if missing is not None:
        pytest.skip(f"{provider.name}: {missing}")
    if provider.max_tensors is not None and len(list(model.parameters())) > provider.max_tensors:
        pytest.skip(f"{provider.name}: compiling more than {provider.max_tensors} tensors takes minutes")
    made = provider.make(model)
    benchmark.extra_info["error"] = gate.check(provider, made, model)[0]
    benchmark.pedantic(made.update, rounds=5, warmup_rounds=1)
