"""The table of the README, made from a report and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import FLAT_LERP, TORCH_EMA, Report, Row, baseline, find, grouped, our_row
from bench.tables import DISTURBED, milliseconds, pass_figures, percent

if TYPE_CHECKING:
    from bench import loop, sharded

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SHARDED_BEGIN, SHARDED_END = "<!-- sharded:begin -->", "<!-- sharded:end -->"
LOOP_BEGIN, LOOP_END = "<!-- loop:begin -->", "<!-- loop:end -->"
LOOP_PAGE = Path("docs/loop.md")

# The pages of which a report fills a table, and the report's part that it is of.
PASSES = {"formats": Path("docs/formats.md"), "several": Path("docs/averages.md")}


def readme_table(report: dict[str, Any]) -> str:
    """Give the block between the markers, as markdown, from a report as its JSON has it."""
    read = Report.from_dict(report)
    about = read.environment
    lines = [
        "| update of | today, ms | its EMA function, ms | swafast, ms | faster | of one flat `lerp_` |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for rows in read.groups():
        today, ours, flat = baseline(rows), our_row(rows), find(rows, FLAT_LERP)
        if today is None or ours is None or flat is None:
            continue
        ema = find(rows, TORCH_EMA)
        dtype = "fp32" if ours.dtype == "float32" else "bf16, `exact`"
        lines.append(
            f"| {ours.title}, {dtype} | {milliseconds(today.seconds)} | {milliseconds(ema.seconds) if ema else ''} "
            f"| {milliseconds(ours.seconds)} "
            f"| {today.seconds / ours.seconds:.1f}x | {percent(flat.seconds / ours.seconds)} |"
        )
    versions = about["versions"]
    lines += [
        "",
        f"Medians of one run of `{about['command']}` on {about['device_name']}, {about['threads']} threads, "
        f"torch {versions.get('torch')}, {about['date'][:10]}. "
        "*today*: `torch.optim.swa_utils.AveragedModel` for fp32; for bf16, where its average freezes, the faster of "
        "the two loops that keep a float32 average, `mul_().add_()` and `lerp_(p.float())`. *its EMA function*: that "
        "class with `multi_avg_fn=get_ema_multi_avg_fn(...)`. *faster*: over *today*. *of one flat `lerp_`*: the share "
        "of the speed of one `lerp_` over the same bytes in a single tensor.",
    ]
    return "\n".join(lines)


def sharded_table(report: sharded.Report) -> str:
    """Give the block of the sharded report: each work's times by contestant."""
    lines = ["| on 2 gloo ranks of one machine | ms per update |", "|---|---|"]
    for workload in dict.fromkeys(row.workload for row in report.timed):
        rows = [row for row in report.timed if row.workload == workload]
        times = ", ".join(f"{row.contestant} {milliseconds(row.seconds)}" for row in rows)
        lines.append(f"| {workload} | {times} |")
    about = report.environment
    lines += [
        "",
        f"Medians of the slower rank in one run of `{about['command']}` on {about['device_name']}, one thread a rank, "
        f"torch {about['versions'].get('torch')}, {about['date'][:10]}. *AveragedModel* is torch's class over the bare "
        "DTensors, since it cannot copy an FSDP model; *SWA fn*: with `multi_avg_fn=get_swa_multi_avg_fn()`.",
    ]
    return "\n".join(lines)


def loop_block(report: loop.Report) -> str:
    """Give the block of the loop report: of each training, its step and what each way adds to it."""
    from bench.loop import CAPTION, COMPARED_STEPS, cells

    lines = [
        "| training | averaged by | ms a step | exposed, ms | quartiles | of a step |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for work, rows in report.works().items():
        name = f"{work}, {rows[0].num_params / 1e6:.3g}M parameters"
        lines += [f"| {name} | {row.way} | {' | '.join(cells(row, rows[0]))} |" for row in rows]
    about = report.environment
    compared = f"{report.differing} elements" if report.differing else "no element"
    lines += [
        "",
        f"Medians of one run of `{about['command']}` on {about['device_name']}, {about['threads']} threads (torch's "
        f"default), torch {about['versions'].get('torch')}, {about['date'][:10]}; {_rounds(report)} samples of each "
        "way, all in turn, an update after every step. *exposed*: a step less the one without averaging in the same "
        f"round, median and quartiles. Averages with overlap and offload differ from the plain ones in {compared}, "
        f"after {COMPARED_STEPS} steps of a training that all follow. {CAPTION}" + _disturbed(report.others_cpu),
    ]
    return "\n".join(lines)


def _rounds(report: loop.Report) -> str:
    return " and ".join(str(len(rows[0].samples)) for rows in report.works().values())


def passes_block(report: Report, part: str) -> str:
    """Give the block of our own passes: of the ``formats`` or of ``several`` averages."""
    lines = [
        "| update of | pass | ms | bytes kept a parameter | bytes moved | time | bytes |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for rows in grouped(getattr(report, part)):
        base = find(rows, rows[0].provider)
        for row in rows:
            if base is None or not row.samples:
                continue
            dtype = "fp32" if row.dtype == "float32" else "bf16"
            kept, moved, time, size, _ = pass_figures(row, base)
            cells = f"{row.title}, {dtype}", row.provider, milliseconds(row.seconds), kept, moved, time, size
            lines.append(f"| {' | '.join(cells)} |")
    about = report.environment
    lines += [
        "",
        f"Medians of one run of `{about['command']}` on {about['device_name']}, {about['threads']} threads, "
        f"torch {about['versions'].get('torch')}, {about['date'][:10]}; all passes over one model interleaved. *time*, "
        "*bytes*: over those of the first line of the same model." + _disturbance(getattr(report, part)),
    ]
    return "\n".join(lines)


def _disturbance(rows: list[Row]) -> str:
    return _disturbed(max((row.others_cpu or 0.0 for row in rows), default=0.0))


def _disturbed(others: float) -> str:
    return f" Other processes took up to {others:.0%} of the CPU meanwhile." if others > DISTURBED else ""


def rewrite_passes(report: Report, root: Path) -> list[Path]:
    """Put the tables of our own passes into their pages under ``root``, as far as ``report`` has them.

    Raises:
        ValueError: as :func:`put_between`.
    """
    written = []
    for part, page in PASSES.items():
        if getattr(report, part):
            put_between(root / page, f"<!-- {part}:begin -->", f"<!-- {part}:end -->", passes_block(report, part))
            written.append(root / page)
    return written


def rewrite_loop(report: loop.Report, root: Path) -> Path:
    """Put the table of the training loop into its page under ``root``; ValueError as :func:`put_between`."""
    put_between(root / LOOP_PAGE, LOOP_BEGIN, LOOP_END, loop_block(report))
    return root / LOOP_PAGE


def rewrite(readme: Path, report: dict[str, Any]) -> None:
    """Put the table of ``report`` between its markers in ``readme``; ValueError as :func:`put_between`."""
    put_between(readme, BEGIN, END, readme_table(report))


def put_between(readme: Path, begin_marker: str, end_marker: str, block: str) -> None:
    """Put ``block`` between two markers of ``readme``.

    Raises:
        ValueError: ``readme`` does not hold the two markers, once each and in order.
    """
    text = readme.read_text()
    before, begin, rest = text.partition(begin_marker)
    _, end, after = rest.partition(end_marker)
    if not begin or not end or begin_marker in rest or end_marker in after:
        raise ValueError(f"{readme.name} must hold {begin_marker} and {end_marker} once each and in this order")
    readme.write_text(f"{before}{begin_marker}\n{block}\n{end_marker}{after}")
