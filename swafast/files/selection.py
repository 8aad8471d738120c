"""Which checkpoints are averaged."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Selected:
    """A checkpoint to be averaged."""

    path: str
    step: int | None = None
    metric: float | None = None


def select(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    last: int | None = None,
    first_step: int | None = None,
    last_step: int | None = None,
    min_gap: int | None = None,
    metric: str | None = None,
    best: int | None = None,
    lower_is_better: bool | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[Selected]:
    """Return the checkpoints to average, the oldest first."""
    if any(option is not None for option in (last, first_step, last_step, min_gap, metric, best, lower_is_better)):
        raise NotImplementedError("list the checkpoints to average, the oldest first")
    return [Selected(os.fspath(path)) for path in inputs]
