"""`swafast.integrations.torchtitan` with the Trainer of torchtitan, and with its optimizers and checkpoints alone."""

from __future__ import annotations

import concurrent.futures
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel
from tests.frameworks import torchtitan_llama as llama
from tests.frameworks.kit import AVERAGE, Job, Kit, Resumes, Watch, check_another_world, differing, whole_state
from tests.frameworks.torchtitan_kit import (
    Fsdp,
    FsdpAsync,
    Loop,
    Titan,
    WeightAverage,
    alone,
    config_of,
    drop,
)
from tests.ranks import run_ranks
from tests.test_documents import ROOT, blocks_of

pytestmark = pytest.mark.frameworks


@pytest.fixture
def group() -> Iterator[None]:
    """A group of one rank."""
    with alone():
        yield


class TestTitan(Kit):
    framework = Titan()


class TestFsdp(Resumes):
    framework = Fsdp()

    test_a_checkpoint_without_averages_begins_a_fresh_one = Kit.test_a_checkpoint_without_averages_begins_a_fresh_one


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_they_go_on_on_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    check_another_world(Fsdp(), tmp_path, before, after)


def test_a_checkpoint_that_is_written_beside_the_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"options": AVERAGE, "accumulation": 2}
    whole = FsdpAsync().run(Job(tmp_path / "whole", 16, **fields))
    shutil.copytree(tmp_path / "whole/checkpoint/step-8", tmp_path / "first/checkpoint/step-8")
    second = FsdpAsync().run(Job(tmp_path / "second", 16, resumes=tmp_path / "first", before=8, **fields))
    assert whole.averaged is not None
    assert second.averaged is not None
    assert differing(second.averaged, whole.averaged) == []
    assert differing(second.model, whole.model) == []
    assert second.attachment == whole.attachment


def test_a_llama_is_averaged_and_exported(tmp_path: Path) -> None:
    llama.write_assets(tmp_path)
    for degree in (1, 2):  # of tensor parallelism
        runs = {}
        for name, options in {
            "whole": {"last_save_model_only": False},
            "again": {"load_step": 2, "last_save_in_hf": True},
        }.items():
            given = {"spmd_backend": "partial_dtensor", "tensor_parallel_degree": degree}
            (runs[name], _) = run_ranks(2, llama.train, tmp_path, tmp_path / f"run{degree}", given, options)
        whole, again = runs.values()
        assert (sorted(whole["seen"]), sorted(again["seen"])) == ([1, 2, 4], [4])
        for run in runs.values():
            for step, seen in run["seen"].items():
                for key, value in seen.items():
                    mean = torch.stack([whole["steps"][number][key].double() for number in range(1, step + 1)]).mean(0)
                    torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-7)
        assert differing(again["model"], whole["model"]) == []
        assert differing(again["averaged"], whole["averaged"]) == []
        assert again["attached"] == whole["attached"]
        (file,) = (tmp_path / f"run{degree}/checkpoint/step-4").glob("*.safetensors")
        exported = load_file(file)["model.embed_tokens.weight"]
        assert torch.equal(exported, whole["averaged"]["module.tok_embeddings.weight"])


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, own = blocks_of((ROOT / "docs/frameworks/torchtitan.md").read_text())
    folder = tmp_path / "trained"
    watch = Watch(Job(folder, 8))
    monkeypatch.setattr("torchtitan.config.ConfigManager.parse_args", lambda self: config_of(watch.job, "disabled"))
    for block in (before, after):
        shutil.rmtree(folder, ignore_errors=True)
        scope: dict[str, Any] = {}
        with watch.watching(), alone():
            exec(block, scope)
    assert scope["average"].attachment.step == int(scope["average"].averaged.n_averaged) == 8
    with alone():
        loop = Loop(tmp_path, last_save_model_only=True)
        seen = []
        scope = {
            "model_parts": [loop.model],
            "optimizers": loop.optimizers,
            "checkpointer": loop.checkpointer,
            "state": loop.steps,
            "loss": lambda model, step: model(torch.full((1, 4), float(step))).square().sum(),
            "evaluate": lambda model: seen.append(whole_state(model)),
        }
        exec(own, scope)
        exported = whole_state(loop.model)
        dcp.load(exported, checkpoint_id=tmp_path / "checkpoint/step-10")
    assert differing(whole_state(loop.model), seen[0]) == []
    assert differing(exported, seen[0]) == []
    assert not scope["average"].attachment.is_attached


# The checkpoints


@pytest.mark.usefixtures("group")
def test_the_last_checkpoint_of_the_model_alone_has_the_average(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        loop = Loop(tmp_path / name, last_save_model_only=True, export_dtype=name, interval=2)
        average = loop.install(rule=EqualAverage())
        loop.step(2)
        loop.save()
        loop.step()
        before = whole_state(loop.model)
        loop.save(last=True)
        assert differing(whole_state(loop.model), before) == []
        saved = {key: torch.zeros_like(value, dtype=dtype) for key, value in before.items()}
        dcp.load(saved, checkpoint_id=tmp_path / name / "checkpoint/step-3")
        expected = {key: value.to(dtype) for key, value in average.averaged.averaged_state_dict().items()}
        assert differing(saved, expected) == []
        assert differing(saved, {key: value.to(dtype) for key, value in before.items()}) != []


class Adapter:
    """An adapter to another tool's names, as torchtitan's models have them."""

    fqn_to_index_mapping = None

    def to_hf(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"model.{key}": value for key, value in state_dict.items()}


@pytest.mark.usefixtures("group")
def test_the_last_checkpoint_as_safetensors_has_the_average(tmp_path: Path) -> None:
    loop = Loop(tmp_path, last_save_model_only=True, last_save_in_hf=True, adapter=Adapter())
    average = loop.install(rule=EqualAverage())
    loop.step(3)
    loop.save(last=True)
    (file,) = tmp_path.glob("checkpoint/step-3/*.safetensors")
    expected = {f"model.{key}": value for key, value in average.averaged.averaged_state_dict().items()}
    assert differing(load_file(file), expected) == []


@pytest.mark.usefixtures("group")
def test_a_whole_last_checkpoint_has_the_trained_params(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    average = loop.install(rule=EqualAverage())
    loop.step(3)
    loop.save(last=True)
    again = Loop(tmp_path)
    resumed = again.install(rule=EqualAverage())
    again.checkpointer.load()
    assert differing(whole_state(again.model), whole_state(loop.model)) == []
    assert differing(resumed.averaged.state_dict(), average.averaged.state_dict()) == []
    assert resumed.steps() == average.steps()
    assert resumed.attachment.step == 3


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("use", ["swapped", "finish"])
def test_params_that_are_being_staged_are_not_replaced_before(tmp_path: Path, use: str) -> None:
    loop = Loop(tmp_path, async_mode="async_with_pinned_mem")
    average = loop.install(rule=EqualAverage())
    loop.step(3)
    trained = whole_state(loop.model)
    staged: list[Any] = []
    future: Any = concurrent.futures.Future()
    future.result = lambda: staged.append(whole_state(loop.model))
    loop.checkpointer.staging_future = future
    if use == "finish":
        average.finish()
    else:
        with average.swapped():
            pass
    assert [differing(state, trained) for state in staged] == [[]]


@pytest.mark.usefixtures("group")
def test_a_checkpoint_excludes_the_averages_on_demand(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.install()
    loop.step(4)
    loop.save()
    again = Loop(tmp_path, exclude_from_loading=["swafast"])
    average = again.install()
    with pytest.warns(UserWarning, match="what is loaded of .*step-4 has no averages of swafast: a fresh .* at step 4"):
        again.checkpointer.load()
    assert average.attachment.step == again.steps.step == 4
    assert int(average.averaged.n_averaged) == 0
    assert differing(whole_state(again.model), whole_state(loop.model)) == []


@pytest.mark.usefixtures("group")
def test_a_training_from_a_model_alone_begins_a_fresh_average_silently(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "first")
    loop.install()
    loop.step(4)
    loop.save()
    again = Loop(tmp_path / "second", initial_load_path=str(tmp_path / "first/checkpoint/step-4"))
    average = again.install()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again.checkpointer.load()
    assert average.attachment.step == again.steps.step == 0
    assert differing(whole_state(again.model), whole_state(loop.model)) == []


#: What somebody does to a checkpoint, or wants of it, and the error that names it.
MISFITS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no attachment": (lambda path: drop(path, "swafast.attachment."), {}, "got none of 'attachment'"),
    "no averages": (lambda path: drop(path, "swafast.averaged."), {}, "got none of 'averaged'"),
    "no step": (
        lambda path: drop(path, "swafast.attachment.step"),
        {},
        r"'attachment' of this average, got 1 keys",
    ),
    "no weight": (
        lambda path: drop(path, "swafast.averaged.module.weight"),
        {},
        r"got 1 keys missing \('module.w",
    ),
    "several": (None, {"rules": {"a": EqualAverage(), "b": EqualAverage()}}, "must have the averages .* of rules="),
    "another format": (None, {"format": "compact", "seed": 3}, "keys missing|use the same format="),
    "a narrow format": (None, {"format": "half"}, "use the same format=|keys missing"),
    "a spread": (None, {"deviations": 0}, "keys missing"),
    "a lost file": (lambda path: (path / "__0_0.distcp").unlink(), {}, "must be whole and of the same averages"),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("damage", "options", "message"), MISFITS.values(), ids=MISFITS)
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(
    tmp_path: Path, damage: Any, options: dict[str, Any], message: str
) -> None:
    loop = Loop(tmp_path)
    loop.install()
    loop.step(2)
    loop.save()
    folder = tmp_path / "checkpoint/step-2"
    if damage is not None:
        damage(folder)
    again = Loop(tmp_path)
    average = again.install(**options)
    again.step()
    before = whole_state(again.model), {k: v.clone() for k, v in average.averaged.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match=message) as raised:
        again.checkpointer.load()
    assert str(folder) in str(raised.value)
    assert differing(whole_state(again.model), before[0]) == []
    assert differing(average.averaged.state_dict(), before[1]) == []
    assert average.attachment.step == again.steps.step == 1


def whole_average(average: WeightAverage) -> dict[str, Tensor]:
    averaged = average.averaged
    state = averaged.full_state_dict() if average.holds_shards else averaged.state_dict()
    return {key: state[key] for key in ("n_averaged", "module.weight", "module.bias")}


@pytest.mark.usefixtures("group")
def test_shards_go_on_from_a_whole_average_and_the_other_way(tmp_path: Path) -> None:
    for name, kinds in {"shards": (False, True), "whole": (True, False)}.items():
        loop = Loop(tmp_path / name)
        average = loop.install(sharded=kinds[0])
        loop.step(2)
        loop.save()
        again = Loop(tmp_path / name)
        resumed = again.install(sharded=kinds[1])
        again.checkpointer.load()
        assert differing(whole_average(resumed), whole_average(average)) == []
        assert resumed.attachment.step == 2


@pytest.mark.usefixtures("group")
def test_damaged_shards_leave_the_model_too(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    average = loop.install(sharded=True)
    loop.step(2)
    loop.save()
    (file,) = tmp_path.glob("checkpoint/step-2/*.distcp")
    weight = whole_average(average)["module.weight"].numpy().tobytes()
    assert file.read_bytes().count(weight) == 1
    file.write_bytes(file.read_bytes().replace(weight, weight[:-1] + bytes([weight[-1] ^ 1])))
    again = Loop(tmp_path)
    again.install(sharded=True)
    before = whole_state(again.model)
    with pytest.raises(ValueError, match="got another checksum"):
        again.checkpointer.load()
    assert differing(whole_state(again.model), before) == []


@pytest.mark.usefixtures("group")
def test_an_average_is_not_taken_out_of_one_with_a_spread(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.install(deviations=0)
    loop.step(2)
    loop.save()
    again = Loop(tmp_path)
    again.install()
    with pytest.raises(RuntimeError, match=r"0 keys missing .* of another model or format"):
        again.checkpointer.load()


@pytest.mark.usefixtures("group")
def test_a_save_inside_a_swap_is_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    average = loop.install()
    loop.step(2)
    with average.swapped(), pytest.raises(RuntimeError, match="swapped"):
        loop.save()
    assert not list(tmp_path.glob("checkpoint/*/.metadata"))


@pytest.mark.usefixtures("group")
def test_a_save_after_the_end_is_told(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    average = loop.install()
    loop.step(2)
    average.finish()
    with pytest.warns(UserWarning, match="the model has the averages since the training has ended"):
        loop.save()


# The optimizers


@pytest.mark.usefixtures("group")
def test_a_container_of_several_optimizers_counts_each_step_once(tmp_path: Path) -> None:
    loop = Loop(tmp_path, patterns={"weight": "Adam", "bias": "AdamW"})
    assert len(loop.optimizers) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        average = loop.install(rule=EqualAverage())
    loop.optimizers.state_dict()  # makes states, by a step of each optimizer
    assert average.attachment.step == int(average.averaged.n_averaged) == 0
    loop.step(3)
    assert average.attachment.step == int(average.averaged.n_averaged) == 3
    assert not [key for key in loop.optimizers.state_dict() if "swafast" in key]


@pytest.mark.usefixtures("group")
def test_attach_counts_no_step_that_makes_the_state_of_an_optimizer(tmp_path: Path) -> None:
    loop = Loop(tmp_path, patterns={"weight": "Adam", "bias": "AdamW"})
    averaged = FusedAveragedModel(loop.model)
    attachment = averaged.attach([*loop.optimizers])
    loop.optimizers.state_dict()
    assert attachment.step == int(averaged.n_averaged) == 0
    loop.step(2)
    assert attachment.step == int(averaged.n_averaged) == 2
    with pytest.warns(UserWarning, match="OptimizersContainer.state_dict does not run torch's hooks"):
        FusedAveragedModel(loop.model).attach(loop.optimizers)


# What is refused


class OptimizersInBackwardContainer:
    """The name of a class of earlier releases."""


@pytest.mark.usefixtures("group")
def test_wrong_installations_are_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    parts = {"model_parts": [loop.model], "optimizers": loop.optimizers, "checkpointer": loop.checkpointer}
    steps_early = type("Early", (type(loop.optimizers), OptimizersInBackwardContainer), {})
    early = Loop(tmp_path).optimizers
    early.__class__ = steps_early
    tolerant = Loop(tmp_path).checkpointer
    tolerant.ft_manager = object()
    others: dict[str, tuple[type[Exception], dict[str, Any]]] = {
        "got SimpleNamespace, without 'checkpointer'": (TypeError, {"checkpointer": None}),
        "model_parts must be a list of modules, got str": (TypeError, {"model_parts": "model"}),
        "model_parts must be one module, got 2 of them": (NotImplementedError, {"model_parts": [loop.model] * 2}),
        "one module, got pipeline parallelism": (NotImplementedError, {"parallel_dims": SimpleNamespace(pp_enabled=1)}),
        "must train without fault tolerance": (NotImplementedError, {"ft_manager": object()}),
        "must be an OptimizersContainer of torchtitan, got SGD": (
            TypeError,
            {"optimizers": torch.optim.SGD(loop.model.parameters(), 0.1)},
        ),
        "its optimizers step inside the backward": (NotImplementedError, {"optimizers": early}),
        "CheckpointManager with a manager": (NotImplementedError, {"checkpointer": tolerant}),
        "must be a CheckpointManager of torchtitan, got SimpleNamespace": (
            NotImplementedError,
            {"checkpointer": SimpleNamespace(enable=True)},
        ),
        "got one with another model": (ValueError, {"model_parts": [nn.Linear(4, 2)]}),
        "optimizer must have params of the model": (ValueError, {"optimizers": Loop(tmp_path).optimizers}),
    }
    for message, (kind, fields) in others.items():
        given = SimpleNamespace(**{**parts, **fields})
        if fields.get("checkpointer", 0) is None:
            del given.checkpointer
        average = WeightAverage()
        with pytest.raises(kind, match=message):
            average.install(given)
        assert average.averaged is None
    for use in (WeightAverage().swapped().__enter__, WeightAverage().finish):
        with pytest.raises(RuntimeError, match=r"must be installed first: call install\(trainer\)"):
            use()
    average = WeightAverage().install(SimpleNamespace(**parts))  # none of the above has left anything
    with pytest.raises(ValueError, match="installed once, got a second call"):
        average.install(SimpleNamespace(**parts))
    with pytest.raises(ValueError, match="only one WeightAverage may be installed in one container of optimizers"):
        WeightAverage().install(SimpleNamespace(**parts))


@pytest.mark.usefixtures("group")
def test_an_installation_after_the_load_is_told(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    trainer = SimpleNamespace(
        model_parts=[loop.model], optimizers=loop.optimizers, checkpointer=loop.checkpointer, step=5
    )
    told = "made 5 steps already, .* install before the checkpoint is loaded"
    with pytest.warns(UserWarning, match=told):
        average = WeightAverage(ExponentialAverage(0.9)).install(trainer)
    assert average.attachment.step == 5
    with warnings.catch_warnings(record=True) as caught:  # in a loop of the user's own too
        warnings.simplefilter("always")
        loops = [Loop(tmp_path) for _ in range(3)]
        for loop in loops:
            loop.steps.step = 5
        counted = [
            loops[0].install(),
            WeightAverage().install_parts(loops[1].model, loops[1].optimizers, loops[1].checkpointer, step=3),
            WeightAverage().install_parts(loops[2].model, loops[2].optimizers),
        ]
    assert [average.attachment.step for average in counted] == [5, 3, 0]
    assert [str(each.message)[:37] for each in caught] == ["the training has made 5 steps already"]


@pytest.mark.usefixtures("group")
def test_a_share_of_the_training_is_of_the_trainers_steps(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    trainer = SimpleNamespace(
        model_parts=[loop.model],
        optimizers=loop.optimizers,
        checkpointer=loop.checkpointer,
        config=SimpleNamespace(training=SimpleNamespace(steps=8)),
    )
    average = WeightAverage(start="0.5dur").install(trainer)
    assert average.attachment.schedule.start == 4
