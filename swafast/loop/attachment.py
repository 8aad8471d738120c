"""Attachments: hooks on an optimizer that update an averaged model."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ..terms import habits, hints
from ..terms.lazy import Checked, MadeOnUse
from ..terms.warn import warn_user
from ..torch_private.core import disable_dynamo
from ..torch_private.modules import named_modules, named_tensors
from ..torch_private.optimizers import is_making_state, is_step
from .hookable import first_name, ids_of_params, refuse_copies
from .roster import Roster, checked_name
from .runners import Runner, Updating, runner_for
from .schedule import Schedule, check_step, read_steps
from .waiting import Waits

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Attachment(hints.WithHints):
    """An averaged model that follows an optimizer until it is detached; ``averaged.attach(optimizer)`` returns it.

    Its state, the number of steps and the schedule, is saved and loaded in the optimizer's state dict, under its name.

    Attributes:
        name: the name of its state. A load may change the number in a default one.
        default_name: the default name without a number; None if the user gave the name.
        step: number of steps of the optimizer so far. You may assign another one.
        schedule: the :class:`~swafast.loop.schedule.Schedule` of updates. You may assign another one.
        then: functions that are called after each step that counts, and its update. They must not attach or detach.
        when_told: functions that are called after the user has assigned ``step``, with the number before.
        waits_in_step: whether a step first waits for an update under way; if not, somebody calls the runner.
    """

    _meant = habits.OF_ATTACHMENTS
    name = Checked(checked_name)
    _beside: tuple[bool, str | None] = (False, None)  # overlap and offload; a copy has neither
    waits_in_step = True
    _trained: set[int] | None = None  # ids of the optimizers' params at construction, until the first step

    # A backward over several GPUs may step optimizers in several threads.
    _counting = MadeOnUse[threading.Lock](lambda self: threading.Lock())

    def __init__(
        self,
        averaged: Updating,
        optimizers: Sequence[Optimizer],
        model: Module,
        schedule: Schedule,
        overlap: bool,
        offload: str | None,
        name: str,
        default_name: str | None,
    ) -> None:
        self.name, self.default_name, self._step, self._schedule = name, default_name, 0, schedule
        self._told_step: int | None = None  # the last step that the user has set or loaded
        self._averaged, self._model, self._optimizers = averaged, model, tuple(optimizers)
        self._stepped: dict[int, int] = {}  # steps since the last count of those that made any, by their place
        self._runner, self._beside = runner_for(averaged, model, overlap, offload), (overlap, offload)
        self._waits = Waits(self)
        self.retarget(model)
        self._own_thread: int | None = None  # the thread that is in an update of ours
        self._is_warned = self._is_warned_of_waiting = False
        self.is_checked = False  # whether the first step need not be checked any more
        self.then: list[Callable[[], None]] = []
        self.when_told: list[Callable[[int], None]] = []
        self._hooks: list[RemovableHandle] = []
        self._trained = ids_of_params(optimizers)
        for index, optimizer in enumerate(optimizers):
            self._hooks.append(optimizer.register_step_pre_hook(self.before_step))
            self._hooks.append(optimizer.register_step_post_hook(partial(self._after_step, index)))
        self._roster = Roster.of(optimizers[-1])
        self._roster.add(self)
        averaged._guard.attachment = self
        _live[id(self)] = self

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        step = check_step(step)
        self._take_up()
        before, self._step, self._told_step = self._step, step, step
        for function in self.when_told:
            function(before)

    @property
    def is_told(self) -> bool:
        """Whether the user has set or loaded ``step``, and no step was made since."""
        return self._step == self._told_step

    @property
    def schedule(self) -> Schedule:
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, got {schedule!r}")
        self._take_up()
        self._schedule = schedule

    @property
    def model(self) -> Module:
        """The model that is averaged."""
        return self._model

    @property
    def is_attached(self) -> bool:
        return bool(self._hooks)

    def detach(self) -> None:
        """Remove the hooks from the optimizer and wait for an update under way.

        Raises:
            RuntimeError: it was detached before; the wait would go into a CUDA graph; or what that update has raised.
        """
        if not self._hooks:
            raise RuntimeError("the attachment must be attached to be detached, got one that was detached before")
        self._runner.refuse_capture()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._roster.remove(self)
        self._averaged._guard.attachment = None
        self._waits.renew(())
        self._runner.close()

    @property
    def is_under_way(self) -> bool:
        """Whether an update may be running beside the training."""
        return self._runner.is_under_way

    def join(self) -> None:
        """Wait for an update under way. If it runs on side streams, the current streams wait and the host does not.

        The methods of the averaged model do this themselves. Call it before you read ``averaged.module`` directly, or
        write the model's params between two steps.

        Raises:
            TypeError, ValueError, RuntimeError: the update has raised it.
            RuntimeError: the wait would go into a CUDA graph.
        """
        self._runner.join()

    def retarget(self, model: Module) -> None:
        """Average this model from now on, where its tensors are now."""
        if model is not self._model or not self._runner.fits(self._averaged, model):
            self._runner.close()
            self._model, self._runner = model, runner_for(self._averaged, model, *self._beside)
        if self._runner.is_beside:
            self._waits.renew(self._averaged._modules_run())

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or pickle has: steps and schedule. It is detached."""
        nothing: dict[str, Any] = {"_hooks": [], "_optimizers": (), "_runner": Runner(), "then": [], "when_told": []}
        own = {"name": self.name, "default_name": self.default_name, "_step": self.step, "_told_step": None}
        return {**own, "_schedule": self.schedule, "_stepped": {}, **nothing}

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._hooks:
            self.detach()

    # Steps

    @disable_dynamo
    def before_step(self, *_: object) -> None:
        """Wait for an update that the next step would overtake. Raise RuntimeError if the averages are in a model."""
        if self._hooks:  # not of a copy of the optimizer
            self._take_up()
            if self._trained is not None:
                refuse_copies(self._model, self._optimizers, self._trained)
                self._trained = None
            if (guard := self._averaged._guard).model is not None and not is_making_state():
                guard.refuse_while_swapped("a step of the optimizer")
            if self.waits_in_step:
                self._runner.before_step()

    @disable_dynamo
    def _after_step(self, index: int, optimizer: Optimizer, *_: object) -> None:
        if self._hooks and is_step(optimizer) and self._counts(index):
            if not self.is_checked:
                self.is_checked = True
                if self._told_step != self.step - 1:
                    self._averaged._check_first_step(self)
            if self.schedule.is_due(self.step):
                self._update()
            for function in self.then:
                function()

    def _counts(self, index: int) -> bool:
        """Note that this optimizer has stepped, and return whether now all have: that is one step more."""
        with self._counting:
            times = self._stepped[index] = self._stepped.get(index, 0) + 1
            if len(self._stepped) == len(self._optimizers):
                self._stepped.clear()
                self._step += 1
                return True
            lacking = [each for place, each in enumerate(self._optimizers) if place not in self._stepped]
        if times >= _WAITS_LONG and not self._is_warned_of_waiting:
            self._is_warned_of_waiting = True
            warn_user(
                f"the averages wait for an optimizer, that of {first_name(self._model, lacking[0])!r}, while another "
                f"has stepped {times} times: a step counts once all have stepped. Attach only to those that step"
            )
        return False

    def _update(self) -> None:
        self._own_thread = threading.get_ident()
        try:
            self.retarget(self._model)  # it may have moved to another GPU
            self._runner.update()
        finally:
            self._own_thread = None
            if self._runner.is_beside:
                self._waits.note_begun()

    def __repr__(self) -> str:
        modes = ", overlap=True" * self._beside[0] + ", offload='cpu'" * (self._beside[1] is not None)
        end = modes + ("" if self.is_attached else ", detached")
        return f"Attachment(name={self.name!r}, step={self.step}, schedule={self.schedule}{end})"

    def settle(self, action: str) -> None:
        """Wait as :meth:`join` before an action on the averages. Warn once of an update that the user calls."""
        is_own = action != "update_parameters" or threading.get_ident() == self._own_thread
        is_refused = self._averaged._guard.model is not None
        if not (self._is_warned or is_own or is_refused or self._runner.is_worker()):
            self._is_warned = True
            warn_user(
                "update_parameters was called on an average that is attached to an optimizer, so it is updated twice: "
                "remove the call, or do not attach"
            )
        self._runner.join()

    def reads(self, written: set[int]) -> bool:
        """Return whether an update under way may read, or write, a param or module with one of these ids."""
        if not self._runner.is_beside:
            return False
        trained = {id(param) for each in self._optimizers for group in each.param_groups for param in group["params"]}
        return not written.isdisjoint(trained.union(*map(_ids, (self._model, *self._averaged._modules_run()))))

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the schedule, as plain numbers.

        Of several optimizers, also their number and those that have stepped since the last count, by their place in
        the order of the model's params.
        """
        state = {"step": self.step, "schedule": self.schedule.state_dict()}
        number = len(self._optimizers)
        return state | ({"stepped": sorted(self._stepped), "optimizers": number} if number > 1 else {})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the number of steps and the schedule from a state.

        Raises:
            ValueError: it is not a state of an attachment. Nothing has changed.
        """
        self.restore(state_dict)
        self._told_step = self._step

    def restore(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, or raise as :meth:`load_state_dict`, where it is not the user who loads it."""
        step, schedule, stepped, number = read_steps(state_dict)
        self._take_up()
        self._step, self._schedule = step, schedule
        places = range(len(self._optimizers))
        is_ours = number in (None, len(places)) and stepped < set(places)  # else places are those of others
        self._stepped = dict.fromkeys(stepped, 1) if is_ours else {}

    def leave_optimizer_state(self) -> None:
        """Take this attachment's state out of the optimizer's state dict. The caller saves and loads it elsewhere."""
        self._roster.remove(self)

    def _take_up(self) -> None:
        """Take a state that a load without hooks has left, before it could replace what comes after."""
        if self._hooks:
            self._roster.take_up()

    def resume(self, state: Any) -> None:
        """Take a state out of the optimizer's. Warn if it cannot be read, or has another schedule."""
        given = self.schedule
        try:
            self.restore(state)
            self._told_step, self.is_checked = None, False
        except ValueError as error:
            warn_user(f"{error}. The average {self.name!r} goes on from step {self.step}")
        if self.schedule != given:
            warn_user(
                f"the saved {self.schedule} takes the place of {given}: assign attachment.schedule if you want another"
            )


#: All attachments, by id. A WeakSet cannot be read while another thread adds to it.
_live: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()

#: Seconds that a fork waits for an update. An update ends sooner, unless it needs a lock that the forking thread holds.
_FORK_WAITS_S = 30.0

#: Steps of one optimizer without a step of another until a warning. A critic in a GAN makes a hundred.
_WAITS_LONG = 1000


def wait_for_readers(written: Module | Iterable[Tensor] | None = None, timeout: float | None = None) -> None:
    """Wait for updates under way that may read the params of a model, or these, before they are written. None: all.

    Errors are left to ``join``.
    """
    ids: set[int] | None = None
    for attachment in filter(None, (reference() for reference in _live.valuerefs())):
        if written is not None and ids is None:
            ids = _ids(written) if isinstance(written, Module) else set(map(id, written))
        if ids is None or attachment.reads(ids):
            attachment._runner.wait(timeout)


def _ids(model: Module) -> set[int]:
    """Return the ids of params and modules. FSDP puts other params into a module for a forward."""
    return {id(part) for _, part in (*named_tensors(model), *named_modules(model))}


def _renew_locks() -> None:
    for attachment in list(_live.values()):
        attachment.__dict__.pop("_counting", None)


# A forked child has no thread to finish an update under way.
os.register_at_fork(before=partial(wait_for_readers, None, _FORK_WAITS_S), after_in_child=_renew_locks)


#: Steps of one optimizer without a step of another until a warning. A critic in a GAN makes a hundred.
_WAITS_LONG = 1000
