"""Folders of ``torch.distributed.checkpoint`` (DCP), read and written without torch and without a process group.

A folder has ``.metadata``, a pickle that lists the chunks of each tensor, and files with one archive of ``torch.save``
for each chunk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..terms.boxes import Box, boxes_of_run
from ..terms.replacing import replacing_folder
from ..torch_private import pickled as names
from .archives import MOST_PICKLE_NBYTES, Archive, ArchiveLayout, PartialChecksum
from .checkpoints import ITEMSIZES, OutputPlan, TensorSpec, write_record
from .descriptors import InputFile, give_up, open_regular, write_fully
from .entries import chosen_entries, chosen_tensors
from .pickles import TORCH_NAMES, Call, Opaque, StridedView, pickled, unpickled, view_to_pickle
from .strided import Region, row_major
from .torch_files import METADATA, region_of, spec_of, strings_in

_METADATA_FILE = ".metadata"
#: The name of the file of rank 0, as DCP writes it.
_DATA_FILE = "__0_0.distcp"
#: Each archive begins at a multiple of it, so that its storages do too.
_ALIGNMENT = 64


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


class DistributedCheckpoint:
    """A folder of DCP that is open for reading: a ``Checkpoint``.

    Attributes:
        notes: lines for the user: which part of the checkpoint was chosen, and what was left out.
    """

    def __init__(
        self, path: str, *, key: str | None = None, strip: str | None = None, allow: Sequence[str] = ()
    ) -> None:
        """Read ``.metadata``, and open the files that it names.

        Raises:
            ValueError: something is damaged or missing, or it holds no tensors under ``key``.
            OSError: a file cannot be read.
        """
        self.path = path
        self._files: dict[str, InputFile] = {}
        self._regions: dict[ChunkPlace, Region] = {}
        try:
            where = os.path.join(path, _METADATA_FILE)
            state, places = _read_metadata(where, allow)
            self.metadata = self._strings(places.get((METADATA, ())))
            state.pop(METADATA, None)
            entries, self.notes = chosen_entries(state, path, key)
            tensors = chosen_tensors(entries, path, strip, ChunkedTensor, self.notes)
            self.specs: dict[str, TensorSpec] = {}
            self.aliases: dict[str, str] = {}
            self._tensors: dict[str, ChunkedTensor] = {}
            first: dict[ChunkedTensor, str] = {}
            for name, tensor in tensors.items():
                if tensor.chunks and first.setdefault(tensor, name) != name:
                    self.aliases[name] = first[tensor]
                    continue
                self.specs[name] = spec_of(name, tensor.dtype, tensor.sizes, path)
                self._tensors[name] = tensor
                for _, place in tensor.chunks:
                    self._file(place, name)
        except BaseException:
            self.close()
            raise

    def _file(self, place: ChunkPlace, name: str) -> InputFile:
        """Return a chunk's file, after a check that the file has the chunk."""
        found = self._files.get(place.file)
        where = os.path.join(self.path, place.file)
        if found is None:
            try:
                found = self._files[place.file] = InputFile(where)
            except FileNotFoundError:
                raise ValueError(f"{self.path} is damaged: {place.file} is missing, which holds {name!r}") from None
        if found.nbytes < place.start + place.nbytes:
            raise ValueError(f"{where} is damaged: it ends before {name!r}, which {_METADATA_FILE} says that it holds")
        return found

    def _archive(self, place: ChunkPlace, name: str) -> Archive:
        where = f"{os.path.join(self.path, place.file)}, at {name!r},"
        with self._file(place, name).opened() as descriptor:
            return Archive(descriptor, place.start, place.nbytes, where)

    def _strings(self, place: ChunkPlace | None) -> Mapping[str, str]:
        return strings_in(self._archive(place, METADATA).value) if place else {}

    def _region(self, name: str, box: Box, place: ChunkPlace) -> Region:
        found = self._regions.get(place)
        if found is None:
            archive = self._archive(place, name)
            view, dtype = archive.value, self._tensors[name].dtype
            if not isinstance(view, StridedView) or (view.dtype, view.sizes) != (dtype, box.sizes):
                got = f"{view.dtype} {view.sizes}" if isinstance(view, StridedView) else type(view).__name__
                raise ValueError(
                    f"{os.path.join(self.path, place.file)} is damaged: for {name!r} it must have a chunk of {dtype} "
                    f"{box.sizes}, got {got}"
                )
            read_at = partial(self._read_at, place, name)
            found = self._regions[place] = region_of(view, archive, read_at, f"{self.path}: {name!r}")
        return found

    def _read_at(self, place: ChunkPlace, name: str, offset: int, into: memoryview) -> None:
        if not self._files[place.file].read_fully(offset, into):
            raise ValueError(f"{os.path.join(self.path, place.file)} is damaged: bytes of {name!r} are missing")

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        tensor, itemsize = self._tensors[name], ITEMSIZES[self.specs[name].dtype]
        wanted = range(start // itemsize, (start + len(into)) // itemsize)
        if len(tensor.chunks) == 1:  # a whole tensor
            self._region(name, *tensor.chunks[0]).read_run(wanted.start, wanted.stop, into)
            return
        missing = len(wanted)
        for part in boxes_of_run(tensor.sizes, wanted.start, wanted.stop):
            strides = row_major(part.sizes)
            for box, place in tensor.chunks:
                shared = part.overlap(box)
                if shared is None:
                    continue
                ours, theirs = shared
                at = part.start + sum(cut.start * stride for cut, stride in zip(ours, strides, strict=True))
                sizes = [cut.stop - cut.start for cut in theirs]
                offsets = [cut.start for cut in theirs]
                self._region(name, box, place).read_box(offsets, sizes, into[at * itemsize :], strides)
                missing -= Box(tuple(offsets), tuple(sizes), 0, ()).numel
        if missing:
            raise ValueError(f"{self.path} is damaged: the chunks of {name!r} do not cover it once")

    def require_unchanged(self) -> None:
        for file in self._files.values():
            file.require_unchanged()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


# Reading `.metadata`


def _read_metadata(
    where: str, allow: Sequence[str]
) -> tuple[dict[str, Any], dict[tuple[str, tuple[int, ...]], ChunkPlace]]:
    """Return the state, nested as it was saved, and where each entry of it is, by key and offsets.

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
        for key, entry in dict.items(value.get("state_dict_metadata")):
            path = tuple(map(str, dict(paths).get(key, (key,)) if isinstance(paths, dict) else (key,)))
            inner = state
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = _tensor(key, entry, places)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged: it does not describe a checkpoint ({error})") from None
    return state, places


def _index(index: Opaque) -> tuple[str, tuple[int, ...]]:
    return index.get("fqn"), tuple(index.get("offset") or ())


def _place(info: Opaque) -> ChunkPlace:
    file, start, nbytes = info.get("relative_path"), info.get("offset"), info.get("length")
    parts = PurePosixPath(file).parts
    if not parts or file.startswith("/") or ".." in parts or "\0" in file:
        raise ValueError(f"it must name files in its own folder, got {file!r}: do not use it")
    if type(start) is not int or type(nbytes) is not int or start < 0 or nbytes < 0:
        raise ValueError(f"an entry in {file} has offset {start!r} and length {nbytes!r}")
    if info.get("transform_descriptors"):
        raise ValueError(f"an entry in {file} is transformed by {info.get('transform_descriptors')!r}: save it without")
    return ChunkPlace(file, start, nbytes)


def _tensor(key: str, entry: Any, places: Mapping[tuple[str, tuple[int, ...]], ChunkPlace]) -> Any:
    """Return a tensor, or the entry itself if it is none."""
    if not entry.global_name.endswith(".TensorStorageMetadata"):
        return entry
    properties, sizes = entry.get("properties").state, entry.get("size")
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    chunks: dict[Box, ChunkPlace] = {}
    for chunk in entry.get("chunks"):
        offsets, extents = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
        if not len(offsets) == len(extents) == len(sizes) or any(
            offset < 0 or extent < 0 or offset + extent > size
            for offset, extent, size in zip(offsets, extents, sizes, strict=True)
        ):
            raise ValueError(f"a chunk of {key!r} at {offsets} of {extents} is not in {sizes}")
        chunks[Box(offsets, extents, 0, tuple(range(len(sizes))))] = places[key, offsets]
    whole = Box((0,) * len(sizes), tuple(sizes), 0, ())
    if sum(box.numel for box in chunks) != whole.numel:
        raise ValueError(f"the chunks of {key!r} do not cover it once")
    return ChunkedTensor(dtype.global_name.removeprefix("torch."), tuple(sizes), tuple(chunks.items()))


# Writing


class DistributedOutput:
    """A folder of DCP that is being written, with one chunk for each tensor: an ``Output``.

    ``dcp.load(model.state_dict(), checkpoint_id=path)`` loads it on any number of ranks. The metadata is under the key
    ``swafast_metadata``.
    """

    def __init__(self, path: str | os.PathLike[str], plan: OutputPlan, *, new: bool = False) -> None:
        """Make the files, beside the folder's place; with ``new``, keep what appears there meanwhile."""
        self._plan = plan
        self._layouts: dict[str, tuple[ArchiveLayout, PartialChecksum]] = {}
        at = 0
        for spec in plan.specs:
            data = pickled(view_to_pickle("0", spec.dtype, spec.shape))
            layout = ArchiveLayout(data, [spec.nbytes], at)
            self._layouts[spec.name] = layout, PartialChecksum()
            at = layout.end + -layout.end % _ALIGNMENT
        self._strings = ArchiveLayout(pickled(dict(plan.metadata)), [], at) if plan.metadata else None
        self._stack = ExitStack()
        self._folder: Path = self._stack.enter_context(replacing_folder(path, new=new))
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(self._folder / _DATA_FILE, flags, 0o666)
        self._stack.callback(os.close, self._descriptor)

    def write(self, name: str, start: int, data: memoryview) -> None:
        layout, checksum = self._layouts[name]
        write_fully(self._descriptor, layout.offsets[0] + start, data)
        checksum.add(start, data)

    def commit(self) -> None:
        for spec in self._plan.specs:
            layout, checksum = self._layouts[spec.name]
            layout.finish(self._descriptor, [checksum.value(spec.nbytes)])
        if self._strings is not None:
            self._strings.finish(self._descriptor, [])
        (self._folder / _METADATA_FILE).write_bytes(pickled(self._metadata_call()))
        write_record(self._folder, self._plan)
        self._stack.close()

    def discard(self) -> None:
        give_up(self._stack)

    def _metadata_call(self) -> Call:
        stored = {spec.name: spec for spec in self._plan.specs}
        tensors = {**{name: name for name in stored}, **self._plan.aliases}
        entries: dict[str, Call] = {key: _tensor_call(stored[name]) for key, name in tensors.items()}
        places = {
            _index_call(key, stored[name].shape): _place_call(self._layouts[name][0]) for key, name in tensors.items()
        }
        if self._strings is not None:
            entries[METADATA] = _described("BytesStorageMetadata", {})
            places[_index_call(METADATA, None)] = _place_call(self._strings)
        paths = {key: (key,) for key in entries}
        return _described("Metadata", {"state_dict_metadata": entries, "planner_data": paths, "storage_data": places})


def _described(name: str, state: Any) -> Call:
    return Call(("torch.distributed.checkpoint.metadata", name), state=state)


def _size_call(sizes: Sequence[int]) -> Call:
    return Call(("torch", "Size"), (tuple(sizes),))


def _tensor_call(spec: TensorSpec) -> Call:
    layout = Call(names.LAYOUT, (names.STRIDED,))
    row_major_format = Call(names.MEMORY_FORMAT, (0,))
    properties = (Call(("torch", TORCH_NAMES[spec.dtype])), layout, False, row_major_format, False)
    chunk = {"offsets": _size_call((0,) * len(spec.shape)), "sizes": _size_call(spec.shape)}
    return _described(
        "TensorStorageMetadata",
        {
            "properties": _described("TensorProperties", properties),
            "size": _size_call(spec.shape),
            "chunks": [_described("ChunkStorageMetadata", chunk)],
        },
    )


def _index_call(key: str, shape: Sequence[int] | None) -> Call:
    offset = None if shape is None else _size_call((0,) * len(shape))
    return _described("MetadataIndex", {"fqn": key, "index": None if shape is None else 0, "offset": offset})


def _place_call(layout: ArchiveLayout) -> Call:
    state = {"relative_path": _DATA_FILE, "offset": layout.start, "length": layout.end - layout.start}
    return Call(names.STORAGE_INFO, state=state)
