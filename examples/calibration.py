"""What ``swag.py`` and ``subspace.py`` share: the test labels, predictions and their scores, progress and the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
from torchmetrics.text import Perplexity

from swafast import update_bn
from swafast.demo.task import NUM_CLASSES, Settings, Split, digits_split, mislabelled

BINS = 20  # of the calibration error, as in the paper of SWAG

Scores = dict[str, float]  # "accuracy", "NLL" and "ECE"


class Scored(Protocol):
    """What one seed gave: the scores of each method, among others."""

    @property
    def scores(self) -> Mapping[str, Scores]: ...


def noisy_split(seed: int, settings: Settings) -> Split:
    """Return the digits with a share of all labels wrong, also of those to test on."""
    split = digits_split(seed, settings)
    generator = torch.Generator().manual_seed(seed)
    return replace(split, test_labels=mislabelled(split.test_labels, settings.label_noise, generator))


@torch.no_grad()
def predict(model: nn.Module, split: Split) -> Tensor:
    """Return the probability of each class, (num_tests, 10), with BatchNorm statistics that fit the weights."""
    update_bn([split.train_images], model)
    return model.eval()(split.test_images).softmax(1)


def mean(each: Iterable[Tensor]) -> Tensor:
    return torch.stack([*each]).mean(0)


def score(probabilities: Tensor, labels: Tensor) -> Scores:
    """Return the accuracy, the mean negative log-likelihood in nats, and the expected calibration error."""
    accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")
    calibration = MulticlassCalibrationError(NUM_CLASSES, n_bins=BINS)
    perplexity = Perplexity()  # exp(NLL), which torchmetrics has for sequences of tokens alone
    return {
        "accuracy": accuracy(probabilities, labels).item(),
        "NLL": perplexity(probabilities.log()[None], labels[None]).log().item(),
        "ECE": calibration(probabilities, labels).item(),
    }


def means(results: Sequence[Scored]) -> dict[str, Scores]:
    """Return the mean of the seeds for each method and score."""
    first = results[0].scores
    return {
        method: {name: statistics.mean(result.scores[method][name] for result in results) for name in scores}
        for method, scores in first.items()
    }


@contextmanager
def advancing(what: str, num_seeds: int, epochs: int) -> Iterator[Callable[[int], Callable[[], None]]]:
    """Show a progress bar on stderr. Yield what begins a seed, and returns the function to call after each epoch."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=num_seeds * epochs)

        def begin(seed: int) -> Callable[[], None]:
            progress.update(task, description=f"{what}, seed {seed + 1} of {num_seeds}")
            return lambda: progress.advance(task)

        yield begin


def print_table(results: Sequence[Scored], settings: Settings) -> None:
    table = Table(title=f"{settings.epochs} epochs, {len(results)} seeds", title_justify="left")
    for column in ("method", "accuracy", "NLL", "ECE"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, scores in means(results).items():
        table.add_row(method, f"{scores['accuracy']:.1%}", f"{scores['NLL']:.3f}", f"{scores['ECE']:.1%}")
    Console().print(table)
