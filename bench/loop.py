"""What an average adds to a training step: torch's class updated in the loop, and ours attached to the optimizer.

Each way follows a training of its own, and all train in turn, a few steps at a time. An untimed step before each sample
starts the update that runs beside the first one in it; the last update under way is waited for after the sample. So a
sample holds as many updates as steps, as in a long training. In a GPU run a GPT-2 medium is followed on each backend,
and with the averages in the host's memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench import names
from bench.machine import OthersCpu, available_bytes
from bench.report import StepRow, Times, count_text
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

# GPT-2 medium's, in bf16 by autocast over fp32 params. 8192 tokens are 17 TFLOP a step, forward and backward.
GPU_SHAPE = Shape(vocabulary=50257, width=1024, depth=24, heads=16, length=1024, batch=8)
DRY_SHAPE = Shape(vocabulary=31, width=16, depth=2, heads=2, length=8, batch=2)
GPU_STEPS_PER_SAMPLE, GPU_MIN_ROUNDS, DRY_MIN_ROUNDS = 4, 6, 2
# Of each way: param, gradient, AdamW's two moments, average. Beside all: activations and logits of one step, and room.
BYTES_PER_PARAM = 5 * 4
BESIDE_BYTES = 24 << 30


@dataclass(frozen=True)
class Way:
    """A way of averaging by its name, ours on a backend or on the default one."""

    name: str
    backend: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.name in OPTIONS


WAYS = tuple(Way(name) for name in (NONE, AGAIN, names.TORCH_CLASS, names.TORCH_EMA, *OPTIONS))


class Contestant:
    """One way beside a training, of its own or one that all follow."""

    def __init__(self, work: Work, way: Way, device: torch.device, training: Training | None = None) -> None:
        self.training = training or Training(work, device)
        self.averaged: nn.Module | None = None
        self._after_step: Callable[[], object] = lambda: None
        self._attachment: Any = None
        self._work, self._device, model = work, device, self.training.model
        if way.is_ours:
            self.averaged = ours = FusedAveragedModel(model, rule=ExponentialAverage(DECAY), backend=way.backend)
            self._attachment = ours.attach(self.training.optimizer, **OPTIONS[way.name])
        elif way.name in (names.TORCH_CLASS, names.TORCH_EMA):
            function = get_ema_multi_avg_fn(DECAY) if way.name == names.TORCH_EMA else None
            theirs = AveragedModel(model, multi_avg_fn=function)
            self._after_step = lambda: theirs.update_parameters(model)

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
        if self._attachment is not None:
            self._attachment.join()
        synchronize(self._device)
        return seconds / self._work.steps_per_sample

    def _step(self) -> None:
        self.training.step()
        self._after_step()

    def _steps(self) -> None:
        for _ in range(self._work.steps_per_sample):
            self._step()

    def end(self) -> None:
        """Leave the optimizer, so that no thread and no tensor of this one stays."""
        if self._attachment is not None:
            self._attachment.detach()


def measure_work(
    work: Work, ways: Sequence[Way], device: torch.device, budget_s: float, *, min_rounds: int = MIN_ROUNDS
) -> list[StepRow]:
    """Compare our averages' bits, and time all ways for about ``budget_s`` seconds. The first averages nothing."""
    differing = count_differing(work, [way for way in ways if way.is_ours], device)
    contestants = {f"{way}": Contestant(work, way, device) for way in ways}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(WARM_UPS):
        for contestant in contestants.values():
            contestant.sample()
    others = OthersCpu()
    for name in rounds(list(contestants), budget_s, least=min_rounds):
        samples[name].append(contestants[name].sample())
    share = others.share()
    for contestant in contestants.values():
        contestant.end()
    first = contestants[f"{ways[0]}"]
    numel, bare = sum(param.numel() for param in first.training.model.parameters()), samples[f"{ways[0]}"]
    rows = []
    for way, taken in zip(ways, samples.values(), strict=True):
        more = {} if way is ways[0] else exposed(taken, bare)
        off = differing.get(way)
        rows.append(
            StepRow(work.title, way.name, numel, Times.of(taken), way.backend, **more, differing=off, others_cpu=share)
        )
    return rows


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
    followers = {way: Contestant(work, way, device, training) for way in ours}
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


def measure(*, quick: bool, progress: Callable[[str], object]) -> list[StepRow]:
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


def measure_on(device: torch.device, backends: Sequence[str], seconds: float) -> tuple[list[StepRow], str]:
    """Measure each backend plain and with overlap, and offloaded on the CPU's. Return rows and a line."""
    ways = (Way(NONE), *(Way(name, backend) for backend in backends for name in (ATTACHED, OVERLAP)), Way(OFFLOAD))
    needed = WORKLOADS["gpt2_medium"].num_params * BYTES_PER_PARAM * len(ways) + BESIDE_BYTES
    free = available_bytes(device)
    if device.type == "cpu":
        work, least = decoder_work("a decoder", DRY_SHAPE, 1), DRY_MIN_ROUNDS
    elif free < needed:
        return [], f"{len(ways)} trainings take {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
    else:
        work, least = decoder_work("GPT-2 medium", GPU_SHAPE, GPU_STEPS_PER_SAMPLE, torch.bfloat16), GPU_MIN_ROUNDS
    rows = measure_work(work, ways, device, seconds, min_rounds=least)
    added = []
    for name, short in ((ATTACHED, "plain"), (OVERLAP, "overlap"), (OFFLOAD, "offload")):
        shares = "/".join(f"{row.share.median:.2%}" for row in rows if row.way == name and row.share is not None)
        added.append(f"{short} {shares}")
    off = sum(row.differing or 0 for row in rows)
    return rows, f"{', '.join(added)} of a step of {rows[0].step.median * 1e3:.3g} ms; {count_text(off, 'element')} off"
