"""`save` and `load`: the state of an averaged model in one safetensors file, with a checksum for each tensor."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..average.averaged_model import FusedAveragedModel
from ..average.fused_averages import FusedAverages
from ..op.checks import check_plain
from ..op.checksum import checksum
from ..terms.copying import describe_kind, is_plain
from ..terms.formats import dtype_named
from ..terms.replacing import replacing
from ..torch_private.modules import metadata_of, set_metadata

_VERSION = 1

#: What a description holds beside the version.
_KINDS: dict[str, tuple[type, ...]] = {
    "averages": (list, type(None)),
    "versions": (dict, type(None)),
    **dict.fromkeys(("tensors", "tied", "extra"), (dict,)),
}

#: Dtypes that every release of safetensors has. Others are stored as their bytes.
_COMMON = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def save(averaged: FusedAveragedModel | FusedAverages, path: str | os.PathLike[str]) -> None:
    """Write the state of an averaged model into one safetensors file, with checksums that :func:`load` verifies.

    The file is written beside ``path``, synced and then renamed, so a kill leaves the whole old file or the whole new
    one. Tensors have the keys of ``averaged.state_dict()``; of tied ones the first is stored. A state holds no rule.

    Raises:
        TypeError: ``averaged`` is neither of these classes, or ``path`` no path; or a module's extra state is neither a
            tensor nor JSON.
        ValueError: a tensor of the state has no values in memory, for instance on the meta device.
        RuntimeError: the averages are swapped into a model.
        OSError: the file cannot be written. The old one is whole.
    """
    _check_averaged(averaged)
    _check_path(path)
    with averaged._guard.hold("save"):
        write_state(averaged.state_dict(keep_vars=True), _names_of(averaged), path)


def load(averaged: FusedAveragedModel | FusedAverages, path: str | os.PathLike[str]) -> None:
    """Load a file of :func:`save`, after its header, its metadata and all its values are verified.

    The averages may have another format, which converts them, and another rule, which no state holds.

    Raises:
        TypeError: ``averaged`` is neither of these classes, or ``path`` no path.
        ValueError: the file is damaged, which the message locates; :func:`save` has not written it; or it holds
            another number of averages. Nothing has changed.
        RuntimeError: keys or shapes do not match, and nothing has changed; or the averages are swapped into a model.
        OSError: the file cannot be read.
    """
    _check_averaged(averaged)
    _check_path(path)
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"path must be that of a file, got {os.fspath(path)!r}, which is a device or a pipe")
    with open(path, "rb"):  # raises an error of its own for a file that may not be read
        names, state = read_state(os.fspath(path))
    own = _names_of(averaged)
    if names != own:
        spelled = "one average" if names is None else f"the averages {', '.join(map(repr, names))}"
        held = "one" if own is None else ", ".join(map(repr, own))
        raise ValueError(
            f"averaged must have what {os.fspath(path)} has, {spelled}, got {held}: load it into the class and the "
            "names that were saved"
        )
    averaged.load_state_dict(state)


def _check_averaged(averaged: object) -> None:
    if not isinstance(averaged, (FusedAveragedModel, FusedAverages)):
        sharded = ""
        if hasattr(averaged, "full_state_dict"):
            sharded = (
                ": save the state_dict() of a sharded average with torch.distributed.checkpoint, or load its "
                "full_state_dict() into a FusedAveragedModel and save that"
            )
        raise TypeError(
            f"averaged must be a FusedAveragedModel or FusedAverages, got {type(averaged).__name__}{sharded}"
        )


def _check_path(path: object) -> None:
    """Raise unless ``path`` may be that of a file.

    Raises:
        TypeError: it is no path. ValueError: it is empty, or not in UTF-8. IsADirectoryError: it is a folder.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"path must be a str or an os.PathLike of one, got {type(path).__name__}")
    if not text:
        raise ValueError("path must not be empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"path must be in UTF-8, got {text!r}") from None
    if os.path.isdir(text) or text.endswith(os.sep):
        raise IsADirectoryError(f"path must be that of a file, got the folder {text!r}: add a file's name")


def _names_of(averaged: FusedAveragedModel | FusedAverages) -> list[str] | None:
    return sorted(averaged) if isinstance(averaged, FusedAverages) else None


# Writing


def write_state(
    state: Mapping[str, Any], names: list[str] | None, path: str | os.PathLike[str], *, new: bool = False
) -> None:
    """Write a state as :func:`save` does.

    Args:
        state: of one average, or of several.
        names: those of several averages. None: it is of one.
        path: of the file.
        new: keep what appears there meanwhile.

    Raises:
        TypeError, ValueError, OSError: as :func:`save`.
    """
    tensors, described = _described(state, names)
    text = json.dumps(described)
    with replacing(path, new=new) as unfinished, _as_os_error(path):
        save_file(tensors, unfinished, {"format": "pt", "swafast": text, "sha256": _digest(text)})


def _described(state: Mapping[str, Any], names: list[str] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors as they are stored, by key, and the description of them and of all else in the state."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {
        **{"version": _VERSION, "averages": names, "tensors": {}, "tied": {}, "extra": {}},
        "versions": _as_json("the metadata of its state", metadata_of(state)),
    }
    first_keys: dict[int, str] = {}
    memories: set[int] = set()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            described["extra"][key] = _as_json(f"the extra state {key!r}", value)
        elif first_keys.setdefault(id(value), key) != key:
            described["tied"][key] = first_keys[id(value)]
        else:
            if not is_plain(value):
                raise ValueError(
                    f"averaged must have only dense tensors in its state, got for {key!r} {describe_kind(value)}: use "
                    "torch.save(averaged.state_dict(), ...) for others"
                )
            check_plain(f"{key!r} of the average", value)
            described["tensors"][key] = {
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": list(value.shape),
                "checksum": checksum(value),
            }
            stored = _as_stored(value)
            memory = stored.untyped_storage().data_ptr()
            # safetensors refuses tensors that share memory.
            tensors[key] = stored.clone() if memory in memories else stored
            memories.add(memory)
    return tensors, described


def _as_stored(value: Tensor) -> Tensor:
    """Return a tensor on the CPU, row-major and of a common dtype, as safetensors takes it."""
    value = value.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return value if value.dtype in _COMMON else value.reshape(-1).view(torch.uint8)


def _as_json(what: str, value: Any) -> Any:
    try:
        same = json.loads(json.dumps(value)) == value
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise TypeError(
            f"averaged must have only tensors and JSON (lists, dicts with strings for keys, strings, numbers, None) in "
            f"its state, got for {what}: {value!r}. Use torch.save(averaged.state_dict(), ...) for other objects"
        )
    return value


@contextmanager
def _as_os_error(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # such as ENOSPC
        given = (int(number[1]),) if number is not None else ()
        raise OSError(*given, f"{os.fspath(path)} could not be written: {error}") from error


# Reading


def read_state(path: str) -> tuple[list[str] | None, OrderedDict[str, Any]]:
    """Return what :func:`save` has written, verified: the names of several averages, or None, and the state.

    Raises:
        ValueError, OSError: as :func:`load`.
    """
    described, tensors = _read(path)
    state: OrderedDict[str, Any] = OrderedDict(tensors)
    for key, first in described["tied"].items():
        state[key] = tensors[first]
    state.update(described["extra"])
    set_metadata(state, described["versions"])
    return described["averages"], state


def _read(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description in a file and its tensors, all verified."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            described = _description_in(path, file.metadata())
            _require_keys(path, list(described["tensors"]), list(file.keys()))
            tensors = {key: _verified(path, key, spec, file) for key, spec in described["tensors"].items()}
    except SafetensorError as error:
        with open(path, "rb") as file:
            of_torch = file.read(2) in (b"PK", b"\x80\x02")  # the beginnings of torch's zip files and of pickles
        if of_torch:
            raise ValueError(
                f"{path} must be a file of swafast.save, got one of torch.save: load it by torch.load"
            ) from None
        raise _damaged(path, f"its header is not that of a whole file: {error}") from error
    return described, tensors


def _description_in(path: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    given = dict(metadata or {})
    text = given.get("swafast")
    if not {"swafast", "sha256"} & given.keys():
        raise ValueError(
            f"path must be a file that swafast.save has written, got {path} without its metadata: load others "
            "into the model, and construct the average with num_averaged= if they are averages"
        )
    if text is None or given != {"format": "pt", "swafast": text, "sha256": _digest(text)}:
        raise _damaged(path, "its metadata has another checksum")
    described = json.loads(text)
    version = described.get("version") if isinstance(described, dict) else None
    if version is not None and version != _VERSION:
        raise ValueError(f"{path} must be of version {_VERSION}, got {version}: load it with the swafast that saved it")
    if version is None or not _is_description(described):
        raise _damaged(path, "its metadata does not describe an average")
    return described


def _is_description(described: dict[str, Any]) -> bool:
    """Return whether this has the form that :func:`save` writes, as another program may have written it."""
    if not all(key in described and isinstance(described[key], kinds) for key, kinds in _KINDS.items()):
        return False
    tensors, tied, versions = described["tensors"], described["tied"], described["versions"] or {}
    are_specs = all(
        isinstance(spec, dict)
        and (isinstance(spec.get("dtype"), str) and isinstance(spec.get("shape"), list) and "checksum" in spec)
        for spec in tensors.values()
    )
    are_ties = all(isinstance(first, str) and first in tensors for first in tied.values())
    return are_specs and are_ties and all(isinstance(each, dict) for each in versions.values())


def _require_keys(path: str, expected: list[str], got: list[str]) -> None:
    differing = sorted({*expected} ^ {*got})
    if differing:
        raise _damaged(path, f"its header does not have the names of its tensors: {differing[:3]}")


def _verified(path: str, key: str, spec: Mapping[str, Any], file: Any) -> Tensor:
    # A copy: the file's memory must not change after the check.
    stored = file.get_tensor(key).clone()
    try:
        dtype, shape = dtype_named(spec["dtype"]), tuple(spec["shape"])
    except ValueError as error:
        raise ValueError(f"{path} must be readable here, but {key!r} is not: {error}") from None
    expected = (dtype, shape) if dtype in _COMMON else (torch.uint8, (stored.numel(),))
    if (stored.dtype, tuple(stored.shape)) != expected:
        raise _damaged(path, f"its header gives {key!r} as {stored.dtype} {tuple(stored.shape)}")
    value: Tensor = stored if dtype in _COMMON else stored.view(dtype).view(shape)
    if checksum(value) != spec["checksum"]:
        raise _damaged(path, f"the values of {key!r} have another checksum")
    return value


def _damaged(path: str, what: str) -> ValueError:
    return ValueError(f"{path} must be what swafast.save has written, but {what}: it is damaged, use a copy of it")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
