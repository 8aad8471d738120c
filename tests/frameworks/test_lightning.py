"""Lightning: the kit, and what is Lightning's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from swafast import ExponentialAverage, convert
from swafast.integrations.lightning import WeightAverage
from tests.frameworks.kit import (
    Job,
    Kit,
    Net,
    Resumes,
    Shards,
    Shorter,
    Watch,
    check_taken_over,
    differing,
    others_average,
    step_of,
)
from tests.frameworks.lightning_kit import Ddp, Fsdp2, Lightning, Module, WholeFiles, loader, trainer_of
from tests.test_documents import ROOT, blocks_of

pytestmark = pytest.mark.frameworks


class TestLightning(Kit):
    framework = Lightning()


class TestDdp(Shorter):
    framework = Ddp()
    kinds = ("float32",)


class TestFsdp2(Resumes):
    framework = Fsdp2()

    test_half_a_state_is_refused = Kit.test_half_a_state_is_refused
    test_a_checkpoint_without_averages_begins_a_fresh_one = Kit.test_a_checkpoint_without_averages_begins_a_fresh_one
    test_a_resumed_average_that_starts_late_is_as_without_a_stop = (
        Kit.test_a_resumed_average_that_starts_late_is_as_without_a_stop
    )
    test_one_of_several_averages_is_evaluated = Kit.test_one_of_several_averages_is_evaluated


class TestWholeFiles(Shorter):
    framework = WholeFiles()
    kinds = ("compact",)


class Reader(Module):
    """A reader's module."""

    def __init__(self) -> None:
        super().__init__(Net())

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:  # type: ignore[override]
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    trainer = pl.Trainer
    monkeypatch.setattr(pl, "Trainer", lambda **options: trainer(**quiet, **options))
    job = Job(tmp_path)
    before, *after = blocks_of((ROOT / "docs/frameworks/lightning.md").read_text())
    for blocks in ([before], after):
        scope: dict[str, Any] = {"Net": Reader, "module": Reader()}
        scope |= {"train_loader": loader(job.train_set()), "val_loader": loader(job.eval_set(0))}
        steps = []
        for block in blocks:
            exec(block, scope)
            average = scope.get("average")
            steps.append(average.attachment.step if average is not None and average.attachment is not None else None)
            if "torch.save(average.evaluated" in block:
                exported = torch.load("average.pt", weights_only=True)
                assert differing(exported, scope["module"].state_dict()) == []
        (tmp_path / "checkpoints").rename(tmp_path / f"checkpoints of {len(blocks)}")
    # after; resumed from the end of the second epoch; exported; read; tested; of several averages; not fitted.
    assert steps == [8, 12, 12, 12, 12, 16, None]


class TakesOver(Fsdp2):
    """As the page on migration says."""

    def module(self, job: Job) -> Module:
        module = super().module(job)

        class Loads(pl.Callback):
            def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                (average,) = [each for each in trainer.callbacks if isinstance(each, WeightAverage)]
                convert.load(average.evaluated, others_average(job).state_dict())

        module.configure_callbacks = lambda: [Loads()]  # type: ignore[method-assign]
        return module


class TestShards(Shards):
    resumes = (Fsdp2, WholeFiles)
    takers = (TakesOver,)


@pytest.mark.parametrize("kind", [Fsdp2, WholeFiles])
def test_shards_take_over_a_checkpoint_of_lightnings_own_average(kind: type[Fsdp2], tmp_path: Path) -> None:
    job = Job(tmp_path / "first")
    saved = ModelCheckpoint(job.folder, save_last=True, save_on_train_epoch_end=True)
    with Watch(job).watching():
        module = Module(job.net())
        callbacks = [saved, EMAWeightAveraging(decay=0.8)]
        trainer_of(tmp_path, callbacks, max_epochs=2).fit(module, loader(job.train_set()), loader(job.eval_set(0)))
    state = torch.load(job.folder / "last.ckpt", weights_only=True)
    again = Job(tmp_path / "again", 16, resumes=job.folder, before=8, options={"rule": ExponentialAverage(0.8)})
    report = kind().run(again)
    assert step_of(report) == 16
    check_taken_over(report, state["state_dict"], 8)
