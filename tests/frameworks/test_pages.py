"""Pages of frameworks that need no class of ours: their code runs in the real package, and does what they say."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import EMAHandler
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swafast import ExponentialAverage, FusedAveragedModel, load
from tests.frameworks.kit import EvaluationError, differing
from tests.frameworks.shims import shim_torchvision
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
    before, after, resume, warm_up = IGNITE
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
    scope["hook"].after_val_epoch(scope["runner"])
    assert differing(saved_by_mmengine(1)["state_dict"], state_of(model)) == []
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
    # Nothing is reported, and no package is installed.
    os.environ |= {"YOLO_CONFIG_DIR": str(folder), "YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}
    os.environ["YOLO_VERBOSE"] = "false"
    shim_torchvision()
    from PIL import Image

    generator = torch.Generator().manual_seed(1)
    for name in (f"{split}/{kind}/{index}.png" for split in ("train", "val") for kind in "ab" for index in range(4)):
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "data" / name)
    from ultralytics import YOLO  # after its environment

    settings = {"data": str(folder / "data"), "project": str(folder), "exist_ok": True, "device": "cpu", "workers": 0}
    settings |= {"imgsz": 32, "batch": 4, "nbs": 4, "epochs": 3, "seed": 3, "freeze": 2, "plots": False}
    states: dict[str, dict[str, State]] = {}
    for name, block in zip(("before", "after"), ULTRALYTICS, strict=True):
        exec(block, scope := {"settings": settings | {"name": name}})
        stopped = YOLO("yolo11n-cls.yaml")
        stopped.add_callback("on_fit_epoch_end", _stop_after_an_epoch)
        with contextlib.suppress(EvaluationError):
            stopped.train(**settings, name=f"stopped {name}")
        resumed = YOLO(folder / f"stopped {name}/weights/last.pt")
        resumed.train(resume=True)
        for key, model in ((name, scope["model"]), (f"resumed {name}", resumed)):
            ema = model.trainer.ema
            states[key] = {"model": state_of(model.trainer.model), "average": state_of(ema.ema)}
            states[key]["average"]["updates"] = torch.tensor(ema.updates)
        saved = torch.load(folder / f"stopped {name}/weights/best.pt", weights_only=False)
        states[f"saved {name}"] = {"average": state_of((saved["ema"] or saved["model"]))}
    averaged = FusedAveragedModel(scope["model"].trainer.model, use_buffers=True)
    load(averaged, folder / "after/weights/averaged.safetensors")
    states["file"] = {"average": state_of(averaged.module) | {"updates": averaged.n_averaged - 1}}
    return states


def _stop_after_an_epoch(trainer: Any) -> None:
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
