"""An interrupt at any line of a call of an average: each average is whole, with planes that belong together."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages
from swafast.average.planes import find_planes
from swafast.terms.converting import full_precision
from tests.support import drift, is_interrupted, same_bits

#: Not the guard: Python sees no signal between the body of a ``with`` and the exit of a lock in C.
FILES = (
    *(f"/swafast/average/{name}.py" for name in ("averaged_model", "fused_averages", "planes", "states", "contents")),
    "/swafast/average/loading.py",
    "/swafast/terms/formats.py",
    "/swafast/backends/reference.py",
    "/torch/nn/modules/module.py",
)
Averaged = Any  # FusedAveragedModel or FusedAverages


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = self.tied = nn.Parameter(torch.randn(5))
        self.register_buffer("statistic", torch.randn(2))


def one(model: nn.Module, **options: Any) -> Averaged:
    return FusedAveragedModel(model, **options)


def several(model: nn.Module, **options: Any) -> Averaged:
    return FusedAverages(model, rules={"mean": EqualAverage(), "fast": ExponentialAverage(0.5)}, **options)


def trained(make: Callable[..., Averaged], **options: Any) -> tuple[nn.Module, Averaged]:
    model = Model()
    averages = make(model, **options)
    for _ in range(2):
        drift(model)
        averages.update_parameters(model)
    drift(model)
    return model, averages


def each_of(averages: Averaged) -> list[FusedAveragedModel]:
    return averages.values() if isinstance(averages, FusedAverages) else [averages]


def decoded(averages: Averaged) -> list[Tensor]:
    """Return the averages at full precision. None may lack a plane."""
    values = []
    for averaged in each_of(averages):
        for name, average, fmt in averaged._each_average():
            planes = [average, *find_planes(averaged, name, average, fmt)]
            assert all(plane is not None for plane in planes), name
            values.append(full_precision([plane.detach() for plane in planes if plane is not None], fmt).clone())
    return values


def load(state: dict[str, Any], *, assign: bool = False) -> Callable[[Averaged, nn.Module], object]:
    return lambda averages, model: averages.load_state_dict(copy.deepcopy(state), assign=assign)


def update(averages: Averaged, model: nn.Module) -> None:
    averages.update_parameters(model)


CASES: dict[str, tuple[Callable[..., Averaged], dict[str, Any], Callable[[Averaged, nn.Module], object]]] = {
    "half": (one, {}, lambda averages, model: averages.half()),
    "half of exact": (one, {"format": "exact"}, lambda averages, model: averages.half()),
    "bfloat16": (one, {"format": "compensated"}, lambda averages, model: averages.bfloat16()),
    "double of several": (several, {"format": "exact"}, lambda averages, model: averages.double()),
    "move": (one, {"format": "compensated"}, lambda averages, model: averages.share_memory()),
    "load": (one, {"format": "exact"}, load(trained(one)[1].state_dict())),
    "load by assignment": (one, {}, load(trained(one, format="exact")[1].state_dict(), assign=True)),
    "update": (one, {"backend": "reference"}, update),
    "update of planes": (one, {"format": "exact", "backend": "reference"}, update),
    "copy_to": (one, {"format": "exact"}, lambda averages, model: averages.copy_to(model)),
}


@pytest.mark.parametrize("every", [None, pytest.param(1, marks=pytest.mark.slow)], ids=["some lines", "each line"])
@pytest.mark.parametrize(("make", "options", "act"), CASES.values(), ids=CASES)
def test_each_average_is_the_old_or_the_new_one(
    make: Callable[..., Averaged],
    options: dict[str, Any],
    act: Callable[[Averaged, nn.Module], object],
    every: int | None,
) -> None:
    every = every or (1 if act is update and options.get("format") else 13)
    first = trained(make, **options)
    done = copy.deepcopy(first)
    act(done[1], done[0])
    old, new = decoded(first[1]), decoded(done[1])
    line, seen = -every, set()
    while True:
        line += every
        model, averages = copy.deepcopy(first)
        if not is_interrupted(lambda: act(averages, model), line, *FILES):  # noqa: B023  # called at once
            break
        torch.set_grad_enabled(True)  # torch leaves it off after an interrupt in its own no_grad
        for value, before, after in zip(decoded(averages), old, new, strict=True):
            assert same_bits(value, before) or same_bits(value, after), f"line {line}"
            seen.add(same_bits(value, after))
        used = threading.Thread(target=lambda: averages.update_parameters(model))  # noqa: B023  # joined at once
        counts = [int(averaged.n_averaged) for averaged in each_of(averages)]
        used.start()
        used.join(5)
        assert [int(averaged.n_averaged) for averaged in each_of(averages)] == [count + 1 for count in counts]
        if line % (10 * every) == 0:
            averages.double().float()
            averages.update_parameters(model)
    assert line > 20
    assert every > 1 or True in seen
