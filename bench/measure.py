"""One workload, from its params to its rows: build, gate, time side by side, weigh what is allocated.

All providers of a workload are timed in the same rounds, and where memory is short they share one set of averages.
``gpu_bench`` does the same on a GPU, where one provider is in memory at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bench import gate, names
from bench.machine import OthersCpu
from bench.profiling import allocated_peak, held_bytes, resident_growth
from bench.providers import (
    DEFAULT_FORMATS,
    FORMAT_PROVIDERS,
    Provider,
    dtype_name,
    moved_bytes,
    providers_for,
    several_providers,
)
from bench.report import Row
from bench.timing import Clock, Rotation, interleave
from bench.workloads import PEAK_BYTES_PER_PARAM, Workload, build

Progress = Callable[[str], None]

# Bytes that one element of a float32 lerp_ moves: read both tensors, write one.
LERP_BYTES = 12
# From here on providers share one set of averages: eight copies of GPT-2 medium would not fit a machine it fits well.
SHARED_FROM_BYTES = 256 << 20
# Params of a workload start on a cache line, as torch's allocator has it.
ALIGNED_NUMEL = 16
# What our own passes hold at most at once, for each param: bf16 params in all their formats take 2 + 4 + 4 + 3 + 8 + 2,
# and float32 params with three and two averages 4 + 12 + 8; the rest is a gate's copy of one average.
PASSES_PEAK_BYTES_PER_PARAM = 28


class Arena:
    """Two flat float32 tensors: the ceiling ``one flat lerp_`` runs on them, and shared averages lie in the first."""

    def __init__(self, params: Sequence[Tensor], counted_bytes: int) -> None:
        self.numels = [param.numel() for param in params]
        self.shapes = [param.shape for param in params]
        self.lerp_numel = counted_bytes // LERP_BYTES
        self.shares = 4 * sum(self.numels) >= SHARED_FROM_BYTES
        padded = sum(-(-numel // ALIGNED_NUMEL) * ALIGNED_NUMEL for numel in self.numels)
        numel = max(self.lerp_numel, padded) if self.shares else self.lerp_numel
        self.average = torch.full((numel,), 0.5, device=params[0].device)
        self.param = torch.full((self.lerp_numel,), 0.25, device=params[0].device)

    def lerp(self) -> None:
        self.average[: self.lerp_numel].lerp_(self.param, 0.01)

    def averages(self) -> list[Tensor]:
        """Return float32 averages that lie in the flat tensor, each on a storage of its own: they are not views."""
        storage, at, averages = self.average.untyped_storage(), 0, []
        for numel, shape in zip(self.numels, self.shapes, strict=True):
            piece: torch.UntypedStorage = storage[4 * at : 4 * (at + numel)]
            averages.append(torch.empty(0, device=self.average.device).set_(piece).view(shape))
            at += -(-numel // ALIGNED_NUMEL) * ALIGNED_NUMEL
        return averages


def row_of(workload: Workload, dtype: torch.dtype, kind: type[Provider] | None, base: Row | None = None) -> Row:
    """Return an empty row for ``kind``, or for what all providers of a workload have in common."""
    base = base or Row(workload.name, workload.title, dtype_name(dtype), "", 0, 0, 0)
    if kind is None:
        return base
    counted = base.num_params * kind.counted_bytes(dtype)
    return replace(
        base, provider=kind.name, note=kind.note, counted_bytes=counted, format=kind.format, averages=kind.averages
    )  # fmt: skip


def refused(kind: type[Provider], model: nn.Module, row: Row, *reasons: str | None) -> Row | None:
    """Return the row of a provider that is not tried, or None."""
    for status, reason in (
        ("not installed", kind.missing()), *(("skipped", reason) for reason in (kind.refusal(model), *reasons))
    ):  # fmt: skip
        if reason is not None:
            return replace(row, status=status, reason=reason)
    return None


@contextmanager
def findings(row: Row, emit: Callable[[Row], object]) -> Iterator[None]:
    """Emit whatever a provider raises as its row: the others still run."""
    try:
        yield
    except gate.WrongAverageError as wrong:
        emit(replace(row, status="wrong", reason=str(wrong)))
    except torch.OutOfMemoryError as error:
        emit(replace(row, status="skipped", reason=f"out of memory: {first_line(error)}"))
    except Exception as failure:
        emit(replace(row, status="failed", reason=f"{type(failure).__name__}: {first_line(failure)}"))


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


# On a CPU: all providers of a workload side by side


@dataclass
class _Side:
    """The state of one workload: rows by provider, and the providers that passed the gate."""

    base: Row
    dtype: torch.dtype
    workload: Workload
    model: nn.Module
    rows: dict[str, Row] = field(default_factory=dict)
    passed: dict[str, Provider] = field(default_factory=dict)
    bits: dict[str, tuple[str, str]] = field(default_factory=dict)  # by rule: who was first, and a hash

    def put(self, row: Row) -> None:
        self.rows[row.provider] = row

    def admit(self, kind: type[Provider], arena: Arena | None) -> None:
        """Build a provider and let it through the gate, or write down why not."""
        row = row_of(self.workload, self.dtype, kind, self.base)
        not_tried = refused(kind, self.model, row)
        if not_tried is not None:
            self.put(not_tried)
            return
        with findings(row, self.put):
            provider = kind.beside(self.model, self.passed)
            error, digests = gate.check(provider, self.model)
            self.put(replace(row, error=error, held_bytes=held_bytes(provider.held())))
            self._require_equal_bits(kind.name, digests)
            if arena is not None and arena.shares:
                provider.adopt(arena.averages())
            self.passed[kind.name] = provider

    def _require_equal_bits(self, name: str, digests: Mapping[str, str]) -> None:
        """Refuse averages that must equal the float32 one bit for bit and do not."""
        for rule, digest in digests.items():
            first, expected = self.bits.setdefault(rule, (name, digest))
            if digest != expected:
                raise gate.WrongAverageError(f"bits of {rule} differ from those of {first}")

    def time(self, contestants: Mapping[str, Callable[[], None]], budget_s: float, device: torch.device) -> None:
        if not contestants:
            return
        others = OthersCpu()
        taken = interleave({name: Rotation(call) for name, call in contestants.items()}, budget_s, Clock(device))
        share = others.share()
        for name, each in taken.items():
            self.put(replace(each.into(self.rows[name]), others_cpu=share))


def measure(
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
    memory_bytes: float,
    progress: Progress = lambda text: None,
) -> list[Row]:
    """Measure every provider on one workload and dtype. Return a row for each, also for those without a time."""
    kinds = providers_for(dtype)
    side = _side(workload, dtype, device, memory_bytes, PEAK_BYTES_PER_PARAM, kinds, progress)
    if not isinstance(side, _Side):
        return side
    counted = side.base.num_params * moved_bytes(dtype, DEFAULT_FORMATS[dtype])
    arena = Arena([param.detach() for param in side.model.parameters()], counted)
    for kind in kinds:
        progress(f"gate: {kind.name}")
        side.admit(kind, arena)
        # A provider that fell through the gate may hold a whole model in a cycle.
        gc.collect()
    flat = replace(side.base, provider=names.FLAT_LERP, counted_bytes=counted)
    side.put(replace(flat, note="the ceiling: the same bytes in one tensor"))
    progress(f"timing {len(side.passed) + 1} providers in turns")
    updates = {name: provider.update for name, provider in side.passed.items()}
    side.time({**updates, names.FLAT_LERP: arena.lerp}, budget_s, device)
    progress("memory of an update")
    for name, update in updates.items():
        allocated, resident = allocated_peak(update, device), resident_growth(update)
        side.put(replace(side.rows[name], allocated_bytes=allocated, resident_bytes=resident))
    return list(side.rows.values())


def measure_passes(
    group: str,
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
    memory_bytes: float,
    progress: Progress = lambda text: None,
) -> list[Row]:
    """Measure our own passes beside each other: our formats, or several averages."""
    kinds = providers_for(dtype, FORMAT_PROVIDERS) if group == names.FORMATS else several_providers(dtype)
    side = _side(workload, dtype, device, memory_bytes, PASSES_PEAK_BYTES_PER_PARAM, kinds[:1], progress, group)
    if not isinstance(side, _Side):
        return side
    for kind in kinds:
        progress(f"gate: {kind.name}")
        side.admit(kind, None)
        gc.collect()
    progress(f"timing {len(side.passed)} passes in turns")
    side.time({name: provider.update for name, provider in side.passed.items()}, budget_s, device)
    order = (names.ONE, names.TWO, names.THREE, names.THREE_APART) if group == names.SEVERAL else tuple(side.rows)
    return [side.rows[name] for name in order]


def _side(
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
    memory_bytes: float,
    per_param: float,
    kinds: Iterable[type[Provider]],
    progress: Progress,
    group: str = "updates",
) -> _Side | list[Row]:
    """Build the model, or return rows that say why it does not fit."""
    depth = workload.depth_within(memory_bytes, per_param)
    base = replace(row_of(workload, dtype, None), group=group)
    if depth == 0:
        reason = f"does not fit the {memory_bytes / 2**30:.1f} GiB that a run may take"
        return [replace(row_of(workload, dtype, kind, base), status="skipped", reason=reason) for kind in kinds]
    progress("building")
    model = build(workload, dtype, device, depth)
    numels = [param.numel() for param in model.parameters()]
    base = replace(base, title=workload.title_at(depth), num_params=sum(numels), num_tensors=len(numels))
    return _Side(base, dtype, workload, model)
