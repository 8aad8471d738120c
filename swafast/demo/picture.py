"""The demo's picture: test error during training, final accuracy by seed, and the loss surface between solutions."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, MaxNLocator

from .measurements import DemoResult, Plane
from .report import describe_task
from .training import Score

# Okabe and Ito's palette, which colour-blind readers can tell apart. The training that is averaged is grey, and so is
# the common part of both trainings.
COLOURS = {"sgd": "#0072B2", "iterate": "#8C8C8C", "swa": "#D55E00", "ema": "#009E73"}
SHORT = {"sgd": "SGD", "iterate": "SGD at\nSWA rate", "swa": "SWA", "ema": "EMA"}
COMPARED = ("sgd", "swa", "ema")
INK, GREY, PALE = "#222222", "#555555", "#B0B0B0"
# Panels as (left, bottom, width, height), shares of the figure. The last is square in inches, as its surface is.
LEFT = 0.05
PANELS = ((LEFT, 0.12, 0.29, 0.63), (0.425, 0.12, 0.17, 0.63), (0.665, 0.12, 0.315, 0.63))
WORDS_WIDTH = 172  # characters of the second heading that fit the figure's width
LABEL_GAP = 0.06  # least distance between two labels, as a share of the panel's height
ERROR_TICKS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100)  # percent
LEAST_ERROR = 0.04  # percent, half a test image; a logarithmic axis cannot show an error of 0
# Cubic interpolation draws this many points per sample and axis.
SMOOTHING = 12
NUM_LEVELS = 12


def save_picture(result: DemoResult, out: Path) -> None:
    """Draw the three panels and write them to ``out`` as a PNG."""
    figure = Figure(figsize=(14, 7), dpi=120, facecolor="white")
    means = (f"{SHORT[method]} {100 * np.mean(result.accuracies(method)):.1f}%" for method in COMPARED)
    figure.text(LEFT, 0.925, f"Test accuracy:  {'   '.join(means)}", fontsize=20, fontweight="bold", color=INK)
    words = textwrap.fill(f"Means of {len(result.seeds)} seeds. {describe_task(result)}", WORDS_WIDTH)
    figure.text(LEFT, 0.905, words, fontsize=11, color=GREY, va="top", linespacing=1.4)
    _draw_curves(_panel(figure, 0, "Test error during training, %"), result)
    _draw_seeds(_panel(figure, 1, "Final test accuracy, %"), result)
    _draw_plane(_panel(figure, 2, f"Test loss on the plane of the three, seed {result.plane.seed}"), result.plane)
    figure.savefig(out, format="png")


def _panel(figure: Figure, index: int, title: str) -> Axes:
    axes = figure.add_axes(PANELS[index])
    axes.set_title(title, loc="left", fontsize=13.5, color=INK, pad=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(colors=GREY, labelsize=11, length=3)
    return axes


def _draw_curves(axes: Axes, result: DemoResult) -> None:
    """Draw the mean test error over the seeds, with a band of one standard deviation on either side."""
    axes.set_yscale("log")
    trunks = [seed.curves["trunk"] for seed in result.seeds]
    _draw_band(axes, trunks, GREY)
    ends = {}
    for method, colour in COLOURS.items():
        # Both trainings continue from the trunk's last point. Averages begin at their own first point.
        joint = [scores[-1:] if method in ("sgd", "iterate") else [] for scores in trunks]
        curves = [head + seed.curves[method] for head, seed in zip(joint, result.seeds, strict=True)]
        ends[method] = _draw_band(axes, curves, colour)
    axes.yaxis.set_major_locator(FixedLocator(ERROR_TICKS))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("epoch", fontsize=11.5, color=GREY)
    axes.set_xlim(0, result.settings.epochs)
    start, where = result.settings.start_epoch, ("data", "axes fraction")
    axes.axvline(start, color=PALE, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    words = axes.annotate("averaging\nstarts", (start, 1), (-6, -2), xycoords=where, textcoords="offset points")
    words.set(ha="right", va="top", fontsize=11, color=GREY)
    _label_ends(axes, ends)


def _draw_band(axes: Axes, curves: list[list[Score]], colour: str) -> float:
    """Draw one method's mean curve and its band, and return the mean error at its end."""
    epochs = [score.epoch for score in curves[0]]
    accuracies = np.array([[score.accuracy for score in curve] for curve in curves])
    errors = np.maximum(100 * (1 - accuracies), LEAST_ERROR)
    means, spreads = errors.mean(axis=0), errors.std(axis=0)
    low = np.maximum(means - spreads, LEAST_ERROR)
    axes.fill_between(epochs, low, means + spreads, color=colour, alpha=0.15, linewidth=0)
    axes.plot(epochs, means, color=colour, linewidth=2.4, marker="o" if len(epochs) == 1 else "")
    return means[-1]


def _label_ends(axes: Axes, ends: dict[str, float]) -> None:
    """Label each curve at its right end, and push labels apart where curves end close together."""
    bottom, top = np.log(axes.get_ylim())
    place = -np.inf
    for method, end in sorted(ends.items(), key=lambda item: item[1]):
        gap = LABEL_GAP * (1.4 if "\n" in SHORT[method] else 1)
        place = max((np.log(end) - bottom) / (top - bottom), place + gap)
        name = axes.text(1.02, place, SHORT[method], transform=axes.transAxes, va="center", color=COLOURS[method])
        name.set(fontsize=12, fontweight="bold")


def _draw_seeds(axes: Axes, result: DemoResult) -> None:
    """Draw the final accuracies. A line joins those of one seed, and a bar marks each mean."""
    columns = 100 * np.array([result.accuracies(method) for method in COMPARED])
    places = range(len(columns))
    axes.plot(places, columns, color=PALE, linewidth=1, zorder=1)
    axes.set_xticks(places, [SHORT[method] for method in COMPARED], fontsize=12, fontweight="bold")
    axes.set_xlim(-0.5, len(columns) - 0.5)
    for place, method, values, tick in zip(places, COMPARED, columns, axes.get_xticklabels(), strict=True):
        colour, mean = COLOURS[method], values.mean()
        axes.scatter([place] * len(values), values, s=70, color=colour, edgecolor="white", linewidth=1, zorder=3)
        axes.plot([place - 0.3, place + 0.3], [mean, mean], color=colour, linewidth=3, zorder=2)
        tick.set_color(colour)


def _draw_plane(axes: Axes, plane: Plane) -> None:
    """Draw the test loss as filled contours, with the three solutions that span the plane."""
    samples = torch.tensor(plane.loss)[None, None]
    smooth = F.interpolate(samples, scale_factor=SMOOTHING, mode="bicubic", align_corners=True)
    loss = smooth[0, 0].double().numpy()
    # Levels are closest near the minimum, where the solutions differ.
    levels = loss.min() + np.ptp(loss) * np.linspace(0, 1, NUM_LEVELS + 1) ** 3
    extent = (plane.x[0], plane.x[-1], plane.y[0], plane.y[-1])
    axes.contourf(loss, levels=levels, extent=extent, cmap="YlGnBu_r", norm=BoundaryNorm(levels, 256))
    lines = axes.contour(loss, levels=levels[3:-1:2], extent=extent, colors="white", linewidths=0.8, alpha=0.7)
    for text in axes.clabel(lines, fmt="%.2f", fontsize=10):
        text.set(color=INK, alpha=1, path_effects=[withStroke(linewidth=2.5, foreground="white")])
    for method, (x, y) in plane.points.items():
        axes.scatter([x], [y], s=130, color=COLOURS[method], edgecolor="white", linewidth=2, zorder=3)
        name = axes.annotate(SHORT[method], (x, y), (10, 8), textcoords="offset points", color="white", fontsize=13)
        name.set(fontweight="bold", path_effects=[withStroke(linewidth=2.5, foreground=INK)])
    axes.set_aspect("equal")
    axes.set_xlabel("Euclidean distance over all weights", fontsize=11.5, color=GREY)
