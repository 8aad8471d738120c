"""The choice of backends for an update: the one asked for, or all that load for the tensors' devices."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from ..backends import Unavailable, cpu, cuda, reference
from ..backends.contract import Backend, Pair
from ..backends.triton import launch as triton_launch
from ..terms.warn import warn_user

#: Every backend, the preferred one first. ``reference`` serves every pair that the others do not.
BACKENDS: tuple[Backend, ...] = (cuda, cpu, triton_launch, reference)

_warned: set[str] = set()


def choose_backends(requested: str | None = None, device_types: Collection[str] = ()) -> tuple[Backend, ...]:
    """Return the backends to use, the preferred one first. The last is ``reference``, for pairs that no other serves.

    Without a name, warn once of a backend that should load here and does not. If only ``reference`` is left for a
    device, warn once of each backend that is missing.

    Args:
        requested: the name of a backend; None: the name in ``SWAFAST_BACKEND``, or if that is not set, all that load.
        device_types: types of the tensors' devices. Without a name, backends for other devices are not loaded.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend of that name cannot run on this machine; or the library that ``SWAFAST_LIBRARY``
            names does not load.
    """
    name = requested if requested is not None else os.environ.get("SWAFAST_BACKEND") or None
    source = "backend" if requested is not None else "SWAFAST_BACKEND"
    known = {backend.name: backend for backend in BACKENDS}
    if name is None:
        return (*(_loaded(device_types)), reference)
    check_name(name, source)
    missing = known[name].unavailable()
    if missing is not None:
        raise RuntimeError(f"{source}={name!r} cannot run here: {missing.reason}")
    return (reference,) if name == reference.name else (known[name], reference)


def check_name(name: object, source: str = "backend") -> None:
    """Raise ValueError unless a backend has this name. ``source``: the argument or variable that gives it."""
    known = [backend.name for backend in BACKENDS]
    if name not in known:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, known))}, got {name!r}")


def _loaded(device_types: Collection[str]) -> list[Backend]:
    """Return every backend for these devices that loads, and warn once of each that should load and does not."""
    chosen = []
    missing: dict[str, Unavailable] = {}
    for backend in BACKENDS[:-1]:
        assert backend.device_types is not None
        if backend.device_types.isdisjoint(device_types):
            continue
        why = backend.unavailable()
        if why is None:
            chosen.append(backend)
        elif why.named:
            raise RuntimeError(f"{why.reason}. Set SWAFAST_LIBRARY to a library that loads, or unset it")
        else:
            missing[backend.name] = why
    served = {kind for backend in chosen for kind in backend.device_types or ()}
    slow = set(device_types) & {"cpu", "cuda"} - served
    for name, why in missing.items():
        if (slow or not why.expected) and name not in _warned:
            _warned.add(name)
            used = "the slower reference backend" if slow else f"the {chosen[0].name} backend"
            warn_user(f"swafast runs on {used}: {name}: {why.reason}", RuntimeWarning)
    return chosen


def device_types(pairs: Sequence[Pair]) -> set[str]:
    return {tensor.device.type for pair in pairs for tensor in (pair.param, pair.average)}
