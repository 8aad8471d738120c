"""How far each format's average is from float64, update by update: what ``python -m bench accuracy`` writes and draws.

The streams are those of ``tests/test_accuracy.py``. All formats, streams and rules move in one launch of the native CPU
kernels, called directly: with the checks of a model's update, 1e5 updates would take many minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.report import write_json
from swafast import EqualAverage, ExponentialAverage, Rule
from swafast.backends import cpu
from swafast.backends.contract import Pair, Update
from swafast.terms.draws import Draws, make_random_key
from swafast.terms.formats import get_format

# Raised when a reader of an older file would misread it.
SCHEMA = 1
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
# Elements of a stream: the relative L2 error of so many varies by a few per cent between seeds.
NUMEL = 1024
UPDATES = 100_000
POINTS_PER_DECADE = 8
SEED = 7


def rule_name(rule: Rule) -> str:
    return f"EMA {rule.decay:g}" if isinstance(rule, ExponentialAverage) else EQUAL


@dataclass(frozen=True)
class Curve:
    """The errors of one average along its updates."""

    stream: str
    rule: str
    format: str
    errors: list[float]  # relative L2 distance from float64, at the report's updates


@dataclass(frozen=True)
class AccuracyReport:
    environment: dict[str, Any]
    numel: int
    updates: list[int]
    curves: list[Curve]
    schema: int = SCHEMA

    def errors(self, stream: str, rule: str, format: str) -> list[float]:
        """Give one curve; KeyError where there is none."""
        for curve in self.curves:
            if (curve.stream, curve.rule, curve.format) == (stream, rule, format):
                return curve.errors
        raise KeyError((stream, rule, format))

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> AccuracyReport:
        """Read what ``write`` wrote; ValueError for a file of another version."""
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}, got {data.get('schema')}")
        return cls(data["environment"], data["numel"], data["updates"], [Curve(**curve) for curve in data["curves"]])


def points(updates: int) -> list[int]:
    """Give the updates after which errors are taken: about evenly spaced on a logarithmic axis, up to the last."""
    steps, found = 0, [1]
    while found[-1] < updates:
        steps += 1
        found.append(min(updates, round(10 ** (steps / POINTS_PER_DECADE))))
    return sorted(set(found))


class _Ours:
    """Every format of every stream under every rule, in one launch."""

    def __init__(self, params: Sequence[Tensor], rules: Sequence[Rule]) -> None:
        self._update = Update(
            tuple(terms for rule in rules if (terms := rule.kernel_terms()) is not None),
            tuple(torch.zeros((), dtype=torch.int64) for _ in rules),
        )
        self.pairs: dict[tuple[int, int, str], Pair] = {}  # by stream, rule and format
        for stream, param in enumerate(params):
            for pace in range(len(rules)):
                for name in FORMATS:
                    self.pairs[stream, pace, name] = self._pair(f"{stream}.{pace}.{name}", param, name, pace)
        self._launch = cpu.prepare(list(self.pairs.values()))

    @staticmethod
    def _pair(name: str, param: Tensor, format: str, pace: int) -> Pair:
        fmt, shape = get_format(format), tuple(param.shape)
        planes = [torch.zeros(shape, dtype=dtype) for dtype in (fmt.dtype, *(dtype for _, dtype in fmt.extra))]
        draws = Draws(make_random_key(0, name), shape) if fmt.num_random_bits else None
        return Pair(name, param, tuple(planes), fmt, draws, pace)

    def update(self) -> None:
        self._launch.update((), self._update)

    def value(self, stream: int, pace: int, format: str) -> Tensor:
        """Give an average as ``averaged_state_dict`` does, in float32."""
        pair = self.pairs[stream, pace, format]
        assert pair.format is not None
        return pair.format.decode(pair.planes).float()


class _Torch:
    """torch's class over a bfloat16 model of all streams, under every rule."""

    def __init__(self, params: Sequence[Tensor], rules: Sequence[Rule]) -> None:
        self._model = nn.ParameterList(nn.Parameter(param) for param in params)
        # Without a function of its own the class takes the equal mean.
        decays = (rule.decay if isinstance(rule, ExponentialAverage) else None for rule in rules)
        functions = [None if decay is None else get_ema_multi_avg_fn(decay) for decay in decays]
        self._averaged = [AveragedModel(self._model, multi_avg_fn=function) for function in functions]

    def update(self) -> None:
        for averaged in self._averaged:
            averaged.update_parameters(self._model)

    def value(self, stream: int, pace: int) -> Tensor:
        return self._averaged[pace].module[stream].detach()  # type: ignore[index]  # a ParameterList, as above


class _Truth:
    """The same averages in float64, (rules, streams, numel): of a float32 constant it is that constant, to the bit."""

    def __init__(self, params: Tensor, num_rules: int) -> None:
        self._params = params
        self.value = torch.zeros(num_rules, *params.shape, dtype=torch.float64)

    def update(self, weights: Tensor) -> None:
        self.value.add_(weights * (self._params.double() - self.value))


class _Run:
    """A float32 stream goes into our formats, rounded to bfloat16 into torch's class: each has a truth of its own."""

    def __init__(self, rules: list[Rule], numel: int) -> None:
        self.rules = rules
        self._generator = torch.Generator().manual_seed(SEED)
        self._params = torch.empty(len(STREAMS), numel)
        self._rounded = self._params.bfloat16()
        self._ours, self._theirs = _Ours(list(self._params), rules), _Torch(list(self._rounded), rules)
        self._truth, self._truth_of_rounded = (_Truth(each, len(rules)) for each in (self._params, self._rounded))

    def update(self, n: int) -> None:
        noise = torch.randn(self._params.shape, generator=self._generator)
        for row, stream in enumerate(STREAMS.values()):
            self._params[row] = stream(n, noise[row])
        self._rounded.copy_(self._params)
        self._ours.update()
        self._theirs.update()
        weights = torch.tensor([rule.weight(n) for rule in self.rules], dtype=torch.float64).view(-1, 1, 1)
        self._truth.update(weights)
        self._truth_of_rounded.update(weights)

    def errors(self) -> Iterator[tuple[tuple[str, str, str], float]]:
        """Give the error of every average as it is now, by stream, rule and format."""
        for row, stream in enumerate(STREAMS):
            for pace, rule in enumerate(self.rules):
                for name in FORMATS:
                    error = _error(self._ours.value(row, pace, name), self._truth.value[pace, row])
                    yield (stream, rule_name(rule), name), error
                error = _error(self._theirs.value(row, pace), self._truth_of_rounded.value[pace, row])
                yield (stream, rule_name(rule), TORCH_BF16), error


def _error(value: Tensor, truth: Tensor) -> float:
    # Four figures: the file is read by people too.
    return float(f"{float((value.double() - truth).norm() / truth.norm()):.4g}")


@torch.no_grad()
def measure(
    environment: dict[str, Any],
    updates: int = UPDATES,
    numel: int = NUMEL,
    progress: Callable[[str], None] = lambda text: None,
) -> AccuracyReport:
    """Run all streams, formats and rules side by side, and give the error of each at each of :func:`points`.

    Raises:
        RuntimeError: the native library is not there.
    """
    missing = cpu.unavailable()
    if missing is not None:
        raise RuntimeError(f"bench accuracy needs the native library: {missing}")
    run = _Run([EqualAverage(), *map(ExponentialAverage, DECAYS)], numel)
    at, curves = points(updates), dict[tuple[str, str, str], list[float]]()
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
    return AccuracyReport(environment, numel, at, [Curve(*key, errors) for key, errors in curves.items()])
