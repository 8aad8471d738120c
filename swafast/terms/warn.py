"""Warnings that point to the user's own line, and notes below the traceback of an error."""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress

#: Frames of these packages are passed over. Go by names: the ``__init__`` of a dataclass has no file.
_PASSED = ("swafast", "torch", "contextlib", "dataclasses")


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line of the stack that is neither in this package nor in torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def add_note(error: Exception, text: str, begin: str) -> None:
    """Add a line to what a traceback shows below an exception, as its ``add_note`` does, which Python 3.10 lacks.

    An exception that is raised again has the last line alone of those that begin with ``begin``.
    """
    with suppress(Exception):
        others = [note for note in getattr(error, "__notes__", ()) if not str(note).startswith(begin)]
        error.__notes__ = [*others, text]  # type: ignore[attr-defined]
