"""What an average adds to a training step: torch's class updated in the loop, and ours attached to the optimizer.

Each way follows a training of its own, and all train in turn, a few steps at a time. An untimed step before each sample
starts the update that runs beside the first one in it; the last update under way is waited for after the sample. So a
sample holds as many updates as steps, as in a long training.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bench.machine import OthersCpu
from bench.provider import Provider
from bench.providers import TorchClass, TorchEma
from bench.report import TORCH_CLASS, TORCH_EMA, write_json
from bench.steps import Shape, Training, Work, decoder_work, demo_work
from bench.tables import DISTURBED, milliseconds
from bench.timing import collector_paused, synchronize
from swafast import ExponentialAverage, FusedAveragedModel
from swafast.loop.attachment import Attachment

# Without averaging twice: what the second seems to add is what this machine's noise adds.
NONE, AGAIN, ATTACHED = "no averaging", "no averaging, again", "swafast, attached"
OVERLAP, OFFLOAD = f"{ATTACHED}, overlap", f"{ATTACHED}, offload"
OURS = (ATTACHED, OVERLAP, OFFLOAD)
OPTIONS: dict[str, dict[str, Any]] = {ATTACHED: {}, OVERLAP: {"overlap": True}, OFFLOAD: {"offload": "cpu"}}
DECAY = 0.999

# Rounds at the start that are not kept: the first updates copy and plan, the first steps make the optimizer's state.
WARM_UPS = 2
MIN_ROUNDS, MAX_ROUNDS = 5, 200
# Steps after which averages that follow one training are compared.
COMPARED_STEPS = 5

DECODER = Shape(vocabulary=8192, width=768, depth=6, heads=12, length=32, batch=2)
QUICK_DECODER = Shape(vocabulary=1024, width=128, depth=2, heads=4, length=16, batch=2)


# The ways


@dataclass(frozen=True)
class Follower:
    """What the loop calls after each step, or what follows the optimizer by itself."""

    after_step: Callable[[], object] = lambda: None
    attachment: Attachment | None = None
    averaged: nn.Module | None = None  # of an attachment

    def join(self) -> None:
        if self.attachment is not None:
            self.attachment.join()

    def end(self) -> None:
        """Leave the optimizer, so that no thread and no tensor of this one stays."""
        if self.attachment is not None:
            self.attachment.detach()


Way = Callable[[Training], Follower]


def _updated(kind: type[Provider]) -> Way:
    return lambda training: Follower(kind(training.model).update)


def attached(backend: str | None = None, **options: Any) -> Way:
    """Give the way of an exponential average on one backend, attached to the optimizer with ``options``."""

    def follow(training: Training) -> Follower:
        averaged = FusedAveragedModel(training.model, rule=ExponentialAverage(DECAY), backend=backend)
        return Follower(attachment=averaged.attach(training.optimizer, **options), averaged=averaged)

    return follow


WAYS: dict[str, Way] = {
    NONE: lambda training: Follower(),
    AGAIN: lambda training: Follower(),
    TORCH_CLASS: _updated(TorchClass),
    TORCH_EMA: _updated(TorchEma),
    **{name: attached(**options) for name, options in OPTIONS.items()},
}


class _Contestant:
    """One way beside a training of its own."""

    def __init__(self, work: Work, way: Way, device: torch.device) -> None:
        self.training = Training(work, device)
        self.follower = way(self.training)
        self._work, self._device = work, device

    def sample(self) -> float:
        """Give the seconds of a step."""
        self._step()
        seconds = self._between_events() if self._device.type == "cuda" else self._on_the_clock()
        self.follower.join()
        synchronize(self._device)
        return seconds / self._work.steps_per_sample

    def _step(self) -> None:
        self.training.step()
        self.follower.after_step()

    def _steps(self) -> None:
        for _ in range(self._work.steps_per_sample):
            self._step()

    def _on_the_clock(self) -> float:
        start = time.perf_counter()
        self._steps()
        return time.perf_counter() - start

    def _between_events(self) -> float:
        """Time the stream that trains, without a wait: the host stays ahead of the device as far as a way lets it."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self._steps()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


# Measuring


@dataclass(frozen=True)
class Followed:
    """One way on one work: per round, the seconds of a step, the mean of a sample's."""

    work: str
    way: str
    backend: str | None  # of an average of ours; None: as it comes
    num_params: int
    steps_per_sample: int
    samples: list[float] = field(repr=False)
    differing: int | None = None  # elements of an average of ours that are not those of the plain one
    others_cpu: float | None = None  # what other processes took of all cores' time while this work was timed

    @property
    def seconds(self) -> float:
        return median(self.samples)

    def exposed(self, bare: Followed) -> Exposed:
        return Exposed(
            [own - step for own, step in zip(self.samples, bare.samples, strict=True)],
            [own / step - 1 for own, step in zip(self.samples, bare.samples, strict=True)],
        )


@dataclass(frozen=True)
class Exposed:
    """What a way adds to a step, by round: to the step without averaging of the same round."""

    seconds: list[float]
    shares: list[float]  # of that step

    @property
    def quartiles_s(self) -> tuple[float, float]:
        first, _, third = quantiles(self.seconds, method="inclusive")
        return first, third

    @property
    def share(self) -> float:
        return median(self.shares)


@dataclass(frozen=True)
class Named:
    """A way by its name, on a backend or as it comes."""

    way: str
    backend: str | None = None

    def follow(self, training: Training) -> Follower:
        return (
            WAYS[self.way](training) if self.backend is None else attached(self.backend, **OPTIONS[self.way])(training)
        )


ALL = tuple(Named(way) for way in WAYS)


def measure_work(
    work: Work, named: tuple[Named, ...], device: torch.device, budget_s: float, *, min_rounds: int = MIN_ROUNDS
) -> list[Followed]:
    """Compare our averages, and time all ways for about ``budget_s`` seconds, in a new order each round."""
    differing = count_differing(work, [each for each in named if each.way in OURS], device)
    contestants = {each: _Contestant(work, each.follow, device) for each in named}
    samples: dict[Named, list[float]] = {each: [] for each in named}
    for _ in range(WARM_UPS):
        for contestant in contestants.values():
            contestant.sample()
    order, shuffled = random.Random(0), list(named)
    others, end = OthersCpu(), time.perf_counter() + budget_s
    with collector_paused():
        for done in range(MAX_ROUNDS):
            if done >= min_rounds and time.perf_counter() > end:
                break
            order.shuffle(shuffled)
            for each in shuffled:
                samples[each].append(contestants[each].sample())
    share = others.share()
    for contestant in contestants.values():
        contestant.follower.end()
    numel = sum(param.numel() for param in contestants[named[0]].training.model.parameters())
    return [
        Followed(
            work.title, each.way, each.backend, numel, work.steps_per_sample, samples[each], differing.get(each), share
        )
        for each in named
    ]


def count_differing(work: Work, ours: list[Named], device: torch.device) -> dict[Named, int]:
    """Let all follow one training, and count in each the elements that are not the first one's, bit for bit.

    One training, because two of them may differ in their last bits themselves, on a GPU.
    """
    training = Training(work, device)
    followers = {each: each.follow(training) for each in ours}
    for _ in range(COMPARED_STEPS):
        training.step()
    for follower in followers.values():
        follower.end()
    synchronize(device)
    states = {each: follower.averaged.state_dict() for each, follower in followers.items() if follower.averaged}
    first = next(iter(states.values()), {})
    return {each: sum(_differing(first[key], state[key]) for key in first) for each, state in states.items()}


def _differing(one: Tensor, other: Tensor) -> int:
    size = one.element_size()
    one, other = (tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return int((one != other).view(-1, size).any(1).sum())


# The report


@dataclass(frozen=True)
class Report:
    environment: dict[str, Any]
    rows: list[Followed]

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Report:
        data = json.loads(path.read_text())
        return cls(data["environment"], [Followed(**row) for row in data["rows"]])

    def works(self) -> Mapping[str, list[Followed]]:
        """Give the rows of each work, the one without averaging first."""
        found: dict[str, list[Followed]] = {}
        for row in self.rows:
            found.setdefault(row.work, []).append(row)
        return found

    @property
    def differing(self) -> int:
        return sum(row.differing or 0 for row in self.rows)

    @property
    def others_cpu(self) -> float:
        return max((row.others_cpu or 0.0 for row in self.rows), default=0.0)


# What a reader must know before comparing the last two ways with the one above them.
CAPTION = (
    "On a CPU an update beside the next step takes the step's own cores and memory traffic, so overlap can gain little "
    "here, or cost. Rows whose quartiles overlap are not told apart by this run, and what a second training without "
    "averaging seems to add is noise."
)


def cells(row: Followed, bare: Followed) -> tuple[str, str, str, str]:
    """Write a step's ms, what of it is exposed in ms with its quartiles, and as a share of a step."""
    if row is bare:
        return milliseconds(row.seconds), "", "", ""
    exposed = row.exposed(bare)
    first, third = exposed.quartiles_s
    spread = f"{milliseconds(first)} to {milliseconds(third)}"
    return milliseconds(row.seconds), milliseconds(median(exposed.seconds)), spread, f"{exposed.share:.1%}"


def loop_table(report: Report) -> Table:
    table = Table(title="What an average adds to a training step", title_justify="left", caption_justify="left")
    table.caption = CAPTION
    if report.others_cpu > DISTURBED:
        table.caption += f" Other processes took up to {report.others_cpu:.0%} of the CPU meanwhile."
    for column in ("training", "averaged by"):
        table.add_column(column)
    for column in ("ms a step", "exposed, ms", "quartiles", "of a step", "elements off"):
        table.add_column(column, justify="right")
    for work, rows in report.works().items():
        for row in rows:
            name = f"{work}, {row.num_params / 1e6:.3g}M" if row is rows[0] else ""
            off = "" if row.differing is None else str(row.differing)
            table.add_row(name, row.way, *cells(row, rows[0]), off, style="bold green" if row.way in OURS else None)
    return table


# Seconds of samples for each work: on 2 cores, 20 rounds and more of the decoder.
BUDGET_S, QUICK_BUDGET_S = 240.0, 2.0


def works(*, quick: bool) -> list[tuple[Work, float]]:
    """Give what is trained, and the seconds for each."""
    if quick:
        return [(demo_work(), QUICK_BUDGET_S), (decoder_work("a small decoder", QUICK_DECODER, 2), QUICK_BUDGET_S)]
    return [(demo_work(), BUDGET_S / 4), (decoder_work("a decoder", DECODER, 2), BUDGET_S)]


def measure(
    environment: dict[str, Any], *, quick: bool = False, progress: Callable[[str], None] = lambda step: None
) -> Report:
    rows: list[Followed] = []
    for work, budget_s in works(quick=quick):
        progress(work.title)
        rows += measure_work(work, ALL, torch.device("cpu"), budget_s)
    return Report(environment, rows)
