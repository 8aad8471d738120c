"""States of averages in a folder of their own, beside what a framework saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..terms.replacing import replacing
from .saved_states import checked_parts, cloned, load_shards, naming
from .weight_average import Contract

FOLDER = "swafast"  # its usual name in a checkpoint
FILE = "averaged.pt"  # of averages that each rank has as a whole
SHARDS = "averaged"  # the folder of torch.distributed.checkpoint, of averages that are shards
ATTACHMENT = "attachment.json"  # written last: with it, the state is complete


def write_averages(average: Contract, folder: Path, *, writes: bool) -> None:
    """Write the state of averages and attachment. Collective if the averages are shards.

    Args:
        writes: whether this process writes what all have alike.
    """
    average.warn_if_copied()
    state = average.state()
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ATTACHMENT).unlink(missing_ok=True)  # of a state that is replaced
    if average.holds_shards:
        import torch.distributed.checkpoint as dcp

        dcp.save({"averaged": state["averaged"]}, checkpoint_id=folder / SHARDS)
    elif writes:
        with replacing(folder / FILE) as path:
            torch.save(state["averaged"], path)
    if writes:
        with replacing(folder / ATTACHMENT) as path:
            path.write_text(json.dumps(state["attachment"]))


def is_of_averages(folder: Path) -> bool:
    """Return whether a path is an empty folder, or one with what :func:`write_averages` writes, whole or in part."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    return not names or any(name.startswith((SHARDS, ATTACHMENT)) for name in names)


def resume_from(average: Contract, folder: Path, where: object, *, step: int | None = None) -> None:
    """Load what :func:`write_averages` has written. If there is nothing, warn, and begin a fresh average.

    Averages that are shards also load a state of whole tensors.

    Args:
        where, step: as for :meth:`Contract.resume`.

    Raises:
        ValueError: one half of the state is missing or damaged, or it is of shards and the averages are not.
        RuntimeError: it does not fit the averages. Nothing has changed.
    """
    state = _read_state(average, folder, where)
    if state is None:
        average.resume(None, where, step=step)
    else:
        average.resume(state, folder, is_whole=(folder / FILE).exists())


def resume_all(folders: Sequence[tuple[Contract, Path]], where: object) -> None:
    """Load the states of several averages, all of them or none. Raise as :func:`resume_from`.

    Of all but the last one, a copy is kept until the others are loaded.
    """
    before: list[tuple[Contract, dict[str, Any], Any]] = []
    try:
        for average, folder in folders:
            if len(before) < len(folders) - 1:
                state = average.state()
                state["averaged"] = cloned(state["averaged"])
                before.append((average, state, (average._before, average._has_copied)))
            resume_from(average, folder, where)
    except BaseException:
        for average, state, notes in before:
            average.load(state)
            average._before, average._has_copied = notes
        raise


def _read_state(average: Contract, folder: Path, where: object) -> dict[str, Any] | None:
    """Return the state of averages and attachment in a folder; None if there is no such folder. Collective with shards.

    Raises:
        ValueError: as :func:`resume_from`.
    """
    if not folder.exists():
        return None
    attachment = _read(folder / ATTACHMENT, lambda path: json.loads(path.read_text()))
    averaged = _read(folder / FILE, lambda path: torch.load(path, map_location="cpu", weights_only=True))
    if averaged is None and (folder / SHARDS).exists():
        if not average.holds_shards:
            raise ValueError(f"sharded must be True, since {where} has averages in shards, got False or 'auto'")
        read = {"averaged": average.averaged.state_dict()}
        load_shards(read, folder / SHARDS)
        averaged = read["averaged"]
    state = {"averaged": averaged, "attachment": attachment}
    with naming(folder):
        checked_parts(state)
    return state


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    """Return what a file has, or None if there is no file."""
    if not path.exists():
        return None
    try:
        return read(path)
    except Exception as error:  # torch raises errors of many kinds
        raise ValueError(f"{path} must be a whole file of a checkpoint, got a damaged one: {error}") from error
