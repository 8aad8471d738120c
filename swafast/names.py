"""What a parameter's name is, and where in a module it is found again.

Names are those of the model itself: wrappers at its root (DDP, DataParallel, ``torch.compile``) are taken off, and the
segments that wrappers inside it add are dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DataParallel, DistributedDataParallel

_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def unwrap(model: Module) -> Module:
    """Take DDP, DataParallel and ``torch.compile`` off the root; ``module.`` inside a name stays, a real child."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif list(model._modules) == ["_orig_mod"] and not model._parameters and not model._buffers:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def canonical(name: str) -> str:
    """Drop the segments that wrappers add to a dotted name."""
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS)


def _by_name(named: Iterable[tuple[str, Tensor]], argument: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for raw, tensor in named:
        name = canonical(raw)
        if found.setdefault(name, tensor) is not tensor:
            raise ValueError(f"{argument} must have one tensor for each name, got two for {name!r} (one as {raw!r})")
    return found


def named_params(root: Module, argument: str) -> dict[str, Tensor]:
    """Give every parameter under each of its names; a tied one stands under all of them."""
    return _by_name(root.named_parameters(remove_duplicate=False), argument)


def named_buffers(root: Module, argument: str) -> dict[str, Tensor]:
    """Give every buffer, persistent or not, under each of its names."""
    return _by_name(root.named_buffers(remove_duplicate=False), argument)


def passing_names(root: Module) -> frozenset[str]:
    """Give the names of the buffers that a state dict of ``root`` leaves out."""
    return frozenset(
        canonical(f"{prefix}.{name}" if prefix else name)
        for prefix, module in root.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    )


def persistent_buffers(root: Module) -> dict[str, Tensor]:
    """Give every buffer that a state dict of ``root`` holds, under each of its names."""
    passing = passing_names(root)
    return {name: tensor for name, tensor in named_buffers(root, "model").items() if name not in passing}


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
        """Give all names, child modules and borders between modules as one list to compare, and all tensors."""
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
        """Give the index of ``tensor`` in what :meth:`tensors` returns; only valid while the walk is being set up."""
        return self._positions[id(tensor)]

    def starts_at(self, root: Module) -> bool:
        return self._modules[0]() is root

    def tensors(self) -> list[Tensor] | None:
        """Give the tensors that stand in the module now, or None when modules, names or ties have changed."""
        modules = [reference() for reference in self._modules]
        if None in modules:
            return None
        layout, values = self._read(modules)  # type: ignore[arg-type]  # no None among them any more
        if layout != self._layout:
            return None
        if any(values[i] is not values[j] for i, j in self._ties) or any(values[i] is not None for i in self._empty):
            return None
        return values  # type: ignore[return-value]  # positions that were None at first still are, and are not asked for


def require_same_names(kind: str, averages: Iterable[str], params: Iterable[str]) -> None:
    """Raise ValueError naming the first few names that stand on one side only."""
    expected, given = dict.fromkeys(averages), dict.fromkeys(params)  # sets that keep their order
    missing = [name for name in expected if name not in given]
    surplus = [name for name in given if name not in expected]
    if missing or surplus:
        parts = [
            f"{label} {', '.join(map(repr, names[:3]))}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for label, names in (("missing", missing), ("unexpected", surplus))
            if names
        ]
        raise ValueError(f"model must have the {kind} that it was averaged with, got {'; '.join(parts)}")
