"""How figures are written, and the tables, in Markdown: a run prints those that it puts into README and docs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from bench import files, names
from bench.lookup import baseline, by_format, find, grouped, our_row, share_of_copy
from bench.report import FileRow, Report, Row, StepRow, count_text

# Columns of a page: its captions are wrapped before.
WIDTH = 118
# Share of all cores' time taken by others, from which a caption warns: an idle machine has measured under 0.02.
DISTURBED = 0.05
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# The rows of README's table, by workload and dtype.
TELLING = (
    ("resnet50", "bfloat16"), ("gpt2_medium", "float32"), ("gpt2_medium", "bfloat16"), ("llama3_8b", "bfloat16"),
    ("2000x64x64", "float32"), ("3000x64", "float32"),
)  # fmt: skip


# Figures


def milliseconds(seconds: float) -> str:
    """Write a time with three significant figures."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def percent(part: float | None) -> str:
    """Write a share with two significant figures."""
    return "" if part is None else f"{part:.0%}" if part >= 0.1 else f"{part:.1%}"


def kind_text(dtype: str, format: str, averages: int = 1) -> str:
    """Write the dtype of params and the format of averages."""
    into = "" if format == dtype else f" to {SHORT_DTYPES[format]}" if format in SHORT_DTYPES else f" {format}"
    return f"{SHORT_DTYPES[dtype]}{into}" + (f" x{averages}" if averages > 1 else "")


def row_kind_text(row: Row) -> str:
    """Write the kind of a row of a GPU run: is it an update of averages with a spread, or a draw?"""
    work = next((work for work in names.SPREADS if row.group.endswith(work)), "")
    return f"{kind_text(row.dtype, row.format, row.averages)}{work}"


def _ms(row: Row | None) -> str:
    return "" if row is None or row.wall is None else milliseconds(row.seconds)


def _name(row: Row) -> str:
    kind = "bf16, `exact`" if row.dtype == "bfloat16" else SHORT_DTYPES[row.dtype]
    return f"{row.title.replace(', no embeddings', '')}, {kind}"


def disturbance(rows: Iterable[Row | StepRow | FileRow]) -> str:
    """Return a sentence where other processes took a share of the CPU that matters."""
    others = max((row.others_cpu or 0.0 for row in rows), default=0.0)
    return f"Other processes took up to {others:.0%} of the CPU meanwhile." if others > DISTURBED else ""


def origin(report: Report, *, threads: str = "") -> str:
    about = report.environment
    return (
        f"`{about['command']}` on {about['device_name']}, {threads or count_text(about['threads'], 'thread')}, "
        f"torch {about['versions'].get('torch')}, {about['date'][:10]}"
    )


def markdown(header: str, rows: Iterable[Sequence[str]], *captions: str, texts: int = 1) -> str:
    """Return a table whose first ``texts`` columns are text, and its captions, wrapped."""
    columns = header.split(" | ")
    rule = "|" + "|".join("---" if at < texts else "---:" for at in range(len(columns))) + "|"
    lines = [f"| {header} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]
    wrapped = (textwrap.fill(caption, WIDTH, break_on_hyphens=False) for caption in captions if caption)
    return "\n".join([*lines, "", "\n\n".join(wrapped)])


# Tables of pages


def _compared(report: Report) -> Iterator[tuple[list[Row], Row, Row]]:
    """Yield each workload's rows, torch's best and ours."""
    for rows in grouped(report.of_group(names.UPDATES)):
        best, ours = baseline(rows), our_row(rows)
        if best is not None and ours is not None:
            yield rows, best, ours


def short_block(report: Report) -> str:
    """Return README's table: torch's class as it comes, torch's best way, and ours, on a few workloads."""
    lines = {
        ours.key[:2]: (
            _name(ours), _ms(find(rows, names.TORCH_CLASS)), _ms(best), _ms(ours), f"{best.seconds / ours.seconds:.1f}x"
        )
        for rows, best, ours in _compared(report)
    }  # fmt: skip
    best = (
        "Torch's best way: fp32, the class with `multi_avg_fn=get_ema_multi_avg_fn(...)`; bf16, where the class "
        "freezes, the faster of two hand-written loops that keep a float32 average."
    )
    return markdown(
        "update of | torch's class, default, ms | torch's best way, ms | swafast, ms | against the best",
        [lines[key] for key in TELLING if key in lines],
        f"{best} Medians, {origin(report)}.",
    )


def full_block(report: Report) -> str:
    """Return the table of every workload."""
    rows = []
    for group, best, ours in _compared(report):
        flat, against = find(group, names.FLAT_LERP), f"{best.seconds / ours.seconds:.1f}x"
        shown = find(group, names.TORCH_CLASS), best, find(group, names.FOREACH), ours
        rows.append(
            (_name(ours), *map(_ms, shown), against, percent(None if flat is None else flat.seconds / ours.seconds))
        )
    return markdown(
        "update of | torch's class | torch's best way | `_foreach_lerp_` | swafast | against the best "
        "| of one flat `lerp_`",
        rows,
        f"Milliseconds: medians of one run of {origin(report)}.",
        "*torch's class*: `torch.optim.swa_utils.AveragedModel` as it comes; its bf16 average freezes. *torch's best "
        "way*: for fp32 the class with `multi_avg_fn=get_ema_multi_avg_fn(...)`; for bf16 the faster of the two loops "
        "that keep a float32 average, `mul_().add_()` and `lerp_(p.float())`. *`_foreach_lerp_`*: alone over lists, "
        "with nothing checked. *against the best*: how many times as fast swafast is as torch's best way. *of one "
        "flat `lerp_`*: the share of the speed of one `lerp_` over the same bytes in a single tensor.",
    )


def passes_block(report: Report, group: str) -> str:
    """Return the table of our own passes beside the first of each model."""
    lines = []
    for rows in grouped(report.of_group(group)):
        base = find(rows, rows[0].provider)
        for row in rows:
            if row.wall is None or base is None:
                continue
            kept = "" if row.held_bytes is None else f"{row.held_bytes / row.num_params:.2f}".removesuffix(".00")
            over = row.seconds / base.seconds, row.counted_bytes / base.counted_bytes
            moved = f"{row.counted_bytes / row.num_params:g}"
            name = f"{row.title}, {SHORT_DTYPES[row.dtype]}"
            lines.append((name, row.provider, _ms(row), kept, moved, *(f"{ratio:.2f}x" for ratio in over)))
    return markdown(
        "update of | pass | ms | bytes kept a parameter | bytes moved | time | bytes",
        lines,
        f"Medians of one run of {origin(report)}; all passes over one model interleaved. *time*, *bytes*: over "
        f"those of the first line of the same model. {disturbance(report.of_group(group))}".strip(),
        texts=2,
    )


def sharded_block(report: Report) -> str:
    groups = grouped(report.rows)
    return markdown(
        "on 2 gloo ranks of one machine | by | ms",
        [(row.title if row is rows[0] else "", row.provider, _ms(row)) for rows in groups for row in rows],
        f"Medians of the slower rank in one run of {origin(report, threads='one thread a rank')}.",
        "*AveragedModel* is torch's class over the bare DTensors, since it cannot copy an FSDP model; *SWA fn*: with "
        "`multi_avg_fn=get_swa_multi_avg_fn()`.",
        texts=2,
    )


def loop_block(report: Report) -> str:
    """Return the table of what an average adds to a training step."""
    rows, last = [], ""
    for row in report.steps:
        name = f"{row.work}, {row.num_params / 1e6:.3g}M parameters" if row.work != last else ""
        added, last = ("", "", ""), row.work
        if row.exposed is not None and row.share is not None:
            spread = f"{milliseconds(row.exposed.low)} to {milliseconds(row.exposed.high)}"
            added = milliseconds(row.exposed.median), spread, f"{row.share.median:.1%}"
        rows.append((name, row.way, milliseconds(row.step.median), *added))
    counts = " and ".join(str(count) for count in dict.fromkeys(row.step.count for row in report.steps))
    off = count_text(report.differing, "element") if report.differing else "no element"
    return markdown(
        "training | averaged by | ms a step | exposed, ms | quartiles | of a step",
        rows,
        f"Medians of one run of {origin(report)}; {counts} samples of each way, all in turn, with an update after "
        "every step.",
        "*exposed*: a step less the one without averaging in the same round, median and quartiles. Averages with "
        f"overlap and offload differ from the plain ones in {off}, after 5 steps of a training that all follow.",
        "On a CPU an update beside the next step takes that step's cores and memory traffic, so overlap gains little "
        "or costs. Rows whose quartiles overlap are not told apart by this run, and what a second training without "
        f"averaging seems to add is noise. {disturbance(report.steps)}".strip(),
        texts=2,
    )


def files_block(report: Report) -> str:
    """Return the table of the ways to average checkpoints in files, with what ours takes of each."""
    lines, ours = [], {row.dtype: row for row in report.files if row.way == files.OURS and row.rounds}
    for row in report.files:
        name = f"{row.num_inputs} x {row.nbytes / 1e6:.0f} MB, {SHORT_DTYPES[row.dtype]}"
        if not row.rounds:
            lines.append((name, row.way, row.status, "", "", ""))
            continue
        base = ours.get(row.dtype)
        times = f"{row.cpu_s / base.cpu_s:.1f}x" if base is not None and row.way != files.LIMIT else ""
        figures = f"{row.cpu_s:.2f}", times, f"{row.wall_s:.2f}", f"{row.peak_bytes / 1e6:.0f}"
        lines.append((name, f"`{row.way}`" if row is base else row.way, *figures))
    count = max((row.rounds for row in report.files), default=0)
    return markdown(
        "inputs | averaged by | CPU s | of ours | s | peak MB",
        lines,
        f"The best of {count} interleaved rounds in one run of {origin(report)}; the peak is VmHWM of the process. "
        f"{disturbance(report.files)}".strip(),
        f"*{files.LIMIT}* averages nothing: it reads all inputs, writes as much as one, and waits for the disk.",
        texts=2,
    )


def swag_block(report: Report) -> str:
    """Return the table of collects and samples of SWAG, with what ours takes of each."""
    lines = []
    for rows in grouped(report.rows):
        ours = find(rows, names.OURS)
        for row in rows:
            times = "" if ours is None or ours.wall is None or row is ours else f"{row.seconds / ours.seconds:.2g}x"
            call = row.group.removeprefix("swag ") if row is rows[0] else ""
            lines.append((call, row.provider, _ms(row), times))
    row = report.rows[0]
    return markdown(
        f"{row.title}, {row.num_params / 1e6:.3g}M float32 | by | ms | of ours",
        lines,
        f"Medians of one run of {origin(report)}; all ways interleaved. *the authors' algorithm*: as swa_gaussian does "
        "it, which concatenates all deviations in each collect and in each sample. *torch foreach*: this package's "
        "formulas, with all memory allocated beforehand, by `torch._foreach_*`. *no deviations*: the update of the "
        f"mean alone, with half of the bytes. {disturbance(report.rows)}".strip(),
        texts=2,
    )


# Tables of a terminal alone


def providers_table(rows: list[Row]) -> str:
    """Return one workload's providers, the fastest first, those without a time last."""
    torch_class, lines = find(rows, names.TORCH_CLASS), []
    for row in sorted(rows, key=lambda row: row.seconds if row.wall else float("inf")):
        if row.wall is None:
            lines.append((row.provider, "", "", "", "", f"{row.status}: {row.reason}"))
            continue
        against = "" if torch_class is None else f"{torch_class.seconds / row.seconds:.2f}x"
        kept = "" if row.held_bytes is None else f"{row.held_bytes / row.num_params:.2f}"
        lines.append((row.provider, _ms(row), f"{row.bytes_per_s / 1e9:.3g}", against, kept, row.note))
    first = rows[0]
    title = f"{first.title}, {SHORT_DTYPES[first.dtype]}"
    header = f"{title} | ms | GB/s | vs torch's class | keeps bytes a parameter | note"
    what = (
        f"{first.num_params / 1e6:,.1f}M parameters in {count_text(first.num_tensors, 'tensor')}. {disturbance(rows)}"
    )
    return markdown(header, lines, what.strip())


def gpu_table(report: Report) -> str:
    """Return one line for each workload of a GPU run: shares of the device copy, then wall times."""
    backends = names.OUR_BACKENDS["cpu" if report.dry else "cuda"]
    lines = []
    for rows in by_format(row for row in report.rows if not row.group.endswith(names.SWEPT)):
        copy = find(rows, names.COPY)
        shown = [*(find(rows, f"{names.OURS} {name}") for name in backends), baseline(rows), find(rows, names.FOREACH)]
        name = f"{rows[0].title.replace(', no embeddings', '')}, "
        name += row_kind_text(rows[0])
        rate = "" if copy is None else f"{copy.bytes_per_s / 1e12:.2f}"
        lines.append((name, rate, *(percent(share_of_copy(row, rows)) for row in shown), *map(_ms, shown)))
    shown_names = [*backends, "best", "foreach"]
    header = ["workload", "copy TB/s", *shown_names, *(f"{name} ms" for name in shown_names)]
    what = (
        "Share of the device copy's bytes a second, and wall time of an update; best: torch's best way. Collect: an "
        "update with 20 deviations; draw: a sample of these."
    )
    return markdown(" | ".join(header), lines, what)


def swept_table(report: Report) -> str:
    """Return one line for each grid and size of chunks that a GPU run has tried; nothing if it tried none."""
    lines = []
    for rows in grouped(row for row in report.rows if row.group.endswith(names.SWEPT)):
        own = next((row for row in rows if row.is_ours), None)
        for row in rows:
            if row.is_ours and row.device is not None:
                over = "" if own is None or own.device is None else f"{row.device.median / own.device.median:.2f}x"
                share = percent(share_of_copy(row, rows))
                name = f"{row.title}, {SHORT_DTYPES[row.dtype]}"
                lines.append(
                    (name, row.provider.partition(", ")[2] or "as it is", milliseconds(row.device.median), share, over)
                )
    count = report.environment.get("multiprocessors")
    what = (
        "Time on the device, share of the device copy's bytes a second, and time over that of the backend's own grid "
        "and chunks. A block of 1024 threads takes a whole multiprocessor" + (f", of {count}." if count else ".")
    )
    header = "update of | grid or chunks | ms | of copy | time"
    return markdown(header, lines, what, texts=2) if lines else ""
