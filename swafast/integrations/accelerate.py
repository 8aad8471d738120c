"""Weight averaging in a training with Hugging Face Accelerate: plain, DDP or FSDP."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from ..terms.names import unwrap
from ..terms.warn import warn_user
from .installed import framework
from .state_folder import FOLDER, is_of_averages, resume_all, write_averages
from .weight_average import Contract, raw_optimizers, refuse_second

if TYPE_CHECKING:
    from accelerate import Accelerator

accelerate = framework("accelerate", "1.6")  # the first one with FSDP2

#: What Accelerate itself writes into a checkpoint: files and folders of these names.
_NAMES = re.compile(
    r"(pytorch_model|model|optimizer|scheduler|sampler|dl_state_dict|random_states|custom_checkpoint|scaler|profile)"
    r"([_.-].*)?"
)

_OWN = "call update_parameters of an averaged model of your own after each step"

#: Engines that step without torch's optimizers, or hold no params, and what to do with them.
_REFUSED = {
    "DEEPSPEED": "install swafast.integrations.deepspeed.WeightAverage in the engine, the model that prepare returns",
    "MEGATRON_LM": _OWN,
    "XLA": _OWN,
}


class WeightAverage(Contract):
    """Averages of a model that an ``Accelerator`` has prepared.

    ``accelerator.save_state`` and ``load_state`` save and load them too, in a folder ``swafast`` beside the rest.

    Example::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        average = WeightAverage(ExponentialAverage(0.999)).install(accelerator, model, optimizer)
        train(model, optimizer, loader)
        with average.swapped():
            evaluate(model)
        average.finish()
    """

    _accelerator: Any = None
    _model: Any = None
    _optimizers: tuple[Any, ...] = ()
    _name = ""

    def install(
        self, accelerator: Accelerator, model: Module, *optimizers: Any, name: str = FOLDER, step: int | None = None
    ) -> WeightAverage:
        """Make the averages, and follow the optimizers. Return this object. Collective if the averages are shards.

        Args:
            model, optimizers: results of ``accelerator.prepare``.
            name: of the averages' folder in a checkpoint.
            step: the number of steps so far, if a training goes on from a checkpoint without averages.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: ``model`` or an optimizer was not prepared, there is no optimizer, or the model has averages.
            NotImplementedError: the accelerator trains with DeepSpeed, Megatron-LM or XLA.
        """
        others = self._check(accelerator, model, optimizers, name)
        try:
            self.make(model)
            self.follow(raw_optimizers(optimizers), model, step=_checked_step(accelerator, optimizers, step))
        except BaseException:
            self.averaged = None
            raise
        self._accelerator, self._model, self._optimizers, self._name = accelerator, model, optimizers, name
        others.append(self)
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)
        return self

    def _check(self, accelerator: Any, model: Module, optimizers: tuple[Any, ...], name: str) -> list[WeightAverage]:
        """Return the accelerator's averages, or raise as :meth:`install`."""
        if not isinstance(accelerator, accelerate.Accelerator):
            raise TypeError(f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}")
        if (advice := _REFUSED.get(accelerator.distributed_type.name)) is not None:
            raise NotImplementedError(
                f"accelerator must train with torch alone, with DDP or with FSDP, got {accelerator.distributed_type}: "
                f"{advice}"
            )
        if self._accelerator is not None:
            raise ValueError("a WeightAverage must be installed once, got a second call: make another one")
        for optimizer in optimizers:
            if not isinstance(optimizer, accelerate.optimizer.AcceleratedOptimizer):
                how = "prepare model and optimizer, then install"
                if isinstance(optimizer, (list, tuple)):
                    how = "write install(accelerator, model, *optimizers)"
                raise ValueError(
                    f"optimizer must be a result of accelerator.prepare, got {type(optimizer).__name__}: {how}"
                )
        # Under FSDP2 prepare replaces the params, so averages of the model before it would follow nothing.
        prepared = [unwrap(each) for each in getattr(accelerator, "_models", [model])]
        if all(each is not unwrap(model) for each in prepared):
            raise ValueError("model must be a result of accelerator.prepare, got another one: prepare it, then install")
        others: list[WeightAverage] = vars(accelerator).setdefault("_swafast_averages", [])
        refuse_second([self, *(each for each in others if unwrap(each._model) is unwrap(model))], "one model")
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {name!r}")
        if name in ("", ".", "..") or not {"/", "\\", "\0"}.isdisjoint(name):
            raise ValueError(f"name must be that of one folder in a checkpoint, such as 'swafast', got {name!r}")
        if _NAMES.fullmatch(name):
            raise ValueError(f"name must be none of Accelerate's own in a checkpoint, got {name!r}: pass another name=")
        if any(each._name == name for each in others):
            raise ValueError(f"name must be one that no other average of the accelerator has, got {name!r}")
        return others

    # Their use

    def swapped(self, model: Module | None = None) -> AbstractContextManager[Any]:
        """Return a context in which the model has the averages, if there are any. Collective if they are shards."""
        return super().swapped(self._checked_model(model))

    def finish(self, model: Module | None = None) -> None:
        """End the training: follow the optimizers no more, and leave the averages in the model if asked to."""
        super().finish(self._checked_model(model))

    def save_model(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write the averages as ``accelerator.save_model`` writes a model. ``options`` are those of that.

        Raises:
            RuntimeError: no model is in the averages yet.
        """
        model = self._checked_model(None)
        if not self.has_models:
            raise RuntimeError("the average must hold a model before it is saved, got none: no update was made yet")
        with self.swapped():
            self._accelerator.save_model(model, folder, **options)

    def _checked_model(self, model: Module | None) -> Module:
        if self._model is None:
            raise RuntimeError("the average must be installed first: call install(accelerator, model, optimizer)")
        return self._model if model is None else model

    # Hooks of the accelerator

    def _save(self, models: list[Module], weights: list[Any], folder: str) -> None:
        on_each_node = self._accelerator.project_configuration.save_on_each_node
        writes = self._accelerator.is_local_main_process if on_each_node else self._accelerator.is_main_process
        path = Path(folder) / self._name
        if path.exists() and not is_of_averages(path):
            raise ValueError(f"name must be that of a folder of averages, or a new one, got {path}: pass another name=")
        write_averages(self, path, writes=writes)

    def _load(self, models: list[Module], folder: str) -> None:
        averages: list[WeightAverage] = self._accelerator._swafast_averages
        if self is averages[0]:  # for all of them: all or none
            resume_all([(each, Path(folder) / each._name) for each in averages], folder)


def _checked_step(accelerator: Any, optimizers: tuple[Any, ...], step: int | None) -> int | None:
    """Return the number of steps so far. Warn if there were some, and it is not given."""
    is_used = accelerator.step > 0 or any(optimizer.state for optimizer in raw_optimizers(optimizers))
    if step is not None or not is_used:
        return step
    warn_user(
        "the optimizer or the accelerator has a state already, and the average counts from step 0: to resume a "
        "training, call install before load_state; else pass the number of steps so far as step="
    )
    return 0
