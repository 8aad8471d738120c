"""Metrics of checkpoints, from where training programs leave them: names, JSON, CSV and YAML beside the weights."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from .step_names import Counted, stem_of

#: Words of a field that say which of two values is better.
_LOWER = (
    *("loss", "losses", "error", "err", "perplexity", "ppl", "nll", "entropy", "mae", "mse", "rmse", "mape"),
    *("bpb", "bpc", "wer", "cer", "ter", "eer", "fid", "lpips", "distance", "divergence", "brier"),
)  # fmt: skip
_HIGHER = (
    *("accuracy", "acc", "top1", "top5", "f1", "precision", "recall", "auc", "auroc", "map", "iou", "miou", "dice"),
    *("bleu", "chrf", "rouge", "rouge1", "rouge2", "rougel", "meteor", "score", "reward", "psnr", "ssim", "r2", "mcc"),
    *("em", "correlation", "pearson", "spearman", "ndcg", "mrr"),
)  # fmt: skip
#: Words that turn it round, or may: scikit-learn's ``neg_mean_squared_error`` is better if higher.
_TURNED = {"neg", "negative", "negated", "minus", "inv", "inverse", "drop", "reduction", "improvement"}

#: Columns that count the steps and the epochs of a table. The first that a row has counts: beside ``global_step``,
#: ``step`` may start again in each epoch, and ``batch`` mostly does.
_STEP_COLUMNS = ("global_step", "step", "iteration", "iter", "update")
_EPOCH_COLUMNS = ("epoch",)

#: Files with a row for each step, in the folder of the checkpoints. Not ``results.csv``: Ultralytics counts
#: epochs from 1 in it, and from 0 in the names.
_TABLES = ("trainer_state.json", "summary.csv", "metrics.csv", "metrics.jsonl", "metrics.json")
#: Files of one checkpoint, in its folder.
_OWN_FILES = ("metrics.json", "eval_results.json", "all_results.json", "results.json")

#: How many files a message lists, and how many fields of each.
_MOST_FILES, _MOST_FIELDS = 3, 12
#: What is read of a file at most. The metrics of a training take less.
_MOST_BYTES = 256 << 20


def is_lower_better(field: str) -> bool:
    """Return whether a lower value of this field is better, judged by its name.

    Raises:
        ValueError: the name does not tell.
    """
    words = {word for word in re.split(r"[^a-z0-9]+", field.lower()) if word}
    lower, higher = bool(words & {*_LOWER}), bool(words & {*_HIGHER})
    if lower == higher or words & _TURNED:
        raise ValueError(
            f"metric must be a field whose name tells which value is better, such as eval_loss, got {field!r}: say it "
            "with --lower-is-better or --higher-is-better (lower_is_better=)"
        )
    return lower


class Metrics:
    """The values of one field for the checkpoints of a folder. Each table is read once."""

    def __init__(self, field: str) -> None:
        self.field = field
        self._fields: dict[str, dict[str, None]] = defaultdict(dict)  # of each file, by its name
        self._rows: dict[str, list[Mapping[str, Any]]] = {}

    def of(self, places: Sequence[str], counts: Sequence[Counted | None]) -> list[float | None]:
        """Return the value for the checkpoint at each of ``places``, or None.

        It is looked for in the checkpoint's name, in files of its own, and in tables: for all by one of their counts.

        Raises:
            ValueError: a file with such a name cannot be read, or does not hold what its ending says; or a name or a
                table has two values for a checkpoint.
        """
        paths = [os.path.abspath(place) for place in places]
        own = [self._of_its_own(path) for path in paths]
        if None not in own:
            return own
        found = [
            [
                self._in_tables(path, count, columns) if value is None else value
                for path, value, count in zip(paths, own, numbers, strict=True)
            ]
            for numbers, columns in _in_which_columns(counts)
        ]
        whole = [values for values in found if None not in values]
        has_word = any(each is not None and each.kind for each in counts)
        if len(whole) > 1 and not has_word and str(whole[0]) != str(whole[1]):  # as text, since NaN differs from NaN
            raise ValueError(
                f"metric must be a field with one value for each checkpoint, got {self.field!r} with values for "
                f"{os.path.basename(paths[0])!r} both as a step and as an epoch: list the checkpoints to average"
            )
        return min(found, key=lambda values: values.count(None), default=own)

    def _of_its_own(self, path: str) -> float | None:
        value = self._in_name(os.path.basename(path))
        if value is not None:
            return value
        stem = stem_of(path)
        files = [os.path.join(path, each) for each in _OWN_FILES]
        return self._in_files([*files, f"{stem}.json", f"{stem}.yaml", f"{stem}.yml"])

    def fields(self) -> list[str]:
        """Return a line for each kind of file that was read: the fields that it has."""
        lines = []
        for name, fields in [*self._fields.items()][:_MOST_FILES]:
            some = [*fields][:_MOST_FIELDS]
            lines.append(f"{name} has {', '.join(some)}" + (" and others" if len(fields) > len(some) else ""))
        return lines

    def _note(self, path: str, found: Any) -> None:
        if isinstance(found, Mapping):
            self._fields[os.path.basename(path)] |= dict.fromkeys(filter(None, map(str, found)))

    def _in_name(self, name: str) -> float | None:
        """Return the value in a name such as ``epoch=3-val_loss=0.23.ckpt``. ``loss`` is not the field there."""
        field = rf"(?<![a-z])(?<![a-z][-_.]){re.escape(_normal(self.field))}"
        number = r"\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf"
        # In ``acc1_0.5`` and ``acc_1_0.5``, a whole number is a part of the field.
        bare = r"[-_]?(\d+\.\d+(?:e[-+]?\d+)?|nan|inf)|[-_](\d+)(?![-_.]\d)"
        matches = re.findall(rf"{field}(?:=([-+]?(?:{number}))|{bare})(?![a-z\d=])", _normal(stem_of(name)))
        values = {float("".join(groups)) for groups in matches}
        if len(values) > 1:
            raise ValueError(
                f"metric must be a field with one value for each checkpoint, got {self.field!r}, which {name!r} has "
                "several of: list the checkpoints to average"
            )
        return values.pop() if values else None

    def _in_files(self, paths: Iterable[str]) -> float | None:
        for path in filter(os.path.isfile, paths):
            if path.endswith(".json"):
                found = _json(path)
                self._note(path, found)
                value = _number(_looked_up(found, self.field))
            else:
                value = self._in_yaml(path)
            if value is not None:
                return value
        return None

    def _in_yaml(self, path: str) -> float | None:
        """Return the value of the one line of the field, under its parts if it has some; YAML is not read otherwise."""
        found = []
        parents: list[tuple[int, str]] = []  # the indent and the key of each line that this one is under
        for indent, key, value in re.findall(r"^( *)([^\s:#]+) *:(?: +(\S+))? *(?: #.*)?$", _text(path), re.MULTILINE):
            while parents and parents[-1][0] >= len(indent):
                parents.pop()
            parents.append((len(indent), key))
            field = ".".join(each for _, each in parents)
            if value:
                self._note(path, {field: value})
            if f".{field}".endswith(f".{self.field}"):
                found.append(re.sub(r"\.(nan|inf)$", r"\1", value.lower()))
        return _number(found[0]) if len(found) == 1 else None

    def _in_tables(self, place: str, count: int | None, columns: Sequence[str]) -> float | None:
        # Lightning has its table beside the folder of the checkpoints.
        parent = os.path.dirname(place)
        folders = (place, parent, os.path.dirname(parent))
        paths = (os.path.join(folder, each) for folder in folders for each in _TABLES)
        for path in filter(os.path.isfile, paths):
            if path not in self._rows:
                rows = _rows(path)
                for row in rows:
                    self._note(path, row)
                self._rows[path] = [row for row in rows if _number(_looked_up(row, self.field)) is not None]
            # A training that was resumed has written the row of a step again.
            for row in reversed(self._rows[path]):
                numbers = (_number(row.get(column)) for column in columns)
                if count is not None and next((each for each in numbers if each is not None), None) == count:
                    return _number(_looked_up(row, self.field))
        return None


def _in_which_columns(counts: Sequence[Counted | None]) -> Iterator[tuple[list[int | None], Sequence[str]]]:
    """Return by which numbers the checkpoints may be found in a table, and in which columns; the surest first."""
    steps = [each.step if each is not None else None for each in counts]
    epochs = [each.epoch if each is not None else None for each in counts]
    kinds = {each.kind if each is not None else "" for each in counts}
    if "epoch" not in kinds:
        yield steps, _STEP_COLUMNS
    if kinds == {"step"}:  # Lightning counts the steps of its table from 0
        yield [step - 1 if step is not None else None for step in steps], _STEP_COLUMNS
    if len({*epochs}) == len(epochs):  # otherwise one row would be that of several checkpoints
        yield epochs, _EPOCH_COLUMNS


def _normal(text: str) -> str:
    """Return a field or a name as both are compared: ``val/loss`` is ``val_loss``."""
    return re.sub(r"[^a-z0-9=.+-]+", "_", text.lower())


def _number(value: Any) -> float | None:
    """Return a number that a JSON, CSV or YAML has, NaN and infinity too; None for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    with suppress(ValueError, OverflowError):
        return float(value)
    return None


def _looked_up(found: Any, field: str) -> Any:
    """Return what stands under a field, or under its parts: ``loss_dict.loss``."""
    if not isinstance(found, Mapping):
        return None
    if field in found:
        return found[field]
    first, dot, rest = field.partition(".")
    return _looked_up(found.get(first), rest) if dot else None


def _rows(path: str) -> list[Mapping[str, Any]]:
    """Return the rows of a table: a CSV, lines of JSON, a list in JSON or the log in Hugging Face's state."""
    if path.endswith(".csv"):
        lines = csv.DictReader(_text(path).splitlines(), skipinitialspace=True)
        try:
            return [{(key or "").strip(): value for key, value in row.items()} for row in lines]
        except csv.Error as error:
            raise ValueError(
                f"{path} must hold CSV, but {error}: repair it, or list the checkpoints to average"
            ) from None
    if path.endswith(".jsonl"):
        whole, _, torn = _text(path).rpartition("\n")
        found: Any = [_parsed(path, line) for line in whole.splitlines() if line.strip()]
        with suppress(ValueError):  # a line that is being written, or was when the training ended
            found.append(_parsed(path, torn))
    else:
        found = _json(path)
        found = found.get("log_history") if isinstance(found, Mapping) else found
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def _json(path: str) -> Any:
    return _parsed(path, _text(path))


def _parsed(path: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold JSON, but {error}: repair it, or list the checkpoints to average") from None


def _text(path: str) -> str:
    if os.path.getsize(path) > _MOST_BYTES:
        raise ValueError(f"{path} must be at most {_MOST_BYTES >> 20} MB to be read for metrics: list the checkpoints")
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.read()
