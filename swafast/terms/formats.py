"""Formats: how an average is stored in planes.

``planes[0]`` is always the averaged module's own param, so the module runs as it is. Each further plane has the key
``<plane>.<name>`` in the state dict. ``encode`` and ``decode`` define the format; every kernel is tested against them.
The planes of a spread, if there is one, come after those of the average: see :func:`with_spread`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import hints
from .pickling import pickled_from
from .plane_names import VARIANCE
from .spread import Spread
from .warn import warn_user


@dataclass(frozen=True)
class Format:
    """How averages of one dtype are stored."""

    name: str
    dtype: torch.dtype | None  # of planes[0]; None: the param's own
    extra: tuple[tuple[str, torch.dtype], ...] = ()  # the further planes, as (name, dtype)
    #: Turn planes into the average at full precision. The result may be one of the planes.
    decode: Callable[[tuple[Tensor, ...]], Tensor] = lambda planes: planes[0]
    #: Turn the average at full precision into planes. A format that rounds at random also takes random bits, int64 of
    #: the average's shape; without them it rounds to nearest.
    encode: Callable[..., tuple[Tensor, ...]] = lambda value: (value,)
    value_dtype: torch.dtype | None = torch.float32  # of the average at full precision; None: that of planes[0]
    num_random_bits: int = 0  # used per element and update
    spread: Spread | None = None
    spread_planes: tuple[tuple[str, torch.dtype], ...] = ()  # as ``extra``

    @functools.cached_property
    def further(self) -> tuple[tuple[str, torch.dtype], ...]:
        """All planes but plane 0: those of the average, then those of the spread."""
        return (*self.extra, *self.spread_planes)

    @functools.cached_property
    def num_planes(self) -> int:
        """The number of planes of the average, without those of the spread."""
        return 1 + len(self.extra)

    @functools.cached_property
    def mean(self) -> Format:
        """The format of the average alone."""
        return self if self.spread is None else get_format(self.name)

    @property
    def nbytes(self) -> int | None:
        """Bytes of one element in all planes of the average; None if ``dtype`` is None."""
        if self.dtype is None:
            return None
        return self.dtype.itemsize + sum(dtype.itemsize for _, dtype in self.extra)

    def __repr__(self) -> str:
        return f"Format({self.name!r})" if self.spread is None else f"Format({self.name!r}, {self.spread})"

    def __reduce__(self) -> tuple[Callable[..., Format], tuple[Any, ...]]:
        if self.spread is None:
            return get_format, (self.name,)
        return with_spread, (self.mean, self.spread, self.dtype or self.spread_planes[-1][1])


def _quiet_bits(value: Tensor) -> Tensor:
    """Return the bits of float32 as int32; of a NaN only the sign is kept."""
    bits = value.contiguous().view(torch.int32)
    return torch.where(value.isnan(), (bits & -0x80000000) | 0x7FC00000, bits)


def encode_exact(value: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into a bfloat16 average and an int16 remainder, with ``bits = (average << 16) + remainder``.

    The bfloat16 rounds ties away from zero; with ties to even, two float32 values would share one pair of planes. Of a
    NaN only the sign is kept.
    """
    bits = _quiet_bits(value)
    # int32 wraps on overflow, and the arithmetic shift keeps the low 16 bits of the result right.
    average = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return average, bits.to(torch.int16)


def decode_exact(planes: tuple[Tensor, ...]) -> Tensor:
    """Join the planes of ``exact`` into float32.

    If other code has written into the bfloat16 plane, the remainder is stale. It then moves the value by at most half a
    bfloat16 ulp. Where it would turn a zero or an infinity into NaN, it counts as 0.
    """
    high = planes[0].contiguous().view(torch.int16).to(torch.int32)
    low = planes[1].to(torch.int32)
    magnitude = high & 0x7FFF
    # Not `==`, for which a subclass of Tensor may have a method of its own.
    stale = (magnitude.eq(0) & (low < 0)) | (magnitude.eq(0x7F80) & (low > 0))
    return ((high << 16) + low.masked_fill(stale, 0)).view(torch.float32)


def encode_mirrored(value: Tensor) -> tuple[Tensor, Tensor]:
    return value.to(torch.float16), value


def decode_mirrored(planes: tuple[Tensor, ...]) -> Tensor:
    """Return the float32 average; where other code has changed the float16 copy, return the copy."""
    copy, average = planes
    kept = average.to(torch.float16).view(torch.int16).eq(copy.contiguous().view(torch.int16))
    return torch.where(kept, average, copy.to(torch.float32))


def encode_compensated(value: Tensor) -> tuple[Tensor, Tensor]:
    """Split float64 into the nearest float32 and a float32 compensation, the difference."""
    average = value.to(torch.float32)
    # Cut, not rounded: a difference rounded up to half a unit could make the sum round to another float32.
    left_over = ((value - average.to(torch.float64)).view(torch.int64) & ~0x1FFFFFFF).view(torch.float64)
    left_over = left_over.to(torch.float32)
    return average, torch.where(average.isfinite(), left_over, torch.zeros_like(left_over))


def decode_compensated(planes: tuple[Tensor, ...]) -> Tensor:
    """Join the planes of ``compensated`` into float64.

    If other code has written into the first plane, the compensation may be one that the encoder never makes. It then
    counts as 0.
    """
    average = planes[0].to(torch.float64)
    value = average + planes[1].to(torch.float64)
    return torch.where(value.to(torch.float32).eq(planes[0]), value, average)


def _rounded_bits(value: Tensor, num_bits: int, random: Tensor | None) -> Tensor:
    """Return the bits of float32 as int32, shifted right by ``num_bits`` and rounded: at random, or to nearest.

    At random, the chance to round up in magnitude is the cut-off share of a unit in the last place. A value that would
    round up to infinity is cut instead. Of a NaN only the sign is kept.
    """
    bits = _quiet_bits(value)
    rounded = bits + (1 << (num_bits - 1) if random is None else random.to(torch.int32))
    return torch.where((rounded & 0x7F800000).eq(0x7F800000), bits, rounded) >> num_bits


def encode_compact(value: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Split the upper 24 bits of float32 into a bfloat16 average, ties away from zero, and an int8 remainder."""
    bits = _rounded_bits(value, 8, random)
    return ((bits + 0x80) >> 8).to(torch.int16).view(torch.bfloat16), bits.to(torch.int8)


def decode_compact(planes: tuple[Tensor, ...]) -> Tensor:
    """Join the planes of ``compact`` into float32; a stale remainder is treated as in ``exact``."""
    return decode_exact((planes[0], planes[1].to(torch.int32) << 8))


def encode_half(value: Tensor, random: Tensor | None = None) -> tuple[Tensor]:
    return (_rounded_bits(value, 16, random).to(torch.int16).view(torch.bfloat16),)


def decode_half(planes: tuple[Tensor, ...]) -> Tensor:
    return planes[0].to(torch.float32)


FLOAT32 = Format("float32", torch.float32)
EXACT = Format("exact", torch.bfloat16, (("remainder", torch.int16),), decode_exact, encode_exact)
# The float32 average stands beside the module's float16 param, and each update writes both. float32 has more exponents
# than float16, so a remainder could not join them.
MIRRORED = Format("mirrored", torch.float16, (("average", torch.float32),), decode_mirrored, encode_mirrored)
# 24 bits of the float32 average, rounded at random so that it does not freeze.
COMPACT = Format(
    "compact", torch.bfloat16, (("remainder", torch.int8),), decode_compact, encode_compact, num_random_bits=8
)
# Computed in float64; the planes keep at least 48 bits of it.
COMPENSATED = Format(
    "compensated",
    torch.float32,
    (("compensation", torch.float32),),
    decode_compensated,
    encode_compensated,
    value_dtype=torch.float64,
)
HALF = Format("half", torch.bfloat16, (), decode_half, encode_half, num_random_bits=16)
# The param's own dtype, for float64 and complex averages and for averages of a custom averaging function.
OWN = Format("own", None, value_dtype=None)

_FORMATS = {fmt.name: fmt for fmt in (FLOAT32, EXACT, MIRRORED, COMPACT, COMPENSATED, HALF, OWN)}
_DEFAULTS = {torch.float32: FLOAT32, torch.bfloat16: EXACT, torch.float16: MIRRORED}
_OWN_DTYPES = (torch.float64, torch.complex64, torch.complex128)

#: Names of the further planes, in the order of their keys in a state dict.
EXTRA_PLANES = tuple(dict.fromkeys(plane for fmt in _FORMATS.values() for plane, _ in fmt.extra))


@pickled_from("swafast")
def get_format(name: str) -> Format:
    """Return the format with this name.

    Raises:
        ValueError: no format has this name.
    """
    if name not in _FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, _FORMATS))}, got {name!r}")
    return _FORMATS[name]


@functools.cache
def with_spread(fmt: Format, spread: Spread | None, dtype: torch.dtype) -> Format:
    """Return a format of averages that have a spread too: the same object for what is the same.

    Args:
        fmt: of the average alone.
        dtype: of plane 0, which the deviations have unless the spread names another.
    """
    if spread is None:
        return fmt
    columns = ((column, spread.dtype or dtype) for column in spread.columns)
    return replace(fmt, spread=spread, spread_planes=((VARIANCE, torch.float32), *columns))


def check_format(name: object) -> None:
    """Raise ValueError unless ``name`` is None or a format that a user may ask for. Warn once for ``half``."""
    public = [known for known in _FORMATS if known != OWN.name]
    if name is not None and name not in public:
        raise ValueError(
            f"format must be one of {', '.join(map(repr, public))} or None, got {name!r}"
            f"{hints.of_value('format', name)}"
        )
    if name == HALF.name:
        _warn_of_half()


@functools.cache
def _warn_of_half() -> None:
    warn_user(
        "format='half' keeps 8 bits of each average: each element is a few percent off, without bias. Use 'compact' if "
        "you can spare one more byte per param: its error is over a hundred times smaller"
    )


def format_of_planes(average: Tensor, extra: Mapping[str, Tensor]) -> Format | None:
    """Return the format that has exactly these planes, by dtype and shape; None if there is none.

    Args:
        average: plane 0.
        extra: the further planes, by name.
    """
    own = OWN if average.dtype in _OWN_DTYPES and not extra else None
    for fmt in (_DEFAULTS.get(average.dtype), *_FORMATS.values()):
        if fmt is not None and fmt.dtype == average.dtype and len(fmt.extra) == len(extra):
            planes = [(extra.get(plane), dtype) for plane, dtype in fmt.extra]
            if all(p is not None and p.dtype == dtype and p.shape == average.shape for p, dtype in planes):
                return fmt
    return own


@functools.cache
def dtype_named(name: object) -> torch.dtype:
    """Return the dtype of this name, such as ``"bfloat16"``.

    Raises:
        ValueError: this torch has none, as if a newer one has written the name.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"dtype must be one of torch {torch.__version__}, got {name!r}: use the torch that has saved it"
        )
    return dtype


def stored_dtype(requested: str | None, dtype: torch.dtype, *, copied: bool = False) -> torch.dtype:
    """Return the dtype in the averaged module of a param of ``dtype`` if the user asked for format ``requested``.

    A copied tensor takes the averages' dtype too, so that the module runs, but only if that dtype can hold every value.
    """
    stored = None if requested is None or dtype not in _DEFAULTS else _FORMATS[requested].dtype
    if stored is None or (copied and torch.promote_types(dtype, stored) != stored):
        return dtype
    return stored


def format_of(requested: str | None, dtype: torch.dtype) -> Format | None:
    """Return the format of an average whose param in the averaged module has ``dtype``; None if it cannot be averaged.

    ``dtype`` decides first: if it is not that of ``requested``, as after a cast, the default format of ``dtype`` is
    used.
    """
    if dtype in _OWN_DTYPES:
        return OWN
    if requested is not None and _FORMATS[requested].dtype == dtype:
        return _FORMATS[requested]
    return _DEFAULTS.get(dtype)
