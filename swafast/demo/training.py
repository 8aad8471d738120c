"""One seed of the demo: SGD with a decaying rate, and SGD at the SWA learning rate with its averages.

Both trainings have the same number of epochs, the same initialisation and the same batches in the same order. They are
equal up to the epoch at which averaging starts, so this part is trained once and then forked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.optim.swa_utils import SWALR

from .. import EqualAverage, ExponentialAverage, FusedAveragedModel, update_bn
from .task import NUM_CLASSES, Settings, Split, shifted

# Every method, in the order of the table. "iterate" is the trained model that SWA and EMA average.
METHODS = {
    "sgd": "SGD, decaying rate",
    "iterate": "SGD, SWA rate",
    "swa": "SWA of that run",
    "ema": "EMA of that run",
}

EpochHook = Callable[[str, int, nn.Module], object]  # ("trunk", "sgd" or "iterate"; epoch from 1; live model)


@dataclass(frozen=True)
class Score:
    """Accuracy and loss of one model on the test images after ``epoch`` epochs."""

    epoch: int
    accuracy: float  # share of the test images
    loss: float  # mean cross-entropy, nats


@dataclass(frozen=True)
class SeedResult:
    """The results of one seed: the scores during training and the final models, in evaluation mode, by method."""

    seed: int
    split: Split
    # "trunk" is the common part before averaging starts.
    curves: dict[str, list[Score]] = field(default_factory=lambda: {name: [] for name in ("trunk", *METHODS)})
    models: dict[str, nn.Module] = field(default_factory=dict)


def digits_cnn(width: int) -> nn.Sequential:
    """Make a network of four 3x3 convolutions with BatchNorm and a linear head; 15,554 params at width 8."""

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
    """Test a model, with new BatchNorm statistics from the training images.

    An average needs new statistics, since no trained model has had its activations. Every method gets them, so that
    only weights are compared.
    """
    update_bn([split.train_images], model)
    model.eval()
    with torch.no_grad():
        logits = model(split.test_images)
    accuracy = (logits.argmax(1) == split.test_labels).double().mean().item()
    return Score(epoch, accuracy, F.cross_entropy(logits, split.test_labels).item())


@dataclass
class _Run:
    """A model in training; its scores go into ``result``."""

    settings: Settings
    result: SeedResult
    on_epoch: EpochHook
    model: nn.Module
    optimizer: SGD
    batches: torch.Generator

    def train(self, branch: str, epochs: range, scheduler: LRScheduler, **averages: nn.Module) -> None:
        """Train for some epochs, and test the model, under the name of the branch, and its averages on the way.

        An epoch goes over all images once and leaves out an incomplete last batch.
        """
        split = self.result.split
        for epoch in epochs:
            self.model.train()
            images = shifted(split.train_images, self.settings.max_shift, self.batches)
            order = torch.randperm(len(images), generator=self.batches)
            for batch in order.split(self.settings.batch_size)[: self.settings.steps_per_epoch]:
                self.optimizer.zero_grad()
                F.cross_entropy(self.model(images[batch]), split.train_labels[batch]).backward()
                self.optimizer.step()
            scheduler.step()
            self.on_epoch(branch, epoch, self.model)
            if epoch % self.settings.test_every == 0 or epoch == epochs[-1]:
                for name, model in {branch: self.model, **averages}.items():
                    self.result.curves[name].append(score(model, split, epoch))


def train_seed(seed: int, split: Split, settings: Settings, on_epoch: EpochHook = lambda *_: None) -> SeedResult:
    """Train every method for one seed and test it on the way. The same seed gives the same numbers.

    ``on_epoch`` is called after each epoch, before the tests. Nothing is chosen by the test images: the accuracies that
    are reported are those of the last epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = digits_cnn(settings.width)
    rate = settings.learning_rate
    optimizer = SGD(model.parameters(), rate, momentum=settings.momentum, weight_decay=settings.weight_decay)
    result = SeedResult(seed, split)
    run = _Run(settings, result, on_epoch, model, optimizer, torch.Generator().manual_seed(seed))
    falling = CosineAnnealingLR(optimizer, settings.epochs)
    run.train("trunk", range(1, settings.start_epoch + 1), falling)
    # The fork continues from the same params and momentum, with the same batches.
    forked_model, forked_optimizer = copy.deepcopy((model, optimizer))
    fork = replace(run, model=forked_model, optimizer=forked_optimizer, batches=run.batches.clone_state())
    rest = range(settings.start_epoch + 1, settings.epochs + 1)
    run.train("sgd", rest, falling)
    swa = FusedAveragedModel(fork.model, rule=EqualAverage())
    ema = FusedAveragedModel(fork.model, rule=ExponentialAverage(settings.ema_decay))
    ema.attach(fork.optimizer, step=0)  # steps count from the fork on
    swa.attach(fork.optimizer, every=settings.steps_per_epoch, step=0)  # once an epoch, as in the paper
    # The rate goes from the schedule's to SWA's during the first third of the averaged epochs.
    to_swa_rate = SWALR(fork.optimizer, settings.swa_rate * rate, anneal_epochs=max(1, len(rest) // 3))
    fork.train("iterate", rest, to_swa_rate, swa=swa.module, ema=ema.module)
    result.models.update(sgd=model, iterate=fork.model, swa=swa.module, ema=ema.module)
    return result
