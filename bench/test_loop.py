"""What follows a training, ranks, and the errors of all formats: short runs, and the bugs that they must see."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from bench import accuracy, loop, names, sharded
from bench.accuracy import EQUAL, FORMATS, RULES, STREAMS, TORCH_BF16
from bench.report import Report
from bench.steps import Decoder, Shape, Training, decoder_work
from bench.workloads import WORKLOADS
from swafast import FusedAverages
from swafast.loop import runners
from tests.ranks import run_ranks

CPU = torch.device("cpu")
TINY = decoder_work("tiny", Shape(vocabulary=19, width=8, depth=2, heads=2, length=5, batch=2), 2)


def test_every_way_is_timed_and_no_element_differs() -> None:
    rows = loop.measure_work(TINY, loop.WAYS, CPU, 0.0, min_rounds=2)
    assert [row.way for row in rows] == [way.name for way in loop.WAYS]
    assert all(row.step.count == 2 and row.step.low > 0 for row in rows)
    assert [row.differing for row in rows] == [None, None, None, None, 0, 0, 0]
    assert [row.exposed is None for row in rows] == [True] + [False] * 6


def test_what_is_exposed_is_paired_by_round() -> None:
    # A machine that slows down hides from the medians what an average adds.
    exposed, share = loop.exposed([1.5, 2.4, 4.6], [1.0, 2.0, 4.0]).values()
    assert (exposed.median, exposed.low, exposed.high, share.median) == pytest.approx((0.5, 0.45, 0.55, 0.2))


def test_an_update_that_the_step_does_not_wait_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run, update, stepped, patience_s = runners.InThread._run, runners.InThread.update, threading.Event(), 0.1

    def late(self: runners.InThread, *arguments: Any) -> None:
        stepped.wait(patience_s)  # or for as long as the step waits
        run(self, *arguments)

    def stepping(self: runners.InThread) -> None:
        stepped.set()
        self.join()
        stepped.clear()
        update(self)

    monkeypatch.setattr(runners.InThread, "_run", late)
    ours = [loop.Way(loop.ATTACHED), loop.Way(loop.OVERLAP)]
    assert loop.count_differing(TINY, ours, CPU) == dict.fromkeys(ours, 0)
    monkeypatch.setattr(runners.InThread, "before_step", lambda self: None)
    monkeypatch.setattr(runners.InThread, "update", stepping)
    patience_s = 5.0  # longer than a step on a machine with much else to do
    assert loop.count_differing(TINY, ours, CPU)[ours[1]] > 0


def test_differing_elements_are_counted_by_their_bits() -> None:
    one = torch.tensor([0.0, float("nan"), 1.0, 2.0])
    assert loop._differing(one, one.clone()) == 0
    assert loop._differing(one, torch.tensor([-0.0, float("nan"), 1.0, 2.5])) == 2
    assert loop._differing(torch.tensor(3), torch.tensor(4)) == 1
    assert loop._differing(torch.ones(3).bfloat16(), torch.tensor([1.0, 2.0, 3.0]).bfloat16()) == 2


def test_trainings_that_do_not_fit_are_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "available_bytes", lambda device: 16 << 30)
    found = loop.measure_on(torch.device("cuda"), ("cuda", "triton"), 0.0)
    assert found == ([], "6 trainings take 64 GiB, 16 are free")


def test_a_decoder_sees_no_later_token_and_learns() -> None:
    trained = Training(TINY, CPU)
    tokens = torch.randint(19, (1, 5))
    changed = torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % 19], 1)
    same = torch.isclose(trained.model(tokens), trained.model(changed)).all(2)[0]
    assert same.tolist() == [True] * 4 + [False]
    before = [param.clone() for param in trained.model.parameters()]
    trained.step()
    assert not any(map(torch.equal, before, trained.model.parameters()))
    with torch.device("meta"):
        numel = sum(param.numel() for param in Decoder(loop.GPU_SHAPE).parameters())
    assert numel == WORKLOADS["gpt2_medium"].num_params


@pytest.mark.distributed
def test_every_contestant_is_timed_on_every_rank() -> None:
    by_rank = run_ranks(2, sharded._time_updates, ((7, 3), (5, 2)))
    order = [sharded.TORCH_DTENSORS, sharded.TORCH_MULTI, sharded.FOREACH_LOCAL, names.OURS]
    for samples in by_rank:
        assert list(samples) == order
        assert {len(taken) for taken in samples.values()} == {sharded.SAMPLES}
    base = sharded.Row("w", "w", "float32", "", 31, 2, 12 * 31)
    (row, *_) = sharded._timed(base, [{"swafast": [1.0, 5.0]}, {"swafast": [3.0, 2.0]}])
    assert row.wall is not None
    assert row.wall.samples == (3.0, 5.0)


@pytest.fixture(scope="module")
def errors() -> Report:
    return accuracy.measure({}, updates=300, numel=256)


def curve(report: Report, stream: str, format: str) -> list[float]:
    return next(c.errors for c in report.curves if (c.stream, c.rule, c.format) == (stream, EQUAL, format))


@pytest.mark.parametrize("stream", STREAMS)
def test_formats_stand_in_the_order_of_their_bits(errors: Report, stream: str) -> None:
    assert errors.updates[:5] + errors.updates[-2:] == [1, 2, 3, 4, 6, 237, 300]
    assert len(errors.curves) == len(STREAMS) * len(RULES) * (len(FORMATS) + 1)
    assert curve(errors, "drifting", TORCH_BF16)[-1] > 2 * curve(errors, "drifting", "half")[-1]  # it freezes
    last = {kind: curve(errors, stream, kind)[-1] for kind in FORMATS}
    assert curve(errors, stream, "exact") == curve(errors, stream, "float32")
    assert last["compensated"] <= 6e-8
    assert last["float32"] <= 0.2 * 300 * 2.0**-24
    assert last["compact"] <= 1e-5 * 300**0.5
    # A wrong weight would show in all of them, a format mistaken for another in one.
    assert last["float32"] < last["compact"] < last["half"] / 20


def test_a_wrong_count_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    update = FusedAverages.update_parameters

    def late(self: FusedAverages, model: torch.nn.Module) -> None:
        update(self, model)
        for averaged in self.values():
            if averaged.n_averaged == 2:
                averaged.n_averaged.add_(1)

    monkeypatch.setattr(FusedAverages, "update_parameters", late)
    threads = torch.get_num_threads()
    assert curve(accuracy.measure({}, updates=20, numel=64), "jumping", "float32")[-1] > 1e-3
    assert torch.get_num_threads() == threads
