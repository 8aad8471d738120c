"""The recorded states are what the installed packages write."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ema_pytorch import EMA
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from swafast import ExponentialAverage, FusedAveragedModel, ShardedAveragedModel
from swafast.convert import load
from tests.convert_cases import CASES, CLOSE, Loading, state_of
from tests.frameworks.record_states import FOLDER, RECORDS, UNPINNED, Net, put, started, version_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.frameworks

INSTALLED = [name for name, (package, _) in RECORDS.items() if package not in UNPINNED]


@pytest.fixture(scope="module")
def made_anew(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record all in a process of its own: some tools change global state, such as torch's default seed."""
    folder = tmp_path_factory.mktemp("states")
    command = [sys.executable, "-m", "tests.frameworks.record_states", "--into", str(folder), *INSTALLED]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def unlike(got: Any, expected: Any, path: str) -> Iterator[str]:
    """Yield where two states differ: in a key, a type, a shape, a value, or a float by more than rounding."""
    if type(got) is not type(expected):
        yield f"{path}: {type(got).__name__} and not {type(expected).__name__}"
    elif isinstance(got, Tensor):
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            yield f"{path}: {got.shape} {got.dtype} and not {expected.shape} {expected.dtype}"
        elif not torch.allclose(got.double(), expected.double(), rtol=CLOSE, atol=CLOSE):
            yield f"{path}: other values"
    elif isinstance(got, dict):
        if [*got] != [*expected]:
            yield f"{path}: {[*got]} and not {[*expected]}"
        else:
            for key in got:
                yield from unlike(got[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(got, (list, tuple)):
        if len(got) != len(expected):
            yield f"{path}: {len(got)} and not {len(expected)}"
        else:
            for index, each in enumerate(got):
                yield from unlike(each, expected[index], f"{path}[{index}]")
    elif got != expected:
        yield f"{path}: {got!r} and not {expected!r}"


@pytest.mark.parametrize("name", INSTALLED)
def test_a_state_is_what_the_package_writes(made_anew: Path, name: str) -> None:
    recorded = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    anew = torch.load(made_anew / f"{name}.pt", weights_only=True)
    package, _ = RECORDS[name]
    assert recorded["writer"].partition("+")[0] == f"{package} {version_of(package)}".partition("+")[0]
    assert [*unlike(anew["state"], recorded["state"], "state")] == []
    assert [*unlike(anew["continued"], recorded["continued"], "continued")] == []


@pytest.mark.parametrize("tool", ["ema_pytorch", "timm"])
@pytest.mark.parametrize("after", [0, 4, 5])
def test_a_state_of_any_step_goes_on_as_there(tool: str, after: int) -> None:
    every = 2 if tool == "ema_pytorch" else 1
    start = after // every * every + 1
    for stop in range(1, 12):
        theirs_of = started()
        if tool == "timm":
            theirs: Any = ModelEmaV3(theirs_of, decay=0.9, update_after_step=after)
            average, count = theirs.module, max(0, stop - after)
        else:
            # So steep a warm-up is none.
            theirs = EMA(theirs_of, beta=0.9, update_after_step=after, update_every=every, inv_gamma=1e-9, power=5)
            average, count = theirs.ema_model, max(0, math.ceil(stop / every) - after // every)
        ours_of = started()
        ours = FusedAveragedModel(ours_of, rule=ExponentialAverage(0.9), use_buffers=True)
        for step in range(1, 18):
            put(theirs_of, step)
            theirs.update(theirs_of, step=step) if tool == "timm" else theirs.update()
            if step == stop:
                load(ours, theirs.state_dict(), num_averaged=count)
            elif step > stop and step >= start and (step - start) % every == 0:
                put(ours_of, step)
                ours.update_parameters(ours_of)
        for own, other in zip(ours.module.parameters(), average.parameters(), strict=True):
            assert torch.allclose(own, other, rtol=CLOSE, atol=CLOSE), (stop, count)


def load_into_shards(names: list[str]) -> None:
    """Compare averages of shards with those of a whole model, for states with names and without."""
    for name in names:
        whole = Loading(name)
        expected = whole.load(state_of(name))
        model: nn.Module = Net()
        put(model, 0)
        fully_shard(model)
        averaged = ShardedAveragedModel(model, rule=CASES[name].rule)
        short = {**state_of(name), "shadow_params": state_of(name).get("shadow_params", [])[:-1]}
        with pytest.raises((ValueError, TypeError)):
            load(averaged, short if "shadow_params" in state_of(name) else {"module.first.weight": torch.zeros(8, 4)})
        assert int(averaged.n_averaged) == 0
        assert load(averaged, state_of(name)) == expected
        got = averaged.averaged_state_dict()
        for key, value in whole.averaged.averaged_state_dict().items():
            assert torch.equal(got[key], value), key


def test_shards_of_two_ranks_take_whole_states() -> None:
    run_ranks(2, load_into_shards, ["torch_swa", "diffusers_ratio", "torch_ema_ratio"])
