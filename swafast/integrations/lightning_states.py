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
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn import Module

from ..terms.names import canonical, named_buffers, named_params

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
        checkpoint[part] = {
            key: value.clone() if isinstance(value, Tensor) else value for key, value in checkpoint[part].items()
        }


def parts_of(checkpoint: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a file has of averages: ``ours``, the state ``averaged``, the module's ``own`` state, the ``step``.

    Each is None if the file lacks it. A file of Lightning's own ``WeightAveraging`` has all but ``ours``.

    Args:
        weights: the ``state_dict`` of the file, if Lightning has taken it out of the checkpoint.

    Raises:
        ValueError: it has only a part of what belongs together.
    """
    ours, parts = checkpoint.get(OURS), {_OWN, _REST} & checkpoint.keys()
    if len(parts) == 1 or (not parts and ours is not None and ours.get("has_models", True)):
        lacking = sorted({_OWN, _REST} - parts)[0]
        raise ValueError(f"the checkpoint must have all of the average's state, got none of {lacking!r}")
    averaged = None
    if parts:
        prefix = _prefix(None if ours is None else ours.get("evaluated"))
        weights = checkpoint["state_dict"] if weights is None else weights
        averaged = {prefix + key: value for key, value in weights.items()} | dict(checkpoint[_REST])
        # They wait until there are averages, and whose memory this is may change it meanwhile.
        averaged = {key: value.clone() if isinstance(value, Tensor) else value for key, value in averaged.items()}
    return {"ours": ours, "averaged": averaged, "own": checkpoint.get(_OWN), "step": checkpoint.get("global_step", 0)}


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
        return parts_of(checkpoint, weights)
    ours = checkpoint.get(OURS)
    found = {"ours": ours, "averaged": None, "own": None, "step": checkpoint.get("global_step", 0)}
    if ours is not None and ours.get("has_models", True):
        state = averaged.state_dict()
        dcp.load({"state_dict": {IN_SHARDS + key: value for key, value in state.items()}}, checkpoint_id=path)
        found["averaged"] = state
    return found


def load_whole_module(module: Module, own: Mapping[str, Any], *, strict: bool) -> None:
    """Load a state of whole tensors into a sharded module. Collective."""
    set_model_state_dict(module, dict(own), options=StateDictOptions(full_state_dict=True, strict=strict))


def _prefix(name: str | None) -> str:
    return "module." if name is None else f"{name}.module."
