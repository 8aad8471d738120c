"""One workload, from its params to its rows: build, gate, share memory, time side by side, weigh what is allocated."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bench import gate
from bench.machine import OthersCpu
from bench.memory import allocated_peak, held_bytes, resident_growth
from bench.provider import Provider
from bench.providers import COUNTED_BYTES, providers_for
from bench.report import FLAT_LERP, OURS_EXACT, OURS_FLOAT32, Row
from bench.timing import interleave
from bench.workloads import Workload, build

# Bytes that one element of a float32 lerp_ moves: read both tensors, write one.
LERP_BYTES = 12
# From here on providers share one set of averages: eight copies of GPT-2 medium would not fit a machine it fits well.
SHARED_FROM_BYTES = 256 << 20
# Params of a workload start on a cache line, as torch's allocator has it.
ALIGNED_NUMEL = 16

Progress = Callable[[str], None]


class Arena:
    """Two flat float32 tensors: the ceiling ``one flat lerp_`` runs on them, and shared averages stand on the first."""

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
        """Give float32 averages that stand on the flat tensor, each on a storage of its own: they are not views."""
        storage, at, averages = self.average.untyped_storage(), 0, []
        for numel, shape in zip(self.numels, self.shapes, strict=True):
            piece: torch.UntypedStorage = storage[4 * at : 4 * (at + numel)]
            averages.append(torch.empty(0, device=self.average.device).set_(piece).view(shape))
            at += -(-numel // ALIGNED_NUMEL) * ALIGNED_NUMEL
        return averages


@dataclass
class _Run:
    """What is built up for one workload: rows by provider, and the providers that passed the gate."""

    row: Row  # what all rows have in common
    model: nn.Module
    arena: Arena
    device: torch.device
    rows: dict[str, Row] = field(default_factory=dict)
    passed: dict[str, Provider] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def admit(self, kind: type[Provider]) -> None:
        """Build a provider and let it through the gate, or write down why not."""
        base = replace(self.row, provider=kind.name, note=kind.note)
        for status, reason in (("not installed", kind.missing()), ("skipped", kind.refusal(self.model))):
            if reason is not None:
                self.rows[kind.name] = replace(base, status=status, reason=reason)
                return
        try:
            provider = kind(self.model)
            error, self.digests[kind.name] = gate.check(provider, self.model)
        except gate.WrongAverageError as wrong:
            self.rows[kind.name] = replace(base, status="wrong", reason=str(wrong))
            return
        # Whatever a provider raises is a finding about that provider, and the others still run.
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
            self.rows[kind.name] = replace(base, status="failed", reason=reason)
            return
        self.rows[kind.name] = replace(base, error=error, held_bytes=held_bytes(provider.held()))
        if self.arena.shares:
            provider.adopt(self.arena.averages())
        self.passed[kind.name] = provider

    def require_equal_bits(self) -> None:
        """Refuse ``exact`` unless it holds the float32 average bit for bit."""
        exact, plain = self.digests.get(OURS_EXACT), self.digests.get(OURS_FLOAT32)
        if exact and plain and exact != plain:
            reason = "bits differ from those of the float32 average"
            self.rows[OURS_EXACT] = replace(self.rows[OURS_EXACT], status="wrong", reason=reason)
            del self.passed[OURS_EXACT]

    def time(self, budget_s: float) -> None:
        contestants = {name: provider.update for name, provider in self.passed.items()}
        contestants[FLAT_LERP] = self.arena.lerp
        self.rows[FLAT_LERP] = replace(self.row, provider=FLAT_LERP, note="the ceiling: the same bytes in one tensor")
        others = OthersCpu()
        timings = interleave(contestants, budget_s, self.device)
        share = others.share()
        for name, timing in timings.items():
            calls, samples = timing.calls_per_sample, timing.samples
            self.rows[name] = replace(self.rows[name], calls_per_sample=calls, samples=samples, others_cpu=share)

    def weigh(self) -> None:
        for name, provider in self.passed.items():
            allocated, resident = allocated_peak(provider.update, self.device), resident_growth(provider.update)
            self.rows[name] = replace(self.rows[name], allocated_bytes=allocated, resident_bytes=resident)


def common_row(workload: Workload, dtype: torch.dtype, title: str, params: list[Tensor]) -> Row:
    num_params = sum(param.numel() for param in params)
    name = str(dtype).removeprefix("torch.")
    return Row(workload.name, title, name, "", num_params, len(params), num_params * COUNTED_BYTES[dtype])


def measure(
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
    memory_bytes: float,
    progress: Progress = lambda text: None,
) -> list[Row]:
    """Measure every provider on one workload and dtype, and give a row for each, those without a time included."""
    depth = workload.depth_within(memory_bytes)
    title = workload.title_at(depth)
    if depth == 0:
        reason = f"does not fit the {memory_bytes / 2**30:.1f} GiB that a run may take"
        row = common_row(workload, dtype, workload.title, [])
        return [replace(row, provider=kind.name, status="skipped", reason=reason) for kind in providers_for(dtype)]
    progress("building")
    model = build(workload, dtype, device, depth)
    params = [param.detach() for param in model.parameters()]
    row = common_row(workload, dtype, title, params)
    run = _Run(row, model, Arena(params, row.counted_bytes), device)
    for kind in providers_for(dtype):
        progress(f"gate: {kind.name}")
        run.admit(kind)
        # A provider that fell through the gate may hold a whole model in a cycle.
        gc.collect()
    run.require_equal_bits()
    progress(f"timing {len(run.passed) + 1} providers in turns")
    run.time(budget_s)
    progress("memory of an update")
    run.weigh()
    return list(run.rows.values())
