"""Writes checkpoints.zip: checkpoints as other packages' training writes them, for tests/test_torch_files.py to read.

    pip install lightning==2.6.6 timm==1.0.31 transformers==5.24.0
    python tests/oracles/checkpoints.py

For each, ``expected/<name>.safetensors`` has the weights that are to be averaged.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel


class Classifier(lightning.LightningModule):
    def __init__(self, width: int = 3, root: Path = Path("logs")) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))

    def training_step(self, batch: Any, index: int) -> Any:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def record_lightning(folder: Path) -> dict[str, torch.Tensor]:
    data = torch.utils.data.TensorDataset(torch.randn(8, 4))
    model = Classifier()
    callback = ModelCheckpoint(dirpath=folder, filename="lightning")
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    return model.state_dict()


def record_timm(folder: Path) -> dict[str, torch.Tensor]:
    """Save as timm's train script does, with its arguments and an average."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9, 2))
    model = model.to(memory_format=torch.channels_last)  # as with --channels-last
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 5, 5)).square().mean().backward()
    average = ModelEmaV3(model, decay=0.5)
    optimizer.step()
    average.update(model)
    arguments = argparse.Namespace(model="resnet", lr=0.1, data_dir=None)
    saver = CheckpointSaver(model, optimizer, arguments, average, checkpoint_dir=str(folder))
    saver.save_checkpoint(epoch=3, metric=71.5)
    for path in folder.glob("*.pth.tar"):
        if path.name != "last.pth.tar":
            path.unlink()
    return average.module.state_dict()


def record_transformers(folder: Path) -> dict[str, torch.Tensor]:
    config = GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder / "transformers", max_shard_size="4KB")
    return {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}  # tied


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "expected").mkdir()
        for name, record in {
            "lightning": record_lightning,
            "timm": record_timm,
            "transformers": record_transformers,
        }.items():
            expected = {key: value.detach().clone().contiguous() for key, value in record(folder).items()}
            save_file(expected, folder / "expected" / f"{name}.safetensors")
        with zipfile.ZipFile(Path(__file__).with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                packed.writestr(
                    zipfile.ZipInfo(path.relative_to(folder).as_posix()), path.read_bytes(), zipfile.ZIP_DEFLATED
                )


if __name__ == "__main__":
    main()
