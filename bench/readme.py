"""The table of the README, made from a report and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.report import FLAT_LERP, TORCH_EMA, Report, baseline, find, our_row
from bench.tables import milliseconds, percent

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


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
