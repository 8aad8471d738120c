"""Subspaces of sharded averages: one all-reduce, the points of one process on every rank, gradients of every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from swafast import FusedAveragedModel, ShardedAveragedModel
from swafast.average.subspace import Subspace
from swafast.op.drawing import PlacesPoint
from swafast.sharded import shard_subspaces, shard_use
from swafast.sharded.parts.ranks import Ranks
from swafast.sharded.parts.shares import Share
from tests.ranks import RankFailedError, on_ranks, planted, run_ranks
from tests.sharded_models import Beside, locals_of, outcome, planes_of
from tests.support import differing, require_same, tensors_of
from tests.test_sharded_modes import Seen

pytestmark = pytest.mark.distributed

T = [0.5, -1.0]


def made(mode: str, **options: Any) -> tuple[Beside, Subspace, Subspace]:
    """Return both models with their averages, and a subspace of each. Both have the same directions then."""
    both = Beside(mode, updates=5, deviations=4, **options)
    with Seen() as seen:
        ours = both.averaged.subspace(2)
    assert len([name for name, _ in seen.collectives if "allreduce" in name]) == 1, seen.collectives
    expected = both.expected.subspace(2)
    torch.testing.assert_close(ours.scales, expected.scales, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.trajectory, expected.trajectory, rtol=0, atol=1e-9)
    expected._mixture = ours._mixture  # they differ in their last bits, since the sums have another order
    return both, ours, expected


def require_points(modes: list[tuple[str, torch.dtype]]) -> None:
    for mode, dtype in modes:
        both, ours, expected = made(mode, dtype=dtype)
        before, own, planes = both.params(), locals_of(both.sharded), planes_of(both.averaged)
        with ours.placed_into(both.sharded, T), expected.placed_into(both.reference, T):
            inside, wanted = both.params(), tensors_of(both.reference)
        require_same(inside, wanted, f"{mode}, inside")
        assert {name for name in before if "weight" in name} <= {*differing(inside, before)}
        require_same(locals_of(both.sharded), own, f"{mode}, own after")
        require_same(both.params(), before, f"{mode}, after")
        require_same(planes_of(both.averaged), planes, f"{mode}, averages after")


def set_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Set a gradient of each param that tells its elements apart, and return these."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = torch.arange(param.numel(), dtype=torch.float64).cos().view(param.shape).to(param.dtype)
        param.grad = found[name].clone()
    return found


def require_gradients(modes: list[tuple[str, dict[str, Any]]]) -> None:
    for mode, options in modes:
        both, ours, expected = made(mode, **options)
        with ours.placed_into(both.sharded, T), expected.placed_into(both.reference, T):
            assert "no gradients" in outcome(lambda ours=ours, both=both: ours.gradient(both.sharded))
            wanted = set_gradients(both.reference)
            for name, param in both.inner.named_parameters():
                whole = wanted[name.removeprefix("module.")].clone()
                is_spread = isinstance(param, DTensor)
                param.grad = distribute_tensor(whole, param.device_mesh, param.placements) if is_spread else whole
            found = ours.gradient(both.sharded)
            torch.testing.assert_close(found, expected.gradient(both.reference), rtol=1e-9, atol=1e-12)
        assert all(param.grad is None for param in both.inner.parameters())


@on_ranks(2)
def test_points_and_gradients_are_those_of_one_process() -> None:
    require_points([("ddp", torch.bfloat16), ("fsdp2", torch.float32)])
    require_gradients([("ddp", {}), ("fsdp2", {})])


@pytest.mark.slow
def test_points_and_gradients_of_other_modes() -> None:
    run_ranks(2, require_points, [("fsdp1", torch.float32), ("tp", torch.float32)])
    run_ranks(4, require_points, [("hsdp", torch.float32)])
    run_ranks(4, require_gradients, [("hsdp", {}), ("hsdp", {"share_replicas": True}), ("tp", {})])


@on_ranks(2)
def test_gradients_of_a_backward() -> None:
    """What DDP and FSDP2 leave in ``grad`` gives the gradient of the mean of both ranks' losses."""
    images = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))

    for wrapped in (lambda: DistributedDataParallel(make(), gradient_as_bucket_view=True), lambda: fully_shard(make())):
        whole, model = make(), wrapped()
        averages = FusedAveragedModel(whole, deviations=3), ShardedAveragedModel(model, deviations=3)
        for step in range(3):
            for each, averaged in zip((whole, model), averages, strict=True):
                with torch.no_grad():
                    for number, param in enumerate(each.parameters()):
                        param.add_(param.square() + 0.01 * number * (step + 1))
                averaged.update_parameters(each)
        expected, ours = (averaged.subspace(1) for averaged in averages)
        model(images[dist.get_rank()]).square().mean().backward()  # of the training, not of the point
        before = [(p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone() for p in model.parameters()]
        with expected.placed_into(whole, [2.0]), ours.placed_into(model, [2.0]):
            whole(images).square().mean().backward()
            model(images[dist.get_rank()]).square().mean().backward()
            torch.testing.assert_close(ours.gradient(model), expected.gradient(whole), rtol=1e-4, atol=1e-6)
        after = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        assert all(map(torch.equal, after, before))


@on_ranks(2)
def test_errors_are_raised_on_every_rank() -> None:
    both, ours, _ = made("ddp")
    first = dist.get_rank() == 0
    assert "rank must be at most 4" in outcome(lambda: both.averaged.subspace(5))
    assert "same call" in outcome(lambda: both.averaged.subspace(1 if first else 2))
    with pytest.raises(RuntimeError, match="same call"), ours.placed_into(both.sharded, [1.0, 2.0] if first else T):
        pass
    for wrong in ([1j, 0.0], [10**400, 0.0]):
        placing = ours.placed_into(both.sharded, wrong if first else T)
        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"t must be|same call|rank 0"), placing:
            pass
    with ours.placed_into(both.sharded, T):
        expected = {name: value.clone() for name, value in both.params().items()}
    placing = ours.placed_into(both.sharded, point := torch.tensor(T, dtype=torch.float64))
    point.fill_(dist.get_rank())  # ranks compare, and place, what it was at the call
    with placing:
        require_same(both.params(), expected, "as at the call")
    both.train()
    with pytest.raises(RuntimeError, match="before an update"), ours.placed_into(both.sharded, T):
        pass
    flat = Beside("fsdp1", updates=3, deviations=2)
    subspace = flat.averaged.subspace(1)
    with subspace.placed_into(flat.sharded, [1.0]):
        assert "FSDP1" in outcome(lambda: subspace.gradient(flat.sharded))


# Planted bugs


def no_sum() -> None:
    Ranks.sum_ = lambda self, tensor: None  # type: ignore[method-assign]


def each_replica_counts() -> None:
    Share.counts_on = lambda self, rank: True  # type: ignore[method-assign]


def other_columns() -> None:
    real = shard_subspaces.products
    shard_subspaces.products = lambda found, count: real([(each, turned[::-1]) for each, turned in found], count)


def no_gathers() -> None:
    shard_use.PlacesShards.gather = lambda self: None  # type: ignore[method-assign]


def gradients_stay() -> None:
    PlacesPoint.back = PlacesPoint.__mro__[1].back  # type: ignore[method-assign]


DDP = [("ddp", {})]
GATES: list[tuple[Callable[[], None], int, Callable[..., None], Any]] = [
    (no_sum, 2, require_gradients, DDP),
    (each_replica_counts, 4, require_gradients, [("hsdp", {})]),
    (other_columns, 2, require_gradients, DDP),
    (no_gathers, 2, require_points, [("ddp", torch.float32)]),
    (gradients_stay, 2, require_gradients, DDP),
]


@pytest.mark.slow
@pytest.mark.parametrize(("plant", "world", "gate", "modes"), GATES, ids=[plant.__name__ for plant, *_ in GATES])
def test_the_gate_kills_the_bug(plant: Callable[[], None], world: int, gate: Callable[..., None], modes: Any) -> None:
    with planted(plant), pytest.raises(RankFailedError, match=r"AssertionError|differ|Mismatch"):
        run_ranks(world, gate, modes)
