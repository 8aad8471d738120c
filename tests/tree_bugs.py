"""The native pass on every change, in a process for each planted bug: ``python -m tests.tree_bugs LIBRARY BUGS``.

It prints a line for each bug, the first one for none. ``tests/test_tree_bugs.py`` runs it under sanitizers.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swafast.op import tree_check
from swafast.op.tree_check import TreeCheck
from tests.tree_changes import CHANGES, HARMLESS, Net, stands


class Shard(Tensor):
    """As a DTensor holds its local tensor."""

    __slots__ = ("_local_tensor", "_spec")


class Local(Tensor):
    """A subclass."""


class Sharded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.param = nn.Parameter(torch.empty(4))
        shard = torch.zeros(4).as_subclass(Shard)
        shard._local_tensor, shard._spec = torch.randn(4), object()
        self._parameters["param"] = shard  # type: ignore[assignment]


SHARD_CHANGES = {
    "nothing": lambda tree: None,
    "another spec": lambda tree: setattr(tree.param, "_spec", object()),
    "local tensor cloned": lambda tree: setattr(tree.param, "_local_tensor", tree.param._local_tensor.clone()),
    "local tensor of a subclass": lambda tree: setattr(
        tree.param, "_local_tensor", tree.param._local_tensor.as_subclass(Local)
    ),
    "no local tensor": lambda tree: delattr(tree.param, "_local_tensor"),
}


def check_of(tree: Any) -> tuple[TreeCheck, list[Tensor]]:
    tensors = [*tree.parameters(), *(buffer for buffer in tree.buffers() if buffer.is_floating_point())]
    return TreeCheck([tree], [tensors, tensors[1:3]], shard_type=Shard), tensors


def require_told(make: Any, changes: dict[str, Any], harmless: Any) -> None:
    for name, change in changes.items():
        tree = make()
        check, _ = check_of(tree)
        assert stands(check), f"{name}: does not stand before"
        change(tree)
        is_told = not stands(check)
        assert is_told != (name in harmless), f"{name}: {'does not stand' if is_told else 'stands'}"


def require_versions_and_references() -> None:
    tree, other = Net(), torch.zeros(3)
    check, tensors = check_of(tree)
    before = [tensor._version for tensor in tensors]
    found = check.find(2)
    assert found is not None
    for group, expected in zip(found, (tensors, tensors[1:3]), strict=True):
        assert list(map(id, group)) == list(map(id, expected)), "tensors: others than the group's"
    assert [tensor._version for tensor in tensors] == before, "versions: told without a write"
    assert tree_check.tell(found[1])
    assert tree_check.tell((other,))
    told = [tensor._version - old for tensor, old in zip(tensors, before, strict=True)]
    assert told == [int(i in (1, 2)) for i in range(len(told))], f"versions: {sum(told)} of 2 told"
    assert other._version == 1, "versions: not told of a tuple"
    assert not tree_check.tell([other, other.as_subclass(Local)]), "versions: of a subclass"
    assert not tree_check.tell([other, None]), "versions: of what is no tensor"  # type: ignore[list-item]
    assert other._version == 1, "versions: told in part"
    with torch.inference_mode():
        assert tree_check.tell([torch.zeros(2)])
    del found, group, expected

    def references() -> list[int]:
        return [*map(sys.getrefcount, (tree.__dict__, tree.inner.__dict__, tensors[0], None)), len(check._kept)]

    counts = references()
    for _ in range(1000):
        check.find(2)
        tree_check.tell(tensors)
    assert all(abs(one - two) < 100 for one, two in zip(references(), counts, strict=True)), "references: changed"
    assert sys.getrefcount(check._kept) == 2, "references: of what is kept"
    found = check.find(1)
    assert found is not None
    memory = weakref.ref(tree.first.weight)
    tree.first.weight = nn.Parameter(torch.ones(4, 4))
    tensors.clear()
    assert memory() is not None, "references: what was found may be freed"


def run_all() -> None:
    require_told(Net, HARMLESS | CHANGES, HARMLESS)
    require_told(Sharded, SHARD_CHANGES, ("nothing",))
    require_versions_and_references()


def outcome(library: ctypes.PyDLL, number: int) -> str:
    """Return how a child process ends that has this bug."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            if number:
                ctypes.c_int.in_dll(library, "planted_bug").value = number
            try:
                run_all()
                os._exit(0)
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}".encode())
                os._exit(1)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        text = said.read().replace("\n", " ")
        return f"{number}: {status} {text[:3000]}"


def main(library: str, num_bugs: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tree_check.library_path = lambda: Path(library)
    assert isinstance(tree_check.load(), tree_check.Functions), tree_check.load()
    Net()
    loaded = ctypes.PyDLL(library)
    for number in range(int(num_bugs) + 1):
        print(outcome(loaded, number), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
