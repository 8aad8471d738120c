"""Checks before a launch. If one raises, nothing has changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..backends.contract import Pair
from ..terms.copying import are_alike, describe_kind, overlaps_itself, without_expansion
from ..terms.formats import Format
from ..terms.layout import extent
from ..terms.numbers import as_bool, as_int
from ..terms.partitioned import mark_of_emptied
from ..torch_private.core import has_own_dispatch
from .copies import is_for_torch

#: Advice for a model that is spread over ranks. We go by class names, since importing the classes takes a second.
FOR_SHARDED = "average a sharded model with swafast.ShardedAveragedModel"

#: Advice for a model whose params are partitioned.
GATHER = f"{FOR_SHARDED}, or gather a model partitioned as by ZeRO-3 before averaging it"

_NONFINITE = ("propagate", "raise", "skip")


def check_nonfinite(value: object) -> None:
    """Raise ValueError unless ``value`` is one of the ways to treat NaNs and infinities."""
    if value not in _NONFINITE:
        raise ValueError(f"nonfinite must be one of {', '.join(map(repr, _NONFINITE))}, got {value!r}")


def checked_seed(value: object) -> int:
    """Return ``value`` as an int, or raise TypeError if it is none."""
    seed = as_int(value)
    if seed is None:
        raise TypeError(f"seed must be an int, got {value!r}")
    return seed


def checked_bool(argument: str, value: object) -> bool:
    """Return ``value`` as a bool, or raise TypeError if it is none."""
    found = as_bool(value)
    if found is None:
        raise TypeError(f"{argument} must be True or False, got {value!r}")
    return found


def checked_num_averaged(value: object) -> int:
    """Return ``value`` as an int, or raise if a counter cannot hold it and still count on from it."""
    count = as_int(value)
    if count is None:
        raise TypeError(f"num_averaged must be an int, got {value!r}")
    if not 0 <= count < 2**63 - 1:
        raise ValueError(f"num_averaged must be from 0 to 2^63 - 2, got {count}")
    return count


def refuse_partitioned(what: str, params: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a param is empty because other ranks hold its parts; name it."""
    for name, param in params.items():
        # Asked first, as it is no call of Python: a load checks hundreds of params.
        if param.numel() == 0 and (mark := mark_of_emptied(param)) is not None:
            raise ValueError(f"{what} must hold its parameters, got {name!r} empty, with {mark}: {GATHER}")


def check_sides(pair: Pair, *, any_device: bool) -> None:
    """Raise ValueError unless a param and its average fit together. The message names the param.

    With ``any_device`` they may be on two devices.
    """
    name, param, average = pair.name, pair.param, pair.average
    if is_for_torch(pair):
        _check_copied(name, param, average)
        return
    for side, tensor in (("model", param), ("average", average)):
        check_plain(f"{name!r} of the {side}", tensor)
    if param.shape != average.shape:
        advice = f": {GATHER}" if param.numel() == 0 else ""
        raise ValueError(
            f"{name!r} must have the average's shape {tuple(average.shape)}, got {tuple(param.shape)}{advice}"
        )
    if _dtype_class(param) != _dtype_class(average):
        raise ValueError(f"{name!r} must have a dtype like the average's {average.dtype}, got {param.dtype}")
    if param.device != average.device and not any_device:
        raise ValueError(
            f"{name!r} must be on the average's device {average.device}, got {param.device}; "
            "move the averaged model, or pass device= to average on another device than the model's"
        )
    if average.numel() > extent(average.shape, average.stride()):
        raise ValueError(f"average {name!r} must not overlap itself, got strides {tuple(average.stride())}")


def _check_copied(name: str, param: Tensor, average: Tensor) -> None:
    """Raise ValueError unless torch can copy a param into a tensor of the averaged module."""
    for side, tensor in (("model", param), ("average", average)):
        if tensor.is_meta:
            raise ValueError(f"{name!r} of the {side} must hold data, got a tensor on the meta device")
    if not are_alike(param, average):
        raise ValueError(f"{name!r} must be like the average's, {describe_kind(average)}, got {describe_kind(param)}")


def check_planes(pair: Pair, fmt: Format) -> None:
    """Raise ValueError unless the planes have the format's dtypes, and all have one shape and one device."""
    wanted = (fmt.dtype or pair.average.dtype, *(dtype for _, dtype in fmt.further))
    got = tuple(plane.dtype for plane in pair.planes)
    if got != wanted:
        raise ValueError(f"average {pair.name!r} in format {fmt.name!r} must have planes of {wanted}, got {got}")
    for plane in pair.planes[1:]:
        check_plain(f"a plane of {pair.name!r}", plane)
        overlapping = plane.numel() > extent(plane.shape, plane.stride())
        if overlapping or plane.shape != pair.average.shape or plane.device != pair.average.device:
            raise ValueError(
                f"planes of {pair.name!r} must be alike in shape and device, got {tuple(plane.shape)} on "
                f"{plane.device} beside {tuple(pair.average.shape)} on {pair.average.device}"
            )


def check_counter(num_averaged: object) -> None:
    """Raise ValueError unless ``n_averaged`` is one int64 in memory, which a kernel can read and advance."""
    if not isinstance(num_averaged, Tensor):
        raise ValueError(f"n_averaged must be one int64, got {num_averaged!r}")
    if num_averaged.device.type == "meta":
        raise ValueError("n_averaged must hold a number, got a tensor on the meta device")
    if num_averaged.layout != torch.strided or num_averaged.dtype != torch.int64 or num_averaged.numel() != 1:
        raise ValueError(f"n_averaged must be one int64, got {num_averaged.dtype} of shape {tuple(num_averaged.shape)}")


def check_one_device(counters: Sequence[Tensor]) -> None:
    """Raise ValueError unless the counters of averages that are updated together are on one device."""
    if len({counter.device for counter in counters}) > 1:
        raise ValueError(
            f"averages that are updated together must be on one device, got {[str(c.device) for c in counters]}"
        )


def check_plain(what: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ValueError(f"{what} must be initialised, got a lazy one: run the model once before averaging it")
    if tensor.is_nested:
        raise ValueError(f"{what} must not be nested, got a nested tensor")
    if tensor.layout != torch.strided:
        raise ValueError(f"{what} must be dense, got layout {tensor.layout}")
    if tensor.is_quantized:
        raise ValueError(f"{what} must not be quantised, got {tensor.dtype}")
    if tensor.device.type == "meta":
        raise ValueError(f"{what} must hold data, got a tensor on the meta device")
    if has_own_dispatch(tensor):
        sharded = f"; {FOR_SHARDED}" if type(tensor).__name__ == "DTensor" else ""
        raise ValueError(f"{what} must be a plain tensor, got {type(tensor).__name__}{sharded}")
    end = (tensor.storage_offset() + extent(tensor.shape, tensor.stride())) * tensor.element_size()
    if tensor.numel() and tensor.untyped_storage().nbytes() < end:
        raise ValueError(f"{what} must have memory for its elements, got a storage that was freed or shrunk")


def check_cast(what: str, source: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError if a copy of a tensor in ``dtype`` would lack its imaginary part, fractions or high bits.

    For integers and bools the values decide, and are read. What float dtypes round is no part.
    """
    if source.is_complex() and not dtype.is_complex:
        raise ValueError(f"{what} must be real, as {dtype} is, got {source.dtype}")
    if dtype.is_floating_point or dtype.is_complex or dtype == source.dtype:
        return
    check_plain(what, source)
    values = source.detach().to(torch.float64) if source.is_floating_point() else source.detach()
    if not torch.equal(values.to(dtype).to(values.dtype), values):
        raise ValueError(f"{what} must have values that {dtype} can hold, got others in {source.dtype}")


def _dtype_class(tensor: Tensor) -> object:
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else tensor.dtype


def check_writable(pairs: Iterable[Pair]) -> None:
    """Raise ValueError if elements of a param share memory, so that it cannot take an average; name the param.

    One that is copied may be expanded, since it takes what was copied from it.
    """
    for pair in pairs:
        param = pair.param
        if param.numel() > _span(param):
            (once,) = without_expansion(param, param) if pair.format is None else (param,)
            if overlaps_itself(once):
                raise ValueError(
                    f"{pair.name!r} of the model must have memory of its own for each element to take the average, "
                    f"got strides {tuple(param.stride())}"
                )


def check_overlap(pairs: Sequence[Pair], *, tied: bool = True) -> None:
    """Raise ValueError if two averages share memory, since an update of one would change the other; name both.

    With ``tied``, two averages of one param may share it: a plan then gives each average memory of its own.
    """
    averaged = [pair for pair in pairs if pair.format is not None]
    for first, second in overlaps([pair.planes for pair in averaged]):
        a, b = averaged[first], averaged[second]
        may_part = a.param is b.param and a.average is not b.average and a.average.data_ptr() == b.average.data_ptr()
        if not (tied and may_part):
            raise ValueError(f"averages must not overlap in memory, got {a.name!r} and {b.name!r} on shared bytes")


def overlaps(tensor_sets: Iterable[Sequence[Tensor]]) -> list[tuple[int, int]]:
    """Return pairs of indices of sets that share memory. Each set that shares memory is in at least one pair."""
    # Lists of ints, since Python would look for garbage in a tuple for each of 100,000 tensors, again and again.
    starts: list[int] = []
    ends: list[int] = []
    indices: list[int] = []
    on_devices: dict[torch.device, list[int]] = {}
    for index, tensors in enumerate(tensor_sets):
        for tensor in tensors:
            nbytes = _span(tensor) * tensor.element_size()
            if nbytes:
                on_devices.setdefault(tensor.device, []).append(len(starts))
                starts.append(tensor.data_ptr())
                ends.append(starts[-1] + nbytes)
                indices.append(index)
    found = []
    for on_device in on_devices.values():
        furthest = None
        for own in sorted(on_device, key=starts.__getitem__):
            if furthest is not None and starts[own] < ends[furthest]:
                found.append((indices[furthest], indices[own]))
            if furthest is None or ends[own] > ends[furthest]:
                furthest = own
    return found


def _span(tensor: Tensor) -> int:
    """Return the extent of a tensor, at once for the usual one."""
    return tensor.numel() if tensor.is_contiguous() else extent(tensor.shape, tensor.stride())
