"""Teachers on several ranks: beside a student under DDP, and under FSDP2 with a model of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from swafast import ExponentialAverage, FusedAveragedModel, ShardedAveragedModel
from swafast.sharded import shard_matching, shard_use
from tests.ranks import RankFailedError, planted, run_ranks

pytestmark = pytest.mark.distributed

RULE = ExponentialAverage(0.6, schedule="cosine", updates=20)
STEPS = 4


class Student(nn.Module):
    """An online network, and the predictor that BYOL's teacher lacks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.online = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
        self.predictor = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.predictor(self.online(images))


def images_of(rank: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(10 + rank))


def under_ddp() -> tuple[list[Tensor], int, bool]:
    student = Student()
    ddp = DistributedDataParallel(student)
    teacher = FusedAveragedModel(ddp.module.online, rule=RULE, num_averaged=1).requires_grad_(False)
    sgd = torch.optim.SGD(ddp.parameters(), 0.5)
    images, collectives = images_of(dist.get_rank()), 0
    for _ in range(STEPS):
        with torch.no_grad():
            targets = teacher(images + 0.1)
        (ddp(images) - targets).square().mean().backward()
        sgd.step()
        sgd.zero_grad()
        with CommDebugMode() as counted:
            teacher.update_parameters(student.online)
        collectives += counted.get_total_counts()
    has_moved = not torch.equal(teacher.module[0].weight, Student().online[0].weight)
    return [param.detach() for param in teacher.parameters()], collectives, has_moved


def test_under_ddp_every_rank_has_the_same_teacher_without_a_collective() -> None:
    (first, *counted), *others = run_ranks(2, under_ddp)
    assert counted == [0, True]
    for params, *also in others:
        assert also == counted
        assert all(map(torch.equal, first, params))


def sharded(model: nn.Sequential) -> Any:
    fully_shard(model[0])
    return fully_shard(model)  # the root has the params of the last layer


def under_fsdp(by_swap: bool) -> None:
    """Hold a teacher under FSDP2, and one that is swapped into the student, to a plain one beside a plain student."""
    plain, student = Student().online, sharded(Student().online)
    expected = FusedAveragedModel(plain, rule=RULE, num_averaged=1)
    averaged = ShardedAveragedModel(student, rule=RULE, num_averaged=1)
    teacher = sharded(copy.deepcopy(plain)).requires_grad_(False)
    optimizers = [torch.optim.SGD(each.parameters(), 0.5) for each in (plain, student)]
    images = images_of(0)
    for _ in range(STEPS):
        with torch.no_grad():
            if by_swap:  # before the student's forward: its graph would lose the params that it needs
                with averaged.swapped_into(student):
                    targets = student(images + 0.1)
            else:
                targets = teacher(images + 0.1)
            require(targets, expected(images + 0.1))
        for model, sgd in zip((plain, student), optimizers, strict=True):
            sgd.zero_grad()
            (model(images) - targets - 1).square().mean().backward()
            sgd.step()
        expected.update_parameters(plain)
        averaged.update_parameters(student)
        with CommDebugMode() as counted:
            if not by_swap:
                averaged.copy_to(teacher)
        assert counted.get_total_counts() == 0


def require(found: Tensor, expected: Tensor) -> None:
    """Equal up to the order of sums in the gradients of two ranks."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by_swap", [False, True], ids=["copy_to", "swapped_into"])
def test_a_teacher_under_fsdp_runs_on_the_newest_average(by_swap: bool) -> None:
    run_ranks(2, under_fsdp, by_swap)


def forget_to_reshard() -> None:
    shard_use.reshard = shard_matching.reshard = lambda model: None  # type: ignore[assignment]


def test_a_teacher_that_stays_gathered_is_seen() -> None:
    # FSDP's root stays gathered after a forward without a backward, and would not see what is written into its shards.
    with planted(forget_to_reshard), pytest.raises(RankFailedError):
        test_a_teacher_under_fsdp_runs_on_the_newest_average(False)


def with_a_sharded_average() -> None:
    student = Student().online
    teacher = FusedAveragedModel(student, rule=RULE, num_averaged=1).requires_grad_(False)
    fully_shard(teacher.module)
    teacher(images_of(0))  # and FSDP's root stays gathered: its params look like plain ones
    with pytest.raises(ValueError, match="module of the averaged model must be whole on this rank, got an FSDPModule"):
        teacher.update_parameters(student)


def test_an_average_that_was_sharded_itself_is_refused() -> None:
    run_ranks(2, with_a_sharded_average)
