"""A few updates of every dtype and format, small and misaligned, an exchange, and a look for what is not finite; and
several averages of mixed formats in one pass.

The part "bits" of a GPU run does them on each backend and on the CPU, and compares all bits. The memory checkers watch
it too.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bench import internals
from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages, PowerAverage, Rule

# Around the widths of vectors, tiles and chunks; and the element that each one starts at, so that most are misaligned.
NUMELS = (1, 3, 64, 255, 1024, 4097, 70_001)
STARTS = (0, 1, 3, 8)
UPDATES = 4
RULES = (EqualAverage(), ExponentialAverage(0.9, warmup="ratio"), PowerAverage(6.94))
FORMATS = {
    torch.float32: ("float32", "compensated", "compact"),
    torch.bfloat16: ("exact", "float32", "compact", "compensated", "half"),
    torch.float16: ("mirrored", "float32"),
}


@dataclass(frozen=True)
class SmokeCase:
    """Averages of params of one dtype: each with its format and its rule."""

    dtype: torch.dtype
    averages: tuple[tuple[str, Rule], ...]

    @property
    def title(self) -> str:
        format, rule = self.averages[0]
        dtype = str(self.dtype).removeprefix("torch.")
        if len(self.averages) > 1:
            return f"{dtype}, {len(self.averages)} averages"
        return f"{dtype}, {format}, {type(rule).__name__}"


def _several(dtype: torch.dtype, count: int) -> SmokeCase:
    """Return a case of ``count`` averages, of all formats and rules in turn."""
    formats = (*FORMATS[torch.bfloat16], "mirrored")
    return SmokeCase(dtype, tuple((formats[i % len(formats)], RULES[i % len(RULES)]) for i in range(count)))


# A rule's weights have nothing to do with a format. Those of the first rule lie on both sides of one half, where a lerp
# changes, so it goes with each format, and the others with one.
CASES = [
    *(SmokeCase(dtype, ((format, RULES[0]),)) for dtype, formats in FORMATS.items() for format in formats),
    *(SmokeCase(dtype, ((FORMATS[dtype][0], rule),)) for dtype in list(FORMATS)[:2] for rule in RULES[1:]),
    *(_several(dtype, 3) for dtype in FORMATS),
    _several(torch.bfloat16, internals.MOST_AVERAGES),
]


class Misaligned(nn.Module):
    """Params that start anywhere in their memory, two orders of dimensions, and buffers of other dtypes."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        for index, numel in enumerate(NUMELS):
            start = STARTS[index % len(STARTS)]
            flat = torch.zeros(start + numel, dtype=dtype, device=device)
            self.register_parameter(f"at_{index}", nn.Parameter(flat[start:]))
        self.turned = nn.Parameter(torch.zeros(7, 11, dtype=dtype, device=device).t())
        self.register_buffer("mean", torch.zeros(5, dtype=dtype, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool, device=device))

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Take the next values of one stream, the same on every device."""
        for param in self.parameters():
            scale = 10.0 ** torch.randint(-3, 4, (), generator=generator).item()
            param.copy_(torch.randn(param.shape, generator=generator) * scale)
        self.get_buffer("mean").copy_(torch.randn(5, generator=generator))
        self.get_buffer("count").add_(1)
        self.get_buffer("mask").logical_not_()


def digest(tensors: Iterable[Tensor]) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def make_averages(
    case: SmokeCase, model: nn.Module, backend: str
) -> tuple[FusedAveragedModel | FusedAverages, list[FusedAveragedModel]]:
    """Return what updates all averages of a case, and each of them."""
    options: dict[str, Any] = {"backend": backend, "nonfinite": "skip"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "format='half'", UserWarning)
        if len(case.averages) == 1:
            ((format, rule),) = case.averages
            one = FusedAveragedModel(model, rule=rule, format=format, **options)
            return one, [one]
        formats = {f"average {index}": format for index, (format, _) in enumerate(case.averages)}
        rules = {f"average {index}": rule for index, (_, rule) in enumerate(case.averages)}
        several = FusedAverages(model, rules=rules, format=formats, **options)
    return several, several.values()


def run_case(case: SmokeCase, backend: str, device: str) -> dict[str, str]:
    """Run one case on one backend. Return hashes of all bits: after the updates, and of the model while exchanged.

    Raises:
        AssertionError: an exchange did not come back, or a NaN was not seen.
    """
    generator = torch.Generator().manual_seed(20)
    model = Misaligned(case.dtype, device)
    averaged, each = make_averages(case, model, backend)
    for _ in range(UPDATES):
        model.draw(generator)
        averaged.update_parameters(model)
    exported = (one.averaged_state_dict().values() for one in each)
    found = {case.title: digest([*averaged.state_dict().values(), *chain.from_iterable(exported)])}
    before = digest(model.state_dict().values())
    with each[0].swapped_into(model):
        # One that does not exchange in place casts, which may round a tie of `exact` the other way.
        if internals.exchanges_in_place(backend):
            found[f"{case.title}, exchanged"] = digest(model.state_dict().values())
    assert digest(model.state_dict().values()) == before, f"{case.title}: the exchange did not come back"
    _look_for_nan(case, averaged, each, model)
    return found


def _look_for_nan(case: SmokeCase, averaged: Any, each: list[FusedAveragedModel], model: Misaligned) -> None:
    name = f"at_{len(NUMELS) - 1}"
    with torch.no_grad():
        model.get_parameter(name)[-1] = float("nan")
    before = digest(averaged.state_dict().values())  # the counters are among them
    averaged.update_parameters(model)
    assert digest(averaged.state_dict().values()) == before, f"{case.title}: a NaN got into an average, or counted"
    for one in each:
        one.nonfinite = "raise"
    try:
        averaged.update_parameters(model)
        seen = ""
    except ValueError as error:
        seen = str(error)
    assert name in seen, f"{case.title}: a NaN was not seen: {seen}"


def compare(
    backends: Sequence[str], device: str, emit: Callable[[dict[str, dict[str, str]]], object]
) -> tuple[bool, str]:
    """Emit the hash of each case on the CPU and on each backend, or the error in its place.

    Return whether any two differ, and a line about it.
    """
    oracle = "reference" if internals.backend_missing("cpu") else "cpu"
    places = {oracle: "cpu", **dict.fromkeys(backends, device)}
    found: dict[str, dict[str, str]] = {}
    for case in CASES:
        for backend, place in places.items():
            try:
                hashes = run_case(case, backend, place)
            # Whatever a backend raises is what this is here to find, and the other cases still run.
            except Exception as error:
                hashes = {case.title: f"{type(error).__name__}: {error}".splitlines()[0]}
            for title, value in hashes.items():
                found.setdefault(title, {})[backend] = value
                emit({title: {backend: value}})
    differing = [f"{title}: {hashes}" for title, hashes in found.items() if len(set(hashes.values())) > 1]
    line = f"{len(found) - len(differing)} of {len(found)} cases equal in all bits on {', '.join(places)}"
    return bool(differing), "\n".join([*differing, line])
