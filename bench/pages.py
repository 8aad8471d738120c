"""The tables of README and docs, made from the committed reports and from nothing else.

A block stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. ``BLOCKS`` lists the pages that hold one.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import names
from bench.lookup import baseline, find, grouped, our_row
from bench.report import Report, Row
from bench.tables import SHORT_DTYPES, STEP_CAPTION, disturbance, milliseconds, pass_figures, percent, step_cells

# Columns of a page: its captions are wrapped before.
WIDTH = 118
MARKER = re.compile(r"<!-- (\w+):(?:begin|end) -->")
# The rows of README's table, by workload and dtype.
TELLING = (
    ("resnet50", "bfloat16"), ("gpt2_medium", "float32"), ("gpt2_medium", "bfloat16"), ("llama3_8b", "bfloat16"),
    ("2000x64x64", "float32"), ("3000x64", "float32"),
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """What stands between the markers ``name`` of one page, made from one report."""

    page: str
    name: str
    report: str
    make: Callable[[Report], str]

    @property
    def markers(self) -> tuple[str, str]:
        return f"<!-- {self.name}:begin -->", f"<!-- {self.name}:end -->"

    def put_into(self, text: str, report: Report) -> str:
        """Return the page with the block filled.

        Raises:
            ValueError: the page does not hold the two markers, once each and in order.
        """
        begin, end = self.markers
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end or begin in rest or end in after:
            raise ValueError(f"{self.page} must hold {begin} and {end} once each and in this order")
        return f"{before}{begin}\n{self.make(report)}\n{end}{after}"


def fill(root: Path, results: Path, *, check: bool = False) -> list[str]:
    """Fill every block of the pages under ``root``, or with ``check`` only compare. Return what is wrong with them."""
    problems = []
    for block in BLOCKS:
        page = root / block.page
        if not page.is_file():
            problems.append(f"{block.page} is missing: it must hold the block {block.name}")
            continue
        text = page.read_text()
        try:
            filled = block.put_into(text, Report.read(results / block.report))
        except ValueError as error:
            problems.append(str(error))
            continue
        if check and filled != text:
            problems.append(f"{block.page}: the block {block.name} is not what {block.report} gives")
        elif not check:
            page.write_text(filled)
    # A marker that no block fills: its table would grow old.
    known = {(block.page, block.name) for block in BLOCKS}
    for page in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        name = page.relative_to(root).as_posix()
        found = sorted(set(MARKER.findall(page.read_text()))) if page.is_file() else []
        problems += [f"{name}: no report fills the block {each}" for each in found if (name, each) not in known]
    return problems


# The blocks


def markdown(header: str, rows: Sequence[tuple[str, ...]], *captions: str, texts: int = 1) -> str:
    """Return a table whose first ``texts`` columns are text, and its captions, wrapped."""
    columns = header.split(" | ")
    rule = "|" + "|".join("---" if at < texts else "---:" for at in range(len(columns))) + "|"
    lines = [f"| {header} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]
    wrapped = (textwrap.fill(caption, WIDTH, break_on_hyphens=False) for caption in captions if caption)
    return "\n".join([*lines, "", "\n\n".join(wrapped)])


def origin(report: Report, *, threads: str = "{threads} threads") -> str:
    about = report.environment
    return (
        f"`{about['command']}` on {about['device_name']}, {threads.format(**about)}, "
        f"torch {about['versions'].get('torch')}, {about['date'][:10]}"
    )


def _name(row: Row) -> str:
    kind = "bf16, `exact`" if row.dtype == "bfloat16" else SHORT_DTYPES[row.dtype]
    return f"{row.title.replace(', no embeddings', '')}, {kind}"


def _ms(row: Row | None) -> str:
    return "" if row is None else milliseconds(row.seconds)


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
    header = "update of | torch's class, default, ms | torch's best way, ms | swafast, ms | against the best"
    best = (
        "Torch's best way: fp32, the class with `multi_avg_fn=get_ema_multi_avg_fn(...)`; bf16, where the class "
        "freezes, the faster of two hand-written loops that keep a float32 average."
    )
    rows = [lines[key] for key in TELLING if key in lines]
    return markdown(header, rows, f"{best} Medians, {origin(report)}.")


def full_block(report: Report) -> str:
    """Return the table of every workload."""
    rows = []
    for group, best, ours in _compared(report):
        flat = find(group, names.FLAT_LERP)
        share = "" if flat is None else percent(flat.seconds / ours.seconds)
        default = _ms(find(group, names.TORCH_CLASS))
        against = f"{best.seconds / ours.seconds:.1f}x"
        rows.append((_name(ours), default, _ms(best), _ms(find(group, names.FOREACH)), _ms(ours), against, share))
    header = (
        "update of | torch's class | torch's best way | `_foreach_lerp_` | swafast | against the best "
        "| of one flat `lerp_`"
    )
    return markdown(
        header,
        rows,
        f"Milliseconds: medians of one run of {origin(report)}.",
        "*torch's class*: `torch.optim.swa_utils.AveragedModel` as it comes; its bf16 average freezes. *torch's best "
        "way*: for fp32 the class with `multi_avg_fn=get_ema_multi_avg_fn(...)`; for bf16 the faster of the two loops "
        "that keep a float32 average, `mul_().add_()` and `lerp_(p.float())`. *`_foreach_lerp_`*: alone over lists, "
        "with nothing checked. *against the best*: how many times as fast swafast is as torch's best way. *of one "
        "flat `lerp_`*: the share of the speed of one `lerp_` over the same bytes in a single tensor.",
    )


def sharded_block(report: Report) -> str:
    rows = [
        (row.title if row is group[0] else "", row.provider, _ms(row))
        for group in grouped(report.rows)
        for row in group
    ]
    return markdown(
        "on 2 gloo ranks of one machine | by | ms",
        rows,
        f"Medians of the slower rank in one run of {origin(report, threads='one thread a rank')}.",
        "*AveragedModel* is torch's class over the bare DTensors, since it cannot copy an FSDP model; *SWA fn*: with "
        "`multi_avg_fn=get_swa_multi_avg_fn()`.",
        texts=2,
    )


def loop_block(report: Report) -> str:
    rows, last = [], ""
    for row in report.steps:
        name = f"{row.work}, {row.num_params / 1e6:.3g}M parameters" if row.work != last else ""
        rows.append((name, row.way, *step_cells(row)))
        last = row.work
    counts = " and ".join(str(count) for count in dict.fromkeys(row.step.count for row in report.steps))
    off = f"{report.differing} elements" if report.differing else "no element"
    return markdown(
        "training | averaged by | ms a step | exposed, ms | quartiles | of a step",
        rows,
        f"Medians of one run of {origin(report)}; {counts} samples of each way, all in turn, with an update after "
        "every step.",
        "*exposed*: a step less the one without averaging in the same round, median and quartiles. Averages with "
        f"overlap and offload differ from the plain ones in {off}, after 5 steps of a training that all follow.",
        f"{STEP_CAPTION} {disturbance(report.others_cpu)}".strip(),
        texts=2,
    )


def _passes_block(group: str) -> Callable[[Report], str]:
    def make(report: Report) -> str:
        lines = []
        for rows in grouped(report.of_group(group)):
            base = find(rows, rows[0].provider)
            for row in rows:
                if base is not None and row.wall is not None:
                    kept, moved, time, size, _ = pass_figures(row, base)
                    name = f"{row.title}, {SHORT_DTYPES[row.dtype]}"
                    lines.append((name, row.provider, milliseconds(row.seconds), kept, moved, time, size))
        others = max((row.others_cpu or 0.0 for row in report.of_group(group)), default=0.0)
        return markdown(
            "update of | pass | ms | bytes kept a parameter | bytes moved | time | bytes",
            lines,
            f"Medians of one run of {origin(report)}; all passes over one model interleaved. *time*, *bytes*: over "
            f"those of the first line of the same model. {disturbance(others)}".strip(),
            texts=2,
        )

    return make


BLOCKS = (
    Block("README.md", "bench", "cpu.json", short_block),
    Block("docs/speed.md", "bench", "cpu.json", full_block),
    Block("docs/sharded.md", "sharded", "sharded.json", sharded_block),
    Block("docs/loop.md", "loop", "loop.json", loop_block),
    Block("docs/formats.md", "formats", "cpu.json", _passes_block(names.FORMATS)),
    Block("docs/averages.md", "several", "cpu.json", _passes_block(names.SEVERAL)),
)
