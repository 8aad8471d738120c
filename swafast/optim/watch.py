"""What BatchNorm layers normalise, seen while a model runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, SyncBatchNorm
from torch.overrides import TorchFunctionMode

from ..torch_private.core import is_in_backward, versions
from ..torch_private.modules import BatchNormLayer, named_modules, own_buffers
from .moments import Moments, have_moved, infer

#: What a layer is found by: the name of its module, and those of its running mean and variance.
Key = tuple[str, str, str]

#: The momentum of layers while a model runs. A layer with code of its own writes ``0.5 * before + 0.5 * batch``,
#: whether its momentum is that of the new value, as in torch, or of the old one. The batch's value follows from that.
MOMENTUM = 0.5

#: The functions that normalise with running statistics, of ``torch`` and of ``torch.ops.aten``, and of
#: ``torch.nn.functional``, with the names of their arguments.
_FUNCTIONS = ("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm")
_ARGUMENTS = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum")
_FUNCTIONAL = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum")

#: The forwards that normalise their input.
_PLAIN = (BatchNormLayer.forward, SyncBatchNorm.forward)


@dataclass
class Layer:
    """Running statistics of a module, and the moments of what is normalised with them.

    Attributes:
        is_inferred: whether moments were inferred from what the layer has written, and are not known for certain.
    """

    module: Module
    mean_name: str = "running_mean"
    var_name: str = "running_var"
    moments: Moments = field(default_factory=Moments)
    is_inferred: bool = False

    @property
    def mean(self) -> Tensor | None:
        return getattr(self.module, self.mean_name, None)

    @property
    def var(self) -> Tensor | None:
        return getattr(self.module, self.var_name, None)

    def put(self) -> None:
        """Write the moments into the running statistics, in place. Channels without values keep theirs."""
        moments = self.moments
        if moments.count is None or moments.mean is None or moments.squares is None:
            return
        for statistic, value in (
            (self.mean, moments.mean),
            (self.var, moments.squares / (moments.count - 1).clamp(min=1)),
        ):
            assert statistic is not None
            new, count = (each.to(statistic.device).view_as(statistic) for each in (value, moments.count))
            statistic.copy_(torch.where(count > 0, new, statistic))
        calls = getattr(self.module, "num_batches_tracked", None)
        if calls is not None:
            calls.fill_(moments.calls)


@dataclass
class Visit:
    """One forward of a layer, in one thread."""

    module: Module  # under DataParallel a replica of the layer's
    layer: Layer
    inputs: Tensor | None
    version: int  # of the inputs
    before: tuple[Tensor, Tensor] | None  # the running statistics, if the layer has code of its own and has some
    is_seen: bool = False  # whether the input of a function that normalises was taken


class Watch(TorchFunctionMode):
    """Adds to the moments of each layer what is normalised with its running statistics, while the model runs.

    A layer may normalise something else than its input: a part of it, or with dimensions exchanged. So the watch goes
    by the arguments of ``F.batch_norm``. If a layer does not call it, the watch takes the input of torch's
    ``SyncBatchNorm``. Of a layer with code of its own, it takes what follows from the running statistics that the layer
    writes: the input, if they have moved towards its mean and variance, or else what a momentum of 0.5 makes of them.

    Args:
        layers: by key; those of functions that normalise with other buffers of the model are added.
    """

    def __init__(self, model: Module, layers: dict[Key, Layer]) -> None:
        super().__init__()
        self._model, self._layers = model, layers
        #: By the id of a running mean, which is held too: another tensor may get the id of a freed one.
        self._found = {id(layer.mean): (layer.mean, layer) for layer in reversed(layers.values())}
        self._main = threading.get_ident()
        self._lock = threading.Lock()
        self._of_thread = threading.local()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch this thread, and in others what runs in a forward of a layer."""
        with self, ExitStack() as hooks:
            for layer in list(self._layers.values()):
                _, shared = self._found[id(layer.mean)]  # with a layer that has the same running mean
                begin = layer.module.register_forward_pre_hook(partial(self._begin, shared), with_kwargs=True)
                hooks.callback(begin.remove)
                end = layer.module.register_forward_hook(self._end, with_kwargs=True, always_call=True)
                hooks.callback(end.remove)
            yield

    # What runs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        names = _argument_names(func)
        if names:
            self._see({**dict(zip(names, args, strict=False)), **(kwargs or {})})
        return result

    @property
    def _visits(self) -> list[Visit]:
        """The forwards of layers that run in this thread, the innermost last."""
        if not hasattr(self._of_thread, "visits"):
            self._of_thread.visits = []
        visits: list[Visit] = self._of_thread.visits
        return visits

    def _begin(self, layer: Layer, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_in_backward():  # which repeats forwards of activation checkpoints
            return
        visits = self._visits
        if not visits and threading.get_ident() != self._main:
            self.__enter__()
        inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        before = None
        if not _is_plain(module) and module.training:
            before = _statistics(module)
            calls = getattr(module, "num_batches_tracked", None)
            if calls is not None:
                with torch.no_grad():
                    calls.fill_(1)  # so that 1 / num_batches_tracked is MOMENTUM, once this batch is counted
        visits.append(Visit(module, layer, inputs, versions([inputs])[0] if inputs is not None else 0, before))

    def _end(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if is_in_backward():
            return
        visits = self._visits
        visit = visits.pop()
        if not visits and threading.get_ident() != self._main:
            self.__exit__(None, None, None)
        # An overridden train() may keep the layer frozen; without a result, it has raised.
        if visit.is_seen or not module.training or visit.inputs is None or result is None:
            return
        if visit.before is not None:
            self._take_written(visit, visit.before, visit.inputs)
        elif _is_plain(module) and _tracks(module):
            self._take(visit.layer, visit.inputs)

    def _see(self, given: Mapping[str, Any]) -> None:
        """Take the input of a call that normalises, if it writes running statistics of the model."""
        mean, var = given.get("running_mean"), given.get("running_var")
        # The watch has set all momenta, so it is the model that has set a momentum of 0, to keep the statistics.
        writes = given.get("training", False) and given.get("momentum", given.get("exponential_average_factor")) != 0
        if not writes or not isinstance(mean, Tensor) or not isinstance(var, Tensor) or is_in_backward():
            return
        found = self._layer_of(mean, var)
        if found is None:
            return
        layer, buffer = found
        for visit in self._visits:
            visit.is_seen = visit.is_seen or visit.layer is layer
        self._take(layer, given["input"], _part(buffer, mean), buffer.numel())

    def _layer_of(self, mean: Tensor, var: Tensor) -> tuple[Layer, Tensor] | None:
        """Return whose running mean this is, or is a view of, and that running mean."""
        known, layer = self._found.get(id(mean), (None, None))
        if known is mean and layer is not None:
            return layer, mean
        for visit in self._visits:  # a replica, or a forward that has replaced its buffers
            buffer = getattr(visit.module, visit.layer.mean_name, None)
            if buffer is not None and _part(buffer, mean) is not None:
                return visit.layer, buffer
        for known, layer in self._found.values():
            if known is not None and _part(known, mean) is not None:
                return layer, known
        for prefix, module in named_modules(self._model, distinct=True):
            mean_name, var_name = (_name_of(statistic, own_buffers(module)) for statistic in (mean, var))
            if mean_name is not None and var_name is not None:
                key = (prefix, mean_name, var_name)
                layer = self._layers.setdefault(key, Layer(module, mean_name, var_name))
                assert layer.mean is not None
                self._found[id(layer.mean)] = (layer.mean, layer)
                return layer, layer.mean
        return None

    # What is taken

    @torch.no_grad()  # even if the model enables gradients: else the graph of each batch would be kept
    def _take(self, layer: Layer, inputs: Tensor, part: range | None = None, channels: int = 0) -> None:
        with self._lock:
            layer.moments.take(inputs.detach(), part, channels)

    @torch.no_grad()
    def _take_written(self, visit: Visit, before: tuple[Tensor, Tensor], inputs: Tensor) -> None:
        """Take what a forward has written into its running statistics; nothing if that is nothing."""
        after = _statistics(visit.module)
        if after is None or all(map(torch.equal, after, before)):
            return
        found, is_inferred = Moments(), True
        has_channels = inputs.ndim > 1 and inputs.shape[1] == before[0].numel() and inputs.is_floating_point()
        if has_channels and versions([inputs])[0] == visit.version:
            found.take(inputs.detach())
            is_inferred = not have_moved(before, after, found, torch.finfo(inputs.dtype).eps)
        if is_inferred:
            momentum = getattr(visit.module, "momentum", None) or MOMENTUM  # the model may have set another
            found = infer(before, after, inputs.numel(), momentum)
        with self._lock:
            visit.layer.moments.merge(found)
            visit.layer.is_inferred |= is_inferred


def _argument_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments of a function that normalises with running statistics, else none."""
    if function is F.batch_norm:
        return _FUNCTIONAL
    name = getattr(function, "__name__", "").partition(".")[0]  # of an overload: batch_norm.default
    return _ARGUMENTS if name in _FUNCTIONS and not isinstance(function, FunctionType) else ()


def _is_plain(module: Module) -> bool:
    """Return whether the forward of a module is torch's: that of its class, or another of its own."""
    return getattr(module.forward, "__func__", None) in _PLAIN


def _tracks(module: Module) -> bool:
    """Return whether a forward of torch's writes running statistics: a model may turn this off for a second pass."""
    return bool(module.track_running_stats and module.running_mean is not None and module.momentum != 0)


def _part(buffer: Tensor, tensor: Tensor) -> range | None:
    """Return which elements of a contiguous buffer a tensor with one dimension is, by its memory; None if others."""
    if tensor is buffer:
        return range(buffer.numel())
    if tensor.ndim != 1 or (tensor.dtype, tensor.device) != (buffer.dtype, buffer.device):
        return None
    try:
        first, other = buffer.data_ptr(), tensor.data_ptr()
    except RuntimeError:  # under vmap
        return None
    if not first or not tensor.numel() or not buffer.is_contiguous() or (other - first) % buffer.element_size():
        return None
    start, step = (other - first) // buffer.element_size(), max(1, tensor.stride(0))
    part = range(start, start + step * tensor.numel(), step)
    return part if part[0] >= 0 and part[-1] < buffer.numel() else None


def _name_of(tensor: Tensor, buffers: Mapping[str, Tensor | None]) -> str | None:
    """Return the name of the buffer that a tensor is, or is a part of."""
    return next((name for name, each in buffers.items() if each is not None and _part(each, tensor) is not None), None)


def _statistics(module: Module) -> tuple[Tensor, Tensor] | None:
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return None
    return mean.detach().to(torch.float64, copy=True), var.detach().to(torch.float64, copy=True)


def find_layers(modules: Iterable[tuple[str, Module]]) -> dict[Key, Layer]:
    """Return the layers of the modules that are BatchNorm layers with running statistics, by key."""
    return {
        (name, "running_mean", "running_var"): Layer(module)
        for name, module in modules
        if isinstance(module, BatchNormLayer) and module.running_mean is not None and module.track_running_stats
    }
