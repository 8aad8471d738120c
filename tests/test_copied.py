"""What is only copied needs ``copy_`` alone: buffers, and params that ``include`` leaves out, of every kind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from swafast import (
    EqualAverage,
    ExponentialAverage,
    FusedAveragedModel,
    FusedAverages,
    ShardedAveragedModel,
    save,
    update_bn,
)
from tests.support import Held, drift, refused, step_with_ones

pytestmark = pytest.mark.filterwarnings("ignore:.*(CSR|uantize|nested|TypedStorage)")


def _dense(seed: int) -> Tensor:
    """Make a matrix with another number of zeros for each seed."""
    values = torch.arange(12.0).view(3, 4) + seed
    return values * (torch.arange(12).view(3, 4) > seed % 5)


#: Make a tensor of a kind, of other values for each seed.
KINDS: dict[str, Callable[[int], Tensor]] = {
    "coo": lambda seed: _dense(seed).to_sparse(),
    "csr": lambda seed: _dense(seed).to_sparse_csr(),
    "quantised": lambda seed: torch.quantize_per_tensor(_dense(seed), 0.1 + seed, 0, torch.quint8),
    "by channel": lambda seed: torch.quantize_per_channel(
        _dense(seed), torch.tensor([0.1, 0.2, 0.3]) + seed, torch.zeros(3), 0, torch.quint8
    ),
    "subclass": lambda seed: TwoTensor(_dense(seed), _dense(seed + 1)),
    "nested": lambda seed: torch.nested.nested_tensor([_dense(seed)[0], _dense(seed)[1, :2]]),
    "expanded": lambda seed: _dense(seed)[:1].expand(3, 4),
}


def value_of(tensor: Tensor) -> Tensor:
    """Return the values of a tensor of any kind as a plain one."""
    if isinstance(tensor, TwoTensor):
        return torch.stack([tensor.a, tensor.b])
    if tensor.is_nested:
        return torch.cat(list(tensor.unbind()))
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor.detach().to_dense().clone()


class Model(nn.Module):
    """A layer, and a tensor of any kind: a buffer, or a frozen param."""

    def __init__(self, tensor: Tensor, *, is_buffer: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("odd", tensor) if is_buffer else self.put(nn.Parameter(tensor, requires_grad=False))

    def put(self, tensor: Tensor | None) -> None:
        """Take another tensor in the place of the odd one, as by an assignment."""
        (self._buffers if "odd" in self._buffers else self._parameters)["odd"] = tensor

    def next(self, tensor: Tensor) -> None:
        drift(self.layer)
        self.put(nn.Parameter(tensor, requires_grad=False) if "odd" in self._parameters else tensor)


def average_of(model: Model, several: bool = False, **options: Any) -> tuple[Any, FusedAveragedModel]:
    """Return an average that leaves the odd tensor out, or several, and one of them."""
    options["include"] = lambda name, _: name != "odd"
    if not several:
        averaged = FusedAveragedModel(model, **options)
        return averaged, averaged
    averages = FusedAverages(model, rules={"mean": EqualAverage(), "fast": ExponentialAverage(0.5)}, **options)
    return averages, averages["mean"]


def has(module: Any, value: Tensor) -> bool:
    return torch.equal(value_of(module.odd), value)


@pytest.mark.parametrize(("is_buffer", "several"), [(True, False), (False, True)], ids=["buffer", "param of several"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_copies_every_kind(kind: str, is_buffer: bool, several: bool) -> None:
    make = KINDS[kind]
    first, second, third = (value_of(make(seed)) for seed in (1, 2, 3))
    model = Model(make(1), is_buffer=is_buffer)
    averages, averaged = average_of(model, several)
    averages.update_parameters(model)
    assert has(averaged.module, first)
    model.next(make(2))
    averages.update_parameters(model)
    assert has(averaged.module, second)
    model.next(make(3))
    with averaged.swapped_into(model):
        assert has(model, second)
    assert has(model, third)
    assert has(averaged.module, second)
    if kind != "nested":  # torch does not load it
        exported = averaged.averaged_state_dict()
        assert torch.equal(value_of(exported["odd"]), second)
        state = averages.state_dict()
        averages.update_parameters(model)
        assert has(averaged.module, third)
        for assign in (False, True):
            averages.load_state_dict(copy.copy(state) if assign else pickle.loads(pickle.dumps(state)), assign=assign)
    averaged.copy_to(model)
    assert has(averaged.module, has_now := value_of(model.odd)), has_now
    averages.update_parameters(model)


@pytest.mark.parametrize("kind", ["coo", "quantised", "subclass", "expanded"])  # torch copies no other one deeply
def test_copies_and_casts_of_the_average_go_on(kind: str) -> None:
    make = KINDS[kind]
    model = Model(make(1))
    averaged, _ = average_of(model)
    averaged.update_parameters(model)
    model.next(make(2))
    for other in (copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged)), averaged.double().float()):
        assert has(other.module, value_of(make(1)))
        other.update_parameters(model)
        assert has(other.module, value_of(make(2)))


@pytest.mark.parametrize("kind", ["coo", "quantised", "subclass", "expanded"])
def test_an_overlapped_update_copies_before_the_next_forward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(KINDS[kind](1))
    averaged, _ = average_of(model)
    optimizer = torch.optim.SGD(model.layer.parameters(), lr=0.1)
    held = Held(monkeypatch)
    attachment = averaged.attach(optimizer, overlap=True)
    model.put(KINDS[kind](2))
    step_with_ones(optimizer, model.layer.parameters())
    model.put(KINDS[kind](3))  # by the next forward
    held.let_go.set()
    attachment.join()
    assert has(averaged.module, value_of(KINDS[kind](2)))
    attachment.detach()


@pytest.mark.parametrize(("nonfinite", "kind"), [*(("skip", kind) for kind in KINDS), ("raise", "coo")])
def test_an_update_that_does_not_happen_copies_nothing(kind: str, nonfinite: str) -> None:
    model = Model(KINDS[kind](1))
    averaged, _ = average_of(model, nonfinite=nonfinite)
    averaged.update_parameters(model)
    model.next(KINDS[kind](2))
    bias = model.layer.bias.detach()
    kept = bias[0].clone()
    bias[0] = float("nan")
    if nonfinite == "raise":
        with pytest.raises(ValueError, match=r"'layer\.bias' must be finite"):
            averaged.update_parameters(model)
    else:
        averaged.update_parameters(model)
    assert averaged.n_averaged == 1
    assert has(averaged.module, value_of(KINDS[kind](1)))
    bias[0] = kept
    averaged.update_parameters(model)
    assert has(averaged.module, value_of(KINDS[kind](2)))


@pytest.mark.parametrize("kind", ["coo", "csr"])
def test_a_load_of_another_kind_changes_nothing(kind: str) -> None:
    model = Model(KINDS[kind](1))
    averaged, _ = average_of(model)
    state = averaged.state_dict() | {"module.odd": _dense(1), "module.layer.bias": torch.ones(2)}
    for bad in (state, state | {"module.odd": KINDS["coo" if kind != "coo" else "csr"](2)}):
        with pytest.raises(RuntimeError, match=r"module\.odd|\"odd\""):
            averaged.load_state_dict(bad)
        assert has(averaged.module, value_of(KINDS[kind](1)))
        assert not torch.equal(averaged.module.layer.bias, torch.ones(2))


def test_a_file_of_dense_tensors_alone_says_so(tmp_path: Path) -> None:
    averaged, _ = average_of(Model(KINDS["coo"](1)))
    with pytest.raises(ValueError, match=r"got for 'module\.odd' .*sparse_coo: use torch\.save"):
        save(averaged, tmp_path / "averaged.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_function_of_the_users_own_leaves_them_to_torch_too() -> None:
    model = Model(KINDS["coo"](1))
    averaged = FusedAveragedModel(model, avg_fn=lambda average, param, n: average + (param - average) / (n + 1))
    for seed in (1, 2):
        model.next(KINDS["coo"](seed))
        averaged.update_parameters(model)
        assert has(averaged.module, value_of(KINDS["coo"](seed)))


# Buffers that the model makes anew


def nested(*lengths: int, layout: torch.layout = torch.strided) -> Tensor:
    return torch.nested.nested_tensor([torch.arange(float(length)) for length in lengths], layout=layout)


#: Made by their tests: the first nested tensor imports a second's worth of torch.
GROWN: dict[str, Callable[[], tuple[Tensor | None, Tensor | None]]] = {
    "grows": lambda: (torch.arange(4.0), torch.arange(8.0)),
    "shrinks": lambda: (torch.arange(8.0), torch.arange(2.0)),
    "gets another rank": lambda: (torch.arange(4.0), torch.ones(2, 3, 1)),
    "becomes whole numbers": lambda: (torch.arange(4.0), torch.arange(4)),
    "becomes sparse": lambda: (torch.eye(3), torch.eye(3).to_sparse()),
    "becomes dense": lambda: (torch.eye(3).to_sparse(), torch.eye(3)),
    "is nested otherwise": lambda: (nested(2, 3), nested(4, 1, 2)),
    "is jagged otherwise": lambda: (nested(2, 3, layout=torch.jagged), nested(4, 1, 2, layout=torch.jagged)),
    "comes": lambda: (None, torch.arange(4.0)),
    "comes sparse": lambda: (None, torch.eye(3).to_sparse()),
    "goes": lambda: (torch.arange(4.0), None),
    "goes sparse": lambda: (torch.eye(3).to_sparse(), None),
}


def same(module: Any, expected: Tensor | None) -> bool:
    if expected is None:
        return module.odd is None
    return module.odd.dtype == expected.dtype and has(module, value_of(expected))


@pytest.mark.parametrize(("case", "several"), [*((case, False) for case in GROWN), ("grows", True), ("comes", True)])
def test_a_copied_buffer_is_taken_over_as_it_is_now(case: str, several: bool) -> None:
    before, now = GROWN[case]()
    model = Model(before)  # type: ignore[arg-type]  # None is a buffer too
    averages, averaged = average_of(model, several)
    averages.update_parameters(model)
    model.put(now)
    averages.update_parameters(model)
    assert same(averaged.module, now)
    assert averaged.module.odd is None or averaged.module.odd is not model.odd
    averages.update_parameters(model)
    with averaged.swapped_into(model):
        assert same(model, now)
    averaged.copy_to(model)
    assert list(averaged.averaged_state_dict()) == list(model.state_dict())
    model.put(before)
    averages.update_parameters(model)
    assert same(averaged.module, before)
    assert averaged.n_averaged == 4


@pytest.mark.parametrize("case", GROWN)
def test_a_buffer_that_an_evaluation_makes_anew_stays_with_the_model(case: str) -> None:
    # A cache grows with its attributes in Python, such as its length, so the old one would not fit them.
    before, now = GROWN[case]()
    model = Model(before)  # type: ignore[arg-type]
    averaged, _ = average_of(model)
    averaged.update_parameters(model)
    drift(model.layer)
    own = model.layer.weight.detach().clone()
    with averaged.swapped_into(model):
        model.put(now)
    assert same(model, now)
    assert same(averaged.module, before)
    assert torch.equal(model.layer.weight, own)
    averaged.update_parameters(model)
    assert same(averaged.module, now)


def test_a_buffer_registered_since_is_registered_as_it_is_there() -> None:
    model = Model(torch.arange(2.0))
    averaged, _ = average_of(model)
    model.layer.register_buffer("cache", torch.arange(3.0), persistent=False)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.layer.cache, torch.arange(3.0))
    assert averaged.averaged_state_dict().keys() == model.state_dict().keys()


def test_a_copied_buffer_that_overlaps_itself_gets_memory_of_its_own() -> None:
    model = Model(torch.arange(4.0))
    averaged, _ = average_of(model)
    averaged.module.odd = torch.zeros(1).expand(4)  # a subclass may make its own copy
    averaged.update_parameters(model)
    assert same(averaged.module, torch.arange(4.0))


def test_a_swap_refuses_a_buffer_whose_elements_overlap_otherwise() -> None:
    model = Model(torch.arange(6.0).as_strided((4, 3), (1, 1)))
    averaged, _ = average_of(model)
    averaged.update_parameters(model)
    for call in (averaged.copy_to, lambda model: averaged.swapped_into(model).__enter__()):
        with refused(ValueError, "'odd' of the model must have memory of its own", model, averaged):
            call(model)


def test_tied_buffers_stay_tied_when_they_grow() -> None:
    model = Model(torch.arange(2.0))
    model.register_buffer("twin", model.odd)
    averaged, _ = average_of(model)
    model.odd = model.twin = torch.arange(5.0)
    averaged.update_parameters(model)
    assert averaged.module.odd is averaged.module.twin
    assert same(averaged.module, torch.arange(5.0))


def test_a_rotary_cache_grows_in_forwards() -> None:
    class Rotary(Model):
        def forward(self, x: Tensor) -> Tensor:
            if self.odd is None or self.odd.shape[0] < len(x):
                self.register_buffer("odd", torch.arange(float(len(x))), persistent=False)
            return self.layer(x) + self.odd[: len(x), None]

    model = Rotary(None)  # type: ignore[arg-type]
    averaged, _ = average_of(model)
    for length in (2, 5, 3, 9):
        model(torch.randn(length, 3))
        averaged.update_parameters(model)
        averaged(torch.randn(length, 3))
    with averaged.swapped_into(model):
        model(torch.randn(12, 3))
    model(torch.randn(11, 3))
    update_bn([torch.randn(4, 3)], model)
    averaged.update_parameters(model)
    assert same(averaged.module, torch.arange(12.0))


def test_a_failed_update_takes_no_buffer_over() -> None:
    model = Model(torch.arange(2.0))
    averaged, _ = average_of(model)
    averaged.update_parameters(model)
    model.put(torch.arange(5.0))
    model.layer.weight = nn.Parameter(torch.zeros(7))
    with refused(ValueError, r"'layer\.weight' must have the average's shape", averaged):
        averaged.update_parameters(model)


def test_an_averaged_buffer_and_a_frozen_param_keep_their_shape() -> None:
    model = Model(torch.arange(2.0))
    averaged = FusedAveragedModel(model, use_buffers=True)
    model.put(torch.arange(5.0))
    with refused(ValueError, r"'odd' must have the average's shape \(2,\), got \(5,\)", averaged):
        averaged.update_parameters(model)
    frozen = Model(torch.eye(3).to_sparse(), is_buffer=False)
    averaged, _ = average_of(frozen)
    frozen.put(nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False))
    with pytest.raises(ValueError, match=r"'odd' must be like the average's, .*\(3, 3\).*, got .*\(4, 4\)"):
        averaged.update_parameters(frozen)


@pytest.mark.parametrize("kind", [FusedAveragedModel, ShardedAveragedModel])
def test_a_sparse_buffer_that_is_to_be_averaged_is_refused_by_name(kind: Any) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("adj", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"'adj' of the model.* must be dense, got layout torch\.sparse_coo"):
        kind(model, use_buffers=True)
