"""The picture of ``python -m bench files``: CPU seconds, seconds and peak memory of every way to average files."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from bench.files import LIMIT, OURS
from bench.plot import CEILING_COLOR, FAINT, INK, NARROW_IN, OURS_COLOR, WIDTH_IN, dress, save
from bench.report import FileRow, Report
from bench.tables import SHORT_DTYPES

_GREY = "#adb5bd"
# Of the figure: inches of a row, of what a panel takes beside its rows, and of the caption.
_ROW_IN, _PANEL_IN, _FOOT_IN = 0.3, 0.75, 0.35
_LEFT, _WIDTH, _STEP = 0.19, 0.2, 0.265


def plot_files(report: Report, path: Path) -> bool:
    """Draw a line of three panels for each dtype; return False if there is nothing to draw."""
    figure = files_figure(report)
    if figure is not None:
        save(figure, path)
    return figure is not None


def files_figure(report: Report, *, is_narrow: bool = False) -> Figure | None:
    """Return the picture, a narrow one with each panel in a line of its own; None if there is nothing to draw."""
    groups = {
        dtype: [row for row in report.files if row.dtype == dtype and row.rounds]
        for dtype in dict.fromkeys(row.dtype for row in report.files)
    }
    groups = {dtype: rows for dtype, rows in groups.items() if rows}
    if not groups:
        return None
    lines, width = (3, NARROW_IN) if is_narrow else (1, WIDTH_IN)
    heights = [(_PANEL_IN + _ROW_IN * len(rows)) for rows in groups.values()]
    total = top = lines * sum(heights) + _FOOT_IN
    figure = Figure(figsize=(width, total), dpi=150, facecolor="white")
    for (dtype, rows), height in zip(groups.items(), heights, strict=True):
        top -= height
        what = f"{rows[0].num_inputs} inputs of {rows[0].nbytes / 1e6:.0f} MB, {SHORT_DTYPES[dtype]}"
        boxes = [
            (0.4, (top - height * line + 0.15) / total, 0.58, (height - _PANEL_IN + 0.1) / total)
            if is_narrow
            else (_LEFT + _STEP * line, (top + 0.15) / total, _WIDTH, (height - _PANEL_IN + 0.1) / total)
            for line in range(3)
        ]
        _draw(figure, rows, what, boxes, named=3 if is_narrow else 1)
        top -= height * (lines - 1)
    about = report.environment
    on = f"{about.get('device_name')}, torch {about.get('versions', {}).get('torch')}"
    when = f"best of {rows[0].rounds} rounds of {about.get('command')}, {str(about.get('date'))[:10]}"
    caption = f"{on}\n{when}" if is_narrow else f"{on}, {when}"
    figure.text(0.985, 0.1 / total, caption, fontsize=7.5, color=FAINT, ha="right")
    return figure


def _draw(
    figure: Figure, rows: list[FileRow], what: str, boxes: list[tuple[float, float, float, float]], named: int
) -> None:
    """Draw the three panels of one dtype; the first ones have the names of the ways."""
    panels = {
        f"{what}: CPU seconds": [row.cpu_s for row in rows],
        "seconds": [row.wall_s for row in rows],
        "peak memory, MB": [row.peak_bytes / 1e6 for row in rows],
    }
    colors = {OURS: OURS_COLOR, LIMIT: CEILING_COLOR}
    for index, (title, values) in enumerate(panels.items()):
        axes = figure.add_axes(boxes[index])
        dress(axes, "" if index == 0 else title, 9.0)
        axes.barh(range(len(rows)), values, color=[colors.get(row.way, _GREY) for row in rows], height=0.7)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.22 * max(values)), xticks=[])
        axes.set_yticks(range(len(rows)), [row.way if index < named else "" for row in rows])
        for y, (row, value) in enumerate(zip(rows, values, strict=True)):
            text = f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.1f}"
            weight = "bold" if row.way == OURS else "normal"
            axes.text(value, y, f" {text}", va="center", fontsize=8.5, color=INK, fontweight=weight)
        if index == 0:
            # Above the names too: it is longer than its panel.
            axes.set_title(title, loc="right", fontsize=9, fontweight="bold", color=INK, pad=7)
