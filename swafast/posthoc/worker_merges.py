"""`merge_over`: one average of the averages of several workers, each of which has trained a model of its own."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..average.averaged_model import FusedAveragedModel
from ..average.fused_averages import FusedAverages
from ..average.lending import is_lent
from ..average.planes import fit_planes
from ..loop.guard import Guard
from ..sharded.construction import ranks_over, spell
from ..sharded.parts.ranks import OneProcess, Ranks
from ..sharded.sharded_averages import ShardedAverages
from ..sharded.sharded_model import ShardedAveragedModel
from ..terms.converting import write_all
from ..terms.copying import describe_kind, is_plain
from ..terms.formats import Format
from ..terms.layout import windows
from ..terms.warn import warn_user
from .merging import pooled_variance, rounded
from .written import Averaged

#: Elements in a window: each rank receives as many from each rank, 4 or 8 bytes each.
_WINDOW_NUMEL = 2**20


@dataclass(frozen=True)
class _Merged:
    """One tensor of an averaged model that is to be the same on all workers."""

    name: str
    planes: tuple[Tensor, ...]  # with the variance, but without deviations
    format: Format | None  # None: copied from the first worker, not averaged
    place: str  # which part of the whole tensor it is


@torch.no_grad()
def merge_over(averaged: Averaged | FusedAverages | ShardedAverages, process_group: ProcessGroup | None = None) -> None:
    """Replace the averages of several workers by their mean, weighted by counts. The counts add up. Collective.

    Each worker has trained its own model, without DDP between them. Afterwards all have the same bits:
    ``sum of n_i * m_i / sum of n_i``, summed in float64 in the order of ranks. That is the mean of all models if the
    rule is :class:`~swafast.EqualAverage`. What is not averaged, such as integers, BatchNorm's statistics and extra
    states of modules, is copied from the first worker, so call :func:`~swafast.update_bn` next. Frozen params that the
    model lends stay as they are.

    Variances are merged too: afterwards they are those of all models. The deviations of one worker do not fit the mean
    of all, so they are dropped, and ``averaged.deviations`` is 0: samples are SWAG-diagonal's from then on.

    Warns if all workers have the same averages: they were in DDP, or had one order of the data.

    The mean is not rounded as a function of the user's own would: that of workers with
    :class:`~swafast.optim.LowPrecisionMean` has its few bits again from the next update on.

    It takes the memory of one more copy of the averages, and receives each worker's averages once.

    Args:
        averaged: :class:`~swafast.FusedAveragedModel` or :class:`~swafast.FusedAverages`; or, if a worker is several
            ranks, their :class:`~swafast.ShardedAveragedModel` or :class:`~swafast.ShardedAverages`.
        process_group: one rank of each worker: those that hold the same part of the model. Default: all ranks.

    Raises:
        TypeError: ``averaged`` is none of these.
        ValueError: on every rank, if workers differ in names, shapes, dtypes, formats, rules or averaging functions, as
            their ``repr`` tells them apart: it names the first difference. Or one has averaged no model, or holds a
            NaN, or an infinity that others have not; or the group does not hold one rank of each worker. Nothing has
            changed on any rank.
        LostPeerError: a worker was lost. Nothing has changed on the others. It is raised within the timeout of the
            process group; torchrun ends the others before.
        RuntimeError: the averages are swapped into a model, or the call failed on another rank.

    Paper: Gupta et al. 2020, "Stochastic Weight Averaging in Parallel: Large-Batch Training that Generalizes Well",
    arXiv:2001.02312.
    """
    sides = _sides_of(averaged)
    ranks = ranks_over(process_group, "merge_over")
    of_worker = averaged._ranks if isinstance(averaged, (ShardedAveragedModel, ShardedAverages)) else OneProcess()
    guard: Guard = averaged._guard
    guard.settle("merge_over")
    with guard.locked(of_worker.lock, ranks.lock):
        with _settled_in_worker(averaged):
            with ranks.settled("merge_over"):
                guard.refuse_while_swapped("merge_over")
                _refuse_own_worker(of_worker, ranks)
                merged = {name: _tensors_of(side) for name, side in sides.items()}
                modules = _modules_with_extra_state(sides)
                extra = _packed([module.get_extra_state() for module in modules.values()]) if modules else b""
            counts = _agreed_counts(ranks, sides, merged, modules)
            fresh = [_mean(ranks, merged[name], counts[name]) for name in sides]
            _take_extra_states(ranks, [*modules.values()], extra)
        is_news = ranks.size == 1 or any(
            _differ(merged[name], writes) for name, writes in zip(sides, fresh, strict=True)
        )
        # From here on no rank waits for another, and no other rank can fail.
        for (name, side), writes in zip(sides.items(), fresh, strict=True):
            write_all(writes)
            side._count_from(sum(counts[name]))
            if side._drop_deviations():
                averaged._bindings.plan_anew()
    if not is_news:
        warn_user(
            "merge_over found the same averages on all workers, so their mean is the same too: train each worker "
            "without DDP, and give it an order of the data of its own"
        )


def _sides_of(averaged: object) -> dict[str, Averaged]:
    if isinstance(averaged, (FusedAveragedModel, ShardedAveragedModel)):
        return {"": averaged}
    if isinstance(averaged, (FusedAverages, ShardedAverages)):
        return dict(sorted(averaged.items()))
    kinds = "FusedAveragedModel, FusedAverages, ShardedAveragedModel or ShardedAverages"
    raise TypeError(f"averaged must be a {kinds}, got {type(averaged).__name__}")


def _settled_in_worker(averaged: object) -> AbstractContextManager[None]:
    """Return a context that raises on every rank of a worker what one of them raises.

    Ranks of a worker meet in several groups, one for each part of the model. If one group fails, none may write.
    """
    if isinstance(averaged, (ShardedAveragedModel, ShardedAverages)):
        return averaged._counting.settled("merge_over", averaged._number)
    return nullcontext()


def _refuse_own_worker(of_worker: Ranks, ranks: Ranks) -> None:
    shared = {*of_worker.ranks} & {*ranks.ranks} if of_worker.size > 1 else set()
    if len(shared) > 1:
        raise ValueError(
            f"process_group must hold one rank of each worker, got ranks {sorted(shared)} of one: pass the group of "
            "the ranks that hold the same part of the model"
        )


def _tensors_of(side: Averaged) -> list[_Merged]:
    if isinstance(side, ShardedAveragedModel):
        tensors = [
            (share.name, side._planes[share.name], share.format, f"{share.holding.shape} {share.boxes}")
            for share in side._shares
        ]
    else:
        tensors = [
            (name, fit_planes(side, name, tensor, fmt), fmt, "")
            for name, tensor, fmt in side._each_average()
            if fmt is not None or (is_plain(tensor) and not is_lent(tensor))
        ]
    return [
        _Merged(name, planes if fmt is None else planes[: fmt.num_planes + (fmt.spread is not None)], fmt, place)
        for name, planes, fmt, place in tensors
    ]


def _unmerged_of(side: Averaged) -> list[tuple[str, str]]:
    """Return what stays as it is on each worker, and must be of the same kind on all: frozen params that are lent."""
    if isinstance(side, ShardedAveragedModel):
        return []
    each = [(name, tensor) for name, tensor, fmt in side._each_average() if fmt is None]
    return [(name, f"{describe_kind(tensor)} frozen") for name, tensor in each if is_plain(tensor) and is_lent(tensor)]


def _agreed_counts(
    ranks: Ranks,
    sides: Mapping[str, Averaged],
    merged: Mapping[str, Sequence[_Merged]],
    modules: Mapping[str, nn.Module],
) -> dict[str, list[int]]:
    """Return the counts of all workers by average, or raise ValueError on every rank if they cannot be merged."""
    described: dict[str, object] = {f"rule {name}".strip(): _spelled_rule(side) for name, side in sides.items()}
    for name, tensors in merged.items():
        for each in tensors:
            kinds = ", ".join(map(describe_kind, each.planes))
            how = each.format.name if each.format is not None else "copied"
            how += " with a variance" if each.format is not None and each.format.spread is not None else ""
            described[f"{name}.{each.name}".lstrip(".")] = f"{kinds} {how} {each.place}".strip()
    for name, side in sides.items():
        described |= {f"{name}.{each}".lstrip("."): kind for each, kind in _unmerged_of(side)}
    described |= dict.fromkeys(modules, "an extra state")
    try:
        ranks.agree("averaged, apart from its values,", described)
    except ValueError as error:
        raise ValueError(f"{error}: give each worker the same model, rule and format") from None
    gathered = ranks.gather([int(side.n_averaged) for side in sides.values()])
    for rank, counts in zip(ranks.ranks, gathered, strict=True):
        if min(counts) < 1:
            raise ValueError(f"averaged must have been updated on every rank, got n_averaged = 0 on rank {rank}")
    return dict(zip(sides, map(list, zip(*gathered, strict=True)), strict=True))


def _spelled_rule(side: Averaged) -> str:
    """Return by what an average moves: a rule, or a function of the user's own."""
    function = side.multi_avg_fn or side.avg_fn if side.rule is None else None
    return spell(side.rule if function is None else function)


def _mean(ranks: Ranks, merged: Sequence[_Merged], counts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return all planes of an averaged model, each with what is to be written into it. Collective."""
    writes: list[tuple[Tensor, Tensor]] = []
    for each in sorted(merged, key=attrgetter("name")):  # workers may have registered them in another order
        fresh = [torch.empty_like(plane.detach()) for plane in each.planes]
        if each.format is None:
            fresh[0].copy_(each.planes[0].detach())
            first = fresh[0].contiguous()
            ranks.broadcast_(first)
            fresh[0] = first
        else:
            for planes, parts in _windows_of(each.planes, fresh):
                for part, merged_part in zip(parts, _merged_window(ranks, each, planes, counts), strict=True):
                    part.copy_(merged_part)
        writes += zip(each.planes, fresh, strict=True)
    return writes


def _differ(merged: Sequence[_Merged], writes: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Return whether a mean differs from this worker's own, or nothing is averaged."""
    averaged = {id(plane) for each in merged if each.format is not None for plane in each.planes}
    pairs = [(plane, fresh) for plane, fresh in writes if id(plane) in averaged and plane.numel() > 0]
    return not pairs or any(not torch.equal(plane, fresh) for plane, fresh in pairs)


def _windows_of(
    planes: Sequence[Tensor], fresh: Sequence[Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    for window in windows((*(plane.detach() for plane in planes), *fresh), _WINDOW_NUMEL):
        if window[0].numel():
            yield window[: len(planes)], window[len(planes) :]


def _merged_window(
    ranks: Ranks, merged: _Merged, planes: Sequence[Tensor], counts: Sequence[int]
) -> tuple[Tensor, ...]:
    """Return the planes of all workers' average in a window. Every rank computes them in the same order, to the bit.

    Raises:
        ValueError: on every rank, if one holds a NaN, or an infinity that others have not.
    """
    fmt = merged.format
    assert fmt is not None, "what is copied is not merged"
    means = _received(ranks, fmt.decode(tuple(planes[: fmt.num_planes])))
    total = torch.zeros_like(means[0], dtype=torch.promote_types(means.dtype, torch.float64))
    for own, count in zip(means, counts, strict=True):
        total += own.to(total.dtype) * count  # not add_(alpha=count), which some processors fuse and round once
    total /= sum(counts)
    _require_finite(ranks, merged.name, total, means)
    mean = total.to(planes[0].device)
    fresh = fmt.mean.encode(rounded(mean, fmt.value_dtype or planes[0].dtype))
    if fmt.spread is None:
        return fresh
    variances = _received(ranks, planes[fmt.num_planes])
    variance = pooled_variance([*variances], [*means], total, counts)
    _require_finite(ranks, f"the variance of {merged.name}", variance, variances)
    return (*fresh, variance.to(planes[0].device, torch.float32))


def _received(ranks: Ranks, value: Tensor) -> Tensor:
    """Return the values of all workers, one after the other. Collective."""
    sent = value.contiguous().to(ranks.device_for(value.device))
    received = sent.new_empty((ranks.size, *sent.shape))
    if ranks.size > 1:
        ranks.all_gather(_bytes_of(received), _bytes_of(sent))
    else:
        received[0] = sent
    return received


def _require_finite(ranks: Ranks, name: str, merged: Tensor, received: Tensor) -> None:
    if not merged.isfinite().all():
        # All ranks have the same values here, so all of them raise. An infinity that all share, as in masks, stays.
        for rank, own in zip(ranks.ranks, received, strict=True):
            if not (own.isfinite() | (own == received).all(0)).all():
                raise ValueError(f"averaged must be finite, got a NaN or an infinity in {name!r} on rank {rank}")


def _bytes_of(tensor: Tensor) -> Tensor:
    """View a tensor as bytes, since gloo does not take every dtype."""
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return parts.view(-1).view(torch.uint8)


# Extra states of modules


def _modules_with_extra_state(sides: Mapping[str, Averaged]) -> dict[str, nn.Module]:
    """Return the averaged modules that have an extra state, by its name. Sharded averages hold none."""
    found = {
        f"{name}.{path}._extra_state".lstrip("."): module
        for name, side in sides.items()
        if isinstance(side, FusedAveragedModel)
        for path, module in side.module.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }
    return dict(sorted(found.items()))


def _packed(values: Sequence[object]) -> bytes:
    """Return the values as bytes, without a copy on another rank's GPU when they are unpacked."""
    into = io.BytesIO()
    torch.save([*values], into)
    return into.getvalue()


def _take_extra_states(ranks: Ranks, modules: Sequence[nn.Module], packed: bytes) -> None:
    """Set the extra states of the first worker. If it fails on a rank, it raises on all, and nothing has changed.

    All ranks come to its end before one of them writes a mean. A broadcast alone may succeed on some of them.
    """
    if modules:
        packed = ranks.gather(packed if ranks.index == 0 else b"")[0]
    before: list[object] = []
    try:
        with ranks.settled("merge_over"):
            if ranks.index > 0 and modules:
                fresh = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)
                before = [copy.deepcopy(module.get_extra_state()) for module in modules]
                for module, extra in zip(modules, fresh, strict=True):
                    module.set_extra_state(extra)
    except BaseException:
        for module, old in zip(modules, before, strict=bool(before)):
            module.set_extra_state(old)
        raise
