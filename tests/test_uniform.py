"""Uniform quantisation: the values and their step, straight-through gradients, and averages of quantised weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swafast import FusedAveragedModel
from swafast.optim import quantize_weights, quantized_copy, requantize, uniform_quantize, uniform_step

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A norm, a shared layer and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)
        self.again = self.first
        self.tied = nn.Linear(5, 4, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.norm(self.first(x).tanh()))
        return self.last(self.tied(x) + self.again(x))


def inputs() -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(4))


def steps_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(".step")}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_values_are_the_nearest_levels() -> None:
    x = torch.tensor([-9.0, -0.76, -0.74, -0.2, 0.0, 0.2, 0.26, 0.8, 9.0])
    assert uniform_quantize(x, 2, 0.5).tolist() == [-0.5, -0.5, -0.5, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5]
    assert uniform_quantize(x, 3, torch.tensor(0.5)).tolist() == [-1.5, -1.0, -0.5, 0.0, 0.0, 0.0, 0.5, 1.0, 1.5]
    assert uniform_quantize(torch.zeros(3), 2).tolist() == [0.0] * 3
    assert uniform_quantize(torch.zeros(0), 2).shape == (0,)
    narrow = uniform_quantize(torch.randn(30).bfloat16(), 3)
    assert narrow.dtype == torch.bfloat16
    assert len(narrow.unique()) <= 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 8, 12])
def test_narrow_dtypes_have_the_nearest_values(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(bits)).to(dtype)
    step, most = uniform_step(x, bits).double(), 2 ** (bits - 1) - 1
    nearest = (x.double() / step).round().clamp(-most, most) * step
    assert torch.equal(uniform_quantize(x, bits), nearest.to(dtype))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 5e-7),
        (torch.float32, 1e-44),
        (torch.float32, 3.402823e38),
        (torch.float64, 1.7976931348623157e308),
    ],
)
def test_very_small_and_very_large_numbers_have_a_step(dtype: torch.dtype, scale: float) -> None:
    x = torch.tensor([1.0, 0.0, -0.5, 0.25], dtype=torch.float64).mul(scale).to(dtype)
    step = uniform_step(x, 8)
    assert 0 < float(step) < float(x.max())
    assert float((uniform_quantize(x, 8) - x).abs().max()) <= float(step)
    assert 0 < float(uniform_quantize(x, 8)[0]) < float("inf")
    model = nn.Linear(4, 1, bias=False, dtype=dtype)
    nn.init.zeros_(model.weight)
    model.weight.data[0] = x
    assert torch.equal(quantize_weights(model, 8).weight[0], uniform_quantize(x, 8))


def test_a_model_in_half_precision_keeps_its_small_step() -> None:
    model = nn.Linear(4, 4)
    nn.init.normal_(model.weight, std=1e-7)
    step = quantize_weights(model, 8).half().parametrizations.weight[0].step  # type: ignore[index,union-attr]
    assert 0 < float(step) < 1e-8
    assert bool(model.weight.isfinite().all())


@pytest.mark.parametrize("seed", range(5))
def test_a_forward_and_a_copy_have_exactly_the_values(seed: int) -> None:
    torch.manual_seed(seed)
    model = quantize_weights(nn.Linear(30, 30), 2)
    chain = model.parametrizations.weight  # type: ignore[union-attr]
    with torch.no_grad():
        chain.original.add_(torch.randn(30, 30))  # type: ignore[union-attr]
    values = uniform_quantize(chain.original, 2, chain[0].step)  # type: ignore[index,union-attr]
    assert torch.equal(model.weight, values)
    assert torch.equal(quantized_copy(model).weight, values)
    assert len(values.unique()) == 3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_step_has_the_least_squared_error(bits: int, seed: int) -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    most = 2 ** (bits - 1) - 1

    def error(step: Tensor) -> Tensor:
        levels = (x / step).round().clamp(-most, most)
        return (levels * step - x).square().sum(-1)

    every = torch.linspace(0.002, 1.2, 4000, dtype=torch.float64)[:, None] * x.abs().max() / most
    # Two steps with nearly the same error may be far apart, so errors are compared.
    over = float(error(uniform_step(x, bits))) / float(error(every).min()) - 1
    assert over < (0.002 if bits <= 4 else 0.04)
    step = uniform_step(x, bits)
    levels = (x / step).round().clamp(-most, most)
    assert torch.isclose(step, x @ levels / (levels @ levels), rtol=1e-12, atol=0)  # the best for its levels
    if bits <= 4:  # the step of the largest element is far from it
        assert float(error(x.abs().max() / most)) / float(error(every).min()) - 1 > 0.1


def test_gradients_go_straight_through() -> None:
    model = quantize_weights(Net(), 3)
    plain = quantized_copy(model)
    for each in (model, plain):
        each(inputs()).square().sum().backward()
    through = model.first.parametrizations.weight.original  # type: ignore[union-attr]
    assert torch.equal(through.grad, plain.first.weight.grad)
    assert torch.equal(model.norm.weight.grad, plain.norm.weight.grad)
    assert float(through.grad.abs().min()) > 0


def test_a_copy_has_the_values_under_the_models_own_names() -> None:
    model, names = Net(), list(Net().state_dict())
    quantize_weights(model, 2)
    before = state_of(model)
    plain = quantized_copy(model)
    assert sorted(plain.state_dict()) == sorted(names)
    assert type(plain.first) is nn.Linear
    assert plain.first is plain.again
    assert torch.equal(plain.tied.weight, plain.first.weight)
    assert len(plain.last.weight.unique()) == 3
    assert is_unchanged(model, before)
    assert torch.equal(plain.eval()(inputs()), model.eval()(inputs()))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(inputs()).sum().backward()
    optimizer.step()
    assert not torch.equal(quantized_copy(model).last.weight, plain.last.weight)  # neither was broken by the copy
    assert set(plain.last.weight.unique().tolist()) == {*uniform_quantize(before[_last()], 2).unique().tolist()}


def _last() -> str:
    return "last.parametrizations.weight.original"


def test_sqwa_averages_quantised_values_and_chooses_a_new_step() -> None:
    model = quantize_weights(Net(), 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    averaged = FusedAveragedModel(quantized_copy(model))
    values, shadows = [], []
    for _ in range(3):
        model(inputs()).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(quantized_copy(model))
        values.append(model.last.weight.detach().clone())
        shadows.append(model.state_dict()[_last()].clone())
    mean = averaged.module.last.weight
    assert torch.allclose(mean, torch.stack(values).mean(0), atol=1e-6)
    assert not torch.allclose(mean, torch.stack(shadows).mean(0), rtol=1e-2)
    kept, before = [*model.parameters()], steps_of(model)
    assert requantize(model, averaged.module) is model
    assert torch.equal(model.last.weight, uniform_quantize(mean, 2))
    assert all(one is other for one, other in zip(kept, model.parameters(), strict=True))
    assert all(steps_of(model)[name] != step for name, step in before.items())
    assert torch.equal(model.norm.weight, averaged.module.norm.weight)
    model(inputs()).square().sum().backward()
    optimizer.step()  # fine-tuning: the average must not move with the model
    assert torch.allclose(mean, torch.stack(values).mean(0), atol=1e-6)


def test_an_assigned_weight_has_a_new_step_and_memory_of_its_own() -> None:
    model = quantize_weights(nn.Linear(4, 4), 2)
    value = torch.randn(4, 4) * 7
    model.weight = value  # type: ignore[assignment]
    assert torch.equal(model.weight, uniform_quantize(value, 2))
    with torch.no_grad():
        model.parametrizations.weight.original.zero_()  # type: ignore[union-attr]
    assert bool(value.any())


def test_a_state_keeps_the_steps() -> None:
    model, other = quantize_weights(Net(), 3), quantize_weights(Net(), 3)
    requantize(
        model,
        Net().apply(
            lambda module: (
                nn.init.normal_(module.weight) if hasattr(module, "weight") and module.weight.dim() > 1 else None
            )
        ),
    )
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(inputs()), model.eval()(inputs()))


def test_a_state_of_other_bits_is_refused() -> None:
    state, other = quantize_weights(Net(), 2).state_dict(), quantize_weights(Net(), 4)
    with pytest.raises(RuntimeError, match=r"num_bits must be that of the model, 4, got 2: call quantize_weights\("):
        other.load_state_dict(state)
    quantize_weights(Net(), 2).load_state_dict(state)


def test_the_step_is_written_in_place() -> None:
    model = quantize_weights(Net(), 2)
    buffers = dict(model.named_buffers())
    requantize(model, Net().apply(lambda each: nn.init.normal_(each.weight) if type(each) is nn.Linear else None))
    assert all(tensor is buffers[name] for name, tensor in model.named_buffers())


def test_include_picks_weights() -> None:
    model = quantize_weights(Net(), 2, include=lambda name, param: name.startswith("last"))
    assert sorted(steps_of(model)) == ["last.parametrizations.bias.0.step", "last.parametrizations.weight.0.step"]
    assert sorted(steps_of(quantize_weights(nn.Linear(2, 2), 2))) == ["parametrizations.weight.0.step"]


def other_shape() -> nn.Module:
    model = Net()
    model.last = nn.Linear(4, 4)
    return model


def not_finite() -> nn.Module:
    model = Net()
    nn.init.constant_(model.last.weight, float("nan"))
    return model


Q = quantize_weights
BAD: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "1 bit": (lambda m: Q(Net(), 1), ValueError, "bits must be from 2 to 16, got 1"),
    "17 bits": (lambda m: uniform_quantize(torch.ones(2), 17), ValueError, "bits must be from 2 to 16, got 17"),
    "a step of 0": (lambda m: uniform_quantize(torch.ones(2), 2, 0), ValueError, "step must be a finite number ab"),
    "a step below 0": (lambda m: uniform_quantize(torch.ones(2), 2, -torch.ones(())), ValueError, "step must be a fin"),
    "no number": (lambda m: uniform_quantize(torch.ones(2), 2, torch.tensor(float("nan"))), ValueError, "step must be"),
    "steps": (lambda m: uniform_quantize(torch.ones(2), 2, torch.ones(2)), ValueError, "step must be a finite number"),
    "complex step": (lambda m: uniform_quantize(torch.ones(2), 2, torch.tensor(1j)), ValueError, "step must be a fin"),
    "too small": (lambda m: uniform_quantize(torch.ones(2), 2, 1e-60), ValueError, "step must be .* in torch.float32"),
    "no function": (lambda m: Q(Net(), 2, include=3), TypeError, "include must be a function .*, got 3"),
    "one of two names": (
        lambda m: Q(Net(), 2, include=lambda name, param: name == "tied.weight"),
        ValueError,
        "a tied weight under all of its names, got 'tied.weight' without 'first.weight'",
    ),
    "complex": (lambda m: uniform_quantize(torch.ones(2) * 1j, 2), TypeError, "got torch.complex64"),
    "no module": (lambda m: Q([], 2), TypeError, "model must be a torch.nn.Module, got list"),
    "none picked": (lambda m: Q(m, 2, include=lambda name, param: False), ValueError, "include must pick a weight"),
    "twice": (lambda m: Q(m, 2), ValueError, "must have no parametrization, got one: requantize chooses new steps"),
    "not finite": (lambda m: Q(not_finite(), 2), ValueError, "'last.weight' must be finite"),
    "complex weight": (lambda m: Q(nn.Linear(2, 2, dtype=torch.complex64), 2), TypeError, "'weight' must be float16"),
    "nothing quantised": (lambda m: quantized_copy(Net()), ValueError, r"call quantize_weights\(model, bits\) first"),
    "source's shape": (lambda m: requantize(m, other_shape()), ValueError, r"'last.weight' of source .* \(5, 4\), got"),
    "source's names": (lambda m: requantize(m, nn.Linear(1, 1)), ValueError, "source must have the names of quant"),
    "source's values": (lambda m: requantize(m, not_finite()), ValueError, "'last.weight of source' must be finite"),
    "a float model": (lambda m: requantize(Net(), Net()), ValueError, "model must have quantised weights, got none"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_named_and_changes_nothing(call: Any, kind: type[Exception], words: str) -> None:
    model = quantize_weights(Net(), 3)
    before = state_of(copy.deepcopy(model))
    with pytest.raises(kind, match=words):
        call(model)
    assert is_unchanged(model, before)
