"""Averages in files. `average` makes one checkpoint of several, and needs no torch for safetensors.

`combine_files` merges averages by their counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..terms.lazy import imported_on_use

if TYPE_CHECKING:
    from .averaging import AverageReport, average
    from .combining import combine_files

__all__ = ["AverageReport", "average", "combine_files"]

if not TYPE_CHECKING:
    _PLACES = {"AverageReport": "averaging", "average": "averaging", "combine_files": "combining"}
    __getattr__ = imported_on_use(__name__, _PLACES)
