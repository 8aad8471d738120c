"""A whole GPU run: the parts in their order, the times, the report. What fails becomes part of the report."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import machine
from bench.gpu.cases import Case, dry_cases, gpu_cases
from bench.gpu.measure import DRY_L2_BYTES
from bench.gpu.parts import LOOP_S, Parts
from bench.gpu.process import ROOT, Budget, run_program, scrub, write_log
from bench.gpu.report import OUR_BACKENDS, GpuReport, GpuRow, Part, merged, with_profiles
from bench.gpu.tables import bars_table, workloads_table
from bench.gpu.worker import Key, Lines, Plan, read_lines

# A whole run, and what its end (the picture, the tables) takes of that.
TOTAL_S, END_S = 465.0, 12.0
# Kept for counting launches.
PROFILE_S = 45.0
# For the samples of one provider; a dry run only shows that they are taken.
PROVIDER_S, DRY_PROVIDER_S = 0.6, 0.0
# A worker looks at the clock between providers: the time that one may go on beyond it.
OVERRUN_S = 12.0
MAX_RESTARTS = 6
# Of the reports, and of the logs that a run writes beside them.
LOGS = ("build.log", "tests.log", "smoke.log", "sanitizer.log", "bench.log")
WIDTH, LINES_SHOWN = 110, 12


def sees_gpu() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_available()


@dataclass
class Run:
    """What a run is told, and what it has found so far."""

    out: Path
    work: Path  # a folder for what is not reported
    command: str
    dry: bool
    with_parts: bool  # build, tests, bits and memory checkers, not the times alone
    cases: list[Case]
    budget: Budget
    report: GpuReport = field(init=False)

    def __post_init__(self) -> None:
        self.report = GpuReport({"command": self.command}, self.dry, [], [])
        self._began = time.monotonic()

    @property
    def stem(self) -> Path:
        return self.out / ("dry" if self.dry else "gpu")

    def go(self) -> None:
        """Do all of it; an error in one thing is written down and the others still run."""
        for name in (*LOGS, f"{self.stem.name}.json", f"{self.stem.name}.png"):
            (self.out / name).unlink(missing_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        l2_bytes = DRY_L2_BYTES
        if not self.dry:
            self._guard("device", self._describe_gpu)
            l2_bytes = self.report.environment.get("l2_bytes", 64 << 20)
        if self.with_parts:
            self._run_parts()
        self._guard("environment", self._describe)
        self._guard("times", lambda: self._measure(l2_bytes))
        self._guard("training loop", self._measure_loop)
        self.report.left_out.extend(left_out(self.report))
        self.report.write(self.stem.with_suffix(".json"))
        self._guard("picture", self._draw)
        self.report.write(self.stem.with_suffix(".json"))

    def _guard(self, name: str, work: Callable[[], None]) -> bool:
        """Do ``work``; what it raises becomes a part that failed. True where it did."""
        sys.stderr.write(f"{time.monotonic() - self._began:4.0f} s: {name}\n")  # a run is silent for minutes otherwise
        try:
            work()
        # A run of eight minutes is not thrown away for whatever one part of it raises.
        except (Exception, KeyboardInterrupt) as error:
            reason = scrub(f"{type(error).__name__}: {error}".splitlines()[0])
            self.report.parts.append(Part(name, "failed", reason))
            return True
        return False

    def _describe_gpu(self) -> None:
        self.report.environment.update(gpu_facts())

    def _describe(self) -> None:
        device = torch.device("cpu") if self.dry else torch.device("cuda", 0)
        about = machine.environment(device, self.command)
        about["versions"].update(_versions("triton", "pytest", "matplotlib"))
        self.report.environment.update(about)
        self.report.environment["native_build"] = native_build()
        self.report.environment["source_sha256"] = source_digest()

    def _run_parts(self) -> None:
        parts = Parts(self.out, self.work, self.budget, self.report.backends, self.dry)
        parts.architecture = self.report.environment.get("architecture", parts.architecture)
        self._guard("build", lambda: self.report.parts.append(parts.build()))
        if parts.library is not None:
            # This process asks it how it was built, and its workers run on it.
            os.environ["SWAFAST_LIBRARY"] = str(parts.library)
        self._guard("gpu tests", lambda: self.report.parts.append(parts.tests()))

        def smoke() -> None:
            part, bits = parts.smoke()
            self.report.parts.append(part)
            self.report.bits.update(bits)

        self._guard("bits", smoke)
        for tool in ("memcheck", "initcheck"):
            self._guard(tool, lambda tool=tool: self.report.parts.append(parts.checker(tool)))  # type: ignore[misc]

    def _measure(self, l2_bytes: int) -> None:
        """Take the times, and on a GPU count launches: in processes of their own."""
        kept = END_S + OVERRUN_S + (0.0 if self.dry else LOOP_S)
        rows = self._work(l2_bytes, profile=False, kept_s=kept if self.dry else kept + PROFILE_S)
        if not self.dry:
            rows = with_profiles(rows, self._work(l2_bytes, profile=True, kept_s=kept))
        self.report.rows.extend(rows)

    def _measure_loop(self) -> None:
        parts = Parts(self.out, self.work, self.budget, self.report.backends, self.dry)
        part, rows = parts.loop(END_S)
        self.report.parts.append(part)
        self.report.loop.extend(rows)

    def _work(self, l2_bytes: int, *, profile: bool, kept_s: float) -> list[GpuRow]:
        """Go through the cases in a process, and in a new one after each that breaks off."""
        name = "profile" if profile else "times"
        lines_path, plan_path = self.work / f"{name}.jsonl", self.work / f"{name}.json"
        device = "cpu" if self.dry else "cuda"
        provider_s = DRY_PROVIDER_S if self.dry else PROVIDER_S
        command = [sys.executable, "-m", "bench.gpu.worker", str(plan_path), str(lines_path)]
        # What a compiled update launches is no bar of ours, and to compile it again takes long.
        cases = [case for case in self.cases if not (profile and case.compiled)]
        failed: dict[Key, GpuRow] = {}
        lines = Lines()
        for _ in range(MAX_RESTARTS):
            seconds = self.budget.left_s() - kept_s
            if seconds <= 0:
                self.report.left_out.append(f"{name}: what was to come, the time was up")
                break
            backends = OUR_BACKENDS[device]
            Plan(device, backends, cases, seconds, provider_s, l2_bytes, profile, lines.begun).write(plan_path)
            known = len(lines.begun)
            done = run_program(command, seconds + OVERRUN_S)
            write_log(self.out / "bench.log", f"bench.gpu.worker, {name}\n{done.output}")
            lines = read_lines(lines_path.read_text().splitlines() if lines_path.is_file() else [])
            if done.code == 0:
                break
            if lines.under_way is not None:
                failed.setdefault(lines.under_way, failed_row(lines.under_way, lines.rows, done.why))
            if len(lines.begun) == known:
                self.report.parts.append(Part(name, "failed", f"the process {done.why}", done.seconds))
                break
        return merged([*lines.rows, *failed.values()])

    def _draw(self) -> None:
        try:
            from bench.gpu.plot import plot
        except ModuleNotFoundError as missing:
            self.report.parts.append(Part("picture", "not run", str(missing)))
            return
        if not plot(self.report, self.stem.with_suffix(".png")):
            raise RuntimeError("no update was timed beside a device copy")


def failed_row(key: Key, rows: list[GpuRow], why: str) -> GpuRow:
    """Give a row for a provider that took its process with it."""
    workload, dtype, fmt, averages, provider = key
    like = next((row for row in rows if row.key == key[:-1]), None)
    bare = GpuRow(workload, workload, dtype, provider, 0, 0, 0, format=fmt, averages=averages)
    if like is not None:
        sizes = {"num_params": like.num_params, "num_tensors": like.num_tensors, "counted_bytes": like.counted_bytes}
        bare = replace(bare, title=like.title, **sizes)  # type: ignore[arg-type]
    return replace(bare, status="failed", reason=f"the process {why}")


def gpu_facts() -> dict[str, Any]:
    """Describe the GPU, and nothing that tells one machine from another of its kind."""
    about = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "gpu": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "architecture": f"{about.major}{about.minor}",
        "l2_bytes": about.L2_cache_size,
        "multiprocessors": about.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "driver": driver_version(),
        "cuda_runtime": torch.version.cuda,
    }


def driver_version() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.split()
        if lines:
            return lines[0]
        text = Path("/proc/driver/nvidia/version").read_text()
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found.group() if found else None


def native_build() -> dict[str, str]:
    """Say how the native library in use was built."""
    from swafast.backends import Unavailable, library

    native = library.load()
    if isinstance(native, Unavailable):
        return {"missing": scrub(native.reason)}
    found = {"library": _text(native.swafast_build)}
    if library.has_cuda(native):
        found["cuda"] = _text(native.swafast_cuda_build)
    return found


def source_digest() -> str:
    """Hash the sources that are measured: a copy of the tree without git can be told from another by it."""
    state = hashlib.sha256()
    for folder in ("csrc", "swafast"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                state.update(f"{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    return state.hexdigest()


def _text(function: Callable[[], bytes]) -> str:
    function.restype = ctypes.c_char_p  # type: ignore[attr-defined]
    return scrub(function().decode())


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def left_out(report: GpuReport) -> list[str]:
    """Say in words what the run did not do."""
    found = [f"{part.name}: {part.detail}" for part in report.parts if part.status == "not run"]
    if report.dry:
        found.append("every time on a GPU, launches, waiting and graphs: this was a dry run on a CPU")
    for rows in report.groups():
        first = rows[0]
        if "layers" in first.title:
            found.append(f"{first.title}: shortened to the memory that was free")
        skipped: dict[str, list[str]] = {}
        for row in rows:
            if row.status == "skipped":
                skipped.setdefault(row.reason, []).append(row.provider)
        found += [f"{first.title}, {first.kind}: {', '.join(who)}: {why}" for why, who in skipped.items()]
    return found


def run(out: Path, command: str, dry: bool, with_parts: bool, seconds: float = TOTAL_S) -> int:
    """Do a whole run, print its tables last, and give 1 where something went wrong."""
    dry = dry or not sees_gpu()
    cases = dry_cases() if dry else gpu_cases()
    with tempfile.TemporaryDirectory() as work:
        this = Run(out, Path(work), command, dry, with_parts, cases, Budget(seconds))
        this.go()
    show(this.report, this.stem)
    return int(bool(this.report.failures()))


def say(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, style=style, no_wrap=True, overflow="ellipsis", markup=False)


def show(report: GpuReport, stem: Path) -> None:
    console = Console(width=WIDTH, highlight=False)
    if report.dry:
        console.print("DRY RUN ON A CPU: no figure below is a GPU's.", style="bold yellow")
    console.print(workloads_table(report))
    for part in report.parts:
        say(console, f"{part.name}: {part.status}, {part.seconds:.0f} s: {part.detail}")
    for line in report.left_out[:LINES_SHOWN]:
        say(console, f"left out: {line}", "dim")
    for line in report.failures()[:LINES_SHOWN]:
        say(console, f"FAILED: {line}", "bold red")
    console.print(bars_table(report))
    written = [stem.with_suffix(end).name for end in (".json", ".png") if stem.with_suffix(end).is_file()]
    verdict = "something failed" if report.failures() else "all that could run was right"
    console.print(f"wrote {', '.join(written)}: {verdict}", style="bold")
