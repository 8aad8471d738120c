"""What averages add to the checkpoints of Lightning, and what a checkpoint has of them.

A file has Lightning's own layout: ``state_dict`` is the average under the module's names, ``current_model_state`` the
module's own state, and ``averaging_state`` what else the average's state has. ``swafast`` is ours. A sharded checkpoint
has the module's own state, and the average under ``swafast_average.<key>`` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn import Module

from ..sharded.strict_reader import read_metadata
from ..terms.names import canonical, named_buffers, named_params
from .saved_states import check_keys, cloned, load_shards, naming
from .weight_average import Contract

OURS = "swafast"
IN_SHARDS = "swafast_average."
_OWN, _REST = "current_model_state", "averaging_state"


def layout(own: Mapping[str, Any], state: Mapping[str, Any], module: Module, name: str | None) -> dict[str, Any]:
    """Return the parts of a file.

    Args:
        own: the module's own state.
        state: of its averages, whole.
        name: of the average that is evaluated, if there are several.
    """
    prefix = _prefix(name)
    # A module may keep more in its state than tensors, such as metrics. Its copy in the average has old ones.
    tensors = {**named_params(module, "module"), **named_buffers(module, "module")}
    further = {key: value for key, value in own.items() if canonical(key) not in tensors}
    own_keys = {canonical(key): key for key in own}  # those of compiled parts have wrappers
    averages = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    averages = {own_keys.get(canonical(key), key): value for key, value in averages.items()}
    rest = {key: value for key, value in state.items() if not key.startswith(prefix)}
    return {"state_dict": {**averages, **further}, _OWN: own, _REST: rest}


def clone_parts(checkpoint: dict[str, Any]) -> None:
    """Replace, in a checkpoint, by copies what :func:`layout` has returned."""
    for part in {"state_dict", _OWN, _REST} & checkpoint.keys():
        checkpoint[part] = cloned(checkpoint[part])


def ours_of(checkpoint: Mapping[str, Any], where: object) -> Mapping[str, Any] | None:
    """Return what is ours alone in a checkpoint, or None if it has nothing.

    Raises:
        ValueError: a part of it is missing, or of another type.
    """
    ours = checkpoint.get(OURS)
    if ours is None:
        return None
    if not isinstance(ours, Mapping):
        raise ValueError(f"{where} must have a dict as {OURS!r}, got {type(ours).__name__}: take another checkpoint")
    if "attachment" not in ours:
        raise ValueError(f"{where} must have all of the average's state, got none of 'attachment'")
    kinds = {"has_models": (bool,), "attachment": (Mapping, type(None)), "evaluated": (str, type(None))}
    for key, kind in kinds.items():
        if key in ours and not isinstance(ours[key], kind):
            names = " or ".join({Mapping: "dict", type(None): "None"}.get(each, each.__name__) for each in kind)
            raise ValueError(f"{where} must have a {names} as {key!r} in {OURS!r}, got {ours[key]!r}")
    return ours


def parts_of(checkpoint: Mapping[str, Any], where: object, weights: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a file has of averages: ``ours``, the state ``averaged``, the module's ``own`` state, the ``step``.

    Each is None if the file lacks it. A file of Lightning's own ``WeightAveraging`` has all but ``ours``.

    Args:
        where: the file, for errors.
        weights: the ``state_dict`` of the file, if Lightning has taken it out of the checkpoint.

    Raises:
        ValueError: it has only a part of what belongs together, or a part is of another type.
    """
    ours, parts = ours_of(checkpoint, where), {_OWN, _REST} & checkpoint.keys()
    has_models = bool(parts) if ours is None else ours.get("has_models", True)
    if len(parts) == 1 or (has_models and not parts):
        lacking = sorted({_OWN, _REST} - parts)[0]
        raise ValueError(f"{where} must have all of the average's state, got none of {lacking!r}")
    _refuse_contradiction(where, has_models=has_models, has_averages=bool(parts))
    averaged = None
    if parts:
        for part in (_OWN, _REST):
            if not isinstance(checkpoint[part], Mapping):
                raise ValueError(f"{where} must have a dict as {part!r}, got {type(checkpoint[part]).__name__}")
            with naming(where):
                check_keys(checkpoint[part])
        prefix = _prefix(None if ours is None else ours.get("evaluated"))
        weights = checkpoint["state_dict"] if weights is None else weights
        # They wait until there are averages, and whose memory this is may change it meanwhile.
        averaged = cloned({prefix + key: value for key, value in weights.items()} | dict(checkpoint[_REST]))
    return {"ours": ours, "averaged": averaged, "own": checkpoint.get(_OWN), "step": checkpoint.get("global_step", 0)}


def _refuse_contradiction(where: object, *, has_models: bool, has_averages: bool) -> None:
    if has_models != has_averages:
        raise ValueError(
            f"{where} must have averages if its 'has_models' is true, and none if not, got {has_models} and "
            f"{'averages' if has_averages else 'none'}: take another checkpoint"
        )


def is_of_no_fit(saved: Mapping[str, Any]) -> bool:
    """Return whether a tuner has saved these parts before there were averages, to put the module back."""
    return saved["averaged"] is None and saved["ours"] is not None and saved["ours"].get("attachment", "none") is None


def parts_after_setup(checkpoint: Mapping[str, Any], path: Path, averaged: Any) -> dict[str, Any]:
    """Return what :func:`parts_of` does, of a checkpoint that Lightning has loaded into a sharded module. Collective.

    Args:
        averaged: averages with the keys that are read from a folder.
    """
    if not path.is_dir():
        weights = torch.load(path, map_location="cpu", mmap=True)["state_dict"]  # as Lightning has loaded it
        return parts_of(checkpoint, path, weights)
    ours = ours_of(checkpoint, path)
    has_models = ours is not None and ours.get("has_models", True)
    saved = read_metadata(path).state_dict_metadata
    has_averages = any(key.startswith(f"state_dict.{IN_SHARDS}") for key in saved)
    _refuse_contradiction(path, has_models=has_models, has_averages=has_averages)
    found = {"ours": ours, "averaged": None, "own": None, "step": checkpoint.get("global_step", 0)}
    if has_models:
        state = averaged.state_dict()
        load_shards({"state_dict": {IN_SHARDS + key: value for key, value in state.items()}}, path)
        found["averaged"] = state
    return found


def take(
    average: Contract, saved: Mapping[str, Any], where: object, *, number: int, counts: bool, may_skip: bool
) -> None:
    """Load the parts of a checkpoint into averages that follow optimizers.

    Args:
        number: of the optimizers. Lightning counts the steps of each.
        counts: whether Lightning counts each step.
        may_skip: whether Lightning counts steps that the averages do not.
    """
    ours, averaged, step = saved["ours"], saved["averaged"], saved["step"] // number
    assert average.attachment is not None
    if ours is None and averaged is None:
        average.resume(None, where, step=step)
    elif ours is None:  # Lightning's own averages
        schedule = average._schedule.state_dict()
        average.resume({"averaged": averaged, "attachment": {"step": step, "schedule": schedule}}, where)
    elif averaged is not None:
        average.resume({"averaged": averaged, "attachment": ours["attachment"]}, where)
    elif ours["attachment"] is not None:
        with naming(where):
            average.load_steps(ours["attachment"])
    # With manual optimization, Lightning does not count the steps of torch's own optimizers.
    if counts and ours is not None and ours["attachment"] is not None:
        average.compare_steps(where, step, may_skip=may_skip)


def load_whole_module(module: Module, own: Mapping[str, Any], *, strict: bool) -> None:
    """Load a state of whole tensors into a sharded module. Collective."""
    set_model_state_dict(module, dict(own), options=StateDictOptions(full_state_dict=True, strict=strict))


def _prefix(name: str | None) -> str:
    return "module." if name is None else f"{name}.module."
