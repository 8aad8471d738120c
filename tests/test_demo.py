"""The demo on a tiny run: files, ranges, the same numbers again, and the averages against float64."""

from __future__ import annotations

import functools
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from swafast import demo
from swafast.cli import app
from swafast.demo import measurements, report, task, training
from swafast.demo.task import Settings

# As the demo trains: another number of threads adds in another order.
pytestmark = pytest.mark.usefixtures("one_thread")

# 4 of these 8 epochs are averaged: of two, an equal mean and an EMA could be the same.
TINY = Settings(num_seeds=1, epochs=8, average_from=0.5, num_train=150, test_every=3, plane_points=3)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "WARM_UP", 1)
    monkeypatch.setattr(measurements, "ROUNDS", 3)


@pytest.fixture(scope="module")
def seed_0() -> training.SeedResult:
    return tiny_seed()


def tiny_seed(seed: int = 0, settings: Settings = TINY, **kwargs: Any) -> training.SeedResult:
    return training.train_seed(seed, task.digits_split(seed, settings), settings, **kwargs)


def test_run_writes_picture_numbers_and_tables(tmp_path: Path) -> None:
    picture, numbers, console = tmp_path / "a.png", tmp_path / "a.json", Console(file=io.StringIO(), width=100)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        demo.run(replace(TINY, num_seeds=2), picture, numbers, console=console)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in (*training.METHODS.values(), "Time per update", "Bytes held", str(picture)):
        assert word in text
    written = json.loads(numbers.read_text())
    for accuracies in written["accuracy"].values():
        assert len(accuracies) == 2
        assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert {row["method"] for row in written["costs"]} == {"swa", "ema"}
    assert all(row["seconds"] > 0 and row["nbytes"] > 0 for row in written["costs"])
    assert written["settings"]["epochs"] == TINY.epochs
    assert written["environment"]["threads"] == 1


def test_command_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "Settings", functools.partial(Settings, num_train=150, plane_points=3))
    picture, numbers = tmp_path / "b.png", tmp_path / "b.json"
    arguments = ["demo", "--seeds", "1", "--epochs", "4", "--out", str(picture), "--json", str(numbers)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert picture.exists()
    assert json.loads(numbers.read_text())["settings"]["epochs"] == 4


def test_the_same_seed_gives_the_same_numbers(seed_0: training.SeedResult) -> None:
    first, again, other = seed_0, tiny_seed(), tiny_seed(1)
    assert first.curves == again.curves
    assert first.curves != other.curves
    for method in training.METHODS:
        for a, b in zip(first.models[method].parameters(), again.models[method].parameters(), strict=True):
            assert torch.equal(a, b)


def recorded_seed() -> tuple[training.SeedResult, list[list[Tensor]], list[list[Tensor]]]:
    """Train one seed; with its models after each averaged epoch, and after each averaged step."""
    epochs: list[list[Tensor]] = []
    steps: list[list[Tensor]] = []

    def copy(model: nn.Module) -> list[Tensor]:
        return [param.detach().double().clone() for param in model.parameters()]

    def after_epoch(branch: str, epoch: int, model: nn.Module) -> None:
        if branch == "iterate":
            epochs.append(copy(model))

    original = training.FusedAveragedModel.update_parameters

    def recording(averaged: training.FusedAveragedModel, model: nn.Module) -> None:
        steps.append(copy(model))
        original(averaged, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.FusedAveragedModel, "update_parameters", recording)
        result = tiny_seed(on_epoch=after_epoch)
    # SWA is updated once after the steps of each epoch.
    per_epoch = TINY.steps_per_epoch + 1
    return result, epochs, [step for index, step in enumerate(steps) if (index + 1) % per_epoch]


def assert_near(model: nn.Module, expected: list[Tensor], num_updates: int) -> None:
    """Each element within the float32 roundings of that many updates."""
    for param, value in zip(model.parameters(), expected, strict=True):
        assert param.dtype == torch.float32
        torch.testing.assert_close(param.double(), value, rtol=num_updates * 2.0**-23, atol=num_updates * 2.0**-25)


def test_averages_match_float64() -> None:
    result, epochs, steps = recorded_seed()
    assert len(epochs) == TINY.epochs - TINY.start_epoch == 4
    assert len(steps) == 4 * TINY.steps_per_epoch
    mean = [torch.stack(params).mean(0) for params in zip(*epochs, strict=True)]
    assert_near(result.models["swa"], mean, len(epochs))
    moving = steps[0]
    for step in steps[1:]:
        moving = [TINY.ema_decay * a + (1 - TINY.ema_decay) * b for a, b in zip(moving, step, strict=True)]
    assert_near(result.models["ema"], moving, len(steps))
    # The test would be worth nothing if the averages were the last iterate.
    last = torch.cat([param.flatten() for param in epochs[-1]])
    assert (torch.cat([param.flatten() for param in mean]) - last).norm() > 1e-2


def test_both_runs_share_their_start_and_their_batches() -> None:
    seen: dict[tuple[str, int], Tensor] = {}

    def record(branch: str, epoch: int, model: nn.Module) -> None:
        seen[branch, epoch] = next(model.parameters()).detach().clone()

    tiny_seed(on_epoch=record)
    start = TINY.start_epoch
    assert [key for key in seen if key[0] == "trunk"] == [("trunk", epoch) for epoch in range(1, start + 1)]
    # SWALR sets its first rate after an epoch, so the first one past the fork is still common to both.
    assert torch.equal(seen["sgd", start + 1], seen["iterate", start + 1])
    assert not torch.equal(seen["sgd", TINY.epochs], seen["iterate", TINY.epochs])


def test_split_keeps_test_images_clean_and_apart() -> None:
    split, clean = task.digits_split(3, TINY), task.digits_split(3, replace(TINY, label_noise=0.0))
    wrong = (split.train_labels != clean.train_labels).sum().item()
    assert wrong == round(TINY.label_noise * TINY.num_train)
    assert torch.equal(split.test_labels, clean.test_labels)
    assert len(split.train_images) + len(split.test_images) == 1797


def test_shifted_moves_whole_images() -> None:
    image = torch.zeros(64, 1, 8, 8)
    image[:, 0, 4, 4] = 1
    moved = task.shifted(image, 1, torch.Generator().manual_seed(0))
    rows, columns = moved[:, 0].nonzero()[:, 1], moved[:, 0].nonzero()[:, 2]
    assert moved.sum() == 64
    assert rows.unique().tolist() == columns.unique().tolist() == [3, 4, 5]
    assert torch.equal(task.shifted(image, 0, torch.Generator()), image)


def test_plane_passes_through_the_solutions(seed_0: training.SeedResult) -> None:
    result = seed_0
    plane = measurements.loss_plane(result, 3)
    vectors = {
        method: torch.cat([param.detach().flatten() for param in result.models[method].parameters()])
        for method in plane.points
    }
    for a in plane.points:
        for b in plane.points:
            flat = math.dist(plane.points[a], plane.points[b])
            assert flat == pytest.approx((vectors[a] - vectors[b]).norm().item(), rel=1e-3, abs=1e-5)
    assert plane.x[0] < 0 < plane.x[-1]
    assert len(plane.loss) == len(plane.loss[0]) == 3


def test_held_bytes_are_those_of_params_buffers_and_counter() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    averaged = measurements.FusedAveragedModel(model)
    averaged.update_parameters(model)
    floats = 3 * 5 + 5 + 4 * 5
    assert measurements.held_nbytes(averaged) == 4 * floats + 2 * 8


def test_comparison_is_paired() -> None:
    scores = {"swa": (0.9, 0.8, 0.7), "sgd": (0.8, 0.8, 0.5)}
    seeds = []
    for index in range(3):
        seed = training.SeedResult(index, task.digits_split(0, TINY))
        for method, accuracies in scores.items():
            seed.curves[method].append(training.Score(1, accuracies[index], 0.0))
        seeds.append(seed)
    result = measurements.DemoResult(TINY, seeds, [], measurements.Plane([], [], [], {}, 0), 0.0)
    compared = report.compare(result, "swa", "sgd")
    assert compared.mean == pytest.approx(10)
    assert compared.standard_error == pytest.approx(10 / math.sqrt(3))
    assert (compared.better, compared.equal) == (2, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_seeds", 0), ("epochs", 3), ("label_noise", 1.0), ("batch_size", 0), ("batch_size", 501), ("test_every", 0)],
)
def test_bad_setting_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Settings(**{name: value})  # type: ignore[arg-type]


def test_too_many_training_images_are_refused() -> None:
    with pytest.raises(ValueError, match="num_train"):
        task.digits_split(0, replace(TINY, num_train=1797))
