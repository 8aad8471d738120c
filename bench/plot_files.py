"""The picture of ``python -m bench files``: CPU seconds, seconds and peak memory of every way to average files."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from bench.files import LIMIT, OURS
from bench.plot import CEILING_COLOR, FAINT, INK, OURS_COLOR, WIDTH_IN, dress, save
from bench.report import FileRow, Report
from bench.tables import SHORT_DTYPES

_GREY = "#adb5bd"
# Of the figure: inches of a row, of what a panel takes beside its rows, and of the caption.
_ROW_IN, _PANEL_IN, _FOOT_IN = 0.3, 0.75, 0.35
_LEFT, _WIDTH, _STEP = 0.19, 0.2, 0.265


def plot_files(report: Report, path: Path) -> bool:
    """Draw a line of three panels for each dtype; return False if there is nothing to draw."""
    groups = {
        dtype: [row for row in report.files if row.dtype == dtype and row.rounds]
        for dtype in dict.fromkeys(row.dtype for row in report.files)
    }
    groups = {dtype: rows for dtype, rows in groups.items() if rows}
    if not groups:
        return False
    heights = [_PANEL_IN + _ROW_IN * len(rows) for rows in groups.values()]
    total = top = sum(heights) + _FOOT_IN
    figure = Figure(figsize=(WIDTH_IN, total), dpi=150, facecolor="white")
    for (dtype, rows), height in zip(groups.items(), heights, strict=True):
        top -= height
        what = f"{rows[0].num_inputs} inputs of {rows[0].nbytes / 1e6:.0f} MB, {SHORT_DTYPES[dtype]}"
        _draw(figure, rows, what, (top + 0.15) / total, (height - _PANEL_IN + 0.1) / total)
    about = report.environment
    caption = (
        f"{about.get('device_name')}, torch {about.get('versions', {}).get('torch')}, best of {rows[0].rounds} rounds "
        f"of {about.get('command')}, {str(about.get('date'))[:10]}"
    )
    figure.text(0.985, 0.1 / total, caption, fontsize=7.5, color=FAINT, ha="right")
    save(figure, path)
    return True


def _draw(figure: Figure, rows: list[FileRow], what: str, bottom: float, height: float) -> None:
    """Draw the three panels of one dtype."""
    panels = {
        f"{what}: CPU seconds": [row.cpu_s for row in rows],
        "seconds": [row.wall_s for row in rows],
        "peak memory, MB": [row.peak_bytes / 1e6 for row in rows],
    }
    colors = {OURS: OURS_COLOR, LIMIT: CEILING_COLOR}
    for index, (title, values) in enumerate(panels.items()):
        axes = figure.add_axes((_LEFT + _STEP * index, bottom, _WIDTH, height))
        dress(axes, "" if index == 0 else title, 9.0)
        axes.barh(range(len(rows)), values, color=[colors.get(row.way, _GREY) for row in rows], height=0.7)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.22 * max(values)), xticks=[])
        axes.set_yticks(range(len(rows)), [row.way if index == 0 else "" for row in rows])
        for y, (row, value) in enumerate(zip(rows, values, strict=True)):
            text = f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.1f}"
            weight = "bold" if row.way == OURS else "normal"
            axes.text(value, y, f" {text}", va="center", fontsize=8.5, color=INK, fontweight=weight)
        if index == 0:
            # Above the names too: it is longer than its panel.
            axes.set_title(title, loc="right", fontsize=9, fontweight="bold", color=INK, pad=7)
