"""Ranks that disagree, and bad arguments: an error names what is wrong, and nothing has changed."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.testing._internal.two_tensor import TwoTensor

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel
from swafast.sharded import ShardedAveragedModel, ShardedAverages
from tests.ranks import run_ranks
from tests.sharded_models import make_model, outcome, wrap
from tests.test_sharded_faults import make_case


def net(**params: Tensor) -> nn.ParameterDict:
    """Make a model of plain params, the same on every rank."""
    source = torch.Generator().manual_seed(5)
    made = {"weight": torch.randn(9, 7, generator=source), "bias": torch.randn(130, generator=source)} | params
    return nn.ParameterDict({name: nn.Parameter(value, requires_grad=False) for name, value in made.items()})


def spread_net(mesh: DeviceMesh, *placements: Placement, shape: tuple[int, ...] = (4, 4)) -> nn.ParameterDict:
    """Make a model with one DTensor, without a collective."""
    return net(spread=DTensor.from_local(torch.ones(shape), mesh, placements, run_check=False))


@torch.no_grad()
def flip_a_bit(tensor: Tensor) -> None:
    """Change the last bit of the last element."""
    words = tensor.view(torch.int32)
    words[(-1,) * words.dim()] ^= 1


# Ranks that disagree


def disagreements(mesh: DeviceMesh, odd: bool) -> dict[str, Callable[[], object]]:
    """Return constructions in which rank 1 differs."""

    def make(model: nn.Module | None = None, **options: Any) -> ShardedAveragedModel:
        return ShardedAveragedModel(net() if model is None else model, **options)

    def pick(name: str) -> Callable[[str, Tensor], bool]:
        return lambda param, _: param != name

    def flipped() -> ShardedAveragedModel:
        model = net()
        if odd:
            flip_a_bit(model["bias"])
        return make(model)

    placements = (Shard(1),) if odd else (Shard(0),)
    return {
        "a name": lambda: make(net(first=torch.ones(3)) if odd else net(second=torch.ones(3))),
        "a param more": lambda: make(net(more=torch.ones(3)) if odd else net()),
        "a shape": lambda: make(net(bias=torch.ones(131 if odd else 130))),
        "a dtype": lambda: make(net(bias=torch.ones(130, dtype=torch.float16 if odd else torch.float32))),
        "a tie": lambda: make(tied(odd)),
        "a placement": lambda: make(spread_net(mesh, *placements)),
        "the rule": lambda: make(rule=ExponentialAverage(0.9 if odd else 0.99)),
        "the format": lambda: make(format="mirrored" if odd else "float32"),
        "the picks": lambda: make(include=pick("bias" if odd else "weight")),
        "use_buffers": lambda: make(use_buffers=odd),
        "share_replicas": lambda: make(share_replicas=odd),
        "nonfinite": lambda: make(nonfinite="skip" if odd else "raise"),
        "a bit": flipped,
    }


def tied(odd: bool) -> nn.ParameterDict:
    model = net(other=torch.ones(130))
    if odd:
        model["other"] = model["bias"]
    else:
        model["other"].copy_(model["bias"])
    return model


DISAGREE = r"ValueError: the model and the arguments must be the same on every rank, got for "
DIFFERENCES = {
    "a name": DISAGREE + r"'second' \(3,\) .* on rank 0 and nothing on rank 1",
    "a param more": DISAGREE + r"'more' nothing on rank 0 and \(3,\) torch.float32 cpu \(one whole .*\) on rank 1",
    "a shape": DISAGREE + r"'bias' \(130,\) .* on rank 0 and \(131,\) .* on rank 1",
    "a dtype": DISAGREE + r"'bias' .*torch.float32 .* on rank 0 and .*torch.float16 .* on rank 1",
    "a tie": DISAGREE + r"'bias' .*one whole tensor on each rank\) on rank 0 and .*, tied to other\) on rank 1",
    "a placement": DISAGREE + r"'spread' .*Shard\(dim=0\).* on rank 0 and .*Shard\(dim=1\).* on rank 1",
    "the rule": DISAGREE + r"'rule' .*decay=0.99\) on rank 0 and .*decay=0.9\) on rank 1",
    "the format": DISAGREE + r"'format' 'float32' on rank 0 and 'mirrored' on rank 1",
    "the picks": DISAGREE + r"'bias' \(130,\) .* on rank 0 and nothing on rank 1",
    "use_buffers": DISAGREE + r"'use_buffers' False on rank 0 and True on rank 1",
    "share_replicas": DISAGREE + r"'share_replicas' False on rank 0 and True on rank 1",
    "nonfinite": DISAGREE + r"'nonfinite' 'raise' on rank 0 and 'skip' on rank 1",
    "a bit": r"ValueError: 'bias' must be the same on all ranks that hold it alike, got other bits on rank 1 than on "
    r"rank 0: broadcast it before averaging",
}


def local_errors(odd: bool) -> dict[str, Callable[[], object]]:
    """Return constructions that are wrong on rank 1."""

    def divide(name: str, param: Tensor) -> bool:
        return bool(1 / (not odd))

    def make(model: object = None, **options: Any) -> ShardedAveragedModel:
        return ShardedAveragedModel(net() if model is None else model, **options)  # type: ignore[arg-type]

    return {
        "include raises": lambda: make(include=divide),
        "include is none": lambda: make(include="weight" if odd else None),
        "include picks nothing": lambda: make(include=(lambda name, param: False) if odd else None),
        "a rule's class": lambda: make(rule=EqualAverage if odd else None),
        "no rule": lambda: make(rule=0.9 if odd else None),
        "no format": lambda: make(format="float31" if odd else None),
        "no answer to NaN": lambda: make(nonfinite="ignore" if odd else "propagate"),
        "no backend": lambda: make(backend="gpu" if odd else None),
        "no module": lambda: make([] if odd else None),
        "float8": lambda: make(net(bias=torch.ones(130).to(torch.float8_e4m3fn)) if odd else None),
        "lazy": lambda: make(nn.LazyLinear(3) if odd else None),
        "a subclass": lambda: make(net(bias=TwoTensor(torch.ones(130), torch.ones(130))) if odd else None),
    }


LOCAL = {
    "include raises": r"ZeroDivisionError: division by zero",
    "include is none": r"TypeError: include must be a function .*, got 'weight'",
    "include picks nothing": r"ValueError: include must pick a parameter, got False for all of them, 'bias' the first",
    "a rule's class": r"TypeError: rule must be a Rule .*, got the class EqualAverage",
    "no rule": r"TypeError: rule must be a Rule .*, got float 0.9",
    "no format": r"ValueError: format must be .*, got 'float31'",
    "no answer to NaN": r"ValueError: nonfinite must be one of .*, got 'ignore'",
    "no backend": r"ValueError: backend must be .*, got 'gpu'",
    "no module": r"TypeError: model must be a torch.nn.Module, got list",
    "float8": r"NotImplementedError: 'bias' must have a dtype that can be averaged, got torch.float8_e4m3fn",
    "lazy": r"ValueError: model must be initialised, got the lazy parameter 'weight'",
    "a subclass": r"ValueError: 'bias' of the model must be a plain tensor, got TwoTensor",
}


def construct_all() -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Try all of these constructions, and then a right one."""
    odd = dist.get_rank() == 1
    mesh = init_device_mesh("cpu", (2,))
    first = {name: outcome(make) for name, make in disagreements(mesh, odd).items()}
    second = {name: outcome(make) for name, make in local_errors(odd).items()}
    case = make_case()
    with case.averaged.swapped_into(case.model):
        pass
    return first, second, case.complaints(params=True)


@pytest.mark.distributed
def test_ranks_that_disagree_are_told_of_the_difference() -> None:
    answers = run_ranks(2, construct_all)
    for rank, (different, local, complaints) in enumerate(answers):
        for name, pattern in DIFFERENCES.items():
            assert re.match(pattern, different[name]), f"{name} on rank {rank}: {different[name]}"
        for name, pattern in LOCAL.items():
            told = pattern if rank == 1 else f"RuntimeError: .* failed on rank 1, and so on every rank: {pattern}"
            assert re.match(told, local[name]), f"{name} on rank {rank}: {local[name]}"
        assert complaints == []


def construct_over_four() -> dict[str, str]:
    """Try constructions that need a 2-D mesh, or ranks outside a group."""
    rank = dist.get_rank()
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    named = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    pair = dist.new_group([0, 1])

    def meshes_differ() -> object:
        reshaped = spread_net(square, Replicate(), Shard(0), shape=(8, 4))
        return ShardedAveragedModel(reshaped if rank == 3 else spread_net(flat, Shard(0)))

    def on_parts(mesh: DeviceMesh, shift: float = 0.0) -> object:
        model = nn.Linear(9, 5)
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(1.0 + shift)
        return ShardedAveragedModel(fully_shard(model, mesh=mesh))

    def replicas_differ(share_replicas: bool) -> object:
        model = wrap(make_model("hsdp"), "hsdp")
        if rank == 3:
            flip_a_bit(dict(model.named_parameters())["blocks.0.outer.bias"].to_local())
        return ShardedAveragedModel(model, share_replicas=share_replicas)

    return {
        "meshes": outcome(meshes_differ),
        "replicas": outcome(lambda: replicas_differ(False)),
        "shared replicas": outcome(lambda: replicas_differ(True)),
        "a group of others": outcome(lambda: ShardedAveragedModel(net(), process_group=pair)),
        "a group of some of the mesh": outcome(
            lambda: ShardedAveragedModel(spread_net(flat, Shard(0)), process_group=pair)
        ),
        "parts of other bits": outcome(lambda: on_parts(named["dp"], shift=rank % 2)),
        "parts that overlap": outcome(lambda: on_parts(named["tp" if rank == 3 else "dp"])),
    }


@pytest.mark.distributed
def test_meshes_replicas_and_groups_that_do_not_fit() -> None:
    bits = (
        r"ValueError: 'blocks.0.outer.bias' must be the same on all ranks .*, got other bits on rank 3 than on rank 1"
    )
    outside = r"ValueError: process_group must hold this rank, {rank}, got one of others"
    lacking = r"ValueError: process_group must hold all ranks of the mesh of 'spread', got one without \[2, 3\]"
    for rank, answer in enumerate(run_ranks(4, construct_over_four)):
        within = rank < 2
        expected = {
            "meshes": DISAGREE
            + r"'spread' .* on a mesh of \(4,\) .* on rank 0 and .* on a mesh of \(2, 2\) .* on rank 3",
            "replicas": bits,
            "shared replicas": bits,
            "a group of others": "no error" if within else outside.format(rank=rank),
            "a group of some of the mesh": lacking if within else outside.format(rank=rank),
            "parts of other bits": r"ValueError: 'weight' must .*, got other bits on rank 1 than on rank 0",
            "parts that overlap": r"ValueError: .*meshes of one shape that share no rank",
        }
        for name, pattern in expected.items():
            assert re.match(pattern, answer[name]), f"{name} on rank {rank}: {answer[name]}"


# Bad input on all ranks alike


@pytest.mark.parametrize("make", [ShardedAveragedModel, partial(ShardedAverages, rules={"a": EqualAverage()})])
def test_one_of_several_processes_needs_a_process_group(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # as torchrun does
    with pytest.raises(ValueError, match=r"process_group must exist, got none in one of 4 processes .*init_process_gr"):
        make(net())


def refused() -> dict[str, str]:
    """Make wrong calls and return their errors; see that an average that exists does not change."""
    mesh = init_device_mesh("cpu", (2,))
    double = TwoTensor(torch.ones(4, 4), torch.ones(4, 4))
    wrapped = net(spread=DTensor.from_local(double, mesh, (Shard(0),), run_check=False))
    make, small = ShardedAveragedModel, make_case()
    told = {
        "no ProcessGroup": outcome(lambda: make(net(), process_group="world")),  # type: ignore[arg-type]
        "an update from None": outcome(lambda: small.averaged.update_parameters(None)),
        "float8 in a DTensor": outcome(lambda: make(float8_shard(mesh))),
        "a subclass in a DTensor": outcome(lambda: make(wrapped)),
        "a part of a sum": outcome(lambda: make(spread_net(mesh, Partial()))),
        "meta": outcome(lambda: make(net(bias=torch.ones(130, device="meta")))),
        "sparse": outcome(lambda: make(net(bias=torch.ones(130).to_sparse()))),
        "pickle": outcome(lambda: pickle.dumps(small.averaged)),
        "deepcopy": outcome(lambda: copy.deepcopy(small.averaged)),
        "copy": outcome(lambda: copy.copy(small.averaged)),
    }
    return told | {"after": ", ".join(small.complaints(params=True))}


def float8_shard(mesh: DeviceMesh) -> nn.ParameterDict:
    local = torch.ones(4, 4).to(torch.float8_e4m3fn)
    return net(spread=DTensor.from_local(local, mesh, (Shard(0),), run_check=False))


REFUSED = {
    "no ProcessGroup": r"TypeError: process_group must be a ProcessGroup or None, got str",
    "an update from None": r"TypeError: model must be a torch.nn.Module, got NoneType",
    "float8 in a DTensor": r"NotImplementedError: 'spread' must have a dtype that .*, got torch.float8_e4m3fn",
    "a subclass in a DTensor": r"ValueError: 'spread' of the model must be a plain tensor, got TwoTensor",
    "a part of a sum": r"ValueError: 'spread' must be sharded or replicated, got .*Partial",
    "meta": r"ValueError: 'bias' of the model must hold data, got a tensor on the meta device",
    "sparse": r"ValueError: 'bias' of the model must be dense, got layout torch.sparse_coo",
    "pickle": r"TypeError: a ShardedAveragedModel belongs to its process group .* save its state_dict\(\)",
    "deepcopy": r"TypeError: a ShardedAveragedModel belongs to its process group .* save its state_dict\(\)",
    "copy": r"TypeError: a ShardedAveragedModel belongs to its process group .* save its state_dict\(\)",
}


@pytest.mark.distributed
def test_bad_input_is_named_and_changes_nothing() -> None:
    for rank, told in enumerate(run_ranks(2, refused)):
        for name, pattern in REFUSED.items():
            assert re.match(pattern, told[name]), f"{name} on rank {rank}: {told[name]}"
        assert told["after"] == ""


def unsharded() -> dict[str, str]:
    """Pass sharded models to the unsharded class, and return the errors."""
    told = {}
    for mode in ("fsdp2", "fsdp1", "fsdp1_orig"):
        told[mode] = outcome(partial(FusedAveragedModel, wrap(make_model(mode), mode)))
    sharded = spread_net(init_device_mesh("cpu", (2,)), Shard(0))
    told["DTensor"] = outcome(lambda: FusedAveragedModel(net(spread=torch.ones(8, 4))).update_parameters(sharded))
    return told


@pytest.mark.distributed
def test_the_unsharded_class_points_to_this_one() -> None:
    pointer = "; average a sharded model with swafast.ShardedAveragedModel"
    flat = f"ValueError: model must be whole on this rank, got an FullyShardedDataParallel{pointer}"
    assert run_ranks(2, unsharded) == 2 * [
        {
            "fsdp2": f"ValueError: model must be whole on this rank, got an FSDPModule{pointer}",
            "fsdp1": flat,
            "fsdp1_orig": flat,
            "DTensor": f"ValueError: 'spread' of the model must be a plain tensor, got DTensor{pointer}",
        }
    ]
