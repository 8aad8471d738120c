"""What ``WeightAverage`` asks of a Trainer of Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..loop.schedule import Span
from .lengths import needed_lengths

#: Names, because a program may have both packages of Lightning.
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
_PRECISIONS = ("MixedPrecision", "HalfPrecision", "DoublePrecision")
_AVERAGING_TOO = ("WeightAveraging", "StochasticWeightAveraging")


def check_callbacks(trainer: Any) -> None:
    """Raise ValueError if another callback averages too."""
    for each in trainer.callbacks:
        # NeMo's EMA and copies of it have this method. Two swaps, one in the other, would exchange the wrong weights.
        if _is_any(each, _AVERAGING_TOO) or hasattr(each, "swap_model_weights"):
            raise ValueError(
                f"callbacks must have WeightAverage alone to average weights, got {type(each).__name__} too: remove it"
            )


def check_fit(trainer: Any, module: Module) -> None:
    """Raise if averages cannot follow this training.

    Raises:
        NotImplementedError: its strategy or its precision is not supported.
        ValueError: the module is sharded itself, or the trainer has no optimizer.
    """
    strategy, precision = trainer.strategy, trainer.precision_plugin
    if not _is_any(strategy, _STRATEGIES):
        raise NotImplementedError(
            f"strategy must be one of {', '.join(_STRATEGIES)} with WeightAverage, got {type(strategy).__name__}: to "
            "shard the module, use ModelParallelStrategy and fully_shard"
        )
    if not _is_any(precision, _PRECISIONS) and type(precision).__name__ != "Precision":
        raise NotImplementedError(
            "precision must be 64, 32, bf16 or 16, mixed or true, with WeightAverage, got "
            f"{type(precision).__name__}: its layers may keep copies of the weights, which a swap does not reach"
        )
    if _is_any(module, ("FSDPModule",)):
        raise ValueError(
            "the LightningModule must not be sharded itself, got fully_shard(self): in configure_model call "
            "fully_shard(self.net) for each network in it"
        )
    if not unmocked_optimizers(trainer):
        raise ValueError("configure_optimizers must return an optimizer for averages to follow, got None")


def unmocked_optimizers(trainer: Any) -> list[Optimizer]:
    """Return the optimizers of torch. Lightning has a mock one if ``configure_optimizers`` returns None."""
    return [each for each in trainer.optimizers if not _is_any(each, ("_MockOptimizer",))]


def lengths_of(trainer: Any, spans: Mapping[str, object]) -> dict[str, Span]:
    """Return what :func:`.lengths.needed_lengths` asks of a Trainer."""

    def duration() -> Span | None:
        steps = trainer.estimated_stepping_batches
        return int(steps) if 0 < steps < math.inf else None

    def steps_per_epoch() -> float:
        duration()  # loads the data: before that, the trainer has no number of batches
        return float(trainer.num_training_batches / trainer.accumulate_grad_batches)

    return needed_lengths(spans, duration=duration, steps_per_epoch=steps_per_epoch)


def calls_before_writes(trainer: Any, module: Any) -> bool:
    """Return whether ``on_before_optimizer_step`` comes before each write of params: the user steps nowhere himself."""
    parts = (module, trainer.strategy, trainer.precision_plugin)
    return module.automatic_optimization and all(
        type(part).optimizer_step.__module__.startswith(("lightning.", "pytorch_lightning.")) for part in parts
    )


def may_skip_steps(trainer: Any, module: Any) -> bool:
    """Return whether the trainer counts steps that averages do not: those that a scaler or the user's code skips."""
    has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
    return has_scaler or not calls_before_writes(trainer, module) or len(unmocked_optimizers(trainer)) > 1


def named(trainer: Any) -> object:
    """Return the path of the checkpoint that is loaded, for messages."""
    return trainer.ckpt_path or "the checkpoint"


def leave_after_validation(trainer: Any, leave: Callable[[], None]) -> None:
    """Have the validation of a fit call ``leave`` at its end, whatever raises in it.

    Lightning calls no further hooks once a hook has raised, such as ``on_exception`` of an earlier callback.
    """
    undo_leaving(trainer)  # an error may have left an earlier one
    loop = _validation_of(trainer)
    if loop is not None:
        loop.run = _LoopRunner(loop, vars(loop).get("run"), leave)


def undo_leaving(trainer: Any) -> None:
    """Undo :func:`leave_after_validation`: the loop has the ``run`` that it had before."""
    loop = _validation_of(trainer)
    ours = vars(loop).get("run") if loop is not None else None
    if isinstance(ours, _LoopRunner):
        del loop.run
        if ours.own is not None:
            loop.run = ours.own


def _validation_of(trainer: Any) -> Any:
    return getattr(getattr(trainer.fit_loop, "epoch_loop", None), "val_loop", None)


@dataclass(frozen=True)
class _LoopRunner:
    """Runs a loop and then calls ``leave``. It can be copied and pickled with the loop."""

    loop: Any
    own: Callable[[], Any] | None  # the loop's own ``run``, if it has another than its class
    leave: Callable[[], None]

    def __call__(self) -> Any:
        try:
            return type(self.loop).run(self.loop) if self.own is None else self.own()
        finally:
            self.leave()


def evaluated_module(trainer: Any, module: Any) -> Any:
    """Return the module in its DDP, if it has one, which broadcasts buffers in an evaluation."""
    return trainer.strategy.model if isinstance(trainer.strategy.model, DistributedDataParallel) else module


def _is_any(value: object, names: tuple[str, ...]) -> bool:
    return not {kind.__name__ for kind in type(value).__mro__}.isdisjoint(names)
