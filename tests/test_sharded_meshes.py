"""Tensor parallelism whose plan leaves params out: FSDP2 then shards these on each rank's own part of the mesh."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from swafast import FusedAveragedModel, ShardedAveragedModel
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.LayerNorm(9)
        self.inner = nn.Linear(9, 16)
        self.outer = nn.Linear(16, 9)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.outer(torch.relu(self.inner(self.norm(x)))))


def on_a_part_of_the_mesh(share_replicas: bool, folder: Path) -> list[str]:
    """Average, swap, save and load; give what differs from the unsharded class."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, plain = Net(), Net()
    parallelize_module(model, mesh["tp"], {"inner": ColwiseParallel(), "outer": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    averaged, fused = ShardedAveragedModel(model, share_replicas=share_replicas), FusedAveragedModel(plain)
    for factor in (1.1, 1.2, 1.3):
        with torch.no_grad():
            for param in (*model.parameters(), *plain.parameters()):
                param.mul_(factor)
        averaged.update_parameters(model)
        fused.update_parameters(plain)
    with averaged.swapped_into(model):
        answer = model(torch.ones(2, 9))
    wrong = [] if torch.allclose(answer, fused(torch.ones(2, 9)), atol=1e-6) else ["forward"]
    state = {"averaged": averaged.state_dict()}
    dcp.save(state, checkpoint_id=folder)
    other = ShardedAveragedModel(model, share_replicas=not share_replicas)
    state = {"averaged": other.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state["averaged"])
    for which in (averaged, other):
        found = which.full_state_dict()
        wrong += [key for key, value in fused.state_dict().items() if not torch.equal(found[key], value)]
    return wrong


@pytest.mark.parametrize("share_replicas", [False, True])
def test_params_outside_the_plan_are_averaged_where_they_are(share_replicas: bool, tmp_path: Path) -> None:
    assert run_ranks(4, on_a_part_of_the_mesh, share_replicas, tmp_path) == [[]] * 4


def other_bits_on_one_part() -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Net()
    if dist.get_rank() in (1, 3):
        model.head.bias.data[0] += 1.0
    fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(ValueError, match=r"head\.bias") as caught:
        ShardedAveragedModel(model)
    return str(caught.value)


def test_parts_of_the_mesh_that_hold_other_bits_are_an_error() -> None:
    told = run_ranks(4, other_bits_on_one_part)
    assert len(set(told)) == 1
    assert "other bits on rank 1 than on rank 0" in told[0]


def overlapping() -> str:
    first = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    mine = first["dp"] if dist.get_rank() != 3 else first["tp"]
    model = nn.Module()
    model.weight = nn.Parameter(distribute_tensor(torch.ones(4), mine, [Shard(0)], src_data_rank=None))
    assert isinstance(model.weight, DTensor)
    with pytest.raises(ValueError, match="meshes of one shape that share no rank") as caught:
        ShardedAveragedModel(model)
    return str(caught.value)


def test_parts_of_the_mesh_that_overlap_are_an_error() -> None:
    assert len(set(run_ranks(4, overlapping))) == 1
