"""Ways of updating that show what checks cost: ours whole, its checks in Python, its kernel alone, unchecked torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from bench import internals, names
from bench.providers import FP32, UPDATE_PROVIDERS, Made, Provider, loop, make_ours, moving, providers_for

FORMAT = "float32"


def params_alone(model: nn.Module) -> Made:
    """Return a foreach of params: unlike the one with buffers, it leaves these out."""
    bare = nn.Module()
    bare.params = nn.ParameterList(model.parameters())
    return replace(loop(torch._foreach_lerp_)(bare), buffers=None)


def in_part(changed: Callable[[internals.Averaged], Callable[[], object] | None]) -> Callable[[nn.Module], Made]:
    """Return our update after ``changed`` has seen an average in use: with what it returns, if that is no None."""

    def make(model: nn.Module) -> Made:
        averages = make_ours(model, FORMAT, 1)
        made = moving(averages, ["mean"], model, FORMAT)
        for _ in range(2):  # the first plans, the second is like all others
            made.update()
        update = changed(averages[""])
        return made if update is None else replace(made, update=update)

    return make


PROVIDERS = (
    *(
        each
        for each in providers_for(FP32, UPDATE_PROVIDERS)
        if each.name in (names.TORCH_CLASS, names.FOREACH, names.OURS)
    ),
    Provider(names.FOREACH_PARAMS, (FP32,), params_alone, "leaves buffers out"),
    Provider(names.OURS_IN_PYTHON, (FP32,), in_part(internals.check_in_python), format=FORMAT),
    Provider(names.C_CALL, (FP32,), in_part(internals.c_call), "checks nothing", FORMAT),
)
