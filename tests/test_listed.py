"""A walk goes by what modules register: scripted and traced ones, and those that list their tensors themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages
from tests.support import Held, drift, require_same, step_with_ones, tensors_of, unchanged


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))


class Holder(nn.Module):
    """Has a scripted child, which it uses twice, beside a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.jit.script(net()), nn.Linear(3, 3)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.first(x)))


class Passing(nn.Module):
    """Lists all its tensors, by methods with an old signature."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.tied = self.body[0]

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:  # type: ignore[override]
        return super().named_parameters(prefix, recurse)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return super().parameters(recurse)

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        return super().named_buffers(prefix, recurse)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Filtering(Passing):
    """Lists only what trains."""

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:  # type: ignore[override]
        return (each for each in super().named_parameters(prefix, recurse) if each[1].requires_grad)


MAKE: dict[str, Callable[[], Any]] = {
    "scripted": lambda: torch.jit.script(net()),
    "traced": lambda: torch.jit.trace(net().eval(), torch.randn(2, 3)),
    "a scripted child": Holder,
    "listing": Passing,
    "listing what trains": Filtering,
}


@pytest.fixture(params=MAKE)
def model(request: pytest.FixtureRequest) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return MAKE[request.param]()


@torch.no_grad()
def train(model: nn.Module) -> None:
    drift(model)
    for buffer in model.buffers():
        buffer.add_(torch.ones_like(buffer))


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_every_call_does_as_torchs_class(model: nn.Module, several: bool) -> None:
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    rules = {"mean": EqualAverage(), "ema": ExponentialAverage(0.5)}
    averages: Any = FusedAverages(model, rules=rules) if several else FusedAveragedModel(model, rule=rules["ema"])
    averaged = averages["ema"] if several else averages
    assert all(param.is_leaf and param.requires_grad for param in averaged.module.parameters())
    for _ in range(3):
        train(model)
        averages.update_parameters(model)
        oracle.update_parameters(model)
        require_close(averaged.module, oracle.module)
    with unchanged(model), averaged.swapped_into(model):
        for name, param in oracle.module.named_parameters():
            torch.testing.assert_close(dict(model.named_parameters())[name], param)
        model(torch.randn(2, 3))
        with pytest.raises(RuntimeError, match="must not be used"):
            averaged.module(torch.randn(2, 3))
    state = {name: value.clone() for name, value in averages.state_dict().items()}
    values = tensors_of(averaged.module)
    for options in ({}, {"assign": True}):
        train(model)
        averages.update_parameters(model)
        averages.load_state_dict(state, **options)
        require_same(tensors_of(averaged.module), values)
    with pytest.raises(RuntimeError, match="size mismatch"):
        averages.load_state_dict({name: value.reshape(-1, 1, 1) for name, value in state.items()})
    averages.double().float()
    averages.update_parameters(model)
    averaged.copy_to(model)
    require_close(averaged.module, model)
    assert averaged.averaged_state_dict().keys() == model.state_dict().keys()


def require_close(got: nn.Module, expected: nn.Module) -> None:
    found, wanted = tensors_of(got), tensors_of(expected)
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], msg=name)


def test_low_precision_and_overlapped_updates(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    for format in ("float32", "compensated", None):
        model.to(torch.bfloat16)
        averaged = FusedAveragedModel(model, format=format)
        train(model)
        averaged.update_parameters(model)
        for name, value in tensors_of(averaged.module).items():
            torch.testing.assert_close(value, tensors_of(model)[name].to(value.dtype), msg=name)
    model.float()
    averaged = FusedAveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = Held(monkeypatch)
    attachment = averaged.attach(optimizer, model, overlap=True)
    step_with_ones(optimizer, model.parameters())
    expected = tensors_of(model)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()  # by the next forward
    held.let_go.set()
    attachment.join()
    require_same(tensors_of(averaged.module), expected)
    attachment.detach()


def test_an_average_that_no_longer_trains_is_updated() -> None:
    model = Filtering()
    averaged = FusedAveragedModel(model)
    averaged.module.requires_grad_(False)
    model.body[0].requires_grad_(False)
    train(model)
    averaged.update_parameters(model)
    require_same(averaged.module.state_dict(), model.state_dict())
