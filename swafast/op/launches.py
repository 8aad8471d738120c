"""How the pairs of a plan are assigned to backends: for an update, and for an exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import cast

import torch
from torch import Tensor

from ..backends.contract import Backend, ExchangeLaunch, Launch, Pair, Update
from ..terms.copying import overlaps_itself
from ..terms.draws import Draws, make_random_key
from ..terms.formats import Format
from ..terms.samples import Sample
from .checks import overlaps


def draws_of(seed: int, name: str, param: Tensor, fmt: Format | None) -> Draws | None:
    """Return what the random bits of a whole param's average depend on, or None for a format that uses none."""
    return Draws(make_random_key(seed, name), tuple(param.shape)) if fmt is not None and fmt.num_random_bits else None


@dataclass(frozen=True, eq=False)
class Work:
    """The pairs of one plan that one backend updates."""

    backend: Backend | None  # None if there are no pairs
    indices: tuple[int, ...]  # into the plan's pairs
    launch: Launch

    takes_tensors: bool = False  # whether each update passes the params to the launch; if not, it uses addresses
    is_on_host: bool = False  # whether it reads ``num_averaged`` on the host


class CountLaunch:
    """A launch that only counts, for a rank that has no part of any param."""

    captured = False

    def update(self, params: Sequence[Tensor], update: Update) -> None:
        if update.skip_nonfinite and update.device.type == "cpu":
            if update.is_skipped(False):  # another rank found a NaN, and then no rank counts
                return
        elif update.skip_nonfinite:
            # As on the CPU, but do not read the flag on the host: the ranks that have a part do not either.
            flag = torch.zeros((), dtype=torch.int64, device=update.device)
            if update.reduce_flag is not None:
                update.reduce_flag(flag)
            for counter in update.counters:
                counter.add_(flag == 0)
            return
        for counter in update.counters:
            counter.add_(update.advance)

    def draw(self, params: Sequence[Tensor], sample: Sample) -> None:
        """Draw nothing."""

    def first_nonfinite(self, params: Sequence[Tensor]) -> int | None:
        return None


def prepare(pairs: Sequence[Pair], backends: Sequence[Backend]) -> list[Work]:
    """Assign each pair to the first backend that serves it. The preferred backend's work comes last.

    Only the last one counts the update, so that all read the same ``num_averaged``.
    """
    if not pairs:
        return [Work(None, (), CountLaunch())]
    taken: dict[str, list[int]] = {backend.name: [] for backend in backends}
    for index, pair in enumerate(pairs):
        taken[next(backend.name for backend in backends if backend.serves(pair))].append(index)
    work = []
    for backend in reversed(backends):
        if indices := taken[backend.name]:
            launch, kinds = backend.prepare([pairs[i] for i in indices]), backend.device_types
            work.append(Work(backend, tuple(indices), launch, kinds is None, kinds is None or "cpu" in kinds))
    return work


def _without_spread(pair: Pair) -> Pair:
    """Return a pair of the average alone: an exchange leaves the spread as it is."""
    return replace(pair, planes=pair.mean_planes, format=pair.format.mean) if pair.format is not None else pair


def prepare_exchange(
    each_pair: Callable[[], Iterable[Pair]],
    backends: Sequence[Backend],
    work: Sequence[Work],
    *,
    may_expand: bool,
    has_spread: bool,
) -> tuple[list[ExchangeLaunch], list[int]]:
    """Prepare launches that exchange params and averages in place.

    A pair is exchanged in place if both sides have one dtype, a kernel serves it, and nothing else shares its memory.
    Averaged buffers are not: a forward pass in training mode may write them, and must not write averages.

    Args:
        each_pair: returns the pairs, one after the other.
        work: the work of an update of these pairs. A launch is reused if it has just the pairs to exchange.
        may_expand: whether elements of a param may share memory. Such a param is not exchanged either.
        has_spread: whether an average has a spread. The launch of its update then is none of an exchange.

    Returns:
        the launches, and the indices of the pairs that no launch exchanges.
    """
    params: list[Tensor] = []
    averages: list[Tensor] = []
    alike: list[int] = []
    for index, pair in enumerate(each_pair()):
        average = pair.average
        params.append(pair.param)
        averages.append(average)
        is_averaged_buffer = pair.is_buffer and pair.format is not None
        expands = may_expand and overlaps_itself(pair.param)
        if pair.param.dtype == average.dtype and not (is_averaged_buffer or expands):
            alike.append(index)
    entangled = {index for side in (params, averages) for both in overlaps(zip(side)) for index in both}
    alike = [index for index in alike if index not in entangled] if entangled else alike
    aside = set(range(len(params)))
    served = {each.backend.name: {*each.indices} for each in work if each.backend is not None}
    launches: list[ExchangeLaunch] = []
    for backend in filter(attrgetter("exchanges"), backends):
        own, rest = served.get(backend.name, set()), [index for index in alike if index in aside]
        if not own.issuperset(rest):  # others' work, which it may exchange although they update
            pairs = [*each_pair()]
            own |= {index for index in rest if index not in own and backend.serves(pairs[index])}
        direct = [index for index in rest if index in own]
        if direct:
            made = next((each.launch for each in work if each.backend is backend and [*each.indices] == direct), None)
            if made is None or has_spread:
                pairs = [*each_pair()]
                made = backend.prepare([_without_spread(pairs[index]) for index in direct])
            launches.append(cast(ExchangeLaunch, made))
            aside -= set(direct)
    return launches, sorted(aside)
