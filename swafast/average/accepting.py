"""Which models can be averaged, and which of their params are."""

from __future__ import annotations

import copy
import inspect
from collections import ChainMap
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from ..op import checks
from ..terms import hints
from ..terms.names import named_params, unwrap
from ..torch_private.modules import named_modules, own_values


def refuse_engine(model: object) -> None:
    """Raise TypeError for an engine of DeepSpeed, whose names of params are not those of the model in it."""
    if hasattr(type(model), "zero_optimization_stage"):
        raise TypeError(f"model must be the one that the engine trains, got {type(model).__name__}: pass engine.module")


def check_model(model: object) -> Module:
    """Raise unless ``model`` is a module whose parameters can be averaged.

    Raises:
        TypeError: it is not an ``nn.Module``, or an engine of DeepSpeed.
        ValueError: a parameter is lazy or partitioned, or all of them are empty.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hints.of_value('model', model)}")
    refuse_engine(model)
    params = named_params(unwrap(model), "model")
    for name, param in params.items():
        if is_lazy(param):
            raise ValueError(
                f"model must be initialised, got the lazy parameter {name!r}: run it once before averaging it"
            )
    checks.refuse_partitioned("model", params)
    if params and all(param.numel() == 0 for param in params.values()):
        raise ValueError(
            f"model must hold its parameters, got only empty ones ({next(iter(params))!r} is the first): "
            f"{checks.GATHER}"
        )
    return model


def check_device(device: object) -> None:
    """Raise unless ``device`` is None or names a device.

    Raises:
        TypeError: it is of another type.
        RuntimeError: this machine or torch has none of this name or index.
    """
    if device is not None and (isinstance(device, bool) or not isinstance(device, (int, str, torch.device))):
        raise TypeError(f"device must be a torch.device, got {device!r}{hints.of_value('device', device)}")
    try:
        torch.device(device) if device is not None else None
    except (RuntimeError, ValueError) as error:
        hint = hints.of_value("device", device)
        raise RuntimeError(
            f"device must be one of this machine, such as 'cpu', got {device!r}: {error}{hint}"
        ) from error


def refuse_sharded(model: Module, what: str = "model", instead: str = checks.FOR_SHARDED) -> None:
    """Raise ValueError if the model has FSDP modules, which cannot be copied.

    Params that FSDP has gathered look like plain ones, but what is written into them is lost.
    """
    for _, module in named_modules(model, distinct=True):
        for kind in type(module).__mro__:
            if kind.__name__ in ("FSDPModule", "FullyShardedDataParallel"):
                raise ValueError(f"{what} must be whole on this rank, got an {kind.__name__}; {instead}")


def find_uncopied(model: Module) -> str | None:
    """Name what of a model ``copy.deepcopy`` cannot copy: an attribute, or a module with code of its own for copies."""
    modules = named_modules(model, distinct=True)
    same = {id(module): module for _, module in modules}
    for name, module in modules:
        for attribute, value in own_values(module):
            if not _is_copied(value, same):
                return f"{attribute!r} of {(name or type(model).__name__)!r}, a {type(value).__name__}"
        del same[id(module)]
        if not _is_copied(module, same):
            return f"{(name or 'the model')!r}, a {type(module).__name__}"
        same[id(module)] = module
    return None


def _is_copied(value: object, same: dict[int, Module]) -> bool:
    """Return whether a deep copy of ``value`` works. Modules in ``same``, by id, are not copied."""
    try:
        copy.deepcopy(value, ChainMap({}, same))  # type: ignore[arg-type]  # any mapping will do
    except Exception:
        return False
    return True


def check_include(include: object) -> None:
    """Raise TypeError unless ``include`` is None, or a function of a name and a parameter."""
    if include is None:
        return
    if not callable(include):
        raise TypeError(
            f"include must be a function include(name, param) -> bool, got {include!r}"
            f"{hints.of_value('include', include)}"
        )
    try:
        inspect.signature(include).bind("name", None)
    except TypeError:
        raise TypeError(
            f"include must take a name and a parameter, got {include!r}{hints.of_value('include', include)}"
        ) from None
    except ValueError:  # some functions in C have no signature
        pass


def ask_include(include: object, params: Mapping[str, Tensor]) -> dict[str, bool]:
    """Return the answers of ``include`` for ``params``, by name; {} if ``include`` is None, so that all are averaged.

    Raises:
        TypeError: ``include`` is not callable.
        ValueError: it picks no parameter.
    """
    check_include(include)
    if not callable(include):  # it is None
        return {}
    asked = {name: bool(include(name, param)) for name, param in params.items()}
    if asked and not any(asked.values()):
        raise ValueError(f"include must pick a parameter, got False for all of them, {next(iter(asked))!r} the first")
    return asked
