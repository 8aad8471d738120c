"""Every way of averaging a model that is measured: torch's class, loops over lists, other packages, and ours.

All fulfil one contract, so that their times compare: params averaged, buffers brought along (a provider that does not
says so in its note). The loops keep their lists of tensors from call to call, which is the fastest way to write them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import runpy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
# Of averages with a spread: SWAG's default number of deviations, and the bytes of a variance.
NUM_COLUMNS, VARIANCE_BYTES = 20, 4
# Compiling a foreach costs 0.07 s a tensor (160 tensors: 11 s, 2 cores), so 2000 of them would take minutes.
COMPILED_MAX_TENSORS = 200
# By the names of our averages. The rules differ, so an average that moved by another's rule is wrong.
RULES: dict[str, Rule] = {"mean": EqualAverage(), "fast": ExponentialAverage(0.5), "slow": ExponentialAverage(0.9)}

Dtypes = tuple[torch.dtype, ...]
Weight = Callable[[int], float]  # of the newest model, when so many are in the average


equal: Weight = RULES["mean"].weight
constant: Weight = lambda num_averaged: 1 - DECAY  # noqa: E731


def ema(num_averaged: int) -> float:
    """The weights of an EMA whose first update copies."""
    return 1.0 if num_averaged == 0 else 1 - DECAY


@dataclass(frozen=True)
class Made:
    """The averages of one model, and the update that moves them."""

    update: Callable[[], object]
    kept: Sequence[Tensor]  # from update to update
    buffers: Sequence[Tensor] | None  # that must equal the model's
    # The averages at full precision, in the order of the model's params, with the name and the weights of their rule.
    export: Callable[[], Iterator[tuple[str, Weight, Iterable[Tensor]]]]
    restart: Callable[[], object] = lambda: None  # forget all updates
    draw: Callable[[], object] | None = None  # what is timed in place of updates: a sample into the model


@dataclass(frozen=True)
class Provider:
    """One way of averaging a model."""

    name: str
    dtypes: Dtypes  # of the params
    make: Callable[[nn.Module], Made]
    note: str = ""
    format: str = ""  # of our averages; only ours have one
    averages: int = 1
    passes: int = 1
    work: str = ""  # of names.SPREADS, where averages have a spread
    max_tensors: int | None = None
    missing: Callable[[], str | None] = lambda: None  # why it cannot run here at all

    def counted_bytes(self, dtype: torch.dtype) -> int:
        """Return the least bytes that an update must move for each param."""
        return moved_bytes(dtype, self.format or DEFAULT_FORMATS[dtype], self.averages, self.passes, self.work)


def moved_bytes(dtype: torch.dtype, format: str, averages: int = 1, passes: int = 1, work: str = "") -> int:
    """Return the bytes an update moves for each element: the param read once a pass, every plane read and written.

    With ``work``, of :data:`names.SPREADS`, the variance is moved too, and a column is written; or all are read for a
    sample. The columns have the params' dtype.
    """
    planes_nbytes = internals.planes_nbytes(format)
    if work == names.DRAW:
        return planes_nbytes + VARIANCE_BYTES + (NUM_COLUMNS + 1) * dtype.itemsize
    spread = 2 * VARIANCE_BYTES + dtype.itemsize if work == names.COLLECT else 0
    return passes * dtype.itemsize + averages * 2 * planes_nbytes + spread


def of_tensors(update: Callable[[], object], kept: list[Tensor], buffers: list[Tensor] | None, weight: Weight) -> Made:
    return Made(update, kept, buffers, lambda: iter([("", weight, kept)]))


def of_module(update: Callable[[], object], module: nn.Module, weight: Weight, *, buffers: bool = True) -> Made:
    return of_tensors(update, list(module.parameters()), list(module.buffers()) if buffers else None, weight)


# torch


def torch_class(weight: Weight, **options: Any) -> Callable[[nn.Module], Made]:
    def make(model: nn.Module) -> Made:
        averaged = AveragedModel(model, **options)
        return of_module(lambda: averaged.update_parameters(model), averaged.module, weight)

    return make


def loop(average: Callable[..., object], weight: Weight = equal) -> Callable[[nn.Module], Made]:
    """Return a loop over lists: float32 averages of all params, a copy of all buffers, a count on the host."""

    def make(model: nn.Module) -> Made:
        params = [param.detach() for param in model.parameters()]
        kept = [param.float() if param.dtype != FP32 else param.clone() for param in params]
        model_buffers = list(model.buffers())
        buffers = [buffer.clone() for buffer in model_buffers]
        num_averaged = 0

        def update() -> None:
            nonlocal num_averaged
            with torch.no_grad():
                average(kept, params, weight(num_averaged))
                if buffers:
                    torch._foreach_copy_(buffers, model_buffers)
            num_averaged += 1

        return of_tensors(update, kept, buffers, weight)

    return make


def each(average: Callable[[Tensor, Tensor, float], object]) -> Callable[[nn.Module], Made]:
    def all_of(kept: list[Tensor], params: list[Tensor], weight: float) -> None:
        for one, param in zip(kept, params, strict=True):
            average(one, param, weight)

    return loop(all_of)


@functools.lru_cache(maxsize=1)
def _compiled(shapes: tuple[torch.Size, ...]) -> Callable[..., object]:
    # One code object serves all workloads, and dynamo gives up after eight compilations of it.
    torch.compiler.reset()
    return torch.compile(torch._foreach_lerp_)


def compiled(model: nn.Module) -> Made:
    # torch 2.13 compiles the weight of a foreach lerp into the code, and compiles again for each other value.
    return loop(_compiled(tuple(param.shape for param in model.parameters())), constant)(model)


# Other packages, each with its own defaults, as its documentation has it. For bf16 params each keeps a float32 average.
# Their warm-ups are set aside, so that the gate knows the weights.


def timm(model: nn.Module) -> Made:
    # By default the average of bf16 params is bf16, rounded at random. ``dtype`` asks for the float32 one.
    kept = _model_ema_v3()(model, decay=DECAY, dtype=FP32, exclude_buffers=True)
    return of_module(lambda: kept.update(model), kept.module, constant)


def _model_ema_v3() -> Any:
    """Load the one file that is needed: all of timm imports torchvision, which this file does not."""
    package = importlib.util.find_spec("timm")
    assert package is not None
    return runpy.run_path(str(Path(str(package.origin)).parent / "utils" / "model_ema.py"))["ModelEmaV3"]


def ema_pytorch(model: nn.Module) -> Made:
    other = None if next(model.parameters()).dtype == FP32 else deepcopy(model).float()
    options: dict[str, Any] = {"beta": DECAY, "min_value": DECAY, "update_after_step": 0, "update_every": 1}
    library = importlib.import_module("ema_pytorch")
    kept = library.EMA(model, ema_model=other, coerce_dtype=other is not None, **options)
    return of_module(kept.update, kept.ema_model, ema, buffers=False)


def diffusers(model: nn.Module) -> Made:
    params = list(model.parameters())
    kept = importlib.import_module("diffusers.training_utils").EMAModel(params, decay=DECAY, min_decay=DECAY)
    kept.to(dtype=FP32)
    return of_tensors(lambda: kept.step(params), kept.shadow_params, None, ema)


def _third_party(name: str, make: Callable[[nn.Module], Made], note: str = "") -> Provider:
    def missing() -> str | None:
        if importlib.util.find_spec(make.__name__) is None:
            return f"no module named {make.__name__}"
        try:
            make(nn.Linear(1, 1))
        # A package whose own dependencies are absent or do not match raises whatever it likes.
        except Exception as error:
            return f"does not run: {error}".splitlines()[0]
        return None

    return Provider(name, (FP32, BF16), make, note, missing=missing)


# Ours


def make_ours(model: nn.Module, format: str, averages: int, backend: str | None = None) -> dict[str, Any]:
    """Return one average, or the first ``averages`` of RULES in one pass: by rule, and under "" what moves all."""
    made: FusedAveragedModel | FusedAverages
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "format='half'", UserWarning)  # whoever runs a bench knows
        if averages == 1:
            made = FusedAveragedModel(model, format=format, backend=backend)
            return {"": made, "mean": made}
        rules = dict(list(RULES.items())[:averages])
        made = FusedAverages(model, rules=rules, format=format, backend=backend)
    return {"": made, **{name: made[name] for name in rules}}


def moving(made: dict[str, Any], rules: Sequence[str], model: nn.Module, format: str, *, apart: bool = False) -> Made:
    """Return the averages of ``rules``, moved together or, if ``apart``, one after another."""
    moved = {name: made[name] for name in rules}
    first = next(iter(moved.values()))

    def update() -> None:
        for averaged in moved.values():
            averaged.update_parameters(model)

    def restart() -> None:
        for averaged in moved.values():
            averaged.n_averaged.zero_()
            for param in averaged.module.parameters():
                # An average that is not moved would keep the bits of an earlier gate.
                param.detach().fill_(float("nan"))

    def export() -> Iterator[tuple[str, Weight, Iterable[Tensor]]]:
        for name, averaged in moved.items():
            yield name, RULES[name].weight, internals.decoded(averaged, format, model)

    kept = [plane for averaged in moved.values() for plane in internals.planes(averaged, model)]
    together = functools.partial(made[""].update_parameters, model)
    return Made(update if apart else together, kept, list(first.module.buffers()), export, restart)


def ours(
    name: str, format: str, dtypes: Dtypes = (FP32,), note: str = "", *, averages: int = 1, backend: str | None = None,
    grid: internals.Grid | None = None,
) -> Provider:  # fmt: skip
    """Return our provider of one average, or of several in one pass, in one format, on one backend, in one grid."""

    def make(model: nn.Module) -> Made:
        made = moving(make_ours(model, format, averages, backend), list(RULES)[:averages], model, format)
        if grid is None:
            return made

        def update() -> None:
            with internals.use_grid(grid):
                made.update()

        return replace(made, update=update)

    missing = functools.partial(internals.backend_missing, backend)
    return Provider(name, dtypes, make, note, format, averages, missing=missing)


def ours_on(backend: str, format: str, averages: int = 1, swept: tuple[str, internals.Grid] | None = None) -> Provider:
    """Return our provider on one backend, as a GPU run measures it: in the backend's own grid, or in a swept one."""
    label, grid = swept or ("", None)
    name = f"{names.OURS} {backend}" + (f", {label}" if label else "")
    return ours(name, format, tuple(DEFAULT_FORMATS), averages=averages, backend=backend, grid=grid)


def spread_on(backend: str, format: str, work: str) -> Provider:
    """Return our provider of an average with a spread on one backend: its update, or a draw of it."""

    def make(model: nn.Module) -> Made:
        averaged = FusedAveragedModel(model, format=format, backend=backend, deviations=NUM_COLUMNS)
        made = moving({"": averaged, "mean": averaged}, ["mean"], model, format)
        index = itertools.count()
        return replace(made, draw=(lambda: averaged.sample_to(model, next(index))) if work == names.DRAW else None)

    missing = functools.partial(internals.backend_missing, backend)
    return Provider(f"{names.OURS} {backend}", tuple(DEFAULT_FORMATS), make, format=format, work=work, missing=missing)


FLOAT32_AVERAGE = "float32 average"
UPDATE_PROVIDERS = (
    Provider(names.TORCH_CLASS, (FP32,), torch_class(equal)),
    # With its multi-tensor EMA function, the fastest way to use it.
    Provider(names.TORCH_EMA, (FP32,), torch_class(ema, multi_avg_fn=get_ema_multi_avg_fn(DECAY))),
    Provider(names.TORCH_CLASS, (BF16,), torch_class(equal), "bf16 average: freezes"),
    Provider(names.FOREACH, (FP32,), loop(torch._foreach_lerp_)),
    Provider("lerp_ per tensor", (FP32,), each(lambda average, param, weight: average.lerp_(param, weight))),
    Provider(
        names.COMPILED, (FP32,), compiled, "EMA only: a new weight recompiles", max_tensors=COMPILED_MAX_TENSORS
    ),
    Provider(
        names.MUL_ADD, (BF16,),
        each(lambda average, param, weight: average.mul_(1 - weight).add_(param, alpha=weight)), FLOAT32_AVERAGE,
    ),
    Provider(
        names.LERP_FLOAT, (BF16, FP16),
        each(lambda average, param, weight: average.lerp_(param.float(), weight)), FLOAT32_AVERAGE,
    ),
    _third_party("timm ModelEmaV3", timm),
    _third_party("ema-pytorch EMA", ema_pytorch, "averages float buffers too"),
    _third_party("diffusers EMAModel", diffusers, "leaves buffers out"),
    ours(names.OURS_EXACT, "exact", (BF16,), "bf16 module that runs as it is; bit for bit the float32 average"),
    ours(names.OURS_FLOAT32, "float32", (BF16,), FLOAT32_AVERAGE),
    ours(names.OURS, "float32"),
)  # fmt: skip

# Our formats beside each other, ``float32`` first.
FORMAT_PROVIDERS = tuple(
    ours(format, format, (BF16,) if format in ("exact", "half") else (FP32, BF16))
    for format in ("float32", "exact", "compact", "compensated", "half")
)


def several_providers(dtype: torch.dtype) -> list[Provider]:
    """Return the providers of one, two and three averages in one pass, and of three in three passes.

    One average and three passes move averages of the three in one pass, where they lie.
    """
    format = DEFAULT_FORMATS[dtype]
    three = functools.cache(lambda model: make_ours(model, format, 3))

    def of(name: str, rules: int, *, apart: bool = False, passes: int = 1) -> Provider:
        def make(model: nn.Module) -> Made:
            made = make_ours(model, format, 2) if rules == 2 else three(model)
            return moving(made, list(RULES)[:rules], model, format, apart=apart)

        return Provider(name, (dtype,), make, format, format, rules, passes)

    return [
        of(names.ONE, 1, apart=True), of(names.TWO, 2), of(names.THREE, 3),
        of(names.THREE_APART, 3, apart=True, passes=3),
    ]  # fmt: skip


def providers_for(dtype: torch.dtype, known: Iterable[Provider] = UPDATE_PROVIDERS) -> list[Provider]:
    """Return those of ``known`` that average params of ``dtype``."""
    return [provider for provider in known if dtype in provider.dtypes]
