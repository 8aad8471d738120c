"""An EMA in Lightning: ``python examples/lightning_digits.py [FOLDER]``, after ``pip install '.[demo,lightning]'``.

Validation and the choice of the best checkpoint are of the EMA. The training stops half way and resumes.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from swafast import ExponentialAverage
from swafast.demo.task import Settings, digits_split
from swafast.demo.training import digits_cnn
from swafast.integrations.lightning import WeightAverage

SETTINGS = Settings()
EPOCHS = int(os.environ.get("EPOCHS", "16"))


class Digits(pl.LightningModule):
    """A small CNN for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = digits_cnn(SETTINGS.width)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        accuracy = (self.net(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.5 * SETTINGS.learning_rate, momentum=SETTINGS.momentum)


def fit(module: Digits, loaders: list[DataLoader], folder: Path, epochs: int, resume: Path | None) -> ModelCheckpoint:
    """Train up to so many epochs, from the beginning or from a checkpoint."""
    best = ModelCheckpoint(
        folder,
        "best",
        monitor="accuracy",
        mode="max",
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    average = WeightAverage(ExponentialAverage(0.98), start="0.25dur", duration=f"{EPOCHS}ep", use_buffers=True)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[best, average],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, *loaders, ckpt_path=resume)
    print(f"after epoch {epochs}: {int(average.averaged.n_averaged)} models in the EMA")
    return best


def main(folder: Path) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)  # a network this small gains nothing from more
    pl.seed_everything(0, verbose=False)
    split = digits_split(0, SETTINGS)
    train = DataLoader(TensorDataset(split.train_images, split.train_labels), SETTINGS.batch_size, shuffle=True)
    test = DataLoader(TensorDataset(split.test_images, split.test_labels), 500)

    fit(Digits(), [train, test], folder, EPOCHS // 2, None)
    best = fit(Digits(), [train, test], folder, EPOCHS, folder / "last.ckpt")  # a new process would do the same

    module = Digits.load_from_checkpoint(best.best_model_path)  # the EMA
    module.eval()
    trained = Digits()
    saved = torch.load(best.best_model_path, weights_only=True)
    trained.load_state_dict(saved["current_model_state"])
    trained.eval()
    for name, tested in (("the trained model", trained), ("its EMA", module)):
        with torch.no_grad():
            hits = tested.net(split.test_images).argmax(1) == split.test_labels
        print(f"{name} in the best checkpoint: {hits.double().mean():.1%} of the test images")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
