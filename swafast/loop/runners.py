"""Runners: run the updates of an attachment, in the hook or beside the next forward and backward."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch
from torch.nn import Module

from ..terms.capturing import allowed_to_wait, refuse_capture
from ..terms.grids import SIDE, use_grid
from ..terms.numbers import as_bool
from ..terms.warn import add_note
from .stand_in import on_side

#: Copies what the next forward will write and binds the tensors. Returns the update to run, and the memory it uses.
Ready = Callable[[], tuple[Callable[[], None], Sequence[object]]]


class Updating(Protocol):
    """What an attachment and its runner need of an averaged model."""

    @property
    def _guard(self) -> Any: ...
    def _gpus(self, model: Module) -> Collection[torch.device]: ...
    def _modules_run(self) -> Sequence[Module]: ...
    def update_parameters(self, model: Module) -> None: ...
    def _beside(
        self, model: Module, device: torch.device | None = None, streams: Sequence[torch.cuda.Stream] = ()
    ) -> Ready: ...
    def _move_to_host(self) -> None: ...
    def _check_first_step(self, attachment: Any) -> None: ...


class Runner:
    """Runs the updates of an attachment."""

    is_beside = True  # whether updates may be under way between two steps
    _streams: Sequence[torch.cuda.Stream] = ()  # of the GPUs that it was made for

    def fits(self, averaged: Updating, model: Module) -> bool:
        """Return whether the GPUs that an update uses now are those that it was made for."""
        return {stream.device for stream in self._streams} == set(averaged._gpus(model))

    @property
    def is_under_way(self) -> bool:
        """Whether an update may be under way now."""
        return False

    def update(self) -> None:
        raise NotImplementedError

    def before_step(self) -> None:
        """Wait until the optimizer may write the params."""

    def join(self) -> None:
        """Wait until the averages may be used, and raise what an update has raised."""

    def refuse_capture(self) -> None:
        """Raise RuntimeError if a wait for the update under way would go into a CUDA graph."""

    def is_worker(self) -> bool:
        """Return whether the calling thread is the one that runs the updates, if there is such a thread."""
        return False

    def wait(self, timeout: float | None = None) -> None:
        """Wait as :meth:`join` does, for at most ``timeout`` seconds, without raising."""
        self.join()

    def close(self) -> None:
        """Wait as :meth:`join` does and free the thread, if there is one."""
        self.join()


#: What must not go into a CUDA graph, and what to do instead.
_START = (
    "an update beside the next forward (overlap or offload)",
    "detach the average, and capture update_parameters instead",
)
_WAIT = (
    "the wait for an update that began before the capture",
    "call torch.cuda.synchronize(), then attachment.join(), before you capture",
)
_ATTACH = ("attach with offload, which moves the averages,", "attach before you capture")

#: What the thread adds to an error, which another line raises.
_EARLIER = "This is the error of an update after an earlier step of the optimizer: it ran beside the training"


def _refuse_capture(streams: Sequence[torch.cuda.Stream], action: tuple[str, str]) -> None:
    for stream in streams:
        refuse_capture(stream.device, *action)


class Plain(Runner):
    """Runs each update in the hook itself."""

    is_beside = False

    def __init__(self, averaged: Updating, model: Module) -> None:
        self._averaged, self._model = averaged, model

    def fits(self, averaged: Updating, model: Module) -> bool:
        return True  # its updates run on the current streams of wherever the tensors are

    def update(self) -> None:
        self._averaged.update_parameters(self._model)


class OnStreams(Runner):
    """Runs each update on a side stream of each of the model's GPUs.

    It holds the memory of each update until the GPUs have ended it, whoever drops the tensors meanwhile: the allocator
    knows of the main stream only. ``record_stream`` cannot tell it, since planes stand on parts of a bucket's storage.
    """

    def __init__(self, ready: Ready, streams: Sequence[torch.cuda.Stream]) -> None:
        self._ready, self._streams = ready, streams
        self._ended: list[torch.cuda.Event] = []
        #: The memory of each update, and the events that end it: none before its launch.
        self._in_flight: dict[int, tuple[Sequence[object], list[torch.cuda.Event]]] = {}

    def update(self) -> None:
        _refuse_capture(self._streams, _START)
        self.join()
        update, memory = self._ready()
        ended: list[torch.cuda.Event] = []
        self._in_flight[id(ended)] = memory, ended
        try:
            with on_side(self._streams), use_grid(SIDE):
                update()
        finally:
            ended += [stream.record_event() for stream in self._streams]
            self._ended = ended

    def refuse_capture(self) -> None:
        if self.is_under_way:
            _refuse_capture(self._streams, _WAIT)

    @property
    def is_under_way(self) -> bool:
        return id(self._ended) in self._in_flight

    def join(self) -> None:
        if not self.is_under_way:
            return
        self.refuse_capture()
        # Wait at each call: other threads with other streams must wait too.
        for stream, event in zip(self._streams, self._ended, strict=False):
            torch.cuda.current_stream(stream.device).wait_event(event)
        with allowed_to_wait():
            for key, (_, ended) in list(self._in_flight.items()):
                if ended and all(event.query() for event in ended):
                    self._in_flight.pop(key, None)  # several threads may be here

    before_step = join

    def close(self) -> None:
        self.join()
        self._end()

    def _end(self) -> None:
        with allowed_to_wait():
            for stream in self._streams if self._in_flight else ():
                stream.synchronize()
        self._in_flight.clear()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the process, or in a forked child, there is no GPU to ask
            self._end()


class InThread(Runner):
    """Runs each update in a thread with the CPU kernels, from the model's params or from copies on the host.

    Args:
        streams: the streams on which ``ready`` copies params from GPUs.
        copies: whether ``ready`` copies the params.
    """

    def __init__(self, ready: Ready, streams: Sequence[torch.cuda.Stream], *, copies: bool) -> None:
        self._ready, self._streams, self._copies = ready, streams, copies
        self._begin()

    def _begin(self) -> None:
        self._pool = ThreadPoolExecutor(1, "swafast")
        self._process = os.getpid()
        self._under_way: Future[None] | None = None
        self._worker: int | None = None

    def update(self) -> None:
        _refuse_capture(self._streams, _START)
        self.join()
        update, memory = self._ready()
        # A thread that waits for a blocking event sleeps. For another, it would take a core of the training.
        copied = [stream.record_event(torch.cuda.Event(blocking=True)) for stream in self._streams]
        self._under_way = self._pool.submit(self._run, update, copied, memory)

    @property
    def is_under_way(self) -> bool:
        under_way = self._under_way
        # One that has raised stays so until it is joined, which raises.
        return under_way is not None and not (under_way.done() and under_way.exception() is None)

    def refuse_capture(self) -> None:
        if self._under_way is not None and not self._under_way.done():
            _refuse_capture(self._streams, _WAIT)

    def is_worker(self) -> bool:
        return threading.get_ident() == self._worker

    def _run(self, update: Callable[[], None], copied: Sequence[torch.cuda.Event], memory: Sequence[object]) -> None:
        """Run an update. The thread holds its memory so long, as the user may give the tensors other memory."""
        self._worker = threading.get_ident()
        with allowed_to_wait():
            for event in copied:
                event.synchronize()
        storages = [each for each in memory if isinstance(each, torch.UntypedStorage)]
        addresses = [storage.data_ptr() for storage in storages]
        try:
            update()
        except Exception as error:
            add_note(error, _EARLIER, _EARLIER)
            raise
        if addresses != [storage.data_ptr() for storage in storages]:  # nothing keeps memory that moves in its storage
            raise RuntimeError(
                "params must keep their memory while an update beside the next step reads them, but it has moved, as "
                "share_memory() moves it: call attachment.join() before. The averages may be wrong: load them again"
            )

    def before_step(self) -> None:
        if not self._copies:
            self.join()
        elif self._under_way is not None and not self._under_way.done():  # else the copy has ended too
            self.refuse_capture()
            for stream in self._streams:
                torch.cuda.current_stream(stream.device).wait_stream(stream)

    def join(self) -> None:
        if os.getpid() != self._process:  # a forked child has no such thread
            self._begin()
        under_way = self._under_way
        if under_way is None or self.is_worker():
            return
        self.refuse_capture()
        try:
            under_way.result()
        finally:
            # Forget it only once it has ended: other threads wait for it too, and an interrupt leaves it running.
            if under_way.done() and self._under_way is under_way:
                self._under_way = None

    def wait(self, timeout: float | None = None) -> None:
        under_way = self._under_way
        if under_way is not None and os.getpid() == self._process and not self.is_worker():
            wait([under_way], timeout)

    def close(self) -> None:
        self.refuse_capture()
        try:
            self.join()
        finally:
            self._pool.shutdown()


def check_modes(overlap: object, offload: object) -> tuple[bool, str | None]:
    """Return these arguments of ``attach`` as Python's own.

    Raises:
        TypeError: ``overlap`` is no bool.
        ValueError: ``offload`` is neither the CPU nor None.
    """
    beside = as_bool(overlap)
    if beside is None:
        raise TypeError(f"overlap must be True or False, got {overlap!r}")
    if offload is None:
        return beside, None
    if offload != "cpu" and not (isinstance(offload, torch.device) and offload.type == "cpu"):
        raise ValueError(f"offload must be 'cpu' or None, got {offload!r}")
    return beside, "cpu"


def runner_for(averaged: Updating, model: Module, overlap: bool, offload: str | None) -> Runner:
    """Return the runner for these arguments of ``attach``, and for the GPUs where the model and the averages are now.

    With ``offload``, move the averages to the host before.
    """
    if not overlap and offload is None:
        return Plain(averaged, model)
    if offload is not None:
        for gpu in averaged._gpus(model):
            refuse_capture(gpu, *_ATTACH)
        with allowed_to_wait():
            averaged._move_to_host()
    streams = [torch.cuda.Stream(gpu) for gpu in averaged._gpus(model)]
    if offload is not None:
        return InThread(averaged._beside(model, torch.device(offload), streams), streams, copies=True)
    ready = averaged._beside(model)
    return OnStreams(ready, streams) if streams else InThread(ready, [], copies=False)
