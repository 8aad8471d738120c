"""Private parts of ``torch.optim``: hooks of an optimizer, and which steps are the user's, seen in the stack."""

from __future__ import annotations

import sys
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
_MAKES_STATE = "_init_optim_state"
_LOADS_STATE = "_load_optim_state_dict"


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
        if name == _MAKES_STATE and _is_of_states(frame):
            return False
        if _HOOKED is not None and name == _HOOKED[1] and _place(frame.f_code) == _HOOKED:
            depth += frame.f_locals["args"][0]._optimizer_step_post_hooks is hooks
        frame = frame.f_back
    return depth <= 1


def is_making_state() -> bool:
    """Return whether torch is taking a step only to make the state of an optimizer."""
    return _innermost(_MAKES_STATE) is not None


def find_in_flat_state(param: object, key: str) -> Any:
    """Return ``key`` of the group of ``param`` in the flattened state that torch is loading; None if there is none.

    ``set_optimizer_state_dict`` takes from a flattened state only those keys that the optimizer's groups have already.
    """
    frame = _innermost(_LOADS_STATE)
    state = None if frame is None else frame.f_locals.get("state_dict")
    return state.get(f"param_groups.{param}.{key}") if isinstance(state, dict) else None


def owners_of_state_hooks(optimizer: Optimizer) -> list[object]:
    """Return the objects whose methods are hooks on ``state_dict``. A copy or pickle of an optimizer has no hooks."""
    return [getattr(hook, "__self__", None) for hook in optimizer._optimizer_state_dict_post_hooks.values()]


def _is_of_states(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == _STATES


def _innermost(name: str) -> FrameType | None:
    """Return the innermost frame of this function of torch's, or None if this thread is not in it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not (frame.f_code.co_name == name and _is_of_states(frame)):
        frame = frame.f_back
    return frame
