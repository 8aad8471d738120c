"""The tables that a GPU run prints, for a terminal of 110 columns and for the end of a log."""

from __future__ import annotations

from rich.table import Table

from bench.gpu.bars import bars, kind_text
from bench.gpu.report import COPY, OURS_PREFIX, GpuReport, GpuRow, share_of_copy, timed
from bench.providers import Foreach
from bench.report import baseline
from bench.tables import milliseconds, percent


def _plain(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")


def workloads_table(report: GpuReport) -> Table:
    """Lay out one line for each workload: shares of the device copy, then wall times."""
    short = [backend[:6] for backend in report.backends]
    table = _plain("Share of the device copy's bytes a second, and wall time of an update")
    table.add_column("workload", no_wrap=True, max_width=30)
    table.add_column("params", no_wrap=True)
    for column in ("copy TB/s", *short, "today", "foreach", *(f"{name} ms" for name in short), "today", "foreach"):
        table.add_column(column, justify="right", no_wrap=True)
    for rows in report.groups():
        copy, today = timed(rows, COPY), baseline(rows)
        shown = [*(timed(rows, f"{OURS_PREFIX}{name}") for name in report.backends), today, timed(rows, Foreach.name)]
        table.add_row(
            rows[0].title.replace(", no embeddings", ""),
            kind_text(rows[0].dtype, rows[0].format, rows[0].averages),
            "" if copy is None else f"{copy.device_bytes_per_s / 1e12:.2f}",
            *(_share(row, rows) for row in shown),
            *("" if row is None or not row.samples else milliseconds(row.seconds) for row in shown),
        )
    return table


def _share(row: GpuRow | None, rows: list[GpuRow]) -> str:
    share = None if row is None else share_of_copy(row, rows)
    return "" if share is None else percent(share)


def bars_table(report: GpuReport) -> Table:
    """Lay out every bar and whether each of our backends meets it; a dry run's are no verdicts."""
    table = _plain("DRY RUN: these are not GPU figures" if report.dry else "Bars")
    table.add_column("bar", no_wrap=True, max_width=60)
    table.add_column("required", no_wrap=True)
    for backend in report.backends:
        table.add_column(backend, justify="right", no_wrap=True)
        table.add_column("")
    for each in bars(report):
        cells, styles = [], set()
        for backend in report.backends:
            bar = each.bar(backend)
            verdict = "?" if bar is None else "dry" if report.dry else "ok" if bar.met else "SHORT"
            cells += ["not measured" if bar is None else bar.measured_text, verdict]
            styles.add(verdict)
        table.add_row(each.work, each.required_text, *cells, style="bold red" if "SHORT" in styles else None)
    return table
