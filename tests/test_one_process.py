"""Models that cannot be copied: what the error says, and sharded averages of one process without a process group."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

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
from tests.support import differing, drift, tensors_in, unchanged


class Uncopied(nn.Linear):
    """A layer that refuses to be copied."""

    def __deepcopy__(self, memo: object) -> None:
        raise NotImplementedError("no copies")


def with_attribute(value: Callable[[nn.Module], object]) -> Callable[[nn.Sequential], None]:
    return lambda model: setattr(model[0], "kept", value(model[0]))


#: What makes a deep copy fail, and what the error names.
MAKES: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "weight norm": (lambda model: nn.utils.weight_norm(model[0]), r"'weight' of '0', a Tensor \(Only Tensors"),
    "lock": (with_attribute(lambda _: threading.Lock()), r"'kept' of '0', a lock \(cannot pickle"),
    "file": (
        with_attribute(lambda _: io.TextIOWrapper(io.BytesIO())),
        r"'kept' of '0', a TextIOWrapper \(cannot pickle",
    ),
    "result": (with_attribute(lambda layer: [layer.weight * 2]), r"'kept' of '0', a list \(Only Tensors"),
    "buffer": (lambda model: model[0].register_buffer("kept", model[0].weight * 2), r"'kept' of '0', a Tensor"),
    "at the root": (lambda model: setattr(model, "kept", threading.Lock()), r"'kept' of 'Sequential', a lock"),
    "module": (lambda model: model.append(Uncopied(2, 2)), r"'3', a Uncopied \(no copies"),
}


def make_model(what: str) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    MAKES[what][0](model)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*weight_norm")
@pytest.mark.parametrize("what", MAKES)
@pytest.mark.parametrize("kind", [FusedAveragedModel, FusedAverages])
def test_the_error_names_what_cannot_be_copied(what: str, kind: Any) -> None:
    model, rules = make_model(what), {"rules": {"a": EqualAverage()}} if kind is FusedAverages else {}
    with pytest.raises(ValueError, match=rf"model must be one .*got {MAKES[what][1]}.*ShardedAveragedModel\(model\)"):
        kind(model, **rules)


def test_another_error_stays_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError("full")

    monkeypatch.setattr("swafast.average.model_copy.copy.deepcopy", full)
    monkeypatch.setattr("swafast.average.model_copy.find_uncopied", lambda model: None)
    with pytest.raises(MemoryError, match="full"):
        FusedAveragedModel(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*weight_norm")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("what", ["weight norm", "lock"])
@pytest.mark.parametrize("several", [False, True])
def test_a_sharded_average_serves_it_in_one_process(what: str, several: bool, tmp_path: Path) -> None:
    model, rule = make_model(what), ExponentialAverage(0.9)
    averages = ShardedAverages(model, rules={"ema": rule, "mean": EqualAverage()}) if several else None
    averaged = averages["ema"] if averages is not None else ShardedAveragedModel(model, rule=rule)
    params = dict(model.named_parameters())
    expected = {name: param.detach().clone() for name, param in params.items()}
    for update in range(3):
        drift(model)
        (averages or averaged).update_parameters(model)
        for name, param in params.items():
            expected[name] = param.detach().clone() if update == 0 else torch.lerp(param, expected[name], 0.9).detach()
    whole = averaged.full_state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(whole[f"module.{name}"], value)
    with unchanged(model), averaged.swapped_into(model):
        assert all(torch.equal(param, whole[f"module.{name}"]) for name, param in params.items())
    update_bn([torch.randn(8, 4)], model, call=lambda model, batch: model[1](model[0](batch)))
    dcp.save({"a": averaged.state_dict()}, checkpoint_id=tmp_path / "dcp")
    other = ShardedAveragedModel(model, rule=rule)
    state = {"a": other.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    other.load_state_dict(state["a"])
    assert differing(tensors_in(other.full_state_dict()), whole) == []
    Snapshots(tmp_path / "snapshots").save({"ema": other})
    other.load_state_dict(whole)
    other.copy_to(model)
    assert all(torch.equal(param, whole[f"module.{name}"]) for name, param in params.items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (averages or averaged).attach(optimizer, step=0)
    optimizer.step()
    assert averaged.n_averaged == 4


def test_its_bits_are_those_of_the_unsharded_class() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).bfloat16()
    alone, sharded = FusedAveragedModel(model, format="compact"), ShardedAveragedModel(model, format="compact")
    for _ in range(3):
        drift(model)
        alone.update_parameters(model)
        sharded.update_parameters(model)
    assert differing(sharded.full_state_dict(), alone.state_dict()) == []
