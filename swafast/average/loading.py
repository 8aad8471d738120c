"""One load of a state into averaged models: all of it is loaded, or nothing has changed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..op.checks import check_cast, check_plain
from ..terms import misfits, other_names
from ..terms.converting import write_all
from ..terms.copying import are_alike, is_plain
from ..terms.layout import extent
from ..terms.names import canonical, passing_names
from ..torch_private.core import has_own_dispatch
from ..torch_private.modules import (
    Place,
    loads_by_own_code,
    metadata_of,
    named_modules,
    own_buffers,
    own_children,
    own_params,
    passing_buffers,
    put_tensor,
    set_metadata,
)
from .lending import without_lent
from .states import STRICT, all_tensors, fit_keys, keeping_ties, load_error


def load_whole(
    root: Module,
    averaged: Mapping[str, Module],  # the averaged modules in it, by the prefixes of the averaged models' keys
    load: Callable[..., Any],
    state_dict: Mapping[str, Any],
    *,
    strict: bool,
    assign: bool,
) -> Any:
    """Call torch's loader ``load`` once, and return its result. If anything raises, nothing in ``root`` has changed.

    During the call a :class:`LateCopy` stands for each tensor, so that torch checks keys and shapes, and hooks rename
    keys, before anything is written. Modules with code of their own for loading may write at once: their tensors stay
    in place, and are copied aside first. With ``assign`` torch writes no tensor, so the old ones are put back.

    Raises:
        RuntimeError: keys, shapes or values do not fit, with torch's message.
    """
    if not isinstance(state_dict, Mapping):
        return load(state_dict)  # torch's loader raises before it changes anything
    state: OrderedDict[str, Any] = OrderedDict(state_dict)
    set_metadata(state, metadata_of(state_dict))
    for prefix, module in averaged.items():
        fit_keys(module, state, prefix)
    way_back = WayBack(root, assign=assign)
    metadata = metadata_of(state) or {}
    for name in way_back.names:  # torch tells no module of ``strict``
        metadata.setdefault(name, {})[STRICT] = strict
    set_metadata(state, metadata)
    for place in way_back.places if not assign else ():
        if id(place.tensor) not in way_back.late and isinstance(state.get(place.key), Tensor):
            _check_copy(root, place, state[place.key])  # torch copies it at once, whatever it is
    writes: list[tuple[Tensor, Tensor]] = []
    is_writing = False
    try:
        way_back.put_late_copies()
        with ExitStack() as ties:
            for module in averaged.values():
                ties.enter_context(keeping_ties(module))
            result = load(state, strict=strict, assign=assign)
        for place, late_copy in way_back.late.values():
            # After an exchange by torch it is the source itself, of another class.
            source = late_copy.source if type(late_copy) is LateCopy else late_copy
            if source is not None:
                _check_copy(root, place, source)
                writes.append((place.tensor, source))
        writes = without_lent(writes)
        way_back.put_back_tensors()
        is_writing = True
        write_all(writes)
    except BaseException as error:
        if is_writing:
            write_all(writes)  # an interrupt may have come before the first
        else:
            way_back.go()
        if type(error) is RuntimeError and str(error).startswith("Error(s) in loading state_dict"):  # torch's own
            loader = "FusedAverages" if hasattr(root, "keys") else "FusedAveragedModel"
            names = {name for module in averaged.values() for name in _names_in_state(module)}
            hint = misfits.of_state(state, names, loader)
            if not hint and misfits.SIZE in str(error):
                hint = f": if the model has changed since, {other_names.after_loading(loader)}"
            raise RuntimeError(misfits.shortened(str(error)) + hint) from error.__cause__
        raise
    return result


def _names_in_state(module: Module) -> Iterable[str]:
    """Yield the names of the tensors that a state of an averaged module has, as :func:`fit_keys` spells them."""
    passing = passing_names(module)
    return (name for name, _ in all_tensors(module) if canonical(name) not in passing)


def _check_copy(root: Module, place: Place, source: Tensor) -> None:
    """Raise RuntimeError, worded as torch's, for a tensor that cannot be copied without loss of a part."""
    tensor, what = place.tensor, f"state_dict[{place.key!r}]"
    if tensor.is_meta:
        return  # torch has warned that nothing is copied
    try:
        check_plain(what, source)
        if tensor.layout != torch.strided:
            raise ValueError(f"{what} must be in {tensor.layout}, got {source.layout}")
        if source.dtype != tensor.dtype:
            check_cast(what, source, tensor.dtype)
        if tensor.numel() > extent(tensor.shape, tensor.stride()):
            raise ValueError(f"{place.key!r} must not overlap itself to be loaded, got strides {tensor.stride()}")
    except ValueError as error:
        if not is_plain(tensor) and are_alike(tensor, source):
            return  # torch copies it
        raise load_error(root, error) from error


class LateCopy(Tensor):
    """Stands for a tensor of a module while torch's loader runs, and keeps what is to be copied into it."""

    source: Tensor | None = None

    def copy_(self, source: Tensor, non_blocking: bool = False) -> LateCopy:
        if source is self:  # the state has the tensor's own values
            return self
        self.source = source
        return self

    def module_load(self, other: Tensor, assign: bool = False) -> Tensor:
        """Return what torch then exchanges with this tensor, if the user has told it to exchange tensors."""
        return other.detach()


class WayBack:
    """What a load may change in a tree of modules, noted before it, and the way back there.

    If a module has code of its own for loading, the values of all are noted, since that code may read and write any of
    them. Otherwise they are noted of tensors for which no late copy can stand.

    Args:
        assign: tensors may be replaced, or exchanged in place with others.
    """

    def __init__(self, root: Module, *, assign: bool) -> None:
        modules = dict(named_modules(root, distinct=True))
        self.names = list(modules)
        coded = [module for module in modules.values() if loads_by_own_code(module)]
        if coded and not torch.__future__.get_swap_module_params_on_conversion():
            coded = [root]  # torch cannot exchange all tensors in place: those of RNNs have weak references
        with_code = {id(each) for module in coded for _, each in named_modules(module)}
        self.places = [
            Place(f"{prefix}.{name}".lstrip("."), module, held_in, name, tensor)
            for prefix, module in modules.items()
            for held_in in (own_params(module), own_buffers(module))
            for name, tensor in held_in.items()
            if tensor is not None
        ]
        self._dicts: list[tuple[MutableMapping[str, Any], dict[str, Any]]] = [
            (kept, dict(kept.items()))
            for module in modules.values()
            for kept in (own_params(module), own_buffers(module), own_children(module), module.__dict__)
        ]
        self._passing = [(passing_buffers(module), set(passing_buffers(module))) for module in modules.values()]
        self._extra: list[tuple[Module, Any]] = []
        for module in modules.values():
            if id(module) in with_code:
                with suppress(Exception):  # it has no extra state, or one that cannot be copied
                    self._extra.append((module, copy.deepcopy(module.get_extra_state())))
        #: Late copies by id of the tensor, each with its first place.
        self.late: dict[int, tuple[Place, LateCopy]] = {}
        # (tensor, the same memory, its values)
        self._memory: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        kept = {id(place.tensor) for place in self.places if id(place.module) in with_code}
        for place in self.places:
            tensor = place.tensor
            if id(tensor) in self._memory or id(tensor) in self.late:
                continue
            late_copy = None
            if not (assign or id(tensor) in kept or has_own_dispatch(tensor) or tensor.is_inference()):
                with suppress(RuntimeError):  # some tensors that stand on memory made in inference mode
                    memory = tensor.detach()
                    if tensor.layout != torch.strided:  # another class cannot have its memory: one element stands in
                        memory = torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
                    late_copy = memory.as_subclass(LateCopy)
            if late_copy is not None:
                self.late[id(tensor)] = (place, late_copy)
            else:
                memory, is_written = tensor.detach(), not assign or id(tensor) in kept or has_own_dispatch(tensor)
                self._memory[id(tensor)] = (tensor, memory, memory.clone() if is_written else None)

    def put_late_copies(self) -> None:
        for place in self.places:
            if id(place.tensor) in self.late:
                place.held_in[place.name] = self.late[id(place.tensor)][1]

    def put_back_tensors(self) -> None:
        """Put the tensors back that late copies stand for."""
        for place in self.places:
            if id(place.tensor) in self.late:
                place.held_in[place.name] = place.tensor

    def go(self) -> None:
        """Put everything back as it was."""
        for module, extra in self._extra:
            with suppress(Exception):
                module.set_extra_state(extra)
        for tensor, memory, values in self._memory.values():
            if not has_own_dispatch(tensor) and memory.layout == torch.strided and not _same_memory(tensor, memory):
                tensor.data = memory
            if values is not None:
                # What cannot be written outside of inference mode, the load has not written either.
                with suppress(RuntimeError):
                    memory.copy_(values)
        for passing, names in self._passing:
            passing.clear()
            passing.update(names)
        for now, before in self._dicts:
            for name in [name for name in now.keys() if name not in before]:  # noqa: SIM118  # see Walk
                del now[name]
            for name, value in before.items():
                if name not in now or now[name] is not value:
                    now[name] = value
        for place in self.places:
            put_tensor(place.module, place.held_in, place.name, place.tensor)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    are_meta = one.is_meta and other.is_meta
    return one.dtype == other.dtype and (are_meta or one.is_set_to(other))
