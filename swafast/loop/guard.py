"""The guard of an averaged model: it lets one thread at a time use the averages, and none while they are swapped."""

from __future__ import annotations

import io
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from itertools import chain
from operator import attrgetter
from typing import Any, NoReturn, ParamSpec, Protocol, TypeVar

import torch
from torch.nn import Module

from .attachment import Attachment, wait_for_readers
from .waiting import begun, wait_within

P = ParamSpec("P")
T = TypeVar("T")


class _Method(property):
    """A method that is looked up without a call of Python. An ``ExitStack`` calls it on the class."""

    def __call__(self, context: object, *exception: object) -> Any:
        return self.__get__(context, None)(*exception)


class _Closing(io.IOBase):
    """Its ``__exit__`` is in C, takes what a ``with`` statement passes, and calls ``close``, whatever that is."""

    closed = True  # otherwise the finalizer closes it too


class SeamlessContext:
    """Enters and leaves a generator. Unlike contextlib's, it runs no Python before and after the generator's own.

    Python raises KeyboardInterrupt between instructions of Python, also in ``__enter__`` and ``__exit__`` if these are
    in Python. There it would leave a lock held, or a model on its averages.

    The generator yields once. What the body raises is not raised there: what follows ``yield`` runs in any case.
    """

    __slots__ = ("_enter", "_exit")
    __enter__ = _Method(attrgetter("_enter"))
    __exit__ = _Method(attrgetter("_exit"))


def _refuse_again() -> NoReturn:
    raise RuntimeError("a context can be entered once: make another for each with statement")


def seamless(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """Make a function that returns a :class:`SeamlessContext` of a generator function."""

    @wraps(function)
    def make(*args: P.args, **options: P.kwargs) -> Any:
        generator = function(*args, **options)
        context, closing = SeamlessContext(), _Closing()
        closing.close = partial(next, generator, None)  # type: ignore[method-assign]
        context._enter = chain(generator, iter(_refuse_again, None)).__next__  # type: ignore[attr-defined]
        context._exit = closing.__exit__  # type: ignore[attr-defined]
        return context

    return make


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
        self._is_alone = not guards
        self._guards = tuple(guards) or (self,)
        self.number = number
        self._lock = ForkSafeLock()
        self._attachment: Attachment | None = None
        self._model: Module | None = None
        self._call = "swapped_into"  # by which the averages are in the model

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

    def lend(self, model: Module, call: str) -> None:
        """Note that the averages are swapped into ``model`` until :attr:`model` is None, and by which call."""
        (guard,) = self._guards
        guard._call = call
        self.model = model

    def settle(self, action: str = "", written: Module | None = None) -> None:
        """Wait for an update under way, unless this is its thread; also for those that read a model to be written.

        Call it before you take any of the locks, since the update may need them. A thread that holds a lock already
        does not wait again: it has waited before it took the lock.
        """
        for guard in self._guards:
            if guard._lock.is_mine():
                continue
            if written is not None and isinstance(written, Module):
                wait_for_readers(written)
                written = None
            if guard._attachment is not None:
                guard._attachment.settle(action)

    def settled_or_error(self, action: str = "", written: Module | None = None) -> Exception | None:
        """Wait as :meth:`settle` does, and return what that raises, to raise it where other ranks hear of it."""
        try:
            self.settle(action, written)
        except Exception as error:  # of an update in a thread
            return error
        return None

    def refuse_while_swapped(self, action: str) -> None:
        """Raise RuntimeError if the averages are swapped into a model."""
        for guard in self._guards:
            if guard._model is not None:
                raise RuntimeError(
                    f"{action} must wait until the averages are swapped back out of the model: leave {guard._call} "
                    "first"
                )

    def locked(self, *others: ForkSafeLock) -> AbstractContextManager[object]:
        """Return a context that holds the averages, then ``others``, for this thread, even while they are swapped."""
        locks = [guard._lock for guard in self._guards] + [*others]
        return locks[0] if len(locks) == 1 else _all_held(locks)

    def is_mine(self, *others: ForkSafeLock) -> bool:
        """Return whether this thread holds the averages or one of ``others``."""
        return any(lock.is_mine() for lock in (*(guard._lock for guard in self._guards), *others))

    def release(self, *others: ForkSafeLock) -> None:
        """Release the averages and ``others`` as often as this thread holds them."""
        for lock in (*(guard._lock for guard in self._guards), *others):
            while lock.is_mine():
                lock.release()

    @seamless
    def hold(
        self, action: str, ranks: Together | None = None, written: Module | None = None, read: Module | None = None
    ) -> Iterator[None]:
        """Hold the averages for this thread, after an update under way. Refuse if they are swapped.

        Args:
            ranks: the ranks that take this action together: an error on one raises on all.
            written: the model whose params the action writes.
            read: the model whose params it reads.

        Raises:
            RuntimeError: the averages are swapped into a model, here or on another of ``ranks``.
        """
        grad = torch.is_grad_enabled()
        if begun and isinstance(read, Module):
            wait_within(read)
        if ranks is None:
            self.settle(action, written)
            with self._lock if self._is_alone else self.locked():
                self.refuse_while_swapped(action)
                yield
        else:
            failure = self.settled_or_error(action, written)
            with self.locked(ranks.lock):
                with ranks.settled(action, self.number):
                    if failure is not None:
                        raise failure
                    self.refuse_while_swapped(action)
                yield
        if torch.is_grad_enabled() != grad:  # an interrupt on leaving torch.no_grad has left it
            torch.set_grad_enabled(grad)


def finished(action: Callable[[], None]) -> None:
    """Run an action to its end. After an interrupt in it, run it again, and raise the interrupt once it is done."""
    interrupt = None
    while True:
        try:
            action()
            break
        except Exception:
            raise
        except BaseException as raised:  # KeyboardInterrupt or SystemExit
            interrupt = raised
    if interrupt is not None:
        raise interrupt


@seamless
def _all_held(locks: Sequence[ForkSafeLock]) -> Iterator[None]:
    # Up to three in one frame: each context of its own costs a microsecond.
    if len(locks) == 1:
        with locks[0]:
            yield
    elif len(locks) == 2:
        with locks[0], locks[1]:
            yield
    elif len(locks) == 3:
        with locks[0], locks[1], locks[2]:
            yield
    else:
        with locks[0], locks[1], locks[2], _all_held(locks[3:]):
            yield
