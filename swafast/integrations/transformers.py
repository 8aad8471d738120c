"""``WeightAverage`` for the Trainer of Hugging Face Transformers, and for its subclasses."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from ..loop.schedule import Span
from ..terms.names import canonical, unwrap
from ..terms.warn import warn_user
from .state_folder import resume_from, write_averages
from .weight_average import Contract, framework, raw_optimizers, refuse_second

if TYPE_CHECKING:
    from transformers import Trainer

_transformers: Any = framework("transformers", "4.46")
_Callback: Any = _transformers.TrainerCallback

FOLDER = "swafast"  # in each checkpoint
_REFUSED = ("DEEPSPEED", "MEGATRON_LM", "XLA")  # their engines step without torch's optimizers, or hold no params


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
    _is_of_another = False  # the model was loaded from a checkpoint without averages

    def install(self, trainer: Trainer) -> WeightAverage:
        """Have the trainer average, evaluate the average, save it and resume it. Return this object.

        Raises:
            TypeError: ``trainer`` is not a Trainer of Transformers.
            ValueError: it has a ``WeightAverage``, or this one is installed in another trainer.
            NotImplementedError: it trains with DeepSpeed, Megatron-LM or XLA.
        """
        if not isinstance(trainer, _transformers.Trainer):
            raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
        kind = trainer.accelerator.distributed_type
        if kind.name in _REFUSED:
            raise NotImplementedError(
                f"trainer must train with torch alone, with DDP or with FSDP, got {kind}: call update_parameters of an "
                "averaged model of your own in a callback's on_step_end"
            )
        callbacks = trainer.callback_handler.callbacks
        refuse_second([self, *(each for each in callbacks if isinstance(each, WeightAverage))], "the Trainer")
        if self._trainer is not None:
            raise ValueError("a WeightAverage must be installed in one trainer, got a second one: make another average")
        self._trainer = trainer
        trainer.add_callback(self)
        # Go first: callbacks that upload the model at the end must find the average in it.
        callbacks.insert(0, callbacks.pop())
        self._wrap("train", self._training)
        self._wrap("save_model", self._saving)
        for loop in ("evaluation_loop", "prediction_loop"):  # the second one is gone from Transformers 5
            if hasattr(trainer, loop):
                self._wrap(loop, lambda *_, **__: self.swapped())
        return self

    def _wrap(self, name: str, around: Callable[..., AbstractContextManager[Any]]) -> None:
        """Have a method of the trainer run inside ``around``, which gets its arguments."""
        method = getattr(self._trainer, name)

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with around(*args, **kwargs):
                return method(*args, **kwargs)

        setattr(self._trainer, name, wrapped)

    def _installed(self) -> Any:
        if self._trainer is None:
            raise RuntimeError(
                "the average must be installed, since a callback alone cannot evaluate it, got callbacks=[average] or "
                "nothing: call average.install(trainer)"
            )
        return self._trainer

    # The training

    @contextmanager
    def _training(self, resume_from_checkpoint: Any = None, *_: Any, **__: Any) -> Iterator[None]:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _transformers.trainer_utils.get_last_checkpoint(self._trainer.args.output_dir)
        self._resumed, self._has_begun = resume_from_checkpoint or None, False
        # A training that raised has left it attached. Distributed checkpoints without averages lack its key.
        self._detach()
        yield

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._installed()
        model, saved = trainer.model_wrapped, None if self._resumed is None else Path(self._resumed) / FOLDER
        is_fresh = saved is not None and not saved.exists()
        # A trainer that looks for a batch size begins again in one call of train.
        if is_fresh or self._has_begun or unwrap(model) is not self._model:
            self._detach()
            self.averaged = self.attachment = None
        self._has_begun, self._model, self._is_of_another = True, unwrap(model), False
        try:
            optimizers = [each for each in raw_optimizers([trainer.optimizer]) if each is not None]
            _refuse_own_averages(optimizers)
            self.make(model)
            self.follow(optimizers, model, step=state.global_step, **self._lengths(state))
            if saved is not None:
                resume_from(self, saved, self._resumed, step=state.global_step)
        except BaseException:
            self._detach()
            raise

    def make(self, model: Module) -> Any:
        if hasattr(unwrap(model), "peft_config") or getattr(unwrap(model), "_hf_peft_config_loaded", False):
            self._options.setdefault("include", lambda name, param: param.requires_grad)
        return super().make(model)

    def _lengths(self, state: Any) -> dict[str, Span]:
        """Return the steps of an epoch and of the whole training, if a span needs them and the trainer knows them."""
        units = "".join(span for span in self._when.values() if isinstance(span, str))
        loader = self._trainer.callback_handler.train_dataloader
        found: dict[str, Span] = {"duration": state.max_steps} if "dur" in units else {}
        if "ep" in units and hasattr(loader, "__len__"):
            found["steps_per_epoch"] = math.ceil(len(loader) / self._trainer.args.gradient_accumulation_steps)
        return found

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._detach()
        best = state.best_model_checkpoint
        if self.averaged is not None and args.load_best_model_at_end and best is not None:
            self._take_best(Path(best))
        self.finish()

    def _take_best(self, best: Path) -> None:
        """Take the averages of the checkpoint that the trainer has loaded into the model."""
        assert self.attachment is not None
        if (best / FOLDER).exists():
            before = self.attachment.state_dict()
            resume_from(self, best / FOLDER, best)
            self.attachment.load_state_dict(before)  # the optimizer has not gone back
            return
        self._is_of_another = True
        warn_user(
            f"load_best_model_at_end has loaded {best}, which has no averages of swafast: the model keeps its params, "
            "and evaluations run on them. `averaged` is the average after the last step"
        )

    def finish(self, model: Module | None = None) -> None:
        """End the training: follow the optimizer no more, and leave the average in the model if asked to."""
        super().finish(self._installed().model_wrapped if model is None else model)

    def _detach(self) -> None:
        if self.attachment is not None and self.attachment.is_attached:
            self.attachment.detach()

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
        if dtype is not None:
            trainer._save(str(folder), state_dict=self._whole_state(dtype))
            if trainer.args.should_save:
                _set_dtype(Path(folder) / "config.json", dtype)
            return
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        before = getattr(plugin, "state_dict_type", None)
        with self.swapped():
            if before is not None:
                plugin.set_state_dict_type("FULL_STATE_DICT")  # with another one, save_model writes nothing
            try:
                type(trainer).save_model(trainer, str(folder), _internal_call=True)  # without a push to the Hub
            finally:
                if before is not None:
                    plugin.set_state_dict_type(before)

    def _whole_state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the average, and what it leaves out, under the model's names. Of shards, all is on rank 0."""
        if not self.holds_shards:
            return dict(self.evaluated.averaged_state_dict(dtype))
        averages = self.evaluated.averaged_state_dict(dtype, rank0_only=True, cpu_offload=True)
        own = self._trainer.accelerator.get_state_dict(self._trainer.model)
        cast = {canonical(name): each.to(dtype) if each.is_floating_point() else each for name, each in own.items()}
        return cast | averages

    @contextmanager
    def _saving(self, output_dir: Any = None, _internal_call: bool = False, **_: Any) -> Iterator[None]:
        """Write our part of a checkpoint.

        ``on_save`` comes too late for a push to the Hub, does not tell a search's folder, and is not called if a signal
        stops the training.
        """
        is_checkpoint = _internal_call and output_dir is not None and Path(output_dir).name.startswith("checkpoint-")
        if is_checkpoint and self._swap is not None:
            raise RuntimeError(
                f"a checkpoint must have the model's own params, got a save of {output_dir} while the average is in "
                "the model: save it after the evaluation"
            )
        yield
        if is_checkpoint and self.averaged is not None:
            write_averages(self, Path(output_dir) / FOLDER, writes=self._trainer.args.should_save)


def _refuse_own_averages(optimizers: list[Any]) -> None:
    """Raise NotImplementedError for an optimizer that writes params before an evaluation, such as a schedule-free one.

    The Trainer calls its ``eval`` then.
    """
    for each in optimizers:
        if callable(getattr(each, "eval", None)):
            raise NotImplementedError(
                f"optimizer must leave the params alone in an evaluation, got {type(each).__name__}, which puts "
                "averages of its own into them: train without WeightAverage"
            )


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the weights into a config, if there is one: ``from_pretrained`` loads them in it."""
    if not config.exists():
        return
    values = json.loads(config.read_text(encoding="utf-8"))
    for part in (values, *(value for value in values.values() if isinstance(value, dict))):
        part.update({key: str(dtype).removeprefix("torch.") for key in {"dtype", "torch_dtype"} & part.keys()})
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
