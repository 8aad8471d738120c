"""Record what other tools write, and how they go on: `python -m tests.frameworks.record_states [--into FOLDER] [NAME]`.

Each file in `states/` has what one tool has written after `SAVED` updates, and the average that the same tool had after
`LAST`. The model's values follow from the number of the step alone, so a test can go on from the state by itself.

The tools are the packages that `versions.txt` and `composer.txt` pin. NeMo is in neither: its own code writes its
state, from the file that a variable names.

    NEMO_EMA   nemo/collections/common/callbacks/ema.py of nemo_toolkit 3.0.0
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_swa_multi_avg_fn

FOLDER = Path(__file__).parent / "states"
SAVED, LAST = 7, 12
DECAY = 0.9

State = dict[str, Any]
#: What a tool has written, and what its average is after the last step, by the model's names.
Recorded = tuple[State, dict[str, Tensor]]


class Net(nn.Module):
    """Params of different shapes, buffers that are floats, and an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 3)


def put(net: nn.Module, step: int) -> None:
    """Set the values that a model has after a step."""
    with torch.no_grad():
        for index, tensor in enumerate(net.state_dict().values()):
            if tensor.is_floating_point():
                numbers = (torch.arange(tensor.numel()) * (2 * index + 3) + step * 17) % 97
                tensor.copy_((numbers.reshape(tensor.shape) - 40) / 97)
            else:
                tensor.fill_(step)


def started() -> Net:
    net = Net()
    put(net, 0)
    return net


def of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def run(
    net: nn.Module, update: Callable[[int], object], state: Callable[[], Any], average: Callable[[], dict[str, Tensor]]
) -> Recorded:
    """Take the steps with a tool whose average is updated by a call."""
    written: Any = None
    for step in range(1, LAST + 1):
        put(net, step)
        update(step)
        if step == SAVED:
            written = copy.deepcopy(state())
    return written, average()


def positions(net: nn.Module, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for (name, _), value in zip(net.named_parameters(), tensors, strict=True)}


class Jump(torch.optim.SGD):
    """An optimizer whose steps lead to the values of `put`."""

    def __init__(self, net: nn.Module, groups: Any = None) -> None:
        super().__init__(groups if groups is not None else net.parameters(), lr=0.1)
        self.net, self.steps = [net], 0  # in a list, as states have no modules

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        self.steps += 1
        put(self.net[0], self.steps)
        return loss


# torch


def torch_swa() -> Recorded:
    net = started()
    averaged = AveragedModel(net, multi_avg_fn=get_swa_multi_avg_fn())
    return run(net, lambda _: averaged.update_parameters(net), averaged.state_dict, lambda: of(averaged.module))


def torch_ema_fn() -> Recorded:
    net = started()
    averaged = AveragedModel(net, avg_fn=get_ema_avg_fn(DECAY))
    return run(net, lambda _: averaged.update_parameters(net), averaged.state_dict, lambda: of(averaged.module))


# timm


def timm_v2() -> Recorded:
    from timm.utils import ModelEmaV2

    net = started()
    ema = ModelEmaV2(net, decay=DECAY)
    return run(net, lambda _: ema.update(net), ema.state_dict, lambda: of(ema.module))


def timm_v3() -> Recorded:
    from timm.utils import ModelEmaV3

    net = started()
    ema = ModelEmaV3(net, decay=DECAY, use_warmup=True, update_after_step=2)
    return run(net, lambda step: ema.update(net, step=step), ema.state_dict, lambda: of(ema.module))


def timm_train() -> Recorded:
    from timm.utils import CheckpointSaver, ModelEmaV3

    net = started()
    ema = ModelEmaV3(net, decay=DECAY)

    def checkpoint() -> State:
        with tempfile.TemporaryDirectory() as folder:
            saver = CheckpointSaver(net, Jump(net), model_ema=ema, checkpoint_dir=folder, recovery_dir=folder)
            saver.save_checkpoint(0, metric=0.5)
            return dict(torch.load(Path(folder) / "last.pth.tar", weights_only=True))

    return run(net, lambda _: ema.update(net), checkpoint, lambda: of(ema.module))


# lucidrains


def ema_pytorch() -> Recorded:
    from ema_pytorch import EMA

    net = started()
    ema = EMA(net, beta=DECAY, update_after_step=2, update_every=2)
    return run(net, lambda _: ema.update(), ema.state_dict, lambda: of(ema.ema_model))


# diffusers, torch_ema


def _diffusers(**options: Any) -> Recorded:
    from diffusers.training_utils import EMAModel

    net = started()
    ema = EMAModel(net.parameters(), decay=DECAY, **options)
    return run(net, lambda _: ema.step(net.parameters()), ema.state_dict, lambda: positions(net, ema.shadow_params))


def diffusers_ratio() -> Recorded:
    return _diffusers(update_after_step=2, min_decay=0.3)


def diffusers_power() -> Recorded:
    return _diffusers(use_ema_warmup=True, inv_gamma=2.0, power=0.75)


def diffusers_files() -> Recorded:
    """Return the entries of config.json and the tensors beside it, in one mapping."""
    import json

    from diffusers import ModelMixin
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.training_utils import EMAModel
    from safetensors.torch import load_file

    class Small(ModelMixin, ConfigMixin, Net):  # type: ignore[misc]
        config_name = "config.json"

        @register_to_config
        def __init__(self) -> None:
            Net.__init__(self)

    net = Small()
    put(net, 0)
    ema = EMAModel(net.parameters(), decay=DECAY, model_cls=Small, model_config=net.config)

    def files() -> State:
        with tempfile.TemporaryDirectory() as folder:
            ema.save_pretrained(folder)
            config = json.loads((Path(folder) / "config.json").read_text())
            return {**config, **load_file(Path(folder) / "diffusion_pytorch_model.safetensors")}

    return run(net, lambda _: ema.step(net.parameters()), files, lambda: positions(net, ema.shadow_params))


def _torch_ema(**options: Any) -> Recorded:
    from torch_ema import ExponentialMovingAverage

    net = started()
    ema = ExponentialMovingAverage(net.parameters(), decay=DECAY, **options)
    return run(net, lambda _: ema.update(), ema.state_dict, lambda: positions(net, ema.shadow_params))


def torch_ema_ratio() -> Recorded:
    return _torch_ema()


def torch_ema_constant() -> Recorded:
    return _torch_ema(use_num_updates=False)


# Lightning


def lightning() -> Recorded:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    class Trained(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = started()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net.first(batch[0]).sum()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return Jump(self.net)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(LAST, 4)), batch_size=1)
    averaging = EMAWeightAveraging(decay=DECAY)
    module = Trained()
    with tempfile.TemporaryDirectory() as folder:
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED, save_top_k=-1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[averaging, saver], **quiet)  # type: ignore[arg-type]
        trainer.fit(module, data)
        state = torch.load(Path(folder) / f"step={SAVED}.ckpt", weights_only=True)
    keys = ("global_step", "pytorch-lightning_version", "state_dict", "current_model_state", "averaging_state")
    assert averaging._average_model is not None
    return {key: state[key] for key in keys}, of(averaging._average_model.module)


# mmengine


def _mmengine(name: str, **options: Any) -> Recorded:
    import mmengine.model as averages

    net = started()
    averaged = getattr(averages, name)(net, **options)
    return run(net, lambda _: averaged.update_parameters(net), averaged.state_dict, lambda: of(averaged.module))


def mmengine_swa() -> Recorded:
    return _mmengine("StochasticWeightAverage", interval=2)


def mmengine_ema() -> Recorded:
    return _mmengine("ExponentialMovingAverage", momentum=0.1)


def mmengine_annealing() -> Recorded:
    return _mmengine("MomentumAnnealingEMA", momentum=0.1, gamma=4)


def mmengine_hook() -> Recorded:
    """Return what a runner of mmengine has saved with its EMAHook."""
    from mmengine.hooks import EMAHook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Small(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = started()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return {"loss": self.net.first(torch.zeros(1, 4)).sum()}

    model = Small()
    hook = EMAHook(momentum=0.1)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            model=model,
            work_dir=folder,
            train_dataloader={
                "dataset": torch.utils.data.TensorDataset(torch.zeros(LAST, 4)),
                "sampler": {"type": "DefaultSampler", "shuffle": False},
                "batch_size": 1,
            },
            train_cfg={"by_epoch": False, "max_iters": LAST},
            optim_wrapper={"optimizer": Jump(model.net), "type": "OptimWrapper"},
            custom_hooks=[hook],
            default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": SAVED, "by_epoch": False}},
            log_level="ERROR",
        )
        runner.train()
        state = torch.load(Path(folder) / f"iter_{SAVED}.pth", weights_only=False)  # it has objects of mmengine
    kept = {key: state[key] for key in ("state_dict", "ema_state_dict")}
    return {**kept, "meta": {"iter": state["meta"]["iter"]}}, of(hook.ema_model.module)


# ignite


def ignite() -> Recorded:
    from ignite.engine import Engine, Events
    from ignite.handlers import EMAHandler

    net = started()
    handler = EMAHandler(net, momentum=0.1)
    written: list[State] = []

    def train(engine: Any, batch: Any) -> None:
        put(net, engine.state.iteration)

    engine = Engine(train)
    handler.attach(engine)

    @engine.on(Events.ITERATION_COMPLETED(once=SAVED))
    def save() -> None:
        written.append(copy.deepcopy(handler.ema_model.state_dict()))

    engine.run([0] * LAST)
    return written[0], of(handler.ema_model)


# ultralytics


def ultralytics() -> Recorded:
    from ultralytics.utils.torch_utils import ModelEMA

    net = started()
    ema = ModelEMA(net, decay=DECAY, tau=20)
    return run(
        net,
        lambda _: ema.update(net),
        lambda: {"ema": ema.ema.state_dict(), "updates": ema.updates},  # as it is while training: files have halves
        lambda: of(ema.ema),
    )


# Not among the pinned packages


def nemo() -> Recorded:
    spec = importlib.util.spec_from_file_location("nemo_ema", os.environ["NEMO_EMA"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = started()
    groups = [{"params": list(net.second.parameters())}, {"params": [*net.first.parameters(), *net.norm.parameters()]}]
    optimizer = module.EMAOptimizer(Jump(net, groups), torch.device("cpu"), decay=DECAY, every_n_steps=2)
    written: State = {}
    for step in range(1, LAST + 1):
        optimizer.step()
        optimizer.join()
        if step == SAVED:
            written = copy.deepcopy(optimizer.state_dict())
    names = {id(param): name for name, param in net.named_parameters()}
    return written, {names[id(p)]: v for p, v in zip(optimizer.all_parameters(), optimizer.ema_params, strict=True)}


def _composer(algorithm: str, **options: Any) -> Recorded:
    import composer.algorithms  # type: ignore[import-not-found]
    from composer import Trainer
    from composer.models import ComposerModel  # type: ignore[import-not-found]

    class Small(ComposerModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = started()

        def forward(self, batch: Any) -> Any:
            return self.net.first(batch[0])

        def loss(self, outputs: Any, batch: Any, *args: Any) -> Any:
            return outputs.sum()

    model = Small()
    algo = getattr(composer.algorithms, algorithm)(**options)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(LAST, 4)), batch_size=1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            train_dataloader=data,
            max_duration=f"{LAST}ba",
            algorithms=[algo],
            optimizers=[Jump(model.net)],
            device="cpu",
            save_folder=folder,
            save_filename="{batch}.pt",
            save_interval=f"{SAVED}ba",
            progress_bar=False,
        )
        trainer.fit()
        state = torch.load(Path(folder) / f"{SAVED}.pt", weights_only=False)["state"]  # it has objects of Composer
    kept = {"model": dict(state["model"]), "algorithms": [(n, dict(s)) for n, s in state["algorithms"]]}
    for _, each in kept["algorithms"]:
        each.pop("repr", None)  # an address
        each.pop("swa_scheduler", None)
    if algorithm == "SWA":
        average = of(algo.swa_model.module)
    else:
        algo._ensure_ema_weights_active(trainer.state)
        average = of(model)
    batch = int(state["timestamp"]["Timestamp"]["batch"])
    return {"state": {**kept, "timestamp": {"Timestamp": {"batch": batch}}}}, average


def composer_ema() -> Recorded:
    return _composer("EMA", half_life=None, smoothing=DECAY, update_interval="1ba")


def composer_swa() -> Recorded:
    return _composer("SWA", swa_start="0.2dur", swa_end="1dur", update_interval="1ba", schedule_swa_lr=False)


#: What is recorded, by the name of its file, and the package that writes it.
RECORDS: dict[str, tuple[str, Callable[[], Recorded]]] = {
    "torch_swa": ("torch", torch_swa),
    "torch_ema_fn": ("torch", torch_ema_fn),
    "timm_v2": ("timm", timm_v2),
    "timm_v3": ("timm", timm_v3),
    "timm_train": ("timm", timm_train),
    "ema_pytorch": ("ema-pytorch", ema_pytorch),
    "diffusers_ratio": ("diffusers", diffusers_ratio),
    "diffusers_power": ("diffusers", diffusers_power),
    "diffusers_files": ("diffusers", diffusers_files),
    "torch_ema_ratio": ("torch-ema", torch_ema_ratio),
    "torch_ema_constant": ("torch-ema", torch_ema_constant),
    "lightning": ("lightning", lightning),
    "mmengine_swa": ("mmengine", mmengine_swa),
    "mmengine_ema": ("mmengine", mmengine_ema),
    "mmengine_annealing": ("mmengine", mmengine_annealing),
    "mmengine_hook": ("mmengine", mmengine_hook),
    "ignite": ("pytorch-ignite", ignite),
    "nemo": ("nemo_toolkit", nemo),
    "composer_ema": ("mosaicml", composer_ema),
    "composer_swa": ("mosaicml", composer_swa),
    "ultralytics": ("ultralytics", ultralytics),
}
#: The releases of packages that are not pinned, from whose own code the states come.
UNPINNED = {"nemo_toolkit": "3.0.0"}


def version_of(package: str) -> str:
    return UNPINNED.get(package) or importlib.metadata.version(package)


def main(arguments: list[str]) -> None:
    from tests.frameworks.shims import shim_torchvision, stay_offline

    stay_offline()
    shim_torchvision()
    into, names = (Path(arguments[1]), arguments[2:]) if arguments[:1] == ["--into"] else (FOLDER, arguments)
    for name in names or list(RECORDS):
        package, record = RECORDS[name]
        state, continued = record()
        path = into / f"{name}.pt"
        torch.save({"writer": f"{package} {version_of(package)}", "state": state, "continued": continued}, path)
        torch.load(path, weights_only=True)
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
