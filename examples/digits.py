"""The task of the examples on ranks: a small transformer on handwritten digits; each rank takes its part of a batch."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from swafast.demo.task import NUM_CLASSES, Settings, Split, digits_split, shifted

# For a quick look, set EPOCHS=8 in the environment.
try:
    SETTINGS = Settings(epochs=int(os.environ.get("EPOCHS", "32")))
except ValueError as error:
    sys.exit(f"EPOCHS does not fit: {error}")
LEARNING_RATE = 2e-3
WIDTH, DEPTH = 128, 3  # 0.6 M params in 41 tensors
SIDE = 8  # pixels; an image is read as that many rows


#: Accuracy, bytes of averages on this rank, milliseconds of an update; None if it was not measured.
Row = tuple[float | None, int | None, float | None]


class Block(nn.Module):
    """Attention and a perceptron, each with a residual connection; FSDP gathers one block at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:  # (batch, rows, width)
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)
        x = x + self.out(attended)
        return x + self.perceptron(self.norms[1](x))


class RowTransformer(nn.Module):
    """A classifier that reads an image as a sequence of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(SIDE, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 1, 8, 8) -> (batch, 10)
        x = self.embed(images.squeeze(1)) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def on_all_ranks(train: Callable[[torch.device], None]) -> None:
    """Train on the ranks that torchrun has started: with NCCL and a GPU each, or with gloo on the CPU."""
    train(_start())
    # Free the models first. If a DDP module is the last holder of the group, it holds the interpreter's lock while it
    # waits for a thread of gloo, which may be waiting for that lock (seen once, torch 2.13).
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def _start() -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same initial model on every rank
    return device


@dataclass
class Training:
    """The training of a model on this rank's part of the images."""

    model: nn.Module
    device: torch.device

    def __post_init__(self) -> None:
        split = digits_split(0, SETTINGS)
        self.split = Split(*(tensor.to(self.device) for tensor in vars(split).values()))
        self._generator = torch.Generator().manual_seed(0)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, weight_decay=0.05)

    def run(self, after_epoch: Callable[[], None]) -> None:
        """Train, and call ``after_epoch`` after each epoch of the last quarter: it updates the average."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        for epoch in range(SETTINGS.epochs):
            images = shifted(self.split.train_images.cpu(), SETTINGS.max_shift, self._generator).to(self.device)
            for batch in torch.randperm(len(images), generator=self._generator).split(SETTINGS.batch_size):
                own = batch[rank::ranks]
                loss = F.cross_entropy(self.model(images[own]), self.split.train_labels[own])
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()
            if epoch >= SETTINGS.start_epoch:
                after_epoch()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Return the share of test images that ``model`` classifies correctly."""
        hits = model(self.split.test_images).argmax(1) == self.split.test_labels
        return hits.double().mean().item()


def update_ms(update: Callable[[], object], device: torch.device, rounds: int = 50) -> float:
    """Return the median milliseconds of an update that all ranks make together."""
    samples = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return 1e3 * statistics.median(samples)


def report(title: str, rows: dict[str, Row]) -> None:
    """Print a table on the first rank, with the largest value of all ranks in each cell."""
    gathered: list[dict[str, Row]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, rows)
    if dist.get_rank() == 0:
        table = Table(title=f"{title} on {dist.get_world_size()} ranks, {dist.get_backend()}", title_justify="left")
        for column in ("", "accuracy", "bytes per rank", "ms per update"):
            table.add_column(column, justify="right" if column else "left")
        for name in rows:
            columns = zip(*(of_rank[name] for of_rank in gathered), strict=True)
            accuracy, nbytes, ms = (max(filter(None, column), default=None) for column in columns)
            cells = (accuracy and f"{accuracy:.1%}", nbytes and f"{nbytes:,}", ms and f"{ms:.3f}")
            table.add_row(name, *(cell or "" for cell in cells))
        Console().print(table)
