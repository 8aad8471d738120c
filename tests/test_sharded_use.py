"""Use of sharded averages: swapped into the model and back, copied, and matched to a model that has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from swafast import ExponentialAverage
from swafast.sharded import ShardedAveragedModel, shard_side, swap
from swafast.sharded.locator import Views
from swafast.sharded.parts import all_gather
from swafast.sharded.parts.holdings import Held
from tests.ranks import on_ranks, planted, run_ranks
from tests.sharded_models import (
    FSDP2_MODES,
    TP_MODES,
    WIDTH,
    WORLDS,
    Beside,
    Net,
    drift,
    fill,
    locals_of,
    make_model,
    nested_in_fsdp1,
    require,
    wrap,
)
from tests.support import differing, require_same, swapped, tensors_of
from tests.test_sharded_modes import FORMATS, ONE_WORLD, Seen

pytestmark = pytest.mark.distributed

#: Modes in which several ranks hold the same elements of shards.
SHARED_SHARDS = ("hsdp", "fsdp1_hybrid", "tp", "fsdp2_part_tp")

Format = tuple[torch.dtype, str | None]


def data_of(dtype: torch.dtype) -> Tensor:
    return torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH).to(dtype)


def is_resharded(sharded: nn.Module, mode: str) -> bool:
    if mode in FSDP2_MODES:
        return all(isinstance(param, DTensor) for param in sharded.parameters())
    if mode in ("fsdp1", "fsdp1_hybrid"):
        return numel_of(sharded) < numel_of(make_model(mode))
    return True


def numel_of(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


# There and back


def swapped_and_copied(mode: str, cases: list[Format], options: dict[str, Any]) -> None:
    """Evaluate on the averages, then copy them."""
    # Some hundred bytes: several windows, of which the last is not full.
    all_gather.WINDOW_NBYTES = 400
    for dtype, fmt in cases:
        both = Beside(mode, dtype, updates=3, format=fmt, **options)
        reference, sharded, data = both.reference.eval(), both.sharded.eval(), data_of(dtype)
        with torch.no_grad():
            before, before_output = both.params(), sharded(data)  # leaves FSDP's root gathered
            with both.averaged.swapped_into(sharded) as model, both.expected.swapped_into(reference):
                assert model is sharded
                output, expected_output = sharded(data), reference(data)
                inside, expected = both.params(), tensors_of(reference)
                sharded(data)
            require_same(inside, expected, "inside")
            assert is_resharded(sharded, mode), "not resharded"
            require_same(both.params(), before, "after")
            assert torch.equal(sharded(data), before_output), "output after"
        both.averaged.copy_to(sharded)
        both.expected.copy_to(reference)
        require_same(both.params(), tensors_of(reference), "copied")
        near = (1e-5 if dtype == torch.float32 else 0.05) if mode in TP_MODES else 0.0
        torch.testing.assert_close(output.float(), expected_output.float(), rtol=near, atol=near)
        assert not torch.equal(output, before_output), "the averages are the params"
        both.train()
        both.require_equal()


FEW_FORMATS = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "float32")]


def check_swapped(mode: str, formats: list[Format], **options: Any) -> None:
    require(mode, forward=True)
    run_ranks(ONE_WORLD[mode], swapped_and_copied, mode, formats, options)


@pytest.mark.parametrize("mode", [mode for mode in WORLDS if mode != "fsdp2_part_tp"])
def test_a_model_takes_the_averages_and_comes_back(mode: str) -> None:
    # What a format is stored as matters where params are cut and where they are shards, not in every mode of these.
    formats = [(dtype, fmt) for dtype, fmt, _ in FORMATS]
    check_swapped(mode, {"plain": formats, "fsdp2": formats[:4], "fsdp1": FEW_FORMATS[1:]}.get(mode, formats[:1]))


@pytest.mark.parametrize("mode", SHARED_SHARDS)
def test_shared_replicas_come_back(mode: str) -> None:
    check_swapped(mode, FEW_FORMATS[1:], share_replicas=True)


def test_the_reference_backend_comes_back() -> None:
    check_swapped("ddp", FEW_FORMATS[:2], backend="reference")


def wrap_mixed(mode: str) -> nn.Module:
    """Compute in bfloat16 on float32 params, checkpoint activations, and keep what a forward pass has gathered."""
    model = make_model(mode)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    if mode == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        return model
    return nested_in_fsdp1(
        model,
        sharding_strategy=ShardingStrategy.SHARD_GRAD_OP,
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, cast_forward_inputs=True),
        use_orig_params=mode == "fsdp1_orig",
        device_id=torch.device("cpu"),
    )


@torch.no_grad()
def swapped_in_mixed_precision(mode: str) -> None:
    both, other = Beside(mode, models=(make_model(mode), wrap_mixed(mode).eval())), wrap_mixed(mode).eval()
    data = data_of(torch.float32)
    for step in range(3):
        drift(both.reference, step)
        both.fill()
        both.sharded(data)
        both.update()
    both.require_equal()
    fill(other, mode, both.expected.module)
    before, wanted = both.sharded(data), other(data)
    assert before.dtype == torch.bfloat16
    assert not torch.equal(before, wanted)
    with both.averaged.swapped_into(both.sharded):
        output = both.sharded(data)
    assert torch.equal(output, wanted)
    assert torch.equal(both.sharded(data), before)
    both.require_equal()


@pytest.mark.parametrize("mode", ["fsdp2", "fsdp1", "fsdp1_orig"])
def test_mixed_precision_and_params_that_stay_gathered(mode: str) -> None:
    require(mode, forward=True)
    run_ranks(2, swapped_in_mixed_precision, mode)


def bytes_of_replicas(mode: str) -> tuple[int, int, int]:
    """Return the bytes of the params' averages on this rank, shared and unshared, and of all of them."""
    both = Beside(mode, updates=1, share_replicas=True)
    alone = ShardedAveragedModel(both.sharded)
    buffers = sum(buffer.nbytes for name, buffer in both.sharded.named_buffers() if "scratch" not in name)
    return both.averaged.nbytes - buffers, alone.nbytes - buffers, 4 * numel_of(both.reference)


@pytest.mark.parametrize("mode", ["hsdp", "fsdp1_hybrid", "fsdp2_part_tp"])
def test_shared_replicas_hold_each_element_once(mode: str) -> None:
    require(mode, forward=False)
    shared, alone, (total, *_) = zip(*run_ranks(4, bytes_of_replicas, mode), strict=True)
    assert sum(shared) == total
    if mode not in TP_MODES:  # in which only some params have replicas
        assert sum(alone) == 2 * total
        assert all(once <= twice // 2 + 4 * 64 for once, twice in zip(shared, alone, strict=True))


@on_ranks(2)
def test_a_small_window_is_run_several_times() -> None:
    # Or the tests above would not be of windows at all.
    both, run = Beside("plain", updates=1), []
    for all_gather.WINDOW_NBYTES in (64 * 2**20, 400):
        with Seen() as seen, both.averaged.swapped_into(both.sharded):
            pass
        run.append(sum("gather" in name for name, _ in seen.ops))
    assert run[1] > run[0] + 40  # 24 windows of 200 bytes from each rank, there and back


@on_ranks(2)
def test_the_swap_is_seen_by_autograd() -> None:
    """Swap between a forward pass and its backward pass."""
    both = Beside("plain", updates=3)
    loss = both.sharded(data_of(torch.float32)).square().sum()
    with both.averaged.swapped_into(both.sharded):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Refusals


@pytest.mark.parametrize("mode", ["plain", "fsdp2", "fsdp1"])
@on_ranks(2)
def test_meanwhile_nothing_may_touch_the_averages(mode: str) -> None:
    both = Beside(mode, updates=3)
    averaged, sharded = both.averaged, both.sharded
    state, before = averaged.full_state_dict(), both.params()
    actions: dict[str, Callable[[], Any]] = {
        "update_parameters": lambda: averaged.update_parameters(sharded),
        "state_dict": averaged.state_dict,
        "full_state_dict": averaged.full_state_dict,
        "load_state_dict": lambda: averaged.load_state_dict(state),
        "copy_to": lambda: averaged.copy_to(sharded),
        "swapped_into": lambda: averaged.swapped_into(sharded).__enter__(),
    }
    with averaged.swapped_into(sharded):
        inside = both.params()
        for action, act in actions.items():
            with pytest.raises(
                RuntimeError, match=f"^{action} must wait until the averages are swapped back out of the"
            ):
                act()
        require_same(both.params(), inside, "inside")
    require_same(both.params(), before, "after")
    both.update()
    both.require_equal()


def moved_meanwhile(mode: str, on_all: bool) -> list[str]:
    """Move a param to other memory inside the body, on one rank or on all; return what differs afterwards."""
    both = Beside(mode, updates=3)
    before = both.params()
    with both.averaged.swapped_into(both.sharded):
        if on_all or dist.get_rank() == 1:
            move(both.sharded, mode)
    both.require_equal()
    return differing(both.params(), before)


def move(sharded: nn.Module, mode: str) -> None:
    if mode == "fsdp1":
        flat = sharded._handle.flat_param
        flat._local_shard = flat._local_shard.clone()
        return
    param = sharded.get_parameter("module.frozen.weight" if mode == "ddp" else "frozen.weight")
    if isinstance(param, DTensor):
        param._local_tensor = param._local_tensor.clone()
    else:
        param.data = param.data.clone()


@pytest.mark.parametrize("mode", ["plain", "ddp", "fsdp2", "fsdp1"])
def test_a_param_moved_meanwhile_comes_back(mode: str) -> None:
    assert run_ranks(2, moved_meanwhile, mode, True) == [[], []]


def test_a_param_moved_on_one_rank_spoils_no_other() -> None:
    assert run_ranks(2, moved_meanwhile, "plain", False) == [[], []]


def replaced(model: nn.Module) -> None:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def grown(model: nn.Module) -> None:
    model.add_module("more", nn.ReLU())
    replaced(model)


def copied(model: nn.Module) -> None:
    model[0] = copy.deepcopy(model[0])


@pytest.mark.parametrize("change", [replaced, grown, copied])
@on_ranks(2)
def test_params_come_back_into_whatever_the_modules_have_then(change: Callable[[nn.Module], None]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    wrapped = nn.parallel.DistributedDataParallel(model)
    averaged = ShardedAveragedModel(wrapped)
    averaged.update_parameters(wrapped)
    state = averaged.full_state_dict()
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(30.0)
    with averaged.swapped_into(wrapped):
        change(model)
    assert all(value.eq(30.0).all() for value in model.state_dict().values())
    require_same(averaged.full_state_dict(), state)


@pytest.mark.parametrize("mode", ["plain", "ddp", "fsdp2", "fsdp1"])
@on_ranks(2)
def test_what_a_body_must_not_do(mode: str) -> None:
    both = Beside(mode, updates=3)
    averaged, sharded, before = both.averaged, both.sharded, both.params()
    if mode != "fsdp2":  # its DTensors cannot be shared
        with averaged.swapped_into(sharded):
            sharded.share_memory()
        require_same(both.params(), before, "after memory has moved in its storage")
        both.require_equal()
    other = ShardedAveragedModel(sharded)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    attachment = other.attach(optimizer)
    outer, inner = averaged.swapped_into(sharded), other.swapped_into(sharded)
    outer.__enter__()
    for act in (lambda: other.update_parameters(sharded), lambda: other.copy_to(sharded), optimizer.step):
        with pytest.raises(RuntimeError, match="must wait until averages are swapped back out of the model"):
            act()
    inner.__enter__()
    with pytest.raises(RuntimeError, match="must be left in reverse order"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    attachment.detach()
    require_same(both.params(), before, "after the wrong order")
    both.require_equal()
    if mode == "fsdp2":  # other modes lose the memory order that some params must keep
        with averaged.swapped_into(sharded):
            sharded.double().float()
        require_same(both.params(), before, "after a cast")
    for write in (add_to, add_to_local, *([] if mode == "fsdp1" else [put_another])):
        told = pytest.raises(RuntimeError, match="must not be written while swapped, got writes into")
        with told, averaged.swapped_into(sharded), torch.no_grad():
            write(sharded)
        require_same(both.params(), before, f"after {write.__name__}")


def add_to(model: nn.Module) -> None:
    next(model.parameters()).add_(1.0)


def add_to_local(model: nn.Module) -> None:
    param = next(model.parameters())
    (param.to_local() if isinstance(param, DTensor) else param).add_(1.0)


def put_another(model: nn.Module) -> None:
    """Put other params in the place of all, as a load by assignment does."""
    others = {param: nn.Parameter(param.detach() + 1) for param in model.parameters()}
    for module in model.modules():
        for name, param in [*module.named_parameters(recurse=False)]:
            module.register_parameter(name, others[param])


# Buffers, a part of the params


@pytest.mark.parametrize("mode", ["plain", "fsdp2", "fsdp1"])
@on_ranks(2)
def test_each_rank_averages_its_own_buffers(mode: str) -> None:
    """Average buffers that differ from rank to rank."""
    rank = dist.get_rank()
    for use_buffers in (False, True):
        both = Beside(mode, use_buffers=use_buffers)
        for step in range(3):
            drift(both.reference, step)
            both.reference.norm.running_mean.add_(rank)
            both.reference.norm.num_batches_tracked.add_(rank)
            both.fill()
            both.update()
        both.require_exchange(use_buffers)
        before = both.params()["norm.running_mean"]
        with both.averaged.swapped_into(both.sharded):
            moved = not torch.equal(both.params()["norm.running_mean"], before)
        assert moved == use_buffers


@pytest.mark.parametrize("mode", ["plain", "ddp", "fsdp2", "fsdp1", "fsdp1_orig"])
@on_ranks(2)
def test_include_sees_whether_a_param_trains(mode: str) -> None:
    """As the docs' recipe for a LoRA: under FSDP1 too, `requires_grad` is that of the original param."""
    asked: dict[str, bool] = {}

    def trains(name: str, param: Tensor) -> bool:
        asked[name] = param.requires_grad
        return param.requires_grad

    both = Beside(mode)
    averaged = ShardedAveragedModel(both.sharded, include=trains)
    assert asked == {name: param.requires_grad for name, param in both.reference.named_parameters()}
    assert {name for name, value in asked.items() if not value} == {"frozen.weight", "frozen.bias"}
    assert not any("frozen" in name for name in averaged.full_state_dict())


@pytest.mark.parametrize("mode", ["plain", "fsdp2", "fsdp1"])
@on_ranks(2)
def test_what_include_leaves_out_is_left_alone(mode: str) -> None:
    """Average biases alone: the rest is neither stored nor exchanged, and may be anything."""
    asked: list[str] = []

    def is_bias(name: str, param: Tensor) -> bool:
        asked.append(name)
        return name.endswith("bias")

    both = Beside(mode)
    averaged = ShardedAveragedModel(both.sharded, include=is_bias, nonfinite="raise")
    full = both.averaged.full_state_dict()
    assert sorted(asked) == sorted(set(asked))
    for step in range(3):
        drift(both.reference, step)
        both.reference.long.data[-1] = float("nan")  # of no concern
        both.fill()
        both.expected.update_parameters(both.reference)
        averaged.update_parameters(both.sharded)
    whole = both.expected.state_dict()
    kept = {f"module.{name}" for name, _ in both.reference.named_parameters() if name.endswith("bias")}
    kept |= {"n_averaged", "module.mask", *(f"module.norm.{name}" for name, _ in both.reference.norm.named_buffers())}
    require_same(averaged.full_state_dict(), {key: whole[key] for key in kept}, "state")
    assert averaged.nbytes < both.averaged.nbytes
    before = both.params()
    with averaged.swapped_into(both.sharded), torch.no_grad():
        inside = both.params()
        if mode != "fsdp1":
            both.sharded.point.fill_(7.0)  # left alone, so written for good
    exchanged = {name for name in before if name.endswith("bias")}
    assert {*differing(inside, before)} == exchanged
    assert differing(both.params(), before) == ([] if mode == "fsdp1" else ["point"])
    require_same(both.averaged.full_state_dict(), full, "of another")


# The same model again, and others


@pytest.mark.parametrize("mode", ["plain", "ddp", "fsdp2", "fsdp1", "fsdp1_orig", "tp"])
@on_ranks(2)
def test_a_model_is_found_again(mode: str) -> None:
    """Average a model whose tensors are replaced, and other models of the same layout."""
    both = Beside(mode, updates=3, rule=ExponentialAverage(0.75))

    def check(after: str) -> None:
        both.train()
        both.require_equal(after)

    old = both.sharded
    both.sharded = wrap(make_model(mode), mode)
    check("another model")
    both.sharded = old
    check("the first model again")
    if mode in ("plain", "fsdp2", "tp"):
        state = {key: value.detach().clone() for key, value in both.sharded.state_dict().items()}
        if mode == "plain":  # a clone has no gaps
            state["gapped"] = torch.randn(6, 10)[:, ::2]
        both.sharded.load_state_dict(state, assign=True)
        both.sharded.tied.weight = both.sharded.encoder.weight
        check("load_state_dict(assign=True)")
    if mode in ("plain", "ddp", "fsdp2", "tp"):
        both.sharded.to(torch.bfloat16)
        if mode == "plain":  # torch closes its gaps, and what lies in memory in another way is refused
            both.sharded.gapped = nn.Parameter(both.sharded.gapped.new_empty(6, 10)[:, ::2])
        both.reference.to(torch.bfloat16)
        check("to(bfloat16)")
        both.require_exchange()


def refused(mode: str) -> dict[str, str]:
    """Change a model in several ways, and return the error of each use; nothing else may happen."""
    both = Beside(mode, updates=3)
    before = both.averaged.full_state_dict()
    told: dict[str, str] = {}
    for change, act in changes(mode).items():
        model = wrap(make_model(mode), mode)
        act(model)
        own = locals_of(model)
        for use in (
            both.averaged.update_parameters,
            both.averaged.copy_to,
            lambda model: both.averaged.swapped_into(model).__enter__(),
        ):
            with pytest.raises(ValueError, match="must have") as caught:
                use(model)
            told[f"{change}, {use.__name__}"] = str(caught.value)
            require_same(locals_of(model), own, change)
    require_same(both.averaged.full_state_dict(), before)
    both.train()
    both.require_equal()
    return told


def changes(mode: str) -> dict[str, Callable[[nn.Module], None]]:
    """Return changes of a model, by the words that the error must have."""
    world = dist.get_world_size()
    meshes = {name: init_device_mesh("cpu", (world,), mesh_dim_names=(name,)) for name in ("tp", "other")}

    def put(value: Tensor, name: str = "table") -> Callable[[nn.Module], None]:
        path, _, leaf = name.rpartition(".")
        return lambda model: setattr(model.get_submodule(path), leaf, nn.Parameter(value))

    def table_as(*placements: Any, mesh: str = "tp", shape: tuple[int, ...] = (7, 3)) -> Callable[[nn.Module], None]:
        return put(distribute_tensor(torch.ones(shape), meshes[mesh], placements))

    def retype(model: nn.Module) -> None:
        model.long = nn.Parameter(model.long.detach().int(), requires_grad=False)

    found: dict[str, Callable[[nn.Module], None]] = {
        "missing 'table'": lambda model: delattr(model, "table"),
        "unexpected 'table2'": put(torch.ones(2), "table2"),
    }
    if mode == "plain":
        return found | {
            "unexpected 'tied.weight'": put(torch.ones(WIDTH, WIDTH), "tied.weight"),
            "'table' must have the whole shape": put(torch.ones(3, 7)),
            "'conv.weight' must have the layout in memory": put(torch.ones(3, 2, 3, 2), "conv.weight"),
            "'table' must have the placement": table_as(Shard(0)),
        }
    return found | {
        "'long' must have a dtype like the average's torch.float32": retype,
        "'table' must have the placement ": table_as(Replicate()),
        "'table' must have the placement": table_as(Shard(1)),
        "'table' must have the  placement": table_as(Shard(0), mesh="other"),
        "'table' must have the   placement": put(torch.ones(7, 3)),
        "'table' must have the whole shape": table_as(Shard(0), shape=(8, 3)),
    }


@pytest.mark.parametrize("mode", ["plain", "tp"])
def test_a_model_spread_in_another_way_changes_nothing(mode: str) -> None:
    for told in run_ranks(2, refused, mode):
        for what, error in told.items():
            change = what.rpartition(", ")[0]
            assert " ".join(change.split()) in error, (what, error)


@pytest.mark.parametrize("mode", ["plain", "fsdp2"])
@on_ranks(4)
def test_groups_of_ranks_average_models_of_their_own(mode: str) -> None:
    """Average one model over ranks 0 and 2, and another over 1 and 3."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("inside", "side"))["inside"]
    side = dist.get_rank() % 2
    models = make_model(mode), make_model(mode)
    if mode == "fsdp2":
        fully_shard(models[1], mesh=mesh)
    both = Beside(mode, models=models, process_group=mesh.get_group()).train(100 * side, 100 * side + 1)
    both.require_exchange()
    first = both.averaged.full_state_dict(rank0_only=True, cpu_offload=True)
    require_same(first, both.expected.state_dict() if dist.get_rank() in (0, 1) else {}, "rank0_only")
    both.require_equal()


@on_ranks(2)
def test_local_tensors_of_any_layout() -> None:
    """Average DTensors whose local tensors are transposed, or have gaps, and a complex param beside them."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    full = torch.arange(64.0).view(8, 8)
    rows = full.chunk(world)[rank]
    for share_replicas in (False, True):
        gapped = torch.zeros(len(rows), 16)[:, ::2].copy_(rows)
        reference = nn.ParameterDict({name: full.clone() for name in ("gapped", "transposed", "replicated", "columns")})
        reference["complex"] = torch.full((5, 3), 1 + 2j)
        sharded = nn.ParameterDict(
            {
                "gapped": DTensor.from_local(gapped, mesh, [Shard(0)]),
                "transposed": DTensor.from_local(rows.t().contiguous().t(), mesh, [Shard(0)]),
                "replicated": DTensor.from_local(full.t().contiguous().t(), mesh, [Replicate()]),
                "columns": distribute_tensor(full, mesh, [Shard(1)]),
                "complex": reference["complex"].detach().clone(),
            }
        )
        both = Beside("any", models=(reference, sharded), share_replicas=share_replicas, updates=3)
        before = both.params()
        require_same(before, tensors_of(reference))
        # Under inference mode torch 2.6 gathers no DTensor.
        pairs = (both.averaged, sharded), (both.expected, reference)
        with torch.inference_mode(), swapped(*pairs), torch.inference_mode(False):
            inside, expected = both.params(), tensors_of(reference)
        require_same(inside, expected, "inside")
        require_same(both.params(), before, "after")
        both.require_equal()


@on_ranks(2)
def test_dtypes_side_by_side_and_other_wrappers() -> None:
    """Average models of several dtypes, compiled ones, and ones of which FSDP1 leaves some modules alone."""

    def of_several_dtypes(mode: str) -> Net:
        model = make_model(mode)
        model.blocks.to(torch.bfloat16)
        model.frozen.to(torch.float16)
        return model

    ignoring = make_model("fsdp1")
    ignored = [ignoring.frozen, ignoring.blocks[0]]
    cpu = torch.device("cpu")
    kinds: dict[str, tuple[str, nn.Module, Any]] = {
        "dtypes, cut": ("ddp", of_several_dtypes("ddp"), wrap(of_several_dtypes("ddp"), "ddp")),
        "dtypes, FSDP1": ("fsdp1", of_several_dtypes("fsdp1"), wrap(of_several_dtypes("fsdp1"), "fsdp1")),
        "compiled": ("fsdp2", make_model("fsdp2"), torch.compile(wrap(make_model("fsdp2"), "fsdp2"))),
        "ignored": (
            "fsdp1",
            make_model("fsdp1"),
            FullyShardedDataParallel(ignoring, ignored_modules=ignored, use_orig_params=True, device_id=cpu),
        ),
    }
    all_gather.WINDOW_NBYTES = 400
    for kind, (mode, reference, sharded) in kinds.items():
        both = Beside(mode, models=(reference, sharded), updates=2)
        both.require_exchange(kind)
        both.require_equal(kind)


# Each gate kills a bug


def leave_the_root_gathered() -> None:
    swap.reshard = lambda model: None


def gather_nothing() -> None:
    all_gather.AllGather.fill = lambda self, held: None  # type: ignore[method-assign]


def drop_the_last_window() -> None:
    windows = all_gather.pieces_of

    def dropped(*args: Any) -> Any:
        yield from list(windows(*args))[:-1]

    all_gather.pieces_of = dropped


def take_any_place() -> None:
    shard_side.require_same_sharding = lambda before, now: None


def send_what_the_body_left() -> None:
    held = Views.held

    def not_detached(self: Views) -> dict[str, Held]:
        bases = {base.data_ptr(): base for base in self.bases}
        return {
            name: replace(found, local=bases.get(found.local.data_ptr(), found.local))
            for name, found in held(self).items()
        }

    Views.held = not_detached  # type: ignore[method-assign]


#: The bug, the check that must fail, and how.
GATES: list[tuple[Callable[[], None], Callable[[], None], str]] = [
    (
        leave_the_root_gathered,
        partial(check_swapped, "fsdp2", FEW_FORMATS[:1]),
        "inside|after|not resharded|got another of 'long'",
    ),
    (
        leave_the_root_gathered,
        partial(check_swapped, "fsdp1", FEW_FORMATS[:1]),
        "inside|after|not resharded|got another of 'long'",
    ),
    (gather_nothing, partial(check_swapped, "ddp", FEW_FORMATS[:1]), "inside: "),
    (drop_the_last_window, partial(check_swapped, "plain", FEW_FORMATS[:1]), "inside: "),
    (take_any_place, partial(test_a_model_spread_in_another_way_changes_nothing, "tp"), "DID NOT RAISE"),
    (send_what_the_body_left, test_a_param_moved_on_one_rank_spoils_no_other, "frozen.weight"),
]


@pytest.mark.parametrize(("plant", "gate", "message"), GATES, ids=[plant.__name__ for plant, *_ in GATES])
def test_the_gate_kills_the_bug(plant: Callable[[], None], gate: Callable[[], None], message: str) -> None:
    with planted(plant), pytest.raises(AssertionError, match=message):  # of the checks, or of a rank
        gate()
