"""The further planes of an averaged model: how they are registered, and how they follow casts and states."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from ..terms.converting import convert
from ..terms.formats import EXTRA_PLANES, Format, format_of_planes, with_spread
from ..terms.names import passing_names, unwrap
from ..terms.pickling import pickled_from
from ..torch_private.modules import named_tensors, own_buffers, own_children, passing_buffers


@pickled_from("swafast")
class PlaneTree(Module):
    """Planes as buffers of nested modules, so that a state dict has them under dotted names."""

    only_holds_tensors = True  # for a walk

    def find(self, name: str) -> Tensor | None:
        buffers, leaf = self._buffers_of(name)
        return buffers.get(leaf)

    def empty(self, name: str) -> None:
        """Free the tensor under ``name``, and keep the name."""
        buffers, leaf = self._buffers_of(name)
        if leaf in buffers:
            buffers[leaf] = None

    def _buffers_of(self, name: str) -> tuple[dict[str, Tensor | None], str]:
        """Return the buffers of the node that ``name`` is in, and its last segment."""
        *path, leaf = name.split(".")
        node: Module | None = self
        for segment in path:
            node = own_children(node).get(segment) if node is not None else None
        return own_buffers(node) if node is not None else {}, leaf

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
    head, _, rest = f"{plane}.{name}".partition(".")  # a column of deviations is a tree in one
    tree = own_children(owner).get(head)
    if tensor is None and not isinstance(tree, PlaneTree):
        return
    if tree is None:
        # Write to the dict: add_module refuses the name if a subclass has an attribute of this name.
        tree = own_children(owner)[head] = PlaneTree()
    assert isinstance(tree, PlaneTree)
    # The plane of a non-persistent buffer is left out of states, as the buffer is.
    passing: frozenset[str] | None = owner.__dict__.get("_passing")
    if passing is None:
        passing = owner.__dict__["_passing"] = passing_names(unwrap(owner.module))  # type: ignore[arg-type]
    tree.put(rest, tensor, in_state=name not in passing)
    if not own_buffers(tree) and not own_children(tree):
        del own_children(owner)[head]


def find_plane(owner: Module, plane: str, name: str) -> Tensor | None:
    head, _, rest = f"{plane}.{name}".partition(".")
    tree = own_children(owner).get(head)
    return tree.find(rest) if isinstance(tree, PlaneTree) else None


def put_planes(owner: Module, name: str, fmt: Format | None, extra: Sequence[Tensor]) -> None:
    """Set the further planes of an average to ``extra``, one for each of ``fmt``, and remove all others."""
    planes = dict(zip((plane for plane, _ in fmt.further), extra, strict=True)) if fmt is not None else {}
    for plane in dict.fromkeys((*EXTRA_PLANES, *planes)):
        put_plane(owner, plane, name, planes.get(plane))


@torch.inference_mode(False)
@torch.no_grad()
def fit_planes(owner: Module, name: str, average: Tensor, fmt: Format | None) -> tuple[Tensor, ...]:
    """Return all planes of ``average`` in format ``fmt``; make those that do not fit, and remove other formats'."""
    further = fmt.further if fmt is not None else ()
    for plane in EXTRA_PLANES:
        if plane not in dict(further):
            put_plane(owner, plane, name, None)
    if not further:
        return (average,)
    found = find_planes(owner, name, average, fmt)
    lacking = {
        plane: torch.empty_like(average.detach(), dtype=dtype)
        for (plane, dtype), tensor in zip(further, found, strict=True)
        if tensor is None
    }
    if lacking:
        convert((average,), None, [None, *(lacking.get(plane) for plane, _ in further)], fmt)
    planes = [average]
    for (plane, _), tensor in zip(further, found, strict=True):
        if tensor is None:
            tensor = lacking[plane]
            put_plane(owner, plane, name, tensor)
        elif tensor.device != average.device:
            tensor.data = tensor.data.to(average.device)
        planes.append(tensor)
    return tuple(planes)


def find_planes(owner: Module, name: str, average: Tensor, fmt: Format | None) -> list[Tensor | None]:
    """Return the further planes of ``average`` in format ``fmt``, None for each that is missing or does not fit."""
    found: list[Tensor | None] = []
    for plane, dtype in fmt.further if fmt is not None else ():
        tensor = find_plane(owner, plane, name)
        fits = tensor is not None and tensor.dtype == dtype and tensor.shape == average.shape
        found.append(tensor if fits else None)
    return found


def extra_planes(owner: Module) -> list[Tensor]:
    """Return all further planes of averages, without those of spreads."""
    trees = [tree for plane in EXTRA_PLANES if (tree := own_children(owner).get(plane)) is not None]
    return [tensor for tree in trees for _, tensor in named_tensors(tree, buffers=True)]


@torch.inference_mode(False)
@torch.no_grad()
def renew_planes(owner: Module, written: Sequence[Tensor], each: Iterable[tuple[str, Tensor, Format | None]]) -> None:
    """Make the further planes of averages anew that other code has written, from their planes 0 alone."""
    ids = set(map(id, written))
    for name, average, fmt in each:
        if id(average) in ids and fmt is not None and fmt.extra:
            fit_planes(owner, name, average, fmt)
            # In place, so that a state that was taken before stays live.
            convert((average,), None, (None, *find_planes(owner, name, average, fmt.mean)), fmt.mean)


def translate_state(
    state: MutableMapping[str, Tensor],
    prefix: str,
    keys: Mapping[str, Sequence[str]],
    formats: Mapping[str, Format],
    strict: bool,
    *,
    casts: bool,
) -> None:
    """Rewrite a state dict in place so that it has the planes of this averaged model's formats.

    Planes are converted from the average at full precision, so float32 values fill both planes of ``exact``, and the
    planes of ``exact`` give float32 values. A state without further planes, such as torch's, gets them too.

    Args:
        prefix: the prefix of the averaged model's keys in ``state``.
        keys: for each average, its keys in ``state``: none if it is missing, several if it is tied.
        formats: for each average, its format in this averaged model.
        strict: do not rewrite an average with missing planes, so that the load reports them.
        casts: cast the planes of spreads too, which whoever loads the state does not copy into others.
    """
    present = {plane for plane in EXTRA_PLANES if any(key.startswith(f"{prefix}{plane}.") for key in state)}
    for name, fmt in formats.items():
        if not keys[name]:
            continue
        if casts and fmt.spread is not None:
            _cast_spread(state, prefix, name, fmt)
        average, fmt = state[keys[name][0]], fmt.mean
        extra = {plane: state[key] for plane in EXTRA_PLANES if (key := f"{prefix}{plane}.{name}") in state}
        if not all(isinstance(tensor, Tensor) for tensor in extra.values()):
            continue  # torch's loader raises
        before = format_of_planes(average, extra)
        # Planes are missing only if other averages in the state have them; else the state is of another format.
        has_planes = any(plane in present for plane, _ in fmt.extra)
        lacking = fmt.dtype == average.dtype and len(fmt.extra) > len(extra)
        if before is fmt or (strict and ((has_planes and lacking) or (before is None and (has_planes or extra)))):
            continue
        # If the further planes do not fit, the first one is the average.
        given = (average, *(extra[plane] for plane, _ in before.extra)) if before is not None else (average,)
        # New planes, which are held until the load is checked: a load that fails has changed nothing.
        full = before.value_dtype if before is not None else None
        dtypes = [fmt.dtype or full or average.dtype, *(dtype for _, dtype in fmt.extra)]
        first, *rest = [torch.empty_like(average.detach(), dtype=dtype) for dtype in dtypes]
        convert(given, before, (first, *rest), fmt)
        for plane in extra:
            state.pop(f"{prefix}{plane}.{name}")
        for key in keys[name]:
            state[key] = first
        for (plane, _), tensor in zip(fmt.extra, rest, strict=True):
            state[f"{prefix}{plane}.{name}"] = tensor


def _cast_spread(state: MutableMapping[str, Tensor], prefix: str, name: str, fmt: Format) -> None:
    for plane, dtype in fmt.spread_planes:
        tensor = state.get(f"{prefix}{plane}.{name}")
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            state[f"{prefix}{plane}.{name}"] = tensor.to(dtype)


def keeps_values(fn: Callable[[Tensor], Tensor]) -> bool:
    """Return whether a function for torch's ``_apply`` keeps values, unlike that of ``to_empty``.

    It is tried on random numbers that every dtype can hold, since memory that is empty may hold any others.
    """
    numbers = torch.tensor([secrets.randbits(7) for _ in range(32)], device="cpu")
    result = fn(numbers)
    return not result.is_meta and torch.equal(result.to("cpu", torch.int64), numbers)


def works_in_place(fn: Callable[[Tensor], Tensor]) -> bool:
    """Return whether a function for torch's ``_apply`` writes or moves the memory it is given, as ``share_memory_``."""
    number = torch.ones(1, device="cpu")
    address = number.data_ptr()
    return fn(number) is number and (number.data_ptr() != address or number.item() != 1)


@dataclass(frozen=True)
class Cast:
    """An average that was cast: its plane 0 before and after, and what is new beside it."""

    average: Tensor
    name: str
    result: Tensor  # torch may exchange it with ``average``
    dtype: torch.dtype  # after
    format: Format | None  # after
    extra: list[Tensor]  # the further planes after


class Recast:
    """A function for torch's ``_apply`` that moves or casts an averaged model; call :meth:`finish` afterwards.

    torch would cast plane 0 alone. This casts the average at full precision. Further planes change their device, but
    never their dtype.

    Raises:
        ValueError: it casts averages with a spread to complex numbers; nothing has changed.
    """

    def __init__(
        self,
        owner: Module,
        averages: Iterable[tuple[str, Tensor, Format | None]],
        fn: Callable[[Tensor], Tensor],
        format_of: Callable[[torch.dtype], Format | None],
    ) -> None:
        #: Each average, its name, its format and its further planes, by id.
        self._averages: dict[int, tuple[Tensor, str, Format, list[Tensor | None]]] = {
            id(average): (average, name, fmt, find_planes(owner, name, average, fmt))
            for name, average, fmt in averages
            if fmt is not None
        }
        for average, name, fmt, _ in self._averages.values():
            if fmt.spread is not None and (cast := fn(average.new_empty(0)).dtype).is_complex:
                raise ValueError(
                    f"deviations must be None for complex averages, got {fmt.spread} for {name!r} as {cast}"
                )
        self._planes = {id(plane) for *_, extra in self._averages.values() for plane in extra if plane is not None}
        self._owner, self._fn, self._format_of = owner, fn, format_of
        self._casts: dict[int, Cast] = {}  # by the id of the average
        self.keeps_values = keeps_values(fn)
        self.moved = False  # whether an average went to another device
        self.is_finished = False  # set by whoever has done all that comes after torch's walk

    def __call__(self, tensor: Tensor) -> Tensor:
        cast = self._casts.get(id(tensor))
        if cast is not None:  # tied
            return tensor if tensor.dtype == cast.dtype else cast.result
        if id(tensor) in self._planes:
            probe = self._fn(tensor.new_empty(0))  # to learn of a cast, without the memory that it takes
            return self._fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)
        result = self._fn(tensor)
        if id(tensor) not in self._averages:
            return result
        self.moved |= result.device != tensor.device and "meta" not in (result.device.type, tensor.device.type)
        if result.dtype != tensor.dtype:
            self._recode(tensor, result)
        return result

    def _recode(self, average: Tensor, result: Tensor) -> None:
        """Write an average at full precision into ``result``, which is its plane 0 as torch has cast it."""
        _, name, fmt, extra = self._averages[id(average)]
        after = self._format_of(result.dtype)
        if after is not None:
            after = with_spread(after, fmt.spread, result.dtype)
        recast = [result, *(torch.empty_like(result, dtype=dtype) for _, dtype in (after.further if after else ()))]
        if after is not None and after is not fmt:
            known = [plane for plane in extra if plane is not None]
            convert((average, *known), fmt if len(known) == len(extra) else None, recast, after)
        # From here on finish() completes the cast, whatever interrupts us or torch.
        self._casts[id(average)] = Cast(average, name, result, result.dtype, after, recast[1:])
        # Free the old planes now, although finish() must wait: a model's planes need not be there twice.
        for plane, _ in fmt.further:
            head, _, rest = f"{plane}.{name}".partition(".")
            tree = own_children(self._owner).get(head)
            if isinstance(tree, PlaneTree):
                tree.empty(rest)
        self._planes.difference_update(map(id, extra))
        extra.clear()

    def finish(self) -> None:
        """Set the further planes of recast averages, which must wait until torch has walked over the modules.

        After an interrupt torch may not have put a recast plane 0 into its module yet. It may run several times.
        """
        late = [cast for cast in self._casts.values() if cast.average.dtype != cast.dtype]
        held = {id(tensor) for is_buffer in (False, True) for _, tensor in self._tensors(is_buffer)} if late else set()
        for cast in late:
            if id(cast.average) in held:
                cast.average.data = cast.result
        for cast in self._casts.values():
            put_planes(self._owner, cast.name, cast.format, cast.extra)

    def _tensors(self, buffers: bool) -> list[tuple[str, Tensor]]:
        return named_tensors(unwrap(self._owner.module), buffers=buffers)  # type: ignore[arg-type]
