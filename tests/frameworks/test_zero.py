"""Averages of models under DeepSpeed's ZeRO, on gloo ranks: stage 3 by its masters, 1 and 2 by the params."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from swafast import (
    EqualAverage,
    FusedAveragedModel,
    ShardedAveragedModel,
    ShardedAverages,
    Snapshots,
    update_bn,
)
from tests.frameworks.deepspeed_kit import RULE, Net, batches, deepspeed, engine_of, train, whole
from tests.ranks import run_ranks, starter
from tests.support import require_same
from tests.test_sharded_modes import Seen

pytestmark = pytest.mark.frameworks

starter.set_forkserver_preload(
    ["tests.ranks_preload", "tests.frameworks.ranks_preload", "tests.frameworks.deepspeed_kit"]
)

#: Small enough for several groups of masters.
GROUPS = {"sub_group_size": 60}
KEPT = {"stage3_param_persistence_threshold": 10**6}  # ZeRO-3 keeps them gathered


def on_ranks(world: int, body: Callable[..., Any], *args: Any) -> Any:
    return run_ranks(world, body, *args)[0]


def averaged_beside(engine: Any, steps: int = 4, **options: Any) -> tuple[ShardedAveragedModel, FusedAveragedModel]:
    """Train; return the average, and an unsharded one of the gathered masters. No update gathers anything."""
    options.setdefault("rule", RULE)
    averaged = ShardedAveragedModel(engine.module, **options)
    reference = Net()
    _fill(reference, whole(engine), engine)
    expected = FusedAveragedModel(reference, **options)
    seen = Seen()
    for step in range(steps):
        train(engine, seed=step)
        status = [param.ds_status for param in engine.module.parameters()]
        with seen:
            averaged.update_parameters(engine.module)
        assert seen.collectives == []
        assert [param.ds_status for param in engine.module.parameters()] == status
        _fill(reference, whole(engine), engine)
        expected.update_parameters(reference)
    return averaged, expected


def _fill(net: nn.Module, values: dict[str, Tensor], engine: Any) -> None:
    for name, value in values.items():
        net.get_parameter(name).data = value
    for name, buffer in engine.module.named_buffers():
        net.get_buffer(name).copy_(buffer)


def net_of(engine: Any, state: dict[str, Tensor]) -> nn.Module:
    """Return a whole net with these params, in the dtype that the engine computes in."""
    net = Net().to(torch.bfloat16 if engine.bfloat16_enabled() else torch.float32)
    net.load_state_dict(state)
    return net.eval()


@torch.no_grad()
def evaluated(engine: Any, model: nn.Module | None = None) -> Tensor:
    engine.eval()
    return (model or engine)(batches(engine, 1, seed=99)[0])


# Bits, swaps and copies


def _evaluate_and_raise(averaged: ShardedAveragedModel, engine: Any) -> None:
    with averaged.swapped_into(engine.module):
        evaluated(engine)
        raise ZeroDivisionError


def follows(dtype: str, options: dict[str, Any]) -> None:
    engine = engine_of(dtype=dtype, **options)
    averaged, expected = averaged_beside(engine)
    require_same(averaged.full_state_dict(), expected.state_dict(), "averages")
    exported, own, before = averaged.averaged_state_dict(), whole(engine), evaluated(engine)
    with averaged.swapped_into(engine.module):
        assert torch.equal(evaluated(engine), evaluated(engine, net_of(engine, exported)))
        assert torch.equal(evaluated(engine), evaluated(engine, net_of(engine, exported)))
        with pytest.raises(RuntimeError, match=r"a step of the optimizer must wait"):
            train(engine)
    engine.optimizer.zero_grad()
    assert torch.equal(evaluated(engine), before)
    with pytest.raises(ZeroDivisionError):
        _evaluate_and_raise(averaged, engine)
    assert torch.equal(evaluated(engine), before)
    require_same(whole(engine), own, "masters after a swap")
    averaged.copy_to(engine.module)
    require_same(whole(engine), {name: exported[name].to(own[name].dtype) for name in own}, "masters after copy_to")
    assert torch.equal(evaluated(engine), evaluated(engine, net_of(engine, exported)))
    train(engine, seed=50)
    # AdamW with a rate of 0.01 moves each element by about as much; the old weights are further away.
    for name, value in whole(engine).items():
        torch.testing.assert_close(value, exported[name].to(value.dtype), rtol=0, atol=0.013, msg=name)
    with averaged.swapped_into(engine.module), deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        pass
    written = pytest.raises(RuntimeError, match=r"must not be written while swapped, got writes into")
    weight = engine.module.last.weight
    with written, averaged.swapped_into(engine.module), deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        weight.data.zero_()


@pytest.mark.parametrize("options", [GROUPS, KEPT], ids=["groups", "kept"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_averages_are_those_of_the_masters(dtype: str, options: dict[str, Any]) -> None:
    on_ranks(2, follows, dtype, options)


def goes_on(with_swaps: bool) -> dict[str, Tensor]:
    engine = engine_of(dtype="bf16", **KEPT)
    averaged = ShardedAveragedModel(engine.module, rule=RULE)
    for step in range(4):
        train(engine, seed=step)
        averaged.update_parameters(engine.module)
        if with_swaps:
            with averaged.swapped_into(engine.module):
                evaluated(engine)
    averages = averaged.averaged_state_dict()
    del averages["num_calls"]  # an evaluation counts in the copy that the averages have
    return {**whole(engine), **{f"averaged.{name}": value for name, value in averages.items()}}


def test_training_goes_on_as_without_swaps() -> None:
    require_same(on_ranks(2, goes_on, True), on_ranks(2, goes_on, False), "params and averages")


def offloaded() -> None:
    engine = engine_of(offload_optimizer={"device": "cpu"}, **GROUPS)
    averaged, expected = averaged_beside(engine)
    require_same(averaged.full_state_dict(), expected.state_dict(), "averages")
    averaged.copy_to(engine.module)
    exported = averaged.averaged_state_dict()
    require_same(whole(engine), {name: exported[name] for name in whole(engine)}, "masters")
    assert torch.equal(evaluated(engine), evaluated(engine, net_of(engine, exported)))


def test_masters_on_the_cpu() -> None:
    on_ranks(2, offloaded)


# States


def saved(folder: str, dtype: str) -> dict[str, Tensor]:
    engine = engine_of(dtype=dtype)
    averaged, _ = averaged_beside(engine)
    dcp.save({"averaged": averaged.state_dict()}, checkpoint_id=f"{folder}/dcp")
    Snapshots(f"{folder}/snapshots").save(averaged)
    return averaged.full_state_dict()


def loaded(folder: str, dtype: str, wanted: dict[str, Tensor]) -> None:
    engine = engine_of(dtype=dtype)
    averaged = ShardedAveragedModel(engine.module, rule=RULE)
    state = {"averaged": averaged.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/dcp")
    averaged.load_state_dict(state["averaged"])
    require_same(averaged.full_state_dict(), wanted, "a loaded state")
    train(engine)
    averaged.update_parameters(engine.module)
    again = ShardedAveragedModel(engine.module, rule=RULE)
    again.load_full_state_dict(wanted if dist.get_rank() == 0 else None, from_rank0=True)
    require_same(again.full_state_dict(), wanted, "a whole state")


def loaded_elsewhere(folder: str, wanted: dict[str, Tensor]) -> None:
    for model in (Net(), Net()):
        fully_shard(model) if model is not None and dist.get_world_size() > 1 else None
        averaged = ShardedAveragedModel(model, rule=RULE)
        state = {"averaged": averaged.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/dcp")
        averaged.load_state_dict(state["averaged"])
        require_same(averaged.full_state_dict(), wanted, "a state in FSDP2")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_states_on_other_numbers_of_ranks(tmp_path: Path, dtype: str) -> None:
    state = on_ranks(2, saved, str(tmp_path), dtype)
    for world in (1, 2, 3):
        on_ranks(world, loaded, str(tmp_path), dtype, state)
    if dtype == "fp32":
        on_ranks(2, loaded_elsewhere, str(tmp_path), state)
        FusedAveragedModel(Net()).load_state_dict(state)


# Options


def with_options() -> None:
    engine = engine_of(dtype="bf16")
    for options in (
        {"format": "float32"},
        {"format": "compensated"},
        {"rule": EqualAverage(), "deviations": 2},
        {"include": lambda name, param: param.dim() > 1, "use_buffers": True},
    ):
        averaged, expected = averaged_beside(engine, 3, **options)
        found = averaged.full_state_dict()
        require_same(found, {key: expected.state_dict()[key] for key in found}, str(options))
    several = ShardedAverages(engine.module, rules={"fast": RULE, "mean": EqualAverage()})
    train(engine)
    several.update_parameters(engine.module)
    with several["mean"].swapped_into(engine.module) as model:
        update_bn(batches(engine, 1), model)
    grown = engine_of(dtype="bf16")
    several.adapt_to(grown.module)
    train(grown)
    several.update_parameters(grown.module)


def sampled() -> None:
    engine = engine_of()
    averaged, expected = averaged_beside(engine, rule=EqualAverage(), deviations=2)
    reference = Net()
    expected.sample_to(reference, 3)
    with averaged.sampled_into(engine.module, 3):
        assert torch.equal(evaluated(engine), evaluated(engine, net_of(engine, reference.state_dict())))
    averaged.sample_to(engine.module, 3)
    wanted = {name: param.detach() for name, param in reference.named_parameters()}
    require_same(whole(engine), wanted, "a sample")


def test_options() -> None:
    on_ranks(2, with_options)


def test_samples() -> None:
    on_ranks(2, sampled)


# Refusals


def refused() -> None:
    engine = engine_of()
    with pytest.raises(ValueError, match=r"'scale' empty, .*swafast\.ShardedAveragedModel"):
        FusedAveragedModel(engine.module)
    for made in (FusedAveragedModel, ShardedAveragedModel):
        with pytest.raises(TypeError, match=r"must be the one that the engine trains, .*: pass engine\.module"):
            made(engine)
    averaged = ShardedAveragedModel(engine.module)
    with pytest.raises(TypeError, match=r"got DeepSpeedEngine: install swafast\.integrations\.deepspeed"):
        averaged.attach(engine, engine.module)
    for optimizer in (engine.optimizer, engine.optimizer.optimizer):
        with pytest.raises(ValueError, match=r"optimizer must have params .*after each engine\.step\(\)"):
            averaged.attach(optimizer, engine.module)
    torch.manual_seed(1)
    inference = deepspeed.initialize(
        model=nn.Linear(3, 3), config={"train_batch_size": 2, "zero_optimization": {"stage": 3}}
    )[0]
    with pytest.raises(ValueError, match=r"'weight' must belong to a DeepSpeed .*average engine\.module"):
        ShardedAveragedModel(inference.module)
    hpz = engine_of(zero_hpz_partition_size=2)
    with pytest.raises(NotImplementedError, match=r"set zero_hpz_partition_size to 1"):
        ShardedAveragedModel(hpz.module)


def test_refused() -> None:
    on_ranks(2, refused)


# Stages 1 and 2


def follows_params(stage: int, dtype: str) -> None:
    engine = engine_of(stage=stage, dtype=dtype)
    averaged = ShardedAveragedModel(engine.module, rule=RULE, format="float32")
    reference = Net().to(next(engine.module.parameters()).dtype)
    expected = FusedAveragedModel(reference, rule=RULE, format="float32")
    for step in range(3):
        train(engine, seed=step)
        averaged.update_parameters(engine.module)
        _fill(reference, {name: param.detach().clone() for name, param in engine.module.named_parameters()}, engine)
        expected.update_parameters(reference)
    require_same(averaged.full_state_dict(), expected.state_dict(), "averages")
    averaged.copy_to(engine.module)
    engine.optimizer.refresh_fp32_params()
    wanted = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    train(engine, seed=50)
    for name, param in engine.module.named_parameters():
        torch.testing.assert_close(param.detach(), wanted[name], rtol=0, atol=0.02, msg=name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2(stage: int, dtype: str) -> None:
    on_ranks(2, follows_params, stage, dtype)
