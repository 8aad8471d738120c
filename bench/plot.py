"""The pictures: how fast updates are, on a CPU or on a GPU, and how far each format is from float64.

A picture of speed has one row for each workload: a bar for each of ours, a line for the ceiling, small marks for the
others, and the times on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from bench import names
from bench.accuracy import DECAYS, EQUAL, STREAMS, TORCH_BF16
from bench.lookup import baseline, by_format, find, grouped, our_row, share_of_copy
from bench.report import Report, count_text
from bench.tables import milliseconds, row_kind_text

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
OURS_COLOR, CEILING_COLOR = "#0b7285", "#d9480f"
BAR_COLORS = (OURS_COLOR, "#66b2c4")
# Drawn at 200 dots an inch and shown 900 pixels wide, so that it stays sharp on a dense screen.
WIDTH_IN, DPI = 9.0, 200
# So few colours, and the edges between them: a third of the size with a palette.
PALETTE = 96
# Of what a panel takes beside its rows; below all panels, the labels of the axis, each row of the legend, the caption.
PANEL_IN, AXIS_IN, LEGEND_ROW_IN, CAPTION_IN = 0.62, 0.1, 0.19, 0.36
# Columns of the legend: the longest name, torch's class, takes a third of the width.
LEGEND_COLUMNS = 3
# Left of the axes stand the names of the workloads, right of them the times; as parts of the width.
LEFT, RIGHT = 0.2, 0.85
# Other providers by their first appearance; shapes, because grey tones alone cannot be told apart. No two share one.
MARKERS = "osD^vPX<>*phd8"
DRY = "DRY RUN ON A CPU\nno figure of a GPU"


def save(figure: Figure, path: Path) -> None:
    """Write a picture with a palette."""
    canvas = FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(PALETTE).save(path, optimize=True)


def dress(axes: Axes, title: str, size: float = 10.0, *, weight: str = "bold", grid: str = "x") -> None:
    """Dress axes as in all pictures."""
    axes.set_title(title, loc="left", fontsize=size, fontweight=weight, color=INK, pad=7)
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=INK)
    axes.tick_params(axis="x", length=0, labelsize=8, labelcolor=FAINT)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


# Speed


@dataclass(frozen=True)
class Line:
    """One row of a picture: a workload, and the value of each provider."""

    name: str
    bars: Mapping[str, float]  # ours, in the order of BAR_COLORS
    others: Mapping[str, float]
    ceiling: float | None
    text: str  # written on the right


@dataclass(frozen=True)
class Style:
    """What differs between a picture of ratios, from a CPU, and one of shares of a copy, from a GPU."""

    ceiling: str
    start: float  # of the bars
    scale: str
    label: Callable[[float], str]
    row_in: float
    bar: float  # height, as a part of a row
    places: Sequence[float]  # of the bars


CPU_STYLE = Style("one flat lerp_", 1.0, "log", lambda value: f"{value:g}x", 0.48, 0.42, (0.12,))
GPU_STYLE = Style("device copy (ceiling)", 0.0, "linear", lambda value: f"{value:.0%}", 0.56, 0.25, (0.27, 0.0))


def plot_speed(report: Report, path: Path) -> bool:
    """Draw the updates of ``report`` into ``path``. Return whether there was something to draw."""
    figure = speed_figure(report)
    if figure is not None:
        save(figure, path)
    return figure is not None


def speed_figure(report: Report) -> Figure | None:
    """Return the picture of a report's updates, or None if there is nothing to draw."""
    on_gpu = any(row.provider == names.COPY for row in report.rows)
    style, panels = (GPU_STYLE, _gpu_panels(report)) if on_gpu else (CPU_STYLE, _cpu_panels(report))
    if not panels:
        return None
    every = [line for lines in panels.values() for line in lines]
    heights = [len(lines) * style.row_in + PANEL_IN for lines in panels.values()]
    others = dict.fromkeys(name for line in every for name in line.others)
    markers = dict(zip(others, MARKERS[: len(others)], strict=True))
    # The bars, the ceiling and the others.
    entries = max(len(line.bars) for line in every) + 1 + len(others)
    top = total = sum(heights) + AXIS_IN + -(-entries // LEGEND_COLUMNS) * LEGEND_ROW_IN + CAPTION_IN
    figure, handles = Figure(figsize=(WIDTH_IN, total), dpi=DPI, facecolor="white"), dict[str, Any]()
    for (title, lines), height in zip(panels.items(), heights, strict=True):
        top -= height
        axes = figure.add_axes((LEFT, (top + 0.2) / total, RIGHT - LEFT, (height - PANEL_IN) / total))
        axes.set(xscale=style.scale, xlim=_limits(every, on_gpu), ylim=(-0.5, len(lines) - 0.5))
        dress(axes, title)
        axes.set_yticks(range(len(lines)), [line.name for line in reversed(lines)])
        if not on_gpu:
            axes.axvline(1, color=INK, linewidth=0.8, zorder=1)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, position: style.label(value))
        for y, line in enumerate(reversed(lines)):
            _draw_line(axes, y, line, style, handles, markers)
    figure.legend(
        handles.values(), handles, loc="lower center", bbox_to_anchor=(0.5, 0.28 / total), ncols=LEGEND_COLUMNS,
        frameon=False, fontsize=8, labelcolor=INK, handletextpad=0.5, columnspacing=1.5,
    )  # fmt: skip
    figure.text(0.985, 0.12 / total, _caption(report), fontsize=7.5, color=FAINT, ha="right")
    if report.dry:
        figure.text(
            0.5, 0.55, DRY, fontsize=44, color="#c92a2a", alpha=0.25, rotation=25,
            ha="center", va="center", zorder=10,
        )  # fmt: skip
    return figure


def _limits(lines: Sequence[Line], on_gpu: bool) -> tuple[float, float]:
    """Return the ends of the axis, one for all panels: a length means the same everywhere."""
    values = [value for line in lines for value in (*line.bars.values(), *line.others.values())]
    if on_gpu:
        # Whatever a cache made of a copy, shares end at 140 %.
        return 0.0, min(max(1.05, max(values) * 1.06), 1.4)
    # The ceiling may lie outside.
    return min(0.5, min(values) / 1.25), max(2.0, max(values) * 1.3)


def _draw_line(
    axes: Axes, y: float, line: Line, style: Style, handles: dict[str, Any], markers: Mapping[str, str]
) -> None:
    """Draw one row. ``handles`` is the legend as it grows, ``markers`` has the marker of each other provider."""
    low, high = axes.get_xlim()
    for (name, value), at, color in zip(line.bars.items(), style.places, BAR_COLORS, strict=False):
        length = value - style.start
        bar = axes.barh(y + at, length, left=style.start, height=style.bar, color=color, zorder=2)
        handles.setdefault(name, bar)
    if line.ceiling is not None and low < line.ceiling < high:
        middle, half = y + sum(style.places) / len(style.places), style.bar / 2 * len(style.places) + 0.07
        drawn = axes.vlines(line.ceiling, middle - half, middle + half, color=CEILING_COLOR, linewidth=2, zorder=4)
        handles.setdefault(style.ceiling, drawn)
    for name, value in line.others.items():
        (handle,) = axes.plot(
            min(value, high), y - 0.28, markers[name], color=FAINT, mec="white", mew=0.6, ms=6.5, clip_on=False
        )
        handles.setdefault(name + (" (default; freezes in bf16)" if name == names.TORCH_CLASS else ""), handle)
    where, (number, *rest) = axes.get_yaxis_transform(), line.text.split("\n")
    axes.text(1.015, y + 0.2, number, transform=where, va="center", fontsize=9, fontweight="bold", color=OURS_COLOR)
    axes.text(1.015, y - 0.17, "\n".join(rest), transform=where, va="center", fontsize=7.5, color=INK, linespacing=1.35)


def _cpu_panels(report: Report) -> dict[str, list[Line]]:
    """Show how many times as fast as torch's best way each provider is."""
    titles = {
        "float32": "fp32 params: times the speed of torch's AveragedModel with its EMA function",
        "bfloat16": "bf16 params: times the speed of the faster loop that keeps a float32 average",
    }
    panels: dict[str, list[Line]] = {}
    for rows in grouped(report.of_group(names.UPDATES)):
        best, ours = baseline(rows), our_row(rows)
        if best is None or ours is None:
            continue
        ratios = {row.provider: best.seconds / row.seconds for row in rows if row.wall}
        hidden = (*names.ALL_OURS, names.FLAT_LERP, best.provider)
        others = {name: ratio for name, ratio in ratios.items() if name not in hidden}
        ratio, name = ratios[ours.provider], "\n".join(ours.title.split(", ")[:2])
        text = f"{ratio:.1f}x\n{milliseconds(ours.seconds)} ms, torch {milliseconds(best.seconds)}"
        line = Line(name, {names.OURS: ratio}, others, ratios.get(names.FLAT_LERP), text)
        panels.setdefault(titles[ours.dtype], []).append(line)
    return panels


def _gpu_panels(report: Report) -> dict[str, list[Line]]:
    """Show what share of a device copy's bytes a second each provider reaches. Swept grids are in a table alone."""
    backends, lines = names.OUR_BACKENDS["cpu" if report.dry else "cuda"], []
    for rows in by_format(row for row in report.rows if not row.group.endswith(names.SWEPT)):
        shares = {row.provider: share for row in rows if (share := share_of_copy(row, rows)) is not None}
        bars = {name: shares[name] for backend in backends if (name := f"{names.OURS} {backend}") in shares}
        if not bars:
            continue
        others = {name: share for name, share in shares.items() if name not in bars and name not in names.CEILINGS}
        ours, best = [row for name in bars if (row := find(rows, name)) and row.wall], baseline(rows)
        text = " / ".join(f"{share:.0%}" for share in bars.values())
        text += "\n" + " / ".join(milliseconds(row.seconds) for row in ours) + " ms"
        text += f"\ntorch {milliseconds(best.seconds)} ms" if best is not None else ""
        title = rows[0].title.replace(" tensors of ", " x ").split(", no embeddings")[0]
        name = f"{title}\n{row_kind_text(rows[0])}"
        lines.append(Line(name, bars, others, 1.0, text))
    what = "Bytes a second of an update, as a share of a device copy of as many bytes"
    return {what: lines} if lines else {}


def _caption(report: Report) -> str:
    about = report.environment
    versions = about.get("versions", {})
    on = about.get("gpu") or f"{about.get('device_name')}, {count_text(about.get('threads', 0), 'thread')}"
    more = f", driver {about['driver']}" if about.get("driver") else ""
    more += f", Triton {versions['triton']}" if about.get("gpu") and versions.get("triton") else ""
    return (
        f"{on}{more}, torch {versions.get('torch')}, medians of {about.get('command')}, {str(about.get('date'))[:10]}"
    )


# Accuracy

# The stream of the EMA panels: its average is small beside its params, so errors weigh the most.
EMA_STREAM = "zero-mean"
COLORS = {TORCH_BF16: "#868e96", "half": "#e8590c", "compact": OURS_COLOR, "float32": INK, "compensated": "#9c36b5"}
LABELS = {TORCH_BF16: "torch, bf16", "float32": "float32, exact"}
# Below every error but 0, which is drawn as a line along the bottom.
LOWEST, HIGHEST = 1e-9, 300.0
# Guide lines: of compact times the root of n, and for an EMA; of compensated.
COMPACT_BOUND, COMPACT_EMA_BOUND, COMPENSATED_BOUND = 1e-5, 1e-3, 6e-8
STREAM_TITLES = {
    "zero-mean": "params around 0",
    "drifting": "params that drift from 1 to 101",
    "jumping": "params that jump between -1 and 100",
    "constant": "params that stay at 0.1",
}


def plot_accuracy(report: Report, path: Path) -> None:
    """Draw a panel for each stream under the equal mean, and one for each decay of an EMA."""
    figure = Figure(figsize=(WIDTH_IN, 10.2), dpi=150, facecolor="white")
    errors = {(curve.stream, curve.rule, curve.format): np.array(curve.errors) for curve in report.curves}
    updates = np.array(report.updates)
    _heading(figure, 0.972, "Equal mean of n models")
    for index, stream in enumerate(STREAMS):
        axes = figure.add_axes((0.062 + 0.487 * (index % 2), 0.69 - 0.295 * (index // 2), 0.43, 0.235))
        of_kind = {kind: errors[stream, EQUAL, kind] for kind in COLORS}
        _draw_errors(axes, STREAM_TITLES[stream], updates, of_kind, COMPACT_BOUND * np.sqrt(updates))
    _heading(figure, 0.345, "Exponential average of params around 0, by its decay")
    for index, decay in enumerate(DECAYS):
        axes = figure.add_axes((0.062 + 0.235 * index, 0.085, 0.212, 0.215))
        of_kind = {kind: errors[EMA_STREAM, f"EMA {decay:g}", kind] for kind in COLORS}
        _draw_errors(axes, f"decay {decay:g}", updates, of_kind, np.full(len(updates), COMPACT_EMA_BOUND))
        axes.tick_params(axis="y", labelleft=index == 0)
    figure.legend(*axes.get_legend_handles_labels(), loc="upper right", ncols=5, frameon=False, fontsize=8.5)
    about = report.environment
    lines = (
        "Vertical: relative L2 distance of the exported average from float64. Horizontal: n, the models averaged.",
        "torch's class averages a bfloat16 model, and is compared with float64 over the same bfloat16 params.",
        r"Dashed guides: $10^{-5}\sqrt{n}$ ($10^{-3}$ for an EMA) for compact, $6\cdot10^{-8}$ for compensated. "
        f"{about['command']}, torch {about['versions'].get('torch')}, {about['date'][:10]}",
    )
    for at, line in zip((0.042, 0.026, 0.01), lines, strict=True):
        figure.text(0.012, at, line, fontsize=8, color=FAINT)
    save(figure, path)


def _heading(figure: Figure, at: float, text: str) -> None:
    figure.text(0.012, at, text, fontsize=11.5, fontweight="bold", color=INK)


def _draw_errors(
    axes: Axes, title: str, updates: np.ndarray, errors: Mapping[str, np.ndarray], of_compact: np.ndarray
) -> None:
    """Draw every format's errors, and the guide lines."""
    dress(axes, title, 9.5, weight="normal", grid="both")
    axes.set(xscale="log", yscale="log", xlim=(1, updates[-1]), ylim=(LOWEST, HIGHEST))
    axes.xaxis.set_major_locator(LogLocator(base=10))
    powers = range(-8, 3, 2)
    labels = ["0", *(f"$10^{{{power}}}$" if power else "1" for power in powers)]
    axes.set_yticks([LOWEST, *(10.0**power for power in powers)], labels)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8, labelcolor=FAINT)
    for kind, bound in (("compact", of_compact), ("compensated", np.full(len(updates), COMPENSATED_BOUND))):
        axes.plot(updates, bound, color=COLORS[kind], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for kind, color in COLORS.items():
        drawn, width = np.clip(errors[kind], LOWEST, HIGHEST), 1.6 if kind == TORCH_BF16 else 2.0
        label = LABELS.get(kind, kind)
        axes.plot(updates, drawn, color=color, linewidth=width, zorder=3, clip_on=False, label=label)
