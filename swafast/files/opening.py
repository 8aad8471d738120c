"""Which form a checkpoint has, by its path: what opens it, and what writes it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .candidates import may_be_whole
from .checkpoints import Checkpoint, Output, OutputPlan, TensorSpec
from .distributed_files import DistributedCheckpoint, DistributedOutput
from .entries import no_prefix
from .safetensors_files import INDEX_SUFFIX, STEMS, SafetensorsOutput, open_safetensors, weights_in
from .torch_files import TorchCheckpoint, TorchOutput

#: Of files that `torch.save` writes.
PICKLED_SUFFIXES = (".pt", ".pth", ".pth.tar", ".bin", ".ckpt")

#: In a folder of `torch.distributed.checkpoint`.
_DISTRIBUTED, _DISTRIBUTED_SUFFIX = ".metadata", ".distcp"

#: As in transformers.
SHARD_NBYTES = 5 * 10**9


def open_checkpoint(path: str, *, key: str | None, strip: str | None, allow: Sequence[str]) -> Checkpoint:
    """Open a checkpoint for reading.

    Args:
        path: a safetensors file, an index of such files, a file of ``torch.save``, or a folder with one of these or of
            ``torch.distributed.checkpoint``.
        key: where the state is in what ``torch.save`` or ``torch.distributed.checkpoint`` has written, as in ``a.b``.
        strip: a prefix that names lose.
        allow: globals that a file of ``torch.save`` may load, as ``module.name``.

    Raises:
        ValueError: it is damaged, or has no form that is known.
        OSError: it cannot be read.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist")
    form = _form_of(Path(path))
    if form == "distributed":
        return DistributedCheckpoint(path, key=key, strip=strip, allow=allow)
    if form == "pickled":
        return TorchCheckpoint(_pickled_in(path), key=key, strip=strip, allow=allow)
    opened = open_safetensors(path)
    return opened if strip is None else StrippedCheckpoint(opened, strip)


def _form_of(path: Path) -> str:
    name = path.name.lower()
    if path.is_dir():
        names = os.listdir(path)
        if any(name == _DISTRIBUTED or name.endswith(_DISTRIBUTED_SUFFIX) for name in names):
            return "distributed"
        is_safetensors = any(name.endswith((".safetensors", INDEX_SUFFIX)) for name in names)
        return "pickled" if not is_safetensors and any(map(_is_pickled, names)) else "safetensors"
    if _is_pickled(name):
        return "pickled"
    if name.endswith((".safetensors", INDEX_SUFFIX)):
        return "safetensors"
    if name.endswith(".index.json"):
        raise ValueError(f"{path} is an index of pickled files: save the model as safetensors first, and average that")
    raise ValueError(
        f"{path} must end in .safetensors, {INDEX_SUFFIX}, {', '.join(PICKLED_SUFFIXES)}, or be a folder of checkpoints"
    )


def _is_pickled(name: str) -> bool:
    return name.lower().endswith(PICKLED_SUFFIXES)


def _pickled_in(path: str) -> str:
    """Return the path of a file of ``torch.save``, or of the one that is in a folder."""
    if not os.path.isdir(path):
        return path
    held = sorted(filter(_is_pickled, os.listdir(path)))
    names = [name for name in held if may_be_whole(name)]
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        if name in names:
            return os.path.join(path, name)
    if len(names) != 1:
        raise ValueError(f"{path} must hold one file with all weights, got {', '.join(held[:3])}: name the file")
    return os.path.join(path, names[0])


class StrippedCheckpoint:
    """A checkpoint whose names have lost a prefix: a ``Checkpoint``."""

    def __init__(self, opened: Checkpoint, prefix: str) -> None:
        self.path, self._opened = opened.path, opened
        has_prefix = any(name.startswith(prefix) for name in opened.specs)
        self.notes = [] if has_prefix else [no_prefix(opened.path, prefix)]
        self.metadata: Mapping[str, str] = opened.metadata
        self._names = {name.removeprefix(prefix): name for name in opened.specs}
        if len(self._names) != len(opened.specs):
            kept = set(self._names.values())
            name = next(name for name in opened.specs if name not in kept)
            raise ValueError(
                f"strip must leave names apart, and {opened.path} has {name!r} with {prefix!r} and without"
            )
        self.specs: Mapping[str, TensorSpec] = {
            new: TensorSpec(new, opened.specs[old].dtype, opened.specs[old].shape) for new, old in self._names.items()
        }
        self.aliases: Mapping[str, str] = {
            new.removeprefix(prefix): old.removeprefix(prefix) for new, old in opened.aliases.items()
        }

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        self._opened.read_into(self._names[name], start, into)

    def require_unchanged(self) -> None:
        self._opened.require_unchanged()

    def close(self) -> None:
        self._opened.close()


def create_output(
    path: str,
    plan: OutputPlan,
    *,
    form: str,
    shard_nbytes: int | None,
    copied: Sequence[Path],
    texts: Mapping[str, str],
    like: Checkpoint,
    last: str,
    new: bool,
) -> Output:
    """Begin an output beside its place.

    Args:
        path: where it will stand.
        plan: what it will hold.
        form: what :func:`output_form` has returned.
        shard_nbytes: of each file in a folder, at most. None: 5 GB.
        copied: small files that go into a folder of safetensors too.
        texts: what is in some of these there, by name.
        like: the first input.
        last: the path of the last input, after which the files in a folder are named.
        new: keep what appears at ``path`` meanwhile.
    """
    if form == "distributed":
        return DistributedOutput(path, plan, like, new=new)
    if form == "pickled":
        return TorchOutput(path, plan, like, new=new)
    if form == "file":
        return SafetensorsOutput(path, plan, new=new)
    stem = _stem(last)
    return SafetensorsOutput(path, plan, shard_nbytes or SHARD_NBYTES, copied, texts, stem=stem, new=new)


def _stem(path: str) -> str:
    """Return what the names of a folder's files begin with, after an input: what its loader looks for."""
    form = _form_of(Path(path))
    if form == "distributed":
        return STEMS[0]
    if form == "safetensors" and os.path.isdir(path):
        path = os.fspath(weights_in(Path(path)))
    name = os.path.basename(_pickled_in(path) if form == "pickled" else path)
    return next((stem for stem in STEMS if re.match(rf"{stem}[-.]", name)), STEMS[0])


def output_form(path: str, shard_nbytes: int | None, first_input: str) -> str:
    """Return ``"file"`` or ``"folder"`` of safetensors, ``"pickled"`` or ``"distributed"``, by the path of an output.

    A folder is one of ``torch.distributed.checkpoint`` if the first input is, and no size of files is asked for.

    Raises:
        ValueError: the path has a suffix that no output has.
    """
    name = Path(path).name.lower()
    if name.endswith(".safetensors") or _is_pickled(name):
        if shard_nbytes is not None:
            raise ValueError(f"shard_size is for an output that is a folder, got {path!r}")
        return "pickled" if _is_pickled(name) else "file"
    if name.endswith((".json", ".safetensor", ".st", ".gguf", ".onnx", ".h5", ".npz", ".tar", ".zip")):
        raise ValueError(f"out must end in .safetensors or {', '.join(PICKLED_SUFFIXES)}, or be a folder, got {path!r}")
    is_distributed = shard_nbytes is None and _form_of(Path(first_input)) == "distributed"
    return "distributed" if is_distributed else "folder"
