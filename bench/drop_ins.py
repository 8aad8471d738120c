"""The drop-ins beside the classes that they replace: one step of diffusers', one update of timm's.

All follow one model, each with a constant decay, and take turns. The averages are compared before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.report import Times
from bench.timing import Call, rounds
from tests.frameworks.shims import shim_torchvision

DECAY = 0.999
STEP = 1000  # timm's averages begin to move after the first step
COMPARED_UPDATES = 5
WARM_UPS = 3
BUDGET_S, QUICK_BUDGET_S = 20.0, 2.0
LEAST_ROUNDS = 20
# diffusers' class and timm's V2 round twice where ours rounds once. timm's V3 has the same bits.
TOLERANCE = 1e-6
# bfloat16 averages are rounded at random, by different bits. So their moves towards the model are compared, over all
# elements: V3's differ by 3e-4 of a move, and V2's, which are not rounded at random, by 2e-3.
TOLERANCE_AT_RANDOM = 1e-2


@dataclass(frozen=True)
class DropInRow:
    """One class that follows a model."""

    model: str
    name: str
    is_ours: bool
    times: Times


class Contestants:
    """Classes that follow one model, each with its update and its averages."""

    def __init__(self, title: str, model: nn.Module, *, at_random: bool = False) -> None:
        self.title, self.model, self.at_random = title, model, at_random
        self.updates: dict[str, Call] = {}
        self.averages: dict[str, Sequence[Tensor]] = {}
        self.tolerances: dict[str, float] = {}

    def add(self, name: str, update: Call, averages: Sequence[Tensor], tolerance: float = TOLERANCE) -> None:
        self.updates[name], self.averages[name], self.tolerances[name] = update, averages, tolerance

    @torch.no_grad()
    def check(self) -> None:
        """Raise AssertionError unless all averages are alike after a few updates."""
        start = _flat(self.model.parameters())
        made = torch.Generator().manual_seed(0)
        for _ in range(COMPARED_UPDATES):
            for param in self.model.parameters():
                param.add_(torch.randn(param.shape, generator=made).to(param.dtype), alpha=0.1)
            for update in self.updates.values():
                update()
        walked = _flat(self.model.parameters()) - start
        own = next(name for name in self.averages if name.startswith("swafast"))
        ours = _flat(self.averages[own])
        for name, kept in self.averages.items():
            other = _flat(kept)
            if self.at_random:
                move, others_move = (float((average - start) @ walked) for average in (ours, other))
                alike = abs(move - others_move) <= TOLERANCE_AT_RANDOM * move
            else:
                alike = bool((ours - other).norm() <= self.tolerances[name] * ours.norm())
            assert alike, f"the averages of {name} and {own} must be alike: {self.title}"

    def measure(self, budget_s: float) -> Iterator[DropInRow]:
        self.check()
        for update in self.updates.values():
            for _ in range(WARM_UPS):
                update()
        samples: dict[str, list[float]] = {name: [] for name in self.updates}
        for name in rounds(list(self.updates), budget_s, least=LEAST_ROUNDS):
            # Each follows itself: what the one before has left in the caches is no part of its speed.
            self.updates[name]()
            start = time.perf_counter()
            self.updates[name]()
            samples[name].append(time.perf_counter() - start)
        for name, taken in samples.items():
            yield DropInRow(self.title, name, name.startswith("swafast"), Times.of(taken))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([each.detach().double().flatten() for each in tensors])


def of_diffusers() -> Contestants:
    """Return diffusers' class and ours, which follow a small UNet of 208 tensors."""
    import diffusers
    from diffusers.training_utils import EMAModel

    from swafast.integrations.diffusers import EMAModel as Ours

    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=4,
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )
    params = list(unet.parameters())  # to find them takes as long as our step
    thousands = sum(param.numel() for param in params) // 1000
    contestants = Contestants(f"UNet, {len(params)} tensors, {thousands}k parameters", unet)
    kinds: dict[str, Callable[..., Any]] = {
        "diffusers EMAModel": EMAModel,
        "diffusers EMAModel, foreach": partial(EMAModel, foreach=True),
        "swafast EMAModel": Ours,
    }
    for name, kind in kinds.items():
        ema = kind(params, decay=DECAY, min_decay=DECAY)
        contestants.add(name, partial(ema.step, params), ema.shadow_params)
    return contestants


def of_timm(dtype: torch.dtype) -> Contestants:
    """Return timm's classes and ours, which follow a ResNet-18 with parameters of ``dtype``."""
    import timm
    from timm.utils import ModelEmaV2, ModelEmaV3

    from swafast.integrations.timm import ModelEma

    model = timm.create_model("resnet18").to(dtype)
    at_random = dtype == torch.bfloat16
    contestants = Contestants(f"ResNet-18, {'bf16' if at_random else 'fp32'}", model, at_random=at_random)
    kinds: dict[str, Callable[..., Any]] = {
        "timm ModelEmaV3": ModelEmaV3,
        "timm ModelEmaV3, foreach=False": partial(ModelEmaV3, foreach=False),
        "swafast ModelEma": ModelEma,
    }
    for name, kind in kinds.items():
        ema = kind(model, decay=DECAY)
        contestants.add(name, partial(ema.update, model, step=STEP), list(ema.module.parameters()), tolerance=0.0)
    ema = ModelEmaV2(model, decay=DECAY)
    contestants.add("timm ModelEmaV2", partial(ema.update, model), list(ema.module.parameters()))
    return contestants


def measure(*, quick: bool, progress: Callable[[str], object]) -> list[DropInRow]:
    """Measure all drop-ins. Their frameworks must be installed."""
    shim_torchvision()
    rows: list[DropInRow] = []
    for make in (of_diffusers, partial(of_timm, torch.float32), partial(of_timm, torch.bfloat16)):
        contestants = make()
        progress(contestants.title)
        rows += contestants.measure(QUICK_BUDGET_S if quick else BUDGET_S)
    return rows


def table(rows: Sequence[DropInRow]) -> str:
    """Return the rows as a table, with how much faster ours is than each of the others."""
    lines = ["| model | class | ms | quartiles | ours is faster |", "|---|---|---:|---:|---:|"]
    ours = {row.model: row.times.median for row in rows if row.is_ours}
    for row in rows:
        times = row.times
        ratio = "" if row.is_ours else f"{times.median / ours[row.model]:.1f}x"
        quartiles = f"{times.low * 1e3:.3g} to {times.high * 1e3:.3g}"
        lines.append(f"| {row.model} | {row.name} | {times.median * 1e3:.3g} | {quartiles} | {ratio} |")
    return "\n".join(lines)
