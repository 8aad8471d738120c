"""Bugs that the kit must find, planted in the contract of the plain loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from swafast.integrations.weight_average import Contract
from tests.frameworks import plain
from tests.frameworks.kit import Kit, Watch
from tests.frameworks.plain import Plain

pytestmark = pytest.mark.frameworks

REAL_SWAP_IN = Contract.swap_in
REAL_SWAP_OUT = Contract.swap_out


def _load_averages_alone(self: Contract, state: Any, *, is_whole: bool = False) -> None:
    self.averaged.load_state_dict(state["averaged"])
    assert self.attachment is not None
    self.attachment.step = 0


def _load_attachment_alone(self: Contract, state: Any, *, is_whole: bool = False) -> None:
    assert self.attachment is not None
    self.attachment.load_state_dict(state["attachment"])


def _swap_once(self: Contract, model: Any) -> None:
    """Swap in at the first evaluation, and in none after it."""
    if not vars(self).setdefault("swapped_once", False):
        REAL_SWAP_IN(self, model)
        self.swapped_once = True  # type: ignore[attr-defined]


def _leave_averages(self: Contract) -> None:
    was_in = self._swap is not None
    REAL_SWAP_OUT(self)
    assert Watch.current is not None
    assert Watch.current.net is not None
    if was_in:
        self.evaluated.copy_to(Watch.current.net)


def _finish_without_copy(self: Contract, model: Any) -> None:
    self.swap_out()


def _finish_always(self: Contract, model: Any) -> None:
    for average, param in zip(self.averaged.module.parameters(), model.parameters(), strict=True):
        param.data.copy_(average + 1)


def _silent(self: Contract, state: Any, where: object, **options: Any) -> None:
    if state is not None:
        self.load(state)


#: The name of a method of the contract, what takes its place, and the tests that must fail.
PLANTED: dict[str, tuple[str, Any, list[str]]] = {
    "nothing is swapped in": (
        "swap_in",
        lambda self, model: None,
        ["test_every_evaluated_batch_sees_the_average", "test_one_of_several_averages_is_evaluated"],
    ),
    "the first evaluation alone is swapped": ("swap_in", _swap_once, ["test_every_evaluated_batch_sees_the_average"]),
    "averages stay in the model": (
        "swap_out",
        _leave_averages,
        ["test_the_model_trains_as_without_averages", "test_an_error_in_an_evaluation_leaves_the_params"],
    ),
    "the count of steps is lost": (
        "load",
        _load_averages_alone,
        ["test_a_resumed_training_equals_one_without_a_stop", "test_half_a_state_is_refused"],
    ),
    "averages are not loaded": (
        "load",
        _load_attachment_alone,
        ["test_a_resumed_training_equals_one_without_a_stop", "test_a_state_of_several_is_refused_by_one"],
    ),
    "the saved schedule replaces that of the arguments": (
        "load_steps",
        lambda self, state: self.attachment.load_state_dict(state),
        ["test_a_resumed_training_takes_the_schedule_of_its_arguments"],
    ),
    "a training without an update is silent": (
        "end",
        Contract.unfollow,
        [
            "test_an_average_that_starts_too_late_leaves_the_model",
            "test_a_resume_after_the_end_of_the_averages_says_so",
        ],
    ),
    "nothing is exported": (
        "swapped",
        lambda self, model: contextlib.nullcontext(),
        ["test_what_is_exported_is_the_average"],
    ),
    "nothing is copied at the end": (
        "finish",
        _finish_without_copy,
        ["test_the_model_has_the_average_at_the_end"],
    ),
    "an empty average is copied": (
        "finish",
        _finish_always,
        ["test_an_average_that_starts_too_late_leaves_the_model"],
    ),
    "a fresh average gets no warning": (
        "resume",
        _silent,
        ["test_a_checkpoint_without_averages_begins_a_fresh_one"],
    ),
    "the wrong one of several is evaluated": (
        "evaluated",
        property(lambda self: self.averaged if self._rules is None else self.averaged["slow"]),
        ["test_one_of_several_averages_is_evaluated"],
    ),
}


def fails(test: str, tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Return whether a test of the kit fails with the plain loop."""
    kit: Any = type("Fresh", (Kit,), {"framework": Plain()})()
    kit.new_folder = lambda: tmp_path_factory.mktemp("run")
    method: Callable[..., None] = getattr(kit, test)
    try:
        method(*(["float32"] if "kind" in method.__code__.co_varnames[: method.__code__.co_argcount] else []))
    except (AssertionError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize(("method", "bug", "tests"), PLANTED.values(), ids=PLANTED)
def test_planted_bugs_are_found(
    method: str,
    bug: Any,
    tests: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    assert not any(fails(test, tmp_path_factory) for test in tests)
    monkeypatch.setattr(plain.WeightAverage, method, bug)
    assert [test for test in tests if not fails(test, tmp_path_factory)] == []


def test_a_second_installation_that_is_not_refused_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(plain, "refuse_second", lambda installed, where: None)
    assert fails("test_a_second_installation_is_refused", tmp_path_factory)
