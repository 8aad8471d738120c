"""The steps of checkpoints, read from their names: ``checkpoint-500``, ``epoch=3-step=1000.ckpt``, ``iter_0001000``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

#: Endings of the files that hold a checkpoint, the longest first.
SUFFIXES = (".safetensors.index.json", ".safetensors", ".pth.tar", ".ckpt", ".pth", ".bin", ".pt")

#: Words before a number that say what it counts. A name's step goes before its epoch.
_KINDS = {
    "step": ("step", "steps", "iter", "iters", "iteration", "iterations", "it", "ba", "update", "updates"),
    "epoch": ("epoch", "epochs", "ep"),
}
_KIND_OF = {word: kind for kind, words in _KINDS.items() for word in words}

#: Words that may end another, as in ``globalstep500``. ``writer`` ends in a word too.
_ENDS = tuple(word for word in _KIND_OF if len(word) > 3 and word not in ("iter", "iters"))

#: A number, with the unit of ``step-10k`` if it has one. That of a metric may have a sign, or be NaN.
_NUMBER = re.compile(
    r"(?:(?<=[=_])[-+])?(?:\d+(?:\.\d+)?(?:e[-+]\d+)?(?:[kmb](?![a-z]))?|(?<![a-z\d])(?:nan|inf)(?![a-z\d]))"
)
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}

#: The name of fairseq's checkpoints within an epoch: epoch and update, without a word for either.
_EPOCH_AND_UPDATE = "checkpoint_#_#"

#: What Lightning and NeMo add to the name of a checkpoint for the same one once more, or for its average.
_COPY_END = re.compile(r"[-_.](v#|last|best|ema)$")


@dataclass(frozen=True)
class Counted:
    """What the name of a checkpoint counts."""

    step: int  # by which checkpoints are ordered: it is an epoch where the kind says so
    kind: str = ""  # "step", "epoch", or "" where the name has a number alone
    epoch: int | None = None  # a number alone may be one


@dataclass(frozen=True)
class _Number:
    value: int | None  # None: it is no whole number
    kind: str
    in_field: bool  # it is the value of another quantity, as that of ``val_loss=0.23``


def stem_of(name: str) -> str:
    """Return a name without the ending of a checkpoint."""
    return next((name[: -len(suffix)] for suffix in SUFFIXES if name.lower().endswith(suffix)), name)


def has_step(name: str) -> bool:
    """Return whether a word for a step or an epoch stands before a number of this name."""
    return any(number.kind for number in _parsed(name)[1])


def copies_among(names: Sequence[str]) -> list[str]:
    """Return those names that are of the series of others but for an ending, such as ``step=500-last.ckpt``."""
    templates = {name: _parsed(name)[0] for name in names}
    known = {*templates.values()}
    shorter = {name: _COPY_END.sub("", template) for name, template in templates.items()}
    return [name for name in names if shorter[name] != templates[name] and shorter[name] in known]


def counts_of(names: Sequence[str]) -> list[Counted]:
    """Return what each of these names counts. They must be of one series: equal but for their numbers.

    A number after a word for a step counts, or else one after a word for an epoch; of both, one in which the names
    differ. Without a word, the number in which the names differ counts.

    Raises:
        ValueError: a name has no such number, or several, or the names are of several series. The message does not say
            what to do.
    """
    parsed = [_parsed(name) for name in names]
    series = dict(zip([template for template, _ in parsed], names, strict=True))
    if len(series) > 1:
        first, second, *_ = series.values()
        raise ValueError(f"{first!r} and {second!r} are named in two ways, and may count different things")
    places = _places([numbers for _, numbers in parsed], next(iter(series), ""))
    if len(places) != 1:
        what = "has no number that is a step" if not places else "has several numbers that may be its step"
        raise ValueError(f"{names[0]!r} {what}")
    return [_counted(numbers, places[0]) for _, numbers in parsed]


def _parsed(name: str) -> tuple[str, list[_Number]]:
    """Return a name with ``#`` for its numbers, and the numbers."""
    text = stem_of(name).lower()
    numbers = []
    for match in _NUMBER.finditer(text):
        before = text[: match.start()]
        word = re.search(r"([a-z]+)[-_=. ]*$", before)
        kind = _KIND_OF.get(word[1], "") if word is not None else ""
        if word is not None and not kind:  # ``globalstep500``
            kind = next((_KIND_OF[each] for each in _ENDS if word[1].endswith(each)), "")
        numbers.append(_Number(whole_number(match[0]), kind, not kind and before.endswith("=")))
    return _NUMBER.sub("#", text), numbers


def whole_number(text: str) -> int | None:
    """Return the whole number that a text is, as in ``500`` or ``10k``; None: it is none."""
    if not _NUMBER.fullmatch(text):
        return None
    if text[-1] in _UNITS:
        value = float(text[:-1]) * _UNITS[text[-1]]
        return round(value) if math.isfinite(value) else None
    return int(text) if text.isdecimal() else None


def _places(rows: list[list[_Number]], template: str) -> list[int]:
    """Return which of the numbers may be the step."""
    columns = list(zip(*rows, strict=True))
    constant: list[int] = []  # a step that all names have tells nothing if their epochs differ
    for kind in ("step", "epoch", ""):
        places = [
            place
            for place, column in enumerate(columns)
            if all(number.kind == kind and number.value is not None and not number.in_field for number in column)
        ]
        if not kind and template == _EPOCH_AND_UPDATE:
            places = places[-1:]
        differing = [place for place in places if len({number.value for number in columns[place]}) > 1]
        if constant and not kind:  # one step of many ranks
            break
        if differing:
            return differing
        constant = constant or places
    return constant


def _counted(numbers: list[_Number], place: int) -> Counted:
    value = numbers[place].value
    assert value is not None
    kind = numbers[place].kind
    if kind != "step":
        return Counted(value, kind, epoch=value)
    return Counted(value, kind, next((each.value for each in numbers if each.kind == "epoch"), None))
