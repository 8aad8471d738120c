"""Runners: how an attached average's updates are run, in the hook or beside the next forward and backward."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch
from torch.nn import Module

from .stand_in import on_side

#: Takes what a forward will write, binds the tensors, and gives the update that is left to run.
Ready = Callable[[], Callable[[], None]]


class Updating(Protocol):
    """What an attachment and its runner ask of an averaged model."""

    @property
    def _guard(self) -> Any: ...
    def update_parameters(self, model: Module) -> None: ...
    def _beside(
        self, model: Module, device: torch.device | None = None, streams: Sequence[torch.cuda.Stream] = ()
    ) -> Ready: ...
    def _move_to_host(self) -> None: ...


class Runner:
    """How an update is run."""

    def update(self) -> None:
        raise NotImplementedError

    def before_step(self) -> None:
        """Wait until the optimizer may write the params."""

    def join(self) -> None:
        """Wait until the averages may be used; raise what went wrong in an update."""

    def wait(self, timeout: float | None = None) -> None:
        """As :meth:`join`, for some seconds, without raising."""
        self.join()

    def close(self) -> None:
        """As :meth:`join`, before this runner is forgotten."""
        self.join()


class Plain(Runner):
    """In the hook itself."""

    def __init__(self, averaged: Updating, model: Module) -> None:
        self._averaged, self._model = averaged, model

    def update(self) -> None:
        self._averaged.update_parameters(self._model)


class OnStreams(Runner):
    """On a side stream of each GPU that the model is on."""

    def __init__(self, ready: Ready, streams: Sequence[torch.cuda.Stream]) -> None:
        self._ready, self._streams = ready, streams
        self._ended: list[torch.cuda.Event] = []

    def update(self) -> None:
        self.join()
        update = self._ready()
        with on_side(self._streams):
            update()
            self._ended = [stream.record_event() for stream in self._streams]

    def join(self) -> None:
        # Each time, since other threads, with streams of their own, have to wait as well.
        for stream, event in zip(self._streams, self._ended, strict=False):
            torch.cuda.current_stream(stream.device).wait_event(event)

    before_step = join


class InThread(Runner):
    """In a thread, by the CPU's kernels: on the model's own params, or on copies of them in the host's memory.

    Args:
        streams: that ``ready`` copies params on, where there are GPUs.
        copies: whether it copies them.
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
        self.join()
        update = self._ready()
        copied = [stream.record_event() for stream in self._streams]
        self._under_way = self._pool.submit(self._run, update, copied)

    def _run(self, update: Callable[[], None], copied: Sequence[torch.cuda.Event]) -> None:
        self._worker = threading.get_ident()
        for event in copied:
            event.synchronize()
        update()

    def before_step(self) -> None:
        if not self._copies:
            self.join()
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    def join(self) -> None:
        if os.getpid() != self._process:  # a forked child has no such thread
            self._begin()
        under_way = self._under_way
        if under_way is None or threading.get_ident() == self._worker:
            return
        try:
            under_way.result()
        finally:
            # Not before it has ended: other threads wait as well, and an interrupt leaves it running.
            if under_way.done() and self._under_way is under_way:
                self._under_way = None

    def wait(self, timeout: float | None = None) -> None:
        under_way = self._under_way
        if under_way is not None and os.getpid() == self._process and threading.get_ident() != self._worker:
            wait([under_way], timeout)

    def close(self) -> None:
        try:
            self.join()
        finally:
            self._pool.shutdown()


def runner_for(averaged: Updating, model: Module, overlap: bool, offload: object) -> Runner:
    """Give the runner for these arguments of ``attach``.

    Raises:
        ValueError: ``offload`` is neither ``"cpu"`` nor None.
    """
    if offload not in (None, "cpu"):
        raise ValueError(f"offload must be 'cpu' or None, got {offload!r}")
    devices = [param.device for param in model.parameters() if param.device.type == "cuda"]
    streams = [torch.cuda.Stream(device) for device in dict.fromkeys(devices)]
    if offload is not None:
        ready = averaged._beside(model, torch.device("cpu"), streams)
        averaged._move_to_host()
        return InThread(ready, streams, copies=True)
    if not overlap:
        return Plain(averaged, model)
    ready = averaged._beside(model)
    return OnStreams(ready, streams) if streams else InThread(ready, [], copies=False)
