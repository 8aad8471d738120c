"""Shared by tests: a model with every kind of tensor, comparisons by bits, and updates that are held."""

from __future__ import annotations

import math
import resource
import runpy
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swafast import FusedAveragedModel


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
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.long = nn.Parameter(torch.randn(1000))
        self.frozen = nn.Parameter(torch.randn(9), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.randn(3), persistent=False)

    def drift(self) -> None:
        """Change every tensor in place, as training would."""
        drift(self)
        with torch.no_grad():
            for buffer in self.buffers():
                if buffer.is_floating_point():
                    buffer.add_(torch.rand(buffer.shape).to(buffer.dtype))
                else:
                    buffer.copy_(torch.randint(0, 2, buffer.shape))


@torch.no_grad()
def drift(model: nn.Module) -> None:
    """Change every param in place, as training would."""
    for param in model.parameters():
        param.add_(torch.randn(param.shape).to(param), alpha=0.1)


def update(model: EveryKind, *averages: Any, updates: int = 1) -> None:
    """Update averages of ``model``, each time with other values."""
    for _ in range(updates):
        model.drift()
        for average in averages:
            average.update_parameters(model)


def updated_once(model: nn.Module, **options: Any) -> FusedAveragedModel:
    """Return an average of ``model`` after one update."""
    average = FusedAveragedModel(model, **options)
    average.update_parameters(model)
    return average


def trained(model: EveryKind, dtype: torch.dtype, **options: Any) -> FusedAveragedModel:
    """Return an average of ``model`` in ``dtype`` after four updates."""
    average = FusedAveragedModel(model.to(dtype), **options)
    update(model, average, updates=4)
    return average


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Copy all params and buffers of a module, to compare with later."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def any_bits(shape: Sequence[int], dtype: torch.dtype, seed: int | None = None) -> Tensor:
    """Make a tensor of random bytes: NaNs with payloads, denormals and infinities among them. A bool is 0 or 1."""
    source = None if seed is None else torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=source, dtype=torch.uint8)
    return (numbers & 1 if dtype == torch.bool else numbers).view(dtype).view(torch.Size(shape))


def tensors_in(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state, without what extra states are."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def bits(tensor: Tensor) -> Tensor:
    """View a tensor's elements as bytes, row-major: -0 differs from 0, and a NaN from another NaN."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Return the names that stand on one side only, or whose tensors differ in dtype, shape or any bit."""
    return sorted({*(a.keys() ^ b.keys()), *(name for name in a.keys() & b.keys() if not same_bits(a[name], b[name]))})


def require_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], about: object = "") -> None:
    """Check that tensors of the same names are the same by bits; in a rank the error tells which are not."""
    found = differing(got, expected)
    assert found == [], f"{about}: {found}"


@contextmanager
def unchanged(*modules: nn.Module) -> Iterator[None]:
    """Check that no tensor of these modules differs after the body."""
    before = [tensors_of(module) for module in modules]
    yield
    for module, tensors in zip(modules, before, strict=True):
        require_same(tensors_of(module), tensors, "has changed")


@contextmanager
def refused(kind: type[BaseException], message: str, *modules: nn.Module) -> Iterator[None]:
    """Check that the body raises ``kind`` with ``message``, and that no tensor of these modules differs then."""
    with unchanged(*modules), pytest.raises(kind, match=message):
        yield


@contextmanager
def swapped(*pairs: tuple[Any, nn.Module]) -> Iterator[None]:
    """Have each average in its model."""
    with ExitStack() as stack:
        for average, model in pairs:
            stack.enter_context(average.swapped_into(model))
        yield


def step_with_ones(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> None:
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()


def is_interrupted(call: Callable[[], object], line: int, *files: str) -> bool:
    """Interrupt a call at a line, the n-th that runs in these files. Return whether it came so far."""

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal line
        if not frame.f_code.co_filename.endswith(files):
            return None
        line -= event == "line"
        if line == -1 and event == "line":
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


class Held:
    """Holds updates, of the background for instance, until they are let go.

    Args:
        kind, name: the class and its method that runs an update.
        at_most: let an update go after so many seconds even if nobody does; None: nobody doing so is an error.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        kind: Any = FusedAveragedModel,
        at_most: float | None = None,
        name: str = "update_parameters",
    ) -> None:
        self.let_go, self.begun, self.ended = threading.Event(), threading.Event(), threading.Event()
        update = getattr(kind, name)

        def held(*args: Any) -> None:
            self.begun.set()
            assert self.let_go.wait(at_most or 60) or at_most
            update(*args)
            self.ended.set()

        monkeypatch.setattr(kind, name, held)

    def let_go_in(self, seconds: float) -> None:
        """Let an update that has begun go in a while."""
        assert self.begun.wait(60)
        threading.Timer(seconds, self.let_go.set).start()


@contextmanager
def limited_files(nbytes: int) -> Iterator[None]:
    """Let no file grow beyond this size: the system refuses to write on, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_example(name: str, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what a file in ``examples/`` defines; as for a program, its folder is where it imports from."""
    folder = Path(__file__).parents[1] / "examples"
    patch.syspath_prepend(folder)
    return runpy.run_path(str(folder / f"{name}.py"))
