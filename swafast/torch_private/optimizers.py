"""Private parts of ``torch.optim``: hooks of an optimizer, and which steps are the user's, seen in the stack."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from types import CodeType, FrameType
from typing import Any

from torch.optim import Optimizer

Place = tuple[str, str, int]


def _place(code: CodeType) -> Place:
    """Return what a function's code and its compiled forms have in common."""
    return code.co_filename, code.co_name, code.co_firstlineno


#: The function that torch puts around ``step`` of each class, to run hooks before and after it.
_HOOKED: Place | None = (
    _place(Optimizer.profile_hook_step(Optimizer.step).__code__) if hasattr(Optimizer, "profile_hook_step") else None
)
_STATES = "torch.distributed.checkpoint.state_dict"  # compared by name: importing it takes long
_LOADS_STATE = "_load_optim_state_dict"
_GETS_STATE = "_get_optim_state_dict"
#: Functions of torch and torchtitan that take a step to make an optimizer's state, with their modules.
_MAKE_STATE = {
    "_init_optim_state": _STATES,
    "init_state": "torch.distributed.optim.named_optimizer",
    "init_optim_state": "torchtitan.components.optimizer.utils",
}


def has_hooks(optimizer: Optimizer, *names: str) -> bool:
    """Return whether hooks can be registered, such as ``"step_post"``. A wrapper may lack the dicts that hold them."""
    try:
        for name in names:
            getattr(optimizer, f"register_{name}_hook")(lambda *_: None).remove()
    except (AttributeError, TypeError):  # no dict, or a plain one, to which no handle can refer
        return False
    return True


def runs_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether ``step`` runs the hooks that the optimizer has, or those of an optimizer inside it."""
    if not _is_hooked(optimizer) and type(optimizer).zero_grad is Optimizer.zero_grad:
        optimizer._patch_step_function()  # as its first zero_grad would, of which the user may make no use
    return _is_hooked(optimizer) or any(map(_is_hooked, _sharing(optimizer, "_optimizer_step_post_hooks")))


def _is_hooked(optimizer: Optimizer) -> bool:
    return bool(getattr(type(optimizer).step, "hooked", False))


def runs_state_hooks(optimizer: Optimizer) -> bool:
    """Return whether ``state_dict`` runs hooks, as far as its code tells: it is torch's, or calls a base class.

    It is not called to see, since it may gather state over ranks, or make state.
    """
    if _sharing(optimizer, "_optimizer_state_dict_post_hooks"):
        return True
    bases = type(optimizer).__mro__
    calls = {"super", *(base.__name__ for base in bases)}
    for base in bases[: bases.index(Optimizer)]:
        code = getattr(inspect.unwrap(vars(base).get("state_dict", object())), "__code__", None)
        if code is not None and calls.isdisjoint(code.co_names) and "__class__" not in code.co_freevars:
            return False
    return True


def _sharing(optimizer: Optimizer, hooks: str) -> list[Optimizer]:
    """Return the optimizers inside a wrapper that have the same dict of hooks."""
    inner = (each for each in vars(optimizer).values() if isinstance(each, Optimizer) and each is not optimizer)
    return [each for each in inner if getattr(each, hooks, None) is getattr(optimizer, hooks)]


def is_step(optimizer: Optimizer) -> bool:
    """Return whether the step whose hook calls this is the outermost of ``optimizer``, and not one that torch takes.

    torch puts its hooks around ``step`` of each class, so they run again for each ``super().step()``. torch takes steps
    with zero gradients and rates to make an optimizer's state. Both are seen in the stack of this thread. Unlike a
    depth counter, the stack is right after a step that has raised.
    """
    hooks = optimizer._optimizer_step_post_hooks  # a wrapper may share those of an optimizer
    depth = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:  # 0.15 us a frame
        name = frame.f_code.co_name
        if name in _MAKE_STATE and _is_of(_MAKE_STATE, frame):
            return False
        if _HOOKED is not None and name == _HOOKED[1] and _place(frame.f_code) == _HOOKED:
            depth += frame.f_locals["args"][0]._optimizer_step_post_hooks is hooks
        frame = frame.f_back
    return depth <= 1


def is_making_state() -> bool:
    """Return whether torch is taking a step only to make the state of an optimizer."""
    return _innermost(_MAKE_STATE) is not None


def is_getting_keys() -> bool:
    """Return whether ``set_optimizer_state_dict`` gets the optimizer's state, only to see which keys it has."""
    return _innermost({_GETS_STATE: _STATES}) is not None and _innermost({_LOADS_STATE: _STATES}) is not None


def is_making_full_state() -> bool:
    """Return whether ``get_optimizer_state_dict`` makes a full state."""
    frame = _innermost({_GETS_STATE: _STATES})
    return frame is not None and bool(frame.f_locals["info"].full_state_dict)


def find_in_flat_state(params: Iterable[object], key: str) -> Any:
    """Return ``key`` of the group of one of ``params`` in the flattened state that torch is loading, or None.

    ``set_optimizer_state_dict`` takes from a flattened state only those keys that the optimizer's groups have already.
    """
    frame = _innermost({_LOADS_STATE: _STATES})
    state = None if frame is None else frame.f_locals.get("state_dict")
    if not isinstance(state, dict):
        return None
    keys = (f"param_groups.{param}.{key}" for param in params)
    return next((state[each] for each in keys if each in state), None)


def owners_of_state_hooks(optimizer: Optimizer) -> list[object]:
    """Return the objects whose methods are hooks on ``state_dict``. A copy or pickle of an optimizer has no hooks."""
    return [getattr(hook, "__self__", None) for hook in optimizer._optimizer_state_dict_post_hooks.values()]


def owners_of_step_hooks(optimizer: Optimizer) -> list[object]:
    """Return the objects whose methods are hooks before ``step``."""
    return [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()]


def _is_of(functions: Mapping[str, str], frame: FrameType) -> bool:
    return functions.get(frame.f_code.co_name) == frame.f_globals.get("__name__", "")


def _innermost(functions: Mapping[str, str]) -> FrameType | None:
    """Return the innermost frame of one of these functions, or None if this thread is in none of them."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_of(functions, frame):
        frame = frame.f_back
    return frame
