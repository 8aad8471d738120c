"""Spans of ``dur`` in a second training and in a longer resume, alike in Lightning and in Transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from swafast import EqualAverage
from swafast.integrations import lightning, transformers
from tests.frameworks.kit import Job, Net, Watch
from tests.frameworks.lightning_kit import Module, loader
from tests.frameworks.lightning_kit import trainer_of as lightning_trainer
from tests.frameworks.transformers_kit import NetConfig, NetModel, fresh_state
from tests.frameworks.transformers_kit import trainer_of as transformers_trainer

pytestmark = pytest.mark.frameworks

SECOND_HALF = {"rule": EqualAverage(), "start": "0.5dur", "copy_at_end": False}


def fit(folder: Path, net: Net, average: Any, steps: int, resumed: Path | None = None) -> Any:
    saves = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = lightning_trainer(folder, [average, saves], max_epochs=steps // 4)
    path = None if resumed is None else resumed / "epoch=0.ckpt"
    module = vars(average).setdefault("module_of_test", Module(net))
    trainer.fit(module, loader(Job(folder).train_set()), ckpt_path=path)
    return trainer


def train(folder: Path, net: Net, average: Any, steps: int, resumed: Path | None = None) -> Any:
    fresh_state()
    model = vars(average).setdefault("model_of_test", NetModel(NetConfig(), net))
    trainer = transformers_trainer(Job(folder, steps), model)
    average._trainer = None  # a second Trainer with other arguments
    average.install(trainer)
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed / "checkpoint-4"))
    return trainer


FRAMEWORKS = {"lightning": (lightning.WeightAverage, fit), "transformers": (transformers.WeightAverage, train)}
each_framework = pytest.mark.parametrize(("kind", "trains"), FRAMEWORKS.values(), ids=FRAMEWORKS)


def net_of(folder: Path) -> Net:
    job = Job(folder)
    with Watch(job).watching():
        return job.net()


def has(average: Any, start: int, end: int, count: int) -> None:
    schedule = average.attachment.schedule
    assert (schedule.start, schedule.every, schedule.end) == (start, 1, end)
    assert (average.attachment.step, int(average.averaged.n_averaged)) == (end, count)


@each_framework
def test_a_second_training_averages_its_own_second_half(
    kind: Callable[..., Any], trains: Callable[..., Any], tmp_path: Path
) -> None:
    average, net = kind(**SECOND_HALF), net_of(tmp_path)
    trains(tmp_path / "first", net, average, 4)
    has(average, 2, 4, 3)
    trains(tmp_path / "second", net, average, 12)
    has(average, 10, 16, 3 + 7)
    again = kind(**SECOND_HALF)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trains(tmp_path / "third", net_of(tmp_path), again, 12, tmp_path / "second")
    has(again, 10, 16, 3 + 7)  # a stop in the second training changes nothing
    assert [str(each.message) for each in caught if "the checkpoint has" in str(each.message)] == []


@each_framework
@pytest.mark.parametrize(("assigned", "start"), [(0, 2), (1, 3)])
def test_a_step_that_the_user_assigns_in_a_second_training_goes_into_its_checkpoints(
    kind: Any, trains: Callable[..., Any], assigned: int, start: int, tmp_path: Path
) -> None:
    class Assigning(kind):
        def follow(self, *given: Any, **options: Any) -> Any:
            before, after = self.attachment, super().follow(*given, **options)
            if after is not before is not None:
                after.step = assigned  # as a user does at the beginning
            return after

    average, net = Assigning(**SECOND_HALF), net_of(tmp_path)
    trains(tmp_path / "first", net, average, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trains(tmp_path / "second", net, average, 4)
        has(average, start, start + 2, 5 + 3)
        again = kind(**SECOND_HALF)
        trains(tmp_path / "third", net_of(tmp_path), again, 4, tmp_path / "second")
    has(again, start, start + 2, 5 + 3)
    # The resumed training has no more steps to make.
    assert [str(each.message) for each in caught if "averages after" in str(each.message)] == []


@each_framework
def test_a_longer_resume_averages_its_own_second_half(
    kind: Callable[..., Any], trains: Callable[..., Any], tmp_path: Path
) -> None:
    trains(tmp_path / "first", net_of(tmp_path), kind(**SECOND_HALF), 4)
    average = kind(**SECOND_HALF)
    with pytest.warns(
        UserWarning, match=r"start=2, every=1, end=4\), but this .* give Schedule\(start=8, every=1, end=16"
    ):
        trains(tmp_path / "second", net_of(tmp_path), average, 16, tmp_path / "first")
    has(average, 8, 16, 3 + 9)


def test_a_fit_that_goes_on_in_one_trainer_of_lightning_is_one_training(tmp_path: Path) -> None:
    average, net = lightning.WeightAverage(**SECOND_HALF), net_of(tmp_path)
    trainer = fit(tmp_path, net, average, 4)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(average.module_of_test, loader(Job(tmp_path).train_set()))
    has(average, 6, 12, 3 + 7)


def test_a_second_call_of_train_averages_its_own_second_half(tmp_path: Path) -> None:
    average = transformers.WeightAverage(**SECOND_HALF)
    trainer = train(tmp_path, net_of(tmp_path), average, 8)
    trainer.train()
    has(average, 12, 16, 5 + 5)
