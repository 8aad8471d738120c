"""The error of each format against float64 along its updates, for ``python -m bench accuracy``.

The streams are those of ``tests/test_accuracy.py``. All streams and rules of a format move in one launch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.report import Curve, Report
from swafast import EqualAverage, ExponentialAverage, FusedAverages, Rule

# As of tests/test_accuracy.py, by the update and its noise.
STREAMS: dict[str, Callable[[int, Tensor], Tensor]] = {
    "zero-mean": lambda n, noise: noise,
    "drifting": lambda n, noise: 1.0 + 1e-3 * n + 0.1 * noise,
    "jumping": lambda n, noise: (100.0 if (n // 50) % 2 else -1.0) + noise,
    "constant": lambda n, noise: torch.full_like(noise, 0.1),
}
FORMATS = ("float32", "exact", "compact", "compensated", "half")
TORCH_BF16 = "torch AveragedModel, bf16"
EQUAL = "equal mean"
DECAYS = (0.9, 0.99, 0.999, 0.9999)
RULES: dict[str, Rule] = {EQUAL: EqualAverage(), **{f"EMA {decay:g}": ExponentialAverage(decay) for decay in DECAYS}}
# Elements of a stream: the relative L2 error of so many varies by a few percent between seeds.
NUMEL = 1024
UPDATES = 100_000
POINTS_PER_DECADE = 8
SEED = 7

Named = Iterator[tuple[str, list[Tensor]]]  # rule, and its averages by stream


def points(updates: int) -> list[int]:
    """Return the updates after which errors are read: about even on a logarithmic axis, up to the last."""
    steps, found = 0, [1]
    while found[-1] < updates:
        steps += 1
        found.append(min(updates, round(10 ** (steps / POINTS_PER_DECADE))))
    return sorted(set(found))


class Ours:
    """Every stream under every rule, in one format."""

    def __init__(self, model: nn.Module, format: str) -> None:
        self.model = model
        rules = [(name.replace(".", "_"), rule) for name, rule in RULES.items()]  # a dot separates keys
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "format='half'", UserWarning)
            self.averages = FusedAverages(model, rules=rules, format=format)

    def update(self) -> None:
        self.averages.update_parameters(self.model)

    def values(self) -> Named:
        for name, averaged in zip(RULES, self.averages.values(), strict=True):
            state = averaged.averaged_state_dict()
            yield name, [state[param] for param, _ in self.model.named_parameters()]


class Theirs:
    """torch's class over a bfloat16 model of all streams, under every rule."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Without a function of its own the class takes the equal mean.
        functions = [
            get_ema_multi_avg_fn(r.decay) if isinstance(r, ExponentialAverage) else None for r in RULES.values()
        ]
        self.averaged = [AveragedModel(model, multi_avg_fn=function) for function in functions]

    def update(self) -> None:
        for averaged in self.averaged:
            averaged.update_parameters(self.model)

    def values(self) -> Named:
        for name, averaged in zip(RULES, self.averaged, strict=True):
            yield name, [param.detach() for param in averaged.module.parameters()]


class Truth:
    """The same averages in float64, as (rules, streams, numel): exact to the bit for a constant."""

    def __init__(self, params: Tensor) -> None:
        self._params = params
        self.value = torch.zeros(len(RULES), *params.shape, dtype=torch.float64)

    def update(self, weights: Tensor) -> None:
        self.value.add_(weights * (self._params.double() - self.value))


class Run:
    """All averages side by side. Ours see float32 params, torch's class the same params rounded to bfloat16."""

    def __init__(self, numel: int) -> None:
        self._generator = torch.Generator().manual_seed(SEED)
        self._params = torch.empty(len(STREAMS), numel)
        self._rounded = self._params.bfloat16()
        model, rounded = (nn.ParameterList(map(nn.Parameter, each)) for each in (self._params, self._rounded))
        truth, truth_of_rounded = Truth(self._params), Truth(self._rounded)
        self._sides: dict[str, tuple[Ours | Theirs, Truth]] = {name: (Ours(model, name), truth) for name in FORMATS}
        self._sides[TORCH_BF16] = Theirs(rounded), truth_of_rounded
        self._truths = truth, truth_of_rounded

    def update(self, n: int) -> None:
        noise = torch.randn(self._params.shape, generator=self._generator)
        for row, stream in enumerate(STREAMS.values()):
            self._params[row] = stream(n, noise[row])
        self._rounded.copy_(self._params)
        for averages, _ in self._sides.values():
            averages.update()
        weights = torch.tensor([rule.weight(n) for rule in RULES.values()], dtype=torch.float64).view(-1, 1, 1)
        for truth in self._truths:
            truth.update(weights)

    def errors(self) -> Iterator[tuple[tuple[str, str, str], float]]:
        """Yield the error of every average as it is now, by stream, rule and format."""
        for format, (averages, truth) in self._sides.items():
            for (rule, values), wanted in zip(averages.values(), truth.value, strict=True):
                for stream, value, right in zip(STREAMS, values, wanted, strict=True):
                    # Four figures: people read the file too.
                    yield (stream, rule, format), float(f"{float((value.double() - right).norm() / right.norm()):.4g}")


@torch.no_grad()
def measure(
    environment: dict[str, Any],
    updates: int = UPDATES,
    numel: int = NUMEL,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run all streams, formats and rules side by side. Return the error of each at each of :func:`points`."""
    run, at, curves = Run(numel), set(points(updates)), dict[tuple[str, str, str], list[float]]()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so few elements gain nothing from a second one
    try:
        for n in range(updates):
            run.update(n)
            if n + 1 in at:
                progress(f"{n + 1:,} of {updates:,} updates")
                for key, error in run.errors():
                    curves.setdefault(key, []).append(error)
    finally:
        torch.set_num_threads(threads)
    found = [Curve(*key, errors) for key, errors in sorted(curves.items(), key=lambda item: _place(item[0]))]
    return Report({**environment, "numel": numel}, curves=found, updates=sorted(at))


def _place(key: tuple[str, str, str]) -> tuple[int, int, int]:
    stream, rule, format = key
    return list(STREAMS).index(stream), list(RULES).index(rule), (*FORMATS, TORCH_BF16).index(format)
