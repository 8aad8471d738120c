"""Each private name of torch that `torch_private/distributed.py` and `PartTensor` rely on; a failure names it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._checkpointable import _Checkpointable
from torch.distributed.checkpoint import planner_helpers
from torch.distributed.checkpoint import utils as checkpoint_utils
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from swafast.sharded import PartTensor
from swafast.torch_private import distributed as private
from tests.ranks import TIMEOUT, run_ranks
from tests.sharded_models import require


def dtensor_names() -> list[str]:
    """Return the private names of DTensor and process groups that this torch lacks, or that mean something else."""
    mesh = init_device_mesh("cpu", (1,))
    tensor = distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Shard(0)])
    missing = [name for name in ("_local_tensor", "_spec", "__create_chunk_list__") if not hasattr(tensor, name)]
    if private.local_tensors([tensor])[0] is not tensor._local_tensor:
        missing.append("_local_tensor")
    if private.box_of(tensor) != ((0, 0), (3, 2)):
        missing.append("__create_chunk_list__")
    if private.specs([tensor])[0].placements != tensor.placements:  # type: ignore[attr-defined]
        missing.append("_spec")
    if private.group_timeout(dist.group.WORLD) != TIMEOUT:  # type: ignore[arg-type]
        missing.append("_get_backend(device).options._timeout")
    if "cpu" not in private.taken_devices(dist.group.WORLD):  # type: ignore[arg-type]
        missing.append("_device_types")
    # On a mesh of GPUs, `DTensor.from_local` would move the tensor there.
    of_gpus = SimpleNamespace(device_type="cuda", **{name: getattr(mesh, name) for name in ("ndim", "shape", "mesh")})
    made = private.on_mesh(tensor.to_local(), of_gpus, tensor.placements, (3, 2), (2, 1))  # type: ignore[arg-type]
    if made.device.type != "cpu" or not torch.equal(made.to_local(), tensor.to_local()) or made.shape != (3, 2):
        missing.append("DTensorSpec")
    if private.on_mesh(tensor.to_local(), mesh, tensor.placements, (3, 2), (2, 1))._spec != tensor._spec:
        missing.append("TensorMeta")
    return missing


def fsdp1_names(orig: bool) -> list[str]:
    """Return the private names of FSDP1 that this torch lacks."""
    model = FullyShardedDataParallel(nn.Linear(3, 5), use_orig_params=orig, device_id=torch.device("cpu"))
    missing = []
    if not orig and [name.rpartition(".")[2] for name, _ in model.named_parameters()] != [private.FLAT_PARAM]:
        missing.append("FLAT_PARAM")
    model(torch.ones(1, 3))
    handle = model._handle
    of_param = ("_fqns", "_shapes", "_strides", "_shard_param_infos", "_param_infos", "_shared_param_infos", "_params")
    missing += [name for name in (*of_param, "_local_shard") if not hasattr(handle.flat_param, name)]
    of_handle = ("reshard", "post_reshard", "_prefetched", "uses_sharded_strategy")
    missing += [name for name in of_handle if not hasattr(handle, name)]
    (found,) = private.flat_params(model)
    if [shard.names for shard in found.shards] != [("weight",), ("bias",)]:
        missing.append("_fqns")
    if sum(shard.stop - shard.start for shard in found.shards) > found.local.numel():
        missing.append("_shard_param_infos")
    private.reshard_flat_params(model)
    return missing


def group_names() -> list[str]:
    """Return the private names of process groups that this torch lacks, or that mean something else."""
    of_torch = dist.distributed_c10d._process_group_name
    group = private.new_group([0], "ours")
    missing = [] if group.group_name == "ours" else ["_process_group_name"]
    if dist.distributed_c10d._process_group_name is not of_torch:
        missing.append("_process_group_name, which is not as it was")
    return missing


def fsdp2_names() -> list[str]:
    """Return the private names of FSDP2 that this torch lacks, or that mean something else."""
    missing = []
    model = fully_shard(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)))
    model.register_forward_pre_hook(stop, prepend=False)
    with contextlib.suppress(StopIteration):
        model(torch.ones(1, 3))
    state = model._get_fsdp_state()
    if state._training_state.name != "FORWARD" or state._is_root is not True:
        missing.append("_training_state")
    private.end_forward(model)
    if state._training_state.name != "IDLE" or not isinstance(model[0].weight, DTensor):
        missing.append("_reset_iter_state")
    return missing


def stop(*args: object) -> None:
    raise StopIteration


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "names_lacking", "args"),
    [(1, dtensor_names, ()), (2, fsdp1_names, (False,)), (2, fsdp1_names, (True,)), (1, group_names, ())],
)
def test_torch_has_what_we_read(world: int, names_lacking: Callable[..., list[str]], args: tuple[bool, ...]) -> None:
    assert run_ranks(world, names_lacking, *args) == [[]] * world


@pytest.mark.distributed
def test_fsdp2_has_what_we_read() -> None:
    require("fsdp2", forward=True)
    assert run_ranks(1, fsdp2_names) == [[]]


def test_checkpoints_ask_tensors_for_the_protocol_that_ours_speaks() -> None:
    source = inspect.getsource(planner_helpers) + inspect.getsource(checkpoint_utils)
    for name in ("__create_write_items__", "__create_chunk_list__", "__get_tensor_shard__"):
        assert name in source, name
        assert hasattr(PartTensor, name), name
        assert hasattr(_Checkpointable, name), name


def test_wrapper_subclasses() -> None:
    assert hasattr(torch.Tensor, "_make_wrapper_subclass"), "torch.Tensor._make_wrapper_subclass is gone"
    assert torch.ops.aten._to_copy.default is not None
