"""The kit's trainings in the Trainer of torchtitan: plain on one rank, FSDP2 on several."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import cross_entropy

from tests.frameworks.kit import (
    BATCH,
    LEARNING_RATE,
    STEPS_PER_EPOCH,
    EvaluationError,
    Framework,
    Job,
    Net,
    Report,
    State,
    Watch,
    of_net,
    whole_state,
)
from tests.frameworks.shims import shim_torchtitan

shim_torchtitan()

from torchtitan.components.checkpointer import CheckpointManager  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import BaseLoss  # noqa: E402
from torchtitan.components.optimizer import (  # noqa: E402
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
)
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.components.validate import Validator  # noqa: E402
from torchtitan.config import ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.protocols import BaseModel  # noqa: E402
from torchtitan.protocols.model_spec import ModelSpec  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

from swafast.integrations.torchtitan import WeightAverage  # noqa: E402


def current() -> Job:
    assert Watch.current is not None
    return Watch.current.job


class TitanNet(Net):
    """The kit's network, as the Trainer makes a model."""

    first_values: State

    def verify_module_protocol(self) -> None:
        """Raise nothing: its layers are torch's."""

    def init_weights(self, buffer_device: object) -> None:
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            value = self.first_values[name]
            tensor.copy_(
                distribute_tensor(value, tensor.device_mesh, tensor.placements)
                if isinstance(tensor, DTensor)
                else value
            )


class ModelConfig(BaseModel):
    """Makes the network."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        def build(self, **_: Any) -> Net:
            with torch.device("cpu"):
                net = current().net()
            net.__class__ = TitanNet
            net.first_values = whole_state(net)
            return net

        def update_from_config(self, *, config: object, **_: Any) -> None:
            """Do nothing."""

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            return 1, 1


def parallelize(model: nn.Module, *, parallel_dims: Any, **_: Any) -> nn.Module:
    if parallel_dims.world_size > 1:
        fully_shard(model, mesh=parallel_dims.get_mesh("fsdp"))
    return model


class Loss(BaseLoss):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: object = None) -> None:
        self.fn = lambda logits, classes: cross_entropy(logits.float(), classes, reduction="sum")


class Tokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return []

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return 2


class Loader(BaseDataLoader):
    """The kit's batches of this rank: of the training, again and again, or of all evaluated sets, once."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        trains: bool = True
        infinite: bool = True

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, **_: Any) -> None:
        job = current()
        sets = [job.train_set()] if config.trains else [job.eval_set(index) for index in range(job.eval_sets)]
        pairs = [(inputs.split(BATCH), classes.split(BATCH)) for inputs, classes in sets]
        batches = [batch for inputs, classes in pairs for batch in zip(inputs, classes, strict=True)]
        self.batches = batches[dp_rank::dp_world_size]
        self.trains, self.drawn = config.trains, 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while self.trains or self.drawn < len(self.batches):
            inputs, classes = self.batches[self.drawn % len(self.batches)]
            self.drawn += 1
            yield {"input": inputs}, classes

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.drawn = state_dict["drawn"]


def config_of(job: Job, async_mode: str) -> Trainer.Config:
    checkpoint: dict[str, Any] = {}
    if job.resumes is not None:
        path = last_of(job.resumes)
        checkpoint = {"initial_load_path": str(path), "initial_load_model_only": False}
    adam = ParamGroupConfig(pattern=".*", optimizer_name="Adam", optimizer_kwargs={"lr": LEARNING_RATE})
    return Trainer.Config(
        model_spec=ModelSpec("net", "kit", ModelConfig.Config(), parallelize, None, None, None),
        dump_folder=str(job.folder),
        tokenizer=Tokenizer.Config(),
        dataloader=Loader.Config(),
        loss=Loss.Config(),
        optimizer=OptimizersContainer.Config(implementation="foreach", param_groups=[adam]),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, min_lr_factor=1.0),
        training=TrainingConfig(
            local_batch_size=BATCH,
            global_batch_size=BATCH * job.world * job.accumulation,
            seq_len=4,
            steps=job.steps,
            max_norm=1e9,
        ),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        activation_checkpoint=None,
        checkpoint=CheckpointManager.Config(
            enable=True,
            interval=STEPS_PER_EPOCH,
            last_save_model_only=False,
            async_mode=async_mode,
            keep_latest_k=0,
            **checkpoint,
        ),
        validator=Validator.Config(enable=True, freq=STEPS_PER_EPOCH, dataloader=Loader.Config(trains=False)),
    )


def last_of(folder: Path) -> Path:
    """Return the last checkpoint in the folder of a training."""
    return max(folder.glob("checkpoint/step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def model_in(folder: Path, net: nn.Module) -> State:
    """Return the model in a checkpoint. Collective."""
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    dcp.load(state, checkpoint_id=folder)
    return of_net(state)


def drop(folder: Path, start: str) -> None:
    """Take entries out of a checkpoint: those whose keys begin so."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for key in [key for key in metadata.state_dict_metadata if key.startswith(start)]:
        del metadata.state_dict_metadata[key]
    path.write_bytes(pickle.dumps(metadata))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Have a group of one rank in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with mock.patch.dict(os.environ, {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}):
            yield
    finally:
        gc.enable()  # the Trainer collects garbage when it sees fit
        dist.destroy_process_group()


class Titan(Framework):
    """The Trainer on one rank, whose params are whole."""

    async_mode = "disabled"

    def train(self, job: Job) -> Report:
        warnings.filterwarnings("ignore", "To get the last learning rate")  # its schedulers do, at a load
        with contextlib.nullcontext() if dist.is_initialized() else alone():
            return self.train_in_group(job)

    def train_in_group(self, job: Job) -> Report:
        trainer = Trainer(config_of(job, self.async_mode))
        net, average, saved = trainer.model_parts[0], None, None
        for _ in range(job.installed):
            average = WeightAverage(**job.options).install(trainer)
        try:
            trainer.train()
        except EvaluationError:
            trainer.checkpointer.save(trainer.step + 1, last_step=True)
            saved = model_in(last_of(job.folder), net)
        exported = None
        if average is not None and average.has_models and saved is None:
            trainer.checkpointer.last_save_model_only = True
            trainer.checkpointer.folder = str(job.folder / "exported")
            trainer.checkpointer.save(trainer.step, last_step=True)
            exported = model_in(job.folder / "exported" / f"step-{trainer.step}", net)
        trainer.close()
        if average is None:
            return Report(whole_state(net), saved=saved)
        states = average.averaged.full_state_dict if average.holds_shards else average.averaged.state_dict
        return Report(whole_state(net), states(), average.attachment.state_dict(), exported, saved)

    def halve(self, folder: Path) -> None:
        drop(last_of(folder), "swafast.attachment.")


class Fsdp(Titan):
    """Two ranks with shards."""

    world = 2


class FsdpAsync(Fsdp):
    async_mode = "async"


# A loop of the user's own, with torchtitan's parts


class Steps:
    """The state of such a loop."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.step = int(state_dict["step"])


class Nothing:
    """A state without content, in place of loaders and schedulers."""

    def state_dict(self) -> dict[str, Tensor]:
        return {"nothing": torch.tensor(0)}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Do nothing."""


class Loop:
    """A model of one layer and what trains it."""

    def __init__(self, folder: Path, *, patterns: dict[str, str] | None = None, adapter: Any = None, **config: Any):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Linear(4, 2)
        groups = [
            ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs={"lr": 0.1})
            for pattern, name in (patterns or {".*": "Adam"}).items()
        ]
        self.optimizers = OptimizersContainer.Config(implementation="foreach", param_groups=groups).build(
            model_parts=[self.model]
        )
        self.steps = Steps()
        settings = {"enable": True, "interval": 1, "last_save_model_only": False, "keep_latest_k": 0, **config}
        self.checkpointer = CheckpointManager.Config(**settings).build(
            dataloader=Nothing(),
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=Nothing(),
            states={"train_state": self.steps},
            sd_adapter=adapter,
            base_folder=str(folder),
        )

    def step(self, number: int = 1) -> None:
        for _ in range(number):
            self.steps.step += 1
            self.optimizers.zero_grad()
            self.model(torch.full((1, 4), float(self.steps.step))).square().sum().backward()
            self.checkpointer.maybe_wait_for_staging()
            self.optimizers.step()

    def save(self, *, last: bool = False) -> None:
        self.checkpointer.save(self.steps.step, last_step=last)

    def install(self, **options: Any) -> WeightAverage:
        return WeightAverage(**options).install_parts(self.model, self.optimizers, self.checkpointer)
