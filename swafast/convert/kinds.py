"""The kinds of states that other tools write, and how each is recognised."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..terms.misfits import few
from .named import (
    each_algorithm,
    read_composer,
    read_ema_pytorch,
    read_ignite,
    read_lightning,
    read_mmengine,
    read_timm,
    read_torch,
    read_ultralytics,
)
from .positional import read_diffusers, read_nemo, read_torch_ema
from .reading import Reading, Source


@dataclass(frozen=True)
class Kind:
    """A kind of state."""

    writer: str  # what writes it
    keys: str  # by which it is recognised, for errors
    fits: Callable[[Source, Collection[str]], bool]  # given the state, and the names of the model's params
    read: Callable[[Source], Reading]


def _has(*keys: str, prefix: str = "") -> Callable[[Source, Collection[str]], bool]:
    """Return a function that is true of a state with all these entries, and with one that begins with ``prefix``."""

    def fits(source: Source, own: Collection[str]) -> bool:
        return source.keys() >= {*keys} and any(str(key).startswith(prefix) for key in source)

    return fits


def _is_timm(source: Source, own: Collection[str]) -> bool:
    if isinstance(source.get("state_dict_ema"), Mapping):
        return True
    return bool(source) and all(str(key).startswith("module.") for key in source)


def _is_mmengine(source: Source, own: Collection[str]) -> bool:
    return _has("ema_state_dict", "state_dict")(source, own) or _has("steps", prefix="module.")(source, own)


def _is_plain(source: Source, own: Collection[str]) -> bool:
    values = [value for key, value in source.items() if not str(key).endswith("_extra_state")]
    return not source.keys().isdisjoint(own) and all(isinstance(value, Tensor) for value in values)


def _is_composer(source: Source, own: Collection[str]) -> bool:
    state = source.get("state", source)
    if not isinstance(state, Mapping) or not isinstance(state.get("algorithms"), (Mapping, list, tuple)):
        return False
    return not {"EMA", "SWA"}.isdisjoint(name for name, _ in each_algorithm(state))


KINDS = {
    "torch": Kind(
        "torch's AveragedModel", "'n_averaged', 'module.*'", _has("n_averaged", prefix="module."), read_torch
    ),
    "timm": Kind("timm's ModelEmaV2 or V3", "'module.*' alone, or 'state_dict_ema'", _is_timm, read_timm),
    "ema_pytorch": Kind(
        "ema_pytorch's EMA",
        "'initted', 'step', 'ema_model.*'",
        _has("initted", "step", prefix="ema_model."),
        read_ema_pytorch,
    ),
    "diffusers": Kind(
        "diffusers' EMAModel",
        "'optimization_step', 'update_after_step', and 'shadow_params' or tensors by name",
        _has("optimization_step", "update_after_step"),
        read_diffusers,
    ),
    "torch_ema": Kind(
        "torch_ema", "'num_updates', 'shadow_params'", _has("num_updates", "shadow_params"), read_torch_ema
    ),
    "lightning": Kind(
        "Lightning's WeightAveraging",
        "'state_dict', 'averaging_state'",
        _has("state_dict", "averaging_state"),
        read_lightning,
    ),
    "mmengine": Kind(
        "mmengine's averaged models or its EMAHook",
        "'steps', 'module.*', or 'state_dict', 'ema_state_dict'",
        _is_mmengine,
        read_mmengine,
    ),
    "ignite": Kind("ignite's EMAHandler or others with plain names", "the model's own names", _is_plain, read_ignite),
    "composer": Kind("Composer's EMA or SWA", "'state' with 'algorithms'", _is_composer, read_composer),
    "nemo": Kind(
        "NeMo's EMAOptimizer", "'opt', 'ema', 'every_n_steps'", _has("opt", "ema", "every_n_steps"), read_nemo
    ),
    "ultralytics": Kind("ultralytics' ModelEMA", "'ema', 'updates'", _has("ema", "updates"), read_ultralytics),
}


def recognised(source: Source, own: Collection[str], asked: str) -> Kind:
    """Return the kind of a state.

    Args:
        own: the names of the model's params.
        asked: the kind that the user names, or ``"auto"``.

    Raises:
        ValueError: there is no such kind, the state is not of the kind asked for, or not of exactly one.
    """
    if asked != "auto" and asked not in KINDS:
        spelled = str(asked).lower().replace("-", "_").replace(" ", "_")
        close = difflib.get_close_matches(spelled, KINDS, 1)
        raise ValueError(
            f"kind must be 'auto' or one of {', '.join(map(repr, KINDS))}, got {asked!r}"
            f"{f': did you mean {close[0]!r}?' if close else ''}"
        )
    found = [name for name, kind in KINDS.items() if kind.fits(source, own)]
    if asked != "auto":
        if asked not in found:
            kind = KINDS[asked]
            raise ValueError(
                f"source must be a state of {kind.writer}, with {kind.keys}, got {few(source) or 'no entry'}"
                f"{_meant(source, own, found)}"
            )
        return KINDS[asked]
    if len(found) > 1:
        raise ValueError(f"kind must be given, as the state can be of the kinds {', '.join(map(repr, found))}")
    if not found:
        raise ValueError(
            "source must be the state of an average, of one of the kinds "
            f"{', '.join(map(repr, KINDS))}, got {few(source) or 'no entry'}{_meant(source, own, found)}"
        )
    return KINDS[found[0]]


def _meant(source: Source, own: Collection[str], found: list[str]) -> str:
    """Return the end of an error: the kind that the state has, or the entry that is such a state."""
    if found:
        return f". It is of the kind {found[0]!r}"
    for spelled, inner in _entries(source):
        for name, kind in KINDS.items():
            if isinstance(inner, Mapping) and kind.fits(inner, own):
                return f": {spelled} is of the kind {name!r}, pass that"
    return ""


def _entries(source: Source) -> list[tuple[str, Any]]:
    entries = [(f"source[{key!r}]", value) for key, value in source.items()]
    listed = [(name, value) for name, value in entries if isinstance(value, (list, tuple))]
    return entries + [(f"{name}[{index}]", each) for name, value in listed for index, each in enumerate(value)]
