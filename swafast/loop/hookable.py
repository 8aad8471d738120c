"""Which optimizers run the hooks of an attachment, and warnings of those that leave params to others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ..terms import hints
from ..terms.warn import warn_user
from ..torch_private.modules import named_modules, named_tensors
from ..torch_private.optimizers import has_hooks, runs_state_hooks, runs_step_hooks


def check_optimizers(given: object) -> list[Optimizer]:
    """Return one optimizer, or several, as a list.

    Raises:
        TypeError: one is not an optimizer, or does not run torch's hooks. ValueError: the sequence is empty.
    """
    every: Sequence[object] = given if isinstance(given, Sequence) else [given]
    if not every:
        raise ValueError("optimizer must be one optimizer or several, got an empty sequence")
    optimizers = []
    for each in every:
        optimizer = each
        while not _runs_hooks(optimizer) and _forwards(optimizer):
            optimizer = optimizer.optimizer  # type: ignore[attr-defined]
        if not isinstance(optimizer, Optimizer):
            hint = hints.of_value("optimizer", each)
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(each).__name__}{hint}")
        if not _runs_hooks(optimizer):
            refuse_unhooked(optimizer)
        optimizers.append(optimizer)
    return optimizers


def _runs_hooks(optimizer: object) -> bool:
    if not isinstance(optimizer, Optimizer):
        return False
    return has_hooks(optimizer, "step_pre", "step_post") and runs_step_hooks(optimizer)


def _forwards(wrapper: object) -> bool:
    """Return whether a wrapper's step is that of the optimizer inside it, as far as its attributes tell.

    One with a state of its own, such as Lookahead, writes params after the step of the optimizer inside.
    """
    inside = getattr(wrapper, "optimizer", None)
    if inside is None or not hasattr(wrapper, "param_groups"):
        return False
    state = getattr(inside, "state", None)
    return getattr(wrapper, "state", state) is state


#: What to do where an optimizer trains copies.
_FOLLOW_COPIES = (
    "if it trains copies of them, average those; under DeepSpeed install swafast.integrations.deepspeed.WeightAverage "
    "in the engine, or call update_parameters(engine.module) after each engine.step()"
)

STATE_HOOKS = ("state_dict_post", "load_state_dict_pre", "load_state_dict_post")


def refuse_unhooked(optimizer: Optimizer) -> NoReturn:
    name = type(optimizer).__name__
    raise TypeError(
        f"optimizer must run torch's hooks, got {name}: pass the optimizer inside it. If {name} writes params after "
        "that one's step, call update_parameters after each step instead"
    )


def warn_of_no_save(optimizer: Optimizer) -> None:
    if not runs_state_hooks(optimizer):
        name = type(optimizer).__name__
        warn_user(
            f"{name}.state_dict does not run torch's hooks, so a state of {name} lacks the steps of the average: pass "
            "the optimizer inside it, or save attachment.state_dict() too"
        )


def warn_of_frozen(model: Module, optimizers: Sequence[Optimizer]) -> None:
    """Warn of optimizers for which the others may wait in vain, since no param of theirs is trained."""
    for optimizer in optimizers:
        if not any(param.requires_grad for param in _params_of(optimizer)):
            warn_user(
                f"an optimizer of frozen params, {first_name(model, optimizer)!r} the first, is attached with others: "
                "a step counts once all have stepped. If it does not step, pass only those that do"
            )


def in_order(given: Sequence[Optimizer], model: Module) -> list[Optimizer]:
    """Return optimizers in the order of the model's params, so that a state fits however they are listed.

    Raises:
        ValueError: one has no params of the model.
    """
    named = enumerate(named_tensors(model))  # after _bind, which puts FSDP's shards back
    places = {id(param): place for place, (_, param) in reversed(list(named))}
    firsts = [min((places.get(id(param), math.inf) for param in _params_of(each)), default=math.inf) for each in given]
    if math.inf in firsts:
        raise ValueError(f"optimizer must have params of the model, got one that has none of them: {_FOLLOW_COPIES}")
    return [given[index] for index in sorted(range(len(given)), key=firsts.__getitem__)]


def _params_of(optimizer: Optimizer) -> Iterator[Tensor]:
    return (param for group in optimizer.param_groups for param in group["params"])


def ids_of_params(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(param) for optimizer in optimizers for param in _params_of(optimizer)}


def refuse_copies(model: Module, optimizers: Iterable[Optimizer], before: set[int]) -> None:
    """Raise if an optimizer has none of its former params any more, nor one of the model.

    ZeRO, and optimizers of mixed precision, have it train copies. Their step writes the model's params after that
    one's step, and thus after our hook: the average would be a step behind.

    Args:
        before: ids of the params of all optimizers when they were attached to.

    Raises:
        ValueError: one is such.
    """
    own = before.union(id(param) for _, param in named_tensors(model))
    for each in optimizers:
        if own.isdisjoint(id(param) for param in _params_of(each)):
            raise ValueError(
                f"optimizer must have params of the model, as when it was attached to, got one that has got others "
                f"since: {_FOLLOW_COPIES}. Detach this average first: averaged.attachment.detach()"
            )


def warn_of_others(model: Module, optimizers: Sequence[Optimizer]) -> None:
    """Warn of params that another optimizer may write while an update reads them."""
    waiting = ids_of_params(optimizers)
    params: dict[int, str] = {}
    for name, param in named_tensors(model):
        if param.requires_grad:
            params.setdefault(id(param), name)
    names = [name for param, name in params.items() if param not in waiting]
    if names:
        warn_user(
            f"{len(names)} trained params, {names[0]!r} the first, are in none of the given optimizers: if another "
            "optimizer writes them during an update, the average is wrong. Attach to all: attach([first, second])"
        )
    inner = next((name for name, part in named_modules(model) if isinstance(part, AveragedModel)), None)
    if inner is not None:
        warn_user(
            f"model has an averaged model in it, {inner!r}: if that one is updated while an update beside the next "
            "step reads the model, the average of it is wrong. Attach without overlap and offload"
        )


def first_name(model: Module, optimizer: Optimizer) -> str:
    """Return the name of the first of the model's params that the optimizer has."""
    params = set(map(id, _params_of(optimizer)))
    return next((name for name, param in named_tensors(model) if id(param) in params), "")
