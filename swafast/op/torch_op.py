"""``torch.ops.swafast.update_``: the update as a torch op, for compiled code."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.contract import Pair
from ..terms.capturing import refuse_capture
from ..terms.formats import Format, get_format
from ..terms.rules import Rule
from ..terms.weight import KernelTerms
from .checks import check_counter, check_overlap, check_planes, check_sides
from .choice import choose_backends, device_types
from .launches import draws_of
from .plan import Launches, bump_versions


@dataclass(frozen=True)
class _TermsRule(Rule):
    """A rule that torch's dispatcher has passed as numbers."""

    terms: KernelTerms

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
    seed: int = 0,
) -> None:
    fmt = get_format(format)
    if len(params) != len(averages) or (fmt.extra and len(remainders) != len(averages)):
        lengths = [len(averages), len(remainders), len(params)]
        raise ValueError(f"averages, remainders and params must have one length, got {lengths}")
    extra: Sequence[Tensor | None] = remainders if fmt.extra else [None] * len(averages)
    pairs = [
        Pair(str(i), param, (average,) if plane is None else (average, plane), fmt, draws_of(seed, str(i), param, fmt))
        for i, (average, plane, param) in enumerate(zip(averages, extra, params, strict=True))
    ]
    check_counter(num_averaged)
    launches = _prepared(pairs, num_averaged, fmt, seed)
    rule = _TermsRule(KernelTerms(kind, tuple(terms)))  # type: ignore[arg-type]  # KernelTerms checks their number
    bump_versions((num_averaged,))  # cached launches bump another tensor on the same memory
    launches.update(params, [plane for pair in pairs for plane in pair.planes], [rule])
    if launches.captured and not any(kept is launches for kept in _captured):
        _captured.append(launches)


#: Launches of the op's last calls, by the format, seed, backend and tensors that they were made for.
_recent: OrderedDict[object, Launches] = OrderedDict()
_MOST_RECENT = 256
#: Launches that a CUDA graph holds: nothing else would keep them alive.
_captured: list[Launches] = []


def _look(tensor: Tensor) -> tuple[object, ...]:
    """Return every property of a tensor on which the checks and a launch depend."""
    view = (tensor.data_ptr(), tensor.untyped_storage().nbytes(), tensor.shape, tensor.stride())
    return (*view, tensor.dtype, tensor.device, type(tensor), tensor.is_neg(), tensor.is_conj())


def _prepared(pairs: Sequence[Pair], num_averaged: Tensor, fmt: Format, seed: int) -> Launches:
    tensors = [num_averaged, *(tensor for pair in pairs for tensor in (pair.param, *pair.planes))]
    try:
        seen = tuple(map(_look, tensors))
    except RuntimeError:  # for instance sparse: the checks below raise an error that names it
        seen = ()
    key = (fmt.name, seed, os.environ.get("SWAFAST_BACKEND"), seen)
    if seen and key in _recent:
        _recent.move_to_end(key)
        return _recent[key]
    for pair in pairs:
        check_sides(pair, any_device=False)
        check_planes(pair, fmt)
    check_overlap(pairs, tied=False)
    for device in {pair.average.device for pair in pairs}:
        refuse_capture(device, "a first call of swafast.update_ for these tensors")
    launches = Launches(pairs, choose_backends(device_types=device_types(pairs)), [num_averaged.detach()])
    if seen and launches.goes_by_address:
        _recent[key] = launches
        while len(_recent) > _MOST_RECENT:
            _recent.popitem(last=False)
    return launches


# torch takes one definition in a process. If another copy of this package has made it, or this module is loaded again,
# that one stays.
if not hasattr(torch.ops.swafast, "update_"):
    _library = torch.library.Library("swafast", "DEF")
    _library.define(
        "update_(Tensor(a!)[] averages, Tensor(b!)[] remainders, Tensor[] params, Tensor(c!) num_averaged, "
        "str format, int kind, float[] terms, int seed=0) -> ()"
    )
    _library.impl("update_", _update_op, "CompositeExplicitAutograd")
    torch.library.register_fake("swafast::update_", lambda *args: None, lib=_library)
