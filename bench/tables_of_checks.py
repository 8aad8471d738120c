"""The tables of the host's time: what an update costs beside its kernel, and what its checks cost in a whole one."""

from __future__ import annotations

from bench import names
from bench.bars import HOST_BARS
from bench.lookup import find, grouped
from bench.report import Report, Row
from bench.tables import disturbance, markdown, milliseconds, origin


def _us(row: Row | None, *, quartiles: bool = False) -> str:
    if row is None or row.wall is None:
        return ""
    spread = f" ({_three(row.wall.low)} to {_three(row.wall.high)})" if quartiles else ""
    return _three(row.seconds) + spread


def _three(seconds: float) -> str:
    """Write microseconds with three significant figures."""
    value = seconds * 1e6
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ns(seconds: float, count: int) -> str:
    return f"{seconds / count * 1e9:.0f}"


def host_block(report: Report) -> str:
    """Return the tables of a run of ``python -m bench host``: both ways of checking, then where the time goes."""
    return f"{_ways_table(report)}\n\n{_parts_table(report)}"


def _ways_table(report: Report) -> str:
    cold = {rows[0].workload: rows for rows in grouped(report.of_group(names.HOST_COLD))}
    lines = []
    for rows in grouped(report.of_group(names.HOST)):
        both = [find(of, name) for of in (rows, cold.get(rows[0].workload, []))
                for name in (names.OURS_IN_PYTHON, names.OURS)]  # fmt: skip
        bar = HOST_BARS.get(rows[0].workload)
        lines.append((
            rows[0].title, str(rows[0].num_tensors), rows[0].note.split()[0],
            *(_us(row, quartiles=row is not None and row.provider == names.OURS) for row in both),
            "" if bar is None else f"{bar:g}",
        ))  # fmt: skip
    return markdown(
        "update of | tensors | modules | in Python | native | cold: in Python | cold: native | bar",
        lines,
        f"Microseconds of the host without the kernel: medians and quartiles of one run of {origin(report)}; all ways "
        f"interleaved. *cold*: after 100 MB of other memory. {disturbance(report.rows)}".strip(),
    )


def _parts_table(report: Report) -> str:
    lines = []
    for rows in grouped(report.of_group(names.HOST)):
        found = [find(rows, name) for name in (names.OURS, names.PASS, names.TELLS, names.TORCH_TELLS)]
        if None in found:
            continue
        whole, alone, tells, torchs = (row.seconds for row in found if row is not None)
        count = rows[0].averages * (rows[0].num_tensors + 1)  # a counter for each average
        parts = alone, tells, whole - alone - tells
        lines.append((rows[0].title, *map(_three, parts), _ns(tells, count), _ns(torchs, count)))
    return markdown(
        "native update of, us | the pass | telling autograd | the rest | ours, ns a tensor | torch's, ns a tensor",
        lines,
        "*telling autograd*: that an update writes averages and counters. *torch's*: "
        "`torch.autograd.graph.increment_version` of the same tensors.",
    )


def checked_block(report: Report) -> str:
    """Return the table of what checks cost in a whole update, with the default threads and with one."""
    shown = (
        names.TORCH_CLASS, names.FOREACH, names.FOREACH_PARAMS, names.OURS_IN_PYTHON, names.OURS, names.C_CALL,
    )  # fmt: skip
    lines, every = [], list[Row]()
    for group in (names.CHECKED, names.CHECKED_ALONE):
        threads = "1" if group == names.CHECKED_ALONE else str(report.environment["threads"])
        for rows in grouped(report.of_group(group)):
            found = {name: find(rows, name) for name in shown}
            ours, every = found[names.OURS], [*every, *rows]
            times = ("" if row is None else milliseconds(row.seconds) for row in found.values())
            against = (
                "" if row is None or ours is None else f"{row.seconds / ours.seconds:.2g}x"
                for row in map(found.get, shown[:3])
            )  # fmt: skip
            lines.append((rows[0].title, threads, *times, *against))
    return markdown(
        "update of | threads | class | foreach | params | in Python | swafast | C call "
        "| vs class | vs foreach | vs params",
        lines,
        f"Milliseconds, float32: medians of one run of {origin(report, threads='with these threads')}; all ways "
        f"interleaved. {disturbance(every)}".strip(),
        "*class*: torch's as it comes. *foreach*: `_foreach_lerp_` over lists kept from update to update, with nothing "
        "checked, and a copy of all buffers. *params*: the same without buffers. *in Python*: swafast without its "
        "native pass. *C call*: its kernel alone. *vs ...*: how many times as fast swafast is.",
    )
