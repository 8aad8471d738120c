"""The pictures of speed, on a CPU or on a GPU.

A picture of speed has one row for each workload: a bar for each of ours, a line for the ceiling, small marks for the
others, and the times on the right.
"""

from __future__ import annotations

import textwrap
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
from bench.lookup import baseline, by_format, find, grouped, our_row, share_of_copy
from bench.report import Report, count_text
from bench.tables import milliseconds, row_kind_text

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
OURS_COLOR, CEILING_COLOR = "#0b7285", "#d9480f"
BAR_COLORS = (OURS_COLOR, "#66b2c4")
# Drawn at 200 dots an inch and shown 900 pixels wide, so that it stays sharp on a dense screen.
WIDTH_IN, DPI = 9.0, 200
# The form for phones: as wide as their pages, so that letters keep their size.
NARROW_IN, NARROW_COLUMNS = 4.0, 42
# So few colours, and the edges between them: a third of the size with a palette.
PALETTE = 96
# Of what a panel takes beside its rows; below all panels, the labels of the axis, each row of the legend, the caption.
PANEL_IN, AXIS_IN, LEGEND_ROW_IN, CAPTION_IN = 0.62, 0.1, 0.19, 0.36
# Other providers by their first appearance; shapes, because grey tones alone cannot be told apart. No two share one.
MARKERS = "osD^vPX<>*phd8"
# Marks of one row that are nearer to each other, as a part of the axis, stand below each other, in so many lines.
NEAR, MARK_LINES = 0.022, 4
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
class Layout:
    """Where the parts of a picture of speed are: beside the axes, or on a phone above the rows."""

    width_in: float
    left: float  # of the axes, as a part of the width: the names of the workloads stand there
    right: float  # of the axes: the times stand there
    columns: int  # of the legend: the longest name, torch's class, takes a third of a wide picture
    is_narrow: bool = False


WIDE, NARROW = Layout(WIDTH_IN, 0.2, 0.85, 3), Layout(NARROW_IN, 0.03, 0.97, 1, is_narrow=True)


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
    marks: float  # the first line of marks


CPU_STYLE = Style("one flat lerp_", 1.0, "log", lambda value: f"{value:g}x", 0.62, 0.32, (0.2,), -0.06)
GPU_STYLE = Style("device copy (ceiling)", 0.0, "linear", lambda value: f"{value:.0%}", 0.6, 0.23, (0.29, 0.05), -0.15)
# Room above each row of a narrow picture, for its name and its times, as a part of a row.
ABOVE = 0.45


def plot_speed(report: Report, path: Path) -> bool:
    """Draw the updates of ``report`` into ``path``. Return whether there was something to draw."""
    figure = speed_figure(report)
    if figure is not None:
        save(figure, path)
    return figure is not None


def speed_figure(report: Report, layout: Layout = WIDE) -> Figure | None:
    """Return the picture of a report's updates, or None if there is nothing to draw."""
    on_gpu = any(row.provider == names.COPY for row in report.rows)
    style, panels = (GPU_STYLE, _gpu_panels(report)) if on_gpu else (CPU_STYLE, _cpu_panels(report))
    if not panels:
        return None
    every = [line for lines in panels.values() for line in lines]
    row_in, panel_in = style.row_in * (1 + ABOVE * layout.is_narrow), PANEL_IN + 0.2 * layout.is_narrow
    heights = [len(lines) * row_in + panel_in for lines in panels.values()]
    others = dict.fromkeys(name for line in every for name in line.others)
    markers = dict(zip(others, MARKERS[: len(others)], strict=True))
    # The bars, the ceiling and the others.
    entries = max(len(line.bars) for line in every) + 1 + len(others)
    top = total = sum(heights) + AXIS_IN + -(-entries // layout.columns) * LEGEND_ROW_IN + CAPTION_IN
    figure, handles = Figure(figsize=(layout.width_in, total), dpi=DPI, facecolor="white"), dict[str, Any]()
    for (title, lines), height in zip(panels.items(), heights, strict=True):
        top -= height
        axes = figure.add_axes(
            (layout.left, (top + 0.2) / total, layout.right - layout.left, (height - panel_in) / total)
        )
        axes.set(
            xscale=style.scale, xlim=_limits(every, on_gpu), ylim=(-0.5, len(lines) - 0.5 + 0.05 * layout.is_narrow)
        )
        dress(axes, textwrap.fill(title, NARROW_COLUMNS) if layout.is_narrow else title)
        axes.set_yticks(range(len(lines)), ["" if layout.is_narrow else line.name for line in reversed(lines)])
        if not on_gpu:
            axes.axvline(1, color=INK, linewidth=0.8, zorder=1)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, position: style.label(value))
        for y, line in enumerate(reversed(lines)):
            _draw_line(axes, y, line, style, handles, markers)
            _write_line(axes, y, line, layout)
    figure.legend(
        handles.values(), handles, loc="lower center", bbox_to_anchor=(0.5, 0.28 / total), ncols=layout.columns,
        frameon=False, fontsize=8, labelcolor=INK, handletextpad=0.5, columnspacing=1.5,
    )  # fmt: skip
    caption = _caption(report, "\n" if layout.is_narrow else ", ")
    figure.text(0.985, 0.12 / total, caption, fontsize=7.5, color=FAINT, ha="right")
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
    high = axes.get_xlim()[1]
    for (name, value), at, color in zip(line.bars.items(), style.places, BAR_COLORS, strict=False):
        length = value - style.start
        bar = axes.barh(y + at, length, left=style.start, height=style.bar, color=color, zorder=2)
        handles.setdefault(name, bar)
    middle, half = y + sum(style.places) / len(style.places), style.bar / 2 * len(style.places) + 0.05
    if line.ceiling is not None and line.ceiling < high:
        drawn = axes.vlines(line.ceiling, middle - half, middle + half, color=CEILING_COLOR, linewidth=2, zorder=4)
        handles.setdefault(style.ceiling, drawn)
    elif line.ceiling is not None:  # it lies beyond the axis: an arrow at the edge says how far
        axes.plot(high, middle, ">", color=CEILING_COLOR, ms=6, clip_on=False, zorder=4)
        text, ground = f" {style.label(round(line.ceiling))}  ", {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axes.text(high, middle, text, color=CEILING_COLOR, fontsize=7.5, ha="right", va="center", bbox=ground, zorder=3)
    to_axes = axes.transScale + axes.transLimits
    places = {name: to_axes.transform((value, y))[0] for name, value in line.others.items()}
    for name, at in lines_of_marks(places).items():
        value, height = min(line.others[name], high), style.marks - 0.13 * at
        (handle,) = axes.plot(value, y + height, markers[name], color=FAINT, mec="white", mew=0.6, ms=6, clip_on=False)
        handles.setdefault(name + (" (default; freezes in bf16)" if name == names.TORCH_CLASS else ""), handle)


def lines_of_marks(places: Mapping[str, float]) -> dict[str, int]:
    """Return the line of each mark: the first one in which no other mark is too near."""
    lines: list[float] = [-1.0] * MARK_LINES  # where each ends
    found = {}
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        free = (at for at, end in enumerate(lines) if place - end >= NEAR)
        found[name] = next(free, min(range(MARK_LINES), key=lines.__getitem__))
        lines[found[name]] = place
    return found


def _write_line(axes: Axes, y: float, line: Line, layout: Layout) -> None:
    """Write the times right of a row, or its name and its times above it."""
    where, (number, *rest) = axes.get_yaxis_transform(), line.text.split("\n")
    if layout.is_narrow:
        name = line.name.replace("\n", ", ")
        axes.text(0, y + 0.47, name, transform=where, va="center", fontsize=8.5, color=INK)
        text = f"{number}: {', '.join(rest)}"
        axes.text(1, y + 0.47, text, transform=where, va="center", ha="right", fontsize=7.5, color=OURS_COLOR)
        return
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


def _caption(report: Report, between: str = ", ") -> str:
    about = report.environment
    versions = about.get("versions", {})
    on = about.get("gpu") or f"{about.get('device_name')}, {count_text(about.get('threads', 0), 'thread')}"
    more = f", driver {about['driver']}" if about.get("driver") else ""
    more += f", Triton {versions['triton']}" if about.get("gpu") and versions.get("triton") else ""
    when = f"medians of {about.get('command')}, {str(about.get('date'))[:10]}"
    return f"{on}{more}, torch {versions.get('torch')}{between}{when}"
