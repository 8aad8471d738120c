"""Checks of what a checkpoint has of averages, and the warnings and errors that name the checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..loop.schedule import check_step
from ..terms.misfits import few
from ..terms.warn import warn_user


def cloned(state: Any) -> Any:
    """Return a state with copies of its tensors, also of those in mappings, lists and tuples within it."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, Mapping):
        return {key: cloned(each) for key, each in state.items()}
    return type(state)(map(cloned, state)) if type(state) in (list, tuple) else state


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Have errors about a state name the checkpoint that has it."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        kind = next((each for each in (TypeError, ValueError, RuntimeError) if type(error) is each), None)
        if kind is None or str(where) in str(error):
            raise
        raise kind(f"{error}\nThis is about the state in {where}. Nothing of the averages has changed") from error


def load_shards(state: dict[str, Any], folder: str | Path, planner: Any = None) -> None:
    """Read a distributed checkpoint into the tensors of ``state``. Collective.

    Args:
        planner: a ``LoadPlanner`` of torch, if another one than usual.

    Raises:
        RuntimeError: it is damaged, or it does not fit. The tensors may then have parts of it.
    """
    import torch.distributed.checkpoint as dcp

    from ..sharded.strict_reader import StrictReader

    reader = None if "://" in str(folder) else StrictReader(folder)
    try:
        dcp.load(state, checkpoint_id=folder, storage_reader=reader, planner=planner)
    except dcp.CheckpointException as error:  # no Exception, so a user's `except` would miss it
        raise RuntimeError(f"{folder} must be whole and of the same averages, got errors on ranks: {error}") from error


def checked_parts(state: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the states of the averages and of their attachment.

    Raises:
        ValueError: one is missing, or is no dict.
    """
    lacking = [part for part in ("averaged", "attachment") if state.get(part) is None]
    if lacking:
        raise ValueError(
            f"the checkpoint must have all of the average's state, got none of {lacking[0]!r}: take another "
            "checkpoint, or begin a fresh average by removing the rest of this state"
        )
    for part in ("averaged", "attachment"):
        if not isinstance(state[part], Mapping):
            raise ValueError(f"the checkpoint must have a dict as {part!r}, got {type(state[part]).__name__}")
        check_keys(state[part])
    check_began(state["attachment"])
    return state["averaged"], state["attachment"]


def check_keys(state: Mapping[Any, Any]) -> None:
    """Raise ValueError if a key of a state is not a str."""
    wrong = [key for key in state if not isinstance(key, str)]
    if wrong:
        raise ValueError(f"the checkpoint must have names as the keys of its states, got {wrong[0]!r}")


def check_began(steps: object) -> int:
    """Return the step at which the training of a saved attachment began.

    Raises:
        ValueError: it is no step up to that of the attachment.
    """
    if not isinstance(steps, Mapping):
        raise ValueError(f"the checkpoint must have a dict as 'attachment', got {type(steps).__name__}")
    try:
        began, step = check_step(steps.get("began", 0)), check_step(steps.get("step"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint must have numbers of steps in 'attachment', got {dict(steps)!r}") from error
    if began > step:
        raise ValueError(f"the checkpoint must have 'began' no later than its step {step} in 'attachment', got {began}")
    return began


def check_one_or_several(averaged: Mapping[str, Any], names: Collection[str] | None) -> None:
    """Raise RuntimeError if a state is of one average and these are several, or the other way.

    Args:
        names: of these, if they are several.
    """
    saved = sorted(key.removesuffix(".n_averaged") for key in map(str, averaged) if key.endswith(".n_averaged"))
    saved = [name for name in saved if name.rpartition(".")[2] != "checksum"]
    if names is not None and not saved and "n_averaged" in averaged:
        raise RuntimeError(
            f"the checkpoint must have the averages {few(names)} of rules=, got one average without a name: "
            "to go on with it, construct WeightAverage(rule) as before"
        )
    if names is None and saved and "n_averaged" not in averaged:
        raise RuntimeError(
            f"the checkpoint must have one average, got several, {few(saved)}: to go on with them, construct "
            "WeightAverage(rules={name: rule}) with the same names"
        )


def warn_of_no_average(where: object, step: int | None = None) -> None:
    """Warn, at a resume, of a checkpoint without averages."""
    counted = "" if step is None else f", at step {step}: assign attachment.step if it begins at another"
    warn_user(f"{where} has no averages of swafast: a fresh average begins with this run{counted}")


def warn_of_steps(where: object, made: int, counted: int, step: int) -> None:
    """Warn, at a resume, that averages have followed another number of steps than the framework has counted.

    Args:
        made, counted: both numbers, of this training.
        step: from which the averages go on.
    """
    warn_user(
        f"{where} has averages after {made} steps of this training, but the framework counts {counted}. The averages "
        f"go on from their own step {step}: assign attachment.step if it is wrong, or take another checkpoint"
    )


def warn_of_copied() -> None:
    """Warn, at a save, that the checkpoint has the averages as the trained params."""
    warn_user(
        "the model has the averages since the training has ended, so this checkpoint lacks the trained params, and a "
        "resume would go on from the averages: save before the end, or use copy_at_end=False "
        "(docs/frameworks/README.md, section 'Saves after the training')"
    )
