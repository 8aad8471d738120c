"""Weight averaging in torchtitan: in its Trainer, or in a loop of your own with its optimizers and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from ..loop.schedule import Span
from ..terms.warn import warn_user
from . import torchtitan_trainer as trainers
from .inside import run_inside
from .installed import framework
from .torchtitan_states import KEY, SavedAverages, found_state
from .weight_average import Contract, refuse_second

if TYPE_CHECKING:
    from torchtitan.components.checkpointer import BaseCheckpointManager
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.trainer import Trainer

framework("torchtitan", "0.3")  # the first one with BaseCheckpointManager


class WeightAverage(Contract):
    """Averages of the model of a ``Trainer``: FSDP, HSDP, tensor parallel or on one GPU.

    Validations run on the average. Checkpoints have it too, among their states, as ``swafast``. A last checkpoint of
    the model alone has the average as the model.

    Example::

        trainer = Trainer(config)
        average = WeightAverage(ExponentialAverage(0.999)).install(trainer)
        trainer.train()
    """

    _model: Any = None
    _checkpointer: Any = None  # None: there is none, or it is disabled

    def install(self, trainer: Trainer) -> WeightAverage:
        """Make the averages, and follow the optimizers. Return this object. Collective on all ranks.

        Call it before ``trainer.train()``, which loads the checkpoint.

        Args:
            trainer: a ``Trainer``, or an object with its ``model_parts``, ``optimizers`` and ``checkpointer``.

        Raises:
            TypeError: ``trainer`` or a part of it has a wrong type.
            ValueError: it has a ``WeightAverage`` already, or a span cannot be read.
            NotImplementedError: it trains with pipeline parallelism or fault tolerance, or steps in the backward.
        """
        trainers.check_training(trainer)
        step = getattr(trainer, "step", None)
        self.install_parts(trainer.model_parts, trainer.optimizers, trainer.checkpointer, step=step,
                           **trainers.lengths_of(trainer, self._when))  # fmt: skip
        if step:
            _warn_of_fresh(step)
        if getattr(trainer, "validator", None) is not None:
            run_inside(trainer.validator, "validate", lambda *_, **__: self.swapped())
        if hasattr(trainer, "train"):
            run_inside(trainer, "train", lambda *_, **__: self._training(trainer))
        return self

    def install_parts(
        self,
        model_parts: Module | Sequence[Module],
        optimizers: OptimizersContainer,
        checkpointer: BaseCheckpointManager | None = None,
        *,
        step: int | None = None,
        **lengths: Span,
    ) -> WeightAverage:
        """Do as :meth:`install` in a loop of your own, without its validation and its end: see the page on torchtitan.

        Args:
            model_parts: the model, or a list of it alone, as the optimizers and the checkpointer have it.
            checkpointer: saves and loads the averages too. Call this before ``checkpointer.load``.
            step: the number of steps so far, if a training goes on without a checkpoint. Default: that of
                ``checkpointer.states["train_state"]``, with a warning if there are any.
            lengths: ``duration`` and ``steps_per_epoch`` of the training, for spans in ``dur`` and ``ep``. Those that
                this object was constructed with are used first.

        Raises:
            TypeError, ValueError, NotImplementedError: as :meth:`install`.
        """
        if self._model is not None:
            raise ValueError("a WeightAverage must be installed once, got a second call: make another one")
        model = trainers.only_model(model_parts, optimizers, checkpointer)
        others: list[WeightAverage] = vars(optimizers).setdefault("_swafast_averages", [])
        refuse_second([self, *others], "one container of optimizers")
        if checkpointer is not None and checkpointer.enable and KEY in checkpointer.states:
            raise ValueError(f"checkpointer must have no state {KEY!r} of its own, got one: name it otherwise")
        counted = trainers.step_of(checkpointer) or 0 if step is None else step
        try:
            self.make(model)
            self.follow([optimizers], model, step=counted, **lengths)
        except BaseException:
            self.averaged = None
            raise
        self._model = model
        others.append(self)
        if checkpointer is not None and checkpointer.enable:
            self._checkpointer = checkpointer
            checkpointer.states[KEY] = SavedAverages(self)
            run_inside(checkpointer, "dcp_load", self._loading)
            run_inside(checkpointer, "save", self._saving)
        if step is None and counted:
            _warn_of_fresh(counted)
        return self

    def _installed(self) -> Module:
        if self._model is None:
            raise RuntimeError("the average must be installed first: call install(trainer)")
        model: Module = self._model
        return model

    # Their use

    @contextmanager
    def swapped(self, model: Module | None = None) -> Iterator[None]:
        """Run the model on the averages, if there are any. Collective if they are shards."""
        model = self._installed() if model is None else model
        self._wait_for_staging()
        with super().swapped(model):
            yield

    def finish(self, model: Module | None = None) -> None:
        """End the training: follow the optimizers no more, and leave the averages in the model if asked to."""
        model = self._installed() if model is None else model
        self._wait_for_staging()
        super().finish(model)

    def _wait_for_staging(self) -> None:
        """Wait for a checkpoint that is still being copied out of the params, before the averages replace them."""
        if self._checkpointer is not None:
            self._checkpointer.maybe_wait_for_staging()

    @contextmanager
    def _training(self, trainer: Any) -> Iterator[None]:
        lengths = trainers.lengths_of(trainer, self._when)
        self.follow([trainer.optimizers], self._model, step=trainer.step, **lengths)  # unless they do
        yield
        self.finish()

    # Checkpoints

    @contextmanager
    def _loading(self, state_dict: dict[str, Any], checkpoint_id: str, *_: Any, **__: Any) -> Iterator[None]:
        is_of_training = not state_dict.keys().isdisjoint(self._checkpointer.states)  # not of the model alone
        ours = state_dict.pop(KEY, None)
        # Ours come first: if they do not fit, nothing has changed.
        state = None if ours is None else found_state(self, checkpoint_id)
        if state is not None:
            self.resume(state, checkpoint_id)
        yield
        step = trainers.step_of(self._checkpointer)
        if is_of_training and state is None:
            where = f"what is loaded of {checkpoint_id}" if ours is None else checkpoint_id
            self.resume(None, where, step=step)
        elif is_of_training and step is not None:
            self.compare_steps(checkpoint_id, step, may_skip=False)

    @contextmanager
    def _saving(self, curr_step: int, last_step: bool = False) -> Iterator[None]:
        checkpointer = self._checkpointer
        is_of_model = last_step and checkpointer.last_save_model_only and not checkpointer.load_only
        with self.swapped() if is_of_model else nullcontext():
            yield


def _warn_of_fresh(step: int) -> None:
    warn_user(
        f"the training has made {step} steps already, and a fresh average begins: to resume a training, install before "
        "the checkpoint is loaded"
    )
