"""Ranks that have made different numbers of updates hear of it in each call that they make together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from swafast import (
    EqualAverage,
    ExponentialAverage,
    FusedAveragedModel,
    ShardedAveragedModel,
    ShardedAverages,
    Snapshots,
)
from swafast.optim import ComposerSWA
from tests import sharded_models
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

RULES = {"mean": EqualAverage(), "fast": ExponentialAverage(0.5)}
COUNTS = "needs the same n_averaged on every rank, got 2 on rank 0 and 0 on rank 1: call update_parameters on every"


def composer(averaged: Any, model: Any, optimizer: Any) -> None:
    ComposerSWA(averaged, optimizer, model=model, max_duration="4ep", steps_per_epoch=1)


def swap(averaged: Any, model: Any, optimizer: Any) -> None:
    with averaged.swapped_into(model):
        pass


def save(averaged: Any, model: Any, optimizer: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Snapshots(folder).save({"average": averaged})


#: By name; whether it is collective if each rank has shards of its own.
CALLS: dict[str, tuple[Callable[[Any, Any, Any], object], bool]] = {
    "swapped_into": (swap, False),
    "copy_to": (lambda averaged, model, optimizer: averaged.copy_to(model), False),
    "state_dict": (lambda averaged, model, optimizer: averaged.state_dict(), True),
    "full_state_dict": (lambda averaged, model, optimizer: averaged.full_state_dict(), True),
    "save": (save, True),
    "attach": (lambda averaged, model, optimizer: averaged.attach(optimizer), True),
    "ComposerSWA": (composer, True),
}


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def counted_apart(mode: str) -> dict[str, str]:
    """Update averages on the first rank alone, and return what each call says afterwards."""
    model = sharded_models.wrap(sharded_models.make_model(mode), mode)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    one, several = ShardedAveragedModel(model), ShardedAverages(model, rules=RULES)
    plain = FusedAveragedModel(sharded_models.make_model("plain"))
    whole = one.state_dict(checksums=False)
    if dist.get_rank() == 0:
        for _ in range(2):
            one.update_parameters(model)
            several.update_parameters(model)
            plain.n_averaged.add_(1)
    heard = {name: said(lambda call=call: call(one, model, optimizer)) for name, (call, _) in CALLS.items()}
    for name in ("state_dict", "full_state_dict", "attach"):
        heard[f"{name} of several"] = said(lambda name=name: CALLS[name][0](several, model, optimizer))
    heard["swapped_into of several"] = said(lambda: swap(several["fast"], model, optimizer))
    heard["save of a plain one"] = said(lambda: save(plain, model, optimizer))
    # A load sets the counts, so it is not refused. Then all is well.
    whole["n_averaged"].fill_(5)
    one.load_state_dict(whole)
    for name, (call, _) in CALLS.items():
        if name not in ("attach", "ComposerSWA"):
            heard[f"{name} after a load"] = said(lambda call=call: call(one, model, optimizer))
    return heard


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_updates_on_the_first_rank_alone(mode: str) -> None:
    for heard in run_ranks(2, counted_apart, mode):
        for name, what in heard.items():
            call = name.partition(" ")[0]
            alone = mode == "fsdp2" and not CALLS[call][1]
            if alone or "after a load" in name:
                assert what == "" or "holds no model yet" in what, (name, what)
            else:
                assert what.startswith("RuntimeError: "), (name, what)
                assert COUNTS in what.replace("2, 2", "2").replace("0, 0", "0"), (name, what)
