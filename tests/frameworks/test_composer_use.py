"""What is Composer's own: its evaluations, its checkpoints, its clock, and what does not go with averages."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import composer
import pytest
import torch
from composer.algorithms import EMA, SAM, SWA
from torch import Tensor

from swafast import EqualAverage, ExponentialAverage
from swafast.integrations.composer import WeightAverage
from tests.frameworks.composer_kit import FILE, USUAL, Model, loader, saved_in, trainer_of
from tests.frameworks.kit import AVERAGE, Job, State, Watch, differing, of_net, whole_state

pytestmark = [pytest.mark.frameworks, *(pytest.mark.filterwarnings(f"ignore:{re.escape(usual)}") for usual in USUAL)]


@pytest.fixture(autouse=True)
def watch(tmp_path: Path) -> Iterator[Watch]:
    watch = Watch(Job(tmp_path))
    with watch.watching():
        yield watch


class Training:
    """A training of the kit's network, with what is saved of it in `folder`."""

    def __init__(self, folder: Path, average: Any = None, *, model: Model | None = None, **options: Any) -> None:
        assert Watch.current is not None
        job = Watch.current.job
        self.model = Model(job.net()) if model is None else model
        self.average = WeightAverage(**AVERAGE) if average is None else average
        others = options.pop("algorithms", [])
        chosen: dict[str, Any] = {"max_duration": "2ep", "train_dataloader": loader(job.train_set())}
        chosen |= {"eval_dataloader": loader(job.eval_set(0)), "save_folder": str(folder), "save_overwrite": True}
        chosen |= {"save_latest_filename": FILE}
        self.trainer = trainer_of(self.model, [self.average, *others], **{**chosen, **options})

    def state(self) -> State:
        return whole_state(self.model.net)

    def averages(self) -> State:
        return of_net(self.average.averaged.averaged_state_dict()) | {"batches": self.state()["batches"]}


def models_in(path: Path) -> tuple[State, State]:
    """Return the trained model and the average in a checkpoint."""
    state, algorithms = saved_in(path)
    return of_net(state["model"]), of_net(algorithms["WeightAverage"]["averaged"])


# Checkpoints


def test_a_checkpoint_has_the_trained_params_and_the_average_apart(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.trainer.fit()
    own, averaged = models_in(tmp_path / FILE)
    assert differing(own, training.state()) == []
    assert differing(averaged, training.averages()) == []
    assert differing(own, averaged) != []


def test_our_part_loads_without_unpickling_anything_else(tmp_path: Path) -> None:
    Training(tmp_path, WeightAverage(**AVERAGE, format="compact")).trainer.fit()
    memory = io.BytesIO()
    torch.save(saved_in(tmp_path / FILE)[1]["WeightAverage"], memory)
    memory.seek(0)
    assert torch.load(memory, weights_only=True).keys() == {"repr", "averaged", "attachment"}


class Saves(composer.Callback):
    """A callback of the user's that saves inside evaluations."""

    trainer: Any = None

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.options = folder, options

    def eval_batch_end(self, state: Any, logger: Any) -> None:
        self.trainer.save_checkpoint(str(self.folder / f"{int(state.timestamp.batch)}.pt"), **self.options)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_from_inside_an_evaluation_has_the_trained_params(
    weights_only: bool, tmp_path: Path, watch: Watch
) -> None:
    saves = Saves(tmp_path, weights_only=weights_only)
    training = Training(tmp_path, callbacks=[saves])
    saves.trainer = training.trainer
    training.trainer.fit()
    assert len(watch.seen) == 4
    for seen in watch.seen:  # the batches after a save too
        assert differing(seen.state, watch.steps[seen.step]) != []
        state = torch.load(tmp_path / f"{seen.step}.pt", weights_only=False)["state"]
        assert differing(of_net(state["model"]), watch.steps[seen.step]) == []
    assert differing(watch.seen[0].state, watch.seen[1].state) == []
    if not weights_only:
        assert differing(models_in(tmp_path / "8.pt")[1], training.averages()) == []
        resumed = Training(tmp_path, load_path=str(tmp_path / "4.pt"))
        resumed.trainer.fit()
        assert differing(resumed.state(), training.state()) == []
        assert differing(resumed.averages(), training.averages()) == []


def test_a_training_that_resumes_itself_has_its_average(tmp_path: Path) -> None:
    options = {"autoresume": True, "run_name": "one"}
    whole = Training(tmp_path / "whole", max_duration="3ep")
    whole.trainer.fit()
    folder = tmp_path / "stopped"
    Training(folder, max_duration="2ep", **options).trainer.fit()
    again = Training(folder, max_duration="3ep", **options)
    again.trainer.fit()
    assert again.average.attachment.step == 12
    assert differing(again.averages(), whole.averages()) == []


def test_a_stop_inside_an_epoch_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole")
    whole.trainer.fit()
    Training(tmp_path, max_duration="6ba").trainer.fit()
    again = Training(tmp_path, load_path=str(tmp_path / FILE))
    again.trainer.fit()
    assert differing(again.state(), whole.state()) == []
    assert differing(again.averages(), whole.averages()) == []
    assert again.average.attachment.step == 8


def test_what_is_loaded_is_evaluated_and_saved_again_before_a_fit(tmp_path: Path, watch: Watch) -> None:
    first = Training(tmp_path)
    first.trainer.fit()
    loaded = Training(tmp_path, load_path=str(tmp_path / FILE), max_duration="3ep")
    watch.seen.clear()
    loaded.trainer.eval()
    assert len(watch.seen) == 2
    assert all(differing(seen.state, first.averages()) == [] for seen in watch.seen)
    assert differing(loaded.state(), first.state()) == []
    loaded.trainer.save_checkpoint(str(tmp_path / "again.pt"))
    for name in ("again.pt", FILE):
        fits = Training(tmp_path / name[:5], load_path=str(tmp_path / name), max_duration="3ep")
        fits.trainer.fit()
        assert fits.average.attachment.step == 12
        assert int(fits.average.averaged.n_averaged) == 12


def test_a_checkpoint_from_before_the_training_has_no_averages(tmp_path: Path) -> None:
    Training(tmp_path).trainer.save_checkpoint(str(tmp_path / "before.pt"))
    assert saved_in(tmp_path / "before.pt")[1]["WeightAverage"] == {"repr": "WeightAverage"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*no averages")
        training = Training(tmp_path, load_path=str(tmp_path / "before.pt"))
    training.trainer.fit()
    assert int(training.average.averaged.n_averaged) == 8


def test_weights_alone_begin_a_fresh_average(tmp_path: Path) -> None:
    first = Training(tmp_path)
    first.trainer.fit()
    path = str(tmp_path / FILE)
    # The same average and model again: what it has averaged is not of the weights that are loaded now.
    again = Training(tmp_path, first.average, model=first.model, load_path=path, load_weights_only=True)
    assert int(again.average.averaged.n_averaged) == 0
    again.trainer.fit(duration="1ep")
    assert again.average.attachment.step == int(again.average.averaged.n_averaged) == 4


def test_a_save_after_the_training_warns_of_the_lost_params(tmp_path: Path) -> None:
    training = Training(tmp_path, WeightAverage(ExponentialAverage(0.8)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*lacks the trained params")
        training.trainer.fit()
    with pytest.warns(UserWarning, match="this checkpoint lacks the trained params"):
        training.trainer.save_checkpoint(str(tmp_path / "after.pt"))


def test_states_of_others_are_refused(tmp_path: Path) -> None:
    Training(tmp_path).trainer.fit()
    saved = torch.load(tmp_path / FILE, weights_only=False)
    ours = dict(saved["state"]["algorithms"])["WeightAverage"]
    for part, value, message in (
        ("averaged", None, "got none of 'averaged'"),
        ("attachment", None, "got none of 'attachment'"),
        ("attachment", {"step": 4, "began": 9}, "'began' no later than its step 4"),
        ("averaged", {**ours["averaged"], "more": torch.zeros(1)}, "more"),
    ):
        changed = copy.deepcopy(saved)
        dict(changed["state"]["algorithms"])["WeightAverage"][part] = value
        torch.save(changed, tmp_path / "changed.pt")
        with pytest.raises((ValueError, RuntimeError, TypeError), match=message) as raised:
            Training(tmp_path, load_path=str(tmp_path / "changed.pt"))
        assert "changed.pt" in str(raised.value)


def test_a_checkpoint_of_composers_ema_tells_that_its_model_is_the_average(tmp_path: Path, watch: Watch) -> None:
    options = {"load_path": str(tmp_path / FILE), "max_duration": "3ep"}
    Training(tmp_path, EMA(half_life="1ba")).trainer.fit()
    trained = watch.steps[-1]
    with pytest.warns(UserWarning, match="its model is the average, and the training goes on from it"):
        training = Training(tmp_path / "resumed", **options)
    assert differing(training.state(), trained) != []
    assert "load_state_dict" not in vars(training.trainer.state)
    for others in ({"load_weights_only": True}, {"load_path": str(tmp_path / "own" / FILE)}):
        if "load_path" in others:
            Training(tmp_path / "own").trainer.fit()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*its model is the average")
            Training(tmp_path / "silent", **{**options, **others})


# Evaluations


class Noisy(Model):
    """A model that trains its dropout in an evaluation, as for Monte Carlo dropout."""

    def eval_forward(self, batch: Any, outputs: Tensor | None = None) -> Tensor:
        self.train()
        self.eval()
        return super().eval_forward(batch, outputs)


def test_a_model_may_change_its_mode_in_an_evaluation(tmp_path: Path, watch: Watch) -> None:
    training = Training(tmp_path, model=Noisy(watch.job.net()))
    training.trainer.fit()
    assert len(watch.seen) == 4
    assert all(differing(seen.state, watch.steps[seen.step]) != [] for seen in watch.seen)
    assert "train" not in vars(training.model)
    assert not {"state_dict", "get_model_state_dict"} & vars(training.trainer.state).keys()


def raise_it(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def by_callback(name: str) -> Callable[[Training], None]:
    def plant(training: Training) -> None:
        training.trainer.state.callbacks.append(type("Raises", (composer.Callback,), {name: raise_it})())

    return plant


def by_data(training: Training) -> None:
    training.trainer.state.evaluators[0].dataloader.dataloader.collate_fn = raise_it


def by_metrics(training: Training) -> None:
    training.trainer._compute_and_log_metrics = raise_it


PLACES = {
    **{name: by_callback(name) for name in ("eval_start", "eval_batch_start", "eval_batch_end", "eval_end")},
    **{"the data": by_data, "the metrics": by_metrics},
}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("plant", PLACES.values(), ids=PLACES)
def test_an_error_anywhere_in_an_evaluation_leaves_the_params(
    plant: Callable[[Training], None], is_training: bool, tmp_path: Path, watch: Watch
) -> None:
    training = Training(tmp_path)
    training.trainer.fit()
    plant(training)
    training.model.train(is_training)  # Composer puts this mode back
    with pytest.raises(KeyboardInterrupt):
        training.trainer.eval()
    assert differing(training.state(), watch.steps[-1]) == []
    assert training.model.training is is_training
    assert "train" not in vars(training.model)
    training.trainer.save_checkpoint(str(tmp_path / "raised.pt"))
    assert differing(models_in(tmp_path / "raised.pt")[0], watch.steps[-1]) == []


class Evaluates(composer.Callback):
    """A callback of the user's that evaluates inside of an evaluation, once."""

    trainer: Any = None
    raises = False

    def eval_batch_start(self, state: Any, logger: Any) -> None:
        trainer, self.trainer = self.trainer, None
        if trainer is not None:
            with contextlib.suppress(KeyboardInterrupt):
                trainer.eval(composer.Evaluator(label="inner", dataloader=loader(Watch.current.job.eval_set(1))))
        elif self.raises:
            self.raises = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("raises", [False, True])
def test_an_evaluation_inside_of_another_leaves_it_the_average(raises: bool, tmp_path: Path, watch: Watch) -> None:
    training = Training(tmp_path)
    training.trainer.fit()
    evaluates = Evaluates()
    evaluates.trainer, evaluates.raises = training.trainer, raises
    training.trainer.state.callbacks.append(evaluates)
    watch.seen.clear()
    training.trainer.eval()
    assert len(watch.seen) == 4  # after an error, Composer has the inner set among its own
    assert all(differing(seen.state, training.averages()) == [] for seen in watch.seen)
    assert differing(training.state(), watch.steps[-1]) == []
    assert "train" not in vars(training.model)


def test_predictions_are_the_averages(tmp_path: Path, watch: Watch) -> None:
    training = Training(tmp_path)
    training.trainer.fit()
    watch.seen.clear()
    outputs = training.trainer.predict(loader(watch.job.eval_set(0)))
    assert len(outputs) == len(watch.seen) == 2
    assert all(differing(seen.state, training.averages()) == [] for seen in watch.seen)
    assert differing(training.state(), watch.steps[-1]) == []


def test_a_model_may_have_a_train_of_its_own(tmp_path: Path, watch: Watch) -> None:
    training = Training(tmp_path)
    modes = []

    def own(mode: bool = True) -> Any:
        modes.append(mode)
        return type(training.model).train(training.model, mode)

    training.model.train = own
    training.trainer.fit()
    assert training.model.train is own
    assert modes == [True, False, True, False, True]
    assert all(differing(seen.state, watch.steps[seen.step]) != [] for seen in watch.seen)


# The clock


@pytest.mark.parametrize(
    ("whole", "options", "expected"),
    [
        ("3ep", {"start": "0.5dur"}, (6, 1, 12)),
        ("10ba", {"start": "0.5dur", "every": "2ba"}, (5, 2, 10)),
        ("3ep", {"start": "1ep", "every": "1ep"}, (4, 4, None)),
        ("3ep", {"start": "4ba", "end": "0.75dur"}, (4, 1, 9)),
        ("48sp", {"start": "1ep", "every": 2}, (4, 2, None)),
        ("48sp", {"start": "0.5dur", "duration": "3ep"}, (6, 1, 12)),
    ],
)
def test_spans_are_as_long_as_composer_knows(
    whole: str, options: dict[str, Any], expected: tuple[int, int, int | None], tmp_path: Path
) -> None:
    training = Training(tmp_path, WeightAverage(EqualAverage(), copy_at_end=False, **options), max_duration=whole)
    training.trainer.fit()
    schedule = training.average.attachment.schedule
    assert (schedule.start, schedule.every, schedule.end) == expected
    steps = int(training.trainer.state.timestamp.batch)
    assert training.average.attachment.step == steps
    assert int(training.average.averaged.n_averaged) == sum(map(schedule.is_due, range(1, steps + 1)))


def test_a_share_of_samples_asks_for_the_duration(tmp_path: Path) -> None:
    training = Training(tmp_path, WeightAverage(start="0.5dur"), max_duration="48sp")
    with pytest.raises(ValueError, match=r"duration must be given for start='0\.5dur', got None"):
        training.trainer.fit()
    with pytest.raises(ValueError, match="start must be an int of steps or a str such as '100ba'"):
        WeightAverage(start="100sp")


def test_a_second_fit_goes_on(tmp_path: Path, watch: Watch) -> None:
    training = Training(tmp_path, WeightAverage(EqualAverage(), start="0.5dur", copy_at_end=False))
    training.trainer.fit()
    assert int(training.average.averaged.n_averaged) == 5  # after the steps 4 to 8
    training.trainer.fit(duration="2ep")  # the second half of 16 steps
    assert training.average.attachment.schedule.start == 8
    assert int(training.average.averaged.n_averaged) == 5 + 8
    training.trainer.fit(duration="1ep", reset_time=True)  # another training, of 4 steps
    assert training.average.attachment.schedule.start == 16 + 2
    assert int(training.average.averaged.n_averaged) == 5 + 8 + 3
    assert training.average.attachment.step == 20


def test_a_fit_goes_on_after_an_error(tmp_path: Path, watch: Watch) -> None:
    training = Training(tmp_path)
    callback = type("Raises", (composer.Callback,), {"eval_batch_end": raise_it})()
    training.trainer.state.callbacks.append(callback)
    with pytest.raises(KeyboardInterrupt):
        training.trainer.fit()
    training.trainer.state.callbacks.remove(callback)
    training.trainer.fit(
        train_dataloader=loader(watch.job.train_set())
    )  # Composer has left the evaluated data in its state
    assert training.average.attachment.step == int(training.trainer.state.timestamp.batch) == 8
    assert int(training.average.averaged.n_averaged) == 8
    assert len(watch.steps) == 9


def test_another_trainer_of_the_same_model_goes_on(tmp_path: Path) -> None:
    first = Training(tmp_path)
    first.trainer.fit()
    second = Training(tmp_path, first.average, model=first.model)
    second.trainer.fit()
    assert second.average.attachment.step == int(second.average.averaged.n_averaged) == 16
    with pytest.raises(ValueError, match="WeightAverage has averages of another model: make a new one"):
        Training(tmp_path, first.average)


def test_sam_steps_once(tmp_path: Path, watch: Watch) -> None:
    training = Training(tmp_path, WeightAverage(EqualAverage(), copy_at_end=False), algorithms=[SAM()])
    training.trainer.fit()
    assert training.average.attachment.step == int(training.average.averaged.n_averaged) == 8


# What is refused


@pytest.mark.parametrize("other", [EMA(half_life="10ba"), SWA()])
def test_averages_of_composer_are_refused_beside_ours(other: Any, tmp_path: Path) -> None:
    name = type(other).__name__
    with pytest.raises(ValueError, match=f"algorithms must have WeightAverage alone .* got {name} too"):
        Training(tmp_path, algorithms=[other])
    training = Training(tmp_path)
    training.trainer.state.algorithms.append(other)
    with pytest.raises(ValueError, match=f"got {name} too"):
        training.trainer.fit()


# What Composer's own average does: the page compares it


def test_an_error_leaves_composers_own_average_in_the_model_and_its_checkpoint(tmp_path: Path, watch: Watch) -> None:
    average = EMA(half_life="1ba")
    training = Training(tmp_path, average)
    training.trainer.fit()
    assert average.ema_weights_active
    saved = of_net(saved_in(tmp_path / FILE)[0]["model"])
    assert differing(saved, training.state()) == []
    assert differing(saved, watch.steps[-1]) != []
    again = Training(tmp_path, EMA(half_life="1ba"))
    by_callback("eval_batch_end")(again)
    with pytest.raises(KeyboardInterrupt):
        again.trainer.fit()
    assert differing(again.state(), watch.steps[-1]) != []
