"""States that other tools have written load into averaged models, and go on as there."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swafast
from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages, ShardedAveragedModel
from swafast.convert import Conversion, kinds, load
from swafast.integrations.weight_average import Contract
from tests.convert_cases import CASES, CLOSE, EMA, Loading, Wrapped, continued, difference, state_of
from tests.frameworks.record_states import FOLDER, RECORDS, UNPINNED, Net, put
from tests.support import differing, same_bits, unchanged

#: Kinds whose states have one tensor for each param, and the key of these.
POSITIONAL = {"diffusers_ratio": "shadow_params", "torch_ema_ratio": "shadow_params", "nemo": "ema"}


def test_every_kind_is_recorded_in_small_files() -> None:
    assert {case.kind for case in CASES.values()} == kinds.KINDS.keys()
    assert CASES.keys() == RECORDS.keys() == {path.stem for path in FOLDER.glob("*.pt")}
    assert all(path.stat().st_size < 50_000 for path in FOLDER.iterdir())
    absent = (FOLDER.parent / "absent.txt").read_text()
    assert UNPINNED.keys() == {"nemo_toolkit"}
    assert re.search(r"^NeMo: .*recorded.*$", absent, re.MULTILINE)


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_state_goes_on_as_there(name: str) -> None:
    loading, case = Loading(name), CASES[name]
    got = loading.load(state_of(name))
    assert (got.rule, got.num_averaged, got.steps) == (case.rule, case.num_averaged, case.steps)
    assert loading.averaged.rule == case.rule
    assert int(loading.averaged.n_averaged) == case.num_averaged
    assert len(got.lost) == len(case.lost)
    assert all(each.startswith(start) for each, start in zip(got.lost, case.lost, strict=True)), got.lost
    average, expected = loading.go_on(), continued(name)
    params = {each for each, _ in loading.model.named_parameters()}
    assert params <= expected.keys()
    compared = [each for each in expected if each in params or case.use_buffers]
    compared = [each for each in compared if expected[each].is_floating_point()]
    if case.difference == 0.0:
        assert all(same_bits(average[each], expected[each]) for each in compared)
    else:
        assert difference(average, expected, compared) <= case.difference
    # That the records can tell: one model more or less in the average is far off where the rule goes by the count.
    if case.rule != EMA:
        other = Loading(name)
        other.load(state_of(name), num_averaged=case.num_averaged + 1)
        assert difference(other.go_on(), expected, compared) > 100 * CLOSE


@pytest.mark.parametrize("name", CASES)
def test_a_state_is_copied(name: str) -> None:
    loading, state = Loading(name), state_of(name)
    before = copy.deepcopy(state)
    loading.load(state)
    loading.go_on()
    for now, then in zip(tensors_of(state), tensors_of(before), strict=True):
        assert same_bits(now, then)


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for each in inner for tensor in tensors_of(each)]


# Damage


def holder_of(state: Any, name: str) -> tuple[Any, Any]:
    """Return what in a state holds the first param's average, and its key there."""
    if name in POSITIONAL or name in ("diffusers_power", "torch_ema_constant"):
        holder = state["ema" if name == "nemo" else "shadow_params"] = list(
            state["ema" if name == "nemo" else "shadow_params"]
        )
        return holder, 0
    if name == "composer_ema":
        return state["state"]["model"], "net.second.weight"
    if name == "composer_swa":
        return dict(state["state"]["algorithms"])["SWA"]["swa_model"], "module.net.second.weight"
    inner = {
        "timm_train": "state_dict_ema",
        "lightning": "state_dict",
        "mmengine_hook": "state_dict",
        "ultralytics": "ema",
    }
    holder = state.get(inner.get(name, ""), state)
    return holder, next(key for key in holder if key.endswith("second.weight") and "online" not in key)


def without_first(state: Any, name: str) -> None:
    holder, key = holder_of(state, name)
    del holder[key]


def with_another_shape(state: Any, name: str) -> None:
    holder, key = holder_of(state, name)
    holder[key] = torch.zeros(5, 5)


def with_integers(state: Any, name: str) -> None:
    holder, key = holder_of(state, name)
    holder[key] = holder[key].to(torch.int64)


def without_tensor(state: Any, name: str) -> None:
    holder, key = holder_of(state, name)
    holder[key] = 0.5


DAMAGE: dict[str, Callable[[Any, str], None]] = {
    "a missing key, or a list that lacks one": without_first,
    "another shape": with_another_shape,
    "another dtype": with_integers,
    "no tensor": without_tensor,
}


def refuses(loading: Loading, state: Any, match: str | None = None, **options: Any) -> None:
    """Check that a state is refused, and that nothing has changed."""
    rule, count = loading.averaged.rule, loading.averaged.n_averaged.clone()
    errors = (ValueError, RuntimeError, TypeError)
    with unchanged(loading.averaged, loading.model), pytest.raises(errors, match=match):
        loading.load(state, **options)
    assert loading.averaged.rule is rule
    assert same_bits(loading.averaged.n_averaged, count)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", CASES)
def test_a_damaged_state_changes_nothing(name: str, damage: str) -> None:
    loading, state = Loading(name), state_of(name)
    DAMAGE[damage](state, name)
    refuses(loading, state)


@pytest.mark.parametrize("name", POSITIONAL)
def test_another_order_changes_nothing(name: str) -> None:
    loading, state, key = Loading(name), state_of(name), POSITIONAL[name]
    refuses(loading, {**state, key: state[key][::-1]}, "has its params in another order")
    refuses(loading, {**state, key: [*state[key], state[key][0]]}, "must have 6 tensors, one for each param, got 7")
    refuses(loading, {**state, key: state[key][0]}, "must be a list of tensors, got Tensor")


#: The entries of states that count.
COUNTS = {
    "torch_swa": ("n_averaged",),
    "ema_pytorch": ("step",),
    "diffusers_ratio": ("optimization_step",),
    "diffusers_power": ("update_after_step",),
    "torch_ema_ratio": ("num_updates",),
    "lightning": ("averaging_state", "n_averaged"),
    "mmengine_ema": ("steps",),
    "mmengine_hook": ("ema_state_dict", "steps"),
    "nemo": ("current_step",),
    "ultralytics": ("updates",),
}
BAD_COUNTS = (float("nan"), -1, 2.5, True, torch.tensor(float("nan")), torch.tensor([1, 2]), "7", 2**63)


@pytest.mark.parametrize("name", COUNTS)
def test_a_bad_count_changes_nothing(name: str) -> None:
    *path, key = COUNTS[name]
    for bad in BAD_COUNTS:
        loading, state = Loading(name), state_of(name)
        holder = state
        for each in path:
            holder = holder[each]
        holder[key] = bad
        refuses(loading, state, re.escape(f"[{key!r}] must be an integer >= 0, got {bad!r}"))
    del holder[key]
    if name == "mmengine_ema":  # what is left may be timm's, and the rule does not go by the count
        assert loading.load(state).num_averaged == 1
    else:
        refuses(loading, state, f"{key}|num_averaged must be given|must be the state of an average")


def test_bad_settings_change_nothing() -> None:
    for name, key, bad, match in (
        ("diffusers_ratio", "decay", 1.5, "decay must be in"),
        ("diffusers_ratio", "decay", float("nan"), "decay must be in"),
        ("diffusers_ratio", "min_decay", -1.0, r"min_decay must be in \[0, 1\], got -1.0"),
        ("diffusers_ratio", "min_decay", 1.5, r"min_decay must be in \[0, 1\], got 1.5"),
        ("diffusers_power", "inv_gamma", 0, "inv_gamma must be > 0"),
        ("diffusers_power", "use_ema_warmup", 1, "'use_ema_warmup'] must be a bool, got 1"),
        ("torch_ema_ratio", "decay", "0.9", "decay must be in"),
        ("nemo", "every_n_steps", 0, "'every_n_steps'] must be an integer >= 1, got 0"),
    ):
        refuses(Loading(name), {**state_of(name), key: bad}, match)
        left = {each: value for each, value in state_of(name).items() if each != key}
        refuses(Loading(name), left, f"'{key}'|must be the state of an average")


def test_a_state_of_another_model_changes_nothing() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8)

    for name in CASES:
        averaged = FusedAveragedModel(Other(), rule=CASES[name].rule)
        with unchanged(averaged), pytest.raises((ValueError, RuntimeError)):
            load(averaged, state_of(name), **CASES[name].options)


# What is asked for


def test_the_kind_is_the_one_that_fits() -> None:
    for name, case in CASES.items():
        loading, state = Loading(name), state_of(name)
        assert loading.load(state, kind=case.kind).num_averaged == case.num_averaged
        for other in kinds.KINDS.keys() - {case.kind}:
            refuses(loading, state, f"must be a state of .*, got .* It is of the kind '{case.kind}'", kind=other)
    refuses(loading, state, "kind must be 'auto' or one of 'torch', .*, got 'swa'", kind="swa")
    refuses(loading, {}, "must be the state of an average, .* got no entry")
    refuses(loading, {"epoch": 1, "weights": 2}, "got 'epoch', 'weights'$")
    inner = state_of("diffusers_ratio")
    refuses(loading, {"epoch": 1, "ema": [inner]}, re.escape("source['ema'][0] is of the kind 'diffusers', pass that"))
    refuses(loading, {"epoch": 1, "unet": inner}, re.escape("source['unet'] is of the kind 'diffusers', pass that"))
    both = {**state_of("torch_ema_ratio"), **inner}
    refuses(loading, both, "kind must be given, as the state can be of the kinds 'diffusers', 'torch_ema'")
    assert Loading("torch_ema_ratio").load(both, kind="torch_ema").num_averaged == 8


def test_a_count_is_asked_for_where_the_rule_goes_by_it() -> None:
    for name in ("timm_v2", "ignite", "composer_ema", "ema_pytorch"):
        loading, state = Loading(name), state_of(name)
        loading.averaged.rule = EqualAverage()
        refuses(loading, state, "num_averaged must be given for a state of .*, got None: pass ", num_averaged=None)
        assert loading.load(state, num_averaged=9).num_averaged == 9
        loading.averaged.rule = ExponentialAverage(0.9, warmup="ramp", tau=5)
        refuses(loading, state, "num_averaged must be given", num_averaged=None)
        loading.averaged.multi_avg_fn = lambda averages, params, count: None
        refuses(loading, state, "num_averaged must be given", num_averaged=None)
    loading = Loading("ema_pytorch")
    for step, count in {1234: 114, 101: 1, 100: 0, 3: 0}.items():
        state = {**state_of("ema_pytorch"), "step": torch.tensor(step)}
        asked = f"step is {step}, so with the defaults 10 and 100 it is {count}$"
        refuses(loading, state, asked, num_averaged=None)
        loading.averaged.rule = EMA  # the count is needed with a constant rule too, as it may be 0
        refuses(loading, state, asked, num_averaged=None)
    assert loading.load({**state, "step": torch.tensor(0)}, num_averaged=None).num_averaged == 0
    for name in ("torch_ema_ratio", "ignite", "composer_ema", "nemo", "ultralytics"):
        refuses(Loading(name), state_of(name), "num_averaged must be >= 1 .* would overwrite it", num_averaged=0)
    for bad in (-1, 1.5, True):
        refuses(Loading("timm_v3"), state_of("timm_v3"), "num_averaged must be", num_averaged=bad)


def test_an_average_that_is_still_a_copy_has_the_count_of_zero() -> None:
    for name in ("timm_v2", "timm_v3", "timm_train"):
        loading = Loading(name)
        loading.averaged.rule = EMA
        unknown = loading.load(state_of(name), num_averaged=None)
        assert unknown.num_averaged == 1
        assert "Pass num_averaged=0 if the average is still a copy" in unknown.lost[-1]
        assert loading.load(state_of(name), num_averaged=0).lost == unknown.lost[:-1]
        put(loading.model, 8)
        loading.averaged.update_parameters(loading.model)
        copied = loading.averaged.averaged_state_dict()
        assert all(same_bits(copied[each], value) for each, value in loading.model.state_dict().items())


def test_a_rule_of_the_state_replaces_another_with_a_warning() -> None:
    loading = Loading("torch_ema_ratio")
    loading.averaged.rule = ExponentialAverage(0.5)
    with pytest.warns(UserWarning, match=r"the rule .*0\.9.* of the state of torch_ema replaces the average's, .*0\.5"):
        assert loading.load(state_of("torch_ema_ratio")).rule == ExponentialAverage(0.9, warmup="ratio")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loading.load(state_of("torch_ema_ratio"))
        Loading("torch_ema_ratio").load(state_of("torch_ema_ratio"))


def test_a_least_decay_above_the_decay_is_the_decay() -> None:
    for name in ("diffusers_ratio", "diffusers_power"):
        assert Loading(name).load({**state_of(name), "min_decay": 0.95}).rule == ExponentialAverage(0.95)
        got = Loading(name).load({**state_of(name), "min_decay": 0.9}).rule
        assert isinstance(got, ExponentialAverage)
        assert (got.decay, got.min_decay, got.warmup) == (0.9, 0.9, name.removeprefix("diffusers_"))


def test_a_late_start_says_when_to_begin() -> None:
    loading = Loading("diffusers_ratio")
    got = loading.load({**state_of("diffusers_ratio"), "update_after_step": 100})
    assert got.num_averaged == 0
    assert any("attach(optimizer, start=101)" in each for each in got.lost)


# Where states come from, and where they go


def test_halves_are_converted_and_said() -> None:
    loading, state = Loading("ultralytics"), state_of("ultralytics")
    halves = {"ema": {name: value.half() for name, value in state["ema"].items()}, "updates": 7}
    got = loading.load(halves)
    assert got.lost[-1].startswith("all but torch.float16, in which the state has 'first.weight', 'first.bias'")
    assert torch.equal(loading.averaged.module.first.weight, halves["ema"]["first.weight"].float())
    module = Net().half()
    module.load_state_dict(halves["ema"])
    assert Loading("ultralytics").load({"ema": module, "updates": 7}).lost == got.lost
    doubles = {name: value.double() for name, value in state["ema"].items()}
    assert Loading("ultralytics").load({"ema": doubles, "updates": 7}).lost[-1].startswith("torch.float64, from which")


def test_composer_without_swapped_weights() -> None:
    state = state_of("composer_ema")["state"]
    ((_, algorithm),) = state["algorithms"]
    average, trained = state["model"], {**algorithm["ema_model"]["named_parameters_dict"]}
    trained |= algorithm["ema_model"]["named_buffers_dict"]
    params = dict(Wrapped().named_parameters())
    named = {
        "named_parameters_dict": {name: value for name, value in average.items() if name in params},
        "named_buffers_dict": {name: value for name, value in average.items() if name not in params},
    }
    for ema_model in (named, average):  # the latter before release 0.13
        own = {**algorithm, "ema_weights_active": False, "ema_model": ema_model}
        for algorithms in ([("EMA", own)], {"EMA": own}):
            loading = Loading("composer_ema")
            loading.load({"state": {**state, "model": trained, "algorithms": algorithms}})
            for name, value in loading.averaged.averaged_state_dict().items():
                assert torch.equal(value, average[name]), name
    unstarted = {**state, "algorithms": [("EMA", {**algorithm, "ema_started": False})]}
    assert Loading("composer_ema").load({"state": unstarted}).num_averaged == 0


def test_frozen_params_keep_their_values_if_a_state_has_the_trainable_ones() -> None:
    loading = Loading("diffusers_ratio")
    loading.model.second.requires_grad_(False)  # type: ignore[union-attr, operator]
    state = state_of("diffusers_ratio")
    before = loading.averaged.module.second.weight.clone()
    got = loading.load({**state, "shadow_params": state["shadow_params"][:4]}, model=loading.model)
    assert got.lost[-1] == (
        "frozen params, which the state does not have: the average has 'second.weight', 'second.bias'"
    )
    assert same_bits(loading.averaged.module.second.weight, before)
    assert same_bits(loading.averaged.module.norm.bias, state["shadow_params"][3])
    refuses(loading, {**state, "shadow_params": state["shadow_params"][:3]}, "6 tensors, .* or 4, one for each train")


@pytest.mark.parametrize("kind", [FusedAveragedModel, ShardedAveragedModel])
@pytest.mark.parametrize("name", POSITIONAL)
def test_trained_params_that_a_state_lacks_are_refused_or_lost(name: str, kind: Any) -> None:
    class Larger(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

    model, smaller = Larger(), Loading(name)
    put(model, 0)
    own = [*model.second.parameters()], [*model.first.parameters(), *model.norm.parameters()]
    by_optimizer = {"optimizer": torch.optim.SGD([{"params": own[0]}, {"params": own[1]}])}
    by_position = {"optimizer": torch.optim.SGD([*own[1], *own[0]])}
    by_model = {"model": smaller.model, **smaller.options}
    by_its_order = by_optimizer if name == "nemo" else by_position
    lacking = "must have an average of each param that is trained, got none of 'head.weight', 'head.bias': leave them"
    if name != "nemo":
        averaged = kind(model, num_averaged=1)
        before = copy.deepcopy(averaged.averaged_state_dict())
        with pytest.raises(ValueError, match=lacking):
            load(averaged, state_of(name), **by_model)
        assert differing(averaged.averaged_state_dict(), before) == []
        assert int(averaged.n_averaged) == 1
    got = load(kind(model), state_of(name), **by_its_order)  # it averages what the optimizer holds
    assert got.lost[-1].startswith("params that the optimizer does not hold, which the state does not have: the av")
    assert got.lost[-1].endswith("has 'head.weight', 'head.bias'")
    chosen = load(kind(model, include=lambda name, param: "head" not in name), state_of(name), **by_its_order)
    assert ("params that include= leaves out" in chosen.lost[-1]) == (kind is FusedAveragedModel)
    model.head.requires_grad_(False)
    assert "frozen params, which the state does not have" in load(kind(model), state_of(name), **by_its_order).lost[-1]


def test_composer_names_the_params_that_its_average_lacks() -> None:
    state = state_of("composer_ema")["state"]
    ((_, algorithm),) = state["algorithms"]
    loading = Loading("composer_ema")
    params = {name: state["model"][name] for name, _ in loading.model.named_parameters()}
    del params["net.first.weight"]
    own = {"named_parameters_dict": params, "named_buffers_dict": {}}
    algorithms = [("EMA", {**algorithm, "ema_weights_active": False, "ema_model": own})]
    given = {"state": {**state, "algorithms": algorithms}}
    refuses(loading, given, "an average of each param that is trained, got none of 'net.first.weight': leave them out")
    loading.net.first.weight.requires_grad_(False)  # type: ignore[union-attr]
    lost = loading.load(given).lost
    assert "frozen params, which the state does not have: the trained model has 'net.first.weight'" in lost
    assert lost[-1].startswith("buffers, which the state does not have: the trained model has 'net.norm.running_mean'")


def test_tied_params_have_one_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight

    averaged = FusedAveragedModel(Tied())
    state = {
        **{"decay": 0.9, "num_updates": 2, "collected_params": [torch.zeros(3)]},
        "shadow_params": [torch.full((3, 3), 2.0), torch.ones(3), torch.zeros(3)],
    }
    got = load(averaged, state)
    assert averaged.module.second.weight is averaged.module.first.weight
    assert averaged.module.first.weight[0, 0] == 2.0
    assert got.lost[-1].startswith("collected_params")


@pytest.mark.parametrize("format", ["exact", "compact", "compensated"])
def test_other_formats_take_full_precision(format: str) -> None:
    model = Net().bfloat16()
    put(model, 0)
    averaged = FusedAveragedModel(model, format=format)
    state = state_of("torch_ema_ratio")
    load(averaged, state)
    tolerance = 0.0 if format != "compact" else 2.0**-15
    first = averaged.averaged_state_dict()["first.weight"]
    assert torch.allclose(first, state["shadow_params"][0], rtol=tolerance, atol=0)


@pytest.mark.parametrize("format", ["exact", "compensated"])
def test_states_of_ours_keep_all_planes(format: str) -> None:
    model = Net().bfloat16()
    averaged = FusedAveragedModel(model, rule=EMA, format=format)
    for step in range(3):
        put(model, step)
        averaged.update_parameters(model)
    own = averaged.state_dict()
    names = {key.removeprefix("module."): value for key, value in own.items() if key.startswith("module.")}
    planes = {key: value for key, value in own.items() if not key.startswith("module.")}
    checkpoint = {"state_dict": names, "averaging_state": planes, "global_step": 3}
    for state in (own, checkpoint):
        other = FusedAveragedModel(Net().bfloat16(), rule=EMA, format=format)
        assert load(other, state).num_averaged == 3
        assert differing(other.state_dict(), own) == []


def test_wrapped_models_and_one_of_several() -> None:
    for name in ("timm_v2", "diffusers_ratio"):
        model = Net()
        put(model, 0)
        wrapped = nn.DataParallel(model)
        rule = Loading(name).load(state_of(name)).rule
        assert rule is not None
        averages = FusedAverages(model, rules={"fast": rule, "slow": EMA})
        for averaged in (FusedAveragedModel(wrapped, rule=rule), averages["fast"]):
            load(averaged, state_of(name))
            expected = Loading(name)
            expected.load(state_of(name))
            for key, value in averaged.averaged_state_dict().items():
                assert torch.equal(value, expected.averaged.averaged_state_dict()[key]), key
        with pytest.raises(TypeError, match=r'got FusedAverages: pass one of them, averages\["name"\]'):
            load(averages, state_of(name))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["torch_swa", "timm_v3", "diffusers_ratio", "nemo"])
def test_shards_take_whole_states(name: str) -> None:
    loading = Loading(name)
    whole = loading.load(state_of(name))
    sharded = ShardedAveragedModel(loading.model, rule=CASES[name].rule, use_buffers=CASES[name].use_buffers)
    assert load(sharded, state_of(name), **loading.options) == whole
    assert int(sharded.n_averaged) == whole.num_averaged
    full = sharded.averaged_state_dict()
    for key, value in loading.averaged.averaged_state_dict().items():
        assert torch.equal(full[key], value), key
    for each in DAMAGE:
        state = state_of(name)
        DAMAGE[each](state, name)
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            load(sharded, state, **loading.options)
        assert int(sharded.n_averaged) == whole.num_averaged
        assert torch.equal(sharded.averaged_state_dict()["first.weight"], full["first.weight"])


def test_bad_arguments() -> None:
    loading, state = Loading("torch_swa"), state_of("torch_swa")
    refuses(loading, Path("ema.pt"), re.escape("load the file before, with torch.load(path, weights_only=True)"))
    refuses(loading, Net(), re.escape("got Net: pass its state_dict()"))
    refuses(loading, 3, "a mapping, got int$")
    refuses(loading, state, "model must be a torch.nn.Module or None, got dict", model={})
    refuses(loading, state, "optimizer must be a torch.optim.Optimizer or None, got int", optimizer=3)
    with pytest.raises(TypeError, match="averaged must be one averaged model of swafast, got Net"):
        load(Net(), state)  # type: ignore[arg-type]
    refuses(loading, state, re.escape("got 'ema-pytorch': did you mean 'ema_pytorch'?"), kind="ema-pytorch")
    refuses(loading, state, "got 'unknown'$", kind="unknown")
    average = Contract()
    for given, meant in (
        (state, ": write convert.load(averaged, state), the state last"),
        (Net(), "got Net: write averaged = FusedAveragedModel(model) first"),
        (average.averaged, "got NoneType: the averaged model of a WeightAverage is made when the training begins"),
        (average, ": pass average.evaluated, once the training has begun. docs/frameworks/migration.md has the place"),
    ):
        with pytest.raises(TypeError, match=re.escape(meant)):
            load(given, loading.averaged)  # type: ignore[arg-type]
    average.make(loading.model)
    with pytest.raises(TypeError, match=re.escape("pass its averaged model, average.evaluated")):
        load(average, state)  # type: ignore[arg-type]
    loading.averaged.update_parameters(loading.model)
    with loading.averaged.swapped_into(loading.model), pytest.raises(RuntimeError, match="swapped"):
        loading.load(state)
    loading = Loading("nemo")
    refuses(loading, state_of("nemo"), "optimizer must be given, got None: .* 2 param groups", optimizer=None)
    strange = torch.optim.SGD([torch.zeros(3)])
    refuses(loading, state_of("nemo"), r"of the model only, got one of the shape \(3,\) besides", optimizer=strange)
    config = {key: value for key, value in state_of("diffusers_ratio").items() if key != "shadow_params"}
    refuses(Loading("diffusers_ratio"), config, "or the tensors of the saved model beside")


def test_it_is_found_from_the_root() -> None:
    assert swafast.convert.load is load
    assert swafast.convert.Conversion is Conversion
