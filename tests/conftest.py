"""Fixtures for all tests: small models with every kind of tensor, and backends to run them on."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from swafast import FusedAveragedModel
from swafast.backends import cpu, cuda, library
from tests.native_build import COMPILER
from tests.shim_library import build_shim_library

NO_LIBRARY = "needs the native library"

# Triton reads this when its kernels are defined: without a GPU its interpreter runs them, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # The checks that need a compiler or the library must not be skipped where the machine can run them: .ci/run looks
    # for their reasons in the summary.
    torch.set_num_threads(int(os.environ.get("SWAFAST_TEST_THREADS", "2")))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Keep each file in one process: what its fixtures compile, and what ranks leave for others, is made once."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


@pytest.fixture(params=["cpu", "cuda", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend, on CPU tensors: the CUDA source runs on them through the shim."""
    if request.param == "cpu" and cpu.unavailable() is not None:
        pytest.skip(f"{NO_LIBRARY}: {cpu.unavailable()}")
    if request.param == "cuda":
        request.getfixturevalue("cuda_on_cpu")
    return str(request.param)


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native library with its CUDA source compiled for the processor."""
    if not COMPILER:
        pytest.skip("needs a C++ compiler")
    return build_shim_library(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def cuda_on_cpu(shim_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The ``cuda`` backend, serving CPU tensors with the real kernels' source and host code."""
    monkeypatch.setenv("SWAFAST_LIBRARY", str(shim_library))
    monkeypatch.setattr(cuda, "device_types", frozenset({"cpu"}))
    caches = (library.load, cuda.num_blocks)
    for cache in caches:
        cache.cache_clear()
    yield library.loaded()
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """A chunk of 64 elements, so that small tensors have several."""
    monkeypatch.setattr(cpu, "CPU_CHUNK_NUMEL", 64)
    return 64


class EveryKind(nn.Module):
    """Dense, channels_last, transposed, strided, 0-dim, empty and tied params; float, integer and bool buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm2d(5)
        self.linear = nn.Linear(7, 11)
        self.linear.weight = nn.Parameter(torch.randn(7, 11).t())
        self.tied = nn.Linear(7, 11, bias=False)
        self.tied.weight = self.linear.weight
        self.gapped = nn.Parameter(torch.randn(6, 10)[:, ::2])
        self.scalar = nn.Parameter(torch.tensor(3.0))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.long = nn.Parameter(torch.randn(1000))
        self.frozen = nn.Parameter(torch.randn(9), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.randn(3), persistent=False)

    def drift(self) -> None:
        """Change every tensor in place, as training would."""
        with torch.no_grad():
            for param in self.parameters():
                param.add_(torch.randn(param.shape).to(param.dtype), alpha=0.1)
            for buffer in self.buffers():
                if buffer.is_floating_point():
                    buffer.add_(torch.rand(buffer.shape).to(buffer.dtype))
                else:
                    buffer.copy_(torch.randint(0, 2, buffer.shape))


@pytest.fixture
def every_kind() -> EveryKind:
    return EveryKind()


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Give copies of all parameters and buffers, to compare with later."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Give the names whose tensors differ in dtype, shape or any bit (NaN equals NaN)."""
    names = [name for name in a if name not in b] + [name for name in b if name not in a]
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        same = x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.isnan(), y.isnan())
        if not same or not torch.equal(x.nan_to_num(0.0), y.nan_to_num(0.0)):
            names.append(name)
    return sorted(names)


def trained(model: EveryKind, dtype: torch.dtype, **options: Any) -> FusedAveragedModel:
    """Give an average of ``model`` in ``dtype`` after a few updates, each of other values."""
    model.to(dtype)
    average = FusedAveragedModel(model, **options)
    for _ in range(4):
        model.drift()
        average.update_parameters(model)
    return average
