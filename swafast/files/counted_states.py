"""States of averages in files, with their counts: files of `save`, and what `torch.save` has written."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..strict.pickles import Opaque, StridedView
from ..terms.formats import dtype_named
from ..terms.numbers import as_int
from ..torch_private.modules import metadata_of, set_metadata
from .archives import Archive
from .averaged_file import read_state
from .checkpoints import ITEMSIZES
from .descriptors import open_regular
from .entries import chosen_entries
from .headers import read_header
from .opening import PICKLED_SUFFIXES
from .strided import extent_of
from .torch_files import offset_of, open_archive, spec_of

COUNT = "n_averaged"


@dataclass(frozen=True)
class CountedState:
    """A state of one or several averages, each with its count."""

    path: str
    state: Mapping[str, Any]
    counts: Mapping[str, int]  # by the prefix of the average's keys: "" of a single one, else "<name>."

    @property
    def names(self) -> list[str] | None:
        """The names of several averages; None: it is a state of one."""
        return None if "" in self.counts else sorted(prefix.rstrip(".") for prefix in self.counts)


def check_files(paths: Sequence[str]) -> None:
    """Raise OSError unless a file is at each path."""
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"inputs must exist, got {path!r}: there is nothing at this path")
        if os.path.isdir(path):
            raise IsADirectoryError(f"inputs must be files, got the folder {path!r}")


def read_counted(path: str, key: str | None, allow: Sequence[str]) -> CountedState:
    """Return the state in a file. A file of ``torch.save`` is mapped, and one of :func:`~swafast.save` verified.

    Raises:
        ValueError: it is damaged, holds no count, or its state holds an object that is no plain value.
        OSError: it cannot be read.
    """
    state = _loaded(path, key, allow) if is_pickled(path) else _saved(path)
    counts: dict[str, int] = {}
    for name in [COUNT] if COUNT in state else filter(_is_count, state):
        count = as_int(state[name])
        if count is None or count < 1:
            raise ValueError(f"{path} must hold an average of at least one model, got {name!r} = {state[name]!r}")
        counts[name.removesuffix(COUNT)] = count
    return CountedState(path, state, counts)


def is_pickled(path: str | os.PathLike[str]) -> bool:
    """Return whether a path has a suffix of ``torch.save``."""
    return Path(path).name.lower().endswith(PICKLED_SUFFIXES)


def _is_count(name: object) -> bool:
    """Return whether a key of a state is that of a count: of its average, or of one of several by name."""
    prefix, _, leaf = str(name).rpartition(".")
    return leaf == COUNT and "." not in prefix


def _saved(path: str) -> OrderedDict[str, Any]:
    descriptor = open_regular(path)
    try:
        metadata = read_header(descriptor, path).metadata
    finally:
        os.close(descriptor)
    if not {"swafast", "sha256"} & metadata.keys():
        raise ValueError(
            f"{path} must be a file of swafast.save, which has a count, got another safetensors file: average files "
            "without counts by swafast average"
        )
    return read_state(path)[1]


def _loaded(path: str, key: str | None, allow: Sequence[str]) -> OrderedDict[str, Any]:
    file, archive = open_archive(path, allow)
    try:
        entries = _entries_in(path, archive.value, key)
        with file.opened() as descriptor:
            mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)  # changes of the memory do not reach the file
    finally:
        file.close()
    values = _MappedState(path, archive, mapped)
    try:
        state = OrderedDict((name, values.made(name, value)) for name, value in dict.items(entries))
        set_metadata(state, values.made("_metadata", metadata_of(entries)))
    except RecursionError:
        raise ValueError(f"{path} is damaged: its values are nested too deeply") from None
    return state


def _entries_in(path: str, value: Any, key: str | None) -> dict[str, Any]:
    """Return the state in what ``torch.save`` has written."""
    found = value
    if key is not None or not isinstance(value, dict):
        found = chosen_entries(value, path, key, StridedView, in_one_plane=False)[0]
    # By the class, since a pickle can set the attributes of a dict that it holds.
    names = [*dict.keys(found)]
    if not any(map(_is_count, names)):
        inner = _counted_within(found) if key is None else None
        hint = f": pass --key {inner} (key={inner!r})" if inner else ": average files without counts by swafast average"
        raise ValueError(f"{path} must hold the state of an average, with {COUNT!r}, got none{hint}")
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must hold the state of an average, got a name that is no string")
    return found


def _counted_within(entries: dict[Any, Any]) -> str | None:
    """Return the key of a dict with a count, with dots between nested ones."""
    waiting, seen = [("", entries)], {id(entries)}
    for prefix, each in waiting:
        for name, inner in dict.items(each):
            if not isinstance(name, str) or not isinstance(inner, dict) or id(inner) in seen:
                continue
            if any(map(_is_count, dict.keys(inner))):
                return prefix + name
            seen.add(id(inner))
            waiting.append((f"{prefix}{name}.", inner))
    return None


class _MappedState:
    """The tensors and plain values of a mapped file, made of what its pickle says of them."""

    def __init__(self, path: str, archive: Archive, mapped: mmap.mmap) -> None:
        self._path, self._archive, self._mapped = path, archive, mapped
        self._tensors: dict[StridedView, Tensor] = {}  # tied ones are one tensor
        self._containers: dict[int, Any] = {}  # by id; a small pickle can have one in many places

    def made(self, name: str, value: Any) -> Any:
        if isinstance(value, StridedView):
            if value not in self._tensors:
                self._tensors[value] = self._tensor(name, value)
            return self._tensors[value]
        if isinstance(value, dict | list | tuple):
            if id(value) not in self._containers:
                self._containers[id(value)] = self._container(name, value)
            return self._containers[id(value)]
        if value is None or isinstance(value, bool | int | float | str | bytes):
            return value
        if isinstance(value, Opaque) and value.global_name == "_codecs.encode":  # bytes in the protocol of torch.save
            return str(value.args[0]).encode("latin1")
        got = value.global_name if isinstance(value, Opaque) else type(value).__name__
        raise ValueError(f"{self._path} must hold dense tensors and plain values alone, got for {name!r} a {got}")

    def _container(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            kind = OrderedDict if isinstance(value, OrderedDict) else dict
            return kind((key, self.made(name, inner)) for key, inner in dict.items(value))
        return (list if isinstance(value, list) else tuple)(self.made(name, inner) for inner in value)

    def _tensor(self, name: str, view: StridedView) -> Tensor:
        spec = spec_of(name, view.dtype, view.sizes, self._path)
        what = f"{self._path}: {name!r}"
        offset, dtype = offset_of(view, self._archive, what), dtype_named(view.dtype)
        if not spec.numel:
            return torch.empty(view.sizes, dtype=dtype)
        extent = extent_of(view.sizes, view.strides)
        if offset + extent * ITEMSIZES[spec.dtype] > len(self._mapped):
            raise ValueError(f"{what} is damaged: its bytes are missing at the end of the file")
        return torch.frombuffer(self._mapped, dtype=dtype, count=extent, offset=offset).as_strided(
            view.sizes, view.strides
        )
