"""Use of averages over ranks: swapped into the model and back, copied, and found again in a model that has changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
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

from swafast import ExponentialAverage, FusedAveragedModel, Rule
from swafast.op.exchange import Exchange
from swafast.sharded import ShardedAveragedModel, shard_matching, swap
from swafast.sharded.parts import spread
from swafast.sharded.parts.holdings import Held
from swafast.sharded.shard_matching import Views
from tests.ranks import run_ranks
from tests.sharded_models import (
    FSDP2_MODES,
    TP_MODES,
    WIDTH,
    WORLDS,
    Net,
    differing_bits,
    drift,
    fill,
    gather,
    make_model,
    plain_name,
    require,
    wrap,
)
from tests.test_sharded_modes import FORMATS, ONE_WORLD, Seen

pytestmark = pytest.mark.distributed

#: Modes in which several ranks hold the same elements of shards.
SHARED_SHARDS = ("hsdp", "fsdp1_hybrid", "tp", "fsdp2_part_tp")


class Averaging:
    """A sharded model and its average beside an unsharded one and its own, updated a few times."""

    def __init__(self, mode: str, dtype: torch.dtype = torch.float32, updates: int = 3, **options: Any) -> None:
        self.mode = mode
        self.reference, self.sharded = make_model(mode, dtype), wrap(make_model(mode, dtype), mode)
        own = {key: options.pop(key) for key in ("share_replicas", "process_group") if key in options}
        self.expected = FusedAveragedModel(self.reference, **options)
        self.averaged = ShardedAveragedModel(self.sharded, **options, **own)
        self.updates = 0
        for _ in range(updates):
            self.update()

    def update(self) -> None:
        drift(self.reference, self.updates)
        fill(self.sharded, self.mode, self.reference)
        self.expected.update_parameters(self.reference)
        self.averaged.update_parameters(self.sharded)
        self.updates += 1

    def params(self) -> dict[str, Tensor]:
        """Give the sharded model's whole params and its buffers. Collective."""
        return gather(self.sharded, self.mode)

    def differing(self) -> list[str]:
        """Give the keys under which the two averages differ in a bit. Collective."""
        return differing_bits(self.averaged.full_state_dict(), self.expected.state_dict())


def named(reference: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone() for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]
    }


def data_of(dtype: torch.dtype) -> Tensor:
    return torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH).to(dtype)


def is_resharded(sharded: nn.Module, mode: str) -> bool:
    if mode in FSDP2_MODES:
        return all(isinstance(param, DTensor) for param in sharded.parameters())
    if mode in ("fsdp1", "fsdp1_hybrid"):
        numel = sum(param.numel() for param in sharded.parameters())
        return numel < make_numel(mode)
    return True


def make_numel(mode: str) -> int:
    return sum(param.numel() for param in make_model(mode).parameters())


# There and back


def swapped_and_copied(
    mode: str, cases: list[tuple[torch.dtype, str | None]], options: dict[str, Any]
) -> list[list[str]]:
    """Evaluate on the averages, then copy them, and say for each case what was not as it should be."""
    # Some hundred bytes: several windows, of which the last is not full.
    spread.WINDOW_NBYTES = 400
    told = []
    for dtype, fmt in cases:
        both = Averaging(mode, dtype, format=fmt, **options)
        reference, sharded, data = both.reference.eval(), both.sharded.eval(), data_of(dtype)
        wrong = []
        with torch.no_grad():
            before_params = both.params()
            before_output = sharded(data)  # leaves FSDP's root gathered
            with both.averaged.swapped_into(sharded) as model, both.expected.swapped_into(reference):
                wrong += [] if model is sharded else ["another model"]
                output, expected_output = sharded(data), reference(data)
                inside = both.params()
                sharded(data)
                wrong += [f"inside: {name}" for name in differing_bits(inside, named(reference))]
            wrong += [] if is_resharded(sharded, mode) else ["not resharded"]
            wrong += [f"after: {name}" for name in differing_bits(both.params(), before_params)]
            after_output = sharded(data)  # and again
        both.averaged.copy_to(sharded)
        both.expected.copy_to(reference)
        wrong += [f"copied: {name}" for name in differing_bits(both.params(), named(reference))]
        if mode in TP_MODES:
            near = 1e-5 if dtype == torch.float32 else 0.05
            close = torch.allclose(output.float(), expected_output.float(), rtol=near, atol=near)
            wrong += [] if close else ["output"]
        else:
            wrong += [] if torch.equal(output, expected_output) else ["output"]
        wrong += [] if torch.equal(after_output, before_output) else ["output after"]
        wrong += [] if not torch.equal(output, before_output) else ["output moved nowhere"]
        both.update()
        told.append(wrong + both.differing())
    return told


FEW_FORMATS = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "float32")]


def check_swapped(
    mode: str, formats: list[tuple[torch.dtype, str | None]], plant: str | None = None, **options: Any
) -> None:
    require(mode, forward=True)
    world = ONE_WORLD[mode]
    assert run_ranks(world, planted, plant, swapped_and_copied, mode, formats, options) == [[[]] * len(formats)] * world


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
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    options: dict[str, Any] = {
        "sharding_strategy": ShardingStrategy.SHARD_GRAD_OP,
        "mixed_precision": MixedPrecision(param_dtype=torch.bfloat16, cast_forward_inputs=True),
        "use_orig_params": mode == "fsdp1_orig",
        "device_id": torch.device("cpu"),
    }
    for index, block in enumerate(model.blocks):
        model.blocks[index] = FullyShardedDataParallel(block, **options)
    model.frozen = FullyShardedDataParallel(model.frozen, **options)
    return FullyShardedDataParallel(model, **options)


def swapped_in_mixed_precision(mode: str) -> list[str]:
    reference, sharded, other = make_model(mode), wrap_mixed(mode).eval(), wrap_mixed(mode).eval()
    expected, averaged = FusedAveragedModel(reference), ShardedAveragedModel(sharded)
    told, data = [], data_of(torch.float32)
    for step in range(3):
        drift(reference, step)
        fill(sharded, mode, reference)
        with torch.no_grad():
            before = sharded(data)
        expected.update_parameters(reference)
        averaged.update_parameters(sharded)
    told += differing_bits(averaged.full_state_dict(), expected.state_dict())
    fill(other, mode, expected.module)
    with torch.no_grad():
        before, wanted = sharded(data), other(data)
        with averaged.swapped_into(sharded):
            told += [] if torch.equal(sharded(data), wanted) else ["output"]
        told += [] if torch.equal(sharded(data), before) else ["output after"]
    told += [] if before.dtype == torch.bfloat16 and not torch.equal(before, wanted) else ["nothing shown"]
    return told + differing_bits(averaged.full_state_dict(), expected.state_dict())


@pytest.mark.parametrize("mode", ["fsdp2", "fsdp1", "fsdp1_orig"])
def test_mixed_precision_and_params_that_stay_gathered(mode: str) -> None:
    require(mode, forward=True)
    assert run_ranks(2, swapped_in_mixed_precision, mode) == [[]] * 2


def bytes_of_replicas(mode: str) -> dict[str, Any]:
    both = Averaging(mode, updates=1, share_replicas=True)
    alone = ShardedAveragedModel(both.sharded)
    buffers = sum(buffer.nbytes for name, buffer in both.sharded.named_buffers() if "scratch" not in name)
    total = 4 * sum(param.numel() for param in both.reference.parameters())
    return {"nbytes": both.averaged.nbytes - buffers, "alone": alone.nbytes - buffers, "total": total}


@pytest.mark.parametrize("mode", ["fsdp1_hybrid", "fsdp2_part_tp"])
def test_shared_replicas_hold_each_element_once(mode: str) -> None:
    require(mode, forward=False)
    told = run_ranks(4, bytes_of_replicas, mode)
    assert sum(rank["nbytes"] for rank in told) == told[0]["total"]
    if mode not in TP_MODES:  # in which only some params have replicas
        assert sum(rank["alone"] for rank in told) == 2 * told[0]["total"]
        assert all(rank["nbytes"] <= rank["alone"] // 2 + 4 * 64 for rank in told)


def windows_run(mode: str, windows_nbytes: list[int]) -> list[int]:
    both = Averaging(mode, updates=1)
    told = []
    for spread.WINDOW_NBYTES in windows_nbytes:
        with Seen() as seen, both.averaged.swapped_into(both.sharded):
            pass
        told.append(sum("gather" in name for name, _ in seen.ops))
    return told


def test_a_small_window_is_run_several_times() -> None:
    # Or the tests above would not be of windows at all.
    for few, many in run_ranks(2, windows_run, "plain", [64 * 2**20, 400]):
        assert many > few + 40  # 24 windows of 200 bytes from each rank, there and back


def saved_for_backward(mode: str) -> list[str]:
    """Swap between a forward pass and its backward pass."""
    both = Averaging(mode)
    loss = both.sharded(data_of(torch.float32)).square().sum()
    with both.averaged.swapped_into(both.sharded):
        pass
    try:
        loss.backward()
    except RuntimeError as error:
        return [] if "modified by an inplace operation" in str(error) else [str(error)]
    return ["a gradient of params that were written"]


def test_the_swap_is_seen_by_autograd() -> None:
    assert run_ranks(2, saved_for_backward, "plain") == [[]] * 2


# Exceptions and refusals


def swapped_and_failed(mode: str, options: dict[str, Any]) -> list[str]:
    """Let the body fail on one rank, and then on all."""
    both = Averaging(mode, **options)
    before = both.params()
    told = []
    for failing in (lambda: dist.get_rank() == 1, lambda: True):
        raised = False
        try:
            with both.averaged.swapped_into(both.sharded):
                if failing():
                    raise KeyError("evaluation failed")
        except KeyError:
            raised = True
        told += [] if raised == failing() else ["raised elsewhere"]
        told += [f"after: {name}" for name in differing_bits(both.params(), before)]
    both.update()
    return told + both.differing()


def check_exceptions(mode: str, plant: str | None = None, **options: Any) -> None:
    world = 4 if mode == "hsdp" else 2
    assert run_ranks(world, planted, plant, swapped_and_failed, mode, options) == [[]] * world


@pytest.mark.parametrize("mode", ["plain", "ddp", "fsdp2", "fsdp1", "tp"])
def test_comes_back_after_an_exception_on_one_rank(mode: str) -> None:
    check_exceptions(mode)


def test_comes_back_after_an_exception_with_shared_replicas() -> None:
    check_exceptions("hsdp", share_replicas=True, format="float32")


def refused_meanwhile(mode: str) -> list[str]:
    both = Averaging(mode)
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
    told = []
    with averaged.swapped_into(sharded):
        inside = both.params()
        for action, act in actions.items():
            try:
                act()
                told.append(f"{action} went through")
            except RuntimeError as error:
                wanted = f"{action} must wait until the averages are swapped back out of the model"
                told += [] if str(error) == wanted else [f"{action}: {error}"]
        told += [f"inside: {name}" for name in differing_bits(both.params(), inside)]
    told += [f"after: {name}" for name in differing_bits(both.params(), before)]
    actions["update_parameters"]()
    both.expected.update_parameters(both.reference)
    return told + both.differing()


@pytest.mark.parametrize("mode", ["plain", "fsdp2", "fsdp1"])
def test_meanwhile_nothing_may_touch_the_averages(mode: str) -> None:
    assert run_ranks(2, refused_meanwhile, mode) == [[]] * 2


def moved_meanwhile(mode: str, on_all: bool) -> dict[str, Any]:
    """Give a param other memory inside the body, on one rank or on all."""
    both = Averaging(mode)
    before = both.params()
    told: dict[str, Any] = {"error": None}
    try:
        with both.averaged.swapped_into(both.sharded):
            if on_all or dist.get_rank() == 1:
                move(both.sharded, mode)
    except RuntimeError as error:
        told["error"] = str(error)
    told["differing"] = both.differing()
    told["params"] = differing_bits(both.params(), before)
    return told


def move(sharded: nn.Module, mode: str) -> None:
    if mode == "fsdp1":
        flat = sharded._handle.flat_param
        flat._local_shard = flat._local_shard.clone()
        return
    name = "module.frozen.weight" if mode == "ddp" else "frozen.weight"
    param = sharded.get_parameter(name)
    if isinstance(param, DTensor):
        param._local_tensor = param._local_tensor.clone()
    else:
        param.data = param.data.clone()


@pytest.mark.parametrize("mode", ["plain", "ddp", "fsdp2", "fsdp1"])
def test_a_param_moved_meanwhile_is_named(mode: str) -> None:
    for told in run_ranks(2, moved_meanwhile, mode, True):
        assert told["error"] is not None
        assert told["error"].startswith("model must keep its tensors while swapped, got '")
        assert "on other memory" in told["error"]
        assert mode == "fsdp1" or "'frozen.weight'" in told["error"]
        assert told["differing"] == []  # the averages are whole


def check_moved_on_one_rank(plant: str | None = None) -> None:
    first, second = run_ranks(2, planted, plant, moved_meanwhile, "plain", False)
    assert first["error"] is None
    assert first["params"] == []
    assert second["error"] is not None
    assert "'frozen.weight'" in second["error"]
    assert second["params"] == ["frozen.weight"]
    assert first["differing"] == second["differing"] == []


def test_a_param_moved_on_one_rank_spoils_no_other() -> None:
    check_moved_on_one_rank()


# Buffers, a part of the params


def buffers_averaged(mode: str, use_buffers: bool) -> list[str]:
    """Average buffers that differ from rank to rank: each has its own, and a state has the first one's."""
    both = Averaging(mode, updates=0, use_buffers=use_buffers)
    first = FusedAveragedModel(both.reference, use_buffers=use_buffers)
    rank = dist.get_rank()
    for step in range(3):
        drift(both.reference, step)
        fill(both.sharded, mode, both.reference)
        first.update_parameters(both.reference)
        mean = both.reference.norm.running_mean.clone()
        both.reference.norm.running_mean.add_(rank)
        both.reference.norm.num_batches_tracked.add_(rank)
        for name, buffer in both.sharded.named_buffers():
            buffer.copy_(both.reference.get_buffer(plain_name(name)))
        both.expected.update_parameters(both.reference)
        both.averaged.update_parameters(both.sharded)
        last, both.reference.norm.running_mean = both.reference.norm.running_mean, mean
    both.reference.norm.running_mean = last
    told = [f"state: {key}" for key in differing_bits(both.averaged.full_state_dict(), first.state_dict())]
    before = both.params()
    with both.averaged.swapped_into(both.sharded), both.expected.swapped_into(both.reference):
        told += [f"inside: {name}" for name in differing_bits(both.params(), named(both.reference))]
        moved = not torch.equal(both.params()["norm.running_mean"], before["norm.running_mean"])
    told += [] if moved == use_buffers else ["running_mean"]
    return told + [f"after: {name}" for name in differing_bits(both.params(), before)]


def buffers_copied_and_averaged(mode: str) -> list[str]:
    return buffers_averaged(mode, False) + buffers_averaged(mode, True)


@pytest.mark.parametrize("mode", ["plain", "fsdp2", "fsdp1"])
def test_each_rank_averages_its_own_buffers(mode: str) -> None:
    assert run_ranks(2, buffers_copied_and_averaged, mode) == [[]] * 2


def included(mode: str) -> list[str]:
    """Average biases alone: the rest is neither stored nor exchanged, and may hold what it likes."""
    asked: list[str] = []

    def is_bias(name: str, param: Tensor) -> bool:
        asked.append(name)
        return name.endswith("bias")

    both = Averaging(mode, updates=0)
    averaged = ShardedAveragedModel(both.sharded, include=is_bias, nonfinite="raise")
    full = both.averaged.full_state_dict()
    told = [] if sorted(asked) == sorted(set(asked)) else ["asked twice"]
    for step in range(3):
        drift(both.reference, step)
        both.reference.long.data[-1] = float("nan")  # of no concern
        fill(both.sharded, mode, both.reference)
        both.expected.update_parameters(both.reference)
        averaged.update_parameters(both.sharded)
    state, whole = averaged.full_state_dict(), both.expected.state_dict()
    biases = {f"module.{name}" for name, _ in both.reference.named_parameters() if name.endswith("bias")}
    kept = {key: value for key, value in whole.items() if key in biases or key.startswith(("n_", "module.norm.r"))}
    kept |= {key: whole[key] for key in ("module.norm.num_batches_tracked", "module.mask")}
    told += [f"state: {key}" for key in differing_bits(state, kept)]
    told += [] if averaged.nbytes < both.averaged.nbytes else ["bytes"]
    before = both.params()
    with averaged.swapped_into(both.sharded), torch.no_grad():
        inside = both.params()
        if mode != "fsdp1":
            both.sharded.point.fill_(7.0)  # left alone, so written for good
    changed = {name for name in before if name not in differing_bits({name: before[name]}, {name: inside[name]})}
    told += [f"exchanged: {name}" for name in before if not name.endswith("bias") and name not in changed]
    told += [f"left: {name}" for name in before if name.endswith("bias") and name in changed]
    wrong = differing_bits(both.params(), before)
    told += [] if wrong == ([] if mode == "fsdp1" else ["point"]) else [f"after: {wrong}"]
    return told + [f"of another: {key}" for key in differing_bits(both.averaged.full_state_dict(), full)]


@pytest.mark.parametrize("mode", ["plain", "fsdp2", "fsdp1"])
def test_what_include_leaves_out_is_left_alone(mode: str) -> None:
    assert run_ranks(2, included, mode) == [[]] * 2


# The same model again, and others


def rebound(mode: str) -> list[str]:
    """Average a model whose tensors are replaced, and other models of the same layout."""
    both = Averaging(mode, rule=ExponentialAverage(0.75))
    told = []

    def check(after: str) -> None:
        both.update()
        told.extend(f"{after}: {key}" for key in both.differing())

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
        before = both.params()
        with both.averaged.swapped_into(both.sharded), both.expected.swapped_into(both.reference):
            told += [f"inside: {name}" for name in differing_bits(both.params(), named(both.reference))]
        told += [f"after: {name}" for name in differing_bits(both.params(), before)]
    return told


@pytest.mark.parametrize("mode", ["plain", "ddp", "fsdp2", "fsdp1", "fsdp1_orig", "tp"])
def test_a_model_is_found_again(mode: str) -> None:
    assert run_ranks(2, rebound, mode) == [[]] * 2


def refused(mode: str) -> dict[str, Any]:
    """Change a model in one way after the other, and give what an update says to each; nothing else may happen."""
    both = Averaging(mode)
    before = both.averaged.full_state_dict()["module.long"]
    told: dict[str, Any] = {}
    for change, act in changes(mode).items():
        model = wrap(make_model(mode), mode)
        act(model)
        for action in ("update_parameters", "swapped_into", "copy_to"):
            locals_before = own_values(model)
            try:
                if action == "swapped_into":
                    with both.averaged.swapped_into(model):
                        pass
                else:
                    getattr(both.averaged, action)(model)
                told[f"{change}, {action}"] = None
            except ValueError as error:
                told[f"{change}, {action}"] = str(error)
            if own_values(model) != locals_before:
                told[f"{change}, {action}"] = "the model was written"
    both.update()
    told["differing"] = both.differing()
    told["moved"] = not torch.equal(both.averaged.full_state_dict()["module.long"], before)
    return told


def own_values(model: nn.Module) -> list[tuple[str, list[float]]]:
    """Give the values of this rank's tensors."""
    locals_ = [
        (name, param.to_local() if isinstance(param, DTensor) else param) for name, param in model.named_parameters()
    ]
    return [(name, local.detach().flatten().tolist()) for name, local in locals_]


def changes(mode: str) -> dict[str, Callable[[nn.Module], None]]:
    """Give what is done to a model, by what the error is to say of it."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)) if mode == "tp" else None

    def table_as(*placements: Any, mesh: Any = mesh, shape: tuple[int, ...] = (7, 3)) -> Callable[[nn.Module], None]:
        def act(model: nn.Module) -> None:
            assert mesh is not None
            model.table = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, placements))

        return act

    def remove(model: nn.Module) -> None:
        del model._parameters["table"]

    def add(model: nn.Module) -> None:
        model.register_parameter("table2", nn.Parameter(torch.ones(2)))

    def untie(model: nn.Module) -> None:
        model.tied.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))

    def replace(model: nn.Module) -> None:
        model.table = nn.Parameter(torch.ones(7, 3))

    def reshape(model: nn.Module) -> None:
        model.table = nn.Parameter(torch.ones(3, 7))

    def reorder(model: nn.Module) -> None:
        model.conv.weight = nn.Parameter(torch.ones(3, 2, 3, 2))

    if mode == "plain":
        plain_mesh = init_device_mesh("cpu", (world,))
        return {
            "missing 'table'": remove,
            "unexpected 'table2'": add,
            "unexpected 'tied.weight'": untie,
            "'table' must have the whole shape": reshape,
            "'conv.weight' must have the layout in memory": reorder,
            "'table' must have the placement": table_as(Shard(0), mesh=plain_mesh),
        }
    other = init_device_mesh("cpu", (world,), mesh_dim_names=("other",))
    return {
        "missing 'table'": remove,
        "unexpected 'table2'": add,
        "'table' must have the placement ": table_as(Replicate()),
        "'table' must have the placement": table_as(Shard(1)),
        "'table' must have the  placement": table_as(Shard(0), mesh=other),
        "'table' must have the   placement": replace,
        "'table' must have the whole shape": table_as(Shard(0), shape=(8, 3)),
    }


def check_refused(mode: str, plant: str | None = None) -> None:
    for told in run_ranks(2, planted, plant, refused, mode):
        assert told.pop("differing") == []
        assert told.pop("moved")
        for what, error in told.items():
            change = what.rpartition(", ")[0]
            assert error is not None, what
            assert " ".join(change.split()) in error, (what, error)


@pytest.mark.parametrize("mode", ["plain", "tp"])
def test_a_model_spread_in_another_way_changes_nothing(mode: str) -> None:
    check_refused(mode)


def averaged_in_groups(mode: str) -> list[str]:
    """Average one model over ranks 0 and 2, and another over 1 and 3."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("inside", "side"))["inside"]
    side = dist.get_rank() % 2
    reference, sharded = make_model(mode), make_model(mode)
    if mode == "fsdp2":
        fully_shard(sharded, mesh=mesh)
    expected = FusedAveragedModel(reference)
    averaged = ShardedAveragedModel(sharded, process_group=mesh.get_group())
    for step in range(2):
        drift(reference, 100 * side + step)
        fill(sharded, mode, reference)
        expected.update_parameters(reference)
        averaged.update_parameters(sharded)
    before = gather(sharded, mode)
    with averaged.swapped_into(sharded), expected.swapped_into(reference):
        told = [f"inside: {name}" for name in differing_bits(gather(sharded, mode), named(reference))]
    told += [f"after: {name}" for name in differing_bits(gather(sharded, mode), before)]
    first = averaged.full_state_dict(rank0_only=True, cpu_offload=True)
    told += [] if bool(first) == (dist.get_rank() in (0, 1)) else ["rank0_only"]
    told += differing_bits(first, expected.state_dict()) if first else []
    return told + differing_bits(averaged.full_state_dict(), expected.state_dict())


@pytest.mark.parametrize("mode", ["plain", "fsdp2"])
def test_groups_of_ranks_average_models_of_their_own(mode: str) -> None:
    assert run_ranks(4, averaged_in_groups, mode) == [[]] * 4


class Third(Rule):
    """A rule of Python alone."""

    def weight(self, num_averaged: int) -> float:
        return 1.0 if num_averaged == 0 else 1 / 3


def averaged_in_any_layout(share_replicas: bool) -> list[str]:
    """Average DTensors whose local tensors are transposed, or have gaps, and a complex param beside them."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    full = torch.arange(64.0).view(8, 8)
    rows = full.chunk(world)[rank]
    gapped = torch.empty(len(rows), 16)[:, ::2].copy_(rows)
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
    expected = FusedAveragedModel(reference, rule=Third())
    averaged = ShardedAveragedModel(sharded, rule=Third(), share_replicas=share_replicas)
    for step in range(3):
        drift(reference, step)
        fill(sharded, "any", reference)
        expected.update_parameters(reference)
        averaged.update_parameters(sharded)
    before = gather(sharded, "any")
    told = differing_bits(before, named(reference))
    with torch.inference_mode():
        inside = averaged.swapped_into(sharded), expected.swapped_into(reference)
        with inside[0], inside[1], torch.inference_mode(False):  # under it torch 2.6 gathers no DTensor
            told += [f"inside: {name}" for name in differing_bits(gather(sharded, "any"), named(reference))]
    told += [f"after: {name}" for name in differing_bits(gather(sharded, "any"), before)]
    return told + differing_bits(averaged.full_state_dict(), expected.state_dict())


def test_local_tensors_of_any_layout() -> None:
    for share_replicas in (False, True):
        assert run_ranks(2, averaged_in_any_layout, share_replicas) == [[]] * 2


def averaged_otherwise() -> list[str]:
    """Average models of several dtypes, compiled ones, and ones of which FSDP1 leaves some modules alone."""

    def of_several_dtypes(mode: str) -> Net:
        model = make_model(mode)
        model.blocks.to(torch.bfloat16)
        model.frozen.to(torch.float16)
        return model

    ignoring = make_model("fsdp1")
    ignored = [ignoring.frozen, ignoring.blocks[0]]
    cpu = torch.device("cpu")
    kinds = {
        "dtypes, cut": ("ddp", of_several_dtypes("ddp"), wrap(of_several_dtypes("ddp"), "ddp")),
        "dtypes, FSDP1": ("fsdp1", of_several_dtypes("fsdp1"), wrap(of_several_dtypes("fsdp1"), "fsdp1")),
        "compiled": ("fsdp2", make_model("fsdp2"), wrap(make_model("fsdp2"), "fsdp2")),
        "ignored": (
            "fsdp1",
            make_model("fsdp1"),
            FullyShardedDataParallel(ignoring, ignored_modules=ignored, use_orig_params=True, device_id=cpu),
        ),
    }
    spread.WINDOW_NBYTES = 400
    told = []
    for kind, (mode, reference, sharded) in kinds.items():
        given = torch.compile(sharded) if kind == "compiled" else sharded
        expected, averaged = FusedAveragedModel(reference), ShardedAveragedModel(given)
        for step in range(2):
            drift(reference, step)
            fill(sharded, mode, reference)
            expected.update_parameters(reference)
            averaged.update_parameters(given)
        before = gather(sharded, mode)
        with averaged.swapped_into(given), expected.swapped_into(reference):
            wrong = [f"inside: {name}" for name in differing_bits(gather(sharded, mode), named(reference))]
        wrong += [f"after: {name}" for name in differing_bits(gather(sharded, mode), before)]
        wrong += differing_bits(averaged.full_state_dict(), expected.state_dict())
        told += [f"{kind}: {what}" for what in wrong]
    return told


def test_dtypes_side_by_side_and_other_wrappers() -> None:
    assert run_ranks(2, averaged_otherwise) == [[]] * 2


def copies_refused() -> list[str]:
    averaged = Averaging("plain", updates=0).averaged
    told = []
    for act in (copy.copy, copy.deepcopy, pickle.dumps):
        try:
            act(averaged)
            told.append(f"{act.__name__} went through")
        except TypeError as error:
            told += [] if "cannot be copied or pickled" in str(error) else [str(error)]
    return told


def test_copies_and_pickles_are_refused() -> None:
    assert run_ranks(1, copies_refused) == [[]]


# Each gate kills a bug


def planted(plant: str | None, function: Callable[..., Any], *args: Any) -> Any:
    """Run a rank's function with a bug planted in this process, which ends with it."""
    if plant is not None:
        PLANTS[plant]()
    return function(*args)


def leave_the_root_gathered() -> None:
    swap.reshard = lambda model: None


def spread_nothing() -> None:
    spread.Spread.fill = lambda self, held: None  # type: ignore[method-assign]


def drop_the_last_window() -> None:
    windows = spread.pieces_of

    def dropped(*args: Any) -> Any:
        yield from list(windows(*args))[:-1]

    spread.pieces_of = dropped


def never_go_back() -> None:
    Exchange.back = lambda self: None  # type: ignore[method-assign]


def take_any_place() -> None:
    shard_matching.require_same_sharding = lambda before, now: None


def send_what_the_body_left() -> None:
    held = Views.held

    def not_detached(self: Views) -> dict[str, Held]:
        bases = {base.data_ptr(): base for base in self.bases}
        return {
            name: replace(found, local=bases.get(found.local.data_ptr(), found.local))
            for name, found in held(self).items()
        }

    Views.held = not_detached  # type: ignore[method-assign]


PLANTS: dict[str, Callable[[], None]] = {
    plant.__name__: plant
    for plant in (
        *(leave_the_root_gathered, spread_nothing, drop_the_last_window, never_go_back, take_any_place),
        send_what_the_body_left,
    )
}

GATES: list[tuple[Callable[[], None], Callable[[str | None], None]]] = [
    (leave_the_root_gathered, lambda plant: check_swapped("fsdp2", FEW_FORMATS[:1], plant)),
    (leave_the_root_gathered, lambda plant: check_swapped("fsdp1", FEW_FORMATS[:1], plant)),
    (spread_nothing, lambda plant: check_swapped("ddp", FEW_FORMATS[:1], plant)),
    (drop_the_last_window, lambda plant: check_swapped("plain", FEW_FORMATS[:1], plant)),
    (never_go_back, lambda plant: check_exceptions("fsdp2", plant)),
    (take_any_place, lambda plant: check_refused("tp", plant)),
    (send_what_the_body_left, check_moved_on_one_rank),
]


@pytest.mark.parametrize(("plant", "gate"), GATES, ids=[plant.__name__ for plant, _ in GATES])
def test_the_gate_kills_the_bug(plant: Callable[[], None], gate: Callable[[str | None], None]) -> None:
    with pytest.raises(AssertionError):  # of the checks, or of a rank
        gate(plant.__name__)
