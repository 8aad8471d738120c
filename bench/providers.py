"""Ways of averaging a model: torch's class, loops over lists, and ours.

The loops keep their lists of tensors from call to call, which is the fastest way to write them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.provider import DECAY, Provider, adopt_params
from bench.report import LERP_FLOAT, MUL_ADD, OURS, OURS_EXACT, OURS_FLOAT32, TORCH_CLASS, TORCH_EMA

# Bytes that an update must move for each element: read the param, read and write a float32 average (or its two planes).
COUNTED_BYTES = {torch.float32: 12, torch.bfloat16: 10}

# Compiling a foreach costs 0.07 s a tensor (160 tensors: 11 s, 2 cores), so 2000 of them would take minutes.
COMPILED_MAX_TENSORS = 200


class TorchClass(Provider):
    name = TORCH_CLASS

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.averaged = AveragedModel(model)

    def update(self) -> None:
        self.averaged.update_parameters(self.model)

    def averages(self) -> list[Tensor]:
        return list(self.averaged.module.parameters())

    def buffers(self) -> list[Tensor]:
        return list(self.averaged.module.buffers())

    def adopt(self, averages: list[Tensor]) -> None:
        adopt_params(self.averaged.module, averages)


class TorchEma(TorchClass):
    """torch's class with its multi-tensor EMA function, the faster way to use it."""

    name = TORCH_EMA

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def weight(self, num_averaged: int) -> float:
        return 1.0 if num_averaged == 0 else 1 - DECAY


class TorchClassBf16(TorchClass):
    param_dtypes = (torch.bfloat16,)
    note = "bf16 average: freezes"


class Lists(Provider):
    """Base of the loops over lists: float32 averages of all params, a copy of all buffers, a count on the host."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.params = [param.detach() for param in model.parameters()]
        self.kept = [param.float() if param.dtype != torch.float32 else param.clone() for param in self.params]
        self.model_buffers = list(model.buffers())
        self.kept_buffers = [buffer.clone() for buffer in self.model_buffers]
        self.num_averaged = 0

    def update(self) -> None:
        with torch.no_grad():
            self.average(self.weight(self.num_averaged))
            if self.kept_buffers:
                torch._foreach_copy_(self.kept_buffers, self.model_buffers)
        self.num_averaged += 1

    def average(self, weight: float) -> None:
        raise NotImplementedError

    def averages(self) -> list[Tensor]:
        return self.kept

    def buffers(self) -> list[Tensor]:
        return self.kept_buffers

    def adopt(self, averages: list[Tensor]) -> None:
        self.kept = averages


class Foreach(Lists):
    name = "_foreach_lerp_"

    def average(self, weight: float) -> None:
        torch._foreach_lerp_(self.kept, self.params, weight)


class Lerp(Lists):
    name = "lerp_ per tensor"

    def average(self, weight: float) -> None:
        for average, param in zip(self.kept, self.params, strict=True):
            average.lerp_(param, weight)


class MulAdd(Lists):
    name = MUL_ADD
    param_dtypes = (torch.bfloat16,)
    note = "float32 average"

    def average(self, weight: float) -> None:
        for average, param in zip(self.kept, self.params, strict=True):
            average.mul_(1 - weight).add_(param, alpha=weight)


class LerpFloat(Lists):
    name = LERP_FLOAT
    param_dtypes = (torch.bfloat16,)
    note = "float32 average"

    def average(self, weight: float) -> None:
        for average, param in zip(self.kept, self.params, strict=True):
            average.lerp_(param.float(), weight)


class CompiledForeach(Lists):
    name = "compiled foreach"
    # torch 2.13 burns the weight of a foreach lerp into the code, and compiles anew for each other value.
    note = "EMA only: a new weight recompiles"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # One code object serves all workloads, and dynamo gives up after eight compilations of it.
        torch.compiler.reset()
        self.compiled = torch.compile(torch._foreach_lerp_)

    def beside(self, model: nn.Module) -> CompiledForeach:
        # Not by __init__, which throws away what is compiled.
        other = object.__new__(type(self))
        Lists.__init__(other, model)
        other.compiled = self.compiled
        return other

    @classmethod
    def refusal(cls, model: nn.Module) -> str | None:
        count = len(list(model.parameters()))
        if count > COMPILED_MAX_TENSORS:
            return f"compiling {count} tensors takes about {0.07 * count:.0f} s; the limit is {COMPILED_MAX_TENSORS}"
        return None

    def weight(self, num_averaged: int) -> float:
        return 1 - DECAY

    def average(self, weight: float) -> None:
        self.compiled(self.kept, self.params, weight)


class Ours(Provider):
    """``FusedAveragedModel`` in one format."""

    name = OURS
    format: ClassVar[str] = "float32"
    backend: ClassVar[str | None] = None
    is_ours = True

    def __init__(self, model: nn.Module) -> None:
        from swafast import FusedAveragedModel

        super().__init__(model)
        self.averaged = FusedAveragedModel(model, format=self.format, backend=self.backend)

    @classmethod
    def missing(cls) -> str | None:
        return None if importlib.util.find_spec("swafast") else "no module named swafast"

    def update(self) -> None:
        self.averaged.update_parameters(self.model)

    def averages(self) -> list[Tensor]:
        state = self.averaged.averaged_state_dict()
        return [state[name] for name, _ in self.model.named_parameters()]

    def each_average(self) -> Iterator[Tensor]:
        from swafast.terms.formats import get_format

        fmt, state = get_format(self.format), self.averaged.state_dict()
        for name, _ in self.model.named_parameters():
            yield fmt.decode(tuple(state[f"{plane}.{name}"] for plane in ("module", *(key for key, _ in fmt.extra))))

    def buffers(self) -> list[Tensor]:
        return list(self.averaged.module.buffers())

    def held(self) -> Iterable[Tensor]:
        # A key is the name of a plane, a dot, and the param's name.
        names = {name for name, _ in self.model.named_parameters()}
        return [value for key, value in self.averaged.state_dict().items() if key.partition(".")[2] in names]


class OursExact(Ours):
    name = OURS_EXACT
    format = "exact"
    param_dtypes = (torch.bfloat16,)
    note = "bf16 module that runs as it is; bit for bit the float32 average"


class OursFloat32(Ours):
    name = OURS_FLOAT32
    param_dtypes = (torch.bfloat16,)
    note = "float32 average"


def providers_for(dtype: torch.dtype) -> list[type[Provider]]:
    """Give every provider that averages params of ``dtype``, installed or not; ours last."""
    from bench import third_party

    known: list[type[Provider]] = [
        TorchClass,
        TorchEma,
        TorchClassBf16,
        Foreach,
        Lerp,
        CompiledForeach,
        MulAdd,
        LerpFloat,
    ]
    known += [third_party.TimmEma, third_party.EmaPytorch, third_party.DiffusersEma, OursExact, OursFloat32, Ours]
    return [provider for provider in known if dtype in provider.param_dtypes]
