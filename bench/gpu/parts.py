"""The parts of a GPU run beside the times: the build, the tests, the bits, and the memory checkers."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.process import ROOT, Budget, Finished, run_program, scrub, write_log
from bench.gpu.report import Part
from bench.loop import Followed

# The most that each part may take, and what is kept for the times.
CONFIGURE_S, BUILD_S, TESTS_S, SMOKE_S, CHECKER_S = 40.0, 90.0, 120.0, 40.0, 50.0
MEASURE_S = 230.0
# The training loop comes after the times: what it may take, what of that goes to samples, and the least to begin with.
LOOP_S, LOOP_SAMPLES_S, LEAST_LOOP_S = 60.0, 20.0, 30.0
FAILURES_SHOWN = 20
# The architecture of a dry run: that of the H100 and H200.
DRY_ARCHITECTURE = "90"
# How compute-sanitizer says that it does not run here, not that it found something.
REFUSAL = re.compile(r"^=+\s*(.*not supported.*)$", re.MULTILINE)
FINDING = re.compile(r"^=+\s*((?:Invalid|Uninitialized|Program hit|Misaligned).*)$", re.MULTILINE)


@dataclass
class Parts:
    """The parts that have run, with what they share."""

    out: Path
    work: Path  # a folder for what is not reported
    budget: Budget
    backends: tuple[str, ...]
    dry: bool
    architecture: str = DRY_ARCHITECTURE
    library: Path | None = None  # as it was built; the programs that run after that use it

    @property
    def env(self) -> dict[str, str]:
        return {} if self.library is None else {"SWAFAST_LIBRARY": str(self.library)}

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    # The build

    def build(self) -> Part:
        """Build the native library for this GPU alone, with what is installed."""
        nvcc, cmake = find_nvcc(), shutil.which("cmake")
        if cmake is None:
            return Part("build", "failed", "there is no cmake")
        if nvcc is None:
            return Part("build", "not run" if self.dry else "failed", "there is no nvcc")
        folder = self.work / f"sm_{self.architecture}"
        generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", generator, "-DCMAKE_BUILD_TYPE=Release"]
        configure.append(f"-DSWAFAST_CUDA_ARCHITECTURES={self.architecture}")
        env = {"CUDACXX": nvcc}
        first = run_program(configure, self.budget.grant(CONFIGURE_S, MEASURE_S), env)
        done = first
        if first.code == 0:
            compile_it = [cmake, "--build", str(folder), "--parallel", "--verbose"]
            done = run_program(compile_it, self.budget.grant(BUILD_S, MEASURE_S), env)
        write_log(self.out / "build.log", f"{' '.join(configure)}\n{first.output}\n{done.output}")
        facts = {"configure": scrub(" ".join(configure)), "compiler": _version(nvcc), "cmake": _version(cmake)}
        seconds = first.seconds + (done.seconds if done is not first else 0.0)
        found = folder / "libswafast.so"
        if done.code != 0 or not found.is_file():
            return Part("build", "failed", done.why, seconds, facts)
        self.library = found
        facts["nvcc_line"] = scrub(next((line for line in done.output.splitlines() if "launch.cu" in line), ""))
        return Part("build", "ok", f"for sm_{self.architecture} by {facts['compiler']}", seconds, facts)

    # The tests

    def tests(self) -> Part:
        """Run the tests that need a GPU; in a dry run only see that they are found."""
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests", "bench"]
        command.append("--continue-on-collection-errors")
        junit = self.work / "junit.xml"
        command += ["--collect-only", "-q"] if self.dry else [f"--junitxml={junit}"]
        done = run_program(command, self.budget.grant(TESTS_S, MEASURE_S), self.env)
        write_log(self.out / "tests.log", f"pytest {' '.join(command[3:])}\n{done.output}")
        if self.dry:
            names = [line for line in done.output.splitlines() if "::" in line and not line.startswith("ERROR")]
            status = "ok" if done.code == 0 and names else "failed"
            detail = f"{len(names)} found, none run: there is no GPU" if status == "ok" else done.why
            return Part("gpu tests", status, detail, done.seconds, {"found": len(names)})
        counts, failing = read_junit(junit)
        facts = {**counts, "failing": failing, "stopped": done.timed_out}
        detail = ", ".join(f"{count} {what}" for what, count in counts.items()) or done.why
        if done.timed_out:
            detail += f"; stopped after {done.seconds:.0f} s"
        ok = done.code == 0 and counts.get("passed", 0) > 0
        return Part("gpu tests", "ok" if ok else "failed", detail, done.seconds, facts)

    # The smoke run, by itself and under the checkers

    def smoke(self) -> tuple[Part, dict[str, dict[str, str]]]:
        """Compare the bits of all backends with those of the CPU."""
        path = self.work / "bits.json"
        done = run_program([*self._smoke_command(), "--out", str(path)], self._checker_s(SMOKE_S), self.env)
        write_log(self.out / "smoke.log", f"bench.gpu.smoke\n{done.output}")
        bits: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.is_file() else {}
        bits = {case: {backend: scrub(value) for backend, value in hashes.items()} for case, hashes in bits.items()}
        ok = done.code == 0 and bool(bits)
        return Part("bits", "ok" if ok else "failed", done.last_line if ok else done.why, done.seconds), bits

    # The training loop

    def loop(self, kept_s: float) -> tuple[Part, list[Followed]]:
        """Take the times of a training step that averages follow; ``kept_s`` is for what comes after."""
        name, path = "training loop", self.work / "loop.json"
        limit = self.budget.grant(LOOP_S, kept_s)
        if limit < LEAST_LOOP_S:
            return Part(name, "not run", "the time was up"), []
        named = [option for backend in self.backends for option in ("--backend", backend)]
        command = [sys.executable, "-m", "bench.gpu.loop", "--device", self.device, *named, "--out", str(path)]
        command += ["--seconds", str(0.0 if self.dry else LOOP_SAMPLES_S)]
        done = run_program(command, limit, self.env)
        write_log(self.out / "bench.log", f"bench.gpu.loop\n{done.output}")
        rows = [Followed(**row) for row in json.loads(path.read_text())] if path.is_file() else []
        status = "failed" if done.code != 0 else "ok" if rows else "not run"
        # One line says how many elements differ where that is why it failed.
        return Part(name, status, done.last_line if rows or status == "not run" else done.why, done.seconds), rows

    def _smoke_command(self) -> list[str]:
        named = [option for backend in self.backends for option in ("--backend", backend)]
        return [sys.executable, "-m", "bench.gpu.smoke", "--device", self.device, *named]

    def _checker_s(self, wanted_s: float) -> float:
        return self.budget.grant(wanted_s, MEASURE_S)

    def checker(self, tool: str) -> Part:
        """Run the smoke run under compute-sanitizer's ``tool``."""
        if self.dry:
            return Part(tool, "not run", "there is no GPU")
        program = find_tool("compute-sanitizer")
        if program is None:
            return Part(tool, "not run", "there is no compute-sanitizer")
        limit = self._checker_s(CHECKER_S)
        if limit < 10:
            return Part(tool, "not run", "the time was up")
        # Without torch's cache every tensor is an allocation of its own, so that a step beyond its end is seen.
        env = {**self.env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        options = ["--tool", tool, "--target-processes", "application-only", "--error-exitcode", "86"]
        if tool == "memcheck":
            # Calls that torch tries and that fail are none of ours: our own are checked where they are made.
            options += ["--report-api-errors", "no"]
        done = run_program([program, *options, *self._smoke_command()], limit, env)
        write_log(self.out / "sanitizer.log", f"compute-sanitizer {' '.join(options)} bench.gpu.smoke\n{done.output}")
        return judge_checker(tool, done)


def judge_checker(tool: str, done: Finished) -> Part:
    """Say what a memory checker's output means."""
    summary = re.search(r"ERROR SUMMARY: (\d+) error", done.output)
    errors = int(summary.group(1)) if summary is not None else 0
    refusal = REFUSAL.search(done.output)
    first = [scrub(found) for found in FINDING.findall(done.output)[:5]]
    status, detail = "ok", "0 errors"
    if refusal is not None:
        status, detail = "not run", f"the tool refuses: {scrub(refusal.group(1))}"
    elif errors or first:
        status, detail = "failed", f"{errors} errors: {first[0] if first else 'see sanitizer.log'}"
    elif done.timed_out:
        status, detail = "not run", f"it was not done after {done.seconds:.0f} s"
    elif summary is None:
        status, detail = "not run", f"the tool gave no summary: it {done.why}"
    elif done.code != 0:
        status, detail = "failed", f"no error of memory, but the program {done.why}"
    return Part(tool, status, detail, done.seconds, {"errors": errors, "first": first})


def read_junit(path: Path) -> tuple[dict[str, int], list[str]]:
    """Give pytest's counts, and the names of what failed with the first line why."""
    if not path.is_file():
        return {}, []
    cases = list(ElementTree.parse(path).iter("testcase"))
    counts = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0}
    failing = []
    for case in cases:
        results = {child.tag: child for child in case}
        bad = next((results[tag] for tag in ("failure", "error") if tag in results), None)
        if bad is not None:
            counts["failed" if bad.tag == "failure" else "errors"] += 1
            why = (bad.get("message") or "").strip().splitlines() or [""]
            failing.append(scrub(f"{case.get('classname')}::{case.get('name')}: {why[0][:200]}"))
        else:
            counts["skipped" if "skipped" in results else "passed"] += 1
    return counts, failing[:FAILURES_SHOWN]


def find_tool(name: str) -> str | None:
    """Find a program of the CUDA toolkit on PATH, under CUDA_HOME, or where the toolkit usually is."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" for home in homes if home]
    return shutil.which(name) or next(
        (found for place in places if (found := shutil.which(name, path=str(place)))), None
    )


def find_nvcc() -> str | None:
    return find_tool("nvcc")


def _version(program: str) -> str:
    """Give the line of ``--version`` that holds it."""
    lines = run_program([program, "--version"], 20.0).output.splitlines()
    wanted = [line for line in lines if "release" in line or "version" in line]
    return f"{Path(program).name}: {scrub(wanted[0].strip())}" if wanted else Path(program).name
