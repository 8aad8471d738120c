"""``WeightAverage`` for MosaicML Composer: an algorithm that averages, evaluates, saves and resumes."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from ..terms.names import unwrap
from .composer_trainer import Evaluation, check_algorithms, has_scaler, lengths_of, warn_of_ema
from .installed import explained, framework
from .saved_states import naming
from .weight_average import Contract

_composer: Any = framework("composer", "0.32.1", package="mosaicml")
_Algorithm: Any = _composer.Algorithm
_Event: Any = _composer.Event
_OTHERS = tuple(getattr(importlib.import_module("composer.algorithms"), name) for name in ("EMA", "SWA"))
_LOOPS = tuple(getattr(_composer.Trainer, name).__code__ for name in ("_eval_loop", "predict"))

#: Which method runs at which of Composer's events.
_HANDLERS = {
    _Event.INIT: "_on_init",
    _Event.BEFORE_LOAD: "_on_before_load",
    _Event.AFTER_LOAD: "_on_after_load",
    _Event.FIT_START: "_on_fit_start",
    _Event.EVAL_START: "_on_evaluation_start",
    _Event.EVAL_END: "_on_evaluation_end",
    _Event.PREDICT_START: "_on_evaluation_start",
    _Event.PREDICT_END: "_on_evaluation_end",
    _Event.FIT_END: "_on_fit_end",
}

__getattr__ = explained(__name__)


class WeightAverage(Contract, _Algorithm):
    __doc__ = f"""An algorithm of Composer: ``Trainer(algorithms=[WeightAverage(ExponentialAverage(0.999))])``.

    Evaluations and predictions run on the average, in ``fit`` and outside of it. Checkpoints have the trained params as
    the model, and the average apart, as the state of this algorithm. ``Trainer(load_path=...)`` goes on from both.
    {(Contract.__doc__ or "").partition("end in it.")[2]}"""

    _model: weakref.ref[Module] | None = None  # whose averages these are, without wrappers
    _pending: Mapping[str, Any] | None = None  # what a checkpoint has, until the averages can take it
    _evaluation: Evaluation | None = None

    def match(self, event: Any, state: Any) -> bool:
        return event in _HANDLERS

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        getattr(self, _HANDLERS[event])(state)

    # The training

    def _on_init(self, state: Any) -> None:
        check_algorithms(state, _OTHERS)
        self._on_evaluation_end(state)
        self.unfollow()  # a training that raised has left it attached

    def _on_before_load(self, state: Any) -> None:
        model = unwrap(state.model)
        if self._model is not None and self._model() is not model:
            raise ValueError("WeightAverage has averages of another model: make a new one for this model")
        self._model, self._pending = weakref.ref(model), None
        load = state.load_state_dict

        def load_state_dict(saved: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
            warn_of_ema(saved)
            load(saved, *args, **kwargs)

        state.load_state_dict = load_state_dict

    def _on_after_load(self, state: Any) -> None:
        vars(state).pop("load_state_dict", None)
        is_loaded, pending = state.load_path is not None, self._pending
        if is_loaded:
            self.averaged = self.attachment = None  # those of an earlier training do not belong to it
        self.make(state.model)
        if pending is not None:
            self.resume(pending, state.load_path, is_whole=True)
            self._pending = {"attachment": pending["attachment"]}
        elif is_loaded and int(state.timestamp.batch):
            self.resume(None, state.load_path, step=int(state.timestamp.batch))

    def _on_fit_start(self, state: Any) -> None:
        check_algorithms(state, _OTHERS)
        self.unfollow()
        step = int(state.timestamp.batch)
        self.follow(state.optimizers, state.model, step=step, **lengths_of(state, self._when))
        pending, self._pending = self._pending, None
        if pending is not None:
            with naming(state.load_path):
                self.load_steps(pending["attachment"])
            self.compare_steps(state.load_path, step, may_skip=has_scaler(state))

    def _on_fit_end(self, state: Any) -> None:
        self.finish(state.model)

    # Evaluation

    def _on_evaluation_start(self, state: Any) -> None:
        self._on_evaluation_end(state)
        if self._evaluation is None and self.has_models:
            self._evaluation = Evaluation(state, _LOOPS, self)

    def _on_evaluation_end(self, state: Any) -> None:
        evaluation = self._evaluation
        if evaluation is not None and not evaluation.is_around:
            self._evaluation = None
            evaluation.leave()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state of averages and attachment, whole on each rank. Collective if the averages are shards."""
        self.warn_if_copied()
        steps = self._pending["attachment"] if self._pending is not None else self.steps()
        state: dict[str, Any] = {"repr": type(self).__name__}
        if steps is not None:  # else no training has begun, and nothing was loaded
            own = self.averaged
            averaged = own.full_state_dict(cpu_offload=True) if self.holds_shards else own.state_dict(frozen=False)
            state |= {"averaged": averaged, "attachment": steps}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a result of :meth:`state_dict`. It is checked and loaded once Composer has loaded the checkpoint."""
        self._pending = {key: value for key, value in state.items() if key != "repr"} or None
