"""Rosters: the attachments of an optimizer, with their states in the optimizer's state dict."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..terms.warn import warn_user
from ..torch_private.optimizers import (
    find_in_flat_state,
    is_getting_keys,
    is_making_full_state,
    owners_of_state_hooks,
)
from .schedule import Schedule

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

#: The key of our entry in the first param group that has params: the one place that all of torch's tools keep. It holds
#: the states of all attachments by name, as JSON: tools that compare keys see one key, whatever the names.
STATE_KEY = "swafast"

#: Bytes of an entry in a full state are a multiple of this, since checkpoints load no tensor of another size.
_FULL_NBYTES = 4096


class Enrolled(Protocol):
    """What a roster needs of an attachment."""

    name: str
    default_name: str | None

    @property
    def schedule(self) -> Schedule: ...
    @property
    def is_told(self) -> bool: ...
    def state_dict(self) -> dict[str, Any]: ...
    def restore(self, state_dict: Mapping[str, Any]) -> None: ...
    def resume(self, state: Any) -> None: ...


def checked_name(argument: str, name: object) -> str:
    """Return the name of an attachment.

    Raises:
        TypeError: it is not a str. ValueError: it is empty.
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a str, got {name!r}")
    if not name:
        raise ValueError(f"{argument} must not be empty")
    return name


class Roster:
    """The attachments whose states are in one optimizer's state dict.

    Its hooks on the optimizer hold it, so it lives as long as the optimizer, and no copy or pickle has it. States that
    were loaded for averages that are not attached yet wait here. If nothing is attached, they wait in the optimizer's
    own param groups.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._hooks: list[RemovableHandle] = []
        self.attachments: list[Enrolled] = []
        self._waiting: dict[str, Any] = {}

    @classmethod
    def of(cls, optimizer: Optimizer) -> Roster:
        """Return the roster of an optimizer. A recipe around an optimizer shares the groups of that, and its roster."""
        optimizer = state_holder(optimizer)
        for owner in owners_of_state_hooks(optimizer):
            if isinstance(owner, cls) and owner._optimizer is not None:  # not of a copy
                return owner
        return cls(optimizer)

    def check_name(self, name: object) -> None:
        """Raise unless this can be the name of one more attachment, or is None.

        Raises:
            TypeError: it is not a str. ValueError: it is empty, or another attachment has it.
        """
        if name is not None:
            checked_name("name", name)
        if any(each.name == name for each in self.attachments):
            raise ValueError(f"name must be one that no other average attached to the optimizer has, got {name!r}")

    def default_name(self, default: str, schedule: Schedule, states: Mapping[str, Any]) -> str:
        """Return the default name, with a number if it is taken, of an attachment that may go on from these states."""
        return _default_name(default, schedule, states, {each.name for each in self.attachments})

    def waiting(self) -> dict[str, Any]:
        """Return the states that were loaded, by name, of averages that are not attached."""
        if self.attachments:
            self.take_up()
            return self._waiting
        groups = self._optimizer.param_groups
        try:
            return _read_all(_entries(groups))
        except ValueError as error:
            _take(groups)
            warn_user(f"{error}. It is left out")
            return {}

    def add(self, attachment: Enrolled) -> None:
        if not self.attachments:
            self._waiting = self.waiting()
            _take(self._optimizer.param_groups)  # compiled steps depend on the values of groups
            self._hooks = [
                self._optimizer.register_state_dict_post_hook(self._save, prepend=True),  # others may move groups
                self._optimizer.register_load_state_dict_pre_hook(self._before_load),
                self._optimizer.register_load_state_dict_post_hook(self._load),
            ]
        self.attachments.append(attachment)
        self._waiting.pop(attachment.name, None)

    def remove(self, attachment: Enrolled) -> None:
        if all(each is not attachment for each in self.attachments):
            return
        self.attachments = [each for each in self.attachments if each is not attachment]
        if not self.attachments:
            for hook in self._hooks:
                hook.remove()
            if self._waiting:
                _home(self._optimizer.param_groups)[STATE_KEY] = json.dumps(self._waiting)

    def states(self) -> dict[str, Any]:
        """Return the states of attachments and those that wait, by name."""
        return {**self._waiting, **{each.name: each.state_dict() for each in self.attachments}}

    def put_back(self, names: Sequence[str], states: Mapping[str, Any]) -> None:
        """Put back the names of attachments, and what :meth:`states` has returned."""
        self._waiting = {name: state for name, state in states.items() if name not in names}
        for each, name in zip(self.attachments, names, strict=True):
            each.name = name
            each.restore(states[name])

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the optimizer with its hooks has: no attachments."""
        return {"_optimizer": None, "_hooks": [], "attachments": []}

    def _save(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        groups = state_dict.get("param_groups")
        if not groups or not self.attachments:
            return
        self.take_up()
        # Where torch only looks for keys, a loaded entry replaces this one. If there is none, this one holds nothing.
        entry: Any = json.dumps({} if is_getting_keys() else self.states())
        if is_making_full_state():  # tensors alone are loaded where an optimizer lacks the key; others raise a KeyError
            nbytes = -(-len(entry) // _FULL_NBYTES) * _FULL_NBYTES
            entry = torch.tensor(list(entry.ljust(nbytes).encode()), dtype=torch.uint8)
        _take(groups)
        _home(groups)[STATE_KEY] = entry

    def _before_load(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Put states that are elsewhere in the state dict into a group, where :meth:`_load` finds them."""
        groups = state_dict.get("param_groups")
        if not groups or not self.attachments or _entries(groups):
            return
        entry = state_dict.get(STATE_KEY)  # as it once was: a list, in the order of attachment
        if isinstance(entry, list) and len(entry) == len(self.attachments):
            entry = {each.name: state for each, state in zip(self.attachments, entry, strict=True)}
        elif entry is None:
            entry = find_in_flat_state((param for group in groups for param in group["params"]), STATE_KEY)
        if entry is not None:
            state_dict["param_groups"] = [{**groups[0], STATE_KEY: entry}, *groups[1:]]

    def take_up(self) -> None:
        """Load what an optimizer that loads its state without hooks has left in its groups."""
        for group in self._optimizer.param_groups:
            if STATE_KEY in group:
                self._load(self._optimizer)

    def _load(self, optimizer: Optimizer) -> None:
        """Pass each attachment its state. Warn where that fails, since the optimizer is to resume all the same."""
        if not self.attachments:
            return
        try:
            states = _read_all(_take(optimizer.param_groups))
        except ValueError as error:
            warn_user(f"{error}. Attached averages keep their steps")
            return
        self._rename(states)
        own = {each.name for each in self.attachments}
        lacking = any(each.name not in states and not each.is_told for each in self.attachments)
        if (lacking or states.keys() - own) and (states or optimizer.state):  # silent if neither has stepped
            warn_user(
                f"the averages attached to the optimizer are {_names(own)}, but those in its state are "
                f"{_names(states)}. One that is not in the state keeps its step: set attachment.step, or attach it "
                "with the saved name="
            )
        for each in self.attachments:
            if each.name in states:
                each.resume(states.pop(each.name))
        self._waiting = states

    def _rename(self, states: Mapping[str, Any]) -> None:
        """Choose default names again, now that the states are known: first where a schedule tells them apart."""
        taken = {each.name for each in self.attachments if each.default_name is None}
        names: dict[int, str] = {}
        for is_sure in (True, False):
            for place, each in enumerate(self.attachments):
                if each.default_name is not None and place not in names:
                    name = _default_name(each.default_name, each.schedule, states, taken)
                    if not is_sure or _has_schedule(states.get(name), each.schedule):
                        names[place] = name
                        taken.add(name)
        for place, name in names.items():
            self.attachments[place].name = name


def state_holder(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer in whose state dict the states of attachments are: that inside a recipe, or this one."""
    holder: Optimizer = getattr(optimizer, "_state_holder", optimizer)
    return holder


def _default_name(default: str, schedule: Schedule, states: Mapping[str, Any], taken: AbstractSet[str]) -> str:
    """Return the default name with the first number that is free.

    A number tells no more than the order of attachment, so the name of a state with this schedule comes first, and then
    that of any state.
    """
    known = [name for name in states if re.fullmatch(re.escape(default) + r"( \d+)?", name)]
    new = (f"{default} {number}" for number in range(2, len(taken) + 3))
    free = [name for name in dict.fromkeys((*sorted(known, key=len), default, *new)) if name not in taken]
    alike = [name for name in free if _has_schedule(states.get(name), schedule)]
    if any(states[name] != states[alike[0]] for name in alike):
        warn_user(
            f"{_names(alike)} in the optimizer's state have equal rules and schedules but different steps, so averages "
            "may get each other's: attach each with a name= of its own"
        )
    return next(iter(alike or [name for name in free if name in states] or free))


def _has_schedule(state: object, schedule: Schedule) -> bool:
    return isinstance(state, Mapping) and state.get("schedule") == schedule.state_dict()


def _home(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the group for our entry: torch's tools lose what is in a group without params."""
    return next((group for group in groups if group["params"]), groups[0])


def _entries(groups: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Return our entries; torch's tools may put what was in one group into another, beside what is there."""
    return [group[STATE_KEY] for group in groups if STATE_KEY in group]


def _take(groups: Iterable[dict[str, Any]]) -> list[Any]:
    return [group.pop(STATE_KEY) for group in groups if STATE_KEY in group]


def _read_all(entries: Iterable[object]) -> dict[str, Any]:
    """Return the states in entries by name.

    Raises:
        ValueError: one is not an entry of ours.
    """
    states: dict[str, Any] = {}
    for entry in entries:
        states.update(_read(entry))
    return states


def _read(entry: object) -> Mapping[str, Any]:
    try:
        if isinstance(entry, Tensor) and entry.dtype == torch.uint8:
            entry = bytes(entry.flatten().tolist()).decode()
        states = json.loads(entry) if isinstance(entry, str) else {} if entry is None else entry
    except ValueError:
        states = None
    if not isinstance(states, Mapping):
        raise ValueError(f"{STATE_KEY!r} in the optimizer's state must be states of attached averages, got {entry!r}")
    return states


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"
