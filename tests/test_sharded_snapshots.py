"""Snapshots of sharded averages: saved by four ranks, synthesized by as many as there are, to the same bits."""

from __future__ import annotations

import re
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from swafast import FusedAveragedModel, PowerAverage, ShardedAveragedModel
from swafast.posthoc.folder import snapshot_paths
from swafast.posthoc.snapshots import Snapshots
from tests.ranks import run_ranks
from tests.sharded_models import drift, fill, make_model, outcome, whole, wrap
from tests.support import differing

pytestmark = pytest.mark.distributed

STORED = {"narrow": PowerAverage.from_sigma_rel(0.05), "wide": PowerAverage.from_sigma_rel(0.10)}
WANTED = PowerAverage.from_sigma_rel(0.15)
MODES = ("ddp", "fsdp2", "fsdp1")
UPDATES, EVERY = 8, 2


def synthesize(folder: Path, **options: Any) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # four snapshots miss a few percent
        return Snapshots(folder).synthesize(WANTED, **options)


def save(folder: Path, mode: str, model: torch.nn.Module, kind: Any) -> dict[str, Any]:
    """Average a model in two widths and save them on the way."""
    reference = make_model(mode)
    averages = {name: kind(model, rule=rule) for name, rule in STORED.items()}
    snapshots = Snapshots(folder)
    for count in range(1, UPDATES + 1):
        drift(reference, count)
        fill(model, mode, reference)
        for average in averages.values():
            average.update_parameters(model)
        if count % EVERY == 0:
            snapshots.save(averages)
    return averages


def gathered(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in given.items()}


def _save_and_disagree(folder: Path) -> dict[str, Any]:
    """On four ranks, save in all modes and synthesize, then make calls that differ."""
    told: dict[str, Any] = {}
    for mode in MODES:
        averages = save(folder / mode, mode, model := wrap(make_model(mode), mode), ShardedAveragedModel)
        told[mode] = synthesize(folder / mode)
        if mode == "fsdp2":
            given = synthesize(folder / mode, like=model.state_dict())
            told["parts"] = all(isinstance(given[name], DTensor) for name, _ in model.named_parameters())
            told["spread"] = gathered(given)
    first = dist.get_rank() == 0
    snapshots = Snapshots(folder / "fsdp2")
    before = sorted(path.name for path in (folder / "fsdp2").iterdir())
    told["raised"] = {
        "rule": outcome(lambda: snapshots.synthesize(WANTED if first else STORED["wide"])),
        "count": outcome(lambda: snapshots.synthesize(WANTED, 4 if first else 6)),
        "outside": outcome(lambda: snapshots.synthesize(WANTED, 4 if first else 60)),
        "dtype": outcome(lambda: Snapshots(folder / "ddp").save(averages, dtype=None if first else torch.float16)),
        "call": outcome(lambda: snapshots.save(averages) if first else snapshots.synthesize(WANTED)),
        "folder": outcome(lambda: Snapshots(folder / ("fsdp2" if first else "ddp")).synthesize(WANTED)),
    }
    with averages["wide"].swapped_into(model) if first else nullcontext():
        told["raised"]["swapped"] = outcome(lambda: snapshots.save(averages["wide"]))
    told["kept"] = sorted(path.name for path in (folder / "fsdp2").iterdir()) == before
    # Without sharding, each rank with a whole average of its own.
    whole = FusedAveragedModel(module := make_model(), rule=WANTED)
    whole.update_parameters(module)
    Snapshots(folder / "whole").save(whole)
    told["whole"] = not differing(Snapshots(folder / "whole").synthesize(WANTED), whole.averaged_state_dict())
    with torch.no_grad():
        whole.module.long[dist.get_rank()] += 1
    told["raised"]["whole"] = outcome(lambda: Snapshots(folder / "whole").save(whole))
    return told


def _load_elsewhere(folder: Path, broken: Path) -> dict[str, Any]:
    """On other ranks, synthesize whole and as shards, and from a damaged snapshot."""
    told: dict[str, Any] = {mode: synthesize(folder / mode) for mode in MODES}
    like = wrap(make_model("fsdp2"), "fsdp2").state_dict()
    told["spread"] = gathered(synthesize(folder / "fsdp2", like=like))
    told["shard"] = outcome(lambda: Snapshots(broken).synthesize(WANTED, like=like))
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, dict[str, Tensor]]:
    for mode in MODES:
        save(folder / "unsharded" / mode, mode, make_model(mode), FusedAveragedModel)
    return {mode: synthesize(folder / "unsharded" / mode) for mode in MODES}


@pytest.fixture(scope="module")
def saved(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(4, _save_and_disagree, folder)


@pytest.mark.parametrize("mode", MODES)
def test_one_process_gives_what_four_ranks_have_saved(
    folder: Path, saved: list[Any], expected: dict[str, dict[str, Tensor]], mode: str
) -> None:
    assert differing(synthesize(folder / mode), expected[mode]) == []
    assert all(differing(told[mode], expected[mode]) == [] for told in saved)


def test_a_rank_gets_its_shards(saved: list[Any], expected: dict[str, dict[str, Tensor]]) -> None:
    assert all(told["parts"] for told in saved)
    assert all(differing(told["spread"], expected["fsdp2"]) == [] for told in saved)


def flip_a_bit(snapshot: Path, value: Tensor) -> None:
    """Flip a bit in the first of the data files that holds these numbers."""
    for path in sorted(snapshot.glob("*.distcp")):
        content = bytearray(path.read_bytes())
        at = content.find(value.numpy().tobytes())
        if at >= 0:
            content[at] ^= 1
            path.write_bytes(content)
            return
    raise AssertionError("it is in none of them")


@pytest.mark.parametrize("world", [2, 3])
def test_other_ranks_give_what_four_have_saved(
    folder: Path, saved: list[Any], expected: dict[str, dict[str, Tensor]], world: int
) -> None:
    broken = folder / f"broken{world}"
    shutil.copytree(folder / "fsdp2", broken)
    latest = snapshot_paths(broken)[-1]
    # Of a few elements at the end of a param, which one rank reads.
    wide = Snapshots(broken).synthesize(STORED["wide"])["long"][-8:]
    flip_a_bit(latest, wide)
    for told in run_ranks(world, _load_elsewhere, folder, broken):
        for mode in MODES:
            assert differing(told[mode], expected[mode]) == []
        assert differing(told["spread"], expected["fsdp2"]) == []
        message = f"ValueError: snapshot {latest} must hold what was saved, got another checksum of 'wide/long'"
        assert told["shard"].startswith(message)


@pytest.mark.parametrize(
    ("what", "own", "other"),
    [
        ("rule", r"ValueError: the call and the snapshots must be the same on every rank, got for 'rule'", ""),
        ("count", r"ValueError: .* must be the same on every rank, got for 'num_averaged' 4 on rank 0 and 6 on", ""),
        (
            "outside",
            r"ValueError: num_averaged must be from 2 to 8, .*, got 60",
            "RuntimeError: synthesize failed on rank 1",
        ),
        ("dtype", r"ValueError: averages must be the same on every rank, got for 'dtype' None on rank 0 and torch", ""),
        ("call", r"RuntimeError: all ranks must make the same call, got save on rank 0, synthesize on rank 1", ""),
        ("folder", r"ValueError: the call and the snapshots must be the same on every rank, got for '0+2\.0'", ""),
        ("swapped", r"RuntimeError: save must wait until", "RuntimeError: save failed on rank 0, and so on every rank"),
        ("whole", r"ValueError: a FusedAveragedModel that is saved must be the same on every rank, got for 'long'", ""),
    ],
)
def test_ranks_that_disagree_are_told(saved: list[Any], what: str, own: str, other: str) -> None:
    messages = [told["raised"][what] for told in saved]
    assert all(re.match(own, message) or (other and message.startswith(other)) for message in messages), messages
    assert any(re.match(own, message) for message in messages)


def _save_other_buffers(folder: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.BatchNorm1d(3) for _ in range(6)))
    for layer in model:  # each rank has its own, and writes some of them
        torch.nn.init.constant_(layer.running_mean, 1.0 + dist.get_rank())
    average = ShardedAveragedModel(model, rule=WANTED)
    average.update_parameters(model)
    Snapshots(folder).save(average)


def test_buffers_are_those_of_the_first_rank(tmp_path: Path) -> None:
    run_ranks(3, _save_other_buffers, tmp_path)
    given = synthesize(tmp_path)
    assert [given[f"{layer}.running_mean"].tolist() for layer in range(6)] == [[1.0] * 3] * 6


def test_a_call_that_fails_leaves_the_folder_as_it_was(saved: list[Any]) -> None:
    assert all(told["kept"] for told in saved)
    assert all(told["whole"] for told in saved)
