"""The op: what an update is, which pairs it takes, and which backend runs it.

``torch.ops.swafast.update_`` is the same op for compiled code. :func:`update` is the eager way, without a dispatcher's
7-11 us a call.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ._torch import has_own_dispatch
from .backends import Backend, Launch, Pair, native, reference
from .bucket import extent
from .formats import Format, get_format
from .rules import FixedWeight, KernelTerms, Rule, checked_weight

#: Every backend, the preferred one first. ``reference`` serves whatever the others do not.
BACKENDS: tuple[Backend, ...] = (native, reference)

_warned: set[str] = set()


def choose_backends(requested: str | None = None) -> tuple[Backend, ...]:
    """Give the backends to use, in order, for ``backend=`` or else ``SWAFAST_BACKEND``.

    ``reference`` always stands last, for what a faster one does not serve. A backend that does not load gives one
    warning, unless it was asked for by name.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend asked for cannot run on this machine.
    """
    name = requested if requested is not None else os.environ.get("SWAFAST_BACKEND") or None
    source = "backend" if requested is not None else "SWAFAST_BACKEND"
    known = [backend.name for backend in BACKENDS]
    if name is not None and name not in known:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, known))}, got {name!r}")
    chosen = []
    for backend in BACKENDS[:-1]:
        reason = backend.unavailable() if name in (None, backend.name) else "not asked for"
        if reason is None:
            chosen.append(backend)
        elif name == backend.name:
            raise RuntimeError(f"{source}={name!r} cannot run here: {reason}")
        elif name is None and backend.name not in _warned:
            _warned.add(backend.name)
            warnings.warn(f"swafast runs on the slower reference backend: {reason}", RuntimeWarning, stacklevel=3)
    return (*chosen, reference)


def check_sides(pair: Pair, *, any_device: bool) -> None:
    """Raise ValueError, naming the parameter, unless its param can be averaged into (or copied over) its average.

    ``any_device`` lets the param be on another device than its average.
    """
    for side, tensor in (("model", pair.param), ("average", pair.average)):
        _check_plain(f"{pair.name!r} of the {side}", tensor)
    name, param, average = pair.name, pair.param, pair.average
    if param.shape != average.shape:
        raise ValueError(f"{name!r} must have the average's shape {tuple(average.shape)}, got {tuple(param.shape)}")
    if _dtype_class(param) != _dtype_class(average):
        raise ValueError(f"{name!r} must have a dtype like the average's {average.dtype}, got {param.dtype}")
    if param.device != average.device and not any_device:
        raise ValueError(
            f"{name!r} must be on the average's device {average.device}, got {param.device}; "
            "move the averaged model, or pass device= to average on another device than the model's"
        )
    if average.numel() > extent(average.shape, average.stride()):
        raise ValueError(f"average {name!r} must not overlap itself, got strides {tuple(average.stride())}")


def check_planes(pair: Pair, fmt: Format) -> None:
    """Raise ValueError unless the planes are those of the format, alike in shape and device."""
    wanted = (fmt.dtype or pair.average.dtype, *(dtype for _, dtype in fmt.extra))
    got = tuple(plane.dtype for plane in pair.planes)
    if got != wanted:
        raise ValueError(f"average {pair.name!r} in format {fmt.name!r} must have planes of {wanted}, got {got}")
    for plane in pair.planes[1:]:
        _check_plain(f"a plane of {pair.name!r}", plane)
        spread = plane.numel() > extent(plane.shape, plane.stride())
        if spread or plane.shape != pair.average.shape or plane.device != pair.average.device:
            raise ValueError(
                f"planes of {pair.name!r} must be alike in shape and device, got {tuple(plane.shape)} on "
                f"{plane.device} beside {tuple(pair.average.shape)} on {pair.average.device}"
            )


def check_counter(num_averaged: object) -> None:
    """Raise ValueError unless ``n_averaged`` is what a kernel can read and count in."""
    if not isinstance(num_averaged, Tensor):
        raise ValueError(f"n_averaged must be one int64, got {num_averaged!r}")
    if num_averaged.device.type == "meta":
        raise ValueError("n_averaged must hold a number, got a tensor on the meta device")
    if num_averaged.dtype != torch.int64 or num_averaged.numel() != 1:
        raise ValueError(f"n_averaged must be one int64, got {num_averaged.dtype} of shape {tuple(num_averaged.shape)}")


def _check_plain(what: str, tensor: Tensor) -> None:
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
        raise ValueError(f"{what} must be a plain tensor, got {type(tensor).__name__}")
    end = (tensor.storage_offset() + extent(tensor.shape, tensor.stride())) * tensor.element_size()
    if tensor.numel() and tensor.untyped_storage().nbytes() < end:
        raise ValueError(f"{what} must have memory for its elements, got a storage that was freed or shrunk")


def _dtype_class(tensor: Tensor) -> object:
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else tensor.dtype


def check_writable(pairs: Sequence[Pair]) -> None:
    """Raise ValueError naming a param that cannot take an average, because its elements share memory."""
    for pair in pairs:
        if pair.param.numel() > extent(pair.param.shape, pair.param.stride()):
            raise ValueError(
                f"{pair.name!r} of the model must have memory of its own for each element to take the average, "
                f"got strides {tuple(pair.param.stride())}"
            )


def check_overlap(pairs: Sequence[Pair]) -> None:
    """Raise ValueError naming two averages that share memory: an update would move one through the other."""
    averaged = [pair for pair in pairs if pair.format is not None]
    for first, second in overlaps([pair.planes for pair in averaged]):
        a, b = averaged[first], averaged[second]
        # Two names of one param, on one memory, are tied: each average gets a place of its own.
        if not (a.param is b.param and a.average.data_ptr() == b.average.data_ptr()):
            raise ValueError(f"averages must not overlap in memory, got {a.name!r} and {b.name!r} on shared bytes")


def overlaps(groups: Sequence[Sequence[Tensor]]) -> list[tuple[int, int]]:
    """Give pairs of indices of groups that share memory: every group that shares any is in one at least."""
    runs = []
    for index, group in enumerate(groups):
        for tensor in group:
            nbytes = extent(tensor.shape, tensor.stride()) * tensor.element_size()
            if nbytes:
                runs.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + nbytes, index))
    runs.sort()
    found = []
    furthest = None
    for run in runs:
        if furthest is not None and furthest[0] == run[0] and run[1] < furthest[2]:
            found.append((furthest[3], run[3]))
        if furthest is None or furthest[0] != run[0] or run[2] > furthest[2]:
            furthest = run
    return found


@dataclass
class Work:
    """The pairs of one plan that one backend runs."""

    backend: Backend
    indices: tuple[int, ...]  # into the plan's pairs
    launch: Launch


def prepare(pairs: Sequence[Pair], backends: Sequence[Backend]) -> list[Work]:
    """Give each pair to the first backend that serves it. The preferred backend's work comes last.

    Only the last one counts the update: the others read the same ``num_averaged`` before it.
    """
    taken: dict[str, list[int]] = {backend.name: [] for backend in backends}
    for index, pair in enumerate(pairs):
        taken[next(backend.name for backend in backends if backend.serves(pair))].append(index)
    return [
        Work(backend, tuple(indices), backend.prepare([pairs[i] for i in indices]))
        for backend in reversed(backends)
        if (indices := taken[backend.name])
    ]


def update(work: Sequence[Work], params: Sequence[Tensor], rule: Rule, num_averaged: Tensor) -> None:
    """Run one update of prepared pairs and count it."""
    if rule.kernel_terms() is None:
        # Asked once, before anything is written: the rule may be of any kind, and may raise.
        rule = FixedWeight(checked_weight(rule, int(num_averaged)))
    for part in work:
        advance = int(part is work[-1])
        part.launch.update([params[i] for i in part.indices], rule, num_averaged, advance)
    if not work:
        num_averaged.add_(1)


def prepare_exchange(
    pairs: Sequence[Pair], backends: Sequence[Backend]
) -> tuple[native.NativeLaunch | None, list[Pair]]:
    """Give a launch that exchanges params and averages in place, and the pairs that it cannot take.

    In place go pairs of one dtype that a kernel serves and that share memory with no other pair.
    """
    if native not in backends:
        return None, list(pairs)
    entangled = {i for side in ("param", "average") for i in _entangled([getattr(pair, side) for pair in pairs])}
    direct: list[Pair] = []
    rest: list[Pair] = []
    for index, pair in enumerate(pairs):
        alike = pair.param.dtype == pair.average.dtype and index not in entangled and native.serves(pair)
        (direct if alike else rest).append(pair)
    return (native.prepare(direct) if direct else None), rest


def _entangled(tensors: Sequence[Tensor]) -> set[int]:
    return {index for pair in overlaps([(tensor,) for tensor in tensors]) for index in pair}


def first_nonfinite(work: Sequence[Work], params: Sequence[Tensor]) -> int | None:
    """Give the index of a param that holds a NaN or an infinity, else None. One more read of the params."""
    for part in work:
        index = part.launch.first_nonfinite([params[i] for i in part.indices])
        if index is not None:
            return part.indices[index]
    return None


@dataclass(frozen=True)
class _TermsRule(Rule):
    """A rule that came through the dispatcher as numbers."""

    terms: KernelTerms

    def weight(self, num_averaged: int) -> float:
        return native.weight(self, num_averaged)

    def kernel_terms(self) -> KernelTerms:
        return self.terms


def _update_op(
    averages: list[Tensor],
    remainders: list[Tensor],
    params: list[Tensor],
    num_averaged: Tensor,
    format: str,
    kind: int,
    terms: list[float],
) -> None:
    fmt = get_format(format)
    if len(params) != len(averages) or (fmt.extra and len(remainders) != len(averages)):
        lengths = [len(averages), len(remainders), len(params)]
        raise ValueError(f"averages, remainders and params must be of one length, got {lengths}")
    extra: Sequence[Tensor | None] = remainders if fmt.extra else [None] * len(averages)
    pairs = [
        Pair(str(i), param, (average,) if plane is None else (average, plane), fmt)
        for i, (average, plane, param) in enumerate(zip(averages, extra, params, strict=True))
    ]
    for pair in pairs:
        check_sides(pair, any_device=False)
        check_planes(pair, fmt)
    check_overlap(pairs)
    check_counter(num_averaged)
    rule = _TermsRule(KernelTerms(kind, tuple(terms)))  # type: ignore[arg-type]  # it checks their number
    update(prepare(pairs, choose_backends()), params, rule, num_averaged)


_library = torch.library.Library("swafast", "DEF")
_library.define(
    "update_(Tensor(a!)[] averages, Tensor(b!)[] remainders, Tensor[] params, Tensor(c!) num_averaged, "
    "str format, int kind, float[] terms) -> ()"
)
_library.impl("update_", _update_op, "CompositeExplicitAutograd")
torch.library.register_fake("swafast::update_", lambda *args: None, lib=_library)
