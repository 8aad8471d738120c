"""The programs that a GPU run starts, their logs, and what their output means."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from bench import process
from bench.process import Finished, judge_checker, run_program, write_log


@pytest.mark.parametrize("ours", [signal.SIG_IGN, signal.default_int_handler], ids=["in the background", "not"])
def test_a_program_that_takes_too_long_may_still_print_what_it_has(ours: Any) -> None:
    before, ticks = signal.signal(signal.SIGINT, ours), Mock()
    script = "try:\n import time; print('begun', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('counts')"
    try:
        done = run_program([sys.executable, "-c", script], 2.5, tick=ticks)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.timed_out, done.last_line, done.seconds < 60, ticks.call_count >= 2) == (True, "counts", True, True)
    assert run_program(["no-such-program"], 1.0).code == 127


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        (f"{process.ROOT}/tests/test_gpu.py:3: at /usr/local/cuda-13.0/bin/nvcc", "tests/test_gpu.py:3: at nvcc"),
        ("-o /tmp/x-1/a_b/lib.so", "-o lib.so"),
        ("-o a -L/usr/local/lib -I/x/inc", "-o a -Llib -Iinc"),
        ("3 of 4/s and a/b/c", "3 of 4/s and a/b/c"),
        (f"cd {process.ROOT} && x", "cd . && x"),
        (f"--lines {process.ROOT}_out/dry.jsonl in {process.ROOT}.old/a", "--lines dry.jsonl in a"),
    ],
)
def test_logs_name_no_folder_of_a_machine_and_keep_both_ends(text: str, scrubbed: str, tmp_path: Path) -> None:
    write_log(tmp_path / "log", text + "x" * 3 * process.LOG_CHARS + "last")
    written = (tmp_path / "log").read_text()
    assert len(written) < process.LOG_CHARS + 100
    assert (written.startswith(scrubbed), written[-5:]) == (True, "last\n")


SUMMARY = "========= ERROR SUMMARY: {} errors\n"
RACES = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("output", "code", "timed_out", "status", "detail"),
    [
        (SUMMARY.format(0), 0, False, "ok", "0 errors"),
        (RACES.format(0, 0), 0, False, "ok", "0 errors"),
        (RACES.format(2, 2), 86, False, "failed", "2 errors"),
        ("========= Invalid __global__ read of size 4\n" + SUMMARY.format(3), 86, False, "failed", "3 errors: Invalid"),
        ("========= Error: Race reported between Write\n", -9, True, "failed", "Race reported"),
        ("========= Error: Device not supported. Please\n", 1, False, "not run", "the tool refuses: Error: Device not"),
        ("begun\n", 0, True, "not run", "not done after"),
        (SUMMARY.format(0) + "2 of 3 cases equal\n", 1, False, "failed", "code 1: 2 of 3 cases equal"),
        ("Traceback\nnot supported by this\n", 1, False, "not run", "no summary: it ended with code 1: not supported"),
    ],
)
def test_memory_checkers_verdict(output: str, code: int, timed_out: bool, status: str, detail: str) -> None:
    part = judge_checker("memcheck", Finished(code, 1.0, output, timed_out))
    assert part.status == status
    assert detail in part.detail
