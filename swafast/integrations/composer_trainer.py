"""What ``WeightAverage`` asks of Composer: what it refuses, how long a training is, and when an evaluation ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import CodeType, FrameType, MethodType
from typing import Any

from torch.nn import Module

from ..loop.schedule import Span
from ..terms.warn import warn_user
from .lengths import needed_lengths
from .saved_states import cloned
from .weight_average import Contract, refuse_second


def check_algorithms(state: Any, others: tuple[type, ...]) -> None:
    """Raise unless one algorithm averages, and Composer trains in a way that averages can follow.

    Args:
        others: Composer's own averages.

    Raises:
        ValueError: there are several ``WeightAverage``, or Composer's EMA or SWA beside one.
        NotImplementedError: the model is spread by tensor parallelism, or the device is a TPU.
    """
    refuse_second([each for each in state.algorithms if isinstance(each, Contract)], "the Trainer")
    for each in state.algorithms:
        if isinstance(each, others):
            raise ValueError(
                f"algorithms must have WeightAverage alone to average weights, got {type(each).__name__} too, which "
                "exchanges the model's params and saves them so: remove it"
            )
    if state.tp_config is not None:
        raise NotImplementedError(
            "parallelism_config must have no 'tp' with WeightAverage, got tensor parallelism: use 'fsdp' or DDP"
        )
    if state.device.name == "tpu":
        raise NotImplementedError("device must be 'cpu' or 'gpu' with WeightAverage, got 'tpu': XLA runs steps later")


def lengths_of(state: Any, spans: Mapping[str, object]) -> dict[str, Span]:
    """Return what :func:`.lengths.needed_lengths` asks of Composer."""

    def duration() -> Span | None:
        whole = state.max_duration
        is_span = whole is not None and whole.unit.value in ("ba", "ep")  # not so many tokens or seconds
        return f"{whole.value}{whole.unit.value}" if is_span else None

    return needed_lengths(spans, duration=duration, steps_per_epoch=lambda: state.dataloader_len)


def has_scaler(state: Any) -> bool:
    """Return whether Composer has a scaler. It counts the steps that the scaler skips, and averages do not."""
    return state.scaler is not None and state.scaler.is_enabled()


def warn_of_ema(saved: Mapping[str, Any]) -> None:
    """Warn if a state that Composer loads has the average of its EMA as the model: the training would go on from it."""
    other = dict(saved.get("algorithms", {})).get("EMA")
    if isinstance(other, Mapping) and other.get("ema_weights_active"):
        warn_user(
            "the checkpoint was made with Composer's EMA: its model is the average, and the training goes on from it. "
            "Load the trained params into the model before fit: they are in the checkpoint's state, in 'ema_model' of "
            "the algorithm 'EMA' (docs/frameworks/composer.md, section 'From Composer's EMA and SWA')"
        )


class Evaluation:
    """An evaluation in which a model has averages.

    Composer tells algorithms nothing of an error, so it is seen where Composer puts the model back into training. A
    checkpoint that is made meanwhile has the model's own params. Evaluations inside of this one belong to it.

    Args:
        state: Composer's.
        loops: the code of the loops of Composer that evaluate.
        average: whose averages go into the model.
    """

    def __init__(self, state: Any, loops: tuple[CodeType, ...], average: Contract) -> None:
        self._state, self._loops, self._average, self._model = state, loops, average, state.model
        self._own = {name: vars(owner).get(name) for owner, name in self._replaced()}
        self._is_aside = self._has_ended = False
        self._depth = self._running()
        average.swap_in(self._model)
        # Copies of the model, which a callback may make, get this method bound to themselves.
        self._model.train = MethodType(self._train, self._model)
        for name in ("state_dict", "get_model_state_dict"):
            setattr(state, name, self._aside(getattr(state, name)))

    def _replaced(self) -> list[tuple[Any, str]]:
        return [(self._model, "train"), (self._state, "state_dict"), (self._state, "get_model_state_dict")]

    def _running(self) -> int:
        """Return how many loops run now, one inside of another."""
        frame, count = sys._getframe(1), 0
        while frame is not None:
            count += frame.f_code in self._loops
            frame = frame.f_back  # type: ignore[assignment]
        return count

    @property
    def is_around(self) -> bool:
        """Whether the loop that runs now is inside of this evaluation, as one that a callback of the user's begins."""
        return not self._has_ended and self._running() > self._depth

    def leave(self) -> None:
        """End it: the model has its own params."""
        self._has_ended = True
        for owner, name in self._replaced():
            vars(owner).pop(name, None)
            if self._own[name] is not None:
                setattr(owner, name, self._own[name])
        self._average.swap_out()

    def _train(self, model: Module, mode: bool = True) -> Module:
        """Change a model's mode. End the evaluation first if one of Composer's loops leaves its context."""
        own = self._own["train"]
        if _ends(sys._getframe(1), self._loops) and not self.is_around:
            self.leave()
        return type(model).train(model, mode) if own is None else own(mode)

    def _aside(self, make: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def make_aside() -> dict[str, Any]:
            if self._is_aside:
                return make()
            self._is_aside = True
            self._average.swap_out()
            try:
                return cloned(make())
            finally:
                self._average.swap_in(self._model)
                self._is_aside = False

        return make_aside


def _ends(frame: FrameType | None, loops: tuple[CodeType, ...]) -> bool:
    """Return whether a loop's own ``with model_eval_mode(model)`` ends: a model's code may call ``train`` too."""
    for name in ("model_eval_mode", "__exit__"):
        if frame is None or frame.f_code.co_name != name:
            return False
        frame = frame.f_back
    return frame is not None and frame.f_code in loops
