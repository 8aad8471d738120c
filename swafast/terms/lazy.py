"""Names that a package imports on first use, and attributes made on first use, or checked when they are set."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, overload

from . import hints

T = TypeVar("T")


def imported_on_use(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a package (PEP 562) that imports each name on first use.

    If a package imported its modules at once, two threads that import parts of it could wait for each other. Python
    then breaks the deadlock with half-initialised modules.

    Args:
        places: for each name, the module of the package that defines it; for a module, its own name.
    """

    def __getattr__(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hints.of_name(name)}")
        try:
            module = importlib.import_module(f".{places[name]}", package)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{package}.{name} needs the module {error.name}, which is not installed: install it, or if it is part "
                "of swafast, install swafast again with pip install --force-reinstall"
            ) from error
        return module if places[name] == name else getattr(module, name)

    return __getattr__


class MadeOnUse(Generic[T]):
    """An attribute that is made on its first use, once for all threads.

    It needs no ``__init__``, which copies and some subclasses do not call. After the first use it is in the object's
    own dict, so that reading it calls no Python function.
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


class Checked(Generic[T]):
    """An attribute that is checked whenever it is set, at construction and later, and is in the object's own dict.

    Args:
        check: ``check(name, value)`` returns what is kept, or raises.
    """

    def __init__(self, check: Callable[[str, Any], T]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Checked[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Checked[T] | T:
        if instance is None:
            return self
        try:
            value: T = instance.__dict__[self._name]
        except KeyError:
            raise AttributeError(f"{type(instance).__name__!r} object has no attribute {self._name!r}") from None
        return value

    def __set__(self, instance: object, value: Any) -> None:
        instance.__dict__[self._name] = self._check(self._name, value)
