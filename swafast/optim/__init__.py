"""Recipes of weight averaging from papers and from other packages, whose names they have. ``SWALR`` is torch's own."""

from typing import TYPE_CHECKING

from ..terms.lazy import imported_on_use

if TYPE_CHECKING:
    from .block import BlockRounding, block_quantize
    from .composer_swa import SWALR, ComposerSWA
    from .cyclical import cyclical_cosine_lr, cyclical_lr
    from .low_precision import LowPrecision, LowPrecisionMean
    from .torchcontrib import SWA
    from .uniform import quantize_weights, quantized_copy, requantize, uniform_quantize, uniform_step
else:
    _cyclical = dict.fromkeys(("Cosine", "Cycles", "Triangle", "cyclical_cosine_lr", "cyclical_lr"), "cyclical")
    _low = {
        **dict.fromkeys(("BlockRounding", "block_quantize"), "block"),
        **dict.fromkeys(("LowPrecision", "LowPrecisionMean"), "low_precision"),
    }
    _sqwa = ("quantize_weights", "quantized_copy", "requantize", "uniform_quantize", "uniform_step")
    _own = {"ComposerSWA": "composer_swa", "SWALR": "composer_swa", "SWA": "torchcontrib"}
    __getattr__ = imported_on_use(__name__, {**_own, **_cyclical, **_low, **dict.fromkeys(_sqwa, "uniform")})

__all__ = [
    "SWA",
    "SWALR",
    "BlockRounding",
    "ComposerSWA",
    "LowPrecision",
    "LowPrecisionMean",
    "block_quantize",
    "cyclical_cosine_lr",
    "cyclical_lr",
    "quantize_weights",
    "quantized_copy",
    "requantize",
    "uniform_quantize",
    "uniform_step",
]


def __dir__() -> list[str]:
    return __all__
