"""`update_bn`: new BatchNorm statistics for averaged weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module, SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from ..average.fused_averages import FusedAverages
from ..loop import swaps
from ..loop.attach import Attachable
from ..loop.guard import finished
from ..terms import hints
from ..terms.copying import copy_into, duplicate, overlaps_itself, write_once
from ..terms.warn import add_note
from ..torch_private.core import running_eagerly
from ..torch_private.modules import BatchNormLayer, named_modules, own_buffers
from .moments import Moments
from .watch import MOMENTUM, Key, Layer, Watch, find_layers

if TYPE_CHECKING:
    from ..sharded.parts.ranks import Ranks

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

    Each layer gets the mean and the unbiased variance of all that it normalises, over all batches, summed up in
    float64. torch's function of this name weighs small and large batches alike and ignores the differences between the
    means of batches. The model runs in training mode, as in torch, so that each layer normalises with the current
    batch.

    Layers that the pass does not reach, that ``train()`` leaves frozen, or that do not track running statistics keep
    what they have. So does every module's ``training`` and ``momentum``. If an exception is raised, no buffer of the
    model has changed.

    Args:
        loader: batches. A tensor is passed to the model, a mapping as keyword arguments, and of a tuple or list the
            first item.
        model: the model or the averaged model, wrapped or not.
        device: move each batch there; default: batches stay where they are.
        call: ``call(model, batch)`` runs the model on a batch of any other kind.
        process_group: the ranks that call this together, each with its own batches. By default this rank is alone.
            But if the model is sharded or has SyncBatchNorm layers, all ranks must call this, because the model's
            forward passes wait for each other. Inside ``swapped_into`` of a sharded averaged model, the ranks of that
            model must.
        progress: show a progress bar.

    Raises:
        TypeError: ``model`` is not a module, or several averages.
        ValueError: ``loader`` is empty on all ranks, the model is not initialised, or the models of ranks differ.
        RuntimeError: the call failed on another rank, or a rank was lost.
        Exception: what the model raises comes through as it is. A note below its traceback names the batch.

    Paper: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407,
    section 3.2.
    """
    _check_model(model)
    layers = find_layers(named_modules(model, distinct=True))
    for (name, *_), layer in layers.items():
        if any(map(is_lazy, layer.module.buffers(recurse=False))):
            raise ValueError(f"model must be initialised, got the lazy layer {name!r}: run the model once before")
    for _, module in named_modules(model, distinct=True):
        if isinstance(module, Attachable):
            module._guard.settle()  # an update in the background would write buffers that a failure here restores
    swaps.refuse_averages("update_bn", model)
    ranks = _ranks_of(model, process_group)
    restore = _restoring(model)
    try:
        with ExitStack() as modes:
            run = partial(_run, loader, model, layers, device, call or _call, progress, modes)
            num_batches = run() if ranks is None else _run_on_all(run, layers, ranks, model)
            if layers and num_batches == 0:
                raise ValueError("loader must give at least one batch, got none")
            for warning in _warnings_of(layers):
                warnings.warn(warning, stacklevel=3)  # torch.no_grad adds a frame
            # Other modules that write while they run keep what they have written, as in torch.
            restore({id(layer.module) for layer in layers.values() if isinstance(layer.module, BatchNormLayer)})
            for layer in layers.values():
                layer.put()
    except BaseException:
        finished(restore)
        raise


def _check_model(model: object) -> None:
    kind = type(model).__name__
    if isinstance(model, FusedAverages):
        raise TypeError(f"model must be one model, got {kind}: call update_bn(loader, averages[{next(iter(model))!r}])")
    if not isinstance(model, Module):
        one = f"averages[{next(iter(model))!r}]." if isinstance(model, Mapping) and len(model) else ""
        is_attachable = isinstance(model, Attachable)
        hint = f": pass the model, inside {one}swapped_into(model)" if is_attachable else hints.of_value("model", model)
        raise TypeError(f"model must be a torch.nn.Module, got {kind}{hint}")


def _ranks_of(model: Module, process_group: ProcessGroup | None) -> Ranks | None:
    """Return the ranks that must make this call together; None: this process does it alone.

    They are those of ``process_group``, or those whose forward passes wait for each other, so that none can be alone.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) and process_group is None:
        return None
    from ..sharded.parts.holdings import is_sharded
    from ..sharded.parts.rendezvous import shared_ranks
    from ..sharded.sharded_model import ShardedAveragedModel

    if process_group is None:
        for owner in swaps.owners(model):
            if isinstance(owner, ShardedAveragedModel):
                return owner._ranks
        if not (is_sharded(model) or any(isinstance(layer, SyncBatchNorm) for _, layer in named_modules(model))):
            return None
    return shared_ranks(process_group, "update_bn")


def _warnings_of(layers: Mapping[Key, Layer]) -> Iterator[str]:
    if layers and not any(layer.moments.calls for layer in layers.values()):
        yield (
            f"none of {len(layers)} BatchNorm layers has seen a value: check that the layers are not frozen, that "
            "batches are not empty, and that the model calls its layers (a traced model does not)"
        )
    inferred = [repr(name) for (name, *_), layer in layers.items() if layer.is_inferred]
    if inferred:
        more = f" and {len(inferred) - 3} more" if len(inferred) > 3 else ""
        yield (
            f"the statistics of {', '.join(inferred[:3])}{more} may be inexact: the layer normalises something else "
            f"than its whole input, and does not call F.batch_norm. They are right if it writes running statistics "
            f"with the momentum {MOMENTUM} that it has meanwhile, or with 1 / num_batches_tracked; and each batch "
            "counts by the size of the input. Call F.batch_norm in the layer to have them exact"
        )


def _run_on_all(run: Callable[[], int], layers: dict[Key, Layer], ranks: Ranks, model: Module) -> int:
    """Run the model on each rank's batches, merge the moments of all ranks, and return the number of all batches.

    Moments are merged in the order of ranks, so each rank gets the same bits. Collective.

    Raises:
        ValueError: the models differ. RuntimeError: ``run`` failed on another rank. Or what ``run`` raises.
    """
    with ranks.lock:
        with ranks.settled("update_bn"):
            sizes = {name: layer.mean.numel() for (name, *_), layer in layers.items() if layer.mean is not None}
            num_batches = run()
        ranks.agree("model", sizes)
        gathered = ranks.gather((num_batches, {key: layer.moments.to("cpu") for key, layer in layers.items()}))
    modules = dict(named_modules(model))
    for key in dict.fromkeys(key for _, moments in gathered for key in moments):
        layer = layers.setdefault(key, Layer(modules[key[0]], *key[1:]))
        layer.moments = Moments()
        for _, moments in gathered:
            layer.moments.merge(moments.get(key, Moments()))
    return sum(count for count, _ in gathered)


def _run(
    loader: Iterable[Any],
    model: Module,
    layers: dict[Key, Layer],
    device: int | str | torch.device | None,
    call: Callable[[Module, Any], object],
    progress: bool,
    modes: ExitStack,
) -> int:
    """Run the model on all batches, in training mode until ``modes`` is left, and return the number of batches."""
    if not layers:
        return 0
    count = 0
    modes.enter_context(_training(model, layers))
    with running_eagerly(), Watch(model, layers).watching():
        for batch in _shown(loader) if progress else loader:
            try:
                call(model, _moved(batch, device) if device is not None else batch)
            except Exception as error:
                add_note(error, f"{_RAISED}{count}, {_described(batch)}{_HINT}", _RAISED)
                raise
            count += 1
    return count


def _shown(loader: Iterable[Any]) -> Iterable[Any]:
    from rich.progress import track

    return track(loader, "BatchNorm")


@contextmanager
def _training(model: Module, layers: Mapping[Key, Layer]) -> Iterator[None]:
    """Put the model into training mode; on leaving, restore in every module what this sets.

    A module with a ``train()`` of its own is told that its mode returns: it may fold what it has gathered.
    """
    settings: list[tuple[Module, str, object]] = [(layer.module, "momentum", MOMENTUM) for layer in layers.values()]
    modules = [module for _, module in named_modules(model, distinct=True)]
    # A forward of DDP would wait for the buffers of the first rank.
    settings += [(m, "require_forward_param_sync", False) for m in modules if isinstance(m, DistributedDataParallel)]
    before = [(module, name, getattr(module, name)) for module, name, _ in settings]
    flags = [(module, "training", module.training) for module in modules]

    def restore() -> None:
        try:
            for module, _, mode in flags:
                if module.training != mode and getattr(module.train, "__func__", None) is not Module.train:
                    module.train(mode)
        finally:
            for module, name, value in [*before, *flags]:
                setattr(module, name, value)

    try:
        model.train()
        for module, name, value in settings:
            setattr(module, name, value)
        yield
    except BaseException:
        with suppress(Exception):  # what was raised first says more
            finished(restore)
        raise
    finished(restore)


def _restoring(model: Module) -> Callable[..., None]:
    """Return a function that restores the buffers of ``model``: those of modules of the ids that it gets, or all."""
    before = [
        (module, name, buffer, duplicate(buffer))
        for _, module in named_modules(model, distinct=True)
        for name, buffer in own_buffers(module).items()
        if buffer is not None and not is_lazy(buffer)
    ]

    def restore(ids: Container[int] | None = None) -> None:
        for module, name, buffer, value in before:
            if ids is None or id(module) in ids:
                own_buffers(module)[name] = buffer if _written_back(buffer, value) else value

    return restore


def _written_back(buffer: Tensor, value: Tensor) -> bool:
    """Write a value back into a buffer. Return whether the buffer has it, also where torch refuses to write."""
    try:
        with torch.inference_mode() if buffer.is_inference() else nullcontext():
            (write_once if overlaps_itself(buffer) else copy_into)(buffer, value)
        return True
    except Exception:  # an error of a device among them: the buffers after this one must return too
        with suppress(Exception):
            return torch.equal(buffer, value)
        return False


# Batches


#: Before and after a batch that the model has not taken.
_RAISED = "update_bn: the model raised this for batch "
_HINT = "; call= runs the model on batches of other kinds"


def _call(model: Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)):
        if not batch:
            raise ValueError(f"loader must give batches with an input, got an empty {type(batch).__name__}")
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
