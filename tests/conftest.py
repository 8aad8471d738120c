"""Fixtures for all tests: a model with every kind of tensor, backends to run it on, and memory that shows unwritten."""

from __future__ import annotations

import ctypes
import gc
import os

# OpenMP reads this when torch is loaded. A waiting thread that spins takes the core from the thread it waits for, where
# tests run in two processes on two cores: 21 CPU seconds instead of 7 for 21 tests of `attach`.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from swafast.backends import cpu, cuda, library
from swafast.backends.triton import launch as triton_launch
from swafast.loop import swaps
from swafast.op import tree_check
from tests.native_build import COMPILER, built_once
from tests.ptx.library import build_once, launched_kernels
from tests.shim_library import build_shim_library

# Other tests import these from here.
from tests.support import EveryKind, differing, tensors_of, trained  # noqa: F401

NO_LIBRARY = "needs the native library"

# Triton reads this when its kernels are defined: without a GPU its interpreter runs them, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # The checks that need a compiler or the library must not be skipped where the machine can run them: .ci/run looks
    # for their reasons in the summary.
    torch.set_num_threads(int(os.environ.get("SWAFAST_TEST_THREADS", "2")))


def pytest_collection_finish() -> None:
    # Each gc.collect() of a test or of bench would walk over all that was imported: 0.2 s.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or Triton's bindings report at the end that they leaked


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


@pytest.fixture(scope="module", autouse=True)
def _unwritten_memory_shows() -> Iterator[None]:
    """Have torch fill each tensor that it makes without values: with NaN, or the largest integer of its dtype.

    Or memory that is read before it is written holds zeros, or what it held before, and the test passes by chance.
    """
    # On a GPU other kernels would run as well.
    torch.use_deterministic_algorithms(not torch.cuda.is_available(), warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_model_stays_on_averages() -> Iterator[None]:
    """Check that each test has left its swaps: one in force would refuse what later tests do."""
    yield
    left, swaps.in_force[:] = list(swaps.in_force), []
    assert left == []


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


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Have the CPU's kernels use an instruction set; skip the test where the processor lacks it."""
    if cpu.unavailable() is not None:
        pytest.skip(f"{NO_LIBRARY}: {cpu.unavailable()}")
    before = cpu.current_isa()
    try:
        cpu.use_isa(name)
    except ValueError:
        pytest.skip(f"needs a processor with {name}")
    yield
    cpu.use_isa(before)


@pytest.fixture(scope="session")
def shim_library(shared_folder: Path) -> Path:
    """The native library with its CUDA source compiled for the processor."""
    if not COMPILER:
        pytest.skip("needs a C++ compiler")
    return built_once(shared_folder / "shim", build_shim_library)


@pytest.fixture
def cuda_on_cpu(shim_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The ``cuda`` backend, serving CPU tensors with the real kernels' source and host code."""
    with cuda_of(shim_library, monkeypatch) as loaded:
        yield loaded


@contextmanager
def cuda_of(shim: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """Have the ``cuda`` backend serve CPU tensors with the kernels of this library."""
    tree_check.load()  # before its library is looked for beside the shim: that of the first call is kept
    monkeypatch.setenv("SWAFAST_LIBRARY", str(shim))
    monkeypatch.setattr(cuda, "device_types", frozenset({"cpu"}))
    caches = (library.load, cuda._load_kernels)
    for cache in caches:
        cache.cache_clear()
    yield library.loaded()
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes of this run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def cuda_ptx(shared_folder: Path) -> Path:
    """The native library with nvcc's PTX of the CUDA kernels, and bugs in it to be switched on."""
    return build_once("cuda", shared_folder)


@pytest.fixture(scope="session")
def triton_ptx(shared_folder: Path) -> Path:
    """A library of Triton's PTX of the Triton kernels, and bugs in it to be switched on."""
    return build_once("triton", shared_folder)


@pytest.fixture
def cuda_on_ptx(cuda_ptx: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The ``cuda`` backend, serving CPU tensors with the kernels' PTX and the real host code."""
    with cuda_of(cuda_ptx, monkeypatch) as loaded:
        yield loaded


@pytest.fixture
def triton_on_ptx(triton_ptx: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The ``triton`` backend, serving CPU tensors with the kernels' PTX and the real host code."""
    loaded = ctypes.CDLL(str(triton_ptx))
    kernels = launched_kernels(loaded, triton_launch._kernels())
    monkeypatch.setattr(triton_launch, "_kernels", lambda: kernels)
    return loaded


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for all of a module: beside other processes two wait for each other, 58 s instead of 3."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """A chunk of 64 elements, so that small tensors have several."""
    monkeypatch.setattr(cpu, "CPU_CHUNK_NUMEL", 64)
    return 64


@pytest.fixture
def every_kind() -> EveryKind:
    return EveryKind()
