"""Averaging as a share of a real training step: forward, backward and optimizer of two small models, in plain torch.

Updates are timed inside the loop, where the step before them has filled the caches with something else; the blocks of
torch's class and ours take turns. Under DDP both are handed the wrapped model, as people do.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from bench.report import OURS, TORCH_CLASS, TrainingRow
from bench.timing import collector_paused

# An update at every step, and at every tenth; a block holds as many steps as the rarest update asks for.
EVERY = (1, 10)
STEPS_PER_BLOCK = 10
RANKS = 2
DDP_SETTING = f"DDP, {RANKS} ranks"


class Transformer(nn.Module):
    """A decoder-like stack over tokens: 4 layers of width 192."""

    vocabulary, width, length, batch = 4096, 192, 64, 8

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.vocabulary, self.width)
        layer = nn.TransformerEncoderLayer(self.width, 4, 4 * self.width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(self.width, self.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens)))

    def draw(self) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(self.vocabulary, (self.batch, self.length + 1))
        return tokens[:, :-1], tokens[:, 1:]


class ConvNet(nn.Module):
    """A CNN with BatchNorm over 32x32 images: three stages of two convolutions."""

    widths, batch, classes = (32, 64, 128), 32, 10

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in self.widths:
            for stride in (2, 1):
                layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, self.classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))

    def draw(self) -> tuple[Tensor, Tensor]:
        return torch.randn(self.batch, 3, 32, 32), torch.randint(self.classes, (self.batch,))


MODELS: dict[str, type[Transformer] | type[ConvNet]] = {"transformer": Transformer, "CNN": ConvNet}


@dataclass(frozen=True)
class Budget:
    """How long one model in one setting is measured, between two bounds of rounds."""

    seconds: float
    min_rounds: int = 3
    max_rounds: int = 20


class Loop:
    """A model in training, with data drawn beforehand."""

    def __init__(self, name: str, *, distributed: bool) -> None:
        torch.manual_seed(0)
        plain = MODELS[name]()
        self.batches = [plain.draw() for _ in range(STEPS_PER_BLOCK)]
        self.model: nn.Module = DistributedDataParallel(plain) if distributed else plain
        params = self.model.parameters()
        self.optimizer = torch.optim.AdamW(params) if name == "transformer" else torch.optim.SGD(params, 0.05, 0.9)

    def step(self, index: int) -> None:
        inputs, targets = self.batches[index]
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten()).backward()
        self.optimizer.step()

    def block(self, update: Callable[[nn.Module], None], every: int) -> tuple[float, float]:
        """Train one block with an update after each ``every`` steps; give the seconds in steps and in updates."""
        step_s = update_s = 0.0
        for index in range(STEPS_PER_BLOCK):
            start = time.perf_counter()
            self.step(index)
            stepped = time.perf_counter()
            step_s += stepped - start
            if (index + 1) % every == 0:
                update(self.model)
                update_s += time.perf_counter() - stepped
        return step_s, update_s


def averaged_models(model: nn.Module) -> dict[str, AveragedModel]:
    """Build torch's class and ours for ``model``; ours is left out where it is not installed."""
    found = {TORCH_CLASS: AveragedModel(model)}
    try:
        from swafast import FusedAveragedModel
    except ImportError:
        return found
    found[OURS] = FusedAveragedModel(model)
    return found


def measure_share(name: str, budget: Budget, *, distributed: bool = False) -> list[TrainingRow]:
    """Measure one model in this process, or in this rank of the default process group."""
    loop = Loop(name, distributed=distributed)
    averaged = averaged_models(loop.model)
    for each in averaged.values():
        # The first update copies and plans, the second is like all others.
        loop.block(each.update_parameters, every=STEPS_PER_BLOCK // 2)
    samples: dict[tuple[str, int], list[tuple[float, float]]] = {}
    end = time.perf_counter() + budget.seconds
    with collector_paused():
        for done in range(budget.max_rounds):
            if done >= budget.min_rounds and _all_past(end, distributed=distributed):
                break
            for every in EVERY:
                for provider, each in averaged.items():
                    samples.setdefault((provider, every), []).append(loop.block(each.update_parameters, every))
    setting = DDP_SETTING if distributed else "alone"
    numel = sum(param.numel() for param in loop.model.parameters())
    return [
        TrainingRow(name, setting, provider, every, numel, STEPS_PER_BLOCK, *map(list, zip(*taken, strict=True)))
        for (provider, every), taken in samples.items()
    ]


def _all_past(end: float, *, distributed: bool) -> bool:
    """Whether the budget is spent; every rank must agree, or one waits for gradients that nobody sends."""
    past = torch.tensor(float(time.perf_counter() > end))
    if distributed:
        dist.all_reduce(past, op=dist.ReduceOp.MIN)
    return bool(past)


def _rank(rank: int, directory: str, budget: Budget) -> None:
    """One rank of the DDP run. Rank 0 writes its rows down for the parent."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=RANKS)
    rows = [row for name in MODELS for row in measure_share(name, budget, distributed=True)]
    if rank == 0:
        (Path(directory) / "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
    # gloo may abort a rank whose peer has already gone
    dist.barrier()
    dist.destroy_process_group()


def measure_alone(budget: Budget) -> list[TrainingRow]:
    return [row for name in MODELS for row in measure_share(name, budget)]


def measure_ddp(budget: Budget) -> list[TrainingRow]:
    """Measure every model under DDP, on RANKS processes with one thread each; rank 0 reports."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_rank, (directory, budget), nprocs=RANKS)
        return [TrainingRow(**row) for row in json.loads((Path(directory) / "rows.json").read_text())]
