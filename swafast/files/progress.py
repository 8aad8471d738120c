"""How far a run is, in bytes: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

#: Seconds between two lines where there is no terminal.
LINE_S = 5.0
#: Seconds between two drawings of the bar. At ten a second rich's own thread took 4 % of a core.
_DRAW_S = 0.2
#: Columns that a terminal needs for all that the bar shows, and for all but the rate.
_WIDE, _MEDIUM = 75, 60


class Progress:
    """Shows how many of ``total`` bytes are done. Several threads may advance it.

    Args:
        total: bytes.
        label: what is done, in a word or two.
        quiet: show nothing.
        file: where to show it; by default, stderr.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        total: int,
        label: str = "averaging",
        *,
        quiet: bool = False,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done = total, 0
        self._label = self._shown_label = label
        self._clock = clock
        self._file = sys.stderr if file is None else file
        quiet = quiet or self._file is None  # as after 2>&-
        self._start = self._shown = 0.0
        self._lock = Lock()
        is_terminal = not quiet and self._file.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._shows_bar, self._shows_lines = is_terminal and not quiet, not is_terminal and not quiet
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        self._start = self._shown = self._clock()
        if self._shows_bar:
            self._bar = _bar(self._file, self._label, self.total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        seconds = self._clock() - self._start
        if self._bar is not None:
            self._bar.stop()  # the bar goes, and the cursor comes back
        if kind is None and (self._shows_bar or self._shows_lines):
            self._line(f"{self._label}: {size_text(self.done)} in {seconds:.1f} s, {_rate(self.done, seconds)}")

    def advance(self, nbytes: int) -> None:
        """Add bytes that are done."""
        with self._lock:
            self.done += nbytes
            now = self._clock()
            due = now - self._shown >= (LINE_S if self._bar is None else _DRAW_S)
            if due:
                self._shown = now
        if not due:
            return
        if self._bar is not None:
            self._draw()
        elif self._shows_lines:
            seconds = now - self._start
            share = self.done / max(self.total, 1)
            left = seconds * (self.total - self.done) / max(self.done, 1)
            done, rate = f"{size_text(self.done)} of {size_text(self.total)}", _rate(self.done, seconds)
            self._line(f"{self._label}: {done} ({share:.0%}), {rate}, {_time(left)} left")

    def phase(self, label: str) -> None:
        """Show that something else is done now, such as a wait for the disk."""
        self._shown_label = label
        if self._bar is not None:
            self._draw()

    def _draw(self) -> None:
        assert self._bar is not None
        rate = _rate(self.done, self._clock() - self._start)
        self._bar.update(
            self._bar.task_ids[0], completed=self.done, description=self._shown_label, rate=rate, refresh=True
        )

    def _line(self, text: str) -> None:
        with suppress(BrokenPipeError):  # nobody reads it any more
            self._file.write(text + "\n")
            self._file.flush()


def _bar(file: TextIO, label: str, total: int) -> RichProgress:
    # Only here: rich takes 40 ms and 10 MB, which a run without a terminal does not need.
    from rich import progress
    from rich.console import Console

    console = Console(file=file)
    columns: list[progress.ProgressColumn] = [
        *(progress.TextColumn("{task.description}"), progress.BarColumn(bar_width=None)),
        progress.TextColumn("{task.percentage:3.0f}%"),
    ]
    if console.width >= _MEDIUM:
        columns.append(progress.DownloadColumn())
    if console.width >= _WIDE:
        columns.append(progress.TextColumn("{task.fields[rate]}"))
    columns.append(progress.TimeRemainingColumn(compact=True))
    # Without rich's own thread, which would draw in the middle of a message.
    bar = progress.Progress(*columns, console=console, auto_refresh=False, transient=True, expand=True)
    bar.add_task(label, total=total, rate="")
    return bar


def size_text(nbytes: float) -> str:
    """Write bytes in decimal units, as disks are sold: ``2.50 GB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} B"


def _rate(nbytes: int, seconds: float) -> str:
    return f"{nbytes / max(seconds, 1e-9) / 1e9:.2f} GB/s"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
