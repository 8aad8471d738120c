"""The error of each format against float64 along its updates.

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


def points(updates: int) -> list[int]:
    """Return the updates after which errors are read: about even on a logarithmic axis, up to the last."""
    steps = range(POINTS_PER_DECADE * len(str(updates)) + 1)
    return sorted({min(updates, round(10 ** (step / POINTS_PER_DECADE))) for step in steps})


class Run:
    """All averages side by side. Ours see float32 params, torch's class the same params rounded to bfloat16."""

    def __init__(self, numel: int) -> None:
        self._generator = torch.Generator().manual_seed(SEED)
        self._params = torch.empty(len(STREAMS), numel)
        self._rounded = self._params.bfloat16()
        self._model, rounded = (nn.ParameterList(map(nn.Parameter, each)) for each in (self._params, self._rounded))
        rules = [(name.replace(".", "_"), rule) for name, rule in RULES.items()]  # a dot separates keys
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "format='half'", UserWarning)
            self.ours = {name: FusedAverages(self._model, rules=rules, format=name) for name in FORMATS}
        self._rounded_model = rounded
        # Without a function of its own the class takes the equal mean.
        decays = (getattr(rule, "decay", None) for rule in RULES.values())
        functions = (None if decay is None else get_ema_multi_avg_fn(decay) for decay in decays)
        self._theirs = [AveragedModel(rounded, multi_avg_fn=function) for function in functions]
        # In float64, as (rules, streams, numel): exact to the bit for a constant.
        self._truth, self._truth_of_rounded = torch.zeros(2, len(RULES), len(STREAMS), numel, dtype=torch.float64)

    def update(self, n: int) -> None:
        noise = torch.randn(self._params.shape, generator=self._generator)
        for row, stream in enumerate(STREAMS.values()):
            self._params[row] = stream(n, noise[row])
        self._rounded.copy_(self._params)
        for averages in self.ours.values():
            averages.update_parameters(self._model)
        for averaged in self._theirs:
            averaged.update_parameters(self._rounded_model)
        weights = torch.tensor([rule.weight(n) for rule in RULES.values()], dtype=torch.float64).view(-1, 1, 1)
        self._truth.add_(weights * (self._params.double() - self._truth))
        self._truth_of_rounded.add_(weights * (self._rounded.double() - self._truth_of_rounded))

    def errors(self) -> Iterator[tuple[tuple[str, str, str], float]]:
        """Yield the error of every average as it is now, by stream, rule and format."""
        values = {
            name: [list(averaged.averaged_state_dict().values())[: len(STREAMS)] for averaged in averages.values()]
            for name, averages in self.ours.items()
        }
        values[TORCH_BF16] = [[param.detach() for param in averaged.module.parameters()] for averaged in self._theirs]
        for format, by_rule in values.items():
            truth = self._truth_of_rounded if format == TORCH_BF16 else self._truth
            for rule, by_stream, wanted in zip(RULES, by_rule, truth, strict=True):
                for stream, value, right in zip(STREAMS, by_stream, wanted, strict=True):
                    # Four figures: people read the file too.
                    yield (stream, rule, format), float(f"{float((value.double() - right).norm() / right.norm()):.4g}")


@torch.no_grad()
def measure(
    environment: dict[str, Any],
    updates: int = UPDATES,
    numel: int = NUMEL,
    progress: Callable[[str], object] = lambda text: None,
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
    orders = [{name: at for at, name in enumerate(each)} for each in (STREAMS, RULES, (*FORMATS, TORCH_BF16))]
    places = {key: [order[name] for order, name in zip(orders, key, strict=True)] for key in curves}
    found = [Curve(*key, curves[key]) for key in sorted(curves, key=places.__getitem__)]
    return Report({**environment, "numel": numel}, curves=found, updates=sorted(at))
