"""The list of a checkpoint of ``torch.distributed.checkpoint``: where the chunks of each tensor are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ..terms.boxes import Box, are_sizes
from .pickles import MOST_PICKLE_NBYTES, Opaque, unpickled
from .regular_files import open_regular

METADATA_FILE = ".metadata"
#: Of nested dicts.
_MOST_DEPTH = 100


@dataclass(frozen=True)
class ChunkPlace:
    """Where the archive of one chunk, or of an entry that is no tensor, lies."""

    file: str  # relative to the folder
    start: int  # in bytes
    nbytes: int


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor of a checkpoint, in chunks that cover it."""

    dtype: str  # in torch's names
    sizes: tuple[int, ...]
    chunks: tuple[tuple[Box, ChunkPlace], ...]


@dataclass(frozen=True)
class Listing:
    """What a checkpoint has."""

    entries: Mapping[str, Any]  # by key: a `ChunkedTensor`, or of what is no tensor, an `Opaque`
    state: Mapping[str, Any]  # the same, nested as it was saved
    places: Mapping[tuple[str, tuple[int, ...]], ChunkPlace]  # by key and offsets


def read_listing(where: str, allow: Sequence[str] = ()) -> Listing:
    """Read the list of a checkpoint.

    Args:
        where: the file.
        allow: further globals that it may name.

    Raises:
        ValueError: the file is missing, damaged, or names globals that it may not.
    """
    try:
        with os.fdopen(open_regular(where), "rb") as file:
            data = file.read(MOST_PICKLE_NBYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"{where} is missing: the folder is no checkpoint, or its save was not finished") from None
    if len(data) > MOST_PICKLE_NBYTES:
        raise ValueError(f"{where} must have at most {MOST_PICKLE_NBYTES:,} bytes, got more")
    value = unpickled(data, where, allow)
    try:
        places = {_index(index): _place(info) for index, info in dict.items(value.get("storage_data"))}
        paths = value.get("planner_data")
        state: dict[str, Any] = {}
        entries: dict[str, Any] = {}
        for key, entry in dict.items(value.get("state_dict_metadata")):
            path = dict.get(paths, key, (key,)) if isinstance(paths, dict) else (key,)
            entries[key] = _tensor(key, entry, places)
            _put(state, path, key, entries[key])
    except ValueError as error:
        raise ValueError(f"{where} is damaged: it does not describe a checkpoint ({error})") from None
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        # Its text may have values of the pickle, which may be endless.
        reason = type(error).__name__
        raise ValueError(f"{where} is damaged: it does not describe a checkpoint ({reason})") from None
    return Listing(entries, state, places)


def _put(state: dict[str, Any], path: Any, key: str, entry: Any) -> None:
    """Put an entry into nested dicts."""
    known = isinstance(key, str) and isinstance(path, tuple | list) and 0 < len(path) <= _MOST_DEPTH
    if not known or not all(isinstance(part, str) or (type(part) is int and abs(part) < 1 << 63) for part in path):
        raise ValueError("an entry has no path of names")
    *outer, last = map(str, path)
    for part in outer:
        state = state.setdefault(part, {})
        if not isinstance(state, dict):
            break
    if not isinstance(state, dict) or last in state:
        raise ValueError(f"{key!r} has the place of another entry")
    state[last] = entry


def _index(index: Opaque) -> tuple[str, tuple[int, ...]]:
    key, offsets = index.get("fqn"), index.get("offset") or ()
    if not isinstance(key, str) or not are_sizes(offsets):
        raise ValueError("an entry has no name, or no offsets")
    return key, tuple(offsets)


def _place(info: Opaque) -> ChunkPlace:
    file, start, nbytes = info.get("relative_path"), info.get("offset"), info.get("length")
    parts = PurePosixPath(file).parts if isinstance(file, str) else ()
    if not parts:
        raise ValueError("an entry has no file")
    if file.startswith("/") or ".." in parts or "\0" in file:
        raise ValueError(f"it must name files in its own folder, got {file!r}: do not use it")
    if type(start) is not int or type(nbytes) is not int or min(start, nbytes) < 0 or start + nbytes >= 1 << 63:
        raise ValueError(f"an entry in {file} has no offset or length that a file can have")
    if info.get("transform_descriptors"):
        raise ValueError(f"an entry in {file} is compressed or otherwise transformed: save it without")
    return ChunkPlace(file, start, nbytes)


def _tensor(key: str, entry: Any, places: Mapping[tuple[str, tuple[int, ...]], ChunkPlace]) -> Any:
    """Return a tensor, or the entry itself if it is none."""
    if not entry.global_name.endswith(".TensorStorageMetadata"):
        return entry
    properties, sizes = entry.get("properties").state, entry.get("size")
    if not are_sizes(sizes):
        raise ValueError(f"{key!r} has no sizes that a tensor can have")
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    chunks: dict[Box, ChunkPlace] = {}
    for chunk in entry.get("chunks"):
        offsets, extents = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
        if not are_sizes(offsets) or not are_sizes(extents) or not len(offsets) == len(extents) == len(sizes):
            raise ValueError(f"a chunk of {key!r} has no offsets and sizes of its tensor's dimensions")
        if any(offset + extent > size for offset, extent, size in zip(offsets, extents, sizes, strict=True)):
            raise ValueError(f"a chunk of {key!r} at {offsets} of {extents} is not in {sizes}")
        chunks[Box(offsets, extents, 0, tuple(range(len(sizes))))] = places[key, offsets]
    whole = Box((0,) * len(sizes), tuple(sizes), 0, ())
    if sum(box.numel for box in chunks) != whole.numel or not _are_apart([box for box in chunks if box.numel]):
        raise ValueError(f"the chunks of {key!r} do not cover it once")
    return ChunkedTensor(dtype.global_name.removeprefix("torch."), tuple(sizes), tuple(chunks.items()))


def _are_apart(boxes: Sequence[Box]) -> bool:
    """Return whether no two boxes share elements."""
    dims = range(len(boxes[0].sizes) if boxes else 0)
    # Along the dimension that is cut most, few boxes are beside another at once.
    dim = max(dims, key=lambda dim: len({box.offsets[dim] for box in boxes}), default=0)
    beside: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[dim : dim + 1]):
        beside = [it for it in beside if it.offsets[dim] + it.sizes[dim] > box.offsets[dim]]
        if any(it.overlap(box) for it in beside):
            return False
        beside.append(box)
    return True
