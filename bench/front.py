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
# Below every error but 0, which is that of the first update.
LEAST = 1e-9
Boxes = Sequence[tuple[float, float, float, float]]
WIDE: Boxes = ((0.13, 0.1, 0.27, 0.72), (0.5, 0.24, 0.2, 0.58), (0.85, 0.4, 0.085, 0.42))
NARROW: Boxes = ((0.27, 0.54, 0.6, 0.38), (0.13, 0.25, 0.8, 0.18), (0.27, 0.02, 0.5, 0.1))
#: Left ends of the titles, which stand above the names of bars too.
WIDE_TITLES, NARROW_TITLES = (0.005, 0.45, 0.745), (0.02,) * 3


def speedups(report: Report) -> dict[str, dict[str, float]]:
    """Return for each workload and dtype how many times as fast as torch's best way an update is."""
    found: dict[str, dict[str, float]] = {}
    for rows in grouped(report.of_group(names.UPDATES)):
        best, ours = baseline(rows), our_row(rows)
        if best is not None and ours is not None:
            name = "\n".join(ours.title.split(", ")[:2])
            found.setdefault(name, {})[ours.dtype] = best.seconds / ours.seconds
    return found


def errors_of_bf16(report: Report) -> dict[str, Sequence[float]]:
    """Return the errors over the updates of torch's class and of swafast, with a bfloat16 model."""
    by_kind = {(curve.stream, curve.rule, curve.format): curve.errors for curve in report.curves}
    return {"torch's class": by_kind[STREAM, RULE, TORCH_BF16], "swafast": by_kind[STREAM, RULE, "float32"]}


def front_figure(
    speed: Mapping[str, Mapping[str, float]],
    errors: Mapping[str, Sequence[float]],
    updates: Sequence[int],
    gigabytes: Mapping[str, float],
    *,
    is_narrow: bool = False,
) -> Figure:
    """Draw three panels: speed, error, memory."""
    size, boxes, left = ((NARROW_IN, 6.4), NARROW, NARROW_TITLES) if is_narrow else ((WIDTH_IN, 2.9), WIDE, WIDE_TITLES)
    figure = Figure(figsize=size, facecolor="white")
    axes = [figure.add_axes(box) for box in boxes]
    _draw_speed(axes[0], speed)
    _draw_errors(axes[1], errors, updates)
    _draw_memory(axes[2], gigabytes)
    titles = (
        "One update: times the speed of\ntorch's best way, on a CPU",
        "Relative error of an EMA\nof a bf16 model",
        "Memory of one of 8 ranks:\nthe average of Llama-3-8B",
    )
    for at, box, title in zip(left, boxes, titles, strict=True):
        top = box[1] + box[3] + 0.07 / size[1]
        figure.text(at, top, title, fontsize=9, fontweight="bold", color=INK, va="bottom", linespacing=1.3)
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
    axes.set_yticks([-row for row in range(len(speed))], [name.replace("tensors of", "tensors\nof") for name in speed])
    axes.set(xlim=(0, most * 1.05), ylim=(-len(speed) + 0.4, 0.6))
    dress(axes, "")
    axes.axvline(1, color=FAINT, linewidth=1, zorder=3)
    axes.set_xticks([])
    axes.legend(loc="upper right", bbox_to_anchor=(1.02, 0.87), frameon=False, fontsize=8)


def _draw_errors(axes: Axes, errors: Mapping[str, Sequence[float]], updates: Sequence[int]) -> None:
    """Draw two lines, each with its name at its end."""
    axes.set(xscale="log", yscale="log", xlim=(1, updates[-1]), ylim=(5e-9, 4))
    for (name, values), color in zip(errors.items(), (FAINT, OURS_COLOR), strict=True):
        axes.plot(updates, [max(value, LEAST) for value in values], color=color, linewidth=2)
        axes.text(updates[-1], values[-1] / 30, name, fontsize=8.5, color=color, ha="right", va="center")
    dress(axes, "", grid="both")
    axes.set_xticks([1, 1e5], ["1", f"{1e5:,.0f} updates"])
    axes.get_xticklabels()[-1].set_horizontalalignment("right")
    axes.set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1])
    axes.minorticks_off()


def _draw_memory(axes: Axes, gigabytes: Mapping[str, float]) -> None:
    """Draw a bar of a whole average and one of a rank's part."""
    axes.barh([1, 0], list(gigabytes.values()), height=0.6, color=[FAINT, OURS_COLOR])
    for place, value in zip((1, 0), gigabytes.values(), strict=True):
        axes.text(value, place, f" {value:.1f} GB", va="center", fontsize=8, color=INK)
    axes.set_yticks([1, 0], list(gigabytes))
    dress(axes, "")
    axes.set_xticks([])
    axes.grid(visible=False)
