"""What BatchNorm layers normalise, seen while a model runs, and its moments."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, SyncBatchNorm
from torch.overrides import TorchFunctionMode

from ..torch_private.core import is_in_backward
from ..torch_private.modules import BatchNormLayer, named_modules, own_buffers

#: What a layer is found by: the name of its module, and those of its running mean and variance.
Key = tuple[str, str, str]

#: The momentum of layers while a model runs. A layer with code of its own writes ``0.5 * before + 0.5 * batch``,
#: whether its momentum is that of the new value, as in torch, or of the old one. The batch's value follows from that.
MOMENTUM = 0.5

#: Elements that are taken at a time, as float64: 128 MiB.
_PIECE = 1 << 24

#: The functions that normalise with running statistics, with the names of their arguments.
_FUNCTIONS: tuple[tuple[Callable[..., Any], tuple[str, ...]], ...] = (
    (F.batch_norm, ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum")),
    (torch.batch_norm, ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum")),
    (torch.native_batch_norm, ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum")),
)

#: The forwards that normalise their input.
_PLAIN = (BatchNormLayer.forward, SyncBatchNorm.forward)


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of what a layer normalises, per channel, in float64."""

    calls: int = 0
    count: int = 0  # of values in each channel
    mean: Tensor | None = None  # (channels,)
    squares: Tensor | None = None  # (channels,)

    def take(self, inputs: Tensor) -> None:
        """Add the values of one call, (batch, channels, ...)."""
        if inputs.numel() == 0:
            return
        self.calls += 1
        over = [dim for dim in range(inputs.ndim) if dim != 1]
        for piece in inputs.split(max(1, _PIECE * len(inputs) // inputs.numel())):
            count = piece.numel() // piece.shape[1]
            variance, mean = torch.var_mean(piece.double(), over, correction=0)
            self.merge(Moments(0, count, mean, variance * count))

    def merge(self, other: Moments) -> None:
        """Add the moments of further values, by the formula of Chan, Golub and LeVeque.

        Paper: Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance".
        """
        if other.mean is None or other.squares is None:
            return
        total = self.count + other.count
        if self.mean is None or self.squares is None:
            self.mean, self.squares = other.mean, other.squares
        else:
            apart = other.mean.to(self.mean.device) - self.mean  # under DataParallel from another GPU
            self.mean = self.mean + apart * (other.count / total)
            squares = other.squares.to(self.mean.device) + apart.square() * (self.count * (other.count / total))
            self.squares = self.squares + squares
        self.count, self.calls = total, self.calls + other.calls

    def to(self, device: str) -> Moments:
        if self.mean is None or self.squares is None:
            return self
        return Moments(self.calls, self.count, self.mean.to(device), self.squares.to(device))


@dataclass
class Layer:
    """Running statistics of a module, and the moments of what is normalised with them."""

    module: Module
    mean_name: str = "running_mean"
    var_name: str = "running_var"
    moments: Moments = field(default_factory=Moments)

    @property
    def mean(self) -> Tensor | None:
        return getattr(self.module, self.mean_name, None)

    @property
    def var(self) -> Tensor | None:
        return getattr(self.module, self.var_name, None)

    def put(self) -> None:
        """Write the moments into the running statistics, in place; without values, keep them."""
        moments = self.moments
        if moments.mean is None or moments.squares is None:
            return
        assert self.mean is not None
        assert self.var is not None
        self.mean.copy_(moments.mean)
        self.var.copy_(moments.squares / max(moments.count - 1, 1))
        calls = getattr(self.module, "num_batches_tracked", None)
        if calls is not None:
            calls.fill_(moments.calls)


@dataclass
class Visit:
    """One forward of a layer, in one thread."""

    module: Module  # under DataParallel a replica of the layer's
    layer: Layer
    inputs: Tensor | None
    before: tuple[Tensor, Tensor] | None  # the running statistics, if the layer has code of its own
    is_seen: bool = False  # whether it has called a function that normalises


class Watch(TorchFunctionMode):
    """Adds to the moments of each layer what is normalised with its running statistics, while the model runs.

    A layer may normalise something else than its input: a part of it, or with dimensions exchanged. So the watch goes
    by the arguments of ``F.batch_norm``. A layer that does not call it is asked for what it has written into its
    running statistics, or, if it is torch's ``SyncBatchNorm``, takes its input.

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
        for function, names in _FUNCTIONS:
            if func is function:
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
        before = _statistics(module) if type(module).forward not in _PLAIN else None
        visits.append(Visit(module, layer, inputs, before))

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
        if visit.before is None:
            self._take(visit.layer, visit.inputs)
        else:
            self._take_written(visit, visit.before, visit.inputs)

    def _see(self, given: Mapping[str, Any]) -> None:
        """Take the input of a call that normalises, if it is with running statistics of the model."""
        mean, var = given.get("running_mean"), given.get("running_var")
        layer = self._layer_of(mean, var) if mean is not None and not is_in_backward() else None
        if layer is None:
            return
        for visit in self._visits:
            visit.is_seen = visit.is_seen or visit.layer is layer
        # A momentum of 0 asks a function, which has none of its own as a layer, to keep the statistics.
        keeps = not isinstance(layer.module, BatchNormLayer) and given.get("momentum") == 0
        if given.get("training", False) and not keeps:
            self._take(layer, given["input"])

    def _layer_of(self, mean: Tensor, var: Tensor | None) -> Layer | None:
        known, layer = self._found.get(id(mean), (None, None))
        if known is mean:
            return layer
        for visit in self._visits:  # a replica, or a forward that has replaced its buffers
            if getattr(visit.module, visit.layer.mean_name, None) is mean:
                return visit.layer
        for prefix, module in named_modules(self._model, distinct=True):
            names = {id(buffer): name for name, buffer in own_buffers(module).items()}
            if id(mean) in names and id(var) in names and var is not None:
                key = (prefix, names[id(mean)], names[id(var)])
                layer = self._layers.setdefault(key, Layer(module, *key[1:]))
                self._found[id(mean)] = (mean, layer)
                return layer
        return None

    # What is taken

    @torch.no_grad()  # even if the model enables gradients: else the graph of each batch would be kept
    def _take(self, layer: Layer, inputs: Tensor) -> None:
        with self._lock:
            layer.moments.take(inputs.detach())

    @torch.no_grad()
    def _take_written(self, visit: Visit, before: tuple[Tensor, Tensor], inputs: Tensor) -> None:
        """Take the batch's mean and unbiased variance from what a forward has written; nothing if that is nothing."""
        after = _statistics(visit.module)
        if after is None or all(map(torch.equal, after, before)):
            return
        mean, var = ((new - (1 - MOMENTUM) * old) / MOMENTUM for new, old in zip(after, before, strict=True))
        count = max(1, inputs.numel() // max(1, mean.numel()))
        with self._lock:
            visit.layer.moments.merge(Moments(1, count, mean, var * max(count - 1, 1)))


def _statistics(module: Module) -> tuple[Tensor, Tensor] | None:
    mean, var = module.running_mean, module.running_var
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
