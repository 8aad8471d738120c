"""Averages of a model's weights along its training, in one fused pass: ``average += weight * (param - average)``."""

from typing import TYPE_CHECKING, Any

from .averaged_model import FusedAveragedModel
from .averages import FusedAverages
from .batchnorm import update_bn
from .rules import EqualAverage, ExponentialAverage, PowerAverage, Rule

if TYPE_CHECKING:
    from .sharded import ShardedAveragedModel, ShardedAverages, Snapshots

__version__ = "0.1.0"

__all__ = [
    "EqualAverage",
    "ExponentialAverage",
    "FusedAveragedModel",
    "FusedAverages",
    "PowerAverage",
    "Rule",
    "ShardedAveragedModel",
    "ShardedAverages",
    "Snapshots",
    "__version__",
    "update_bn",
]


def __getattr__(name: str) -> Any:
    # On first use: DTensor and FSDP take most of a second to import.
    if name in ("ShardedAveragedModel", "ShardedAverages", "Snapshots"):
        from . import sharded

        return getattr(sharded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
