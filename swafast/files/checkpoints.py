"""What averaging asks of a checkpoint, whatever its form: tensors by name, and their bytes a piece at a time.

This module and what reads safetensors import no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

#: Bytes of one element, by the dtype's name in safetensors.
ITEMSIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}

#: Dtypes that are averaged. Others must be equal in all inputs, or are taken from one of them.
AVERAGED_DTYPES = ("F64", "F32", "F16", "BF16")


#: The key of our own metadata in an output, which is JSON, and the file of it in a folder. A file has it in its first
#: 64 bytes, where a look into a folder of checkpoints finds it: as the first key, or as a zip's folder.
RECORD = "swafast_average"
RECORD_FILE = f"{RECORD}.json"


@dataclass(frozen=True, slots=True)  # there are many
class TensorSpec:
    """A tensor as a file holds it: row-major, without padding."""

    name: str
    dtype: str  # a key of ITEMSIZES
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZES[self.dtype]


class Checkpoint(Protocol):
    """A checkpoint that is open for reading. Two threads may read from it at once."""

    @property
    def path(self) -> str:
        """As the user wrote it, for messages."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The distinct tensors, in the file's order."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of a tensor in ``specs``, of tied params."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What safetensors and our own outputs have beside the tensors; otherwise empty."""

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes of a tensor from byte ``start`` on.

        Raises:
            ValueError: the file is damaged, with its path and the tensor's name.
            OSError: it cannot be read.
        """

    def require_unchanged(self) -> None:
        """Check that no file has changed since it was opened.

        Raises:
            ValueError: one has, so what was read may be a mixture.
        """

    def close(self) -> None:
        """Close what is open. The checkpoint is not read any more."""


class Output(Protocol):
    """A checkpoint that is being written, beside its place. Two threads may write into it at once."""

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write bytes of a tensor from byte ``start`` on. Every byte of it is written once, in any order."""

    def commit(self) -> None:
        """Sync everything to the disk, and then give it its name."""

    def discard(self) -> None:
        """Delete what was written. What stood at the output's place is whole."""


@dataclass(frozen=True)
class OutputPlan:
    """What an output will hold."""

    specs: Sequence[TensorSpec]  # distinct tensors, in order
    aliases: Mapping[str, str]  # further names of them; a safetensors file leaves these out
    metadata: Mapping[str, str]  # strings alone, as safetensors has them; other forms store them beside the tensors


def write_record(folder: Path, plan: OutputPlan) -> None:
    """Write our own metadata into a folder that is otherwise complete, with the names of its files."""
    if RECORD in plan.metadata:
        names = sorted([*os.listdir(folder), RECORD_FILE])
        record = {**json.loads(plan.metadata[RECORD]), "files": names}
        (folder / RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")
