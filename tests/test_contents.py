"""An average that holds no model says so where it is used, and goes on from weights when told how many models."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from swafast import (
    EqualAverage,
    ExponentialAverage,
    FusedAveragedModel,
    FusedAverages,
    ShardedAveragedModel,
    ShardedAverages,
    Snapshots,
    update_bn,
)
from swafast.optim import ComposerSWA
from tests.support import require_same, step_with_ones, tensors_of, unchanged

RULES = {"mean": EqualAverage(), "fast": ExponentialAverage(0.5)}
KINDS: dict[str, Callable[..., Any]] = {
    "one": FusedAveragedModel,
    "several": lambda model, **options: FusedAverages(model, rules=RULES, **options),
    "sharded": ShardedAveragedModel,
    "several sharded": lambda model, **options: ShardedAverages(model, rules=RULES, **options),
}
EVERY = pytest.mark.parametrize("kind", KINDS)
EMPTY, OVERWRITES = "holds no model yet", "the first update overwrites weights"


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.barrier()  # gloo may abort without it
    dist.destroy_process_group()


class Model(nn.Module):
    def __init__(self, value: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((6,), value, dtype=dtype))
        self.norm = nn.BatchNorm1d(6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if x.dim() > 1 else x * self.weight

    @torch.no_grad()
    def be(self, value: float) -> Model:
        self.weight.fill_(value)
        return self


def make(kind: str, model: nn.Module, **options: Any) -> tuple[Any, Any]:
    """Return averages, and the one of them that is used."""
    averages = KINDS[kind](model, **options)
    return averages, averages["mean"] if "several" in kind else averages


def swap(averaged: Any, model: Model) -> None:
    with averaged.swapped_into(model):
        pass


def export(averaged: Any, model: Model) -> dict[str, Tensor]:
    return averaged.averaged_state_dict() if isinstance(averaged, nn.Module) else averaged.full_state_dict()


#: What uses the averages, and needs a model in them.
USES: dict[str, Callable[[Any, Model], object]] = {
    "swapped_into": swap,
    "copy_to": lambda averaged, model: averaged.copy_to(model),
    "export": export,
    "forward": lambda averaged, model: averaged(torch.randn(6)),
    "update_bn": lambda averaged, model: update_bn([torch.randn(4, 6)], averaged),
}


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def uses_of(averaged: Any) -> list[str]:
    return [use for use in USES if isinstance(averaged, nn.Module) or use not in ("forward", "update_bn")]


def says_so(averaged: Any, model: Model, most: int = 4, *, loaded: bool = False) -> None:
    """Check that each use says that there is no model, and that none replaces the training's."""
    for use in uses_of(averaged)[:most]:
        with unchanged(model):
            if use == "copy_to" and not loaded:
                with pytest.raises(RuntimeError, match=f"copy_to must not .* {EMPTY}"):
                    USES[use](averaged, model)
            else:
                with pytest.warns(UserWarning, match=EMPTY) as seen:
                    USES[use](averaged, copy.deepcopy(model) if loaded else model)
                assert use == "update_bn" or {each.filename for each in seen} == {__file__}


def says_nothing(averaged: Any) -> None:
    other = Model()
    with silent():
        for use in uses_of(averaged)[:4]:
            USES[use](averaged, other)


@pytest.mark.parametrize(
    ("kind", "attached"),
    [*((kind, {}) for kind in KINDS), ("one", {"overlap": True}), ("several", {"offload": "cpu"})],
    ids=str,
)
def test_before_the_first_update(kind: str, attached: dict[str, Any], tmp_path: Path) -> None:
    model = Model()
    averages, averaged = make(kind, model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with averages.attach(optimizer, start=3, **attached):
        for _ in range(2):
            step_with_ones(optimizer, model.parameters())
        says_so(averaged, model, most=len(USES))
        with silent():
            averages.state_dict()
        with pytest.raises(ValueError, match="must have been updated"):
            Snapshots(tmp_path).save({"mean": averaged})
        with silent():
            step_with_ones(optimizer, model.parameters())
    says_nothing(averaged)


def loaded_into_parent(averages: Any, state: dict[str, Tensor]) -> None:
    nn.ModuleDict({"ema": averages}).load_state_dict({f"ema.{key}": value for key, value in state.items()})


def loaded_in_place(averages: Any, state: dict[str, Tensor]) -> None:
    for key, value in averages.state_dict().items():  # as dcp.load does
        value.copy_(state[key])


LOADS: dict[str, Callable[[Any, dict[str, Tensor]], object]] = {
    "load_state_dict": lambda averages, state: averages.load_state_dict(state),
    "assign": lambda averages, state: averages.load_state_dict(state, assign=True),
    "of the parent": loaded_into_parent,
    "in place": loaded_in_place,
}


@pytest.mark.parametrize("updates", [0, 2])
@pytest.mark.parametrize(("kind", "load"), [*(("one", load) for load in LOADS), ("several", "of the parent")])
def test_after_a_load(kind: str, load: str, updates: int) -> None:
    model = Model(1.0)
    saved = make(kind, model)[0]
    for _ in range(updates):
        saved.update_parameters(model)
    averages, averaged = make(kind, Model())
    LOADS[load](averages, saved.state_dict())
    says_nothing(averaged) if updates else says_so(averaged, model, loaded=True)
    with silent():
        averages.update_parameters(model.be(2.0))
    says_nothing(averaged)
    if updates:
        averages, averaged = make(kind, model)
        averages.update_parameters(model)
        LOADS["load_state_dict"](averages, make(kind, model)[0].state_dict())  # back to before the first update
        says_so(averaged, model, loaded=True)


def test_a_count_that_was_written_past_versions_is_read() -> None:
    averaged = FusedAveragedModel(Model())
    averaged.n_averaged.data.fill_(2)
    says_nothing(averaged)


@pytest.mark.parametrize("kind", ["sharded", "several sharded"])
@pytest.mark.parametrize("updates", [0, 2])
def test_after_a_load_of_shards(kind: str, updates: int) -> None:
    model = Model(1.0)
    saved = make(kind, model)[0]
    for _ in range(updates):
        saved.update_parameters(model)
    averages, averaged = make(kind, Model())
    averages.load_state_dict(saved.state_dict())
    says_nothing(averaged) if updates else says_so(averaged, model, loaded=True)


@pytest.mark.parametrize("updates", [0, 2])
def test_dcp_loads_in_place(updates: int, tmp_path: Path) -> None:
    model = Model(1.0)
    saved, averaged = FusedAveragedModel(model), FusedAveragedModel(Model())
    for _ in range(updates):
        saved.update_parameters(model)
    dcp.save({"ema": saved.state_dict()}, checkpoint_id=tmp_path)
    dcp.load({"ema": averaged.state_dict()}, checkpoint_id=tmp_path)
    says_nothing(averaged) if updates else says_so(averaged, model, loaded=True)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda averages: pickle.loads(pickle.dumps(averages)),
    "torch.save": lambda averages: torch.load(_saved(averages), weights_only=False),
    "moved": lambda averages: averages.double().float(),
    "swapped": lambda averages: _swapped(averages),
}


def _saved(averages: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(averages, file)
    file.seek(0)
    return file


def _swapped(averages: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for averaged in averages.values() if isinstance(averages, FusedAverages) else [averages]:
            swap(averaged, Model(3.0))
    return averages


@pytest.mark.parametrize(("kind", "copied"), [*(("one", copied) for copied in COPIES), ("several", "pickle")])
def test_copies_know_what_they_hold(kind: str, copied: str) -> None:
    model = Model(1.0)
    for content in ("nothing", "weights", "a model"):
        averages, averaged = make(kind, model)
        if content == "weights":
            averaged.module.load_state_dict(Model(5.0).state_dict())
        if content == "a model":
            averages.update_parameters(model)
        averages = COPIES[copied](averages)
        averaged = averages["mean"] if kind == "several" else averages
        with pytest.warns(UserWarning, match=EMPTY) if content == "nothing" else silent():
            averaged.averaged_state_dict()
        with pytest.warns(UserWarning, match=OVERWRITES) if content == "weights" else silent():
            averages.update_parameters(model)


def test_a_pickle_of_before_tells_nothing_and_is_used() -> None:
    averaged = FusedAveragedModel(Model())
    state = averaged.__getstate__()
    del state["_uncounted"]
    old = FusedAveragedModel.__new__(FusedAveragedModel)
    old.__setstate__(state)
    says_nothing(old)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_update_that_was_skipped_for_a_nan_leaves_no_model(backend: str) -> None:
    model = Model(float("nan"))
    averaged = FusedAveragedModel(model, nonfinite="skip", backend=backend)
    averaged.update_parameters(model)
    says_so(averaged, Model())
    averaged.update_parameters(model.be(1.0))
    says_nothing(averaged)


def test_a_count_on_a_gpu_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a counter that cannot be read without waiting, what has been written counts."""
    from swafast.average import contents

    model = Model(1.0)
    monkeypatch.setattr(contents, "is_on_host", lambda tensor: False)
    averaged = FusedAveragedModel(model)
    says_so(averaged, model)
    averaged.update_parameters(model)
    monkeypatch.setattr(Tensor, "__int__", lambda self: pytest.fail("was read"))
    assert averaged._uncounted is None
    for load in (loaded_in_place, loaded_into_parent):
        loaded = FusedAveragedModel(Model())
        assert loaded._holds() == contents.INITIAL
        load(loaded, averaged.state_dict())
        assert loaded._holds() == contents.MODELS


def test_composers_end_replaces_no_model_by_nothing() -> None:
    model = Model(1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    averaged = FusedAveragedModel(model)
    composer = ComposerSWA(averaged, optimizer, max_duration="4ep", steps_per_epoch=1, update_interval="2ep")
    resumed = {"step": 3, "schedule": {"start": 1, "every": 2, "end": 4}}  # without the average's state
    composer.attachment.load_state_dict(resumed)
    with unchanged(model), pytest.raises(RuntimeError, match=EMPTY):
        step_with_ones(optimizer, model.parameters())


# From weights


@pytest.mark.parametrize(
    ("kind", "dtype", "format"),
    [
        *((kind, torch.float32, "exact") for kind in KINDS),
        *(("one", torch.float32, format) for format in (None, "compact", "compensated")),
        ("sharded", torch.bfloat16, "exact"),
        ("one", torch.bfloat16, None),
        ("one", torch.float16, "mirrored"),
    ],
    ids=str,
)
def test_updates_go_on_from_so_many_models(kind: str, dtype: torch.dtype, format: str | None) -> None:
    model = Model(0.1, dtype)
    averages, averaged = make(kind, model, format=format, num_averaged=3)
    assert averaged.n_averaged == 3
    first = model.weight[0].item()
    with silent():
        got = export(averaged, model)
        key = "weight" if "weight" in got else "module.weight"
        if isinstance(averaged, nn.Module):  # not only plane 0
            torch.testing.assert_close(got[key], model.weight.float(), rtol=0, atol=1e-6 if format == "compact" else 0)
        averages.update_parameters(model.be(0.5))
        swap(averaged, model)
    assert averaged.n_averaged == 4
    with averaged.swapped_into(model):
        expected = first + (float(torch.tensor(0.5).to(dtype)) - first) / 4
        torch.testing.assert_close(model.weight.float(), torch.full((6,), expected), rtol=4e-3, atol=0)


@EVERY
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "num_averaged must be from 0 to .*, got -1"),
        (2**63 - 1, ValueError, "num_averaged must be from 0 to"),
        (True, TypeError, "num_averaged must be an int, got True"),
        (1.0, TypeError, "num_averaged must be an int, got 1.0"),
    ],
)
def test_a_number_that_is_none_is_refused(kind: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(kind, Model(), num_averaged=value)


def copied_in(averaged: Any, weights: Model) -> None:
    with torch.no_grad():
        averaged.module.weight.copy_(weights.weight)


def without_versions(averaged: Any, weights: Model) -> None:
    averaged.module.weight.data.copy_(weights.weight)


def other_memory(averaged: Any, weights: Model) -> None:
    averaged.module.weight.data = weights.weight.detach().clone()


def other_param(averaged: Any, weights: Model) -> None:
    averaged.module.weight = nn.Parameter(weights.weight.detach().clone())


WAYS_IN: dict[str, Callable[[Any, Model], object]] = {
    "load_state_dict": lambda averaged, weights: averaged.module.load_state_dict(weights.state_dict()),
    "assign": lambda averaged, weights: averaged.module.load_state_dict(weights.state_dict(), assign=True),
    "copy_": copied_in,
    "data.copy_": without_versions,
    "data": other_memory,
    "a param": other_param,
    "numpy": lambda averaged, weights: averaged.module.weight.detach().numpy().fill(2.0),
    "without a count": lambda averaged, weights: averaged.load_state_dict(
        {f"module.{key}": value for key, value in weights.state_dict().items()}, strict=False
    ),
}


@pytest.mark.parametrize(
    ("kind", "way", "format"),
    [
        *(("one", way, None) for way in WAYS_IN),
        ("several", "load_state_dict", "exact"),
        ("several", "data", None),
        ("one", "copy_", "compensated"),
        ("one", "data.copy_", "exact"),
    ],
)
def test_a_first_update_over_loaded_weights_warns(kind: str, way: str, format: str | None) -> None:
    averages, averaged = make(kind, Model(), format=format)
    WAYS_IN[way](averaged, Model(2.0))
    says_nothing(averaged)
    with pytest.warns(UserWarning, match=OVERWRITES) as seen:
        averages.update_parameters(Model(1.0))
    assert {each.filename for each in seen} == {__file__}
    averages, averaged = make(kind, Model(), format=format)
    WAYS_IN[way](averaged, Model(2.0))
    for each in averages.values() if kind == "several" else [averaged]:
        each.n_averaged.fill_(3)
    with silent():
        averages.update_parameters(Model(1.0))
        require_same({"weight": averaged.averaged_state_dict()["weight"]}, {"weight": torch.full((6,), 1.75)})


@pytest.mark.parametrize("way", ["load_state_dict", "assign", "data", "data.copy_"])
@pytest.mark.parametrize("format", [None, "exact", "compact", "compensated", "mirrored", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loaded_weights_keep_no_plane_of_others(dtype: torch.dtype, format: str | None, way: str) -> None:
    if (dtype, format) == (torch.float32, "exact") or (dtype, format) == (torch.bfloat16, "mirrored"):
        return
    averaged = FusedAveragedModel(Model(1.00371).to(dtype), format=format)
    WAYS_IN[way](averaged, Model(100.0).to(averaged.module.weight.dtype))
    averaged.n_averaged.fill_(3)
    other = FusedAveragedModel(Model().to(dtype), format=format)
    other.load_state_dict(averaged.state_dict())
    for each in (averaged, averaged, other):
        require_same({"weight": each.averaged_state_dict()["weight"]}, {"weight": torch.full((6,), 100.0)})


MOVES: dict[str, Callable[[FusedAveragedModel], object]] = {
    "cast": lambda averaged: averaged.double().float(),
    "cast of the module": lambda averaged: averaged.module.double().float(),
    "shared": lambda averaged: averaged.share_memory(),
    "shared module": lambda averaged: averaged.module.share_memory(),
    "planned": lambda averaged: averaged._bind(Model()),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_moves_are_no_loads(move: str, value: float) -> None:
    averaged = FusedAveragedModel(Model(value))
    MOVES[move](averaged)
    with pytest.warns(UserWarning, match=EMPTY):
        averaged.averaged_state_dict()
    with silent():
        averaged.update_parameters(Model(2.0))


@pytest.mark.parametrize("way", ["data", "a param"])
def test_on_a_gpu_other_memory_tells_of_a_load(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from swafast.average import contents

    monkeypatch.setattr(contents, "is_on_host", lambda tensor: False)
    for move in ("planned", "shared"):  # into other memory, by us
        averaged = FusedAveragedModel(Model())
        MOVES[move](averaged)
        assert averaged._holds() == contents.INITIAL
    WAYS_IN[way](averaged, Model(2.0))
    with pytest.warns(UserWarning, match=OVERWRITES):
        averaged.update_parameters(Model(1.0))


def test_training_beside_an_average_is_no_load() -> None:
    model = Model(1.0)
    averaged = FusedAveragedModel(model)
    with silent():
        model.be(2.0)
        averaged.eval().requires_grad_(False)
        averaged.update_parameters(model)
    require_same(tensors_of(averaged.module), tensors_of(model))


def test_an_average_that_was_emptied_holds_no_model() -> None:
    model = nn.Linear(2, 2)
    averaged = FusedAveragedModel(model)
    averaged.update_parameters(model)
    averaged.copy_to(model)
    averaged.to_empty(device="cpu")
    with unchanged(model), pytest.raises(RuntimeError, match="holds no model yet"):
        averaged.copy_to(model)
