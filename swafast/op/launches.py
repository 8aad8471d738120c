"""Launches: what an update is, and how its pairs are shared out among backends.

:func:`update` is the eager way. ``torch_op.py`` registers the same op for compiled code, where the dispatcher takes
7-11 us a call.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backends.contract import Backend, ExchangeLaunch, Launch, Pair, ReduceFlag, found_anywhere
from ..backends.gpu import DeviceLaunch
from ..terms.draws import Draws, make_random_key
from ..terms.formats import Format
from ..terms.rules import FixedWeight, Rule, checked_weight, terms_of
from .checks import overlaps, refuse_capture

_warned: set[str] = set()


def bump_versions(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that the memory of ``tensors`` was written: unseen, a write gives a wrong gradient in silence."""
    try:
        increment_version(tensors)
    except RuntimeError:  # a tensor made under inference_mode has no version, and autograd never keeps it
        for tensor in tensors:
            with contextlib.suppress(RuntimeError):
                increment_version(tensor)


def draws_of(seed: int, name: str, param: Tensor, fmt: Format | None) -> Draws | None:
    """Return where the random bits of a whole param's average come from; None for a format that draws none."""
    return Draws(make_random_key(seed, name), tuple(param.shape)) if fmt is not None and fmt.num_random_bits else None


@dataclass
class Work:
    """The pairs of one plan that one backend runs."""

    backend: Backend
    indices: tuple[int, ...]  # into the plan's pairs
    launch: Launch

    @property
    def on_host(self) -> bool:
        """Whether it reads ``num_averaged`` on the host."""
        return self.backend.device_types is None or "cpu" in self.backend.device_types

    def pick(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return its own params, for a backend that takes tensors: the others use addresses."""
        return [params[i] for i in self.indices] if self.backend.device_types is None else ()


def prepare(pairs: Sequence[Pair], backends: Sequence[Backend]) -> list[Work]:
    """Assign each pair to the first backend that serves it. The preferred backend's work comes last.

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


def update(
    work: Sequence[Work],
    params: Sequence[Tensor],
    rules: Sequence[Rule],
    counters: Sequence[Tensor],
    *,
    skip_nonfinite: bool = False,
    reduce_flag: ReduceFlag | None = None,
) -> None:
    """Run one update of prepared pairs and count it; with ``skip_nonfinite`` neither, if a param is not finite.

    ``rules`` and ``counters`` are those of the averaged models, by the pairs' ``pace``; all counters are on one device.
    ``reduce_flag`` sets a flag on all ranks where it is set on one, on the flag's device.
    """
    rules = [
        rule if terms_of(rule) is not None else _work_out(rule, counter)
        for rule, counter in zip(rules, counters, strict=True)
    ]
    device = counters[0].device
    if device.type == "cuda" and any(each.on_host for each in work):
        refuse_capture(device, "an update of which a part runs on the host")
    if skip_nonfinite and not work:
        flag = torch.zeros((), dtype=torch.int64, device=device)
        if reduce_flag is not None:
            reduce_flag(flag)
        for counter in counters:
            counter.add_(flag == 0)
        return
    if skip_nonfinite:
        launch = work[0].launch
        if len(work) == 1 and isinstance(launch, DeviceLaunch):
            launch.update((), rules, counters, 1, skip_nonfinite=True, reduce_flag=reduce_flag)
            return
        # What one backend finds holds for all of them.
        if found_anywhere(first_nonfinite(work, params) is not None, device, reduce_flag):
            return
    for each in work:
        each.launch.update(each.pick(params), rules, counters, int(each is work[-1]))
    if not work:
        for counter in counters:
            counter.add_(1)


def _work_out(rule: Rule, num_averaged: Tensor) -> Rule:
    """Ask a rule of Python alone for its weight, once, before anything is written: it may be of any kind, and raise."""
    if num_averaged.device.type == "cuda":
        refuse_capture(num_averaged.device, f"{type(rule).__name__}, which works out its weight in Python,")
        what = f"{type(rule).__name__} has no kernel_terms"
        if what not in _warned:
            _warned.add(what)
            why = "so each update waits for the GPU to read n_averaged"
            warnings.warn(f"swafast works out the weight in Python: {what}, {why}", RuntimeWarning, stacklevel=2)
    return FixedWeight(checked_weight(rule, int(num_averaged)))


def prepare_exchange(pairs: Sequence[Pair], backends: Sequence[Backend]) -> tuple[list[ExchangeLaunch], list[Pair]]:
    """Prepare launches that exchange params and averages in place; return them, and the pairs that none can take.

    In place go pairs of one dtype that a kernel serves and that share memory with no other pair.
    """
    sides = [(pair.param,) for pair in pairs], [(pair.average,) for pair in pairs]
    entangled = {index for side in sides for overlapping in overlaps(side) for index in overlapping}
    alike = [
        pair for index, pair in enumerate(pairs) if pair.param.dtype == pair.average.dtype and index not in entangled
    ]
    launches: list[ExchangeLaunch] = []
    taken: set[int] = set()
    for backend in backends:
        if backend.exchanges:
            direct = [pair for pair in alike if id(pair) not in taken and backend.serves(pair)]
            if direct:
                launches.append(cast(ExchangeLaunch, backend.prepare(direct)))
                taken |= {id(pair) for pair in direct}
    return launches, [pair for pair in pairs if id(pair) not in taken]


def first_nonfinite(work: Sequence[Work], params: Sequence[Tensor]) -> int | None:
    """Return the index of a param that holds a NaN or an infinity, else None. One more read of the params."""
    for each in work:
        index = each.launch.first_nonfinite(each.pick(params))
        if index is not None:
            return each.indices[index]
    return None
