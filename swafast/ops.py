"""The op: what an update is, which pairs it takes, and which backend runs it.

``torch.ops.swafast.update_`` is the same op for compiled code. :func:`launch` is the eager way, without a dispatcher's
7-11 us a call.
"""

from __future__ import annotations

import itertools
import math
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
from .formats import get_format
from .rules import KernelTerms, Rule

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


def check_pair(pair: Pair, *, any_device: bool) -> None:
    """Raise ValueError, naming the parameter, unless ``pair`` can be averaged (or copied, without a format).

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
    if pair.format is not None:
        for plane in pair.planes:
            if plane.numel() > extent(plane.shape, plane.stride()):
                raise ValueError(f"average {name!r} must not overlap itself, got strides {tuple(plane.stride())}")


def check_counter(num_averaged: object) -> None:
    """Raise ValueError unless ``n_averaged`` is what a kernel can read and count in."""
    if not isinstance(num_averaged, Tensor):
        raise ValueError(f"n_averaged must be one int64, got {num_averaged!r}")
    if num_averaged.dtype != torch.int64 or num_averaged.numel() != 1:
        raise ValueError(f"n_averaged must be one int64, got {num_averaged.dtype} of shape {tuple(num_averaged.shape)}")


def _check_plain(what: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ValueError(f"{what} must be initialised, got a lazy one: run the model once before averaging it")
    if tensor.layout != torch.strided:
        raise ValueError(f"{what} must be dense, got layout {tensor.layout}")
    if tensor.is_quantized:
        raise ValueError(f"{what} must not be quantised, got {tensor.dtype}")
    if tensor.device.type == "meta":
        raise ValueError(f"{what} must hold data, got a tensor on the meta device")
    if has_own_dispatch(tensor):
        raise ValueError(f"{what} must be a plain tensor, got {type(tensor).__name__}")


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
    runs = []
    for pair in pairs:
        for plane in pair.planes if pair.format is not None else ():
            nbytes = extent(plane.shape, plane.stride()) * plane.element_size()
            if nbytes:
                runs.append((str(plane.device), plane.data_ptr(), plane.data_ptr() + nbytes, pair.name))
    runs.sort()
    for (device, _, end, name), (next_device, start, _, next_name) in itertools.pairwise(runs):
        if device == next_device and start < end:
            raise ValueError(f"averages must not overlap in memory, got {name!r} and {next_name!r} on shared bytes")


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
    for part in work:
        advance = int(part is work[-1])
        part.launch.update([params[i] for i in part.indices], rule, num_averaged, advance)
    if not work:
        num_averaged.add_(1)


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

    kind: int
    terms: tuple[float, float, float, float]

    def weight(self, num_averaged: int) -> float:
        return native.weight(self, num_averaged)

    def kernel_terms(self) -> KernelTerms:
        return KernelTerms(self.kind, self.terms)


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
    extra: Sequence[Tensor | None] = remainders or [None] * len(averages)
    pairs = [
        Pair(str(i), param, (average,) if plane is None else (average, plane), fmt)
        for i, (average, plane, param) in enumerate(zip(averages, extra, params, strict=True))
    ]
    for pair in pairs:
        check_pair(pair, any_device=False)
    check_overlap(pairs)
    check_counter(num_averaged)
    if kind not in range(KernelTerms.NUM_KINDS):
        raise ValueError(f"kind must be in [0, {KernelTerms.NUM_KINDS}), got {kind}")
    if len(terms) != 4 or not all(math.isfinite(term) for term in terms):
        raise ValueError(f"terms must be four finite numbers, got {terms}")
    rule = _TermsRule(kind, (terms[0], terms[1], terms[2], terms[3]))
    update(prepare(pairs, choose_backends()), params, rule, num_averaged)


_library = torch.library.Library("swafast", "DEF")
_library.define(
    "update_(Tensor(a!)[] averages, Tensor(b!)[] remainders, Tensor[] params, Tensor(c!) num_averaged, "
    "str format, int kind, float[] terms) -> ()"
)
_library.impl("update_", _update_op, "CompositeExplicitAutograd")
torch.library.register_fake("swafast::update_", lambda *args: None, lib=_library)
