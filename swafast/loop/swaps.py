"""Swaps in force: models that hold averages, who must not be trained, updated or copied to meanwhile."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from ..terms.names import unwrap
from ..torch_private.modules import named_modules, named_tensors
from ..torch_private.optimizers import is_making_state
from .guard import ForkSafeLock, Guard, finished

# What becomes of writes by others while the averages are in the model.
INTO_MODEL = "the model has its own values again, but averages may have what was written: load them from a checkpoint"
INTO_AVERAGES = "the model's own values lay there, so it may have what was written: load it from a checkpoint"
INTO_BOTH = "the model lends it to its averages, and no swap puts it back: load it from a checkpoint, or undo the write"
DISCARDED = "the model has its own values again, and what was written is gone"
INTO_OWN = "averages keep what was written: load them from a checkpoint, or undo the write"
REPLACED = "the model has its own values again, and what was written is gone: write it after the swap"
REMOVED = "the model no longer has it, so what stands in its place may have averages: load it from a checkpoint"


class Exchanged(Protocol):
    """What a swap needs of the exchange that it undoes."""

    is_back: bool

    @property
    def tensors(self) -> Sequence[Tensor]: ...
    @property
    def beside(self) -> Sequence[Tensor]: ...
    def there(self) -> None: ...
    def back(self) -> None: ...
    def watch(self) -> None: ...
    def written(self) -> dict[str, str]: ...


class Swap:
    """One use of ``swapped_into`` or ``sampled_into``.

    Leave it in one ``finally``, and finish in another around it, since an interrupt may come in the first. Swaps of
    several averages into one model are left in reverse order. One that is left too early raises, and goes back as soon
    as the inner one has left.

    Args:
        guard: the guard of the averages.
        owner: the averaged model.
        model: the model that the averages go into.
        locks: what to hold on leaving, besides the averages.
        call: the user's.
    """

    def __init__(
        self, guard: Guard, owner: object, model: Module, *locks: ForkSafeLock, call: str = "swapped_into"
    ) -> None:
        self.owner, self.model, self.call = owner, model, call
        self._guard, self._locks = guard, locks
        self._exchange: Exchanged | None = None
        self._outside = sys.exc_info()[1]
        self._is_free = not guard.is_mine(*locks)  # of this thread
        self._is_left = False
        self._grad: bool | None = None  # whether the body leaves gradients on
        self._hooks: list[RemovableHandle] = []
        self._written: dict[str, str] = {}  # by name, in order: what becomes of it

    def enter(self, exchange: Exchanged) -> None:
        """Put the averages into the model. The caller holds the averages."""
        self._exchange = exchange
        others = self._others()
        for other in others:
            other.note()
        _refuse_steps()
        in_force.append(weakref.ref(self, _forget))
        self._guard.lend(self.model, self.call)
        if isinstance(owner := self.owner, AveragedModel):
            # The averaged model refuses itself. Its module is the user's own, and does not know of the swap.
            refusal = _Refusal(self)
            # Module's own methods: a scripted module refuses to register hooks, but runs them.
            self._hooks.append(Module.register_forward_pre_hook(owner.module, refusal))
            self._hooks.append(Module.register_state_dict_pre_hook(owner.module, refusal))
        exchange.there()
        exchange.watch()
        for other in others:
            other.disregard()

    def note(self) -> None:
        """Remember what was written since :meth:`enter`."""
        if self._exchange is not None and not self._is_left:
            self._written |= self._exchange.written()

    def disregard(self) -> None:
        """Take what was written until now for our own, once it was noted."""
        if self._exchange is not None and not self._is_left:
            self._exchange.watch()

    def take_writes(self) -> None:
        """Take what was written until now for our own, also for other swaps into this model."""
        for swap in (self, *self._others()):
            swap.disregard()

    def _others(self) -> list[Swap]:
        """Return the other swaps in force into this model or a part of it."""
        others = [swap for swap in living() if swap is not self]
        ids = self.ids() if others else set()
        return [swap for swap in others if swap.overlaps(ids)]

    def _is_outer(self) -> bool:
        """Return whether averages were swapped into this model after these, and are in it still."""
        swaps = living()
        later = swaps[swaps.index(self) + 1 :] if self in swaps else []
        ids = self.ids() if later else set()
        return any(swap.overlaps(ids) for swap in later)

    def overlaps(self, ids: set[int]) -> bool:
        """Return whether one of these ids is in :meth:`ids`."""
        return not ids.isdisjoint(self.ids())

    def ids(self) -> set[int]:
        """Return the ids of the tensors of the model and the averages, and of their memory."""
        held = (*self._exchange.tensors, *self._exchange.beside) if self._exchange is not None else ()
        return _ids((*_tensors_of(self.model), *held))

    def leave(self) -> None:
        """Put the params back, unless another swap into this model has come after. Do nothing the second time.

        An interrupt is raised once that is done.

        Raises:
            RuntimeError: this one is left too early, what it had to put back was lost, or params were written
                meanwhile. The message says what holds now. If the body has raised, writes are warned of instead.
        """
        if self._grad is None:
            self._grad = torch.is_grad_enabled()
        finished(self._leave)

    def finish(self) -> None:
        """Leave if an interrupt or an error has prevented it, and release locks that it has left held."""
        try:
            self.leave()
        except Exception:
            if not self._is_left:  # a device that fails again: nothing can be put back
                self._end()
            raise
        finally:
            if self._is_free:
                self._guard.release(*self._locks)
            if self._grad is not None and torch.is_grad_enabled() != self._grad:
                torch.set_grad_enabled(self._grad)  # an interrupt on leaving torch.no_grad has left it

    def _leave(self) -> None:
        if self._exchange is None or self._is_left:
            return
        raised = sys.exc_info()[1]
        failed = raised is not None and raised is not self._outside
        self.note()
        if self._is_outer():
            _waiting.append(self)
            self._is_left = True
            raise RuntimeError(
                f"{self.call} must be left in reverse order: other averages were swapped into the model later, and are "
                "in it still; these go back when those have left"
            )
        self._go_back()
        self._is_left = True
        for other in reversed(living()):
            if other._is_left and not other._is_outer():
                other._go_back()
        if isinstance(raised, GeneratorExit):  # Python may be collecting the model, and have emptied it
            self._written = {name: end for name, end in self._written.items() if end != REMOVED}
        if self._written:
            first, *others = self._written
            more = f" and {len(others)} more" if others else ""
            ends = "; ".join(dict.fromkeys(self._written.values()))
            message = f"model and averages must not be written while swapped, got writes into {first}{more}: {ends}"
            if not failed:
                raise RuntimeError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _go_back(self) -> None:
        """Put the params back and free the guard."""
        assert self._exchange is not None
        with self._guard.locked(*self._locks):
            try:
                self._exchange.back()
            finally:
                if self._exchange.is_back:
                    self._written |= self._exchange.written()  # now it knows what stood in the place of params
                    self._end()
        for other in self._others():
            other.disregard()  # our writes are none of theirs

    def _end(self) -> None:
        in_force[:] = [swap for swap in in_force if swap() is not self]
        _waiting[:] = [swap for swap in _waiting if swap is not self]
        self._guard.model = None
        for hook in self._hooks:
            hook.remove()


class _Refusal:
    """Hook of an averaged module: it refuses a forward, a state and a copy for as long as the swap is in force."""

    def __init__(self, swap: Swap | None = None) -> None:
        self._swap = weakref.ref(swap) if swap is not None else None

    def __call__(self, *_: object) -> None:
        swap = self._swap() if self._swap is not None else None
        if swap is not None and swap in living():
            raise RuntimeError(
                "module of the averaged model must not be used while averages are swapped into a model, since it may "
                f"hold the model's own params: use the model, or leave {swap.call} first"
            )

    def __reduce__(self) -> Any:
        self()
        return _Refusal, ()


#: In the order in which they were entered. Weak, so that a swap that is never left keeps no model alive.
in_force: list[weakref.ref[Swap]] = []

#: Those that were left too early.
_waiting: list[Swap] = []


def living() -> list[Swap]:
    """Return the swaps in force, in the order in which they were entered."""
    return [swap for reference in in_force if (swap := reference()) is not None]


def _forget(reference: weakref.ref[Swap]) -> None:
    in_force[:] = [each for each in in_force if each is not reference]


def _refuse_steps() -> None:
    """Have every optimizer ask before its steps, from the first swap on. Fused ones write without telling autograd."""
    global _asks
    if not _asks:
        _asks = True
        register_optimizer_step_pre_hook(_refuse_step)
        register_optimizer_step_post_hook(_after_step)


_asks = False


def _refuse_step(optimizer: Optimizer, *_: object) -> None:
    if not in_force:
        return
    if is_making_state():
        for swap in living():
            swap.note()
    else:
        refuse("a step of the optimizer", (p for group in optimizer.param_groups for p in group["params"]))


def _after_step(*_: object) -> None:
    """Disregard what a step has written that torch takes to make an optimizer's state: its rate is 0."""
    if in_force and is_making_state():
        for swap in living():
            swap.disregard()


def refuse(action: str, tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError if averages are swapped into a model with one of these tensors, or on their memory."""
    ids = _ids(tensors)
    for swap in living():
        if swap.overlaps(ids):
            raise RuntimeError(
                f"{action} must wait until averages are swapped back out of the model: leave {swap.call} first"
            )


def refuse_model(action: str, model: Module) -> None:
    """Raise as :func:`refuse` for the tensors of ``model``."""
    refuse(action, _tensors_of(model))


def _ids(tensors: Iterable[Tensor]) -> set[int]:
    """Return the ids of tensors, and the addresses of their memory: params may be views of one flat tensor."""
    ids: set[int] = set()
    for tensor in tensors:
        ids.add(id(tensor))
        with suppress(RuntimeError, NotImplementedError):  # a sparse one, for instance, has no memory of its own
            ids.add(tensor.untyped_storage().data_ptr())
    return ids - {0}


def _tensors_of(model: Module) -> list[Tensor]:
    return [tensor for buffers in (False, True) for _, tensor in named_tensors(model, buffers=buffers)]


def owners(model: Module) -> list[object]:
    """Return whose averages are in ``model``, or in a part of it."""
    ids = set(map(id, _tensors_of(model)))
    return [swap.owner for swap in living() if swap.overlaps(ids)]


def refuse_averages(action: str, module: Module) -> None:
    """Raise RuntimeError if ``module`` is an averaged model, or a part of one, that is swapped into a model."""
    module = unwrap(module)
    for swap in living():
        if isinstance(swap.owner, Module) and any(module is part for _, part in named_modules(swap.owner)):
            raise RuntimeError(
                f"{action} must have the model while averages are swapped into it, got the averaged model, which holds "
                "the model's own params meanwhile"
            )


def broadcasts_buffers(model: Module) -> bool:
    """Return whether each forward pass writes the model's buffers with those of the first rank, as DDP does."""
    return isinstance(model, DistributedDataParallel) and model.broadcast_buffers
