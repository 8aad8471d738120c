"""States of other tools' averages, loaded into an averaged model, which goes on where they stopped."""

from .conversion import Conversion, load

__all__ = ["Conversion", "load"]
