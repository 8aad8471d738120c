"""Averages made after training, from averages that were stored along it."""

from typing import TYPE_CHECKING

from ..terms.lazy import imported_on_use

if TYPE_CHECKING:
    from .snapshots import Snapshots
else:
    __getattr__ = imported_on_use(__name__, {"Snapshots": "snapshots"})

__all__ = ["Snapshots"]


def __dir__() -> list[str]:
    return __all__
