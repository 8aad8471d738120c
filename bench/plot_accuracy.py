"""The picture of ``python -m bench accuracy``: how far each format is from float64."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bench.accuracy import DECAYS, EQUAL, STREAMS, TORCH_BF16
from bench.plot import FAINT, INK, NARROW_IN, OURS_COLOR, WIDTH_IN, dress, save
from bench.report import Report

# The stream of the EMA panels: its average is small beside its params, so errors weigh the most.
EMA_STREAM = "zero-mean"
COLORS = {TORCH_BF16: "#868e96", "half": "#e8590c", "compact": OURS_COLOR, "float32": INK, "compensated": "#9c36b5"}
LABELS = {TORCH_BF16: "torch, bf16", "float32": "float32, exact"}
# Below every error but 0, which is drawn as a line along the bottom.
LOWEST, HIGHEST = 1e-9, 300.0
# Of a panel's title in a narrow picture, and of the text below it.
TITLE_COLUMNS, TEXT_COLUMNS = 25, 78
# Guide lines: of compact times the root of n, and for an EMA; of compensated.
COMPACT_BOUND, COMPACT_EMA_BOUND, COMPENSATED_BOUND = 1e-5, 1e-3, 6e-8
STREAM_TITLES = {
    "zero-mean": "params around 0",
    "drifting": "params that drift from 1 to 101",
    "jumping": "params that jump between -1 and 100",
    "constant": "params that stay at 0.1",
}


@dataclass(frozen=True)
class Panels:
    """A grid of panels, as parts of the figure: the first one's place, the steps to the next, and the size."""

    columns: int
    left: float
    top: float
    step: float
    down: float
    width: float
    height: float


WIDE_PANELS = Panels(2, 0.062, 0.69, 0.487, 0.295, 0.43, 0.235), Panels(4, 0.062, 0.085, 0.235, 0.0, 0.212, 0.215)
NARROW_PANELS = (
    Panels(2, 0.115, 0.775, 0.485, 0.215, 0.385, 0.14),
    Panels(2, 0.115, 0.33, 0.485, 0.2, 0.385, 0.14),
)


def plot_accuracy(report: Report, path: Path) -> None:
    """Draw a panel for each stream under the equal mean, and one for each decay of an EMA."""
    save(accuracy_figure(report), path)


def accuracy_figure(report: Report, *, is_narrow: bool = False) -> Figure:
    """Return the picture of the errors of all formats; a narrow one has two panels in a line."""
    size, streams, decays = ((NARROW_IN, 9.5), *NARROW_PANELS) if is_narrow else ((WIDTH_IN, 10.2), *WIDE_PANELS)
    figure = Figure(figsize=size, dpi=150, facecolor="white")
    errors = {(curve.stream, curve.rule, curve.format): np.array(curve.errors) for curve in report.curves}
    updates = np.array(report.updates)
    small = 1.8 if is_narrow else 0.0
    _heading(figure, 0.946 if is_narrow else 0.972, "Equal mean of n models", small)
    for index, stream in enumerate(STREAMS):
        axes = figure.add_axes(_panel(streams, index))
        of_kind = {kind: errors[stream, EQUAL, kind] for kind in COLORS}
        _draw_errors(axes, STREAM_TITLES[stream], updates, of_kind, COMPACT_BOUND * np.sqrt(updates), small)
    _heading(
        figure,
        0.502 if is_narrow else 0.345,
        "Exponential average of params around 0, by its decay",
        small + 1.5 * is_narrow,
    )
    for index, decay in enumerate(DECAYS):
        axes = figure.add_axes(_panel(decays, index))
        of_kind = {kind: errors[EMA_STREAM, f"EMA {decay:g}", kind] for kind in COLORS}
        _draw_errors(axes, f"decay {decay:g}", updates, of_kind, np.full(len(updates), COMPACT_EMA_BOUND), small)
        axes.tick_params(axis="y", labelleft=index % decays.columns == 0)
    place: dict[str, Any] = {"loc": "upper center", "ncols": 3} if is_narrow else {"loc": "upper right", "ncols": 5}
    figure.legend(*axes.get_legend_handles_labels(), **place, frameon=False, fontsize=8.5 - small)
    about = report.environment
    lines = (
        "Vertical: relative L2 distance of the exported average from float64. Horizontal: n, the models averaged.",
        "torch's class averages a bfloat16 model, and is compared with float64 over the same bfloat16 params.",
        r"Dashed guides: $10^{-5}\sqrt{n}$ ($10^{-3}$ for an EMA) for compact, $6\cdot10^{-8}$ for compensated. "
        f"{about['command']}, torch {about['versions'].get('torch')}, {about['date'][:10]}",
    )
    if is_narrow:
        figure.text(
            0.012, 0.01, "\n".join(textwrap.fill(line, TEXT_COLUMNS) for line in lines), fontsize=6.6, color=FAINT
        )
        return figure
    for at, line in zip((0.042, 0.026, 0.01), lines, strict=True):
        figure.text(0.012, at, line, fontsize=8, color=FAINT)
    return figure


def _panel(panels: Panels, index: int) -> tuple[float, float, float, float]:
    """Return the place of a panel, from the top."""
    row, column = divmod(index, panels.columns)
    return panels.left + panels.step * column, panels.top - panels.down * row, panels.width, panels.height


def _heading(figure: Figure, at: float, text: str, small: float) -> None:
    figure.text(0.012, at, text, fontsize=11.5 - small, fontweight="bold", color=INK)


def _draw_errors(
    axes: Axes, title: str, updates: np.ndarray, errors: Mapping[str, np.ndarray], of_compact: np.ndarray, small: float
) -> None:
    """Draw every format's errors, and the guide lines."""
    dress(axes, textwrap.fill(title, TITLE_COLUMNS) if small else title, 9.5 - small, weight="normal", grid="both")
    axes.set(xscale="log", yscale="log", xlim=(1, updates[-1]), ylim=(LOWEST, HIGHEST))
    axes.xaxis.set_major_locator(LogLocator(base=10))
    powers = range(-8, 3, 2)
    labels = ["0", *(f"$10^{{{power}}}$" if power else "1" for power in powers)]
    axes.set_yticks([LOWEST, *(10.0**power for power in powers)], labels)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8 - small / 2, labelcolor=FAINT)
    for kind, bound in (("compact", of_compact), ("compensated", np.full(len(updates), COMPENSATED_BOUND))):
        axes.plot(updates, bound, color=COLORS[kind], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for kind, color in COLORS.items():
        drawn, width = np.clip(errors[kind], LOWEST, HIGHEST), 1.6 if kind == TORCH_BF16 else 2.0
        label = LABELS.get(kind, kind)
        axes.plot(updates, drawn, color=color, linewidth=width, zorder=3, clip_on=False, label=label)
