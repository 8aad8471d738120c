"""Recipes of weight averaging from other packages, under the names that they have there. ``SWALR`` is torch's own."""

from typing import TYPE_CHECKING

from ..terms.lazy import imported_on_use

if TYPE_CHECKING:
    from .composer import SWALR, ComposerSWA
    from .cyclical import cyclical_cosine_lr, cyclical_lr
    from .torchcontrib import SWA
else:
    _cyclical = dict.fromkeys(("Cosine", "Cycles", "Triangle", "cyclical_cosine_lr", "cyclical_lr"), "cyclical")
    __getattr__ = imported_on_use(
        __name__, {"ComposerSWA": "composer", "SWALR": "composer", "SWA": "torchcontrib", **_cyclical}
    )

__all__ = ["SWA", "SWALR", "ComposerSWA", "cyclical_cosine_lr", "cyclical_lr"]


def __dir__() -> list[str]:
    return __all__
