"""The recipes of weight averaging, on handwritten digits: ``python examples/recipes.py``.

Each recipe is a function that trains one model and returns the model to use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, SequentialLR
from torch.optim.swa_utils import SWALR

from swafast import FusedAveragedModel, update_bn
from swafast.demo.task import Settings, digits_split, shifted
from swafast.demo.training import digits_cnn
from swafast.optim import SWA, ComposerSWA, cyclical_cosine_lr, cyclical_lr

# For a quick look, set EPOCHS=4 in the environment.
try:
    SETTINGS = Settings(epochs=int(os.environ.get("EPOCHS", "24")))
except ValueError as error:
    sys.exit(f"EPOCHS does not fit: {error}")
STEPS_PER_EPOCH = SETTINGS.steps_per_epoch
STEPS = SETTINGS.epochs * STEPS_PER_EPOCH
START = 3 * STEPS // 4  # of averaging
SPLIT = digits_split(0, SETTINGS)


def begin() -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(0)
    model = digits_cnn(SETTINGS.width)
    options = {"momentum": SETTINGS.momentum, "weight_decay": SETTINGS.weight_decay}
    return model, torch.optim.SGD(model.parameters(), SETTINGS.learning_rate, **options)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all batches of a training, the same for each recipe."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(SETTINGS.epochs):
        images = shifted(SPLIT.train_images, SETTINGS.max_shift, generator)
        order = torch.randperm(len(images), generator=generator)
        for batch in order.split(SETTINGS.batch_size)[:STEPS_PER_EPOCH]:
            yield images[batch], SPLIT.train_labels[batch]


def train(model: nn.Module, optimizer: Optimizer, after_step: Callable[[int], None] = lambda step: None) -> None:
    """Train, and call ``after_step`` with the number of each step, counted from 0."""
    for step, (images, labels) in enumerate(batches()):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        after_step(step)


def plain() -> nn.Module:
    """SGD with a cosine down to 0: the baseline."""
    model, optimizer = begin()
    scheduler = CosineAnnealingLR(optimizer, STEPS)
    train(model, optimizer, lambda step: scheduler.step())
    return model


def swalr() -> nn.Module:
    """torch's SWA: ``SWALR`` keeps the rate constant once averaging has started."""
    model, optimizer = begin()
    averaged = FusedAveragedModel(model)
    averaged.attach(optimizer, start="0.75dur", every="1ep", duration=STEPS, steps_per_epoch=STEPS_PER_EPOCH)
    decay = CosineAnnealingLR(optimizer, STEPS)
    swa = SWALR(optimizer, swa_lr=0.25 * SETTINGS.learning_rate, anneal_epochs=5)
    train(model, optimizer, lambda step: (decay if step < START else swa).step())
    return averaged


def torchcontrib() -> nn.Module:
    """torchcontrib's SWA: an optimizer that averages the params which another one trains."""
    model, base = begin()
    optimizer = SWA(base, swa_start=START, swa_freq=STEPS_PER_EPOCH, swa_lr=0.25 * SETTINGS.learning_rate)
    train(model, optimizer)
    optimizer.swap_swa_sgd()
    return model


def composer() -> nn.Module:
    """Composer's SWA: the average of the last quarter replaces the model one epoch before the end."""
    model, optimizer = begin()
    scheduler = CosineAnnealingLR(optimizer, STEPS)
    end = f"{SETTINGS.epochs - 1}ep"
    start = f"{SETTINGS.epochs * 3 // 4 - 1}ep"
    clock = {"max_duration": f"{SETTINGS.epochs}ep", "steps_per_epoch": STEPS_PER_EPOCH}
    ComposerSWA(FusedAveragedModel(model), optimizer, swa_start=start, swa_end=end, **clock)
    train(model, optimizer, lambda step: scheduler.step())
    return model


def fge() -> nn.Module:
    """FGE's triangular cycles: the average of the models at the lowest rates."""
    model, optimizer = begin()
    averaged, cycle = FusedAveragedModel(model), 2 * STEPS_PER_EPOCH
    averaged.attach(optimizer, start=START + cycle // 2, every=cycle)
    high = SETTINGS.learning_rate
    cycles = cyclical_lr(optimizer, max_lr=0.5 * high, min_lr=0.01 * high, cycle=cycle)
    scheduler = SequentialLR(optimizer, [CosineAnnealingLR(optimizer, STEPS), cycles], milestones=[START])
    train(model, optimizer, lambda step: scheduler.step())
    return averaged


def fast_swa() -> nn.Module:
    """fast-SWA: a cosine whose end repeats, and the average of several models of each cycle."""
    model, optimizer = begin()
    averaged, cycle = FusedAveragedModel(model), 2 * STEPS_PER_EPOCH
    averaged.attach(optimizer, start=START, every=cycle // 4)
    rate = SETTINGS.learning_rate
    scheduler = cyclical_cosine_lr(optimizer, max_lr=rate, anneal=STEPS, until=START, cycle=cycle)
    train(model, optimizer, lambda step: scheduler.step())
    return averaged


RECIPES: tuple[Callable[[], nn.Module], ...] = (plain, swalr, torchcontrib, composer, fge, fast_swa)


@torch.no_grad()
def score(model: nn.Module) -> tuple[float, float]:
    """Return accuracy and loss on the test images, with BatchNorm statistics that fit the weights."""
    update_bn(SPLIT.train_images.split(SETTINGS.batch_size), model)
    logits = model.eval()(SPLIT.test_images)
    hits = logits.argmax(1) == SPLIT.test_labels
    return hits.double().mean().item(), F.cross_entropy(logits, SPLIT.test_labels).item()


def main() -> None:
    torch.set_num_threads(1)  # a network this small gains nothing from more
    table = Table(title=f"After {SETTINGS.epochs} epochs of {STEPS_PER_EPOCH} steps")
    for column in ("recipe", "accuracy", "loss"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for recipe in RECIPES:
        accuracy, loss = score(recipe())
        table.add_row(recipe.__name__, f"{accuracy:.1%}", f"{loss:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
