"""Warnings that point to the user's own line."""

from __future__ import annotations

import sys
import warnings

#: Frames of these packages are passed over. Go by names: the ``__init__`` of a dataclass has no file.
_PASSED = ("swafast", "torch", "contextlib", "dataclasses")


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line of the stack that is neither in this package nor in torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
