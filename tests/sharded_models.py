"""One small model, spread over ranks in every mode that torch has, beside an unsharded one.

Every rank keeps the unsharded model as well: `drift` changes it in the same way on all of them, and `fill` copies its
values to the sharded one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from swafast import FusedAveragedModel, FusedAverages, ShardedAveragedModel, ShardedAverages
from tests.support import differing, require_same, swapped, tensors_of

#: The ranks that each mode is run on; 2-D meshes are 2x2.
WORLDS = {
    "plain": (1, 2, 3, 4),
    "ddp": (1, 2, 3, 4),
    "fsdp2": (1, 2, 3, 4),
    "fsdp1": (1, 2, 3, 4),
    "fsdp1_orig": (1, 2, 3, 4),
    "tp": (1, 2, 3, 4),
    "fsdp2_tp": (4,),
    "fsdp2_part_tp": (4,),  # params outside the plan are on each rank's own part of the mesh
    "hsdp": (4,),
    "fsdp1_no_shard": (2,),
    "fsdp1_hybrid": (4,),
}
MODES = tuple(WORLDS)

_REPLICATED = ("plain", "ddp")
_FSDP1 = ("fsdp1", "fsdp1_orig", "fsdp1_no_shard", "fsdp1_hybrid")

#: Their forward passes add up in another order than an unsharded one, and take the same data on all ranks.
TP_MODES = ("tp", "fsdp2_tp", "fsdp2_part_tp")
FSDP2_MODES = ("fsdp2", "fsdp2_tp", "fsdp2_part_tp", "hsdp")

WIDTH = 10
#: Divides evenly by 1 to 4 ranks: torch runs no forward pass on uneven Colwise and Rowwise shards.
_INNER = 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, _INNER)
        self.outer = nn.Linear(_INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(x)))


class Linear(nn.Linear):
    """Takes plain tensors and gathers its params for them."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, whole(self.weight), None if self.bias is None else whole(self.bias))


class BatchNorm(nn.BatchNorm1d):
    """As :class:`Linear`, with this rank's own statistics."""

    def forward(self, x: Tensor) -> Tensor:
        stats, affine = (self.running_mean, self.running_var), (whole(self.weight), whole(self.bias))
        if self.training:
            self.num_batches_tracked.add_(1)
        else:  # which mixed precision may have made another than the buffers'
            stats = tuple(buffer.to(x.dtype) for buffer in stats)
        return nn.functional.batch_norm(x, *stats, *affine, self.training, self.momentum, self.eps)


class Net(nn.Module):
    """Uneven shards, shards without elements, tied and frozen params, BatchNorm, and whatever else its mode allows."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.encoder = Linear(WIDTH, WIDTH)
        self.tied = Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.encoder.weight
        self.norm = BatchNorm(WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.frozen = Linear(WIDTH, WIDTH).requires_grad_(False)
        self.long = nn.Parameter(torch.randn(1009))
        self.table = nn.Parameter(torch.randn(7, 3))
        self.short = nn.Parameter(torch.randn(1, 2))
        self.point = nn.Parameter(torch.ones(1))
        # FSDP takes no param without dimensions, and FSDP2 none that is not contiguous.
        self.scalar = nn.Parameter(torch.tensor(1.0)) if mode in (*_REPLICATED, "tp") else None
        self.conv = None
        if mode in (*_REPLICATED, *_FSDP1):
            self.conv = nn.Conv2d(2, 3, (3, 2), padding=(1, 0))
            self.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.gapped = nn.Parameter(torch.randn(6, 10)[:, ::2]) if mode == "plain" else None
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.tied(torch.relu(self.encoder(x))))
        for block in self.blocks:
            x = block(x)
        x = self.frozen(x) * whole(self.long)[-WIDTH:]
        if self.conv is not None:
            x = x + self.conv(x.view(-1, 2, 5, 1).expand(-1, 2, 5, 2)).flatten(1).sum(1, keepdim=True)
        for param in (self.table, self.short, self.point, self.scalar, self.gapped):
            if param is not None:
                x = x + whole(param).square().mean()
        return x


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or all of a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_of(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make_model(mode: str = "plain", dtype: torch.dtype = torch.float32) -> Net:
    """Make the unsharded model with what ``mode`` allows, with the same values on every rank."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(4)
        return Net(mode).to(dtype)


def can_run(mode: str, *, forward: bool) -> bool:
    """Return whether this torch can run the mode."""
    # torch 2.6 runs no forward pass of FSDP2 without a GPU, and shards a dimension unevenly over one mesh only.
    return hasattr(torch.cpu.Stream, "record_event") or mode not in (FSDP2_MODES if forward else TP_MODES[1:])


def require(mode: str, *, forward: bool) -> None:
    """Skip a test where this torch cannot run the mode."""
    if not can_run(mode, forward=forward):
        pytest.skip(f"needs a torch that can run {mode} on a CPU")


def wrap(model: Net, mode: str) -> nn.Module:
    """Spread ``model`` over all ranks, and take it over: do not use it afterwards. Collective."""
    world = dist.get_world_size()
    if mode == "plain":
        return model
    if mode == "ddp":
        return DistributedDataParallel(model)
    if mode in _FSDP1:
        return _wrap_fsdp1(model, mode)
    if mode == "fsdp2":
        return _fully_shard(model, init_device_mesh("cpu", (world,)))
    if mode == "tp":
        return _parallelize(model, init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)))
    if mode == "hsdp":
        return _fully_shard(model, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    assert mode in ("fsdp2_tp", "fsdp2_part_tp"), mode
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    return _fully_shard(_parallelize(model, mesh["tp"], everything=mode == "fsdp2_tp"), mesh["dp"])


def _wrap_fsdp1(model: Net, mode: str) -> FullyShardedDataParallel:
    strategies = {"fsdp1_no_shard": ShardingStrategy.NO_SHARD, "fsdp1_hybrid": ShardingStrategy.HYBRID_SHARD}
    world = dist.get_world_size()
    options = {
        "sharding_strategy": strategies.get(mode, ShardingStrategy.FULL_SHARD),
        "use_orig_params": mode == "fsdp1_orig",
        "device_id": torch.device("cpu"),
    }
    if mode == "fsdp1_hybrid":
        names = ("replicate", "shard")
        options["device_mesh"] = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names)
    return nested_in_fsdp1(model, **options)


def nested_in_fsdp1(model: Net, **options: Any) -> FullyShardedDataParallel:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = FullyShardedDataParallel(block, **options)
    # One flat param is trained or frozen as one.
    model.frozen = FullyShardedDataParallel(model.frozen, **options)
    return FullyShardedDataParallel(model, **options)


def _fully_shard(model: Net, mesh: DeviceMesh) -> Net:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _parallelize(model: Net, mesh: DeviceMesh, *, everything: bool = False) -> Net:
    plan = {"inner": ColwiseParallel(), "outer": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    placements: dict[str, Placement] = {"table": Shard(0), "short": Shard(1), "point": Replicate(), "long": Shard(0)}
    if everything:
        placements |= {"encoder.weight": Shard(0), "encoder.bias": Replicate(), "frozen.weight": Shard(1)}
        placements |= {"frozen.bias": Shard(0), "norm.weight": Replicate(), "norm.bias": Shard(0)}
    for name, placement in placements.items():
        path, _, leaf = name.rpartition(".")
        param = model.get_parameter(name)
        spread = nn.Parameter(distribute_tensor(param.detach(), mesh, [placement]), requires_grad=param.requires_grad)
        setattr(model.get_submodule(path), leaf, spread)
    model.tied.weight = model.encoder.weight
    return model


def plain_name(name: str) -> str:
    """Drop what wrappers add to a name."""
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


@torch.no_grad()
def drift(reference: nn.Module, step: int) -> None:
    """Change every param and persistent buffer of the unsharded model, by values that depend on ``step`` alone."""
    source = torch.Generator().manual_seed(1000 + step)
    for param in reference.parameters():
        param.add_(torch.randn(param.shape, generator=source).to(param.dtype), alpha=0.1)
    for name, buffer in reference.named_buffers():
        if buffer.is_floating_point() and name != "scratch":
            buffer.add_(torch.rand(buffer.shape, generator=source).to(buffer.dtype))
        elif not buffer.is_floating_point():
            buffer.copy_(torch.randint(0, 2, buffer.shape, generator=source))


@torch.no_grad()
def fill(model: nn.Module, mode: str, reference: nn.Module) -> None:
    """Copy the unsharded model's values to the sharded ``model``, buffers too. Collective."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward leaves the root gathered
    values = dict(reference.named_parameters(remove_duplicate=False))
    with summoned(model, mode, writeback=True):
        for name, param in model.named_parameters():
            _assign(param, values[plain_name(name)])
    buffers = dict(reference.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[plain_name(name)])


def _assign(param: Tensor, value: Tensor) -> None:
    if not isinstance(param, DTensor):
        param.copy_(value)
        return
    local = param.to_local()
    if local.numel():
        (box,) = param.__create_chunk_list__()
        index = tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))
        local.copy_(value[index])


@contextmanager
def summoned(model: nn.Module, mode: str, *, writeback: bool = False) -> Iterator[None]:
    """Have whole params in an FSDP1 model; leave any other model as it is."""
    if mode not in _FSDP1:
        yield
        return
    with FullyShardedDataParallel.summon_full_params(model, writeback=writeback):
        yield


@torch.no_grad()
def gather(model: nn.Module, mode: str) -> dict[str, Tensor]:
    """Copy the sharded model's whole params and its buffers, by torch's own ways. Collective."""
    with summoned(model, mode):
        named = {plain_name(name): whole(param).clone() for name, param in model.named_parameters()}
    return named | {plain_name(name): buffer.clone() for name, buffer in model.named_buffers()}


def locals_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy this rank's own params and buffers as they stand in the model, without a collective."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: local_of(tensor).detach().clone() for name, tensor in named}


def outcome(call: Callable[[], object]) -> str:
    """Return the error that something raises, in words."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def wrong_parts(averaged: ShardedAveragedModel, expected: Mapping[str, Tensor]) -> list[str]:
    """Return what of this rank's part differs by bits from whole tensors, and keys that only one of the two has."""
    found = {"n_averaged": averaged.n_averaged}
    wanted = {"n_averaged": expected["n_averaged"]}
    names = {"n_averaged"}
    for entry in averaged._entries():
        names.update(entry.keys)
        for index, box in enumerate(entry.share.boxes):
            found[f"{entry.keys[0]}, box {index}"] = box.of_run(entry.run)
            wanted[f"{entry.keys[0]}, box {index}"] = box.of_whole(expected[entry.keys[0]])
    return sorted(names ^ expected.keys()) + differing(found, wanted)


def require_own_parts(averaged: ShardedAveragedModel, expected: Mapping[str, Tensor], about: str = "own parts") -> None:
    """Check this rank's part by bits, without a collective, and the keys."""
    found = wrong_parts(averaged, expected)
    assert found == [], f"{about}: {found}"


def planes_of(averaged: ShardedAveragedModel) -> dict[str, Tensor]:
    """Copy all planes and the counter of this rank's average, without a collective."""
    named = {f"{name} {i}": plane for name, planes in averaged._planes.items() for i, plane in enumerate(planes)}
    return {name: plane.detach().clone() for name, plane in (named | {"n_averaged": averaged.n_averaged}).items()}


class Beside:
    """A sharded model and its average, beside an unsharded model of the same values and its own average.

    Args:
        kind: of which mode the models have the params.
        models: the unsharded model and the sharded one, in the place of those of the mode.
        options: of both averages; ``share_replicas`` and ``process_group`` of the sharded one alone.
    """

    def __init__(
        self,
        mode: str,
        dtype: torch.dtype = torch.float32,
        *,
        updates: int = 0,
        kind: str | None = None,
        models: tuple[nn.Module, nn.Module] | None = None,
        **options: Any,
    ) -> None:
        self.mode = mode
        made = models or (make_model(kind or mode, dtype), wrap(make_model(kind or mode, dtype), mode))
        self.reference, self.sharded = made
        own = {key: options.pop(key) for key in ("share_replicas", "process_group") if key in options}
        several = "rules" in options
        self.expected: Any = (FusedAverages if several else FusedAveragedModel)(self.reference, **options)
        self.averaged: Any = (ShardedAverages if several else ShardedAveragedModel)(self.sharded, **options, **own)
        self.next_step = 0
        if updates:
            self.train(*range(updates))

    @property
    def inner(self) -> nn.Module:
        """The sharded model without what `torch.compile` wraps around it."""
        return getattr(self.sharded, "_orig_mod", self.sharded)

    def fill(self) -> None:
        fill(self.inner, self.mode, self.reference)

    def update(self) -> None:
        self.averaged.update_parameters(self.sharded)
        self.expected.update_parameters(self.reference)

    def train(self, *steps: int) -> Any:
        """Update both averages with the values of these steps, or of the next one. Collective."""
        for step in steps or (self.next_step,):
            drift(self.reference, step)
            self.fill()
            self.update()
            self.next_step = step + 1
        return self

    def params(self) -> dict[str, Tensor]:
        """Copy the sharded model's whole params and its buffers. Collective."""
        return gather(self.inner, self.mode)

    def require_equal(self, about: object = "averages") -> None:
        """Check that the two averages are the same by bits. Collective."""
        require_same(self.averaged.full_state_dict(), self.expected.state_dict(), about)

    def require_exchange(self, about: object = "swapped") -> None:
        """Check that both models take their averages and come back, by bits. Collective."""
        before = self.params()
        with swapped((self.averaged, self.sharded), (self.expected, self.reference)):
            inside, expected = self.params(), tensors_of(self.reference)
        require_same(inside, expected, f"{about}, inside")
        require_same(self.params(), before, f"{about}, after")
