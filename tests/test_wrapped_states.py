"""States of averages of wrapped models: they load whatever wraps the model, and what torch refuses is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import swafast
from swafast import ExponentialAverage, FusedAveragedModel, FusedAverages, ShardedAveragedModel, Snapshots
from swafast.sharded import ShardedAverages
from tests.support import differing, drift, tensors_in, unchanged

RULES = {"fast": ExponentialAverage(0.5), "slow": ExponentialAverage(0.9)}


class Versioned(nn.Linear):
    """Takes a state without its version for an old one, whose weight had the other sign and another name."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = -state.pop(f"{prefix}kernel", state.get(f"{prefix}weight"))
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def get_extra_state(self) -> dict[str, int]:
        return {"bits": int(self.weight.numel())}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == self.get_extra_state()


class Net(nn.Module):
    """Layers, among them one whose child has DDP's name."""

    def __init__(self, last: type[nn.Linear] = Versioned) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.last = last(2, 2)
        self.holder = nn.Module()
        self.holder.module = nn.Linear(2, 1)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def inner(model: Net) -> Net:
    model.first[0], model.last = compiled(model.first[0]), compiled(model.last)
    return model


def checkpointed(model: Net) -> Net:
    model.last, model.first = checkpoint_wrapper(compiled(model.last)), checkpoint_wrapper(model.first)
    return model


WRAPPERS: dict[str, Callable[[Net], nn.Module]] = {
    "bare": lambda model: model,
    "compile": compiled,
    "parallel": nn.DataParallel,
    "compiled parallel": lambda model: compiled(nn.DataParallel(model)),
    "ddp of compiled": lambda model: DistributedDataParallel(compiled(model)),
    "inner": inner,
    "checkpointed": checkpointed,
}
MODULES: dict[str, Callable[..., Any]] = {
    "one": FusedAveragedModel,
    "several": lambda model, **options: FusedAverages(model, rules=RULES, **options),
    "held": lambda model, **options: nn.ModuleDict({"held": FusedAveragedModel(model, **options)}),
}


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def averages_in(averaged: nn.Module) -> list[FusedAveragedModel]:
    return [module for module in averaged.modules() if isinstance(module, FusedAveragedModel)]


def exports(averaged: nn.Module) -> list[dict[str, Tensor]]:
    return [tensors_in(each.averaged_state_dict()) for each in averages_in(averaged)]


def trained(make: Callable[..., Any], model: nn.Module) -> Any:
    averaged = make(model)
    for each in averages_in(averaged):
        drift(each.module)
        each.n_averaged.fill_(3)
    return averaged


def require_equal(found: Any, expected: Any) -> None:
    for one, other in zip(exports(found), exports(expected), strict=True):
        assert differing(one, other) == []
        assert len(one) == 11
    assert [int(each.n_averaged) for each in averages_in(found)] == [3] * len(averages_in(expected))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_state_loads_whatever_wraps_the_model(wrap: str) -> None:
    source = trained(FusedAveragedModel, WRAPPERS[wrap](Net()))
    stock = AveragedModel(source.module)
    for other in WRAPPERS:
        target = FusedAveragedModel(WRAPPERS[other](Net()))
        target.load_state_dict(source.state_dict())
        require_equal(target, source)
    target = FusedAveragedModel(WRAPPERS["inner" if wrap == "bare" else "bare"](Net()))
    target.load_state_dict(stock.state_dict())
    assert differing(exports(target)[0], exports(source)[0]) == []


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(("wrap", "other"), [("bare", "ddp of compiled"), ("parallel", "inner"), ("compile", "bare")])
def test_states_with_planes_load_in_every_class_and_way(kind: str, wrap: str, other: str, tmp_path: Path) -> None:
    # Only torch's loader knows the versions of modules, and they do not follow if it loads a holder of averages.
    last = nn.Linear if kind == "held" else Versioned
    source = trained(MODULES[kind], WRAPPERS[wrap](Net(last).bfloat16()))
    target = MODULES[kind](WRAPPERS[other](Net(last).bfloat16()))
    for assign in (False, True):
        drift(target)
        target.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
        require_equal(target, source)
    if kind != "held":
        drift(target)
        swafast.save(source, tmp_path / "file")
        swafast.load(target, tmp_path / "file")
        require_equal(target, source)


class Child(nn.Module):
    """Has a param of its own, and a child of a wrapper's name."""

    def __init__(self, name: str, *own: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(2, 2))
        for param in own:
            setattr(self, param, nn.Parameter(torch.randn(2)))


@pytest.mark.parametrize(
    ("name", "own"), [("module", ()), ("module", ("weight",)), ("_orig_mod", ("scale",)), ("_orig_mod", ())]
)
def test_a_real_child_of_a_wrappers_name_stays_right(name: str, own: tuple[str, ...]) -> None:
    for wrap, other in itertools.product(("bare", "parallel", "compile"), repeat=2):
        source, target = (FusedAveragedModel(WRAPPERS[each](Child(name, *own))) for each in (wrap, other))
        target.load_state_dict(source.state_dict())
        assert differing(exports(target)[0], exports(source)[0]) == []


@pytest.mark.parametrize("kind", ["one", "several"])
def test_what_does_not_fit_is_refused_with_torchs_message_and_nothing_changes(kind: str) -> None:
    source, target = (trained(MODULES[kind], WRAPPERS[wrap](Net())) for wrap in ("parallel", "compile"))
    at = "fast." if kind == "several" else ""
    state = source.state_dict()
    state[f"{at}module.module.nothing.weight"] = state.pop(f"{at}module.module.last.bias")
    with unchanged(target), pytest.raises(RuntimeError) as raised:
        target.load_state_dict(state)
    assert f'Missing key(s) in state_dict: "{at}module._orig_mod.last.bias"' in str(raised.value)
    assert "Unexpected key(s) in state_dict: " in str(raised.value)
    kept = [each.averaged_state_dict()["last.bias"] for each in averages_in(target)]
    result = target.load_state_dict(state, strict=False)
    assert result.missing_keys == [f"{at}module._orig_mod.last.bias"]
    assert len(result.unexpected_keys) == 1
    assert torch.equal(averages_in(target)[0].averaged_state_dict()["last.bias"], kept[0])
    state = source.state_dict()
    state[f"{at}module.module.first.0.weight"] = torch.zeros(3)
    with unchanged(target), pytest.raises(RuntimeError, match=r"size mismatch for .*module._orig_mod.first.0.weight"):
        target.load_state_dict(state)


def test_a_key_that_the_models_code_renames_comes_to_its_module() -> None:
    source, target = trained(FusedAveragedModel, inner(Net())), FusedAveragedModel(compiled(Net()))
    state = source.state_dict()
    state["module.last._orig_mod.kernel"] = -state.pop("module.last._orig_mod.weight")
    del state._metadata["module.last._orig_mod"]
    target.load_state_dict(state)
    require_equal(target, source)


@pytest.mark.parametrize("wrap", ["compile", "parallel", "inner"])
def test_averages_on_ranks_and_snapshots_match_names_too(wrap: str, tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    wrapped = nn.Sequential(compiled(model()[0]), model()[1]) if wrap == "inner" else WRAPPERS[wrap](model())
    source = FusedAveragedModel(wrapped)
    drift(wrapped)
    source.update_parameters(wrapped)
    for target in (ShardedAveragedModel(model()), ShardedAveragedModel(DistributedDataParallel(model()))):
        target.load_state_dict(source.state_dict())
        assert differing(target.full_state_dict(), FusedAveragedModel(model()).state_dict()) != []
        back = FusedAveragedModel(wrapped)
        back.load_state_dict(target.full_state_dict())
        assert differing(tensors_in(back.state_dict()), tensors_in(source.state_dict())) == []
    several = ShardedAverages(model(), rules=RULES)
    several.load_state_dict({f"{name}.{key}": value for name in RULES for key, value in source.state_dict().items()})
    assert differing(several["fast"].full_state_dict(), target.full_state_dict()) == []
    snapshots = Snapshots(tmp_path)
    snapshots.save(source)
    for like in (wrapped, model(), WRAPPERS["parallel"](model())):
        given = snapshots.synthesize(swafast.EqualAverage(), like=like.state_dict())
        like.load_state_dict(given)
        for found, expected in zip(given.values(), exports(source)[0].values(), strict=True):
            assert torch.equal(found, expected)
