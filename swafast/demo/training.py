"""One seed of the demo: SGD with its decaying schedule, and SGD that goes to the SWA learning rate and is averaged.

Both have the same number of epochs, the same initialisation and the same batches in the same order. Up to the epoch at
which averaging starts they are one and the same run, so that is trained once and forked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.optim.swa_utils import SWALR

from .. import EqualAverage, ExponentialAverage, FusedAveragedModel, update_bn
from .data import NUM_CLASSES, Split, shifted
from .settings import Settings

# Every method, in the order of the table. "iterate" is the model that SWA and EMA average, itself.
METHODS = {
    "sgd": "SGD, decaying rate",
    "iterate": "SGD, SWA rate",
    "swa": "SWA of that run",
    "ema": "EMA of that run",
}

EpochHook = Callable[[str, int, nn.Module], None]  # "trunk", "sgd" or "iterate", epoch from 1, live model


@dataclass(frozen=True)
class Score:
    """How one model does on the test images after ``epoch`` epochs."""

    epoch: int
    accuracy: float  # share of the test images
    loss: float  # mean cross-entropy, nats


@dataclass(frozen=True)
class SeedResult:
    """What one seed gave: the scores along training and, by method, the final models in evaluation mode."""

    seed: int
    split: Split
    trunk: list[Score] = field(default_factory=list)  # up to the start of averaging, common to all
    curves: dict[str, list[Score]] = field(default_factory=lambda: {method: [] for method in METHODS})
    models: dict[str, nn.Module] = field(default_factory=dict)

    def final(self, method: str) -> Score:
        return self.curves[method][-1]


def digits_cnn(width: int) -> nn.Sequential:
    """Four 3x3 convolutions with BatchNorm, one pooling between, and a linear head; 15,554 params at width 8."""

    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(
        *block(1, width),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 4 * width),
        *block(4 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, NUM_CLASSES),
    )


def score(model: nn.Module, split: Split, epoch: int) -> Score:
    """Test a model, with BatchNorm's statistics taken anew over the training images.

    An average needs that (its activations are those of no model that was trained), so every method gets it: else the
    comparison would be of statistics as much as of weights.
    """
    update_bn([split.train_images], model)
    model.eval()
    with torch.no_grad():
        logits = model(split.test_images)
    accuracy = (logits.argmax(1) == split.test_labels).double().mean().item()
    return Score(epoch, accuracy, F.cross_entropy(logits, split.test_labels).item())


@dataclass
class _Run:
    """A model in training. A fork goes on from the same params and momentum, with the same batches."""

    split: Split
    settings: Settings
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    batches: torch.Generator

    @classmethod
    def start(cls, seed: int, split: Split, settings: Settings) -> _Run:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = digits_cnn(settings.width)
        optimizer = _sgd(model, settings)
        scheduler = CosineAnnealingLR(optimizer, settings.epochs)
        return cls(split, settings, model, optimizer, scheduler, torch.Generator().manual_seed(seed))

    def fork_to_swa_rate(self) -> _Run:
        """Copy the run, and leave the decaying schedule for the SWA learning rate."""
        settings = self.settings
        model = copy.deepcopy(self.model)
        optimizer = _sgd(model, settings)
        # A copy of the state, or both optimizers would write into the same momentum.
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        scheduler = SWALR(optimizer, settings.swa_rate * settings.learning_rate, settings.anneal_epochs)
        return _Run(self.split, settings, model, optimizer, scheduler, self.batches.clone_state())

    def epoch(self, after_step: Callable[[], None] | None = None) -> None:
        """Train over all images once, an incomplete last batch left out."""
        self.model.train()
        images = shifted(self.split.train_images, self.settings.max_shift, self.batches)
        order = torch.randperm(len(images), generator=self.batches)
        for batch in order.split(self.settings.batch_size)[: self.settings.steps_per_epoch]:
            self.optimizer.zero_grad()
            loss: Tensor = F.cross_entropy(self.model(images[batch]), self.split.train_labels[batch])
            loss.backward()
            self.optimizer.step()
            if after_step is not None:
                after_step()
        self.scheduler.step()

    def tested_at(self, epoch: int) -> bool:
        return epoch % self.settings.test_every == 0 or epoch == self.settings.epochs


def _sgd(model: nn.Module, settings: Settings) -> SGD:
    return SGD(
        model.parameters(), settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def train_seed(seed: int, split: Split, settings: Settings, on_epoch: EpochHook | None = None) -> SeedResult:
    """Train every method for one seed and test each along the way; the same seed gives the same numbers.

    Calls ``on_epoch`` after each epoch trained, before the model is tested. The test images are only ever looked at:
    nothing is chosen by them, and every reported score is that of the last epoch.
    """
    hook = on_epoch or (lambda branch, epoch, model: None)
    result = SeedResult(seed, split)
    run = _Run.start(seed, split, settings)
    for epoch in range(1, settings.start_epoch + 1):
        run.epoch()
        hook("trunk", epoch, run.model)
        if run.tested_at(epoch) or epoch == settings.start_epoch:
            result.trunk.append(score(run.model, split, epoch))
    forked = run.fork_to_swa_rate()
    _train_decaying(run, result, hook)
    _train_averaged(forked, result, hook)
    return result


def _train_decaying(run: _Run, result: SeedResult, hook: EpochHook) -> None:
    for epoch in range(run.settings.start_epoch + 1, run.settings.epochs + 1):
        run.epoch()
        hook("sgd", epoch, run.model)
        if run.tested_at(epoch):
            result.curves["sgd"].append(score(run.model, run.split, epoch))
    result.models["sgd"] = run.model


def _train_averaged(run: _Run, result: SeedResult, hook: EpochHook) -> None:
    """Train at the SWA rate; SWA takes the model once an epoch, as in the paper, EMA after every step."""
    swa = FusedAveragedModel(run.model, rule=EqualAverage())
    ema = FusedAveragedModel(run.model, rule=ExponentialAverage(run.settings.ema_decay))
    models = {"iterate": run.model, "swa": swa.module, "ema": ema.module}
    for epoch in range(run.settings.start_epoch + 1, run.settings.epochs + 1):
        run.epoch(after_step=lambda: ema.update_parameters(run.model))
        hook("iterate", epoch, run.model)
        swa.update_parameters(run.model)
        if run.tested_at(epoch):
            for method, model in models.items():
                result.curves[method].append(score(model, run.split, epoch))
    result.models.update(models)
