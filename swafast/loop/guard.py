"""The guard of an averaged model: it lets one thread at a time use the averages, and none while they are swapped."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from torch.nn import Module

from .attachment import Attachment, wait_for_readers


class ForkSafeLock(type(threading.RLock())):  # type: ignore[misc]  # threading.RLock is a function
    """A reentrant lock that is new in a forked child, where a thread that held it no longer runs.

    It subclasses the lock in C. In a lock written in Python, an interrupt between two lines could leave it held.
    """

    def __init__(self) -> None:
        super().__init__()
        _locks.add(self)

    #: ``is_mine()`` returns whether this thread holds the lock.
    is_mine = type(threading.RLock())._is_owned  # type: ignore[attr-defined]


_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_locks):
        lock._at_fork_reinit()


os.register_at_fork(after_in_child=_renew_all)


class Together(Protocol):
    """What a guard needs of ranks that act together: :class:`~swafast.sharded.parts.ranks.Ranks`."""

    lock: ForkSafeLock

    def settled(self, what: str, number: int | None = None) -> AbstractContextManager[None]: ...


class Guard:
    """Lets one thread at a time use an averaged model, or several that are used together.

    Every action takes locks in the same order: first those of all its averages, then that of their ranks.

    Args:
        guards: the guards of several averages that are used together; none for the guard of one average.
        number: distinguishes averages that share their ranks; the same on every rank.

    Attributes:
        attachment: the attachment by which the averages follow an optimizer, or None.
        model: the model that the averages are swapped into, or None.
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

    def settle(self, action: str = "", written: Module | None = None) -> None:
        """Wait for an update under way, unless this is its thread; also for those that read a model to be written.

        Call it before you take any of the locks, since the update may need them. A thread that holds a lock already
        does not wait again: it has waited before it took the lock.
        """
        waited_for = [guard for guard in self._guards if not guard._lock.is_mine()]
        if waited_for and isinstance(written, Module):
            wait_for_readers(written)
        for guard in waited_for:
            if guard._attachment is not None:
                guard._attachment.settle(action)

    def refuse_while_swapped(self, action: str) -> None:
        """Raise RuntimeError if the averages are swapped into a model."""
        for guard in self._guards:
            if guard._model is not None:
                raise RuntimeError(f"{action} must wait until the averages are swapped back out of the model")

    def locked(self) -> AbstractContextManager[object]:
        """Return a context that holds the averages for this thread, even while they are swapped."""
        return self._guards[0]._lock if len(self._guards) == 1 else self._all_locked()

    @contextmanager
    def _all_locked(self) -> Iterator[None]:
        with ExitStack() as locks:
            for guard in self._guards:
                locks.enter_context(guard._lock)
            yield

    @contextmanager
    def hold(self, action: str, ranks: Together | None = None, written: Module | None = None) -> Iterator[None]:
        """Hold the averages for this thread, after an update under way. Refuse if they are swapped.

        Args:
            ranks: the ranks that take this action together: an error on one raises on all.
            written: the model whose params the action writes.

        Raises:
            RuntimeError: the averages are swapped into a model, here or on another of ``ranks``.
        """
        self.settle(action, written)
        with self.locked():
            if ranks is None:
                self.refuse_while_swapped(action)
                yield
            else:
                with ranks.lock:
                    with ranks.settled(action, self.number):
                        self.refuse_while_swapped(action)
                    yield
