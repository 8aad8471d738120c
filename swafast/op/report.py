"""The log line of a plan: which backend, which formats, how many bytes, and why other backends were passed over."""

from __future__ import annotations

import logging
import math
from collections import Counter

from ..terms.formats import OWN, format_of
from .choice import BACKENDS
from .plan import Plan
from .tree_check import LOGGER


def spell_bytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 10**5 else f"{nbytes} bytes"


def log_plan(plan: Plan, said: str = "") -> str:
    """Log one line at level INFO about the first plan of an average, unless ``said`` is that line. Return the line."""
    if not LOGGER.isEnabledFor(logging.INFO):
        return said
    formats = Counter(fmt.name for fmt in plan.formats if fmt is not None)
    nbytes = sum(math.prod(shape) * dtype.itemsize for dtype, _, shape, *_ in plan.plane_views)
    works = ", ".join(f"{name} ({len(indices)} tensors)" for name, indices in plan.indices_by_backend.items())
    passed = [*_not_loaded(plan), *_not_served(plan)]
    averaged = sum(formats.values())
    copied = sum(map(len, plan.indices_by_backend.values())) - averaged
    line = (
        f"swafast averages {averaged} tensors{f' and copies {copied}' if copied > 0 else ''}: "
        f"backend {works or 'none'}; format {', '.join(formats) or 'none'}; {spell_bytes(nbytes)}"
        f"{'; passed over: ' if passed else ''}{'; '.join(passed)}"
    )
    if line != said:
        LOGGER.info("%s", line)
    return line


def _not_loaded(plan: Plan) -> list[str]:
    """Return why backends that would be preferred on these devices are not used."""
    kinds = {device.type for _, device, *_ in plan.plane_views}
    passed = []
    for backend in BACKENDS:
        if backend in plan.chosen:
            break
        if backend.device_types is not None and not backend.device_types.isdisjoint(kinds):
            why = backend.unavailable()
            passed.append(f"{backend.name}: {why if why is not None else 'another one was asked for'}")
    return passed


def _not_served(plan: Plan) -> list[str]:
    """Return which tensors the preferred backend does not take."""
    preferred = plan.chosen[0].name
    passed = []
    for name, indices in plan.indices_by_backend.items():
        first, dtype = plan.names[indices[0]], plan.param_views[indices[0]][0]
        if name == preferred:
            continue
        if plan.formats[indices[0]] is OWN and format_of(None, dtype) is not OWN:
            passed.append(f"{preferred}: an averaging function of your own runs in torch")
        else:
            more = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
            passed.append(f"{preferred}: does not take {first!r} ({dtype}){more}")
    return passed
