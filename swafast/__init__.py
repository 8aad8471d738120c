"""Averages of a model's weights along its training, in one fused pass: ``average += weight * (param - average)``."""

from .averaged_model import FusedAveragedModel
from .rules import EqualAverage, ExponentialAverage, PowerAverage, Rule

__version__ = "0.1.0"

__all__ = ["EqualAverage", "ExponentialAverage", "FusedAveragedModel", "PowerAverage", "Rule", "__version__"]
