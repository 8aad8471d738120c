"""Warnings that point to the user's own line."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

import torch

#: Files whose frames are passed over: those of this package, of torch, and the module that runs context managers.
_PASSED = (
    os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ""),
    os.path.join(os.path.dirname(torch.__file__), ""),
    contextlib.__file__,
)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line of the stack that is neither in this package nor in torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
