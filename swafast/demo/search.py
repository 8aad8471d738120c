"""The search behind the demo's learning rate and weight decay: ``python -m swafast.demo.search``, 6 minutes on a core.

Plain SGD, the baseline, gets the pair that gives it the best mean accuracy on validation images, taken from the
training images of seeds that the demo does not use. SWA and EMA are shown beside it and inherit the pair.
"""

from __future__ import annotations

import statistics
from itertools import product

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .data import validation_split
from .settings import Settings
from .training import METHODS, train_seed

LEARNING_RATES = (0.03, 0.1, 0.3)
WEIGHT_DECAYS = (5e-3, 1e-2, 2e-2, 4e-2)
# The demo counts its seeds from 0.
SEEDS = range(1000, 1008)


def validation_accuracies(learning_rate: float, weight_decay: float, seeds: range) -> dict[str, float]:
    """Train every method; the mean validation accuracy of each."""
    # Only the last epoch counts here.
    epochs = Settings.epochs
    settings = Settings(learning_rate=learning_rate, weight_decay=weight_decay, epochs=epochs, test_every=epochs)
    results = [train_seed(seed, validation_split(seed, settings), settings) for seed in seeds]
    return {method: statistics.mean(result.final(method).accuracy for result in results) for method in METHODS}


def main() -> None:
    """Print the validation accuracy of every pair."""
    table = Table("learning rate", "weight decay", *METHODS.values(), title="Validation accuracy, %")
    for rate, decay in track(list(product(LEARNING_RATES, WEIGHT_DECAYS))):
        accuracies = validation_accuracies(rate, decay, SEEDS)
        table.add_row(str(rate), str(decay), *(f"{100 * accuracies[method]:.2f}" for method in METHODS))
    Console().print(table)


if __name__ == "__main__":
    main()
