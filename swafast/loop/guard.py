"""The guard of an averaged model: one thread at a time, no update under way, and not while it is in a model."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from torch.nn import Module

from .attachment import Attachment, wait_for_readers

#: Actions that write a model's params, which other averages' updates may be reading.
_WRITING = ("swapped_into", "copy_to")


class ForkSafeLock(type(threading.RLock())):  # type: ignore[misc]  # threading.RLock is a function
    """A reentrant lock, new in a forked child: there, the thread that may have held it no longer runs.

    A subclass of the lock in C, because an interrupt between two lines of Python could leave it held for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        _locks.add(self)

    #: Whether this thread holds it: ``is_mine()``.
    is_mine = type(threading.RLock())._is_owned  # type: ignore[attr-defined]


_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_locks):
        lock._at_fork_reinit()


os.register_at_fork(after_in_child=_renew_all)


class Together(Protocol):
    """What a guard asks of the ranks that take part in an action: :class:`~swafast.sharded.parts.ranks.Ranks`."""

    lock: ForkSafeLock

    def settled(self, what: str, number: int | None = None) -> AbstractContextManager[None]: ...


class Guard:
    """Who may use an averaged model now, or several that are used together.

    Locks are taken in one order: first those of all averages of an action, then that of their ranks.

    Args:
        guards: those of several averages that are used together; none: it is that of one.
        number: of the averages among those that share their ranks, the same on every rank.

    Attributes:
        attachment: by which the averages follow an optimizer, or None.
        model: that the averages are in, inside ``swapped_into``; else None.
    """

    def __init__(self, guards: Sequence[Guard] = (), number: int | None = None) -> None:
        self._guards = tuple(guards) or (self,)
        self.number = number
        self._lock = ForkSafeLock()
        self._attachment: Attachment | None = None
        self._model: Module | None = None

    @property
    def attachment(self) -> Attachment | None:
        return self._attachment

    @attachment.setter
    def attachment(self, attachment: Attachment | None) -> None:
        for guard in {self, *self._guards}:
            guard._attachment = attachment

    @property
    def is_attached(self) -> bool:
        """Whether one of the averages follows an optimizer, alone or with the others."""
        return any(guard._attachment is not None for guard in {self, *self._guards})

    @property
    def model(self) -> Module | None:
        return next((guard._model for guard in self._guards if guard._model is not None), None)

    @model.setter
    def model(self, model: Module | None) -> None:
        (guard,) = self._guards
        guard._model = model

    def settle(self, action: str = "") -> None:
        """Wait for an update under way, unless this is it; before an action that writes params, for all that read any.

        Whoever holds the lock that the update may be waiting for is in an action that has waited before it took the
        lock. All averages of an action are waited for before the first lock is taken.
        """
        waited_for = [guard for guard in self._guards if not guard._lock.is_mine()]
        if waited_for and action in _WRITING:
            wait_for_readers()
        for guard in waited_for:
            if guard._attachment is not None:
                guard._attachment.join()

    def refuse_while_swapped(self, action: str) -> None:
        """Raise RuntimeError while the averages are in a model."""
        for guard in self._guards:
            if guard._model is not None:
                raise RuntimeError(f"{action} must wait until the averages are swapped back out of the model")

    def locked(self) -> AbstractContextManager[object]:
        """Hold the averages for this thread, whatever their state."""
        return self._guards[0]._lock if len(self._guards) == 1 else self._all_locked()

    @contextmanager
    def _all_locked(self) -> Iterator[None]:
        with ExitStack() as locks:
            for guard in self._guards:
                locks.enter_context(guard._lock)
            yield

    @contextmanager
    def hold(self, action: str, ranks: Together | None = None) -> Iterator[None]:
        """Hold the averages for this thread, with no update under way; refuse while they are in a model.

        Args:
            ranks: that all take this action together: what one of them refuses raises on each.

        Raises:
            RuntimeError: the averages are in a model, or another rank refuses.
        """
        self.settle(action)
        with self.locked():
            if ranks is None:
                self.refuse_while_swapped(action)
                yield
            else:
                with ranks.lock:
                    with ranks.settled(action, self.number):
                        self.refuse_while_swapped(action)
                    yield
