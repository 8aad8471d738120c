"""The further planes of an averaged model: how they are registered, and how they follow casts and states."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.nn import Module

from ..terms.formats import EXTRA_PLANES, Format, format_of_planes
from ..terms.names import passing_names, unwrap
from ..terms.pickling import pickled_from
from ..torch_private.modules import own_buffers, own_children, passing_buffers


@pickled_from("swafast")
class PlaneTree(Module):
    """Planes as buffers of nested modules, so that a state dict has them under dotted names."""

    def find(self, name: str) -> Tensor | None:
        *path, leaf = name.split(".")
        node: Module | None = self
        for segment in path:
            node = own_children(node).get(segment) if node is not None else None
        return None if node is None else own_buffers(node).get(leaf)

    def put(self, name: str, tensor: Tensor | None, *, in_state: bool = True) -> None:
        """Set the tensor under ``name``, or with None remove the name, and modules that are then empty."""
        head, _, rest = name.partition(".")
        if not rest:
            # Write to the dict: register_buffer refuses some names that a ParameterDict allows.
            if tensor is None:
                own_buffers(self).pop(head, None)
            else:
                own_buffers(self)[head] = tensor
                (passing_buffers(self).discard if in_state else passing_buffers(self).add)(head)
            return
        child = own_children(self).setdefault(head, PlaneTree())
        assert isinstance(child, PlaneTree)
        child.put(rest, tensor, in_state=in_state)
        if not own_buffers(child) and not own_children(child):
            del own_children(self)[head]


def put_plane(owner: Module, plane: str, name: str, tensor: Tensor | None) -> None:
    tree = own_children(owner).get(plane)
    if tensor is None and not isinstance(tree, PlaneTree):
        return
    if tree is None:
        # Write to the dict: add_module refuses the name if a subclass has an attribute of this name.
        tree = own_children(owner)[plane] = PlaneTree()
    assert isinstance(tree, PlaneTree)
    # The plane of a non-persistent buffer is left out of states, as the buffer is.
    passing: frozenset[str] | None = owner.__dict__.get("_passing")
    if passing is None:
        passing = owner.__dict__["_passing"] = passing_names(unwrap(owner.module))  # type: ignore[arg-type]
    tree.put(name, tensor, in_state=name not in passing)
    if not own_buffers(tree) and not own_children(tree):
        del own_children(owner)[plane]


def put_planes(owner: Module, name: str, fmt: Format | None, extra: Sequence[Tensor]) -> None:
    """Set the further planes of an average to ``extra``, one for each of ``fmt``, and remove all others."""
    planes = dict(zip((plane for plane, _ in fmt.extra), extra, strict=True)) if fmt is not None else {}
    for plane in EXTRA_PLANES:
        put_plane(owner, plane, name, planes.get(plane))


@torch.inference_mode(False)
@torch.no_grad()
def fit_planes(owner: Module, name: str, average: Tensor, fmt: Format | None) -> tuple[Tensor, ...]:
    """Return all planes of ``average`` in format ``fmt``; make those that do not fit, and remove other formats'."""
    extra = fmt.extra if fmt is not None else ()
    for plane in EXTRA_PLANES:
        if plane not in dict(extra):
            put_plane(owner, plane, name, None)
    planes = [average]
    for index, (plane, dtype) in enumerate(extra, start=1):
        tree = own_children(owner).get(plane)
        tensor = tree.find(name) if isinstance(tree, PlaneTree) else None
        if tensor is None or tensor.dtype != dtype or tensor.shape != average.shape:
            assert fmt is not None
            fresh = fmt.encode(average.detach().to(fmt.value_dtype))
            tensor = torch.empty_like(average, dtype=dtype).copy_(fresh[index]).detach()
            put_plane(owner, plane, name, tensor)
        elif tensor.device != average.device:
            tensor.data = tensor.data.to(average.device)
        planes.append(tensor)
    return tuple(planes)


def convert(planes: tuple[Tensor, ...], fmt: Format, average: Tensor, after: Format | None) -> tuple[Tensor, ...]:
    """Convert planes of ``fmt`` to planes of ``after``, from the average at full precision.

    Args:
        average: ``planes[0]`` as torch has cast it. Its device, dtype and strides are used, its values are not.
        after: the format for ``average``'s dtype; None if that dtype cannot be averaged: then ``average`` is returned.
    """
    if after is None or after is fmt:
        return (average,)
    value = fmt.decode(planes).to(device=average.device, dtype=after.value_dtype or average.dtype)
    return tuple(torch.empty_like(average, dtype=plane.dtype).copy_(plane) for plane in after.encode(value))


def translate_state(
    state: MutableMapping[str, Tensor],
    prefix: str,
    keys: Mapping[str, Sequence[str]],
    formats: Mapping[str, Format],
    strict: bool,
) -> None:
    """Rewrite a state dict in place so that it has the planes of this averaged model's formats.

    Planes are converted from the average at full precision, so float32 values fill both planes of ``exact``, and the
    planes of ``exact`` give float32 values. A state without further planes, such as torch's, gets them too.

    Args:
        prefix: the prefix of the averaged model's keys in ``state``.
        keys: for each average, its keys in ``state``: none if it is missing, several if it is tied.
        formats: for each average, its format in this averaged model.
        strict: do not rewrite an average with missing planes, so that the load reports them.
    """
    present = {plane for plane in EXTRA_PLANES if any(key.startswith(f"{prefix}{plane}.") for key in state)}
    for name, fmt in formats.items():
        if not keys[name]:
            continue
        average = state[keys[name][0]]
        extra = {plane: state[key] for plane in EXTRA_PLANES if (key := f"{prefix}{plane}.{name}") in state}
        if not all(isinstance(tensor, Tensor) for tensor in extra.values()):
            continue  # torch's loader raises
        before = format_of_planes(average, extra)
        # Planes are missing only if other averages in the state have them; else the state is of another format.
        has_planes = any(plane in present for plane, _ in fmt.extra)
        lacking = fmt.dtype == average.dtype and len(fmt.extra) > len(extra)
        if before is fmt or (strict and has_planes and (lacking or before is None)):
            continue
        if before is not None:
            value = before.decode((average, *(extra[plane] for plane, _ in before.extra)))
        else:
            value = average  # the further planes do not fit it
        first, *rest = fmt.encode(value.to(fmt.value_dtype) if fmt.value_dtype is not None else value)
        for plane in extra:
            state.pop(f"{prefix}{plane}.{name}")
        for key in keys[name]:
            state[key] = first
        for (plane, _), tensor in zip(fmt.extra, rest, strict=True):
            state[f"{prefix}{plane}.{name}"] = tensor


def keeps_values(fn: Callable[[Tensor], Tensor]) -> bool:
    """Return whether a function for torch's ``_apply`` keeps values, unlike that of ``to_empty``.

    It is tried on random numbers that every dtype can hold, since memory that is empty may hold any others.
    """
    numbers = torch.tensor([secrets.randbits(7) for _ in range(32)], device="cpu")
    result = fn(numbers)
    return not result.is_meta and torch.equal(result.to("cpu", torch.int64), numbers)


class Recast:
    """A function for torch's ``_apply`` that moves or casts an averaged model; call :meth:`finish` afterwards.

    torch would cast plane 0 alone. This casts the average at full precision. Further planes change their device, but
    never their dtype.
    """

    def __init__(
        self,
        averages: Mapping[int, tuple[str, tuple[Tensor, ...], Format]],
        fn: Callable[[Tensor], Tensor],
        format_of: Callable[[torch.dtype], Format | None],
    ) -> None:
        self._averages = averages
        self._planes = {id(plane) for _, planes, _ in averages.values() for plane in planes[1:]}
        self._fn = fn
        self._format_of = format_of
        self._recast: dict[str, tuple[Format | None, tuple[Tensor, ...]]] = {}
        self.moved = False  # whether an average went to another device

    def __call__(self, tensor: Tensor) -> Tensor:
        result = self._fn(tensor)
        if id(tensor) in self._planes:
            return result if result.dtype == tensor.dtype else tensor.to(result.device)
        average = self._averages.get(id(tensor))
        if average is None:
            return result
        self.moved |= result.device != tensor.device and "meta" not in (result.device.type, tensor.device.type)
        if result.dtype == tensor.dtype:
            return result
        name, planes, fmt = average
        after = self._format_of(result.dtype)
        recast = convert(planes, fmt, result, after)
        self._recast[name] = (after, recast)
        return recast[0]

    def finish(self, owner: Module) -> None:
        """Set the further planes of recast averages, which must wait until torch has walked over the modules."""
        for name, (fmt, planes) in self._recast.items():
            put_planes(owner, name, fmt, planes[1:])
