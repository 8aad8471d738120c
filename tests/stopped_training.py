"""A training that saves its state on the way, and that can be killed at a step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swafast import ExponentialAverage, FusedAveragedModel

STEPS = 30
WAYS: dict[str, dict[str, Any]] = {"plain": {}, "overlap": {"overlap": True}, "offload": {"offload": "cpu"}}


def train(folder: Path, way: str, kill_at: int | None) -> None:
    """Go on from the checkpoint in ``folder``, if there is one, and leave ``end.pt`` there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    averaged = FusedAveragedModel(model, rule=ExponentialAverage(0.9), format="compact", use_buffers=True)
    attachment = averaged.attach(optimizer, start="0.2dur", every=2, duration=STEPS, **WAYS[way])
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "averaged": averaged}
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        for name, state in torch.load(checkpoint, weights_only=True).items():
            parts[name].load_state_dict(state)
    for step in range(attachment.step, STEPS):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
        scheduler.step()
        if step == kill_at:  # with an update under way
            os.kill(os.getpid(), signal.SIGKILL)
        if step % 3 == 0:
            torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "next.pt")
            (folder / "next.pt").rename(checkpoint)
    torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "end.pt")
