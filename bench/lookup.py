"""Find rows of a report: by name, by group, the best and ours. List what failed and what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from bench import names
from bench.report import Report, Row, Times, count_text


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each workload, dtype and group, in the order in which they ran."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault(row.key, []).append(row)
    return list(found.values())


def by_format(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the groups of a GPU run, those of one dtype and format beside each other."""
    groups = grouped(rows)
    kinds = list(dict.fromkeys(rows[0].key[1:] for rows in groups))
    return sorted(groups, key=lambda rows: kinds.index(rows[0].key[1:]))


def find(rows: Iterable[Row], *providers: str) -> Row | None:
    """Return the row of the first of these providers that has a time."""
    rows = list(rows)
    found = (row for name in providers for row in rows if row.provider == name and (row.wall or row.device))
    return next(found, None)


def baseline(rows: Iterable[Row]) -> Row | None:
    """Return the row of torch's best way to keep a sound average.

    For float32 params that is torch's class with its multi-tensor EMA function. The class's average of bf16 params
    freezes, so there it is the faster of the two loops that keep a float32 average.
    """
    rows = list(rows)
    if rows and rows[0].dtype == "float32":
        return find(rows, names.TORCH_EMA, names.TORCH_CLASS)
    loops = [row for name in (names.MUL_ADD, names.LERP_FLOAT) if (row := find(rows, name)) is not None and row.wall]
    return min(loops, key=lambda row: row.seconds, default=None)


def our_row(rows: Iterable[Row]) -> Row | None:
    """Return our row in the default format of the params' dtype."""
    return find(rows, names.OURS, names.OURS_EXACT)


def time_over_bytes(row: Row | None, base: Row | None) -> float | None:
    """Return the time of ``row`` over what its bytes would take at the rate of ``base``."""
    return None if row is None or base is None else base.bytes_per_s / row.bytes_per_s


def share_of_copy(row: Row | None, rows: Iterable[Row]) -> float | None:
    """Return the bytes a second of an update as a part of the same run's device copy of as many bytes."""
    copy = find(rows, names.COPY)
    return row.bytes_per_s / copy.bytes_per_s if row is not None and row.device and copy is not None else None


def merged(rows: Iterable[Row]) -> list[Row]:
    """Keep the last row of each provider. Join the samples of a ceiling, which is measured beside every provider."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (*row.key, row.provider)
        before = found.get(key)
        if before is not None and row.provider in names.CEILINGS and before.device and row.device:
            row = replace(before, device=Times.of((*before.device.samples, *row.device.samples)))
        elif before is not None and before.wall is not None and row.wall is None:
            # The profiler's, which takes no times, or a failure after they were taken.
            why = [] if row.status == "ok" else [f"{row.status}: {row.reason}"]
            seen = {} if row.launches is None else {"launches": row.launches, "transfers": row.transfers}
            row = replace(before, remarks=[*before.remarks, *row.remarks, *why], **seen)  # type: ignore[arg-type]
        found[key] = row
    return list(found.values())


def left_out(report: Report) -> Iterator[str]:
    """Yield in words what a GPU run did not do."""
    yield from (f"{part.name}: {part.detail}" for part in report.parts if part.status == "not run")
    if report.dry:
        yield "every time on a GPU, launches, waiting and graphs: this was a dry run on a CPU"
    for rows in grouped(report.rows):
        if "layers" in rows[0].title:
            yield f"{rows[0].title}: shortened to the memory that was free"
        reasons: dict[str, list[str]] = {}
        for row in rows:
            if row.status == "skipped":
                reasons.setdefault(row.reason, []).append(row.provider)
        for why, who in reasons.items():
            yield f"{rows[0].title}, {rows[0].dtype} {rows[0].group}: {', '.join(who)}: {why}"


def failures(report: Report) -> list[str]:
    """Return what went wrong: parts that failed, rows of ours that are wrong or missing, bits that differ."""
    found = [f"{part.name}: {part.detail}" for part in report.parts if part.status == "failed"]
    for row in report.rows:
        if row.is_ours and row.status in ("wrong", "failed", "not installed"):
            found.append(f"{row.provider} on {row.title}, {row.dtype} {row.group}: {row.status}: {row.reason}")
    differing = [case for case, hashes in report.bits.items() if len(set(hashes.values())) > 1]
    if differing:
        found.append(f"bits differ in {count_text(len(differing), 'case')}, first in {differing[0]}")
    if report.differing:
        found.append(f"attached averages differ from the plain ones in {count_text(report.differing, 'element')}")
    return found
