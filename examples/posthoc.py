"""Post-hoc EMA: train once with two power averages, and choose the width afterwards: ``python examples/posthoc.py``.

``--cost MILLIONS`` measures how long it takes to save and to synthesize averages of that many million params.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from swafast import FusedAverages, PowerAverage, Snapshots
from swafast.demo.task import Settings, digits_split, shifted
from swafast.demo.training import digits_cnn, score

SETTINGS = Settings(epochs=80)
LEARNING_RATE = 0.15
STORED = {"narrow": PowerAverage.from_sigma_rel(0.05), "wide": PowerAverage.from_sigma_rel(0.10)}
EVERY = 20  # updates from one snapshot to the next
WIDTHS = (0.05, 0.075, 0.10, 0.15, 0.20, 0.25)

State = dict[str, Tensor]


def train(snapshots: Snapshots) -> tuple[State, dict[float, State]]:
    """Train, and return the model's last state and the states of averages of each width that ran along."""
    split, generator = digits_split(0, SETTINGS), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = digits_cnn(SETTINGS.width)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=SETTINGS.weight_decay)
    stored = FusedAverages(model, rules=STORED)
    direct = FusedAverages(model, rules={f"{1000 * width:.0f}": PowerAverage.from_sigma_rel(width) for width in WIDTHS})
    updates = 0
    for _ in range(SETTINGS.epochs):
        images = shifted(split.train_images, SETTINGS.max_shift, generator)
        for batch in torch.randperm(len(images), generator=generator).split(SETTINGS.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), split.train_labels[batch]).backward()
            optimizer.step()
            stored.update_parameters(model)
            direct.update_parameters(model)
            updates += 1
            if updates % EVERY == 0:
                snapshots.save(stored)
    states = (average.averaged_state_dict() for average in direct.values())
    return model.state_dict(), dict(zip(WIDTHS, states, strict=True))


def distance(a: State, b: State) -> float:
    """Return the L2 distance of the params."""
    names = [name for name, _ in digits_cnn(SETTINGS.width).named_parameters()]
    return float(torch.cat([(a[name] - b[name]).flatten() for name in names]).norm())


def accuracy(state: State) -> str:
    """Test a state with new BatchNorm statistics, which every average needs."""
    model = digits_cnn(SETTINGS.width)
    model.load_state_dict(state)
    return f"{score(model, digits_split(0, SETTINGS), SETTINGS.epochs).accuracy:.1%}"


def report() -> None:
    table = Table(title="Averages by width, put together after training", title_justify="left")
    for column in ("sigma_rel", "accuracy", "had it run along", "params off by", "profile off by"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        snapshots = Snapshots(folder)
        last, direct = train(snapshots)
        zero = dict.fromkeys(last, torch.zeros(()))
        for width, truth in direct.items():
            rule = PowerAverage.from_sigma_rel(width)
            given = snapshots.synthesize(rule)
            off = distance(given, truth) / distance(truth, zero)
            table.add_row(
                f"{width:g}", accuracy(given), accuracy(truth), f"{off:.1e}", f"{snapshots.fit(rule).residual:.1e}"
            )
    table.caption = f"The model's last params: {accuracy(last)}. {len(STORED)} averages stored every {EVERY} updates."
    Console().print(table)


def cost(millions: int, count: int = 8) -> None:
    """Print how many seconds a save of two averages takes, and a synthesis from ``count`` such snapshots."""
    model = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(millions)))
    stored = FusedAverages(model, rules=STORED)
    saves = []
    with tempfile.TemporaryDirectory() as folder:
        snapshots = Snapshots(folder)
        for _ in range(count):
            stored.update_parameters(model)
            start = time.perf_counter()
            snapshots.save(stored)
            saves.append(time.perf_counter() - start)
        nbytes = sum(path.stat().st_size for path in snapshots.folder.rglob("*") if path.is_file())
        start = time.perf_counter()
        snapshots.synthesize(PowerAverage.from_sigma_rel(0.07))
        synthesis = time.perf_counter() - start
    print(f"{millions} M params: {nbytes / count / 1e6:.0f} MB and {statistics.median(saves):.2f} s a snapshot,")
    print(f"{synthesis:.2f} s for a synthesis from {count} of them, {nbytes / synthesis / 1e9:.2f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cost", type=int, metavar="MILLIONS")
    millions = parser.parse_args().cost
    if millions is None:
        report()
    else:
        cost(millions)


if __name__ == "__main__":
    main()
