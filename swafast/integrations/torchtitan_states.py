"""States of averages in the checkpoints of torchtitan: what its manager saves of them, and what a load finds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner

from ..sharded.checkpoint import CHECKSUM, SAVE_ID
from ..terms.misfits import few
from .saved_states import check_one_or_several, checked_parts, cloned, load_shards, naming
from .weight_average import Contract

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

KEY = "swafast"  # of averages, among the states of a checkpoint
_SPANS = ("start", "every", "end")


class SavedAverages:
    """The averages and their attachment, among the states of a checkpoint manager: tensors alone."""

    def __init__(self, average: Contract) -> None:
        self._average = average

    def state_dict(self) -> dict[str, Any]:
        """Return copies, as a save may run beside the training. Collective if the averages are shards."""
        self._average.warn_if_copied()
        return _packed(self._average)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._average.resume(_unpacked(state_dict), "the checkpoint")


def _packed(average: Contract) -> dict[str, Any]:
    state = average.state()
    averaged = state["averaged"] if average.holds_shards else cloned(state["averaged"])  # shards are copies already
    steps = state["attachment"]
    numbers = {"step": steps["step"], "began": steps["began"], **steps["schedule"]}
    # A checkpoint of torch loads an int by a pickle, and a tensor without one.
    attachment = {name: torch.tensor(-1 if number is None else number) for name, number in numbers.items()}
    return {"averaged": averaged, "attachment": attachment}


def _unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    averaged, attachment = checked_parts(state)
    numbers = {name: None if int(number) == -1 else int(number) for name, number in attachment.items()}
    schedule = {name: numbers.pop(name, None) for name in _SPANS}
    return {"averaged": averaged, "attachment": {**numbers, "schedule": schedule}}


class FoundStates(DefaultLoadPlanner):  # type: ignore[misc, unused-ignore]
    """Loads what a checkpoint has of a state, and tells what it has."""

    def __init__(self) -> None:
        super().__init__(allow_partial_load=True)
        self.found: dict[str, Any] = {}  # what the checkpoint says of each entry of ours, under its key without KEY

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        entries = metadata.state_dict_metadata.items()
        self.found = {key.removeprefix(f"{KEY}."): each for key, each in entries if key.startswith(f"{KEY}.")}
        super().set_up_planner(state_dict, metadata, is_coordinator)


def found_state(average: Contract, folder: str | Path) -> dict[str, Any] | None:
    """Return the state of averages in a checkpoint; None if it has none. Collective.

    Nothing of the averages changes. The tensors of the state are copies.

    Raises:
        ValueError: a part of the state is missing.
        RuntimeError: it does not fit the averages, or the checkpoint is damaged.
    """
    state = _packed(average)
    planner = FoundStates()
    load_shards({KEY: state}, folder, planner)
    if not planner.found:
        return None
    with naming(folder):
        kept = {part: _kept(average, part, state[part], planner.found) for part in state}
        return _unpacked({part: entries or None for part, entries in kept.items()})


def _kept(average: Contract, part: str, own: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was loaded of one part of the state; nothing if the checkpoint has nothing of it.

    Raises:
        RuntimeError: keys or dtypes differ from the average's own. Torch would leave out the former, and cast.
    """
    saved = {key.removeprefix(f"{part}."): each for key, each in found.items() if key.startswith(f"{part}.")}
    names = None if average._rules is None else [*average._rules]
    if part == "averaged" and saved:
        check_one_or_several(saved, names)
    prefixes = [""] if names is None else [f"{name}." for name in names]
    seals = {key for key in {*own, *saved} if any(_is_seal(key, prefix) for prefix in prefixes)}
    if part == "averaged" and seals.isdisjoint(saved):
        own = {key: value for key, value in own.items() if key not in seals}  # those of an average that is no shard
    lacking, surplus = own.keys() - saved.keys(), saved.keys() - own.keys() - seals
    if saved and (lacking or surplus):
        raise RuntimeError(
            f"the checkpoint must have the {part!r} of this average, got {len(lacking)} keys missing "
            f"({few(sorted(lacking))}) and {len(surplus)} of another model or format ({few(sorted(surplus))}): "
            "use the model and format= as then, and if the model changes, call adapt_to(model) after the load"
        )
    for key, value in own.items() if saved else ():
        dtype = getattr(getattr(saved[key], "properties", None), "dtype", None)
        if isinstance(value, Tensor) and dtype != value.dtype:
            raise RuntimeError(f"the checkpoint must have {key!r} in {value.dtype}, got {dtype}: use the same format=")
    return own if saved else {}


def _is_seal(key: str, prefix: str) -> bool:
    """Return whether a key is of a checksum or an id, which shards alone have."""
    return key.startswith(prefix + CHECKSUM) or key == prefix + SAVE_ID
