"""Names of torch that are not public API, each with the public way that serves when it is gone.

A test fails with the name when a torch release changes one. Beside them what is asked of parts of torch that take long
to import.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import swa_utils

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", bound=Tensor)


def disable_dynamo(function: F) -> F:
    """Keep ``function`` out of compiled graphs; unlike ``torch.compiler.disable`` it does not import dynamo for it."""
    lazy = getattr(torch, "_disable_dynamo", None)
    return lazy(function) if lazy is not None else torch.compiler.disable(function)


def running_eagerly() -> AbstractContextManager[object]:
    """Run compiled modules as they were written."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def is_in_backward() -> bool:
    """Say whether autograd is in a backward pass on this thread, where activation checkpoints run modules again."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def make_metadata_check(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Give a check that the tensors passed still have these dtypes, devices, shapes and strides, or None.

    One call for all of them: 50 ns a tensor where the public properties take about 300. It may reject tensors that are
    alike (``requires_grad`` counts as a difference), so a rejection has to be looked at again.
    """
    return _make_guards(tensors) if _guards_work() else None


def _make_guards(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    try:
        from torch._C._dynamo.guards import TensorGuards

        # Both lists always: a size given as None would not be checked, and without the lists it crashes.
        sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
        strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
        check = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*tensors) else None
    except (ImportError, TypeError, AttributeError, RuntimeError):
        return None


@functools.cache
def _guards_work() -> bool:
    """Say whether this torch's guards accept what is the same and reject what is not."""
    tensor = torch.empty(2, 3, device="cpu")
    check = _make_guards([tensor])
    others = (tensor.view(3, 2), tensor.as_strided((2, 3), (1, 2)), tensor.double(), tensor[:1], tensor.to("meta"))
    return check is not None and check(tensor) and not any(check(other) for other in others)


def has_own_dispatch(tensor: Tensor) -> bool:
    """Say whether ``tensor`` is of a subclass with its own dispatch (DTensor, quantised, fake, ...)."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    disabled = getattr(torch._C, "_disabled_torch_dispatch_impl", None)
    return getattr(type(tensor), "__torch_dispatch__", disabled) is not disabled


def make_wrapper(kind: type[T], shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> T:
    """Return a tensor of the subclass ``kind`` that has this look and no memory of its own."""
    return Tensor._make_wrapper_subclass(kind, tuple(shape), dtype=dtype, device=device)


def current_raw_stream(device: torch.device) -> int:
    """Give the handle of the device's current stream, 0 where there are none."""
    if device.type != "cuda":
        return 0
    quick = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # the public way makes an object for it
    index = device.index if device.index is not None else torch.cuda.current_device()
    return quick(index) if quick is not None else torch.cuda.current_stream(device).cuda_stream


def is_capturing(device: torch.device) -> bool:
    """Say whether a CUDA graph is being captured from the device's current stream."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def closure_of(factory: Callable[..., Any], function: object) -> dict[str, Any] | None:
    """Give the closure variables of ``function`` if torch's ``factory`` made it, else None."""
    made = getattr(factory(), "__wrapped__", None)
    inner = getattr(function, "__wrapped__", None)
    if made is None or inner is None or getattr(inner, "__code__", None) is not made.__code__:
        return None
    cells = inner.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(inner.__code__.co_freevars, cells, strict=True)}


#: torch's factories of averaging functions, those of the equal mean and those with a decay.
SWA_FACTORIES = (swa_utils.get_swa_multi_avg_fn, swa_utils.get_swa_avg_fn)
EMA_FACTORIES = (swa_utils.get_ema_multi_avg_fn, swa_utils.get_ema_avg_fn)
