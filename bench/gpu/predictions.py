"""What an update on an H200 should take, stated before a GPU has run it, and beside it what a report measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from bench import names
from bench.gpu.model import COPY_BYTES_PER_S, CUDA, TRITON, Gpu, bytes_of, chunks_of, simulate
from bench.lookup import find, grouped
from bench.report import Report
from bench.tables import kind_text, markdown
from bench.workloads import GPU_WORKLOADS

#: Of a longer list, this many chunks are simulated. The others take the time of their bytes: with so many chunks the
#: memory is never idle. All 122,593 of Llama-3-8B take 0.04 % longer in the model, and seconds to simulate.
MOST_CHUNKS = 16_384
#: The kernel loops that are compared.
LOOPS = {"cuda": CUDA, "triton": TRITON}
#: Of the device, by another kernel.
TAKEN = 0.1


@dataclass(frozen=True)
class Prediction:
    """The seconds on the device of one update by the ``cuda`` backend, or of one draw."""

    workload: str
    dtype: str
    format: str
    # Of the bytes a second of a copy, the least and the most, where the model does not serve.
    shares: tuple[float, float] | None = None
    work: str = ""  # of names.SPREADS, where the average has a spread

    @property
    def kind(self) -> str:
        return f"{kind_text(self.dtype, self.format)}{self.work}"

    @property
    def title(self) -> str:
        return f"{GPU_WORKLOADS[self.workload].title}, {self.kind}"

    @property
    def param_bytes(self) -> int:
        return sum(bytes_of(self.dtype, self.format, self.work))

    @cached_property
    def seconds(self) -> tuple[float, float]:
        """Return the least and the most seconds: the same from the model, a range from ``shares``."""
        if self.shares is None:
            modelled = self.modelled()
            return modelled, modelled
        least, most = self.shares
        copied = GPU_WORKLOADS[self.workload].num_params * self.param_bytes / COPY_BYTES_PER_S
        return copied / most, copied / least

    def modelled(self) -> float:
        chunks = chunks_of(self.workload, self.dtype, self.format, work=self.work)
        further = sum(numel * (read + written) for numel, read, written in chunks[MOST_CHUNKS:])
        return simulate(chunks[:MOST_CHUNKS]) + further / Gpu.bytes_per_s

    def compared(self) -> list[float]:
        """Return the model's seconds of each of :data:`LOOPS`, alone and beside another kernel; none of a range, and
        none of a list so long that the loops differ by nothing.
        """
        chunks = chunks_of(self.workload, self.dtype, self.format, work=self.work)
        if self.shares is not None or len(chunks) > MOST_CHUNKS:
            return []
        return [simulate(chunks, loop, taken=taken) for taken in (0.0, TAKEN) for loop in LOOPS.values()]


#: The model leaves arithmetic out. At the rate of a copy it takes 5 % of the issue slots in fp32 and 22 % in exact, but
#: 53 % in compact and 50 % in half: so these two are ranges. Of a collect it takes 23 % in fp32 and 34 % in exact. Of a
#: draw with 20 deviations it takes 32 % and 64 %, and the columns are read four at a time: so draws are ranges.
PREDICTIONS = (
    Prediction("1e9", "float32", "float32"),
    Prediction("1e9", "bfloat16", "exact"),
    Prediction("llama3_8b", "float32", "float32"),
    Prediction("llama3_8b", "bfloat16", "exact"),
    Prediction("vit_l_16", "float32", "float32"),
    Prediction("gpt2_medium", "float32", "float32"),
    Prediction("resnet50", "float32", "float32"),
    Prediction("2000x64x64", "float32", "float32"),
    Prediction("3000x64", "float32", "float32"),
    Prediction("1e9", "bfloat16", "compact", shares=(0.80, 0.92)),
    Prediction("1e9", "bfloat16", "half", shares=(0.88, 0.95)),
    Prediction("gpt2_medium", "float32", "float32", work=names.COLLECT),
    Prediction("gpt2_medium", "bfloat16", "exact", work=names.COLLECT),
    Prediction("resnet50", "float32", "float32", work=names.COLLECT),
    Prediction("gpt2_medium", "float32", "float32", shares=(0.85, 0.95), work=names.DRAW),
    Prediction("gpt2_medium", "bfloat16", "exact", shares=(0.70, 0.90), work=names.DRAW),
)


def _range_text() -> str:
    shares = ", ".join(
        f"{each.kind if each.work else each.format} {each.shares[0]:.0%} to {each.shares[1]:.0%}"
        for each in PREDICTIONS
        if each.shares is not None
    )
    return (
        "A range is no result of the model, which leaves arithmetic out: compact and half spend half of the GPU's "
        "issue slots on it, and draws with 20 deviations a third in fp32 and two thirds in bf16. A range is an "
        f"estimated share of a copy's bytes a second: {shares}."
    )


def assumptions() -> tuple[str, ...]:
    """Return in words what the predictions assume."""
    gpu = Gpu()
    kinds = {each.kind: each.param_bytes for each in PREDICTIONS}
    return (
        f"Assumed: {gpu.multiprocessors} multiprocessors with {gpu.blocks_each} blocks each; a copy from device to "
        f"device at {COPY_BYTES_PER_S / 1e12:g} TB/s, read and written; memory that serves "
        f"{gpu.bytes_per_s / 1e12:g} TB/s once a kernel is under way; {gpu.memory_s * 1e6:g} us from a load to its "
        f"value; {gpu.begin_s * 1e6:g} us from a launch to its first load.",
        "Bytes that an update or a draw moves for each param: "
        f"{'; '.join(f'{name} {count}' for name, count in kinds.items())}. "
        "Buffers are copied byte by byte.",
        _range_text(),
    )


def model_table() -> str:
    """Return every prediction, and the model's times of each kernel loop where the loops differ."""
    lines = []
    for each in PREDICTIONS:
        copied = GPU_WORKLOADS[each.workload].num_params * each.param_bytes / COPY_BYTES_PER_S
        shares = dict.fromkeys(f"{copied / seconds:.0%}" for seconds in reversed(each.seconds))
        # The first of the compared times is the prediction itself.
        times = [f"{seconds * 1e6:.4g}" for seconds in each.compared()[1:]] or [""] * (2 * len(LOOPS) - 1)
        lines.append((each.title, predicted_text(each), " to ".join(shares), *times))
    first, *others = LOOPS
    header = ["predicted", first, "of a copy", *(f"{name}, us" for name in others)]
    header += [f"{name} beside, us" for name in LOOPS]
    what = (
        f"Device time of an update on an H200 by the {first} backend, by the others, and beside another kernel that "
        f"takes {TAKEN:.0%} of the device, from the model in bench/gpu/model.py. No figure is measured."
    )
    return markdown(" | ".join(header), lines, what, *assumptions())


def predicted_text(each: Prediction) -> str:
    low, high = each.seconds
    texts = dict.fromkeys(_in_unit(seconds, high) for seconds in (low, high))
    return f"{' to '.join(texts)} {_unit(high)}"


def _unit(seconds: float) -> str:
    return "ms" if seconds >= 1e-3 else "us"


def _in_unit(seconds: float, largest: float) -> str:
    return f"{seconds * (1e3 if _unit(largest) == 'ms' else 1e6):.3g}"


def _measured(report: Report, each: Prediction) -> float | None:
    """Return the median on the device of our first backend; nothing of a dry run, whose device is no GPU."""
    if report.dry:
        return None
    key = each.workload, each.dtype, f"{each.format}{each.work}"
    rows = next((rows for rows in grouped(report.rows) if rows[0].key == key), [])
    row = find(rows, f"{names.OURS} {names.OUR_BACKENDS['cuda'][0]}")
    return None if row is None or row.device is None else row.device.median


def predictions_table(report: Report) -> str:
    """Return measured times beside the predicted ones."""

    def lines() -> Iterator[tuple[str, ...]]:
        for each in PREDICTIONS:
            seconds, (low, high) = _measured(report, each), each.seconds
            measured, over = "not measured", ""
            if seconds is not None:
                measured = f"{_in_unit(seconds, high)} {_unit(high)}"
                over = f"{seconds / min(max(seconds, low), high):.2f}x"
            yield each.title, predicted_text(each), measured, over

    what = (
        "Predictions are of the cuda backend on an H200, from the model in bench/gpu/model.py, and no measurements. "
        "`python -m bench predict` prints what they assume."
    )
    header = "device time of an update | predicted | measured | measured/predicted"
    return markdown(header, list(lines()), what, _range_text())
