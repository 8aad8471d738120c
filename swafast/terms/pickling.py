"""Where a pickle looks for what it holds: a public package, which stays when modules move."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T", bound=Callable[..., object])


def pickled_from(package: str) -> Callable[[T], T]:
    """Mark a class or function that ends up in pickles: they hold it as ``package.<name>``, where it must resolve.

    Set after the class is made, since a dataclass looks for its annotations' names in the module that it is in.
    """

    def mark(kind: T) -> T:
        if isinstance(kind, type):  # later they would be looked up in ``package``
            kind.__annotations__ = inspect.get_annotations(kind, eval_str=True)
        kind.__module__ = package
        return kind

    return mark
