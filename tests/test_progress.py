"""The progress of a run: a bar that fits the terminal, lines where there is none, and nothing where it is quiet."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from swafast.files import progress
from swafast.files.progress import Progress

GB = 10**9
# A clock that jumps, so that every part is drawn without a wait.
SCRIPT = """
import itertools, sys
from swafast.files.progress import Progress
ticks = itertools.count()
with Progress(3 * 10**9, clock=lambda: next(ticks) * 0.5) as shown:
    for _ in range(30):
        shown.advance(10**8)
    shown.phase("writing to disk")
    if "fail" in sys.argv:
        sys.exit(3)
"""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(total: int, seconds: int, *, quiet: bool = False) -> list[str]:
    """The lines of a run that does 1 GB a second."""
    file, clock = io.StringIO(), Clock()
    with Progress(total, quiet=quiet, file=file, clock=clock) as shown:
        for _ in range(8 * seconds):
            clock.now += 0.125
            shown.advance(GB // 8)
    return file.getvalue().splitlines()


def in_terminal(columns: int, *arguments: str, term: str = "xterm-256color") -> tuple[int, str]:
    """Run the script in a pseudo-terminal, and return its exit code and what it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, "TERM": term}
    ) as child:
        os.close(theirs)
        written = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # on Linux, at the end of a pseudo-terminal
                break
            if not data:
                break
            written += data
    os.close(ours)
    return child.returncode, written.decode()


def frames_of(text: str) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    return [frame for frame in re.split(r"[\r\n]+", plain) if frame.strip()]


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        (
            80,
            r"averaging [━╸╺ ]+ 50% 1\.5/3\.0 GB 0\.\d\d GB/s [\d:-]+",
        ),
        (60, r"averaging [━╸╺ ]+ 50% 1\.5/3\.0 GB [\d:-]+"),
        (40, r"averaging [━╸╺ ]+ 50% [\d:-]+"),
    ],
)
def test_the_bar_fits_the_terminal(columns: int, shape: str) -> None:
    code, text = in_terminal(columns)
    *frames, last = frames_of(text)
    assert code == 0
    assert {len(frame) for frame in frames} == {columns}
    assert any(re.fullmatch(shape, frame.rstrip()) for frame in frames), frames
    assert frames[-1].startswith("writing to disk")
    # The bar is gone, and the cursor is back.
    assert re.fullmatch(r"averaging: 3 GB in \d+\.\d s, 0\.\d\d GB/s", last)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize("columns", [45, 59, 60, 65, 75, 100])
def test_the_longest_sizes_and_labels_fit_in_one_line(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    ticks = iter(range(100))
    with Progress(990_100_000, file=file, clock=lambda: next(ticks)) as shown:
        shown.advance(671_100_000)
        shown.phase("syncing to the disk")
        frames = file.getvalue()
    assert "\n" not in frames
    assert "…" not in frames
    assert ("671.1/990.1 MB" in frames) == (columns >= 60)


def test_a_failure_in_a_terminal_gives_the_cursor_back() -> None:
    code, text = in_terminal(80, "fail")
    assert code == 3
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "averaging: 3 GB" not in text


def test_a_dumb_terminal_has_lines() -> None:
    code, text = in_terminal(80, term="dumb")
    assert code == 0
    assert "\x1b" not in text
    assert text.splitlines()[0].startswith("averaging: ")


def test_lines_come_every_few_seconds() -> None:
    assert lines_of(12 * GB, 12) == [
        "averaging: 5 GB of 12 GB (42%), 1.00 GB/s, 7 s left",
        "averaging: 10 GB of 12 GB (83%), 1.00 GB/s, 2 s left",
        "averaging: 12 GB in 12.0 s, 1.00 GB/s",
    ]
    assert "2 min 0 s left" in lines_of(125 * GB, 6)[0]
    assert lines_of(GB, 1) == ["averaging: 1 GB in 1.0 s, 1.00 GB/s"]


def test_quiet_shows_nothing() -> None:
    assert lines_of(12 * GB, 12, quiet=True) == []


def test_a_failed_run_does_not_say_that_it_is_done() -> None:
    file = io.StringIO()

    def fail() -> None:
        with Progress(GB, file=file):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert file.getvalue() == ""


def test_no_byte_of_two_threads_is_lost() -> None:
    class Slow(int):
        """A number that another thread may overtake while it is added."""

        def __radd__(self, other: int) -> int:
            time.sleep(1e-4)
            return int(self) + other

    with Progress(10**6, quiet=True) as shown:
        threads = [threading.Thread(target=lambda: [shown.advance(Slow(1)) for _ in range(100)]) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert shown.done == 200


def test_nothing_is_divided_by_zero() -> None:
    clock, file = Clock(), io.StringIO()
    with Progress(0, file=file, clock=clock) as shown:
        clock.now += progress.LINE_S
        shown.advance(0)
    assert file.getvalue().splitlines() == [
        "averaging: 0 B of 0 B (0%), 0.00 GB/s, 0 s left",
        "averaging: 0 B in 5.0 s, 0.00 GB/s",
    ]


def test_rich_is_imported_in_a_terminal_alone() -> None:
    code = (
        "import sys; from swafast.files.progress import Progress\n"
        "with Progress(2) as shown: shown.advance(2)\n"
        "assert not {'rich', 'torch'} & {*sys.modules}, sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_an_average_goes_on_where_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as after 2>&-
    for each in (Progress(10), Progress(10, quiet=True), Progress(10, file=Closed())):
        with each as shown:
            shown.advance(10)
