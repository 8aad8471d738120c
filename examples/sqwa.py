"""SQWA, weights of two bits from the average of several such models: ``python examples/sqwa.py [PICTURE.png]``.

Five stages on handwritten digits, of which a fifth of the training labels is wrong: a training in float32, a
quantisation, a training of the quantised weights with a cyclical rate, the average of the models at the ends of its
cycles, and that average quantised again and trained at a low rate. It is a reading of the abstract of the paper, which
has no public code. It needs the extra ``swafast[demo]`` (scikit-learn, matplotlib).
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler

from swafast import FusedAveragedModel, update_bn
from swafast.demo.task import Settings, Split, digits_split, shifted
from swafast.demo.training import digits_cnn
from swafast.optim import cyclical_cosine_lr, quantize_weights, quantized_copy, requantize

# For a quick look, set EPOCHS=4 in the environment.
try:
    SETTINGS = Settings(num_seeds=3, epochs=int(os.environ.get("EPOCHS", "24")))  # of the training in float32
except ValueError as error:
    sys.exit(f"EPOCHS does not fit: {error}")
BITS = 2  # of each weight of convolutions and of the last layer: three values
CAPTURED = 7  # models in the average, as in the paper with 2 bits
CYCLE = max(1, SETTINGS.epochs // 6)  # epochs from one of them to the next
CYCLE_RATE, TUNE_RATE = SETTINGS.learning_rate / 3, SETTINGS.learning_rate / 100
FLOAT, DIRECT, LAST, MEAN, AGAIN, TUNED = (
    "trained in float32",
    "quantised",
    "last captured",
    "average of captured, float32",
    "average, quantised again",
    "fine-tuned",
)

Scores = dict[str, float]  # test accuracy by stage


@dataclass
class Training:
    """A model, its data and the order of its batches."""

    model: nn.Module
    split: Split
    generator: torch.Generator

    def optimizer(self, rate: float) -> SGD:
        options = {"momentum": SETTINGS.momentum, "weight_decay": SETTINGS.weight_decay}
        return SGD(self.model.parameters(), rate, **options)

    def train(self, epochs: int, optimizer: SGD, scheduler: LRScheduler) -> None:
        for _ in range(epochs):
            images = shifted(self.split.train_images, SETTINGS.max_shift, self.generator)
            order = torch.randperm(len(images), generator=self.generator)
            for batch in order.split(SETTINGS.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(self.model(images[batch]), self.split.train_labels[batch]).backward()
                optimizer.step()
                scheduler.step()


@torch.no_grad()
def score(model: nn.Module, split: Split) -> float:
    """Return the test accuracy of a copy, with BatchNorm statistics that fit its weights."""
    model = copy.deepcopy(model)
    update_bn([split.train_images], model)
    hits = model.eval()(split.test_images).argmax(1) == split.test_labels
    return hits.double().mean().item()


def run(seed: int, weights: dict[str, Tensor] | None = None) -> Scores:
    """Go through the stages. ``weights`` gets those of the last convolution, by stage."""
    split = digits_split(seed, SETTINGS)
    torch.manual_seed(seed)
    training = Training(digits_cnn(SETTINGS.width), split, torch.Generator().manual_seed(seed))
    model, scores = training.model, {}

    def note(stage: str, current: nn.Module) -> None:
        scores[stage] = score(current, split)
        if weights is not None:
            convolutions = [each for each in current.modules() if isinstance(each, nn.Conv2d)]
            weights[stage] = convolutions[-1].weight.detach().flatten().clone()

    optimizer = training.optimizer(SETTINGS.learning_rate)
    steps = SETTINGS.epochs * SETTINGS.steps_per_epoch
    training.train(SETTINGS.epochs, optimizer, CosineAnnealingLR(optimizer, steps))
    note(FLOAT, model)

    quantize_weights(model, BITS)
    note(DIRECT, model)

    cycle = CYCLE * SETTINGS.steps_per_epoch
    optimizer = training.optimizer(CYCLE_RATE)
    scheduler = cyclical_cosine_lr(optimizer, max_lr=CYCLE_RATE, anneal=cycle, until=cycle, cycle=cycle)
    averaged = FusedAveragedModel(quantized_copy(model))
    for _ in range(CAPTURED):
        training.train(CYCLE, optimizer, scheduler)
        averaged.update_parameters(quantized_copy(model))  # its quantised weights, not the float ones behind them
    note(LAST, model)
    note(MEAN, averaged.module)

    requantize(model, averaged.module)
    note(AGAIN, model)

    optimizer = training.optimizer(TUNE_RATE)
    training.train(CYCLE, optimizer, ConstantLR(optimizer, factor=1))
    note(TUNED, model)
    return scores


def means(results: list[Scores]) -> Scores:
    return {stage: statistics.mean(result[stage] for result in results) for stage in results[0]}


def print_table(results: list[Scores]) -> None:
    bits = {FLOAT: "32", MEAN: "32"}
    table = Table(title=f"{BITS} bits, mean of {len(results)} seeds", title_justify="left")
    for column in ("stage", "bits", "accuracy"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, accuracy in means(results).items():
        table.add_row(stage, bits.get(stage, str(BITS)), f"{accuracy:.1%}")
    Console().print(table)


# The picture

BLUE, GREY, INK, PALE = "#0072B2", "#A8A8A8", "#222222", "#555555"


def draw(results: list[Scores], weights: dict[str, Tensor], out: Path) -> None:
    """Draw the weights of the last convolution of one seed in three stages, and the accuracy of all stages."""
    figure = Figure(figsize=(12.5, 6), dpi=120, facecolor="white")
    mean = means(results)
    gain = 100 * (mean[AGAIN] - mean[LAST])
    title = f"SQWA: the average, in {BITS} bits again: {gain:+.1f} points on the last model"
    figure.text(0.045, 0.92, title, fontsize=18, fontweight="bold", color=INK)
    about = (
        f"Handwritten digits, {SETTINGS.label_noise:.0%} wrong training labels. The average of {CAPTURED} models has"
        " values between theirs. So it is quantised again, with a step of its own."
    )
    figure.text(0.045, 0.875, about, fontsize=11.5, color=PALE)
    figure.text(
        0.045, 0.015, "How many weights of the last convolution have which value, seed 1", fontsize=11, color=PALE
    )
    limit = 1.5 * max(float(weights[stage].abs().max()) for stage in (LAST, AGAIN))
    for place, stage in enumerate((LAST, MEAN, AGAIN)):
        axes = figure.add_axes((0.045 + 0.155 * place, 0.14, 0.135, 0.6))
        draw_weights(axes, weights[stage], stage, BLUE if place else GREY, limit)
    draw_accuracy(figure.add_axes((0.705, 0.12, 0.21, 0.62)), results)
    figure.savefig(out, format="png")


def draw_weights(axes: Axes, weights: Tensor, stage: str, colour: str, limit: float) -> None:
    values, counts = weights.mul(1e6).round().div(1e6).unique(return_counts=True)  # the average has rounding errors
    axes.bar(values.tolist(), counts.tolist(), width=0.6 * float(values.diff().min()), color=colour)
    axes.set_xlim(-limit, limit)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#B0B0B0")
    axes.tick_params(colors=PALE, labelsize=10)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel(f"{len(values)} values", color=PALE, fontsize=11)
    axes.set_title(stage.replace(", ", ",\n"), loc="left", fontsize=12, color=INK, pad=10)


def draw_accuracy(axes: Axes, results: list[Scores]) -> None:
    mean = means(results)
    for place, (stage, accuracy) in enumerate(mean.items()):
        colour = BLUE if stage in (MEAN, AGAIN, TUNED) else GREY
        values = [100 * result[stage] for result in results]
        axes.scatter(values, [place] * len(values), s=40, color=colour, alpha=0.55, lw=0)
        axes.plot([100 * accuracy] * 2, [place - 0.3, place + 0.3], color=colour, lw=4)
        where = ("axes fraction", "data")
        axes.annotate(f"{accuracy:.1%}", (1.06, place), xycoords=where, va="center", color=INK, fontsize=12)
    axes.set_yticks(range(len(mean)), [stage.replace(", ", ",\n").replace(" of captured", "") for stage in mean])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#B0B0B0")
    axes.tick_params(colors=PALE, labelsize=11)
    axes.set_title("Test accuracy, %", loc="left", fontsize=13, color=INK, pad=14)


def main(picture: Path) -> None:
    torch.set_num_threads(1)  # a network this small gains nothing from more
    weights: dict[str, Tensor] = {}  # of the first seed
    results = [run(seed, None if seed else weights) for seed in range(SETTINGS.num_seeds)]
    print_table(results)
    draw(results, weights, picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("swafast-sqwa.png"))
