"""An average that runs forward in each step: the teacher of BYOL, DINO, I-JEPA and Mean Teacher."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from swafast import ExponentialAverage, FusedAveragedModel, FusedAverages
from swafast.backends import cpu
from swafast.loop import runners, waiting
from tests.conftest import NO_LIBRARY

RULE = ExponentialAverage(0.6, schedule="cosine", updates=50)
IMAGES = torch.linspace(-1, 1, 6 * 8).view(6, 8)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def teacher_of(student: nn.Module, **options: Any) -> FusedAveragedModel:
    return FusedAveragedModel(student, rule=RULE, num_averaged=1, **options).requires_grad_(False)


def step(student: nn.Module, by: float = 0.05) -> None:
    with torch.no_grad():
        for param in student.parameters():
            param.add_(by)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*script_method", category=DeprecationWarning)
        yield


# A step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_moves_no_memory_and_plans_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Encoder().to(dtype)
    teacher = teacher_of(student)
    images = IMAGES.to(dtype)
    params = [*teacher.module.parameters()]
    assert {param.dtype for param in params} == {dtype}
    before = [(id(param), param.data_ptr()) for param in params]
    teacher.update_parameters(student)
    plan = teacher._bind(student)[0]
    for _ in range(3):
        with torch.no_grad():
            outputs = teacher(images)
        step(student)
        teacher.update_parameters(student)
        assert teacher._bind(student)[0] is plan
    # What runs is the average itself: in bfloat16 the plane of `exact`, and not a cast of it.
    assert [(id(param), param.data_ptr()) for param in teacher.module.parameters()] == before
    assert outputs.dtype == dtype
    assert not outputs.requires_grad


def test_modes_and_flags_are_the_teachers_own() -> None:
    student = Encoder().train()
    teacher = teacher_of(student).eval()
    for _ in range(2):
        teacher.update_parameters(student)
        teacher(IMAGES)
    assert [student.training, teacher.training, teacher.module.head[0].training] == [True, False, False]
    student.eval()
    teacher.train().update_parameters(student)
    assert [student.training, teacher.module.head[0].training] == [False, True]
    with teacher.swapped_into(student):
        assert not any(param.requires_grad for param in teacher.parameters())
        assert all(param.requires_grad for param in student.parameters())
    teacher.load_state_dict(teacher.state_dict())
    for each in (teacher, copy.deepcopy(teacher), teacher.double()):
        assert not any(param.requires_grad for param in each.parameters())


def test_statistics_are_the_students_after_each_update() -> None:
    student = Encoder().train()
    teacher = teacher_of(student).train()
    student(IMAGES)
    teacher(IMAGES + 5)
    running = [each.backbone[1].running_mean for each in (student, teacher.module)]
    assert not torch.equal(*running)
    teacher.update_parameters(student)
    assert torch.equal(*running)


def test_a_loss_may_be_differentiated_after_the_update_but_not_through_the_teacher() -> None:
    student = Encoder().eval()
    teacher = teacher_of(student)
    expected = None
    for updates in (False, True):
        loss = (student(IMAGES) - teacher(IMAGES)).square().mean()
        if updates:
            teacher.update_parameters(student)
        student.zero_grad()
        loss.backward()
        grads = [param.grad.clone() for param in student.parameters() if param.grad is not None]
        expected = expected or grads
        assert grads
        assert all(map(torch.equal, grads, expected))
    # A graph through the teacher needs its old values. Autograd sees that they are gone.
    loss = (student(IMAGES) - teacher.requires_grad_()(IMAGES)).square().mean()
    teacher.update_parameters(student)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_keeps_no_cast_of_a_frozen_teacher() -> None:
    student = Encoder().eval()
    teacher = teacher_of(student).eval()
    with torch.autocast("cpu", torch.bfloat16):
        before = teacher(IMAGES)
        step(student, by=1.0)
        teacher.update_parameters(student)
        after = teacher(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, teacher(IMAGES))
    assert not torch.equal(before, after)


# Compiled


@pytest.mark.parametrize("way", ["compile()", "method", "module", "overlap"])
def test_a_compiled_teacher_is_one_graph_and_sees_every_update(way: str) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    student = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))  # dynamo compiles no forward of torch's own
    teacher = teacher_of(student).eval()
    sgd = torch.optim.SGD(student.parameters(), 0.5)
    attachment = teacher.attach(sgd, step=0, overlap=way == "overlap")
    if way == "method":
        teacher.compile(backend=counter)
    run: Any = teacher
    if way != "method":
        run = torch.compile(teacher.module if way == "module" else teacher, backend=counter)
    for _ in range(3):
        assert torch.equal(run(IMAGES), teacher.module(IMAGES))
        student(IMAGES).square().mean().backward()
        sgd.step()
    attachment.detach()
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_a_compiled_teacher_is_refused_while_swapped() -> None:
    torch.compiler.reset()
    student = Encoder().eval()
    teacher = teacher_of(student).eval()
    run = torch.compile(teacher, backend=CompileCounter())
    run(IMAGES)
    with teacher.swapped_into(student), pytest.raises(RuntimeError, match="forward must wait until the averages"):
        run(IMAGES)
    torch.compiler.reset()


def test_a_forward_that_dynamo_cannot_trace_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: FusedAveragedModel, *args: Any) -> Any:
        self._prepare_forward()
        return self.module(*args)  # by a __getattr__ of ours

    monkeypatch.setattr(FusedAveragedModel, "forward", forward)
    with pytest.raises(AssertionError):
        test_a_compiled_teacher_is_one_graph_and_sees_every_update("compile()")


# Beside the next forward


class Late:
    """Holds each update in its thread back until somebody waits for it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.waited = threading.Event()
        run, join, wait = runners.InThread._run, runners.InThread.join, runners.InThread.wait

        def late(runner: runners.InThread, *arguments: Any) -> None:
            assert self.waited.wait(60)
            self.waited.clear()
            run(runner, *arguments)

        def let_go(runner: runners.InThread) -> None:
            if runner._under_way is not None and not runner._under_way.done() and not runner.is_worker():
                self.waited.set()

        def joining(runner: runners.InThread) -> None:
            let_go(runner)
            join(runner)

        def waiting(runner: runners.InThread, timeout: float | None = None) -> None:
            let_go(runner)
            wait(runner, timeout)

        patch.setattr(runners.InThread, "_run", late)
        patch.setattr(runners.InThread, "join", joining)
        patch.setattr(runners.InThread, "wait", waiting)


WAYS = {
    "averaged": lambda teacher: teacher,
    "module": lambda teacher: teacher.module,
    "backbone": lambda teacher: teacher.module.backbone,
    "layer": lambda teacher: teacher.module.backbone[0],
}


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{NO_LIBRARY}: {cpu.unavailable()}")
@pytest.mark.parametrize("way", WAYS)
def test_a_forward_never_reads_an_update_under_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    late, student = Late(monkeypatch), Encoder().eval()
    plain, beside = teacher_of(student).eval(), teacher_of(student).eval()
    sgd = torch.optim.SGD(student.parameters(), 0.5)
    run = WAYS[way](beside)
    attachments = [plain.attach(sgd, name="plain", step=0), beside.attach(sgd, name="beside", step=0, overlap=True)]
    try:
        for _ in range(2):
            student(IMAGES).square().mean().backward()
            sgd.step()
            outputs = run(IMAGES)
            assert torch.equal(outputs, WAYS[way](plain)(IMAGES))
            assert late.waited.is_set() is False
    finally:
        for attachment in attachments:
            attachment.detach()
    assert not any(part._forward_pre_hooks for part in beside.modules())


def test_a_module_that_does_not_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting.Wait, "__call__", lambda self, *_: None)
    with pytest.raises(AssertionError):
        test_a_forward_never_reads_an_update_under_way("backbone", monkeypatch)


class Pair(nn.Module):
    """A student, and its teacher beside it in one module, as many trainings have them."""

    def __init__(self, *, has_hook: bool = False) -> None:
        super().__init__()
        linear = nn.Linear(8, 4)
        self.student = nn.Sequential(nn.utils.spectral_norm(linear) if has_hook else linear).eval()
        self.teacher = teacher_of(self.student)


def _copied(values: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}


def _loaded(pair: Pair, _: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    other = Pair().state_dict()
    pair.load_state_dict(other)
    return _copied(pair.teacher.state_dict())


def _averaged(average: FusedAveragedModel, model: nn.Module) -> dict[str, Tensor]:
    average.update_parameters(model)
    return _copied(average.state_dict())


def _overwritten(pair: Pair, averages: dict[str, FusedAveragedModel]) -> dict[str, Tensor]:
    averages["part"].copy_to(pair.teacher.module)
    return _copied(pair.teacher.state_dict())


#: What waits for the update of a teacher, by whatever module it is reached. Averages of part and whole are there.
REACHED: dict[str, Any] = {
    "a hook of torch's": lambda pair, _: {"": pair.teacher.module[0](IMAGES)},
    "a load of the whole": _loaded,
    "an average of the average": lambda pair, averages: _averaged(averages["part"], pair.teacher.module),
    "an average of the whole": lambda pair, averages: _averaged(averages["whole"], pair),
    "a copy into the average": _overwritten,
}


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{NO_LIBRARY}: {cpu.unavailable()}")
@pytest.mark.parametrize("way", REACHED)
def test_whoever_reaches_a_teacher_waits(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Late(monkeypatch)
    found = []
    for overlap in (False, True):
        torch.manual_seed(4)
        pair = Pair(has_hook=way == "a hook of torch's")
        sgd = torch.optim.SGD(pair.student.parameters(), 0.5)
        averages = {"part": teacher_of(pair.student), "whole": FusedAveragedModel(pair, rule=RULE, num_averaged=1)}
        attachment = pair.teacher.attach(sgd, step=0, overlap=overlap)
        pair.student(IMAGES).square().mean().backward()
        sgd.step()
        result = REACHED[way](pair, averages)
        assert not attachment.is_under_way
        found.append((result, _copied(pair.teacher.state_dict())))
        attachment.detach()
    for plain, beside in zip(*found, strict=True):
        assert [name for name, value in plain.items() if not torch.equal(value, beside[name])] == []


def test_an_overlapped_average_of_a_module_with_a_teacher_in_it_warns() -> None:
    pair = Pair()
    sgd = torch.optim.SGD(pair.student.parameters(), 0.5)
    with pytest.warns(UserWarning, match="model has an averaged model in it, 'teacher'"):
        FusedAveragedModel(pair).attach(sgd, pair, overlap=True).detach()


def test_scripting_an_overlapped_teacher_says_what_to_do() -> None:
    student = Encoder()
    sgd = torch.optim.SGD(student.parameters(), 0.5)
    teacher = teacher_of(student)
    with teacher.attach(sgd, step=0, overlap=True), pytest.raises(AttributeError, match=r"call attachment\.detach\(\)"):
        torch.jit.script(teacher.module)
    torch.jit.script(teacher.module)


def hooks_of(teachers: FusedAverages) -> list[int]:
    """How many hooks each part has, of those that have tensors; the others need none."""
    parts = [part for teacher in teachers.values() for part in teacher.module.modules()]
    return [len(part._forward_pre_hooks) for part in parts if [*part.parameters(), *part.buffers()]]


def test_several_teachers_and_a_grown_one_wait() -> None:
    student = Encoder()
    sgd = torch.optim.SGD(student.parameters(), 0.5)
    teachers = FusedAverages(student, rules={"slow": RULE, "fast": ExponentialAverage(0.5)})
    attachment = teachers.attach(sgd, overlap=True)
    assert hooks_of(teachers) == [1] * 2 * 6
    before = teachers["slow"].module
    student.head.append(nn.Linear(4, 4))
    teachers.adapt_to(student)
    assert hooks_of(teachers) == [1] * 2 * 7
    assert not any(part._forward_pre_hooks for part in before.modules())
    copied = pickle.loads(pickle.dumps(teachers))
    del copied["slow"].module.head[2]
    copied["slow"](IMAGES)  # a copy's hooks wait for nobody
    attachment.detach()


# Rules


def mean_teachers_decay(updates: int) -> float:
    return min(1 - 1 / (updates + 1), 0.99)  # of the authors' code, whose first update is 1


@pytest.mark.parametrize(
    ("rule", "decay_of"),
    [
        (ExponentialAverage(0.99, warmup="power", inv_gamma=1.0, power=1.0), mean_teachers_decay),
        (ExponentialAverage(0.996, schedule="linear", updates=300), lambda n: 0.996 + n * (1.0 - 0.996) / 300),
    ],
    ids=["Mean Teacher", "I-JEPA"],
)
def test_the_teachers_of_other_papers(rule: ExponentialAverage, decay_of: Any) -> None:
    assert [1 - rule.weight(n) for n in range(1, 300)] == pytest.approx([decay_of(n) for n in range(1, 300)], abs=1e-12)


def test_a_teacher_that_counts_as_a_model_warns_of_nothing() -> None:
    student = Encoder()
    sgd = torch.optim.SGD(student.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher = teacher_of(student)
        attachment = teacher.attach(sgd, step=0)
        teacher(IMAGES)
        student(IMAGES).sum().backward()
        sgd.step()
    attachment.detach()
    # The first update of torch's class copies: the teacher would be the student of the first step.
    assert not torch.equal(teacher.module.head[1].weight, student.head[1].weight)
    with pytest.warns(UserWarning, match="holds no model yet"):
        FusedAveragedModel(student, rule=RULE)(IMAGES)
