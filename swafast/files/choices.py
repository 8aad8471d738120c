"""What a user of `average` may choose, in Python or on the command line: weights, dtypes, sizes, threads."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from ..terms import coefficients
from ..terms.numbers import as_int

_DTYPES = {
    **dict.fromkeys(("f64", "float64", "fp64", "double"), "F64"),
    **dict.fromkeys(("f32", "float32", "fp32", "float"), "F32"),
    **dict.fromkeys(("f16", "float16", "fp16", "half"), "F16"),
    **dict.fromkeys(("bf16", "bfloat16"), "BF16"),
}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def asked_coefficients(count: int, **asked: Any) -> list[float] | None:
    """Return the coefficients of the inputs, the oldest first. None: the mean."""
    chosen = {name: value for name, value in asked.items() if value is not None}
    if count < 1:
        raise ValueError("inputs must be at least one checkpoint, got none")
    if len(chosen) > 1:
        raise ValueError(f"only one of weights, ema, power and decay may be given, got {' and '.join(chosen)}")
    of: dict[str, Callable[[int, Any], list[float]]] = {
        "weights": coefficients.given,
        "ema": partial(coefficients.ema, argument="ema"),
        "power": partial(coefficients.power, argument="power"),
        "decay": partial(coefficients.decay, argument="decay"),
    }
    return next((of[name](count, value) for name, value in chosen.items()), None)


def check_choices(**choices: tuple[object, Sequence[str]]) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def checked_paths(inputs: Any, out: Any) -> list[str]:
    """Return the paths of the inputs."""
    chosen = [*inputs] if isinstance(inputs, Iterable) and not isinstance(inputs, (str, bytes)) else [inputs]
    for name, path in (*(("inputs", path) for path in chosen), ("out", out)):
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"{name} must be a str or a Path, or several for inputs, got {path!r}")
    return [os.fspath(path) for path in chosen]


def check_names(*, key: object, strip: object, tied: object) -> None:
    for name, value in (("key", key), ("strip", strip)):
        if not isinstance(value, str | None):
            raise TypeError(f"{name} must be a str, got {value!r}")
    pairs = {} if tied is None else tied
    if not isinstance(pairs, Mapping) or not all(isinstance(name, str) for pair in pairs.items() for name in pair):
        raise TypeError(f"tied must be a dict from names to names, got {tied!r}")


def checked_threads(threads: object) -> int:
    number = as_int(threads)
    if number is None or not 1 <= number <= 256:
        raise ValueError(f"threads must be an int from 1 to 256, got {threads!r}")
    return number


def dtype_name(dtype: Any) -> str | None:
    """Return the name in safetensors of a dtype of torch or numpy, or of its name."""
    if dtype is None:
        return None
    name = str(getattr(dtype, "__name__", dtype)).removeprefix("torch.").lower()
    if name not in _DTYPES:
        raise ValueError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype!r}")
    return _DTYPES[name]


def nbytes_of(size: int | str | None) -> int | None:
    if size is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", str(size).strip().upper())
    unit = _UNITS.get(found[2] if found is None or found[2][-1:] in ("", "B") else f"{found[2]}B") if found else None
    if found is None or unit is None or not 1 <= float(found[1]) * unit < 2**63:
        raise ValueError(f"shard_size must be a number of bytes such as '5GB', got {size!r}")
    return int(float(found[1]) * unit)
