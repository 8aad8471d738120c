"""The picture of the errors: one panel for each stream under the equal mean, and one for each decay of an EMA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from bench.accuracy import DECAYS, EQUAL, STREAMS, TORCH_BF16, AccuracyReport
from bench.plot import FAINT, GRID, INK, OURS_COLOR

WIDTH_IN, HEIGHT_IN, DPI = 9.0, 10.2, 150
# A picture of so few colours, and the edges between them, is a third of its size with a palette.
PALETTE = 96
# The stream of the EMA panels: its average is small beside its params, so errors weigh the most.
EMA_STREAM = "zero-mean"
COLORS = {
    TORCH_BF16: "#868e96",
    "half": "#e8590c",
    "compact": OURS_COLOR,
    "float32": INK,
    "compensated": "#9c36b5",
}
LABELS = {TORCH_BF16: "torch, bf16", "float32": "float32, exact"}
WIDTHS = {TORCH_BF16: 1.6}
# Below every error but 0, which stands at LOWEST and is drawn as a line along the bottom.
LOWEST, HIGHEST = 1e-9, 300.0
# Labels at the end of lines are at least this part of the axis apart, so that they do not overlap.
APART, APART_SMALL = 0.052, 0.075
# Guide lines: of compact times the root of n, and for an EMA; of compensated.
COMPACT_BOUND, COMPACT_EMA_BOUND, COMPENSATED_BOUND = 1e-5, 1e-3, 6e-8
TITLES = {
    "zero-mean": "params around 0",
    "drifting": "params that drift from 1 to 101",
    "jumping": "params that jump between -1 and 100",
    "constant": "params that stay at 0.1",
}


def plot(report: AccuracyReport, path: Path) -> None:
    """Draw ``report`` into ``path``."""
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    last = report.updates[-1]
    _heading(figure, 0.972, "Equal mean of n models")
    for index, stream in enumerate(STREAMS):
        left, bottom = 0.062 + 0.487 * (index % 2), 0.69 - 0.295 * (index // 2)
        axes = figure.add_axes((left, bottom, 0.325, 0.235), xscale="log", yscale="log")
        _dress(axes, TITLES[stream], last, 9.5)
        _bounds(axes, report.updates, COMPACT_BOUND * np.sqrt(report.updates))
        _draw(axes, report, stream, EQUAL, 8, APART)
    _heading(figure, 0.345, "Exponential average of params around 0, by its decay")
    for index, decay in enumerate(DECAYS):
        left = 0.062 + 0.2 * index
        axes = figure.add_axes((left, 0.085, 0.18, 0.215), xscale="log", yscale="log")
        _dress(axes, f"decay {decay:g}", last, 9)
        _bounds(axes, report.updates, np.full(len(report.updates), COMPACT_EMA_BOUND))
        if index:
            axes.tick_params(axis="y", labelleft=False)
        _draw(axes, report, EMA_STREAM, f"EMA {decay:g}", 8 if index == len(DECAYS) - 1 else 0, APART_SMALL)
    _footer(figure, report)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(PALETTE).save(path, optimize=True)


def _heading(figure: Figure, at: float, text: str) -> None:
    figure.text(0.012, at, text, fontsize=11.5, fontweight="bold", color=INK)


def _dress(axes: Axes, title: str, last: int, size: float) -> None:
    axes.set(xlim=(1, last), ylim=(LOWEST, HIGHEST))
    axes.set_title(title, loc="left", fontsize=size, color=INK, pad=5)
    axes.xaxis.set_major_locator(LogLocator(base=10))
    ticks = [LOWEST, *(10.0**power for power in range(-8, 3, 2))]
    axes.set_yticks(ticks, ["0", *(f"$10^{{{power}}}$" if power else "1" for power in range(-8, 3, 2))])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(length=0, labelsize=8, labelcolor=FAINT)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _bounds(axes: Axes, updates: list[int], of_compact: NDArray[np.float64]) -> None:
    for kind, bound in (("compact", of_compact), ("compensated", np.full(len(updates), COMPENSATED_BOUND))):
        axes.plot(updates, bound, color=COLORS[kind], linewidth=1, linestyle=(0, (4, 3)), zorder=1)


def _draw(axes: Axes, report: AccuracyReport, stream: str, rule: str, label_size: float, apart: float) -> None:
    """Draw every format's errors, and write its name where its line ends."""
    ends: dict[str, float] = {}
    for kind, color in COLORS.items():
        errors = np.array(report.errors(stream, rule, kind))
        drawn = np.clip(errors, LOWEST, HIGHEST)
        width = WIDTHS.get(kind, 2.0)
        axes.plot(report.updates, drawn, color=color, linewidth=width, zorder=3, clip_on=False, solid_capstyle="butt")
        ends[kind] = float(drawn[-1])
    if not label_size:
        return
    low, high = np.log10(LOWEST), np.log10(HIGHEST)
    wanted = {kind: (np.log10(end) - low) / (high - low) for kind, end in ends.items()}
    for kind, at in _spread(wanted, apart).items():
        label = LABELS.get(kind, kind)
        axes.text(1.03, at, label, transform=axes.transAxes, fontsize=label_size, color=COLORS[kind], va="center")


def _spread(wanted: dict[str, float], apart: float) -> dict[str, float]:
    """Move labels up until each is ``apart`` from the one below it."""
    found: dict[str, float] = {}
    lowest = -1.0
    for kind, at in sorted(wanted.items(), key=lambda item: item[1]):
        found[kind] = lowest = max(at, lowest + apart)
    return found


def _footer(figure: Figure, report: AccuracyReport) -> None:
    about = report.environment
    lines = (
        "Up: relative L2 distance of the average from float64, as it is exported. Right: n, the models averaged. "
        "torch's class averages a",
        "bfloat16 model and is held to float64 over the same bfloat16 params. Dashed, to go by: "
        r"$10^{-5}\sqrt{n}$ ($10^{-3}$ for an EMA) beside compact,",
        r"$6\cdot10^{-8}$ beside compensated. "
        f"{about['command']}, torch {about['versions'].get('torch')}, {about['date'][:10]}",
    )
    for at, line in zip((0.042, 0.026, 0.01), lines, strict=True):
        figure.text(0.012, at, line, fontsize=8, color=FAINT)
