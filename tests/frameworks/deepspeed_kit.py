"""A small net under DeepSpeed's ZeRO, and its training."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swafast import ExponentialAverage
from tests.frameworks.shims import shim_deepspeed

shim_deepspeed()

import deepspeed  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

RULE = ExponentialAverage(0.9)


class Net(nn.Module):
    """Params that 2 and 3 ranks cannot divide evenly, one smaller than the ranks, tied ones, a frozen one, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(7, 15), nn.LayerNorm(15)
        self.middle, self.last = nn.Linear(15, 15, bias=False), nn.Linear(15, 3)
        self.scale, self.frozen = nn.Parameter(torch.ones(1)), nn.Parameter(torch.randn(5), requires_grad=False)
        self.again = self.middle
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        hidden = self.again(self.middle(self.norm(self.first(x)).relu()))
        return self.last(hidden * self.scale) + self.frozen.sum()


def engine_of(net: nn.Module | None = None, *, stage: int = 3, dtype: str = "fp32", **zero: Any) -> Any:
    """Return an engine of a net, which accumulates the gradients of two batches."""
    torch.manual_seed(0)
    os.environ |= {"LOCAL_RANK": str(dist.get_rank())}
    deepspeed.init_distributed("gloo")
    net = net if net is not None else Net()
    optimizer = torch.optim.AdamW([param for param in net.parameters() if param.requires_grad], 0.01)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
    }
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)[0]


def batches(engine: Any, count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    return [torch.randn(4, 7, generator=generator).to(dtype) for _ in range(count)]


def train(engine: Any, steps: int = 1, seed: int = 0) -> None:
    engine.train()
    for batch in batches(engine, 2 * steps, seed):
        engine.backward(engine(batch).float().square().mean())
        engine.step()


def whole(engine: Any) -> dict[str, Tensor]:
    """Return the whole params that the optimizer steps, by name: gathered by DeepSpeed."""
    found = {}
    for name, param in engine.module.named_parameters():
        full = safe_get_full_fp32_param(param)
        if full is None or not param.requires_grad:
            with deepspeed.zero.GatheredParameters([param]):
                full = param.detach().clone()
        found[name] = full.clone().view(getattr(param, "ds_shape", param.shape))
    return found
