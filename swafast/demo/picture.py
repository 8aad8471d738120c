"""The demo's picture: test error along training, each seed at the end, and the loss surface between the solutions."""

from __future__ import annotations

import math
import statistics
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from .report import DemoResult, describe_task
from .surface import Plane
from .training import Score

# Okabe and Ito's palette, which colour-blind readers can tell apart; the run that is averaged, and the part common to
# both runs, stay grey.
COLOURS = {"sgd": "#0072B2", "iterate": "#8C8C8C", "swa": "#D55E00", "ema": "#009E73"}
SHORT = {"sgd": "SGD", "iterate": "SGD at\nSWA rate", "swa": "SWA", "ema": "EMA"}
COMPARED = ("sgd", "swa", "ema")
WORDS_WIDTH = 172  # characters of the second heading that fit the figure's width
INK, GREY, PALE = "#222222", "#555555", "#B0B0B0"
SIZE_INCHES = (14.0, 7.0)
DPI = 120
# Panels as (left, bottom, width, height), shares of the figure; the last is square in inches, as its surface is.
LEFT = 0.05
PANELS = ((LEFT, 0.12, 0.29, 0.63), (0.425, 0.12, 0.17, 0.63), (0.665, 0.12, 0.315, 0.63))
ERROR_TICKS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100)  # percent
LABEL_GAP = 0.06  # least distance between two labels, as a share of the panel's height
# The surface is sampled coarsely and drawn by cubic interpolation, with this many points for each sampled one.
SMOOTHING = 12
NUM_LEVELS = 12


def save_picture(result: DemoResult, out: Path) -> None:
    """Draw the three panels and write them to ``out`` as a PNG."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    curves, seeds, surface = (figure.add_axes(panel) for panel in PANELS)
    _write_words(figure, result)
    _draw_curves(curves, result)
    _draw_seeds(seeds, result)
    _draw_plane(surface, result.plane)
    figure.savefig(out, format="png")


def _write_words(figure: Figure, result: DemoResult) -> None:
    means = {method: 100 * statistics.mean(result.accuracies(method)) for method in COMPARED}
    title = "Test accuracy:  " + "   ".join(f"{SHORT[method]} {mean:.1f}%" for method, mean in means.items())
    figure.text(LEFT, 0.925, title, fontsize=20, fontweight="bold", color=INK)
    words = f"Means of {len(result.seeds)} seeds. {describe_task(result)}"
    figure.text(LEFT, 0.905, textwrap.fill(words, WORDS_WIDTH), fontsize=11, color=GREY, va="top", linespacing=1.4)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13.5, color=INK, pad=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(colors=GREY, labelsize=11, length=3)


def _draw_curves(axes: Axes, result: DemoResult) -> None:
    """Mean test error over the seeds, and a band of one standard deviation on either side."""
    _style(axes, "Test error along training, %")
    axes.set_yscale("log")
    trunk = [seed.curves["trunk"] for seed in result.seeds]
    _draw_band(axes, trunk, GREY)
    ends = {}
    for method, colour in COLOURS.items():
        # Both runs go on from the trunk's last point; the averages begin with their own first one.
        joint = [scores[-1:] if method in ("sgd", "iterate") else [] for scores in trunk]
        curves = [head + seed.curves[method] for head, seed in zip(joint, result.seeds, strict=True)]
        ends[method] = _draw_band(axes, curves, colour)
    axes.yaxis.set_major_locator(FixedLocator(ERROR_TICKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("epoch", fontsize=11.5, color=GREY)
    axes.set_xlim(0, result.settings.epochs)
    _mark_start(axes, result.settings.start_epoch)
    _label_ends(axes, ends)


def _draw_band(axes: Axes, curves: list[list[Score]], colour: str) -> float:
    """Draw one curve for all seeds; gives the height at which it ends."""
    columns = list(zip(*curves, strict=True))
    epochs = [column[0].epoch for column in columns]
    # An error of 0 has no place on a logarithmic axis: draw it at half a test image's share.
    errors = [[max(100 * (1 - score.accuracy), 0.04) for score in column] for column in columns]
    means = [statistics.mean(values) for values in errors]
    spreads = [statistics.pstdev(values) for values in errors]
    low = [max(mean - spread, 0.04) for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(epochs, means, color=colour, linewidth=2.4, marker="o" if len(epochs) == 1 else "")
    return means[-1]


def _mark_start(axes: Axes, epoch: int) -> None:
    axes.axvline(epoch, color=PALE, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate(
        "averaging\nstarts",
        (epoch, 1),
        (-6, -2),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=11,
        color=GREY,
    )


def _label_ends(axes: Axes, ends: dict[str, float]) -> None:
    """Name each curve at its right end, the names pushed apart where curves end close together."""
    bottom, top = (math.log(limit) for limit in axes.get_ylim())
    heights = {method: (math.log(end) - bottom) / (top - bottom) for method, end in ends.items()}
    place = -math.inf
    for method in sorted(heights, key=lambda name: heights[name]):
        two_lines = "\n" in SHORT[method]
        place = max(heights[method], place + LABEL_GAP * (1.4 if two_lines else 1))
        axes.annotate(
            SHORT[method],
            (1.02, place),
            xycoords="axes fraction",
            va="center",
            fontsize=12,
            fontweight="bold",
            color=COLOURS[method],
        )


def _draw_seeds(axes: Axes, result: DemoResult) -> None:
    """Final accuracies; a line joins those of one seed, a bar marks each mean."""
    _style(axes, "Final test accuracy, %")
    columns = [[100 * accuracy for accuracy in result.accuracies(method)] for method in COMPARED]
    places = range(len(columns))
    for one_seed in zip(*columns, strict=True):
        axes.plot(places, one_seed, color=PALE, linewidth=1, zorder=1)
    for place, method, values in zip(places, COMPARED, columns, strict=True):
        colour, mean = COLOURS[method], statistics.mean(values)
        axes.scatter([place] * len(values), values, s=70, color=colour, edgecolor="white", linewidth=1, zorder=3)
        axes.plot([place - 0.3, place + 0.3], [mean, mean], color=colour, linewidth=3, zorder=2)
    axes.set_xticks(places, [SHORT[method] for method in COMPARED], fontsize=12, fontweight="bold")
    for tick, method in zip(axes.get_xticklabels(), COMPARED, strict=True):
        tick.set_color(COLOURS[method])
    axes.set_xlim(-0.5, len(columns) - 0.5)


def _draw_plane(axes: Axes, plane: Plane) -> None:
    """Test loss as filled contours, with the three solutions that span the plane."""
    _style(axes, f"Test loss on the plane of the three, seed {plane.seed}")
    loss = F.interpolate(
        torch.tensor(plane.loss)[None, None], scale_factor=SMOOTHING, mode="bicubic", align_corners=True
    )[0, 0]
    # Levels that widen upwards: the floor of the valley is where the solutions differ.
    low, high = loss.min().item(), loss.max().item()
    levels = [low + (high - low) * (step / NUM_LEVELS) ** 3 for step in range(NUM_LEVELS + 1)]
    extent = (plane.x[0], plane.x[-1], plane.y[0], plane.y[-1])
    axes.contourf(loss.numpy(), levels=levels, extent=extent, cmap="YlGnBu_r", norm=BoundaryNorm(levels, 256))
    lines = axes.contour(loss.numpy(), levels=levels[3:-1:2], extent=extent, colors="white", linewidths=0.8, alpha=0.7)
    for text in axes.clabel(lines, fmt="%.2f", fontsize=10):
        text.set(color=INK, alpha=1)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    for method, (x, y) in plane.points.items():
        axes.scatter([x], [y], s=130, color=COLOURS[method], edgecolor="white", linewidth=2, zorder=3)
        label = axes.annotate(
            SHORT[method],
            (x, y),
            (10, 8),
            textcoords="offset points",
            color="white",
            fontsize=13,
            fontweight="bold",
        )
        label.set_path_effects([withStroke(linewidth=2.5, foreground=INK)])
    axes.set_aspect("equal")
    axes.set_xlabel("Euclidean distance over all weights", fontsize=11.5, color=GREY)
