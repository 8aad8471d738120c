"""The acceptance kit: one set of tests for the `WeightAverage` of every framework.

A framework's test file implements `Framework.train` with the real package, and has a subclass of `Kit`, whose name
begins with Test. `plain.py` is an example: a loop in plain torch.

All train the same network on the same data. The network itself records what it has after each step of an optimizer, and
what each evaluated batch sees, so the kit knows what averages must be without trusting anything that it tests.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel
from tests.ranks import run_ranks

BATCH = 4
STEPS_PER_EPOCH = 4  # an epoch ends, is evaluated and is saved after each
EVAL_SAMPLES = 8  # in each evaluated set: two batches

State = dict[str, Tensor]


class EvaluationError(Exception):
    """What the network raises inside an evaluation if `Job.raises_at` says so."""


@dataclass(frozen=True)
class Job:
    """What a framework is to train.

    An epoch has `STEPS_PER_EPOCH` steps of Adam with `LEARNING_RATE`, constant; each step has `accumulation` batches of
    `BATCH` samples, in the order of the data or in any other that a resumed training keeps. There is no clipping and no
    mixed precision. After each epoch comes an evaluation of all sets, and then a checkpoint in `folder`.
    """

    folder: Path  # for checkpoints
    steps: int = 24  # of the optimizer, in all: those before a resume count
    resumes: Path | None = None  # the `folder` of a training that ended after `before` steps: go on from its end
    before: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)  # of WeightAverage
    installed: int = 1  # how many times to install WeightAverage
    dtype: torch.dtype = torch.float32
    accumulation: int = 1
    eval_sets: int = 1
    raises_at: int | None = None  # the evaluated batch, from 1, at which the network raises
    world: int = 1
    net_name: str = ""  # that of `Framework`

    @property
    def epochs(self) -> int:
        return self.steps // STEPS_PER_EPOCH

    def net(self) -> Net:
        """Return the network to train, always with the same values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = Net().to(self.dtype)
        watch = Watch.current
        assert watch is not None, "Job.net is called inside Framework.run"
        watch.net = net
        watch.steps = [whole_state(net)]
        return net

    def train_set(self) -> tuple[Tensor, Tensor]:
        """Return inputs (N, 4) and classes (N,) of one epoch of all ranks."""
        count = BATCH * STEPS_PER_EPOCH * self.accumulation * self.world
        made = torch.Generator().manual_seed(1)
        inputs = torch.randn(count, 4, generator=made)
        return inputs.to(self.dtype), (inputs.sum(1) > 0).long()

    def eval_set(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and classes of one evaluated set. The first input of a sample is its number."""
        made = torch.Generator().manual_seed(2 + index)
        inputs = torch.randn(EVAL_SAMPLES, 4, generator=made)
        inputs[:, 0] = torch.tensor(self.numbers(index), dtype=torch.float32)
        return inputs.to(self.dtype), (inputs[:, 1:].sum(1) > 0).long()

    def numbers(self, index: int) -> list[int]:
        return [100 * index + number for number in range(1, EVAL_SAMPLES + 1)]  # bfloat16 holds them exactly


LEARNING_RATE = 0.01
NAMES = ("first.weight", "first.bias", "second.weight", "second.bias", "batches")  # of the Net's tensors


class Net(nn.Module):
    """Two layers, and a buffer that counts training batches. Its forward returns logits (N, 2)."""

    batches: Tensor
    fsdp1: Callable[[], Any]  # a weak reference to the FSDP1 module around it, if there is one

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.batches += 1
        elif Watch.current is not None:
            Watch.current.see(self, inputs)
        logits: Tensor = self.second(torch.tanh(self.first(inputs)))
        return logits


def optimizer_of(params: Any) -> Optimizer:
    """Return the optimizer of every training."""
    return torch.optim.Adam(params, lr=LEARNING_RATE)


@dataclass
class Seen:
    """What an evaluated batch has seen."""

    step: int  # steps of the optimizer before
    numbers: list[int]  # of its samples
    state: State  # of the network


class Watch:
    """What the network of one training goes through."""

    current: ClassVar[Watch | None] = None

    def __init__(self, job: Job, is_told: bool = False) -> None:
        self.job, self.is_told = job, is_told
        self.net: Net | None = None
        self.steps: list[State] = []  # what the network had at first, and after each step
        self.seen: list[Seen] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        hook = register_optimizer_step_post_hook(self._after_step)
        Watch.current = self
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # else the threads of so small a network wait for each other most of the time
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            Watch.current = None
            hook.remove()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # torch's tools make an optimizer's state by a step with a learning rate of 0.
        rate = optimizer.param_groups[0].get("lr", 0)
        if self.net is not None and not self.is_told and float(rate) != 0:
            self.steps.append(whole_state(self.net))

    def note_step(self) -> None:
        """Record what the network has after a step, for a framework that `tells_steps`."""
        assert self.is_told
        assert self.net is not None
        self.steps.append(whole_state(self.net))

    def see(self, net: Net, inputs: Tensor) -> None:
        numbers = [round(number) for number in inputs[:, 0].tolist()]
        self.seen.append(Seen(self.job.before + len(self.steps) - 1, numbers, whole_state(net)))
        if len(self.seen) == self.job.raises_at:
            raise EvaluationError("the evaluation has raised, as it was told to")


@dataclass
class Report:
    """What a training has left. `Framework.train` fills in the first part."""

    model: State  # the user's model after the training: `whole_state` of its Net
    averaged: State | None = None  # averaged.state_dict(), of shards averaged.full_state_dict(); None without averages
    attachment: Mapping[str, Any] | None = None  # attachment.state_dict()
    exported: State | None = None  # what was written as the trained model, under the Net's names; None if nothing was
    saved: State | None = None  # of a training that raised: the model in the checkpoint that was written then

    job: Any = None
    steps: list[State] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    ranks: list[Report] = field(default_factory=list)


class Framework(ABC):
    """How one framework trains."""

    world = 1
    net_name = ""  # of the Net in the module that is averaged: random bits depend on the names of params
    #: Whether `train` calls `Watch.note_step` after each step of the optimizer: torch's hook comes before a framework
    #: has copied the new params into the network.
    tells_steps = False

    @abstractmethod
    def train(self, job: Job) -> Report:
        """Train, in this process or on this rank, and report the first part of `Report`.

        The network comes from ``job.net()``. If the evaluation raises an `EvaluationError`, catch it round the
        framework's own call, then report; a framework without a checkpoint on exceptions saves one where its users
        would. Let every other error through.
        """

    @abstractmethod
    def halve(self, folder: Path) -> None:
        """Remove the attachment's state, or another half of ours, from the last checkpoint in a folder."""

    # What the kit calls

    def run(self, job: Job) -> Report:
        job = replace(job, world=self.world, net_name=self.net_name)
        return self.watched(job) if self.world == 1 else self.run_on(self.world, job)

    def run_on(self, world: int, job: Job) -> Report:
        """Train on so many ranks: also on one with a group of processes."""
        job = replace(job, world=world, net_name=self.net_name)
        reports = run_ranks(world, functools.partial(self.watched, job))
        for report in reports[1:]:
            assert differing(report.model, reports[0].model) == []
        return replace(reports[0], ranks=reports)

    def watched(self, job: Job) -> Report:
        if dist.is_initialized():  # frameworks read what torchrun would have set
            rank, world = str(dist.get_rank()), str(dist.get_world_size())
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # unused: the group is there
        watch = Watch(job, self.tells_steps)
        with watch.watching(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = self.train(job)
        warned = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
        return replace(report, job=job, steps=watch.steps, seen=watch.seen, warned=warned)

    def refusal(self, job: Job) -> str:
        """Return the type and the message of the error with which a training ends; "" if it does not."""
        job = replace(job, world=self.world, net_name=self.net_name)
        refused = functools.partial(self._refused, job)
        return refused() if self.world == 1 else str(run_ranks(self.world, refused)[0])

    def _refused(self, job: Job) -> str:
        try:
            self.watched(job)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def whole_state(module: nn.Module) -> State:
    """Return copies of a Net's params and buffers, under its own names. Collective if they are sharded."""
    if any(hasattr(param, "ds_id") for param in module.parameters()):  # ZeRO-3 has freed it
        import deepspeed

        with deepspeed.zero.GatheredParameters([*module.parameters()]):
            return {name: _whole(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    root = getattr(module, "fsdp1", None)
    # In its forward, FSDP1 has gathered the params, as attributes alone. After it, they must be gathered again.
    is_whole = root is None or root().training_state.name != "IDLE"
    gathers = (
        contextlib.nullcontext() if is_whole else FullyShardedDataParallel.summon_full_params(root(), writeback=False)
    )
    with gathers:
        if root is not None:
            return {name: _whole(operator.attrgetter(name)(module)) for name in NAMES}
        tensors = [*module.named_parameters(), *module.named_buffers()]
        return {name: _whole(tensor) for name, tensor in tensors}


def of_net(state: Mapping[str, Any]) -> State:
    """Return the Net's tensors in a state of a model around it, under the Net's names."""
    with torch.random.fork_rng(devices=[]):
        names = [*Net().state_dict()]
    found: State = {}
    for key, value in state.items():
        for name in names:
            if key == name or key.endswith(f".{name}"):
                assert name not in found, f"{name} is in the state twice"
                found[name] = _whole(value)
    return found


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of what is in one state alone, or differs in a bit."""
    alike = {name for name in one.keys() & other.keys() if _equal(one[name], other[name])}
    return sorted((one.keys() | other.keys()) - alike)


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return bool(one == other)
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())


def evaluated_states(job: Job, steps: Sequence[State]) -> list[State]:
    """Return what an evaluation must see after each number of steps: the average, or the model if there is none yet.

    Args:
        steps: what the network had at first, and after each step of the whole training.
    """
    options = dict(job.options)
    rules = options.pop("rules", None)
    name = options.pop("evaluate", None)
    start, every = options.pop("start", 0), options.pop("every", 1)
    if rules is not None:
        options["rule"] = rules[name or next(iter(rules))]
    for own in ("copy_at_end", "sharded"):
        options.pop(own, None)
    model = Net().to(job.dtype)
    root = nn.ModuleDict({job.net_name: model}) if job.net_name else model
    averaged = FusedAveragedModel(root, **options)
    first = start or every
    states = []
    for step, state in enumerate(steps):
        for own, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.data.copy_(state[own])
        if step >= first and (step - first) % every == 0:
            averaged.update_parameters(root)
        with averaged.swapped_into(root) if int(averaged.n_averaged) else contextlib.nullcontext():
            states.append(whole_state(model))
    return states


def check_another_world(framework: Framework, folder: Path, before: int, after: int) -> None:
    """Check that an average goes on where a checkpoint of ``before`` ranks is resumed by ``after`` ranks."""
    options = {"rule": ExponentialAverage(0.8), "copy_at_end": False}
    first = framework.run_on(before, Job(folder / "first", 8, options=options))
    again = Job(folder / "again", 16, resumes=first.job.folder, before=8, options=options)
    second = framework.run_on(after, again)
    states = evaluated_states(second.job, first.steps + second.steps[1:])
    assert second.averaged is not None
    assert step_of(second) == int(second.averaged["n_averaged"]) == 16
    assert {seen.step for seen in second.seen} == {12, 16}
    for seen in second.seen:
        assert differing(seen.state, states[seen.step]) == [], seen.step
    assert differing(second.model, second.steps[-1]) == []
    assert second.exported is not None
    assert differing(second.exported, states[16]) == []


def others_average(job: Job) -> AveragedModel:
    """Return an average of torch of two models like the one that is trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        models = [nn.ModuleDict({job.net_name: Net()}) if job.net_name else Net() for _ in range(2)]
    other = AveragedModel(models[0])
    for model in models:
        other.update_parameters(model)
    return other


def check_taken_over(report: Report, before: Mapping[str, Any], count: int = 2) -> None:
    """Check that an average with ``ExponentialAverage(0.8)`` has gone on from what it took over.

    Args:
        count: models in what it took over.
    """
    assert report.averaged is not None
    assert int(report.averaged["n_averaged"]) == count + len(report.steps) - 1
    found = of_net(report.averaged)
    for name, value in of_net(before).items():
        if value.is_floating_point():
            expected = value.double()
            for step in report.steps[1:]:
                expected = 0.8 * expected + 0.2 * step[name].double()
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-7)


def step_of(report: Report) -> int:
    assert report.attachment is not None
    return int(report.attachment["step"])


AVERAGE = {"rule": ExponentialAverage(0.8), "copy_at_end": False}
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"options": AVERAGE},
    "exact": {"options": AVERAGE, "dtype": torch.bfloat16},
    "compact": {"options": {**AVERAGE, "format": "compact", "seed": 3}},
    "accumulation": {"options": AVERAGE, "accumulation": 2},
}
SEVERAL = {
    "rules": {"slow": ExponentialAverage(0.9), "mean": EqualAverage()},
    "evaluate": "mean",
    "copy_at_end": False,
}


class Resumes:
    """The tests of what a stop must not change. They run on several ranks too, if `framework.world` says so."""

    framework: ClassVar[Framework]
    kinds: ClassVar[Sequence[str]] = tuple(KINDS)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", self.kinds)

    @pytest.fixture(autouse=True)
    def _folders(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.new_folder = lambda: tmp_path_factory.mktemp("run")

    def trained(self, resumes: Report | None = None, **fields: Any) -> Report:
        """Return the report of a training; one with the same fields was made once for all tests of the class."""
        done: dict[str, Report] = type(self).__dict__.get("_done", {})
        type(self)._done = done  # type: ignore[attr-defined]
        key = repr((resumes and resumes.job, sorted(fields.items())))
        if key not in done:
            done[key] = self.framework.run(self.job(resumes, **fields))
        return done[key]

    def job(self, resumes: Report | None = None, **fields: Any) -> Job:
        fields = {"options": AVERAGE, **fields}
        if resumes is not None:
            fields |= {"resumes": resumes.job.folder, "before": resumes.job.steps}
        return Job(self.new_folder(), **fields)

    def stopped(self, **fields: Any) -> tuple[Report, Report]:
        """Return the reports of 8 steps, and of 16 that go on from them."""
        first = self.trained(steps=8, **fields)
        return first, self.trained(first, steps=24, **fields)

    def test_a_resumed_training_equals_one_without_a_stop(self, kind: str) -> None:
        whole = self.trained(**KINDS[kind])
        first, second = self.stopped(**KINDS[kind])
        assert (len(first.steps), len(second.steps), len(whole.steps)) == (9, 17, 25)
        for one, other in zip(whole.steps[1:], first.steps[1:] + second.steps[1:], strict=True):
            assert differing(one, other) == []
        assert whole.averaged is not None
        assert second.averaged is not None
        assert differing(second.model, whole.model) == []
        assert differing(second.averaged, whole.averaged) == []
        assert int(whole.averaged["n_averaged"]) == 24
        assert second.attachment == whole.attachment
        assert step_of(whole) == 24
        assert not [text for text in second.warned if text not in whole.warned]

    def test_the_model_trains_as_without_averages(self, kind: str) -> None:
        alone = self.trained(installed=0, **KINDS[kind])
        beside = self.trained(**KINDS[kind])
        for one, other in zip(alone.steps, beside.steps, strict=True):
            assert differing(one, other) == []
        assert differing(alone.model, beside.model) == []
        assert differing(beside.model, beside.steps[-1]) == []

    def test_every_evaluated_batch_sees_the_average(self, kind: str) -> None:
        self.check_seen(*self.stopped(**KINDS[kind]))

    def test_every_batch_of_two_sets_sees_the_average(self) -> None:
        self.check_seen(*self.stopped(eval_sets=2))

    def check_seen(self, first: Report, second: Report) -> None:
        states = evaluated_states(first.job, first.steps + second.steps[1:])
        for report in (first, second):
            for seen in report.seen:
                assert differing(seen.state, states[seen.step]) == [], (seen.step, seen.numbers)
            of_ranks = [seen for each in report.ranks or [report] for seen in each.seen]
            for step in range(report.job.before + STEPS_PER_EPOCH, report.job.steps + 1, STEPS_PER_EPOCH):
                numbers = {number for seen in of_ranks if seen.step == step for number in seen.numbers}
                assert numbers == {n for index in range(report.job.eval_sets) for n in report.job.numbers(index)}
                assert differing(states[step], (first.steps + second.steps[1:])[step]) != []

    def test_what_is_exported_is_the_average(self) -> None:
        for report in self.stopped():
            state = evaluated_states(report.job, self.trained().steps)[report.job.steps]
            assert report.exported is not None
            assert differing(report.exported, state) == []

    def test_the_model_has_the_average_at_the_end(self) -> None:
        first, second = self.stopped(options={"rule": ExponentialAverage(0.8)})
        states = evaluated_states(first.job, first.steps + second.steps[1:])
        assert differing(first.model, states[8]) == []
        assert differing(second.model, states[24]) == []
        for one, other in zip(self.trained().steps[9:], second.steps[1:], strict=True):
            assert differing(one, other) == []

    def test_an_error_in_an_evaluation_leaves_the_params(self) -> None:
        report = self.trained(raises_at=3)
        assert 0 < len(report.steps) - 1 < 24
        trained = report.steps[-1]
        assert differing(report.seen[-1].state, trained) != []  # it was on the average
        assert differing(report.model, trained) == []
        assert report.saved is not None
        assert differing(report.saved, trained) == []
        again = self.trained(steps=len(report.steps) - 1)
        assert report.averaged is not None
        assert again.averaged is not None
        assert differing(report.averaged, again.averaged) == []


class Shorter(Resumes):
    """What checkpoints and wrappers may change; each test starts ranks."""

    test_the_model_trains_as_without_averages = None  # type: ignore[assignment]
    test_every_batch_of_two_sets_sees_the_average = None  # type: ignore[assignment]
    test_the_model_has_the_average_at_the_end = None  # type: ignore[assignment]


class Shards:
    """The tests of checkpoints of another number of ranks, and of averages of another tool."""

    resumes: ClassVar[Sequence[type[Framework]]]
    takers: ClassVar[Sequence[type[Framework]]]  # take over `others_average`, as the page on migration says

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name in {"resume", "taker"} & {*metafunc.fixturenames}:
            metafunc.parametrize(name, {"resume": self.resumes, "taker": self.takers}[name])

    @pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
    def test_they_go_on_on_another_number_of_ranks(
        self, resume: type[Framework], before: int, after: int, tmp_path: Path
    ) -> None:
        check_another_world(resume(), tmp_path, before, after)

    def test_they_take_over_an_average_of_torch(self, taker: type[Framework], tmp_path: Path) -> None:
        report = taker().run(Job(tmp_path, 8, options={"rule": ExponentialAverage(0.8)}))
        check_taken_over(report, others_average(report.job).state_dict())


class ResumesWithoutOptimizer(Resumes):
    """The tests for frameworks that lose the optimizer's own state at a resume, also without averages."""

    test_a_resumed_training_equals_one_without_a_stop = None  # type: ignore[assignment]
    test_the_model_has_the_average_at_the_end = None  # type: ignore[assignment]
    test_what_is_exported_is_the_average = None  # type: ignore[assignment]

    def test_the_average_goes_on_from_its_checkpoint(self) -> None:
        first, second = self.stopped(options={"rule": ExponentialAverage(0.8)})
        states = evaluated_states(first.job, first.steps + second.steps[1:])
        for report in (first, second):
            assert report.exported is not None
            assert differing(report.exported, states[report.job.steps]) == []
            assert differing(report.model, states[report.job.steps]) == []
            assert report.averaged is not None
            assert step_of(report) == int(report.averaged["n_averaged"]) == report.job.steps


class Kit(Resumes):
    """All tests of the kit."""

    def test_the_average_is_right(self) -> None:
        report = self.trained(options={"rule": EqualAverage(), "start": 5, "every": 3, "copy_at_end": False})
        assert report.averaged is not None
        assert int(report.averaged["n_averaged"]) == 7
        for name, value in of_net(report.averaged).items():
            if value.is_floating_point():
                mean = torch.stack([report.steps[step][name].double() for step in range(5, 25, 3)]).mean(0)
                torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)

    def test_an_average_that_starts_too_late_leaves_the_model(self) -> None:
        late = self.trained(options={"rule": ExponentialAverage(0.8), "start": 100})
        alone = self.trained(installed=0)
        assert late.averaged is not None
        assert int(late.averaged["n_averaged"]) == 0
        assert differing(late.model, alone.model) == []
        assert late.exported is None or differing(late.exported, alone.model) == []
        told = [text for text in late.warned if "no update" in text]
        assert told == ["no update was made: start=100, and the training had 24 steps"]
        assert len(late.seen) == len(alone.seen) > 0
        for one, other in zip(late.seen, alone.seen, strict=True):
            assert differing(one.state, other.state) == []

    def test_a_resumed_average_that_starts_late_is_as_without_a_stop(self) -> None:
        options = {"rule": ExponentialAverage(0.8), "start": 11, "every": 2, "copy_at_end": False}
        whole = self.trained(options=options)
        first, second = self.stopped(options=options)
        assert first.averaged is not None
        assert second.averaged is not None
        assert whole.averaged is not None
        assert int(first.averaged["n_averaged"]) == 0
        assert int(whole.averaged["n_averaged"]) == 7
        assert differing(second.averaged, whole.averaged) == []
        states = evaluated_states(first.job, whole.steps)
        for seen in first.seen + second.seen:
            assert differing(seen.state, states[seen.step]) == [], seen.step

    def test_a_resumed_training_takes_the_schedule_of_its_arguments(self) -> None:
        mean = {"rule": EqualAverage(), "copy_at_end": False}
        first = self.trained(steps=8, options={**mean, "start": 2, "end": 8})
        second = self.trained(first, options={**mean, "start": 12, "every": 3, "duration": 24})
        assert second.averaged is not None
        assert second.attachment is not None
        assert second.attachment["schedule"] == {"start": 12, "every": 3, "end": 24}
        assert step_of(second) == 24
        assert int(second.averaged["n_averaged"]) == 7 + 5
        states = first.steps[:9] + second.steps[1:]
        for name, value in of_net(second.averaged).items():
            if value.is_floating_point():
                expected = torch.stack([states[step][name].double() for step in (*range(2, 9), *range(12, 25, 3))])
                torch.testing.assert_close(value.double(), expected.mean(0), rtol=1e-6, atol=1e-7)
        warned = [text for text in second.warned if text not in self.stopped()[1].warned]
        assert len(warned) == 1, warned
        assert warned[0].startswith("the checkpoint has Schedule(start=2, every=1, end=8), but this training's")
        assert "give Schedule(start=12, every=3, end=24): that is used" in warned[0]

    def test_a_resume_after_the_end_of_the_averages_says_so(self) -> None:
        ended = {"options": {**AVERAGE, "end": 8}}
        warned = self.trained(self.trained(steps=8, **ended), **ended).warned
        told = [text for text in warned if "no update" in text]
        assert len(told) == 1, warned
        assert told[0].startswith("no update was made: end=8, and the training had 24 steps, 8 of them before. ")

    def test_a_resume_with_another_decay_is_silent(self) -> None:
        usual, first = self.stopped()[1].warned, self.trained(steps=8)
        second = self.trained(first, options={**AVERAGE, "rule": ExponentialAverage(0.9)})
        assert [text for text in second.warned if text not in usual] == []
        assert step_of(second) == 24

    def test_one_of_several_averages_is_evaluated(self) -> None:
        whole = self.trained(options=SEVERAL)
        first, second = self.stopped(options=SEVERAL)
        self.check_seen(first, second)
        assert whole.averaged is not None
        assert second.averaged is not None
        assert differing(second.averaged, whole.averaged) == []
        assert whole.exported is not None
        assert differing(whole.exported, evaluated_states(whole.job, whole.steps)[24]) == []

    def test_a_checkpoint_without_averages_begins_a_fresh_one(self) -> None:
        first = self.trained(steps=8, installed=0)
        second = self.trained(first, steps=24)
        usual = self.stopped()[1]
        warned = [text for text in second.warned if text not in usual.warned]
        assert len(warned) == 1, warned
        assert "no averages" in warned[0]
        assert second.averaged is not None
        assert int(second.averaged["n_averaged"]) == 16
        assert step_of(second) == 24
        for one, other in zip(second.steps[1:], self.trained(installed=0).steps[9:], strict=True):
            assert differing(one, other) == []

    def test_half_a_state_is_refused(self) -> None:
        first = self.framework.run(self.job(steps=8))
        self.framework.halve(first.job.folder)
        refusal = self.framework.refusal(self.job(first))
        assert refusal.startswith(("ValueError", "RuntimeError")), refusal
        assert "got none of" in refusal

    def test_a_state_of_several_is_refused_by_one(self) -> None:
        first = self.trained(steps=8, options=SEVERAL)
        refusal = self.framework.refusal(self.job(first))
        assert refusal.startswith(("ValueError", "RuntimeError")), refusal

    def test_a_second_installation_is_refused(self) -> None:
        refusal = self.framework.refusal(self.job(installed=2))
        assert refusal.startswith("ValueError: only one WeightAverage"), refusal
