"""How Composer trains the kit's network: in this process, or with DDP on several ranks."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import composer
import torch
import torch.distributed.checkpoint as dcp
from composer.core import Evaluator
from composer.utils import FSDP2Config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from swafast.integrations.composer import WeightAverage
from tests.frameworks.kit import (
    BATCH,
    EvaluationError,
    Framework,
    Job,
    Report,
    State,
    of_net,
    optimizer_of,
    whole_state,
)

logging.getLogger("composer").setLevel(logging.ERROR)

FILE = "latest.pt"
#: What Composer itself warns of, with and without averages.
USUAL = ("WeightAverage is not in the state_dict", "`torch.cuda.amp.GradScaler", "torch.cuda.amp.GradScaler")


class Model(composer.ComposerModel):
    """A ComposerModel as users write it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits: Tensor = self.net(batch[0])
        return logits

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor], *_: Any, **__: Any) -> Tensor:
        return cross_entropy(outputs, batch[1])


def loader(tensors: tuple[Tensor, Tensor], size: int = BATCH, *, world: int = 1) -> DataLoader:
    data = TensorDataset(*tensors)
    sampler = DistributedSampler(data, shuffle=False) if world > 1 else None
    return DataLoader(data, size, sampler=sampler)


def trainer_of(model: Model, algorithms: list[Any], **options: Any) -> composer.Trainer:
    """Return a quiet Trainer on the CPU."""
    quiet = {"progress_bar": False, "log_to_console": False, "auto_log_hparams": False, "device": "cpu"}
    return composer.Trainer(
        model=model, optimizers=optimizer_of(model.parameters()), algorithms=algorithms, **{**quiet, **options}
    )


def saved_in(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return the state in a checkpoint, and those of its algorithms."""
    state = torch.load(path, weights_only=False)["state"]
    return state, dict(state["algorithms"])


class Composer(Framework):
    """In this process."""

    net_name = "net"

    def train(self, job: Job) -> Report:
        for usual in USUAL:
            warnings.filterwarnings("ignore", usual)
        averages = [WeightAverage(**job.options) for _ in range(job.installed)]
        model = Model(job.net())
        evaluated = [
            Evaluator(label=f"set {index}", dataloader=loader(job.eval_set(index), world=job.world))
            for index in range(job.eval_sets)
        ]
        trainer = trainer_of(
            model,
            averages,
            train_dataloader=loader(job.train_set(), BATCH * job.accumulation, world=job.world),
            eval_dataloader=evaluated,
            device_train_microbatch_size=BATCH,
            max_duration=f"{job.epochs}ep",
            save_folder=str(job.folder),
            save_overwrite=True,
            save_latest_filename=FILE,
            load_path=None if job.resumes is None else str(self.latest(job.resumes)),
            **self.options(job),
        )
        raised = None
        try:
            trainer.fit()
        except EvaluationError:
            raised = job.folder / "raised" / FILE
            trainer.save_checkpoint(str(raised))
        saved = None if raised is None else of_net(self.saved_model(raised, model))
        return self.report(model, averages, saved)

    def options(self, job: Job) -> dict[str, Any]:
        return {}

    def latest(self, folder: Path) -> Path:
        return folder / FILE

    def saved_model(self, path: Path, model: Model) -> State:
        """Return the model in a checkpoint."""
        state: State = saved_in(path)[0]["model"]
        return state

    def report(self, model: Model, averages: list[WeightAverage], saved: Any) -> Report:
        trained = whole_state(model.net)
        if not averages:
            return Report(trained, saved=saved)
        (average,) = averages
        assert average.attachment is not None
        state = average.averaged.full_state_dict() if average.holds_shards else average.averaged.state_dict()
        exported = of_net(average.evaluated.averaged_state_dict()) if average.has_models else None
        return Report(trained, state, average.attachment.state_dict(), exported, saved)

    def halve(self, folder: Path) -> None:
        saved = torch.load(folder / FILE, weights_only=False)
        del dict(saved["state"]["algorithms"])["WeightAverage"]["attachment"]
        torch.save(saved, folder / FILE)


class Ddp(Composer):
    """On two ranks, each with the whole model."""

    world = 2

    def train(self, job: Job) -> Report:
        os.environ["NODE_RANK"] = "0"
        return super().train(job)


class Fsdp2(Ddp):
    """On two ranks, each with its shard."""

    kind = "full"

    def options(self, job: Job) -> dict[str, Any]:
        return {"parallelism_config": {"fsdp": FSDP2Config(state_dict_type=self.kind)}}


class Sharded(Fsdp2):
    """With shards in the checkpoints too."""

    kind = "sharded"

    def latest(self, folder: Path) -> Path:
        return max(folder.glob("ep*"), key=lambda path: int(path.name.rpartition("ba")[2]))

    def saved_model(self, path: Path, model: Model) -> State:
        state = {"state": {"model": whole_state(model)}}
        dcp.load(state, checkpoint_id=self.latest(path.parent))
        return state["state"]["model"]
