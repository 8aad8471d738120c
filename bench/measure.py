"""One case, from its params to its rows: build, gate, time, and on a GPU look closer.

On a CPU all providers of a case are timed in the same rounds, beside one flat ``lerp_``; where memory is short they
share one set of averages. In a GPU run one provider at a time is in memory, beside the copies from device to device
that are its ceiling: Llama-3-8B with its averages takes half of an H200.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from bench import device as closer
from bench import gate, names
from bench.machine import OthersCpu, available_bytes
from bench.providers import DEFAULT_FORMATS, Made, Provider, moved_bytes
from bench.report import Row, count_text
from bench.timing import COVER, Clock, Rotation, interleave, rotation_size, synchronize
from bench.workloads import Workload, build

# Bytes that one element of a float32 lerp_ moves: read both tensors, write one.
LERP_BYTES = 12
# From here on providers share one set of averages: eight copies of GPT-2 medium would not fit a machine it fits well.
SHARED_FROM_BYTES = 256 << 20
# A run on a CPU leaves the rest of the memory to whatever else the machine is doing.
MEMORY_SHARE = 0.6
# What a case takes beside its models and averages. On a GPU: float64 pieces of the gate, one decoded tensor, torch's
# own. On a CPU: torch's class has up to three temporaries of the largest tensor.
BESIDE_BYTES, BESIDE_BYTES_ON_CPU = 10 << 30, 1 << 30
# Copied for a moment while a format is made from a model.
MADE_BYTES_PER_PARAM = 1
# Copies start on a multiple of this, and so many of them fill any cache.
ALIGNED_BYTES, MAX_COPIES = 512, 1024
# Of the two buffers of the large copy together.
BIG_COPY_BYTES, DRY_BIG_COPY_BYTES = 8_000_000_000, 8_000_000
# A provider is begun only with this much time left, a compiled one with this much more for each tensor.
LEAST_S, COMPILE_S, COMPILE_S_PER_TENSOR = 3.0, 15.0, 0.1


@dataclass(frozen=True)
class Case:
    """One workload with params of one dtype, and who averages it."""

    workload: Workload
    dtype: torch.dtype
    providers: Sequence[Provider]
    held_bytes: int  # for each param, by all that is in memory at once
    group: str = names.UPDATES
    format: str = ""  # of all averages, where it is one
    averages: int = 1


@dataclass(frozen=True)
class Setting:
    """Where and how long to measure, and what is told of every row and step."""

    device: torch.device
    budget_s: float
    emit: Callable[[Row], object]
    progress: Callable[[str], object] = lambda step: None
    l2_bytes: int = 0  # of a GPU run, or a dry one: one provider at a time, beside copies from device to device
    end: float = float("inf")  # on the clock of time.monotonic
    profile: bool = False  # count launches, instead of taking times

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left_s(self) -> float:
        return self.end - time.monotonic()


# A provider that passed the gate: its row, and its update of each copy of the model.
Contestant = tuple[Row, Rotation]


class Bench:
    """Measures one case after another. In a GPU run it holds the two buffers that are copied."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self._bits = setting, dict[str, tuple[str, str]]()
        if setting.l2_bytes:
            nbytes = (BIG_COPY_BYTES if setting.on_gpu else DRY_BIG_COPY_BYTES) // 2
            self._source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=setting.device)
            self._target = torch.empty_like(self._source)
        if setting.profile:
            # The first use starts the profiler's own machinery, and may miss what it is meant to see.
            closer.activity(self._copies(ALIGNED_BYTES)[0].step, setting.device)

    def run(self, case: Case) -> None:
        """Emit a row for each provider, also for those without a time."""
        setting, workload, dtype = self.setting, case.workload, str(case.dtype).removeprefix("torch.")
        base = Row(workload.name, workload.title, dtype, "", 0, 0, 0, case.group, case.format, case.averages)
        memory = available_bytes(setting.device) * (1 if setting.l2_bytes else MEMORY_SHARE)
        beside = BESIDE_BYTES if setting.on_gpu else BESIDE_BYTES_ON_CPU
        depth = workload.depth_within(memory, case.held_bytes + MADE_BYTES_PER_PARAM, beside)
        reason = f"does not fit the {memory / 2**30:.0f} GiB that are free" if depth == 0 else ""
        if setting.left_s() < LEAST_S:
            reason = "the time was up"
        if reason:
            for provider in case.providers:
                setting.emit(replace(base, provider=provider.name, status="skipped", reason=reason))
            return
        models = [build(workload, case.dtype, setting.device, depth)]
        numels = [param.numel() for param in models[0].parameters()]
        copies, filler = 1, 0
        if setting.l2_bytes and setting.profile:
            filler = COVER * setting.l2_bytes
        elif setting.l2_bytes:
            copies, filler = rotation_size(sum(numels) * case.held_bytes, setting.l2_bytes)
        models += [build(workload, case.dtype, setting.device, depth) for _ in range(copies - 1)]
        base = replace(base, title=workload.title_at(depth), num_params=sum(numels), num_tensors=len(numels))
        base = replace(base, copies=copies, filler_bytes=filler)
        clock = Clock(setting.device, apart=bool(setting.l2_bytes), filler_bytes=filler)
        self._bits = {}
        batches = [[provider] for provider in case.providers] if setting.l2_bytes else [case.providers]
        for batch in batches:
            rows = [self._row(provider, base, case.dtype) for provider in batch]
            with findings(rows[0], setting.emit):
                self._measure(batch, rows, base, models, clock, case)
            closer.free_memory(setting.device)
            # A device that a kernel has broken raises here, and ends this process: nothing after it would be true.
            synchronize(setting.device)

    def _row(self, provider: Provider, base: Row, dtype: torch.dtype) -> Row:
        counted = base.num_params * provider.counted_bytes(dtype)
        return replace(
            base, provider=provider.name, note=provider.note, counted_bytes=counted,
            format=base.format or provider.format, averages=provider.averages,
        )  # fmt: skip

    def _measure(
        self,
        batch: Sequence[Provider],
        rows: Sequence[Row],
        base: Row,
        models: list[nn.Module],
        clock: Clock,
        case: Case,
    ) -> None:
        """Let a batch through the gate, and time those that passed in the same rounds."""
        shared = self._shared(models[0])
        passed = [
            contestant
            for provider, row in zip(batch, rows, strict=True)
            if (contestant := self._admit(provider, row, models, shared)) is not None
        ]
        if self.setting.profile:
            for row, rotation in passed:
                self.setting.emit(self._profiled(row, rotation, clock))
            return
        both = [*self._ceilings(base, case, rows[0]), *passed]
        if not passed:
            return
        self.setting.progress(f"{base.title}, {base.dtype} {base.group}: timing {len(both)} in turns")
        others = OthersCpu()
        taken = interleave({row.provider: rotation for row, rotation in both}, self.setting.budget_s, clock)
        share = others.share()
        for row, _ in both:
            self.setting.emit(replace(taken[row.provider].into(row), others_cpu=share))
        for row, rotation in passed if self.setting.on_gpu else ():
            # Times were first: a closer look may break the device.
            self.setting.emit(self._look_closer(taken[row.provider].into(row), rotation, clock))

    # The gate

    def _admit(self, provider: Provider, row: Row, models: list[nn.Module], shared: list[Tensor]) -> Contestant | None:
        """Build a provider and let it through the gate, or write down why not."""
        # The last line of a process that ends early names its provider.
        self.setting.progress(f"{row.title}, {row.dtype} {row.group}, {provider.name}")
        for status, reason in (("not installed", provider.missing()), ("skipped", self._refusal(provider, row))):
            if reason is not None:
                self.setting.emit(replace(row, status=status, reason=reason))
                return None
        with findings(row, self.setting.emit):
            made = [provider.make(model) for model in models]
            if self.setting.profile:
                return row, timed(made)
            error, digests = gate.check(provider, made[0], models[0])
            for rule, digest in digests.items():
                first, expected = self._bits.setdefault(rule, (provider.name, digest))
                if digest != expected:
                    raise gate.WrongAverageError(f"bits of {rule} differ from those of {first}")
            held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in made[0].kept}
            for kept, other in zip(made[0].kept, () if provider.format else shared, strict=False):
                if kept.dtype == other.dtype:
                    kept.data = other
            row = replace(row, error=error, held_bytes=sum(held.values()))
            return row, timed(made)
        return None

    def _refusal(self, provider: Provider, row: Row) -> str | None:
        """Return why this provider is left out for this case, or None."""
        compiles, limit, needs = provider.name == names.COMPILED, provider.max_tensors, LEAST_S
        if limit is not None and row.num_tensors > limit:
            needed = f"compiling {count_text(row.num_tensors, 'tensor')} takes about {0.07 * row.num_tensors:.0f} s"
            return f"{needed}; the limit is {limit}"
        if compiles and self.setting.on_gpu:
            needs = COMPILE_S + COMPILE_S_PER_TENSOR * row.num_tensors
        left = self.setting.left_s()
        return None if left >= needs else f"{left:.0f} s were left, it may take {needs:.0f}"

    def _shared(self, model: nn.Module) -> list[Tensor]:
        """Return the averages that others than ours share on a CPU if each one's own would not fit."""
        params = [param.detach() for param in model.parameters()]
        if self.setting.l2_bytes or 4 * sum(param.numel() for param in params) < SHARED_FROM_BYTES:
            return []
        return [torch.full_like(param, 0.5, dtype=torch.float32) for param in params]

    # Ceilings

    def _ceilings(self, base: Row, case: Case, first: Row) -> list[tuple[Row, Rotation]]:
        """Return what no update can beat: one lerp_ in one tensor, or copies from device to device."""
        if self.setting.l2_bytes:
            rotation, nbytes = self._copies(first.counted_bytes)
            blank = replace(first, provider=names.COPY, note="", counted_bytes=nbytes, copies=len(rotation.calls))
            return [(blank, rotation)]
        if case.group != names.UPDATES:
            return []
        counted = base.num_params * moved_bytes(case.dtype, DEFAULT_FORMATS[case.dtype])
        average, param = (torch.full((counted // LERP_BYTES,), value) for value in (0.5, 0.25))
        row = replace(base, provider=names.FLAT_LERP, counted_bytes=counted, note="as many bytes in one tensor")
        return [(row, Rotation(lambda: average.lerp_(param, 0.01)))]

    def _copies(self, counted_bytes: int) -> tuple[Rotation, int]:
        """Return copies that move ``counted_bytes`` each, read and written, and the bytes that they do move."""
        whole = self._source.numel()
        nbytes = min(counted_bytes // 2, whole)
        step = -(-nbytes // ALIGNED_BYTES) * ALIGNED_BYTES
        wanted = -(-COVER * self.setting.l2_bytes // (2 * nbytes))
        count = max(1, min(wanted, MAX_COPIES, (whole - nbytes) // step + 1))
        pieces = [slice(at * step, at * step + nbytes) for at in range(count)]
        return Rotation(*(partial(self._target[at].copy_, self._source[at]) for at in pieces)), 2 * nbytes

    # What only a GPU has

    def _look_closer(self, row: Row, rotation: Rotation, clock: Clock) -> Row:
        """Look for allocations and waiting. A failure is a remark, and the times stay."""
        assert row.host is not None
        try:
            allocated = closer.allocated_total(rotation.step, self.setting.device)
            return replace(row, allocated_bytes=allocated, waits=closer.waits(clock, rotation.step, row.host.median))
        except Exception as error:
            return replace(row, remarks=[f"waiting: {type(error).__name__}: {first_line(error)}"])

    def _profiled(self, row: Row, rotation: Rotation, clock: Clock) -> Row:
        """Have the profiler look at one update in cold caches."""
        for _ in range(2):  # the first update copies and plans, the second is like all others
            rotation.step()
        clock.evict()
        seen = closer.activity(rotation.step, self.setting.device)
        remarks = [] if seen else ["profiler: it recorded nothing of the device"]
        return replace(row, remarks=remarks, **seen)  # type: ignore[arg-type]


def timed(made: Sequence[Made]) -> Rotation:
    """Return the updates of these averages, or draws: the average of each has two models then, as a draw needs."""
    for each in made:
        if each.draw is not None:
            each.update()
            each.update()
    return Rotation(*(each.draw or each.update for each in made))


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
