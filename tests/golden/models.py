"""The model of the golden files, and its values. Change neither, or the files are of another model.

Values follow from a tensor's name, a step and an element's index, in whole numbers: the same on every machine.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class GoldenModel(nn.Module):
    """Dense, channels_last, transposed, strided, 0-dim, empty, frozen and tied params; float, integer, bool buffers.

    Args:
        shardable: leave out what FSDP2 takes no part of: params that are strided, empty or without dimensions.
    """

    def __init__(self, *, shardable: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        if not shardable:
            self.linear.weight = nn.Parameter(torch.zeros(5, 4).t())
        self.tied = nn.Linear(5, 4, bias=False)
        self.tied.weight = self.linear.weight
        self.norm = nn.BatchNorm1d(3)
        self.first = nn.Linear(3, 2)  # bfloat16 and float16 in a mixed model
        self.second = nn.Linear(3, 2)
        self.long = nn.Parameter(torch.zeros(67))
        self.short = nn.Parameter(torch.zeros(1, 2))
        self.frozen = nn.Parameter(torch.zeros(9), requires_grad=False)
        self.wide = nn.Parameter(torch.zeros(7))  # float64 in every model
        if not shardable:
            self.conv = nn.Conv2d(2, 3, (3, 2)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.gapped = nn.Parameter(torch.zeros(3, 10)[:, ::2])
            self.scalar = nn.Parameter(torch.tensor(0.0))
            self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def make_model(
    step: int, dtype: torch.dtype = torch.float32, *, shardable: bool = False, mixed: bool = False
) -> GoldenModel:
    """Make the model with the values of ``step``.

    Args:
        dtype: of all that is no float64.
        mixed: have params in bfloat16 and float16 as well.
    """
    model = GoldenModel(shardable=shardable).to(dtype)
    model.wide.data = model.wide.data.double()
    if mixed:
        model.first.bfloat16()
        model.second.half()
    fill(model, values_of(model, step))
    return model


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all params and the buffers in a state, each once."""
    passing = {"scratch"}
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in passing}
    return {**dict(model.named_parameters()), **buffers}


def values_of(model: nn.Module, step: int, salt: str = "") -> dict[str, Tensor]:
    """Return whole values for each tensor of the model, in its dtype."""
    return {name: _value(f"{salt}{name}", step, tensor) for name, tensor in named_tensors(model).items()}


@torch.no_grad()
def fill(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Write whole values into the model, into each rank's part of what is sharded."""
    for name, tensor in named_tensors(model).items():
        if isinstance(tensor, DTensor):
            spread = distribute_tensor(values[name], tensor.device_mesh, tensor.placements)
            tensor.to_local().copy_(spread.to_local())
        else:
            tensor.copy_(values[name])


def _value(name: str, step: int, like: Tensor) -> Tensor:
    bits = _mixed(torch.arange(like.numel()) * 0x9E3779B1 + zlib.crc32(f"{name} {step}".encode()))
    if not like.is_floating_point():
        return (bits & 1).to(like.dtype).view(like.shape)
    # 24 bits of each, of many magnitudes: exact in float64, so that it is rounded once, to the dtype wanted.
    units = ((bits >> 8) - 2**23).double() * 2.0**-22
    return (units * 2.0 ** (bits % 13 - 6).double()).to(like.dtype).view(like.shape)


def _mixed(x: Tensor) -> Tensor:
    """Return 32 bits that look random for each int64."""
    x = x & 0xFFFFFFFF
    for factor, shift in ((0x7FEB352D, 16), (0x046CA68B, 15)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)
