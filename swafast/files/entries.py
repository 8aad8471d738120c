"""Which entries of a saved state are averaged, and under which names."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from .pickles import Opaque

#: Keys under which training scripts keep the weights, the average first.
PARTS = ("state_dict_ema", "state_dict", "model", "module")
#: The key that averages of torch and of swafast have beside their params, which are under ``module.``.
_COUNT = "n_averaged"


def chosen_entries(value: Any, path: str, key: str | None) -> tuple[dict[Any, Any], list[str]]:
    """Return the state dict in what a file holds, and lines that say what was chosen and left out.

    Args:
        key: that of the state dict, with dots between nested ones; None: the first of ``PARTS``, else the whole value.

    Raises:
        ValueError: there is no such entry, or the value is no dict.
    """
    if not isinstance(value, dict):
        got = value.global_name if isinstance(value, Opaque) else type(value).__name__
        raise ValueError(f"{path} must hold a state dict, got {got}: save model.state_dict()")
    entries = _named(value)
    if key is None:
        key = next((part for part in PARTS if isinstance(entries.get(part), dict)), None)
        if key is None and _COUNT in entries and any(name.startswith("module.") for name in entries):
            key = "module"
        if key is None:
            return value, []
    part = _part(value, key)
    if part is None:
        raise ValueError(
            f"key must be that of a state dict in {path}, which has {few_of(_dicts(entries)) or 'none'}, got {key!r}"
        )
    others = [name for name in entries if name != key.partition(".")[0] and not name.startswith(f"{key}.")]
    notes = [f"{path}: averaging {key!r}"]
    if others:
        notes[0] += f", without {few_of(others)}"
    return part, notes


def _named(state: dict[Any, Any]) -> dict[str, Any]:
    # By the class, since a pickle can set the attributes of a dict that it holds.
    return {name: entry for name, entry in dict.items(state) if isinstance(name, str)}


def _part(state: dict[Any, Any], key: str) -> dict[Any, Any] | None:
    """Return the dict under a key, whose dots may separate keys or be in them."""
    entries, at = _named(state), len(key)
    while at > 0:
        inner = entries.get(key[:at])
        if isinstance(inner, dict):
            found = inner if at == len(key) else _part(inner, key[at + 1 :])
            if found is not None:
                return found
        at = key.rfind(".", 0, at)
    prefix = f"{key}."
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)} or None


def _dicts(entries: dict[str, Any]) -> list[str]:
    return [name for name, entry in entries.items() if isinstance(entry, dict)]


def chosen_tensors(state: dict[Any, Any], path: str, strip: str | None, kind: type, notes: list[str]) -> dict[str, Any]:
    """Return the tensors of a chosen state dict by name.

    Args:
        strip: a prefix that is taken off the names that have it.
        kind: of the tensors.
        notes: gets a line that says what was left out.

    Raises:
        ValueError: there is none; or two names become one.
    """
    entries = _named(state)
    others = [name for name, entry in entries.items() if not isinstance(entry, kind)]
    for name in others:
        if isinstance(entries[name], Opaque) and "_rebuild_" in entries[name].global_name:
            raise ValueError(
                f"{path} must hold dense tensors, got for {name!r} one of {entries[name].global_name}: save its "
                "to_dense(), dequantize() or full_tensor()"
            )
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        if name in others:
            continue
        short = name.removeprefix(strip) if strip else name
        if short in found:
            raise ValueError(f"strip must leave different names in {path}, got two {short!r} with {strip!r}")
        found[short] = entry
    if not found:
        inner = _dicts(entries)
        raise ValueError(
            f"{path} must hold tensors by name, got {few_of(others) or 'nothing'}"
            + (f": pass key={inner[0]!r} or another (--key {inner[0]})" if inner else "")
        )
    if strip and not any(name.startswith(strip) for name in entries):
        notes.append(nothing_to_strip(path, strip))
    if others:
        notes.append(f"{path}: left out {few_of(others)}, which are no tensors")
    return found


def nothing_to_strip(path: str, prefix: str) -> str:
    """Return a note that a prefix is nowhere."""
    return f"{path}: no name begins with {prefix!r}, which strip takes off"


def few_of(names: Collection[str]) -> str:
    """Return the first three names, and how many more there are."""
    some: Iterable[str] = list(names)[:3]
    return ", ".join(map(repr, some)) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
