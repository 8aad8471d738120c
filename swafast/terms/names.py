"""The names of params and buffers, without the segments that wrappers (DDP, ``torch.compile``, FSDP1, ...) add."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor
from torch.nn import Embedding, EmbeddingBag, Module
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..torch_private.modules import (
    named_modules,
    named_tensors,
    own_buffers,
    own_children,
    own_params,
    passing_buffers,
)

_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)")


def unwrap(model: Module) -> Module:
    """Take DDP, DataParallel and ``torch.compile`` off the root. A child that is named ``module`` stays."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif list(own_children(model)) == ["_orig_mod"] and not own_params(model) and not own_buffers(model):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def canonical(name: str) -> str:
    """Drop the segments that wrappers add from a dotted name."""
    return _WRAPPERS.sub("", name).removesuffix(".") if _WRAPPERS.search(name) else name


def _by_name(named: Iterable[tuple[str, Tensor]], argument: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for raw, tensor in named:
        name = canonical(raw)
        if found.setdefault(name, tensor) is not tensor:
            raise ValueError(f"{argument} must have one tensor for each name, got two for {name!r} (one is {raw!r})")
    return found


def named_params(root: Module, argument: str) -> dict[str, Tensor]:
    """Return every param by name; a tied param is there under each of its names."""
    return _by_name(named_tensors(root), argument)


def named_buffers(root: Module, argument: str) -> dict[str, Tensor]:
    """Return every buffer, persistent or not, under each of its names."""
    return _by_name(named_tensors(root, buffers=True), argument)


def passing_names(root: Module) -> frozenset[str]:
    """Return the names of the buffers that a state dict of ``root`` leaves out."""
    return frozenset(
        canonical(f"{prefix}.{name}" if prefix else name)
        for prefix, module in named_modules(root)
        for name in passing_buffers(module)
    )


def persistent_buffers(root: Module) -> dict[str, Tensor]:
    """Return every buffer that a state dict of ``root`` holds, under each of its names."""
    passing = passing_names(root)
    return {name: tensor for name, tensor in named_buffers(root, "model").items() if name not in passing}


def renormed_params(root: Module) -> list[str]:
    """Return the names of the params that a forward pass writes: of embeddings with ``max_norm``."""
    return [
        canonical(f"{prefix}.weight".lstrip("."))
        for prefix, module in named_modules(root)
        if isinstance(module, (Embedding, EmbeddingBag)) and module.max_norm is not None
    ]


def require_same_names(kind: str, averages: Iterable[str], params: Iterable[str]) -> None:
    """Raise ValueError with the first few names that only one side has."""
    expected, given = dict.fromkeys(averages), dict.fromkeys(params)  # ordered sets
    missing = [name for name in expected if name not in given]
    surplus = [name for name in given if name not in expected]
    if missing or surplus:
        clauses = [
            f"{label} {', '.join(map(repr, names[:3]))}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for label, names in (("missing", missing), ("unexpected", surplus))
            if names
        ]
        raise ValueError(f"model must have the {kind} that it was averaged with, got {'; '.join(clauses)}")
