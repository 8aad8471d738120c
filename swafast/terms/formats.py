"""Formats: how an average is stored, and what its planes mean.

``planes[0]`` of a format is always the averaged module's own parameter, so the module runs as it is. A further plane
is kept beside it, under the key ``<plane>.<name>`` of the state dict. ``encode`` and ``decode`` are the definition that
every kernel is tested against.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .pickling import pickled_from


@dataclass(frozen=True)
class Format:
    """How averages of one dtype are stored."""

    name: str
    dtype: torch.dtype | None  # of planes[0]; None: whatever the param has
    extra: tuple[tuple[str, torch.dtype], ...] = ()  # the further planes, as (name, dtype)
    #: Planes -> the average at full precision, maybe a plane itself.
    decode: Callable[[tuple[Tensor, ...]], Tensor] = lambda planes: planes[0]
    #: The average at full precision, and for a format that is rounded at random the random bits, int64 of its shape ->
    #: planes. Without bits it is rounded to the nearest.
    encode: Callable[..., tuple[Tensor, ...]] = lambda value: (value,)
    value_dtype: torch.dtype | None = torch.float32  # that the average is worked out in; None: planes[0]'s
    num_random_bits: int = 0  # that an update rounds each element with

    @property
    def nbytes(self) -> int | None:
        """Bytes that one element takes; None: as many as the param's."""
        if self.dtype is None:
            return None
        return self.dtype.itemsize + sum(dtype.itemsize for _, dtype in self.extra)

    def __repr__(self) -> str:
        return f"Format({self.name!r})"

    def __reduce__(self) -> tuple[Callable[[str], Format], tuple[str]]:
        return get_format, (self.name,)


def _quiet_bits(value: Tensor) -> Tensor:
    """Return the bits of float32, int32; a NaN keeps its sign and nothing else."""
    bits = value.contiguous().view(torch.int32)
    return torch.where(value.isnan(), (bits & -0x80000000) | 0x7FC00000, bits)


def encode_exact(value: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into a bfloat16 and the int16 that gives the float32 back: ``bits = (average << 16) + remainder``.

    The bfloat16 is rounded half up in magnitude: a tie rounded to even could not be told apart. A NaN keeps its sign
    and nothing else.
    """
    bits = _quiet_bits(value)
    # int32 wraps on overflow, and the arithmetic shift keeps the low 16 bits of the result right
    average = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return average, bits.to(torch.int16)


def decode_exact(planes: tuple[Tensor, ...]) -> Tensor:
    """Join the planes of ``exact`` into float32.

    Somebody may write into the bfloat16 plane behind our back; the stale remainder then moves the value by half a
    bfloat16 ulp at most, and counts as 0 where it would turn a zero or an infinity into NaN.
    """
    high = planes[0].contiguous().view(torch.int16).to(torch.int32)
    low = planes[1].to(torch.int32)
    magnitude = high & 0x7FFF
    stale = ((magnitude == 0) & (low < 0)) | ((magnitude == 0x7F80) & (low > 0))
    return ((high << 16) + low.masked_fill(stale, 0)).view(torch.float32)


def encode_mirrored(value: Tensor) -> tuple[Tensor, Tensor]:
    return value.to(torch.float16), value


def decode_mirrored(planes: tuple[Tensor, ...]) -> Tensor:
    """Give the float32 average, or the float16 copy where somebody has written another value into that."""
    copy, average = planes
    kept = average.to(torch.float16).view(torch.int16) == copy.contiguous().view(torch.int16)
    return torch.where(kept, average, copy.to(torch.float32))


def encode_compensated(value: Tensor) -> tuple[Tensor, Tensor]:
    """Split float64 into the float32 next to it and another one, of what that leaves over."""
    average = value.to(torch.float32)
    # Cut, not rounded: rounded up to half a unit it could make the sum round to another float32 than the average.
    left_over = ((value - average.to(torch.float64)).view(torch.int64) & ~0x1FFFFFFF).view(torch.float64)
    left_over = left_over.to(torch.float32)
    return average, torch.where(average.isfinite(), left_over, torch.zeros_like(left_over))


def decode_compensated(planes: tuple[Tensor, ...]) -> Tensor:
    """Join the planes of ``compensated`` into float64.

    A compensation that the encoder would not have left, since somebody has written another value into the first plane,
    counts as 0.
    """
    average = planes[0].to(torch.float64)
    value = average + planes[1].to(torch.float64)
    return torch.where(value.to(torch.float32) == planes[0], value, average)


def _rounded_bits(value: Tensor, num_bits: int, random: Tensor | None) -> Tensor:
    """Return the bits of float32, int32, without the lower ``num_bits``, which are cut off or rounded up by chance.

    The chance of the next larger magnitude is the share of a unit in the last place that is cut off. What would round
    up to an infinity is cut; a NaN keeps its sign and nothing else.
    """
    bits = _quiet_bits(value)
    rounded = bits + (1 << (num_bits - 1) if random is None else random.to(torch.int32))
    return torch.where((rounded & 0x7F800000) == 0x7F800000, bits, rounded) >> num_bits


def encode_compact(value: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Split the upper 24 bits of float32 into a bfloat16, rounded half up, and the int8 that gives them back."""
    bits = _rounded_bits(value, 8, random)
    return ((bits + 0x80) >> 8).to(torch.int16).view(torch.bfloat16), bits.to(torch.int8)


def decode_compact(planes: tuple[Tensor, ...]) -> Tensor:
    """Join the planes of ``compact`` into float32; a stale remainder counts as it does in ``exact``."""
    return decode_exact((planes[0], planes[1].to(torch.int32) << 8))


def encode_half(value: Tensor, random: Tensor | None = None) -> tuple[Tensor]:
    return (_rounded_bits(value, 16, random).to(torch.int16).view(torch.bfloat16),)


def decode_half(planes: tuple[Tensor, ...]) -> Tensor:
    return planes[0].to(torch.float32)


FLOAT32 = Format("float32", torch.float32)
EXACT = Format("exact", torch.bfloat16, (("remainder", torch.int16),), decode_exact, encode_exact)
# The average of a float16 model is a float32 beside the module's float16 parameter, which each update writes as well:
# float32 has more exponents than float16, so no remainder could join them.
MIRRORED = Format("mirrored", torch.float16, (("average", torch.float32),), decode_mirrored, encode_mirrored)
# Rounded at random, so that it does not freeze: 24 bits of the float32 average.
COMPACT = Format(
    "compact", torch.bfloat16, (("remainder", torch.int8),), decode_compact, encode_compact, num_random_bits=8
)
# Worked out in float64, of which it keeps 48 bits and more.
COMPENSATED = Format(
    "compensated",
    torch.float32,
    (("compensation", torch.float32),),
    decode_compensated,
    encode_compensated,
    value_dtype=torch.float64,
)
HALF = Format("half", torch.bfloat16, (), decode_half, encode_half, num_random_bits=16)
# float64 and complex averages, and whatever a custom averaging function works on: the param's own dtype.
OWN = Format("own", None, value_dtype=None)

_FORMATS = {fmt.name: fmt for fmt in (FLOAT32, EXACT, MIRRORED, COMPACT, COMPENSATED, HALF, OWN)}
_DEFAULTS = {torch.float32: FLOAT32, torch.bfloat16: EXACT, torch.float16: MIRRORED}
_OWN_DTYPES = (torch.float64, torch.complex64, torch.complex128)

#: Names of the further planes, in the order of their keys in a state dict.
EXTRA_PLANES = tuple(dict.fromkeys(plane for fmt in _FORMATS.values() for plane, _ in fmt.extra))


@pickled_from("swafast")
def get_format(name: str) -> Format:
    """Give a format by its name.

    Raises:
        ValueError: no format has that name.
    """
    if name not in _FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, _FORMATS))}, got {name!r}")
    return _FORMATS[name]


def check_format(name: object) -> None:
    """Raise ValueError unless ``name`` is a format a user may ask for, or None; warn once of one that loses much."""
    public = [known for known in _FORMATS if known != OWN.name]
    if name is not None and name not in public:
        raise ValueError(f"format must be one of {', '.join(map(repr, public))} or None, got {name!r}")
    if name == HALF.name:
        _warn_of_half()


@functools.cache
def _warn_of_half() -> None:
    warnings.warn(
        "format='half' keeps 8 bits of each average: right on the whole, off by percents element by element; 'compact' "
        "takes one byte more and is over a hundred times closer",
        UserWarning,
        stacklevel=4,
    )


def format_of_planes(average: Tensor, extra: Mapping[str, Tensor]) -> Format | None:
    """Give the format that has just these planes, by their dtypes and shapes; None where that is none.

    Args:
        extra: the planes that stand beside the averaged module's own, by name.
    """
    own = OWN if average.dtype in _OWN_DTYPES else None
    for fmt in (_DEFAULTS.get(average.dtype), *_FORMATS.values()):
        if fmt is not None and fmt.dtype == average.dtype and len(fmt.extra) == len(extra):
            planes = [(extra.get(plane), dtype) for plane, dtype in fmt.extra]
            if all(p is not None and p.dtype == dtype and p.shape == average.shape for p, dtype in planes):
                return fmt
    return own


def stored_dtype(requested: str | None, dtype: torch.dtype, *, copied: bool = False) -> torch.dtype:
    """Give the dtype that a param of ``dtype`` has in the averaged module when ``requested`` is asked for.

    What is copied follows the averages, so that the module runs, but to a dtype that holds all its values alone.
    """
    stored = None if requested is None or dtype not in _DEFAULTS else _FORMATS[requested].dtype
    if stored is None or (copied and torch.promote_types(dtype, stored) != stored):
        return dtype
    return stored


def format_of(requested: str | None, dtype: torch.dtype) -> Format | None:
    """Give the format of an average whose parameter in the averaged module has ``dtype``; None: it cannot be averaged.

    The parameter's dtype comes first: a module moved to another dtype takes that dtype's default format.
    """
    if dtype in _OWN_DTYPES:
        return OWN
    if requested is not None and _FORMATS[requested].dtype == dtype:
        return _FORMATS[requested]
    return _DEFAULTS.get(dtype)
