"""`update_bn`: statistics of BatchNorm taken anew, for weights that no training has run with."""

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

from ..loop.attach import Attachable
from ..torch_private.core import is_in_backward, running_eagerly
from ..torch_private.modules import BatchNormLayer, own_buffers

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
    """Take the statistics of all BatchNorm layers anew, in one pass over ``loader``: the end of SWA.

    Each layer gets the mean and the unbiased variance of all that has come into it, whatever the sizes of the batches,
    of all ranks together; torch's function of this name weighs every batch alike, and leaves out how far the means of
    batches are apart. It runs the model in training mode, as torch's does, since each layer has to see what the one
    before gives out with the new weights. Layers that the pass does not reach, or without running statistics, stay as
    they are, and so do ``training`` and ``momentum`` of every module. So do layers that ``train()`` leaves frozen.

    Args:
        loader: batches. A tensor is passed to the model; of a tuple or list, the first item; a mapping, as keyword
            arguments.
        model: the model, or the averaged model, wrapped or not.
        device: where to move batches to; default: they stay.
        call: ``call(model, batch)`` runs the model on a batch of any other kind.
        process_group: collective where there is one: its ranks, by default all, each bring batches of their own, as
            many as they have.
        progress: show how far it is.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``loader`` is empty (on all ranks), a batch is none that the model takes, or the models of ranks
            differ. The model is as it was, after any other exception of ``loader`` or ``call`` too.
        RuntimeError: it failed on another rank, or a rank was lost.

    Paper: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407,
    section 3.2.
    """
    if not isinstance(model, Module):
        hint = ": give the model, inside swapped_into" if hasattr(model, "swapped_into") else ""
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    layers = {
        name: Layer(module, Moments())
        for name, module in model.named_modules()
        if isinstance(module, BatchNormLayer) and module.running_mean is not None
    }
    for name, layer in layers.items():
        if any(map(is_lazy, layer.module.buffers(recurse=False))):
            raise ValueError(f"model must be initialised, got the lazy {name!r}: run it once before")
    for module in model.modules():
        if isinstance(module, Attachable):
            module._guard.settle()  # an update would write what is kept here in case of a failure
    run = partial(_run, loader, model, layers, device, call or _call, progress)
    together = process_group is not None or (torch.distributed.is_available() and torch.distributed.is_initialized())
    num_batches = _run_on_all(run, layers, process_group) if together else run()
    if layers and num_batches == 0:
        raise ValueError("loader must give at least one batch, got none")
    if layers and not any(layer.moments.count for layer in layers.values()):
        warnings.warn(
            f"none of {len(layers)} BatchNorm layers has seen a value: all are frozen, the batches empty, or the model "
            "does not call its layers (as a traced one)",
            stacklevel=3,  # behind torch.no_grad
        )
    for layer in layers.values():
        layer.put()


@dataclass
class Moments:
    """Mean, and sum of squared distances from it, by channel, in float64: those of any batches add up."""

    calls: int = 0
    count: int = 0  # of values in each channel
    mean: Tensor | None = None  # (channels,)
    squares: Tensor | None = None  # (channels,)

    def take(self, inputs: Tensor) -> None:
        """Add what comes into a layer, (batch, channels, ...)."""
        count = inputs.numel() // max(inputs.shape[1], 1)
        if count == 0:
            return
        wide = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
        over = [dim for dim in range(inputs.ndim) if dim != 1]
        # From a value of each channel on: float32 would round a mean that is large beside the deviation.
        origin = wide
        for dim in over:
            origin = origin.narrow(dim, 0, 1)
        variance, mean = torch.var_mean(wide - origin, over, correction=0)
        self.merge(Moments(1, count, mean.double() + origin.flatten().double(), variance.double() * count))

    def merge(self, other: Moments) -> None:
        """Add the moments of further values.

        The formula: Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance".
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
        """Write what was taken into the layer, in place."""
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
    """Run the model on each rank's batches, join the moments of all ranks, and return the number of all batches.

    Moments are joined in the ranks' order, so each rank gets the same bits. Collective.

    Raises:
        ValueError: the models differ, or what ``run`` raises. RuntimeError: it failed on another rank.
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
    """Run the model on all batches, give their number, and leave the model as it was."""
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
                hint = "" if isinstance(batch, (Tensor, Mapping, list, tuple)) else " (call= runs it on any other kind)"
                raise ValueError(
                    f"loader must give batches that the model takes{hint}, got at {count} {_described(batch)}, and "
                    f"from the model {type(error).__name__}: {error}"
                ) from error
            count += 1
    return count


def _shown(loader: Iterable[Any]) -> Iterable[Any]:
    from rich.progress import track

    return track(loader, "BatchNorm")


def _taking(moments: Moments) -> Callable[[Module, tuple[Any, ...], dict[str, Any]], None]:
    @torch.no_grad()  # whatever the model does: else each batch's graph would be kept
    def take(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # One that an overridden train() keeps frozen goes on with its statistics; a backward makes a checkpoint again.
        if module.training and not is_in_backward():
            moments.take((args[0] if args else kwargs["input"]).detach())

    return take


@contextmanager
def _training(model: Module) -> Iterator[None]:
    """Put the model into training mode, and each of its modules back into its own."""
    before = {module: module.training for module in model.modules()}
    try:
        model.train()
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _as_before(model: Module, layers: Mapping[str, Layer]) -> Iterator[None]:
    """Undo what layers write into their statistics while they run; after a failure, what any module has written."""
    own = {id(layer.module) for layer in layers.values()}
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not is_lazy(buffer)
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
    """Say whether a model that is spread over ranks has waited in vain: then the batch is not to blame."""
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
    """Give a batch with all its tensors on ``device``."""
    if hasattr(batch, "to"):  # of a library's own kind of mapping or tuple too
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
