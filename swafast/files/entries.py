"""Which entries of a saved state are averaged, and under which names."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from .pickles import Opaque

#: Keys under which training scripts keep the weights, the average first.
PARTS = ("state_dict_ema", "state_dict", "model", "module")
#: The key that averages of torch and of swafast have beside their params, which are under ``module.``.
_COUNT = "n_averaged"
#: The planes that averages of swafast have beside the first one, in the formats that have several.
PLANES = ("remainder", "average", "compensation")


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
            _require_one_plane(value, path)
            return value, []
    part = _part(value, key, path)
    if part is None:
        raise ValueError(
            f"key must be that of a state dict in {path}, which has {few_of(_dicts(entries)) or 'none'}, got {key!r}"
        )
    _require_one_plane(part, path)
    prefix = f"{key}."
    # A name with the prefix may also be beside the dict of that key.
    chosen = {
        name
        for name in entries
        if name.startswith(prefix) and entries[name] is dict.get(part, name.removeprefix(prefix))
    }
    head = key if entries.get(key) is part else key.partition(".")[0]
    others = [name for name in value if name != head and name not in chosen]
    notes = [f"{path}: averaging {key!r}"]
    if others:
        notes[0] += f", without {few_of(others)}"
    return part, notes


def _require_one_plane(state: dict[Any, Any], path: str, key: str = "") -> None:
    """Check that what a key chooses is no average whose bits are in several planes: the first one lacks bits."""
    entries = _named(state)
    for count in entries:
        head, _, leaf = count.rpartition(".")
        if leaf != _COUNT or "." in head:
            continue
        begin = head and f"{head}."
        if not f"{begin}module.".startswith(f"{key}." if key else ""):
            continue
        for name in entries:
            if name.startswith(tuple(f"{begin}{plane}." for plane in PLANES)):
                whole = f"{begin}module.{name.removeprefix(begin).partition('.')[2]}"
                if whole in entries:
                    raise ValueError(
                        f"{path} must hold whole averages, got {whole!r} with further bits in {name!r}: average such "
                        "states by swafast combine, or save averaged_state_dict()"
                    )


def _named(state: dict[Any, Any]) -> dict[str, Any]:
    # By the class, since a pickle can set the attributes of a dict that it holds.
    return {name: entry for name, entry in dict.items(state) if isinstance(name, str)}


def _part(state: dict[Any, Any], key: str, path: str) -> dict[Any, Any] | None:
    """Return the dict under a key, whose dots may separate keys or be in them."""
    _require_one_plane(state, path, key)
    entries, at = _named(state), len(key)
    while at > 0:
        inner = entries.get(key[:at])
        if isinstance(inner, dict):
            found = inner if at == len(key) else _part(inner, key[at + 1 :], path)
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
    if any(isinstance(entry, kind) for name, entry in dict.items(state) if not isinstance(name, str)):
        raise ValueError(f"{path} must hold tensors by name, got one whose key is no text: save model.state_dict()")
    others = [name for name, entry in dict.items(state) if not isinstance(name, str) or not isinstance(entry, kind)]
    for name in filter(entries.__contains__, others):
        if isinstance(entries[name], Opaque) and "_rebuild_" in entries[name].global_name:
            raise ValueError(
                f"{path} must hold dense tensors, got for {name!r} one of {entries[name].global_name}: save its "
                "to_dense(), dequantize(), full_tensor() or resolve_conj().resolve_neg()"
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
    if others:
        notes.append(f"{path}: left out {few_of(others)}, which are no tensors")
    return found


def few_of(names: Collection[Any]) -> str:
    """Return the first three names, and how many more there are."""
    some: Iterable[Any] = list(names)[:3]
    return ", ".join(repr(name) if isinstance(name, str | int) else type(name).__name__ for name in some) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
