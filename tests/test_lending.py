"""Frozen params that ``include`` leaves out, such as those under a LoRA: the model lends them to its average."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from swafast import ExponentialAverage, FusedAveragedModel, FusedAverages
from tests.costs import memory_events, peak_of
from tests.support import differing, drift, same_bits, unchanged

WIDTH, RANK, LAYERS = 64, 2, 3


class Layer(nn.Module):
    """A linear layer with a LoRA."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, dtype=dtype).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, WIDTH).to(dtype))
        self.up = nn.Parameter(torch.randn(WIDTH, RANK).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()


def make_model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return nn.Sequential(*(Layer(dtype) for _ in range(LAYERS)))


def make(model: nn.Module, kind: Any = FusedAveragedModel, **options: Any) -> Any:
    own = {"rules": {"a": ExponentialAverage(0.9), "b": ExponentialAverage(0.5)}} if kind is FusedAverages else {}
    return kind(model, include=lambda name, param: param.requires_grad, **own, **options)


def one_of(averaged: Any) -> FusedAveragedModel:
    return averaged["b"] if isinstance(averaged, FusedAverages) else averaged


def bases_of(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in module.named_parameters() if ".base." in name}


def shared(averaged: Any, model: nn.Module) -> list[str]:
    """Return the names of the base's params that both have on one memory."""
    own = bases_of(one_of(averaged).module)
    return [name for name, param in bases_of(model).items() if own[name].data_ptr() == param.data_ptr()]


def train(model: nn.Module, averaged: Any, updates: int = 2) -> None:
    for _ in range(updates):
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param.add_(torch.randn(param.shape).to(param), alpha=0.1)
        averaged.update_parameters(model)


@pytest.mark.parametrize("kind", [FusedAveragedModel, FusedAverages])
def test_only_what_is_averaged_is_held_and_updated(kind: Any) -> None:
    model, made = make_model(), []
    adapters = sum(param.numel() for param in model.parameters() if param.requires_grad)
    count = 2 if kind is FusedAverages else 1
    taken = peak_of(lambda: made.append(make(model, kind)))
    averaged = made[0]
    # 4 bytes each in the format exact, and some for what construction asks torch
    assert taken < count * 4 * adapters + 2500 < LAYERS * WIDTH**2
    train(model, averaged)
    assert len(averaged._bindings.latest.plan.names) == count * 2 * LAYERS
    assert [nbytes for nbytes in memory_events(lambda: averaged.update_parameters(model)) if nbytes > 0] == []
    with averaged._guard.hold("a test"):
        plan = averaged._bind(model)[0]
    assert averaged._bind(model)[0] is plan
    assert len(shared(averaged, model)) == 2 * LAYERS


def test_it_gives_what_copies_give() -> None:
    model = make_model(torch.float32)
    lent, copied = make(model), FusedAveragedModel(model, include=lambda name, _: ".base." not in name)
    for param in bases_of(copied.module).values():
        param.data = param.data.clone()
    for _ in range(2):
        train(model, lent, updates=1)
        copied.update_parameters(model)
    x = torch.randn(2, WIDTH)
    assert torch.equal(lent(x), copied(x))
    assert differing(lent.state_dict(), copied.state_dict()) == []
    assert differing(lent.averaged_state_dict(), copied.averaged_state_dict()) == []
    with unchanged(model, lent), lent.swapped_into(model):
        assert torch.equal(model(x), copied(x))
    lent.copy_to(model)
    assert torch.equal(model(x), copied(x))
    assert len(shared(lent, model)) == 2 * LAYERS


#: What is done to the average or to its module, and must not reach the model.
DEEDS: dict[str, Callable[[FusedAveragedModel], object]] = {
    "cast": lambda averaged: averaged.float(),
    "narrow cast": lambda averaged: averaged.half(),
    "no values": lambda averaged: averaged.to_empty(device="cpu"),
    "meta": lambda averaged: averaged.to("meta"),
    "shared": lambda averaged: averaged.share_memory(),
    "in place": lambda averaged: averaged._apply(lambda tensor: tensor.zero_()),
    "part cast": lambda averaged: averaged.module.half(),
    "unfrozen": lambda averaged: averaged.requires_grad_(True),
}


@pytest.mark.parametrize("kind", [FusedAveragedModel, FusedAverages])
@pytest.mark.parametrize("deed", DEEDS)
def test_what_is_done_to_the_average_does_not_reach_the_model(deed: str, kind: Any) -> None:
    model = make_model()
    averaged = make(model, kind)
    train(model, averaged)
    before = [(param.data_ptr(), param.requires_grad, param.is_shared()) for param in model.parameters()]
    with unchanged(model):
        DEEDS[deed](averaged if deed != "part cast" else one_of(averaged))
    assert [(param.data_ptr(), param.requires_grad, param.is_shared()) for param in model.parameters()] == before


@pytest.mark.parametrize("deed", ["cast", "load"])
def test_nor_does_it_where_torch_exchanges_tensors(deed: str) -> None:
    model = make_model()
    averaged = make(model)
    train(model, averaged)
    other = {key: value + 1 for key, value in averaged.state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with unchanged(model):
            averaged.float() if deed == "cast" else averaged.load_state_dict(other)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert deed == "cast" or differing(averaged.state_dict(), other) == []


def test_a_move_that_changes_nothing_parts_nothing() -> None:
    model = make_model()
    averaged = make(model).to("cpu")
    train(model, averaged)
    assert len(shared(averaged, model)) == 2 * LAYERS


class Coded(nn.Module):
    """A module with code of its own for loading, which writes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ParameterDict({"w": nn.Parameter(torch.randn(4, 4).bfloat16(), requires_grad=False)})
        self.base._load_from_state_dict = self._load  # type: ignore[method-assign]

    def _load(self, state: Any, prefix: str, *rest: Any) -> None:
        with torch.no_grad():
            self.base["w"].copy_(state[f"{prefix}w"])


def load_nested(averaged: Any, state: dict[str, Any], assign: bool = False) -> None:
    holder = nn.Module()
    holder.ema = averaged
    holder.load_state_dict({f"ema.{key}": value for key, value in state.items()}, assign=assign)


LOADS: dict[str, Callable[[Any, dict[str, Any]], object]] = {
    "load": lambda averaged, state: averaged.load_state_dict(state),
    "assign": lambda averaged, state: averaged.load_state_dict(state, assign=True),
    "nested": load_nested,
    "nested assign": lambda averaged, state: load_nested(averaged, state, assign=True),
}


@pytest.mark.parametrize("kind", [FusedAveragedModel, FusedAverages])
@pytest.mark.parametrize("load", LOADS)
def test_a_load_never_writes_into_the_model(load: str, kind: Any) -> None:
    model = make_model()
    averaged = make(model, kind)
    train(model, averaged)
    same = {key: value.clone() for key, value in averaged.state_dict().items()}
    other = {key: value + 1 if ".1.base." in key else value.clone() for key, value in same.items()}
    with unchanged(model):
        LOADS[load](averaged, same)
        assert len(shared(averaged, model)) == (0 if "assign" in load else 2 * LAYERS)
        LOADS[load](averaged, other)
        assert differing(averaged.state_dict(), other) == []
        LOADS[load](averaged, same)
    assert [name for name in shared(averaged, model) if name.startswith("1.")] == []


@pytest.mark.parametrize("load", ["load", "nested"])
@pytest.mark.parametrize("how", ["code", "hook"])
def test_nor_does_a_load_by_code_of_the_models_own(load: str, how: str) -> None:
    model = nn.Sequential(Layer(torch.bfloat16))
    model.add_module("1", Coded())
    averaged = make(model)
    if how == "hook":
        averaged.module[0].register_load_state_dict_pre_hook(lambda module, state, *_: None)
    state = {key: value + 1 for key, value in averaged.state_dict().items()}
    with unchanged(model):
        LOADS[load](averaged, state)
    assert differing(averaged.state_dict(), state) == []


@pytest.mark.parametrize("kind", [FusedAveragedModel, FusedAverages])
@pytest.mark.parametrize("assign", [False, True])
def test_states_may_leave_the_frozen_out(assign: bool, kind: Any) -> None:
    model = make_model()
    model.register_parameter("left_out", nn.Parameter(torch.randn(3)))
    model.forward = lambda x: x  # type: ignore[assignment]

    def fresh() -> Any:
        own = {"rules": {"a": ExponentialAverage(0.9)}} if kind is FusedAverages else {}
        return kind(model, include=lambda name, param: param.requires_grad and name != "left_out", **own)

    averaged = fresh()
    train(model, averaged)
    whole, small = averaged.state_dict(), averaged.state_dict(frozen=False)
    assert {key for key in whole if key not in small} == {key for key in whole if ".base." in key}
    assert any("left_out" in key for key in small)
    other = fresh()
    other.load_state_dict(small, assign=assign)
    assert differing(other.state_dict(), whole) == []
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.base\.bias"):
        other.load_state_dict({key: value for key, value in whole.items() if "0.base.bias" not in key})
    if kind is FusedAveragedModel:
        assert {*averaged.averaged_state_dict()} - {*averaged.averaged_state_dict(frozen=False)} == {*bases_of(model)}
        assert list(averaged.state_dict(prefix="x.", frozen=False)) == [f"x.{key}" for key in small]


@pytest.mark.parametrize("action", ["update_parameters", "swapped_into", "copy_to"])
def test_another_model_gets_copies(action: str) -> None:
    model = make_model()
    averaged = make(model)
    train(model, averaged)
    other = copy.deepcopy(model)
    drift(other)
    with unchanged(model):
        if action == "update_parameters":
            averaged.update_parameters(other)
            assert differing(tensors_of_bases(averaged.module), tensors_of_bases(other)) == []
        elif action == "copy_to":
            averaged.copy_to(other)
            assert differing(tensors_of_bases(model), tensors_of_bases(other)) == []
        else:
            with unchanged(other), averaged.swapped_into(other):
                assert differing(tensors_of_bases(model), tensors_of_bases(other)) == []
    assert shared(averaged, model) == shared(averaged, other) == []


def tensors_of_bases(module: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in bases_of(module).items()}


@pytest.mark.parametrize("fmt", [None, "float32"])
def test_a_param_that_trains_later_is_copied_from_then_on(fmt: str | None) -> None:
    model = make_model()
    averaged = make(model, format=fmt).requires_grad_(False)
    train(model, averaged)
    model[0].base.requires_grad_(True)
    for _ in range(2):
        train(model, averaged, updates=1)
        for name, base in tensors_of_bases(averaged.module).items():
            assert torch.equal(base, model.get_parameter(name).to(base.dtype))
        kept = averaged.module[0].base.weight.clone()
        drift(model[0].base)
        assert same_bits(averaged.module[0].base.weight, kept)
    assert [name for name in shared(averaged, model) if name.startswith("0.")] == []
    exported = averaged.averaged_state_dict(frozen=False)
    assert [name for name in exported if "base" in name] == ["0.base.weight", "0.base.bias"]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.float(),
        lambda model: setattr(model[0].base, "weight", nn.Parameter(torch.ones(WIDTH, WIDTH).bfloat16(), False)),
        lambda model: setattr(model[0].base.weight, "data", torch.ones(WIDTH, WIDTH).bfloat16()),
        lambda model: model[0].base.weight.data.fill_(2),
    ],
    ids=["cast", "replaced", "data", "written"],
)
def test_a_base_that_changes_is_followed(change: Callable[[nn.Module], object]) -> None:
    model = make_model()
    averaged = make(model)
    train(model, averaged)
    change(model)
    train(model, averaged)
    assert torch.equal(averaged.module[0].base.weight, model[0].base.weight.bfloat16())
    assert averaged.module[0].base.weight.dtype == torch.bfloat16


def test_copies_and_pickles_have_their_own() -> None:
    model = make_model()
    averaged = make(model)
    train(model, averaged)
    file = io.BytesIO()
    torch.save((model, averaged), file)
    file.seek(0)
    again, loaded = torch.load(file, weights_only=False)
    assert shared(copy.deepcopy(averaged), model) == []
    train(again, loaded)
    assert len(shared(loaded, again)) == 2 * LAYERS  # the file has the memory that both share once
    with unchanged(again):
        loaded.load_state_dict({key: value + 1 for key, value in loaded.state_dict().items()})


@pytest.mark.parametrize("load", ["assign", "nested assign"])
def test_memory_of_a_state_is_lent_too(load: str) -> None:
    model = make_model()
    first, second = make(model), make(model)
    LOADS[load](second, first.state_dict())
    with unchanged(model, first):
        second.load_state_dict({key: value + 1 for key, value in second.state_dict().items()})


def test_a_load_into_the_model_is_no_load_into_the_average() -> None:
    model = make_model()
    averaged = make(model)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averaged.update_parameters(model)


class Marked(nn.Parameter):
    """A param of a class of its own, which knows how to copy itself."""

    def __copy__(self) -> Marked:
        return Marked(self.data, self.requires_grad)


def test_a_class_of_ones_own_is_lent_if_it_knows_how_to_copy_itself() -> None:
    model = make_model()
    model[0].base.weight = Marked(torch.randn(WIDTH, WIDTH).bfloat16(), requires_grad=False)
    averaged = make(model)
    assert len(shared(averaged, model)) == 2 * LAYERS
    assert isinstance(averaged.module[0].base.weight, Marked)


def test_a_base_that_the_average_stores_in_another_dtype_is_copied() -> None:
    model = make_model()
    averaged = make(model, format="float32")  # its dtype is that of the averages, so that the module runs
    train(model, averaged)
    assert shared(averaged, model) == []
    assert torch.equal(averaged.module[1].base.weight, model[1].base.weight.float())


@pytest.mark.parametrize("kind", [FusedAveragedModel, FusedAverages])
def test_a_model_that_grows_lends_its_base_as_before(kind: Any) -> None:
    model = make_model()
    averaged = make(model, kind)
    train(model, averaged)
    model.append(Layer(torch.bfloat16))
    assert averaged.adapt_to(model) == ["3.down", "3.up"]
    train(model, averaged)
    assert shared(averaged, model) == [*bases_of(model)]
    left_out = averaged.state_dict().keys() - averaged.state_dict(frozen=False).keys()
    assert {key.rpartition("module.")[2] for key in left_out} == {*bases_of(model)}


def test_wrapped_models_leave_their_base_out_of_states_too() -> None:
    model = make_model()
    for index, layer in enumerate(model):
        model[index] = checkpoint_wrapper(layer)
    averaged = make(model)
    train(model, averaged)
    state = averaged.state_dict(frozen=False)
    assert [key for key in state if ".base." in key] == []
    again = make(model)
    again.load_state_dict(state)
    assert differing(again.state_dict(), averaged.state_dict()) == []
    assert shared(averaged, model) == [*bases_of(model)]


@pytest.mark.parametrize("kind", [FusedAveragedModel, FusedAverages])
def test_a_write_into_a_frozen_param_in_a_swap_is_told(kind: Any) -> None:
    model = make_model()
    averaged = make(model, kind)
    train(model, averaged)
    bases = {name: param.clone() for name, param in bases_of(model).items()}
    told = pytest.raises(
        RuntimeError, match=r"'0\.base\.weight'.* the model lends it to its averages, and no swap puts"
    )
    with told, one_of(averaged).swapped_into(model), torch.no_grad():
        bases_of(model)["0.base.weight"].add_(1)
    assert torch.equal(bases_of(model)["0.base.weight"], bases["0.base.weight"] + 1)
    with one_of(averaged).swapped_into(model):
        model(torch.randn(2, WIDTH, dtype=torch.bfloat16))


def sevens(averaged: Any) -> dict[str, Tensor]:
    state = averaged.state_dict()
    return {key: torch.full_like(each, 7) if each.is_floating_point() else each for key, each in state.items()}


def saved_together(model: nn.Module, averaged: Any) -> Any:
    buffer = io.BytesIO()
    torch.save((model, averaged), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def shared_memory(model: nn.Module, averaged: Any) -> Any:
    return model.share_memory(), averaged


def off_and_on(model: nn.Module, averaged: Any) -> Any:
    for param in bases_of(model).values():
        storage, values = param.untyped_storage(), param.detach().clone()
        size = storage.nbytes()
        storage.resize_(0)
        keep = torch.empty(size, dtype=torch.uint8)  # or the memory is the same again
        storage.resize_(size)
        param.data.copy_(values)
        del keep
    return model, averaged


class Included:
    """An ``include`` that a pickle can hold."""

    def __call__(self, name: str, param: Tensor) -> bool:
        return ".base." not in name


@pytest.mark.parametrize("move", [saved_together, shared_memory, off_and_on])
@pytest.mark.parametrize("kind", [FusedAveragedModel, FusedAverages])
@pytest.mark.parametrize("use", ["load", "another model", "unfrozen"])
def test_shared_memory_that_moves_is_still_known_to_be_shared(move: Any, kind: Any, use: str) -> None:
    model = make_model()
    averages = make(model, kind)
    one_of(averages).include = Included()
    for each in averages.values() if kind is FusedAverages else [averages]:
        each.include = Included()
    train(model, averages)
    model, averages = move(model, averages)
    with unchanged(model):
        if use == "load":
            averages.load_state_dict(sevens(averages))
        elif use == "another model":
            other = copy.deepcopy(model)
            for param in bases_of(other).values():
                param.data.fill_(7)
            averages.update_parameters(other)
        else:
            model.requires_grad_(True)
            averages.update_parameters(model)
            before = {name: param.clone() for name, param in bases_of(one_of(averages).module).items()}
            for param in bases_of(model).values():
                param.data.neg_()
            assert differing(bases_of(one_of(averages).module), before) == []
            for param in bases_of(model).values():
                param.data.neg_()
            model.requires_grad_(True)
            for param in bases_of(model).values():
                param.requires_grad_(False)


@pytest.mark.parametrize("kind", [FusedAveragedModel, FusedAverages])
def test_frozen_params_may_be_on_meta(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta").requires_grad_(False), nn.Linear(2, 2))
    averages = make(model, kind)
    for _ in range(2):
        with torch.no_grad():
            model[1].weight.add_(1)
        averages.update_parameters(model)
    assert int(one_of(averages).n_averaged) == 2
    with one_of(averages).swapped_into(model):
        pass


@pytest.mark.parametrize("kind", [FusedAveragedModel, FusedAverages])
def test_a_state_without_frozen_params_that_are_sparse_loads(kind: Any) -> None:
    model = nn.Linear(2, 2)
    model.adj = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    averages = make(model, kind)
    averages.update_parameters(model)
    state = averages.state_dict(frozen=False)
    averages.load_state_dict(state)
    assert torch.equal(one_of(averages).module.adj.to_dense(), torch.eye(3))
