"""``WeightAverage`` for Lightning: a callback that averages, evaluates, saves and resumes."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from .installed import explained, framework
from .lightning_states import (
    IN_SHARDS,
    OURS,
    clone_parts,
    is_of_no_fit,
    layout,
    load_whole_module,
    ours_of,
    parts_after_setup,
    parts_of,
    take,
)
from .lightning_trainer import (
    calls_before_writes,
    check_callbacks,
    check_fit,
    evaluated_module,
    leave_after_validation,
    lengths_of,
    may_skip_steps,
    named,
    undo_leaving,
    unmocked_optimizers,
)
from .weight_average import Contract, refuse_second

_OTHER_NAME = "pytorch_lightning"

if importlib.util.find_spec("lightning") is None and importlib.util.find_spec(_OTHER_NAME) is not None:
    _Callback: Any = framework(_OTHER_NAME, "2.4", extra="lightning").Callback
else:
    framework("lightning", "2.4")
    _Callback = importlib.import_module("lightning.pytorch").Callback

__getattr__ = explained(__name__)


class WeightAverage(Contract, _Callback):
    """A callback of Lightning: ``Trainer(callbacks=[WeightAverage(ExponentialAverage(0.999))])``.

    The validation of ``fit`` runs on the average, and so a ``ModelCheckpoint`` picks the best average. Its files have
    the average as ``state_dict``. The training continues from the model's own params in them, with
    ``fit(ckpt_path=...)``. Outside of ``fit`` nothing is swapped: ``test`` runs on the module as it is.

    Its arguments are those of :class:`~.weight_average.Contract`: a ``rule`` or ``rules``, ``start``, ``every``,
    ``end`` and ``duration``, ``copy_at_end``, ``sharded``, and those of :class:`~swafast.FusedAveragedModel`. An epoch
    and the whole training are as long as the Trainer knows.
    """

    _module: weakref.ref[Module] | None = None  # whose averages these are
    _pending: dict[str, Any] | None = None  # what a checkpoint has, until the averages can take it

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.swap_out()  # an error may have left them in the module
        refuse_second([each for each in trainer.callbacks if isinstance(each, WeightAverage)], "the Trainer")
        check_callbacks(trainer)
        leave_after_validation(trainer, self.swap_out)
        self._pending = None  # of a fit that did not begin

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        undo_leaving(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        check_fit(trainer, pl_module)
        if self._pending is not None and self._pending["averaged"] is None:
            self.averaged = self.attachment = None  # those of an earlier fit do not belong to it
        elif self._module is not None and self._module() is not pl_module:
            raise ValueError("WeightAverage has averages of another module: make a new one for this module")
        self.make(pl_module)
        self._module = weakref.ref(pl_module)
        self._move_to(pl_module)
        # A sharded checkpoint is loaded after this hook, and may replace these averages.
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._begin(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer, pl_module)  # a tuner may have made new optimizers

    def _begin(self, trainer: Any, module: Any) -> None:
        optimizers = unmocked_optimizers(trainer)
        step = trainer.global_step // len(optimizers)  # Lightning counts the steps of each
        attachment = self.follow(optimizers, module, step=step, **lengths_of(trainer, self._when))
        # Lightning's closures have the forward in the step. Let it run beside the update, if hooks come before writes.
        attachment.waits_in_step = not calls_before_writes(trainer, module)
        pending, self._pending = self._pending, None
        if pending is not None:
            counted = {"counts": module.automatic_optimization, "may_skip": may_skip_steps(trainer, module)}
            take(self, pending, named(trainer), number=len(optimizers), **counted)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.attachment is not None:
            self.attachment._runner.before_step()  # after the closure, which has the forward and backward

    # Evaluation

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self.swap_in(evaluated_module(trainer, pl_module))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.swap_out()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.swap_out()

    # The end

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.attachment is not None:
            self.attachment.join()  # Lightning moves the module to the CPU next

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._move_to(pl_module)
        device = _device_of(pl_module)
        if self.holds_shards and device != trainer.strategy.root_device:
            pl_module.to(trainer.strategy.root_device)  # shards stay there
        self.finish(pl_module)
        pl_module.to(device)

    def _move_to(self, module: Any) -> None:
        """Move averages to where the module is, unless the user has chosen a place for them."""
        is_free = self._options.get("device") is None and self._when.get("offload") is None
        if is_free and not self.holds_shards and _device_of(self.averaged) != _device_of(module):
            self.averaged.to(_device_of(module))

    # Checkpoints

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return  # the module may have any weights, such as those of a checkpoint that was tested
        if trainer.state.status != "running":  # a tuner saves in a fit, to put the training back
            self.warn_if_copied()
        is_swapped = self._swap is not None
        if is_swapped:  # somebody saves inside the validation
            self.swap_out()
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        checkpoint["callbacks"][self.state_key] = {"has_models": self.has_models}  # so Lightning misses us at a resume
        checkpoint[OURS] = {"has_models": self.has_models, "attachment": self.steps(), "evaluated": self.evaluated_name}
        if self.has_models and self.holds_shards and getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            state = self.averaged.state_dict()
            checkpoint["state_dict"] |= {IN_SHARDS + key: value for key, value in state.items()}
        elif self.has_models:
            state = self.averaged.full_state_dict(cpu_offload=True) if self.holds_shards else self.averaged.state_dict()
            checkpoint |= layout(checkpoint["state_dict"], state, pl_module, self.evaluated_name)
        if is_swapped:
            clone_parts(checkpoint)
            self.swap_in(evaluated_module(trainer, pl_module))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.strategy.restore_checkpoint_after_setup:
            self._load_after_setup(trainer, pl_module, checkpoint)
        elif trainer.state.fn == "fit":  # else the module has the average, which Lightning has loaded
            saved = parts_of(checkpoint, named(trainer))
            if saved["own"] is not None:
                own = {"state_dict": saved.pop("own")}
                trainer.strategy.load_model_state_dict(own, strict=pl_module.strict_loading)
            self._pending = self._pending if is_of_no_fit(saved) else saved
            if self.attachment is not None and self.attachment.is_attached:  # a tuner puts a training back
                self._begin(trainer, pl_module)

    def _load_after_setup(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        path, fits = Path(trainer.strategy.broadcast(trainer.ckpt_path)), trainer.state.fn == "fit"
        if fits:
            saved = parts_after_setup(checkpoint, path, self.averaged)
            if saved["averaged"] is None and self.has_models:  # those of an earlier fit do not belong to it
                self.averaged = self.attachment = None
                self.make(module)
            if saved["own"] is not None:
                load_whole_module(module, saved.pop("own"), strict=module.strict_loading)
            self._pending = saved
            self._begin(trainer, module)
        elif path.is_dir() and (ours_of(checkpoint, path) or {}).get("has_models"):
            tested = copy.copy(self)  # ours keep what they have
            tested.averaged = tested.attachment = None
            state = parts_after_setup(checkpoint, path, tested.make(module))["averaged"]
            tested.averaged.load_state_dict(state)
            tested.evaluated.copy_to(module)


def _device_of(module: Module) -> torch.device:
    return next(param.device for param in module.parameters())
