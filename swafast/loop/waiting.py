"""Forwards of averaged modules that wait for an update under way, also where the user calls a part of a module.

:class:`Waits` is what an attachment has of them: a :class:`Wait`, the hook, on each part. Each waits by the attachment,
of which it knows no more than :class:`Waiting` says.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Sequence, Set
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import Module

from ..terms.names import unwrap
from ..torch_private.modules import named_modules, unnamed_tensors

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Waiting(Protocol):
    """What a wait needs of an attachment."""

    @property
    def is_under_way(self) -> bool:
        """Whether an update has begun and may not have ended."""
        ...

    def join(self) -> None:
        """Wait until it has ended."""


class Waits:
    """The hooks by which each part of the averaged modules waits, before its forward, for an update under way.

    The averaged model's own forward waits too. But a teacher may be run as ``averaged.module.backbone(images)``, and
    would read averages of which half are old.

    Args:
        waiting: the attachment, which knows of an update under way and waits for it. The hooks do not keep it alive.
    """

    def __init__(self, waiting: Waiting) -> None:
        self._wait = Wait(waiting)
        self._roots: Sequence[Module] = ()
        self._hooks: list[RemovableHandle] = []

    def wait_within(self, parts: Set[int]) -> None:
        """Wait if one of the averaged modules is among these, given by id."""
        if not parts.isdisjoint(map(id, self._roots)):
            self._wait()

    @property
    def is_under_way(self) -> bool:
        waiting = self._wait.waiting
        return waiting is not None and waiting.is_under_way

    def renew(self, roots: Sequence[Module]) -> None:
        """Have the parts of ``roots`` wait, and no others."""
        if len(roots) == len(self._roots) and all(map(operator.is_, roots, self._roots)):
            return
        for hook in self._hooks:
            hook.remove()
        self._roots, self._hooks = tuple(roots), [*_hooked(self._wait, roots)]

    def note_begun(self) -> None:
        """Have whoever reads the averaged modules within others wait for the update that has begun."""
        begun[id(self)] = weakref.ref(self, partial(_forget, id(self)))


#: Those of which an update has begun, by id. Whoever looks next drops those that have ended. Asking a dict is no call
#: of Python, and most trainings have none.
begun: dict[int, weakref.ref[Waits]] = {}


def _forget(key: int, _: object) -> None:
    begun.pop(key, None)


def wait_within(model: Module) -> None:
    """Wait for updates under way of averages whose modules are in ``model``, such as a teacher in a whole model."""
    if type(model) is Module:  # a stand-in, of which an update that is under way itself reads
        return
    under_way = []
    for key, alive in list(begun.items()):
        each = alive()
        if each is not None and each.is_under_way:
            under_way.append(each)
        elif begun.get(key) is alive:
            begun.pop(key, None)
    parts = {id(part) for _, part in named_modules(unwrap(model), distinct=True)} if under_way else set()
    for each in under_way:
        each.wait_within(parts)


def _hooked(wait: Wait, roots: Iterable[Module]) -> Iterable[RemovableHandle]:
    parts = {id(part): part for root in roots for _, part in named_modules(root)}
    for part in parts.values():
        if not any(True for _ in unnamed_tensors(part)):
            continue  # an activation reads no average, and a hook costs a microsecond or two in each forward
        # Module's own method: a scripted module refuses to register hooks, but runs them. First of the module's hooks:
        # that of spectral_norm reads averages.
        yield Module.register_forward_pre_hook(part, wait, prepend=True)


class Wait:
    """Hook of a module: it waits for the attachment's update under way, if there is one. A copy waits for none."""

    def __init__(self, waiting: Waiting | None = None) -> None:
        self._waiting = weakref.ref(waiting) if waiting is not None else None

    @property
    def waiting(self) -> Waiting | None:
        return self._waiting() if self._waiting is not None else None

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # torch.jit.script asks for it, and nothing else does
            raise AttributeError(
                "torch.jit.script cannot script the waits of an averaged module that is attached with overlap or "
                "offload: call attachment.detach() before, or script a copy of the module made before attach"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __call__(self, *_: object) -> None:
        # Of compiled code, the averaged model's forward waits once, outside of the graph.
        if torch.compiler.is_compiling():
            return
        waiting = self._waiting() if self._waiting is not None else None  # inline: a forward has many of these
        if waiting is not None and waiting.is_under_way:
            waiting.join()

    def __reduce__(self) -> Any:
        return Wait, ()
