"""The memory of an update under way beside the next forward: nobody else gets it before the update has ended."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from swafast import ExponentialAverage, FusedAveragedModel, FusedAverages, ShardedAveragedModel
from swafast.backends import cpu
from swafast.loop import attachment, runners, stand_in
from swafast.loop.attach import Attachable
from tests.conftest import NO_LIBRARY
from tests.support import step_with_ones

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{NO_LIBRARY}: {cpu.unavailable()}")

BLOCK_NBYTES, NUM_BLOCKS = 4096, 256


class Block(ctypes.c_char * BLOCK_NBYTES):  # type: ignore[misc]
    """The memory of one tensor, from the arena."""


class Arena:
    """The memory of a GPU. As by torch's allocator, what is freed is handed out again, to the main stream at once."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(BLOCK_NBYTES * NUM_BLOCKS)
        self._start = ctypes.addressof(self._memory)
        self.free = set(range(NUM_BLOCKS))

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        index = min(self.free)
        self.free.remove(index)
        block = Block.from_buffer(self._memory, index * BLOCK_NBYTES)
        weakref.finalize(block, self.free.add, index)
        return torch.frombuffer(block, dtype=dtype, count=max(1, shape.numel()))[: shape.numel()].view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def block_of(self, address: int) -> int:
        assert 0 <= address - self._start < BLOCK_NBYTES * NUM_BLOCKS, "all that an update uses is in the arena"
        return (address - self._start) // BLOCK_NBYTES

    def overwrite_free(self) -> None:
        """Write, as others do, into all memory that is free."""
        for index in self.free:
            ctypes.memset(self._start + index * BLOCK_NBYTES, 0xAB, BLOCK_NBYTES)

    def is_overwritten(self) -> bool:
        blocks = (self._memory[index * BLOCK_NBYTES : (index + 1) * BLOCK_NBYTES] for index in self.free)
        return all(block == b"\xab" * BLOCK_NBYTES for block in blocks)


class Event:
    is_done = False

    def query(self) -> bool:
        return self.is_done


class Stream:
    """A stream of a GPU that does its work when the host asks for the end of it, and not before."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.work: list[tuple[set[int], Callable[[], object]]] = []  # blocks that it uses, and what it does

    def synchronize(self) -> None:
        while self.work:
            self.work.pop(0)[1]()

    def record_event(self) -> Event:
        event = Event()
        self.work.append((set(), lambda: setattr(event, "is_done", True)))
        return event

    def wait_stream(self, other: Stream) -> None:
        assert not other.work

    def wait_event(self, event: Event) -> None:
        """Wait as the main stream: what it does then comes at once in these tests, so the event must be done."""
        while not event.is_done:
            SIDE.work.pop(0)[1]()


SIDE, MAIN = Stream(), Stream()


class Run:
    """A training on an arena, with updates on a side stream."""

    def __init__(self, arena: Arena, kind: str, dtype: torch.dtype) -> None:
        model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).to(dtype)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = arena.copy(tensor.data)
        if kind == "several":
            averaged: Any = FusedAverages(model, rules={"a": ExponentialAverage(0.5), "b": ExponentialAverage(0.5)})
        else:
            if kind == "sharded":
                dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            made: Any = ShardedAveragedModel if kind == "sharded" else FusedAveragedModel
            averaged = made(model, rule=ExponentialAverage(0.5))
        for each in averaged.values() if kind == "several" else [averaged]:
            buffers = each.module.buffers() if hasattr(each, "module") else ()
            for tensor in (each.n_averaged, *buffers):
                tensor.data = arena.copy(tensor.data)
        self.model, self.averaged = model, averaged
        self.one = averaged["b"] if kind == "several" else averaged
        self.optimizer = torch.optim.SGD(model.parameters(), 0.1)
        self.attachment = averaged.attach(self.optimizer, overlap=True)

    def step(self, value: float) -> None:
        self.model.requires_grad_()
        step_with_ones(self.optimizer, self.model.parameters())
        assert SIDE.work, "the update is under way"

    def average(self) -> Tensor:
        state = self.averaged.full_state_dict() if hasattr(self.averaged, "full_state_dict") else None
        return (state or self.one.state_dict())["module.0.weight"]


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch) -> Iterator[Arena]:
    """An arena from which all tensors come, and updates on the side stream: under way until somebody waits."""
    made, current, run = Arena(), [MAIN], cpu.NativeLaunch._run
    empty, empty_like, cut_chunks = torch.empty, torch.empty_like, cpu.cut_chunks

    def in_arena(*shape: Any, **options: Any) -> Tensor:
        plain = empty(*shape, **options)
        return made.empty(plain.shape, plain.dtype) if plain.numel() and not plain.is_meta else plain

    def like_in_arena(tensor: Tensor, **options: Any) -> Tensor:
        plain = empty_like(tensor, **options)
        return made.empty(plain.shape, plain.dtype) if plain.numel() and not plain.is_meta else plain

    def launch(native: Any, update: Any, paces: Any) -> None:
        if current[-1] is MAIN:
            run(native, update, paces)
            return
        rows, table, advance = native._tensors, native._table, update.advance  # and none of the tensors
        addresses = {row.param for row in rows} | {plane for row in rows for plane in row.planes if plane}
        addresses |= {pace.num_averaged for pace in paces} | {table[2]}
        kernel, used = native._native.swafast_cpu_update, {made.block_of(address) for address in addresses}
        SIDE.work.append((used, lambda: (rows, kernel(*table, paces, len(paces), advance, 1))))

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch, "empty", in_arena)
    monkeypatch.setattr(torch, "empty_like", like_in_arena)
    monkeypatch.setattr(cpu, "cut_chunks", lambda *args: made.copy(cut_chunks(*args)))
    monkeypatch.setattr(cpu.NativeLaunch, "_run", launch)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(
        attachment, "runner_for", lambda averaged, model, *_: runners.OnStreams(averaged._beside(model), [SIDE])
    )
    monkeypatch.setattr(Attachable, "_gpus", lambda *_: [SIDE.device])
    yield made
    SIDE.work.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def others_use_what_is_free(arena: Arena) -> None:
    """Have others take all free memory, then let the side stream end, which must not have written there."""
    in_use = set().union(*(used for used, _ in SIDE.work))
    assert in_use.isdisjoint(arena.free), "handed out while an update uses it"
    arena.overwrite_free()
    free = set(arena.free)
    SIDE.synchronize()
    arena.free, now = free, arena.free
    assert arena.is_overwritten()
    arena.free = now


KINDS = ("one", "several", "sharded")


@pytest.mark.parametrize(
    ("kind", "dtype"), [("one", torch.float32), ("several", torch.bfloat16), ("sharded", torch.bfloat16)]
)
def test_all_may_be_dropped_after_the_last_step(kind: str, dtype: torch.dtype, arena: Arena) -> None:
    run = Run(arena, kind, dtype)
    run.step(1.0)
    run.step(2.0)
    del run
    gc.collect()
    others_use_what_is_free(arena)
    assert len(arena.free) == NUM_BLOCKS  # nothing is held for good


def move_the_params(run: Run) -> None:
    for param in run.model.parameters():
        param.data = param.data + 9.0


def move_buffers_and_counter(run: Run) -> None:
    for buffer in run.model.buffers():
        buffer.data = buffer.data + 9
    run.one.n_averaged = run.one.n_averaged + 9


def drop_the_plans(run: Run) -> None:
    run.averaged._bindings._recent.clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", [move_the_params, move_buffers_and_counter, drop_the_plans])
def test_what_an_update_uses_may_move_meanwhile(kind: str, act: Callable[[Run], None], arena: Arena) -> None:
    run = Run(arena, kind, torch.float32)
    run.step(1.0)
    first = run.model[0].weight.detach().clone()
    run.step(2.0)
    want = torch.lerp(first, run.model[0].weight.detach(), 0.5)
    act(run)
    others_use_what_is_free(arena)
    torch.testing.assert_close(run.average(), want, rtol=0, atol=0)
    run.attachment.detach()
    assert not run.attachment._runner._in_flight


def test_memory_is_held_no_longer_than_the_update_takes(arena: Arena) -> None:
    run = Run(arena, "one", torch.float32)
    for step in range(5):
        run.step(float(step))
        assert len(run.attachment._runner._in_flight) == 1  # the host waits for none, and holds what is under way
    SIDE.synchronize()
    run.attachment.join()
    assert not run.attachment._runner._in_flight


def test_an_update_that_fails_holds_nothing_for_good(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(arena, "one", torch.float32)
    run.step(1.0)
    run.averaged.nonfinite = "raise"
    monkeypatch.setattr(FusedAveragedModel, "update_parameters", lambda *_: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            step_with_ones(run.optimizer, run.model.parameters())
    SIDE.synchronize()
    run.attachment.join()
    assert not run.attachment._runner._in_flight


@pytest.mark.parametrize("way", ["overlap", "offload"])
@pytest.mark.parametrize("kind", ["one", "several"])
def test_a_thread_holds_what_its_update_uses(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 8)
    rules = {"a": ExponentialAverage(0.5)}
    averaged: Any = FusedAveragedModel(model) if kind == "one" else FusedAverages(model, rules=rules)
    begun, let_go = threading.Event(), threading.Event()

    def wait_for_it() -> None:
        begun.set()
        assert let_go.wait(60)

    if way == "offload":  # the copy of the params is still under way
        event = SimpleNamespace(synchronize=wait_for_it)
        stream: Any = SimpleNamespace(
            record_event=lambda made: made, wait_stream=lambda _: None, device=torch.device("cpu")
        )
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: event)
        monkeypatch.setattr(stand_in, "on_side", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
        ready = averaged._beside(model, torch.device("cpu"), [stream])
        runner = runners.InThread(ready, [stream], copies=True)
    else:
        run = cpu.NativeLaunch._run
        monkeypatch.setattr(cpu.NativeLaunch, "_run", lambda *args: (wait_for_it(), run(*args)))
        runner = runners.InThread(averaged._beside(model), [], copies=False)
    runner.update()
    assert begun.wait(60)
    freed: list[str] = []
    for name, param in model.named_parameters():
        weakref.finalize(param.untyped_storage(), freed.append, name)
        param.data = torch.zeros_like(param)
    assert freed == []  # the update reads it
    let_go.set()
    runner.update()
    runner.close()
    assert sorted(freed) == ["bias", "weight"]


@pytest.mark.parametrize("kind", ["one", "several"])
def test_memory_that_moves_in_its_storage_under_an_update_is_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 8)
    rules = {"a": ExponentialAverage(0.5)}
    averaged: Any = FusedAveragedModel(model) if kind == "one" else FusedAverages(model, rules=rules)
    begun, moved = threading.Event(), threading.Event()
    # In place of the kernel, which would read memory that is free by then.
    monkeypatch.setattr(cpu.NativeLaunch, "_run", lambda *_: (begun.set(), moved.wait(60)))
    runner = runners.InThread(averaged._beside(model), [], copies=False)
    runner.update()
    assert begun.wait(60)
    model.share_memory()
    moved.set()
    told = r"params must keep their memory .* has moved, as share_memory\(\) moves it: call attachment.join\(\) before"
    with pytest.raises(RuntimeError, match=told):
        runner.join()
    runner.update()  # on the memory that they have now
    runner.close()
