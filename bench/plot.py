"""The picture of a report: per workload, how many times faster an update is than what a user would run today."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bench.report import ALL_OURS, FLAT_LERP, TORCH_CLASS, Report, Row, baseline, find, our_row
from bench.tables import milliseconds

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
OURS_COLOR, CEILING_COLOR = "#0b7285", "#d9480f"
# Drawn at 200 dots an inch and shown 900 pixels wide, so that it stays sharp on a dense screen.
WIDTH_IN, DPI = 9.0, 200
# Of a workload's row, of what a panel takes beside its rows, and of the legend and caption below all panels.
ROW_IN, PANEL_IN, FOOT_IN = 0.48, 0.62, 0.98
# Left of the axes stand the names of the workloads, right of them the times; as parts of the width.
LEFT, RIGHT = 0.2, 0.85
# Within a row of height 1: our bar above, and the others on a line below it.
BAR_Y, BAR_HEIGHT, OTHERS_Y = 0.12, 0.46, -0.27
# A bar as long as this part of the axis has room for its number inside.
LABEL_PART = 0.13
# Other providers by their first appearance; shapes, because grey tones alone cannot be told apart.
MARKERS = "osD^vPX<>ph"

TITLES = {
    "float32": "fp32 params: times the speed of torch's AveragedModel",
    "bfloat16": "bf16 params: times the speed of the faster loop that keeps a float32 average",
}


def plot(report: Report, path: Path) -> bool:
    """Draw ``report`` into ``path``; False where it holds nothing to draw."""
    panels: dict[str, list[list[Row]]] = {}
    for rows in report.groups():
        if baseline(rows) is not None and our_row(rows) is not None:
            panels.setdefault(rows[0].dtype, []).append(rows)
    if not panels:
        return False
    heights = [len(groups) * ROW_IN + PANEL_IN for groups in panels.values()]
    total = sum(heights) + FOOT_IN
    figure = Figure(figsize=(WIDTH_IN, total), facecolor="white")
    FigureCanvasAgg(figure)
    keys = Keys()
    limits = _limits([group for groups in panels.values() for group in groups])
    top = total
    for (dtype, groups), height in zip(panels.items(), heights, strict=True):
        bottom = top - height
        box = (LEFT, (bottom + 0.2) / total, RIGHT - LEFT, (height - PANEL_IN) / total)
        axes = figure.add_axes(box, xscale="log", xlim=limits, ylim=(-0.5, len(groups) - 0.5))
        _dress(axes, TITLES[dtype], [rows[0].title for rows in reversed(groups)])
        for y, rows in enumerate(reversed(groups)):
            _draw_row(axes, y, rows, keys)
        top = bottom
    figure.legend(
        keys.handles.values(), keys.handles, loc="lower center", bbox_to_anchor=(0.5, 0.28 / total), ncols=5,
        frameon=False, fontsize=8, labelcolor=INK, handletextpad=0.5, columnspacing=1.5,
    )  # fmt: skip
    figure.text(0.985, 0.12 / total, _caption(report), fontsize=7.5, color=FAINT, ha="right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return True


@dataclass
class Keys:
    """The legend as it grows, and the marker that each other provider was given."""

    handles: dict[str, Any] = field(default_factory=dict)
    markers: dict[str, str] = field(default_factory=dict)

    def marker(self, provider: str) -> str:
        return self.markers.setdefault(provider, MARKERS[len(self.markers) % len(MARKERS)])


def _ratios(rows: list[Row]) -> dict[str, float]:
    """Give each timed provider's speed as a multiple of the baseline's."""
    today = baseline(rows)
    assert today is not None
    return {row.provider: today.seconds / row.seconds for row in rows if row.samples}


def _limits(groups: list[list[Row]]) -> tuple[float, float]:
    """Give one axis for all panels: a length means the same everywhere. The ceiling may lie outside."""
    shown = [ratio for rows in groups for name, ratio in _ratios(rows).items() if name != FLAT_LERP]
    return min(0.5, min(shown) / 1.25), max(2.0, max(shown) * 1.3)


def _dress(axes: Axes, title: str, names: list[str]) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=7)
    axes.set_yticks([y + BAR_Y / 2 for y in range(len(names))], ["\n".join(name.split(", ")[:2]) for name in names])
    axes.axvline(1, color=INK, linewidth=0.8, zorder=1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}x")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=INK)
    axes.tick_params(axis="x", length=0, labelsize=8, labelcolor=FAINT)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _draw_row(axes: Axes, y: float, rows: list[Row], keys: Keys) -> None:
    ratios, today, ours, ceiling = _ratios(rows), baseline(rows), our_row(rows), find(rows, FLAT_LERP)
    assert today is not None
    assert ours is not None
    ratio = ratios[ours.provider]
    at = y + BAR_Y
    bar = axes.barh(at, ratio - 1, left=1, height=BAR_HEIGHT, color=OURS_COLOR, zorder=2)
    keys.handles.setdefault("swafast", bar)
    if ceiling is not None:
        half = BAR_HEIGHT / 2 + 0.07
        line = axes.vlines(ratios[FLAT_LERP], at - half, at + half, color=CEILING_COLOR, linewidth=2, zorder=4)
        keys.handles.setdefault("one flat lerp_ (ceiling)", line)
    _label(axes, at, ratio, ratios.get(FLAT_LERP))
    for name, value in ratios.items():
        if name not in (*ALL_OURS, FLAT_LERP, today.provider):
            (handle,) = axes.plot(value, y + OTHERS_Y, keys.marker(name), color=FAINT, mec="white", mew=0.6, ms=6.5)
            keys.handles.setdefault(name + " (freezes)" * (name == TORCH_CLASS), handle)
    times = f"{milliseconds(ours.seconds)} ms\ninstead of {milliseconds(today.seconds)}"
    axes.text(1.015, at, times, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=INK)


def _label(axes: Axes, at: float, ratio: float, ceiling: float | None) -> None:
    """Write our number into our bar, or right of it where the bar is short; clear of the ceiling either way."""
    low, high = axes.get_xlim()
    room = (high / low) ** LABEL_PART
    inside = ratio > room
    end = max(ratio, 1)
    if ceiling is not None and end / room < ceiling < end * room:
        end = min(end, ceiling) if inside else max(end, ceiling)
    axes.annotate(
        f"{ratio:.1f}x", (end, at), xytext=(-6 if inside else 7, -0.5), textcoords="offset points",
        ha="right" if inside else "left", va="center", fontsize=10.5, fontweight="bold",
        color="white" if inside else OURS_COLOR, zorder=5,
    )  # fmt: skip


def _caption(report: Report) -> str:
    about = report.environment
    return (
        f"{about['device_name']}, {about['threads']} threads, torch {about['versions'].get('torch')}, "
        f"medians of one run of {about['command']}, {about['date'][:10]}"
    )
