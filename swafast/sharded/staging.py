"""Copies of buffers for an update beside a forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..terms.copying import duplicate
from .parts.shares import Share


class Staging:
    """Copies of buffers for an update beside a forward, which writes the buffers. Each attached average has its own."""

    #: Whether it copies params too, this rank's part of them, and everything to the host.
    is_on_host = False
    #: The memory that its last copies may still be read from, on side streams.
    read: Sequence[object] = ()

    def __init__(self) -> None:
        self._copies: dict[str, tuple[object, Tensor]] = {}  # (layout of the buffer, its copy)
        self.by_torch: dict[tuple[str, ...], Tensor | None] = {}  # the copies of those that torch copies

    @torch.no_grad()
    def take(self, name: str, buffer: Tensor) -> Tensor:
        """Copy a buffer, if possible into the memory of its last copy, and return the copy."""
        layout = (buffer.dtype, buffer.device, buffer.shape, buffer.stride())
        if name not in self._copies or self._copies[name][0] != layout:
            self._copies[name] = layout, torch.empty_like(buffer)
        return self._copies[name][1].copy_(buffer)

    def take_parts(self, parts: Sequence[tuple[Share, Tensor]]) -> list[Tensor]:
        """Copy this rank's parts to the host, and return the copies."""
        raise NotImplementedError

    def take_by_torch(self, buffers: Mapping[tuple[str, ...], Tensor | None]) -> None:
        """Copy the buffers that torch copies."""
        self.by_torch = {names: duplicate(each) if each is not None else None for names, each in buffers.items()}
