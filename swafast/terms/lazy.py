"""What is made on first use: names that a package imports, and attributes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


def imported_on_use(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package (PEP 562) that imports each name when it is first asked for.

    A package that imports its own modules at once would let two threads that import parts of it wait for each other,
    and Python then gives them half-made modules.

    Args:
        places: for each name, the module in the package that has it; the name itself for a module.
    """

    def __getattr__(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f".{places[name]}", package)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{package}.{name} needs the module {error.name}, which is not there: install it, or where it is one "
                "of swafast's, install swafast again with pip install --force-reinstall"
            ) from error
        return module if places[name] == name else getattr(module, name)

    return __getattr__


class MadeOnUse(Generic[T]):
    """An attribute that is made when it is first asked for, once for all threads.

    An object may come without its ``__init__``, as a subclass or a copy. Afterwards the attribute is found in the
    object's own dict, without a call of Python.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> MadeOnUse[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> MadeOnUse[T] | T:
        return self if instance is None else instance.__dict__.setdefault(self._name, self._make(instance))
