"""Methods of a framework's object that run inside a context of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


def run_inside(owner: Any, name: str, around: Callable[..., AbstractContextManager[Any]]) -> None:
    """Have a method of this object run inside ``around``, which gets the arguments of the call."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with around(*args, **kwargs):
            return method(*args, **kwargs)

    setattr(owner, name, wrapped)
