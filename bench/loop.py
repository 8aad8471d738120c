"""What an average adds to a training step: torch's class updated in the loop, and ours attached to the optimizer.

Each way follows a training of its own, and all train in turn, a few steps at a time. An untimed step before each sample
starts the update that runs beside the first one in it; the last update under way is waited for after the sample. So a
sample holds as many updates as steps, as in a long training.

``python -m bench.loop --device cuda --backend cuda --backend triton --seconds 40 --lines FILE`` is the part of a GPU
run: it follows a GPT-2 medium on each backend, and with the averages in the host's memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import names
from bench.machine import OthersCpu, available_bytes
from bench.providers import Provider, TorchClass, TorchEma
from bench.report import StepRow, Times, item_line
from bench.steps import Shape, Training, Work, decoder_work, demo_work
from bench.timing import between_events, rounds, synchronize
from bench.workloads import WORKLOADS
from swafast import ExponentialAverage, FusedAveragedModel

# Without averaging twice: what the second seems to add is what this machine's noise adds.
NONE, AGAIN, ATTACHED = "no averaging", "no averaging, again", "swafast, attached"
OVERLAP, OFFLOAD = f"{ATTACHED}, overlap", f"{ATTACHED}, offload"
OPTIONS: dict[str, dict[str, Any]] = {ATTACHED: {}, OVERLAP: {"overlap": True}, OFFLOAD: {"offload": "cpu"}}
DECAY = 0.999

# Rounds at the start that are not kept: the first updates copy and plan, the first steps make the optimizer's state.
WARM_UPS = 2
MIN_ROUNDS = 5
# Steps after which averages that follow one training are compared.
COMPARED_STEPS = 5

DECODER = Shape(vocabulary=8192, width=768, depth=6, heads=12, length=32, batch=2)
QUICK_DECODER = Shape(vocabulary=1024, width=128, depth=2, heads=4, length=16, batch=2)
# Seconds of samples for each work: on 2 cores, 20 rounds and more of the decoder.
BUDGET_S, QUICK_BUDGET_S = 240.0, 2.0


@dataclass(frozen=True)
class Follower:
    """What the loop calls after each step, or what follows the optimizer by itself."""

    after_step: Callable[[], object] = lambda: None
    attachment: Any = None
    averaged: nn.Module | None = None  # of an attachment

    def join(self) -> None:
        if self.attachment is not None:
            self.attachment.join()

    def end(self) -> None:
        """Leave the optimizer, so that no thread and no tensor of this one stays."""
        if self.attachment is not None:
            self.attachment.detach()


@dataclass(frozen=True)
class Way:
    """A way of averaging by its name, ours on a backend or on the default one."""

    name: str
    backend: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.name in OPTIONS

    def follow(self, training: Training) -> Follower:
        if self.is_ours:
            averaged = FusedAveragedModel(training.model, rule=ExponentialAverage(DECAY), backend=self.backend)
            return Follower(attachment=averaged.attach(training.optimizer, **OPTIONS[self.name]), averaged=averaged)
        kinds: dict[str, type[Provider]] = {names.TORCH_CLASS: TorchClass, names.TORCH_EMA: TorchEma}
        return Follower(kinds[self.name](training.model).update) if self.name in kinds else Follower()


WAYS = tuple(Way(name) for name in (NONE, AGAIN, names.TORCH_CLASS, names.TORCH_EMA, *OPTIONS))


class Contestant:
    """One way beside a training of its own."""

    def __init__(self, work: Work, way: Way, device: torch.device) -> None:
        self.training = Training(work, device)
        self.follower = way.follow(self.training)
        self._work, self._device = work, device

    def sample(self) -> float:
        """Return the seconds of a step."""
        self._step()
        if self._device.type == "cuda":
            # The stream that trains, without a wait: the host stays ahead of the device as far as a way lets it.
            seconds = between_events(self._steps)
        else:
            start = time.perf_counter()
            self._steps()
            seconds = time.perf_counter() - start
        self.follower.join()
        synchronize(self._device)
        return seconds / self._work.steps_per_sample

    def _step(self) -> None:
        self.training.step()
        self.follower.after_step()

    def _steps(self) -> None:
        for _ in range(self._work.steps_per_sample):
            self._step()


def measure_work(
    work: Work, ways: Sequence[Way], device: torch.device, budget_s: float, *, min_rounds: int = MIN_ROUNDS
) -> list[StepRow]:
    """Compare our averages' bits, and time all ways for about ``budget_s`` seconds. The first averages nothing."""
    differing = count_differing(work, [way for way in ways if way.is_ours], device)
    contestants = {way: Contestant(work, way, device) for way in ways}
    samples: dict[Way, list[float]] = {way: [] for way in ways}
    for _ in range(WARM_UPS):
        for contestant in contestants.values():
            contestant.sample()
    by_name = {f"{way}": way for way in ways}
    others = OthersCpu()
    for name in rounds(list(by_name), budget_s, least=min_rounds):
        samples[by_name[name]].append(contestants[by_name[name]].sample())
    share = others.share()
    for contestant in contestants.values():
        contestant.follower.end()
    numel = sum(param.numel() for param in contestants[ways[0]].training.model.parameters())
    bare = samples[ways[0]]
    return [
        StepRow(
            work.title, way.name, way.backend, numel, Times.of(taken), differing=differing.get(way), others_cpu=share,
            **({} if way is ways[0] else exposed(taken, bare)),
        )
        for way, taken in samples.items()
    ]  # fmt: skip


def exposed(taken: Sequence[float], bare: Sequence[float]) -> dict[str, Times]:
    """Return what a way adds to the step without averaging of the same round, in seconds and as a share."""
    pairs = list(zip(taken, bare, strict=True))
    return {
        "exposed": Times.of(own - step for own, step in pairs),
        "share": Times.of(own / step - 1 for own, step in pairs),
    }


def count_differing(work: Work, ours: Sequence[Way], device: torch.device) -> dict[Way, int]:
    """Let all follow one training, and count in each the elements that are not the first one's, bit for bit.

    One training, because two of them may differ in their last bits themselves, on a GPU.
    """
    training = Training(work, device)
    followers = {way: way.follow(training) for way in ours}
    for _ in range(COMPARED_STEPS):
        training.step()
    for follower in followers.values():
        follower.end()
    synchronize(device)
    states = {way: follower.averaged.state_dict() for way, follower in followers.items() if follower.averaged}
    first = next(iter(states.values()), {})
    return {way: sum(_differing(first[key], state[key]) for key in first) for way, state in states.items()}


def _differing(one: Tensor, other: Tensor) -> int:
    """Count the elements whose bits differ, on the device of ``one``: on a CPU a GPT-2 medium takes 7 s."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    one, other = (tensor.detach().to(one.device).contiguous().view(-1).view(bits) for tensor in (one, other))
    return int((one != other).sum())


def measure(*, quick: bool = False, progress: Callable[[str], None] = lambda step: None) -> list[StepRow]:
    """Measure every way on this CPU."""
    if quick:
        works = [(demo_work(), QUICK_BUDGET_S), (decoder_work("a small decoder", QUICK_DECODER, 2), QUICK_BUDGET_S)]
    else:
        works = [(demo_work(), BUDGET_S / 4), (decoder_work("a decoder", DECODER, 2), BUDGET_S)]
    rows: list[StepRow] = []
    for work, budget_s in works:
        progress(work.title)
        rows += measure_work(work, WAYS, torch.device("cpu"), budget_s)
    return rows


# On a GPU

# GPT-2 medium's, in bf16 by autocast over fp32 params. 8192 tokens are 17 TFLOP a step, forward and backward.
GPU_SHAPE = Shape(vocabulary=50257, width=1024, depth=24, heads=16, length=1024, batch=8)
DRY_SHAPE = Shape(vocabulary=31, width=16, depth=2, heads=2, length=8, batch=2)
GPU_STEPS_PER_SAMPLE, DRY_STEPS_PER_SAMPLE = 4, 1
GPU_MIN_ROUNDS, DRY_MIN_ROUNDS = 6, 2
# Of each way: param, gradient, AdamW's two moments, average. Beside all: activations and logits of one step, and room.
BYTES_PER_PARAM = 5 * 4
BESIDE_BYTES = 24 << 30


def gpu_ways(backends: Sequence[str]) -> tuple[Way, ...]:
    """Return the ways of a GPU run: on each backend plain and with overlap, and offloaded on the CPU's."""
    ours = [Way(name, backend) for backend in backends for name in (ATTACHED, OVERLAP)]
    return (Way(NONE), *ours, Way(OFFLOAD))


def short_of_memory(device: torch.device, num_ways: int) -> str | None:
    """Return why the trainings do not fit, or None."""
    needed = WORKLOADS["gpt2_medium"].num_params * BYTES_PER_PARAM * num_ways + BESIDE_BYTES
    free = available_bytes(device)
    if device.type == "cpu" or free >= needed:
        return None
    return f"{num_ways} trainings take {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"


def summary(rows: Sequence[StepRow]) -> str:
    """Write in one line what each way adds, on one backend after the other."""
    added = []
    for name, short in ((ATTACHED, "plain"), (OVERLAP, "overlap"), (OFFLOAD, "offload")):
        shares = "/".join(f"{row.share.median:.2%}" for row in rows if row.way == name and row.share is not None)
        added.append(f"{short} {shares}")
    off = sum(row.differing or 0 for row in rows)
    return f"{', '.join(added)} of a step of {rows[0].step.median * 1e3:.3g} ms; {off} elements off"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, append the rows to the lines, and return 1 where an average is not the plain one, bit for bit."""
    parser = argparse.ArgumentParser(prog="python -m bench.loop", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", action="append", required=True)
    parser.add_argument("--seconds", type=float, default=0.0, help="For the samples; a few are always taken.")
    parser.add_argument("--lines", type=Path, required=True)
    given = parser.parse_args(arguments)
    device, ways = torch.device(given.device), gpu_ways(given.backend)
    why_not = short_of_memory(device, len(ways))
    if why_not is not None:
        sys.stdout.write(f"{why_not}\n")
        return 0
    if device.type == "cpu":
        # A dry run: nothing that counts is timed, and others may be at work on this machine.
        torch.set_num_threads(1)
        work, least = decoder_work("a decoder", DRY_SHAPE, DRY_STEPS_PER_SAMPLE), DRY_MIN_ROUNDS
    else:
        work, least = decoder_work("GPT-2 medium", GPU_SHAPE, GPU_STEPS_PER_SAMPLE, torch.bfloat16), GPU_MIN_ROUNDS
    rows = measure_work(work, ways, device, given.seconds, min_rounds=least)
    with given.lines.open("a") as lines:
        lines.writelines(item_line("steps", row) for row in rows)
    sys.stdout.write(f"{summary(rows)}\n")
    return int(any(row.differing for row in rows))


if __name__ == "__main__":
    sys.exit(main())
