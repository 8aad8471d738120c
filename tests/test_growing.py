"""Averages of a model that grows: names that stay keep their averages, and new ones begin."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swafast import ExponentialAverage, FusedAveragedModel, FusedAverages
from tests.ranks import on_ranks
from tests.sharded_models import Beside, wrap
from tests.support import differing, drift, step_with_ones, tensors_in, tensors_of, unchanged

RULES = {"fast": ExponentialAverage(0.5), "slow": ExponentialAverage(0.9)}
KINDS: dict[str, Callable[..., Any]] = {"one": FusedAveragedModel, "several": partial(FusedAverages, rules=RULES)}
FORMATS = [None, "float32", "exact", "mirrored", "compact", "compensated"]


class Adapter(nn.Module):
    """What PEFT puts in the place of a layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora = nn.Parameter(torch.randn(2, layer.in_features).to(layer.weight.dtype))


class Net(nn.Module):
    """A language model: its head is tied to its embeddings."""

    def __init__(self, rows: int = 5) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(rows, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, rows, bias=False)
        self.head.weight = self.table.weight

    def resize(self, rows: int) -> None:
        """Change the embeddings as Transformers does: the rows that both have are copied."""
        old, self.table, self.head = self.table.weight, nn.Embedding(rows, 4), nn.Linear(4, rows, bias=False)
        self.table.to(old.dtype)
        self.head.weight = self.table.weight
        with torch.no_grad():
            self.table.weight[: len(old)] = old[:rows]


def each_of(averaged: Any) -> list[FusedAveragedModel]:
    return averaged.values() if isinstance(averaged, FusedAverages) else [averaged]


def exports(averaged: Any) -> list[dict[str, Tensor]]:
    return [tensors_in(each.averaged_state_dict()) for each in each_of(averaged)]


def trained(make: Callable[..., Any], model: nn.Module, **options: Any) -> Any:
    averaged = make(model, **options)
    for _ in range(3):
        drift(model)
        averaged.update_parameters(model)
    drift(model)
    return averaged


@pytest.mark.parametrize(("kind", "format"), [*(("one", format) for format in FORMATS), ("several", "compact")])
def test_names_that_stay_keep_their_averages_and_new_ones_begin(kind: str, format: str | None) -> None:
    model = Net().bfloat16()
    averaged = trained(KINDS[kind], model, format=format)
    planes, before = averaged.state_dict(), exports(averaged)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attachment = averaged.attach(optimizer, step=0)
    model.resize(7)
    model.body[0] = Adapter(model.body[0])
    model.extra = nn.Linear(2, 2).bfloat16()
    renamed = {"body.0.base_layer.weight": "body.0.weight", "body.0.base_layer.bias": "body.0.bias"}
    begun = averaged.adapt_to(model, old_name=lambda name: renamed.get(name, name))
    assert begun == ["table.weight", "body.0.lora", "extra.weight", "extra.bias"]
    now = model.state_dict()
    for found, old in zip(exports(averaged), before, strict=True):
        assert torch.equal(found["table.weight"][:5], old["table.weight"])
        assert torch.equal(found["table.weight"][5:], now["table.weight"][5:].float())
        assert found["table.weight"] is found["head.weight"]
        for name in ("body.0.base_layer.weight", "body.0.base_layer.bias", "body.1.weight", "body.1.bias"):
            assert torch.equal(found[name], old[renamed.get(name, name)])
        for name in ("body.0.lora", "extra.weight", "extra.bias", "body.1.running_mean"):
            assert torch.equal(found[name], now[name].to(found[name].dtype))
    state = averaged.state_dict()
    kept = [key for key in planes if "body.1." in key and not key.endswith(("mean", "var", "tracked"))]
    assert len(kept) >= 2 * len(each_of(averaged))
    assert differing({key: state[key] for key in kept}, {key: planes[key] for key in kept}) == []
    # It goes on, by the attachment too.
    optimizer.add_param_group({"params": [model.body[0].lora]})
    step_with_ones(optimizer, [model.body[0].lora])
    assert attachment.step == 1
    assert [int(each.n_averaged) for each in each_of(averaged)] == [4] * len(each_of(averaged))
    pickle.loads(pickle.dumps(averaged)).update_parameters(model)


def test_what_goes_on_is_what_a_model_of_that_size_would_have_had() -> None:
    model, grown = Net(), Net(7)
    grown.load_state_dict(
        {**model.state_dict(), **{name: grown.state_dict()[name] for name in ("table.weight", "head.weight")}}
    )
    with torch.no_grad():
        grown.table.weight[:5] = model.table.weight
    whole, averaged = FusedAveragedModel(grown, rule=RULES["slow"]), FusedAveragedModel(model, rule=RULES["slow"])
    for _ in range(3):
        drift(model)
        with torch.no_grad():
            for name, param in grown.named_parameters():
                param[tuple(map(slice, model.get_parameter(name).shape))] = model.get_parameter(name)
        whole.update_parameters(grown)
        averaged.update_parameters(model)
    averaged.adapt_to(grown)
    for _ in range(2):
        drift(grown)
        whole.update_parameters(grown)
        averaged.update_parameters(grown)
    assert differing(exports(averaged)[0], exports(whole)[0]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_replaced_under_its_name_begins_if_it_is_said(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    averaged = trained(KINDS[kind], model)
    before = exports(averaged)
    model[1] = nn.Linear(3, 3)
    begun = averaged.adapt_to(model, old_name=lambda name: None if name.startswith("1.") else name)
    assert begun == ["1.weight", "1.bias"]
    for found, old in zip(exports(averaged), before, strict=True):
        assert torch.equal(found["0.weight"], old["0.weight"])
        assert torch.equal(found["1.weight"], model[1].weight)
    model[1] = nn.Bilinear(2, 2, 3)  # another number of dimensions
    assert averaged.adapt_to(model) == ["1.weight"]
    assert averaged.adapt_to(model) == []
    model[0] = nn.Linear(2, 2)  # smaller
    assert averaged.adapt_to(model) == []
    assert torch.equal(exports(averaged)[0]["0.weight"], before[0]["0.weight"][:2, :2])


def test_answers_of_include_stay_and_new_names_are_asked() -> None:
    model = Net()
    model.body[1].requires_grad_(False)
    averaged = trained(FusedAveragedModel, model, include=lambda name, param: param.requires_grad)
    before = averaged.averaged_state_dict()
    model.requires_grad_(False)
    model.body[1].requires_grad_(True)
    model.extra, model.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    averaged.adapt_to(model)
    drift(model)
    averaged.update_parameters(model)
    found, now = averaged.averaged_state_dict(), model.state_dict()
    copied = [name for name in now if torch.equal(found[name], now[name])]
    assert copied == [name for name in now if name.startswith(("body.1.", "frozen."))]
    assert not torch.equal(found["body.0.weight"], before["body.0.weight"])


def test_casts_devices_modes_and_functions_of_the_users_stay() -> None:
    model = Net()
    averaged = trained(FusedAveragedModel, model, avg_fn=lambda average, param, _: (average + param) / 2)
    averaged.double().requires_grad_(False).eval()
    before = averaged.averaged_state_dict()
    model.extra = nn.Linear(2, 2)
    averaged.adapt_to(nn.ModuleDict({"base": model}), old_name=lambda name: name.removeprefix("base."))
    assert {tensor.dtype for tensor in averaged.parameters()} == {torch.float64}
    averaged.adapt_to(copy.deepcopy(model), old_name=lambda name: f"base.{name}")
    found = averaged.averaged_state_dict()
    assert {tensor.dtype for name, tensor in found.items() if "num" not in name} == {torch.float64}
    assert torch.equal(found["body.0.weight"], before["body.0.weight"])
    assert not averaged.module.extra.training
    assert not any(param.requires_grad for param in averaged.parameters())
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.extra.weight, model.extra.weight.double())


@pytest.mark.parametrize("overlap", [False, True])
def test_an_attachment_follows_another_object(overlap: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    averaged = trained(FusedAveragedModel, model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attachment = averaged.attach(optimizer, overlap=overlap, step=0)
    grown = nn.Sequential(model[0], nn.Linear(3, 3))
    step_with_ones(optimizer, model.parameters())
    averaged.adapt_to(grown)
    step_with_ones(optimizer, model.parameters())
    attachment.join()
    other = FusedAveragedModel(grown, num_averaged=1)
    assert int(averaged.n_averaged) == 5
    assert averaged.averaged_state_dict().keys() == other.averaged_state_dict().keys()
    attachment.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_changes_nothing(kind: str) -> None:
    model = Net()
    averaged = trained(KINDS[kind], model)
    other = FusedAveragedModel(model, num_averaged=1)
    wrong: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: averaged.adapt_to(model.state_dict()), TypeError, "model must be a torch.nn.Module"),
        (
            lambda: averaged.adapt_to(nn.ModuleDict({"base": model})),
            ValueError,
            r"got none \(\['base.table.weight'\] for",
        ),
        (lambda: averaged.adapt_to(model, old_name=lambda name: 3), TypeError, "old_name must return a string or None"),
        (lambda: averaged.adapt_to(model, old_name=lambda name: {}[name]), KeyError, "table"),
        (lambda: averaged.adapt_to(nn.LazyLinear(2)), ValueError, "must be initialised"),
    ]
    modules = [each.module for each in each_of(averaged)]
    with unchanged(averaged):
        for call, kind_of, message in wrong:
            with pytest.raises(kind_of, match=message):
                call()
        for swapped in (each_of(averaged)[-1], other):
            with swapped.swapped_into(model), pytest.raises(RuntimeError, match="adapt_to must wait"):
                averaged.adapt_to(model)
    assert all(each.module is module for each, module in zip(each_of(averaged), modules, strict=True))
    averaged.update_parameters(model)


def test_before_the_first_update_it_still_holds_no_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    averaged = FusedAveragedModel(model)
    model.append(nn.Linear(2, 2))
    averaged.adapt_to(model)
    with pytest.raises(RuntimeError, match="holds no model yet"):
        averaged.copy_to(model)
    drift(model)
    averaged.update_parameters(model)
    assert differing(tensors_of(averaged.module), tensors_of(model)) == []


@pytest.mark.distributed
@on_ranks(2)
def test_shards_of_a_grown_model_have_the_bits_of_one_process() -> None:
    for mode, after, options in (
        ("plain", "plain", {"use_buffers": True, "deviations": 2}),
        ("ddp", "fsdp2", {"rules": RULES, "format": "compensated", "deviations": {"fast": 0}}),
        ("fsdp1", "fsdp1", {"include": lambda name, param: "point" not in name, "deviations": 3}),
    ):
        both = Beside(mode, updates=2, kind="fsdp2" if mode == "ddp" else None, **options)
        optimizer = torch.optim.SGD(both.sharded.parameters(), 0.1)
        attachment = both.averaged.attach(optimizer, both.sharded, start=100, step=0)
        grown = copy.deepcopy(both.reference)
        grown.extra, grown.point2 = nn.Linear(3, 5), nn.Parameter(torch.ones(2))
        grown.table = nn.Parameter(torch.cat([grown.table.detach(), torch.ones(4, 3)]))
        both.reference, both.mode, both.sharded = grown, after, wrap(copy.deepcopy(grown), after)
        names = {"encoder.bias": "frozen.bias", "norm.bias": None}

        def old_name(name: str, names: dict[str, str | None] = names) -> str | None:
            return names.get(name, name)

        begun = both.expected.adapt_to(grown, old_name=old_name)
        assert sorted(both.averaged.adapt_to(both.sharded, old_name=old_name)) == sorted(begun)
        assert attachment.model is both.sharded
        for _ in range(2):
            found, expected = both.averaged.full_state_dict(), both.expected.state_dict()
            assert differing(found, {name: expected[name] for name in found}) == [], (mode, after)
            assert expected.keys() - found.keys() <= {"module.point", "module.point2"}
            both.train()
        with pytest.raises(ValueError, match="must have names that the average has"):
            both.averaged.adapt_to(wrap(nn.Linear(3, 3), "plain"))
        both.averaged.update_parameters(both.sharded)
