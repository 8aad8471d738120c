"""BYOL on handwritten digits: a student learns to predict its own average, which runs forward in each step.

``python examples/teacher.py``, or on several ranks ``torchrun --nproc-per-node 2 examples/teacher.py``, under DDP. No
label is used in training. A k-nearest-neighbour search then classifies digits by the features of student and teacher.
The test images are moved by up to two pixels, so pixels themselves are a weak measure.

Paper: Grill et al. 2020, "Bootstrap Your Own Latent", arXiv:2006.07733.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import on_all_ranks
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from swafast import ExponentialAverage, FusedAveragedModel, update_bn
from swafast.demo.task import Settings, Split, digits_split, shifted
from swafast.demo.training import digits_cnn

# For a quick look, set EPOCHS=4 in the environment; digits.py has checked it.
EPOCHS = int(os.environ.get("EPOCHS", "80"))
NUM_TRAIN, BATCH, MAX_SHIFT, NOISE = 1000, 125, 2, 0.1
# BYOL's 0.996 suits its training of 300,000 steps and more. In 640 steps such a teacher stays near its initial values.
BASE_DECAY = 0.95
WIDTH, PROJECTED = 8, 32
NEIGHBOURS = 10


def perceptron(features: int) -> nn.Sequential:
    hidden = 4 * PROJECTED
    return nn.Sequential(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, PROJECTED))


class Online(nn.Module):
    """What the teacher is an average of: a backbone and a projector."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = digits_cnn(WIDTH)[:-1]
        self.projector = perceptron(4 * WIDTH)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 1, 8, 8) -> (batch, PROJECTED)
        return self.projector(self.backbone(images))


class Student(nn.Module):
    """The online network with a predictor, which the teacher lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.online = Online()
        self.predictor = perceptron(PROJECTED)

    def forward(self, images: Tensor) -> Tensor:
        return self.predictor(self.online(images))


def view_of(images: Tensor, generator: torch.Generator) -> Tensor:
    moved = shifted(images, MAX_SHIFT, generator)
    return moved + NOISE * torch.randn(moved.shape, generator=generator)


def train(device: torch.device, split: Split) -> tuple[Student, FusedAveragedModel, float]:
    """Train; return student, teacher and the median seconds of a step."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    net = Student().to(device)
    student = DistributedDataParallel(net) if dist.is_initialized() else net
    optimizer = torch.optim.AdamW(student.parameters(), 2e-3, weight_decay=1e-4)
    updates = EPOCHS * (NUM_TRAIN // BATCH)
    scheduler = CosineAnnealingLR(optimizer, updates)
    rule = ExponentialAverage(BASE_DECAY, schedule="cosine", updates=updates)
    teacher = FusedAveragedModel(net.online, rule=rule, num_averaged=1).requires_grad_(False)
    teacher.attach(optimizer, step=0)
    generator, seconds = torch.Generator().manual_seed(0), []
    for _ in range(EPOCHS):
        for batch in torch.randperm(NUM_TRAIN, generator=generator).split(BATCH):
            start = time.perf_counter()
            views = [view_of(split.train_images[batch], generator)[rank::ranks].to(device) for _ in range(2)]
            both = torch.cat(views)
            with torch.no_grad():
                targets = torch.cat(teacher(both).chunk(2)[::-1])  # each view predicts the other one
            loss = 2 - 2 * F.cosine_similarity(student(both), targets).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # and the teacher moves towards the student
            scheduler.step()
            seconds.append(time.perf_counter() - start)
    return net, teacher, statistics.median(seconds)


def features_of(backbone: nn.Module, split: Split, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features of the training images and of ``images``, with BatchNorm statistics of the training images."""
    backbone = copy.deepcopy(backbone).cpu()
    update_bn([split.train_images], backbone)
    with torch.no_grad():
        return backbone.eval()(split.train_images), backbone(images)


def neighbours_accuracy(known: Tensor, asked: Tensor, split: Split) -> float:
    near = F.normalize(asked.flatten(1)) @ F.normalize(known.flatten(1)).T
    votes = split.train_labels[near.topk(NEIGHBOURS).indices]
    return (votes.mode(1).values == split.test_labels).double().mean().item()


def update_seconds(updates: dict[str, Callable[[], object]], rounds: int = 100) -> dict[str, float]:
    """Return the median seconds of each update, measured in turn."""
    samples: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(rounds):
        for name, update in updates.items():
            start = time.perf_counter()
            update()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def is_equal_on_all_ranks(teacher: nn.Module) -> bool:
    params = torch.cat([param.flatten() for param in teacher.parameters()])
    gathered = [torch.empty_like(params) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, params)
    return all(torch.equal(params, each) for each in gathered)


def main(device: torch.device) -> None:
    torch.set_num_threads(1)  # a network this small gains nothing from more
    torch.manual_seed(0)
    split = digits_split(0, Settings(num_train=NUM_TRAIN, label_noise=0.0))
    asked = shifted(split.test_images, MAX_SHIFT, torch.Generator().manual_seed(1))
    untrained = Online()
    student, teacher, step = train(device, split)

    table = Table(title=f"{EPOCHS} epochs of BYOL", title_justify="left")
    table.add_column("features")
    table.add_column(f"accuracy of {NEIGHBOURS} neighbours", justify="right")
    table.add_row("pixels", f"{neighbours_accuracy(split.train_images, asked, split):.1%}")
    for name, module in {
        "an untrained network": untrained,
        "the student": student.online,
        "the teacher": teacher,
    }.items():
        backbone = getattr(module, "module", module).backbone
        table.add_row(name, f"{neighbours_accuracy(*features_of(backbone, split, asked), split):.1%}")

    online = student.online
    theirs = AveragedModel(online, multi_avg_fn=get_ema_multi_avg_fn(BASE_DECAY))
    ours = FusedAveragedModel(online, rule=ExponentialAverage(BASE_DECAY))
    calls = {
        "FusedAveragedModel": lambda: ours.update_parameters(online),
        "torch's AveragedModel": lambda: theirs.update_parameters(online),
    }
    lines = [f"a step: {1e3 * step:.2f} ms"]
    lines += [
        f"an update, {name}: {1e3 * s:.3f} ms, {s / step:.1%} of a step" for name, s in update_seconds(calls).items()
    ]
    if dist.is_initialized():
        lines.append(f"the teacher has the same bits on all ranks: {is_equal_on_all_ranks(teacher)}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        Console().print(table)
        print(*lines, sep="\n")


if __name__ == "__main__":
    if "RANK" in os.environ:
        on_all_ranks(main)
    else:
        main(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
