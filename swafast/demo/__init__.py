"""The demo: SGD, SWA and EMA of a small network on real handwritten digits, and what an average costs.

``swafast demo`` on the command line, or :func:`run`. It needs the extra ``swafast[demo]`` (scikit-learn, matplotlib).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .cost import update_costs
from .data import digits_split
from .picture import save_picture
from .report import DemoResult, print_report
from .report import to_json as to_json
from .settings import Settings as Settings
from .surface import loss_plane
from .training import train_seed

# The plane through these three solutions is drawn, for the first seed.
PLANE_METHODS = ("swa", "sgd", "ema")


def run(
    settings: Settings,
    out: Path,
    json_file: Path | None = None,
    *,
    console: Console | None = None,  # takes the table; progress goes to stderr
) -> DemoResult:
    """Train, test, time and draw; print a table, and write the picture to ``out`` and the numbers to ``json_file``.

    Runs on one CPU thread: a network this small gains nothing from a second, and on a busy machine loses much.
    The accuracies are the same for the same settings, on one kind of CPU and one version of torch.

    Raises:
        OSError: a file cannot be written.
    """
    console = console or Console()
    with _one_thread():
        result = measure(settings)
        print_report(result, console)
        save_picture(result, out)
        if json_file is not None:
            json_file.write_text(json.dumps(to_json(result), indent=1) + "\n", encoding="utf-8")
    console.print(f"Picture: {out}  (measured in {result.seconds:.0f} s)", highlight=False, soft_wrap=True)
    return result


def measure(settings: Settings) -> DemoResult:
    """Train every seed, time the updates and sample the loss surface, with a progress bar on stderr."""
    start = time.perf_counter()
    seeds = []
    with _progress() as progress:
        epochs_per_seed = 2 * settings.epochs - settings.start_epoch
        task = progress.add_task("", total=settings.num_seeds * epochs_per_seed)
        for seed in range(settings.num_seeds):
            progress.update(task, description=f"Training, seed {seed + 1} of {settings.num_seeds}")
            split = digits_split(seed, settings)
            seeds.append(train_seed(seed, split, settings, lambda *_: progress.advance(task)))
        costs = update_costs(seeds[0].models["iterate"], settings.ema_decay)
        rows = progress.add_task("Sampling the loss surface", total=settings.plane_points)
        plane = loss_plane(seeds[0], PLANE_METHODS, settings.plane_points, lambda: progress.advance(rows))
    return DemoResult(settings, seeds, costs, plane, time.perf_counter() - start)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
