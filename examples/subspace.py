"""A posterior over five directions of SWAG: ``python examples/subspace.py [PICTURE.png [RESULTS.json]]``.

Subspace inference of one training on handwritten digits: the directions in which SWAG's deviations vary most, with
elliptical slice sampling and, where Pyro is installed, NUTS, which follows gradients. Beside them SWA, SWAG and random
directions. The task is that of ``swag.py``: a fifth of all labels is wrong, also of those to test on. It needs the
extra ``swafast[subspace]`` (torchmetrics, scikit-learn, matplotlib, Pyro).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swafast import FusedAveragedModel
from swafast.average.subspace import Subspace
from swafast.demo.task import Settings, Split
from swafast.demo.training import train_seed
from swafast.posthoc import random_subspace

try:
    import sklearn  # noqa: F401  # the task reads the digits of it
    from calibration import Scores, advancing, mean, means, noisy_split, predict, print_table, score
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    sys.exit(f"{error}: pip install '.[subspace]' in a clone of swafast")
try:
    import pyro
    from pyro.infer import MCMC, NUTS
except ImportError:
    pyro = None

# For a quick look, set EPOCHS=12 in the environment.
try:
    if (EPOCHS := int(os.environ.get("EPOCHS", "60"))) < 12:
        raise ValueError(f"it must be at least 12, got {EPOCHS}: two directions need three models of the last quarter")
    # As in swag.py: with the demo's own rate and decay predictions are not too sure, and samples gain less.
    SETTINGS = Settings(num_seeds=3, epochs=EPOCHS, learning_rate=0.1, weight_decay=1e-3, test_every=EPOCHS)
except ValueError as error:
    sys.exit(f"EPOCHS does not fit: {error}")
SAMPLES = 30  # of each method, as in the authors' code
WARMUP = 15  # steps of NUTS that choose its step size
RANK = 5  # directions; fewer if the training is too short
TEMPERATURE = 100.0  # divides the log-likelihood of all training images
PRIOR_STD = 1.0  # in each coordinate, whose direction is one standard deviation of the deviations long
GRID = 25  # points of the picture in each direction


def train(seed: int, split: Split, on_epoch: Callable[[], object]) -> tuple[nn.Module, FusedAveragedModel]:
    """Train as the demo does, and average after each epoch at the SWA rate. Return the model too."""
    averages: list[FusedAveragedModel] = []

    def collect(branch: str, epoch: int, model: nn.Module) -> None:
        if branch == "iterate":
            if not averages:
                averages.append(FusedAveragedModel(model, deviations=20))
            averages[0].update_parameters(model)
        on_epoch()

    return train_seed(seed, split, SETTINGS, collect).models["iterate"], averages[0]


# The posterior


@dataclass(frozen=True)
class Posterior:
    """The density over the coordinates of a subspace: that of the training labels, flattened, times a normal prior."""

    subspace: Subspace
    model: nn.Module
    split: Split
    temperature: float = TEMPERATURE

    def loss(self, placed: nn.Module) -> Tensor:
        # In training mode BatchNorm normalises by the statistics of the batch. All images are one batch, so the density
        # is the same each time, and the gradient goes through the statistics.
        logits = placed.train()(self.split.train_images)
        return F.cross_entropy(logits, self.split.train_labels, reduction="sum") / self.temperature

    @torch.no_grad()
    def log_likelihood(self, t: Tensor) -> float:
        with self.subspace.placed_into(self.model, t) as placed:
            return -self.loss(placed).item()

    def log_density(self, t: Tensor) -> float:
        return self.log_likelihood(t) - 0.5 * float(t.square().sum()) / PRIOR_STD**2

    def potential(self, values: dict[str, Tensor]) -> Tensor:
        """Return minus the log density, as Pyro wants it: a function of ``t`` that autograd can follow."""
        t = values["t"]
        return Loss.apply(t, self) + 0.5 * t.square().sum() / PRIOR_STD**2

    def predictions(self, samples: Tensor) -> Tensor:
        """Return the mean prediction of the models at these coordinates."""
        return mean(self._each_prediction(samples))

    def _each_prediction(self, samples: Tensor) -> Iterator[Tensor]:
        for t in samples:
            with self.subspace.placed_into(self.model, t) as placed:
                yield predict(placed, self.split)


class Loss(torch.autograd.Function):
    """The loss at ``t`` as one operation of autograd. Its gradient is the subspace's."""

    @staticmethod
    def forward(context: Any, t: Tensor, posterior: Posterior) -> Tensor:
        with posterior.subspace.placed_into(posterior.model, t) as placed, torch.enable_grad():
            loss = posterior.loss(placed)
            loss.backward()
            context.gradient = posterior.subspace.gradient(placed).to(t.dtype)
        return loss.detach().to(t.dtype)

    @staticmethod
    def backward(context: Any, outer: Tensor) -> tuple[Tensor, None]:
        return outer * context.gradient, None


def by_slices(posterior: Posterior, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return posterior.subspace.elliptical_slice(posterior.log_likelihood, PRIOR_STD, SAMPLES, generator)


def by_nuts(posterior: Posterior, seed: int) -> Tensor:
    pyro.set_rng_seed(seed)
    kernel = NUTS(potential_fn=posterior.potential, max_tree_depth=4)
    start = {"t": torch.zeros(posterior.subspace.rank, dtype=torch.float64)}
    chain = MCMC(kernel, SAMPLES, WARMUP, initial_params=start, disable_progbar=True)
    chain.run()
    return chain.get_samples()["t"]


# Methods and scores


def of_swag(averaged: FusedAveragedModel, model: nn.Module, split: Split) -> Iterator[Tensor]:
    for index in range(SAMPLES):
        with averaged.sampled_into(model, index) as sample:
            yield predict(sample, split)


def through_random(averaged: FusedAveragedModel, model: nn.Module, like: Subspace, seed: int) -> Subspace:
    """Return random directions, each as long as the first two of ``like`` are in the mean, as in the authors' code."""
    scale = like.scales[:2].mean().item()
    return random_subspace(model, averaged.averaged_state_dict(), like.rank, scale=scale, seed=seed)


def predict_all(averaged: FusedAveragedModel, model: nn.Module, split: Split, seed: int) -> dict[str, Tensor]:
    """Return the predictions of each method, in the order of the table."""
    # The first deviation is 0, and so there is one direction less than deviations.
    rank = min(RANK, int(averaged.n_averaged) - 1)
    principal = Posterior(averaged.subspace(rank), model, split)
    random = Posterior(through_random(averaged, model, principal.subspace, seed), model, split)
    with averaged.swapped_into(model):
        swa = predict(model, split)
    found = {
        "SWA": swa,
        "SWAG": mean(of_swag(averaged, model, split)),
        "random directions, slices": random.predictions(by_slices(random, seed)),
        "subspace, slices": principal.predictions(by_slices(principal, seed)),
    }
    if pyro is not None:
        found["subspace, NUTS"] = principal.predictions(by_nuts(principal, seed))
    return found


@dataclass(frozen=True)
class Trained:
    """One training, and the scores of each method on it."""

    model: nn.Module
    averaged: FusedAveragedModel
    split: Split
    scores: dict[str, Scores]


def run(seed: int, on_epoch: Callable[[], object] = lambda: None) -> Trained:
    split = noisy_split(seed, SETTINGS)
    # The first training of each seed in swag.py.
    model, averaged = train(3 * seed, split, on_epoch)
    found = predict_all(averaged, model, split, seed)
    return Trained(model, averaged, split, {name: score(each, split.test_labels) for name, each in found.items()})


def measure() -> list[Trained]:
    """Run all seeds, with a progress bar on stderr."""
    torch.set_num_threads(1)  # a network this small gains nothing from more
    with advancing("Training and sampling", SETTINGS.num_seeds, 2 * SETTINGS.epochs - SETTINGS.start_epoch) as begin:
        return [run(seed, begin(seed)) for seed in range(SETTINGS.num_seeds)]


# The picture

# Okabe and Ito's orange and blues, on shades of grey. Light blue: random directions, dark blue: the subspace.
COLOURS = {
    "SWA": "#A8A8A8",
    "SWAG": "#606060",
    "random directions, slices": "#56B4E9",
    "subspace, slices": "#0072B2",
    "subspace, NUTS": "#0072B2",
}
PATH, INK, GREY = "#D55E00", "#222222", "#555555"
LEFT = 0.05
HALF_WIDTH = 4.0  # of a plane, in standard deviations of the prior: the trajectory reaches 2
#: Nats below the highest density, and the shade above each but the last.
LEVELS = (-40.0, -20.0, -10.0, -5.0, -2.5, -1.0, 0.0)
SHADES = ("#F4F4F4", "#E6E6E6", "#D6D6D6", "#C4C4C4", "#B0B0B0", "#989898")


def heights(posterior: Posterior) -> Tensor:
    """Return the log density at the points of a grid, (GRID, GRID): a row for each value of the second coordinate."""
    line = torch.linspace(-HALF_WIDTH, HALF_WIDTH, GRID, dtype=torch.float64)
    rows = [[posterior.log_density(torch.stack((x, y))) for x in line] for y in line]
    return torch.tensor(rows)


def draw(results: Sequence[Trained], out: Path) -> None:
    """Draw the posterior over the plane of the first two directions of the first training, and all NLLs."""
    first = results[0]
    tempered = Posterior(first.averaged.subspace(2), first.model, first.split)
    figure = Figure(figsize=(14.4, 6.3), dpi=120, facecolor="white")
    nll = {method: scores["NLL"] for method, scores in means(results).items()}
    words = f"Test NLL:  SWA {nll['SWA']:.2f} → a posterior over {RANK} directions {nll['subspace, slices']:.2f}"
    figure.text(LEFT, 0.925, words, fontsize=18, fontweight="bold", color=INK)
    count = len(first.split.train_labels)
    about = (
        f"Handwritten digits, {SETTINGS.label_noise:.0%} of all labels wrong. Left: the posterior over the plane in"
        " which the deviations vary most; samples of it by elliptical slices.\n"
        f"At temperature {TEMPERATURE:.0f} the {count} training images count as {count / TEMPERATURE:.0f}, so the prior"
        f" shapes it. Right: mean predictions of {SAMPLES} samples in {RANK} directions; a dot for each of"
        f" {len(results)} seeds."
    )
    figure.text(LEFT, 0.895, about, fontsize=11, color=GREY, va="top", linespacing=1.5)
    for number, posterior in enumerate((replace(tempered, temperature=1.0), tempered)):
        axes = figure.add_axes((LEFT + 0.3 * number, 0.1, 0.265, 0.605))
        shades = draw_plane(axes, posterior)
        axes.set_title(f"temperature {posterior.temperature:.0f}", loc="left", fontsize=13, color=INK, pad=10)
        axes.set_xlabel("first coordinate", color=GREY, fontsize=11)
        if not number:
            axes.set_ylabel("second coordinate", color=GREY, fontsize=11)
    bar = figure.colorbar(shades, cax=figure.add_axes((LEFT + 0.577, 0.1, 0.009, 0.605)), ticks=LEVELS)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=GREY, labelsize=10, length=0)
    bar.set_label("log density, nats below its highest", color=GREY, fontsize=10)
    draw_likelihood(figure.add_axes((0.815, 0.1, 0.125, 0.605)), results)
    figure.savefig(out, format="png")


def draw_plane(axes: Axes, posterior: Posterior) -> Any:
    """Draw the density over a plane as shades, the way of the deviations, and samples. Return the shades."""
    line, grid = torch.linspace(-HALF_WIDTH, HALF_WIDTH, GRID).tolist(), heights(posterior)
    shades = axes.contourf(line, line, (grid - grid.max()).tolist(), levels=LEVELS, colors=SHADES)
    way = posterior.subspace.trajectory
    axes.plot(way[:, 0], way[:, 1], "-", color=PATH, lw=1.4, zorder=2)
    axes.plot(way[:, 0], way[:, 1], "o", color=PATH, ms=5, mec="white", mew=0.6, zorder=3, label="deviations")
    axes.annotate("last", way[-1].tolist(), (6, -12), textcoords="offset points", color=PATH, fontsize=10)
    samples = by_slices(posterior, 0)
    blue = COLOURS["subspace, slices"]
    axes.plot(samples[:, 0], samples[:, 1], "o", color=blue, ms=6, mec="white", mew=0.7, zorder=4, label="samples")
    axes.plot(0, 0, "X", color=INK, ms=10, mec="white", mew=1, zorder=5, label="SWA")
    axes.set(xlim=(-HALF_WIDTH, HALF_WIDTH), ylim=(-HALF_WIDTH, HALF_WIDTH), aspect="equal")
    axes.tick_params(colors=GREY, labelsize=10)
    for spine in axes.spines.values():
        spine.set_color("#B0B0B0")
    axes.legend(loc="lower left", fontsize=10, framealpha=0.9, edgecolor="none")
    return shades


def draw_likelihood(axes: Axes, results: Sequence[Trained]) -> None:
    """Draw the NLL of each method: a dot for each seed, and a bar at their mean."""
    found = means(results)
    for place, (method, scores) in enumerate(found.items()):
        values = [result.scores[method]["NLL"] for result in results]
        axes.scatter(values, [place] * len(values), s=36, color=COLOURS[method], alpha=0.55, lw=0, zorder=2)
        axes.plot([scores["NLL"]] * 2, [place - 0.27, place + 0.27], color=COLOURS[method], lw=4, zorder=3)
        text = f"{scores['NLL']:.2f}"
        axes.annotate(text, (1.06, place), xycoords=("axes fraction", "data"), va="center", color=INK, fontsize=12)
    axes.set(ylim=(len(found) - 0.5, -0.5), yticks=range(len(found)))
    axes.set_yticklabels([method.replace(", ", ",\n") for method in found], fontsize=11, color=INK)
    axes.set_title("NLL on the test images", loc="left", fontsize=13, color=INK, pad=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#B0B0B0")
    axes.tick_params(colors=GREY, labelsize=11, left=False)
    axes.tick_params(axis="y", colors=INK)
    axes.grid(axis="x", color="#EEEEEE")
    axes.set_axisbelow(True)


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "subspace.png")
    measured = measure()
    print_table(measured, SETTINGS)
    if pyro is None:
        print("subspace, NUTS: skipped, since Pyro is not installed: pip install '.[subspace]' in a clone of swafast")
    draw(measured, out)
    print(f"picture: {out}")
    if len(sys.argv) > 2:
        described = {"settings": asdict(SETTINGS), "scores": [result.scores for result in measured]}
        Path(sys.argv[2]).write_text(json.dumps(described, indent=1) + "\n")
