"""Merged checkpoints of a constant learning rate against a decayed rate: ``python examples/merging.py [PICTURE.png]``.

A small transformer learns handwritten digits at a constant rate. At three points a copy of the training decays its rate
instead, as usual. The constant training never decays. It merges its last checkpoints (WSM), here at every epoch.
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from swafast.demo.task import NUM_CLASSES, Settings, Split, digits_split, shifted
from swafast.posthoc import merge

# For a quick look, set EPOCHS=6 in the environment.
try:
    SETTINGS = Settings(epochs=int(os.environ.get("EPOCHS", "48")), num_seeds=5)
except ValueError as error:
    sys.exit(f"EPOCHS does not fit: {error}")
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05
WIDTH = 64
PER_EPOCH = 5  # checkpoints
SPAN = SETTINGS.epochs // 3  # epochs of a decay, or of a merge
ENDS = {SETTINGS.epochs - SPAN, SETTINGS.epochs - SPAN // 2, SETTINGS.epochs}  # the epochs at which decays end

COLOURS = {"constant": "#8C8C8C", "decayed": "#E69F00", "merged": "#0072B2"}
LABELS = {"constant": "constant rate", "decayed": "decayed rate", "merged": "merged checkpoints"}

Curve = dict[int, float]  # test accuracy by epoch


class Transformer(nn.Module):
    """A classifier that reads an image as a sequence of its rows; without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(8, WIDTH))
        layers = [nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True)] * 2
        self.blocks = nn.Sequential(*map(copy.deepcopy, layers))
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 1, 8, 8) -> (batch, 10)
        return self.head(self.blocks(self.embed(images.squeeze(1)) + self.position).mean(1))


@dataclass
class Training:
    """A model in training; a deep copy of it goes on with the same batches."""

    split: Split
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: torch.Generator
    checkpoints: list[dict[str, Tensor]] = field(default_factory=list)

    def epoch(self, rate: Callable[[float], float]) -> float:
        """Train for an epoch, store checkpoints on the way, and return the test accuracy.

        Args:
            rate: the learning rate after a share of the epoch.
        """
        images = shifted(self.split.train_images, SETTINGS.max_shift, self.batches)
        steps = torch.randperm(len(images), generator=self.batches).split(SETTINGS.batch_size)
        for step, batch in enumerate(steps):
            self.optimizer.param_groups[0]["lr"] = rate(step / len(steps))
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images[batch]), self.split.train_labels[batch]).backward()
            self.optimizer.step()
            if (step + 1) % (len(steps) // PER_EPOCH) == 0:
                self.checkpoints.append({name: value.clone() for name, value in self.model.state_dict().items()})
        del self.checkpoints[: -SPAN * PER_EPOCH]
        return self.accuracy(self.model)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        found = model(self.split.test_images).argmax(1) == self.split.test_labels
        return 100 * found.double().mean().item()

    def fork(self) -> Training:
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return Training(self.split, model, optimizer, self.batches.clone_state())


def decayed(start: Training, first: int) -> Curve:
    """Train a copy while the rate decays as ``1 - sqrt(x)``."""
    training = start.fork()
    return {
        first + epoch: training.epoch(lambda x, epoch=epoch: LEARNING_RATE * (1 - math.sqrt((epoch - 1 + x) / SPAN)))  # type: ignore[misc]
        for epoch in range(1, SPAN + 1)
    }


def run(seed: int) -> dict[str, Curve]:
    """Train one seed, and return the curves: constant, merged, and one decayed curve for each of ``ENDS``."""
    torch.manual_seed(seed)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    training = Training(digits_split(seed, SETTINGS), model, optimizer, torch.Generator().manual_seed(seed))
    curves: dict[str, Curve] = {"constant": {}, "merged": {}}
    for epoch in range(1, SETTINGS.epochs + 1):
        if epoch - 1 + SPAN in ENDS:
            curves[f"decayed {epoch - 1 + SPAN}"] = decayed(training, epoch - 1)
        curves["constant"][epoch] = training.epoch(lambda x: LEARNING_RATE)
        if epoch >= SPAN:
            merged = copy.deepcopy(model)
            merged.load_state_dict(merge(training.checkpoints, "1-sqrt"))
            curves["merged"][epoch] = training.accuracy(merged)
    return curves


# The picture


def draw(runs: list[dict[str, Curve]], out: Path) -> None:
    """Draw test accuracies and learning rates over the epochs, and the final accuracies of each seed."""
    figure = Figure(figsize=(12, 6.5), dpi=120, facecolor="white")
    (curves, seeds), (rates, words) = figure.subplots(
        2, 2, gridspec_kw={"width_ratios": (2.4, 1), "height_ratios": (3, 1), "hspace": 0.28, "wspace": 0.16}
    )
    figure.subplots_adjust(left=0.055, right=0.98, top=0.84, bottom=0.085)
    finals = {kind: [each[key][SETTINGS.epochs] for each in runs] for kind, key in _keys().items()}
    means = "   ".join(f"{LABELS[kind]} {np.mean(found):.1f}%" for kind, found in finals.items())
    figure.text(0.055, 0.945, f"Test accuracy:  {means}", fontsize=16, fontweight="bold", color="#222222")
    about = "A decay must be planned: it begins before the end. Checkpoints can be merged at any epoch."
    about = f"{about} Means of {len(runs)} seeds; bands: one standard error."
    figure.text(0.055, 0.905, about, fontsize=10.5, color="#555555")
    for key in runs[0]:
        kind = key.split()[0]
        epochs = sorted(runs[0][key])
        values = np.array([[each[key][epoch] for epoch in epochs] for each in runs])
        mean, error = values.mean(0), values.std(0) / math.sqrt(max(1, len(runs) - 1))
        curves.plot(epochs, mean, color=COLOURS[kind], lw=2.2 if kind != "constant" else 1.2, label=LABELS[kind])
        curves.fill_between(epochs, mean - error, mean + error, color=COLOURS[kind], alpha=0.18, lw=0)
        if kind == "decayed":
            curves.plot(epochs[-1], mean[-1], "o", ms=8, color=COLOURS[kind])
            start = epochs[0] - 1
            x = np.linspace(0, 1, 50)
            rates.plot(start + SPAN * x, 1 - np.sqrt(x), color=COLOURS[kind], lw=2)
    handles = dict(zip(*curves.get_legend_handles_labels()[::-1], strict=True))
    curves.legend(handles.values(), handles.keys(), frameon=False, loc="lower right", fontsize=11)
    means_at = [np.mean([each["constant"][SPAN] for each in runs]), *(np.mean(found) for found in finals.values())]
    curves.set_ylim(min(means_at), max(means_at) + 1.5)
    curves.set_title("Test accuracy, %", loc="left", fontsize=12)
    rates.plot([0, SETTINGS.epochs], [1, 1], color=COLOURS["merged"], lw=2)
    rates.set_title("Learning rate, share of the largest", loc="left", fontsize=12)
    rates.set_xlabel("epoch")
    for axes in (curves, rates):
        axes.set_xlim(0, SETTINGS.epochs + 0.5)
    _draw_seeds(seeds, finals)
    words.bar(range(SPAN * PER_EPOCH), _coefficients(), width=1.0, color=COLOURS["merged"])
    words.set_title("Coefficients, oldest checkpoint first", loc="left", fontsize=12)
    words.set_yscale("log")
    for axes in (curves, seeds, rates, words):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, format="png")


def _keys() -> dict[str, str]:
    return {"constant": "constant", "decayed": f"decayed {SETTINGS.epochs}", "merged": "merged"}


def _coefficients() -> list[float]:
    """Return what each checkpoint weighs in a merge: a merge of the rows of the identity."""
    count = SPAN * PER_EPOCH
    rows = [{"row": row} for row in torch.eye(count)]
    return merge(rows, "1-sqrt")["row"].tolist()


def _draw_seeds(axes, finals: dict[str, list[float]]) -> None:  # type: ignore[no-untyped-def]
    order = np.argsort(finals["decayed"])
    for place, seed in enumerate(order):
        axes.plot([finals["decayed"][seed], finals["merged"][seed]], [place, place], color="#CCCCCC", lw=2, zorder=1)
        for kind in ("decayed", "merged"):
            axes.scatter(finals[kind][seed], place, s=60, color=COLOURS[kind], zorder=2)
    axes.set_yticks(range(len(order)), [f"seed {seed}" for seed in order])
    axes.set_title(f"After {SETTINGS.epochs} epochs, %", loc="left", fontsize=12)


def main(out: Path) -> None:
    torch.set_num_threads(1)  # a network this small gains nothing from more
    runs = []
    for seed in range(SETTINGS.num_seeds):
        runs.append(run(seed))
        spelled = ", ".join(f"{LABELS[kind]} {runs[-1][key][SETTINGS.epochs]:.1f}%" for kind, key in _keys().items())
        print(f"seed {seed}: {spelled}", flush=True)
    means = {kind: np.mean([each[key][SETTINGS.epochs] for each in runs]) for kind, key in _keys().items()}
    print("mean: " + ", ".join(f"{LABELS[kind]} {mean:.1f}%" for kind, mean in means.items()))
    draw(runs, out)
    print(f"picture: {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "swafast-merging.png"))
