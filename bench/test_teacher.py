"""A teacher's step: a short run, and the bug that its comparison must see."""

from __future__ import annotations

import pytest

from bench import names, teacher
from swafast import FusedAveragedModel


def test_every_part_of_a_step_is_timed() -> None:
    rows = teacher.measure(quick=True, progress=lambda text: None)
    assert [(row.dtype, row.way) for row in rows] == [
        (dtype, way) for dtype in ("float32", "bfloat16") for way in (names.TORCH_EMA, names.OURS)
    ]
    for row in rows:
        assert row.student.count == row.update.count >= teacher.LEAST_STEPS
        assert min(row.student.low, row.teacher.low, row.update.low) > 0
        assert 0 < row.share.median < 1
    (first, *_) = rows
    assert f"| {first.share.median:.2%} |" in teacher.table(rows)


def test_a_teacher_that_stands_still_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedAveragedModel, "update_parameters", lambda self, model: None)
    with pytest.raises(AssertionError, match="must be alike"):
        teacher.check(teacher.QUICK_SHAPE)
