"""Rosters: the attachments of an optimizer, with their states in the optimizer's state dict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch.optim import Optimizer

from ..terms.warn import warn_user
from ..torch_private.optimizers import find_in_flat_state, owners_of_state_hooks

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

#: The key of our entry in the first param group of a state dict, the one place that all of torch's tools keep. It holds
#: the states of all attachments by name, as JSON: tools that compare keys see one key, whatever the names.
STATE_KEY = "swafast"


class Enrolled(Protocol):
    """What a roster needs of an attachment."""

    name: str

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None: ...
    def resume(self, state: Any) -> None: ...


class Roster:
    """The attachments whose states are in one optimizer's state dict.

    Its hooks on the optimizer hold it, so it lives as long as the optimizer, and no copy or pickle has it. States that
    were loaded for averages that are not attached yet wait in the optimizer's own param groups.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._hooks: list[RemovableHandle] = []
        self.attachments: list[Enrolled] = []

    @classmethod
    def of(cls, optimizer: Optimizer) -> Roster:
        """Return the roster of an optimizer. A recipe around an optimizer shares the groups of that, and its roster."""
        optimizer = getattr(optimizer, "_state_holder", optimizer)
        found = (owner for owner in owners_of_state_hooks(optimizer) if isinstance(owner, cls))
        return next(found, None) or cls(optimizer)

    def name_for(self, given: object, default: str) -> str:
        """Return the name that was given, or the default with a number if it is taken.

        Raises:
            TypeError: it is not a str. ValueError: it is empty, or another attachment has it.
        """
        taken = {each.name for each in self.attachments}
        if given is None:
            numbered = (default if number == 1 else f"{default} {number}" for number in range(1, len(taken) + 2))
            return next(name for name in numbered if name not in taken)
        if not isinstance(given, str):
            raise TypeError(f"name must be a str, got {given!r}")
        if not given or given in taken:
            raise ValueError(f"name must be one that no other average attached to the optimizer has, got {given!r}")
        return given

    def waiting(self) -> dict[str, Any]:
        """Return the states that were loaded, by name, of averages that are not attached."""
        return _waiting(self._optimizer)

    def add(self, attachment: Enrolled) -> None:
        if not self.attachments:
            self._hooks = [
                self._optimizer.register_state_dict_post_hook(self._save),
                self._optimizer.register_load_state_dict_pre_hook(self._before_load),
                self._optimizer.register_load_state_dict_post_hook(self._load),
            ]
        self.attachments.append(attachment)
        waiting = self.waiting()
        waiting.pop(attachment.name, None)
        _keep(self._optimizer, waiting)

    def remove(self, attachment: Enrolled) -> None:
        self.attachments = [each for each in self.attachments if each is not attachment]
        if not self.attachments:
            for hook in self._hooks:
                hook.remove()

    def states(self) -> dict[str, Any]:
        return {each.name: each.state_dict() for each in self.attachments}

    def put_back(self, states: Mapping[str, Any]) -> None:
        for each in self.attachments:
            each.load_state_dict(states[each.name])

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the optimizer with its hooks has: no attachments."""
        return {"_optimizer": None, "_hooks": [], "attachments": []}

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        if self.attachments:  # the optimizer's own groups stay as they are: compiled steps depend on their values
            groups = state_dict["param_groups"]
            _take_entry(groups)
            groups[0][STATE_KEY] = json.dumps({**_waiting(optimizer), **self.states()})

    def _before_load(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Put states that are elsewhere in the state dict into the first group, where :meth:`_load` finds them."""
        groups = state_dict["param_groups"]
        if not groups or not self.attachments or _entry_of(groups) is not None:
            return
        entry = state_dict.get(STATE_KEY)  # as it once was: a list, in the order of attachment
        if isinstance(entry, list) and len(entry) == len(self.attachments):
            entry = {each.name: state for each, state in zip(self.attachments, entry, strict=True)}
        elif entry is None and groups[0]["params"]:
            entry = find_in_flat_state(groups[0]["params"][0], STATE_KEY)
        if entry is not None:
            state_dict["param_groups"] = [{**groups[0], STATE_KEY: entry}, *groups[1:]]

    def _load(self, optimizer: Optimizer) -> None:
        """Pass each attachment its state. Warn where that fails, since the optimizer is to resume all the same."""
        if not self.attachments:
            return
        entry = _take_entry(optimizer.param_groups)
        try:
            states = _read(entry)
        except ValueError as error:
            warn_user(f"{error}. Attached averages keep their steps")
            return
        own = {each.name for each in self.attachments}
        if own != states.keys() and (states or optimizer.state):  # silent if neither has stepped
            warn_user(
                f"the averages attached to the optimizer are {_names(own)}, but those in its state are "
                f"{_names(states)}. One that is not in the state keeps its step: set attachment.step, or attach it "
                "with the saved name="
            )
        for each in self.attachments:
            if each.name in states:
                each.resume(states.pop(each.name))
        _keep(optimizer, states)


def _waiting(optimizer: Optimizer) -> dict[str, Any]:
    try:
        return _read(_entry_of(optimizer.param_groups))
    except ValueError as error:
        _take_entry(optimizer.param_groups)
        warn_user(f"{error}. It is left out")
        return {}


def _keep(optimizer: Optimizer, states: Mapping[str, Any]) -> None:
    """Keep these states in the optimizer's groups and no others, for averages that are attached later."""
    _take_entry(optimizer.param_groups)
    if states:
        optimizer.param_groups[0][STATE_KEY] = json.dumps(states)


def _entry_of(groups: Iterable[Mapping[str, Any]]) -> Any:
    """Return our entry; torch's tools may put what was in the first group into another one."""
    return next((group[STATE_KEY] for group in groups if STATE_KEY in group), None)


def _take_entry(groups: Iterable[dict[str, Any]]) -> Any:
    taken = [group.pop(STATE_KEY) for group in groups if STATE_KEY in group]
    return taken[0] if taken else None


def _read(entry: object) -> dict[str, Any]:
    """Return the states by name of an entry.

    Raises:
        ValueError: it is not an entry of ours.
    """
    try:
        states = json.loads(entry) if isinstance(entry, str) else {} if entry is None else entry
    except ValueError:
        states = None
    if not isinstance(states, Mapping):
        raise ValueError(f"{STATE_KEY!r} in the optimizer's state must be states of attached averages, got {entry!r}")
    return dict(states)


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"
