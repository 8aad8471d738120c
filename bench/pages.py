"""The tables of README and docs, made from the committed reports and from nothing else.

A block stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. ``BLOCKS`` lists the pages that hold one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import names, tables, tables_of_checks
from bench.report import Report

MARKER = re.compile(r"<!-- (\w+):(?:begin|end) -->")


@dataclass(frozen=True)
class Block:
    """What stands between the markers ``name`` of one page, made from one report."""

    page: str
    name: str
    report: str
    make: Callable[[Report], str]

    @property
    def markers(self) -> list[str]:
        return [f"<!-- {self.name}:{end} -->" for end in ("begin", "end")]

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


BLOCKS = (
    Block("README.md", "bench", "cpu.json", tables.short_block),
    Block("docs/speed.md", "bench", "cpu.json", tables.full_block),
    Block("docs/speed.md", "checked", "host.json", tables_of_checks.checked_block),
    Block("docs/speed.md", "host", "host.json", tables_of_checks.host_block),
    Block("docs/sharded.md", "sharded", "sharded.json", tables.sharded_block),
    Block("docs/loop.md", "loop", "loop.json", tables.loop_block),
    Block("docs/files.md", "files", "files.json", tables.files_block),
    Block("docs/recipes/swag.md", "swag", "swag.json", tables.swag_block),
    Block("docs/formats.md", "formats", "cpu.json", partial(tables.passes_block, group=names.FORMATS)),
    Block("docs/averages.md", "several", "cpu.json", partial(tables.passes_block, group=names.SEVERAL)),
)


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
