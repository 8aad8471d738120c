"""How the Trainer of Transformers trains for the kit: in one process, with DDP, and with FSDP2 and its two states."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
import transformers
from accelerate import DistributedType
from accelerate import state as accelerate_state
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
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
    Watch,
    of_net,
    whole_state,
)
from tests.frameworks.shims import shim_fsdp1

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
        """Return none: no weights are tied."""

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
            self.recover(trainer)
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

    def recover(self, trainer: Trainer) -> None:
        """Do what users do after a forward that raised, before they save."""

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
    config: ClassVar[dict[str, Any]] = {"version": 2, "auto_wrap_policy": "NO_WRAP"}

    def trainer(self, job: Job, model: PreTrainedModel) -> Trainer:
        fresh_state()
        return on_fsdp(job, model, self.kind, {**self.config, "state_dict_type": self.states})


class ShardedStates(FullStates):
    """The same, and checkpoints have shards."""

    states = "SHARDED_STATE_DICT"

    def saved_model(self, folder: Path) -> State:
        with torch.random.fork_rng(devices=[]):
            state = {"model": {f"net.{name}": tensor for name, tensor in Net().state_dict().items()}}
        dcp.load(state, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
        return of_net(state["model"])


class Fsdp1(FullStates):
    """FSDP1: the params of the whole network are one flat param, and all that the optimizer sees."""

    config: ClassVar[dict[str, Any]] = {
        **{"version": 1, "auto_wrap_policy": "NO_WRAP", "use_orig_params": False},
        **{"sync_module_states": False, "cpu_ram_efficient_loading": False},  # both want an accelerator
    }

    def trainer(self, job: Job, model: PreTrainedModel) -> Trainer:
        shim_fsdp1()
        trainer = super().trainer(job, model)
        wrap = trainer.accelerator.prepare

        def prepare(*given: Any, **options: Any) -> Any:
            prepared = wrap(*given, **options)
            wrapped = prepared[0] if isinstance(prepared, tuple) else prepared
            if isinstance(wrapped, FullyShardedDataParallel):
                model.net.fsdp1 = weakref.ref(wrapped)
            return prepared

        trainer.accelerator.prepare = prepare
        return trainer

    def recover(self, trainer: Trainer) -> None:
        with torch.no_grad():  # FSDP1 gathers no params for a state until a forward has come to its end
            trainer.model_wrapped(torch.zeros(BATCH, 4))
        assert Watch.current is not None
        Watch.current.seen.pop()

    def saved_model(self, folder: Path) -> State:
        return of_net(torch.load(folder / "pytorch_model_fsdp.bin", weights_only=True))


class Fsdp1Orig(Fsdp1):
    """The same, and the optimizer sees the original params."""

    config: ClassVar[dict[str, Any]] = {**Fsdp1.config, "use_orig_params": True}


def on_fsdp(job: Job, model: PreTrainedModel, kind: type[Trainer], config: dict[str, Any]) -> Trainer:
    """Return a trainer that takes FSDP on CPUs too: Accelerate has it only on accelerators, and takes gloo for DDP."""
    inner = accelerate_state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        inner(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate_state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            # FSDP1 wants the CPU as torch itself names it, and Accelerate calls it cpu:0.
            self.device = accelerate_state.PartialState._shared_state["device"] = torch.device("cpu")

    accelerate_state.AcceleratorState.__init__ = init
    try:
        return trainer_of(job, model, kind, fsdp="full_shard", fsdp_config=config)
    finally:
        accelerate_state.AcceleratorState.__init__ = inner
