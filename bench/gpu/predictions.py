"""What an update on an H200 should take, stated before a GPU has run it, and beside it what a report measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench import names
from bench.gpu.model import CUDA, DEALT, TRITON, chunks_of, simulate
from bench.lookup import find, grouped
from bench.report import Report
from bench.tables import kind_text, markdown
from bench.workloads import GPU_WORKLOADS


@dataclass(frozen=True)
class Prediction:
    """The seconds on the device of one update by the ``cuda`` backend."""

    workload: str
    dtype: str
    format: str
    low: float
    high: float

    @classmethod
    def of(cls, workload: str, dtype: str, format: str, low: float, high: float | None = None) -> Prediction:
        return cls(workload, dtype, format, low, low if high is None else high)


#: ``python -m bench predict`` computes those of the model again. Formats that are rounded at random are a range, since
#: arithmetic takes more than half of the issue slots there.
PREDICTIONS = (
    Prediction.of("1e9", "float32", "float32", 2.76e-3),
    Prediction.of("1e9", "bfloat16", "exact", 2.31e-3),
    Prediction.of("llama3_8b", "float32", "float32", 22.4e-3),
    Prediction.of("llama3_8b", "bfloat16", "exact", 18.7e-3),
    Prediction.of("vit_l_16", "float32", "float32", 845e-6),
    Prediction.of("gpt2_medium", "float32", "float32", 984e-6),
    Prediction.of("resnet50", "float32", "float32", 75.9e-6),
    Prediction.of("2000x64x64", "float32", "float32", 28.0e-6),
    Prediction.of("3000x64", "float32", "float32", 10.7e-6),
    Prediction.of("1e9", "bfloat16", "compact", 2.02e-3, 2.33e-3),
    Prediction.of("1e9", "bfloat16", "half", 1.47e-3, 1.59e-3),
)


#: The loops that the model compares, and the workloads that it takes through all of them.
LOOPS = {"before": DEALT, "triton": TRITON, "cuda": CUDA}
MODELLED = ("3000x64", "2000x64x64", "resnet50", "vit_l_16", "gpt2_medium")
#: Of the device, by another kernel.
TAKEN = 0.1


def model_table() -> str:
    """Return the model's times for each kernel loop: alone on the device, and beside another kernel."""
    lines = []
    for workload in MODELLED:
        chunks = chunks_of(workload)
        times = [simulate(chunks, 8, 4, loop, taken=taken) for taken in (0.0, TAKEN) for loop in LOOPS.values()]
        lines.append((f"{GPU_WORKLOADS[workload].title}, fp32", *(f"{seconds * 1e6:.4g}" for seconds in times)))
    header = ["predicted us of", *LOOPS, *(f"{name}, beside" for name in LOOPS)]
    what = (
        "before: two loads for each chunk, dealt out. triton: one load. cuda: prefetched, and chunks are claimed. "
        f"beside: another kernel takes {TAKEN:.0%} of the device. No figure is measured."
    )
    return markdown(" | ".join(header), lines, what)


def predicted_text(each: Prediction) -> str:
    low, high = (f"{_unit(seconds, each.high)}" for seconds in (each.low, each.high))
    return f"{low if each.low == each.high else f'{low} to {high}'} {'ms' if each.high >= 1e-3 else 'us'}"


def _unit(seconds: float, largest: float) -> str:
    return f"{seconds * (1e3 if largest >= 1e-3 else 1e6):.3g}"


def _measured(report: Report, each: Prediction) -> float | None:
    """Return the median on the device of our first backend; nothing of a dry run, whose device is no GPU."""
    if report.dry:
        return None
    key = each.workload, each.dtype, each.format
    rows = next((rows for rows in grouped(report.rows) if rows[0].key == key), [])
    row = find(rows, f"{names.OURS} {names.OUR_BACKENDS['cuda'][0]}")
    return None if row is None or row.device is None else row.device.median


def predictions_table(report: Report) -> str:
    """Return measured times beside the predicted ones."""

    def lines() -> Iterator[tuple[str, ...]]:
        for each in PREDICTIONS:
            seconds = _measured(report, each)
            measured, over = "not measured", ""
            if seconds is not None:
                measured = f"{_unit(seconds, each.high)} {'ms' if each.high >= 1e-3 else 'us'}"
                over = f"{seconds / min(max(seconds, each.low), each.high):.2f}x"
            title = f"{GPU_WORKLOADS[each.workload].title}, {kind_text(each.dtype, each.format)}"
            yield title, predicted_text(each), measured, over

    what = "Of the cuda backend on an H200. Predictions come from bench/gpu/model.py; they are not measurements."
    return markdown("device time of an update | predicted | measured | measured/predicted", list(lines()), what)
