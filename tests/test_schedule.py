"""Schedules: spans of steps, epochs and shares, and after which steps they are due."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from swafast.integrations.lengths import needed_lengths
from swafast.loop import schedule as module
from swafast.loop.schedule import Schedule, parse


def due(schedule: Schedule, steps: int) -> list[int]:
    return [step for step in range(1, steps + 1) if schedule.is_due(step)]


@pytest.mark.parametrize(
    ("spans", "steps"),
    [
        ({}, list(range(1, 21))),
        ({"every": 6}, [6, 12, 18]),
        ({"start": 1, "every": 6}, [1, 7, 13, 19]),
        ({"start": 4, "every": "3ba"}, [4, 7, 10, 13, 16, 19]),
        ({"start": 4, "every": 5, "end": 14}, [4, 9, 14]),
        ({"start": "1ep", "every": "1ep", "steps_per_epoch": 7}, [7, 14]),
        ({"start": "0.5ep", "every": "1.5ep", "steps_per_epoch": 5}, [3, 11, 19]),  # 2.5 and 7.5, rounded up
        ({"start": "0.75dur", "duration": 18}, [14, 15, 16, 17, 18]),  # 13.5, rounded up; and no further
        ({"start": "0.7dur", "every": "1ep", "duration": "5ep", "steps_per_epoch": 4}, [14, 18]),
        ({"start": "1dur", "duration": 9}, [9]),
        ({"start": ".5dur", "end": "0.8dur", "every": 2, "duration": 10}, [5, 7]),
        ({"start": 30}, []),
        ({"start": 20, "end": 20}, [20]),
    ],
    ids=str,
)
def test_updates_come_after_these_steps(spans: dict[str, Any], steps: list[int]) -> None:
    assert due(Schedule.of(**spans), 20) == steps
    for kind in (np.int64, np.uint8, np.array, torch.tensor):
        given = {name: span if isinstance(span, str) else kind(span) for name, span in spans.items()}
        state = Schedule.of(**given).state_dict()
        assert repr(state) == repr(Schedule.of(**spans).state_dict())  # ints of Python: torch.load reads no others


def test_a_share_is_exact() -> None:
    # 0.29 * 100 is 28.999999999999996 in floats, and 0.07 * 100 is 7.000000000000001
    assert Schedule.of("0.29dur", duration=100).start == 29
    assert Schedule.of("0.07dur", duration=100).start == 7
    assert parse("start", "0.07dur") == (Fraction(7, 100), "dur")


def test_a_state_makes_the_same_schedule() -> None:
    schedule = Schedule.of("2ep", "3ba", steps_per_epoch=4)
    assert schedule.state_dict() == {"start": 8, "every": 3, "end": None}
    assert Schedule(**schedule.state_dict()) == schedule


SPAN = "must be an int of steps or a str such as"
NO_SPANS = ["", "ep", "1 ep", "1e3ba", "-1ba", "1epoch", "0x1ba", "nandur", "1ba2ep", "1ba\n3ep"]


@pytest.mark.parametrize(
    ("make", "fields", "kind", "message"),
    [
        *((Schedule.of, (0, bad), ValueError, f"every {SPAN}") for bad in NO_SPANS),
        *((Schedule.of, (bad,), TypeError, f"start {SPAN}") for bad in (None, 1.0, True, [1], b"1ba")),
        (Schedule, (0, 0), ValueError, "every must be >= 1, got 0"),
        (Schedule, (-3, 1), ValueError, "start must be >= 0, got -3"),
        (Schedule, (4, 1, 3), ValueError, "end must be >= 4, got 3"),
        (Schedule, (0, 1, "2ep"), TypeError, "end must be an int of steps, got '2ep'"),
        (Schedule, (0, True), TypeError, "every must be an int of steps, got True"),
        (Schedule, (None, 1), TypeError, "start must be an int of steps, got None"),
    ],
)
def test_what_is_no_schedule_is_named(make: Any, fields: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make(*fields)


def test_the_gate_sees_spans_rounded_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.math, "ceil", int)
    with pytest.raises(AssertionError):
        test_updates_come_after_these_steps({"start": "0.75dur", "duration": 18}, [14, 15, 16, 17, 18])


#: Spans, what a framework knows, and what of it is asked: the answer may load the data.
LENGTHS: dict[str, tuple[dict[str, Any], Any, Any, dict[str, Any], set[str]]] = {
    "steps": ({"start": 3, "every": "2ba", "end": None, "offload": "cpu", "overlap": True}, 90, 4, {}, set()),
    "epochs": ({"start": 0, "every": " 1ep"}, 90, 3.5, {"steps_per_epoch": 4}, {"epoch"}),
    "shares": ({"start": "0.5dur"}, 90, 4, {"duration": 90}, {"duration"}),
    "both": (
        {"start": "0.5dur", "every": "2ep"}, 90, 4, {"duration": 90, "steps_per_epoch": 4}, {"duration", "epoch"},
    ),
    "a training of epochs": (
        {"end": "0.9dur"}, "6ep", 4, {"duration": "6ep", "steps_per_epoch": 4}, {"duration", "epoch"},
    ),
    "the user's duration": ({"start": 0, "duration": "6ep"}, 90, 4, {"steps_per_epoch": 4}, {"epoch"}),
    "endless epochs": ({"every": "1ep"}, 90, float("inf"), {}, {"epoch"}),
    "nothing is known": ({"start": "0.5dur", "every": "1ep"}, None, None, {}, {"duration", "epoch"}),
}  # fmt: skip


@pytest.mark.parametrize("case", LENGTHS)
def test_a_framework_is_asked_for_the_lengths_that_spans_need(case: str) -> None:
    spans, duration, epoch, lengths, wanted = LENGTHS[case]
    asked: set[str] = set()

    def known(what: str, length: Any) -> Any:
        asked.add(what)
        return length

    found = needed_lengths(
        spans, duration=lambda: known("duration", duration), steps_per_epoch=lambda: known("epoch", epoch)
    )
    assert (found, asked) == (lengths, wanted)
