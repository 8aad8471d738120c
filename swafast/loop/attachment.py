"""Attachments: averaged models that follow an optimizer's hooks, and their state in its state dict."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.nn import Module
from torch.optim import Optimizer

from ..torch_private.core import disable_dynamo
from .runners import Updating, runner_for
from .schedule import Schedule

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

#: The key of our entry in an optimizer's state dict: a list, in the order in which averages were attached.
STATE_KEY = "swafast"


class Attachment:
    """An averaged model that follows an optimizer, until it is detached: what ``averaged.attach(optimizer)`` gives.

    Its state, the number of steps and the schedule, goes into the optimizer's state dict and comes back with it, as
    long as averages are attached in the same order. Where another tool makes that dict of its own
    (``get_optimizer_state_dict``, say), save :meth:`state_dict` beside it.

    Attributes:
        step: how many steps of the optimizer it has seen.
        schedule: after which of them it updates, a :class:`~swafast.loop.schedule.Schedule`; another may be assigned.
    """

    def __init__(
        self,
        averaged: Updating,
        optimizers: Sequence[Optimizer],
        model: Module,
        schedule: Schedule,
        overlap: bool,
        offload: str | None,
    ) -> None:
        self.step, self._schedule = 0, schedule
        self._averaged = averaged
        self._runner = runner_for(averaged, model, overlap, offload)
        self._loaded: Mapping[str, Any] | None = None
        optimizer = optimizers[-1]
        self._hooks: list[RemovableHandle] = [
            *(each.register_step_pre_hook(self._before_step) for each in optimizers),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._check_load),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]
        self._fellows = _followers.setdefault(optimizer, [])
        self._fellows.append(self)
        averaged._guard.attachment = self
        _live[id(self)] = self

    @property
    def schedule(self) -> Schedule:
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, got {schedule!r}")
        self._schedule = schedule

    @property
    def is_attached(self) -> bool:
        return bool(self._hooks)

    def detach(self) -> None:
        """Leave the optimizer alone from now on, once an update under way has ended.

        Raises:
            RuntimeError: it was detached before.
        """
        if not self._hooks:
            raise RuntimeError("the attachment must be attached to be detached, got one that was detached before")
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._fellows.remove(self)
        self._averaged._guard.attachment = None
        self._runner.close()

    def join(self) -> None:
        """Wait for an update under way: on the device where it runs on one, else in this thread.

        Whatever is done with the averaged model does it by itself; only what reads ``averaged.module`` directly, or
        writes the model's params between two steps, has to ask for it.

        Raises:
            TypeError, ValueError, RuntimeError: what went wrong in that update.
        """
        self._runner.join()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._hooks:
            self.detach()

    # Steps

    @disable_dynamo
    def _before_step(self, *_: object) -> None:
        self._runner.before_step()

    @disable_dynamo
    def _after_step(self, *_: object) -> None:
        self.step += 1
        if self.schedule.is_due(self.step):
            self._runner.update()

    # State

    def state_dict(self) -> dict[str, Any]:
        """Give the state: plain numbers."""
        return {"step": self.step, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state: its steps, and its schedule in the place of this one's.

        Raises:
            ValueError: it is no state of an attachment; nothing has changed.
        """
        self.step, self.schedule = _read(state_dict)

    def _save(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict.setdefault(STATE_KEY, []).append(self.state_dict())

    def _check_load(self, _: Optimizer, state_dict: Mapping[str, Any]) -> None:
        self._loaded = None
        states = state_dict.get(STATE_KEY)
        if states is None:  # it was saved before anything was attached
            return
        if not isinstance(states, list) or len(states) != len(self._fellows):
            got = len(states) if isinstance(states, list) else type(states).__name__
            raise ValueError(
                f"state_dict[{STATE_KEY!r}] must have a state for each of {len(self._fellows)} attached averages, "
                f"got {got}"
            )
        state = states[self._fellows.index(self)]
        _read(state)
        self._loaded = state

    def _load(self, _: Optimizer) -> None:
        if self._loaded is None:
            return
        given = self.schedule
        self.load_state_dict(self._loaded)
        self._loaded = None
        if self.schedule != given:
            warnings.warn(
                f"{self.schedule}, which was saved, takes the place of {given}: assign attachment.schedule to go by "
                "another",
                stacklevel=5,  # under two frames of torch's
            )


#: Those attached to each optimizer, in order.
_followers: weakref.WeakKeyDictionary[Optimizer, list[Attachment]] = weakref.WeakKeyDictionary()

#: All there are, by their ids: a WeakSet cannot be read while another thread adds to it.
_live: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()

#: Seconds that a fork waits for an update. It ends in less, unless the thread that forks holds what it needs.
_FORK_WAITS_S = 30.0


def wait_for_readers(timeout: float | None = None) -> None:
    """Wait for all updates under way, before params are written: whichever they read. What goes wrong joins raise."""
    for reference in _live.valuerefs():
        attachment = reference()
        if attachment is not None:
            attachment._runner.wait(timeout)


# A child has no thread that would end an update under way.
os.register_at_fork(before=partial(wait_for_readers, _FORK_WAITS_S))


def check_attached_load(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError where an attachment of ``optimizer`` would, and change nothing."""
    for attachment in _followers.get(optimizer, []):
        attachment._check_load(optimizer, state_dict)
        attachment._loaded = None


def _read(state: object) -> tuple[int, Schedule]:
    try:
        step, spans = state["step"], state["schedule"]  # type: ignore[index]
        schedule = Schedule(spans["start"], spans["every"], spans["end"])
        good = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"state_dict must be of an attachment, got {state!r}: {error}") from error
    if not good:
        raise ValueError(f"state_dict['step'] must be an int >= 0, got {step!r}")
    return step, schedule
