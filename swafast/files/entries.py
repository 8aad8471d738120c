"""Which entries of a saved state are averaged, and under which names."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ..strict.pickles import Opaque

#: The key under which training scripts keep an average, which is taken before the weights.
AVERAGE_PART = "state_dict_ema"
#: Keys under which they keep the weights.
PARTS = ("state_dict", "model_state_dict", "model", "module")
#: The key that averages of torch and of swafast have beside their params, which are under ``module.``.
_COUNT = "n_averaged"
#: The planes that averages of swafast have beside the first one, in the formats that have several.
PLANES = ("remainder", "average", "compensation")
#: The planes of a spread, without which the first ones are whole.
SPREAD_PLANES = ("variance", "deviation")


def chosen_entries(
    value: Any, path: str, key: str | None, kind: type, *, in_one_plane: bool = True
) -> tuple[dict[Any, Any], str, list[str]]:
    """Return the state dict in what a file holds, its key ("" of the whole), and what to say of the choice.

    Args:
        key: that of the state dict, with dots between nested ones; None: ``AVERAGE_PART``, or else the one of ``PARTS``
            that is there, or else the whole value.
        kind: of the tensors.
        in_one_plane: refuse averages whose bits are in several planes.

    Raises:
        ValueError: there is no such entry, or it has no tensors, or the value is no dict, or several may be meant.
    """
    if not isinstance(value, dict):
        got = value.global_name if isinstance(value, Opaque) else type(value).__name__
        raise ValueError(f"{path} must hold a state dict, got {got}: save model.state_dict()")
    entries = _named(value)
    if key is None:
        key = _only_part(entries, path, kind)
        if key is None and _COUNT in entries and any(name.startswith("module.") for name in entries):
            key = "module"
    part = value if key is None else _part(value, key, path, in_one_plane)
    if part is None:
        raise ValueError(f"key must be that of a state dict in {path}, got {key!r}{_advice(value, kind)}")
    if in_one_plane:
        require_one_plane(_named(part), path)
    if not any(isinstance(entry, kind) for entry in dict.values(part)):
        _check_dense(part, path)
        what = few_of(_named(part)) or "nothing"
        raise ValueError(f"{path} must hold tensors by name, got {what}{_advice(value, kind)}")
    if key is None:
        return value, "", []
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
    is_nested = isinstance(entries.get(key, entries.get(key.partition(".")[0])), dict)
    return part, key if is_nested else "", notes


def _only_part(entries: dict[str, Any], path: str, kind: type) -> str | None:
    """Return the key of the state that is meant; None if none of the usual keys has one."""
    found = [part for part in (AVERAGE_PART, *PARTS) if isinstance(entries.get(part), dict)]
    having = [part for part in found if any(isinstance(each, kind) for each in dict.values(entries[part]))]
    distinct = [part for at, part in enumerate(having) if all(entries[part] is not entries[it] for it in having[:at])]
    if len(distinct) > 1 and distinct[0] != AVERAGE_PART:
        raise ValueError(
            f"key must say which of the states in {path} is averaged, got none for {few_of(distinct)}: pass "
            f"key={distinct[0]!r}, or another of them (--key {distinct[0]})"
        )
    return next(iter(having or found), None)


def require_one_plane(names: Collection[str], path: str, key: str = "") -> None:
    """Check that what a key chooses is no average in several planes: the first one lacks bits, or is not alone.

    Args:
        key: "": all of the names are averaged.
    """
    planes = PLANES if key else (*PLANES, *SPREAD_PLANES)
    for count in names:
        head, _, leaf = count.rpartition(".")
        if leaf != _COUNT:
            continue
        begin = head and f"{head}."
        if not f"{begin}module.".startswith(f"{key}." if key else ""):
            continue
        for name in names:
            if name.startswith(tuple(f"{begin}{plane}." for plane in planes)):
                plane, _, rest = name.removeprefix(begin).partition(".")
                whole = f"{begin}module.{rest.partition('.')[2] if plane == 'deviation' else rest}"
                if whole in names and plane in SPREAD_PLANES:
                    raise ValueError(
                        f"{path} must hold averages alone, got {whole!r} with a spread in {name!r}: average such "
                        f"states by swafast combine, or the means alone by the key that ends in {begin + 'module'!r}"
                    )
                if whole in names:
                    raise ValueError(
                        f"{path} must hold whole averages, got {whole!r} with further bits in {name!r}: average such "
                        "states by swafast combine, or save averaged_state_dict()"
                    )


def _named(state: dict[Any, Any]) -> dict[str, Any]:
    # By the class, since a pickle can set the attributes of a dict that it holds.
    return {name: entry for name, entry in dict.items(state) if isinstance(name, str)}


def _part(state: dict[Any, Any], key: str, path: str, in_one_plane: bool) -> dict[Any, Any] | None:
    """Return the dict under a key, whose dots may separate keys or be in them."""
    if in_one_plane:
        require_one_plane(_named(state), path, key)
    entries, at = _named(state), len(key)
    while at > 0:
        inner = entries.get(key[:at])
        if isinstance(inner, dict):
            found = inner if at == len(key) else _part(inner, key[at + 1 :], path, in_one_plane)
            if found is not None:
                return found
        at = key.rfind(".", 0, at)
    prefix = f"{key}."
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)} or None


def _advice(value: dict[Any, Any], kind: type) -> str:
    """Return the keys of the dicts in a value that hold tensors by name, the least nested first, as advice."""
    found = []
    seen, dicts = {id(value)}, [("", value)]  # a pickle may hold a dict in itself
    for prefix, state in dicts:
        for name, entry in _named(state).items():
            if isinstance(entry, dict) and id(entry) not in seen:
                seen.add(id(entry))
                dicts.append((f"{prefix}{name}.", entry))
                if any(isinstance(each, kind) for each in _named(entry).values()):
                    found.append(prefix + name)
    if any(isinstance(entry, kind) for entry in _named(value).values()):
        return ": it holds tensors itself: pass no key"
    if not found:
        return ": save model.state_dict()"
    others = f" or {few_of(found[1:])}" if found[1:] else ""
    return f": pass key={found[0]!r}{others} (--key {found[0]})"


def _check_dense(state: dict[Any, Any], path: str) -> None:
    for name, entry in _named(state).items():
        if isinstance(entry, Opaque) and "_rebuild_" in entry.global_name:
            raise ValueError(
                f"{path} must hold dense tensors, got for {name!r} one of {entry.global_name}: save its to_dense(), "
                "dequantize(), full_tensor() or resolve_conj().resolve_neg()"
            )


def chosen_tensors(state: dict[Any, Any], path: str, strip: str | None, kind: type, notes: list[str]) -> dict[str, Any]:
    """Return the tensors of a chosen state dict by name.

    Args:
        strip: a prefix that is taken off the names that have it.
        kind: of the tensors.
        notes: gets a line that says what was left out.

    Raises:
        ValueError: a tensor is not dense; or two names become one.
    """
    entries = _named(state)
    if any(isinstance(entry, kind) for name, entry in dict.items(state) if not isinstance(name, str)):
        raise ValueError(f"{path} must hold tensors by name, got one whose key is no text: save model.state_dict()")
    _check_dense(state, path)
    others = [name for name, entry in dict.items(state) if not isinstance(name, str) or not isinstance(entry, kind)]
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        if name in others:
            continue
        short = name.removeprefix(strip) if strip else name
        if short in found:
            raise ValueError(f"strip must leave different names in {path}, got two {short!r} with {strip!r}")
        found[short] = entry
    if strip and not any(name.startswith(strip) for name in entries):
        notes.append(no_prefix(path, strip))
    if others:
        notes.append(f"{path}: left out {few_of(others)}, which are no tensors")
    return found


def no_prefix(path: str, strip: str) -> str:
    """Return the line for a checkpoint in which no name has the prefix that is taken off."""
    return f"{path}: no name begins with {strip!r}"


def few_of(names: Collection[Any]) -> str:
    """Return the first three names, and how many more there are."""
    some: Iterable[Any] = list(names)[:3]
    return ", ".join(repr(name) if isinstance(name, str | int) else type(name).__name__ for name in some) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
