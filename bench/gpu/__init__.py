"""A whole GPU run: its parts in their order, and a report that is written anew while they run.

What fails becomes part of the report, and the run goes on. A kill at any moment leaves everything measured so far: the
JSON is replaced in one step after every part, and once a second while a part finds something. Raw samples go to lines
beside it as they are taken. Each part that touches the device is a process of its own, because a kernel that fails
takes its process's device with it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from bench import internals, machine, names
from bench.bars import bars_table, gpu_bars
from bench.gpu.predictions import predictions_table
from bench.lookup import failures, left_out, merged
from bench.process import ROOT, Finished, find_tool, judge_checker, run_program, scrub, write_log
from bench.report import Part, Report
from bench.tables import gpu_table, swept_table

# A whole run, and what its end (the picture, the tables) takes of that.
TOTAL_S, END_S = 505.0, 12.0
# A measuring process looks at the clock between providers: the time that one may go on beyond it.
OVERRUN_S = 12.0
# A dry run's idea of an L2 cache, so that it rotates and fills too, and its architecture, that of the H100 and H200.
DRY_L2_BYTES, DRY_ARCHITECTURE = 1 << 18, "90"
# For the samples of the training loop.
LOOP_SAMPLES_S = 18.0
LOGS = ("build.log", "tests.log", "checks.log", "bench.log")
WIDTH, LINES_SHOWN, FAILURES_SHOWN = 110, 12, 20
# The tests of waiting and of graphs come first: what they show is shown nowhere else.
FIRST_TESTS = "wait or sync or graph or replay or captur"
# Our kernels, CUDA's and Triton's, by a part of their names. torch's are checked by torch.
KERNELS = ("update_kernel", "exchange_kernel", "nonfinite_kernel", "collect_kernel", "draw_kernel")
# A name, the most seconds it may take, and what it does with its own limit.
PartOfRun = tuple[str, float, Callable[[str, float], None]]


@dataclass
class Run:
    """One run: its settings, and its findings so far."""

    out: Path
    work: Path  # a folder for what is not reported
    command: str
    dry: bool
    end: float  # on the clock of time.monotonic
    library: Path | None = None  # carried here: used where none can be built
    report: Report = field(init=False)

    def __post_init__(self) -> None:
        self.report = Report({"command": self.command}, dry=self.dry)
        self._read, self._tail, self._written = 0, "", ""
        self.l2_bytes, self.architecture = DRY_L2_BYTES, DRY_ARCHITECTURE
        self.env: dict[str, str] = {}
        self.stem = self.out / ("dry" if self.dry else "gpu")
        self.lines = self.out / f"{self.stem.name}.samples.jsonl"
        self.device = "cpu" if self.dry else "cuda"
        self.backends = names.OUR_BACKENDS[self.device]

    def parts(self) -> list[PartOfRun]:
        """Return the parts in their order."""
        first, second = self.backends
        return [
            ("facts", 20.0, self.facts),
            ("build", 100.0, self.build),
            (f"bits of {first}", 25.0, self.doing("bits", first, log="checks.log")),
            ("largest", 40.0, self.doing("largest", first)),
            ("small", 45.0, self.doing("small", first)),
            (f"bits of {second}", 40.0, self.doing("bits", second, log="checks.log")),
            (f"times of {second}", 45.0, self.doing("ours", second)),
            ("launches", 45.0, self.doing("ours", first, second, profile=True)),
            ("tests of waiting and graphs", 50.0, self.tests(FIRST_TESTS)),
            ("the other gpu tests", 60.0, self.tests(f"not ({FIRST_TESTS})")),
            ("training loop", 60.0, self.doing("loop", first, second)),
            ("memcheck", 40.0, self.checker),
            ("racecheck", 40.0, self.checker),
            ("compiled foreach", 45.0, self.doing("compiled")),
            ("grids and chunks", 60.0, self.doing("swept", first)),
            ("spreads", 40.0, self.doing("spreads", first, second)),
            ("other formats", 80.0, self.doing("formats", first, second)),
            ("picture", END_S, self.draw),
        ]

    def go(self) -> None:
        """Do all parts. An error in one is written down, and the others still run."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name in (*LOGS, self.lines.name, f"{self.stem.name}.json", f"{self.stem.name}.png"):
            (self.out / name).unlink(missing_ok=True)
        began = time.monotonic()
        for name, limit_s, work in self.parts():
            start = time.monotonic()
            granted = min(limit_s, self.end - start - (0.0 if name == "picture" else END_S))
            # A run is silent for minutes otherwise.
            sys.stderr.write(f"{start - began:4.0f} s: {name}\n")
            try:
                if granted <= 0 and name != "picture":
                    self.note(name, "not run", "the time was up")
                else:
                    work(name, granted)
            # A run of nine minutes is not thrown away for whatever one part of it raises.
            except (Exception, KeyboardInterrupt) as error:
                reason = scrub(f"{type(error).__name__}: {error}".splitlines()[0])
                self.note(name, "failed", reason, time.monotonic() - start)
            self.save()

    def note(self, name: str, status: str, detail: str = "", seconds: float = 0.0, **facts: Any) -> None:
        self.report.parts.append(Part(name, status, detail, seconds, facts))

    def save(self) -> None:
        """Take in what the parts' processes have written since the last look, and replace the JSON if there is news."""
        if self.lines.is_file():
            with self.lines.open() as file:
                file.seek(self._read)
                *whole, self._tail = (self._tail + file.read()).split("\n")
                self._read = file.tell()
            for line in whole:
                # One that was cut off with its process is no JSON.
                try:
                    self.report.add(line)
                except ValueError:
                    continue
        self.report.rows = merged(self.report.rows)
        self.report.left_out = list(left_out(self.report))
        now = json.dumps(self.report.to_dict())
        if now != self._written:
            self.report.write(self.stem.with_suffix(".json"))
            self._written = now

    def start(self, command: Sequence[str], limit_s: float, log: str, env: dict[str, str] | None = None) -> Finished:
        """Run a program, save what it finds meanwhile, and keep its output."""
        done = run_program(command, limit_s, {**self.env, **(env or {})}, self.save)
        shown = " ".join(command).replace(sys.executable, "python")
        write_log(self.out / log, f"== {shown}\n{done.output}\n")
        self.save()
        return done

    def part_command(self, part: str, *backends: str, **options: object) -> list[str]:
        named = [option for backend in backends for option in ("--backend", backend)]
        more = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        return [sys.executable, "-m", "bench", "part", part, "--device", self.device, *named, *more]

    # Facts and the build

    def facts(self, name: str, limit_s: float) -> None:
        about = self.report.environment
        device = torch.device("cpu") if self.dry else torch.device("cuda", 0)
        if not self.dry:
            about.update(machine.gpu_facts())
            self.l2_bytes, self.architecture = about["l2_bytes"], about["architecture"]
        about.update(machine.environment(device, self.command))
        about["source_sha256"] = machine.source_digest(ROOT)
        self.note(name, "ok", str(about.get("gpu") or about["device_name"]))

    def build(self, name: str, limit_s: float) -> None:
        """Build the native library for this GPU alone, or take the one that was carried here."""
        start = time.monotonic()
        why, facts = self._build(limit_s)
        status, detail = "ok", f"for sm_{self.architecture} by {facts.get('compiler')}"
        if why:
            carried = self.library is not None and self.library.is_file()
            if carried:
                self.env["SWAFAST_LIBRARY"] = str(self.library)
            # A dry run without a CUDA compiler has nothing to build.
            status = "ok" if carried else "not run" if self.dry and "there is no" in why else "failed"
            detail = f"{why}; the carried library is used" if carried else why
        # This process asks the library how it was built, and has loaded none before.
        os.environ.update(self.env)
        about = self.report.environment
        about["native_build"] = {key: scrub(text) for key, text in internals.native_build().items()}
        about["swafast_backend"] = internals.backend_in_use(torch.device(self.device))
        self.note(name, status, detail, time.monotonic() - start, **facts)

    def _build(self, limit_s: float) -> tuple[str, dict[str, str]]:
        """Build, and return why it failed or nothing, and what it was built with."""
        tools = {"nvcc": find_tool("nvcc"), "cmake": shutil.which("cmake")}
        missing = [tool for tool, path in tools.items() if path is None]
        if missing:
            return f"there is no {' and no '.join(missing)}", {}
        nvcc, cmake = str(tools["nvcc"]), str(tools["cmake"])
        folder, end = self.work / f"sm_{self.architecture}", time.monotonic() + limit_s
        generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", generator, "-DCMAKE_BUILD_TYPE=Release"]
        configure.append(f"-DSWAFAST_CUDA_ARCHITECTURES={self.architecture}")
        version = run_program([nvcc, "--version"], 20.0).output.splitlines()
        facts = {"configure": scrub(" ".join(configure))}
        facts["compiler"] = scrub(next((line.strip() for line in version if "release" in line), "nvcc"))
        done = self.start(configure, limit_s, "build.log", {"CUDACXX": nvcc})
        if done.code == 0:
            compile_it = [cmake, "--build", str(folder), "--parallel", "--verbose"]
            done = self.start(compile_it, max(1.0, end - time.monotonic()), "build.log", {"CUDACXX": nvcc})
        found = folder / "libswafast.so"
        if done.code != 0 or not found.is_file():
            return done.why, facts
        facts["nvcc_line"] = scrub(next((line for line in done.output.splitlines() if "launch.cu" in line), ""))
        self.env["SWAFAST_LIBRARY"] = str(found)
        return "", facts

    # Bits, times and launches

    def doing(self, part: str, *backends: str, log: str = "bench.log", profile: bool = False) -> Callable[..., None]:
        """Return the part that compares bits, times these cases or counts their launches, or follows a training."""

        def work(name: str, limit_s: float) -> None:
            if profile and self.dry:
                self.note(name, "not run", "there is no GPU")
                return
            seconds = LOOP_SAMPLES_S if part == "loop" else limit_s - OVERRUN_S
            options = {"lines": self.lines, "l2_bytes": self.l2_bytes, "seconds": seconds}
            command = self.part_command(part, *backends, **options) + (["--profile"] if profile else [])
            done = self.start(command, limit_s, log)
            compared = {backend for hashes in self.report.bits.values() for backend in hashes}
            ok = done.code == 0 and (part != "bits" or compared >= {*backends})
            status = "failed" if not ok else "not run" if part == "loop" and not self.report.steps else "ok"
            # One line tells how many elements differ where that is why the loop failed.
            told = ok or (part == "loop" and bool(self.report.steps))
            self.note(name, status, done.last_line if told else done.why, done.seconds)

        return work

    # Tests and memory checkers

    def tests(self, which: str) -> Callable[[str, float], None]:
        """Return the part that runs the tests for a GPU that ``which`` names; a dry run only collects them."""

        def run_tests(name: str, limit_s: float) -> None:
            command = [sys.executable, "-m", "pytest", "tests", "bench", "-m", "gpu", "-k", which]
            command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "-rfE"]
            done = self.start(command + (["--collect-only", "-q"] if self.dry else []), limit_s, "tests.log")
            lines = done.output.splitlines()
            failing = [scrub(line) for line in lines if line.startswith(("FAILED ", "ERROR "))][:FAILURES_SHOWN]
            found = sum("::" in line for line in lines) - len(failing)
            ok = done.code == 0 and (found > 0 if self.dry else " passed" in done.last_line)
            detail = f"{found} found, none run: there is no GPU" if self.dry else done.last_line.strip("= ")
            self.note(name, "ok" if ok else "failed", detail if ok else done.why, done.seconds, failing=failing)

        return run_tests

    def checker(self, name: str, limit_s: float) -> None:
        """Compare bits under compute-sanitizer's tool ``name``, which checks our kernels alone."""
        program = None if self.dry else find_tool("compute-sanitizer")
        if program is None:
            self.note(name, "not run", "there is no GPU" if self.dry else "there is no compute-sanitizer")
            return
        # Without torch's cache every tensor is an allocation of its own, so that a step beyond its end is seen.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        options = ["--tool", name, "--target-processes", "application-only", "--error-exitcode", "86"]
        for kernel in KERNELS:
            options += ["--kernel-name", f"kernel_substring={kernel}"]
        if name == "memcheck":
            # Calls that torch tries and that fail are none of ours: our own are checked where they are made.
            options += ["--report-api-errors", "no"]
        done = self.start([program, *options, *self.part_command("bits", *self.backends)], limit_s, "checks.log", env)
        self.report.parts.append(judge_checker(name, done))

    def draw(self, name: str, limit_s: float) -> None:
        from bench.plot import plot_speed

        if not plot_speed(self.report, self.stem.with_suffix(".png")):
            raise RuntimeError("no update was timed beside a device copy")
        self.note(name, "ok")


def problems_of(report: Report) -> list[str]:
    """Return what went wrong in a GPU run."""
    timed = any(row.is_ours and row.device for row in report.rows)
    return [*failures(report), *([] if timed else ["no update of swafast was timed"])]


def run(out: Path, command: str, *, dry: bool, library: Path | None = None) -> int:
    """Do a whole run, print its tables last, and return 1 where something went wrong."""
    sees_gpu = torch.version.cuda is not None and torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as work:
        this = Run(out, Path(work), command, dry or not sees_gpu, time.monotonic() + TOTAL_S, library)
        this.go()
    show(this.report, this.stem)
    return int(bool(problems_of(this.report)))


def show(report: Report, stem: Path) -> None:
    console, wrong = Console(width=WIDTH, highlight=False), problems_of(report)

    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False)

    if report.dry:
        line("DRY RUN ON A CPU: no figure below is a GPU's.", "bold yellow")
    for table in (gpu_table(report), predictions_table(report), swept_table(report)):
        console.print(Markdown(table))
    for part in report.parts:
        line(f"{part.name}: {part.status}, {part.seconds:.0f} s: {part.detail}")
    for style, texts in (("dim", report.left_out), ("bold red", [f"FAILED: {text}" for text in wrong])):
        for text in texts[:LINES_SHOWN]:
            line(text, style)
    console.print(Markdown(bars_table(report, gpu_bars(report))))
    written = [stem.with_suffix(end).name for end in (".json", ".png") if stem.with_suffix(end).is_file()]
    line(f"wrote {', '.join(written)}: {'something failed' if wrong else 'all that could run was right'}", "bold")
