"""Checkpoints in safetensors: one file, or a folder of files with an index, as Hugging Face writes them."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from ..terms.misfits import few
from ..terms.replacing import replacing, replacing_folder
from .checkpoints import OutputPlan, TensorSpec, write_record
from .descriptors import InputFile, give_up, open_regular, write_fully
from .headers import MOST_HEADER_NBYTES, MOST_TENSORS, Scanner, header_bytes, read_header

INDEX_SUFFIX = ".safetensors.index.json"
#: The stem of one of several files of a checkpoint, with its own stem and their number.
OF_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})")
#: The names of the weights in a folder, of which a folder has one: those of transformers, diffusers and peft.
STEMS = ("model", "diffusion_pytorch_model", "adapter_model")


class SafetensorsCheckpoint:
    """One safetensors file, or the files of one index, open for reading: a ``Checkpoint``."""

    def __init__(self, path: str, files: Mapping[str, Path], placed: Mapping[str, str] | None = None) -> None:
        """Read the headers.

        Args:
            path: as the user wrote it.
            files: the path of each file, by its name in the index.
            placed: for each tensor, the name of the file that has it, as the index says.
        """
        self.path = path
        self.aliases: Mapping[str, str] = {}
        self._shards: dict[str, _Shard] = {}
        try:
            missing = [name for name, file in files.items() if not file.exists()]
            if missing and placed is not None:
                raise FileNotFoundError(
                    f"{path}: the index names files that do not exist: {few(missing)}. Copy them there"
                )
            for name, file in files.items():
                self._shards[name] = _Shard(file)
            self.specs: Mapping[str, TensorSpec] = self._placed(placed)
        except BaseException:
            self.close()
            raise
        self.metadata: Mapping[str, str] = next((each.header.metadata for each in self._shards.values()), {})

    def _placed(self, placed: Mapping[str, str] | None) -> dict[str, TensorSpec]:
        """Return the tensors of all files, each of which must be where the index says."""
        specs: dict[str, TensorSpec] = {}
        self._places: dict[str, _Shard] = {}
        for name, shard in self._shards.items():
            for tensor, spec in shard.header.specs.items():
                if placed is not None and placed.get(tensor) != name:
                    where = f"says that {placed[tensor]} has it" if tensor in placed else "does not name it"
                    raise ValueError(f"{self.path}: the file {name} has the tensor {tensor!r}, and the index {where}")
                specs[tensor] = spec
                self._places[tensor] = shard
        for tensor, name in (placed or {}).items():
            if tensor not in specs:
                raise ValueError(f"{self.path}: the index says that {name} has the tensor {tensor!r}, and it has not")
        return specs

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        shard = self._places[name]
        if not shard.file.read_fully(shard.header.offsets[name] + start, into):
            raise ValueError(f"{shard.file.path} is cut short: bytes of the tensor {name!r} are missing")

    def require_unchanged(self) -> None:
        for shard in self._shards.values():
            shard.file.require_unchanged()

    def close(self) -> None:
        for shard in self._shards.values():
            shard.file.close()


class _Shard:
    """One safetensors file, with its header."""

    def __init__(self, path: Path) -> None:
        self.file = InputFile(path)
        try:
            with self.file.opened() as descriptor:
                self.header = read_header(descriptor, str(path))
        except BaseException:
            self.file.close()
            raise


def open_safetensors(path: str) -> SafetensorsCheckpoint:
    """Open a file, an index, or a folder that has one of them.

    Raises:
        ValueError: a file is damaged, the index and its files disagree, or the folder holds no weights or several.
        OSError: a file cannot be read.
    """
    chosen = weights_in(Path(path)) if os.path.isdir(path) else Path(path)
    if not chosen.name.endswith(INDEX_SUFFIX):
        return SafetensorsCheckpoint(path, {chosen.name: chosen})
    placed = read_index(chosen)
    return SafetensorsCheckpoint(path, {name: chosen.parent / name for name in dict.fromkeys(placed.values())}, placed)


def weights_in(folder: Path) -> Path:
    """Return the file or the index of the weights in a folder."""
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    for stem in STEMS:
        own = [name for name in (f"{stem}{INDEX_SUFFIX}", f"{stem}.safetensors") if name in names]
        if len(own) > 1:  # one of them is left over, and transformers would take the other one
            raise ValueError(f"{folder} must hold {own[0]} or {own[1]}, got both: name the file")
        if own:
            return folder / own[0]
    found = sorted(name for name in names if name.endswith(INDEX_SUFFIX))
    found = found or sorted(name for name in names if name.endswith(".safetensors"))
    if len(found) != 1:
        listed = ", ".join(found[:3]) or "none"
        raise ValueError(f"{folder} must hold one *.safetensors or one *{INDEX_SUFFIX}, got {listed}: name the file")
    shard = OF_SHARD.fullmatch(found[0].removesuffix(".safetensors"))
    if shard is not None and int(shard[2]) > 1:
        raise ValueError(f"{folder} must hold all files of a checkpoint and its index, got {found[0]} without an index")
    return folder / found[0]


def read_index(path: Path) -> dict[str, str]:
    """Return the name of the file that has the tensor, for each tensor of an index.

    Raises:
        ValueError: it is no index, or names files outside of its folder.
        OSError: it cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        text = file.read(MOST_HEADER_NBYTES + 1)
    try:
        if len(text) > MOST_HEADER_NBYTES:
            raise ValueError(f"it has more than {MOST_HEADER_NBYTES:,} bytes")
        placed = _weight_map(Scanner(text))
    except ValueError as error:
        raise ValueError(f"{path} is not an index of safetensors files: {error}") from None
    for name in dict.fromkeys(placed.values()):
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            raise ValueError(f"{path} must name files in its own folder, got {name!r}: do not use this index")
    return placed


def _weight_map(scanner: Scanner) -> dict[str, str]:
    placed: dict[str, str] = {}
    names: dict[str, str] = {}  # each once in memory
    for key in scanner.keys("it"):
        if key != "weight_map":
            scanner.skip(f"its entry {key[:100]!r}")
            continue
        for tensor in scanner.keys("its weight_map, which must give each tensor's file,"):
            if tensor in placed:
                raise ValueError(f"the key {tensor[:100]!r} stands twice")
            name = scanner.string()
            placed[tensor] = names.setdefault(name, name)
            if len(placed) > MOST_TENSORS:
                raise ValueError(f"it names more than {MOST_TENSORS:,} tensors")
    scanner.end()
    if not placed:
        raise ValueError("it has no weight_map of names")
    return placed


class SafetensorsOutput:
    """One safetensors file, or a folder of them, that is being written: an ``Output``."""

    def __init__(
        self,
        path: str,
        plan: OutputPlan,
        shard_nbytes: int | None = None,
        copied: Sequence[Path] = (),
        texts: Mapping[str, str] = MappingProxyType({}),
        *,
        stem: str = STEMS[0],
        new: bool = False,
    ) -> None:
        """Make the files, with their headers.

        Args:
            path: of the file, or of the folder if ``shard_nbytes`` is given.
            plan: what to write.
            shard_nbytes: how many bytes of tensors one file of the folder has at most, or else one tensor.
            copied: small files that go into the folder too.
            texts: what is in some of these there, by name.
            stem: what the names of the folder's files begin with.
            new: keep what appears at ``path`` meanwhile.
        """
        self._plan, self._stack = plan, ExitStack()
        replace = replacing if shard_nbytes is None else replacing_folder
        place = self._stack.enter_context(replace(path, new=new))
        self._folder = None if shard_nbytes is None else place
        self._files: dict[str, _Unfinished] = {}
        try:
            files: Mapping[Path, Sequence[TensorSpec]] = {place: plan.specs}
            if shard_nbytes is not None:
                files = _laid_out(place, plan.specs, shard_nbytes, stem)
                for file in copied:
                    shutil.copyfile(file, place / file.name)
                for name, text in texts.items():
                    (place / name).write_text(text, encoding="utf-8")
            for file, specs in files.items():
                made = _Unfinished(file, specs, plan.metadata)
                self._stack.callback(made.close)
                self._files |= dict.fromkeys((spec.name for spec in specs), made)
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, start: int, data: memoryview) -> None:
        self._files[name].write(name, start, data)

    def commit(self) -> None:
        if self._folder is not None:
            write_record(self._folder, self._plan)
        self._stack.close()

    def discard(self) -> None:
        give_up(self._stack)


class _Unfinished:
    """One safetensors file that is being written. It is open from its first write until its last byte is there."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        self._path = path
        head, self._offsets = header_bytes(specs, metadata)
        self._missing = sum(spec.nbytes for spec in specs)
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        with open(path, "wb") as file:
            file.write(head)
            file.truncate(len(head) + self._missing)

    def write(self, name: str, start: int, data: memoryview) -> None:
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        write_fully(self._descriptor, self._offsets[name] + start, data)
        with self._lock:
            self._missing -= len(data)
            if self._missing == 0:
                self.close()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _laid_out(
    folder: Path, specs: Sequence[TensorSpec], shard_nbytes: int, stem: str
) -> Mapping[Path, Sequence[TensorSpec]]:
    """Return the tensors of each file in a folder, in order; write the index if there are several files."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_nbytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        return {folder / f"{stem}.safetensors": shards[0]}
    files = {
        folder / f"{stem}-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)
    }
    weight_map = {spec.name: file.name for file, shard in files.items() for spec in shard}
    total = sum(spec.nbytes for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files
