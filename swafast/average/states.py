"""States of an averaged model: what a load makes of them, and the export under the model's own names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..terms.formats import FLOAT32, OWN, Format, convert
from ..terms.names import canonical, unwrap
from ..torch_private.modules import named_tensors, own_buffers, own_params, put_tensor
from .matching import FormatOf, each_average
from .planes import fit_planes, put_planes, translate_state


@contextmanager
def keeping_ties(module: Module) -> Iterator[None]:
    """On leaving, tie again the tensors that were tied before, since ``assign=True`` gives each name its own tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in all_tensors(module):
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


def all_tensors(module: Module) -> list[tuple[str, Tensor]]:
    return [*named_tensors(module), *named_tensors(module, buffers=True)]


def translate_load(
    owner: Module, module: Module, state: Any, prefix: str, format_of: FormatOf, *, assign: bool, strict: bool
) -> None:
    """Rewrite ``state`` in place for the formats that the averages of ``owner`` will have after the load.

    Raises:
        RuntimeError: its count is not one integer >= 0.
    """
    count = state.get(f"{prefix}n_averaged")
    if isinstance(count, Tensor) and count.numel() == 1 and not count.is_meta:
        number = count.item()
        if not isinstance(number, int) or number < 0:
            raise RuntimeError(
                f"Error(s) in loading state_dict for {type(owner).__name__}:\n\t"
                f"'{prefix}n_averaged' must be one integer >= 0, got {number}"
            )
        state[f"{prefix}n_averaged"] = count.to(torch.int64)
    head = f"{prefix}module."
    # Some wrappers leave their segments out of the keys of states, so look keys up by canonical names.
    given = {canonical(key[len(head) :]): key for key in state if key.startswith(head)}
    keys: dict[int, list[str]] = {}
    for raw, tensor in all_tensors(module):
        key = given.get(canonical(raw))
        if key is not None and isinstance(state[key], Tensor):
            keys.setdefault(id(tensor), []).append(key)
    formats: dict[str, Format] = {}
    names: dict[str, list[str]] = {}
    for (name, *_), tensor, is_buffer in each_average(module):
        names[name] = keys.get(id(tensor), [])
        kept = state[names[name][0]] if assign and names[name] else tensor
        fmt = format_of(name, kept, is_buffer)
        if fmt is None:
            continue
        formats[name] = fmt
        if assign:
            room = [torch.zeros_like(kept.detach(), dtype=dtype) for _, dtype in fmt.extra]
            put_planes(owner, name, fmt, room)  # the assignment replaces them
    translate_state(state, prefix, names, formats, strict)


def export(
    owner: Module, module: Module, averages: Iterable[tuple[str, Tensor, Format | None]], dtype: torch.dtype | None
) -> dict[str, Any]:
    """Return copies of the averages, at full precision, and of the other tensors, under the model's own names.

    With ``dtype``, all floating tensors are cast to it.

    Raises:
        ValueError: ``dtype`` is neither a floating dtype nor None.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
    known = {id(tensor): (fit_planes(owner, name, tensor, fmt), fmt) for name, tensor, fmt in averages}
    state: dict[str, Any] = {}
    for key, value in unwrap(module).state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            planes, fmt = known.get(id(value), ((value,), None))
            rounded = FLOAT32 if fmt is not None and fmt.dtype is not None else OWN
            cast = dtype if dtype is not None and value.is_floating_point() else rounded.dtype or value.dtype
            value = torch.empty_like(value.detach(), dtype=cast)
            convert(planes, fmt, (value,), rounded)
        state[canonical(key)] = value
    return state
