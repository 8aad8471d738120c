"""An EMA in the Trainer of Transformers: ``python examples/transformers_tiny.py``.

A small language model learns the characters of this project's texts. Its EMA is evaluated, exported and resumed. Then
a LoRA (PEFT) is trained on another text, and the EMA of its adapters is exported. Nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, logging

from swafast import ExponentialAverage
from swafast.integrations.transformers import WeightAverage

try:
    EPOCHS = int(os.environ.get("EPOCHS", "10"))
except ValueError as error:
    sys.exit(f"EPOCHS does not fit: {error}")
ROOT = Path(__file__).parents[1]
LENGTH = 48  # characters in a sample
RULE = ExponentialAverage(0.8)


class Characters(Dataset[dict[str, Tensor]]):
    """The characters of a text, cut into samples."""

    def __init__(self, text: str, samples: range) -> None:
        bytes_ = text.encode("ascii", "replace")
        self.samples = [torch.tensor([*bytes_[LENGTH * index : LENGTH * (index + 1)]]) for index in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.samples[index], "labels": self.samples[index]}


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=LENGTH, **sizes))


def trainer_on(text: str, model: Any, folder: Path, epochs: int) -> Trainer:
    args = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    samples, tests = Characters(text, range(64)), Characters(text, range(64, 80))
    trainer = Trainer(model, args, train_dataset=samples, eval_dataset=tests)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(text: str, model: Any, folder: Path, epochs: int, *, resume: bool = False) -> tuple[Trainer, WeightAverage]:
    """Train with an EMA, and leave the trained params in the model."""
    trainer = trainer_on(text, model, folder, epochs)
    average = WeightAverage(RULE, copy_at_end=False).install(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, average


def loss_of_model(text: str, model: Any, folder: Path) -> float:
    return float(trainer_on(text, model, folder, 1).evaluate()["eval_loss"])


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # a network this small gains nothing from more
    text = (ROOT / "CONTRIBUTING.md").read_text()
    trainer, average = train(text, language_model(), folder / "whole", EPOCHS)
    of_average = trainer.evaluate()["eval_loss"]
    print(f"loss of the EMA {of_average:.4f}, of the trained model {loss_of_model(text, trainer.model, folder):.4f}")

    average.save_pretrained(folder / "exported")
    loaded = LlamaForCausalLM.from_pretrained(folder / "exported")
    print(f"loss of the exported EMA {loss_of_model(text, loaded, folder):.4f}")

    train(text, language_model(), folder / "stopped", EPOCHS // 2)
    _, resumed = train(text, language_model(), folder / "stopped", EPOCHS, resume=True)
    states = average.averaged.state_dict(), resumed.averaged.state_dict()
    is_equal = all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    print(f"stopped after {EPOCHS // 2} epochs and resumed: the EMA is {'equal' if is_equal else 'different'}")

    adapted = get_peft_model(loaded, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    _, average = train((ROOT / "README.md").read_text(), adapted, folder / "adapted", EPOCHS)
    average.save_pretrained(folder / "adapters")
    size = (folder / "adapters" / "adapter_model.safetensors").stat().st_size
    print(f"the EMA of the LoRA's adapters: {size} bytes")


if __name__ == "__main__":
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
