"""The backends: tensors in, tensors changed. ``contract.py`` says what a backend is.

Neither this module nor ``library.py`` imports torch, so that files are averaged without it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unavailable:
    """Why a backend cannot run here."""

    reason: str
    #: Nothing is amiss: this machine has no such device, or this torch or this build is for another kind.
    expected: bool = False
    #: The user has named what does not work, so nothing may stand in for it.
    named: bool = False

    def __str__(self) -> str:
        return self.reason
