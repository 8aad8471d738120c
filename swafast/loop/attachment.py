"""Attachments: hooks on an optimizer that update an averaged model, with their state in its state dict."""

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

#: The key of our entry in an optimizer's state dict: a list of states, in the order of attachment.
STATE_KEY = "swafast"


class Attachment:
    """An averaged model that follows an optimizer until it is detached; ``averaged.attach(optimizer)`` returns it.

    Its state, the number of steps and the schedule, is saved and loaded in the optimizer's state dict. On resuming,
    attach averages in the same order. If a tool builds that dict by other means, such as ``get_optimizer_state_dict``,
    save :meth:`state_dict` beside it.

    Attributes:
        step: number of steps of the optimizer so far.
        schedule: the :class:`~swafast.loop.schedule.Schedule` of updates. You may assign another one.
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
        """Remove the hooks from the optimizer and wait for an update under way.

        Raises:
            RuntimeError: it was detached before; or what that update has raised.
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
        """Wait for an update under way. If it runs on side streams, the current streams wait and the host does not.

        The methods of the averaged model do this themselves. Call it before you read ``averaged.module`` directly, or
        write the model's params between two steps.

        Raises:
            TypeError, ValueError, RuntimeError: the update has raised it.
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
        """Return the number of steps and the schedule, as plain numbers."""
        return {"step": self.step, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the number of steps and the schedule from a state.

        Raises:
            ValueError: it is not a state of an attachment. Nothing has changed.
        """
        self.step, self.schedule = _read(state_dict)

    def _save(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict.setdefault(STATE_KEY, []).append(self.state_dict())

    def _check_load(self, _: Optimizer, state_dict: Mapping[str, Any]) -> None:
        self._loaded = None
        states = state_dict.get(STATE_KEY)
        if states is None:  # saved without an attachment
            return
        if not isinstance(states, list) or len(states) != len(self._fellows):
            got = len(states) if isinstance(states, list) else type(states).__name__
            raise ValueError(
                f"state_dict[{STATE_KEY!r}] must have a state for each of {len(self._fellows)} attached averages, "
                f"got {got}: attach as many averages as when it was saved"
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
                f"the saved {self.schedule} takes the place of {given}: assign attachment.schedule if you want another",
                stacklevel=5,  # torch adds two frames
            )


#: The attachments of each optimizer, in order.
_followers: weakref.WeakKeyDictionary[Optimizer, list[Attachment]] = weakref.WeakKeyDictionary()

#: All attachments, by id. A WeakSet cannot be read while another thread adds to it.
_live: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()

#: Seconds that a fork waits for an update. An update ends sooner, unless it needs a lock that the forking thread holds.
_FORK_WAITS_S = 30.0


def wait_for_readers(timeout: float | None = None) -> None:
    """Wait for all updates under way, before params that they may read are written. Errors are left to ``join``."""
    for reference in _live.valuerefs():
        attachment = reference()
        if attachment is not None:
            attachment._runner.wait(timeout)


# A forked child has no thread to finish an update under way.
os.register_at_fork(before=partial(wait_for_readers, _FORK_WAITS_S))


def attached_to(optimizer: Optimizer) -> list[Attachment]:
    """Return the attachments of an optimizer, in order."""
    return list(_followers.get(optimizer, []))


def check_attached_load(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError if an attachment of ``optimizer`` would refuse to load ``state_dict``. Nothing changes."""
    for attachment in attached_to(optimizer):
        attachment._check_load(optimizer, state_dict)
        attachment._loaded = None


def _read(state: object) -> tuple[int, Schedule]:
    try:
        step, spans = state["step"], state["schedule"]  # type: ignore[index]
        schedule = Schedule(spans["start"], spans["every"], spans["end"])
        good = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"state_dict must be a state of an attachment, got {state!r}: {error}") from error
    if not good:
        raise ValueError(f"state_dict['step'] must be an int >= 0, got {step!r}")
    return step, schedule
