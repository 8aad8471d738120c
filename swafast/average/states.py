"""States of an averaged model: load all of one or nothing, and export the averages under the model's own names."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..terms.formats import FLOAT32, OWN, Format, convert
from ..terms.names import canonical, unwrap
from ..torch_private.modules import copy_metadata, own_buffers, own_params
from .matching import FormatOf, each_average
from .planes import find_planes, fit_planes, put_planes, translate_state


def check_state(owner: Module, state_dict: Mapping[str, Any], strict: bool, assign: bool) -> None:
    """Raise the error that loading ``state_dict`` into ``owner`` would raise, by loading it into a copy without data.

    torch's own loader does the checks, so hooks that rename keys or fill in missing ones run as well.
    """
    if not isinstance(state_dict, Mapping):
        return  # torch's loader raises before it changes anything
    memo: dict[int, Any] = {id(tensor): _without_data(tensor) for tensor in chain(owner.parameters(), owner.buffers())}
    try:
        skeleton = copy.deepcopy(owner, memo)
    except Exception:
        # An attribute that the user has set cannot be copied. The load still works, but may stop half-way, as torch's.
        return
    state = OrderedDict(
        (key, value.to("meta") if isinstance(value, Tensor) and not key.endswith("_extra_state") else value)
        for key, value in state_dict.items()
    )
    copy_metadata(state, state_dict)
    if not assign:
        _check_values(skeleton, owner, state_dict)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of copies to meta tensors
            Module.load_state_dict(skeleton, state, strict=strict)
    except Exception as error:
        if str(error).startswith("Error(s) in loading state_dict"):
            raise
        # Ignored: a module that reads values while it loads fails on meta tensors only.


def _check_values(skeleton: Module, owner: Module, state_dict: Mapping[str, Any]) -> None:
    """Raise RuntimeError, worded as torch's, for a tensor that cannot be copied: the copy without data accepts it."""
    if all(param.is_meta for param in owner.parameters()):
        return
    own = Module.state_dict(skeleton)
    for key, value in state_dict.items():
        if key in own and isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
            what = "meta" if value.is_meta else str(value.layout)
            raise RuntimeError(
                f"Error(s) in loading state_dict for {type(owner).__name__}:\n\t"
                f"{key!r} must be a dense tensor with values, got one of {what}"
            )


def _without_data(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor.detach(), device="meta")
    return Parameter(empty, tensor.requires_grad) if isinstance(tensor, Parameter) else empty


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
                    tied[leaf] = kept[first_leaf]


def _all_tensors(module: Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def translate_load(
    owner: Module, module: Module, state: Any, prefix: str, format_of: FormatOf, *, assign: bool, strict: bool
) -> None:
    """Rewrite ``state`` in place for the formats that the averages of ``owner`` will have after the load."""
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
    written: dict[str, Tensor] = {}  # plane 0 of each average that the load writes in place
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
        else:
            written[name] = tensor

    def own(name: str, fmt: Format) -> Sequence[Tensor]:
        planes = [written[name], *find_planes(owner, name, written[name], fmt)] if name in written else []
        return [plane for plane in planes if plane is not None]

    translate_state(state, prefix, names, formats, strict, own)


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
