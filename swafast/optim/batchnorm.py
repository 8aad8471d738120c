"""`update_bn`: new BatchNorm statistics for averaged weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from ..loop import swaps
from ..loop.attach import Attachable
from ..terms import hints
from ..torch_private.core import is_in_backward, running_eagerly
from ..torch_private.modules import BatchNormLayer, named_modules, own_buffers

if torch.distributed.is_available():
    from torch.distributed import ProcessGroup


@torch.no_grad()
def update_bn(
    loader: Iterable[Any],
    model: Module,
    device: int | str | torch.device | None = None,
    *,
    call: Callable[[Module, Any], object] | None = None,
    process_group: ProcessGroup | None = None,
    progress: bool = False,
) -> None:
    """Compute new running statistics for all BatchNorm layers in one pass over ``loader``: the last step of SWA.

    Each layer gets the mean and the unbiased variance of all its inputs, over all batches and ranks. torch's function
    of this name weighs small and large batches alike and ignores the differences between the means of batches. The
    model runs in training mode, as in torch, so that each layer normalises with the current batch.

    Layers that the pass does not reach, that ``train()`` leaves frozen, or that have no running statistics keep what
    they have. So does every module's ``training`` and ``momentum``. If an exception is raised, nothing has changed.

    Args:
        loader: batches. A tensor is passed to the model, a mapping as keyword arguments, and of a tuple or list the
            first item.
        model: the model or the averaged model, wrapped or not.
        device: move each batch there; default: batches stay where they are.
        call: ``call(model, batch)`` runs the model on a batch of any other kind.
        process_group: the ranks that call this together, each with its own batches; default: all ranks, or this
            process alone if ``torch.distributed`` is not initialised.
        progress: show a progress bar.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``loader`` is empty on all ranks, the model does not take a batch or is not initialised, or the
            models of ranks differ.
        RuntimeError: the call failed on another rank, or a rank was lost.

    Paper: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407,
    section 3.2.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hints.of_value('model', model)}")
    layers = {
        name: Layer(module, Moments())
        for name, module in named_modules(model, distinct=True)
        if isinstance(module, BatchNormLayer) and module.running_mean is not None
    }
    for name, layer in layers.items():
        if any(map(is_lazy, layer.module.buffers(recurse=False))):
            raise ValueError(f"model must be initialised, got the lazy layer {name!r}: run the model once before")
    for _, module in named_modules(model, distinct=True):
        if isinstance(module, Attachable):
            module._guard.settle()  # an update in the background would write buffers that a failure here restores
    swaps.refuse_averages("update_bn", model)
    run = partial(_run, loader, model, layers, device, call or _call, progress)
    together = process_group is not None or (torch.distributed.is_available() and torch.distributed.is_initialized())
    num_batches = _run_on_all(run, layers, process_group) if together else run()
    if layers and num_batches == 0:
        raise ValueError("loader must give at least one batch, got none")
    if layers and not any(layer.moments.count for layer in layers.values()):
        warnings.warn(
            f"none of {len(layers)} BatchNorm layers has seen a value: check that the layers are not frozen, that "
            "batches are not empty, and that the model calls its layers (a traced model does not)",
            stacklevel=3,  # torch.no_grad adds a frame
        )
    for layer in layers.values():
        layer.put()


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of the inputs of a layer, per channel, in float64."""

    calls: int = 0
    count: int = 0  # of values in each channel
    mean: Tensor | None = None  # (channels,)
    squares: Tensor | None = None  # (channels,)

    def take(self, inputs: Tensor) -> None:
        """Add one input of a layer, (batch, channels, ...)."""
        count = inputs.numel() // max(inputs.shape[1], 1)
        if count == 0:
            return
        wide = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
        over = [dim for dim in range(inputs.ndim) if dim != 1]
        # Subtract one value of each channel first: if the mean is large, float32 would lose the deviation from it.
        origin = wide
        for dim in over:
            origin = origin.narrow(dim, 0, 1)
        variance, mean = torch.var_mean(wide - origin, over, correction=0)
        self.merge(Moments(1, count, mean.double() + origin.flatten().double(), variance.double() * count))

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
            apart = other.mean - self.mean
            self.mean = self.mean + apart * (other.count / total)
            self.squares = self.squares + other.squares + apart.square() * (self.count * (other.count / total))
        self.count, self.calls = total, self.calls + other.calls

    def to(self, device: str) -> Moments:
        if self.mean is None or self.squares is None:
            return self
        return Moments(self.calls, self.count, self.mean.to(device), self.squares.to(device))


@dataclass
class Layer:
    module: BatchNormLayer
    moments: Moments

    def put(self) -> None:
        """Write the moments into the layer's running statistics, in place; without values, keep them."""
        moments, module = self.moments, self.module
        if moments.mean is None or moments.squares is None:
            return
        assert module.running_mean is not None
        assert module.running_var is not None
        module.running_mean.copy_(moments.mean)
        module.running_var.copy_(moments.squares / max(moments.count - 1, 1))
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(moments.calls)


def _run_on_all(run: Callable[[], int], layers: Mapping[str, Layer], process_group: ProcessGroup | None) -> int:
    """Run the model on each rank's batches, merge the moments of all ranks, and return the number of all batches.

    Moments are merged in the order of ranks, so each rank gets the same bits. Collective.

    Raises:
        ValueError: the models differ, or ``run`` raises it. RuntimeError: ``run`` failed on another rank.
    """
    from ..sharded.parts.rendezvous import shared_ranks

    ranks = shared_ranks(process_group)
    with ranks.lock:
        with ranks.settled("update_bn"):
            num_batches = run()
        ranks.agree("model", {name: layer.module.num_features for name, layer in layers.items()})
        gathered = ranks.gather((num_batches, [layer.moments.to("cpu") for layer in layers.values()]))
    for index, layer in enumerate(layers.values()):
        layer.moments = Moments()
        for _, of_rank in gathered:
            layer.moments.merge(of_rank[index])
    return sum(count for count, _ in gathered)


def _run(
    loader: Iterable[Any],
    model: Module,
    layers: Mapping[str, Layer],
    device: int | str | torch.device | None,
    call: Callable[[Module, Any], object],
    progress: bool,
) -> int:
    """Run the model on all batches, restore its buffers and modes, and return the number of batches."""
    if not layers:
        return 0
    count = 0
    with _training(model), _as_before(model, layers), running_eagerly(), ExitStack() as hooks:
        for layer in layers.values():
            handle = layer.module.register_forward_pre_hook(_taking(layer.moments), with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in _shown(loader) if progress else loader:
            try:
                call(model, _moved(batch, device) if device is not None else batch)
            except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
                if isinstance(error, torch.OutOfMemoryError) or _is_of_peers(error):
                    raise
                hint = "" if isinstance(batch, (Tensor, Mapping, list, tuple)) else " (or pass call=)"
                raise ValueError(
                    f"loader must give batches that the model takes{hint}, got batch {count}, {_described(batch)}: "
                    f"the model raised {type(error).__name__}: {error}"
                ) from error
            count += 1
    return count


def _shown(loader: Iterable[Any]) -> Iterable[Any]:
    from rich.progress import track

    return track(loader, "BatchNorm")


def _taking(moments: Moments) -> Callable[[Module, tuple[Any, ...], dict[str, Any]], None]:
    @torch.no_grad()  # even if the model enables gradients: else the graph of each batch would be kept
    def take(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Skip layers that an overridden train() keeps frozen, and forwards that a backward repeats for checkpoints.
        if module.training and not is_in_backward():
            moments.take((args[0] if args else kwargs["input"]).detach())

    return take


@contextmanager
def _training(model: Module) -> Iterator[None]:
    """Put the model into training mode; on leaving, restore the mode of each module."""
    before = [(module, module.training) for _, module in named_modules(model, distinct=True)]
    try:
        model.train()
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _as_before(model: Module, layers: Mapping[str, Layer]) -> Iterator[None]:
    """On leaving, restore the statistics of ``layers``; after a failure, restore every buffer of the model."""
    own = {id(layer.module) for layer in layers.values()}
    before = [
        (module, name, buffer, buffer.clone())
        for _, module in named_modules(model, distinct=True)
        for name, buffer in own_buffers(module).items()
        if buffer is not None and not is_lazy(buffer)
    ]
    failed = True
    try:
        yield
        failed = False
    finally:
        for module, name, buffer, value in before:
            if failed or id(module) in own:
                buffer.copy_(value)
                own_buffers(module)[name] = buffer


def _is_of_peers(error: Exception) -> bool:
    """Return whether a collective of the model timed out or lost a peer, so that the batch is not to blame."""
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("imed out", "onnection closed", "onnection reset")
    )


# Batches


def _call(model: Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)):
        return model(batch[0])
    return model(batch)


def _moved(batch: Any, device: int | str | torch.device) -> Any:
    """Return the batch with all its tensors on ``device``."""
    if hasattr(batch, "to"):  # some libraries' mappings and tuples have it too
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        moved = [_moved(value, device) for value in batch]
        return moved if isinstance(batch, list) else tuple(moved)
    return batch


def _described(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)} of {batch.dtype}"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with {', '.join(map(repr, batch)) or 'nothing in it'}"
    if isinstance(batch, (list, tuple)):
        return f"a {type(batch).__name__} of {', '.join(map(_described, batch[:1])) or 'nothing'}"
    return f"a {type(batch).__name__}"
