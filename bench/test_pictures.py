"""The pictures of the documents are drawn, from what is counted and planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import pictures
from bench.report import Report
from bench.workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"


def test_an_update_of_ours_is_one_launch_without_a_wait() -> None:
    updates = pictures.counted_updates()
    assert updates.pop("swafast") == [pictures.OURS]
    params = 2 * pictures.NUM_LAYERS
    default, loop = (
        updates["torch's class as it comes, on a CPU"],
        updates["a loop that keeps a float32 average of bf16"],
    )
    assert loop == [pictures.OP] * 2 * params
    assert default.count(pictures.OP) > params
    assert all(noted.count(pictures.WAIT) > 0 for name, noted in updates.items() if name.startswith("torch's class"))


@pytest.mark.distributed
def test_memory_is_that_of_the_plans() -> None:
    gigabytes = pictures.planned_gb(WORKLOADS["vit_l_16"], pictures.RANKS)
    whole, ddp, fsdp, hsdp, shared = gigabytes.values()
    assert ddp == pytest.approx(whole / pictures.RANKS, rel=0.01)
    assert fsdp == pytest.approx(whole / pictures.RANKS, rel=0.05)
    assert hsdp == pytest.approx(2 * fsdp, rel=0.05)
    assert shared < 1.1 * hsdp / 2


def test_pictures_are_drawn_and_the_same_each_time(tmp_path: Path) -> None:
    updates = {"theirs": [pictures.OP, pictures.WAIT], "ours": [pictures.OURS]}
    figures = {
        "formats": lambda: pictures.formats_figure(Report.read(RESULTS / "accuracy.json")),
        "memory": lambda: pictures.memory_figure({pictures.WHOLE: 8.0, "DDP": 1.0}),
        "one_update": lambda: pictures.update_figure(updates),
    }
    for name, figure in figures.items():
        first = pictures.save_svg(figure(), tmp_path / f"{name}.svg").read_bytes()
        assert first.startswith(b"<?xml")
        assert len(first) < 200_000
        assert pictures.save_svg(figure(), tmp_path / f"{name}.svg").read_bytes() == first
        assert (pictures.FOLDER / f"{name}.svg").exists()
