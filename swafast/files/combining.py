"""`combine_files`: the merge of several averages in files, or the window between two, by the counts that they hold."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..posthoc.merging import is_averaged, pooled_variance, rounded
from ..posthoc.stored_merges import MOST_GAIN, loss_of
from ..terms.copying import bytes_of, describe_kind, is_plain
from ..terms.formats import COMPENSATED, EXTRA_PLANES, Format, format_of_planes
from ..terms.misfits import few, unlike
from ..terms.plane_names import DEVIATION, VARIANCE
from ..terms.replacing import replacing
from ..terms.unmerged import is_statistic, is_unmerged
from ..torch_private.modules import metadata_of, set_metadata
from .averaged_file import write_state
from .counted_states import COUNT, CountedState, check_files, is_pickled, read_counted
from .opening import PICKLED_SUFFIXES
from .placing import check_place, check_space


@dataclass(frozen=True)
class Combined:
    """What was written."""

    counts: Mapping[str, int]  # as of a CountedState
    copied: Sequence[str]  # names of BatchNorm statistics, which are those of the last input
    dropped: Sequence[str] = ()  # keys of deviations that the last input has


@torch.no_grad()
def combine_files(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    window: bool = False,
    key: str | None = None,
    allow: Sequence[str] = (),
    copied: Sequence[str] = (),
    force: bool = False,
) -> Combined:
    """Write one average that is made of averages in files, summed in float64 and rounded once to their format.

    A merge is the mean of all models, ``sum of n_i * m_i / sum of n_i``. A window is the mean of the models that the
    later average has and the earlier one has not, ``(n2 * m2 - n1 * m1) / (n2 - n1)``. Both are right for equal means,
    as of :class:`~swafast.EqualAverage`; files hold no rule. Integers, BatchNorm's statistics and further state are
    copied from the last input, and so is all that is equal in all inputs. Other floating-point buffers look like params
    in a file: name those that were not averaged (``use_buffers=False``) in ``copied``. The result is in memory, and so
    are inputs of :func:`~swafast.save`, whose checksums are verified. Files of ``torch.save`` are mapped.

    Of averages with a spread the result has the variance of its models, but no deviations, since those are from other
    means: load it into an average with ``deviations=0``.

    Args:
        inputs: files of :func:`~swafast.save`, or states with ``n_averaged`` of ``torch.save``, as of torch's
            ``AveragedModel``. For a window: the earlier one, then the later one.
        out: ends in .safetensors for a file as of :func:`~swafast.save`, or as a file of ``torch.save`` for a state.
        key: where the state is in what ``torch.save`` has written, as in ``a.b``.
        allow: globals that files of ``torch.save`` may name beside tensors and the state, as ``module.name``.
        copied: the model's names of tensors that are not averaged, but copied from the last input.
        force: replace ``out``.

    Warns:
        RuntimeWarning: a window is so short that rounding errors grow by more than 20, and is not ``compensated``.

    Raises:
        ValueError: an input is damaged or holds no count; counts do not fit; names, shapes, formats, dtypes or float8
            values differ; a sum overflows; or no tensor has a name in ``copied``. The message names the file and the
            tensor. Nothing was written.
        OSError: a file cannot be read or written, or ``out`` exists. What stood there is whole.
    """
    paths = [os.fspath(path) for path in inputs]
    if len(paths) < 2 or (window and len(paths) != 2):
        raise ValueError(f"inputs must be {'two' if window else 'at least two'} files, got {len(paths)}")
    check_files(paths)
    _check_out(Path(out), force)
    read = [read_counted(path, key, allow) for path in paths]
    states = [_without_deviations(each) for each in read]
    last = states[-1]
    for each in states[1:]:
        _require_alike(each, states[0])
    state: OrderedDict[str, Any] = OrderedDict(last.state)
    counts: dict[str, int] = {}
    kept = {f"{prefix}module.{name}" for prefix in last.counts for name in copied}
    unknown = [name for name in copied if not any(f"{prefix}module.{name}" in last.state for prefix in last.counts)]
    if unknown:
        raise ValueError(f"copied must have names of the model in {last.path}, got {few(unknown)}")
    for prefix in last.counts:
        found = [each.counts[prefix] for each in states]
        factors = [-found[0], found[1]] if window else found
        if sum(factors) < 1:
            raise ValueError(f"{paths[1]} must have averaged more models than {paths[0]}, {found[0]}, got {found[1]}")
        _combine(states, prefix, factors, kept, state)
        counts[prefix] = sum(factors)
        state[prefix + COUNT] = torch.tensor(counts[prefix])
    set_metadata(state, metadata_of(last.state))
    _write(state, last.names, Path(out), new=not force)
    dropped = [name for name in read[-1].state if name not in last.state]
    return Combined(counts, [name for name in state if is_statistic(name)], dropped)


# Files


def _check_out(out: Path, force: bool) -> None:
    if not (out.suffix.lower() == ".safetensors" or is_pickled(out)):
        raise ValueError(f"out must end in .safetensors, {', '.join(PICKLED_SUFFIXES)}, got {str(out)!r}")
    check_place(out, "file", force, ())


def _write(state: OrderedDict[str, Any], names: list[str] | None, out: Path, *, new: bool) -> None:
    distinct = {id(value): value.nbytes for value in state.values() if isinstance(value, Tensor)}
    check_space(out, sum(distinct.values()))
    if not is_pickled(out):
        write_state(state, names, out, new=new)
        return
    with replacing(out, new=new) as unfinished:
        torch.save(state, unfinished)


def _without_deviations(each: CountedState) -> CountedState:
    """Return a state without its deviations, which are from one mean and do not fit that of other models."""
    heads = tuple(f"{prefix}{DEVIATION}." for prefix in each.counts)
    state = OrderedDict((name, value) for name, value in each.state.items() if not name.startswith(heads))
    set_metadata(state, metadata_of(each.state))
    return replace(each, state=state)


# What must agree


def _require_alike(each: CountedState, first: CountedState) -> None:
    differing = sorted(each.state.keys() ^ first.state.keys())
    planes = [name for name in differing if {*name.split(".")[:2]} & {*EXTRA_PLANES}]
    if differing:
        variances = [
            name for name in differing if name.startswith(tuple(f"{each}{VARIANCE}." for each in first.counts))
        ]
        if variances:
            raise ValueError(
                f"{each.path} must have a variance where {first.path} has one, got {few(variances)} in one of them "
                "alone: take the variances out of that state to combine the means"
            )
        if planes == differing:
            raise ValueError(
                f"{each.path} must have the formats of {first.path}, got others for {few(planes)}: load one into an "
                "average of the other's format, and save it"
            )
        raise ValueError(f"{each.path} must have the names of {first.path}, but {unlike(each.state, first.state)}")
    for name, value in first.state.items():
        got, expected = (describe_kind(x) if isinstance(x, Tensor) else "no tensor" for x in (each.state[name], value))
        if got != expected and not name.endswith(COUNT):
            raise ValueError(f"{each.path} must have {expected} for {name!r}, as {first.path}, got {got}")


# Arithmetic


@dataclass(frozen=True)
class _KeysOfAverage:
    """Where a state has the planes of one average."""

    first: list[str]  # of plane 0, under each name of a tied param
    further: list[str]
    format: Format | None  # None: plane 0 alone, in its own dtype
    variance: str | None


def _combine(
    states: Sequence[CountedState], prefix: str, factors: Sequence[int], kept: Set[str], into: dict[str, Any]
) -> None:
    """Write the sums of one average into a state.

    Args:
        factors: the counts, of which an earlier one is negative.
        kept: keys of tensors that are copied.
    """
    gain = sum(map(abs, factors)) / sum(factors)
    is_short = gain > MOST_GAIN
    _require_same_float8(states, f"{prefix}module.", kept)
    for keys in _averages_in(states, prefix):
        name, *_ = keys.first
        spread = [keys.variance] if keys.variance is not None else []
        planes = [tuple(each.state[key] for key in (name, *keys.further, *spread)) for each in states]
        if not kept.isdisjoint(keys.first):
            continue
        if is_short and keys.format is not COMPENSATED and planes[-1][0].dtype not in (torch.float64, torch.complex128):
            is_short = False  # warn once
            warnings.warn(loss_of(gain), RuntimeWarning, stacklevel=3)
        if all(_same_bits(of_one, planes[-1]) for of_one in planes[:-1]):
            continue
        for each, of_one in zip(states, planes, strict=True):
            for key, value in zip((name, *spread), (of_one[0], *of_one[1 + len(keys.further) :]), strict=True):
                if not value.isfinite().all():
                    raise ValueError(f"{each.path} must be finite, got a NaN or an infinity in {key!r}")
        first, *further = _sum(planes, keys, factors)
        if not first.isfinite().all():
            raise ValueError(f"the inputs must have a mean that {first.dtype} holds, got an infinity for {name!r}")
        into.update(dict.fromkeys(keys.first, first))
        into.update(zip((*keys.further, *spread), further, strict=True))


def _require_same_float8(states: Sequence[CountedState], head: str, kept: Set[str]) -> None:
    """Raise ValueError where float8 tensors of a model differ, which no sum is made of."""
    last = states[-1]
    for key, value in last.state.items():
        if not key.startswith(head) or key in kept or is_unmerged(key) or not isinstance(value, Tensor):
            continue
        if value.is_floating_point() and value.itemsize == 1:
            for each in states[:-1]:
                if not _same_bits((each.state[key],), (value,)):
                    raise ValueError(
                        f"{each.path} must have the values of {last.path} for {key!r}, since {value.dtype} is not "
                        f"averaged: copied=({key.removeprefix(head)!r},) (--copied {key.removeprefix(head)}) takes "
                        "those of the last input"
                    )


def _averages_in(states: Sequence[CountedState], prefix: str) -> Iterator[_KeysOfAverage]:
    """Yield where the averages are. What is no average is left out, as far as a state tells."""
    state = states[-1].state
    head = f"{prefix}module."
    # Params that are tied in all states stand together. Their further planes have the first name.
    by_memory: dict[object, list[str]] = {}
    for key, value in state.items():
        if key.startswith(head) and is_averaged(key, value) and is_plain(value):
            tensors = [each.state[key] for each in states]
            memory = tuple((each.data_ptr(), each.dtype, each.shape, each.stride()) for each in tensors)
            by_memory.setdefault(memory if value.numel() else key, []).append(key)
    found: list[tuple[list[str], dict[str, str]]] = []
    for keys in by_memory.values():
        names = [(plane, f"{prefix}{plane}.{key.removeprefix(head)}") for plane in EXTRA_PLANES for key in keys]
        found.append((keys, {plane: of for plane, of in names if of in state}))
    # If averages of one dtype have further planes, a tensor of that dtype without them is a buffer.
    in_planes = {state[keys[0]].dtype for keys, further in found if further}
    for keys, further in found:
        first = state[keys[0]]
        if not further and first.dtype in in_planes:
            continue
        variances = (f"{prefix}{VARIANCE}.{key.removeprefix(head)}" for key in keys)
        variance = next((key for key in variances if key in state), None)
        fmt = format_of_planes(first, {plane: state[of] for plane, of in further.items()}) if further else None
        if further and fmt is None:
            raise ValueError(
                f"{states[-1].path}: {keys[0]!r} must have the planes of one format, got {list(further.values())}"
            )
        yield _KeysOfAverage(keys, [further[plane] for plane, _ in fmt.extra] if fmt else [], fmt, variance)


def _same_bits(planes: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for one, other in zip(planes, others, strict=True):
        kind = integers.get(one.itemsize, torch.int64)
        a, b = ((torch.view_as_real(x) if x.is_complex() else x).contiguous() for x in (one, other))
        if bytes_of(one) and not torch.equal(a.view(kind), b.view(kind)):
            return False
    return True


def _sum(planes: Sequence[tuple[Tensor, ...]], keys: _KeysOfAverage, factors: Sequence[int]) -> list[Tensor]:
    """Return the planes of the sum, and its variance where the averages have one."""
    first, fmt, count = planes[-1][0], keys.format, 1 + len(keys.further)
    means = [fmt.decode(of_one[:count]) if fmt is not None else of_one[0] for of_one in planes]
    total = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float64))
    for value, factor in zip(means, factors, strict=True):
        total += value.to(total.dtype) * factor
    total /= sum(factors)
    value = rounded(total, (fmt.value_dtype if fmt is not None else None) or first.dtype)
    summed = list(fmt.encode(value)) if fmt is not None else [value]
    if keys.variance is not None:
        variance = pooled_variance([of_one[count] for of_one in planes], means, total, factors)
        summed.append(variance.to(planes[-1][count].dtype))
    return summed
