"""What the demo measured: as a record, as JSON, as a table and as sentences."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__
from .cost import Cost
from .settings import Settings
from .surface import Plane
from .training import METHODS, SeedResult

# (a, b): each pair is compared seed by seed. The second of them shows what the averaging does, the rate being the same.
COMPARISONS = (("swa", "sgd"), ("swa", "iterate"), ("ema", "sgd"))


@dataclass(frozen=True)
class DemoResult:
    """All that one call of the demo measured."""

    settings: Settings
    seeds: list[SeedResult]
    costs: list[Cost]
    plane: Plane
    seconds: float  # wall time, imports left out

    def accuracies(self, method: str) -> list[float]:
        """Final test accuracies in [0, 1], one a seed."""
        return [seed.curves[method][-1].accuracy for seed in self.seeds]


@dataclass(frozen=True)
class Comparison:
    """Differences in test accuracy between two methods, seed by seed, in percentage points."""

    mean: float
    standard_error: float | None  # None for a single seed
    better: int  # seeds on which the first is better
    equal: int


def compare(result: DemoResult, method: str, other: str) -> Comparison:
    """Subtract the accuracies of ``other`` from those of ``method``, seed by seed."""
    pairs = zip(result.accuracies(method), result.accuracies(other), strict=True)
    points = [100 * (a - b) for a, b in pairs]
    error = statistics.stdev(points) / len(points) ** 0.5 if len(points) > 1 else None
    better = sum(point > 0 for point in points)
    return Comparison(statistics.mean(points), error, better, sum(point == 0 for point in points))


def print_report(result: DemoResult, console: Console) -> None:
    """Print the task, the two tables and the comparisons."""
    console.print(f"\n{describe_task(result)}\n", highlight=False)
    console.print(_accuracy_table(result))
    console.print("\nSeed by seed, mean difference ± its standard error:")
    for method, other in COMPARISONS:
        console.print(_sentence(result, method, other), highlight=False)
    console.print()
    console.print(_cost_table(result))
    console.print()


def describe_task(result: DemoResult) -> str:
    """Say in a few sentences what was trained and tested."""
    settings = result.settings
    num_tests = len(result.seeds[0].split.test_labels)
    return (
        "Handwritten digits of 8x8 pixels, a task made hard so that averaging can matter:"
        f" {settings.num_train} to train on, {settings.label_noise:.0%} of them with a wrong label,"
        f" shifted by up to {settings.max_shift} px; {num_tests:,} others, with true labels, to test on."
        f" {settings.epochs} epochs; the average starts after {settings.start_epoch}. Learning rate and weight decay"
        " were chosen for plain SGD, on validation images."
    )


def _accuracy_table(result: DemoResult) -> Table:
    table = Table("Method", title=f"Test accuracy over {len(result.seeds)} seeds, %", title_justify="left")
    for heading in ("Mean", "Std", "Min", "Max"):
        table.add_column(heading, justify="right")
    for method, title in METHODS.items():
        accuracies = [100 * accuracy for accuracy in result.accuracies(method)]
        figures = (statistics.mean(accuracies), _spread(accuracies), min(accuracies), max(accuracies))
        table.add_row(title, *(f"{figure:.2f}" for figure in figures))
    return table


def _cost_table(result: DemoResult) -> Table:
    table = Table("Average", "Kept by", title="What keeping an average of this network costs", title_justify="left")
    for heading in ("Time per update, us", "Bytes held"):
        table.add_column(heading, justify="right")
    for cost in result.costs:
        table.add_row(cost.method.upper(), cost.keeper, f"{cost.seconds * 1e6:.0f}", f"{cost.nbytes:,}")
    return table


def _spread(values: list[float]) -> float:
    """Sample standard deviation; 0 for a single seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _sentence(result: DemoResult, method: str, other: str) -> str:
    comparison = compare(result, method, other)
    count = len(result.seeds)
    error = comparison.standard_error
    spread = "" if error is None else f" ± {error:.2f}"
    ties = f", equal on {comparison.equal}" if comparison.equal else ""
    return (
        f"{method.upper()} minus {METHODS[other]}: {comparison.mean:+.2f}{spread} points, "
        f"better on {comparison.better} of {count} seeds{ties}"
    )


def to_json(result: DemoResult) -> dict[str, Any]:
    """Give every number of the result, and what it ran on, as plain JSON values."""
    return {
        "settings": asdict(result.settings),
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
        "comparisons": {f"{a} - {b}": asdict(compare(result, a, b)) for a, b in COMPARISONS},
        "costs": [asdict(cost) for cost in result.costs],
        "curves": [_curves(seed) for seed in result.seeds],
        "plane": asdict(result.plane),
    }


def _curves(seed: SeedResult) -> dict[str, Any]:
    return {"seed": seed.seed, **{name: [asdict(score) for score in curve] for name, curve in seed.curves.items()}}
