"""Folders of ``torch.distributed.checkpoint`` (DCP), read and written without torch and without a process group.

A folder has ``.metadata``, a pickle that lists the chunks of each tensor, and files with one archive of ``torch.save``
for each chunk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ..strict.distributed_metadata import METADATA_FILE, ChunkedTensor, ChunkPlace, read_listing
from ..strict.pickles import StridedView
from ..terms.boxes import Box, boxes_of_run
from ..terms.replacing import replacing_folder
from ..torch_private import pickled as names
from .archives import Archive, ArchiveLayout, PartialChecksum
from .checkpoints import ITEMSIZES, Checkpoint, OutputPlan, TensorSpec, write_record
from .descriptors import InputFile, give_up, write_fully
from .entries import chosen_entries, chosen_tensors
from .strided import Region, row_major
from .torch_files import METADATA, region_of, spec_of, strings_in
from .written_pickles import TORCH_NAMES, Call, pickled, view_to_pickle

#: The name of the file of rank 0, as DCP writes it.
_DATA_FILE = "__0_0.distcp"
#: Each archive begins at a multiple of it, so that its storages do too.
_ALIGNMENT = 64


class DistributedCheckpoint:
    """A folder of DCP that is open for reading: a ``Checkpoint``.

    Attributes:
        key: that of the part that was chosen, with dots between nested ones; "" of the whole.
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
            where = os.path.join(path, METADATA_FILE)
            listing = read_listing(where, allow)
            places = listing.places
            self.metadata = self._strings(places.get((METADATA, ())))
            state = {name: entry for name, entry in listing.state.items() if name != METADATA}
            entries, self.key, self.notes = chosen_entries(state, path, key, ChunkedTensor)
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
            raise ValueError(f"{where} is damaged: it ends before {name!r}, which {METADATA_FILE} says that it holds")
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


# Writing


class DistributedOutput:
    """A folder of DCP that is being written, with one chunk for each tensor: an ``Output``.

    ``dcp.load(model.state_dict(), checkpoint_id=path)`` loads it on any number of ranks. If the input that it is like
    has the state under a key, as ``{"model": model.state_dict()}``, the output has it there too. The metadata is under
    the key ``swafast_metadata``.
    """

    def __init__(
        self, path: str | os.PathLike[str], plan: OutputPlan, like: Checkpoint | None = None, *, new: bool = False
    ) -> None:
        """Make the files, beside the folder's place; with ``new``, keep what appears there meanwhile."""
        self._plan = plan
        self._outer: tuple[str, ...] = tuple(filter(None, getattr(like, "key", "").split(".")))
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
        (self._folder / METADATA_FILE).write_bytes(pickled(self._metadata_call()))
        write_record(self._folder, self._plan)
        self._stack.close()

    def discard(self) -> None:
        give_up(self._stack)

    def _metadata_call(self) -> Call:
        stored = {spec.name: spec for spec in self._plan.specs}
        named = {**{name: name for name in stored}, **self._plan.aliases}
        paths = {".".join((*self._outer, name)): (*self._outer, name) for name in named}
        tensors = dict(zip(paths, named.values(), strict=True))
        entries: dict[str, Call] = {key: _tensor_call(stored[name]) for key, name in tensors.items()}
        places = {
            _index_call(key, stored[name].shape): _place_call(self._layouts[name][0]) for key, name in tensors.items()
        }
        if self._strings is not None:
            entries[METADATA] = _described("BytesStorageMetadata", {})
            places[_index_call(METADATA, None)] = _place_call(self._strings)
            paths[METADATA] = (METADATA,)
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
