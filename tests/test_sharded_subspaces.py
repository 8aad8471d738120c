"""Subspaces of sharded averages: one all-reduce, the points of one process on every rank, gradients of every mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from swafast.average.subspace import Subspace
from tests.ranks import on_ranks
from tests.sharded_models import Beside, locals_of, outcome, planes_of
from tests.support import differing, require_same, tensors_of
from tests.test_sharded_modes import Seen

pytestmark = pytest.mark.distributed

T = [0.5, -1.0]


def made(mode: str, **options: object) -> tuple[Beside, Subspace, Subspace]:
    both = Beside(mode, updates=5, deviations=4, **options)  # type: ignore[arg-type]
    with Seen() as seen:
        ours = both.averaged.subspace(2)
    sums = [name for name, _ in seen.collectives if "allreduce" in name]
    assert len(sums) == 1, seen.collectives
    return both, ours, both.expected.subspace(2)


@on_ranks(2)
def test_points_are_those_of_one_process() -> None:
    for mode, dtype in (("ddp", torch.bfloat16), ("fsdp2", torch.float32), ("fsdp1", torch.float32)):
        both, ours, expected = made(mode, dtype=dtype)
        torch.testing.assert_close(ours.scales, expected.scales, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.trajectory, expected.trajectory, rtol=0, atol=1e-9)
        # Then with the same directions: these differ in their last bits, since the sums have another order.
        expected._mixture = ours._mixture
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
    for param in model.parameters():
        param.grad = None
    made = {}
    for name, param in model.named_parameters():
        made[name] = torch.arange(param.numel(), dtype=torch.float64).cos().view(param.shape).to(param.dtype)
        param.grad = made[name].clone()
    return made


@on_ranks(4)
def test_gradients_count_each_element_once() -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    for mode, options in (("ddp", {}), ("fsdp2", {}), ("hsdp", {}), ("hsdp", {"share_replicas": True}), ("tp", {})):
        both, ours, expected = made(mode, **options)
        expected._mixture = ours._mixture
        with ours.placed_into(both.sharded, T), expected.placed_into(both.reference, T):
            assert "no gradients" in outcome(lambda ours=ours, both=both: ours.gradient(both.sharded))
            wanted = set_gradients(both.reference)
            for name, param in both.inner.named_parameters():
                whole = wanted[name.removeprefix("module.").replace("_orig_mod.", "")]
                is_spread = isinstance(param, DTensor)
                param.grad = (
                    distribute_tensor(whole, param.device_mesh, param.placements) if is_spread else whole.clone()
                )
            torch.testing.assert_close(
                ours.gradient(both.sharded), expected.gradient(both.reference), rtol=1e-9, atol=1e-12
            )
        assert all(param.grad is None for param in both.inner.parameters())


@on_ranks(2)
def test_errors_are_raised_on_every_rank() -> None:
    import torch.distributed as dist

    both, ours, _ = made("ddp")
    first = dist.get_rank() == 0
    assert "rank must be at most 4" in outcome(lambda: both.averaged.subspace(5))
    assert "same call" in outcome(lambda: both.averaged.subspace(1 if first else 2))
    with pytest.raises(RuntimeError, match="same call"), ours.placed_into(both.sharded, [1.0, 2.0] if first else T):
        pass
    both.train()
    with pytest.raises(RuntimeError, match="before an update"), ours.placed_into(both.sharded, T):
        pass
    flat = Beside("fsdp1", updates=3, deviations=2)
    subspace = flat.averaged.subspace(1)
    with subspace.placed_into(flat.sharded, [1.0]):
        assert "FSDP1" in outcome(lambda: subspace.gradient(flat.sharded))
