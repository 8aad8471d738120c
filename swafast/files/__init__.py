"""Averages in files. `average` makes one checkpoint of several, and needs no torch for safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..terms.lazy import imported_on_use

if TYPE_CHECKING:
    from .averaging import AverageReport, average

__all__ = ["AverageReport", "average"]

if not TYPE_CHECKING:
    __getattr__ = imported_on_use(__name__, dict.fromkeys(__all__, "averaging"))
