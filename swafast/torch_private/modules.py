"""The dicts in which a module keeps its tensors and children, and a walk through those of a whole tree."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping

from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

#: What all BatchNorm layers are, those of torch's subclasses too.
BatchNormLayer = _BatchNorm


def own_params(module: Module) -> dict[str, Tensor | None]:
    """The live dict of a module's own parameters, by name."""
    return module._parameters  # type: ignore[return-value]


def own_buffers(module: Module) -> dict[str, Tensor | None]:
    """The live dict of a module's own buffers, by name."""
    return module._buffers


def own_children(module: Module) -> dict[str, Module | None]:
    """The live dict of a module's own children, by name; an empty one before the module's ``__init__`` has run."""
    return module.__dict__.get("_modules", {})


def passing_buffers(module: Module) -> set[str]:
    """The live set of names of a module's own buffers that its state dict leaves out."""
    return module._non_persistent_buffers_set


def copy_metadata(state: MutableMapping[str, object], like: object) -> None:
    """Copy to ``state`` the versions of modules that torch has noted on the state dict ``like``, if any."""
    metadata = getattr(like, "_metadata", None)
    if metadata is not None:
        state._metadata = metadata  # type: ignore[attr-defined]


class Walk:
    """A path through a module that finds all its tensors again quickly, and notices when it no longer fits.

    ``module.named_parameters()`` costs 0.5 us a tensor, at every update. This walk visits each module's dicts once and
    keeps only weak references, so that an average holds no model alive.
    """

    def __init__(self, root: Module) -> None:
        modules = list(root.modules())
        self._modules = [weakref.ref(module) for module in modules]
        self._layout, values = self._read(modules)
        self._empty = [i for i, value in enumerate(values) if value is None]
        first: dict[int, int] = {}
        for i, value in enumerate(values):
            if value is not None:
                first.setdefault(id(value), i)
        self._ties = [(first[id(v)], i) for i, v in enumerate(values) if v is not None and first[id(v)] != i]
        self._positions = first

    @staticmethod
    def _read(modules: list[Module]) -> tuple[list[object], list[Tensor | None]]:
        """Return all names, child modules and borders between modules as one list to compare, and all tensors."""
        layout: list[object] = []
        values: list[Tensor | None] = []
        for module in modules:
            params, buffers, submodules = module._parameters, module._buffers, module._modules
            if params:
                layout.extend(params)
                values.extend(params.values())
            if buffers:
                layout.extend(buffers)
                values.extend(buffers.values())
            if submodules:
                layout.extend(submodules)
                layout.extend(map(id, submodules.values()))
            layout.append(len(values))
        return layout, values

    def position(self, tensor: Tensor) -> int:
        """Return the index of ``tensor`` in what :meth:`tensors` returns; valid only while the walk is being set up."""
        return self._positions[id(tensor)]

    @property
    def root(self) -> Module | None:
        """The module that the walk begins at, while it lives."""
        return self._modules[0]()

    def tensors(self) -> list[Tensor] | None:
        """Return the tensors that are in the module now, or None when modules, names or ties have changed."""
        modules = []
        for reference in self._modules:
            module = reference()
            if module is None:
                return None
            modules.append(module)
        layout, values = self._read(modules)
        if layout != self._layout:
            return None
        for first, again in self._ties:
            if values[first] is not values[again]:
                return None
        for empty in self._empty:
            if values[empty] is not None:
                return None
        return values  # type: ignore[return-value]  # positions that were None at first still are, and are not asked for
