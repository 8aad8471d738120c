"""SWAP, SWA in parallel, on handwritten digits: ``torchrun --nproc-per-node 4 examples/swap.py``.

Phase one is one training with large batches, under DDP, up to a training accuracy. In phase two each rank is a worker:
it goes on alone, with small batches in an order of its own. The result is the mean of the workers' weights. All of it
runs with true training labels, and with a fifth of them wrong.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import on_all_ranks
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

from swafast import FusedAveragedModel
from swafast.demo.task import Settings, Split, digits_split, shifted
from swafast.demo.training import digits_cnn, score
from swafast.posthoc import merge_over

# For a quick look, set EPOCHS=4 in the environment; digits.py has checked it.
EPOCHS = int(os.environ.get("EPOCHS", "12"))  # of phase two
MOST_EPOCHS = 2 * EPOCHS  # of phase one, if it does not come to its training accuracy
SEEDS = (0, 1, 2)
NOISES = {"clean": 0.0, "noisy": 0.2}  # shares of wrong training labels
# Chosen with seeds 100 and 101. The rate of phase two is constant: if it decays to 0, workers come to about the same
# weights, and their mean is no better than one of them.
STOP = 0.9  # the training accuracy that ends phase one, as a share of the right labels
LARGE_BATCH, LARGE_RATE = 250, 0.3
SMALL_BATCH, SMALL_RATE = 50, 0.1


@dataclass
class Result:
    """Test accuracies of one training, the same on all ranks."""

    large: list[float] = field(default_factory=list)  # after each epoch of phase one
    workers: list[list[float]] = field(default_factory=list)  # of each worker, after each epoch of phase two
    swap: list[float] = field(default_factory=list)  # of the mean of the workers' weights at that epoch
    decayed: list[float] = field(default_factory=list)  # of each worker, had its rate decayed to 0

    def finals(self) -> dict[str, float]:
        """Return the accuracies at the end, in the order of the table."""
        return {
            "large batches: phase one": self.large[-1],
            "a worker, mean of all": statistics.mean(self.workers[-1]),
            "the best worker": max(self.workers[-1]),
            "SWAP: the workers' average": self.swap[-1],
            "a worker with a decaying rate, mean of all": statistics.mean(self.decayed),
        }


def make_optimizer(model: nn.Module, rate: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-2)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    batch_size: int,
    order: torch.Generator,
    part: slice = slice(None),
) -> float:
    """Train for an epoch on this rank's part of each batch; return the share of the part that was classified right."""
    model.train()
    images = shifted(split.train_images.cpu(), 1, order).to(split.train_images.device)
    hits = []
    for batch in torch.randperm(len(images), generator=order).split(batch_size):
        logits, labels = model(images[batch[part]]), split.train_labels[batch[part]]
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        hits.append(logits.argmax(1) == labels)
    return torch.cat(hits).double().mean().item()


def of_all_ranks(value: float) -> list[float]:
    values: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def train_together(model: nn.Module, split: Split, goal: float, seed: int) -> list[float]:
    """Phase one: all ranks train one model, each on its part of a large batch. Return the test accuracies."""
    part = slice(dist.get_rank(), None, dist.get_world_size())
    together = DistributedDataParallel(model)
    optimizer = make_optimizer(together, LARGE_RATE)
    order = torch.Generator().manual_seed(seed)  # the same on all ranks
    found, reached = [], 0.0
    while reached < goal and len(found) < MOST_EPOCHS:
        own = train_epoch(together, optimizer, split, LARGE_BATCH, order, part)
        reached = statistics.mean(of_all_ranks(own))  # so all ranks stop at once
        found.append(score(model, split, len(found)).accuracy)
    return found


def train_alone(model: nn.Module, split: Split, seed: int, result: Result) -> None:
    """Phase two: this rank trains on, without DDP. Ranks meet only to average, here at each epoch, to draw it."""
    optimizer = make_optimizer(model, SMALL_RATE)
    order = order_of_worker(seed)
    for epoch in range(EPOCHS):
        train_epoch(model, optimizer, split, SMALL_BATCH, order)
        result.workers.append(of_all_ranks(score(model, split, epoch).accuracy))
        averaged = FusedAveragedModel(model)
        averaged.update_parameters(model)  # one model of each worker, so the mean is equal
        merge_over(averaged)
        result.swap.append(score(averaged, split, epoch).accuracy)  # after update_bn, as all scores


def train_decayed(model: nn.Module, split: Split, seed: int) -> list[float]:
    """For comparison: a phase two that needs no average. Return the test accuracy of each worker."""
    optimizer = make_optimizer(model, SMALL_RATE)
    scheduler = CosineAnnealingLR(optimizer, EPOCHS)
    order = order_of_worker(seed)
    for _ in range(EPOCHS):
        train_epoch(model, optimizer, split, SMALL_BATCH, order)
        scheduler.step()
    return of_all_ranks(score(model, split, EPOCHS).accuracy)


def order_of_worker(seed: int) -> torch.Generator:
    """Return the generator of batches and shifts, another one on each rank."""
    return torch.Generator().manual_seed(1000 * (seed + 1) + dist.get_rank())


def run(seed: int, noise: float, device: torch.device) -> Result:
    split = digits_split(seed, Settings(label_noise=noise))
    split = Split(*(tensor.to(device) for tensor in vars(split).values()))
    torch.manual_seed(seed)
    model, result = digits_cnn(8).to(device), Result()
    result.large = train_together(model, split, STOP * (1 - noise), seed)
    result.decayed = train_decayed(copy.deepcopy(model), split, seed)
    train_alone(model, split, seed, result)
    return result


def print_table(results: dict[str, list[Result]]) -> None:
    for name, of_seeds in results.items():
        for seed, result in zip(SEEDS, of_seeds, strict=True):
            finals = ", ".join(f"{method} {accuracy:.2%}" for method, accuracy in result.finals().items())
            print(f"{name}, seed {seed}: phase one took {len(result.large)} epochs; {finals}")
    table = Table(title=f"{EPOCHS} epochs of phase two, mean of {len(SEEDS)} seeds", title_justify="left")
    table.add_column("test accuracy")
    for name in results:
        table.add_column(name, justify="right")
    for method, *accuracies in zip(*(means(of_seeds) for of_seeds in results.values()), strict=True):
        table.add_row(method[0], f"{method[1]:.1%}", *(f"{accuracy:.1%}" for _, accuracy in accuracies))
    Console().print(table)


def means(results: list[Result]) -> list[tuple[str, float]]:
    """Return each method with its mean accuracy of all seeds."""
    finals = [result.finals() for result in results]
    return [(method, statistics.mean(each[method] for each in finals)) for method in finals[0]]


# The picture

COLOURS = {"large": "#E69F00", "worker": "#8C8C8C", "swap": "#0072B2"}
INK, GREY = "#222222", "#555555"
BEFORE = 6  # epochs of phase one that are shown: the accuracies before are far lower
LEAST, MOST = 84, 100  # percent


def draw(results: dict[str, list[Result]], out: Path) -> None:
    """Draw test accuracies against the epochs from the end of phase one on, for each share of wrong labels."""
    figure = Figure(figsize=(12.5, 6.4), dpi=120, facecolor="white")
    workers = len(results["clean"][0].workers[0])
    figure.text(0.05, 0.93, f"SWAP: {workers} workers and their average", fontsize=17, fontweight="bold", color=INK)
    about = (
        f"Test accuracy on handwritten digits, %. Phase one: one training with batches of {LARGE_BATCH}. Phase two: the"
        f" workers go on alone, with batches of {SMALL_BATCH}.\n"
        f"Thin: each of {len(SEEDS)} seeds. Thick: the mean. Test labels are always right."
    )
    figure.text(0.05, 0.905, about, fontsize=11, color=GREY, va="top", linespacing=1.5)
    for place, (name, of_seeds) in enumerate(results.items()):
        axes = figure.add_axes((0.05 + 0.49 * place, 0.1, 0.445, 0.63))
        _draw_curves(axes, of_seeds)
        found = dict(means(of_seeds))
        worker, swap = found["a worker, mean of all"], found["SWAP: the workers' average"]
        labels = "right labels" if NOISES[name] == 0 else f"{NOISES[name]:.0%} wrong labels"
        title = f"With {labels}: a worker {worker:.1%}, the average {swap:.1%}"
        axes.set_title(title, loc="left", fontsize=13, color=INK, pad=12)
        if place == 0:
            axes.legend(frameon=False, loc="upper left", fontsize=11)
    figure.savefig(out, format="png")


def _draw_curves(axes: Axes, results: list[Result]) -> None:
    epochs = range(1, EPOCHS + 1)
    for result in results:
        large = [100 * accuracy for accuracy in result.large]
        axes.plot(range(1 - len(large), 1), large, color=COLOURS["large"], lw=1.5)
        for worker in zip(*result.workers, strict=True):
            axes.plot((0, *epochs), [large[-1], *(100 * x for x in worker)], color=COLOURS["worker"], lw=0.5)
        axes.plot((0, *epochs), [large[-1], *(100 * x for x in result.swap)], color=COLOURS["swap"], lw=0.8)
    of_workers = zip(*(map(statistics.mean, result.workers) for result in results), strict=True)
    of_swap = zip(*(result.swap for result in results), strict=True)
    axes.plot([], [], color=COLOURS["large"], lw=1.5, label="phase one")
    for label, kind, of_seeds in (("a worker", "worker", of_workers), ("the average", "swap", of_swap)):
        percents = [100 * statistics.mean(each) for each in of_seeds]
        axes.plot(epochs, percents, color=COLOURS[kind], lw=3, label=label)
    axes.axvline(0, color="#B0B0B0", lw=1, ls=(0, (4, 3)))
    axes.set(ylim=(LEAST, MOST), xlim=(-min(BEFORE, MOST_EPOCHS), EPOCHS + 0.2))
    axes.set_xlabel("epochs of phase two", color=GREY, fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#EEEEEE")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=11)


def main(device: torch.device) -> None:
    torch.set_num_threads(1)  # a network this small gains nothing from more
    results = {name: [run(seed, noise, device) for seed in SEEDS] for name, noise in NOISES.items()}
    if dist.get_rank() == 0:
        names = ["swafast-swap.png", "swafast-swap.json"]
        picture, numbers = (Path(name) for name in sys.argv[1:] + names[len(sys.argv) - 1 :])
        print_table(results)
        found = {name: [asdict(result) for result in of_seeds] for name, of_seeds in results.items()}
        numbers.write_text(json.dumps(found, indent=1) + "\n")
        draw(results, picture)
        print(f"picture: {picture}, results: {numbers}")


if __name__ == "__main__":
    on_all_ranks(main)
