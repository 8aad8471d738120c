"""A teacher's step on a CPU: an average that runs forward in each step of its student, by torch's class and by ours.

Both teachers follow one student, so that the student's part of a step is one and the same. Each step, one of them is
updated first, in turn: the second one finds the params in the caches. Before any time, the teachers are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench import names
from bench.loop import DECODER
from bench.report import Times
from bench.steps import Decoder, Shape
from bench.timing import rounds
from swafast import ExponentialAverage, FusedAveragedModel

DECAY = 0.996
DTYPES = (torch.float32, torch.bfloat16)
QUICK_SHAPE = Shape(vocabulary=64, width=32, depth=2, heads=2, length=8, batch=2)
BUDGET_S, QUICK_BUDGET_S = 40.0, 0.5
LEAST_STEPS, WARM_UPS = 4, 2
COMPARED_UPDATES = 3
# Relative L2 distance in float32. In bfloat16 torch's average freezes, so that the two are not alike.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class TeacherRow:
    """One teacher of one student."""

    dtype: str
    way: str
    num_params: int
    student: Times  # forward, backward and the optimizer's step
    teacher: Times  # forward
    update: Times
    share: Times  # the update's, of a step with this teacher; no seconds


class Step:
    """A student in training, and its teachers by name."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.student = student = Decoder(shape).to(dtype)
        # The student reads one, its teachers the other: else the first loss were 0.
        self._tokens, self._others = torch.randint(shape.vocabulary, (2, shape.batch, shape.length))
        self._optimizer = torch.optim.AdamW(student.parameters(), 1e-3, fused=True)
        ours = FusedAveragedModel(student, rule=ExponentialAverage(DECAY), num_averaged=1)
        theirs = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        theirs.n_averaged.fill_(1)
        self.teachers: dict[str, AveragedModel] = {names.TORCH_EMA: theirs, names.OURS: ours}
        for teacher in self.teachers.values():
            teacher.requires_grad_(False)

    def train(self, targets: Tensor) -> None:
        self._optimizer.zero_grad()
        F.mse_loss(self.student(self._tokens), targets).backward()
        self._optimizer.step()

    @torch.no_grad()
    def targets(self, teacher: nn.Module) -> Tensor:
        outputs: Tensor = teacher(self._others)
        return outputs

    def sample(self, order: Sequence[str]) -> dict[str, tuple[float, float, float]]:
        """Make a step. Return the seconds of the student's part, a teacher's forward and its update, by its name."""
        forwards = {name: timed(partial(self.targets, self.teachers[name])) for name in order}
        targets = forwards[names.OURS][1]
        student, _ = timed(lambda: self.train(targets))
        found = {}
        for name in order:
            update, _ = timed(partial(self.teachers[name].update_parameters, self.student))
            found[name] = student, forwards[name][0], update
        return found


def timed(call: Callable[[], Tensor | None]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, torch.empty(0) if result is None else result


def check(shape: Shape) -> None:
    """Raise AssertionError unless both teachers of a float32 student are alike after a few steps."""
    step = Step(shape, torch.float32)
    for _ in range(COMPARED_UPDATES):
        step.sample([*step.teachers])
    flat = [torch.cat([param.double().flatten() for param in each.parameters()]) for each in step.teachers.values()]
    assert (flat[0] - flat[1]).norm() <= TOLERANCE * flat[0].norm(), "both teachers must be alike"


def measure_student(shape: Shape, dtype: torch.dtype, budget_s: float) -> list[TeacherRow]:
    step = Step(shape, dtype)
    order = [*step.teachers]
    for _ in range(WARM_UPS):
        step.sample(order)
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in order}
    for _ in rounds(["step"], budget_s, least=LEAST_STEPS):
        order.reverse()
        for name, taken in step.sample(order).items():
            samples[name].append(taken)
    numel = sum(param.numel() for param in step.student.parameters())
    title, rows = str(dtype).removeprefix("torch."), []
    for name in step.teachers:
        student, teacher, update = (Times.of(part) for part in zip(*samples[name], strict=True))
        share = Times.of(taken[2] / sum(taken) for taken in samples[name])
        rows.append(TeacherRow(title, name, numel, student, teacher, update, share))
    return rows


def measure(*, quick: bool, progress: Callable[[str], object]) -> list[TeacherRow]:
    """Compare both teachers, and time them with a student in each dtype."""
    shape, budget_s = (QUICK_SHAPE, QUICK_BUDGET_S) if quick else (DECODER, BUDGET_S)
    check(QUICK_SHAPE)
    rows: list[TeacherRow] = []
    for dtype in DTYPES:
        progress(f"a student in {dtype}")
        rows += measure_student(shape, dtype, budget_s)
    return rows


def table(rows: Sequence[TeacherRow]) -> str:
    """Return the rows as a table of medians."""
    lines = [
        "| student | teacher | student, ms | teacher's forward, ms | update, ms | update, of a step |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        parts = " | ".join(f"{1e3 * part.median:.3g}" for part in (row.student, row.teacher, row.update))
        lines.append(
            f"| {row.dtype}, {row.num_params / 1e6:.3g}M parameters | {row.way} | {parts} | {row.share.median:.2%} |"
        )
    return "\n".join(lines)
