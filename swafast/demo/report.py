"""The demo's results as tables, as sentences and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from .. import __version__
from .measurements import DemoResult
from .training import METHODS

# Pairs to compare seed by seed. The second pair shows the effect of averaging alone, at the same learning rate.
COMPARISONS = (("swa", "sgd"), ("swa", "iterate"), ("ema", "sgd"))


@dataclass(frozen=True)
class Comparison:
    """Differences in test accuracy between two methods over the seeds, in percentage points."""

    mean: float
    standard_error: float | None  # None for a single seed
    better: int  # number of seeds on which the first method is better
    equal: int  # number of seeds on which both are equal


def compare(result: DemoResult, method: str, other: str) -> Comparison:
    """Subtract the accuracies of ``other`` from those of ``method``, seed by seed."""
    points = [100 * (a - b) for a, b in zip(result.accuracies(method), result.accuracies(other), strict=True)]
    error = statistics.stdev(points) / len(points) ** 0.5 if len(points) > 1 else None
    return Comparison(statistics.mean(points), error, sum(point > 0 for point in points), points.count(0))


def print_report(result: DemoResult, console: Console) -> None:
    """Print the task, a table of accuracies, the comparisons and a table of costs."""
    console.print(f"\n{describe_task(result)}\n", highlight=False)
    table = _table(f"Test accuracy over {len(result.seeds)} seeds, %", ("Method",), ("Mean", "Std", "Min", "Max"))
    for method, title in METHODS.items():
        values = [100 * accuracy for accuracy in result.accuracies(method)]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        figures = (statistics.mean(values), spread, min(values), max(values))
        table.add_row(title, *(f"{figure:.2f}" for figure in figures))
    console.print(table)
    console.print("\nSeed by seed, mean difference ± its standard error:")
    for method, other in COMPARISONS:
        found = compare(result, method, other)
        error = "" if found.standard_error is None else f" ± {found.standard_error:.2f}"
        ties = f", equal on {found.equal}" if found.equal else ""
        difference = f"{method.upper()} minus {METHODS[other]}: {found.mean:+.2f}{error} points"
        console.print(f"{difference}, better on {found.better} of {len(result.seeds)} seeds{ties}", highlight=False)
    title = "What keeping an average of this network costs"
    table = _table(title, ("Average", "Kept by"), ("Time per update, us", "Bytes held"))
    for cost in result.costs:
        table.add_row(cost.method.upper(), cost.keeper, f"{cost.seconds * 1e6:.0f}", f"{cost.nbytes:,}")
    console.print("", table, "", sep="\n")


def _table(title: str, words: Iterable[str], figures: Iterable[str]) -> Table:
    """Make a table with columns of words on the left and columns of figures on the right."""
    return Table(*words, *(Column(name, justify="right") for name in figures), title=title, title_justify="left")


def describe_task(result: DemoResult) -> str:
    """Describe the training and test data, the epochs and the baseline's tuning in a few sentences."""
    settings = result.settings
    num_tests = len(result.seeds[0].split.test_labels)
    return (
        "Handwritten digits of 8x8 pixels, a task made hard so that averaging can matter:"
        f" {settings.num_train} to train on, {settings.label_noise:.0%} of them with a wrong label,"
        f" shifted by up to {settings.max_shift} px; {num_tests:,} others, with true labels, to test on."
        f" {settings.epochs} epochs; the average starts after {settings.start_epoch}. Learning rate and weight decay"
        " were chosen for plain SGD, on validation images."
    )


def to_json(result: DemoResult) -> dict[str, Any]:
    """Return all numbers and the environment for JSON; dataclasses in it are still to be turned into dicts."""
    return {
        "settings": result.settings,
        "environment": {
            "swafast": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "seconds": result.seconds,
        "accuracy": {method: result.accuracies(method) for method in METHODS},
        "comparisons": {f"{a} - {b}": compare(result, a, b) for a, b in COMPARISONS},
        "costs": result.costs,
        "curves": [{"seed": seed.seed, **seed.curves} for seed in result.seeds],
        "plane": result.plane,
    }
