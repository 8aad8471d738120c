"""`attach`: updates by the optimizer's hooks, also beside the next forward pass, and through a resume."""

from __future__ import annotations

import copy
import gc
import io
import json
import multiprocessing
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages
from swafast.loop import attach as module
from swafast.loop import runners
from swafast.loop.attachment import Attachment
from swafast.loop.roster import STATE_KEY
from swafast.loop.schedule import Schedule
from swafast.op.plan import Plan
from tests import ranks, stopped_training
from tests.stopped_training import WAYS
from tests.support import Held, differing, refused, tensors_of, unchanged

BESIDE = ("overlap", "offload")
SEVERAL = {"fast": ExponentialAverage(0.9), "mean": EqualAverage()}


class Net(nn.Module):
    """Has buffers that a forward pass writes and an update copies."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))
        self.tied = self.inner[3]
        self.also_tied = nn.Linear(6, 16, bias=False)
        self.also_tied.weight = self.inner[0].weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.inner(x)


class Run:
    """A training that is the same each time."""

    def __init__(self, dtype: torch.dtype = torch.float32, on: str = "cpu", **options: Any) -> None:
        torch.manual_seed(3)
        self.model = Net().to(on, dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        kind: Any = FusedAverages if "rules" in options else FusedAveragedModel
        self.averaged = kind(self.model, **options)
        self.generator = torch.Generator().manual_seed(4)

    def step(self, after: Callable[[], object] = lambda: None) -> None:
        x = torch.randn(8, 6, generator=self.generator).to(self.model.seen.device)
        x = x.to(next(self.model.parameters()).dtype)
        self.optimizer.zero_grad()
        (self.model(x) - x).square().mean().backward()
        self.optimizer.step()
        after()

    def steps(self, count: int) -> Run:
        for _ in range(count):
            self.step()
        return self

    def updating(self) -> None:
        """Make a step with an update called in the loop."""
        self.step(lambda: self.averaged.update_parameters(self.model))

    def attach(self, way: str = "plain", **options: Any) -> Attachment:
        return self.averaged.attach(self.optimizer, **options, **WAYS[way])


def plainly(steps: int, schedule: Schedule, **options: Any) -> Run:
    """Return a run whose loop calls ``update_parameters`` itself."""
    run = Run(**options)
    for step in range(1, steps + 1):
        run.step(lambda step=step: schedule.is_due(step) and run.averaged.update_parameters(run.model))
    return run


def require_equal(got: Run, want: Run) -> None:
    for ours, theirs in ((got.averaged, want.averaged), (got.model, want.model)):
        assert differing(tensors_of(ours.cpu()), tensors_of(theirs.cpu())) == []


# The same results


@pytest.mark.parametrize("on", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": ExponentialAverage(0.9), "use_buffers": True},
        {"dtype": torch.bfloat16},
        {"format": "compact", "seed": 7},
        {"rules": SEVERAL, "format": {"fast": "compensated"}},
        {"nonfinite": "skip"},
        {"nonfinite": "raise"},
    ],
    ids=str,
)
def test_the_results_are_those_of_calls_in_the_loop(way: str, options: dict[str, Any], on: str) -> None:
    run = Run(on=on, **options)
    run.attach(way)
    require_equal(run.steps(12), plainly(12, Schedule(0, 1), on=on, **options))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("spans", "schedule"),
    [
        ({"start": 3, "every": 4}, Schedule(3, 4)),
        ({"every": 5}, Schedule(0, 5)),
        ({"start": "0.5dur", "every": "2ba", "duration": 12}, Schedule(6, 2, 12)),
        ({"start": "1ep", "every": "1ep", "end": "3ep", "steps_per_epoch": 3}, Schedule(3, 3, 9)),
    ],
    ids=str,
)
def test_updates_come_when_they_are_due(way: str, spans: dict[str, Any], schedule: Schedule) -> None:
    run = Run()
    attachment = run.attach(way, **spans)
    assert attachment.schedule == schedule
    require_equal(run.steps(12), plainly(12, schedule))
    assert attachment.step == 12


@pytest.mark.parametrize("way", BESIDE)
def test_a_forward_and_backward_run_beside_an_update(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, run = Held(monkeypatch), Run()
    run.attach(way, start=1, every=2)
    run.step()
    run.optimizer.zero_grad()
    run.model(torch.ones(4, 6)).sum().backward()  # writes BatchNorm's statistics
    assert held.begun.wait(60)
    assert not held.ended.is_set()
    held.let_go_in(0.3)
    run.optimizer.step()  # waits, or the update has its own copy
    run.averaged.state_dict()
    assert held.ended.is_set()
    monkeypatch.undo()
    expected = plainly(1, Schedule(0, 1))
    expected.optimizer.zero_grad()
    expected.model(torch.ones(4, 6)).sum().backward()
    expected.optimizer.step()
    require_equal(run, expected)


@pytest.mark.parametrize("way", WAYS)
def test_errors_of_an_update_come_and_nothing_has_changed(way: str) -> None:
    run = Run(nonfinite="raise")
    attachment = run.attach(way)
    run.step(attachment.join)
    run.model.inner[0].weight.data[0, 0] = float("nan")
    with refused(ValueError, r"'inner\.0\.weight' must be finite", run.averaged):
        run.step(attachment.join)
    attachment.detach()  # it was told already


@pytest.mark.parametrize("way", WAYS)
def test_an_error_of_the_thread_says_that_it_is_of_an_earlier_step(way: str) -> None:
    run = Run(nonfinite="raise")
    attachment = run.attach(way)
    run.model.inner[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="must be finite") as seen:
        run.steps(2)  # the second one waits for the update after the first
    notes = getattr(seen.value, "__notes__", [])
    said = [note.startswith("This is the error of an update after an earlier step of the optimizer") for note in notes]
    assert said == [True] * (way in BESIDE)
    assert attachment.step == (2 if way == "offload" else 1)


@pytest.mark.parametrize(
    ("arguments", "shown", "runner"),
    [
        ({}, "", runners.Plain),
        ({"overlap": np.False_}, "", runners.Plain),
        ({"overlap": np.True_}, ", overlap=True", runners.InThread),
        ({"overlap": torch.tensor(True)}, ", overlap=True", runners.InThread),
        ({"offload": torch.device("cpu", 0)}, ", offload='cpu'", runners.InThread),
        ({"overlap": True, "offload": "cpu"}, ", overlap=True, offload='cpu'", runners.InThread),
    ],
    ids=str,
)
def test_an_attachment_shows_how_its_updates_run(
    arguments: dict[str, Any], shown: str, runner: type[runners.Runner]
) -> None:
    run = Run()
    attachment = run.averaged.attach(run.optimizer, **arguments)
    assert type(attachment._runner) is runner
    assert repr(attachment).endswith(f", every=1, end=None){shown})")
    assert repr(copy.deepcopy(attachment)).endswith("), detached)")
    attachment.detach()
    assert repr(attachment).endswith(f"{shown}, detached)")


def test_steps_that_are_skipped_do_not_count() -> None:
    run = Run()
    attachment = run.attach()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for bad in (False, True, False):
        run.optimizer.zero_grad()
        loss = run.model(torch.ones(4, 6)).square().sum()
        scaler.scale(loss * float("inf") if bad else loss).backward()
        scaler.step(run.optimizer)
        scaler.update()
    assert attachment.step == run.averaged.n_averaged == 2


@pytest.mark.parametrize("way", WAYS)
def test_the_model_may_change_on_the_way(way: str) -> None:
    runs = [Run(), Run()]
    runs[0].averaged.attach(runs[0].optimizer, **WAYS[way])
    for run in runs:
        update = (lambda: None) if run is runs[0] else (lambda: run.averaged.update_parameters(run.model))  # noqa: B023
        run.step(update)
        run.model.inner[1] = copy.deepcopy(run.model.inner[1])  # other modules and tensors of the same names
        run.model.seen = run.model.seen.clone()
        run.model.further = nn.Identity()
        run.optimizer.param_groups[0]["params"] = list(run.model.parameters())
        run.step(update)
        attachment = run.averaged._guard.attachment
        run.averaged.n_averaged.item() if attachment is None else attachment.join()
        run.model.inner[0].weight.data = run.model.inner[0].weight.data.clone()
        run.step(update)
    require_equal(*runs)


@pytest.mark.parametrize("way", BESIDE)
@pytest.mark.parametrize("given", ["both", "the last"])
def test_each_of_several_optimizers_waits(way: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first optimizer steps while an update reads its params; a wait for it takes half a second at most."""
    run, held = Run(), Held(monkeypatch, at_most=0.5)
    parts = [torch.optim.SGD(run.model.inner[i].parameters(), 0.1) for i in (0, 3)]
    parts[1].add_param_group({"params": run.model.inner[1].parameters()})
    if given == "both":
        run.averaged.attach(parts, **WAYS[way])
    else:
        with pytest.warns(
            UserWarning, match=r"2 trained params, 'inner\.0\.weight' the first, are in none of the given"
        ):
            run.averaged.attach(parts[1], **WAYS[way])
    for param in run.model.parameters():
        param.grad = torch.ones_like(param)
    expected = copy.deepcopy(run.model)
    for _ in range(2):
        parts[0].step()
        held.let_go.set()
        run.averaged._guard.attachment.join()
        held.let_go.clear()
        parts[1].step()
    for param in expected.parameters():
        param.grad = torch.ones_like(param)
    average = expected.inner[0].weight - 0.1
    held.let_go.set()
    run.averaged.state_dict()
    if given == "both" or way == "offload":  # which has copies of its own
        torch.testing.assert_close(run.averaged.module.inner[0].weight, average - 0.05)
    assert run.averaged.n_averaged == 2


def swap(run: Run) -> None:
    with run.averaged.swapped_into(run.model):
        pass


USES: list[Callable[[Run], object]] = [
    swap,
    lambda run: run.averaged.eval()(torch.ones(2, 6)),
    lambda run: run.averaged.copy_to(run.model),
    lambda run: run.averaged.state_dict(),
    lambda run: run.averaged.averaged_state_dict(),
    lambda run: run.averaged.load_state_dict(FusedAveragedModel(run.model).state_dict()),
    lambda run: run.averaged.to(torch.float64),
    lambda run: copy.deepcopy(run.averaged),
    lambda run: run.averaged._guard.attachment.detach(),
    lambda run: run.averaged._guard.attachment.join(),
]


@pytest.mark.parametrize("way", BESIDE)
@pytest.mark.parametrize("use", USES)
def test_whatever_uses_the_averages_waits(
    way: str, use: Callable[[Run], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, run = Held(monkeypatch), Run()
    run.attach(way)
    run.step()
    held.let_go_in(0.1)
    use(run)
    assert held.ended.is_set()


@pytest.mark.parametrize("write", [swap, lambda run: run.averaged.copy_to(run.model)])
@pytest.mark.parametrize("way", BESIDE)
def test_what_writes_params_waits_for_all_that_read_them(
    way: str, write: Callable[[Run], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, run = Held(monkeypatch), Run()
    other = FusedAveragedModel(run.model)
    other.attach(run.optimizer, **WAYS[way])
    run.averaged.load_state_dict(FusedAveragedModel(run.model).state_dict())
    run.step()
    held.let_go_in(0.1)
    write(run)
    assert held.ended.is_set()
    other.state_dict()


@pytest.mark.parametrize("way", BESIDE)
def test_an_update_has_its_copies_to_itself(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next update copies only when the last one has ended, which here comes late."""
    run = Run(use_buffers=True)
    Held(monkeypatch, at_most=0.2)
    run.attach(way)
    run.steps(3).averaged.state_dict()
    monkeypatch.undo()
    require_equal(run, plainly(3, Schedule(0, 1), use_buffers=True))


@pytest.mark.parametrize("way", BESIDE)
def test_one_plan_serves_all_updates(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, made = Run(), []
    init = Plan.__init__
    monkeypatch.setattr(Plan, "__init__", lambda plan, *args, **options: made.append(init(plan, *args, **options)))
    attachment = run.attach(way)
    run.step(attachment.join)
    made.clear()
    for _ in range(3):
        run.step(attachment.join)
    assert made == []


def test_an_interrupted_wait_is_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    held, run = Held(monkeypatch), Run()
    attachment = run.attach("overlap")
    run.step()
    assert held.begun.wait(60)
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            attachment.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    threading.Timer(0.2, held.let_go.set).start()
    run.step(attachment.join)
    assert held.ended.is_set()
    monkeypatch.undo()
    require_equal(run, plainly(2, Schedule(0, 1)))


def test_other_threads_wait_too(monkeypatch: pytest.MonkeyPatch) -> None:
    held, run = Held(monkeypatch, FusedAverages), Run(rules=SEVERAL)
    run.attach("overlap")
    run.step()
    assert held.begun.wait(60)
    with ThreadPoolExecutor(3) as threads:
        saved = [threads.submit(run.averaged.state_dict) for _ in range(2)]
        saved.append(threads.submit(run.averaged["mean"].state_dict))
        assert not wait(saved, timeout=0.2).done
        held.let_go.set()
        assert [int(state.result(60)["mean.n_averaged"]) for state in saved[:2]] == [1, 1]
        assert saved[2].result(60)["n_averaged"] == 1


def test_who_holds_all_averages_waits_for_none_of_them() -> None:
    """The thread that saves steps in a hook: the update that begins then needs the locks of the save."""
    run = Run(rules=SEVERAL)
    run.attach("overlap")
    run.step()
    handle = run.averaged["fast"].register_state_dict_pre_hook(lambda *_: run.step())
    saving = threading.Thread(target=run.averaged.state_dict, daemon=True)
    saving.start()
    saving.join(60)
    assert not saving.is_alive()
    handle.remove()
    assert run.averaged.state_dict()["mean.n_averaged"] == 2


def _check_and_train_on(run: Run) -> None:
    assert run.averaged.state_dict()["n_averaged"] == 1
    run.step()
    sys.exit(int(run.averaged.state_dict()["n_averaged"]))


def test_a_forked_child_has_the_update_that_was_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)  # libgomp hangs in a child of a process that ran more
    held, run = Held(monkeypatch), Run()
    run.attach("overlap")
    run.step()
    held.let_go_in(0.2)
    child = multiprocessing.get_context("fork").Process(target=_check_and_train_on, args=(run,))
    child.start()  # waits; of a DataLoader, say
    child.join(60)
    assert child.exitcode == 2
    assert run.averaged.state_dict()["n_averaged"] == 1


def test_wrapped_models_are_followed() -> None:
    run = Run()
    wrapped = torch.compile(run.model, backend="eager")
    run.averaged.attach(run.optimizer, wrapped, overlap=True)
    require_equal(run.steps(3), plainly(3, Schedule(0, 1)))


# Detaching


@pytest.mark.parametrize("way", WAYS)
def test_a_detached_optimizer_is_left_alone(way: str) -> None:
    run = Run()
    keys = run.optimizer.state_dict().keys()
    threads = set(threading.enumerate())
    with run.averaged.attach(run.optimizer, **WAYS[way]) as attachment:
        run.step()
        run.step()
        assert attachment.is_attached
    assert not attachment.is_attached
    run.step()
    assert run.averaged.n_averaged == attachment.step == 2
    assert run.optimizer.state_dict().keys() == keys
    assert [new for new in threading.enumerate() if new not in threads and new.name.startswith("swafast")] == []
    with pytest.raises(RuntimeError, match="must be attached to be detached, got one that was detached before"):
        attachment.detach()
    run.averaged.attach(run.optimizer, every=3, step=0)
    run.step()
    assert run.averaged.n_averaged == 2


def test_copies_and_pickles_are_not_attached() -> None:
    run = Run()
    run.attach("overlap")
    run.step()
    copied, pickled = copy.deepcopy(run.averaged), pickle.loads(pickle.dumps(run.averaged))
    run.step()
    for other in (copied, pickled):
        assert other.n_averaged == 1
        other.attach(run.optimizer, run.model).detach()
        with pytest.raises(ValueError, match="model must be given, got None: the model that this average was made of"):
            other.attach(run.optimizer)


def test_nothing_is_kept_alive_once_all_are_gone() -> None:
    run = Run()
    run.attach("overlap")
    run.step()
    run.averaged.state_dict()  # waits
    gone = [weakref.ref(run.model), weakref.ref(run.averaged), weakref.ref(run.optimizer)]
    del run
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


# State


def saved(run: Run) -> bytes:
    file = io.BytesIO()
    state = {name: getattr(run, name).state_dict() for name in ("model", "optimizer", "averaged")}
    torch.save(state | {"generator": run.generator.get_state()}, file)
    return file.getvalue()


def entry_of(state: dict[str, Any]) -> dict[str, Any]:
    """Return the states of attachments in the state of an optimizer, by name."""
    return json.loads(state["param_groups"][0][STATE_KEY])


def load(run: Run, state: bytes) -> None:
    loaded = torch.load(io.BytesIO(state), weights_only=True)
    for name in ("model", "optimizer", "averaged"):
        getattr(run, name).load_state_dict(loaded[name])
    run.generator.set_state(loaded["generator"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"rules": SEVERAL}, {"format": "compact"}], ids=str)
@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_run_that_was_stopped_equals_one_that_was_not(way: str, options: dict[str, Any], at: int) -> None:
    spans = {"start": 2, "every": 3, "end": 20}
    first = Run(**options)
    first.attach(way, **spans)
    state = saved(first.steps(at))
    second = Run(**options)
    attachment = second.attach(way, **spans)
    load(second, state)
    assert (attachment.step, attachment.schedule) == (at, Schedule(2, 3, 20))
    require_equal(second.steps(12 - at), plainly(12, Schedule(2, 3, 20), **options))


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_goes_on_to_the_same_end(way: str, tmp_path: Path) -> None:
    def train(folder: str, kill_at: int | None = None) -> int | None:
        (tmp_path / folder).mkdir(exist_ok=True)
        process = ranks.starter.Process(target=stopped_training.train, args=(tmp_path / folder, way, kill_at))
        process.start()
        process.join(120)
        return process.exitcode

    assert train("whole") == 0
    assert [train("killed", kill_at) for kill_at in (4, 17)] == [-signal.SIGKILL] * 2
    assert train("killed") == 0
    ends = [torch.load(tmp_path / folder / "end.pt", weights_only=True) for folder in ("whole", "killed")]
    assert ends[0]["averaged"]["n_averaged"] == 13
    assert entry_of(ends[0]["optimizer"]) == entry_of(ends[1]["optimizer"])
    for part in ("model", "averaged"):
        assert differing(ends[0][part], ends[1][part]) == []


def test_a_schedule_that_takes_the_place_of_another_is_told_of() -> None:
    first, second = Run(), Run()
    first.averaged.attach(first.optimizer, every=2, end=10)
    first.step()
    attachment = second.averaged.attach(second.optimizer, every=2, end=20)
    with pytest.warns(UserWarning, match=r"end=10\) takes the place of Schedule\(.*end=20\): assign"):
        second.optimizer.load_state_dict(first.optimizer.state_dict())
    attachment.schedule = replace(attachment.schedule, end=None)
    assert (attachment.step, attachment.schedule) == (1, Schedule(0, 2))


def test_several_averages_on_one_optimizer_have_a_state_each() -> None:
    run = Run()
    others = [FusedAveragedModel(run.model), FusedAveragedModel(run.model)]
    attachments = [each.attach(run.optimizer, every=every) for each, every in zip(others, (1, 2), strict=True)]
    state = run.steps(4).optimizer.state_dict()
    assert [each["schedule"]["every"] for each in entry_of(state).values()] == [1, 2]
    for attachment in attachments:
        attachment.step, attachment.schedule = 0, Schedule(0, 9)
    with pytest.warns(UserWarning, match="takes the place of"):
        run.optimizer.load_state_dict(state)
    assert [(attachment.step, attachment.schedule.every) for attachment in attachments] == [(4, 1), (4, 2)]


def test_a_state_from_before_leaves_the_attachment() -> None:
    run = Run()
    run.step()
    state = run.optimizer.state_dict()
    attachment = run.attach()
    run.step()
    with pytest.warns(UserWarning, match=r"'EqualAverage', but those in its state are none\. .* set attachment\.step"):
        run.optimizer.load_state_dict(state)
    assert attachment.step == 1
    plain = Run()
    plain.optimizer.load_state_dict(run.optimizer.state_dict())  # ours is no hindrance elsewhere


@pytest.mark.parametrize("bad", [None, {}, {"step": 1}, {"step": -1, "schedule": Schedule(0, 1).state_dict()},
                                 {"step": True, "schedule": Schedule(0, 1).state_dict()},
                                 {"step": 1, "schedule": {"start": 0, "every": 0}},
                                 {"step": 1, "schedule": {"start": "a", "every": 1, "end": None}},
                                 {"step": 1, "schedule": {"start": 0, "every": 1}}, torch.tensor(3),
                                 {"step": 1, "schedule": {"begin": 3}}])  # fmt: skip
def test_a_bad_state_changes_nothing(bad: Any) -> None:
    run = Run()
    attachment = run.attach()
    run.step()
    with pytest.raises(ValueError, match="must be"):
        attachment.load_state_dict(bad)
    with pytest.raises(TypeError, match="schedule must be a Schedule, got"):
        attachment.schedule = bad
    state = run.optimizer.state_dict()
    state["param_groups"][0]["lr"] = 7.0
    del state["param_groups"][0][STATE_KEY]
    state[STATE_KEY] = [bad]  # where it once was
    with pytest.warns(UserWarning, match="must be"):
        run.optimizer.load_state_dict(state)
    assert attachment.step == 1
    assert run.optimizer.param_groups[0]["lr"] == 7.0  # which an average does not stop


# What may be amiss


class Wrapper(torch.optim.Optimizer):
    """An optimizer by its type alone, which does not say what is inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer
        self.param_groups = optimizer.param_groups


def other_optimizer(run: Run) -> dict[str, Any]:
    return {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)}


def test_an_optimizer_that_has_got_copies_since_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    averaged = FusedAveragedModel(model)
    averaged.attach(optimizer)
    copied = [param.detach().clone() for param in model.parameters()]  # as ZeRO and mixed precision do
    model_params, optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"], copied
    for _ in range(2):
        with pytest.raises(ValueError, match=r"got one that has got others since: .*integrations\.deepspeed"):
            optimizer.step()
    assert (averaged.attachment.step, int(averaged.n_averaged)) == (0, 0)
    optimizer.param_groups[0]["params"] = [*copied[:1], *model_params[1:]]
    optimizer.step()
    assert averaged.attachment.step == 1


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (lambda run: {"optimizer": run.model}, TypeError, r"optimizer must be a torch\.optim\.Optimizer, got Net"),
        (lambda run: {"optimizer": []}, ValueError, "optimizer must be one optimizer or several, got an empty"),
        (lambda run: {"optimizer": [run.optimizer, None]}, TypeError, "optimizer must be a torch.*, got NoneType"),
        (lambda run: {"optimizer": Wrapper(run.optimizer)}, TypeError, "optimizer must run torch's hooks, got Wrapper"),
        (other_optimizer, ValueError, "optimizer must have params of the model, got one that has none of them"),
        (lambda run: {"model": "net"}, TypeError, r"model must be a torch\.nn\.Module, got str"),
        (lambda run: {"model": run.model.inner}, ValueError, "'inner.0.weight'"),
        (lambda run: {"every": 0}, ValueError, "every must be at least one step, got 0"),
        (lambda run: {"every": "0.0001dur", "duration": 0}, ValueError, "duration must be at least one step, got 0"),
        (lambda run: {"start": 9, "end": 8}, ValueError, "start must not be after the end 8, step 8, got 9, step 9"),
        (lambda run: {"start": "2ep", "duration": 5, "steps_per_epoch": 3}, ValueError, "after the duration 5"),
        (lambda run: {"start": "1ep"}, ValueError, "steps_per_epoch must be given for start='1ep', got None"),
        (lambda run: {"end": "0.9dur"}, ValueError, "duration must be given for end='0.9dur', got None"),
        (lambda run: {"end": "1.5dur", "duration": 9}, ValueError, "end must be at most '1dur', got '1.5dur'"),
        (lambda run: {"duration": " 1dur "}, ValueError, "duration must be in steps or epochs"),
        (lambda run: {"duration": "1dur"}, ValueError, "duration must be in steps or epochs"),
        (lambda run: {"start": "0.5ba"}, ValueError, "start must be a whole number of steps, got '0.5ba'"),
        (lambda run: {"start": "soon"}, ValueError, "start must be an int of steps or a str .*, got 'soon'"),
        (lambda run: {"start": -1}, ValueError, "start must be >= 0, got -1"),
        (lambda run: {"start": 0.75}, TypeError, "start must be an int of steps or a str .*, got 0.75"),
        (lambda run: {"every": True}, TypeError, "every must be an int"),
        (lambda run: {"steps_per_epoch": 0}, ValueError, "steps_per_epoch must be an int >= 1, got 0"),
        *(
            (lambda run, value=value: {"overlap": value}, TypeError, "overlap must be True or False, got ")
            for value in ("yes", 1, 0, None, torch.ones(2, dtype=torch.bool))
        ),
        (lambda run: {"offload": False}, ValueError, "offload must be 'cpu' or None, got False"),
        (lambda run: {"offload": torch.device("cuda")}, ValueError, r"offload must be 'cpu' or None, got device\("),
        (lambda run: {"offload": "disk"}, ValueError, "offload must be 'cpu' or None, got 'disk'"),
        (lambda run: {"name": 3}, TypeError, "name must be a str, got 3"),
        (lambda run: {"name": ""}, ValueError, "name must not be empty"),
        (lambda run: {"step": 1.0}, TypeError, r"step must be an int, got 1\.0"),
        (lambda run: {"step": -1}, ValueError, "step must be an int >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_attached(
    arguments: Callable[[Run], dict[str, Any]], kind: type[Exception], message: str
) -> None:
    run = Run()
    run.averaged.update_parameters(run.model)
    with refused(kind, message, run.averaged):
        run.averaged.attach(**({"optimizer": run.optimizer} | arguments(run)))
        run.step()
    assert STATE_KEY not in run.optimizer.state_dict()["param_groups"][0]
    with pytest.warns(UserWarning, match="counts from 0, although the optimizer or the average"):
        run.attach()


def test_one_that_is_attached_is_not_attached_again() -> None:
    run = Run(rules=SEVERAL)
    run.averaged.attach(run.optimizer)
    for each in (run.averaged, run.averaged["fast"]):
        with pytest.raises(RuntimeError, match="must not be attached already"):
            each.attach(run.optimizer)
    run.step()
    assert run.averaged["fast"].n_averaged == run.averaged["mean"].n_averaged == 1


def test_one_that_is_swapped_is_not_attached() -> None:
    run = Run()
    with run.averaged.swapped_into(run.model), pytest.raises(RuntimeError, match="attach must wait until"):
        run.averaged.attach(run.optimizer)


# On a GPU


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the stream of each update busy first, for longer than a step."""
    update = Plan.update

    def slow(plan: Plan, *args: Any, **kwargs: Any) -> None:
        torch.cuda._sleep(50_000_000)  # cycles: some 30 ms
        update(plan, *args, **kwargs)

    monkeypatch.setattr(Plan, "update", slow)


@pytest.mark.gpu
@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("is_planted", [False, True])
def test_a_gpus_step_waits_for_the_side_stream(is_planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(on="cuda", use_buffers=True)
    run.attach("overlap")
    if is_planted:
        monkeypatch.setattr(runners.OnStreams, "before_step", lambda runner: None)
    run.steps(5)
    want = plainly(5, Schedule(0, 1), on="cuda", use_buffers=True)
    found = differing(run.averaged.state_dict(), want.averaged.state_dict())
    assert (found != []) == is_planted


@pytest.mark.gpu
@pytest.mark.usefixtures("slowly")
def test_a_gpu_computes_beside_an_update() -> None:
    run = Run(on="cuda")
    run.attach("overlap")
    inputs = torch.ones(4, 6, device="cuda")
    run.model(inputs).sum().backward()  # CUDA loads a kernel at its first launch, and that may wait for the device
    run.step()
    run.step()
    forward = torch.cuda.Event()
    run.model(inputs).sum().backward()
    forward.record()
    forward.synchronize()
    attachment = run.averaged._guard.attachment
    assert not attachment._runner._ended[0].query()
    attachment.join()
    torch.cuda.current_stream().synchronize()
    assert attachment._runner._ended[0].query()


@pytest.mark.gpu
@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("drop", ["all", "the params' memory"])
def test_a_gpus_memory_is_kept_until_the_update_has_ended(drop: str) -> None:
    run = Run(on="cuda")
    run.attach("overlap")
    run.steps(2)
    sizes = [tensor.numel() for tensor in (*run.model.parameters(), *run.averaged.parameters(), *run.model.buffers())]
    if drop == "all":
        del run
        gc.collect()
    else:
        for param in run.model.parameters():
            param.data = param.data.clone()
    others = [torch.full((size,), 7.0, device="cuda") for size in sizes for _ in range(3)]
    if drop != "all":
        want = plainly(2, Schedule(0, 1), on="cuda")
        assert differing(run.averaged.averaged_state_dict(), want.averaged.averaged_state_dict()) == []
    torch.cuda.synchronize()
    assert all(bool((tensor == 7.0).all()) for tensor in others)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["plain", "overlap"])
def test_the_host_waits_for_no_gpu(way: str) -> None:
    run = Run(on="cuda")
    run.attach(way)
    run.steps(2)
    x = torch.ones(4, 6, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run.optimizer.zero_grad()
            run.model(x).square().mean().backward()
            run.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.averaged.state_dict()["n_averaged"] == 5


@pytest.mark.gpu
@pytest.mark.parametrize("way", BESIDE)
def test_a_model_moves_to_a_gpu_and_back_while_it_is_attached(way: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
    averaged = FusedAveragedModel(model, rule=ExponentialAverage(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attachment = averaged.attach(optimizer, **WAYS[way])
    want = [param.detach().clone() for param in model.parameters()]
    side = torch.cuda.Stream()
    for step, on in enumerate(("cpu", "cuda", "cuda", "cpu", "cuda")):
        model.to(on)
        with torch.cuda.stream(side):
            for param in model.parameters():
                param.grad = torch.full_like(param, float(step))
            torch.cuda._sleep(50_000_000)  # the params are written late
            optimizer.step()
        for average, param in zip(want, model.parameters(), strict=True):
            average.lerp_(param.detach().cpu(), 1.0 if step == 0 else 0.5)
    attachment.join()
    torch.cuda.synchronize()
    for average, param in zip(want, averaged.module.parameters(), strict=True):
        torch.testing.assert_close(param.detach().cpu(), average)


@pytest.mark.gpu
def test_averages_of_a_gpus_model_are_kept_in_pinned_memory() -> None:
    run = Run(on="cuda", rules=SEVERAL)
    run.averaged.attach(run.optimizer, offload="cpu")
    run.steps(3).averaged.state_dict()  # waits
    for tensor in run.averaged["fast"].module.parameters():
        assert tensor.is_pinned()
    with unchanged(run.model), run.averaged["fast"].swapped_into(run.model):
        got = tensors_of(run.model)
    want = plainly(3, Schedule(0, 1), on="cuda", rules=SEVERAL)
    with want.averaged["fast"].swapped_into(want.model):
        assert differing(got, tensors_of(want.model)) == []


# Each gate sees its bug


def buffers_are_read_as_they_change(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module.StandIn, "take", lambda stand_in: stand_in._model)


def the_step_does_not_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(runners.InThread, "before_step", lambda runner: None)


@pytest.mark.parametrize(
    ("plant", "wrong"), [(buffers_are_read_as_they_change, "module.seen"), (the_step_does_not_wait, "weight")]
)
def test_the_gate_kills_the_bug(
    plant: Callable[[pytest.MonkeyPatch], None], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=wrong):
        test_a_forward_and_backward_run_beside_an_update("overlap", monkeypatch)
