"""Recipes of weight averaging from other packages, under the names that they have there."""

from typing import TYPE_CHECKING

from ..terms.lazy import imported_on_use

if TYPE_CHECKING:
    from .composer import ComposerSWA
    from .cyclical import cyclical_cosine_lr, cyclical_lr
    from .torchcontrib import SWA
else:
    _cyclical = dict.fromkeys(("Cosine", "Cycles", "Triangle", "cyclical_cosine_lr", "cyclical_lr"), "cyclical")
    __getattr__ = imported_on_use(__name__, {"ComposerSWA": "composer", "SWA": "torchcontrib", **_cyclical})

__all__ = ["SWA", "ComposerSWA", "cyclical_cosine_lr", "cyclical_lr"]


def __dir__() -> list[str]:
    return __all__
