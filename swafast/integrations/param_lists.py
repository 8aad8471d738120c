"""Averages of the tensors in a list, matched by their positions, with the plan of their updates."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import Pair
from ..loop import swaps
from ..op import checks, choice
from ..op.plan import Plan
from ..terms.capturing import refuse_capture
from ..terms.converting import convert
from ..terms.copying import is_plain
from ..terms.formats import Format, format_of
from ..terms.rules import FixedWeight

_COPY = FixedWeight(1.0)
_is_trained = attrgetter("requires_grad")


class PositionalAverages:
    """The further planes of averages that are in somebody's list, and the plan of their updates.

    The list is the user's: its tensors may be written, moved or replaced at any time. So each call is given the list.
    Averages have the format that their dtype has by default: a bfloat16 average is kept as ``exact``, and so on.
    """

    def __init__(self) -> None:
        self._averages: list[Tensor] = []
        self._further: list[tuple[Tensor, ...]] = []  # of each average; none if it has none yet
        self._forget_plan()

    def _forget_plan(self) -> None:
        self._plan: Plan | None = None
        self._planes: list[Tensor] = []
        self._trained: list[bool] = []
        self._counters: tuple[Tensor, ...] = ()  # kernels want them, and nobody else
        self._homes: frozenset[int] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process."""
        return {"_averages": self._averages, "_further": self._further}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def further(self, averages: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return the further planes of each average that has some."""
        if len(averages) != len(self._averages) or not all(map(is_, averages, self._averages)):
            known = {id(average): planes for average, planes in zip(self._averages, self._further, strict=True)}
            self._further = [known.get(id(average), ()) for average in averages]
            self._averages, self._plan = [*averages], None
        kept = enumerate(zip(averages, self._further, strict=True)) if any(self._further) else ()
        for index, (average, planes) in kept:
            if planes and not _fit(average, planes):  # somebody has cast or moved it in place
                self._further[index], self._plan = (), None
        return self._further

    def put_further(self, averages: Sequence[Tensor], further: Sequence[tuple[Tensor, ...]]) -> None:
        """Replace all averages, with their further planes."""
        self._averages, self._further = [*averages], [*further]
        self._forget_plan()

    def update(self, params: Sequence[Tensor], averages: Sequence[Tensor], weight: float) -> bool:
        """Move each average towards its param by ``weight``. Params that are not trained are copied.

        Returns:
            False if nothing has happened, because a tensor is not a plain one: a ``DTensor``, for example.

        Raises:
            ValueError: a tensor does not fit its average; the message has its position, and nothing has changed.
            NotImplementedError: a param that is trained has a dtype that cannot be averaged.
            RuntimeError: averages are swapped into the params' model, or a CUDA graph is being captured.
        """
        if swaps.in_force:
            swaps.refuse("step", params)
        trained = [*map(_is_trained, params)]
        further = self.further(averages)
        plan = self._plan
        if plan is None or trained != self._trained or not plan.fits(params, self._planes, self._counters):
            if not all(map(is_plain, (*params, *averages))):
                return False
            plan = self._make(params, averages, trained, further)
        refuse_capture(self._counters[0].device, "step, which computes its decay in Python,")
        plan.update(params, self._planes, (FixedWeight(weight), _COPY)[: len(self._counters)])
        return True

    def _make(
        self,
        params: Sequence[Tensor],
        averages: Sequence[Tensor],
        trained: list[bool],
        further: list[tuple[Tensor, ...]],
    ) -> Plan:
        pairs = []
        for index, (param, average, is_trained) in enumerate(zip(params, averages, trained, strict=True)):
            fmt = _format_of(f"parameters[{index}]", param, average, is_trained)
            pair = Pair(f"parameters[{index}]", param, (average,), fmt, pace=int(not is_trained))
            checks.check_sides(pair, any_device=True)
            pairs.append(pair)
        made = [_further_of(pair, planes) for pair, planes in zip(pairs, further, strict=True)]
        pairs = [
            Pair(p.name, p.param, (p.average, *own), p.format, pace=p.pace) for p, own in zip(pairs, made, strict=True)
        ]
        checks.check_overlap(pairs)
        backends = choice.choose_backends(None, choice.device_types(pairs))
        paces = 1 + max(pair.pace for pair in pairs)
        counters = [torch.ones((), dtype=torch.int64, device=averages[0].device) for _ in range(paces)]
        plan = Plan(pairs, backends, counters, self._homes)
        self._further, self._trained, self._counters = made, trained, tuple(counters)
        self._planes = [plane for pair in pairs for plane in pair.planes]
        self._plan, self._homes = plan, plan.homes
        return plan


def own_format(average: Tensor) -> Format | None:
    """Return the format of an average in a list; None if it can only be copied."""
    return format_of(None, average.dtype)


def _format_of(name: str, param: Tensor, average: Tensor, is_trained: bool) -> Format | None:
    fmt = own_format(average)
    if not is_trained and (fmt is None or param.dtype == average.dtype):
        return None
    if fmt is None:
        raise NotImplementedError(
            f"{name} must have a dtype that can be averaged, got {average.dtype}: leave it out, or freeze it"
        )
    return fmt


def _further_of(pair: Pair, known: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the further planes of a pair: those that are known, or else new ones."""
    if pair.format is None or not pair.format.extra:
        return ()
    if known:
        return known
    made = tuple(torch.zeros_like(pair.average, dtype=dtype) for _, dtype in pair.format.extra)
    convert((pair.average,), None, (None, *made), pair.format)
    return made


def _fit(average: Tensor, planes: Sequence[Tensor]) -> bool:
    fmt = own_format(average)
    wanted = [(dtype, average.shape, average.device) for _, dtype in fmt.extra] if fmt is not None else []
    return [(plane.dtype, plane.shape, plane.device) for plane in planes] == wanted
