"""States of an averaged model: what a load makes of them, and the export under the model's own names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..op.buckets import stay
from ..op.checks import check_cast
from ..terms.formats import FLOAT32, OWN, Format, convert
from ..terms.names import canonical, unwrap
from ..torch_private.modules import ASSIGN, named_tensors, own_buffers, own_params, put_tensor
from .matching import FormatOf, WithBindings, each_average
from .planes import fit_planes, put_planes, translate_state

#: The key of a module's metadata in a state that is being loaded.
STRICT = "strict"


@contextmanager
def keeping_ties(module: Module) -> Iterator[None]:
    """On leaving, tie again the tensors that were tied before, since ``assign=True`` gives each name its own tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in _all_tensors(module):
        names.setdefault(id(tensor), []).append(name)
    yield
    for first, *others in names.values():
        for name in others:
            first_path, _, first_leaf = first.rpartition(".")
            path, _, leaf = name.rpartition(".")
            first_module, tied_module = module.get_submodule(first_path), module.get_submodule(path)
            for kept, tied in (
                (own_params(first_module), own_params(tied_module)),
                (own_buffers(first_module), own_buffers(tied_module)),
            ):
                if first_leaf in kept:
                    put_tensor(tied_module, tied, leaf, kept[first_leaf])


def _all_tensors(module: Module) -> list[tuple[str, Tensor]]:
    return [*named_tensors(module), *named_tensors(module, buffers=True)]


def load_error(root: Module, what: object) -> RuntimeError:
    """Return an error that is worded as torch's of a load."""
    return RuntimeError(f"Error(s) in loading state_dict for {type(root).__name__}:\n\t{what}")


def translate_load(
    owner: Module, module: Module, state: Any, prefix: str, format_of: FormatOf, metadata: Mapping[str, Any]
) -> None:
    """Rewrite ``state`` in place for the formats that the averages of ``owner`` will have after the load.

    Args:
        metadata: of ``owner``, in the state. It tells whether the load assigns, and whether it is strict.

    Raises:
        RuntimeError: its count is not one integer >= 0, or a tensor would lose a part when it is copied.
    """
    assign, strict = bool(metadata.get(ASSIGN, False)), bool(metadata.get(STRICT, True))
    count = state.get(f"{prefix}n_averaged")
    if isinstance(count, Tensor) and count.numel() == 1 and not count.is_meta:
        number = count.item()
        if not isinstance(number, int) or number < 0:
            raise load_error(owner, f"'{prefix}n_averaged' must be one integer >= 0, got {number}")
        state[f"{prefix}n_averaged"] = count.to(torch.int64, copy=assign)  # else both would count
    head = f"{prefix}module."
    # Some wrappers leave their segments out of the keys of states, so look keys up by canonical names.
    given = {canonical(key[len(head) :]): key for key in state if key.startswith(head)}
    keys: dict[int, list[str]] = {}
    for raw, tensor in _all_tensors(module):
        key = given.get(canonical(raw))
        if key is not None and isinstance(state[key], Tensor):
            keys.setdefault(id(tensor), []).append(key)
    formats: dict[str, Format] = {}
    names: dict[str, list[str]] = {}
    for (name, *_), tensor, is_buffer in each_average(module):
        names[name] = keys.get(id(tensor), [])
        for key in names[name] if not (assign or tensor.is_meta) else ():
            if state[key].dtype != tensor.dtype:
                try:
                    check_cast(f"state_dict[{key!r}]", state[key], tensor.dtype)
                except ValueError as error:
                    raise load_error(owner, error) from error
        kept = state[names[name][0]] if assign and names[name] else tensor
        fmt = format_of(name, kept, is_buffer)
        if fmt is None:
            continue
        formats[name] = fmt
        if assign:
            room = [torch.zeros_like(kept.detach(), dtype=dtype) for _, dtype in fmt.extra]
            put_planes(owner, name, fmt, room)  # the assignment replaces them
    translate_state(state, prefix, names, formats, strict)
    if assign:
        _own_averages(owner, state, prefix, names, formats)


def _own_averages(
    owner: Module, state: Any, prefix: str, names: Mapping[str, Sequence[str]], formats: Mapping[str, Format]
) -> None:
    """Put copies in the place of the averages in a state that is to be assigned, since others may write its tensors."""
    assert isinstance(owner, WithBindings)
    for name, fmt in formats.items():
        for keys in (names[name], *([f"{prefix}{plane}.{name}"] for plane, _ in fmt.extra)):
            given = [key for key in keys if isinstance(state.get(key), Tensor)]
            if given:
                own = state[given[0]].detach().clone()
                state.update(dict.fromkeys(given, own))
                owner._bindings.homes |= stay([own] if not own.is_meta else [])


def leave_out(module: Module, tensors: Collection[int], state: MutableMapping[str, Any], prefix: str) -> None:
    """Take tensors of a ``module``, given by id, out of its state. ``prefix`` is that of its keys."""
    for name, tensor in named_tensors(module):
        if id(tensor) in tensors:
            state.pop(prefix + name, None)


def fill_in(module: Module, tensors: Collection[int], state: MutableMapping[str, Any], prefix: str) -> None:
    """Put tensors of a ``module``, given by id, into a state that was taken without any of them."""
    own = {prefix + name: tensor for name, tensor in named_tensors(module) if id(tensor) in tensors}
    if not own.keys() & state.keys():
        state.update(own)


def export(
    owner: Module,
    module: Module,
    averages: Iterable[tuple[str, Tensor, Format | None]],
    dtype: torch.dtype | None,
    left_out: Collection[int] = (),
) -> dict[str, Any]:
    """Return copies of the averages, at full precision, and of the other tensors, under the model's own names.

    With ``dtype``, all floating tensors are cast to it. ``left_out`` has the ids of tensors that are not exported.

    Raises:
        ValueError: ``dtype`` is neither a floating dtype nor None.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
    known = {id(tensor): (fit_planes(owner, name, tensor, fmt), fmt) for name, tensor, fmt in averages}
    state: dict[str, Any] = {}
    for key, value in unwrap(module).state_dict(keep_vars=True).items():
        if id(value) in left_out:
            continue
        if isinstance(value, Tensor):
            planes, fmt = known.get(id(value), ((value,), None))
            rounded = FLOAT32 if fmt is not None and fmt.dtype is not None else OWN
            cast = dtype if dtype is not None and value.is_floating_point() else rounded.dtype or value.dtype
            value = torch.empty_like(value.detach(), dtype=cast)
            convert(planes, fmt, (value,), rounded)
        state[canonical(key)] = value
    return state
