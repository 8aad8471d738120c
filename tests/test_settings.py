"""Attributes that a user may assign: a wrong value is an error there and then, and nothing has changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from swafast import EqualAverage, FusedAveragedModel, FusedAverages, ShardedAveragedModel, ShardedAverages, Snapshots
from swafast.average import settings
from swafast.average.described import asked_of
from swafast.optim import BlockRounding, LowPrecision

RULES = {"swa": EqualAverage()}
MODEL = nn.Linear(2, 2)
MAKERS: dict[str, Callable[[], Any]] = {
    "FusedAveragedModel": lambda: FusedAveragedModel(MODEL),
    "one of FusedAverages": lambda: FusedAverages(MODEL, rules=RULES)["swa"],
    "ShardedAveragedModel": lambda: ShardedAveragedModel(MODEL),
    "one of ShardedAverages": lambda: ShardedAverages(MODEL, rules=RULES)["swa"],
    "LowPrecision": lambda: LowPrecision(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)),
    "BlockRounding": BlockRounding,
    "Snapshots": lambda: Snapshots("snapshots"),
    "Attachment": lambda: FusedAveragedModel(MODEL).attach(torch.optim.SGD(MODEL.parameters(), 0.1)),
}
AVERAGES = [kind for kind in MAKERS if "Average" in kind]
#: By attribute: a right value, a wrong one, and the error.
OF_AVERAGES: dict[str, tuple[Any, Any, str]] = {
    "nonfinite": ("skip", "typo", "nonfinite must be one of 'propagate', 'raise', 'skip', got 'typo'"),
    "seed": (3, "a", "seed must be an int, got 'a'"),
    "include": (lambda name, param: True, "bias", "include must be a function"),
    "use_buffers": (True, "yes", "use_buffers must be True or False, got 'yes'"),
    "rule": (EqualAverage(), "ema", "rule must be a"),
    "n_averaged": (torch.tensor(3), 3, "n_averaged must be a tensor of one int64, got 3: write n_averaged.fill_"),
}
OTHERS: list[tuple[str, str, Any, Any, str]] = [
    ("ShardedAveragedModel", "share_replicas", True, "no", "share_replicas must be True or False"),
    ("LowPrecision", "bits", 4, 40, "bits must be from 2 to 16"),
    ("LowPrecision", "rounding", "nearest", "up", "rounding must be"),
    ("LowPrecision", "full_accumulator", True, "no", "full_accumulator must be True or False"),
    ("LowPrecision", "seed", 1, 0.5, "seed must be an int"),
    ("BlockRounding", "bits", None, 1, "bits must be from 2 to 16"),
    ("BlockRounding", "error_bits", 2, "8", "error_bits must be an int from 2 to 16"),
    ("BlockRounding", "rounding", "nearest", "up", "rounding must be"),
    ("Snapshots", "folder", Path("/b"), 3, "expected str"),
    ("Attachment", "name", "ema", 3, "name must be a str, got 3"),
    ("Attachment", "name", "ema", "", "name must not be empty"),
]


@pytest.mark.parametrize(
    ("kind", "name", "right", "wrong", "words"),
    [*((kind, name, *values) for kind in AVERAGES for name, values in OF_AVERAGES.items()), *OTHERS],
)
def test_a_wrong_value_is_an_error_where_it_is_assigned(
    kind: str, name: str, right: Any, wrong: Any, words: str
) -> None:
    owner = MAKERS[kind]()
    before = getattr(owner, name)
    with pytest.raises((TypeError, ValueError), match=words):
        setattr(owner, name, wrong)
    assert getattr(owner, name) is before
    setattr(owner, name, right)
    assert getattr(owner, name) == right


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("name", ["format", "backend"])
def test_a_choice_that_nobody_knows_is_an_error_where_it_is_assigned(kind: str, name: str) -> None:
    owner = MAKERS[kind]()
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        setattr(owner, name, "gpu")
    assert asked_of(owner, name) is None


def test_several_sharded_averages_check_what_they_share() -> None:
    averages = ShardedAverages(MODEL, rules=RULES)
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        averages.nonfinite = "typo"
    with pytest.raises(ValueError, match=r"n_averaged must be one int64, got torch\.float32"):
        averages["swa"].n_averaged = torch.ones(())


def test_every_setting_of_an_average_has_a_check() -> None:
    """Of the arguments of a construction, only these cannot be assigned, or have checks of their own."""
    others = {
        "self",
        "model",
        "process_group",
        "num_averaged",
        "deviations",
        "device",
        "avg_fn",
        "multi_avg_fn",
        "rule",
    }
    for kind in (FusedAveragedModel, ShardedAveragedModel):
        assert {*inspect.signature(kind.__init__).parameters} - others <= {*settings.SETTINGS}
