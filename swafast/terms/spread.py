"""The spread of an average: its variance and its last deviations, of which SWAG draws samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .numbers import as_int
from .pickling import pickled_from
from .plane_names import DEVIATION

#: The dtypes in which kernels keep deviations.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Past it the addresses of the columns outweigh a small tensor.
_MOST_COLUMNS = 4096


@pickled_from("swafast")
@dataclass(frozen=True)
class Spread:
    """What an average keeps besides the mean: the variance of each element, and the last deviations from the mean.

    Args:
        count: how many deviations, K: 0 for the variance alone (SWAG-diagonal), or 2 and more. The update of n models
            writes the column n % K.
        dtype: of the deviations: float32, bfloat16 or float16; default: that of the averaged module's parameter.

    Raises:
        TypeError: ``count`` is not an int.
        ValueError: ``count`` is 1, negative or larger than 4096; or ``dtype`` is none of these.

    Paper: Maddox et al. 2019, "A Simple Baseline for Bayesian Uncertainty in Deep Learning", arXiv:1902.02476.
    """

    count: int
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        count = as_int(self.count)
        if count is None:
            raise TypeError(f"deviations must be a whole number, a Spread or None, got {self.count!r}")
        if count == 1 or not 0 <= count <= _MOST_COLUMNS:
            raise ValueError(
                f"deviations must be 0 for the variance alone, or from 2 to {_MOST_COLUMNS}, got {count}"
                + (": one deviation has no covariance" if count == 1 else "")
            )
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(f"dtype of deviations must be one of {_DTYPES} or None, got {self.dtype!r}")
        object.__setattr__(self, "count", count)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the planes of the deviations."""
        return tuple(f"{DEVIATION}.{column}" for column in range(self.count))

    def __repr__(self) -> str:
        return f"Spread({self.count})" if self.dtype is None else f"Spread({self.count}, dtype={self.dtype})"


def checked_spread(deviations: object) -> Spread | None:
    """Return what the argument ``deviations`` asks for: None for no spread.

    Raises:
        TypeError, ValueError: as :class:`Spread`.
    """
    if deviations is None or isinstance(deviations, Spread):
        return deviations
    return Spread(deviations)  # type: ignore[arg-type]  # it checks
