"""What ``WeightAverage`` asks of a Trainer of torchtitan and of its parts: model, optimizers and checkpointer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module
from torchtitan.components.checkpointer import MODEL, TRAIN_STATE, CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer

from ..loop.schedule import Span
from .lengths import needed_lengths

#: Containers of optimizers that averages cannot follow, by their class, and why.
_REFUSED = {
    "OptimizersInBackwardContainer": "its optimizers step inside the backward, one param at a time",
    "TorchFTOptimizersContainer": "its groups of replicas come and go, and a new one would lack the averages",
}


def check_training(trainer: Any) -> None:
    """Raise unless averages can follow a trainer.

    Raises:
        TypeError: it lacks a part. NotImplementedError: it trains in a way that is not supported.
    """
    lacking = [name for name in ("model_parts", "optimizers", "checkpointer") if not hasattr(trainer, name)]
    if lacking:
        raise TypeError(
            f"trainer must be a torchtitan.trainer.Trainer, got {type(trainer).__name__}, without {lacking[0]!r}: "
            "construct the Trainer, then install. In a loop of your own, call install_parts"
        )
    if getattr(getattr(trainer, "parallel_dims", None), "pp_enabled", False):
        _refuse_stages("pipeline parallelism")
    if getattr(trainer, "ft_manager", None) is not None:
        raise NotImplementedError(
            f"trainer must train without fault tolerance, got {type(trainer).__name__}: "
            + _REFUSED["TorchFTOptimizersContainer"]
        )


def only_model(model_parts: object, optimizers: object, checkpointer: object) -> Module:
    """Return the model, or raise as ``WeightAverage.install_parts``."""
    modules = [model_parts] if isinstance(model_parts, Module) else model_parts
    if not isinstance(modules, (list, tuple)) or not all(isinstance(each, Module) for each in modules):
        raise TypeError(f"model_parts must be a list of modules, got {type(model_parts).__name__}")
    if len(modules) != 1:
        _refuse_stages(f"{len(modules)} of them")
    if not isinstance(optimizers, OptimizersContainer):
        raise TypeError(
            f"optimizers must be an OptimizersContainer of torchtitan, got {type(optimizers).__name__}: with one of "
            "torch, call averaged.attach(optimizer)"
        )
    for kind in type(optimizers).__mro__:
        if kind.__name__ in _REFUSED:
            raise NotImplementedError(
                f"optimizers must step outside the backward and without fault tolerance, got "
                f"{type(optimizers).__name__}: {_REFUSED[kind.__name__]}"
            )
    model: Module = modules[0]
    _check_checkpointer(checkpointer, model)
    return model


def _check_checkpointer(checkpointer: Any, model: Module) -> None:
    if checkpointer is None or not getattr(checkpointer, "enable", True):
        return
    if not isinstance(checkpointer, CheckpointManager):
        raise NotImplementedError(
            f"checkpointer must be a CheckpointManager of torchtitan, got {type(checkpointer).__name__}: save and "
            "load average.state() in a way of your own, and pass None"
        )
    if getattr(checkpointer, "ft_manager", None) is not None:
        raise NotImplementedError(
            f"checkpointer must be without fault tolerance, got {type(checkpointer).__name__} with a manager: "
            + _REFUSED["TorchFTOptimizersContainer"]
        )
    saved = {id(param) for part in checkpointer.states[MODEL].model for param in part.parameters()}
    if any(id(param) not in saved for param in model.parameters()):
        raise ValueError(
            "checkpointer must save and load the model in model_parts, got one with another model: build it with the "
            "same model_parts"
        )


def _refuse_stages(what: str) -> None:
    raise NotImplementedError(
        f"model_parts must be one module, got {what}: with pipeline parallelism each rank has other layers, and the "
        "ranks of a checkpoint differ in their averages. Train with pipeline_parallel_degree=1"
    )


def lengths_of(trainer: Any, spans: Mapping[str, object]) -> dict[str, Span]:
    """Return what :func:`.lengths.needed_lengths` asks of a Trainer, which has steps but no epochs."""
    steps = getattr(getattr(getattr(trainer, "config", None), "training", None), "steps", None)
    return needed_lengths(spans, duration=lambda: steps)


def step_of(checkpointer: Any) -> int | None:
    """Return the number of steps that the training counts, as its state says; None if it says nothing."""
    state = checkpointer.states.get(TRAIN_STATE) if getattr(checkpointer, "enable", False) else None
    step = None if state is None else state.state_dict().get("step")
    return None if step is None else int(step)
