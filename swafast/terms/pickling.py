"""Pickle classes and functions under a public package, so that old pickles load after a module has moved."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T", bound=Callable[..., object])


def pickled_from(package: str) -> Callable[[T], T]:
    """Return a decorator that has a class or function pickled as ``package.<name>``, where imports must find it.

    Put it above ``@dataclass``, which needs the real module to resolve annotations.
    """

    def mark(kind: T) -> T:
        if isinstance(kind, type):  # resolve them now: later they would be looked up in ``package``
            kind.__annotations__ = inspect.get_annotations(kind, eval_str=True)
        kind.__module__ = package
        return kind

    return mark
