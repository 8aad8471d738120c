"""CUDA graphs that are being captured: what must not go into one, and how to wait beside one."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: ``CU_STREAM_CAPTURE_MODE_RELAXED`` of the CUDA driver.
_RELAXED = 2


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured on the device's current stream."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, action: str, instead: str = "run it outside the capture") -> None:
    """Raise RuntimeError if a CUDA graph is being captured on the device's current stream."""
    if is_capturing(device):
        raise RuntimeError(f"{action} must not be captured in a CUDA graph: {instead}")


@contextmanager
def allowed_to_wait() -> Iterator[None]:
    """Return a context in which this thread may wait for a GPU while another thread captures a CUDA graph.

    CUDA forbids that to all threads (``capture_error_mode="global"``, torch's default): the wait would raise, and the
    other thread's capture would fail. A thread can lift it for itself. What we wait for is never part of a capture.
    """
    exchange = _exchange_mode()
    mode = ctypes.c_int(_RELAXED)
    if exchange is None or exchange(ctypes.byref(mode)) != 0:
        yield
        return
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))  # which has held the mode before since then


@functools.cache
def _exchange_mode() -> Callable[[Any], int] | None:
    """Return the driver's function that exchanges this thread's capture mode, or None if there is no such driver."""
    try:
        function: Callable[[Any], int] = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None
    return function
