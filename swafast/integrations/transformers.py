"""``WeightAverage`` for the Trainer of Hugging Face Transformers, and for its subclasses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from ..terms.names import unwrap
from ..terms.warn import warn_user
from . import transformers_trainer as trainers
from .inside import run_inside
from .installed import framework
from .state_folder import FOLDER, resume_from, write_averages
from .weight_average import Contract, raw_optimizers, refuse_second

if TYPE_CHECKING:
    from transformers import Trainer

_transformers: Any = framework("transformers", "4.48")
_Callback: Any = _transformers.TrainerCallback


class WeightAverage(Contract, _Callback):
    __doc__ = f"""Averages of the model that a Trainer trains: ``WeightAverage(rule).install(trainer)``.

    ``evaluate`` and ``predict`` run on the average, in a training and after it, so the best model is that of the best
    average. Each checkpoint has the average in a folder ``swafast``, and ``train(resume_from_checkpoint=...)`` goes on
    from it. The other files of a checkpoint have the model's own params. Of a model with adapters (PEFT), only the
    trained params are averaged, unless ``include`` says otherwise.
    {(Contract.__doc__ or "").partition("end in it.")[2]}"""

    _trainer: Any = None
    _model: Module | None = None  # whose averages these are, without wrappers
    _resumed: Any = None  # the checkpoint from which the training goes on
    _has_begun = False  # this call of train
    _saved_at: int | None = None  # the step of the last checkpoint
    _is_of_another = False  # the model was loaded from a checkpoint without averages

    def install(self, trainer: Trainer) -> WeightAverage:
        """Have the trainer average, evaluate the average, save it and resume it. Return this object.

        Raises:
            TypeError: ``trainer`` is not a Trainer of Transformers.
            ValueError: it has a ``WeightAverage``, or this one is installed in another trainer.
            NotImplementedError: it trains with DeepSpeed, Megatron-LM or XLA.
        """
        trainers.check_trainer(trainer, _transformers.Trainer)
        callbacks = trainer.callback_handler.callbacks
        refuse_second([self, *(each for each in callbacks if isinstance(each, WeightAverage))], "the Trainer")
        if self._trainer is not None:
            raise ValueError("a WeightAverage must be installed in one trainer, got a second one: make another average")
        self._trainer = trainer
        trainer.add_callback(self)
        # Go first: callbacks that upload the model at the end must find the average in it.
        callbacks.insert(0, callbacks.pop())
        run_inside(trainer, "train", self._training)
        run_inside(trainer, "save_model", self._saving)
        for loop in ("evaluation_loop", "prediction_loop"):  # the second one is gone from Transformers 5
            if hasattr(trainer, loop):
                run_inside(trainer, loop, lambda *_, **__: self.swapped())
        return self

    def _installed(self) -> Any:
        if self._trainer is None:
            raise RuntimeError(
                "the average must be installed, as a callback alone cannot evaluate it: call average.install(trainer)"
            )
        return self._trainer

    # The training

    @contextmanager
    def _training(self, resume_from_checkpoint: Any = None, *_: Any, **__: Any) -> Iterator[None]:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _transformers.trainer_utils.get_last_checkpoint(self._trainer.args.output_dir)
        self._resumed, self._has_begun, self._saved_at = resume_from_checkpoint or None, False, None
        self.unfollow()  # a training that raised has left it attached
        yield

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._installed()
        model, saved = trainer.model_wrapped, None if self._resumed is None else Path(self._resumed) / FOLDER
        is_fresh = saved is not None and not saved.exists()
        # A trainer that looks for a batch size begins again in one call of train.
        if is_fresh or self._has_begun or unwrap(model) is not self._model:
            self.unfollow()
            self.averaged = self.attachment = None
        self._has_begun, self._model, self._is_of_another = True, unwrap(model), False
        try:
            optimizers = [each for each in raw_optimizers([trainer.optimizer]) if each is not None]
            trainers.refuse_own_averages(optimizers)
            self.make(model)
            self.follow(optimizers, model, step=state.global_step, **trainers.lengths_of(trainer, self._when))
            if saved is not None:
                resume_from(self, saved, self._resumed, step=state.global_step)
                self.compare_steps(self._resumed, state.global_step, may_skip=trainers.scales_gradients(trainer))
        except BaseException:
            self.unfollow()
            raise

    def make(self, model: Module) -> Any:
        if trainers.has_adapters(unwrap(model)):
            self._options.setdefault("include", lambda name, param: param.requires_grad)
        return super().make(model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.attachment is not None:
            self.attachment.join()  # the trainer may load the best model into params that an update reads

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.end()
        best = state.best_model_checkpoint
        if self.averaged is not None and args.load_best_model_at_end and best is not None:
            self._take_best(Path(best))
        self.finish()

    def _take_best(self, best: Path) -> None:
        """Take the averages of the checkpoint that the trainer has loaded into the model."""
        if (best / FOLDER).exists():
            attachment, self.attachment = self.attachment, None  # the optimizer has not gone back
            try:
                resume_from(self, best / FOLDER, best)
            finally:
                self.attachment = attachment
            return
        self._is_of_another = True
        warn_user(
            f"load_best_model_at_end has loaded {best}, which has no averages of swafast: the model keeps its params, "
            "and evaluations run on them. `averaged` is the average after the last step"
        )

    def finish(self, model: Module | None = None) -> None:
        """End the training: follow the optimizer no more, and leave the average in the model if asked to."""
        super().finish(self._installed().model_wrapped if model is None else model)

    # Evaluation and export

    @property
    def has_models(self) -> bool:
        """Whether the trainer's model has an average. Waits for a GPU."""
        return not self._is_of_another and super().has_models

    @contextmanager
    def swapped(self, model: Module | None = None) -> Iterator[None]:
        """Run the trainer's model on the average, if there is one. Collective if averages are shards. It may nest."""
        trainer = self._installed()
        if self._swap is not None or unwrap(trainer.model) is not self._model:
            yield
            return
        self.swap_in(trainer.model_wrapped if model is None else model)
        try:
            yield
        finally:
            self.swap_out()

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write the average as ``trainer.save_model`` writes the model, for ``from_pretrained``. Collective on ranks.

        Args:
            dtype: of the weights; default: that of the model. A wider one has all bits of the average.

        Raises:
            RuntimeError: no model is in the average yet.
            ValueError: ``dtype`` is not a floating dtype.
        """
        trainer = self._installed()
        if not self.has_models:
            raise RuntimeError("the average must hold a model before it is saved, got none: no update was made yet")
        if dtype is None:
            with self.swapped(), trainers.with_whole_states(trainer):
                type(trainer).save_model(trainer, str(folder), _internal_call=True)  # without a push to the Hub
        else:
            trainers.save_in(dtype, trainer, self.evaluated, Path(folder), is_of_shards=self.holds_shards)

    @contextmanager
    def _saving(self, output_dir: Any = None, _internal_call: bool = False, **_: Any) -> Iterator[None]:
        # `on_save` is too late for a push to the Hub, lacks a search's folder, and is not called at a signal to stop.
        is_checkpoint = _internal_call and output_dir is not None and Path(output_dir).name.startswith("checkpoint-")
        if is_checkpoint and self._swap is not None:
            raise RuntimeError(f"{output_dir} must get the model's own params, got the average: leave swapped() first")
        yield
        if is_checkpoint:
            self._write(Path(output_dir))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._saved_at != state.global_step:  # a subclass saves in a way of its own
            self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _write(self, checkpoint: Path) -> None:
        if self.averaged is not None:
            write_averages(self, checkpoint / FOLDER, writes=self._trainer.args.should_save)
            self._saved_at = self._trainer.state.global_step
