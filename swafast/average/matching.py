"""Match tensors of a model to averages by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel

from ..backends.contract import Pair
from ..op import checks
from ..op.launches import draws_of
from ..terms.names import named_buffers, named_params, require_same_names, unwrap
from ..torch_private.modules import named_tensors
from . import lending
from .accepting import refuse_sharded
from .following import FormatOf as FormatOf
from .planes import fit_planes, put_planes

_FOR_SHARDED_TEACHER = (
    f"{checks.FOR_SHARDED}, and call its copy_to(teacher) for a teacher that is sharded as the model is"
)


def each_average(
    module: Module, anew: Mapping[str, Tensor | None] | None = None
) -> Iterator[tuple[list[str], Tensor, bool]]:
    """Yield each distinct tensor of an averaged module: all its names, the tensor, and whether it is a buffer.

    Args:
        anew: buffers in place of those that it has, by name, as of :func:`~.following.made_anew`.
    """
    params = named_params(unwrap(module), "averaged model")
    checks.refuse_partitioned("averaged model", params)
    buffers = {**named_buffers(unwrap(module), "averaged model"), **(anew or {})}
    for is_buffer, found in ((False, params), (True, buffers)):
        tied: dict[int, tuple[list[str], Tensor]] = {}
        for name, tensor in found.items():
            if tensor is not None:
                tied.setdefault(id(tensor), ([], tensor))[0].append(name)
        for names, tensor in tied.values():
            yield names, tensor, is_buffer


@dataclass(frozen=True)
class ModuleSide:
    """One of the averaged models that are updated together."""

    owner: AveragedModel  # its module holds planes 0; it holds the further planes and the counter itself
    format_of: FormatOf
    any_device: bool  # the averages may be on another device than the model
    backend: str | None
    seed: int


def match(
    side: ModuleSide, model: Module, pace: int, anew: Mapping[str, Tensor | None]
) -> tuple[list[Pair], list[Pair]]:
    """Pair each distinct average with its param. Raise ValueError with the names that do not match.

    Returns:
        the pairs of an update; and those of the params that the model lends, of which an update has nothing to do.
    """
    refuse_sharded(side.owner.module, "module of the averaged model", _FOR_SHARDED_TEACHER)
    theirs = {False: named_params(unwrap(model), "model"), True: named_buffers(unwrap(model), "model")}
    own = list(each_average(side.owner.module, anew))
    for is_buffer, kind in ((False, "parameters"), (True, "buffers")):
        names = [name for tied, _, buffer in own if buffer == is_buffer for name in tied]
        require_same_names(kind, names, theirs[is_buffer])
    matched: list[Pair] = []
    lent: list[Pair] = []
    for names, average, is_buffer in own:
        param = theirs[is_buffer][names[0]]
        for other in names[1:]:
            if theirs[is_buffer][other] is not param:
                raise ValueError(f"model must tie {names[0]!r} and {other!r} as the average does, got two tensors")
        fmt = side.format_of(names[0], average, is_buffer)
        is_left_out = fmt is None and not is_buffer
        pairs = lent if is_left_out and lending.may_stay(average, param) else matched
        pairs.append(Pair(names[0], param, (average,), fmt, pace=pace, is_buffer=is_buffer))
    return matched, lent


def with_planes(pair: Pair, side: ModuleSide, taken: set[int]) -> Pair:
    """Add the further planes to a pair. ``taken`` are the ids of planes of the pairs before it."""
    planes = fit_planes(side.owner, pair.name, pair.average, pair.format)
    if not taken.isdisjoint(map(id, planes)):  # a load by assignment gave two averages one tensor
        planes = (pair.average, *(plane.clone() for plane in planes[1:]))
        put_planes(side.owner, pair.name, pair.format, planes[1:])
    taken.update(map(id, planes))
    return replace(pair, planes=planes, draws=draws_of(side.seed, pair.name, pair.param, pair.format))


def place_counters(sides: Sequence[ModuleSide]) -> list[Tensor]:
    """Return the counters, each a tensor of its own on the device of its averages, as kernels need them."""
    taken: set[int] = set()
    for side in sides:
        owner = side.owner
        where = next((p.device for _, p in named_tensors(owner.module) if not p.is_meta), owner.n_averaged.device)
        if owner.n_averaged.device not in (where, torch.device("meta")):
            owner.n_averaged = owner.n_averaged.to(where)
        if owner.n_averaged.data_ptr() in taken:  # after load_state_dict(assign=True)
            owner.n_averaged = owner.n_averaged.clone()
        taken.add(owner.n_averaged.data_ptr())
    counters = [side.owner.n_averaged for side in sides]
    checks.check_one_device(counters)
    return counters
