"""Which frameworks are installed, and what an import of a name that is not there tells."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

from ..terms.hints import of_name


def framework(name: str, least: str, *, extra: str | None = None, package: str | None = None) -> ModuleType:
    """Import a framework.

    Args:
        name: of the module.
        least: the oldest release that is supported.
        extra: of swafast, which installs it; default: ``name``.
        package: under which it is installed; default: ``name``.

    Raises:
        ImportError: it is not installed, or older.
    """
    where = f"swafast.integrations.{extra or name}"
    advice = f"pip install '.[{extra or name}]' in the clone of swafast"
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f"{where} needs {package or name} >= {least}, which is not installed: {advice}") from error
    installed = importlib.metadata.version(package or name)
    if _release(installed) < _release(least):
        raise ImportError(f"{where} needs {package or name} >= {least}, got {installed}: {advice}")
    return found


def explained(module: str) -> Callable[[str], NoReturn]:
    """Return the ``__getattr__`` of an integration, which names the line for a class that another package has."""

    def find(name: str) -> NoReturn:
        if hint := of_name(name):
            # `from module import name` drops the message of an AttributeError.
            raise ImportError(f"cannot import name {name!r} from {module!r}{hint}", name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


def _release(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split(".")[:3]:
        digits = part[: next((i for i, letter in enumerate(part) if not letter.isdigit()), len(part))]
        numbers.append(int(digits or 0))
    return tuple(numbers)
