"""SWALP: the steps against plain torch, averages of quantised weights, resumes, and the paper's least squares."""

from __future__ import annotations

import copy
import io
import math
import pickle
import runpy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import SGD, Adam, Optimizer

from swafast import FusedAveragedModel
from swafast.optim import SWA, LowPrecision, LowPrecisionMean, block_quantize
from swafast.optim.block import Noise

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"momentum": 0.9, "weight_decay": 0.01}
BOTH = pytest.mark.parametrize("full", [False, True], ids=["low accumulator", "full accumulator"])


def make_net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def backward(net: nn.Module, step: int) -> None:
    net.zero_grad()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    (net(x) - x[:, :3]).square().mean().backward()


def train(net: nn.Module, optimizer: Optimizer, steps: range) -> Iterator[int]:
    for step in steps:
        backward(net, step)
        optimizer.step()
        yield step


def params_of(net: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in net.parameters()]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def is_rounded(tensor: Tensor, bits: int) -> bool:
    """Whether each row has integers of so many bits, times a power of two."""
    rows = tensor.detach().reshape(len(tensor), -1) if tensor.dim() > 1 else tensor.detach()[None]
    largest = torch.frexp(rows.abs().amax(1, keepdim=True)).exponent - 1
    fits = torch.zeros(len(rows), dtype=torch.bool)
    for exponent in (largest, largest - 1):  # the latter where the largest is -2^(bits-1)
        integers = torch.ldexp(rows, bits - 2 - exponent)
        in_range = (integers >= -(2 ** (bits - 1))) & (integers < 2 ** (bits - 1))
        fits |= (in_range & (integers == integers.round())).all(1)
    return bool(fits.all())


def by_hand(net: nn.Module, steps: int, *, full: bool, rounding: str) -> tuple[list[Tensor], list[Tensor]]:
    """The paper's steps of SGD with momentum, without an optimizer. Returns weights and momentum."""
    weights = list(net.parameters())
    accumulators, momenta = params_of(net), [torch.zeros_like(weight) for weight in weights]
    for step in range(steps):
        generator = Noise(7, step).on(torch.device("cpu"))

        def quantized(x: Tensor, generator: torch.Generator = generator) -> Tensor:
            return block_quantize(x, 5, rounding=rounding, generator=generator)

        backward(net, step)
        with torch.no_grad():
            gradients = [quantized(weight.grad) for weight in weights if weight.grad is not None]
            for place, gradient in enumerate(gradients):
                gradient = gradient.add(accumulators[place], alpha=0.01)
                momenta[place].mul_(0.9).add_(gradient)
                accumulators[place].add_(momenta[place], alpha=-0.1)
                momenta[place] = quantized(momenta[place])
                weights[place].copy_(quantized(accumulators[place]))
                if not full:
                    accumulators[place] = weights[place].detach().clone()
    return params_of(net), momenta


@BOTH
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_steps_are_those_of_the_paper(full: bool, rounding: str) -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), 0.1, **OPTIONS)
    low = LowPrecision(optimizer, 5, rounding=rounding, full_accumulator=full, seed=7)
    assert [*train(net, optimizer, range(6))]
    weights, momenta = by_hand(make_net(), 6, full=full, rounding=rounding)
    assert equal(params_of(net), weights)
    assert equal([state["momentum_buffer"] for state in optimizer.state.values()], momenta)
    assert all(is_rounded(each, 5) for each in (*weights, *momenta))
    assert low.step == 6
    assert not equal(weights, by_hand(make_net(), 6, full=not full, rounding=rounding)[0])
    first = params_of(net)
    low.detach()
    assert [*train(net, optimizer, range(6, 7))]
    assert not any(is_rounded(param, 5) for param in net.parameters())
    assert not equal(params_of(net), first)
    with pytest.raises(RuntimeError, match="detached before"):
        low.detach()


@pytest.mark.parametrize("overlap", [False, True])
@BOTH
def test_attached_averages_have_the_quantised_weights_in_full_precision(full: bool, overlap: bool) -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), 0.1, **OPTIONS)
    LowPrecision(optimizer, 4, full_accumulator=full)
    averaged = FusedAveragedModel(net)
    attachment = averaged.attach(optimizer, overlap=overlap)
    seen = [params_of(net) for _ in train(net, optimizer, range(5))]
    attachment.join()  # an update that runs beside the next forward
    assert int(averaged.n_averaged) == 5
    for average, *values in zip(averaged.module.parameters(), *seen, strict=True):
        assert all(is_rounded(value, 4) for value in values)
        assert torch.allclose(average, torch.stack(values).mean(0), atol=1e-6)
        assert not is_rounded(average.detach(), 4)


def resumed(full: bool, bits_of_average: int | None, lost: str = "") -> list[Tensor]:
    """Weights, average and momentum after 8 steps, with a stop after 4 from which ``lost`` is not loaded."""

    def parts() -> dict[str, Any]:
        net = make_net()
        optimizer = SGD(net.parameters(), 0.1, **OPTIONS)
        low = LowPrecision(optimizer, 5, full_accumulator=full, seed=3)
        mean = None if bits_of_average is None else LowPrecisionMean(bits_of_average, seed=3)
        return {"net": net, "optimizer": optimizer, "low": low, "averaged": FusedAveragedModel(net, multi_avg_fn=mean)}

    def go(made: dict[str, Any], steps: range) -> None:
        for _ in train(made["net"], made["optimizer"], steps):
            made["averaged"].update_parameters(made["net"])

    made = parts()
    go(made, range(4) if lost != "nothing" else range(8))
    if lost != "nothing":
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in made.items()}, file)
        file.seek(0)
        saved, made = torch.load(file), parts()
        for name, part in made.items():
            if name != lost:
                part.load_state_dict(saved[name])
        go(made, range(4, 8))
    momenta = [state["momentum_buffer"] for state in made["optimizer"].state.values()]
    return [*params_of(made["net"]), *params_of(made["averaged"].module), *momenta]


@BOTH
@pytest.mark.parametrize("bits_of_average", [None, 6])
def test_a_resumed_training_has_the_same_bits(full: bool, bits_of_average: int | None) -> None:
    straight = resumed(full, bits_of_average, lost="nothing")
    assert equal(straight, resumed(full, bits_of_average))
    with pytest.warns(UserWarning, match=r"random numbers repeat. Load low_precision.state_dict\(\) too"):
        assert not equal(straight, resumed(full, bits_of_average, lost="low"))
    if full:
        assert not equal(straight, resumed(full, bits_of_average, lost="optimizer"))


@pytest.mark.parametrize("write", ["all", "one", "load", "nothing"])
def test_a_step_starts_from_what_was_written_to_the_weights(write: str) -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), 0.1)
    low = LowPrecision(optimizer, 5, full_accumulator=True)
    assert [*train(net, optimizer, range(3))]
    accumulators = [optimizer.state[param]["accumulator"].clone() for param in net.parameters()]
    with torch.no_grad():
        if write == "all":
            for param in net.parameters():
                param.fill_(0.3)
        elif write == "one":
            net[0].weight[1, 2] += 2.0**-20
        elif write == "load":
            net.load_state_dict(make_net().state_dict())
    expected = params_of(net) if write in ("all", "load") else accumulators
    if write == "one":
        expected[0][1, 2] = net[0].weight[1, 2].detach()
    optimizer.param_groups[0]["lr"] = 0.0
    assert [*train(net, optimizer, range(3, 5))]
    assert equal([optimizer.state[param]["accumulator"] for param in net.parameters()], expected)
    assert low.step == 5


def test_a_detached_optimizer_trains_on_and_may_be_wrapped_again() -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), 0.1)
    low = LowPrecision(optimizer, 5, full_accumulator=True)
    assert low.is_attached
    assert [*train(net, optimizer, range(2))]
    low.detach()
    assert not low.is_attached
    assert not any(optimizer.state.values())
    assert [*train(net, optimizer, range(2, 9))]
    trained = params_of(net)
    LowPrecision(optimizer, 5, full_accumulator=True)
    optimizer.param_groups[0]["lr"] = 0.0
    assert [*train(net, optimizer, range(1))]
    assert equal([optimizer.state[param]["accumulator"] for param in net.parameters()], trained)


def test_two_optimizers_of_the_same_params_do_not_undo_each_other() -> None:
    net = make_net()
    optimizers = [SGD(net.parameters(), rate) for rate in (0.0, 0.1)]
    for optimizer in optimizers:
        LowPrecision(optimizer, 5, rounding="nearest", full_accumulator=True)
    assert [*train(net, optimizers[0], range(1))]
    assert [*train(net, optimizers[1], range(5))]
    moved = params_of(net)
    assert [*train(net, optimizers[0], range(1))]
    assert equal(params_of(net), moved)


def test_accumulators_follow_the_dtype_of_the_model() -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), 0.1)
    LowPrecision(optimizer, 5, full_accumulator=True)
    assert [*train(net, optimizer, range(1))]
    before = optimizer.state[net[0].weight]["accumulator"].clone()
    net.double()
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.state[net[0].weight]["accumulator"].dtype == torch.float64
    assert torch.equal(optimizer.state[net[0].weight]["accumulator"], before.double())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_a_copy_is_detached_and_says_so(copied: Callable[[Any], Any]) -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), 0.1)
    low = LowPrecision(optimizer, 5)
    assert [*train(net, optimizer, range(2))]
    _, _, other = copied((net, optimizer, low))
    assert repr(other) == "LowPrecision(bits=5, rounding='stochastic', seed=0, step=2, detached)"
    assert other.state_dict() == low.state_dict()
    with pytest.raises(RuntimeError, match="detached before"):
        other.detach()
    assert low.is_attached
    assert not other.is_attached


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_a_forgotten_state_is_warned_of(wrapped_first: bool) -> None:
    def warned(kind: Callable[..., Optimizer], state: Any, told: Callable[[LowPrecision], None] | None) -> bool:
        net = make_net()
        optimizer = kind(net.parameters(), 0.1, **({"momentum": 0.9} if kind is SGD else {}))
        low = LowPrecision(optimizer, 5) if wrapped_first else None
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))  # Adam shares ``step``
        low = low or LowPrecision(optimizer, 5)
        if told:
            told(low)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert [*train(net, optimizer, range(2))]
        assert low.step in (2, 4)
        return [str(each.message).partition(",")[0] for each in seen] == ["LowPrecision counts steps from 0"]

    for kind in (SGD, Adam, torch.optim.Adagrad):
        net = make_net()
        optimizer = kind(net.parameters(), 0.1, **({"momentum": 0.9} if kind is SGD else {}))
        low = LowPrecision(optimizer, 5)
        fresh = copy.deepcopy(optimizer.state_dict())
        assert [*train(net, optimizer, range(2))]
        assert not warned(kind, None, None)
        assert not warned(kind, fresh, None)
        assert warned(kind, optimizer.state_dict(), None)
        assert not warned(kind, optimizer.state_dict(), lambda new: new.load_state_dict(low.state_dict()))  # noqa: B023
        assert not warned(kind, optimizer.state_dict(), lambda new: setattr(new, "step", 0))


def test_each_seed_has_random_numbers_of_its_own() -> None:
    ends: dict[int, list[Tensor]] = {}
    for seed in (0, 1, -1, 2**32, 2**64):
        net = make_net()
        optimizer = SGD(net.parameters(), 0.1)
        LowPrecision(optimizer, 5, seed=seed)
        assert [*train(net, optimizer, range(1))]
        ends[seed] = params_of(net)
    assert not equal(ends[0], ends[1])
    assert not any(equal(ends[0], ends[seed]) for seed in (-1, 2**32, 2**64))


def test_the_mean_of_few_bits_is_rounded_at_each_update() -> None:
    net = make_net()
    averaged = FusedAveragedModel(net, multi_avg_fn=LowPrecisionMean(6, "nearest"))
    weight = net[0].weight
    averaged.update_parameters(net)
    mean = weight.detach().clone()
    assert torch.equal(averaged.module[0].weight, mean)  # type: ignore[index]
    for count in (1, 2, 3):
        nn.init.normal_(weight)
        averaged.update_parameters(net)
        mean = block_quantize(mean + (weight.detach() - mean) / (count + 1), 6, rounding="nearest")
        assert torch.equal(averaged.module[0].weight, mean)  # type: ignore[index]
    # At random, the rounding errors of many updates cancel.
    averaged = FusedAveragedModel(net, multi_avg_fn=LowPrecisionMean(6))
    for _ in range(30):
        averaged.update_parameters(net)
    off = (averaged.module[0].weight - weight).detach().abs().max()  # type: ignore[index]
    assert 0 < float(off) < 2.0 ** (1 - 4)  # a step of numbers from 2 to 4 is 2^-3


def test_each_update_of_a_mean_has_random_numbers_of_its_own() -> None:
    ends = []
    for seed, count in ((0, 1), (0, 2), (1, 1), (0, 1)):
        average = torch.linspace(-1, 1, 50)
        LowPrecisionMean(5, seed=seed)([average], [average], torch.tensor(count))
        ends.append(average)
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert torch.equal(ends[0], ends[3])


class Twice(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_the_step_of_a_base_class_is_not_one_more() -> None:
    nets = [make_net(), make_net()]
    for net, kind in zip(nets, (SGD, Twice), strict=True):
        optimizer = kind(net.parameters(), 0.1, **OPTIONS)
        low = LowPrecision(optimizer, 5)
        assert [*train(net, optimizer, range(3))]
        assert low.step == 3
    assert equal(*map(params_of, nets))


class DecaysFirst(SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            param.mul_(0.5)
        return super().step(closure)


def test_what_a_step_does_before_that_of_its_base_class_stays() -> None:
    net = make_net()
    optimizer, before = DecaysFirst(net.parameters(), 0.0), params_of(net)
    LowPrecision(optimizer, 5, full_accumulator=True)
    assert [*train(net, optimizer, range(3))]
    accumulators = [optimizer.state[param]["accumulator"] for param in net.parameters()]
    assert equal(accumulators, [param / 8 for param in before])


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_steps_that_torch_takes_to_make_a_state_change_nothing(kind: Any) -> None:
    net = make_net()
    optimizer = kind(net.parameters(), 0.1)
    low = LowPrecision(optimizer, 5, full_accumulator=True)
    before = params_of(net)
    state = get_optimizer_state_dict(net, optimizer)
    assert equal(params_of(net), before)
    assert low.step == 0
    assert torch.equal(state["state"]["0.weight"]["accumulator"], before[0])  # what a checkpoint is loaded into
    assert [*train(net, optimizer, range(2))]
    assert all(is_rounded(param, 5) for param in net.parameters())
    assert not is_rounded(optimizer.state[net[0].weight]["accumulator"], 5)


def test_a_step_that_a_scaler_skips_changes_nothing() -> None:
    net = make_net()
    optimizer, scaler = SGD(net.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0)
    low, before = LowPrecision(optimizer, 5), params_of(net)
    for wrong in (math.inf, 1.0):
        net.zero_grad()
        scaler.scale(net(torch.full((2, 4), wrong)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert equal(params_of(net), before) == (wrong == math.inf)
        assert low.step == (wrong == 1.0)


@BOTH
def test_a_step_that_a_fused_optimizer_skips_changes_no_weight(full: bool) -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), 0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    low = LowPrecision(optimizer, 4, full_accumulator=full)
    before, kept = params_of(net), params_of(net)
    for place, is_finite in enumerate((True, False, False, True)):  # torch's fused SGD must not skip its first
        net.zero_grad()
        scaler.scale(net(torch.full((2, 4), 1.0 if is_finite else math.inf)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        now = [tensor.clone() for state in optimizer.state.values() for tensor in state.values()]
        assert equal(params_of(net), before) != is_finite
        if not is_finite:
            assert equal(now, kept)
        before, kept = params_of(net), now
        assert low.step == place + 1


@BOTH
def test_an_expanded_gradient_is_rounded(full: bool) -> None:
    nets = [make_net(), make_net()]
    for net, expand in zip(nets, (False, True), strict=True):
        optimizer = SGD(net.parameters(), 0.1, **OPTIONS)
        LowPrecision(optimizer, 5, full_accumulator=full)
        for _ in range(2):
            for param in net.parameters():
                gradient = torch.full((), 0.3).expand(param.shape)
                param.grad = gradient if expand else gradient.clone()
            optimizer.step()
    assert equal(*map(params_of, nets))


def test_a_step_after_one_that_raised_has_the_same_bits() -> None:
    nets = [make_net(), make_net()]
    for net, raises in zip(nets, (False, True), strict=True):
        optimizer = SGD(net.parameters(), 0.1, **OPTIONS)
        LowPrecision(optimizer, 5, full_accumulator=True)
        assert [*train(net, optimizer, range(2))]
        if raises:
            hook = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                optimizer.step()
            hook.remove()
        assert [*train(net, optimizer, range(2, 4))]


def test_params_without_a_gradient_stay_and_get_no_state() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    optimizer = Adam(net.parameters(), 0.1)
    LowPrecision(optimizer, 4, full_accumulator=True)
    before = params_of(net)
    assert [*train(net, optimizer, range(2))]
    assert equal(params_of(net)[:2], before[:2])
    assert {*optimizer.state} == {*net[2].parameters()}
    net[0].requires_grad_()
    assert [*train(net, optimizer, range(2))]  # Adam asks whether its state is empty
    assert all(is_rounded(param, 4) for param in net.parameters())


def test_torchcontribs_swa_goes_around_it() -> None:
    net = make_net()
    base = SGD(net.parameters(), 0.1)
    swa = SWA(base, swa_start=0, swa_freq=1)
    low = LowPrecision(swa, 4)
    seen = [params_of(net) for _ in train(net, swa, range(3))]
    assert low.step == 3
    swa.swap_swa_sgd()
    assert torch.allclose(net[0].weight, torch.stack([each[0] for each in seen]).mean(0), atol=1e-6)


# Bad input


def wrapped(optimizer: Optimizer) -> Optimizer:
    LowPrecision(optimizer)
    return optimizer


def attached(optimizer: Optimizer) -> Optimizer:
    net = nn.ParameterList(optimizer.param_groups[0]["params"])
    FusedAveragedModel(net).attach(optimizer, net)
    return optimizer


def of(*tensors: Tensor) -> Optimizer:
    return SGD([nn.Parameter(each, requires_grad=each.is_floating_point()) for each in tensors], 0.1)


ONE = torch.ones(2)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "1 bit": (lambda: LowPrecision(of(ONE), 1), ValueError, "bits must be from 2 to 16, got 1"),
    "17 bits": (lambda: LowPrecision(of(ONE), 17), ValueError, "bits must be from 2 to 16, got 17"),
    "rounding": (lambda: LowPrecision(of(ONE), rounding="up"), ValueError, "rounding must be 'stochastic' or"),
    "seed": (lambda: LowPrecision(of(ONE), seed=0.5), TypeError, "seed must be an int"),  # type: ignore[arg-type]
    "accumulator": (lambda: LowPrecision(of(ONE), full_accumulator=8), TypeError, "full_accumulator must be True"),
    "no optimizer": (lambda: LowPrecision(nn.Linear(1, 1)), TypeError, "optimizer must be a torch.optim.Optimizer"),
    "several": (lambda: LowPrecision([of(ONE)]), TypeError, "must be one optimizer, got 1: call Low"),
    "twice": (lambda: LowPrecision(wrapped(of(ONE))), RuntimeError, r"not be wrapped already.*call its detach\(\)"),
    "too late": (lambda: LowPrecision(attached(of(ONE))), RuntimeError, "wrapped before an average is attached"),
    "differentiable": (
        lambda: LowPrecision(SGD([nn.Parameter(ONE)], 0.1, differentiable=True)), ValueError, "differentiable=False"
    ),
    "complex": (lambda: LowPrecision(of(ONE, ONE * 1j)), TypeError, "param 1 of the optimizer's group 0 must be float"),
    "integers": (lambda: LowPrecision(of(ONE.long())), TypeError, "param 0 of .* must be float16, .* got torch.int64"),
    "mean": (lambda: LowPrecisionMean(1), ValueError, "bits must be from 2 to 16, got 1"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


def test_a_refused_optimizer_has_no_hook() -> None:
    optimizer = of(ONE, ONE * 1j)
    with pytest.raises(TypeError):
        LowPrecision(optimizer)
    del optimizer.param_groups[0]["params"][1]
    optimizer.param_groups[0]["params"][0].grad = torch.full((2,), 0.3)
    optimizer.step()
    assert torch.allclose(optimizer.param_groups[0]["params"][0], torch.full((2,), 0.97))


@pytest.mark.parametrize("what", ["sparse", "closure", "closure by name"])
def test_a_step_that_is_refused_changes_nothing(what: str) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Embedding(4, 3, sparse=what == "sparse"))
    optimizer = SGD(net.parameters(), 0.1)
    low = LowPrecision(optimizer, 4, full_accumulator=True)
    net[0](net[1](torch.tensor([0, 2]))).sum().backward()
    before, gradient = params_of(net), net[0].weight.grad.clone()
    calls: dict[str, Callable[[], Any]] = {
        "sparse": optimizer.step,
        "closure": lambda: optimizer.step(lambda: 0.0),
        "closure by name": lambda: optimizer.step(closure=lambda: 0.0),
    }
    kind, words = (ValueError, "the gradient of param 2 .* dense") if what == "sparse" else (TypeError, "closure")
    with pytest.raises(kind, match=words):
        calls[what]()
    assert equal(params_of(net), before)
    assert torch.equal(net[0].weight.grad, gradient)
    assert low.step == 0


def test_a_state_of_other_settings_is_refused() -> None:
    low = LowPrecision(of(ONE), 8, seed=4)
    state = {**low.state_dict(), "step": 5}
    for name, value in {"bits": 5, "rounding": "nearest", "full_accumulator": True}.items():
        with pytest.raises(
            ValueError, match=rf"{name} must be that of the state, .*construct LowPrecision\(optimizer, "
        ):
            low.load_state_dict({**state, name: value})
    for wrong in ({}, None, {**state, "step": -1}, {**state, "seed": "x"}):
        with pytest.raises(ValueError, match=r"state_dict must|step must"):
            low.load_state_dict(wrong)  # type: ignore[arg-type]
    assert low.step == 0
    low.load_state_dict(state)
    assert repr(low) == "LowPrecision(bits=8, rounding='stochastic', seed=4, step=5)"


def test_a_copied_optimizer_trains_in_full_precision_until_it_is_wrapped() -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), 0.1)
    LowPrecision(optimizer, 4, full_accumulator=True)
    assert [*train(net, optimizer, range(2))]
    other_net, other = copy.deepcopy((net, optimizer))
    LowPrecision(other, 4, full_accumulator=True).step = 2
    assert [*train(other_net, other, range(2, 4))] == [*train(net, optimizer, range(2, 4))]
    assert equal(params_of(other_net), params_of(net))


# The paper's least squares

SEEDS = (0, 1, 2)  # fixed before any result was seen
DIMS, SAMPLES, RATE = 64, 16, 0.1


def squared_errors(counts: list[int]) -> tuple[list[float], float, float]:
    """Errors of the average after so many updates, of the last weights, and of the nearest weights: means of the seeds.

    A row for each seed. Its largest solution lies between 1 and 2, so that 8 bits have steps of 2^-6.
    """
    rows = [torch.rand(DIMS, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in SEEDS]
    solution = torch.stack(rows)
    solution[:, 0] = 1.4
    generator = torch.Generator().manual_seed(len(SEEDS))
    model = nn.ParameterList([torch.zeros_like(solution)])
    optimizer = SGD(model.parameters(), RATE)
    LowPrecision(optimizer, 8)
    averaged = FusedAveragedModel(model)
    averaged.attach(optimizer, start=200)
    errors = []
    weights = model[0]
    while len(errors) < len(counts):
        x = torch.randn(len(SEEDS), SAMPLES, DIMS, generator=generator)
        residuals = torch.einsum("rnd,rd->rn", x, weights.detach() - solution)
        weights.grad = torch.einsum("rn,rnd->rd", residuals, x) / SAMPLES
        optimizer.step()
        if int(averaged.n_averaged) == counts[len(errors)]:
            errors.append(error_of(averaged.module[0], solution))  # type: ignore[index]
    return errors, error_of(weights, solution), error_of(block_quantize(solution, 8, rounding="nearest"), solution)


def error_of(weights: Tensor, solution: Tensor) -> float:
    return float((weights.detach().double() - solution).square().sum(1).mean())


def slope_of(counts: list[int], errors: list[float]) -> float:
    """The slope of errors against counts in logarithms, by least squares."""
    x, y = (torch.tensor(values).double().log() for values in (counts, errors))
    x = x - x.mean()
    return float(x @ y / (x @ x))


def test_averages_come_nearer_than_any_weights_of_8_bits() -> None:
    (error,), last, floor = squared_errors([1500])
    print(f"error of the average {error:.2e}, of the last weights {last:.2e}, of the nearest weights {floor:.2e}")
    assert error < floor / 5 < last / 5


@pytest.mark.slow
def test_the_error_of_least_squares_falls_as_in_the_paper() -> None:
    counts = [round(10 ** (3 + place / 4)) for place in range(9)]
    errors, _, floor = squared_errors(counts)
    slope = slope_of(counts, errors)
    print(f"slope {slope:.3f}; after {counts[-1]} updates {errors[-1]:.2e}, {floor / errors[-1]:.0f} below {floor:.2e}")
    assert -1.2 <= slope <= -0.8
    assert errors[-1] < floor / 5


#: For each example: what must be better than what, as its results name them, and by how many points.
BARS: dict[str, tuple[Any, Any, float]] = {
    "swalp": (("average in float32", 5), ("SGD, at the end", 5), 0.5),
    "sqwa": ("average, quantised again", "last captured", 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BARS)
def test_the_examples_keep_their_bars(name: str) -> None:
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / f"{name}.py"))
    means = example["means"]([example["run"](seed) for seed in SEEDS])
    print({method: f"{value:.2%}" for method, value in means.items()})
    better, worse, points = BARS[name]
    assert means[better] >= means[worse] + points / 100
