"""How figures are written, and the tables that a run prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from bench import names
from bench.lookup import baseline, find, grouped, time_over_bytes
from bench.report import Report, Row, StepRow, Times

# Share of all cores' time taken by others, from which a table warns: an idle machine has measured under 0.02.
DISTURBED = 0.05
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
STEP_CAPTION = (
    "On a CPU an update beside the next step takes that step's cores and memory traffic, so overlap gains little or "
    "costs. Rows whose quartiles overlap are not told apart by this run, and what a second training without averaging "
    "seems to add is noise."
)


def milliseconds(seconds: float) -> str:
    """Write a time with three significant figures."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def percent(part: float) -> str:
    """Write a share with two significant figures."""
    return f"{part:.0%}" if part >= 0.1 else f"{part:.1%}"


def size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "?"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"


def kind_text(dtype: str, format: str, averages: int = 1) -> str:
    """Write the dtype of params and the format of averages."""
    into = "" if format == dtype else f" to {SHORT_DTYPES[format]}" if format in SHORT_DTYPES else f" {format}"
    return f"{SHORT_DTYPES[dtype]}{into}" + (f" x{averages}" if averages > 1 else "")


def disturbance(others: float) -> str:
    """Return a sentence where other processes took a share of the CPU that matters."""
    return f"Other processes took up to {others:.0%} of the CPU meanwhile." if others > DISTURBED else ""


def make_table(
    title: str, texts: Sequence[str], figures: Sequence[str], note: str = "", *, plain: bool = False
) -> Table:
    """Return a table with left-aligned ``texts``, then right-aligned ``figures``, then perhaps a note."""
    looks = {"box": None, "padding": (0, 1, 0, 0), "header_style": "bold"} if plain else {}
    table = Table(title=title, title_justify="left", caption_justify="left", **looks)  # type: ignore[arg-type]
    for column in texts:
        table.add_column(column, no_wrap=plain)
    for column in figures:
        table.add_column(column, justify="right", no_wrap=plain)
    if note:
        table.add_column(note)
    return table


def warn(table: Table, rows: Iterable[Row | StepRow]) -> Table:
    text = disturbance(max((row.others_cpu or 0.0 for row in rows), default=0.0))
    if text:
        table.caption, table.caption_style = f"{table.caption or ''} {text}".strip(), "bold yellow"
    return table


def workload_table(rows: list[Row]) -> Table:
    """Lay out the rows of one workload and dtype, fastest first, those without a time last."""
    first = rows[0]
    title = f"{first.title}, {first.dtype} params: {first.num_params / 1e6:,.1f}M in {first.num_tensors} tensors"
    figures = ("ms", "GB/s", "of flat lerp_", "vs torch's class", "allocates", "keeps B/param")
    table = make_table(title, ("provider",), figures, "note")
    flat, torch_class = find(rows, names.FLAT_LERP), find(rows, names.TORCH_CLASS)
    for row in sorted((row for row in rows if row.wall), key=lambda row: row.seconds):
        table.add_row(
            row.provider,
            milliseconds(row.seconds),
            f"{row.bytes_per_s / 1e9:.3g}",
            "" if flat is None else percent(flat.seconds / row.seconds),
            "" if torch_class is None else f"{torch_class.seconds / row.seconds:.2f}x",
            "" if row.provider == names.FLAT_LERP else size(row.peak_bytes),
            "" if row.held_bytes is None else f"{row.held_bytes / row.num_params:.2f}",
            row.note,
            style="bold green" if row.provider in names.ALL_OURS else None,
        )
    for row in rows:
        if not row.wall:
            table.add_row(row.provider, *[""] * 6, f"{row.status}: {row.reason}", style="red" if row.wrong else "dim")
    return warn(table, rows)


def passes_table(rows: list[Row]) -> Table:
    """Lay out our own passes of one workload and dtype beside the first of them, by time and by bytes."""
    first = rows[0]
    figures = ("ms", "GB/s", "keeps B/param", "moves B/param", "time", "bytes", "time / bytes")
    table = make_table(f"{first.title}, {first.dtype} params: our own passes", ("pass",), figures)
    base = find(rows, first.provider)
    for row in rows:
        if not row.wall or base is None:
            table.add_row(row.provider, f"{row.status}: {row.reason}", style="red" if row.wrong else "dim")
            continue
        figures_of = pass_figures(row, base)
        table.add_row(row.provider, milliseconds(row.seconds), f"{row.bytes_per_s / 1e9:.3g}", *figures_of)
    return warn(table, rows)


def pass_figures(row: Row, base: Row) -> tuple[str, str, str, str, str]:
    """Write the bytes a pass keeps and moves for each param, its time and bytes over ``base``'s, and their ratio."""
    return (
        "" if row.held_bytes is None else f"{row.held_bytes / row.num_params:.2f}".removesuffix(".00"),
        f"{row.counted_bytes / row.num_params:g}",
        f"{row.seconds / base.seconds:.2f}x",
        f"{row.counted_bytes / base.counted_bytes:.2f}x",
        f"{time_over_bytes(row, base):.2f}",
    )


def accuracy_table(report: Report) -> Table:
    """Lay out the errors after the last update: of each format by stream and rule."""
    kinds = list(dict.fromkeys(curve.format for curve in report.curves))
    table = make_table(f"Relative L2 error after {report.updates[-1]:,} updates", ("stream", "rule"), kinds)
    last = {(curve.stream, curve.rule, curve.format): curve.errors[-1] for curve in report.curves}
    for stream, rule in dict.fromkeys((curve.stream, curve.rule) for curve in report.curves):
        table.add_row(stream, rule, *(f"{last[stream, rule, kind]:.1e}" for kind in kinds))
    return table


def training_table(report: Report) -> Table:
    texts, figures = ("model", "setting", "class", "update every"), ("ms per step", "ms per update", "share")
    table = make_table("Averaging as a share of training time", texts, figures)
    for row in report.training:
        every = "step" if row.every == 1 else f"{row.every} steps"
        times = milliseconds(row.step.median), milliseconds(row.update.median), f"{row.share.median:.2%}"
        style = "bold green" if row.provider in names.ALL_OURS else None
        model = f"{row.model}, {row.num_params / 1e6:.1f}M"
        table.add_row(model, row.setting, row.provider, every, *times, style=style)
    return table


def step_cells(row: StepRow) -> tuple[str, str, str, str]:
    """Write a step's ms, what an average adds to it in ms, the quartiles of that, and its share of a step."""
    if row.exposed is None or row.share is None:
        return milliseconds(row.step.median), "", "", ""
    spread = f"{milliseconds(row.exposed.low)} to {milliseconds(row.exposed.high)}"
    return milliseconds(row.step.median), milliseconds(row.exposed.median), spread, f"{row.share.median:.1%}"


def steps_table(report: Report) -> Table:
    texts, figures = ("training", "averaged by"), ("ms a step", "exposed, ms", "quartiles", "of a step", "elements off")
    table = make_table("What an average adds to a training step", texts, figures)
    table.caption, last = STEP_CAPTION, ""
    for row in report.steps:
        name = f"{row.work}, {row.num_params / 1e6:.3g}M" if row.work != last else ""
        off, ours = "" if row.differing is None else str(row.differing), row.way.startswith(names.OURS)
        table.add_row(name, row.way, *step_cells(row), off, style="bold green" if ours else None)
        last = row.work
    return warn(table, report.steps)


def sharded_table(report: Report) -> Table:
    table = make_table("On 2 gloo ranks, the slower one of each sample", ("work", "by"), ("ms", "quartiles"))
    for rows in grouped(report.rows):
        for row in rows:
            spread = "" if row.wall is None else quartiles(row.wall)
            table.add_row(row.title if row is rows[0] else "", row.provider, milliseconds(row.seconds), spread)
    return table


def quartiles(times: Times) -> str:
    return f"{milliseconds(times.low)} to {milliseconds(times.high)}"


# Of a GPU run, for a terminal of 110 columns and for the end of a log


def by_format(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the groups of a GPU run, those of one dtype and format beside each other."""
    groups = grouped(rows)
    kinds = list(dict.fromkeys(rows[0].key[1:] for rows in groups))
    return sorted(groups, key=lambda rows: kinds.index(rows[0].key[1:]))


def share_of_copy(row: Row | None, rows: Iterable[Row]) -> float | None:
    """Return the bytes a second of an update as a part of the same run's device copy of as many bytes."""
    copy = find(rows, names.COPY)
    return row.bytes_per_s / copy.bytes_per_s if row is not None and row.device and copy is not None else None


def gpu_table(report: Report) -> Table:
    """Lay out one line for each workload: shares of the device copy, then wall times."""
    backends = names.OUR_BACKENDS["cpu" if report.dry else "cuda"]
    short = [backend[:6] for backend in backends]
    figures = ("copy TB/s", *short, "best", "foreach", *(f"{name} ms" for name in short), "best", "foreach")
    title = "Share of the device copy's bytes a second, and wall time of an update; best: torch's best way"
    table = make_table(title, ("workload", "params"), figures, plain=True)
    for rows in by_format(report.rows):
        copy = find(rows, names.COPY)
        shown = [*(find(rows, f"{names.OURS} {name}") for name in backends), baseline(rows), find(rows, names.FOREACH)]
        shares = (share_of_copy(row, rows) for row in shown)
        table.add_row(
            rows[0].title.replace(", no embeddings", "")[:30],
            kind_text(rows[0].dtype, rows[0].format, rows[0].averages),
            "" if copy is None else f"{copy.bytes_per_s / 1e12:.2f}",
            *("" if share is None else percent(share) for share in shares),
            *("" if row is None or row.wall is None else milliseconds(row.seconds) for row in shown),
        )
    return table
