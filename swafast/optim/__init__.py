"""Optimizers and schedules by the names under which the recipes of weight averaging are known."""

from .composer import ComposerSWA
from .cyclical import cyclical_cosine_lr, cyclical_lr
from .torchcontrib import SWA

__all__ = ["SWA", "ComposerSWA", "cyclical_cosine_lr", "cyclical_lr"]
