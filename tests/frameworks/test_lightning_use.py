"""Lightning: what its users do beside the kit, with its own Trainer."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel
from swafast.integrations.lightning import WeightAverage
from swafast.integrations.lightning_trainer import check_fit
from swafast.loop.runners import InThread
from tests.frameworks.kit import Job, Net, Report, differing, of_net, whole_state
from tests.frameworks.lightning_kit import Fsdp2, Module, loader, trainer_of
from tests.test_documents import ROOT, blocks_of

pytestmark = pytest.mark.frameworks

RULE = ExponentialAverage(0.8)
OTHERS = [(EMAWeightAveraging, {}), (StochasticWeightAveraging, {"swa_lrs": 0.1})]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fitted(
    folder: Path, callbacks: list[Any], module: Module | None = None, *, path: Path | None = None, **options: Any
) -> Module:
    """Return a module after a fit, by default of two epochs of four steps."""
    module = module or seeded()
    trainer = trainer_of(folder, callbacks, **{"max_epochs": 2, **options})
    job = Job(folder)
    trainer.fit(module, loader(job.train_set()), loader(job.eval_set(0)), ckpt_path=path)
    return module


def seeded(kind: type[Module] = Module) -> Module:
    torch.manual_seed(0)
    return kind(Net())


def trained(module: Module) -> dict[str, Tensor]:
    return whole_state(module.net)


class Recorder(Module):
    """Records its params after each batch, and its validation losses."""

    def __init__(self, net: Net) -> None:
        super().__init__(net)
        self.steps, self.losses = [whole_state(net)], []

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(whole_state(self.net))

    def on_validation_epoch_end(self) -> None:
        self.losses.append(float(self.trainer.callback_metrics["loss"]))


def averages_of(steps: list[dict[str, Tensor]], rule: Any = RULE) -> dict[str, Tensor]:
    """Return the average of the states that a training has recorded, without the first."""
    net = Net()
    averaged = FusedAveragedModel(net, rule=rule)
    for state in steps[1:]:
        net.load_state_dict(state)
        averaged.update_parameters(net)
    averaged.copy_to(net)
    return whole_state(net)


class TestCheckpoints:
    def test_the_best_checkpoint_is_the_average_that_was_validated(self, tmp_path: Path) -> None:
        module = seeded(Recorder)
        best = ModelCheckpoint(tmp_path, "{epoch}", monitor="loss", mode="min", save_top_k=4)
        fitted(tmp_path, [best, WeightAverage(RULE)], module, max_epochs=4)  # in any order
        assert len(best.best_k_models) == 4
        for path, score in best.best_k_models.items():
            saved = torch.load(path, weights_only=True)
            steps = module.steps[: saved["global_step"] + 1]
            net = Net()
            net.load_state_dict(of_net(saved["state_dict"]))
            assert differing(whole_state(net), averages_of(steps)) == []
            assert differing(of_net(saved["current_model_state"]), steps[-1]) == []
            losses = [cross_entropy(net(inputs), classes) for inputs, classes in loader(Job(tmp_path).eval_set(0))]
            assert float(score) == pytest.approx(sum(float(loss.detach()) for loss in losses) / 2, rel=1e-6)

    def test_save_last_at_the_end_of_the_training_keeps_the_trained_params(self, tmp_path: Path) -> None:
        module = seeded(Recorder)
        fitted(tmp_path, [WeightAverage(RULE), ModelCheckpoint(tmp_path, every_n_epochs=9, save_last=True)], module)
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert differing(of_net(saved["current_model_state"]), module.steps[-1]) == []
        assert differing(of_net(saved["state_dict"]), averages_of(module.steps)) == []
        assert differing(trained(module), averages_of(module.steps)) == []

    def test_a_checkpoint_loads_into_a_plain_module(self, tmp_path: Path) -> None:
        module = seeded(Recorder)
        fitted(tmp_path, [WeightAverage(RULE), ModelCheckpoint(tmp_path, save_last=True)], module)
        plain = Module.load_from_checkpoint(tmp_path / "last.ckpt", net=Net())
        assert differing(trained(plain), averages_of(module.steps)) == []

    def test_a_test_of_a_checkpoint_is_of_its_average(self, tmp_path: Path) -> None:
        average = WeightAverage(RULE, copy_at_end=False)
        module = seeded(Recorder)
        fitted(tmp_path, [average, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)], module)
        latest = {key: value.clone() for key, value in average.averaged.state_dict().items()}
        trainer = trainer_of(tmp_path, [average])
        evaluated = loader(Job(tmp_path).eval_set(0))
        trainer.test(module, evaluated, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
        assert differing(trained(module), averages_of(module.steps[:5])) == []
        assert differing(average.averaged.state_dict(), latest) == []
        trainer.save_checkpoint(tmp_path / "tested.ckpt")  # has what was tested, not the latest average
        saved = torch.load(tmp_path / "tested.ckpt", weights_only=True)["state_dict"]
        assert differing(of_net(saved), averages_of(module.steps[:5])) == []

    def test_what_is_tested_after_a_fit_is_the_module_as_it_is(self, tmp_path: Path) -> None:
        average = WeightAverage(RULE, copy_at_end=False)
        module = fitted(tmp_path, [average], seeded(Recorder))
        before = trained(module)
        states = []
        module.on_test_start = lambda: states.append(trained(module))
        trainer_of(tmp_path, [average]).test(module, loader(Job(tmp_path).eval_set(0)), verbose=False)
        assert differing(states[0], before) == []

    def test_a_save_inside_the_validation_has_both(self, tmp_path: Path) -> None:
        class Saves(Recorder):
            def on_validation_epoch_end(self) -> None:
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")
                self.seen = whole_state(self.net)

        module = seeded(Saves)
        fitted(tmp_path, [WeightAverage(RULE, copy_at_end=False)], module)
        saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)
        assert differing(of_net(saved["state_dict"]), averages_of(module.steps)) == []
        assert differing(of_net(saved["current_model_state"]), module.steps[-1]) == []
        assert differing(module.seen, averages_of(module.steps)) == []  # it is swapped in again
        assert differing(trained(module), module.steps[-1]) == []

    def test_a_checkpoint_of_lightnings_own_averaging_is_resumed(self, tmp_path: Path) -> None:
        theirs = EMAWeightAveraging(decay=0.8, use_buffers=False)
        saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        fitted(tmp_path, [theirs, saves], max_epochs=3)
        ours = WeightAverage(RULE, copy_at_end=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted(tmp_path, [ours], path=tmp_path / "epoch=0.ckpt", max_epochs=3)
        assert not [each for each in caught if "averages" in str(each.message)]
        end = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
        assert int(ours.averaged.n_averaged) == int(end["averaging_state"]["n_averaged"]) == 12
        assert ours.attachment is not None
        assert ours.attachment.step == 12
        for name, value in of_net(ours.averaged.state_dict()).items():
            if value.is_floating_point():
                expected = of_net(end["state_dict"])[name]
                assert float((value - expected).norm() / expected.norm()) <= 2e-7

    def test_lightnings_own_averaging_resumes_ours(self, tmp_path: Path) -> None:
        saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        fitted(tmp_path, [WeightAverage(RULE), saves], max_epochs=3)
        theirs = EMAWeightAveraging(decay=0.8, use_buffers=False)
        module = fitted(tmp_path, [theirs], path=tmp_path / "epoch=0.ckpt", max_epochs=3)
        end = of_net(torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"])
        for name, value in trained(module).items():
            if value.is_floating_point():
                assert float((value - end[name]).norm() / end[name].norm()) <= 2e-7

    def test_a_resume_without_the_callback_gets_lightnings_warning(self, tmp_path: Path) -> None:
        fitted(tmp_path, [WeightAverage(RULE), ModelCheckpoint(tmp_path, save_last=True)])
        with pytest.warns(UserWarning, match=r"add the following callbacks: .*WeightAverage"):
            fitted(tmp_path, [], path=tmp_path / "last.ckpt", max_epochs=3)

    def test_an_extra_state_is_the_modules_own(self, tmp_path: Path) -> None:
        class Counts(Recorder):
            def get_extra_state(self) -> dict[str, int]:
                return {"batches": len(self.steps) - 1}

            def set_extra_state(self, state: dict[str, int]) -> None:
                self.loaded = state["batches"]

        fitted(tmp_path, [WeightAverage(RULE), ModelCheckpoint(tmp_path, save_last=True)], seeded(Counts))
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert saved["state_dict"]["_extra_state"] == {"batches": 8}
        again = seeded(Counts)
        fitted(tmp_path, [WeightAverage(RULE)], again, path=tmp_path / "last.ckpt", max_epochs=3)
        assert again.loaded == 8

    @pytest.mark.parametrize("sharded", [False, True])
    def test_a_compiled_part_keeps_its_keys(self, tmp_path: Path, sharded: bool) -> None:
        def compiled() -> Recorder:
            module = seeded(Recorder)
            module.net.second = torch.compile(module.net.second, backend="eager")
            return module

        average = WeightAverage(RULE, copy_at_end=False, sharded=sharded)
        module = compiled()
        fitted(tmp_path, [average, ModelCheckpoint(tmp_path, save_last=True)], module)
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert saved["state_dict"].keys() == module.state_dict().keys()
        average.averaged.copy_to(module)
        assert differing(saved["state_dict"], module.state_dict()) == []
        again = WeightAverage(RULE, sharded=sharded)
        fitted(tmp_path, [again], compiled(), path=tmp_path / "last.ckpt", max_epochs=3)
        assert int(again.averaged.n_averaged) == 12

    def test_a_test_of_a_sharded_checkpoint_is_of_its_average(self, tmp_path: Path) -> None:
        first = Fsdp2().run(Job(tmp_path / "fit", steps=8, options={"rule": RULE, "copy_at_end": False}))
        tested = TestsAlone().run(Job(tmp_path / "test", resumes=tmp_path / "fit", options={"rule": RULE}))
        assert first.exported is not None
        assert differing(first.exported, first.model) != []
        assert differing(tested.model, first.exported) == []
        assert tested.seen
        for seen in tested.seen:
            assert differing(seen.state, first.exported) == []

    def test_a_sharded_checkpoint_that_contradicts_itself_is_refused(self, tmp_path: Path) -> None:
        Fsdp2().run(Job(tmp_path / "fit", steps=8, options={"rule": RULE}))
        path = tmp_path / "fit/last.ckpt/meta.pt"
        saved = torch.load(path, weights_only=True)
        ours = saved["swafast"]
        for wrong, match in (
            (3, "must have a dict as 'swafast', got int"),
            (None, "and none if not, got False and averages"),
            ({**ours, "has_models": False}, "and none if not, got False and averages"),
        ):
            torch.save({**saved, "swafast": wrong}, path)
            refusal = Fsdp2().refusal(Job(tmp_path / "again", resumes=tmp_path / "fit", options={"rule": RULE}))
            assert refusal.startswith("ValueError"), refusal
            assert match in refusal
            assert "last.ckpt must have" in refusal

    @pytest.mark.parametrize("part", ["current_model_state", "averaging_state"])
    def test_a_checkpoint_that_lacks_a_part_is_refused(self, tmp_path: Path, part: str) -> None:
        fitted(tmp_path, [WeightAverage(RULE), ModelCheckpoint(tmp_path, save_last=True)])
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        del saved[part]
        torch.save(saved, tmp_path / "part.ckpt")
        with pytest.raises(ValueError, match=f"got none of '{part}'"):
            fitted(tmp_path, [WeightAverage(RULE)], path=tmp_path / "part.ckpt", max_epochs=3)

    @pytest.mark.parametrize(
        ("change", "match"),
        {
            "no dict": ({"swafast": 3}, r"part\.ckpt must have a dict as 'swafast', got int"),
            "a word": ({"has_models": "yes"}, "must have a bool as 'has_models' in 'swafast', got 'yes'"),
            "no model": (
                {"has_models": False},
                "must have averages if its 'has_models' is true, and none if not",
            ),
            "a number": ({"attachment": 3}, "must have a dict or None as 'attachment' in 'swafast', got 3"),
            "no steps": ({"attachment": None}, "got none of 'attachment'"),
            "numbers": ({"evaluated": 3}, "must have a str or None as 'evaluated' in 'swafast', got 3"),
            "own": ({"current_model_state": [1]}, "must have a dict as 'current_model_state', got list"),
            "rest": ({"averaging_state": 3}, "must have a dict as 'averaging_state', got int"),
            "another": ({"evaluated": "slow"}, r"(?s)Missing key.*in .*part\.ckpt"),
            "began": ({"began": 9}, r"(?s)'began' no later than its step 8 in 'attachment', got 9.*part\.ckpt"),
            "a word as began": ({"began": "x"}, r"(?s)numbers of steps in 'attachment', got .*part\.ckpt"),
            "a negative step": ({"step": -1}, r"(?s)numbers of steps in 'attachment', got .*part\.ckpt"),
            "a schedule": ({"schedule": 3}, r"(?s)must be a state of an attachment, got .*part\.ckpt"),
        }.values(),
    )
    def test_a_part_of_another_type_is_refused(self, tmp_path: Path, change: dict[str, Any], match: str) -> None:
        fitted(tmp_path, [WeightAverage(RULE), ModelCheckpoint(tmp_path, save_last=True)])
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        for key, value in change.items():
            place = next(each for each in (saved, saved["swafast"], saved["swafast"]["attachment"]) if key in each)
            place[key] = value
        torch.save(saved, tmp_path / "part.ckpt")
        average = WeightAverage(RULE)
        with pytest.raises((ValueError, RuntimeError), match=match):
            fitted(tmp_path, [average], path=tmp_path / "part.ckpt", max_epochs=3)
        assert average.averaged is None or int(average.averaged.n_averaged) == 0
        assert average.attachment is None or average.attachment.step == 0

    @pytest.mark.parametrize("step", [7, 9])
    def test_steps_that_the_trainer_has_not_counted_are_told(self, tmp_path: Path, step: int) -> None:
        fitted(tmp_path, [WeightAverage(RULE), ModelCheckpoint(tmp_path, save_last=True)])
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        saved["swafast"]["attachment"]["step"] = step
        torch.save(saved, tmp_path / "other.ckpt")
        average = WeightAverage(RULE)
        with pytest.warns(UserWarning, match=f"other.ckpt has averages after {step} steps of this training, but .* 8"):
            fitted(tmp_path, [average], path=tmp_path / "other.ckpt", max_epochs=3)
        assert average.attachment is not None
        assert average.attachment.step == step + 4

    @pytest.mark.parametrize("copies", [True, False])
    def test_a_save_after_the_fit_is_told_if_the_module_has_the_average(self, tmp_path: Path, copies: bool) -> None:
        average, module = WeightAverage(RULE, copy_at_end=copies), seeded(Recorder)
        trainer = trainer_of(tmp_path, [average], max_epochs=2)
        job = Job(tmp_path)
        trainer.fit(module, loader(job.train_set()), loader(job.eval_set(0)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.save_checkpoint(tmp_path / "after.ckpt")
        assert ["copy_at_end=False" in str(each.message) for each in caught] == [True] * copies
        saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
        assert differing(of_net(saved["state_dict"]), averages_of(module.steps)) == []
        own = averages_of(module.steps) if copies else module.steps[-1]
        assert differing(of_net(saved["current_model_state"]), own) == []

    def test_saves_of_a_second_fit_are_not_told(self, tmp_path: Path) -> None:
        average = WeightAverage(RULE)
        module = fitted(tmp_path, [average])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*copy_at_end")
            fitted(tmp_path, [average, ModelCheckpoint(tmp_path, save_last=True)], module)


class TestFits:
    def test_a_second_fit_goes_on_counting(self, tmp_path: Path) -> None:
        average = WeightAverage(EqualAverage(), copy_at_end=False)
        module = fitted(tmp_path, [average], seeded(Recorder))
        fitted(tmp_path, [average], module)
        assert int(average.averaged.n_averaged) == 16
        assert average.attachment is not None
        assert average.attachment.step == 16
        assert len(module.steps) == 17
        average.averaged.copy_to(module)
        assert differing(trained(module), averages_of(module.steps, EqualAverage())) == []

    def test_a_fit_after_one_that_raised_is_averaged_too(self, tmp_path: Path) -> None:
        class Raises(Recorder):
            def training_step(self, batch: Any, index: int) -> Tensor:
                if len(self.steps) == 3:
                    self.steps.append(self.steps[-1])
                    raise OSError("the data are gone")
                return super().training_step(batch, index)

        average = WeightAverage(RULE)
        module = seeded(Raises)
        with pytest.raises(OSError, match="gone"):
            fitted(tmp_path, [average], module)
        fitted(tmp_path, [average], module)
        assert int(average.averaged.n_averaged) == 2 + 8

    @pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_end"])
    @pytest.mark.parametrize("is_first", [True, False])
    def test_hooks_that_raise_leave_the_trained_params_in_the_module(
        self, tmp_path: Path, hook: str, is_first: bool
    ) -> None:
        class Raises(Callback):
            def on_exception(self, *_: Any) -> None:
                raise OSError("the logger is gone")

        def fails(*_: Any) -> None:
            raise ValueError("the validation has failed")

        raises, average, module = Raises(), WeightAverage(RULE), seeded(Recorder)
        setattr(raises, hook, fails)
        callbacks = [raises, average] if is_first else [average, raises]
        with pytest.raises(OSError, match="logger is gone"):
            fitted(tmp_path, callbacks, module)
        assert int(average.averaged.n_averaged) == 4
        assert differing(trained(module), module.steps[-1]) == []
        assert differing(trained(module), averages_of(module.steps)) != []

    def test_a_swap_that_was_never_left_ends_where_the_next_run_begins(self, tmp_path: Path) -> None:
        average = WeightAverage(RULE, copy_at_end=False)
        module = fitted(tmp_path, [average], seeded(Recorder))
        average.swap_in(module)
        trainer_of(tmp_path, [average]).test(module, loader(Job(tmp_path).eval_set(0)), verbose=False)
        assert differing(trained(module), module.steps[-1]) == []

    def test_averages_of_another_module_are_refused(self, tmp_path: Path) -> None:
        average = WeightAverage(RULE)
        fitted(tmp_path, [average])
        count = int(average.averaged.n_averaged)
        with pytest.raises(ValueError, match="another module"):
            fitted(tmp_path, [average])
        assert int(average.averaged.n_averaged) == count

    def test_a_fit_from_a_checkpoint_without_models_begins_anew(self, tmp_path: Path) -> None:
        late = WeightAverage(RULE, start=7, copy_at_end=False)
        saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        module = fitted(tmp_path, [late, saves])
        assert int(late.averaged.n_averaged) == 2
        fitted(tmp_path, [late], module, path=tmp_path / "epoch=0.ckpt")
        assert int(late.averaged.n_averaged) == 2
        assert late.attachment is not None
        assert late.attachment.step == 8

    def test_each_of_several_averages_is_read_from_a_checkpoint_as_the_page_does(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        average = WeightAverage(rules={"fast": RULE, "slow": EqualAverage()}, evaluate="slow")
        keeper = ModelCheckpoint("checkpoints", save_last=True, save_on_train_epoch_end=True)
        fitted(tmp_path, [average, keeper])
        (block,) = (
            each for each in blocks_of((ROOT / "docs/frameworks/lightning.md").read_text()) if "fast = {" in each
        )
        scope: dict[str, Any] = {"torch": torch}
        exec(block, scope)
        expected = average.averaged["fast"].averaged_state_dict()
        assert scope["fast"].keys() == expected.keys()
        assert differing(scope["fast"], expected) == []

    def test_another_tools_average_is_taken_over_as_the_page_does(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        block = blocks_of((ROOT / "docs/frameworks/migration.md").read_text())[1]
        torch.manual_seed(0)
        module = Recorder(Net())
        other = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(RULE.decay))
        for _ in range(3):
            torch._foreach_add_([*map(torch.Tensor.detach, module.parameters())], 1.0)
            other.update_parameters(module)
        expected = {name: value.clone() for name, value in other.module.named_parameters()}
        average, job = WeightAverage(RULE), Job(tmp_path)
        scope: dict[str, Any] = {"average": average, "state": copy.deepcopy(other.state_dict()), "module": module}
        scope |= {"train_loader": loader(job.train_set()), "val_loader": loader(job.eval_set(0))}
        made, quiet = pl.Trainer, {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
        monkeypatch.setattr(pl, "Trainer", lambda **options: made(default_root_dir=tmp_path, **quiet, **options))
        exec(block, scope)
        assert int(average.averaged.n_averaged) == 3 + 8
        for step in module.steps[1:]:
            for name, value in expected.items():
                value.lerp_(step[name.removeprefix("net.")], 1 - RULE.decay)
        assert differing(expected, dict(average.averaged.module.named_parameters())) == []

    def test_spans_in_epochs_and_shares(self, tmp_path: Path) -> None:
        average = WeightAverage(RULE, start="0.5dur", every="1ep")
        fitted(tmp_path, [average], max_epochs=4, accumulate_grad_batches=3)  # 2 steps an epoch
        assert average.attachment is not None
        schedule = average.attachment.schedule
        assert (schedule.start, schedule.every, schedule.end) == (4, 2, 8)
        assert int(average.averaged.n_averaged) == 3

    def test_two_optimizers_by_hand_count_together(self, tmp_path: Path) -> None:
        class ByHand(Recorder):
            automatic_optimization = False

            def training_step(self, batch: Any, _: int) -> None:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
                    optimizer.step()

            def configure_optimizers(self) -> Any:
                parts = (self.net.first, self.net.second)
                return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]

        average = WeightAverage(RULE)
        module = seeded(ByHand)
        fitted(tmp_path, [average, ModelCheckpoint(tmp_path, save_last=True)], module)
        assert int(average.averaged.n_averaged) == 8
        assert differing(trained(module), averages_of(module.steps)) == []
        again = WeightAverage(RULE)
        fitted(tmp_path, [again], seeded(ByHand), path=tmp_path / "last.ckpt", max_epochs=3)
        assert int(again.averaged.n_averaged) == 12
        assert again.attachment is not None
        assert again.attachment.step == 12

    def test_steps_of_a_learning_rate_finder_are_not_averaged(self, tmp_path: Path) -> None:
        class Tunes(LearningRateFinder):
            def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
                if trainer.current_epoch == 1:
                    self.lr_find(trainer, pl_module)

        average = WeightAverage(EqualAverage(), copy_at_end=False)
        module = seeded(Recorder)
        module.lr = 0.01
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted(tmp_path, [average, Tunes(num_training_steps=3, update_attr=False)], module)
        assert not [each for each in caught if "averages" in str(each.message)]
        assert int(average.averaged.n_averaged) == 8

    def test_a_learning_rate_finder_keeps_what_a_checkpoint_has(self, tmp_path: Path) -> None:
        fitted(tmp_path, [WeightAverage(RULE), ModelCheckpoint(tmp_path, save_last=True)])
        average = WeightAverage(RULE)
        module = seeded()
        module.lr = 0.01
        finder = LearningRateFinder(num_training_steps=3, update_attr=False)
        fitted(tmp_path, [finder, average], module, path=tmp_path / "last.ckpt", max_epochs=3)
        # Lightning itself forgets the loops of the checkpoint then, and trains three epochs from its params.
        assert int(average.averaged.n_averaged) == 8 + 12
        assert average.attachment is not None
        assert average.attachment.step == 20

    def test_pytorch_lightning_runs_the_same_callback(self, tmp_path: Path) -> None:
        class Other(pytorch_lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.net = Net()

            training_step, configure_optimizers = Module.training_step, Module.configure_optimizers

        other, average = Other(), WeightAverage(RULE)
        trainer = pytorch_lightning.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[average], max_epochs=2
        )
        trainer.fit(other, loader(Job(tmp_path).train_set()))
        assert int(average.averaged.n_averaged) == 8
        module = fitted(tmp_path, [WeightAverage(RULE)])
        assert differing(whole_state(other.net), trained(module)) == []


class TestOverlap:
    """Closures have the forward inside of the step."""

    def events(self, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Module]) -> tuple[str, WeightAverage]:
        events: list[str] = []
        waits = InThread.before_step
        monkeypatch.setattr(InThread, "before_step", lambda runner: (events.append("w"), waits(runner))[1])
        module = seeded(kind)
        module.net.register_forward_pre_hook(lambda net, _: events.append("f" if net.training else "v"))
        average = WeightAverage(RULE, overlap=True, copy_at_end=False)
        fitted(folder, [average], module)
        return "".join(events), average

    def test_an_update_runs_beside_the_next_forward(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        events, average = self.events(tmp_path, monkeypatch, Module)
        assert events == "fw" * 4 + "vv" + "fw" * 4 + "vv"
        plain = WeightAverage(RULE, copy_at_end=False)
        fitted(tmp_path, [plain])
        assert differing(average.averaged.state_dict(), plain.averaged.state_dict()) == []

    def test_a_step_of_the_users_own_waits_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Own(Module):
            def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
                optimizer.optimizer.step(closure)

        events, _ = self.events(tmp_path, monkeypatch, Own)
        assert re.fullmatch(r"(wf){4}v*(wf){4}v*", events)


class TestRefusals:
    def refused(self, folder: Path, match: str, *callbacks: Any, kind: Any = None, **options: Any) -> None:
        average = WeightAverage(RULE)
        module = seeded(kind or Module)
        before = trained(module)
        error = NotImplementedError if "precision must" in match else ValueError
        with pytest.raises(error, match=match):
            fitted(folder, [average, *callbacks], module, **options)
        assert average.averaged is None
        assert differing(trained(module), before) == []

    def test_no_optimizer(self, tmp_path: Path) -> None:
        class Without(Module):
            def configure_optimizers(self) -> None: ...

        self.refused(tmp_path, "configure_optimizers must return an optimizer", kind=Without)

    @pytest.mark.parametrize(
        ("other", "given"), [(EMAWeightAveraging, {}), (StochasticWeightAveraging, {"swa_lrs": 0.1})]
    )
    def test_another_callback_that_averages(self, tmp_path: Path, other: Any, given: dict[str, Any]) -> None:
        self.refused(tmp_path, f"got {other.__name__}", other(**given))

    def test_a_precision_that_keeps_copies(self, tmp_path: Path) -> None:
        class Copies(Precision): ...

        self.refused(tmp_path, "precision must be .* got Copies", plugins=[Copies()])

    def test_a_strategy_that_was_not_tried(self, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path, [])
        check_fit(trainer_with(trainer, seeded()), seeded())
        trainer._accelerator_connector.strategy = FSDPStrategy()
        with pytest.raises(NotImplementedError, match="got FSDPStrategy: to shard the module, use ModelParallel"):
            check_fit(trainer, seeded())

    def test_a_module_that_is_sharded_itself(self, tmp_path: Path) -> None:
        refusal = ShardsItself().refusal(Job(tmp_path, options={"rule": RULE}))
        assert refusal.startswith("ValueError: the LightningModule must not be sharded itself, got fully_shard(self)")


def trainer_with(trainer: Any, module: Module) -> Any:
    trainer.strategy.connect(module)
    trainer.strategy.optimizers = [module.configure_optimizers()]
    return trainer


class TestsAlone(Fsdp2):
    """Tests a checkpoint, and trains nothing."""

    __test__ = False

    def train(self, job: Job) -> Report:
        assert job.resumes is not None
        module = self.module(job)
        trainer = trainer_of(job.folder, [WeightAverage(**job.options)], **self.options(job))
        trainer.test(module, loader(job.eval_set(0)), ckpt_path=job.resumes / "last.ckpt", verbose=False)
        return Report(whole_state(module.net))


class ShardsItself(Fsdp2):
    def module(self, job: Job) -> Module:
        class Itself(Module):
            def configure_model(self) -> None:
                fully_shard(self, mesh=self.device_mesh["data_parallel"])

        return Itself(job.net())
