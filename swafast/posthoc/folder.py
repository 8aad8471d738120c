"""The layout of a folder of snapshots, and the ``snapshot.json`` that describes each snapshot.

A snapshot is a subfolder ``<num_averaged>.<generation>``. ``snapshot.json`` is written last: a subfolder without it is
left over from an interrupted save and is ignored. Of one count, the latest generation is used.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata

from ..sharded.strict_reader import read_metadata
from ..terms.formats import dtype_named
from ..terms.pickling import pickled_from
from ..terms.replacing import replacing
from ..terms.rules import EqualAverage, ExponentialAverage, PowerAverage, Rule
from .profiles import Profile

SIDECAR = "snapshot.json"
_VERSION = 1
_RULES = {kind.__name__: kind for kind in (EqualAverage, ExponentialAverage, PowerAverage)}
_NAME = re.compile(r"(\d{12,})\.(\d+)")


@pickled_from("swafast")
class StoredAverage(NamedTuple):
    """The name, count and rule of one average in one snapshot, as iteration over ``Snapshots`` yields it."""

    name: str
    num_averaged: int
    rule: Rule | str  # a str: the repr of a user's own rule, which swafast cannot make again

    def profile(self, folder: Path) -> Profile:
        """Return the profile of the average; an error names ``folder``.

        Raises:
            ValueError: the average has a user's own rule, which ``rules`` of :class:`Snapshots` lacks.
        """
        if isinstance(self.rule, str):
            raise ValueError(
                f"rules must have the rule of the average {self.name!r}, stored as {self.rule} in {folder}, "
                f"got none of that name: pass Snapshots(folder, rules={{{self.name!r}: ...}})"
            )
        return Profile(self.rule, self.num_averaged)


@dataclass(frozen=True)
class StoredTensor:
    """The names, whole shape and dtype of a stored param or buffer."""

    names: tuple[str, ...]  # its name in the model, then the names that are tied to it
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Snapshot:
    """The content of one ``snapshot.json``."""

    path: Path
    num_averaged: int
    rules: Mapping[str, Rule | str]  # by name of the average
    params: tuple[StoredTensor, ...]  # stored for each average under `key_of(average, name)`
    copies: tuple[StoredTensor, ...]  # tensors that are not averaged, stored once under `key_of("", name)`
    checksums: Mapping[str, int]  # by key

    @functools.cached_property
    def metadata(self) -> Metadata:
        """What its files have, read once for all windows of a sum."""
        return read_metadata(self.path)

    def layout(self) -> dict[str, str]:
        """Describe each tensor, by name. Snapshots of one model have equal layouts."""
        kinds = (("averaged", self.params), ("copied", self.copies))
        return {
            stored.names[0]: f"{kind} {stored.shape}" + "".join(f", tied to {name!r}" for name in stored.names[1:])
            for kind, all_stored in kinds
            for stored in all_stored
        }


def key_of(average: str, name: str) -> str:
    """Return the key of a param of an average, or, if ``average`` is empty, of a tensor that is not averaged."""
    return f"{average}/{name}"


def require_same_model(expected: Snapshot, what: str, got: Snapshot) -> None:
    """Raise ValueError with the first difference if two snapshots are of different models; ``what`` names ``got``."""
    ours, theirs = expected.layout(), got.layout()
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{what} must be of the model in {expected.path}, got for {name!r} "
                f"{theirs.get(name, 'nothing')} instead of {ours.get(name, 'nothing')}: if the model has changed, save "
                "it to another folder"
            )


# Folders


def snapshot_paths(folder: Path) -> list[Path]:
    """Return the complete snapshots in ``folder``, in the order of their counts."""
    latest: dict[int, tuple[int, Path]] = {}
    for path, count, generation in _subfolders(folder):
        if (path / SIDECAR).exists():
            latest[count] = max(latest.get(count, (-1, path)), (generation, path))
    return [latest[count][1] for count in sorted(latest)]


def new_path(folder: Path, num_averaged: int) -> Path:
    """Make the subfolder for a new snapshot. An earlier snapshot of this count stays valid meanwhile."""
    taken = [generation for _, count, generation in _subfolders(folder) if count == num_averaged]
    path = folder / f"{num_averaged:012d}.{max(taken, default=-1) + 1}"
    path.mkdir(parents=True)
    return path


def outdated_paths(path: Path) -> list[Path]:
    """Return the subfolders that a snapshot replaces: those of its count with earlier generations."""
    _, own_count, own = next(found for found in _subfolders(path.parent) if found[0] == path)
    return [other for other, count, generation in _subfolders(path.parent) if count == own_count and generation < own]


def _subfolders(folder: Path) -> Iterable[tuple[Path, int, int]]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            yield path, int(match[1]), int(match[2])


# Sidecars


def write_sidecar(snapshot: Snapshot) -> None:
    """Write ``snapshot.json`` atomically: a reader finds the whole file or none."""
    body = _body(snapshot)
    with replacing(snapshot.path / SIDECAR) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        json.dump({"sha256": _digest(body), "snapshot": body}, file, indent=1)


def read_sidecar(path: Path) -> Snapshot:
    """Read ``snapshot.json`` of a snapshot.

    Raises:
        ValueError: the file is damaged, of another version, or of another count than the folder's name. The message
            names the snapshot.
    """
    try:
        saved = json.loads((path / SIDECAR).read_text(encoding="utf-8"))
        body = saved["snapshot"]
        intact = saved["sha256"] == _digest(body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / SIDECAR} must be whole, got {type(error).__name__}: {error}") from error
    if not intact:
        raise ValueError(f"{path / SIDECAR} must be what was saved, got other bytes: delete the damaged snapshot")
    if body["version"] != _VERSION:
        raise ValueError(f"{path / SIDECAR} must be of version {_VERSION}, got {body['version']}")
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[1]) != body["n_averaged"]:
        raise ValueError(f"{path} must be named after its count, {body['n_averaged']}: rename it back")
    try:
        params, copies = (tuple(map(_tensor_of, body[kind])) for kind in ("params", "copies"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / SIDECAR} must be readable here: {error}") from None
    rules = {name: _rule_of(rule, path) for name, rule in body["averages"].items()}
    return Snapshot(path, body["n_averaged"], rules, params, copies, body["checksums"])


def fingerprint(snapshot: Snapshot) -> str:
    """Return a short digest of a snapshot's description."""
    return _digest(_body(snapshot))[:16]


def _body(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "n_averaged": snapshot.num_averaged,
        "averages": {name: _spell(rule) for name, rule in snapshot.rules.items()},
        "params": [_spell_tensor(stored) for stored in snapshot.params],
        "copies": [_spell_tensor(stored) for stored in snapshot.copies],
        "checksums": dict(snapshot.checksums),
    }


def _digest(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _spell(rule: Rule | str) -> dict[str, Any]:
    # Exactly these classes: a subclass may define another weight.
    if type(rule) in _RULES.values():
        options = {each.name: getattr(rule, each.name) for each in dataclasses.fields(rule) if _is_spelled(rule, each)}  # type: ignore[arg-type]
        return {"rule": type(rule).__name__, **options}
    return {"rule": None, "spelled": rule if isinstance(rule, str) else repr(rule)}


def _is_spelled(rule: Rule | str, option: dataclasses.Field[Any]) -> bool:
    """Return whether a sidecar has this option: one by keyword only, which was added later, just if it is given."""
    return not option.kw_only or getattr(rule, option.name) != option.default


def _rule_of(saved: Mapping[str, Any], path: Path) -> Rule | str:
    arguments = dict(saved)
    kind = arguments.pop("rule")
    if kind is None:
        return str(arguments["spelled"])
    try:
        rule: Rule = _RULES[kind](**arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / SIDECAR} must name rules of swafast, got {dict(saved)}: {error}") from error
    return rule


def _spell_tensor(stored: StoredTensor) -> dict[str, Any]:
    return {**dataclasses.asdict(stored), "dtype": str(stored.dtype).removeprefix("torch.")}


def _tensor_of(saved: Mapping[str, Any]) -> StoredTensor:
    return StoredTensor(tuple(saved["names"]), tuple(saved["shape"]), dtype_named(saved["dtype"]))
