"""Metrics of checkpoints, from where training programs leave them: names, JSON, CSV and YAML beside the weights."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
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

#: Columns that count the steps and the epochs of a table.
_STEP_COLUMNS = ("step", "global_step", "iteration", "iter", "update", "batch")
_EPOCH_COLUMNS = ("epoch",)

#: Files with a row for each step, in the folder of the checkpoints.
_TABLES = ("trainer_state.json", "summary.csv", "metrics.csv", "results.csv", "metrics.jsonl", "metrics.json")
#: Files of one checkpoint, in its folder.
_OWN_FILES = ("metrics.json", "eval_results.json", "all_results.json", "results.json")

#: How many fields of a file a message lists.
_MOST_FIELDS = 12
#: What is read of a file at most. The metrics of a training take less.
_MOST_BYTES = 256 << 20


def is_lower_better(field: str) -> bool:
    """Return whether a lower value of this field is better, judged by its name.

    Raises:
        ValueError: the name does not tell.
    """
    words = {word for word in re.split(r"[^a-z0-9]+", field.lower()) if word}
    lower, higher = bool(words & {*_LOWER}), bool(words & {*_HIGHER})
    if lower == higher:
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

    def of(self, place: str, counted: Counted | None, *, by_epoch: bool) -> float | None:
        """Return the value for the checkpoint at ``place``, or None.

        It is looked for in the checkpoint's name, in files of its own, and in tables: by its step, or by its epoch.

        Raises:
            ValueError: a file with such a name cannot be read, or does not hold what its ending says.
        """
        value = self._in_name(os.path.basename(place))
        if value is None:
            stem = stem_of(place)
            own = [os.path.join(place, each) for each in _OWN_FILES]
            value = self._in_files([*own, f"{stem}.json", f"{stem}.yaml", f"{stem}.yml"])
        if value is None and counted is not None:
            # Lightning has its table beside the folder of the checkpoints.
            parent = os.path.dirname(os.path.abspath(place))
            folders = (place, parent, os.path.dirname(parent))
            value = self._in_tables(
                [os.path.join(folder, each) for folder in folders for each in _TABLES], counted, by_epoch
            )
        return value

    def fields(self) -> list[str]:
        """Return a line for each kind of file that was read: the fields that it has."""
        lines = []
        for name, fields in self._fields.items():
            some = [*fields][:_MOST_FIELDS]
            lines.append(f"{name} has {', '.join(some)}" + (" and others" if len(fields) > len(some) else ""))
        return lines

    def _note(self, path: str, found: Any) -> None:
        if isinstance(found, Mapping):
            self._fields[os.path.basename(path)] |= dict.fromkeys(filter(None, map(str, found)))

    def _in_name(self, name: str) -> float | None:
        """Return the value in a name such as ``epoch=3-val_loss=0.23.ckpt``. ``loss`` is not the field there."""
        field = rf"(?:^|(?<=[^a-z_])|(?<=[^a-z]_)){re.escape(_normal(self.field))}"
        number = r"(=-?|[-_]?)(\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf)(?![a-z\d])"
        found = re.search(field + number, _normal(stem_of(name)))
        return None if found is None else float(found[2]) * (-1 if found[1] == "=-" else 1)

    def _in_files(self, paths: Iterable[str]) -> float | None:
        for path in filter(os.path.isfile, paths):
            if path.endswith(".json"):
                found = _json(path)
                self._note(path, found)
                value = _number(_looked_up(found, self.field))
            else:
                value = self._in_yaml(_text(path))
            if value is not None:
                return value
        return None

    def _in_yaml(self, text: str) -> float | None:
        """Return the value of the one line ``field: value``; YAML is not read otherwise."""
        last = re.escape(self.field.rpartition(".")[2])
        found = re.findall(rf"^\s*{last}\s*:\s*(\S+)\s*$", text, re.MULTILINE)
        return _number(found[0]) if len(found) == 1 else None

    def _in_tables(self, paths: Iterable[str], counted: Counted, by_epoch: bool) -> float | None:
        count, columns = (counted.epoch, _EPOCH_COLUMNS) if by_epoch else (counted.step, _STEP_COLUMNS)
        for path in filter(os.path.isfile, paths):
            if path not in self._rows:
                rows = _rows(path)
                for row in rows:
                    self._note(path, row)
                self._rows[path] = [row for row in rows if _number(_looked_up(row, self.field)) is not None]
            # A training that was resumed has written the row of a step again.
            for row in reversed(self._rows[path]):
                if count is not None and any(_number(row.get(column)) == count for column in columns):
                    return _number(_looked_up(row, self.field))
        return None


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
        return [{(key or "").strip(): value for key, value in row.items()} for row in lines]
    if path.endswith(".jsonl"):
        found: Any = [_parsed(path, line) for line in _text(path).splitlines() if line.strip()]
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
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
