"""Swaps in force: models that hold averages, who must not be trained, updated or copied to meanwhile."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from ..terms.names import unwrap
from ..torch_private.modules import named_tensors


class Exchanged(Protocol):
    """What a swap needs of the exchange that it undoes."""

    is_back: bool

    @property
    def tensors(self) -> Sequence[Tensor]: ...
    def there(self) -> None: ...
    def back(self) -> None: ...
    def watch(self) -> None: ...
    def written(self) -> list[str]: ...


class Guarding(Protocol):
    """What a swap needs of the guard of its averages."""

    model: Module | None

    def locked(self, *others: Any) -> AbstractContextManager[object]: ...
    def is_mine(self, *others: Any) -> bool: ...
    def release(self, *others: Any) -> None: ...


class Swap:
    """One use of ``swapped_into``. Leave it in one ``finally``, and finish in another around it, since an interrupt may
    come in the first.

    Swaps of several averages into one model are left in reverse order. One that is left too early raises, and goes back
    as soon as the inner one has left.

    Args:
        guard: the guard of the averages.
        owner: the averaged model.
        model: the model that the averages go into.
        locks: what to hold on leaving, besides the averages.
    """

    def __init__(self, guard: Guarding, owner: object, model: Module, *locks: object) -> None:
        self.owner, self.model = owner, model
        self._guard, self._locks = guard, locks
        self._exchange: Exchanged | None = None
        self._outside = sys.exc_info()[1]
        self._is_free = not guard.is_mine(*locks)  # of this thread
        self._is_left = False
        self._written: dict[str, None] = {}  # names, in order

    def enter(self, exchange: Exchanged) -> None:
        """Put the averages into the model. The caller holds the averages."""
        self._exchange = exchange
        for other in self._others():
            other.note()
        in_force.append(self)
        self._guard.model = self.model
        exchange.there()
        exchange.watch()

    def note(self) -> None:
        """Remember which params were written since :meth:`enter`."""
        if self._exchange is not None and not self._is_left:
            self._written.update(dict.fromkeys(self._exchange.written()))

    def _others(self) -> list[Swap]:
        """Return the other swaps in force into this model or a part of it."""
        others = [swap for swap in in_force if swap is not self]
        ids = self.ids() if others else set()
        return [swap for swap in others if swap.overlaps(ids)]

    def _is_outer(self) -> bool:
        """Return whether averages were swapped into this model after these, and are in it still."""
        if self not in in_force or in_force[-1] is self:
            return False
        ids = self.ids()
        return any(swap.overlaps(ids) for swap in in_force[in_force.index(self) + 1 :])

    def overlaps(self, ids: set[int]) -> bool:
        """Return whether the model or the averages have a tensor of one of these ids."""
        return not ids.isdisjoint(self.ids())

    def ids(self) -> set[int]:
        held = self._exchange.tensors if self._exchange is not None else ()
        return set(map(id, (*_tensors_of(self.model), *held)))

    def leave(self) -> None:
        """Put the params back, unless another swap into this model has come after. Do nothing the second time.

        An interrupt is raised once that is done.

        Raises:
            RuntimeError: this one is left too early, what it had to put back was lost, or params were written
                meanwhile. The message says what holds now. If the body has raised, writes are warned of instead.
        """
        interrupt = None
        while True:
            try:
                self._leave()
                break
            except Exception:
                raise
            except BaseException as raised:  # KeyboardInterrupt or SystemExit
                interrupt = raised
        if interrupt is not None:
            raise interrupt

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

    def _leave(self) -> None:
        if self._exchange is None or self._is_left:
            return
        raised = sys.exc_info()[1]
        failed = raised is not None and raised is not self._outside
        self.note()
        if self._is_outer():
            self._is_left = True
            raise RuntimeError(
                "swapped_into must be left in reverse order: other averages were swapped into the model later, and are "
                "in it still; these go back when those have left"
            )
        self._go_back()
        self._is_left = True
        for other in reversed(in_force):
            if other._is_left and not other._is_outer():
                other._go_back()
        if self._written:
            first, *others = self._written
            more = f" and {len(others)} more" if others else ""
            message = (
                f"model must not be written while swapped, got writes into {first!r}{more}: the model has its own "
                "values again, but its averages may have what was written, so load them from a checkpoint"
            )
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
                    self._end()
        for other in self._others():
            if other._exchange is not None:
                other._exchange.watch()  # our writes are none of theirs

    def _end(self) -> None:
        if self in in_force:
            in_force.remove(self)
        self._guard.model = None


#: In the order in which they were entered.
in_force: list[Swap] = []


def refuse(action: str, tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError if averages are swapped into a model with one of these tensors."""
    ids = set(map(id, tensors))
    for swap in in_force:
        if swap.overlaps(ids):
            raise RuntimeError(
                f"{action} must wait until averages are swapped back out of the model: leave swapped_into first"
            )


def refuse_model(action: str, model: Module) -> None:
    """Raise as :func:`refuse` for the tensors of ``model``."""
    refuse(action, _tensors_of(model))


def _tensors_of(model: Module) -> list[Tensor]:
    return [tensor for buffers in (False, True) for _, tensor in named_tensors(model, buffers=buffers)]


def refuse_averages(action: str, module: Module) -> None:
    """Raise RuntimeError if ``module`` is an averaged model, or the module in it, that is swapped into a model."""
    module = unwrap(module)
    for swap in in_force:
        if module is swap.owner or module is getattr(swap.owner, "module", None):
            raise RuntimeError(
                f"{action} must have the model while averages are swapped into it, got the averaged model, which holds "
                "the model's own params meanwhile"
            )


def broadcasts_buffers(model: Module) -> bool:
    """Return whether each forward pass writes the model's buffers with those of the first rank, as DDP does."""
    return isinstance(model, DistributedDataParallel) and model.broadcast_buffers
