"""Lightning: the validation loop after a fit, and saves and resumes that need no warning."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.nn.functional import cross_entropy

from swafast import EqualAverage
from swafast.integrations.lightning import WeightAverage
from swafast.integrations.lightning_trainer import leave_after_validation
from tests.frameworks.kit import Job, Net
from tests.frameworks.lightning_kit import Module, loader, trainer_of

pytestmark = pytest.mark.frameworks


class Watched(Module):
    """Has no metric, which a pickle of the trainer may lack, and a rate that a tuner may set."""

    lr = 0.1

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int, dataloader_idx: int = 0) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), self.lr)


def validation_loop(trainer: Any) -> Any:
    return trainer.fit_loop.epoch_loop.val_loop


def test_a_run_of_the_users_own_is_called_and_stays(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [WeightAverage(EqualAverage())], max_epochs=2)
    loop, calls = validation_loop(trainer), []
    run = loop.run

    def own() -> Any:
        calls.append(1)
        return run()

    loop.run = own
    sets = Job(tmp_path)
    trainer.fit(Watched(Net()), loader(sets.train_set()), loader(sets.eval_set(0)))
    assert len(calls) == 2
    assert loop.run is own


def test_a_trainer_is_copied_and_pickled_after_a_validation(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [WeightAverage(EqualAverage())])
    trainer.validate(Watched(Net()), loader(Job(tmp_path).eval_set(0)), verbose=False)
    assert "run" not in vars(validation_loop(trainer))
    pickle.loads(pickle.dumps(trainer))
    copy.deepcopy(trainer)


def left() -> None:
    calls.append(1)


calls: list[int] = []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))])
def test_a_copy_in_a_fit_runs_its_own_loop(tmp_path: Path, copied: Any) -> None:
    trainer = trainer_of(tmp_path, [])
    for _ in range(2):  # an error has left the first one
        leave_after_validation(trainer, left)
    loop = validation_loop(copied(trainer))
    assert loop is not validation_loop(trainer)
    assert loop.run.loop is loop
    assert (loop.run.own, loop.run.leave) == (None, left)


def test_a_tuner_after_a_fit_needs_no_warning(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [WeightAverage(EqualAverage())], max_epochs=1)
    module, data = Watched(Net()), loader(Job(tmp_path).train_set())
    trainer.fit(module, data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Tuner(trainer).lr_find(module, data, num_training=3)
        assert [str(each.message) for each in caught if "has the averages since" in str(each.message)] == []
    trainer = trainer_of(tmp_path, [WeightAverage(EqualAverage())], max_epochs=1)
    trainer.fit(module, data)
    with pytest.warns(UserWarning, match="the model has the averages since the training has ended"):
        trainer.save_checkpoint(tmp_path / "after.ckpt")


class Manual(Watched):
    """Steps torch's own optimizer, which Lightning does not count."""

    def __init__(self, net: Net) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        cross_entropy(self.net(batch[0]), batch[1]).backward()
        optimizer.step()


def test_steps_that_lightning_does_not_count_need_no_warning(tmp_path: Path) -> None:
    data = loader(Job(tmp_path).train_set())
    saves: Callback = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    trainer_of(tmp_path, [WeightAverage(EqualAverage()), saves], max_epochs=1).fit(Manual(Net()), data)
    average = WeightAverage(EqualAverage())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(tmp_path, [average], max_epochs=2).fit(Manual(Net()), data, ckpt_path=tmp_path / "last.ckpt")
    assert average.attachment is not None
    assert average.attachment.step == 8
    assert [str(each.message) for each in caught if "the framework counts" in str(each.message)] == []
