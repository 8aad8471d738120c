"""What a user may assign to attributes of averages at any time, checked as the arguments of a construction are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..op import checks
from ..op.choice import choose_backends
from ..terms.formats import check_format
from .accepting import check_include


def _of(check: Callable[[Any], object]) -> Callable[[str, Any], Any]:
    """Return what checks a value, and keeps it as it is."""

    def checked(name: str, value: Any) -> Any:
        check(value)
        return value

    return checked


def _bool(name: str, value: Any) -> bool:
    return bool(value) if value in (0, 1) else checks.checked_bool(name, value)  # torch's class takes 1 too


def _backend(name: str, value: Any) -> Any:
    if value is not None:
        choose_backends(value)
    return value


def _count(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of one int64, got {value!r}: write {name}.fill_(count) to set it")
    if value.numel() != 1 or value.dtype != torch.int64:
        raise ValueError(f"{name} must be one int64, got {value.dtype} {tuple(value.shape)}")
    return value


#: By attribute: what returns a value as it is kept, or raises TypeError or ValueError; RuntimeError for a backend that
#: cannot run on this machine. Asking a dict is no call of Python: averages set attributes in each load.
SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "nonfinite": _of(checks.check_nonfinite),
    "seed": lambda name, value: checks.checked_seed(value),
    "format": _of(check_format),
    "backend": _backend,
    "include": _of(check_include),
    "use_buffers": _bool,
    "share_replicas": _bool,
    "n_averaged": _count,
}
