"""The picture of a GPU run: per workload, the bytes a second of an update as a share of the same run's device copy."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.gpu.bars import kind_text
from bench.gpu.report import COPIES, COPY, OURS_PREFIX, GpuReport, GpuRow, share_of_copy, timed
from bench.plot import CEILING_COLOR, DPI, FAINT, GRID, INK, OURS_COLOR, WIDTH_IN, Keys
from bench.report import TORCH_CLASS, baseline
from bench.tables import milliseconds

SECOND_COLOR = "#66b2c4"
ROW_IN, HEAD_IN, FOOT_IN = 0.56, 0.62, 1.12
# Left of the axes stand the workloads, right of them the wall times; as parts of the width.
LEFT, RIGHT = 0.22, 0.80
# Within a row of height 1: our two bars, and the others on a line below them.
BARS_Y, BAR_HEIGHT, OTHERS_Y = (0.27, 0.0), 0.25, -0.29
# The end of the axis, whatever a cache made of a copy.
MOST_SHOWN = 1.4
# Our share stands in its bar from this length on, else right of it.
LABEL_INSIDE = 0.16


def plot(report: GpuReport, path: Path) -> bool:
    """Draw ``report`` into ``path``; False where it holds nothing to draw."""
    groups = [rows for rows in report.groups() if timed(rows, COPY) is not None and _ours(report, rows)]
    if not groups:
        return False
    height = len(groups) * ROW_IN + HEAD_IN + FOOT_IN
    figure = Figure(figsize=(WIDTH_IN, height), facecolor="white")
    FigureCanvasAgg(figure)
    box = (LEFT, FOOT_IN / height, RIGHT - LEFT, len(groups) * ROW_IN / height)
    highest = max(share for rows in groups for share in _shares(rows).values())
    limit = min(max(1.05, highest * 1.06), MOST_SHOWN)
    axes = figure.add_axes(box, xlim=(0, limit), ylim=(-0.5, len(groups) - 0.5))
    _dress(axes, report, [rows[0] for rows in reversed(groups)])
    keys = Keys()
    for y, rows in enumerate(reversed(groups)):
        _draw_row(axes, y, report, rows, keys)
    figure.legend(
        keys.handles.values(), keys.handles, loc="lower center", bbox_to_anchor=(0.5, 0.28 / height), ncols=4,
        frameon=False, fontsize=8, labelcolor=INK, handletextpad=0.5, columnspacing=1.5,
    )  # fmt: skip
    figure.text(0.985, 0.12 / height, _caption(report), fontsize=7.5, color=FAINT, ha="right")
    if report.dry:
        figure.text(
            0.5, 0.55, "DRY RUN ON A CPU\nno figure of a GPU", fontsize=44, color="#c92a2a", alpha=0.25, rotation=25,
            ha="center", va="center", zorder=10,
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return True


def _ours(report: GpuReport, rows: list[GpuRow]) -> list[GpuRow]:
    found = (timed(rows, f"{OURS_PREFIX}{backend}") for backend in report.backends)
    return [row for row in found if row is not None]


def _shares(rows: list[GpuRow]) -> dict[str, float]:
    """Give each timed provider's share of the device copy."""
    shares = {row.provider: share_of_copy(row, rows) for row in rows if row.provider not in COPIES}
    return {name: share for name, share in shares.items() if share is not None}


def _dress(axes: Axes, report: GpuReport, firsts: list[GpuRow]) -> None:
    what = "Bytes a second of an update, as a share of a device copy of as many bytes"
    axes.set_title(what, loc="left", fontsize=10, fontweight="bold", color=INK, pad=18)
    axes.text(
        1.015, 1.0, "wall time of an update", transform=axes.transAxes, fontsize=8, color=FAINT, va="bottom"
    )  # fmt: skip
    names = [row.title.replace(" tensors of ", " x ").split(", no embeddings")[0] for row in firsts]
    kinds = [kind_text(row.dtype, row.format, row.averages) for row in firsts]
    axes.set_yticks(range(len(firsts)), [f"{name}\n{kind}" for name, kind in zip(names, kinds, strict=True)])
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=INK)
    axes.tick_params(axis="x", length=0, labelsize=8, labelcolor=FAINT)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _draw_row(axes: Axes, y: float, report: GpuReport, rows: list[GpuRow], keys: Keys) -> None:
    shares = _shares(rows)
    for backend, at, color in zip(report.backends, BARS_Y, (OURS_COLOR, SECOND_COLOR), strict=True):
        name = f"{OURS_PREFIX}{backend}"
        if name in shares:
            bar = axes.barh(y + at, shares[name], height=BAR_HEIGHT, color=color, zorder=2)
            keys.handles.setdefault(name, bar)
            _label(axes, shares[name], y + at, color)
    line = axes.vlines(1, y - 0.2, y + 0.44, color=CEILING_COLOR, linewidth=2, zorder=4)
    keys.handles.setdefault("device copy (ceiling)", line)
    for name, share in shares.items():
        if not name.startswith(OURS_PREFIX):
            (marker,) = axes.plot(
                min(share, axes.get_xlim()[1]),
                y + OTHERS_Y,
                keys.marker(name),
                color=FAINT,
                mec="white",
                mew=0.6,
                ms=6.5,
            )
            keys.handles.setdefault(name + " (bf16: freezes)" * (name == TORCH_CLASS), marker)
    axes.text(1.015, y + 0.02, _times(report, rows), transform=axes.get_yaxis_transform(), va="center", fontsize=8,
              color=INK, linespacing=1.35)  # fmt: skip


def _label(axes: Axes, share: float, at: float, color: str) -> None:
    inside = share > LABEL_INSIDE
    axes.annotate(
        f"{share:.1%}" if share < 0.1 else f"{share:.0%}", (min(share, 1) if inside else share, at),
        xytext=(-6 if inside else 6, -0.5), textcoords="offset points", ha="right" if inside else "left", va="center",
        fontsize=8, fontweight="bold", color="white" if inside else color, zorder=5,
    )  # fmt: skip


def _times(report: GpuReport, rows: list[GpuRow]) -> str:
    """Give our wall times, the preferred backend's first, and what they stand against."""
    ours = " / ".join(milliseconds(row.seconds) for row in _ours(report, rows) if row.samples)
    today = baseline(rows)
    return f"{ours} ms" + (f"\ninstead of {milliseconds(today.seconds)}" if today is not None else "")


def _caption(report: GpuReport) -> str:
    about = report.environment
    versions = about.get("versions", {})
    driver = f"driver {about['driver']}, " if about.get("driver") else ""
    return (
        f"{about.get('gpu') or about.get('device_name')}, {driver}torch {versions.get('torch')}, "
        f"Triton {versions.get('triton')}, medians of one run, {str(about.get('date'))[:10]}"
    )
