"""Several sharded averages in all formats: the same bits as in one process, also after a change of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from swafast import EqualAverage, ExponentialAverage, PowerAverage, ShardedAverages
from swafast.sharded import shard_side, sharded_averages
from tests.ranks import RankFailedError, on_ranks, run_ranks
from tests.sharded_models import Beside, drift, locals_of, require, require_own_parts
from tests.support import require_same
from tests.test_sharded_modes import Seen

pytestmark = pytest.mark.distributed

RULES = {
    "mean": EqualAverage(),
    "fast": ExponentialAverage(0.9),
    "power": PowerAverage(6.94),
    "rough": ExponentialAverage(0.99, warmup="ratio"),
}
FORMATS = {"fast": "compact", "power": "compensated", "rough": "half"}
OPTIONS: dict[str, Any] = {"rules": RULES, "format": FORMATS, "seed": 5, "deviations": {"mean": 2, "power": 0}}

#: One kind of model for each: a checkpoint of one is loaded by all others.
WAYS = ("ddp", "fsdp2", "tp")
MORE_WAYS = ("fsdp1_orig", "hsdp", "fsdp2_tp")
_FOUR_RANKS = ("hsdp", "fsdp2_tp")
_KIND = "fsdp2"  # of the model: params that every way takes


def make(way: str, dtype: torch.dtype = torch.bfloat16) -> Beside:
    """Make a set of averages and, on every rank, the unsharded one that it has to be equal to."""
    return Beside(way, dtype, kind=_KIND, **OPTIONS)


def require_own(both: Beside, about: object = "") -> None:
    for name, averaged in both.averaged.items():
        require_own_parts(averaged, both.expected[name].state_dict(), f"{about}, {name}, own parts")


def _save_all(folder: Path, ways: list[str]) -> None:
    """Average in each way, compare with one process, and save."""
    for way in ways:
        for dtype in (torch.float32, torch.bfloat16) if way == ways[0] else (torch.bfloat16,):
            both, seen = make(way, dtype), Seen()
            for step in range(3):
                drift(both.reference, step)
                both.fill()
                with seen:
                    both.averaged.update_parameters(both.sharded)
                both.expected.update_parameters(both.reference)
            require_own(both, way)
            assert seen.spread_out == [], seen.spread_out
        averages = both.averaged
        assert averages.nbytes == sum(averaged.nbytes for averaged in averages.values())
        dcp.save({"averages": averages.state_dict()}, checkpoint_id=folder / way)
        both.require_equal(way)


def _load_all(folder: Path, ways: list[str], saved: list[str]) -> None:
    """Go on in each way from each save, and compare with one process that was not interrupted."""
    # The first way loads every save, the others one each.
    for way, source in [*((ways[0], source) for source in saved), *zip(ways[1:], itertools.cycle(saved), strict=False)]:
        both = make(way)
        for step in range(3):
            drift(both.reference, step)
            both.expected.update_parameters(both.reference)
        state = {"averages": both.averaged.state_dict()}
        dcp.load(state, checkpoint_id=folder / source)
        both.averaged.load_state_dict(state["averages"])
        require_own(both, f"{way} from {source}")
        require_own(both.train(3, 4), f"{way} went on from {source}")


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("saves"), WAYS)


@pytest.fixture(scope="module")
def more_saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("saves"), (*WAYS, *MORE_WAYS))


def save_all(folder: Path, ways: Sequence[str]) -> Path:
    for way in ways:
        require(way, forward=False)
    run_ranks(4, _save_all, folder, list(ways))
    return folder


@pytest.mark.parametrize(("world", "ways"), [(1, ["ddp"]), (2, ["tp", "fsdp2"]), (3, ["fsdp2", "ddp"])])
def test_every_kind_of_state_goes_on_with_other_ranks(saves: Path, world: int, ways: list[str]) -> None:
    run_ranks(world, _load_all, saves, ways, list(WAYS))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_way_goes_on_from_every_other(more_saves: Path, world: int) -> None:
    ways = [way for way in (*WAYS, *MORE_WAYS) if world == 4 or way not in _FOUR_RANKS]
    for first in range(len(ways)):
        turned = ways[first:] + ways[:first]
        run_ranks(world, _load_all, more_saves, turned[:2], [*WAYS, *MORE_WAYS])


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
@on_ranks(2)
def test_a_failed_load_changes_none(way: str) -> None:
    """Swap one average in, see that other calls are refused meanwhile, and that loads fail."""
    both = make(way).train(0, 1)
    averages = both.averaged
    assert averages.fast is averages["fast"]
    assert {averages: 1}[averages] == 1
    with pytest.raises(AttributeError):
        averages.fast = 3
    before = locals_of(both.sharded)
    with averages["fast"].swapped_into(both.sharded):
        for action in (lambda: averages.update_parameters(both.sharded), averages.state_dict):
            with pytest.raises(RuntimeError, match="swapped back"):
                action()
    require_same(locals_of(both.sharded), before, "after")
    state = averages.state_dict()
    both.train(2)
    for spoil, message in (
        (lambda s: s.pop("power.compensation.long"), r"averages\['power'\]"),
        (lambda s: s["rough.module.long"].copy_(torch.zeros_like(s["rough.module.long"])), r"averages\['rough'\]"),
        (lambda s: s.update({"other.n_averaged": s["fast.n_averaged"]}), "got 'other.n_averaged'"),
    ):
        spoiled = {key: value.clone() for key, value in state.items()}
        spoil(spoiled)
        with pytest.raises((ValueError, RuntimeError), match=message):
            averages.load_state_dict(spoiled)
    require_own(both, "after loads that failed")
    require_own(both.train(3), "after an update")


@on_ranks(2)
def test_ranks_that_name_different_averages_are_told_so() -> None:
    first = dist.get_rank() == 0
    rules = {"a": EqualAverage(), "b": ExponentialAverage(0.9)}
    other = {"b": ExponentialAverage(0.9), "a": EqualAverage()}
    for mine, message in (
        (rules if first else other, "the averages"),
        (rules if first else {"a": EqualAverage()}, "the averages"),
        ({} if first else rules, "rules must name 1 to 16 averages, got 0"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            ShardedAverages(nn.Linear(2, 2), rules=mine)


# Each gate kills a bug


def forget_the_boxes() -> None:
    # As if each rank's part began at the first element of the whole.
    draws = shard_side.Draws
    shard_side.Draws = lambda key, shape, boxes: draws(key, (sum(box.numel for box in boxes),), None)  # type: ignore[misc, assignment]


def commit_before_all_are_verified() -> None:
    verify = sharded_averages.checkpoint.verify

    def verify_and_commit(staged: Any, ranks: Any, device: torch.device) -> None:
        verify(staged, ranks, device)
        for entry, run in staged.runs:
            entry.plane.detach().copy_(run.view(entry.plane.shape))

    sharded_averages.checkpoint.verify = verify_and_commit


@pytest.mark.parametrize(
    ("plant", "function", "args", "message"),
    [
        (forget_the_boxes, _save_all, (Path(), ["fsdp2"]), "own parts: "),
        (
            commit_before_all_are_verified,
            test_a_failed_load_changes_none,
            ("fsdp2",),
            "after loads that failed, ",
        ),
    ],
)
def test_the_gate_kills_the_bug(
    plant: Callable[[], None], function: Callable[..., None], args: tuple[Any, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RankFailedError, match=message):
        run_ranks(2, function, *(tmp_path if arg == Path() else arg for arg in args), plant=plant)
