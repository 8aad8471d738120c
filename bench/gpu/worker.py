"""The process that measures: ``python -m bench.gpu.worker PLAN LINES`` does what PLAN says, and writes line by line.

It is a process of its own because a kernel that fails takes the process's device with it: the run then begins another
one, which goes on after the provider under way.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.gpu.cases import Case
from bench.gpu.measure import Setting, measure_all
from bench.gpu.report import GpuRow

Key = tuple[str, str, str, int, str]  # that of a row, and its provider


@dataclass(frozen=True)
class Plan:
    """What a worker is to do, as JSON between the two processes."""

    device: str
    backends: tuple[str, ...]
    cases: list[Case]
    seconds: float  # from the start of the process
    provider_s: float
    l2_bytes: int
    profile: bool = False  # count launches, instead of taking times
    done: list[Key] = field(default_factory=list)  # not to be run again

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Plan:
        data: dict[str, Any] = json.loads(path.read_text())
        data["cases"] = [Case(**case) for case in data["cases"]]
        data["backends"] = tuple(data["backends"])
        data["done"] = [tuple(key) for key in data["done"]]
        return cls(**data)


def key_of(case: Case, provider: str) -> Key:
    return case.workload, case.dtype, case.format, case.averages, provider


@dataclass
class Lines:
    """What a worker has written: rows, and the provider it was at when it ended early."""

    rows: list[GpuRow] = field(default_factory=list)
    begun: list[Key] = field(default_factory=list)
    under_way: Key | None = None


def read_lines(lines: Iterable[str]) -> Lines:
    read = Lines()
    for line in lines:
        try:
            data = json.loads(line)
        except ValueError:  # cut off with its process
            continue
        if "begin" in data:
            key = tuple(data["begin"])
            read.under_way = key
            read.begun.append(key)
        else:
            row = GpuRow(**data)
            read.rows.append(row)
            if read.under_way == (*row.key, row.provider):
                read.under_way = None
    return read


class Writer:
    """The progress of a run, written down line by line."""

    def __init__(self, file: TextIO, done: Iterable[Key]) -> None:
        self._file, self._done = file, set(done)

    def _put(self, data: dict[str, Any]) -> None:
        self._file.write(json.dumps(data) + "\n")
        self._file.flush()

    def wanted(self, case: Case, provider: str) -> bool:
        return key_of(case, provider) not in self._done

    def begin(self, case: Case, provider: str) -> None:
        self._put({"begin": key_of(case, provider)})

    def emit(self, row: GpuRow) -> None:
        self._put(asdict(row))


def work(plan: Plan, lines: Path, started: float) -> None:
    device = torch.device("cpu") if plan.device == "cpu" else torch.device(plan.device, 0)
    if device.type == "cpu":
        torch.set_num_threads(1)  # a dry run times nothing that counts, and others may be at work on this machine
    setting = Setting(device, plan.backends, plan.l2_bytes, plan.provider_s, started + plan.seconds, plan.profile)
    with lines.open("a") as file:
        measure_all(plan.cases, setting, Writer(file, plan.done))


if __name__ == "__main__":
    work(Plan.read(Path(sys.argv[1])), Path(sys.argv[2]), time.monotonic())
