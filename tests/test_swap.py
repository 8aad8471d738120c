"""`swapped_into`: the model runs on the averages, and everything comes back to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from swafast import ExponentialAverage, FusedAveragedModel
from swafast.backends import cpu
from swafast.op import exchange as exchange_module
from tests.support import EveryKind, differing, drift, refused, tensors_of, trained, unchanged, updated_once

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [None, "float32", "exact"])
def test_there_and_back(
    every_kind: EveryKind, dtype: torch.dtype, format: str | None, backend: str, small_chunks: int
) -> None:
    average = trained(every_kind, dtype, format=format, backend=backend)
    state = average.averaged_state_dict()
    with unchanged(every_kind, average), average.swapped_into(every_kind) as swapped:
        assert swapped is every_kind
        inside = tensors_of(every_kind)
    for name, param in every_kind.named_parameters():
        expected = state[name]
        if format in (None, "exact") and dtype == torch.bfloat16:
            torch.testing.assert_close(inside[name].float(), expected, rtol=2**-8, atol=1e-30)
        else:
            assert torch.equal(inside[name], expected.to(param.dtype)), name


def test_buffers_change_places_too() -> None:
    model = nn.BatchNorm1d(3)
    average = updated_once(model)
    average.module.running_mean.fill_(7.0)
    with unchanged(model, average), average.swapped_into(model):
        assert model.running_mean.tolist() == [7.0] * 3


def test_comes_back_after_an_exception(every_kind: EveryKind) -> None:
    average = trained(every_kind, torch.float32)
    with refused(KeyError, "evaluation failed", every_kind, average), average.swapped_into(every_kind):
        raise KeyError("evaluation failed")
    average.update_parameters(every_kind)


def test_meanwhile_nothing_may_touch_the_averages(every_kind: EveryKind) -> None:
    average = trained(every_kind, torch.float32)
    state = average.state_dict()
    actions = [
        lambda: average.update_parameters(every_kind),
        lambda: average.state_dict(),
        lambda: average.load_state_dict(state),
        lambda: average.averaged_state_dict(),
        lambda: average.copy_to(every_kind),
        lambda: average.half(),
        lambda: average.swapped_into(every_kind).__enter__(),
        lambda: nn.ModuleDict({"ema": average}).load_state_dict({f"ema.{k}": v for k, v in state.items()}),
    ]
    with average.swapped_into(every_kind):
        for action in actions:
            with pytest.raises(RuntimeError, match="swapped back out"):
                action()
    for action in actions[:2]:
        action()


def test_a_bad_model_changes_nothing(every_kind: EveryKind) -> None:
    average = trained(every_kind, torch.float32)
    with refused(ValueError, "missing", average):
        average.swapped_into(nn.Linear(2, 2)).__enter__()
    every_kind.frozen = nn.Parameter(torch.zeros(1).expand(9), requires_grad=False)
    with refused(ValueError, "'frozen' of the model must have memory of its own", every_kind, average):
        average.swapped_into(every_kind).__enter__()


def test_autograd_sees_the_exchange() -> None:
    model = nn.Linear(3, 3)
    average = updated_once(model)
    out = model(torch.randn(2, 3, requires_grad=True)).sum()
    with average.swapped_into(model):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_params_that_the_model_ties_and_the_average_does_not() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    average = FusedAveragedModel(model)
    model[1].weight = model[0].weight
    average.update_parameters(model)
    drift(model)
    state = average.averaged_state_dict()
    with unchanged(model, average), average.swapped_into(model):
        assert torch.equal(model[0].weight, state["0.weight"])


def test_writing_a_bfloat16_plane_behind_our_back_and_back_is_exact(every_kind: EveryKind) -> None:
    # How Lightning exchanges weights: through .data, by copies.
    average = trained(every_kind, torch.bfloat16)
    state = average.averaged_state_dict()
    for _ in range(2):
        for ours, theirs in zip(average.module.parameters(), every_kind.parameters(), strict=True):
            held = ours.data.clone()
            ours.data.copy_(theirs.data)
            theirs.data.copy_(held)
    assert differing(average.averaged_state_dict(), state) == []


def _flat_param(model: nn.Module) -> None:
    flat = torch.randn(32)
    model.first.weight, model.second.weight = nn.Parameter(flat), nn.Parameter(flat[8:24])


ENTANGLED: dict[str, Callable[[nn.Module], object]] = {
    "the same memory": lambda model: setattr(model.second.weight, "data", model.first.weight.data),
    "a transposed view": lambda model: setattr(model.second, "weight", nn.Parameter(model.first.weight.data.t())),
    "a buffer of a param": lambda model: model.register_buffer("view", model.first.weight.data),
    "parts of a flat param": _flat_param,
}


@pytest.mark.parametrize("entangle", ENTANGLED.values(), ids=ENTANGLED)
@pytest.mark.parametrize("format", ["float32", "exact"])
def test_params_that_share_memory_come_back(entangle: Callable[[nn.Module], object], format: str) -> None:
    model = nn.Module()
    model.first, model.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    entangle(model)
    average = FusedAveragedModel(model, format=format)
    for _ in range(2):
        average.update_parameters(model)
        with torch.no_grad():
            model.first.weight.add_(1.0)
    state = average.averaged_state_dict()
    with unchanged(model, average), average.swapped_into(model):
        assert torch.equal(model.first.weight, state["first.weight"].to(model.first.weight.dtype))


@pytest.mark.parametrize("when", ["there, exchanged", "there, stashed", "back, exchanged", "back, restored"])
def test_an_interrupt_at_any_point_loses_nothing(
    every_kind: EveryKind, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    # Python raises KeyboardInterrupt between two of its own instructions: after the call of C, say.
    average = trained(every_kind, torch.float32)
    owner, name, call = {
        "there, exchanged": (cpu.NativeLaunch, "exchange", 1),
        "there, stashed": (exchange_module, "bump_versions", 1),
        "back, exchanged": (cpu.NativeLaunch, "exchange", 2),
        "back, restored": (exchange_module, "bump_versions", 2),
    }[when]
    function, calls = getattr(owner, name), []

    def interrupted(*args: object) -> None:
        function(*args)
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt("now")

    monkeypatch.setattr(owner, name, interrupted)
    with refused(KeyboardInterrupt, "now", every_kind, average), average.swapped_into(every_kind):
        pass
    average.update_parameters(every_kind)


def test_a_model_gets_the_averaged_modules_own_values_on_every_backend(backend: str) -> None:
    # A float32 average half way between two bfloat16: `exact` rounds up, a cast would round to even.
    model = torch.nn.ParameterList([torch.tensor([1.0, 1.0078125]).bfloat16()])
    average = updated_once(model, backend=backend, rule=ExponentialAverage(0.5))
    with torch.no_grad():
        model[0].copy_(torch.tensor([1.0078125, 1.015625]))
    average.update_parameters(model)
    (own,) = (param.detach().clone() for param in average.module.parameters())
    with average.swapped_into(model):
        assert torch.equal(model[0].detach(), own)
    average.copy_to(model)
    exported = average.averaged_state_dict(torch.bfloat16)
    assert torch.equal(model[0].detach(), exported["0"])
    assert not torch.equal(own, exported["0"])  # or the tie that this is about is none
