"""How Lightning trains the kit's network: in this process, or sharded with FSDP2 on several ranks."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from swafast.integrations.lightning import WeightAverage
from tests.frameworks.kit import BATCH, EvaluationError, Framework, Job, Net, Report, of_net, optimizer_of, whole_state

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(pl.LightningModule):
    """A LightningModule as users write it."""

    def __init__(self, net: nn.Module, *, is_sharded: bool = False) -> None:
        super().__init__()
        self.net, self._is_sharded = net, is_sharded

    def configure_model(self) -> None:
        if self._is_sharded:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int, dataloader_idx: int = 0) -> None:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=self._is_sharded)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.net.parameters())


def loader(tensors: tuple[Tensor, Tensor]) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), BATCH)


def trainer_of(folder: Path, callbacks: list[Any], **options: Any) -> pl.Trainer:
    """Return a quiet Trainer on the CPU."""
    chosen = {"accelerator": "cpu", "devices": 1, "logger": False, "num_sanity_val_steps": 0}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(default_root_dir=folder, callbacks=callbacks, **{**chosen, **quiet, **options})


class Lightning(Framework):
    """In this process."""

    net_name = "net"

    def train(self, job: Job) -> Report:
        for usual in ("The dirpath has changed", "Detected an existing checkpoint"):
            warnings.filterwarnings("ignore", usual)
        averages = [WeightAverage(**job.options) for _ in range(job.installed)]
        saved = ModelCheckpoint(job.folder, "{epoch}", save_last=True, save_on_train_epoch_end=True)
        callbacks = [*averages, saved, OnExceptionCheckpoint(job.folder, "raised")]
        trainer = trainer_of(
            job.folder, callbacks, max_epochs=job.epochs, accumulate_grad_batches=job.accumulation, **self.options(job)
        )
        module = self.module(job)
        evaluated = [loader(job.eval_set(index)) for index in range(job.eval_sets)]
        resumed = None if job.resumes is None else job.resumes / "last.ckpt"
        try:
            trainer.fit(module, loader(job.train_set()), evaluated, ckpt_path=resumed)
        except EvaluationError:
            path, key = job.folder / "raised.ckpt", "current_model_state"
        else:
            path, key = job.folder / "last.ckpt", "state_dict"
        return self.report(module, averages, *self.read(path, key))

    def options(self, job: Job) -> dict[str, Any]:
        return {}

    def module(self, job: Job) -> Module:
        return Module(job.net())

    def read(self, path: Path, key: str) -> tuple[Any, Any]:
        """Return what was exported, and what was saved on an exception."""
        saved = torch.load(path, weights_only=True)
        if key == "state_dict":
            return of_net(saved[key]), None
        return None, of_net(saved[key])

    def report(self, module: Module, averages: list[WeightAverage], exported: Any, saved: Any) -> Report:
        model = whole_state(module.net)
        if not averages:
            return Report(model, exported=exported, saved=saved)
        (average,) = averages
        assert average.attachment is not None
        state = average.averaged.full_state_dict() if average.holds_shards else average.averaged.state_dict()
        return Report(model, state, average.attachment.state_dict(), exported, saved)

    def halve(self, folder: Path) -> None:
        path = self.metadata(folder / "last.ckpt")
        saved = torch.load(path, weights_only=True)
        del saved["swafast"]["attachment"]
        torch.save(saved, path)

    def metadata(self, path: Path) -> Path:
        """Return the file of a checkpoint that is not of tensors."""
        return path


class Ddp(Lightning):
    """On two ranks, each with the whole module."""

    world = 2

    def options(self, job: Job) -> dict[str, Any]:
        return {"devices": job.world, "strategy": "ddp", "plugins": [LightningEnvironment()]}


class Fsdp2(Ddp):
    """On two ranks, each with its shard: Lightning's ModelParallelStrategy."""

    def options(self, job: Job) -> dict[str, Any]:
        strategy = ModelParallelStrategy(data_parallel_size=job.world, tensor_parallel_size=1)
        return super().options(job) | {"strategy": strategy}

    def module(self, job: Job) -> Module:
        return Module(job.net(), is_sharded=True)

    def read(self, path: Path, key: str) -> tuple[Any, Any]:
        keys = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        ours = [key for key in keys if key.startswith("state_dict.swafast_average.") and key.endswith(".net.batches")]
        evaluated = next((key for key in ours if ".mean." in key), ours[0] if ours else "state_dict.net.batches")
        prefix = evaluated.removesuffix("batches") if key == "state_dict" else "state_dict.net."
        with torch.random.fork_rng(devices=[]):
            state = {prefix + name: tensor for name, tensor in Net().state_dict().items()}
        dcp.load(state, checkpoint_id=path, no_dist=True)
        found = of_net(state)
        return (found, None) if key == "state_dict" else (None, found)

    def metadata(self, path: Path) -> Path:
        return path / "meta.pt"


class WholeFiles(Fsdp2):
    """With shards in the training, and whole tensors in the checkpoints."""

    def options(self, job: Job) -> dict[str, Any]:
        strategy = ModelParallelStrategy(job.world, 1, save_distributed_checkpoint=False)
        return super().options(job) | {"strategy": strategy}

    read, metadata = Lightning.read, Lightning.metadata
