"""Every way of averaging a model that is measured: torch's class, loops over lists, other packages, and ours.

All fulfil one contract, so that their times compare: params averaged, buffers brought along (a provider that does not
says so in its note). The loops keep their lists of tensors from call to call, which is the fastest way to write them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench import internals, names
from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages, Rule

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# The format of our average where none is asked for.
DEFAULT_FORMATS = {FP32: "float32", BF16: "exact", FP16: "mirrored"}
# With decay 0.9 an average moves far enough within the gate's few updates for a wrong weight to show in bf16 too. The
# time of an update does not depend on it.
DECAY = 0.9
# Compiling a foreach costs 0.07 s a tensor (160 tensors: 11 s, 2 cores), so 2000 of them would take minutes.
COMPILED_MAX_TENSORS = 200
# By the names of our averages. The rules differ, so an average that moved by another's rule is wrong.
RULES: dict[str, Rule] = {"mean": EqualAverage(), "fast": ExponentialAverage(0.5), "slow": ExponentialAverage(0.9)}
# Relative L2 distance of the worst tensor after the gate's three updates, where a format's is not that of its dtype:
# compact measured at most 1.3e-5, half 3e-3, and compensated, exported in float32, 4e-8.
TOLERANCE = {"compact": 5e-5, "half": 1e-2, "compensated": 1e-7}
# Formats that hold a float32 average bit for bit.
BIT_EXACT = ("float32", "exact", "mirrored")

Weight = Callable[[int], float]  # of the newest model, when so many are in the average


def moved_bytes(dtype: torch.dtype, format: str, averages: int = 1, passes: int = 1) -> int:
    """Return the bytes an update moves for each element: the param read once a pass, every plane read and written."""
    both_ways = 2 * internals.planes_nbytes(format)
    if format == "mirrored":
        both_ways -= 2  # the float16 is only written
    return passes * dtype.itemsize + averages * both_ways


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Provider:
    """One way of averaging ``model``."""

    name: ClassVar[str]
    param_dtypes: ClassVar[tuple[torch.dtype, ...]] = (FP32,)
    note: ClassVar[str] = ""
    format: ClassVar[str] = ""  # of our averages
    averages: ClassVar[int] = 1
    passes: ClassVar[int] = 1
    copies_buffers: ClassVar[bool] = True  # whether the gate may ask that buffers equal the model's

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    def beside(cls, model: nn.Module, built: Mapping[str, Provider]) -> Provider:
        """Build one, possibly over the averages of a provider that was built before."""
        return cls(model)

    @classmethod
    def missing(cls) -> str | None:
        """Return why this provider cannot run here at all, or None."""
        return None

    @classmethod
    def refusal(cls, model: nn.Module) -> str | None:
        """Return why this provider is left out for ``model``, or None."""
        return None

    @classmethod
    def counted_bytes(cls, dtype: torch.dtype) -> int:
        """Return the least bytes that an update must move for each param."""
        return moved_bytes(dtype, cls.format or DEFAULT_FORMATS[dtype], cls.averages, cls.passes)

    def update(self) -> None:
        raise NotImplementedError

    def restart(self) -> None:
        """Forget all updates, where the averages were another provider's."""

    def weight(self, num_averaged: int) -> float:
        return 1 / (num_averaged + 1)

    def each(self) -> Iterable[Tensor]:
        """Return the averages at full precision, in the order of ``model.parameters()``."""
        raise NotImplementedError

    def by_rule(self) -> Iterator[tuple[str, Weight, Iterable[Tensor]]]:
        """Yield the name, the weights and the tensors of each average."""
        yield "", self.weight, self.each()

    def buffers(self) -> list[Tensor]:
        raise NotImplementedError

    def held(self) -> Iterable[Tensor]:
        """Return the tensors that this provider keeps from update to update."""
        return self.each()

    def adopt(self, averages: list[Tensor]) -> None:
        """Put float32 averages into memory shared with other providers, where the run would not fit otherwise."""


class OfModule(Provider):
    """Base of the providers whose averages are the params of a module."""

    def module(self) -> nn.Module:
        raise NotImplementedError

    def each(self) -> Iterable[Tensor]:
        return list(self.module().parameters())

    def buffers(self) -> list[Tensor]:
        return list(self.module().buffers())

    def adopt(self, averages: list[Tensor]) -> None:
        for param, average in zip(self.module().parameters(), averages, strict=True):
            if param.dtype == average.dtype:
                param.data = average


class Ema:
    """The weights of an EMA whose first update copies."""

    def weight(self, num_averaged: int) -> float:
        return 1.0 if num_averaged == 0 else 1 - DECAY


class TorchClass(OfModule):
    name = names.TORCH_CLASS
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.averaged = AveragedModel(model, **self.options)

    def update(self) -> None:
        self.averaged.update_parameters(self.model)

    def module(self) -> nn.Module:
        return self.averaged.module


class TorchEma(Ema, TorchClass):
    """torch's class with its multi-tensor EMA function, the fastest way to use it."""

    name = names.TORCH_EMA
    options: ClassVar[dict[str, Any]] = {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)}


class TorchClassBf16(TorchClass):
    param_dtypes = (BF16,)
    note = "bf16 average: freezes"


class Lists(Provider):
    """Base of the loops over lists: float32 averages of all params, a copy of all buffers, a count on the host."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.params = [param.detach() for param in model.parameters()]
        self.kept = [param.float() if param.dtype != FP32 else param.clone() for param in self.params]
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
        for average, param in zip(self.kept, self.params, strict=True):
            self.average_one(average, param, weight)

    def average_one(self, average: Tensor, param: Tensor, weight: float) -> None:
        raise NotImplementedError

    def each(self) -> Iterable[Tensor]:
        return self.kept

    def buffers(self) -> list[Tensor]:
        return self.kept_buffers

    def adopt(self, averages: list[Tensor]) -> None:
        self.kept = averages


class Foreach(Lists):
    name = names.FOREACH

    def average(self, weight: float) -> None:
        torch._foreach_lerp_(self.kept, self.params, weight)


class Lerp(Lists):
    name = "lerp_ per tensor"

    def average_one(self, average: Tensor, param: Tensor, weight: float) -> None:
        average.lerp_(param, weight)


class MulAdd(Lists):
    name = names.MUL_ADD
    param_dtypes = (BF16,)
    note = "float32 average"

    def average_one(self, average: Tensor, param: Tensor, weight: float) -> None:
        average.mul_(1 - weight).add_(param, alpha=weight)


class LerpFloat(Lists):
    name = names.LERP_FLOAT
    param_dtypes = (BF16, FP16)
    note = "float32 average"

    def average_one(self, average: Tensor, param: Tensor, weight: float) -> None:
        average.lerp_(param.float(), weight)


class CompiledForeach(Lists):
    name = names.COMPILED
    # torch 2.13 compiles the weight of a foreach lerp into the code, and compiles again for each other value.
    note = "EMA only: a new weight recompiles"

    def __init__(self, model: nn.Module, compiled: Callable[..., object] | None = None) -> None:
        super().__init__(model)
        if compiled is None:
            # One code object serves all workloads, and dynamo gives up after eight compilations of it.
            torch.compiler.reset()
        self.compiled = compiled or torch.compile(torch._foreach_lerp_)

    @classmethod
    def refusal(cls, model: nn.Module) -> str | None:
        count = len(list(model.parameters()))
        if count <= COMPILED_MAX_TENSORS:
            return None
        return f"compiling {count} tensors takes about {0.07 * count:.0f} s; the limit is {COMPILED_MAX_TENSORS}"

    @classmethod
    def beside(cls, model: nn.Module, built: Mapping[str, Provider]) -> Provider:
        return cls(model, getattr(built.get(cls.name), "compiled", None))

    def weight(self, num_averaged: int) -> float:
        return 1 - DECAY

    def average(self, weight: float) -> None:
        self.compiled(self.kept, self.params, weight)


# Ours


class Ours(Provider):
    """One average, or the first ``averages`` of RULES in one pass, in one format, on one backend."""

    backend: ClassVar[str | None] = None
    apart: ClassVar[bool] = False  # a pass for each average instead of one for all
    shares: ClassVar[str | None] = None  # the provider whose averages it moves

    def __init__(self, model: nn.Module, made: FusedAverages | None = None) -> None:
        super().__init__(model)
        self.made: FusedAverages | FusedAveragedModel
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "format='half'", UserWarning)  # whoever runs a bench knows
            if made is not None:
                self.made = made
            elif self.averages == 1:
                self.made = FusedAveragedModel(model, format=self.format, backend=self.backend)
            else:
                rules = dict(list(RULES.items())[: self.averages])
                self.made = FusedAverages(model, rules=rules, format=self.format, backend=self.backend)

    @classmethod
    def missing(cls) -> str | None:
        return None if cls.backend is None else internals.backend_missing(cls.backend)

    @classmethod
    def beside(cls, model: nn.Module, built: Mapping[str, Provider]) -> Provider:
        return cls(model, getattr(built.get(cls.shares or ""), "made", None))

    def moved(self) -> dict[str, FusedAveragedModel]:
        """Return the averages that an update moves, by the names of their rules."""
        if isinstance(self.made, FusedAveragedModel):
            return {"mean": self.made}
        return {name: self.made[name] for name in list(RULES)[: self.averages]}

    def update(self) -> None:
        if self.apart or self.shares is not None:
            for averaged in self.moved().values():
                averaged.update_parameters(self.model)
        else:
            self.made.update_parameters(self.model)

    def restart(self) -> None:
        for averaged in self.moved().values() if self.shares is not None else ():
            averaged.n_averaged.zero_()
            for param in averaged.module.parameters():
                # An average that is not moved would keep the bits of an earlier gate.
                param.detach().fill_(float("nan"))

    def by_rule(self) -> Iterator[tuple[str, Weight, Iterable[Tensor]]]:
        for name, averaged in self.moved().items():
            yield name, RULES[name].weight, internals.decoded(averaged, self.format, self.model)

    def buffers(self) -> list[Tensor]:
        return list(next(iter(self.moved().values())).module.buffers())

    def held(self) -> Iterable[Tensor]:
        return [plane for averaged in self.moved().values() for plane in internals.planes(averaged, self.model)]


def ours(name: str, format: str, dtypes: tuple[torch.dtype, ...] = (FP32,), **attributes: Any) -> type[Ours]:
    """Return our provider under a name, in one format, with further attributes of :class:`Ours`."""
    return type(f"Ours: {name}", (Ours,), {"name": name, "format": format, "param_dtypes": dtypes, **attributes})


def ours_on(backend: str, format: str, averages: int = 1) -> type[Ours]:
    """Return our provider on one backend, as a GPU run measures it."""
    # The gate of one average sees to the buffers.
    several = {"averages": averages, "copies_buffers": averages == 1}
    return ours(f"{names.OURS} {backend}", format, tuple(DEFAULT_FORMATS), backend=backend, **several)


def update_providers() -> tuple[type[Provider], ...]:
    """Return every way of averaging, installed or not; ours last."""
    from bench.third_party import DiffusersEma, EmaPytorch, TimmEma

    note = "bf16 module that runs as it is; bit for bit the float32 average"
    return (
        *(TorchClass, TorchEma, TorchClassBf16, Foreach, Lerp, CompiledForeach, MulAdd, LerpFloat),
        *(TimmEma, EmaPytorch, DiffusersEma),
        ours(names.OURS_EXACT, "exact", (BF16,), note=note),
        ours(names.OURS_FLOAT32, "float32", (BF16,), note="float32 average"),
        ours(names.OURS, "float32"),
    )


# Our formats beside each other, ``float32`` first.
FORMAT_PROVIDERS: tuple[type[Provider], ...] = (
    ours("float32", "float32", (FP32, BF16)),
    ours("exact", "exact", (BF16,)),
    *(ours(format, format, (FP32, BF16)) for format in ("compact", "compensated")),
    ours("half", "half", (BF16,)),
)


def several_providers(dtype: torch.dtype) -> list[type[Provider]]:
    """Return the providers of one, two and three averages in one pass, and of three in three passes."""
    format = DEFAULT_FORMATS[dtype]

    def of(name: str, averages: int, **attributes: Any) -> type[Ours]:
        return ours(name, format, (dtype,), averages=averages, copies_buffers=False, note=format, **attributes)

    # Three come first: one average and three passes move averages of theirs, where they lie.
    three, two = of(names.THREE, 3), of(names.TWO, 2)
    one = of(names.ONE, 1, shares=names.THREE)
    return [three, one, two, of(names.THREE_APART, 3, apart=True, passes=3, shares=names.THREE)]


def providers_for(dtype: torch.dtype, known: Iterable[type[Provider]] | None = None) -> list[type[Provider]]:
    """Return those of ``known``, or of every provider, that average params of ``dtype``."""
    return [kind for kind in (update_providers() if known is None else known) if dtype in kind.param_dtypes]
