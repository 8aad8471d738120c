"""Formats: how an average is stored, and what its planes mean.

``planes[0]`` of a format is always the averaged module's own parameter, so the module runs as it is. A further plane
is kept beside it, under the key ``<plane>.<name>`` of the state dict. ``encode`` and ``decode`` are the definition that
every kernel is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """How averages of one dtype are stored."""

    name: str
    dtype: torch.dtype | None  # of planes[0]; None: whatever the param has
    extra: tuple[tuple[str, torch.dtype], ...]  # the further planes, as (name, dtype)
    decode: Callable[[tuple[Tensor, ...]], Tensor]  # planes -> the average at full precision, maybe a plane itself
    encode: Callable[[Tensor], tuple[Tensor, ...]]  # the average at full precision -> planes

    def __repr__(self) -> str:
        return f"Format({self.name!r})"

    def __reduce__(self) -> tuple[Callable[[str], Format], tuple[str]]:
        return get_format, (self.name,)


def encode_exact(value: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into a bfloat16 and the int16 that gives the float32 back: ``bits = (average << 16) + remainder``.

    The bfloat16 is rounded half up in magnitude: a tie rounded to even could not be told apart. A NaN keeps its sign
    and nothing else.
    """
    bits = value.contiguous().view(torch.int32)
    quiet = (bits & -0x80000000) | 0x7FC00000
    bits = torch.where(value.isnan(), quiet, bits)
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


def decode_mirrored(planes: tuple[Tensor, ...]) -> Tensor:
    """Give the float32 average, or the float16 copy where somebody has written another value into that."""
    copy, average = planes
    kept = average.to(torch.float16).view(torch.int16) == copy.contiguous().view(torch.int16)
    return torch.where(kept, average, copy.to(torch.float32))


FLOAT32 = Format(
    "float32",
    torch.float32,
    extra=(),
    decode=lambda planes: planes[0],
    encode=lambda value: (value,),
)
EXACT = Format(
    "exact",
    torch.bfloat16,
    extra=(("remainder", torch.int16),),
    decode=decode_exact,
    encode=encode_exact,
)
# The average of a float16 model is a float32 beside the module's float16 parameter, which each update writes as well:
# float32 has more exponents than float16, so no remainder could join them.
MIRRORED = Format(
    "mirrored",
    torch.float16,
    extra=(("average", torch.float32),),
    decode=decode_mirrored,
    encode=lambda value: (value.to(torch.float16), value),
)
# float64 and complex averages, and whatever a custom averaging function works on: the param's own dtype.
OWN = Format(
    "own",
    None,
    extra=(),
    decode=lambda planes: planes[0],
    encode=lambda value: (value,),
)

_FORMATS = {fmt.name: fmt for fmt in (FLOAT32, EXACT, MIRRORED, OWN)}
_DEFAULTS = {torch.float32: FLOAT32, torch.bfloat16: EXACT, torch.float16: MIRRORED}
_OWN_DTYPES = (torch.float64, torch.complex64, torch.complex128)

#: Names of the further planes, in the order of their keys in a state dict.
EXTRA_PLANES = tuple(dict.fromkeys(plane for fmt in _FORMATS.values() for plane, _ in fmt.extra))


def get_format(name: str) -> Format:
    """Give a format by its name.

    Raises:
        ValueError: no format has that name.
    """
    if name not in _FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, _FORMATS))}, got {name!r}")
    return _FORMATS[name]


def check_format(name: str | None) -> None:
    """Raise ValueError unless ``name`` is a format a user may ask for, or None."""
    public = [known for known in _FORMATS if known != OWN.name]
    if name is not None and name not in public:
        raise ValueError(f"format must be one of {', '.join(map(repr, public))} or None, got {name!r}")


def stored_dtype(requested: str | None, dtype: torch.dtype) -> torch.dtype:
    """Give the dtype that a param of ``dtype`` has in the averaged module when ``requested`` is asked for."""
    if requested is None or dtype not in _DEFAULTS:
        return dtype
    return _FORMATS[requested].dtype or dtype


def format_of(requested: str | None, dtype: torch.dtype) -> Format | None:
    """Give the format of an average whose parameter in the averaged module has ``dtype``; None: it cannot be averaged.

    The parameter's dtype comes first: a module moved to another dtype takes that dtype's default format.
    """
    if dtype in _OWN_DTYPES:
        return OWN
    if requested is not None and _FORMATS[requested].dtype == dtype:
        return _FORMATS[requested]
    return _DEFAULTS.get(dtype)
