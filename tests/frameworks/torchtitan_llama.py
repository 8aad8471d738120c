"""A Llama of torchtitan, as its registry makes it but with fewer layers, trained by its Trainer on a file of words."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from swafast import EqualAverage
from tests.frameworks.shims import shim_torchtitan

shim_torchtitan()

import torchtitan.distributed.fsdp  # noqa: E402
from torchtitan.components.checkpointer import CheckpointManager  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: E402
from torchtitan.components.validate import Validator  # noqa: E402
from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.distributed.activation_checkpoint import SelectiveAC  # noqa: E402
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3 import model_registry  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

from swafast.integrations.torchtitan import WeightAverage  # noqa: E402

torchtitan.distributed.fsdp.disable_fsdp_gradient_division = lambda model: [
    (
        each.set_gradient_divide_factor(1.0),
        each.set_force_sum_reduction_for_comms(True),
    )  # gloo scales nothing
    for each in model.modules()
    if isinstance(each, FSDPModule)
]

WORDS = [f"word{number}" for number in range(20)]
STEPS = 4


def write_assets(folder: Path) -> None:
    """Write a tokenizer of a few words, and a set of texts."""
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "<s>", "</s>", *WORDS])}
    tokens = {"tokenizer_class": "PreTrainedTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(tokens))
    made = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (64, 12), generator=made).tolist()
    lines = [json.dumps({"text": " ".join(WORDS[each] for each in row)}) for row in picks]
    (folder / "texts").mkdir()
    (folder / "texts/data.json").write_text("\n".join(lines))


def config_of(assets: Path, folder: Path, parallelism: dict[str, int], **checkpoint: Any) -> Trainer.Config:
    spec = model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:2]
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # the usual one has no backward on CPUs
    data = {"dataset": "c4_test", "dataset_path": str(assets / "texts")}
    return Trainer.Config(
        model_spec=spec,
        hf_assets_path=str(assets / "tokenizer"),
        dump_folder=str(folder),
        dataloader=HuggingFaceTextDataLoader.Config(**data),
        validator=Validator.Config(enable=True, freq=2, steps=1, dataloader=HuggingFaceTextDataLoader.Config(**data)),
        loss=CrossEntropyLoss.Config(),
        optimizer=default_adamw(lr=1e-2),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, total_steps=STEPS),
        training=TrainingConfig(local_batch_size=2, seq_len=16, steps=STEPS, mixed_precision_param="float32"),
        parallelism=ParallelismConfig(**parallelism),
        activation_checkpoint=SelectiveAC.Config(),
        checkpoint=CheckpointManager.Config(enable=True, interval=2, keep_latest_k=0, **checkpoint),
        debug=DebugConfig(seed=0),
    )


def whole(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the model's params under their own names. Collective."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): (
            param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()
        ).clone()
        for name, param in model.named_parameters()
    }


def train(assets: Path, folder: Path, parallelism: dict[str, int], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank. Return what the params were after each step and in each validation, and the average."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"HF_HOME": str(assets / f"cache{rank}"), "HF_DATASETS_OFFLINE": "1"}
    trainer = Trainer(config_of(assets, folder, parallelism, **checkpoint))
    average = WeightAverage(EqualAverage(), copy_at_end=False).install(trainer)
    (model,) = trainer.model_parts
    steps: dict[int, dict[str, Tensor]] = {}
    seen: dict[int, dict[str, Tensor]] = {}
    process = trainer.validator.post_dataloading_process

    def look(*args: Any) -> Any:
        seen[trainer.step] = whole(model)
        return process(*args)

    trainer.optimizers.register_step_post_hook(lambda *_: steps.__setitem__(trainer.step, whole(model)))
    trainer.validator.post_dataloading_process = look
    trainer.train()
    trainer.close()
    gc.enable()
    return {
        "steps": steps,
        "seen": seen,
        "averaged": average.averaged.full_state_dict(),
        "attached": average.steps(),
        "model": whole(model),
    }
