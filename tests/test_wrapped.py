"""Real DDP in this process, around the model, around what is averaged, and around both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from swafast import FusedAveragedModel
from tests.support import tensors_of, unchanged


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("average_of", ["plain", "ddp"])
@pytest.mark.parametrize("update_from", ["plain", "ddp"])
def test_ddp_on_either_side(average_of: str, update_from: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    models = {"plain": model, "ddp": DistributedDataParallel(model)}
    average, oracle = FusedAveragedModel(models[average_of]), AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        models["ddp"](torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(models[update_from])
        oracle.update_parameters(model)
    state = average.averaged_state_dict()
    assert list(state) == list(model.state_dict())
    for name, tensor in tensors_of(oracle.module).items():
        torch.testing.assert_close(state[name], tensor)
    with unchanged(model), average.swapped_into(models[update_from]):
        assert torch.equal(model[0].weight, state["0.weight"])


@pytest.mark.usefixtures("process_group")
def test_keys_are_torchs_under_ddp() -> None:
    wrapped = DistributedDataParallel(nn.Linear(3, 4))
    assert list(FusedAveragedModel(wrapped).state_dict()) == list(AveragedModel(wrapped).state_dict())
