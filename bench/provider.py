"""What a provider is: one way of averaging a model, behind the same few methods as all others.

All fulfil one contract, so that their times compare: params averaged, buffers brought along (a provider that does not
says so in its note).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

# An average with decay 0.9 moves far enough within the gate's few updates for a wrong weight to show in bf16 too. The
# time of an update does not depend on it.
DECAY = 0.9


class Provider:
    """One way of averaging ``model``."""

    name: ClassVar[str]
    param_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    note: ClassVar[str] = ""
    # Whether the gate may ask that buffers equal the model's after an update.
    copies_buffers: ClassVar[bool] = True
    # Our own rows fail the command when they are wrong.
    is_ours: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    def missing(cls) -> str | None:
        """Return why this provider cannot run here at all, or None."""
        return None

    @classmethod
    def refusal(cls, model: nn.Module) -> str | None:
        """Return why this provider is left out for ``model``, or None."""
        return None

    def update(self) -> None:
        raise NotImplementedError

    def weight(self, num_averaged: int) -> float:
        """Return the weight of the newest model when ``num_averaged`` models are in the average."""
        return 1 / (num_averaged + 1)

    def averages(self) -> list[Tensor]:
        """Return the averages at full precision, in the order of ``model.parameters()``."""
        raise NotImplementedError

    def each_average(self) -> Iterator[Tensor]:
        """Yield the same averages one at a time, for a workload that memory could not hold twice."""
        yield from self.averages()

    def beside(self, model: nn.Module) -> Provider:
        """Make another provider of this kind, for another copy of the model."""
        return type(self)(model)

    def buffers(self) -> list[Tensor]:
        raise NotImplementedError

    def held(self) -> Iterable[Tensor]:
        """Return the tensors that this provider keeps from update to update."""
        return self.averages()

    def adopt(self, averages: list[Tensor]) -> None:
        """Put float32 averages into memory shared with other providers, where the run would not fit otherwise."""


def adopt_params(module: nn.Module, averages: list[Tensor]) -> None:
    """Let the float32 params of ``module`` stand on ``averages``; other dtypes stay."""
    for param, average in zip(module.parameters(), averages, strict=True):
        if param.dtype == average.dtype:
            param.data = average
