"""What a user may do while averages are swapped into a model: nothing crashes, tears or misleads."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from swafast import ExponentialAverage, FusedAveragedModel, FusedAverages, update_bn
from swafast.loop import swaps
from swafast.optim import SWA
from tests.support import differing, tensors_of, unchanged

DTYPES = [torch.float32, torch.bfloat16]
FORMATS = [None, "float32", "compact"]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).to(dtype)


def average_of(model: nn.Module, **options: Any) -> FusedAveragedModel:
    """Return an average of two different models, the second of which is ``model``."""
    averaged = FusedAveragedModel(model, **options)
    averaged.update_parameters(model)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    averaged.update_parameters(model)
    return averaged


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)


def average_at(model: nn.Module, value: float) -> FusedAveragedModel:
    fill(model, value)
    averaged = FusedAveragedModel(model)
    averaged.update_parameters(model)
    return averaged


# Memory that moves


def share(model: nn.Module) -> None:
    model.share_memory()


def share_each(model: nn.Module) -> None:
    for param in model.parameters():
        param.share_memory_()


def there_and_back(model: nn.Module) -> None:
    dtype = model[0].weight.dtype
    model.double().to(dtype)


def cast(model: nn.Module) -> None:
    dtype = model[0].weight.dtype
    model.double().to(dtype)
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                module._parameters[name] = nn.Parameter(param.data.to(dtype))


def replace(model: nn.Module) -> None:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def transpose(model: nn.Module) -> None:
    for param in model.parameters():
        if param.ndim == 2:
            param.data = param.data.t().contiguous().t()


def add_a_module(model: nn.Module) -> None:
    model.add_module("cache", nn.Module())
    replace(model)


MOVES = [share, share_each, there_and_back, cast, replace, transpose, add_a_module]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_what_was_set_aside_comes_back_whatever_became_of_the_memory(
    move: Callable[[nn.Module], None], dtype: torch.dtype, format: str | None
) -> None:
    model = make_model(dtype)
    averaged = average_of(model, format=format)
    before, state = tensors_of(model), averaged.averaged_state_dict()
    with averaged.swapped_into(model):
        move(model)
    assert differing(tensors_of(model), before) == []
    assert differing(averaged.averaged_state_dict(), state) == []
    with unchanged(model, averaged), averaged.swapped_into(model):
        torch.testing.assert_close(model[0].bias, state["0.bias"].to(dtype), rtol=2**-7, atol=0.0)
    averaged.update_parameters(model)


@pytest.mark.parametrize("move", [share, there_and_back])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_averaged_module_may_move_too(move: Callable[[nn.Module], None], dtype: torch.dtype) -> None:
    model = make_model(dtype)
    averaged = average_of(model)
    with unchanged(model, averaged), averaged.swapped_into(model):
        move(averaged.module)


def free(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("format", FORMATS)
def test_freed_memory_of_a_param_costs_at_most_its_average(format: str | None) -> None:
    model = make_model(torch.bfloat16)
    averaged = average_of(model, format=format)
    before, state = tensors_of(model), averaged.averaged_state_dict()
    in_place = format != "float32"
    with ExitStack() as context:
        if in_place:
            context.enter_context(
                pytest.raises(RuntimeError, match=r"the average of '0\.weight'.*everything else is back")
            )
        context.enter_context(averaged.swapped_into(model))
        free(model[0].weight)
    assert differing(tensors_of(model), before) == []
    assert differing(averaged.averaged_state_dict(), state) == (["0.weight"] if in_place else [])


# Several swaps


def test_swaps_of_two_averages_left_in_the_wrong_order_come_back() -> None:
    model = nn.Linear(4, 4)
    first, second = average_at(model, 10), average_at(model, 20)
    fill(model, 30)
    one, two = first.swapped_into(model), second.swapped_into(model)
    one.__enter__()
    two.__enter__()
    assert float(model.bias.detach()[0]) == 20
    with pytest.raises(RuntimeError, match="must be left in reverse order"):
        one.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="swapped back out"):
        first.update_parameters(model)
    two.__exit__(None, None, None)
    values = [float(module.bias[0]) for module in (model, first.module, second.module)]
    assert values == [30, 10, 20]
    first.update_parameters(model)
    assert swaps.living() == []


@pytest.mark.parametrize("part", [True, False])
def test_swaps_may_nest(part: bool) -> None:
    whole = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    inner = whole[0] if part else whole
    first, second = average_at(whole, 10), average_at(inner, 20)
    fill(whole, 30)
    with first.swapped_into(whole):
        with second.swapped_into(inner):
            assert whole[0].bias[0] == 20
        assert whole[0].bias[0] == 10
    assert [float(module.bias[0]) for module in (whole[0], first.module[0])] == [30, 10]


def test_swaps_of_models_without_a_common_tensor_are_left_in_any_order() -> None:
    models = [nn.Linear(2, 2) for _ in range(2)]
    contexts = [average_at(model, 1).swapped_into(model) for model in models]
    with unchanged(*models):
        for context in contexts:
            context.__enter__()
        for context in contexts:
            context.__exit__(None, None, None)


def refused_while_swapped(model: nn.Module) -> dict[str, Callable[[], object]]:
    """Return what other averages of this model must not do meanwhile."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other, several = FusedAveragedModel(model), FusedAverages(model, rules={"fast": ExponentialAverage(0.9)})
    other.update_parameters(model)
    swa = SWA(torch.optim.SGD(model.parameters(), lr=0.1))
    swa.update_swa()
    return {
        "update_parameters": lambda: other.update_parameters(model),
        "update_parameters of several": lambda: several.update_parameters(model),
        "copy_to": lambda: other.copy_to(model),
        "attach": lambda: other.attach(optimizer),
        "update_swa": swa.update_swa,
        "swap_swa_sgd": swa.swap_swa_sgd,
    }


def test_other_averages_of_the_model_are_refused_meanwhile() -> None:
    model, elsewhere = make_model(), make_model()
    averaged, of_another = average_of(model), FusedAveragedModel(elsewhere)
    actions = refused_while_swapped(model)
    for name, act in actions.items():
        with averaged.swapped_into(nn.DataParallel(model)):
            of_another.update_parameters(elsewhere)
            with pytest.raises(RuntimeError, match=f"^{name.split()[0]} must wait until averages are swapped back out"):
                act()
    for act in actions.values():
        act()


#: What must not be asked of an averaged model that is swapped, in its own words or through others.
USES: dict[str, Callable[[Any, nn.Module], object]] = {
    "forward": lambda averaged, model: averaged(torch.randn(4, 8)),
    "update": lambda averaged, model: averaged.update_parameters(model),
    "state": lambda averaged, model: averaged.state_dict(),
    "state of a parent": lambda averaged, model: nn.ModuleDict({"ema": averaged}).state_dict(),
    "load": lambda averaged, model: averaged.load_state_dict({}),
    "move": lambda averaged, model: averaged.to("cpu"),
    "cast": lambda averaged, model: averaged.double(),
    "share": lambda averaged, model: averaged.share_memory(),
    "copy": lambda averaged, model: copy.deepcopy(averaged),
    "shallow copy": lambda averaged, model: copy.copy(averaged),
    "pickle": lambda averaged, model: pickle.dumps(averaged),
    "export": lambda averaged, model: averaged.averaged_state_dict(),
    "attach": lambda averaged, model: averaged.attach(torch.optim.SGD(model.parameters(), 0.1)),
    "copy_to": lambda averaged, model: averaged.copy_to(model),
    "swap": lambda averaged, model: averaged.swapped_into(model).__enter__(),
    "update_bn": lambda averaged, model: update_bn([torch.randn(4, 8)], averaged),
    "update_bn of its module": lambda averaged, model: update_bn([torch.randn(4, 8)], averaged.module),
    "forward of its module": lambda averaged, model: averaged.module(torch.randn(4, 8)),
    "state of its module": lambda averaged, model: averaged.module.state_dict(),
    "copy of its module": lambda averaged, model: copy.deepcopy(averaged.module),
    "pickle of its module": lambda averaged, model: pickle.dumps(averaged.module),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_swapped_average_is_not_used(use: Callable[[Any, nn.Module], object]) -> None:
    model = make_model()
    averaged = average_of(model)
    with unchanged(model, averaged), averaged.swapped_into(model):
        with pytest.raises(RuntimeError, match="swapped"):
            use(averaged, model)
        str(averaged), averaged.eval(), averaged.train(), list(averaged.parameters()), averaged.rule  # these are free
    for again in (averaged.module, copy.deepcopy(averaged.module), pickle.loads(pickle.dumps(averaged.module))):
        again(torch.randn(4, 8)), again.state_dict()


def test_a_context_is_entered_once() -> None:
    model = make_model()
    context = average_of(model).swapped_into(model)
    with context:
        pass
    for _ in range(2):
        with pytest.raises(RuntimeError, match="can be entered once"), context:
            pass


# Writes in the body


def train(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.sub_(0.1)


def load(model: nn.Module) -> None:
    model.load_state_dict(
        {key: value + 1 for key, value in model.state_dict().items() if "num" not in key}, strict=False
    )


def clip(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.clamp_(-0.01, 0.01)


@pytest.mark.parametrize("write", [train, load, clip])
@pytest.mark.parametrize("format", [None, "float32"])
def test_a_write_in_the_body_is_told_on_leaving(write: Callable[[nn.Module], None], format: str | None) -> None:
    model = make_model(torch.bfloat16)
    averaged = average_of(model, format=format)
    before, state = tensors_of(model), averaged.averaged_state_dict()
    told = pytest.raises(RuntimeError, match=r"must not be written while swapped, got writes into '0\.weight'")
    with told, averaged.swapped_into(model):
        write(model)
    assert differing(tensors_of(model), before) == []
    if format == "float32":  # nothing changed places in place
        assert differing(averaged.averaged_state_dict(), state) == []
    averaged.update_parameters(model)


def assign(model: nn.Module) -> None:
    model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()}, assign=True)


def set_data(model: nn.Module) -> None:
    for param in model.parameters():
        param.data = param + 1


def set_attribute(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight + 1)


def tie(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))
    model.other = nn.Module()
    model.other.register_parameter("weight", model[0].weight)


@pytest.mark.parametrize("put", [assign, set_data, set_attribute, tie])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_put_in_the_place_of_a_param_is_told_on_leaving(
    put: Callable[[nn.Module], None], dtype: torch.dtype
) -> None:
    model = make_model(dtype)
    averaged = average_of(model)
    before, state = tensors_of(model), averaged.averaged_state_dict()
    told = pytest.raises(RuntimeError, match=r"writes into '0\.weight'.*what was written is gone")
    with told, averaged.swapped_into(model):
        put(model)
    assert differing({name: tensor for name, tensor in tensors_of(model).items() if name in before}, before) == []
    assert differing(averaged.averaged_state_dict(), state) == []


class Cached(nn.Module):
    """A model whose forward pass puts another tensor in the place of a buffer."""

    def __init__(self, change: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("cache", torch.zeros(4))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.cache = self.change(torch.zeros(4))
        return self.linear(x)


CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "other values": lambda cache: cache + 1,
    "another dtype": lambda cache: cache.double() + 1,
    "another shape": lambda cache: torch.ones(9),
    "nothing": lambda cache: None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_forward_pass_may_replace_a_buffer(change: Callable[[Tensor], Tensor | None]) -> None:
    model = Cached(change)
    averaged = average_of(model)
    before, state = tensors_of(model), tensors_of(averaged)
    with averaged.swapped_into(model):
        model(torch.ones(2, 4))
    assert set(differing(tensors_of(model), before)) <= {"cache"}
    assert differing(tensors_of(averaged), state) == []
    if change is CHANGES["other values"]:
        assert differing(tensors_of(model), before) == []


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_with_a_largest_norm_is_evaluated(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(10, 4, max_norm=1.0))
    averaged = average_of(model)
    own = tensors_of(model)
    with averaged.swapped_into(model):
        model(torch.tensor([[1, 2]]))
    assert differing(tensors_of(model), own) == []
    with pytest.raises(RuntimeError, match="what was written is gone"), averaged.swapped_into(model):
        model[0].weight = nn.Parameter(torch.zeros(10, 4))
    assert differing(tensors_of(model), own) == []
    assert averaged.module[0].weight[1].norm() <= 1.0 + 1e-6 < averaged.module[0].weight[3].norm()


def test_a_state_is_made_in_an_inner_swap() -> None:
    model = make_model()
    first, second = average_of(model), average_of(model)
    with unchanged(model, first, second), first.swapped_into(model), second.swapped_into(model):
        get_optimizer_state_dict(model, torch.optim.Adam(model.parameters()))


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_write_into_a_param_that_is_only_copied_is_told(several: bool, dtype: torch.dtype) -> None:
    model, options = make_model(dtype), {"include": lambda name, param: name == "2.weight"}
    averages = FusedAverages(model, rules={"fast": ExponentialAverage(0.9)}, **options)
    averaged = averages["fast"] if several else FusedAveragedModel(model, **options)
    averages.update_parameters(model), averaged.update_parameters(model)
    told = pytest.raises(RuntimeError, match=r"writes into '0\.weight'")
    with unchanged(model), told, averaged.swapped_into(model):
        train(model)


def test_a_step_on_the_memory_of_the_params_is_refused() -> None:
    model = nn.Linear(4, 2, bias=False)
    flat = nn.Parameter(torch.zeros(8))
    model.weight.data = flat.data.view(2, 4)
    optimizer = torch.optim.SGD([flat], lr=1.0)
    averaged = average_of(model)
    flat.grad = torch.ones(8)
    refused = pytest.raises(RuntimeError, match="a step of the optimizer must wait")
    with unchanged(model, averaged), averaged.swapped_into(model), refused:
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("is_written", [True, False])
def test_a_step_that_torch_takes_to_make_a_state_is_no_write(is_written: bool) -> None:
    model = make_model()
    optimizer, averaged = torch.optim.Adam(model.parameters()), average_of(model)
    with unchanged(model), averaged.swapped_into(model):
        get_optimizer_state_dict(model, optimizer)
    told = pytest.raises(RuntimeError, match="writes into") if is_written else nullcontext()
    again = torch.optim.Adam(model.parameters())
    with unchanged(model), told, averaged.swapped_into(model):
        if is_written:
            train(model)
        get_optimizer_state_dict(model, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_param_that_is_gone_on_leaving_is_told(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    averaged = average_of(model)
    told = pytest.raises(RuntimeError, match=r"writes into '0\.weight': the model no longer has it")
    with told, averaged.swapped_into(model):
        nn.utils.parametrizations.weight_norm(model[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_write_into_the_averaged_module_is_told_on_leaving(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    averaged = average_of(model)
    told = pytest.raises(RuntimeError, match=r"writes into the average of '0\.weight' and .*the model's own values lay")
    with told, averaged.swapped_into(model), torch.no_grad():
        averaged.module.load_state_dict(model.state_dict())


def test_after_an_error_of_the_body_a_write_is_only_warned_of() -> None:
    model = make_model()
    averaged = average_of(model)

    def fail() -> None:
        with averaged.swapped_into(model):
            clip(model)
            raise KeyError

    with unchanged(model), pytest.warns(RuntimeWarning, match=r"writes into '0\.weight'"), pytest.raises(KeyError):
        fail()


def test_a_swap_while_an_error_is_handled_still_raises() -> None:
    model = make_model()
    averaged = average_of(model)
    try:
        raise KeyError
    except KeyError:
        with pytest.raises(RuntimeError, match="writes into"), averaged.swapped_into(model):
            clip(model)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_buffers_may_be_written_by_a_forward_pass(use_buffers: bool) -> None:
    model = make_model()
    averaged = average_of(model, use_buffers=use_buffers)
    statistics = averaged.module[1].running_mean.clone()
    with unchanged(model), averaged.swapped_into(model):
        model.train()(torch.randn(4, 8))  # BatchNorm writes without telling autograd
        copied = model[1].running_mean.clone()
    assert torch.equal(averaged.module[1].running_mean, statistics if use_buffers else copied)


def test_a_write_into_an_averaged_buffer_is_told_and_does_not_reach_the_average() -> None:
    model = make_model()
    averaged = average_of(model, use_buffers=True)
    told = pytest.raises(RuntimeError, match=r"writes into '1\.running_mean'")
    with unchanged(model, averaged), told, averaged.swapped_into(model):
        model[1].running_mean.add_(1.0)


def test_nested_swaps_are_no_writes() -> None:
    model = make_model()
    first, second = average_of(model), average_of(model)
    with unchanged(model, first, second), first.swapped_into(model), second.swapped_into(model):
        pass

    def write_after_the_inner() -> None:
        with first.swapped_into(model):
            with second.swapped_into(model):
                pass
            clip(model)

    with pytest.raises(RuntimeError, match="writes into"):
        write_after_the_inner()


@pytest.mark.parametrize("attached", ["itself", "another", "none"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_an_optimizer_is_refused(attached: str, fused: bool) -> None:
    model = make_model()
    averaged, other = average_of(model), FusedAveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)  # fused: it does not tell autograd
    if attached != "none":
        attachment = (averaged if attached == "itself" else other).attach(optimizer, step=0)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    refused = pytest.raises(RuntimeError, match="a step of the optimizer must wait")
    with unchanged(model, averaged), averaged.swapped_into(model), unchanged(model, averaged), refused:
        optimizer.step()
    optimizer.step()
    assert attached == "none" or attachment.step == 1


# Interrupts


class Injected(BaseException):
    """Raised by a trace function, as an interrupt is by a signal handler."""


def inject_at(number: int, kind: str, files: tuple[str, ...] | None = None) -> list[str]:
    """Raise in the files before the event of this kind and number, from now on. Return the list of those before it."""
    seen: list[str] = []

    def trace(frame: Any, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.endswith(files or FILES):
            return None
        frame.f_trace_opcodes = True
        if event == kind:
            seen.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            if len(seen) == number:
                sys.settrace(None)
                raise Injected
        return trace

    sys.settrace(trace)
    return seen


FILES = (
    "/swafast/average/averaged_model.py",
    "/swafast/loop/guard.py",
    "/swafast/loop/swaps.py",
    "/swafast/op/exchange.py",
    "/swafast/op/plan.py",
    "/swafast/backends/cpu.py",
    "/contextlib.py",
)
EVENTS = ("call", "line", "opcode")


def is_free(averaged: FusedAveragedModel) -> bool:
    """Return whether another thread can use the averages."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (averaged.state_dict(), done.set()), daemon=True)
    thread.start()
    return done.wait(5)


@pytest.mark.parametrize("kind", EVENTS)
@pytest.mark.parametrize("format", [None, "float32"])
def test_an_interrupt_anywhere_loses_nothing(kind: str, format: str | None) -> None:
    model = nn.Linear(3, 3).bfloat16()
    averaged = average_of(model, format=format)
    with averaged.swapped_into(model):
        pass
    before, state = tensors_of(model), tensors_of(averaged)
    number, lost = 0, []
    while True:
        number += 1
        seen = inject_at(number, kind)
        try:
            with averaged.swapped_into(model):
                sys.gettrace()
            sys.settrace(None)
            break
        except Injected:
            if swaps.in_force or differing(tensors_of(model), before) or differing(tensors_of(averaged), state):
                lost.append(seen[-1])
                break
    assert number > 20
    assert lost == []
    assert is_free(averaged)


def swap(averaged: FusedAveragedModel, model: nn.Module) -> None:
    with averaged.swapped_into(model):
        pass


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize("act", ["swap", "copy_to", "averaged_state_dict"])
def test_an_interrupt_leaves_gradients_as_they_were(act: str, is_enabled: bool) -> None:
    model = nn.Linear(3, 3).bfloat16()
    averaged = average_of(model, format="float32")
    acts: dict[str, Callable[[], object]] = {
        "swap": lambda: swap(averaged, model),
        "copy_to": lambda: averaged.copy_to(model),
        "averaged_state_dict": averaged.averaged_state_dict,
    }
    number, is_done = 0, False
    with torch.set_grad_enabled(is_enabled):
        while not is_done:
            number += 1
            inject_at(number, "line", ("/torch/autograd/grad_mode.py", "/torch/utils/_contextlib.py"))
            with suppress(Injected):
                acts[act]()
                is_done = True
            sys.settrace(None)
            assert torch.is_grad_enabled() == is_enabled
    assert number > 10


# What testers found


def tied(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("format", [None, "float32"])
def test_each_name_of_a_tied_tensor_gets_its_own_value_back(format: str | None) -> None:
    model = tied(torch.bfloat16)
    averaged = average_of(model, format=format)
    own = model[0].weight.detach().clone()
    with unchanged(averaged), averaged.swapped_into(model):
        replace(model)
    assert model[1].weight is not model[0].weight
    assert torch.equal(model[0].weight, own)
    assert torch.equal(model[1].weight, own)


def test_a_part_of_the_averaged_module_gets_no_statistics() -> None:
    model = nn.Sequential(make_model())
    averaged = average_of(model)
    refused = pytest.raises(RuntimeError, match="update_bn must have the model")
    with unchanged(model, averaged), averaged.swapped_into(model), refused:
        update_bn([torch.randn(4, 8)], averaged.module[0])


def test_a_swap_that_is_never_left_keeps_no_model() -> None:
    model = make_model()
    model.context = average_of(model).swapped_into(model)
    model.context.__enter__()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert swaps.living() == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_interrupt_of_torchcontribs_swap_loses_nothing(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 3).to(dtype)
    swa = SWA(torch.optim.SGD(model.parameters(), lr=0.1))
    swa.update_swa()
    fill(model, 30)
    own = tensors_of(model)
    swa.swap_swa_sgd()
    averages = tensors_of(model)
    swa.swap_swa_sgd()
    for number in itertools.count(1):
        inject_at(number, "line", ("/swafast/optim/torchcontrib.py",))
        try:
            swa.swap_swa_sgd()
            sys.settrace(None)
            break
        except Injected:
            there = differing(tensors_of(model), averages) == []
            assert there or differing(tensors_of(model), own) == []
            if there:
                swa.swap_swa_sgd()
                assert differing(tensors_of(model), own) == []
    assert number > 20
