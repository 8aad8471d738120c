"""Files of ``torch.save``, read and written without torch: ``.pt``, ``.pth``, ``.bin``, ``.ckpt``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from ..strict.pickles import DTYPES, StridedView
from ..terms.replacing import replacing
from ..torch_private.pickled import MODULE_VERSIONS
from .archives import Archive, ArchiveLayout, PartialChecksum
from .checkpoints import ITEMSIZES, RECORD, Checkpoint, OutputPlan, TensorSpec
from .descriptors import InputFile, give_up, write_fully
from .entries import chosen_entries, chosen_tensors
from .strided import ReadAt, Region, extent_of
from .written_pickles import Call, pickled, view_to_pickle

#: The attribute of a state dict in which an output keeps the metadata of safetensors.
METADATA = "swafast_metadata"
#: How files of ``torch.save`` begin today, and what is near the beginning of those before torch 1.6.
_ZIP, _LEGACY = b"PK\3\4", bytes.fromhex("8a0a6cfc9c46f9206aa85019")


class TorchCheckpoint:
    """A file of ``torch.save`` that is open for reading: a ``Checkpoint``.

    Attributes:
        notes: lines for the user: which part of the file was chosen, and what was left out.
        module_versions: the version of each module, which a state dict of torch has beside its tensors.
    """

    def __init__(
        self, path: str, *, key: str | None = None, strip: str | None = None, allow: Sequence[str] = ()
    ) -> None:
        """Open the file and read what it says of its tensors.

        Raises:
            ValueError: the file is damaged or of another format; it names globals that are not allowed; or it holds no
                dense tensors under ``key``.
            OSError: it cannot be read.
        """
        self.path = path
        self._file, archive = open_archive(path, allow)
        try:
            self.metadata: Mapping[str, str] = strings_in(getattr(archive.value, METADATA, None))
            entries, self.key, self.notes = chosen_entries(archive.value, path, key, StridedView)
            self.module_versions = _versions_in(entries, strip)
            views = chosen_tensors(entries, path, strip, StridedView, self.notes)
            self.specs: dict[str, TensorSpec] = {}
            self.aliases: dict[str, str] = {}
            self._regions: dict[str, Region] = {}
            first: dict[StridedView, str] = {}
            for name, view in views.items():
                if first.setdefault(view, name) != name:
                    self.aliases[name] = first[view]
                else:
                    self.specs[name] = spec_of(name, view.dtype, view.sizes, path)
                    self._regions[name] = region_of(view, archive, partial(self._read_at, name), f"{path}: {name!r}")
        except BaseException:
            self.close()
            raise

    def _read_at(self, name: str, offset: int, into: memoryview) -> None:
        if not self._file.read_fully(offset, into):
            raise ValueError(f"{self.path} is damaged: bytes of {name!r} are missing at its end")

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        itemsize = ITEMSIZES[self.specs[name].dtype]
        self._regions[name].read_run(start // itemsize, (start + len(into)) // itemsize, into)

    def require_unchanged(self) -> None:
        self._file.require_unchanged()

    def close(self) -> None:
        self._file.close()


def open_archive(path: str, allow: Sequence[str]) -> tuple[InputFile, Archive]:
    """Open a file of ``torch.save``. Return the file, and what it says of itself.

    Raises:
        ValueError, OSError: as a ``TorchCheckpoint``.
    """
    file = InputFile(path)
    try:
        with file.opened() as descriptor:
            _require_zip(descriptor, path)
            return file, Archive(descriptor, 0, file.nbytes, path, allow)
    except BaseException:
        file.close()
        raise


def _require_zip(descriptor: int, path: str) -> None:
    begin = os.pread(descriptor, 32, 0)
    if begin.startswith(_ZIP):
        return
    if _LEGACY in begin:
        raise ValueError(
            f"{path} must be a file of torch 1.6 or later, got an older one: save it anew, with "
            "torch.save(torch.load(path, weights_only=True), path)"
        )
    raise ValueError(f"{path} must be a file of torch.save, got one that begins with {begin[:4]!r}")


def spec_of(name: str, dtype: str, sizes: tuple[int, ...], path: str) -> TensorSpec:
    """Return what a checkpoint says of a tensor.

    Raises:
        ValueError: safetensors has no such dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"{path} must hold tensors of dtypes that safetensors has, got {dtype} for {name!r}")
    return TensorSpec(name, DTYPES[dtype], sizes)


def region_of(view: StridedView, archive: Archive, read_at: ReadAt, what: str) -> Region:
    """Return where a tensor's elements lie in the file.

    Raises:
        ValueError: not all of them are in its storage.
    """
    return Region(read_at, offset_of(view, archive, what), ITEMSIZES[DTYPES[view.dtype]], view.sizes, view.strides)


def offset_of(view: StridedView, archive: Archive, what: str) -> int:
    """Return the offset in the file of a tensor's first byte.

    Raises:
        ValueError: not all of its elements are in its storage.
    """
    offset, nbytes = archive.storages.get(view.storage, (0, -1))
    itemsize = ITEMSIZES[DTYPES[view.dtype]]
    if (view.offset + extent_of(view.sizes, view.strides)) * itemsize > nbytes:
        raise ValueError(f"{what} is damaged: its storage has {max(nbytes, 0)} bytes, which are fewer than it needs")
    return offset + view.offset * itemsize


def strings_in(value: Any) -> dict[str, str]:
    """Return the strings in an output's metadata."""
    texts = dict.items(value) if isinstance(value, dict) else ()
    return {key: text for key, text in texts if isinstance(key, str) and isinstance(text, str)}


def _versions_in(state: dict[Any, Any], strip: str | None) -> dict[str, dict[str, int]]:
    """Return the version of each module, by the name of the module after ``strip``."""
    found = vars(state).get(MODULE_VERSIONS) if hasattr(state, "__dict__") else None
    prefix = (strip or "").removesuffix(".")
    return {
        name.removeprefix(prefix).removeprefix("."): {"version": versions["version"]}
        for name, versions in (dict.items(found) if isinstance(found, dict) else ())
        if isinstance(name, str) and isinstance(versions, dict) and type(versions.get("version")) is int
        if (f"{name}.").startswith(f"{prefix}." if prefix else "")
    }


class TorchOutput:
    """A file of ``torch.save`` that is being written, a state dict of tensors: an ``Output``.

    A load with ``torch.load(path, weights_only=True)`` works, mapped too. The metadata is in the state dict's attribute
    ``swafast_metadata``.
    """

    def __init__(
        self, path: str | os.PathLike[str], plan: OutputPlan, like: Checkpoint | None = None, *, new: bool = False
    ) -> None:
        """Make the file, beside its place.

        Args:
            path: of the file.
            plan: what to write.
            like: the input of which the modules' versions are kept.
            new: keep what appears at ``path`` meanwhile.
        """
        places = {spec.name: index for index, spec in enumerate(plan.specs)}
        views = {spec.name: view_to_pickle(str(places[spec.name]), spec.dtype, spec.shape) for spec in plan.specs}
        views |= {alias: views[name] for alias, name in plan.aliases.items()}
        state: dict[str, Any] = {METADATA: dict(plan.metadata)} if plan.metadata else {}
        versions = getattr(like, "module_versions", None)
        if versions:
            state[MODULE_VERSIONS] = versions
        data = pickled(Call(("collections", "OrderedDict"), (), views, state or None))
        folder = RECORD if RECORD in plan.metadata else None
        self._layout = ArchiveLayout(data, [spec.nbytes for spec in plan.specs], folder=folder)
        self._places = {
            spec.name: (offset, PartialChecksum())
            for spec, offset in zip(plan.specs, self._layout.offsets, strict=True)
        }
        self._nbytes = {spec.name: spec.nbytes for spec in plan.specs}
        self._stack = ExitStack()
        unfinished = self._stack.enter_context(replacing(path, new=new))
        self._descriptor = os.open(unfinished, os.O_WRONLY | os.O_CLOEXEC)
        self._stack.callback(os.close, self._descriptor)

    def write(self, name: str, start: int, data: memoryview) -> None:
        offset, checksum = self._places[name]
        write_fully(self._descriptor, offset + start, data)
        checksum.add(start, data)

    def commit(self) -> None:
        checksums = [checksum.value(self._nbytes[name]) for name, (_, checksum) in self._places.items()]
        self._layout.finish(self._descriptor, checksums)
        self._stack.close()

    def discard(self) -> None:
        give_up(self._stack)
