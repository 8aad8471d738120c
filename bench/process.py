"""Other programs as parts of a run: a limit on their time, logs that name no machine, and what their output means."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.report import Part, count_text

ROOT = Path(__file__).parents[1]
# What a program is given to write down what it has, after an interrupt.
GRACE_S = 8.0
# How often whoever waits for a program looks at what it has written.
TICK_S = 1.0
PR_SET_PDEATHSIG = 1
# Kept of a log: its beginning and its end.
LOG_CHARS = 150_000
# The clone, and the slash behind it where a path goes on; not the beginning of another folder's name.
_CLONE = re.compile(rf"{re.escape(str(ROOT))}(?:({re.escape(os.sep)})|(?![\w.+~@\-]))")
# A path, alone or behind a compiler's option, less the folders that say where on a machine it is; not the slash of
# "3 of 4/s".
_FOLDERS = re.compile(r"(?:(?<![\w.\-/])|(?<=\s-[A-Z]))/(?:[\w.+~@=\-]+/)+(?=[\w.+~@=<\-])")
# How compute-sanitizer says that it does not run here, what it found, and how much.
REFUSAL = re.compile(r"^=+\s*(.*not supported.*)$", re.MULTILINE)
FINDING = re.compile(
    r"^=+\s*((?:Invalid|Uninitialized|Program hit|Misaligned|Error: Race|Warning: Race).*)$", re.MULTILINE
)
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


@dataclass(frozen=True)
class Finished:
    code: int
    seconds: float
    output: str  # stdout and stderr together
    timed_out: bool = False

    @property
    def last_line(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return scrub(lines[-1].strip()) if lines else ""

    @property
    def why(self) -> str:
        """Return in one line how it failed."""
        ended = f"stopped after {self.seconds:.0f} s" if self.timed_out else f"ended with code {self.code}"
        return f"{ended}: {self.last_line}" if self.last_line else ended


def run_program(
    command: Sequence[str],
    limit_s: float,
    env: Mapping[str, str] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> Finished:
    """Run ``command`` in the clone for at most ``limit_s``: then it is interrupted, and at last killed.

    ``tick`` is called every TICK_S meanwhile.
    """
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    try:
        # A group of its own, so that what it started goes with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, text=True, errors="replace", start_new_session=True, preexec_fn=_prepare_child,
        )  # fmt: skip
    except OSError as error:
        return Finished(127, 0.0, f"{command[0]}: {error.strerror}")
    timed_out, output = False, None
    try:
        while output is None:
            left = start + limit_s - time.monotonic()
            try:
                output = process.communicate(timeout=GRACE_S if timed_out else max(0.0, min(TICK_S, left)))[0]
            except subprocess.TimeoutExpired:
                tick()
                if left <= TICK_S:
                    _signal_group(process, signal.SIGKILL if timed_out else signal.SIGINT)
                    timed_out = True
    finally:
        # What it left running, as compilers' workers are, goes too.
        _signal_group(process, signal.SIGKILL)
    return Finished(process.returncode, time.monotonic() - start, output, timed_out)


def _prepare_child() -> None:
    """Heed interrupts, which a shell's background programs ignore, and end with this process (Linux, prctl(2))."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        if number == signal.SIGINT:
            os.kill(process.pid, number)
        else:
            os.killpg(process.pid, number)


def find_tool(name: str) -> str | None:
    """Return a program of the CUDA toolkit on PATH, under CUDA_HOME, or where the toolkit usually is."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(str(Path(home) / "bin") for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(places))


def scrub(text: str) -> str:
    """Remove from ``text`` what names a machine: folders from the root on, and the host."""
    text = _CLONE.sub(lambda found: "" if found[1] else ".", text)
    text = _FOLDERS.sub("", text)
    host = socket.gethostname()
    return re.sub(rf"\b{re.escape(host)}\b", "<host>", text) if len(host) > 2 else text


def write_log(path: Path, text: str) -> None:
    """Append to a log, without what names a machine, shortened in its middle."""
    text = scrub(text)
    if len(text) > LOG_CHARS:
        half = LOG_CHARS // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
    with path.open("a") as file:
        file.write(text if text.endswith("\n") else text + "\n")


# Verdicts


def judge_checker(tool: str, done: Finished) -> Part:
    """Return what a memory checker's output means."""
    summary, refusal = SUMMARY.search(done.output), REFUSAL.search(done.output)
    errors = int(next(filter(None, summary.groups()), 0)) if summary is not None else 0
    first = [scrub(found) for found in FINDING.findall(done.output)[:5]]
    status, detail = "ok", "0 errors"
    if refusal is not None:
        status, detail = "not run", f"the tool refuses: {scrub(refusal.group(1))}"
    elif errors or first:
        status, detail = "failed", f"{count_text(errors, 'error')}: {first[0] if first else 'see checks.log'}"
    elif done.timed_out:
        status, detail = "not run", f"it was not done after {done.seconds:.0f} s"
    elif summary is None:
        status, detail = "not run", f"the tool gave no summary: it {done.why}"
    elif done.code != 0:
        status, detail = "failed", f"no error of memory, but the program {done.why}"
    return Part(tool, status, detail, done.seconds, {"errors": errors, "first": first})
