"""Updates beside the training and captures of CUDA graphs, on a mock of the driver that allows no more than CUDA does.

``tests/test_cuda.py`` has the captures of updates, on the shim.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from swafast import FusedAveragedModel, FusedAverages
from swafast.backends import cpu
from swafast.loop import runners, stand_in
from swafast.op import buckets, launches, plan
from swafast.sharded.updating import AttachableShards
from swafast.terms import capturing
from swafast.terms.formats import FLOAT32
from swafast.terms.rules import EqualAverage
from tests.conftest import NO_LIBRARY, differing, tensors_of
from tests.stopped_training import WAYS
from tests.support import refused, step_with_ones

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{NO_LIBRARY}: {cpu.unavailable()}")

GLOBAL, RELAXED = 0, 2
TIMEOUT_S = 10.0


class Driver:
    """The driver of a GPU. In a capture of mode "global", no thread may ask or wait."""

    def __init__(self) -> None:
        self.capturing: int | None = None  # the thread that captures
        self.modes: dict[int, int] = {}
        self.events: list[Event] = []
        self.is_broken = False  # the capture
        self.asked = threading.Event()
        self.exchange_mode = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int))(self._exchange_mode)

    def _exchange_mode(self, mode: Any) -> int:
        me = threading.get_ident()
        before = self.modes.get(me, GLOBAL)
        self.modes[me], mode[0] = mode[0], before
        return 0

    def ask(self) -> None:
        """Be asked, or waited for, by the calling thread."""
        self.asked.set()
        if self.capturing is not None and self.modes.get(threading.get_ident(), GLOBAL) != RELAXED:
            self._refuse("operation not permitted when stream is capturing")

    def order(self) -> None:
        """Have a stream of the calling thread wait for work from before the capture."""
        if self.capturing == threading.get_ident():
            self._refuse("dependency created on uncaptured work in another stream")

    def _refuse(self, why: str) -> None:
        self.is_broken = True
        raise RuntimeError(why)

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.capturing, self.is_broken = threading.get_ident(), False
        try:
            yield
        finally:
            self.capturing = None
        assert not self.is_broken

    @contextmanager
    def capture_elsewhere(self) -> Iterator[None]:
        """Capture in another thread."""
        begun, over = threading.Event(), threading.Event()

        def capture() -> None:
            self.capturing, self.is_broken = threading.get_ident(), False
            begun.set()
            over.wait()
            self.capturing = None

        thread = threading.Thread(target=capture)
        thread.start()
        assert begun.wait(TIMEOUT_S)
        try:
            yield
        finally:
            over.set()
            thread.join()
        assert not self.is_broken


class Event:
    def __init__(self, driver: Driver, blocking: bool = False) -> None:
        self.driver, self.blocking, self.is_done = driver, blocking, threading.Event()
        driver.events.append(self)

    def query(self) -> bool:
        self.driver.ask()
        return self.is_done.is_set()

    def synchronize(self) -> None:
        assert self.blocking, "the thread would spin"
        self.driver.ask()
        assert self.is_done.wait(TIMEOUT_S)
        self.driver.ask()  # a capture may have begun meanwhile


class Stream:
    device = torch.device("cpu")

    def __init__(self, driver: Driver) -> None:
        self.driver, self.events = driver, [Event(driver)]

    def record_event(self, event: Event | None = None) -> Event:
        self.events.append(event or Event(self.driver))
        return self.events[-1]

    def wait_event(self, event: Event) -> None:
        self.driver.order()

    def wait_stream(self, other: Stream) -> None:
        self.driver.order()

    def finish(self) -> None:
        for event in self.events:
            event.is_done.set()

    def synchronize(self) -> None:
        self.driver.ask()
        self.finish()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(capturing, "_exchange_mode", lambda: made.exchange_mode)
    monkeypatch.setattr(capturing, "is_capturing", lambda _: made.capturing == threading.get_ident())
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Event(made, blocking))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(made))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    yield made
    for event in made.events:  # so that no thread of a failed test waits
        event.is_done.set()
    assert set(made.modes.values()) <= {GLOBAL}, "a thread has not got its mode back"


Made = tuple[Any, Any, runners.Runner, Stream]


def beside(way: str, driver: Driver) -> Made:
    """Return a model, its average, what updates it beside the next forward, and the stream that this uses."""
    model, side = nn.Linear(3, 4), Stream(driver)
    averaged = FusedAveragedModel(model)
    runner: Any
    if way == "overlap":
        runner = runners.OnStreams(averaged._beside(model), [side])  # type: ignore[list-item]
    else:
        ready = averaged._beside(model, torch.device("cpu"), [side])  # type: ignore[list-item]
        runner = runners.InThread(ready, [side], copies=True)  # type: ignore[list-item]
    averaged._guard._attachment = SimpleNamespace(settle=lambda action: runner.join())  # type: ignore[assignment]
    return model, averaged, runner, side


def test_the_thread_of_offload_waits_while_another_thread_captures(driver: Driver) -> None:
    _, averaged, runner, side = beside("offload", driver)
    runner.update()
    with driver.capture():
        assert driver.asked.wait(TIMEOUT_S)  # the thread waits for the copy
        side.finish()
        runner.wait(TIMEOUT_S)
    runner.close()
    assert averaged.n_averaged == 1


def test_steps_go_on_while_another_thread_captures(driver: Driver) -> None:
    _, averaged, runner, _ = beside("overlap", driver)
    runner.update()
    runner.update()
    with driver.capture_elsewhere():
        runner.before_step()
        runner.update()
        runner.close()
    assert averaged.n_averaged == 3


ACTS: dict[str, Callable[[Made], object]] = {
    "join": lambda made: made[2].join(),
    "step": lambda made: made[2].before_step(),
    "close": lambda made: made[2].close(),
    "state": lambda made: made[1].state_dict(),
    "update": lambda made: made[1].update_parameters(made[0]),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("way", ["overlap", "offload"])
def test_a_wait_is_refused_in_a_capture_until_the_update_has_ended(way: str, act: str, driver: Driver) -> None:
    made = model, averaged, runner, side = beside(way, driver)
    averaged.update_parameters(model)  # the first one of this tree is never captured
    runner.update()
    with driver.capture():
        told = r"the wait for an update that began before the capture .*synchronize\(\), then attachment.join\(\)"
        with pytest.raises(RuntimeError, match=told):
            ACTS[act](made)
    side.synchronize()
    runner.join()
    with driver.capture():
        ACTS[act](made)
    runner.close()


@pytest.mark.parametrize("way", ["overlap", "offload"])
def test_an_update_beside_the_step_is_not_captured(way: str, driver: Driver) -> None:
    _, averaged, runner, side = beside(way, driver)
    for _ in range(2):
        before = tensors_of(averaged)
        with driver.capture():
            told = r"an update beside the next forward .* must not be captured .*: detach the average, and capture"
            with refused(RuntimeError, told, averaged):
                runner.update()
        assert differing(tensors_of(averaged), before) == []
        side.finish()
        runner.update()
        side.finish()
        runner.join()
    runner.close()
    assert averaged.n_averaged == 2


def test_what_is_dropped_in_a_capture_waits_without_breaking_it(driver: Driver) -> None:
    _, averaged, runner, side = beside("overlap", driver)
    runner.update()
    with driver.capture():
        averaged._guard._attachment = None
        del runner
        gc.collect()
        assert side.events[-1].is_done.is_set(), "the memory of the update was held until here"


def test_offload_does_not_move_the_averages_in_a_capture(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 4)
    averaged = FusedAveragedModel(model)
    monkeypatch.setattr(averaged, "_gpus", lambda _: [torch.device("cuda", 0)])
    with driver.capture(), pytest.raises(RuntimeError, match="attach with offload, which moves the averages, must not"):
        runners.runner_for(averaged, model, False, "cpu")


# Tensors that move to another device while they are attached


@pytest.mark.parametrize("way", ["overlap", "offload"])
def test_updates_are_ordered_with_the_gpu_where_the_tensors_are_now(
    way: str, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, gpus, streams = nn.Linear(3, 4), [], []  # type: ignore[var-annotated]
    averaged, optimizer = FusedAveragedModel(model), torch.optim.SGD(model.parameters(), 1.0)

    def on(gpu: torch.device) -> Stream:
        streams.append(Stream(driver))
        streams[-1].device = gpu
        return streams[-1]

    monkeypatch.setattr(torch.cuda, "Stream", on)
    monkeypatch.setattr(averaged, "_gpus", lambda _: list(gpus))
    attachment = averaged.attach(optimizer, **WAYS[way])
    step_with_ones(optimizer, model.parameters())
    attachment.join()
    assert averaged.n_averaged == 1
    for index in (0, 0, 1):
        gpus[:] = [torch.device("cuda", index)]
        driver.asked.clear()
        step_with_ones(optimizer, model.parameters())
        side = streams[-1]
        assert side.device == gpus[0]
        assert len(streams) == 1 + index  # made when it moves, and then kept
        if way == "offload":
            assert driver.asked.wait(TIMEOUT_S), "the thread waits for the copy from that GPU"
            assert not attachment._runner._under_way.done()
            side.finish()
        else:
            assert attachment._runner._ended == [side.events[-1]]
        attachment.join()
        side.finish()
    gpus.clear()
    step_with_ones(optimizer, model.parameters())
    attachment.detach()
    assert type(attachment._runner) is runners.InThread
    assert averaged.n_averaged == 5
    assert len(streams) == 2


def test_the_gpus_of_an_update_are_those_of_params_buffers_and_averages() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    averaged = FusedAverages(model, rules={"a": EqualAverage()})
    assert averaged._gpus(model) == []
    on: list[Any] = [SimpleNamespace(device=torch.device("cuda", index)) for index in range(6)]
    model._parameters["w"], model[0]._buffers["seen"], model[0]._parameters["w"] = on[0], on[1], on[0]
    averaged["a"].module[0]._parameters["weight"], averaged["a"]._buffers["n_averaged"] = on[2], on[3]
    assert {*averaged._gpus(model)} == {each.device for each in on[:4]}
    side = SimpleNamespace(_stored=lambda: [(None, (on[4],))], n_averaged=on[5])
    assert AttachableShards._own_tensors(SimpleNamespace(_updated=[side])) == on[4:]  # type: ignore[arg-type]


def test_averages_that_leave_the_host_go_back_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 4)
    averaged, optimizer = FusedAveragedModel(model), torch.optim.SGD(model.parameters(), 1.0)
    attachment = averaged.attach(optimizer, offload="cpu")
    moved: list[object] = []
    monkeypatch.setattr(averaged, "_gpus", lambda _: [] if moved else [torch.device("cuda", 0)])
    monkeypatch.setattr(averaged, "_move_to_host", lambda: moved.append(averaged))
    monkeypatch.setattr(capturing, "is_capturing", lambda _: False)
    step_with_ones(optimizer, model.parameters())
    attachment.detach()
    assert moved == [averaged]
    assert averaged.n_averaged == 1


def test_only_copies_from_a_gpu_may_end_later(monkeypatch: pytest.MonkeyPatch) -> None:
    later: list[bool] = []
    monkeypatch.setattr(stand_in, "copy_into", lambda *_, non_blocking: later.append(non_blocking))
    stand_in.StandIn(nn.Linear(3, 4), torch.device("cpu")).take()
    assert later == [False, False]


def test_without_a_driver_there_is_no_mode_to_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # one that lacks the function
    capturing._exchange_mode.cache_clear()
    with capturing.allowed_to_wait():
        assert capturing._exchange_mode() is None
    capturing._exchange_mode.cache_clear()
    calls: list[object] = []
    monkeypatch.setattr(capturing, "_exchange_mode", lambda: lambda mode: calls.append(mode) or 3)  # not initialised
    with capturing.allowed_to_wait():
        pass
    assert len(calls) == 1


@pytest.mark.parametrize("at", ["param", "counter"])
@pytest.mark.parametrize(
    ("on_host", "works", "told"),
    [(True, 1, "an update of which a part runs on the host"), (False, 2, "nonfinite='skip' with several backends")],
)
def test_what_the_host_has_to_do_is_not_captured_wherever_the_gpu_is(
    at: str, on_host: bool, works: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, host = (SimpleNamespace(device=torch.device(kind)) for kind in ("cuda", "cpu"))
    param, counter = (gpu, host) if at == "param" else (host, gpu)
    pair: Any = SimpleNamespace(param=param, planes=(host,), format=FLOAT32)
    launch = SimpleNamespace(captured=False, update=lambda *_: pytest.fail("it ran"))
    work: Any = launches.Work(None, (0,), launch, is_on_host=on_host)  # type: ignore[arg-type]
    monkeypatch.setattr(launches, "prepare", lambda pairs, backends: [work] * works)
    monkeypatch.setattr(capturing, "is_capturing", lambda device: device.type == "cuda")
    made = plan.Launches([pair], [], [counter])  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match=f"{told}.* must not be captured in a CUDA graph"):
        made.update([], [], [EqualAverage()], skip_nonfinite=True)


# Pinned memory


class Pinned:
    """torch's allocator of pinned memory, which rounds every allocation up to a power of two."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes = 0
        self.addresses: list[range] = []
        empty = torch.empty

        def made(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            tensor = empty(*shape, **options)
            if pin_memory and tensor.nbytes:
                self.nbytes += 1 << (tensor.nbytes - 1).bit_length()
                self.addresses.append(range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
            return tensor

        monkeypatch.setattr(torch, "empty", made)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pytest.fail("each tensor alone"))

    def holds(self, tensor: torch.Tensor) -> bool:
        return any(tensor.data_ptr() in addresses for addresses in self.addresses)


def decoder() -> nn.Module:
    """Return a model whose tensors, each alone rounded up to a power of two, take 1.7 times their size."""
    layers = [nn.Sequential(nn.Linear(136, 408), nn.Linear(136, 136), nn.LayerNorm(136)) for _ in range(6)]
    return nn.Sequential(nn.Embedding(1100, 136), *layers, nn.BatchNorm1d(9)).bfloat16()


@pytest.mark.parametrize("kind", ["one", "several", "spread"])
def test_offload_takes_as_much_pinned_memory_as_the_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    rules = {"a": EqualAverage(), "b": EqualAverage()}
    deviations = 2 if kind == "spread" else None
    one = kind != "several"
    averaged: Any = FusedAveragedModel(model, deviations=deviations) if one else FusedAverages(model, rules=rules)
    several = [averaged] if one else [*averaged.values()]
    want, pinned = tensors_of(averaged), Pinned(monkeypatch)
    averaged._move_to_host()
    planes = [plane for each in several for _, _, planes in each._planes() for plane in planes]
    assert all(map(pinned.holds, planes))
    assert pinned.nbytes <= 1.05 * sum(plane.nbytes for plane in planes)
    assert differing(tensors_of(averaged), want) == []
    assert all(plane.untyped_storage().nbytes() == plane.nbytes for plane in planes)  # a pickle has no more
    before = pinned.nbytes
    made = stand_in.StandIn(model, torch.device("cpu"))
    copy = made.take()
    tensors = [*model.parameters(), *model.buffers()]
    assert pinned.nbytes - before <= 1.05 * sum(tensor.nbytes for tensor in tensors)
    assert all(map(pinned.holds, [*copy.parameters(), *copy.buffers()]))
    averaged.update_parameters(copy)
    assert all(map(pinned.holds, planes))  # they are at home there
    addresses = [param.data_ptr() for param in copy.parameters()]
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)
    again = made.take()
    assert [param.data_ptr() for param in again.parameters()] == addresses
    assert differing(tensors_of(again), tensors_of(model)) == []
    model[0].weight = nn.Parameter(torch.ones(7, 136))
    assert torch.equal(made.take().get_parameter("0.weight"), model[0].weight)


def test_averages_go_straight_into_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    averaged = FusedAveragedModel(model)
    planes = [plane for _, _, planes in averaged._planes() for plane in planes]
    pinned, copied, asked = Pinned(monkeypatch), 0, []  # type: ignore[var-annotated]

    def cpu_of(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal copied
        asked.append(tensor.data_ptr())
        copied += 0 if pinned.holds(tensor) else tensor.nbytes
        return tensor

    monkeypatch.setattr(torch.Tensor, "cpu", cpu_of)  # as it copies from a GPU
    averaged._move_to_host()
    assert copied < 0.01 * sum(plane.nbytes for plane in planes)
    assert {tensor.data_ptr() for tensor in (*averaged.parameters(), *averaged.buffers())} <= {*asked}
    taken: list[Any] = []
    monkeypatch.setattr(buckets, "_move", lambda _, likes: taken.extend(likes))
    on_meta = [plane.to("meta") for plane in planes]  # for those on a GPU
    buckets.pin(on_meta)
    assert {(like.device.type, like.pinned) for like in taken} == {("cpu", True)}


def test_a_grown_average_stays_in_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(30, 40)).bfloat16()
    averaged = FusedAveragedModel(model)
    averaged.update_parameters(model)
    pinned = Pinned(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: pinned.holds(tensor))
    averaged._move_to_host()
    grown = nn.Sequential(*model, nn.Linear(40, 3).bfloat16())
    averaged.adapt_to(grown)
    averaged.update_parameters(grown)
    assert all(map(pinned.holds, [plane for _, _, planes in averaged._planes() for plane in planes]))
