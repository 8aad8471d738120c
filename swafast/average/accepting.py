"""Which models can be averaged, and which of their params are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from ..op import checks
from ..terms import hints
from ..terms.names import named_params, unwrap
from ..torch_private.modules import named_modules


def check_model(model: object) -> Module:
    """Raise unless ``model`` is a module whose parameters can be averaged.

    Raises:
        TypeError: it is not an ``nn.Module``.
        ValueError: a parameter is lazy, or all of them are empty.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hints.of_value('model', model)}")
    params = named_params(unwrap(model), "model")
    for name, param in params.items():
        if is_lazy(param):
            raise ValueError(
                f"model must be initialised, got the lazy parameter {name!r}: run it once before averaging it"
            )
    if params and all(param.numel() == 0 for param in params.values()):
        raise ValueError(
            f"model must hold its parameters, got only empty ones ({next(iter(params))!r} is the first): "
            "gather a model partitioned as by ZeRO-3 before averaging it"
        )
    return model


def check_device(device: object) -> None:
    """Raise TypeError unless ``device`` is what torch takes for a device, or None."""
    if device is not None and not isinstance(device, (int, str, torch.device)):
        raise TypeError(f"device must be a torch.device, got {device!r}{hints.of_value('device', device)}")


def refuse_sharded(model: Module) -> None:
    """Raise ValueError if the model has FSDP modules, which cannot be copied."""
    for _, module in named_modules(model, distinct=True):
        for kind in type(module).__mro__:
            if kind.__name__ in ("FSDPModule", "FullyShardedDataParallel"):
                raise ValueError(f"model must be whole on this rank, got an {kind.__name__}; {checks.FOR_SHARDED}")


def ask_include(include: object, params: Mapping[str, Tensor]) -> dict[str, bool]:
    """Return the answers of ``include`` for ``params``, by name; {} if ``include`` is None, so that all are averaged.

    Raises:
        TypeError: ``include`` is not callable.
        ValueError: it picks no parameter.
    """
    if include is None:
        return {}
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
    asked = {name: bool(include(name, param)) for name, param in params.items()}
    if asked and not any(asked.values()):
        raise ValueError(f"include must pick a parameter, got False for all of them, {next(iter(asked))!r} the first")
    return asked
