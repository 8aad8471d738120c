"""Hints for states that do not fit: which kind of state it is, and the line that loads it. Lists of keys in errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from . import other_names
from .plane_names import DEVIATION, VARIANCE

if TYPE_CHECKING:
    from .spread import Spread


def of_state(state: object, names: Iterable[str], loader: str) -> str:
    """Return the end of an error about a state that does not fit.

    Args:
        names: the names of the model's own params and buffers.
        loader: the class that shall load it: of one average or of several, whole or of shards.
    """
    meant = _meant(state, {*names}, loader) if isinstance(state, Mapping) and state else ""
    return f": {meant}" if meant else ""


def _meant(state: Mapping[Any, Any], own: set[str], loader: str) -> str:
    several, sharded = loader.endswith("Averages"), loader.startswith("Sharded")
    root, one = ("averages", 'averages["name"]') if several else ("averaged", "averaged")
    load = f"{one}.load_full_state_dict" if sharded else f"{one}.load_state_dict"
    made = f"{loader}(model, {'rules=..., ' if several else ''}num_averaged=n)"
    keys = list(map(str, state))
    if "shadow_params" in state:
        return (
            "this is a state of diffusers' EMAModel or of torch_ema, which has no names: write "
            f"swafast.convert.load({one}, state)"
        )
    if isinstance(state.get("averaging_state"), Mapping) and isinstance(state.get("state_dict"), Mapping):
        return (
            "this is a whole checkpoint of Lightning's WeightAveraging, whose averages are in 'state_dict': write "
            f"swafast.convert.load({one}, state)"
        )
    if any(f"{key.removesuffix('_sq_mean')}_mean" in state for key in keys if key.endswith("_sq_mean")):
        return (
            "this is a state of swa_gaussian's SWAG, whose variance is a difference of squares: "
            f"collect the models again by {root}.update_parameters(model)"
        )
    nested = {key: [*map(str, value)] for key, value in state.items() if isinstance(value, Mapping)}
    for key, inner in nested.items():
        if any(each.endswith("n_averaged") for each in inner):
            target = one if "n_averaged" in inner else root
            return f"this is a whole checkpoint: write {target}.load_state_dict(state[{key!r}])"
    are_exports = several and all(not own.isdisjoint(nested.get(key, ())) for key in state)
    if nested and not are_exports:
        return f"this is a whole checkpoint, of {few(keys)}: pass the entry of the average"
    counted = {key.removesuffix(".n_averaged") for key in keys if key.endswith(".n_averaged")}
    members = sorted(each for each in counted if each.rpartition(".")[2] != "checksum")
    is_part = any(key.startswith("checksum.") for key in keys)
    if not sharded and (is_part or any(f"{each}.save_id" in state for each in members)):
        what, full = "a sharded state", "full_state_dict() for this class"
        if members and not several:
            what, full = f"a sharded state of the averages {few(members)}", f"averages[{members[0]!r}].{full}"
        elif several and is_part:
            full = f"full_state_dict(), and write {load} with it"
        return f"this is {what}, for torch.distributed.checkpoint: save {full}"
    if "n_averaged" in state and several:
        loading = f"{one}.load_state_dict" if is_part else load
        return f"this is a state of one average: write {loading}(state)"
    if "n_averaged" in state or (members and several):
        head = f"{members[0]}.module." if several else "module."
        return other_names.of_saved(own, [key[len(head) :] for key in keys if key.startswith(head)], loader)
    if members:
        class_of_several = loader.replace("AveragedModel", "Averages")
        return (
            f"this is a state of several averages, {few(members)}: load it into {class_of_several}, or keys that begin "
            f"with '{members[0]}.', without that, into one average"
        )
    if all(key.startswith("module.") for key in keys):
        return (
            "this state has no count, like one of timm's ModelEmaV3. If it averages n models, write "
            f"swafast.convert.load({one}, state, num_averaged=n)"
        )
    if any(key.startswith("ema_model.") for key in keys):
        of_n = f"If it averages n models, write swafast.convert.load({one}, state, num_averaged=n)"
        return f"this is a state of ema_pytorch's EMA. {of_n}"
    if are_exports or not own.isdisjoint(keys):
        filled = "load it into the model" if sharded or are_exports else "write model.load_state_dict(state)"
        return (
            "this state has the model's own names, as of averaged_state_dict(), which is for exports: to resume, "
            f"save {root}.state_dict(). To go on from it as an average of n models, {filled}, and write {made}"
        )
    return ""


def of_spreads(state: Mapping[str, object], prefix: str, spreads: Mapping[str, Spread | None]) -> str:
    """Return how the spread in a state differs from that of these averages, with its first key; nothing: it does not.

    Args:
        prefix: of their keys in the state.
        spreads: by name of the average.
    """
    for name, spread in spreads.items():
        lacking, surplus = None, f"{prefix}{VARIANCE}.{name}"
        if spread is not None:
            wanted = [f"{prefix}{plane}.{name}" for plane in (VARIANCE, *spread.columns)]
            lacking = next((key for key in wanted if key not in state), None)
            surplus = f"{prefix}{DEVIATION}.{spread.count}.{name}"
        if lacking is None and surplus not in state:
            continue
        own, found = None if spread is None else spread.count, _num_deviations(state, prefix)
        differs = f"{surplus!r} is there" if lacking is None else f"{lacking!r} is missing"
        if own == found:
            return (
                f"the state must have the spread of {name!r}, but {differs}: it was left out by include=, or tied to "
                "another parameter"
            )
        return (
            f"the state must have the average's deviations={own}, got deviations={found}: {differs}. Construct the "
            f"average with deviations={found}, or load another state"
        )
    return ""


def _num_deviations(state: Mapping[str, object], prefix: str) -> int | None:
    """Return how many deviations the averages in a state have; None: they have no variance either."""
    paths = [key.removeprefix(prefix).split(".", 2) for key in map(str, state) if key.startswith(prefix)]
    columns = {int(path[1]) for path in paths if path[0] == DEVIATION and len(path) > 2 and path[1].isdecimal()}
    return max(columns) + 1 if columns else 0 if any(path[0] == VARIANCE for path in paths) else None


def few(names: Iterable[object]) -> str:
    """Spell names for an error: at most three, and how many more there are."""
    spelled = [repr(name) for name in names]
    return ", ".join(spelled[:3]) + (f" and {len(spelled) - 3} more" if len(spelled) > 3 else "")


def unlike(names: Iterable[str], others: Iterable[str]) -> str:
    """Return which names are missing and which are surplus, beside the others; nothing: they are the same."""
    has, expected = dict.fromkeys(names), dict.fromkeys(others)
    missing, surplus = [name for name in expected if name not in has], [name for name in has if name not in expected]
    parts = [*([f"lacks {few(missing)}"] if missing else []), *([f"has {few(surplus)} besides"] if surplus else [])]
    return f"it {' and '.join(parts)}" if parts else ""


_KEYS = re.compile(r'("[^"\n]*", "[^"\n]*", "[^"\n]*"), ("[^"\n]*"(?:, "[^"\n]*")*)')
#: Before the key of a tensor of another shape, in an error of torch's loader.
SIZE = "\tsize mismatch for "


def shortened(message: str) -> str:
    """Return a message of torch's loader whose lists of keys, and of other shapes, end after three."""
    message = _KEYS.sub(lambda found: f"{found[1]} and {len(found[2].split(', '))} more", message)
    lines = message.split("\n")
    sizes = [line for line in lines if line.startswith(SIZE)]
    if len(sizes) > 3:
        lines = [line for line in lines if line not in sizes[3:]] + [f"\tand {len(sizes) - 3} more size mismatches"]
    return "\n".join(lines).rstrip().removesuffix(".")
