"""Loads that fail: nothing has changed, whatever raises and whatever the model's own code does while it loads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swafast import ExponentialAverage, FusedAveragedModel, FusedAverages
from swafast.optim import SWA
from swafast.terms.converting import write_all
from tests.support import differing, drift, is_interrupted, refused, step_with_ones, tensors_in, tensors_of

Averaged = FusedAveragedModel | FusedAverages
Patch = Callable[[nn.Module], object]


class Observer(nn.Module):
    """Writes its buffer at once while it loads, as torch's observers do, and counts its loads."""

    def __init__(self) -> None:
        super().__init__()
        self.loads, self.seen = 0, {"batches": 0}
        self.register_buffer("least", torch.zeros(3))
        self.scale = nn.Parameter(torch.ones(3))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.loads += 1
        self.get_buffer("least").data.copy_(state_dict[prefix + "least"])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def get_extra_state(self) -> dict[str, int]:
        return self.seen

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.loads += 1
        self.seen.update(state)


class Net(nn.Module):
    """Layers, code of its own for loading, a list of params beside the dict (in the RNN), and ties."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.observer = Observer()
        self.rnn = nn.GRU(3, 3)
        self.last = nn.Linear(4, 3)
        self.last.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)


def one(model: nn.Module, **options: Any) -> FusedAveragedModel:
    return FusedAveragedModel(model, **options)


def several(model: nn.Module, **options: Any) -> FusedAverages:
    return FusedAverages(model, rules={"fast": ExponentialAverage(0.5), "slow": ExponentialAverage(0.9)}, **options)


def trained(make: Callable[..., Averaged], **options: Any) -> Averaged:
    model = Net()
    averaged = make(model, **options)
    for _ in range(2):
        drift(model)
        averaged.update_parameters(model)
    return averaged


def modules_of(averaged: Averaged) -> list[nn.Module]:
    """Return the copies of the model in the averages."""
    return [each.module for each in (averaged.values() if isinstance(averaged, FusedAverages) else [averaged])]


@contextmanager
def unchanged_in_all(averaged: Averaged) -> Iterator[None]:
    """Check that after the body tensors, the tensors that RNNs list, counts and extra state are what they were."""
    models = modules_of(averaged)
    before = tensors_of(averaged), [id(tensor) for tensor in averaged.parameters()]
    loads = [(model.observer.loads, dict(model.observer.seen)) for model in models]
    yield
    assert differing(tensors_of(averaged), before[0]) == []
    assert [id(tensor) for tensor in averaged.parameters()] == before[1]
    assert [(model.observer.loads, model.observer.seen) for model in models] == loads
    for model in models:
        assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))
        assert model.last.weight is model.first.weight


def other_state(averaged: Averaged) -> dict[str, Any]:
    """Return a state of other values."""
    state = copy.deepcopy(averaged.state_dict())
    for value in state.values():
        if isinstance(value, Tensor):
            value.add_(3)
        else:
            value["batches"] += 1
    return state


def _raise(*_: object) -> None:
    raise OSError("of the model's author")


def _raise_in_a_setter(model: nn.Module) -> None:
    own = {"get_extra_state": lambda self: {"batches": 0}, "set_extra_state": _raise}
    model.norm.__class__ = type("Norm", (nn.BatchNorm1d,), own)


RAISE: dict[str, Patch] = {
    "a hook after the last": lambda model: model.norm.register_load_state_dict_post_hook(_raise),
    "a hook before the last": lambda model: model.norm.register_load_state_dict_pre_hook(_raise),
    "a hook after all": lambda model: model.register_load_state_dict_post_hook(_raise),
    "a hook before a first one": lambda model: model.first.register_load_state_dict_pre_hook(_raise),
    "an extra state": _raise_in_a_setter,
}
SPOIL: dict[str, Callable[[dict[str, Any], str], object]] = {
    "a shape": lambda state, key: state.update({key: torch.zeros(9)}),
    "a missing key": lambda state, key: state.pop(key),
    "no tensor": lambda state, key: state.update({key: "running_var"}),
    "no values": lambda state, key: state.update({key: state[key].to("meta")}),
    "a layout": lambda state, key: state.update({key: state[key].to_sparse()}),
    "freed memory": lambda state, key: state[key].untyped_storage().resize_(0),
    "complex numbers": lambda state, key: state.update({key: state[key].to(torch.complex64)}),
    "a count of a half": lambda state, key: state.update({_count(key): torch.tensor(0.5)}),
    "a count below 0": lambda state, key: state.update({_count(key): torch.tensor(-1)}),
}
#: What torch accepts in a load by assignment, in which nothing is copied.
ASSIGNED = ("no values", "a layout", "freed memory", "complex numbers")


def _count(key: str) -> str:
    return key.partition("module.")[0] + "n_averaged"


KINDS = pytest.mark.parametrize("make", [one, several])
ASSIGN = pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])


@KINDS
@pytest.mark.parametrize(
    ("spoil", "assign"), [(spoil, assign) for spoil in SPOIL for assign in (False, True)[: 2 - (spoil in ASSIGNED)]]
)
def test_a_state_that_does_not_fit_changes_nothing_beside_what_cannot_be_copied(
    make: Callable[..., Averaged], spoil: str, assign: bool
) -> None:
    averaged = trained(make)
    for model in modules_of(averaged):
        model.lock = threading.Lock()
    state = other_state(averaged)
    SPOIL[spoil](state, next(key for key in reversed(state) if key.endswith("norm.running_var")))
    with unchanged_in_all(averaged), pytest.raises(RuntimeError, match=r"norm\.running_var|n_averaged"):
        averaged.load_state_dict(state, assign=assign)


@KINDS
@ASSIGN
@pytest.mark.parametrize(("fail", "exchanges"), [*((fail, False) for fail in RAISE), ("a hook after the last", True)])
def test_code_of_the_model_that_raises_changes_nothing(
    make: Callable[..., Averaged], fail: str, exchanges: bool, assign: bool
) -> None:
    averaged = trained(make, format="exact")
    RAISE[fail](modules_of(averaged)[-1])
    state = other_state(averaged)
    torch.__future__.set_swap_module_params_on_conversion(exchanges)
    try:
        with unchanged_in_all(averaged), pytest.raises(OSError, match="author"):
            averaged.load_state_dict(state, assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@KINDS
@pytest.mark.parametrize(  # torch cannot exchange an RNN's params in a load by assignment
    ("assign", "exchanges"), [(False, False), (True, False), (False, True)], ids=["copied", "assigned", "exchanged"]
)
def test_a_load_runs_code_of_the_model_once_and_loads_all(
    make: Callable[..., Averaged], assign: bool, exchanges: bool
) -> None:
    averaged = trained(make)
    calls: list[str] = []
    for model in modules_of(averaged):
        model.first.register_load_state_dict_pre_hook(lambda *_: calls.append("before"))
        model.first.register_load_state_dict_post_hook(lambda *_: calls.append("after"))
    state = other_state(averaged)
    torch.__future__.set_swap_module_params_on_conversion(exchanges)
    try:
        averaged.load_state_dict(copy.deepcopy(state), assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert differing(tensors_in(averaged.state_dict()), tensors_in(state)) == []
    assert calls == ["before", "after"] * len(modules_of(averaged))
    for model in modules_of(averaged):
        assert (model.observer.loads, model.observer.seen) == (2, {"batches": 1})  # tensors, and the extra state
        assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))
        assert all(type(tensor) in (nn.Parameter, Tensor) for tensor in (*model.parameters(), *model.buffers()))
        assert all(param.requires_grad for param in model.parameters())
        assert model.last.weight is model.first.weight
    averaged.update_parameters(Net())


def test_a_load_by_assignment_does_not_make_later_loads_of_the_state_assign() -> None:
    averaged = FusedAveragedModel(nn.Linear(2, 2))
    state = averaged.state_dict()
    averaged.load_state_dict(state, assign=True)
    own = averaged.module.weight.data_ptr()
    other = FusedAveragedModel(nn.Linear(2, 2))
    other.load_state_dict(state)
    assert other.module.weight.data_ptr() != own


def test_hooks_that_rename_keys_are_heard_and_what_is_integer_is_converted() -> None:
    averaged = FusedAveragedModel(nn.Sequential(nn.Linear(2, 2)))
    averaged.module.register_load_state_dict_pre_hook(
        lambda module, state, prefix, *_: state.update({f"{prefix}0.weight": state.pop(f"{prefix}old")})
    )
    state = averaged.state_dict()
    del state["module.0.weight"]
    averaged.load_state_dict({**state, "module.old": torch.arange(4).view(2, 2)})
    assert averaged.module[0].weight.tolist() == [[0, 1], [2, 3]]


LOADING = "average/loading.py"


@ASSIGN
def test_an_interrupt_at_any_line_leaves_all_of_the_old_or_all_of_the_new(assign: bool) -> None:
    averaged = FusedAveragedModel(nn.Sequential(nn.Linear(1, 1, bias=False), Observer()))
    old, new = copy.deepcopy(averaged.state_dict()), other_state(averaged)
    expected, seen = [tensors_in(old), tensors_in(new)], [False, False]

    def load() -> None:
        averaged.load_state_dict(copy.deepcopy(new), assign=assign)

    line = 0
    while is_interrupted(load, line, LOADING):
        found = tensors_in(averaged.state_dict())
        which = [differing(found, each) == [] for each in expected]
        assert any(which), f"line {line}"
        seen = [before or now for before, now in zip(seen, which, strict=True)]
        averaged.load_state_dict(copy.deepcopy(old))
        line += 1
    assert line > 100
    assert seen == [True, True]


@KINDS
@pytest.mark.parametrize("format", [None, "exact", "mirrored", "compact", "compensated", "half"])
def test_to_empty_leaves_a_count_of_0_and_the_next_update_copies(
    make: Callable[..., Averaged], format: str | None
) -> None:
    model = nn.Linear(3, 3)
    averaged = make(model, format=format)
    averaged.update_parameters(model)
    holder = nn.ModuleList([averaged])
    for empty in (averaged.to_empty, holder.to_empty, lambda device: averaged.to("meta").to_empty(device=device)):
        empty(device="cpu")
        each = averaged.values() if isinstance(averaged, FusedAverages) else [averaged]
        assert [int(one.n_averaged) for one in each] == [0] * len(each)
        drift(model)
        averaged.update_parameters(model)
        averaged.to("cpu").share_memory()
        assert [int(one.n_averaged) for one in each] == [1] * len(each)
        for one in each:
            torch.testing.assert_close(one.averaged_state_dict()["weight"], model.weight.detach(), rtol=1e-2, atol=1e-2)


def test_values_that_were_made_in_inference_mode_load_there_and_elsewhere_nothing_changes() -> None:
    def numbers(state: dict[str, Tensor]) -> list[Any]:
        return [value.tolist() for value in state.values()]

    with torch.inference_mode():
        model = nn.Linear(2, 2)
        averaged = FusedAveragedModel(model)
        averaged.update_parameters(model)
        state = {key: value + 3 for key, value in averaged.state_dict().items()}
        averaged.load_state_dict(state)
        assert numbers(averaged.state_dict()) == numbers(state)
        more = {key: value + 3 for key, value in state.items()}
    with pytest.raises(RuntimeError, match=r"^Error\(s\) in loading"):
        averaged.load_state_dict(more)
    assert numbers(averaged.state_dict()) == numbers(state)


@pytest.mark.parametrize("line", range(8))
def test_an_interrupt_among_writes_leaves_none_or_all(line: int) -> None:
    tensors = [torch.zeros(2) for _ in range(3)]
    is_interrupted(lambda: write_all([(tensor, torch.ones(2)) for tensor in tensors]), line, "terms/formats.py")
    assert len({int(tensor.sum()) for tensor in tensors}) == 1


@pytest.mark.parametrize("hook", ["register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_recipes_optimizer_and_what_is_attached_to_it_go_back(hook: str, inner: bool) -> None:
    model = nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    swa = SWA(sgd, 1, 1, 0.05)
    attachments = [FusedAveragedModel(model).attach(optimizer) for optimizer in (sgd, swa)]
    step_with_ones(swa, model.parameters())
    saved = copy.deepcopy(swa.state_dict())
    step_with_ones(swa, model.parameters())
    getattr(sgd if inner else swa, hook)(_raise)
    before = repr(swa.state_dict())
    with pytest.raises(OSError, match="author"):
        swa.load_state_dict(saved)
    assert repr(swa.state_dict()) == before
    assert [attachment.step for attachment in attachments] == [2, 2]


@pytest.mark.parametrize("spoil", ["no values", "a layout", "freed memory", "complex numbers"])
def test_a_recipes_optimizer_refuses_what_it_cannot_copy(spoil: str) -> None:
    model = nn.Linear(2, 2)
    swa = SWA(torch.optim.SGD(model.parameters(), lr=0.1))
    swa.update_swa()
    saved = copy.deepcopy(swa.state_dict())
    swa.update_swa()
    SPOIL[spoil](saved["swa_state"][1], "swa_buffer")
    before = repr(swa.state_dict())
    with pytest.raises(ValueError, match=r"^state_dict\['swa_state'\]\[1\]\['swa_buffer'\] must"):
        swa.load_state_dict(saved)
    assert repr(swa.state_dict()) == before


class Counting(nn.Module):
    """Has tensors of each kind of dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.copied = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
        self.register_buffer("statistic", torch.randn(2))
        self.register_buffer("count", torch.zeros(2, dtype=torch.int32))
        self.register_buffer("mask", torch.zeros(2, dtype=torch.bool))


def into_parent(averaged: Averaged, state: dict[str, Any]) -> None:
    nn.ModuleDict({"ema": averaged}).load_state_dict({f"ema.{key}": value for key, value in state.items()})


WAYS: dict[str, Callable[[Averaged, dict[str, Any]], object]] = {
    "load_state_dict": lambda averaged, state: averaged.load_state_dict(state),
    "not strictly": lambda averaged, state: averaged.load_state_dict(state, strict=False),
    "of the parent": into_parent,
}
LOST = {
    "weight": torch.tensor([1j, 2]),
    "statistic": torch.tensor([1j, 2], dtype=torch.complex128),
    "copied": torch.tensor([1.5, 2.0]),
    "count": torch.tensor([2**31, 0]),
    "mask": torch.tensor([2, 1], dtype=torch.uint8),
}
#: Casts that torch makes without a loss of a part.
BENIGN = {
    "weight": torch.tensor([1, 2]),
    "statistic": torch.tensor([0.1, 2.0], dtype=torch.float64),
    "copied": torch.tensor([3.0, 2.0]),
    "count": torch.tensor([2**31 - 1, 0]),
    "mask": torch.tensor([0, 1]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("make", "way", "format"),
    [
        *((one, way, "exact") for way in WAYS),
        *((one, "load_state_dict", format) for format in ("float32", "mirrored", "compact", "compensated")),
        (several, "load_state_dict", "exact"),
    ],
)
def test_no_load_drops_a_part_of_a_number(make: Callable[..., Averaged], way: str, format: str) -> None:
    averaged = make(Counting(), format=format)
    state = {**make(Counting(), format="float32").state_dict()}
    for name, value in LOST.items():
        key = next(key for key in reversed(state) if key.endswith(f"module.{name}"))
        expected = rf"state_dict\['.*{name}'\] must (be real|have values)"
        with refused(RuntimeError, expected, averaged):
            WAYS[way](averaged, {**state, key: value})
        WAYS[way](averaged, {**state, key: BENIGN[name]})


@KINDS
def test_a_state_whose_planes_were_cast_is_not_taken_for_its_rounded_average(make: Callable[..., Averaged]) -> None:
    averaged, exact = make(Counting()), make(Counting(), format="exact")
    state = {key: value if "n_averaged" in key else value.double() for key, value in exact.state_dict().items()}
    with refused(RuntimeError, r"Unexpected key.*remainder\.weight", averaged):
        averaged.load_state_dict(state)
    before = tensors_of(exact)
    exact.load_state_dict(state)
    assert differing(tensors_of(exact), before) == []


class Fusing(nn.Module):
    """Has a hook that reads and writes what other modules have loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_buffer("fused", torch.zeros(4, 2), persistent=False)
        self.second.register_load_state_dict_post_hook(self._fuse)

    @torch.no_grad()
    def _fuse(self, *_: object) -> None:
        self.first.weight.clamp_(max=1.5)
        self.fused.copy_(torch.cat([self.first.weight, self.second.weight]))


def test_a_hook_reads_and_writes_what_other_modules_have_loaded() -> None:
    model = Fusing()
    averaged = FusedAveragedModel(model)
    averaged.update_parameters(model)
    state = {key: torch.full_like(value, 2) for key, value in averaged.state_dict().items()}
    before = tensors_of(averaged)
    with pytest.raises(RuntimeError, match=r"last\.bias"):
        averaged.load_state_dict({**state, "module.last.bias": torch.zeros(3)})
    assert differing(tensors_of(averaged), before) == []
    averaged.load_state_dict(state)
    assert averaged.module.first.weight.unique().tolist() == [1.5]
    assert averaged.module.fused.unique().tolist() == [1.5, 2.0]
