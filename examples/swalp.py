"""SWALP, training in a few bits, and what an average adds to it: ``python examples/swalp.py [PICTURE.png]``.

First the paper's least squares: weights of 8 bits wander around the solution, and their average comes nearer to it than
any weights of 8 bits are. Then a network on handwritten digits, of which weights, gradients, momentum, activations and
errors have 5 bits. It needs the extra ``swafast[demo]`` (scikit-learn, matplotlib).
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from swafast import FusedAveragedModel, update_bn
from swafast.demo.task import Settings, Split, digits_split, shifted
from swafast.demo.training import digits_cnn
from swafast.optim import BlockRounding, LowPrecision, LowPrecisionMean, block_quantize

# For a quick look, set EPOCHS=4 in the environment.
try:
    EPOCHS = int(os.environ.get("EPOCHS", "32"))
    # True labels. Of two rates and two SWA rates, three other seeds gave these the best average.
    SETTINGS = Settings(num_seeds=3, epochs=EPOCHS, learning_rate=0.3, weight_decay=5e-4, label_noise=0, swa_rate=1)
except ValueError as error:
    sys.exit(f"EPOCHS does not fit: {error}")
BITS = 5  # of weights, gradients, momentum, activations and errors
AVERAGE_BITS = 8  # of the average that is not in float32
DECAYED, LAST, MEAN, MEAN_LOW = (
    "SGD, decayed rate, at 75%",
    "SGD, at the end",
    "average in float32",
    f"average in {AVERAGE_BITS} bits",
)

Scores = dict[tuple[str, int | None], float]  # test accuracy, by row of the table and bits; None: float32


def network(bits: int | None) -> nn.Sequential:
    """The network of the demo, with a rounding of activations and errors after each activation function."""
    layers = digits_cnn(SETTINGS.width)
    if bits is None:
        return layers
    rounded = [(layer, BlockRounding(bits)) if isinstance(layer, nn.ReLU) else (layer,) for layer in layers]
    return nn.Sequential(*(each for pair in rounded for each in pair))


def rate_at(step: int) -> float:
    """The learning rate's share of the first one, as in the authors' code: it decays to 1%, and then jumps."""
    done = step / (SETTINGS.start_epoch * SETTINGS.steps_per_epoch)
    if done >= 1:
        return SETTINGS.swa_rate
    return 1 if done <= 0.5 else max(0.01, 1 - 0.99 * (done - 0.5) / 0.4)


@torch.no_grad()
def score(model: nn.Module, split: Split) -> float:
    """Return the test accuracy of a copy, without rounded activations and with BatchNorm statistics of its own."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, BlockRounding):
            layer.bits = None
    update_bn([split.train_images], model)
    hits = model.eval()(split.test_images).argmax(1) == split.test_labels
    return hits.double().mean().item()


def train(seed: int, bits: int | None) -> Scores:
    split = digits_split(seed, SETTINGS)
    torch.manual_seed(seed)
    model = network(bits)
    options = {"momentum": SETTINGS.momentum, "weight_decay": SETTINGS.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), SETTINGS.learning_rate, **options)
    if bits is not None:
        LowPrecision(optimizer, bits, seed=seed)  # before attach: averages get the quantised weights
    averages = {
        MEAN: FusedAveragedModel(model),
        MEAN_LOW: FusedAveragedModel(model, multi_avg_fn=LowPrecisionMean(AVERAGE_BITS, seed=seed)),
    }
    start = SETTINGS.start_epoch * SETTINGS.steps_per_epoch
    for name, averaged in averages.items():
        averaged.attach(optimizer, start=start + SETTINGS.steps_per_epoch, every=SETTINGS.steps_per_epoch, name=name)
    scheduler = LambdaLR(optimizer, rate_at)
    generator = torch.Generator().manual_seed(seed)
    scores: Scores = {}
    for epoch in range(SETTINGS.epochs):
        if epoch == SETTINGS.start_epoch:
            scores[DECAYED, bits] = score(model, split)
        images = shifted(split.train_images, SETTINGS.max_shift, generator)
        order = torch.randperm(len(images), generator=generator)
        for batch in order.split(SETTINGS.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), split.train_labels[batch]).backward()
            optimizer.step()
            scheduler.step()
    return {**scores, **{(name, bits): score(each, split) for name, each in {LAST: model, **averages}.items()}}


def run(seed: int) -> Scores:
    return {**train(seed, None), **train(seed, BITS)}


def means(results: list[Scores]) -> Scores:
    return {key: statistics.mean(result[key] for result in results) for key in results[0]}


def print_table(results: list[Scores]) -> None:
    title = f"Test accuracy: {SETTINGS.epochs} epochs, mean of {len(results)} seeds"
    table = Table(title=title, title_justify="left")
    for column in ("", "float32", f"{BITS} bits"):
        table.add_column(column, justify="right" if column else "left")
    mean = means(results)
    for name in (DECAYED, LAST, MEAN, MEAN_LOW):
        table.add_row(name, *(f"{mean[name, bits]:.2%}" for bits in (None, BITS)))
    Console().print(table)


# Least squares

DIMS, SAMPLES, LEAST_SQUARES_BITS = 64, 16, 8
UPDATES = 10_000 if EPOCHS > 20 else 1_000  # 10 s on one core
EVERY = 20


def least_squares() -> tuple[list[int], list[float], list[float], float]:
    """Return counts of models, errors of their average, errors of the newest, and the error of the nearest weights.

    An error is the mean squared distance to the solution, over a row for each seed. The largest weight of each solution
    lies between 1 and 2, so that 8 bits have steps of 2^-6.
    """
    rows = [torch.rand(DIMS, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in range(3)]
    solution = torch.stack(rows)
    solution[:, 0] = 1.4
    generator = torch.Generator().manual_seed(3)
    model = nn.ParameterList([torch.zeros_like(solution)])
    weights = model[0]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    LowPrecision(optimizer, LEAST_SQUARES_BITS)
    averaged = FusedAveragedModel(model)
    averaged.attach(optimizer, start=200)  # once the zeros at the start are forgotten

    def error(values: Tensor) -> float:
        return (values.detach().double() - solution).square().sum(1).mean().item()

    counts, of_average, of_newest = [], [], []
    for step in range(200 + UPDATES):
        x = torch.randn(len(rows), SAMPLES, DIMS, generator=generator)
        residuals = torch.einsum("rnd,rd->rn", x, weights.detach() - solution)
        weights.grad = torch.einsum("rn,rnd->rd", residuals, x) / SAMPLES
        optimizer.step()
        count = step - 198  # models in the average, which has its first after step 200
        if count > 0 and count % EVERY == 0:
            counts.append(count)
            of_average.append(error(averaged.module[0]))
            of_newest.append(error(weights))
    return counts, of_average, of_newest, error(block_quantize(solution, LEAST_SQUARES_BITS, rounding="nearest"))


# The picture

BLUE, GREY, INK, PALE = "#0072B2", "#A8A8A8", "#222222", "#555555"


def draw(found: tuple[list[int], list[float], list[float], float], results: list[Scores], out: Path) -> None:
    """Draw errors of least squares against the number of models, and the accuracy of each seed on the digits."""
    figure = Figure(figsize=(12.5, 6), dpi=120, facecolor="white")
    left, right = figure.add_axes((0.065, 0.12, 0.4, 0.62)), figure.add_axes((0.7, 0.12, 0.2, 0.62))
    mean = means(results)
    gain = 100 * (mean[MEAN, BITS] - mean[LAST, BITS])
    figure.text(
        0.065,
        0.92,
        "The average of weights of a few bits is more exact than they are",
        fontsize=18,
        fontweight="bold",
        color=INK,
    )
    about = (
        "Grey: what a training in a few bits ends with. Blue: the average of its weights. On the digits, the average"
        f" of {BITS}-bit weights gains {gain:.1f} points."
    )
    figure.text(0.065, 0.875, about, fontsize=11.5, color=PALE)
    draw_errors(left, *found)
    draw_accuracy(right, results)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#B0B0B0")
        axes.tick_params(colors=PALE, labelsize=11)
    figure.savefig(out, format="png")


def draw_errors(axes: Axes, counts: list[int], of_average: list[float], of_newest: list[float], floor: float) -> None:
    axes.loglog(counts, of_newest, color=GREY, lw=0.8)
    axes.loglog(counts, of_average, color=BLUE, lw=2.5)
    axes.axhline(floor, color=INK, lw=1, ls=(0, (4, 3)))
    last = counts[-1]
    axes.annotate("8-bit weights", (last, 2.2 * max(of_newest[-20:])), ha="right", color=PALE, fontsize=11.5)
    axes.annotate("the nearest 8-bit weights", (last, 1.15 * floor), ha="right", color=INK, fontsize=11.5)
    place = len(counts) // 3
    axes.annotate("their average", (counts[place], of_average[place] / 3.5), ha="right", color=BLUE, fontsize=11.5)
    axes.set_ylim(of_average[-1] / 2, 8 * max(of_newest[-20:]))
    axes.set_xlabel("models in the average", color=PALE, fontsize=11)
    axes.set_title("Least squares: squared distance to the solution", loc="left", fontsize=13, color=INK, pad=14)


def draw_accuracy(axes: Axes, results: list[Scores]) -> None:
    mean = means(results)
    rows = [(name, bits) for bits in (None, BITS) for name in (DECAYED, LAST, MEAN, MEAN_LOW)]
    for place, key in enumerate(rows):
        colour = BLUE if key[0] in (MEAN, MEAN_LOW) else GREY
        axes.scatter(
            [100 * result[key] for result in results], [place] * len(results), s=40, color=colour, alpha=0.55, lw=0
        )
        axes.plot([100 * mean[key]] * 2, [place - 0.3, place + 0.3], color=colour, lw=4)
        where = ("axes fraction", "data")
        axes.annotate(f"{mean[key]:.1%}", (1.08, place), xycoords=where, va="center", color=INK, fontsize=12)
    axes.axhline(3.5, color="#DDDDDD", lw=1, zorder=0)
    labels = [f"{'float32' if bits is None else f'{bits} bits'}: {name}" for name, bits in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("higher is better", color=PALE, fontsize=11)
    axes.set_title("Digits: test accuracy, %", loc="left", fontsize=13, color=INK, pad=14)


def main(picture: Path) -> None:
    torch.set_num_threads(1)  # a network this small gains nothing from more
    results = [run(seed) for seed in range(SETTINGS.num_seeds)]
    print_table(results)
    found = least_squares()
    counts, of_average, of_newest, floor = found
    print(
        f"Least squares, squared distance to the solution: the average of {counts[-1]} models {of_average[-1]:.1e},"
        f" the last model {of_newest[-1]:.1e}, the nearest {LEAST_SQUARES_BITS}-bit weights {floor:.1e}"
    )
    draw(found, results, picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("swafast-swalp.png"))
