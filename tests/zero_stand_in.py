"""A stand-in for DeepSpeed's ZeRO-3: params with its attributes, and an engine that gathers and steps them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Status = Enum("Status", ["AVAILABLE", "NOT_AVAILABLE"])


class Engine:
    """Partitions the params of a module as ZeRO-3 does: runs in ``dtype``, float32 masters in two groups.

    A forward pass gathers the params, and they stay gathered, as ZeRO-3 keeps its small ones.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.module, self.dtype, self.gathers = module, dtype, 0
        self.grad_position: dict[int, list[int]] = {}
        self.fp32_partitioned_groups_flat: list[Tensor] = []
        params: list[Any] = list(module.parameters())
        for index, param in enumerate(params):
            self._partition(index, param)
        trained = [param for param in params if param.requires_grad]
        for group, members in enumerate((trained[::2], trained[1::2])):
            working = torch.cat([param.ds_tensor for param in members])
            offset = 0
            for param in members:
                size = param.ds_tensor.numel()
                self.grad_position[param.ds_id] = [group, offset, size]
                param.ds_tensor.data = working[offset : offset + size]
                offset += size
            # In float32 DeepSpeed has no second copy of the masters.
            self.fp32_partitioned_groups_flat.append(working.float().requires_grad_())
        module.register_forward_pre_hook(lambda *_: self.gather())

    def _partition(self, index: int, param: Any) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        size = -(-param.numel() // world)
        padded = torch.zeros(size * world, dtype=self.dtype)
        padded[: param.numel()] = param.detach().flatten()
        param.ds_id, param.ds_shape, param.ds_numel = index, param.shape, param.numel()
        param.ds_tensor, param.ds_process_group = padded[size * rank : size * (rank + 1)].clone(), dist.group.WORLD
        param.ds_secondary_tensor = param.ds_zero_param_process_group = param.nvme_swapper = None
        param._z3_optimizer = self
        self._free(param)

    def _free(self, param: Any) -> None:
        param.data, param.ds_status = torch.empty(0, dtype=self.dtype), Status.NOT_AVAILABLE

    def get_param_id(self, param: Any) -> int:
        return int(param.ds_id)

    def empty_partition_cache(self) -> None:
        for param in self.module.parameters():
            self._free(param)

    def gather(self) -> None:
        params: list[Any] = list(self.module.parameters())
        for param in params:
            if param.ds_status is Status.NOT_AVAILABLE:
                parts = [torch.empty_like(param.ds_tensor) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, param.ds_tensor)
                param.data, param.ds_status = torch.cat(parts)[: param.ds_numel].view(param.ds_shape), Status.AVAILABLE
                self.gathers += 1

    @contextmanager
    def gathered(self, name: str) -> Iterator[Tensor]:
        """Let the body write a param, and keep what it has written, as ``GatheredParameters`` does."""
        self.gather()
        param: Any = self.module.get_parameter(name)
        yield param
        start = dist.get_rank() * param.ds_tensor.numel()
        own = param.detach().flatten()[start : start + param.ds_tensor.numel()]
        param.ds_tensor[: own.numel()].copy_(own)
        self._free(param)

    def step(self, seed: int) -> None:
        """Move the masters, and write them into the runs that a forward pass gathers."""
        self.empty_partition_cache()
        generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
        for group, flat in enumerate(self.fp32_partitioned_groups_flat):
            optimizer = torch.optim.SGD([flat], 0.1)
            flat.grad = torch.randn(flat.shape, generator=generator)
            optimizer.step()
            for param in self.module.parameters():
                at = self.grad_position.get(self.get_param_id(param), [-1])
                if at[0] == group:
                    param.ds_tensor.data.copy_(flat.data[at[1] : at[1] + at[2]])

    def masters(self) -> dict[str, Tensor]:
        """Return the whole params, of the masters where there are some. Collective."""
        found = {}
        for name, param in self.module.named_parameters():
            own: Any = param.ds_tensor
            if param.ds_id in self.grad_position:
                group, offset, size = self.grad_position[param.ds_id]
                own = self.fp32_partitioned_groups_flat[group].detach()[offset : offset + size]
            parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, own.contiguous())
            found[name] = torch.cat(parts)[: param.ds_numel].view(param.ds_shape).clone()
        return found
