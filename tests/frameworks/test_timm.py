"""`swafast.integrations.timm.ModelEma` beside timm's `ModelEmaV3`, which stays the definition of right."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import load_checkpoint
from timm.task import ClassificationTask, load_task_ema_checkpoint
from timm.task import task as timm_task
from timm.utils import CheckpointSaver, ModelEmaV3, get_state_dict
from torch import nn

from swafast import FusedAveragedModel
from swafast.integrations.timm import ModelEma
from tests.test_documents import ROOT, blocks_of, reader

pytestmark = [pytest.mark.frameworks, pytest.mark.usefixtures("one_thread")]

SETTINGS: dict[str, dict[str, Any]] = {
    "constant": {"decay": 0.9},
    "late": {"decay": 0.75, "update_after_step": 4},
    "warm-up": {"decay": 0.95, "use_warmup": True, "warmup_gamma": 3.0, "warmup_power": 0.8, "min_decay": 0.2},
    "no buffers": {"decay": 0.9, "exclude_buffers": True, "use_warmup": True, "update_after_step": 2},
    "raised": {"decay": 0.5, "use_warmup": True, "min_decay": 0.8, "update_after_step": 2},
    "no foreach": {"decay": 0.9, "foreach": False},
    "float32": {"decay": 0.9, "dtype": torch.float32},
    "device": {"decay": 0.9, "device": "cpu"},
}


def made_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model.num_classes = 2
    return model


@torch.no_grad()
def walk(model: nn.Module, step: int, size: float = 0.1) -> None:
    """Change params and buffers as a step of a training would, always in the same way."""
    made = torch.Generator().manual_seed(step)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=made).to(tensor.dtype), alpha=size)
        else:
            tensor.add_(1)


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert [each.dtype for each in ours.values()] == [each.dtype for each in theirs.values()]
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def flat(ema: Any) -> torch.Tensor:
    return torch.cat([param.detach().double().flatten() for param in ema.module.parameters()])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("counts", [True, False])
def test_averages_are_theirs_bit_for_bit(settings: dict[str, Any], counts: bool) -> None:
    model = made_model()
    ours, theirs = ModelEma(model, **settings), ModelEmaV3(model, **settings)
    assert differing(ours, theirs) == []
    for step in range(1, 60):
        walk(model, step)
        for ema in (ours, theirs):
            ema.update(model, step=step if counts else None)
        assert differing(ours, theirs) == [], step
    late = settings.get("update_after_step", 0) if counts else -1
    assert int(ours.n_averaged) == 59 - late
    walk(model, 60)
    ours.set(model)
    theirs.set(model)
    assert differing(ours, theirs) == []
    ours.decay = theirs.decay = 0.5
    assert ours.rule == ModelEma(model, **{**settings, "decay": 0.5}).rule
    walk(model, 61)
    ours.update(model)
    theirs.update(model)
    assert differing(ours, theirs) == []
    assert (ours.training, ours.module.training) == (theirs.training, theirs.module.training)


def test_a_resnet_and_a_bfloat16_model_averaged_in_float32() -> None:
    with torch.random.fork_rng():
        models = {"resnet": timm.create_model("test_resnet"), "bf16": made_model().to(torch.bfloat16)}
    for name, model in models.items():
        dtype = torch.float32 if name == "bf16" else None
        ours, theirs = (kind(model, decay=0.99, use_warmup=True, dtype=dtype) for kind in (ModelEma, ModelEmaV3))
        for step in range(1, 6):
            walk(model, step)
            ours.update(model, step)
            theirs.update(model, step)
        if name == "resnet":
            assert differing(ours, theirs) == []
            continue
        for own, other in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
            # timm multiplies and adds where dtypes differ, with two roundings.
            assert own.dtype == torch.float32
            assert (own - other).norm() <= 2e-7 * other.norm()


def test_bfloat16_is_rounded_at_random() -> None:
    model = made_model().to(torch.bfloat16)
    made = {seed: ModelEma(model, decay=0.999, stochastic_rounding_seed=seed) for seed in (1, 2)}
    again, theirs = ModelEma(model, decay=0.999, stochastic_rounding_seed=1), ModelEmaV3(model, decay=0.999)
    exact = ModelEma(model, decay=0.999, format="exact")
    plain = ModelEmaV3(model, decay=0.999, stochastic_rounding=False)
    start = flat(exact)
    for step in range(300):
        walk(model, step, size=0.01)
        for ema in (*made.values(), again, theirs, exact, plain):
            ema.update(model)
    assert differing(made[1], again) == []
    assert differing(made[1], made[2]) != []
    theirs.load_state_dict(made[1].state_dict())
    moved = (flat(exact) - start).norm()
    assert (flat(made[1]) - flat(exact)).norm() < 0.3 * moved
    assert (flat(plain) - flat(exact)).norm() > 0.6 * moved  # it has stood still
    assert any(key.startswith("remainder.") for key in exact.state_dict())


@pytest.mark.parametrize("settings", [{}, {"foreach": False}, {"exclude_buffers": True}, {"use_warmup": True}])
def test_bfloat16_without_random_rounding_is_theirs_bit_for_bit(settings: dict[str, Any]) -> None:
    model = made_model().to(torch.bfloat16)
    settings = {"decay": 0.99, "stochastic_rounding": False, "update_after_step": 3, **settings}
    ours, theirs = ModelEma(model, **settings), ModelEmaV3(model, **settings)
    for step in range(1, 40):
        walk(model, step)
        for ema in (ours, theirs):
            ema.update(model, step=step if step < 30 else None)
        assert differing(ours, theirs) == []
        if step == 20:
            ours.decay = theirs.decay = 0.9
    copied = copy.deepcopy(ours)
    resumed = ModelEma(made_model().to(torch.bfloat16), **{**settings, "decay": 0.9})
    resumed.load_state_dict(theirs.state_dict())
    walk(model, 40)
    for ema in (theirs, ours, copied, resumed):
        ema.update(model)
        assert differing(ema, theirs) == []
    ours.set(model)
    theirs.set(model)
    assert differing(ours, theirs) == []


@pytest.mark.parametrize(("first", "second"), [(ModelEma, ModelEmaV3), (ModelEmaV3, ModelEma), (ModelEma, ModelEma)])
def test_each_loads_the_others_state_and_goes_on(first: Any, second: Any) -> None:
    settings = SETTINGS["warm-up"]
    model = made_model()
    whole, stopped = second(model, **settings), first(model, **settings)
    for step in range(1, 11):
        walk(model, step)
        whole.update(model, step)
        stopped.update(model, step)
    resumed = second(made_model(), **settings)
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    if first is second:
        assert int(resumed.n_averaged) == int(stopped.n_averaged) == 10
    for step in range(11, 21):
        walk(model, step)
        whole.update(model, step)
        resumed.update(model, step)
    assert differing(resumed, whole) == []


def test_a_loaded_average_is_no_empty_one() -> None:
    model = made_model()
    ours, theirs = ModelEma(model, decay=0.5), ModelEmaV3(model, decay=0.5)
    torchs = FusedAveragedModel(made_model())  # its count is 0
    ours.load_state_dict(torchs.state_dict())
    for step in range(3):
        walk(model, step)
        ours.update(model)
        theirs.update(model)
    assert differing(ours, theirs) == []
    counted = FusedAveragedModel(made_model(), num_averaged=7)
    ours.load_state_dict(counted.state_dict())
    assert int(ours.n_averaged) == 7
    copied = copy.deepcopy(ours)
    walk(model, 9)
    copied.update(model, step=100)
    assert int(copied.n_averaged) == 100
    assert int(ours.n_averaged) == 7
    assert copied.decay == 0.5


def test_an_attached_average_warms_up_by_its_count() -> None:
    model, settings = made_model(), {"decay": 0.9, "use_warmup": True, "warmup_power": 0.7}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ours, theirs = ModelEma(model, **settings), ModelEmaV3(model, **settings)
    ours.attach(optimizer, model)
    for step in range(1, 8):
        model(torch.ones(2, 3, 4, 4) * step).sum().backward()
        optimizer.step()
        theirs.update(model, step + 1)  # the initial model counts as the first
    assert differing(ours, theirs) == []


CHANGES = {"decay": 0.6, "min_decay": 0.3, "use_warmup": True, "warmup_gamma": 4.0, "warmup_power": 0.9}


@pytest.mark.parametrize("before", [{"decay": 0.2}, {"decay": 0.9, "min_decay": 0.8, "use_warmup": True}])
def test_settings_may_be_set_in_any_order(before: dict[str, Any]) -> None:
    for order in itertools.permutations(CHANGES):
        model = made_model()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ours, theirs, attached = ModelEma(model, **before), ModelEmaV3(model, **before), ModelEma(model, **before)
        attached.attach(optimizer, model, step=0)
        for step, name in enumerate(order, 1):
            setattr(ours, name, CHANGES[name])
            setattr(theirs, name, CHANGES[name])
            setattr(attached, name, CHANGES[name])
            for each in (1, 2, 3, 100):
                assert ours.get_decay(each) == theirs.get_decay(each)
            walk(model, step)
            ours.update(model, step)
            theirs.update(model, step)
            assert differing(ours, theirs) == [], (order, name)
        assert attached.rule == ModelEma(model, **CHANGES).rule


def test_settings_of_an_attached_average_are_in_force_at_the_next_step() -> None:
    model = made_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    settings = {"decay": 0.3, "use_warmup": True, "warmup_power": 0.7}
    ours, theirs = ModelEma(model, **settings), ModelEmaV3(model, **settings)
    ours.attach(optimizer, model, step=0)
    for step, least in enumerate((0.0, 0.9, 0.6, 0.1), 2):  # the initial model counts as the first
        ours.min_decay = theirs.min_decay = least
        model(torch.ones(2, 3, 4, 4) * step).sum().backward()
        optimizer.step()
        theirs.update(model, step)
        assert differing(ours, theirs) == []


def test_tied_weights_move_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    for excludes in (False, True):
        ours, theirs = (kind(model, decay=0.9, exclude_buffers=excludes) for kind in (ModelEma, ModelEmaV3))
        start = ours.module[0].weight.detach().clone()
        walk(model, 1)
        ours.update(model)
        theirs.update(model)
        once = start.lerp(model[0].weight.detach(), 1 - 0.9)
        twice = once.lerp(model[0].weight.detach(), 1 - 0.9)
        assert torch.equal(ours.module[0].weight, once)
        assert torch.equal(theirs.module[0].weight, once if excludes else twice)


def test_trains_as_timms_scripts_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_task, "ModelEmaV3", ModelEma)
    model = made_model()
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=0.9, use_warmup=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(1, 5):
        walk(model, step)
        task.update_ema(step=step)
    ema = task.get_trainable_module(ema=True)
    assert isinstance(ema, ModelEma)
    for name, given in {"task": {"task": task}, "plain": {"model_ema": ema}}.items():
        CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), **given)._save(tmp_path / name, epoch=1)
        loaded = ModelEmaV3(made_model())
        load_checkpoint(loaded.module, tmp_path / name, use_ema=True)
        assert differing(loaded.module, ema.module) == []
        own = ModelEma(made_model())
        load_checkpoint(own.module, tmp_path / name, use_ema=True)
        assert differing(own, ema) == []
    other = ClassificationTask(made_model(), nn.CrossEntropyLoss(), verbose=False)
    other.setup_ema()
    load_task_ema_checkpoint(other, tmp_path / "task")
    assert differing(other.get_trainable_module(ema=True), ema) == []
    assert list(get_state_dict(ema)) == list(made_model().state_dict())
    compiled = torch.compile(ema, backend="eager")
    walk(model, 9)
    compiled.update(model, step=9)
    inputs = torch.ones(2, 3, 4, 4)
    assert torch.equal(compiled(inputs), ema.module(inputs))


def test_wrong_arguments_are_refused_and_nothing_changes() -> None:
    model = made_model()
    for settings, message in (
        ({"decay": 1.5}, r"decay must be in \[0, 1\]"),
        ({"use_warmup": True, "warmup_gamma": 0.0}, "inv_gamma must be > 0"),
        ({"use_warmup": True, "min_decay": 1.5}, r"min_decay must be in \[0, 1\], got 1.5"),
        ({"dtype": torch.float64}, "dtype must be torch.float32, bfloat16, float16 or None, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelEma(model, **settings)
    with pytest.raises(TypeError, match="model must be"):
        ModelEma(model.state_dict())
    ema = ModelEma(model, decay=0.9)
    rule = ema.rule
    walk(model, 1)
    ema.update(model, step=5)
    assert ema.rule == rule
    before = copy.deepcopy(ema.state_dict())
    with pytest.raises(ValueError, match="weight"):
        ema.update(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(16, 2)), step=50)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
        ema.decay = 7
    with pytest.raises(RuntimeError, match="size mismatch"):
        ema.load_state_dict({**before, "module.3.bias": torch.ones(9)})
    with pytest.raises(RuntimeError, match="Missing"):
        ema.load_state_dict({key: value for key, value in before.items() if key != "module.3.bias"})
    assert (ema.decay, ema.rule, int(ema.n_averaged)) == (0.9, rule, 5)
    assert not [key for key, value in ema.state_dict().items() if not torch.equal(value, before[key])]


def test_the_code_of_the_page_runs() -> None:
    emas = []
    for block in blocks_of((ROOT / "docs/frameworks/timm.md").read_text())[:2]:
        model = made_model()
        scope = reader() | {"model": model, "evaluate": lambda model: None}
        scope["train_step"] = lambda model, batch: walk(model, 1)
        exec(block, scope)
        emas.append(scope["ema"])
    theirs, ours = emas
    assert (type(theirs), type(ours)) == (ModelEmaV3, ModelEma)
    assert differing(ours, theirs) == []
