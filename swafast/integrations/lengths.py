"""How long an epoch and a whole training are, asked of a framework only where a span is measured by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..loop.schedule import Span, parse

_SPANS = ("start", "every", "end", "duration")


def needed_lengths(
    spans: Mapping[str, Any],
    *,
    duration: Callable[[], Span | None],
    steps_per_epoch: Callable[[], float | None] = lambda: None,
) -> dict[str, Span]:
    """Return the arguments ``duration`` and ``steps_per_epoch`` for ``attach``: those that the spans need.

    What the framework does not know is left out, and ``attach`` asks the user for it.

    Args:
        spans: as the user has given them, by argument. Those that are None and other arguments count for nothing.
        duration: asks the framework for the length of the training, which may load the data. None: it does not know.
        steps_per_epoch: likewise. Fractions are rounded up, and infinite epochs are not known.
    """
    units = {parse(name, spans[name])[1] for name in _SPANS if spans.get(name) is not None}
    found: dict[str, Span] = {}
    if "dur" in units and (whole := duration()) is not None:
        found["duration"] = whole
        units.add(parse("duration", whole)[1])  # a training may be so many epochs long
    if "ep" in units and (epoch := steps_per_epoch()) is not None and math.isfinite(epoch):
        found["steps_per_epoch"] = math.ceil(epoch)
    return found
