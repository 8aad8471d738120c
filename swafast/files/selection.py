"""Which checkpoints are averaged: the last ones, those between two steps, or the best by a metric."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..terms.misfits import few
from .candidates import Candidate, children, listed, without_others
from .metrics import Metrics, is_lower_better
from .step_names import Counted, counts_of


@dataclass(frozen=True)
class Selected:
    """A checkpoint to be averaged."""

    path: str
    step: int | None = None  # as its name counts it; None: its name has none
    metric: float | None = None


Say = Callable[[str], object]

#: Arguments that the command line calls otherwise, as errors spell them.
_FIRST, _LAST = "first_step (--from)", "last_step (--to)"


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
    say: Say = lambda line: None,
) -> list[Selected]:
    """Return the checkpoints to average, the oldest first.

    Listed checkpoints without a further argument are returned as they are listed. Otherwise they are ordered by their
    steps, which are read from their names, and never by the time of a file.

    Args:
        inputs: checkpoints; or one folder that has the checkpoints of a training in it.
        last: only so many of those with the largest steps.
        first_step: only those from this step on.
        last_step: only those up to this step.
        min_gap: only those that are so many steps apart, counted back from the last.
        metric: a field that tells which are the best. It is looked for in names, and in JSON, CSV and YAML beside.
        best: only so many of those with the best metric.
        lower_is_better: which values are better; by default the field's name tells.
        say: called with a line for what is skipped and for what a user may not expect.

    Raises:
        ValueError: the steps or the metrics cannot be told, or there are too few checkpoints.
        OSError: a folder or a file does not exist or cannot be read.
    """
    _check_counts(last=last, best=best, min_gap=min_gap)
    _check_counts(0, **{_FIRST: first_step, _LAST: last_step})
    _check_together(last, first_step, last_step, metric, best, lower_is_better)
    paths = [os.fspath(path) for path in inputs]
    if not paths:
        raise ValueError("inputs must have at least one checkpoint or folder, got none")
    by_step = any(given is not None for given in (last, first_step, last_step, min_gap))
    if len(paths) == 1 and os.path.isdir(paths[0]):
        found = _of_folder(paths[0], by_step or metric is not None, say)
    else:
        found = _of_list(paths, by_step, metric is not None, say)
    found = _apart(_between(found, first_step, last_step), min_gap)
    if last is not None:
        found = _enough(found, last, "last")[-last:]
    if metric is not None and best is not None:
        found = _best(found, metric, best, lower_is_better, say)
    return [Selected(each.path, each.step, each.metric) for each in found]


def _check_counts(least: int = 1, /, **given: int | None) -> None:
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_together(
    last: int | None,
    first_step: int | None,
    last_step: int | None,
    metric: str | None,
    best: int | None,
    lower_is_better: bool | None,
) -> None:
    if first_step is not None and last_step is not None and first_step > last_step:
        raise ValueError(f"{_FIRST} must be at most {_LAST}, got {first_step} and {last_step}")
    if (metric is None) != (best is None):
        raise ValueError("metric and best must be given together: the field, and how many checkpoints to take")
    if metric is not None and not metric.strip():
        raise ValueError("metric must be the name of a field, got an empty one")
    if last is not None and best is not None:
        raise ValueError(f"last and best must not be given together: use {_FIRST} with best")
    if lower_is_better is not None and metric is None:
        raise ValueError("lower_is_better must be given with metric, got it alone")


def _of_folder(parent: str, options: bool, say: Say) -> list[Candidate]:
    """Return the checkpoints in the folder of a training by their steps, or a folder that is one checkpoint."""
    found, is_checkpoint = children(parent, say)
    if is_checkpoint and found and not options:
        raise ValueError(
            f"inputs must be checkpoints or one folder of them, got {parent!r}, which is a checkpoint itself and has "
            f"{len(found)} in it: add --last N (last=) to average N of those in it"
        )
    if is_checkpoint and not found and options:
        raise ValueError(
            f"inputs must be checkpoints or one folder of them, got {parent!r}, which is one checkpoint: give the "
            "folder that it lies in, to select from the checkpoints there"
        )
    return _ordered(_counted(found, required=True)) if found else listed([parent])


def _of_list(paths: list[str], by_step: bool, by_metric: bool, say: Say) -> list[Candidate]:
    selects = by_step or by_metric
    twice = few([path for path in dict.fromkeys(paths) if paths.count(path) > 1])
    if twice:
        say(f"listed more than once, and counted as often: {twice}")
    found = _counted(listed(without_others(paths, say) if selects else paths), required=by_step)
    return _ordered(found) if selects else found


# By steps


def _counted(found: list[Candidate], *, required: bool) -> list[Candidate]:
    """Read the steps from all names, or from none."""
    try:
        counts: Sequence[Counted | None] = counts_of([each.name for each in found])
        by_step = defaultdict(list)
        for each, counted in zip(found, counts, strict=True):
            by_step[counted.step if counted is not None else None].append(each.path)
        twice = next((paths for paths in by_step.values() if len(paths) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice[0]!r} and {twice[1]!r} have the same step")
    except ValueError as error:
        if required:
            raise ValueError(
                f"inputs must have names with a step each, but {error}: list the checkpoints to average, the oldest "
                "first"
            ) from None
        return found
    return [replace(each, counted=counted) for each, counted in zip(found, counts, strict=True)]


def _ordered(found: list[Candidate]) -> list[Candidate]:
    return sorted(found, key=lambda each: each.step or 0) if all(each.counted for each in found) else found


def _between(found: list[Candidate], first: int | None, last: int | None) -> list[Candidate]:
    if first is None and last is None:
        return found
    low, high = first or 0, math.inf if last is None else last
    kept = [each for each in found if each.step is not None and low <= each.step <= high]
    if not kept:
        given = {name: step for name, step in ((_FIRST, first), (_LAST, last)) if step is not None}
        steps = [f"{each.name!r} has the step {each.step}" for each in (found[0], *found[1:][-1:])]
        raise ValueError(
            f"{' and '.join(given)} must leave a checkpoint, got {' and '.join(map(str, given.values()))}, and "
            + " and ".join(steps)
        )
    return kept


def _apart(found: list[Candidate], gap: int | None) -> list[Candidate]:
    kept: list[Candidate] = []
    for each in reversed(found):
        if gap is None or not kept or (kept[-1].step or 0) - (each.step or 0) >= gap:
            kept.append(each)
    return kept[::-1]


def _enough(found: list[Candidate], count: int, argument: str) -> list[Candidate]:
    if count > len(found):
        names = few([each.name for each in found])
        raise ValueError(
            f"{argument} must be at most the {len(found)} checkpoints that there are, got {count}: {names}"
        )
    return found


# By a metric


def _best(found: list[Candidate], field: str, count: int, lower: bool | None, say: Say) -> list[Candidate]:
    lower = is_lower_better(field) if lower is None else lower
    metrics = Metrics(field)
    values = metrics.of([each.place for each in found], [each.counted for each in found])
    valued = [replace(each, metric=value) for each, value in zip(found, values, strict=True)]
    missing = [each.name for each in valued if each.metric is None]
    if missing:
        raise ValueError(_no_value(metrics, missing, found))
    usable = [each for each in valued if each.metric is not None and math.isfinite(each.metric)]
    if len(usable) < len(valued):
        say(f"left out, since {field} is not finite: {few([each.name for each in valued if each not in usable])}")
    _enough(usable, count, "best")

    def rank(place: int) -> tuple[float, int]:
        value = usable[place].metric or 0.0
        return (value if lower else -value), -place  # of equal ones the newer

    places = sorted(range(len(usable)), key=rank)
    border = [place for place in places if usable[place].metric == usable[places[count - 1]].metric]
    if places.index(border[-1]) >= count:
        say(f"{few([usable[place].name for place in sorted(border)])} have the same {field}: the newer are taken")
    return [usable[place] for place in sorted(places[:count])]


def _no_value(metrics: Metrics, missing: list[str], found: list[Candidate]) -> str:
    where = "; ".join(metrics.fields()) or "the names have none, and there is no JSON, CSV or YAML beside them"
    column = "epoch" if any(each.counted and each.counted.kind == "epoch" for each in found) else "step"
    return (
        f"metric must be a field with a value for each checkpoint, got {metrics.field!r}, without one for "
        f"{few(missing)}: {where}. Values in the checkpoints themselves are not read. Write them to metrics.csv there, "
        f"with the first line {column},{metrics.field}; or list the checkpoints to average"
    )
