"""How the Trainer of Transformers trains for the kit: in one process, with DDP, and with FSDP2 and its two states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from accelerate import DistributedType
from accelerate import state as accelerate_state
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from swafast.integrations.transformers import WeightAverage
from tests.frameworks.kit import (
    BATCH,
    LEARNING_RATE,
    EvaluationError,
    Framework,
    Job,
    Net,
    Report,
    State,
    of_net,
    whole_state,
)

transformers.logging.set_verbosity_error()


class NetConfig(PreTrainedConfig):
    model_type = "net_of_the_kit"


class NetModel(PreTrainedModel):
    """The kit's Net as a model of Transformers."""

    config_class = NetConfig
    main_input_name = "inputs"

    def __init__(self, config: NetConfig, net: Net | None = None) -> None:
        super().__init__(config)
        self.net = Net() if net is None else net
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Keep those of the Net."""

    def get_input_embeddings(self) -> None:
        """Say that there are none, to those who ask for tied ones."""

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(inputs)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __init__(self, tensors: tuple[Tensor, Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.tensors[0][index], "labels": self.tensors[1][index]}


def fresh_state() -> None:
    """Have Accelerate forget the process's earlier trainers."""
    accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate_state.GradientState._reset_state()


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **options: Any) -> TrainingArguments:
    """Return quiet arguments for the CPU, with which no metric of a batch waits for another one."""
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    sizes = {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH, "dataloader_pin_memory": False}
    strategies = {"eval_strategy": "epoch", "save_strategy": "epoch", "lr_scheduler_type": "constant"}
    chosen = {"learning_rate": LEARNING_RATE, "max_grad_norm": 0.0, **quiet, **sizes, **strategies}
    return kind(str(folder), **{**chosen, **options})


def trainer_of(job: Job, model: PreTrainedModel, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    sets = {str(index): Rows(job.eval_set(index)) for index in range(job.eval_sets)}
    options = {"num_train_epochs": job.epochs, "gradient_accumulation_steps": job.accumulation, **options}
    return kind(
        model,
        arguments(job.folder, **options),
        train_dataset=Rows(job.train_set()),
        eval_dataset=sets if job.eval_sets > 1 else sets["0"],
        optimizer_cls_and_kwargs=(torch.optim.Adam, {"lr": LEARNING_RATE}),
    )


class Transformers(Framework):
    """In this process."""

    net_name = "net"
    kind = Trainer

    def trainer(self, job: Job, model: PreTrainedModel) -> Trainer:
        fresh_state()
        return trainer_of(job, model, self.kind)

    def train(self, job: Job) -> Report:
        net = job.net()
        trainer = self.trainer(job, NetModel(NetConfig(), net))
        average = None
        for _ in range(job.installed):
            average = WeightAverage(**job.options).install(trainer)
        saved = None
        try:
            trainer.train(resume_from_checkpoint=None if job.resumes is None else get_last_checkpoint(str(job.resumes)))
        except EvaluationError:
            trainer._save_checkpoint(trainer.model_wrapped, None)
            trainer.accelerator.wait_for_everyone()
            saved = self.saved_model(Path(get_last_checkpoint(str(job.folder))))
        if average is None:
            return Report(whole_state(net), saved=saved)
        exported = None
        if average.has_models:
            average.save_pretrained(job.folder / "exported")
            trainer.accelerator.wait_for_everyone()
            exported = of_net(load_file(job.folder / "exported" / "model.safetensors"))
        assert average.attachment is not None
        states = average.averaged.full_state_dict if average.holds_shards else average.averaged.state_dict
        return Report(whole_state(net), states(), average.attachment.state_dict(), exported, saved)

    def saved_model(self, folder: Path) -> State:
        """Return the model in a checkpoint."""
        return of_net(load_file(folder / "model.safetensors"))

    def halve(self, folder: Path) -> None:
        (Path(get_last_checkpoint(str(folder))) / "swafast" / "attachment.json").unlink()


class Ddp(Transformers):
    """On two ranks, each with the whole model."""

    world = 2


class FullStates(Transformers):
    """On two ranks, each with its shards: FSDP2. Checkpoints have whole tensors."""

    world = 2
    states = "FULL_STATE_DICT"

    def trainer(self, job: Job, model: PreTrainedModel) -> Trainer:
        fresh_state()
        config = {"version": 2, "auto_wrap_policy": "NO_WRAP", "state_dict_type": self.states}
        return on_fsdp(job, model, self.kind, config)


class ShardedStates(FullStates):
    """The same, and checkpoints have shards."""

    states = "SHARDED_STATE_DICT"

    def saved_model(self, folder: Path) -> State:
        with torch.random.fork_rng(devices=[]):
            state = {"model": {f"net.{name}": tensor for name, tensor in Net().state_dict().items()}}
        dcp.load(state, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
        return of_net(state["model"])


def on_fsdp(job: Job, model: PreTrainedModel, kind: type[Trainer], config: dict[str, Any]) -> Trainer:
    """Return a trainer that takes FSDP on CPUs too: Accelerate has it only on accelerators, and takes gloo for DDP."""
    inner = accelerate_state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        inner(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate_state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate_state.AcceleratorState.__init__ = init
    try:
        return trainer_of(job, model, kind, fsdp="full_shard", fsdp_config=config)
    finally:
        accelerate_state.AcceleratorState.__init__ = inner
