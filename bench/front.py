"""The picture of the front page: what an update gains in speed and precision, and what an average costs in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import names
from bench.accuracy import TORCH_BF16
from bench.lookup import baseline, grouped, our_row
from bench.plot import BAR_COLORS, FAINT, INK, NARROW_IN, OURS_COLOR, dress
from bench.report import Report

WIDTH_IN = 8.0
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
STREAM, RULE = "drifting", "EMA 0.999"
# Of the axes of errors, which are drawn as powers of ten above it.
LEAST = 1e-9
Boxes = Sequence[tuple[float, float, float, float]]
WIDE: Boxes = ((0.155, 0.17, 0.25, 0.66), (0.535, 0.36, 0.165, 0.47), (0.845, 0.36, 0.1, 0.47))
NARROW: Boxes = ((0.34, 0.53, 0.56, 0.4), (0.34, 0.27, 0.5, 0.13), (0.34, 0.06, 0.5, 0.13))


def speedups(report: Report) -> dict[str, dict[str, float]]:
    """Return for each workload and dtype how many times as fast as torch's best way an update is."""
    found: dict[str, dict[str, float]] = {}
    for rows in grouped(report.of_group(names.UPDATES)):
        best, ours = baseline(rows), our_row(rows)
        if best is not None and ours is not None:
            name = "\n".join(ours.title.split(", ")[:2])
            found.setdefault(name, {})[ours.dtype] = best.seconds / ours.seconds
    return found


def last_errors(report: Report) -> dict[str, float]:
    """Return the error after all updates, of torch's class and of swafast, with a bfloat16 model."""
    by_kind = {(curve.stream, curve.rule, curve.format): curve.errors[-1] for curve in report.curves}
    return {"torch's class": by_kind[STREAM, RULE, TORCH_BF16], "swafast": by_kind[STREAM, RULE, "float32"]}


def front_figure(
    speed: Mapping[str, Mapping[str, float]],
    errors: Mapping[str, float],
    updates: int,
    gigabytes: Mapping[str, float],
    *,
    is_narrow: bool = False,
) -> Figure:
    """Draw three panels: speed, error, memory."""
    size, boxes = ((NARROW_IN, 5.6), NARROW) if is_narrow else ((WIDTH_IN, 2.9), WIDE)
    figure = Figure(figsize=size, facecolor="white")
    first, second, third = (figure.add_axes(box) for box in boxes)
    _draw_speed(first, speed)
    logs = {name: value / LEAST for name, value in errors.items()}
    texts = [f"{value:.0e}".replace("e-0", "e-") for value in errors.values()]
    _draw_pair(second, f"Error of an EMA in bf16,\n{updates:,} updates", logs, texts, scale="log")
    texts = [f"{value:.1f} GB" for value in gigabytes.values()]
    _draw_pair(third, "Memory of Llama-3-8B's\naverage on 1 of 8 ranks", gigabytes, texts)
    return figure


def _draw_speed(axes: Axes, speed: Mapping[str, Mapping[str, float]]) -> None:
    """Draw two bars for each workload."""
    height = 0.36
    most = max(ratio for ratios in speed.values() for ratio in ratios.values())
    for line, (dtype, label) in enumerate(DTYPES.items()):
        places = [-row + height * (0.5 - line) for row in range(len(speed))]
        ratios = [each.get(dtype, 0.0) for each in speed.values()]
        axes.barh(places, ratios, height=height, color=BAR_COLORS[line], label=label)
        for place, ratio in zip(places, ratios, strict=True):
            axes.text(ratio + 0.02 * most, place, f"{ratio:.1f}x", va="center", fontsize=7.5, color=INK)
    axes.set_yticks([-row for row in range(len(speed))], list(speed))
    axes.set(xlim=(0, most * 1.05), ylim=(-len(speed) + 0.4, 0.6))
    dress(axes, "One update: times the speed of\ntorch's best way, on a CPU", 9.0)
    axes.axvline(1, color=FAINT, linewidth=1, zorder=3)
    axes.set_xticks([])
    axes.legend(loc="upper right", bbox_to_anchor=(1.02, 0.87), frameon=False, fontsize=8)


def _draw_pair(
    axes: Axes, title: str, values: Mapping[str, float], texts: Sequence[str], *, scale: str = "linear"
) -> None:
    """Draw a bar of another's and one of ours."""
    axes.set_xscale(scale)
    axes.barh([1, 0], list(values.values()), left=1 if scale == "log" else 0, height=0.6, color=[FAINT, OURS_COLOR])
    for place, value, text in zip((1, 0), values.values(), texts, strict=True):
        axes.text(value, place, f" {text}", va="center", fontsize=8, color=INK)
    axes.set_yticks([1, 0], list(values))
    dress(axes, title, 9.0)
    axes.set_xticks([])
    axes.minorticks_off()
    axes.grid(visible=False)
