"""The native pass over module trees tells each change, and updates give what the checks in Python give."""

from __future__ import annotations

import gc
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from swafast import FusedAveragedModel, Rule
from swafast.backends import Unavailable
from swafast.op import tree_check
from swafast.op.tree_check import TreeCheck
from tests.support import same_bits
from tests.tree_changes import CHANGES, HARMLESS, Change, Net, stands

if isinstance(tree_check.load(), Unavailable):
    pytest.skip("needs the native library of the checks", allow_module_level=True)

SIDES = ("model", "average")


@contextmanager
def in_python() -> Iterator[None]:
    """Have all checks made in Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_check, "load", lambda: Unavailable("a test has left it out"))
        yield


class Training:
    """A model with an average after two updates."""

    def __init__(self, model: Any = None) -> None:
        torch.manual_seed(3)
        self.model = Net() if model is None else model
        self.average = FusedAveragedModel(self.model)
        self.log: list[object] = []
        for _ in range(2):
            self.step()

    def tree(self, side: str) -> Any:
        return self.model if side == "model" else self.average.module

    @property
    def check(self) -> TreeCheck | None:
        """The check of the plan that was used last."""
        return self.average._bindings.latest._checks._check  # type: ignore[attr-defined]

    @property
    def fits_in_python(self) -> bool:
        latest, average = self.average._bindings.latest, self.average
        with in_python(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(latest._checks, "_check", None)  # type: ignore[attr-defined]
            return latest.current(self.model, latest.config, (average.n_averaged,)) is not None

    def step(self) -> None:
        """Update, and note what comes of it."""
        for action in (getattr(self.model, "drift", None), lambda: self.average.update_parameters(self.model)):
            try:
                if action is not None:
                    action()
            except Exception as error:
                self.log.append((type(error), str(error)))
        self.log.append({name: seen(value) for name, value in self.average.state_dict().items()})

    def apply(self, change: Change, side: str) -> bool:
        """Return whether the change was possible."""
        try:
            change(self.tree(side))
        except Exception as error:
            self.log.append((type(error), str(error)))
            return False
        return True


def seen(tensor: Tensor) -> Tensor:
    value = tensor.detach()
    if value.is_nested or value.layout != torch.strided or value.device.type != "cpu":
        return torch.empty(0)
    if value.numel() and not value.untyped_storage().nbytes():
        return torch.empty(0)
    return value.clone()


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_bits(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def run(training: Training, actions: list[Callable[[], object]], native: bool) -> list[object]:
    """Run the actions with the native checks, or with those in Python."""
    if native:
        for action in actions:
            action()
    else:
        with in_python():
            training.average._bindings.forget()
            for action in actions:
                action()
    return training.log


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*HARMLESS, *CHANGES])
def test_a_change_is_told_and_gives_what_the_checks_in_python_give(
    name: str, side: str, capfd: pytest.CaptureFixture[str]
) -> None:
    logs = []
    for native in (True, False):
        training = Training()
        assert training.check is not None
        assert stands(training.check)
        is_changed = training.apply((HARMLESS | CHANGES)[name], side) and name in CHANGES
        assert is_changed == (name in CHANGES) or (name, side) == ("storage freed", "average")  # a bucket stays
        if native:
            assert stands(training.check) is not is_changed
            assert training.fits_in_python or name in CHANGES
        logs.append(run(training, [training.step] * 3, native))
    assert all(map(same, *logs))
    assert len(logs[0]) == len(logs[1])
    assert "Exception in aoti" not in capfd.readouterr().err or torch.__version__ < "2.7"


@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_of_changes_gives_what_the_checks_in_python_give(seed: int) -> None:
    logs, num_stood = [], 0
    for native in (True, False):
        chosen, training = random.Random(seed), Training()

        def act(chosen: random.Random = chosen, training: Training = training, native: bool = native) -> None:
            nonlocal num_stood
            name, change = chosen.choice(list(chosen.choice((HARMLESS, CHANGES)).items()))
            training.apply(change, chosen.choices(SIDES, (4, 1))[0])
            if native and training.check is not None and stands(training.check):
                num_stood += 1
                assert training.fits_in_python, name
            training.step()
            if any(isinstance(entry, tuple) for entry in training.log[-2:]):
                another = Training()
                training.model, training.average = another.model, another.average

        logs.append(run(training, [act] * 20, native))
    assert len(logs[0]) == len(logs[1])
    assert all(map(same, *logs))
    assert num_stood > 3


class Meddling(Rule):
    """Calls the user's code when its weight is asked for: between the checks and the kernel."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self.meddle = meddle

    def weight(self, num_averaged: int) -> float:
        self.meddle()
        return 0.5


@pytest.mark.parametrize("side", SIDES)
def test_what_a_kernel_uses_is_held_until_it_ends(side: str) -> None:
    model, held = Net(), []

    def replace() -> None:
        tree = model if side == "model" else average.module
        before = weakref.ref(tree.first.weight)
        tree.first.weight = torch.nn.Parameter(torch.zeros(4, 4))
        gc.collect()
        held.append(before() is not None)

    rule = Meddling(lambda: None)
    average = FusedAveragedModel(model, rule=rule)
    for _ in range(3):
        average.update_parameters(model)
    rule.meddle = replace
    average.update_parameters(model)
    assert held == [True]


def test_an_update_that_is_refused_tells_autograd_nothing() -> None:
    def refuse() -> None:
        raise ArithmeticError

    rule = Meddling(lambda: None)
    average = FusedAveragedModel(model := Net(), rule=rule)
    for _ in range(3):
        average.update_parameters(model)
    versions = [tensor._version for tensor in average.state_dict().values()]
    rule.meddle = refuse
    with pytest.raises(ArithmeticError):
        average.update_parameters(model)
    assert [tensor._version for tensor in average.state_dict().values()] == versions


def test_a_check_that_never_stands_is_made_seldom_and_one_that_stands_again_stays() -> None:
    checks, made = tree_check.Checks(), []
    tree = Net()

    def make() -> TreeCheck:
        made.append(TreeCheck([tree], [list(tree.parameters())]))
        tree.a.data = tree.a.data.clone()
        return made[-1]

    for _ in range(200):
        assert checks.find(1) is None
        checks.make(make)
    assert 8 <= len(made) <= 8 + 200 // 64
    checks.make(lambda: TreeCheck([tree], [list(tree.parameters())]))
    for _ in range(64):
        checks.make(lambda: TreeCheck([tree], [list(tree.parameters())]))
        if checks.find(1) is not None:
            break
    assert checks.find(1) is not None


def test_an_unpickled_model_is_taken_too() -> None:
    """Its dicts have keys that are equal to a module's own names, but other objects."""
    model = pickle.loads(pickle.dumps(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))))
    average = pickle.loads(pickle.dumps(FusedAveragedModel(model)))
    for _ in range(3):
        average.update_parameters(model)
    check = average._bindings.latest._checks._check
    assert check is not None
    assert stands(check)
    model[0].weight.data = model[0].weight.data.clone()
    assert not stands(check)


def test_a_tensor_that_moves_while_a_check_is_made_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, make = Net(), TreeCheck.__init__

    def move(self: TreeCheck, *args: Any, **options: Any) -> None:
        model.a.data = model.a.data.clone()
        make(self, *args, **options)

    average = FusedAveragedModel(model)
    monkeypatch.setattr(TreeCheck, "__init__", move)
    for _ in range(3):
        average.update_parameters(model)
    assert average._bindings.latest._checks._check is None
