"""Several averages in all formats, spread over ranks: the bits of one process, and so after a change of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from swafast import (
    EqualAverage,
    ExponentialAverage,
    FusedAverages,
    PowerAverage,
    ShardedAverages,
)
from swafast.sharded import shard_matching, sharded_averages
from tests.ranks import run_ranks
from tests.sharded_models import drift, fill, make_model, require, wrap
from tests.test_sharded_modes import Seen, own_parts_differing

pytestmark = pytest.mark.distributed

RULES = {
    "mean": EqualAverage(),
    "fast": ExponentialAverage(0.9),
    "power": PowerAverage(6.94),
    "rough": ExponentialAverage(0.99, warmup="ratio"),
}
FORMATS = {"fast": "compact", "power": "compensated", "rough": "half"}
OPTIONS: dict[str, Any] = {"rules": RULES, "format": FORMATS, "seed": 5}

#: One kind of model for each: a checkpoint of one is loaded by all others.
WAYS = ("ddp", "fsdp2", "tp")
MORE_WAYS = ("fsdp1_orig", "hsdp", "fsdp2_tp")
_FOUR_RANKS = ("hsdp", "fsdp2_tp")
_KIND = "fsdp2"  # of the model: params that every way takes


class Twins:
    """A sharded set of averages and, on every rank, the unsharded one that it has to be equal to."""

    def __init__(self, way: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.way = way
        self.reference, self.model = make_model(_KIND, dtype), wrap(make_model(_KIND, dtype), way)
        self.averages = ShardedAverages(self.model, **OPTIONS)
        self.truth = FusedAverages(self.reference, **OPTIONS)
        self.seen = Seen()

    def train(self, *steps: int, both: bool = True) -> Twins:
        for step in steps:
            drift(self.reference, step)
            fill(self.model, self.way, self.reference)
            self.truth.update_parameters(self.reference)
            if both:
                with self.seen:
                    self.averages.update_parameters(self.model)
        return self

    def differing(self) -> list[str]:
        found = []
        for name, averaged in self.averages.items():
            own = own_parts_differing(averaged, self.truth[name].state_dict())
            found += [f"{self.way}: {name}: {key}" for key in own]
        return found


def _save_all(folder: Path, ways: list[str]) -> dict[str, list[str]]:
    """Average in each way, compare with one process, and save; give what differs."""
    differing, seen = [], []
    for way in ways:
        for dtype in (torch.float32, torch.bfloat16) if way == ways[0] else (torch.bfloat16,):
            twins = Twins(way, dtype).train(0, 1, 2)
            differing += twins.differing()
            seen += twins.seen.spread_out
        averages = twins.averages
        assert averages.nbytes == sum(averaged.nbytes for averaged in averages.values())
        dcp.save({"averages": averages.state_dict()}, checkpoint_id=folder / way)
        whole = averages.full_state_dict()
        differing += [key for key, value in twins.truth.state_dict().items() if not torch.equal(whole[key], value)]
    return {"differing": differing, "seen": [str(each) for each in seen]}


def _load_all(folder: Path, ways: list[str], saved: list[str]) -> list[str]:
    """Go on in each way from each save, and compare with one process that was not interrupted."""
    differing = []
    # The first way loads every save, the others one each.
    for way, source in [*((ways[0], source) for source in saved), *zip(ways[1:], itertools.cycle(saved), strict=False)]:
        twins = Twins(way).train(0, 1, 2, both=False)
        state = {"averages": twins.averages.state_dict()}
        dcp.load(state, checkpoint_id=folder / source)
        twins.averages.load_state_dict(state["averages"])
        differing += [f"from {source} loaded {key}" for key in twins.differing()]
        differing += [f"from {source} went on {key}" for key in twins.train(3, 4).differing()]
    return differing


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("saves"), WAYS)


@pytest.fixture(scope="module")
def more_saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("saves"), (*WAYS, *MORE_WAYS))


def save_all(folder: Path, ways: Sequence[str]) -> Path:
    for way in ways:
        require(way, forward=False)
    for told in run_ranks(4, _save_all, folder, list(ways)):
        assert told == {"differing": [], "seen": []}
    return folder


@pytest.mark.parametrize(("world", "ways"), [(1, ["ddp"]), (2, ["tp", "fsdp2"]), (3, ["fsdp2", "ddp"])])
def test_every_kind_of_state_goes_on_with_other_ranks(saves: Path, world: int, ways: list[str]) -> None:
    assert run_ranks(world, _load_all, saves, ways, list(WAYS)) == [[]] * world


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_way_goes_on_from_every_other(more_saves: Path, world: int) -> None:
    ways = [way for way in (*WAYS, *MORE_WAYS) if world == 4 or way not in _FOUR_RANKS]
    for first in range(len(ways)):
        turned = ways[first:] + ways[:first]
        assert run_ranks(world, _load_all, more_saves, turned[:2], [*WAYS, *MORE_WAYS]) == [[]] * world


def _use(way: str) -> list[str]:
    """Swap one average in, refuse the rest meanwhile, and fail loads; give what is wrong."""
    twins = Twins(way).train(0, 1)
    averages, wrong = twins.averages, []
    if averages.fast is not averages["fast"] or {averages: 1}[averages] != 1:
        wrong.append("no attribute, or no hash")
    try:
        averages.fast = 3
        wrong.append("an average was replaced")
    except AttributeError:
        pass
    before = {name: param.detach().clone() for name, param in twins.model.named_parameters()}
    with averages["fast"].swapped_into(twins.model):
        for action in (lambda: averages.update_parameters(twins.model), averages.state_dict):
            try:
                action()
                wrong.append("an action went on while one average was swapped in")
            except RuntimeError as error:
                wrong += [] if "swapped back" in str(error) else [str(error)]
    wrong += [name for name, param in twins.model.named_parameters() if not torch.equal(param, before[name])]
    state = averages.state_dict()
    for spoil, message in (
        (lambda s: s.pop("power.compensation.long"), "averages['power']"),
        (lambda s: s["rough.module.long"].copy_(torch.zeros_like(s["rough.module.long"])), "averages['rough']"),
        (lambda s: s.update({"other.n_averaged": s["fast.n_averaged"]}), "got 'other.n_averaged'"),
    ):
        spoiled = {key: value.clone() for key, value in state.items()} if way != "ddp" else averages.state_dict()
        spoil(spoiled)
        try:
            averages.load_state_dict(spoiled)
            wrong.append(f"a spoiled state was loaded: {message}")
        except (ValueError, RuntimeError) as error:
            wrong += [] if message in str(error) else [str(error)]
    wrong += twins.differing()
    return wrong + twins.train(2).differing()


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_one_is_used_and_a_failed_load_changes_none(way: str) -> None:
    assert run_ranks(2, _use, way) == [[]] * 2


def _disagree() -> list[str]:
    import torch.distributed as dist

    told = []
    first = dist.get_rank() == 0
    rules = {"a": EqualAverage(), "b": ExponentialAverage(0.9)}
    other = {"b": ExponentialAverage(0.9), "a": EqualAverage()}
    for mine in (rules if first else other, rules if first else {"a": EqualAverage()}, {} if first else rules):
        try:
            ShardedAverages(nn.Linear(2, 2), rules=mine)
            told.append("none")
        except (ValueError, RuntimeError) as error:
            told.append(str(error))
    return told


def test_ranks_that_name_different_averages_are_told_so() -> None:
    for told in run_ranks(2, _disagree):
        assert all("the averages" in message for message in told[:2]), told
        assert "rules must name 1 to 16 averages, got 0" in told[2]


# Each gate kills a bug


def forget_the_boxes() -> None:
    # As if each rank's part began at the first element of the whole.
    draws = shard_matching.Draws
    shard_matching.Draws = lambda key, shape, boxes: draws(key, (sum(box.numel for box in boxes),), None)  # type: ignore[misc, assignment]


def commit_before_all_are_verified() -> None:
    verify = sharded_averages.checkpoint.verify

    def verify_and_commit(staged: Any, ranks: Any, device: torch.device) -> None:
        verify(staged, ranks, device)
        for _, run in staged.runs:
            run.add_(1)

    sharded_averages.checkpoint.verify = verify_and_commit


def _planted(plant: Callable[[], None], function: Callable[..., Any], *args: Any) -> Any:
    plant()
    return function(*args)


@pytest.mark.parametrize(
    ("plant", "function", "args"),
    [(forget_the_boxes, "_save_all", (["fsdp2"],)), (commit_before_all_are_verified, "_use", ("fsdp2",))],
)
def test_the_gate_kills_the_bug(
    plant: Callable[[], None], function: str, args: tuple[Any, ...], tmp_path: Path
) -> None:
    folder = (tmp_path,) if function == "_save_all" else ()
    told = run_ranks(2, _planted, plant, globals()[function], *folder, *args)
    assert any(each not in ([], {"differing": [], "seen": []}) for each in told)
