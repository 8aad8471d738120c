"""The parts of an averaged model that one rank writes into a snapshot."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ..average.averaged_model import FusedAveragedModel
from ..average.matching import each_average
from ..average.planes import fit_planes
from ..op.checksum import checksum
from ..sharded import checkpoint
from ..sharded.parts.ranks import Ranks
from ..sharded.sharded_model import ShardedAveragedModel
from ..terms.converting import full_precision
from ..terms.copying import describe_kind, is_plain
from ..terms.formats import Format
from ..terms.names import persistent_buffers, unwrap
from .folder import StoredTensor

#: The name under which a single averaged model is saved.
_ALONE = "average"

Averaged = FusedAveragedModel | ShardedAveragedModel


@dataclass(frozen=True)
class StoredPart:
    """This rank's part of one tensor of an averaged model."""

    stored: StoredTensor
    is_copy: bool  # copied from the model, not averaged
    value: Tensor  # plain, DTensor or PartTensor, as distributed checkpoints take it
    checksum: int  # this rank's summand of the whole tensor's checksum


def stored_parts(averaged: Averaged, ranks: Ranks, dtype: torch.dtype | None) -> list[StoredPart]:
    """Return this rank's parts of an averaged model, at full precision or as ``dtype``. Collective.

    Raises:
        ValueError: ranks that each have a whole average have different bits in it.
    """
    if isinstance(averaged, ShardedAveragedModel):
        ranks.agree("a ShardedAveragedModel that is saved", averaged._anew)
        return list(_sharded_parts(averaged, ranks, dtype))
    if ranks.size > 1:  # a buffer may have grown on one of them
        kinds = {names[0]: describe_kind(tensor) for names, tensor, _ in each_average(averaged.module)}
        ranks.agree("a FusedAveragedModel that is saved", kinds)
    parts = list(_whole_parts(averaged, ranks, dtype))
    ranks.agree("a FusedAveragedModel that is saved", {part.stored.names[0]: part.checksum for part in parts})
    return [part if ranks.index == 0 else replace(part, checksum=0) for part in parts]


def _sharded_parts(averaged: ShardedAveragedModel, ranks: Ranks, dtype: torch.dtype | None) -> Iterator[StoredPart]:
    for share in averaged._shares:
        holding, planes = share.holding, averaged._planes[share.name]
        full = full_precision(planes, share.format)
        entry = checkpoint.Entry(holding.names, share, full.to(_dtype_of(share.format, full, dtype)))
        value, own = checkpoint.sealed_part_of(entry, ranks)
        yield StoredPart(StoredTensor(holding.names, holding.shape, value.dtype), share.format is None, value, own)


def _whole_parts(averaged: FusedAveragedModel, ranks: Ranks, dtype: torch.dtype | None) -> Iterator[StoredPart]:
    saved = set(map(id, persistent_buffers(unwrap(averaged.module)).values()))
    tensors = zip(each_average(averaged.module), averaged._each_average(), strict=True)
    for (names, tensor, is_buffer), (name, _, fmt) in tensors:
        if (is_buffer and id(tensor) not in saved) or (fmt is None and not is_plain(tensor)):
            continue
        planes = fit_planes(averaged, name, tensor, fmt)
        full = full_precision(planes, fmt)
        value = full.to(_dtype_of(fmt, full, dtype))
        if is_buffer and ranks.size > 1:
            value = value.clone()
            ranks.broadcast_(value)
        stored = StoredTensor(tuple(names), tuple(value.shape), value.dtype)
        yield StoredPart(stored, fmt is None, value, checksum(value))


def _dtype_of(fmt: Format | None, full: Tensor, requested: torch.dtype | None) -> torch.dtype:
    """Return the dtype to store a tensor in. Copied and complex tensors keep theirs, as float64 does by default."""
    if fmt is None or full.is_complex():
        return full.dtype
    return requested or (torch.float32 if fmt.dtype is not None else full.dtype)


def named_averages(averages: object) -> dict[str, Averaged]:
    """Return the averages by name, or raise TypeError or ValueError."""
    if isinstance(averages, (FusedAveragedModel, ShardedAveragedModel)):
        return {_ALONE: averages}
    if not hasattr(averages, "items"):
        raise TypeError(f"averages must be an averaged model, or several by name, got {type(averages).__name__}")
    named = dict(averages.items())
    if not named:
        raise ValueError("averages must be at least one averaged model, got none")
    for name, average in named.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"averages must have non-empty strings without '/' for names, got {name!r}")
        if not isinstance(average, (FusedAveragedModel, ShardedAveragedModel)):
            kinds = "a FusedAveragedModel or a ShardedAveragedModel"
            raise TypeError(f"averages[{name!r}] must be {kinds}, got {type(average).__name__}")
    return named


def stored_in(parts: Mapping[str, list[StoredPart]]) -> tuple[tuple[StoredTensor, ...], tuple[StoredTensor, ...]]:
    """Return the params and the copied tensors, or raise ValueError if averages differ in them."""
    (first, expected), *others = (
        (name, {part.stored: part.is_copy for part in of_average}) for name, of_average in parts.items()
    )
    for name, got in others:
        if got != expected:
            differing = sorted({stored.names[0] for stored, _ in got.items() ^ expected.items()})
            raise ValueError(
                f"averages[{name!r}] must have the params of {first!r}, in one dtype, got others: {differing[:3]}"
            )
    return tuple(x for x, is_copy in expected.items() if not is_copy), tuple(x for x in expected if expected[x])


# Files


def write(path: Path, state: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write the parts of all ranks. Collective; an error on one rank raises on each."""
    with reporting(RuntimeError, f"snapshot {path} could not be written:", written=path):
        dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(path), process_group=ranks.group)


#: Bytes that are written to learn why a file could not be. A full disk may have room for a few bytes still.
_PROBE_NBYTES = 2**20


def _why_not(folder: Path | None) -> str:
    """Return what the system says against writing into ``folder``, as on a full disk; torch's writer does not tell."""
    if folder is not None:
        try:
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(_PROBE_NBYTES))
        except OSError as error:
            return f" {error.strerror};"
    return ""


def _was_interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused the error: a file that it closes may raise an error of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


@contextmanager
def reporting(kind: type[Exception], what: str, *, written: Path | None = None) -> Iterator[None]:
    """Raise any error of the body, on any rank, as an error of type ``kind`` whose message begins with ``what``.

    Args:
        written: the folder that the body writes into.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # one process is intended
            yield
    except CheckpointException as error:  # a BaseException with the errors of all ranks
        if any(_was_interrupted(each) for each, _ in error.failures.values()):
            raise KeyboardInterrupt from error
        errors = "; ".join(
            f"{type(each).__name__}: {each} on rank {rank}" for rank, (each, _) in error.failures.items()
        )
        raise kind(f"{what}{_why_not(written)} {errors}") from error
    except Exception as error:
        raise kind(f"{what}{_why_not(written)} {type(error).__name__}: {error}") from error
