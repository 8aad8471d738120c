"""Whole tensors, read from a checkpoint and written into an output in pieces, for tests of their forms."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from swafast.files.checkpoints import ITEMSIZES, Checkpoint, Output, OutputPlan, TensorSpec
from swafast.files.written_pickles import TORCH_NAMES
from swafast.strict.pickles import DTYPES
from tests.support import same_bits

#: Elements of a piece: borders of pieces lie inside rows, and inside chunks.
STEPS = (7, 64, 1 << 17)


def read_whole(checkpoint: Checkpoint, name: str, step: int = 1 << 17) -> Tensor:
    """Read a tensor in pieces of so many elements, into memory that is not zero before."""
    spec = checkpoint.specs[name]
    dtype = getattr(torch, TORCH_NAMES[spec.dtype])
    data = bytearray(b"\xa5" * spec.nbytes)
    nbytes = step * ITEMSIZES[spec.dtype]
    for start in range(0, spec.nbytes, nbytes):
        checkpoint.read_into(name, start, memoryview(data)[start : start + nbytes])
    return torch.frombuffer(data, dtype=dtype).view(spec.shape) if data else torch.empty(spec.shape, dtype=dtype)


def require_holds(checkpoint: Checkpoint, expected: Mapping[str, Tensor], steps: tuple[int, ...] = STEPS) -> None:
    """Assert that a checkpoint has these tensors and no others, bit for bit, however they are read."""
    names = {**{name: name for name in checkpoint.specs}, **checkpoint.aliases}
    assert set(names) == set(expected)
    for name, tensor in expected.items():
        for step in steps:
            assert same_bits(read_whole(checkpoint, names[name], step), tensor.detach()), (name, step)


def plan_of(tensors: Mapping[str, Tensor], aliases: Mapping[str, str] = {}, **metadata: str) -> OutputPlan:
    specs = [
        TensorSpec(name, DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    return OutputPlan(specs, aliases, metadata)


def write_pieces(output: Output, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in three pieces each, the last first."""
    for name, tensor in reversed(tensors.items()):
        data = bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())
        third = len(data) // 3
        for start, stop in ((2 * third, len(data)), (0, third), (third, 2 * third)):
            output.write(name, start, memoryview(data)[start:stop])


class Exploit:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch harmed",)


def require_unharmed(folder: Path) -> None:
    assert not Path("harmed").exists()
    assert not (folder / "harmed").exists()
