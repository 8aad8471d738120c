"""The loop report: what is exposed, its table and block, and one look at every way on a tiny decoder."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import loop, readme
from bench.steps import Decoder, Shape, Training, decoder_work, demo_work
from bench.workloads import WORKLOADS
from swafast.loop import runners

CPU = torch.device("cpu")
TINY = decoder_work("tiny", Shape(vocabulary=19, width=8, depth=2, heads=2, length=5, batch=2), 2)
ENVIRONMENT = {
    "command": "python -m bench loop", "device_name": "a CPU", "threads": 2, "date": "2026-11-21", "versions": {},
}  # fmt: skip


def followed(way: str, samples: list[float], differing: int | None = None) -> loop.Followed:
    return loop.Followed("a training", way, None, 10**6, 2, samples, differing, 0.01)


def report(differing: int = 0) -> loop.Report:
    """Give a report in which a machine that slows down hides from the medians what overlap saves."""
    rows = [
        followed(loop.NONE, [1.0, 2.0, 4.0]),
        followed(loop.ATTACHED, [1.5, 2.4, 4.6], 0),
        followed(loop.OVERLAP, [1.1, 2.1, 4.2], differing),
    ]
    return loop.Report(ENVIRONMENT, rows)


def test_what_is_exposed_is_paired_by_round() -> None:
    bare, plain, overlap = report().rows
    assert plain.exposed(bare).seconds == pytest.approx([0.5, 0.4, 0.6])
    assert plain.exposed(bare).share == pytest.approx(0.2)
    assert plain.exposed(bare).quartiles_s == pytest.approx((0.45, 0.55))
    assert overlap.exposed(bare).share == pytest.approx(0.05)


def test_a_report_reads_back_as_it_was_written(tmp_path: Path) -> None:
    report(3).write(tmp_path / "loop.json")
    assert loop.Report.read(tmp_path / "loop.json") == report(3)
    assert report(3).differing == 3


def test_the_pages_block_is_put_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / readme.LOOP_PAGE
    page.parent.mkdir()
    page.write_text(f"before {readme.LOOP_BEGIN} stale {readme.LOOP_END} after")
    assert readme.rewrite_loop(report(), tmp_path) == page
    text = page.read_text()
    assert "stale" not in text
    assert f"| {loop.NONE} | 2000 |  |  |  |\n" in text
    assert f"| {loop.OVERLAP} | 2100 | 100 | 100 to 150 | 5.0% |\n" in text
    assert "from the plain ones in no element," in text
    assert "plain ones in 3 elements," in readme.loop_block(report(3))


def test_the_page_holds_its_markers() -> None:
    text = (Path(__file__).parents[1] / readme.LOOP_PAGE).read_text()
    assert text.count(readme.LOOP_BEGIN) == text.count(readme.LOOP_END) == 1


def test_the_table_fits_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=150).print(loop.loop_table(report()))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "20.0%" in printed


def test_every_way_is_timed_and_no_element_differs() -> None:
    rows = loop.measure_work(TINY, loop.ALL, CPU, 0.0, min_rounds=2)
    assert [row.way for row in rows] == list(loop.WAYS)
    assert all(len(row.samples) == 2 and min(row.samples) > 0 for row in rows)
    assert [row.differing for row in rows] == [None, None, None, None, 0, 0, 0]


class Event:
    """A stand-in for a CUDA event, on a clock that an event moves by 30 ms."""

    clock_ms = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.recorded_ms = math.nan

    def record(self) -> None:
        self.recorded_ms = Event.clock_ms
        Event.clock_ms += 30.0

    def synchronize(self) -> None:
        assert not math.isnan(self.recorded_ms)

    def elapsed_time(self, end: Event) -> float:
        return end.recorded_ms - self.recorded_ms


def test_a_gpus_sample_is_between_two_events_and_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    contestant = loop._Contestant(TINY, loop.WAYS[loop.OVERLAP], CPU)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(contestant, "_device", torch.device("cuda"))
    monkeypatch.setattr(loop, "synchronize", lambda device: None)
    assert contestant.sample() == pytest.approx(0.030 / TINY.steps_per_sample)
    contestant.follower.end()


def test_an_update_that_the_step_does_not_wait_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run, update, stepped = runners.InThread._run, runners.InThread.update, threading.Event()

    def late(self: runners.InThread, *arguments: Any) -> None:
        stepped.wait(0.3)  # or for as long as the step waits
        run(self, *arguments)

    def stepping(self: runners.InThread) -> None:
        stepped.set()
        self.join()
        stepped.clear()
        update(self)

    monkeypatch.setattr(runners.InThread, "_run", late)
    ours = [loop.Named(loop.ATTACHED), loop.Named(loop.OVERLAP)]
    assert loop.count_differing(TINY, ours, CPU) == dict.fromkeys(ours, 0)
    monkeypatch.setattr(runners.InThread, "before_step", lambda self: None)
    monkeypatch.setattr(runners.InThread, "update", stepping)
    assert loop.count_differing(TINY, ours, CPU)[ours[1]] > 0


def test_differing_elements_are_counted_by_their_bits() -> None:
    one = torch.tensor([0.0, float("nan"), 1.0, 2.0])
    assert loop._differing(one, one.clone()) == 0
    assert loop._differing(one, torch.tensor([-0.0, float("nan"), 1.0, 2.5])) == 2
    assert loop._differing(torch.tensor(3), torch.tensor(4)) == 1


def test_a_decoder_sees_no_later_token_and_learns() -> None:
    training = Training(TINY, CPU)
    tokens = torch.randint(19, (1, 5))
    changed = tokens.clone()
    changed[0, -1] = (tokens[0, -1] + 1) % 19
    one, other = training.model(tokens), training.model(changed)
    torch.testing.assert_close(one[:, :-1], other[:, :-1])
    assert not torch.equal(one[:, -1], other[:, -1])
    before = [param.clone() for param in training.model.parameters()]
    training.step()
    assert not any(map(torch.equal, before, training.model.parameters()))


def test_a_decoder_of_gpt2s_shape_has_its_params() -> None:
    with torch.device("meta"):
        shape = Shape(vocabulary=50257, width=1024, depth=24, heads=16, length=1024, batch=1)
        numel = sum(param.numel() for param in Decoder(shape).parameters())
    assert numel == WORKLOADS["gpt2_medium"].num_params


def test_the_demos_training_has_the_demos_network() -> None:
    pytest.importorskip("sklearn")
    training = Training(demo_work(), CPU)
    training.step()
    assert sum(param.numel() for param in training.model.parameters()) == 15_554
