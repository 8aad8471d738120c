"""The names of params and buffers, without the segments that wrappers (DDP, ``torch.compile``, FSDP1, ...) add."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor
from torch.nn import Embedding, EmbeddingBag, Module
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..torch_private.modules import (
    loads_by_own_code,
    named_modules,
    named_tensors,
    own_buffers,
    own_children,
    own_params,
    passing_buffers,
)
from . import other_names
from .misfits import few

_SEGMENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = re.compile(rf"(?<![^.])(?:{'|'.join(_SEGMENTS)})(?:\.|$)")


def unwrap(model: Module) -> Module:
    """Take DDP, DataParallel and ``torch.compile`` off the root. A child that is named ``module`` stays."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif [*own_children(model).keys()] == ["_orig_mod"] and not own_params(model) and not own_buffers(model):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def canonical(name: str) -> str:
    """Drop the segments that wrappers add from a dotted name."""
    return _WRAPPERS.sub("", name).removesuffix(".") if _WRAPPERS.search(name) else name


def unwrapping(given: Collection[str], own: Iterable[str]) -> Callable[[str], str]:
    """Return a function that takes wrappers out of names of one model, as updates do.

    A leading ``module.`` may be of DDP, or of a child of that name. It goes if more of ``given`` are in ``own`` then.
    """
    named = {*own}
    names = [canonical(name) for name in given]
    dropped, most = 0, len(named.intersection(names))
    for depth in itertools.count(1):
        if not names or not all(name.startswith("module.") for name in names):
            break
        names = [name.removeprefix("module.") for name in names]
        if len(named.intersection(names)) > most:
            dropped, most = depth, len(named.intersection(names))

    def unwrapped(name: str) -> str:
        name = canonical(name)
        for _ in range(dropped):
            name = name.removeprefix("module.")
        return name

    return unwrapped


def rewrapping(model: Module, given: Collection[str], paths: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Match the names in a state of a model, wrapped in any way, with those in a state of ``model``.

    Names that ``model`` has no tensor for go to the module that they belong to, since its own code may know them.

    Args:
        given: the names in the state.
        paths: the paths of modules in the state's metadata.

    Returns:
        for each given name the one in a state of ``model``; for each module of ``model`` its path among ``paths``. Both
        are empty if nothing differs.
    """
    raw = [name for buffers in (False, True) for name, _ in named_tensors(model, buffers=buffers)]
    paths_here = [name for name, _ in named_modules(model)]
    extra_states = {f"{path}._extra_state".lstrip(".") for path in paths_here}
    if {*given} <= {*raw, *extra_states} and {*paths} <= {*paths_here}:
        return {}, {}  # the model is wrapped in the same way
    root, prefix = _root_of(model)
    shown, modules = _shown(prefix, root)
    own = {canonical(name.removeprefix(prefix)): _in_state(name.removeprefix(prefix), shown) for name in raw}
    unwrapped = unwrapping(given, own)

    def rewrapped(name: str) -> str:
        name = unwrapped(name)
        path = _head(name)[:-1]
        while path not in modules:
            path = _head(path)[:-1]
        return own.get(name) or modules[path] + name[len(path) :].removeprefix(".")

    names, known = {name: rewrapped(name) for name in given}, {*own.values()}
    all_placed = {_head(name) for name in given} <= {*modules.values()}
    if all_placed and len(known.intersection(given)) >= len(known.intersection(names.values())):
        names = {name: name for name in given}  # the model is wrapped in the same way
    theirs = {_head(unwrapped(f"{path}.".lstrip(".") + "_")): path for path in paths}
    ours = {f"{prefix}{name}".rstrip("."): f"{canonical(name)}.".lstrip(".") for name in shown}
    if ours.keys() == {*paths}:
        return names, {path: path for path in ours}
    return names, {path: theirs[bare] for path, bare in ours.items() if bare in theirs}


def names_in_states(model: Module) -> dict[str, str]:
    """Return the name of each param and buffer in a state of ``model``, by the name that it has in the module."""
    root, prefix = _root_of(model)
    shown, _ = _shown(prefix, root)
    raw = [name for buffers in (False, True) for name, _ in named_tensors(model, buffers=buffers)]
    return {name: _in_state(name.removeprefix(prefix), shown) for name in raw}


def _root_of(model: Module) -> tuple[Module, str]:
    """Return the unwrapped model, and the prefix of its names in ``model``."""
    root = unwrap(model)
    return root, next(f"{name}.".lstrip(".") for name, module in named_modules(model) if module is root)


def _in_state(name: str, shown: Mapping[str, str]) -> str:
    return shown[_head(name)[:-1]] + name[len(_head(name)) :]


def _shown(prefix: str, root: Module) -> tuple[dict[str, str], dict[str, str]]:
    """Return the prefixes of modules in states by name, and by name without wrappers, of modules that are none."""
    shown: dict[str, str] = {}
    modules: dict[str, str] = {}
    hidden: set[str] = set()
    for name, module in named_modules(root):
        parent, _, segment = name.rpartition(".")
        outer = shown[parent] if name else prefix
        shown[name] = outer if not name or parent in hidden else f"{outer}{segment}."
        is_wrapper = len(own_children(module)) == 1 and next(iter(own_children(module))) in _SEGMENTS
        if not is_wrapper or own_params(module) or own_buffers(module):
            modules.setdefault(canonical(name), shown[name])
        elif loads_by_own_code(module):  # torch's wrappers for checkpoints leave their segment out of states
            hidden.add(name)
    return shown, modules


def _head(name: str) -> str:
    """Return a dotted name without its last segment."""
    return name[: name.rfind(".") + 1]


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


def empty_buffers(root: Module) -> set[str]:
    """Return the names of buffers that are None now."""
    return {
        canonical(f"{prefix}.{name}" if prefix else name)
        for prefix, module in named_modules(root)
        for name, buffer in own_buffers(module).items()
        if buffer is None
    }


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
    """Raise ValueError with the first few names that only one side has, and the call that takes the model along."""
    expected, given = dict.fromkeys(averages), dict.fromkeys(params)  # ordered sets
    missing = [name for name in expected if name not in given]
    surplus = [name for name in given if name not in expected]
    if missing or surplus:
        clauses = [f"{label} {few(names)}" for label, names in (("missing", missing), ("unexpected", surplus)) if names]
        raise ValueError(
            f"model must have the {kind} that it was averaged with, got {'; '.join(clauses)}: "
            f"{other_names.of_model(expected, given)}"
        )
