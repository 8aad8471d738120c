"""`swafast.integrations.diffusers.EMAModel` beside diffusers' own, which stays the definition of right."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.training_utils import EMAModel as Theirs
from torch import Tensor, nn

from swafast import ExponentialAverage, FusedAveragedModel, convert
from swafast.integrations import param_lists
from swafast.integrations.diffusers import EMAModel
from tests.test_documents import ROOT, blocks_of, reader

pytestmark = [pytest.mark.frameworks, pytest.mark.usefixtures("one_thread")]

SETTINGS: dict[str, dict[str, Any]] = {
    "ratio": {"decay": 0.9},
    "power": {"decay": 0.95, "use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75, "min_decay": 0.3},
    "late": {"decay": 0.8, "update_after_step": 5},
    "raised": {"decay": 0.6, "min_decay": 0.9, "update_after_step": 2},
    "raised power": {"decay": 0.2, "use_ema_warmup": True, "min_decay": 0.7},
}


def made_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((3, 4), (5,), (), (2, 3, 2, 2), (0,))]
    params[1].requires_grad_(False)
    return params


@torch.no_grad()
def walk(params: Iterable[Tensor], step: int) -> None:
    """Change params as a step of a training would, always in the same way."""
    made = torch.Generator().manual_seed(step)
    for param in params:
        param.add_(torch.randn(param.shape, generator=made).to(param.dtype), alpha=0.1)


def run(ema: Any, params: list[nn.Parameter], steps: Iterable[int]) -> None:
    for step in steps:
        walk(params, step)
        ema.step(iter(params))


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs)
    one, other = (torch.cat([tensor.detach().double().flatten() for tensor in each]) for each in (ours, theirs))
    return float((one - other).norm() / other.norm())


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def settings_of(ema: Any) -> dict[str, Any]:
    return {name: value for name, value in ema.state_dict().items() if isinstance(value, (bool, int, float))}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("foreach", [False, True])
def test_averages_are_theirs(settings: dict[str, Any], foreach: bool) -> None:
    params = made_params()
    ours, theirs = EMAModel(params, foreach=foreach, **settings), Theirs(params, foreach=foreach, **settings)
    assert isinstance(ours, Theirs)
    for step in range(1, 60):
        walk(params, step)
        ours.step(params)
        theirs.step(params)
        assert ours.cur_decay_value == theirs.cur_decay_value
        assert error(ours.shadow_params, theirs.shadow_params) <= 2e-7
        assert torch.equal(ours.shadow_params[1], params[1])  # it is frozen
    assert settings_of(ours) == settings_of(theirs)
    assert error(ours.shadow_params, list(params)) > 0.01


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_converted_state_goes_on_as_theirs(settings: dict[str, Any], stop: int) -> None:
    params = [param.requires_grad_() for param in made_params()]
    model, theirs = nn.ParameterList(params), Theirs(params, **settings)
    run(theirs, params, range(1, stop + 1))
    averaged = FusedAveragedModel(model)
    conversion = convert.load(averaged, theirs.state_dict())
    assert conversion.num_averaged == max(0, stop - theirs.update_after_step)
    for step in range(stop + 1, 16):
        run(theirs, params, [step])
        if step > theirs.update_after_step:
            averaged.update_parameters(model)
    assert error(list(averaged.module), theirs.shadow_params) <= 2e-7


@pytest.mark.parametrize("first", [EMAModel, Theirs])
@pytest.mark.parametrize("second", [EMAModel, Theirs])
def test_each_loads_the_others_state_and_goes_on(first: Any, second: Any) -> None:
    params, settings = made_params(), SETTINGS["power"]
    stopped, whole = first(params, **settings), second(params, **settings)
    run(whole, params, range(1, 31))
    params = made_params()
    run(stopped, params, range(1, 11))
    resumed = second(made_params())
    state = stopped.state_dict()
    assert state.keys() == Theirs(params).state_dict().keys()
    resumed.load_state_dict(state)
    assert all(a is not b for a, b in zip(resumed.shadow_params, state["shadow_params"], strict=True))
    run(resumed, params, range(11, 31))
    assert settings_of(resumed) == settings_of(whole)
    assert error(resumed.shadow_params, whole.shadow_params) <= (0 if first is second else 2e-7)


def tiny_unet() -> diffusers.UNet2DModel:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


@pytest.mark.parametrize(("first", "second"), [(EMAModel, Theirs), (Theirs, EMAModel), (EMAModel, EMAModel)])
def test_each_loads_what_the_other_has_saved(first: Any, second: Any, tmp_path: Path) -> None:
    unet = tiny_unet()
    ema = first(unet.parameters(), model_cls=diffusers.UNet2DModel, model_config=unet.config, **SETTINGS["late"])
    run(ema, list(unet.parameters()), range(1, 9))
    ema.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in settings_of(ema)} == settings_of(ema)
    assert not [name for name in config if "shadow" in name or "swafast" in name]
    loaded = second.from_pretrained(tmp_path, diffusers.UNet2DModel, foreach=True)
    assert type(loaded) is second
    assert loaded.foreach
    assert same(loaded.shadow_params, ema.shadow_params)
    assert settings_of(loaded) == settings_of(ema)
    plain = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert same(list(plain.parameters()), ema.shadow_params)


def planes_in(state: dict[str, Any]) -> list[list[Tensor]]:
    return [state["shadow_params"], *([*named.values()] for named in state["swafast_planes"])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_half_precision_do_not_stand_still(dtype: torch.dtype) -> None:
    settings = {"decay": 0.999, "use_ema_warmup": True, "power": 2.0}
    params = made_params(dtype)
    model = nn.ParameterList(params)
    wanted = FusedAveragedModel(model, rule=ExponentialAverage(0.0), format="float32", num_averaged=1)
    ours, theirs = EMAModel(params, **settings), Theirs(params, **settings)
    for step in range(1, 201):
        walk(params, step)
        ours.step(params)
        theirs.step(params)
        wanted.rule = ExponentialAverage(ours.cur_decay_value)
        wanted.update_parameters(model)
    trained = [index for index, param in enumerate(params) if param.requires_grad]
    kept = [plane for index, plane in enumerate(wanted.module) if index in trained]
    full = made_params()
    ours.copy_to(full)
    assert same([full[index].data for index in trained], [plane.data for plane in kept])
    assert error([theirs.shadow_params[index] for index in trained], kept) > 1e-3
    assert {average.dtype for average in ours.shadow_params} == {dtype}

    state = ours.state_dict()
    theirs.load_state_dict(state)
    assert same(theirs.shadow_params, ours.shadow_params)
    resumed = copy.deepcopy(ours), EMAModel(made_params(dtype))
    resumed[1].load_state_dict(state)
    kept = copy.deepcopy(state)
    resumed[1].step(made_params(dtype))
    assert all(same(one, other) for one, other in zip(planes_in(state), planes_in(kept), strict=True))
    resumed[1].load_state_dict(state)
    for step in range(201, 220):
        walk(params, step)
        for ema in (ours, *resumed):
            ema.step(params)
    for ema in resumed:
        assert same(ema.shadow_params, ours.shadow_params)
        assert all(map(same, map(list, ema._positional._further), map(list, ours._positional._further)))
    ours.to(dtype=torch.float32)
    assert {average.dtype for average in ours.shadow_params} == {torch.float32}
    resumed[0].copy_to(full)
    assert same([full[index].data for index in trained], [ours.shadow_params[index] for index in trained])


def test_averages_of_another_dtype_than_the_model(tmp_path: Path) -> None:
    params = made_params()
    ema, theirs = EMAModel(params, decay=0.5), Theirs(params, decay=0.5)
    ema.to(dtype=torch.bfloat16)
    for step in range(1, 9):
        walk(params, step)
        ema.step(params)
        theirs.step(params)
    assert torch.equal(ema.shadow_params[1], params[1].to(torch.bfloat16))  # frozen, so copied
    assert error(ema.shadow_params, theirs.shadow_params) < 4e-3

    unet = tiny_unet().to(torch.bfloat16)
    ema = EMAModel(unet.parameters(), model_cls=diffusers.UNet2DModel, model_config=unet.config)
    run(ema, list(unet.parameters()), range(1, 9))
    ema.save_pretrained(tmp_path)
    assert "swafast_planes" not in (tmp_path / "config.json").read_text()
    assert "swafast_planes" in ema.state_dict()
    exported = list(diffusers.UNet2DModel.from_pretrained(tmp_path).parameters())
    assert {param.dtype for param in exported} == {torch.float32}  # at full precision
    assert not same(exported, [average.float() for average in ema.shadow_params])
    assert error(exported, ema.shadow_params) < 4e-3


def test_steps_make_no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plan = param_lists.Plan
    monkeypatch.setattr(param_lists, "Plan", lambda *args: made.append(1) or plan(*args))
    params = made_params()
    ema, theirs = EMAModel(params, decay=0.5), Theirs(params, decay=0.5)

    def check(plans: int) -> None:
        for step in range(3):
            walk(params, step)
            ema.step(iter(params))
            theirs.step(params)
        assert error(ema.shadow_params, theirs.shadow_params) <= 2e-7
        assert len(made) == plans

    check(1)
    params[0].data = params[0].data.clone()
    check(2)
    params[1].requires_grad_(True)
    check(3)
    ema.shadow_params = [average.clone() for average in ema.shadow_params]
    check(4)
    ema.load_state_dict(theirs.state_dict())
    check(5)


def test_the_model_takes_the_averages_and_its_params_again() -> None:
    for foreach in (False, True):
        params = made_params()
        ema = EMAModel(params, foreach=foreach)
        run(ema, params, range(1, 9))
        before = [param.detach().clone() for param in params]
        with pytest.raises(RuntimeError, match="must have parameters to put back, got none"):
            ema.restore(params)
        ema.store(params)
        ema.copy_to(iter(params))
        assert same(list(params), ema.shadow_params)
        with pytest.raises(ValueError, match=r"parameters must be the 5 tensors that are averaged, got 2"):
            ema.restore(params[:2])
        ema.restore(iter(params))
        assert same(list(params), before)
        assert ema.temp_stored_params is None


def test_wrong_parameters_are_refused_and_nothing_changes() -> None:
    params = made_params()
    for given, kind, message in (
        ([], ValueError, "parameters must hold tensors, got none: call model.parameters() anew"),
        (torch.ones(3, 3), TypeError, "parameters must be model.parameters(), got a Tensor"),
        ({"weight": params[0]}, TypeError, "got a dict"),
        (nn.Linear(1, 1).named_parameters(), TypeError, "parameters must hold tensors alone, got a tuple"),
    ):
        with pytest.raises(kind) as refused:
            EMAModel(given)
        assert message in str(refused.value)
    for options, message in (
        ({"rule": ExponentialAverage(0.99)}, r"takes no rule, .*: write EMAModel\(parameters, decay=0\.99\)"),
        ({"decays": 0.9}, r"unexpected keyword argument 'decays'.*: did you mean decay=\?"),
    ):
        with pytest.raises(TypeError, match=message):
            EMAModel(params, **options)
    with pytest.raises(TypeError, match=r"parameters must be model\.parameters\(\), got a Linear"):
        EMAModel(params, decay=0.9).copy_to(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ImportError, match="in place of timm's class, write from swafast"):
        exec("from swafast.integrations.diffusers import ModelEmaV3")
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], the share that the old average keeps, got 1.5"):
        EMAModel(params, decay=1.5)
    ema = EMAModel(params, decay=0.9)
    run(ema, params, range(1, 9))
    before = copy.deepcopy(ema.state_dict())
    for given, message in (
        (params[:-1], "parameters must be the 5 tensors that are averaged, got 4"),
        ([params[0].T, *params[1:]], r"'parameters\[0\]' must have the average's shape \(3, 4\), got \(4, 3\)"),
        ([params[1], params[0], *params[2:]], r"'parameters\[0\]' must have the average's shape"),
    ):
        for use in (ema.step, ema.copy_to):
            with pytest.raises(ValueError, match=message.replace("'", "'?")):
                use(given)
    averaged = FusedAveragedModel(nn.ParameterList(params), num_averaged=1)
    with averaged.swapped_into(nn.ParameterList(params)), pytest.raises(RuntimeError, match="step must wait until"):
        ema.step(params)
    assert settings_of(ema) == {name: before[name] for name in settings_of(ema)}
    assert same(ema.shadow_params, before["shadow_params"])


def test_wrong_states_are_refused_and_nothing_changes() -> None:
    params = made_params(torch.bfloat16)
    ema = EMAModel(params, **SETTINGS["power"])
    run(ema, params, range(1, 9))
    before = copy.deepcopy(ema.state_dict())
    good = {**before, "decay": 0.5, "optimization_step": 77}
    reordered = [*before["shadow_params"][::-1]]
    for state, message in (
        ({**good, "shadow_params": before["shadow_params"][:3]}, "shadow_params must have 5 tensors, got 3"),
        ({**good, "shadow_params": reordered}, r"shadow_params\[0\] must have the shape \(3, 4\), got \(0,\)"),
        ({**good, "shadow_params": tuple(reordered)}, "shadow_params must be a list"),
        ({**good, "power": "1"}, "Invalid power"),
        ({**good, "decay": 2.0}, "between 0 and 1"),
        ({**good, "swafast_planes": before["swafast_planes"][:2]}, "swafast_planes must have 5 entries"),
        ({**good, "swafast_planes": before["swafast_planes"][::-1]}, r"swafast_planes\[0\] must be of shadow_params"),
    ):
        with pytest.raises(ValueError, match=message):
            ema.load_state_dict(state)
        assert settings_of(ema) == {name: before[name] for name in settings_of(ema)}
        assert same(ema.shadow_params, before["shadow_params"])
    run(ema, params, [9])
    other = EMAModel(made_params(torch.bfloat16))
    other.load_state_dict(before)
    other.step(params)
    assert same(ema.shadow_params, other.shadow_params)


def test_partitioned_params_take_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    params = made_params(torch.bfloat16)
    ema = EMAModel(params)
    run(ema, params, range(1, 5))
    steps = []
    step: Callable[..., None] = lambda self, given: steps.append([*given])  # noqa: E731
    monkeypatch.setattr(transformers.integrations.deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(Theirs, "step", step)
    ema.step(iter(params))
    assert len(steps) == 1
    assert all(map(lambda one, other: one is other, steps[0], params))
    assert "swafast_planes" not in ema.state_dict()  # the remainders have not followed


def test_sharded_params_take_their_way() -> None:
    class Sharded(Tensor):
        """Has an operator of its own for all of torch's, as a DTensor has."""

        @classmethod
        def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = torch.utils._pytree.tree_map_only(cls, lambda each: each.local, (args, kwargs or {}))
            return function(*given[0], **given[1])

    local = made_params()
    param = torch.Tensor._make_subclass(Sharded, local[0].detach().clone(), True)
    param.local = local[0].detach().clone()
    ema, theirs = (kind([param, *local[1:]], decay=0.5) for kind in (EMAModel, Theirs))
    for _ in range(3):
        param.local.add_(1.0)
        ema.step([param, *local[1:]])
        theirs.step([param, *local[1:]])
    assert same(ema.shadow_params, theirs.shadow_params)
    assert ema.optimization_step == 3


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = []
    for block in blocks_of((ROOT / "docs/frameworks/diffusers.md").read_text())[:2]:
        unet = tiny_unet()
        scope = reader() | {"unet": unet, "UNet2DModel": diffusers.UNet2DModel, "steps": itertools.count()}
        scope["train_step"] = lambda model, batch, count=scope["steps"]: walk(model.parameters(), next(count))
        scope["evaluate"] = lambda model: None
        exec(block, scope)
        kinds.append(scope["ema"])
    theirs, ours = kinds
    assert (type(theirs), type(ours)) == (Theirs, EMAModel)
    assert error(ours.shadow_params, theirs.shadow_params) <= 2e-7
    assert (tmp_path / "unet_ema" / "config.json").exists()
