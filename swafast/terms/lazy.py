"""Import a package's names on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def imported_on_use(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a package (PEP 562) that imports each name on first use.

    If a package imports its modules at once, two threads that import parts of it can wait for each other. Python then
    breaks the deadlock with half-initialised modules.

    Args:
        places: for each name, the module of the package that defines it; for a module, its own name.
    """

    def __getattr__(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f".{places[name]}", package)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{package}.{name} needs the module {error.name}, which is not installed: install it, or if it is part "
                "of swafast, install swafast again with pip install --force-reinstall"
            ) from error
        return module if places[name] == name else getattr(module, name)

    return __getattr__
