"""Changes of a module tree, and whether a plan that was made before may stand: what the native pass must tell.

``tests/test_tree_check.py`` and ``tests/tree_bugs.py`` apply them.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from swafast.op.tree_check import TreeCheck

Change = Callable[[Any], object]


def stands(check: TreeCheck) -> bool:
    return check.find(0) is not None


class Net(nn.Module):
    """A tree with a tensor for each thing that a change may alter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.inner[0].weight
        self.shared = self.inner[1]
        self.register_module("absent", None)
        self.small = nn.Parameter(torch.randn(4).half())
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.row = nn.Parameter(torch.randn(1, 4))
        self.a, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
        self.imaginary = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64).imag)
        self.wave = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.one = nn.Parameter(torch.randn(1))
        self.act = nn.ReLU()
        self.register_buffer("mean", torch.randn(2, 3))
        self.register_buffer("nothing", None)

    @torch.no_grad()
    def drift(self) -> None:
        """Change every float in place, by amounts that do not depend on where it lies."""
        for tensor in (*self.parameters(), *self.buffers()):
            is_plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_nested
            if is_plain and tensor.is_floating_point() and tensor.untyped_storage().nbytes():
                tensor.add_(torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape).to(tensor.dtype))


class Further(nn.Sequential):
    """Another class with the same tensors."""


class Special(nn.Parameter):
    """A subclass of Parameter."""


def replace(tree: Any, kind: type[Tensor] = nn.Parameter) -> Tensor:
    """Return another tensor on the memory of one of the tree."""
    made = tree.first.weight.detach()
    return made if kind is Tensor else kind(made)


def _set_data(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    def change(tree: Any) -> None:
        tensor = tree.get_parameter(name)
        tensor.data = make(tensor.data)

    return change


def _conjugate_twice(tree: Any) -> None:
    base = torch.empty(0, dtype=torch.complex64).set_(
        tree.imaginary.untyped_storage(),
        tree.imaginary.storage_offset() // 2,
        (4, 4),
        tuple(stride // 2 for stride in tree.imaginary.stride()),
    )
    tree.imaginary.data = base.conj().imag


def _reorder(values: dict[str, Any], *first: str) -> None:
    for name in [*first, *(name for name in values if name not in first)]:
        values[name] = values.pop(name)


def _rename(values: dict[str, Any], name: str, new: str) -> None:
    renamed = {new if key == name else key: value for key, value in values.items()}
    values.clear()
    values.update(renamed)


def _swap_children(tree: Any) -> None:
    one, other = tree.inner[1]._modules["0"], tree.inner[1]._modules["1"]
    tree.inner[1]._modules.update({"0": other, "1": one})


def _reset_dict(tree: Any, reverse: bool) -> None:
    own = list(tree.norm.__dict__.items())
    tree.norm.__dict__ = dict(reversed(own) if reverse else own)


@torch.no_grad()
def _set_(tree: Any) -> None:
    tree.first.weight.set_(torch.eye(4))


def _put(tree: Any, name: str, value: Tensor) -> None:
    tree._parameters[name] = value


#: After these the plan still fits, and the pass must say so: a pass that always falls back tells nothing.
HARMLESS: dict[str, Change] = {
    "nothing": lambda tree: None,
    "values": lambda tree: tree.drift(),
    "data to itself": _set_data("first.weight", lambda data: data),
    "another param on the same memory": lambda tree: setattr(tree.first, "weight", replace(tree)),
    "a dict of params replaced": lambda tree: setattr(tree.first, "_parameters", dict(tree.first._parameters)),
    "a dict of children replaced": lambda tree: setattr(tree, "_modules", dict(tree._modules)),
    "a module's dict replaced": lambda tree: _reset_dict(tree, False),
    "a module's dict replaced, reversed": lambda tree: _reset_dict(tree, True),
    "attributes": lambda tree: [setattr(tree.first, f"note_{i}", i) for i in range(50)],
    "a child put back": lambda tree: setattr(tree, "first", tree.first),
    "the last key put back": lambda tree: _reorder(tree.first._parameters, "weight"),
    "gradients": lambda tree: setattr(tree.first.weight, "grad", torch.ones(4, 4)),
    "no gradients": lambda tree: tree.norm.requires_grad_(False),
}

#: After these it must not say that all stand.
CHANGES: dict[str, Change] = {
    "data cloned": _set_data("first.weight", torch.clone),
    "data of the last module cloned": _set_data("inner.1.1.bias", torch.clone),
    "data of another shape": _set_data("first.weight", lambda data: data.view(2, 8)),
    "data of another dim": _set_data("first.weight", lambda data: data.view(2, 2, 4)),
    "data transposed": _set_data("first.weight", torch.t),
    "another stride of one row": _set_data("row", lambda data: data.as_strided((1, 4), (7, 1), data.storage_offset())),
    "fewer rows": _set_data("first.weight", lambda data: data[:3]),
    "data moved within a storage": _set_data("a", lambda data: torch.cat((data, data))[3:]),
    "another dtype": _set_data("small", lambda data: data.view(torch.bfloat16)),
    "fewer columns": _set_data("first.weight", lambda data: data[:, :3]),
    "data without a dim": _set_data("one", lambda data: data.view(())),
    "a conjugate view": _set_data("wave", torch.conj),
    "a negative view": _conjugate_twice,
    "another device": lambda tree: setattr(tree, "empty", nn.Parameter(torch.empty(0, 4, device="meta"))),
    "param replaced": lambda tree: setattr(tree.first, "weight", nn.Parameter(torch.eye(4))),
    "param replaced by a tensor": lambda tree: tree.first._parameters.update(weight=replace(tree, Tensor)),
    "param of a subclass": lambda tree: setattr(tree.first, "weight", replace(tree, Special)),
    "param sparse": lambda tree: setattr(tree.first, "weight", nn.Parameter(torch.eye(4).to_sparse())),
    "param nested": lambda tree: setattr(
        tree.first, "weight", nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    ),
    "param to None": lambda tree: setattr(tree.first, "bias", None),
    "None to param": lambda tree: setattr(tree.tied, "bias", nn.Parameter(torch.zeros(4))),
    "buffer to None": lambda tree: setattr(tree, "mean", None),
    "None to buffer": lambda tree: setattr(tree, "nothing", torch.zeros(4)),
    "new param": lambda tree: setattr(tree.inner[1], "new", nn.Parameter(torch.zeros(4))),
    "new buffer": lambda tree: tree.inner[1].register_buffer("new", torch.zeros(4)),
    "new child": lambda tree: tree.inner[1].append(nn.Linear(4, 4)),
    "param deleted": lambda tree: delattr(tree.first, "bias"),
    "last param deleted": lambda tree: delattr(tree, "one"),
    "buffer deleted": lambda tree: delattr(tree, "mean"),
    "child deleted": lambda tree: delattr(tree, "tied"),
    "param renamed": lambda tree: _rename(tree._parameters, "b", "c"),
    "params reordered": lambda tree: _reorder(tree._parameters, "b", "a"),
    "children reordered": lambda tree: _reorder(tree._modules, "norm", "first"),
    "children exchanged": _swap_children,
    "child copied": lambda tree: setattr(tree, "first", copy.deepcopy(tree.first)),
    "an empty child copied": lambda tree: setattr(tree, "act", nn.ReLU()),
    "child to None": lambda tree: tree._modules.update(tied=None),
    "None to child": lambda tree: setattr(tree, "absent", nn.Linear(1, 1)),
    "tie broken": lambda tree: setattr(tree.tied, "weight", nn.Parameter(tree.tied.weight.detach().clone())),
    "tie broken on the same memory": lambda tree: setattr(tree.tied, "weight", nn.Parameter(tree.tied.weight.data)),
    "tie made": lambda tree: setattr(tree, "b", tree.a),
    "shared child copied": lambda tree: setattr(tree, "shared", copy.deepcopy(tree.shared)),
    "params in another dict": lambda tree: setattr(
        tree.first, "_parameters", {name: nn.Parameter(value.clone()) for name, value in tree.first.named_parameters()}
    ),
    "an ordered dict": lambda tree: setattr(tree.first, "_parameters", OrderedDict(tree.first._parameters)),
    "another class": lambda tree: setattr(tree.inner, "__class__", Further),
    "storage freed": lambda tree: tree.first.weight.untyped_storage().resize_(0),
    "storage set": _set_,
    "memory shared": lambda tree: tree.first.weight.share_memory_(),
    "params exchanged": lambda tree: torch.utils.swap_tensors(tree.a, tree.b),
    "parametrization": lambda tree: parametrize.register_parametrization(tree.first, "weight", nn.Identity()),
    "weight norm": lambda tree: parametrizations.weight_norm(tree.first),
    "old weight norm": lambda tree: torch.nn.utils.weight_norm(tree.first),
}
