"""`merge` and `greedy_merge`: sums of state dicts that are in memory."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..op.checks import GATHER
from ..terms.coefficients import coefficients_of, factors_of
from ..terms.copying import describe_kind, duplicate, is_plain
from ..terms.formats import EXTRA_PLANES
from ..terms.misfits import unlike
from ..terms.numbers import as_float
from ..terms.pickling import pickled_from
from ..terms.plane_names import VARIANCE
from ..terms.unmerged import is_unmerged, leaf_of
from ..torch_private.modules import metadata_of, set_metadata
from .sums import local_of

State = Mapping[str, Any]

#: The key of an average's count.
COUNT = "n_averaged"

#: Dtypes that are averaged.
_AVERAGED = (*(torch.float64, torch.float32, torch.float16, torch.bfloat16), torch.complex64, torch.complex128)


@pickled_from("swafast.posthoc")
class GreedyMerge(NamedTuple):
    """What :func:`greedy_merge` has found."""

    state: dict[str, Any]  # the merged one
    chosen: list[int]  # which of the states are in it, in the order in which they were added
    score: float  # of the merged one


@torch.no_grad()
def merge(states: Iterable[State], weights: str | Sequence[float] | None = None) -> dict[str, Any]:
    """Return the weighted sum of state dicts of one model, summed in float64 and rounded once to each dtype.

    Integers, BatchNorm's statistics, extra states and whatever is no tensor are copied from the last state. If the
    model has BatchNorm, load the result and call :func:`~swafast.update_bn`. DTensors stay as they are sharded.

    Args:
        states: oldest first, such as ``model.state_dict()`` of several checkpoints. They are not changed.
        weights: None or ``"equal"`` for the mean; ``"1-sqrt"`` (also ``"minus-sqrt"``) or ``"linear"`` for that decay
            of the learning rate; or one number for each state, which sum to 1.

    Raises:
        TypeError: ``states`` are not mappings of names to values, or ``weights`` is none of these.
        ValueError: there is no state, or one is a whole checkpoint; names, shapes or dtypes differ; float8 values
            differ; a tensor has no values in memory; or ``weights`` do not fit.

    Papers: Wortsman et al. 2022, "Model soups", arXiv:2203.05482; Tian et al. 2025, "WSM: Decay-Free Learning Rate
    Schedule via Checkpoint Merging for LLM Pre-training", arXiv:2507.17634, for the decays.
    """
    given = checked_states(states)
    coefficients = coefficients_of(len(given), weights)
    merged: OrderedDict[str, Any] = OrderedDict()
    sums: dict[object, Tensor] = {}  # by the memory that is summed: tied params get one sum
    for name, value in given[-1].items():
        if not is_averaged(name, value):
            merged[name] = _copied(value)
            continue
        tensors = [state[name] for state in given]
        memory = (value.dtype, value.shape, *((local_of(each).data_ptr(), each.stride()) for each in tensors))
        if memory not in sums or not value.numel():
            sums[memory] = _weighted_sum(tensors, coefficients)
        merged[name] = sums[memory]
    set_metadata(merged, metadata_of(given[-1]))
    return merged


def greedy_merge(states: Iterable[State], score: Callable[[dict[str, Any]], float]) -> GreedyMerge:
    """Merge those states whose mean scores best: the greedy soup.

    Begin with the state of the best score. Then try to add each of the others, best first, and keep it in the mean
    while the score of the mean does not fall. Each state is scored alone, and then once in a mean.

    Args:
        states: as for :func:`merge`. What is not averaged is copied from the state of the best score.
        score: takes a state dict, and returns a number that is higher for a better model, such as the accuracy on
            images that were held out. If the model has BatchNorm, it must call :func:`~swafast.update_bn`.

    Raises:
        TypeError, ValueError: ``states`` are not as for :func:`merge`, ``score`` is no function, or a score no number.

    Paper: Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
    increasing inference time", arXiv:2203.05482, recipe 1.
    """
    if not callable(score):
        raise TypeError(f"score must be a function of a state dict that returns a number, got {type(score).__name__}")
    given = checked_states(states)
    alone = [_scored(score, merge([state]), f"states[{index}]") for index, state in enumerate(given)]
    first, *others = sorted(range(len(given)), key=lambda index: -alone[index])  # stable: of equal ones the first
    chosen, best = [first], alone[first]
    merged = merge([given[first]])
    for index in others:
        tried = [*chosen, index]
        candidate = merge([given[each] for each in reversed(tried)])  # the best one last, as it is copied from
        found = _scored(score, candidate, f"the mean of states {tried}")
        if found >= best:
            merged, chosen, best = candidate, tried, found
    return GreedyMerge(merged, chosen, best)


def _scored(score: Callable[[dict[str, Any]], float], state: dict[str, Any], what: str) -> float:
    found = score(state)
    number = as_float(found)
    if number is None:
        raise TypeError(f"score must return a number, got {found!r} for {what}")
    if math.isnan(number):
        raise ValueError(f"score must return a number that can be compared, got NaN for {what}: leave it out")
    return number


# Which tensors are averaged, and what must agree


def is_averaged(name: str, value: object) -> bool:
    """Return whether a value of a state dict is averaged in a merge. All others are copied."""
    return isinstance(value, Tensor) and value.dtype in _AVERAGED and not is_unmerged(name)


def checked_states(states: Iterable[State]) -> list[State]:
    """Return the states, whose names, dtypes and shapes agree, or raise as :func:`merge` does."""
    if isinstance(states, (Mapping, torch.nn.Module)) or not isinstance(states, Iterable):
        raise TypeError(f"states must be a sequence of state dicts, got {type(states).__name__}")
    given = list(states)
    if not given:
        raise ValueError("states must be at least one state dict, got none")
    for index, state in enumerate(given):
        if not isinstance(state, Mapping):
            raise TypeError(f"states[{index}] must be a mapping such as model.state_dict(), got {type(state).__name__}")
        _require_tensors(f"states[{index}]", state)
        difference = unlike(state, given[0])
        if difference:
            raise ValueError(f"states[{index}] must have the names of states[0], but {difference}")
    for name, last in given[-1].items():
        for index, state in enumerate(given):
            _require_alike(f"states[{index}][{name!r}]", state[name], last, is_extra=leaf_of(name) == "_extra_state")
    return given


def _require_tensors(what: str, state: State) -> None:
    """Raise ValueError for a whole checkpoint, which has the state in one of its entries, and for several planes."""
    inner = _largest_within(state)
    if inner is not None:
        place = what + "".join(f"[{key!r}]" for key in inner)
        raise ValueError(f"{what} must hold tensors by name, got a dict of them at {place}: pass that one")
    plane = _further_plane(state)
    if plane is not None:
        raise ValueError(
            f"{what} must be a model's own state, got one of an average with {plane!r} beside it: pass "
            "averaged_state_dict(), or merge such states by their counts with swafast combine or merge_over"
        )
    tensors = (value for value in state.values() if isinstance(value, Tensor))
    averaged = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    if not averaged:
        raise ValueError(f"{what} must hold tensors that can be averaged, got none: pass model.state_dict()")
    if not any(tensor.numel() for tensor in averaged):
        raise ValueError(f"{what} must hold values, got only empty tensors, as a model has under ZeRO-3: {GATHER}")


def _further_plane(state: State) -> str | None:
    """Return the first key of a plane that an average has beside its first one, or None: no sum of each would fit."""
    keys = [*map(str, state)]
    counted = [key.removesuffix(COUNT) for key in keys if leaf_of(key) == COUNT]
    heads = tuple(f"{prefix}{plane}." for prefix in counted for plane in (*EXTRA_PLANES, VARIANCE))
    return next((key for key in keys if key.startswith(heads)), None)


def _largest_within(state: State) -> list[object] | None:
    """Return the keys that lead to the nested dict with the most tensors to average; None: there is no such dict."""
    found: list[tuple[int, list[object]]] = []

    def search(entries: State, keys: list[object]) -> None:
        for key, inner in entries.items():
            if isinstance(inner, Mapping) and leaf_of(str(key)) != "_extra_state":
                found.append((sum(is_averaged(str(name), value) for name, value in inner.items()), [*keys, key]))
                search(inner, [*keys, key])

    search(state, [])
    most, keys = max(found, key=lambda each: each[0], default=(0, []))
    return keys if most else None


def _require_alike(what: str, value: object, last: object, *, is_extra: bool) -> None:
    if _kind_of(value) != _kind_of(last):
        raise ValueError(f"{what} must be {_kind_of(last)}, as in the last state, got {_kind_of(value)}")
    if not isinstance(value, Tensor) or not isinstance(last, Tensor):
        return
    if value.is_meta:
        raise ValueError(f"{what} must have values in memory, got a tensor on meta")
    if value.dtype in _AVERAGED and not (is_plain(value) or isinstance(value, DTensor)):
        raise ValueError(f"{what} must be dense to be averaged, got {describe_kind(value)}")
    if value.is_floating_point() and value.itemsize == 1 and not is_extra and not _same_bytes(value, last):
        raise ValueError(
            f"{what} must be equal in all states, since {value.dtype} is not averaged: merge the weights in a wider "
            "dtype, and quantise the result"
        )


def _kind_of(value: object) -> str:
    if not isinstance(value, Tensor):
        return "no tensor"
    spread = f" {value.placements} on {value.device_mesh}" if isinstance(value, DTensor) else ""
    return describe_kind(value) + spread


def _same_bytes(value: Tensor, other: Tensor) -> bool:
    one, two = (local_of(each).detach().contiguous().view(torch.uint8).cpu() for each in (value, other))
    return torch.equal(one, two)


# Arithmetic


def _copied(value: Any) -> Any:
    return duplicate(value) if isinstance(value, Tensor) else copy.deepcopy(value)


def _weighted_sum(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    last = local_of(tensors[-1].detach())
    total = torch.zeros_like(last, dtype=torch.promote_types(last.dtype, torch.float64))
    factors, divisor = factors_of(coefficients)
    for tensor, factor in zip(tensors, factors, strict=True):
        total.add_(local_of(tensor.detach()).to(total.device), alpha=factor)
    total /= divisor
    result = torch.empty_like(tensors[-1].detach())
    local_of(result).copy_(rounded(total, last.dtype))
    return result


def pooled_variance(
    variances: Sequence[Tensor], means: Sequence[Tensor], mean: Tensor, factors: Sequence[int]
) -> Tensor:
    """Return the variance of all models of several averages, float64: ``sum of n_i (v_i + (m_i - m)^2) / sum of n_i``.

    Args:
        mean: of all, before it is rounded.
        factors: the counts. For a window the earlier one is negative; rounding errors below 0 are then cut.

    Paper: Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance", The American Statistician 37(3).
    """
    total = torch.zeros_like(mean, dtype=torch.float64)
    for variance, own, factor in zip(variances, means, factors, strict=True):
        total += (variance.to(torch.float64) + (own.to(torch.float64) - mean).square()) * factor
    return (total / sum(factors)).clamp_(min=0)


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 or complex128 once to ``dtype``.

    torch rounds float64 to bfloat16 and float16 by way of float32, so twice. Here float32 gets the bits that decide the
    second rounding: it is cut, and its last bit is set if anything was cut off.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    bits = value.contiguous().view(torch.int64)
    is_cut = (bits & 0x1FFFFFFF).ne(0).to(torch.int64)  # float64 has 29 bits more than float32
    return ((bits & ~0x1FFFFFFF) | (is_cut << 29)).view(torch.float64).to(torch.float32).to(dtype)
