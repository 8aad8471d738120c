"""Modules, tensors and optimizers are told apart by ``is``: their own ``==``, ``hash()`` and truth are not asked."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from swafast import (
    EqualAverage,
    ExponentialAverage,
    FusedAveragedModel,
    FusedAverages,
    ShardedAveragedModel,
    ShardedAverages,
    update_bn,
)
from swafast.optim import SWA, ComposerSWA
from swafast.torch_private.modules import Walk
from tests.support import require_same, step_with_ones

RULES = {"mean": EqualAverage(), "fast": ExponentialAverage(0.5)}


def refuse(*_: object) -> NoReturn:
    raise AssertionError("was asked for its ==, its hash or its truth")


class Refusing:
    """Refuses to be compared. torch itself asks modules, params and optimizers for their hash, and nothing else."""

    __eq__ = __bool__ = refuse  # type: ignore[assignment]
    __hash__ = object.__hash__  # type: ignore[assignment]


class Lying:
    """Equals everything, as torchmetrics' ``Metric`` does, has one hash for all, and is false."""

    def __eq__(self, other: object) -> bool:
        return True

    def __bool__(self) -> bool:
        return False

    def __hash__(self) -> int:
        return 1


class OfTensor:
    def new_empty(self, *args: Any, **kwargs: Any) -> Any:  # torch's deepcopy wants it to keep the class
        return super().new_empty(*args, **kwargs).as_subclass(type(self))  # type: ignore[misc]


class RefusingTensor(Refusing, OfTensor, Tensor):
    __hash__ = refuse  # type: ignore[assignment]


class LyingTensor(Lying, OfTensor, Tensor): ...


class RefusingLayer(Refusing, nn.BatchNorm1d): ...


class LyingLayer(Lying, nn.BatchNorm1d): ...


class RefusingSGD(Refusing, torch.optim.SGD): ...


class LyingSGD(Lying, torch.optim.SGD): ...


KINDS = {
    "refusing": (RefusingLayer, RefusingTensor, RefusingSGD),
    "lying": (LyingLayer, LyingTensor, LyingSGD),
}


@pytest.fixture(params=KINDS)
def kinds(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    return KINDS[request.param]


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    """Two layers, a param and a buffer that answer comparisons as they like, beside plain params."""

    def __init__(self, layer: Any, tensor: Any) -> None:
        super().__init__()
        self.first, self.second, self.plain = layer(3), layer(3), nn.Linear(3, 3)
        self.odd = nn.Parameter(torch.randn(5).as_subclass(tensor))
        self.register_buffer("note", torch.randn(2).as_subclass(tensor))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.plain(x)))

    def values(self) -> dict[str, Tensor]:
        return {name: value.detach().clone().as_subclass(Tensor) for name, value in self.state_dict().items()}

    @torch.no_grad()
    def drift(self) -> None:
        layers = self.plain, self.first, self.second
        for param in (self.odd, *(param for layer in layers for param in layer.parameters())):
            param.add_(torch.randn(param.shape))


def means(updates: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the float64 mean of params, and the last of buffers."""
    buffers = ("note", "running_mean", "running_var", "num_batches_tracked")
    return {
        name: last if name.endswith(buffers) else torch.stack([of[name].double() for of in updates]).mean(0)
        for name, last in updates[-1].items()
    }


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip", "use_buffers": True, "backend": "reference"}], ids=str)
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_every_call_of_an_average(kinds: tuple[Any, Any, Any], options: Any, several: bool) -> None:
    model = Model(*kinds[:2])
    averages: Any = FusedAverages(model, rules=RULES, **options) if several else FusedAveragedModel(model, **options)
    averaged = averages["mean"] if several else averages
    seen = []
    for _ in range(3):
        model.drift()
        seen.append(model.values())
        averages.update_parameters(model)
    expected = means(seen)
    for name, value in averaged.averaged_state_dict().items():
        torch.testing.assert_close(value.as_subclass(Tensor).double(), expected[name].double(), msg=name)
    with averaged.swapped_into(model):
        torch.testing.assert_close(model.odd.as_subclass(Tensor).double(), expected["odd"])
    require_same(model.values(), seen[-1])
    state = copy.deepcopy(averages).state_dict()
    for assign in (False, True):
        averages.load_state_dict(state, assign=assign)
    averaged.copy_to(model)
    averages.update_parameters(model)
    assert averaged.n_averaged == 4


@pytest.mark.parametrize("format", ["exact", "mirrored", "compact", "compensated", "half"])
@pytest.mark.filterwarnings("ignore:format='half'")
def test_formats_compare_elements_by_torch(kinds: tuple[Any, Any, Any], format: str) -> None:
    model = Model(*kinds[:2])
    averaged = FusedAveragedModel(model, format=format, backend="reference")
    averaged.update_parameters(model)
    got, wanted = averaged.averaged_state_dict()["odd"].as_subclass(Tensor), model.odd.detach().as_subclass(Tensor)
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("overlap", [False, True])
def test_what_follows_an_optimizer(kinds: tuple[Any, Any, Any], overlap: bool) -> None:
    model = Model(*kinds[:2])
    one, two = (kinds[2](layer.parameters(), 0.1) for layer in (model.plain, model.first))
    averaged = FusedAveragedModel(model)
    with pytest.warns(UserWarning, match="trained params") if overlap else torch.no_grad():
        attachment = averaged.attach([one, two], overlap=overlap)
    for optimizer, layer in ((one, model.plain), (two, model.first), (one, model.plain), (two, model.first)):
        step_with_ones(optimizer, layer.parameters())
    attachment.join()
    assert averaged.n_averaged == attachment.step == 2
    two.load_state_dict(two.state_dict())
    attachment.detach()


def test_recipes_and_statistics(kinds: tuple[Any, Any, Any]) -> None:
    model = Model(*kinds[:2])
    optimizer = SWA(kinds[2](model.plain.parameters(), 0.1), swa_start=1, swa_freq=1)
    for _ in range(3):
        step_with_ones(optimizer, model.plain.parameters())
    optimizer.swap_swa_sgd()
    composer = ComposerSWA(
        FusedAveragedModel(model), optimizer.optimizer, max_duration="2ep", steps_per_epoch=1, swa_start="0.5dur"
    )
    composer.detach()
    inputs = torch.randn(16, 3)
    update_bn([inputs], model)
    torch.testing.assert_close(model.first.running_mean, model.plain(inputs).mean(0).detach())
    assert all(layer.num_batches_tracked == 1 for layer in (model.first, model.second))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_sharded_averages(kinds: tuple[Any, Any, Any], several: bool) -> None:
    model = Model(*kinds[:2])
    averages: Any = ShardedAverages(model, rules=RULES) if several else ShardedAveragedModel(model)
    averaged = averages["mean"] if several else averages
    seen = []
    for _ in range(2):
        model.drift()
        seen.append(model.values())
        averages.update_parameters(model)
    with averaged.swapped_into(model):
        torch.testing.assert_close(model.odd.as_subclass(Tensor).double(), means(seen)["odd"])
    require_same(model.values(), seen[-1])
    averages.load_state_dict(averages.state_dict())
    averaged.copy_to(model)
    optimizer = kinds[2](model.plain.parameters(), 0.1)
    with averages.attach(optimizer):
        step_with_ones(optimizer, model.plain.parameters())
    assert averaged.n_averaged == 3


def test_a_walk_sees_each_of_two_equal_modules() -> None:
    model = Model(LyingLayer, LyingTensor)
    walk = Walk(model)
    found = walk.tensors()
    assert found is not None
    assert found[walk.position(model.second.weight)] is model.second.weight
    model.second = LyingLayer(3)
    assert walk.tensors() is None
