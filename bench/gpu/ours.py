"""Our own providers: one average, or several in one pass, on one backend; and the gate that each goes through."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench import gate
from bench.gpu.report import OURS_PREFIX
from bench.passes import RULES, TOLERANCE
from bench.provider import Provider
from bench.providers import Ours
from swafast import FusedAveragedModel, FusedAverages, Rule
from swafast.terms.formats import get_format

# Elements decoded at once: what a format's planes become on the way takes up to 40 bytes for each of them.
DECODED_NUMEL = 1 << 25


class OnBackend(Ours):
    """``FusedAveragedModel`` on one backend, in one format."""

    count: ClassVar[int] = 1

    def __init__(self, model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "format='half'", UserWarning)  # whoever runs a bench knows
            self._make(model)

    def _make(self, model: nn.Module) -> None:
        super().__init__(model)

    @classmethod
    def missing(cls) -> str | None:
        from swafast.op.choice import BACKENDS

        why = next(each for each in BACKENDS if each.name == cls.backend).unavailable()
        return None if why is None else why.reason

    def each_average(self) -> Iterator[Tensor]:
        yield from decoded(self.averaged, self.format, self.model)

    def check_error(self, model: nn.Module) -> float:
        """Give the worst relative error, as :func:`gate.check_error`, by what the format accounts for."""
        factor = gate.run_updates(self, model)
        error, name, tolerance = gate.worst_error(self.each_average(), model, factor)
        return gate.require(error, name, TOLERANCE.get(self.format, tolerance))


class SeveralOnBackend(OnBackend):
    """Several averages by name, each by a rule of its own, in one pass."""

    copies_buffers = False  # of each of them: the gate of one average sees to that
    fused: FusedAverages

    def _make(self, model: nn.Module) -> None:
        self.model = model
        self.fused = FusedAverages(model, rules=self.rules(), format=self.format, backend=self.backend)

    @classmethod
    def rules(cls) -> Mapping[str, Rule]:
        assert cls.count <= len(RULES)
        return dict(list(RULES.items())[: cls.count])

    def update(self) -> None:
        self.fused.update_parameters(self.model)

    def check_error(self, model: nn.Module) -> float:
        """Hold each average to its own rule, in float64."""
        gate.run_updates(self, model)
        worst = 0.0
        for name, averaged in self.fused.items():
            factor = gate.factor_of(RULES[name].weight)
            error, where, tolerance = gate.worst_error(decoded(averaged, self.format, model), model, factor)
            worst = max(worst, gate.require(error, f"{name}.{where}", TOLERANCE.get(self.format, tolerance)))
        return worst


def decoded(averaged: FusedAveragedModel, format_name: str, model: nn.Module) -> Iterator[Tensor]:
    """Give the averages in float32, in the order of ``model.parameters()``: one at a time, decoded piece by piece."""
    fmt, state = get_format(format_name), averaged.state_dict()
    keys = ("module", *(key for key, _ in fmt.extra))
    for name, param in model.named_parameters():
        planes = [state[f"{key}.{name}"].reshape(-1).split(DECODED_NUMEL) for key in keys]
        if not fmt.extra and planes[0][0].dtype == torch.float32:
            yield state[f"module.{name}"]
            continue
        whole = torch.empty(param.numel(), dtype=torch.float32, device=param.device)
        for piece, *parts in zip(whole.split(DECODED_NUMEL), *planes, strict=True):
            piece.copy_(fmt.decode(tuple(parts)))
        yield whole.view(param.shape)


def ours_on(backend_name: str, format_name: str, averages: int = 1) -> type[OnBackend]:
    """Give our provider on one backend, in one format, of so many averages."""

    class OursOnBackend(OnBackend if averages == 1 else SeveralOnBackend):  # type: ignore[misc]
        name = f"{OURS_PREFIX}{backend_name}"
        format = format_name
        backend = backend_name
        count = averages

    return OursOnBackend


def check_error(provider: Provider, model: nn.Module) -> float:
    """Run the gate's updates and give the worst relative error of the averages.

    Raises:
        WrongAverageError: an average is further from float64 than its format accounts for.
    """
    check = provider.check_error if isinstance(provider, OnBackend) else partial(gate.check_error, provider)
    return check(model)
