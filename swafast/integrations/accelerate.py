"""Weight averaging in a training with Hugging Face Accelerate: plain, DDP or FSDP."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from ..terms.names import unwrap
from .state_folder import resume_from, write_averages
from .weight_average import Contract, framework, raw_optimizers, refuse_second

if TYPE_CHECKING:
    from accelerate import Accelerator

accelerate = framework("accelerate", "1.6")  # the first one with FSDP2

_REFUSED = ("DEEPSPEED", "MEGATRON_LM", "XLA")  # their engines step without torch's optimizers, or hold no params


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
        self, accelerator: Accelerator, model: Module, *optimizers: Any, name: str = "swafast", step: int | None = None
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
            self.follow(raw_optimizers(optimizers), model, step=step)
        except BaseException:
            self.averaged = None
            raise
        self._accelerator, self._model, self._optimizers, self._name = accelerator, model, optimizers, name
        others.append(self)
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)
        load_state = accelerator.load_state

        @functools.wraps(load_state)
        def load_state_detached(*args: Any, **kwargs: Any) -> None:
            with self._detached():
                load_state(*args, **kwargs)

        accelerator.load_state = load_state_detached
        return self

    def _check(self, accelerator: Any, model: Module, optimizers: tuple[Any, ...], name: str) -> list[WeightAverage]:
        """Return the accelerator's averages, or raise as :meth:`install`."""
        if not isinstance(accelerator, accelerate.Accelerator):
            raise TypeError(f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}")
        if accelerator.distributed_type.name in _REFUSED:
            raise NotImplementedError(
                f"accelerator must train with torch alone, with DDP or with FSDP, got {accelerator.distributed_type}: "
                "call update_parameters of an averaged model of your own after each step"
            )
        if self._accelerator is not None:
            raise ValueError("only one WeightAverage may be installed once, got a second call: make another one")
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
        write_averages(self, Path(folder) / self._name, writes=writes)

    def _load(self, models: list[Module], folder: str) -> None:
        resume_from(self, Path(folder) / self._name, folder)

    @contextmanager
    def _detached(self) -> Iterator[None]:
        """Follow no optimizer in the body.

        Distributed checkpoints must have each key that the optimizer's state has at a load. That of an attachment is
        not in checkpoints without averages, and not needed, since the attachment has a file of its own.
        """
        before = self.attachment
        if before is None or not before.is_attached:
            yield
            return
        before.detach()
        try:
            yield
        finally:
            self.follow(raw_optimizers(self._optimizers), self._model).load_state_dict(before.state_dict())
