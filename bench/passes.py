"""What our own passes cost by what they move: each format beside ``float32``, several averages in one pass beside one.

The other rows compare us with others; these compare us with ourselves, by the time and by the bytes. All of a table is
one interleaved run.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench import gate
from bench.machine import OthersCpu
from bench.memory import held_bytes
from bench.providers import Ours
from bench.report import EXACT, FLOAT32, ONE, THREE, THREE_APART, TWO, Row
from bench.suite import Progress
from bench.timing import interleave
from bench.workloads import Workload, build
from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages, Rule
from swafast.terms.formats import get_format

# What a table holds at most at once, for each param: bf16 params in all their formats take 2 + 4 + 4 + 3 + 8 + 2, and
# float32 params with three and two averages 4 + 12 + 8; the rest is a gate's copy of one average.
PEAK_BYTES_PER_PARAM = 28
# Relative L2 distance of the worst tensor after the gate's three updates, where a format's is not that of its dtype:
# at most 1.3e-5 was measured of compact, 3e-3 of half and 4e-8 of compensated, which is exported in float32.
TOLERANCE = {"compact": 5e-5, "half": 1e-2, "compensated": 1e-7}
# Different ones, so that an average moved by another's rule is wrong.
RULES: dict[str, Rule] = {"mean": EqualAverage(), "fast": ExponentialAverage(0.5), "slow": ExponentialAverage(0.9)}
DEFAULT_FORMATS = {torch.float32: FLOAT32, torch.bfloat16: EXACT}


class OneFormat(Ours):
    """``FusedAveragedModel`` in one format."""

    def __init__(self, model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "format='half'", UserWarning)  # whoever runs a bench knows
            super().__init__(model)

    def each_average(self) -> Iterator[Tensor]:
        # In float32, as it is exported.
        yield from (average.float() for average in super().each_average())


class InFloat32(OneFormat):
    name = format = FLOAT32


class InExact(OneFormat):
    name = format = EXACT


class InCompact(OneFormat):
    name = format = "compact"


class InCompensated(OneFormat):
    name = format = "compensated"


class InHalf(OneFormat):
    name = format = "half"


FORMATS: dict[torch.dtype, tuple[type[OneFormat], ...]] = {
    torch.float32: (InFloat32, InCompensated, InCompact),
    torch.bfloat16: (InFloat32, InExact, InCompact, InCompensated, InHalf),
}


def _planes(averaged: FusedAveragedModel, model: nn.Module) -> list[Tensor]:
    """Give all planes of the averages of params; buffers are copied and left out."""
    names = {name for name, _ in model.named_parameters()}
    # A key is the name of a plane, a dot, and the param's name.
    return [value for key, value in averaged.state_dict().items() if key.partition(".")[2] in names]


class Together(Ours):
    """Several averages by name, moved in one pass."""

    copies_buffers = False  # of each of them: the gate of one average sees to that
    count: ClassVar[int]

    def __init__(self, model: nn.Module, averages: FusedAverages | None = None) -> None:
        self.model = model
        rules = dict(list(RULES.items())[: self.count])
        self.fused = FusedAverages(model, rules=rules) if averages is None else averages

    def update(self) -> None:
        self.fused.update_parameters(self.model)

    def held(self) -> Iterable[Tensor]:
        return [plane for averaged in self.moved().values() for plane in _planes(averaged, self.model)]

    def moved(self) -> dict[str, FusedAveragedModel]:
        """Give the averages that an update moves, by name: the first ``count``."""
        return dict(self.fused.items()[: self.count])


class TwoTogether(Together):
    name = TWO
    count = 2


class ThreeTogether(Together):
    name = THREE
    count = 3


class ThreeApart(Together):
    """The same three averages where they lie, each by a pass of its own: as three averaged models would."""

    name = THREE_APART
    count = 3

    def update(self) -> None:
        for averaged in self.fused.values():
            averaged.update_parameters(self.model)


class One(Together):
    """The first of them, by itself."""

    name = ONE
    count = 1

    def update(self) -> None:
        self.fused["mean"].update_parameters(self.model)


def moved_bytes(dtype: torch.dtype, format: str, averages: int = 1, passes: int = 1) -> int:
    """Give the bytes an update moves for each element: the param read once a pass, every plane read and written."""
    nbytes = get_format(format).nbytes
    assert nbytes is not None
    return passes * dtype.itemsize + averages * 2 * nbytes


def _gate_format(provider: OneFormat, model: nn.Module) -> float:
    factor = gate.run_updates(provider, model)
    error, name, tolerance = gate.worst_error(provider.each_average(), model, factor)
    return gate.require(error, name, TOLERANCE.get(provider.format, tolerance))


def _run_anew(provider: Together, model: nn.Module) -> dict[str, FusedAveragedModel]:
    """Run the gate's updates from the start, and give the averages that ``provider`` moves."""
    averages = provider.moved()
    for averaged in averages.values():
        averaged.n_averaged.zero_()
        for param in averaged.module.parameters():
            # What is not moved would keep the bits of an earlier gate.
            param.detach().fill_(float("nan"))
    gate.run_updates(provider, model)
    return averages


def _gate_several(provider: Together, model: nn.Module) -> float:
    """Hold each of several averages to its own rule, in float64."""
    worst = 0.0
    for name, averaged in _run_anew(provider, model).items():
        state = averaged.averaged_state_dict()
        each = (state[param] for param, _ in model.named_parameters())
        error, where, tolerance = gate.worst_error(each, model, gate.factor_of(RULES[name].weight))
        worst = max(worst, gate.require(error, f"{name}.{where}", tolerance))
    return worst


def _bits(averaged: FusedAveragedModel, model: nn.Module) -> list[int]:
    """Give the sum of each plane's bits, which takes a hundredth of the time of a comparison in float64."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    return [int(plane.view(words[plane.itemsize]).sum(dtype=torch.int64)) for plane in _planes(averaged, model)]


def _gate_alike(provider: Together, model: nn.Module, expected: Mapping[str, list[int]]) -> None:
    """Hold averages to the bits that they had when they were moved with others, and were right."""
    for name, averaged in _run_anew(provider, model).items():
        if _bits(averaged, model) != expected[name]:
            raise gate.WrongAverageError(f"bits of {name} differ from those of {THREE}")


Measure = Callable[[Workload, torch.dtype, torch.device, float, float, Progress], list[Row]]
Admitted = Iterator[tuple[Row, Callable[[], None]]]


def measure_formats(
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
    memory_bytes: float,
    progress: Progress = lambda text: None,
) -> list[Row]:
    """Time an update in each format that params of ``dtype`` are averaged in, ``float32`` first."""

    def admitted(model: nn.Module, row: Row) -> Admitted:
        for kind in FORMATS[dtype]:
            progress(f"gate: {kind.name}")
            provider = kind(model)
            counted = row.num_params * moved_bytes(dtype, kind.format)
            base = replace(row, provider=kind.name, counted_bytes=counted)
            yield _gated(base, provider, partial(_gate_format, provider, model)), provider.update

    return _measure(workload, dtype, device, budget_s, memory_bytes, progress, admitted)


def measure_several(
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
    memory_bytes: float,
    progress: Progress = lambda text: None,
) -> list[Row]:
    """Time one, two and three averages in one pass, and three in a pass each."""
    format = DEFAULT_FORMATS[dtype]

    def admitted(model: nn.Module, row: Row) -> Admitted:
        three = ThreeTogether(model)
        progress(f"gate: {three.name}")
        checked = _gated(row, three, partial(_gate_several, three, model))
        expected = {name: _bits(averaged, model) for name, averaged in three.fused.items()}

        def check(provider: Together) -> float:
            if checked.error is None:
                raise gate.WrongAverageError(checked.reason)
            if provider is not three:
                _gate_alike(provider, model, expected)
            return checked.error

        for provider in (One(model, three.fused), TwoTogether(model), three, ThreeApart(model, three.fused)):
            progress(f"gate: {provider.name}")
            passes = provider.count if isinstance(provider, ThreeApart) else 1
            counted = row.num_params * moved_bytes(dtype, format, provider.count, passes)
            base = replace(row, provider=provider.name, counted_bytes=counted, note=format)
            yield _gated(base, provider, partial(check, provider)), provider.update

    return _measure(workload, dtype, device, budget_s, memory_bytes, progress, admitted)


def _gated(base: Row, provider: Ours, check: Callable[[], float]) -> Row:
    try:
        error = check()
    except gate.WrongAverageError as wrong:
        return replace(base, status="wrong", reason=str(wrong))
    return replace(base, error=error, held_bytes=held_bytes(provider.held()))


def _measure(
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
    memory_bytes: float,
    progress: Progress,
    admitted: Callable[[nn.Module, Row], Admitted],
) -> list[Row]:
    depth = workload.depth_within(memory_bytes, PEAK_BYTES_PER_PARAM)
    name = str(dtype).removeprefix("torch.")
    if depth == 0:
        reason = f"does not fit the {memory_bytes / 2**30:.1f} GiB that a run may take"
        return [Row(workload.name, workload.title, name, "", 0, 0, 0, status="skipped", reason=reason)]
    progress("building")
    model = build(workload, dtype, device, depth)
    numels = [param.numel() for param in model.parameters()]
    row = Row(workload.name, workload.title_at(depth), name, "", sum(numels), len(numels), 0)
    rows, contestants = {}, {}
    for gated, update in admitted(model, row):
        rows[gated.provider] = gated
        if not gated.wrong:
            contestants[gated.provider] = update
        gc.collect()
    progress(f"timing {len(contestants)} passes in turns")
    return _timed(rows, contestants, budget_s, device)


def _timed(
    rows: Mapping[str, Row], contestants: Mapping[str, Callable[[], None]], budget_s: float, device: torch.device
) -> list[Row]:
    others = OthersCpu()
    timings = interleave(contestants, budget_s, device) if contestants else {}
    share = others.share()
    return [
        replace(row, calls_per_sample=timings[name].calls_per_sample, samples=timings[name].samples, others_cpu=share)
        if name in timings
        else row
        for name, row in rows.items()
    ]
