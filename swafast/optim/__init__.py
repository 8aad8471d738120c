"""Optimizers and schedules by the names under which the recipes of weight averaging are known."""

from .composer import ComposerSWA
from .cyclical import Cosine as Cosine
from .cyclical import Cycles as Cycles
from .cyclical import Triangle as Triangle
from .cyclical import cyclical_cosine_lr, cyclical_lr
from .torchcontrib import SWA

# Cosine, Cycles and Triangle are here for pickles.
__all__ = ["SWA", "ComposerSWA", "cyclical_cosine_lr", "cyclical_lr"]
