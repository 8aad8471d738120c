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
from ..terms import misfits
from ..terms.converting import convert
from ..terms.copying import duplicate
from ..terms.formats import FLOAT32, OWN, Format
from ..terms.names import canonical, names_in_states, rewrapping, unwrap
from ..terms.plane_names import VARIANCE
from ..terms.spread import Spread
from ..torch_private.modules import ASSIGN, Place, metadata_of, named_tensors, places, put_tensor, set_metadata
from .bindings import WithBindings
from .matching import FormatOf, each_average
from .planes import fit_planes, put_planes, translate_state

#: The key of a module's metadata in a state that is being loaded.
STRICT = "strict"


@contextmanager
def keeping_ties(module: Module) -> Iterator[None]:
    """On leaving, tie again the tensors that were tied before, since ``assign=True`` gives each name its own tensor."""
    tied: dict[int, list[Place]] = {}
    for place in (*places(module), *places(module, buffers=True)):
        tied.setdefault(id(place.tensor), []).append(place)
    yield
    for first, *others in tied.values():
        for place in others:
            put_tensor(place.module, place.held_in, place.name, first.held_in[first.name])


def all_tensors(module: Module) -> list[tuple[str, Tensor]]:
    return [*named_tensors(module), *named_tensors(module, buffers=True)]


def load_error(root: Module, what: object) -> RuntimeError:
    """Return an error that is worded as torch's of a load."""
    return RuntimeError(f"Error(s) in loading state_dict for {type(root).__name__}:\n\t{what}")


def fit_keys(module: Module, state: Any, prefix: str) -> None:
    """Rename, in place, the keys in ``state`` of an averaged ``module`` if its model was wrapped in another way.

    Args:
        prefix: the prefix of the averaged model's keys.
    """
    head, root = f"{prefix}module.", f"{prefix}module"
    metadata = metadata_of(state) or {}
    paths = [path[len(head) :] for path in metadata if path == root or path.startswith(head)]
    names, sources = rewrapping(module, [key[len(head) :] for key in state if key.startswith(head)], paths)
    if not names:
        return
    keys = {head + name: head + own for name, own in names.items()}
    if len({*keys.values()}) == len(keys) and any(before != after for before, after in keys.items()):
        items = list(state.items())
        state.clear()
        state.update((keys.get(key, key), value) for key, value in items)
    found = {(head + own).rstrip("."): metadata[(head + path).rstrip(".")] for own, path in sources.items()}
    set_metadata(state, metadata | found or None)


def translate_load(
    owner: Module, module: Module, state: Any, prefix: str, format_of: FormatOf, metadata: Mapping[str, Any]
) -> None:
    """Rewrite ``state`` in place for the formats that the averages of ``owner`` will have after the load.

    Args:
        metadata: of ``owner``, in the state. It tells whether the load assigns, and whether it is strict.

    Raises:
        RuntimeError: its count is not one integer >= 0; a tensor would lose a part when it is copied; or it has the
            spread of other averages. Without ``strict`` too, or the averages would keep that of other models.
    """
    fit_keys(module, state, prefix)
    assign, strict = bool(metadata.get(ASSIGN, False)), bool(metadata.get(STRICT, True))
    count = state.get(f"{prefix}n_averaged")
    if isinstance(count, Tensor) and count.numel() == 1 and not count.is_meta:
        number = count.item()
        if not isinstance(number, int) or not 0 <= number < 2**63:
            raise load_error(owner, f"'{prefix}n_averaged' must be one integer from 0 to 2^63 - 1, got {number}")
        state[f"{prefix}n_averaged"] = count.to(torch.int64, copy=assign)  # else both would count
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
    spreads: dict[str, Spread | None] = {}  # of averages that have one here or in the state
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
        if names[name] and (fmt.spread is not None or f"{prefix}{VARIANCE}.{name}" in state):
            spreads[name] = fmt.spread
        if assign:
            room = [torch.zeros_like(kept.detach(), dtype=dtype) for _, dtype in fmt.further]
            put_planes(owner, name, fmt, room)  # the assignment replaces them
    if spreads and (differs := misfits.of_spreads(state, prefix, spreads)):
        raise load_error(owner, differs)
    translate_state(state, prefix, names, formats, strict, casts=assign)
    if assign:
        _own_averages(owner, state, prefix, names, formats)


def _own_averages(
    owner: Module, state: Any, prefix: str, names: Mapping[str, Sequence[str]], formats: Mapping[str, Format]
) -> None:
    """Put copies in the place of the averages in a state that is to be assigned, since others may write its tensors."""
    assert isinstance(owner, WithBindings)
    for name, fmt in formats.items():
        for keys in (names[name], *([f"{prefix}{plane}.{name}"] for plane, _ in fmt.further)):
            given = [key for key in keys if isinstance(state.get(key), Tensor)]
            if given:
                own = state[given[0]].detach().clone()
                state.update(dict.fromkeys(given, own))
                owner._bindings.homes |= stay([own] if not own.is_meta else [])


def leave_out(module: Module, tensors: Collection[int], state: MutableMapping[str, Any], prefix: str) -> None:
    """Take tensors of a ``module``, given by id, out of its state. ``prefix`` is that of its keys."""
    for key, _ in _in_state(module, tensors, prefix):
        state.pop(key, None)


def fill_in(module: Module, tensors: Collection[int], state: MutableMapping[str, Any], prefix: str) -> None:
    """Put tensors of a ``module``, given by id, into a state that was taken without any of them."""
    own = dict(_in_state(module, tensors, prefix))
    if not own.keys() & state.keys():
        state.update(own)


def _in_state(module: Module, tensors: Collection[int], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of a ``module``, given by id, with their keys in a state."""
    names = names_in_states(module) if tensors else {}
    for name, tensor in named_tensors(module) if tensors else ():
        if id(tensor) in tensors:
            yield prefix + names[name], tensor


def export(
    owner: Module,
    module: Module,
    averages: Iterable[tuple[str, Tensor, Format | None]],
    dtype: torch.dtype | None,
    left_out: Collection[int] = (),
) -> dict[str, Any]:
    """Return copies of the averages, at full precision, and of the other tensors, under the model's own names.

    Tied names have one tensor. With ``dtype``, all floating tensors are cast to it. ``left_out`` has the ids of tensors
    that are not exported.

    Raises:
        ValueError: ``dtype`` is neither a floating dtype nor None.
    """
    check_export(dtype)
    known = {id(tensor): (fit_planes(owner, name, tensor, fmt), fmt) for name, tensor, fmt in averages}
    exported: dict[int, Tensor] = {}
    state: dict[str, Any] = {}
    for key, value in unwrap(module).state_dict(keep_vars=True).items():
        if id(value) in left_out:
            continue
        if isinstance(value, Tensor):
            if id(value) not in exported:
                exported[id(value)] = exported_copy(*known.get(id(value), ((value,), None)), dtype)
            value = exported[id(value)]
        state[canonical(key)] = value
    return state


def check_export(dtype: object) -> None:
    """Raise ValueError unless ``dtype`` is a floating dtype or None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")


def exported_copy(planes: Sequence[Tensor], fmt: Format | None, dtype: torch.dtype | None) -> Tensor:
    """Return a copy of an average at full precision, or of another tensor; if it is floating, cast to ``dtype``."""
    value = planes[0].detach()
    rounded = FLOAT32 if fmt is not None and fmt.dtype is not None else OWN
    cast = dtype if dtype is not None and value.is_floating_point() else rounded.dtype or value.dtype
    if fmt is None:
        return duplicate(value).to(cast)
    copied = torch.empty_like(value, dtype=cast)
    convert(planes, fmt, (copied,), rounded)
    return copied
