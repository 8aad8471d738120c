"""Names that are private in torch, each with a public fallback, and queries of parts that are slow to import."""

from __future__ import annotations

import functools
import operator
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
    """Keep ``function`` out of compiled graphs. Unlike ``torch.compiler.disable``, this does not import dynamo."""
    lazy = getattr(torch, "_disable_dynamo", None)
    return lazy(function) if lazy is not None else torch.compiler.disable(function)


def running_eagerly() -> AbstractContextManager[object]:
    """Return a context in which compiled modules run eagerly."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def is_in_backward() -> bool:
    """Return whether this thread is in a backward pass, in which activation checkpoints run modules again."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def storage_id(tensor: Tensor) -> int:
    """Return what tells a tensor's storage from all others, as long as it lives: it stays if its memory moves."""
    return int(tensor.untyped_storage()._cdata)


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return how often each tensor was written in place; -1 for those made under inference mode, without a count."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        return [_version_or_none(tensor) for tensor in tensors]


_version = operator.attrgetter("_version")


def _version_or_none(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # `is_inference` tells it of most such tensors, but not of all
        return -1


def make_metadata_check(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Return a check that tensors passed to it have the same dtypes, devices, shapes and strides as ``tensors``.

    It takes 50 ns per tensor, while the public properties take about 300. It may also reject tensors that agree, for
    instance if ``requires_grad`` differs, so compare the properties after a rejection. None if torch has no such check.
    """
    return _make_guards(tensors) if _guards_work() else None


def _make_guards(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    try:
        from torch._C._dynamo.guards import TensorGuards

        # Pass both lists with every size: a size of None is not checked, and without the lists TensorGuards crashes.
        sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
        strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
        check = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*tensors) else None
    except (ImportError, TypeError, AttributeError, RuntimeError):
        return None


@functools.cache
def _guards_work() -> bool:
    """Return whether the guards of this torch accept equal tensors and reject different ones."""
    tensor = torch.empty(2, 3, device="cpu")
    check = _make_guards([tensor])
    others = (tensor.view(3, 2), tensor.as_strided((2, 3), (1, 2)), tensor.double(), tensor[:1], tensor.to("meta"))
    return check is not None and check(tensor) and not any(check(other) for other in others)


def has_own_dispatch(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is of a subclass with its own dispatch (DTensor, quantised, fake, ...)."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    disabled = getattr(torch._C, "_disabled_torch_dispatch_impl", None)
    return getattr(type(tensor), "__torch_dispatch__", disabled) is not disabled


def is_held_elsewhere(tensor: Tensor) -> bool:
    """Return whether other tensors stand on the storage of ``tensor``; True if torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return True
    alone = torch.empty(0, device="cpu")
    return bool(count(tensor.untyped_storage()._cdata) > count(alone.untyped_storage()._cdata))


def make_wrapper(kind: type[T], shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> T:
    """Make a tensor of the subclass ``kind`` with this shape, dtype and device, but without memory."""
    return Tensor._make_wrapper_subclass(kind, tuple(shape), dtype=dtype, device=device)


def current_raw_stream(device: torch.device) -> int:
    """Return the handle of the device's current stream, or 0 if the device is not a CUDA device."""
    if device.type != "cuda":
        return 0
    quick = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # the public way makes an object at each call
    index = device.index if device.index is not None else torch.cuda.current_device()
    return quick(index) if quick is not None else torch.cuda.current_stream(device).cuda_stream


def closure_of(factory: Callable[..., Any], function: object) -> dict[str, Any] | None:
    """Return the closure variables of ``function`` if torch's ``factory`` made it, else None."""
    made = getattr(factory(), "__wrapped__", None)
    inner = getattr(function, "__wrapped__", None)
    if made is None or inner is None or getattr(inner, "__code__", None) is not made.__code__:
        return None
    cells = inner.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(inner.__code__.co_freevars, cells, strict=True)}


def decay_of(function: Any) -> float | None:
    """Return the decay of an EMA's averaging function if torch has made it, else None.

    If torch has renamed the variable that holds it, apply the function to an average of 1 and a param of 0.
    """
    for factory, is_multi in EMA_FACTORIES.items():
        closure = closure_of(factory, function)
        if closure is not None and "decay" in closure:
            return float(closure["decay"])
        if closure is not None:
            average, param = torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu").split(1)
            result = function([average], [param], 0) if is_multi else function(average, param, 0)
            return float(average if is_multi else result)
    return None


#: torch's factories of averaging functions: for the equal mean, and for an EMA with a decay.
SWA_FACTORIES = (swa_utils.get_swa_multi_avg_fn, swa_utils.get_swa_avg_fn)
#: Each with whether it makes a ``multi_avg_fn``.
EMA_FACTORIES = {swa_utils.get_ema_multi_avg_fn: True, swa_utils.get_ema_avg_fn: False}
