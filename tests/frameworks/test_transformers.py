"""The Trainer of Transformers: the kit, and what is its own."""

from __future__ import annotations

import json
import re
import runpy
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from typer.testing import CliRunner

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, cli, convert
from swafast.integrations.transformers import WeightAverage
from tests.frameworks.kit import (
    EvaluationError,
    Job,
    Kit,
    Report,
    Resumes,
    ResumesWithoutOptimizer,
    Shards,
    State,
    Watch,
    differing,
    evaluated_states,
    of_net,
    others_average,
    step_of,
    whole_state,
)
from tests.frameworks.transformers_kit import (
    Ddp,
    Fsdp1,
    Fsdp1Orig,
    FullStates,
    NetConfig,
    NetModel,
    Rows,
    ShardedStates,
    Transformers,
    arguments,
    fresh_state,
    trainer_of,
)
from tests.test_documents import ROOT, blocks_of

pytestmark = pytest.mark.frameworks

RULE = ExponentialAverage(0.8)
#: The loss falls, so the best model by the largest loss is that of the first checkpoint.
WORST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}


class TestTransformers(Kit):
    framework = Transformers()


class TestDdp(Resumes):
    framework = Ddp()
    kinds = ("float32",)


class TestFullStates(Resumes):
    framework = FullStates()
    kinds = ("float32", "exact")


class TestFsdp1(Resumes):
    framework = Fsdp1()
    kinds = ("float32",)


class TestFsdp1Orig(ResumesWithoutOptimizer):
    framework = Fsdp1Orig()
    kinds = ("float32",)


class TestShardedStates(Resumes):
    framework = ShardedStates()

    test_a_checkpoint_without_averages_begins_a_fresh_one = Kit.test_a_checkpoint_without_averages_begins_a_fresh_one
    test_half_a_state_is_refused = Kit.test_half_a_state_is_refused


def trained(
    job: Job, average: WeightAverage | None = None, *, resume: Any = None, model: Any = None, **options: Any
) -> tuple[Trainer, Watch]:
    """Train on the Net, or on what ``model`` makes of it."""
    watch = Watch(job)
    with watch.watching():
        made = NetModel(NetConfig(), job.net())
        fresh_state()
        trainer = trainer_of(job, made if model is None else model(made), **options)
        if average is not None:
            average.install(trainer)
        trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


def net_of(watch: Watch) -> State:
    assert watch.net is not None
    return whole_state(watch.net)


# The best model


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"copy_at_end": False}])
def test_the_best_model_is_that_of_the_best_average(options: dict[str, Any], tmp_path: Path) -> None:
    average = WeightAverage(RULE, **options)
    job = Job(tmp_path, 12, options={"rule": RULE})
    trainer, watch = trained(job, average, **WORST)
    assert trainer.state.best_global_step == 4
    best = evaluated_states(job, watch.steps)[4]
    assert differing(net_of(watch), watch.steps[4] if "copy_at_end" in options else best) == []
    assert (int(average.averaged.n_averaged), average.attachment.step) == (4, 12)
    with average.swapped():
        assert differing(net_of(watch), best) == []


def test_the_best_model_from_before_the_averages_start_is_left_alone(tmp_path: Path) -> None:
    average = WeightAverage(RULE, start=6)
    _, watch = trained(Job(tmp_path, 12), average, **WORST)
    assert differing(net_of(watch), watch.steps[4]) == []
    assert not average.has_models


def test_the_best_model_of_a_checkpoint_without_averages_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(averaged: FusedAveragedModel, model: nn.Module) -> None:
        time.sleep(0.1)  # the last update must end before the best model is loaded
        update(averaged, model)

    class Stops(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.control.should_training_stop = self.state.global_step == 9  # neither saved nor evaluated
            return super().training_step(*args, **kwargs)

    trained(Job(tmp_path, 4), **WORST)
    average = WeightAverage(RULE, overlap=True)
    job = Job(tmp_path, 12, before=4, options={"rule": RULE})
    update = FusedAveragedModel.update_parameters
    monkeypatch.setattr(FusedAveragedModel, "update_parameters", slow)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 4}
        _, watch = trained(job, average, resume=True, kind=Stops, **WORST, **steps)
    monkeypatch.undo()
    told = [str(each.message) for each in caught if "no averages of swafast" in str(each.message)]
    assert len(told) == 2, told
    assert told[1].startswith(f"load_best_model_at_end has loaded {tmp_path / 'checkpoint-4'}")
    kept = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert differing(net_of(watch), of_net(kept)) == []
    assert int(average.averaged.n_averaged) == 6
    assert differing(of_net(average.averaged.averaged_state_dict()), evaluated_states(job, watch.steps)[6]) == []
    with average.swapped():
        assert differing(net_of(watch), of_net(kept)) == []
    with pytest.raises(RuntimeError, match="must hold a model before it is saved"):
        average.save_pretrained(tmp_path / "exported")


# Evaluation and export


def test_predict_and_nested_swaps_see_the_average(tmp_path: Path) -> None:
    average = WeightAverage(RULE, copy_at_end=False)
    job = Job(tmp_path, 4, options={"rule": RULE})
    trainer, watch = trained(job, average)
    mean = evaluated_states(job, watch.steps)[4]
    with watch.watching():
        trainer.predict(Rows(job.eval_set(0)))
        with average.swapped():
            trainer.evaluate()
            assert differing(net_of(watch), mean) == []
    assert len(watch.seen) == 6
    assert all(differing(seen.state, mean) == [] for seen in watch.seen)
    assert differing(net_of(watch), watch.steps[4]) == []


def test_generated_text_is_that_of_the_average(tmp_path: Path) -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 8}

    class Model(transformers.T5ForConditionalGeneration):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            generated.append(whole_state(self))
            return super().generate(*args, **kwargs)

    class Tokens(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, list[int]]:
            return {"input_ids": [2, 3, 4, index], "labels": [4, 3, 2, 1]}

    generated: list[State] = []
    fresh_state()
    model = Model(transformers.T5Config(**sizes, decoder_start_token_id=0))
    options = {"num_train_epochs": 2, "predict_with_generate": True, "generation_max_length": 4}
    chosen = arguments(tmp_path, Seq2SeqTrainingArguments, **options)
    data = {"train_dataset": Tokens(), "eval_dataset": Tokens()}
    trainer = Seq2SeqTrainer(model, chosen, **data, compute_metrics=lambda _: {})  # with metrics, it generates
    average = WeightAverage(EqualAverage(), copy_at_end=False).install(trainer)
    trainer.train()
    with average.swapped():
        assert differing(whole_state(model), generated[-1]) == []
    assert differing(whole_state(model), generated[-1]) != []


def test_an_export_in_another_dtype_has_all_bits_and_loads_in_it(tmp_path: Path) -> None:
    average = WeightAverage(RULE)
    trained(Job(tmp_path, 4, dtype=torch.bfloat16), average)
    for dtype, wanted in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        average.save_pretrained(tmp_path / "exported", dtype=dtype)
        loaded = NetModel.from_pretrained(tmp_path / "exported")
        assert loaded.dtype == wanted
        expected = average.averaged.averaged_state_dict(wanted)
        assert differing(loaded.state_dict(), expected) == []
    assert differing(of_net(expected), of_net(load_file(tmp_path / "checkpoint-4" / "model.safetensors"))) != []
    with pytest.raises(ValueError, match="dtype must be a floating"):
        average.save_pretrained(tmp_path / "wrong", dtype=torch.int8)
    assert not (tmp_path / "wrong").exists()


class Exports(ShardedStates):
    """Shards of some params, exported in another dtype."""

    def train(self, job: Job) -> Report:
        net = job.net()
        trainer = self.trainer(job, NetModel(NetConfig(), net))
        average = WeightAverage(RULE, include=lambda name, _: "second" not in name).install(trainer)
        trainer.train()
        average.save_pretrained(job.folder / "exported", dtype=torch.float64)
        trainer.accelerator.wait_for_everyone()
        exported = of_net(load_file(job.folder / "exported" / "model.safetensors"))
        with average.swapped():
            return Report(whole_state(net), exported=exported)


def test_shards_are_exported_in_another_dtype_with_what_they_leave_out(tmp_path: Path) -> None:
    report = Exports().run(Job(tmp_path, 4))
    assert report.exported is not None
    assert {value.dtype for value in report.exported.values()} == {torch.float64, torch.int64}
    narrow = {name: value.to(report.model[name].dtype) for name, value in report.exported.items()}
    assert differing(narrow, report.model) == []
    assert differing(narrow, report.steps[-1]) == ["first.bias", "first.weight"]


# Checkpoints


def test_averages_go_with_their_checkpoints(tmp_path: Path) -> None:
    trained(Job(tmp_path, 12), WeightAverage(RULE), save_total_limit=1)
    assert [path.parent.parent.name for path in tmp_path.glob("*/swafast/attachment.json")] == ["checkpoint-12"]


def test_a_checkpoint_is_complete_before_a_push_and_at_a_signal(tmp_path: Path) -> None:
    class Pushes(Trainer):
        def _push_from_checkpoint(self, folder: str) -> None:
            found.append((Path(folder) / "swafast" / "attachment.json").exists())

    class OwnCheckpoints(Trainer):
        def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}").mkdir()

    found: list[bool] = []
    job = Job(tmp_path / "pushed", 8)
    with Watch(job).watching():
        fresh_state()
        trainer = trainer_of(job, NetModel(NetConfig(), job.net()), Pushes)
        trainer.args.push_to_hub = True
        WeightAverage(RULE).install(trainer)
        trainer.train()
    assert found == [True, True]
    trained(Job(tmp_path / "own", 8), WeightAverage(RULE), kind=OwnCheckpoints)
    assert len([*(tmp_path / "own").glob("*/swafast/averaged.pt")]) == 2


def test_a_checkpoint_never_has_the_average_as_the_model(tmp_path: Path) -> None:
    average = WeightAverage(RULE, copy_at_end=False)
    trainer, _ = trained(Job(tmp_path, 4), average)
    trainer.state.global_step = 5
    with average.swapped(), pytest.raises(RuntimeError, match=r"checkpoint-5 must get the model's own params"):
        trainer._save_checkpoint(trainer.model, None)
    assert not (tmp_path / "checkpoint-5").exists()


def test_a_state_of_another_model_changes_nothing(tmp_path: Path) -> None:
    trained(Job(tmp_path, 4), WeightAverage(RULE))
    path = tmp_path / "checkpoint-4" / "swafast" / "averaged.pt"
    torch.save({**torch.load(path), "module.net.first.weight": torch.zeros(7)}, path)
    average = WeightAverage(RULE)
    with pytest.raises(RuntimeError, match=r"net\.first\.weight"):
        trained(Job(tmp_path, 8, before=4), average, resume=True)
    assert not average.attachment.is_attached
    assert (int(average.averaged.n_averaged), average.attachment.step) == (0, 4)


# Trainings


def test_a_training_that_raised_goes_on_in_the_same_process(tmp_path: Path) -> None:
    class Loads(Trainer):
        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            assert not average.attachment.is_attached
            super()._load_optimizer_and_scheduler(checkpoint)

    whole = WeightAverage(RULE)
    _, expected = trained(Job(tmp_path / "whole", 12), whole)
    average = WeightAverage(RULE)
    job = Job(tmp_path / "raised", 12, raises_at=4)
    watch = Watch(job)
    with watch.watching():
        fresh_state()
        trainer = trainer_of(job, NetModel(NetConfig(), job.net()), Loads)
        average.install(trainer)
        with pytest.raises(EvaluationError):
            trainer.train()
        assert average.attachment.is_attached
        trainer.train(resume_from_checkpoint=True)
    assert differing(net_of(watch), net_of(expected)) == []
    assert differing(average.averaged.state_dict(), whole.averaged.state_dict()) == []
    assert average.attachment.step == 12


def test_a_second_training_goes_on_with_the_average_and_a_new_model_with_a_new_one(tmp_path: Path) -> None:
    average = WeightAverage(RULE)
    trainer, _ = trained(Job(tmp_path, 4), average)
    trainer.train()
    assert (int(average.averaged.n_averaged), average.attachment.step) == (8, 8)
    trainer.model_init = lambda: NetModel(NetConfig())
    trainer.train()
    assert (int(average.averaged.n_averaged), average.attachment.step) == (4, 4)
    with average.swapped():
        assert average._swap is not None


def test_a_search_for_a_batch_size_begins_a_new_average(tmp_path: Path) -> None:
    class TooLarge(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self._train_batch_size > 2 and self.state.global_step == 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    average = WeightAverage(RULE)
    trainer, _ = trained(Job(tmp_path, 4), average, kind=TooLarge, auto_find_batch_size=True)
    assert trainer.state.global_step > 4
    assert average.attachment.step == int(average.averaged.n_averaged) == trainer.state.global_step


def test_spans_of_epochs_and_of_the_whole_training(tmp_path: Path) -> None:
    for start, count in (("2ep", 5), ("0.75dur", 4), (9, 4)):
        average = WeightAverage(EqualAverage(), start=start)
        trained(Job(tmp_path, 12, accumulation=2), average)
        assert int(average.averaged.n_averaged) == count, start


# Adapters


def adapted(model: NetModel) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"]))


def adapters(trainer: Trainer) -> State:
    return peft.get_peft_model_state_dict(trainer.model)


def test_adapters_alone_are_averaged_saved_and_resumed(tmp_path: Path) -> None:
    whole, average = WeightAverage(RULE, copy_at_end=False), WeightAverage(RULE, copy_at_end=False)
    expected, _ = trained(Job(tmp_path / "whole", 12), whole, model=adapted)
    trained(Job(tmp_path / "stopped", 4), WeightAverage(RULE, copy_at_end=False), model=adapted)
    saved = torch.load(tmp_path / "stopped/checkpoint-4/swafast/averaged.pt", weights_only=True)
    names = {name for name in saved if name.startswith("module.") and not name.endswith(".batches")}
    assert len(names) == 4
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    trainer, _ = trained(Job(tmp_path / "stopped", 12, before=4), average, resume=True, model=adapted)
    assert differing(adapters(trainer), adapters(expected)) == []
    # A checkpoint of adapters lacks the model's buffers, and so has a resumed model.
    lost = ["module.base_model.model.net.batches"]
    assert differing(average.averaged.state_dict(), whole.averaged.state_dict()) == lost
    for dtype in (None, torch.float32):
        average.save_pretrained(tmp_path / "exported", dtype=dtype)
        exported = load_file(tmp_path / "exported" / "adapter_model.safetensors")
        with average.swapped():
            assert differing(exported, adapters(trainer)) == []
        assert differing(exported, adapters(trainer)) != []


def test_the_best_adapters_are_those_of_the_best_average(tmp_path: Path) -> None:
    average = WeightAverage(RULE)
    trainer, watch = trained(Job(tmp_path, 12), average, model=adapted, **WORST)
    saved = torch.load(tmp_path / "checkpoint-4/swafast/averaged.pt", weights_only=True)
    own = trainer.model.state_dict()
    for name, value in saved.items():
        if "lora_" in name:
            assert torch.equal(own[name.removeprefix("module.")], value)
    assert all(differing(seen.state, watch.steps[seen.step]) != [] for seen in watch.seen)


class Adapters(FullStates):
    """A LoRA on two ranks with shards."""

    def train(self, job: Job) -> Report:
        net = job.net()
        trainer = self.trainer(job, adapted(NetModel(NetConfig(), net)))
        average = WeightAverage(**job.options).install(trainer)
        trainer.train(resume_from_checkpoint=None if job.resumes is None else get_last_checkpoint(str(job.resumes)))
        average.save_pretrained(job.folder / "exported")
        average.save_pretrained(job.folder / "in_double", dtype=torch.float64)
        trainer.accelerator.wait_for_everyone()
        with average.swapped():
            swapped = whole_state(net)
        averaged, steps = average.averaged.full_state_dict(), average.attachment.state_dict()
        return Report(
            whole_state(net), averaged, steps, load_file(job.folder / "exported" / "adapter_model.safetensors"), swapped
        )


class ShardsOfAdapters(Adapters):
    states = "SHARDED_STATE_DICT"


@pytest.mark.parametrize("framework", [Adapters(), ShardsOfAdapters()], ids=["FULL", "SHARDED"])
def test_adapters_in_shards_alone_are_averaged_saved_and_resumed(framework: Adapters, tmp_path: Path) -> None:
    options = {"rule": RULE, "copy_at_end": False}
    whole = framework.run(Job(tmp_path / "whole", 12, options=options))
    first = framework.run(Job(tmp_path / "stopped", 4, options=options))
    second = framework.run(Job(tmp_path / "resumed", 12, before=4, resumes=tmp_path / "stopped", options=options))
    assert whole.averaged is not None
    assert second.averaged is not None
    assert sum(name.startswith("module.base_model.") for name in whole.averaged) == 5  # four of adapters, and a buffer
    # Of adapters in shards, a checkpoint lacks the model's buffers, and so has a resumed model.
    lost = {"SHARDED_STATE_DICT": ["batches"]}.get(framework.states, [])
    assert differing(second.model, whole.model) == lost
    assert differing(second.averaged, whole.averaged) == [f"module.base_model.model.net.{name}" for name in lost]
    assert second.attachment == whole.attachment
    assert step_of(second) == int(second.averaged["n_averaged"]) == 12
    for report in (whole, first, second):
        assert report.saved is not None
        assert report.exported is not None
        trained = differing(report.saved, report.model)
        assert trained == sorted(name for name in report.saved if "lora_" in name or "modules_to_save" in name)
        exported = {own_name(name): value for name, value in report.exported.items()}
        assert differing(exported, {name: report.saved[name] for name in trained}) == []
        wide = load_file(report.job.folder / "in_double" / "adapter_model.safetensors")
        assert {value.dtype for value in wide.values()} == {torch.float64}
        assert differing({name: value.float() for name, value in wide.items()}, report.exported) == []


def own_name(exported: str) -> str:
    """Return the name in the Net of a param of an adapter that PEFT has written."""
    part, _, rest = exported.removeprefix("base_model.model.net.").partition(".")
    within, _, leaf = rest.rpartition(".")
    return f"{part}.{within or 'modules_to_save'}.default.{leaf}"


class FlatAdapters(Fsdp1Orig):
    """A LoRA under FSDP1. With modules_to_save, the Trainer's own checkpoint waits for ever."""

    def train(self, job: Job) -> Report:
        config = peft.LoraConfig(r=2, target_modules=["first"])
        trainer = self.trainer(job, peft.get_peft_model(NetModel(NetConfig()), config))
        average = WeightAverage(**job.options).install(trainer)
        trainer.train()
        average.save_pretrained(job.folder / "exported")
        trainer.accelerator.wait_for_everyone()
        exported = load_file(job.folder / "exported" / "adapter_model.safetensors")
        return Report({}, average.averaged.full_state_dict(), average.attachment.state_dict(), exported)


def test_adapters_in_a_flat_param_alone_are_averaged_and_exported(tmp_path: Path) -> None:
    report = FlatAdapters().run(Job(tmp_path, 8, options={"rule": RULE}))
    assert report.averaged is not None
    assert report.exported is not None
    assert step_of(report) == int(report.averaged["n_averaged"]) == 8
    wanted = {f"module.{name.replace('.weight', '.default.weight')}": each for name, each in report.exported.items()}
    assert len(wanted) == 2
    assert all(bool(value.any()) for value in wanted.values())  # B begins with zeros
    assert differing({name: value for name, value in report.averaged.items() if "lora_" in name}, wanted) == []
    assert not any("base_layer" in name or ".second." in name for name in report.averaged)


# What is refused


def untrained(folder: Path, **options: Any) -> Trainer:
    fresh_state()
    job = Job(folder, 4)
    with Watch(job).watching():
        return trainer_of(job, NetModel(NetConfig(), job.net()), **options)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("averaged.pt", b"PK", r"averaged\.pt must be a whole file of a checkpoint, got a damaged one"),
        ("averaged.pt", b"", r"averaged\.pt must be a whole file of a checkpoint, got a damaged one"),
        ("attachment.json", b'{"step": ', r"attachment\.json must be a whole file of a checkpoint, got a damaged one"),
        ("attachment.json", b"3", r"(?s)must have a dict as 'attachment', got int.*checkpoint-4/swafast"),
        ("attachment.json", b'{"step": 4, "schedule": 1}', r"(?s)a state of an attachment, got .*checkpoint-4/swafast"),
        ("attachment.json", b'{"step": 4, "began": 5}', r"(?s)'began' no later than its step 4 .*checkpoint-4/swafast"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    trained(Job(tmp_path, 4), WeightAverage(RULE))
    (tmp_path / "checkpoint-4/swafast" / file).write_bytes(content)
    average = WeightAverage(RULE)
    with pytest.raises(ValueError, match=message):
        trained(Job(tmp_path, 8), average, resume=str(tmp_path / "checkpoint-4"))
    assert int(average.averaged.n_averaged) == 0
    assert average.attachment.step in (0, 4)  # as it was before the load
    assert not average.attachment.is_attached


@pytest.mark.parametrize(("step", "scaler"), [(3, None), (5, None), (3, "one"), (5, "one"), (4, None)])
def test_steps_that_the_trainer_has_not_counted_are_told(tmp_path: Path, step: int, scaler: str | None) -> None:
    trained(Job(tmp_path, 4), WeightAverage(RULE))
    path = tmp_path / "checkpoint-4/swafast/attachment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": step}))

    class Scales(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            trainer.accelerator.scaler = scaler

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            trainer.accelerator.scaler = None

    job, average = Job(tmp_path, 8), WeightAverage(RULE)
    fresh_state()
    with Watch(job).watching():
        trainer = trainer_of(job, NetModel(NetConfig(), job.net()))
    average.install(trainer)
    trainer.callback_handler.callbacks.insert(0, Scales())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    told = [str(each.message) for each in caught if "the framework counts" in str(each.message)]
    assert len(told) == (step == 5 or (step == 3 and scaler is None))
    for text in told:
        assert f"checkpoint-4 has averages after {step} steps of this training, but the framework counts 4" in text
        assert f"go on from their own step {step}: assign attachment.step" in text
    assert average.attachment.step == step + 4


def test_wrong_installations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = untrained(tmp_path)
    with pytest.raises(TypeError, match=r"trainer must be a transformers\.Trainer, got NetModel"):
        WeightAverage().install(trainer.model)
    for use in (lambda: WeightAverage().save_pretrained("folder"), WeightAverage().finish):
        with pytest.raises(RuntimeError, match=r"must be installed, .* call average\.install\(trainer\)"):
            use()
    average = WeightAverage().install(trainer)
    with pytest.raises(ValueError, match="must be installed in one trainer, got a second one"):
        average.install(untrained(tmp_path))
    with pytest.raises(ValueError, match="only one WeightAverage may be installed in the Trainer, got 2"):
        average.install(trainer)
    other = untrained(tmp_path)
    other.add_callback(WeightAverage())
    with pytest.raises(RuntimeError, match=r"as a callback alone cannot evaluate it: call average\.install"):
        other.train()
    other = untrained(tmp_path)
    monkeypatch.setattr(type(other.accelerator), "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(NotImplementedError, match=r"with DDP or with FSDP, got DistributedType\.DEEPSPEED"):
        WeightAverage().install(other)
    assert not any(isinstance(each, WeightAverage) for each in other.callback_handler.callbacks)


def test_optimizers_that_cannot_be_followed_are_refused(tmp_path: Path) -> None:
    class ScheduleFree(torch.optim.SGD):
        def eval(self) -> None: ...

    trainer = untrained(tmp_path)
    trainer.optimizer_cls_and_kwargs = (ScheduleFree, {"lr": 0.1})
    average = WeightAverage().install(trainer)
    with pytest.raises(NotImplementedError, match="leave the params alone in an evaluation, got ScheduleFree"):
        trainer.train()
    trainer = untrained(tmp_path)
    average = WeightAverage().install(trainer)
    with pytest.raises(ValueError, match="must have an optimizer for averages to follow, got none"):
        average.on_train_begin(trainer.args, trainer.state, trainer.control)  # before one is made
    assert average.attachment is None


def test_callbacks_at_the_end_find_the_average(tmp_path: Path) -> None:
    class Uploads(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            uploaded.append(whole_state(model.net))

    uploaded: list[State] = []
    trainer = untrained(tmp_path)
    trainer.add_callback(Uploads())
    average = WeightAverage(RULE).install(trainer)
    trainer.train()
    assert differing(uploaded[0], of_net(average.averaged.averaged_state_dict())) == []


# Documents


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of((ROOT / "docs/frameworks/transformers.md").read_text())
    job = Job(tmp_path, 4)
    with Watch(job).watching():
        models = [NetModel(NetConfig(), job.net()) for _ in range(4)]
    rows, evaluated = Rows(job.train_set()), Rows(job.eval_set(0))
    scope = {"torch": torch, "train_set": rows, "eval_set": evaluated, "batch": {"inputs": torch.ones(1, 4)}}
    scope |= {"fresh_model": models[2], "base_model": models[3], "modules": ["first"]}
    for number, block in enumerate(blocks):
        fresh_state()
        folders = {"args": f"run{min(number, 1)}", "longer_args": "run1", "adapted_args": "adapted"}
        for name, folder in folders.items():
            scope[name] = arguments(tmp_path / folder, num_train_epochs=1 + (name == "longer_args"))
        if number < 2:
            scope["model"] = models[number]
        exec(compile(block, f"block {number}", "exec"), scope)
        if number == 1:
            exported = load_file(tmp_path / "exported" / "model.safetensors")
            assert differing(exported, scope["average"].averaged.averaged_state_dict()) == []
        if number == 3:
            assert scope["average"].attachment.step == 8
    assert number == 5
    whole = load_file(tmp_path / "averaged_in_full" / "model.safetensors")
    assert differing(whole, load_file(tmp_path / "averaged" / "model.safetensors")) == []
    assert len(load_file(tmp_path / "adapters" / "adapter_model.safetensors")) == 2


def test_another_tools_average_is_taken_over_as_the_page_does(tmp_path: Path) -> None:
    block = blocks_of((ROOT / "docs/frameworks/migration.md").read_text())[2]
    trainer = untrained(tmp_path)
    model = trainer.model
    state = {f"module.{name}": value + 1.0 for name, value in model.state_dict().items()} | {
        "n_averaged": torch.tensor(3)
    }
    state["module.net.batches"] = model.state_dict()["net.batches"]
    loaded = []

    class Watches(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            loaded.append(average.averaged.state_dict()["module.net.first.weight"].clone())

    average = WeightAverage(ExponentialAverage(0.9))
    trainer.add_callback(Watches())
    exec(block, {"average": average, "ema_state": state, "trainer": trainer})
    assert torch.equal(loaded[0], state["module.net.first.weight"])
    assert int(average.averaged.n_averaged) == 3 + average.attachment.step > 3


def test_an_older_checkpoint_is_exported_as_the_pages_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = untrained(tmp_path / "run")
    average = WeightAverage(ExponentialAverage(0.9)).install(trainer)
    trainer.train()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    for name, written in (("transformers", "run/checkpoint-8"), ("accelerate", "checkpoint")):
        page = (ROOT / f"docs/frameworks/{name}.md").read_text()
        (command,) = re.findall(
            rf"^(swafast average {written}/swafast/averaged\.pt -o average\.safetensors)$", page, re.M
        )
        given = command.replace(written, str(checkpoint.relative_to(tmp_path))).split()[1:]
        assert CliRunner().invoke(cli.app, [*given, "--force"]).exit_code == 0
        exported = load_file("average.safetensors")
        assert differing(exported, average.averaged.averaged_state_dict()) == []
        Path("average.safetensors").unlink()


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EPOCHS", "2")
    fresh_state()
    threads = torch.get_num_threads()
    runpy.run_path(str(ROOT / "examples" / "transformers_tiny.py"), run_name="__main__")
    torch.set_num_threads(threads)
    told = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    assert told[0].split()[4].rstrip(",") == told[1].split()[-1]
    assert told[2] == "stopped after 1 epochs and resumed: the EMA is equal"
    assert told[3].startswith("the EMA of the LoRA's adapters: ")


class TakesOver(FullStates):
    """As the page on migration says."""

    def trainer(self, job: Job, model: PreTrainedModel) -> Trainer:
        trainer = super().trainer(job, model)

        class Loads(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                (average,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, WeightAverage)]
                convert.load(average.evaluated, others_average(job).state_dict())

        trainer.add_callback(Loads())
        return trainer


class TestShards(Shards):
    resumes = (ShardedStates, FullStates)
    takers = (TakesOver,)
