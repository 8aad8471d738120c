"""The table of the README, made from a report and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.report import FLAT_LERP, Report, baseline, find, our_row
from bench.tables import milliseconds, percent

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def readme_table(report: dict[str, Any]) -> str:
    """Give the block between the markers, as markdown, from a report as its JSON has it."""
    read = Report.from_dict(report)
    about = read.environment
    lines = [
        "| update of | today, ms | swafast, ms | faster | of one flat `lerp_` |",
        "|---|---:|---:|---:|---:|",
    ]
    for rows in read.groups():
        today, ours, flat = baseline(rows), our_row(rows), find(rows, FLAT_LERP)
        if today is None or ours is None or flat is None:
            continue
        dtype = "fp32" if ours.dtype == "float32" else "bf16, `exact`"
        lines.append(
            f"| {ours.title}, {dtype} | {milliseconds(today.seconds)} | {milliseconds(ours.seconds)} "
            f"| {today.seconds / ours.seconds:.1f}x | {percent(flat.seconds / ours.seconds)} |"
        )
    versions = about["versions"]
    lines += [
        "",
        f"Medians of one run of `{about['command']}` on {about['device_name']}, {about['threads']} threads, "
        f"torch {versions.get('torch')}, {about['date'][:10]}. "
        "*today*: `torch.optim.swa_utils.AveragedModel` for fp32; for bf16, where its average freezes, the faster of "
        "the two loops that keep a float32 average, `mul_().add_()` and `lerp_(p.float())`. "
        "*of one flat `lerp_`*: its share of the speed of one `lerp_` over the same bytes in a single tensor.",
    ]
    return "\n".join(lines)


def rewrite(readme: Path, report: dict[str, Any]) -> None:
    """Put the table of ``report`` between the markers of ``readme``.

    Raises:
        ValueError: ``readme`` does not hold the two markers, once each and in order.
    """
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"{readme.name} must hold {BEGIN} and {END} once each and in this order")
    readme.write_text(f"{before}{BEGIN}\n{readme_table(report)}\n{END}{after}")
