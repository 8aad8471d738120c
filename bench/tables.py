"""The tables that a run prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from bench.numbers import bars
from bench.report import ALL_OURS, FLAT_LERP, TORCH_CLASS, Report, Row, TrainingRow, find, time_over_bytes

if TYPE_CHECKING:
    from bench.accuracy import AccuracyReport

# Share of all cores' time taken by others, from which a table warns: an idle machine has measured under 0.02.
DISTURBED = 0.05


def milliseconds(seconds: float) -> str:
    """Write a time with three figures that matter."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def percent(part: float) -> str:
    """Write a share with two figures that matter."""
    return f"{part:.0%}" if part >= 0.1 else f"{part:.1%}"


def size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "?"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"


def workload_table(rows: list[Row]) -> Table:
    """Lay out the rows of one workload and dtype, fastest first, those without a time last."""
    first = rows[0]
    title = f"{first.title}, {first.dtype} params: {first.num_params / 1e6:,.1f}M in {first.num_tensors} tensors"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("provider")
    for column in ("ms", "GB/s", "of flat lerp_", "vs torch's class", "allocates", "keeps B/param"):
        table.add_column(column, justify="right")
    table.add_column("note")
    flat, torch_class = find(rows, FLAT_LERP), find(rows, TORCH_CLASS)
    for row in sorted((row for row in rows if row.samples), key=lambda row: row.seconds):
        table.add_row(
            row.provider,
            milliseconds(row.seconds),
            f"{row.gb_per_s:.3g}",
            "" if flat is None else percent(flat.seconds / row.seconds),
            "" if torch_class is None else f"{torch_class.seconds / row.seconds:.2f}x",
            "" if row.provider == FLAT_LERP else size(row.peak_bytes),
            "" if row.held_bytes is None else f"{row.held_bytes / row.num_params:.2f}",
            row.note,
            style="bold green" if row.provider in ALL_OURS else None,
        )
    others = max((row.others_cpu or 0.0 for row in rows), default=0.0)
    if others > DISTURBED:
        _warn(table, others)
    for row in rows:
        if not row.samples:
            table.add_row(row.provider, *[""] * 6, f"{row.status}: {row.reason}", style="red" if row.wrong else "dim")
    return table


def passes_table(rows: list[Row]) -> Table:
    """Lay out our own passes of one workload and dtype beside the first of them, by time and by bytes."""
    first = rows[0]
    table = Table(title=f"{first.title}, {first.dtype} params: our own passes", title_justify="left")
    table.caption_justify = "left"
    table.add_column("pass")
    for column in ("ms", "GB/s", "keeps B/param", "moves B/param", "time", "bytes", "time / bytes"):
        table.add_column(column, justify="right")
    base = find(rows, first.provider)
    for row in rows:
        if not row.samples or base is None:
            table.add_row(row.provider, f"{row.status}: {row.reason}", style="red" if row.wrong else "dim")
            continue
        table.add_row(row.provider, milliseconds(row.seconds), f"{row.gb_per_s:.3g}", *pass_figures(row, base))
    others = max((row.others_cpu or 0.0 for row in rows), default=0.0)
    if others > DISTURBED:
        _warn(table, others)
    return table


def pass_figures(row: Row, base: Row) -> tuple[str, str, str, str, str]:
    """Write the bytes a pass keeps and moves for each param, its time and bytes over ``base``'s, and their ratio."""
    return (
        "" if row.held_bytes is None else f"{row.held_bytes / row.num_params:.2f}".removesuffix(".00"),
        f"{row.counted_bytes / row.num_params:g}",
        f"{row.seconds / base.seconds:.2f}x",
        f"{row.counted_bytes / base.counted_bytes:.2f}x",
        f"{time_over_bytes(row, base):.2f}",
    )


def accuracy_table(report: AccuracyReport) -> Table:
    """Lay out the errors after the last update: of each format by stream and rule."""
    table = Table(title=f"Relative L2 error after {report.updates[-1]:,} updates", title_justify="left")
    kinds = list(dict.fromkeys(curve.format for curve in report.curves))
    for column in ("stream", "rule", *kinds):
        table.add_column(column, justify="right" if column in kinds else "left")
    for stream, rule in dict.fromkeys((curve.stream, curve.rule) for curve in report.curves):
        table.add_row(stream, rule, *(f"{report.errors(stream, rule, kind)[-1]:.1e}" for kind in kinds))
    return table


def _warn(table: Table, others: float) -> None:
    table.caption = f"Other processes took {others:.0%} of the CPU meanwhile: kernels on all cores waited for them."
    table.caption_style = "bold yellow"


def training_table(rows: list[TrainingRow]) -> Table:
    table = Table(title="Averaging as a share of training time", title_justify="left")
    for column in ("model", "setting", "class", "update every"):
        table.add_column(column)
    for column in ("ms per step", "ms per update", "share"):
        table.add_column(column, justify="right")
    for row in rows:
        every = "step" if row.every == 1 else f"{row.every} steps"
        figures = milliseconds(row.step_ms / 1e3), milliseconds(row.update_ms / 1e3), f"{row.share:.2%}"
        model = f"{row.model}, {row.num_params / 1e6:.1f}M"
        style = "bold green" if row.provider in ALL_OURS else None
        table.add_row(model, row.setting, row.provider, every, *figures, style=style)
    return table


def numbers_table(report: Report) -> Table:
    """Lay out the bars that the run measured something for."""
    table = Table(title="Numbers", title_justify="left", caption_justify="left")
    measured = (*report.rows, *report.formats, *report.several)
    others = max((row.others_cpu or 0.0 for row in measured), default=0.0)
    if others > DISTURBED:
        _warn(table, others)
    for column in ("bar", "required", "measured", ""):
        table.add_column(column)
    for bar in bars(report):
        style = None if bar.met else "bold red"
        table.add_row(bar.work, bar.required_text, bar.measured_text, "ok" if bar.met else "short", style=style)
    return table
