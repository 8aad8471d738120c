"""How sure a model is, and how often it is right: ``python examples/swag.py [PICTURE.png [RESULTS.json]]``.

SGD, SWA, SWAG-diagonal and SWAG of one training, and a deep ensemble, MultiSWA and MultiSWAG of three, on handwritten
digits. A fifth of all labels is wrong, also of those to test on: a model that knows this is at most 80 % sure. The
training is long enough to learn wrong labels by heart. After six epochs few predictions are too sure, and samples leave
the NLL about the same. It needs the extra ``swafast[swag]`` (torchmetrics, scikit-learn, matplotlib).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from swafast import FusedAveragedModel
from swafast.demo.task import Settings, Split
from swafast.demo.training import train_seed

try:
    import sklearn  # noqa: F401  # the task reads the digits of it
    from calibration import BINS, Scores, advancing, mean, means, noisy_split, predict, print_table, score
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    sys.exit(f"{error}: pip install '.[swag]' in a clone of swafast")

# For a quick look, set EPOCHS=8 in the environment.
try:
    if (EPOCHS := int(os.environ.get("EPOCHS", "60"))) < 5:
        raise ValueError(f"it must be at least 5, got {EPOCHS}: samples need two models of the last quarter")
    # With the demo's own rate of 0.3 and decay of 1e-2, which were chosen for SGD, SWAG lowers the NLL less, and its
    # ECE is worse than that of SWA.
    SETTINGS = Settings(num_seeds=3, epochs=EPOCHS, learning_rate=0.1, weight_decay=1e-3, test_every=EPOCHS)
except ValueError as error:
    sys.exit(f"EPOCHS does not fit: {error}")
MEMBERS = 3  # trainings of the deep ensemble, of MultiSWA and of MultiSWAG
SAMPLES = 20  # of each SWAG


@dataclass(frozen=True)
class Member:
    """One training: its model at the decayed rate, that at the SWA rate, and the averages of the latter."""

    sgd: nn.Module
    swa: nn.Module
    iterate: nn.Module
    swag: FusedAveragedModel
    diagonal: FusedAveragedModel


def train(seed: int, split: Split, on_epoch: Callable[[], object]) -> Member:
    """Train as the demo does, and update two averages after each epoch at the SWA rate."""
    averages: list[FusedAveragedModel] = []

    def collect(branch: str, epoch: int, model: nn.Module) -> None:
        if branch == "iterate":
            if not averages:
                averages.extend(FusedAveragedModel(model, deviations=count) for count in (20, 0))
            for averaged in averages:
                averaged.update_parameters(model)
        on_epoch()

    models = train_seed(seed, split, SETTINGS, collect).models
    return Member(models["sgd"], models["swa"], models["iterate"], *averages)


def predictions(averaged: FusedAveragedModel, model: nn.Module, first: int, split: Split) -> Iterator[Tensor]:
    """Yield the predictions of samples; ``model`` lends its tensors, and has its own values again afterwards."""
    for index in range(first, first + SAMPLES):
        with averaged.sampled_into(model, index) as sample:
            yield predict(sample, split)


def predict_all(members: list[Member], split: Split) -> dict[str, Tensor]:
    """Return the predictions of each method, in the order of the table."""
    first = members[0]
    # All members have one seed, and each goes on with the index: samples with one index have the same random numbers.
    swag = [mean(predictions(m.swag, m.iterate, SAMPLES * place, split)) for place, m in enumerate(members)]
    return {
        "SGD": predict(first.sgd, split),
        "SWA": predict(first.swa, split),
        "SWAG-diagonal": mean(predictions(first.diagonal, first.iterate, 0, split)),
        "SWAG": swag[0],
        "deep ensemble": mean(predict(member.sgd, split) for member in members),
        "MultiSWA": mean(predict(member.swa, split) for member in members),
        "MultiSWAG": mean(swag),
    }


@dataclass(frozen=True)
class Result:
    """What one seed gave: scores by method, and how sure its predictions are and whether they are right."""

    scores: dict[str, Scores]
    confidence: dict[str, Tensor]  # (num_tests,) of the class with the largest probability
    right: dict[str, Tensor]  # (num_tests,) bool


def run(seed: int, on_epoch: Callable[[], object] = lambda: None) -> Result:
    split = noisy_split(seed, SETTINGS)
    members = [train(MEMBERS * seed + member, split, on_epoch) for member in range(MEMBERS)]
    predicted = predict_all(members, split)
    best = {method: probabilities.max(1) for method, probabilities in predicted.items()}
    return Result(
        {method: score(probabilities, split.test_labels) for method, probabilities in predicted.items()},
        {method: values for method, (values, _) in best.items()},
        {method: classes == split.test_labels for method, (_, classes) in best.items()},
    )


def measure() -> list[Result]:
    """Run all seeds, with a progress bar on stderr."""
    torch.set_num_threads(1)  # a network this small gains nothing from more
    epochs = MEMBERS * (2 * SETTINGS.epochs - SETTINGS.start_epoch)
    with advancing("Training", SETTINGS.num_seeds, epochs) as begin:
        return [run(seed, begin(seed)) for seed in range(SETTINGS.num_seeds)]


# The picture

# Grey: without samples, blue: with samples. Light: one training, dark: three. The blues are Okabe and Ito's.
COLOURS = {
    **dict.fromkeys(("SGD", "SWA"), "#A8A8A8"),
    **dict.fromkeys(("SWAG-diagonal", "SWAG"), "#56B4E9"),
    **dict.fromkeys(("deep ensemble", "MultiSWA"), "#606060"),
    "MultiSWAG": "#0072B2",
}
CURVES = ("SWA", "SWAG", "MultiSWA", "MultiSWAG")
CURVE_BINS = 10
SURE = 0.9
LEAST_IN_BIN = 30  # test images; the share of fewer is mere chance
LEFT = 0.06
INK, GREY = "#222222", "#555555"


def draw(results: list[Result], out: Path) -> None:
    """Draw how often predictions are right against how sure they are, and the NLL of each method."""
    figure = Figure(figsize=(12.5, 6.6), dpi=120, facecolor="white")
    reliability, likelihood = figure.add_axes((LEFT, 0.1, 0.36, 0.62)), figure.add_axes((0.585, 0.1, 0.275, 0.62))
    nll = {method: scores["NLL"] for method, scores in means(results).items()}
    words = ",   ".join(f"{one} {nll[one]:.2f} → {one}G {nll[one + 'G']:.2f}" for one in ("SWA", "MultiSWA"))
    figure.text(LEFT, 0.925, f"Test NLL:  {words}", fontsize=18, fontweight="bold", color=INK)
    about = (
        f"Handwritten digits. {SETTINGS.label_noise:.0%} of all labels are wrong, also of those to test on:"
        f" no method can be right much more often than {1 - SETTINGS.label_noise:.0%}.\n"
        f"Grey: without samples; blue: mean predictions of {SAMPLES} samples. Light: one training; dark: {MEMBERS}."
        f" {SETTINGS.epochs} epochs, {len(results)} seeds."
    )
    figure.text(LEFT, 0.895, about, fontsize=11, color=GREY, va="top", linespacing=1.5)
    draw_reliability(reliability, results)
    draw_likelihood(likelihood, results)
    for axes in (reliability, likelihood):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#B0B0B0")
        axes.tick_params(colors=GREY, labelsize=11)
    figure.savefig(out, format="png")


def draw_reliability(axes: Axes, results: list[Result]) -> None:
    """Draw, for some methods, the share of right predictions among those that are about as sure."""
    axes.plot([0, 100], [0, 100], color=INK, lw=1, ls=(0, (4, 3)), zorder=0)
    axes.axhline(100 * (1 - SETTINGS.label_noise), color="#DDDDDD", lw=1, zorder=0)
    for method in CURVES:
        confidence = torch.cat([result.confidence[method] for result in results])
        right = torch.cat([result.right[method] for result in results]).float()
        place = (confidence * CURVE_BINS).long().clamp(max=CURVE_BINS - 1)
        bins = [place == each for each in range(CURVE_BINS) if int((place == each).sum()) >= LEAST_IN_BIN]
        x, y = ([100 * values[each].mean().item() for each in bins] for values in (confidence, right))
        label = f"{method}: {(confidence > SURE).double().mean():.0%} are over {SURE:.0%} sure"
        axes.plot(x, y, "o-", color=COLOURS[method], lw=2, ms=6.5, label=label)
    axes.set(xlim=(20, 101), ylim=(20, 101))
    axes.annotate(
        "as sure as right", (94, 96), rotation=42, rotation_mode="anchor", ha="right", color=GREY, fontsize=10
    )
    axes.set_xlabel("how sure it is, %", color=GREY, fontsize=11)
    axes.set_title("How often a prediction is right, %", loc="left", fontsize=13, color=INK, pad=14)
    axes.legend(frameon=False, loc="lower right", fontsize=11)


def draw_likelihood(axes: Axes, results: list[Result]) -> None:
    """Draw the NLL of each method: a dot for each seed, and a bar at their mean."""
    where = ("axes fraction", "data")
    for name, x in (("NLL", 1.06), ("ECE", 1.24)):
        axes.annotate(name, (x, 1.03), xycoords="axes fraction", color=GREY, fontsize=11.5)
    for place, (method, scores) in enumerate(means(results).items()):
        values = [result.scores[method]["NLL"] for result in results]
        axes.scatter(values, [place] * len(values), s=40, color=COLOURS[method], alpha=0.55, lw=0, zorder=2)
        axes.plot([scores["NLL"]] * 2, [place - 0.3, place + 0.3], color=COLOURS[method], lw=4, zorder=3)
        for text, x in ((f"{scores['NLL']:.2f}", 1.06), (f"{scores['ECE']:.1%}", 1.24)):
            axes.annotate(text, (x, place), xycoords=where, va="center", color=INK, fontsize=12)
    axes.axhline(3.5, color="#DDDDDD", lw=1, zorder=0)
    axes.set_yticks(range(len(COLOURS)), means(results))
    axes.invert_yaxis()
    axes.set_xlabel("lower is better", color=GREY, fontsize=11)
    axes.set_title("Negative log-likelihood, nats", loc="left", fontsize=13, color=INK, pad=14)


def main(picture: Path, numbers: Path) -> None:
    results = measure()
    print_table(results, SETTINGS)
    settings = {**asdict(SETTINGS), "members": MEMBERS, "samples": SAMPLES, "bins": BINS}
    found = {"settings": settings, "mean": means(results), "seeds": [result.scores for result in results]}
    numbers.write_text(json.dumps(found, indent=1) + "\n")
    draw(results, picture)
    print(f"picture: {picture}, results: {numbers}")


if __name__ == "__main__":
    names = ["swafast-swag.png", "swafast-swag.json"]
    main(*(Path(name) for name in sys.argv[1:] + names[len(sys.argv) - 1 :]))
