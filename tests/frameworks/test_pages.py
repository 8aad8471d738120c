"""Pages of frameworks that need no class of ours: their code runs in the real package, and does what they say."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from ignite.handlers import EMAHandler
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swafast import FusedAveragedModel, load
from swafast.integrations.lightning import WeightAverage
from tests.frameworks.kit import EvaluationError, Job, Net, differing
from tests.frameworks.lightning_kit import Module, loader, trainer_of
from tests.frameworks.shims import shim_megatron, shim_torchvision, stay_offline
from tests.ranks import run_ranks
from tests.test_documents import ROOT, blocks_of, reader

pytestmark = pytest.mark.frameworks

State = dict[str, Tensor]


def state_of(module: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.fixture(autouse=True)
def _alone(one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Ignite


IGNITE = blocks_of((ROOT / "docs/frameworks/ignite.md").read_text())


def ignite_scope() -> dict[str, Any]:
    scope = reader()
    scope["seen"] = []

    def metric(model: nn.Module, batch: Tensor) -> None:
        scope["seen"].append(state_of(model))

    return scope | {"metric": metric}


def test_ignites_page_evaluates_the_average_and_resumes() -> None:
    before, after, resume, _ = IGNITE
    exec(before, theirs := ignite_scope())
    exec(after, ours := ignite_scope())
    # Theirs begins as the initial model, and ours as that of the first step: the rest is the same training.
    assert differing(state_of(theirs["model"]), state_of(ours["model"])) == []
    assert len(ours["seen"]) == 4  # two batches in each of two epochs
    assert differing(ours["seen"][-1], ours["averaged"].averaged_state_dict()) == []
    assert differing(ours["seen"][-1], state_of(ours["model"])) != []
    assert int(ours["averaged"].n_averaged) == 4
    # Stopped after two epochs, made anew and resumed: as three epochs without a stop.
    setup, run = after.rsplit("trainer.run", 1)
    assert run == "(loader, max_epochs=2)\n"
    exec(setup, resumed := ignite_scope())
    exec(resume, resumed)
    exec(setup + "trainer.run(loader, max_epochs=3)\n", straight := ignite_scope())
    for name in ("model", "averaged"):
        assert differing(state_of(resumed[name]), state_of(straight[name])) == []


def test_ignites_warm_up_is_that_of_its_handler() -> None:
    scope = ignite_scope()
    begins = "averaged.update_parameters(model)\naveraged.attach(optimizer, step=0)"
    setup, _ = IGNITE[1].replace("averaged.attach(optimizer)", begins).rsplit("trainer.run", 1)
    exec(setup, scope)
    handlers = {name: EMAHandler(scope["model"], 0.001, 0.2, 100) for name in ("ema_momentum", "other")}
    seen: dict[str, list[float]] = {name: [] for name in handlers}
    trainer = scope["trainer"]
    for name, handler in handlers.items():
        handler.attach(trainer, name=name)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: [seen[name].append(getattr(trainer.state, name)) for name in seen]
    )
    exec(IGNITE[3], scope)
    assert seen["ema_momentum"][:2] == [0.2, 0.2 + (0.001 - 0.2) / 99]
    assert {*seen["other"]} == {0.001}  # it has no warm-up, as the page says
    assert int(scope["averaged"].n_averaged) == 1 + 8
    for name, value in handlers["ema_momentum"].ema_model.state_dict().items():
        torch.testing.assert_close(scope["averaged"].averaged_state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_a_save_inside_an_evaluation_is_refused() -> None:
    exec(IGNITE[1].replace("Events.EPOCH_COMPLETED, saver", "Events.STARTED, saver"), scope := ignite_scope())
    scope["evaluator"].add_event_handler(Events.COMPLETED, scope["saver"])
    with pytest.raises(RuntimeError, match="swapped"):
        scope["trainer"].run(scope["loader"], max_epochs=3)


# MMEngine


MMENGINE = blocks_of((ROOT / "docs/frameworks/mmengine.md").read_text())


class Small(BaseModel):  # type: ignore[misc]
    """A model of MMEngine, which notes the states in which it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(20)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.seen: list[State] = []
        self.fails = False

    def forward(self, inputs: Any, mode: str) -> Any:
        if mode == "loss":
            return {"loss": self.net(torch.stack(list(inputs))).square().mean()}
        self.seen.append(state_of(self))
        if self.fails:
            raise ArithmeticError
        return [0.5]


class Metric(BaseMetric):  # type: ignore[misc]
    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(1.0)

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return {"count": sum(results)}


def mmengine_config(epochs: int = 2, **others: Any) -> dict[str, Any]:
    data = TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)))
    loader = {"dataset": data, "sampler": {"type": "DefaultSampler", "shuffle": False}, "batch_size": 3}
    model = Small()
    return {
        "experiment_name": f"run{next(NUMBERS)}",
        "model": model,
        "work_dir": "work",
        "train_dataloader": loader,
        "train_cfg": {"by_epoch": True, "max_epochs": epochs},
        "optim_wrapper": {"type": "OptimWrapper", "optimizer": torch.optim.AdamW(model.parameters(), 0.05)},
        "val_dataloader": loader,
        "val_cfg": {},
        "val_evaluator": Evaluator(Metric()),
        "test_dataloader": loader,
        "test_cfg": {},
        "test_evaluator": Evaluator(Metric()),
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        "log_level": "ERROR",
        **others,
    }


NUMBERS = itertools.count()


def run_mmengine(block: str, epochs: int = 2, **others: Any) -> dict[str, Any]:
    """Run a block with a runner, and forget the hook that it has registered."""
    HOOKS.module_dict.pop("AverageHook", None)
    scope = {"config": mmengine_config(epochs, **others), "torch": torch}
    exec(block, scope)
    return scope


def saved_by_mmengine(epoch: int) -> dict[str, Any]:
    # Like MMEngine's own resume, it needs objects of MMEngine.
    return dict(torch.load(f"work/epoch_{epoch}.pth", weights_only=False))


def test_mmengines_page_evaluates_the_average_and_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, export = MMENGINE
    theirs = run_mmengine(before)["runner"].model
    ours = run_mmengine(after)
    model, averaged = ours["runner"].model, ours["hook"].averaged
    assert differing(state_of(theirs), state_of(model)) == []
    assert int(averaged.n_averaged) == 8
    assert len(model.seen) == 8  # four batches in each of two epochs
    assert differing(model.seen[-1], averaged.averaged_state_dict()) == []
    assert differing(model.seen[-1], state_of(model)) != []
    ours["runner"].test()
    assert differing(model.seen[-1], averaged.averaged_state_dict()) == []
    saved = saved_by_mmengine(2)
    assert differing(saved["state_dict"], state_of(model)) == []
    assert differing(saved["averaged"], averaged.state_dict()) == []
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    resumed = run_mmengine(after, 3, resume=True)
    straight = run_mmengine(after, 3, work_dir="straight")
    for each in (resumed, straight):
        assert each["hook"].averaged.attachment.step == 12
    for name, value in (("averaged", resumed["hook"].averaged), ("model", resumed["runner"].model)):
        other = straight["hook"].averaged if name == "averaged" else straight["runner"].model
        assert differing(state_of(value), state_of(other)) == []
    exec(export, ours)
    deployed = torch.load("deployed.pth", weights_only=True)["state_dict"]
    assert differing(deployed, averaged.averaged_state_dict()) == []


def test_several_wrappers_of_mmengine_are_attached_by_their_values() -> None:
    model = nn.Linear(4, 2)
    both = OptimWrapperDict(
        weight=OptimWrapper(torch.optim.SGD([model.weight], 0.1)), bias=OptimWrapper(torch.optim.SGD([model.bias], 0.1))
    )
    averaged = FusedAveragedModel(model)
    with pytest.raises(TypeError, match=re.escape("got OptimWrapperDict: write attach([*optimizers.values()])")):
        averaged.attach(both)
    averaged.attach([*both.values()])
    for each in both.values():
        each.step()
    assert int(averaged.n_averaged) == 1


def test_what_the_traps_of_mmengines_page_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    after = MMENGINE[1]
    begins, trains = after.rsplit("runner.train()", 1)
    assert trains == "\n"
    scope = run_mmengine(begins)
    model = scope["runner"].model
    model.fails = True
    with pytest.raises(ArithmeticError):
        scope["runner"].train()
    assert differing(model.seen[-1], state_of(model)) == []
    model.fails = False
    scope["hook"].before_run(scope["runner"])
    assert differing(saved_by_mmengine(1)["state_dict"], state_of(model)) == []
    scope["runner"].train()
    assert int(scope["hook"].averaged.n_averaged) == 8
    with pytest.warns(UserWarning, match="counts from 0"):  # of the average of that checkpoint
        taken = run_mmengine(after, 1, load_from="work/epoch_1.pth", work_dir="other")
    assert int(taken["hook"].averaged.n_averaged) == 8
    # With accumulation, ours counts steps.
    config = mmengine_config(1)
    config["optim_wrapper"]["accumulative_counts"] = 2
    scope = run_mmengine(after, 1, optim_wrapper=config["optim_wrapper"], model=config["model"], work_dir="accumulated")
    assert int(scope["hook"].averaged.n_averaged) == 2


# Ultralytics


ULTRALYTICS = blocks_of((ROOT / "docs/frameworks/ultralytics.md").read_text())


def _ultralytics_trainings(folder: Path) -> dict[str, dict[str, State]]:
    """Train by both blocks of the page, stop and resume both, and return the model and the average of each."""
    stay_offline()
    shim_torchvision()
    from PIL import Image

    generator = torch.Generator().manual_seed(1)
    for name in (f"{split}/{kind}/{index}.png" for split in ("train", "val") for kind in "ab" for index in range(4)):
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "data" / name)
    from ultralytics import YOLO

    torch.set_num_threads(1)  # its import sets another number

    settings = {"data": str(folder / "data"), "project": str(folder), "exist_ok": True, "device": "cpu", "workers": 0}
    settings |= {"imgsz": 32, "batch": 4, "nbs": 4, "epochs": 3, "seed": 3, "freeze": 2, "plots": False}
    states: dict[str, dict[str, State]] = {}
    for name, block in zip(("before", "after"), ULTRALYTICS, strict=True):
        exec(block, scope := {"settings": settings | {"name": name}})
        stopped = YOLO("yolo11n-cls.yaml")
        stopped.add_callback("on_fit_epoch_end", _raise_in_evaluation)
        with contextlib.suppress(EvaluationError):
            stopped.train(**settings, name=f"stopped {name}")
        resumed = YOLO(folder / f"stopped {name}/weights/last.pt")
        resumed.train(resume=True)
        for key, model in ((name, scope["model"]), (f"resumed {name}", resumed)):
            ema = model.trainer.ema
            states[key] = {"model": state_of(model.trainer.model), "average": state_of(ema.ema)}
            states[key]["average"]["updates"] = torch.tensor(ema.updates)
        saved = torch.load(folder / f"stopped {name}/weights/best.pt", weights_only=False)
        states[f"saved {name}"] = {"average": state_of(saved["ema"] or saved["model"])}
    averaged = FusedAveragedModel(scope["model"].trainer.model, use_buffers=True)
    load(averaged, folder / "after/weights/averaged.safetensors")
    states["file"] = {"average": state_of(averaged.module) | {"updates": averaged.n_averaged - 1}}
    return states


def _raise_in_evaluation(*_: Any, **__: Any) -> None:
    raise EvaluationError


def test_ultralytics_page_has_the_bits_of_its_own_class(tmp_path: Path) -> None:
    (states,) = run_ranks(1, _ultralytics_trainings, tmp_path)
    assert int(states["after"]["average"]["updates"]) == int(states["resumed after"]["average"]["updates"]) == 6
    for kind in ("", "resumed ", "saved "):
        for name, theirs in states[f"{kind}before"].items():
            differ = differing(theirs, states[f"{kind}after"][name])
            assert [key for key in differ if not key.endswith("num_batches_tracked")] == []
    model, average = states["after"].values()
    assert differing(model, average) != ["updates"]
    assert differing(states["file"]["average"], average) == []


# Megatron


MEGATRON = blocks_of((ROOT / "docs/frameworks/megatron.md").read_text())


def megatron_scope() -> dict[str, Any]:
    """Return a model in bfloat16 and float32, and its distributed optimizer, over this group's ranks."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    half = torch.bfloat16
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=True, params_dtype=half)

    class Halves(MegatronModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(config)
            torch.manual_seed(1)
            self.first, self.last = nn.Linear(4, 5, dtype=half), nn.Linear(5, 3, dtype=half)
            self.norm = nn.LayerNorm(5)

        def forward(self, batch: Tensor) -> Tensor:
            return self.last(self.norm(self.first(batch).float()).to(half)).float()  # type: ignore[no-any-return]

    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=False)
    model = DistributedDataParallel(config, ddp, Halves())
    settings = OptimizerConfig(optimizer="adam", lr=0.1, bf16=True, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [model])
    generator = torch.Generator().manual_seed(dist.get_rank())

    def train_step(model: Any, batch: Tensor, optimizer: Any) -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        model.finish_grad_sync()

    seen: list[State] = []
    scope = {"model": model, "optimizer": optimizer, "train_step": train_step, "seen": seen}
    scope["evaluate"] = lambda model: seen.append(state_of(model.module))
    return scope | {"loader": [torch.randn(6, 4, generator=generator).to(half) for _ in range(5)]}


def whole(parts: list[Tensor]) -> Tensor:
    """Return the main params of all ranks, one after another as each rank has them."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, torch.cat([part.detach().flatten() for part in parts]))
    return torch.cat(every)


def _megatron_on_a_rank(folder: Path) -> list[str]:
    shim_megatron()
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    os.chdir(folder)
    before, after, save, resume = MEGATRON
    exec(before, theirs := megatron_scope())
    exec(after, ours := megatron_scope())
    model, optimizer, averaged, mains = (ours[name] for name in ("model", "optimizer", "averaged", "mains"))
    wrong = differing(state_of(theirs["model"].module), state_of(model.module))  # averaging changes no training
    (seen,) = ours["seen"]
    # The average that was evaluated is that of the main params, by hand, and on all ranks the same.
    again = megatron_scope()
    again_mains = [main for part in again["optimizer"].chained_optimizers for main in groups_of(part)]
    expected = None
    for batch in again["loader"]:
        again["train_step"](again["model"], batch, again["optimizer"])
        again["optimizer"].step()
        if expected is None:
            expected = [main.detach().clone() for main in again_mains]
        for average, main in zip(expected, again_mains, strict=True):
            average.lerp_(main.detach(), torch.tensor(1 - 0.999, dtype=torch.float64).float())
    wrong += [
        f"main {index}"
        for index, (average, main) in enumerate(zip(expected or [], averaged.module.parameters(), strict=True))
        if not torch.equal(average, main)
    ]
    values = {float(value) for value in whole(list(averaged.module.parameters())).bfloat16()}
    for name, value in seen.items():
        if not {float(each) for each in value.bfloat16().flatten()} <= values:
            wrong.append(f"{name} is not of the average")
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, seen)
    wrong += differing(*ranks)
    if differing(seen, state_of(model.module)) == []:
        wrong.append("the model itself was evaluated")
    # A refusal, and a resume.
    whole_model = FusedAveragedModel(model.module)
    with pytest.raises(TypeError, match=r"got ChainedOptimizer: average the main params of Megatron, as docs/frame"):
        whole_model.attach(optimizer)
    with pytest.raises(ValueError, match=r"has none of them: if it trains copies of them"):
        whole_model.attach(optimizer.chained_optimizers[0].optimizer)
    exec(save, ours)
    saved = state_of(averaged)
    averaged.update_parameters(mains)
    exec(resume, ours)
    return wrong + differing(state_of(averaged), saved)


def groups_of(part: Any) -> list[Tensor]:
    return [main for group in part.optimizer.param_groups for main in group["params"]]


def test_megatrons_page_averages_the_main_params(tmp_path: Path) -> None:
    assert run_ranks(2, _megatron_on_a_rank, tmp_path) == [[], []]


# Keras


PAGE = (ROOT / "docs/frameworks/keras.md").read_text()
KERAS = PAGE, blocks_of(PAGE)


def _keras_trainings(folder: Path) -> dict[str, Any]:
    """Run the page, and return what it has trained and averaged, as lists of weights."""
    os.environ["KERAS_BACKEND"] = "torch"
    os.chdir(folder)
    import keras

    from swafast.cli import app

    def scope() -> dict[str, Any]:
        keras.utils.clear_session()  # the layers of each model are numbered from the start
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Dense(5), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).numpy()
        model = keras.Sequential([keras.layers.Input((4,)), *layers])
        return {"model": model, "inputs": inputs, "targets": inputs[:, :2] ** 2, "steps": [], "seen": []}

    def weights(model: Any) -> list[Tensor]:
        return [variable.value.detach().clone() for variable in model.trainable_variables]

    page, (before, after, resume, load_average) = KERAS
    exec(before.replace("epochs=2", "epochs=2, batch_size=2"), theirs := scope())
    ours = scope()

    class Watch(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            ours["steps"].append(weights(self.model))

        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            ours["seen"].append(weights(self.model))

    watched = after.replace("epochs=2", "epochs=2, batch_size=2").replace("[average]", "[average, Watch()]")
    ours["Watch"] = Watch
    exec(watched, ours)
    got = {name: ours[name] for name in ("steps", "seen")} | {"trained": weights(ours["model"])}
    got |= {"theirs": weights(theirs["model"])}
    got["average"] = [value.detach().clone() for value in ours["average"].averaged.module.parameters()]
    torch.save(ours["model"].state_dict(), "epoch1.pt")
    exec(resume, ours)
    got["resumed"] = int(ours["average"].averaged.n_averaged)
    fails = type("Fails", (keras.callbacks.Callback,), {"on_test_batch_end": _raise_in_evaluation})()
    fit = {"x": ours["inputs"], "y": ours["targets"], "validation_split": 0.5}
    with pytest.raises(EvaluationError):
        ours["model"].fit(**fit, callbacks=[ours["average"], fails])
    ours["model"].fit(**fit, callbacks=[ours["average"]])
    got["after an error"] = int(ours["average"].averaged.n_averaged)
    with pytest.raises(TypeError, match="got Adam: an optimizer of Keras has no hooks"):
        ours["average"].averaged.attach(ours["model"].optimizer)
    with pytest.raises(ValueError, match="model must have the parameters that it was averaged with"):
        FusedAveragedModel(model := scope()["model"]).update_parameters(model)
    (command,) = re.findall(r"^swafast (.*)$", page, re.MULTILINE)
    other = scope()
    torch.save(other["model"].state_dict(), "epoch2.pt")
    got["untrained"] = weights(other["model"])
    app(command.split(), standalone_mode=False)
    exec(load_average, other | {"torch": torch})
    return got | {"loaded": weights(other["model"])}


def test_keras_page_averages_bit_for_bit(tmp_path: Path) -> None:
    (got,) = run_ranks(1, _keras_trainings, tmp_path)
    weight = torch.tensor(1 - 0.9, dtype=torch.float64).float()
    averages = [[value.clone() for value in got["steps"][0]]]
    for step in got["steps"][1:]:
        averages.append([torch.lerp(old, new, weight) for old, new in zip(averages[-1], step, strict=True)])
    assert len(averages) == 8
    for seen, expected in (
        (got["average"], averages[-1]),
        (got["seen"][0], averages[3]),  # at the end of the first of two epochs
        (got["seen"][-1], averages[7]),
        (got["trained"], got["steps"][-1]),
        (got["loaded"], [torch.stack([*pair]).mean(0) for pair in zip(got["trained"], got["untrained"], strict=True)]),
    ):
        assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))
    assert got["resumed"] == 8 + 1  # one batch of all inputs
    assert got["after an error"] == 9 + 2
    for one, other in zip(got["average"], got["theirs"], strict=True):  # Keras leaves its average in the model
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# NeMo


def test_nemos_page_trains_in_lightning(tmp_path: Path) -> None:
    (block,) = blocks_of((ROOT / "docs/frameworks/nemo.md").read_text())
    torch.manual_seed(20)
    module, job = Module(Net()), Job(tmp_path)
    quiet = "logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False"
    scope = {"model": module, "train_loader": loader(job.train_set()), "val_loader": loader(job.eval_set(0))}
    exec(block.replace("max_epochs=2", f"max_epochs=2, {quiet}"), scope)
    averaged = scope["average"].averaged
    assert int(averaged.n_averaged) == 8
    assert differing(state_of(module), averaged.averaged_state_dict()) == []


def test_a_callback_that_swaps_as_nemos_does_is_refused(tmp_path: Path) -> None:
    class EMA(pl.Callback):
        def swap_model_weights(self, trainer: Any, saving_ema_model: bool = False) -> None: ...

    job = Job(tmp_path)
    trainer = trainer_of(tmp_path, [WeightAverage(), EMA()], max_epochs=1)
    with pytest.raises(ValueError, match="callbacks must have WeightAverage alone to average weights, got EMA too"):
        trainer.fit(Module(Net()), loader(job.train_set()))
