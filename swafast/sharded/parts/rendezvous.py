"""How ranks come to share one process group of ours: they exchange messages through the store of the user's group."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup, Store

from ...torch_private.distributed import group_timeout, store_of
from .faults import LostPeerError, losing_peers
from .ranks import GRACE, OneProcess, Ranks, checked_group

#: How long ranks wait for each other if their process group has no timeout.
_TIMEOUT = timedelta(minutes=30)


class Rendezvous:
    """Turns in which each rank posts a message and reads those of all ranks, without a collective.

    A rank that times out stays in its turn, so that late ranks can still meet it there. A rank that is interrupted
    after posting goes on to the next turn, since the others do.

    Args:
        store: the store of a process group that holds ``ranks``; None: there are no peers.
        rank: this rank.
    """

    def __init__(self, store: Store | None, rank: int, ranks: Sequence[int]) -> None:
        self._store, self._rank, self._members = store, rank, tuple(ranks)
        self.turn = 0  # number of the next turn

    def _key(self, rank: int, turn: int) -> str:
        return f"swafast/{turn}/{rank}"

    def exchange(self, message: str, timeout: timedelta) -> list[str]:
        """Post ``message`` and return the messages of all ranks, in the order of ranks.

        Raises:
            RuntimeError: a rank did not post within ``timeout``.
        """
        if self._store is None:
            return [message]
        keys = [self._key(rank, self.turn) for rank in self._members]
        has_posted = False
        try:
            self._store.set(self._key(self._rank, self.turn), message)
            has_posted = True
            self._store.wait(keys, timeout)
            messages = self._read(self._store, keys)
        except RuntimeError:
            raise
        except BaseException:
            self.turn += has_posted
            raise
        self.turn += 1
        with suppress(RuntimeError):  # every rank that has posted in this turn has read the one before
            self._store.delete_key(self._key(self._rank, self.turn - 2))
        return messages

    def _read(self, store: Store, keys: Sequence[str]) -> list[str]:
        if getattr(store, "has_extended_api", lambda: False)():  # one round trip
            return [message.decode() for message in store.multi_get(list(keys))]
        return [store.get(key).decode() for key in keys]


class _Seat(Rendezvous):
    """This rank's view of our process group over one of the user's, and the rendezvous for it."""

    def __init__(self, parent: ProcessGroup) -> None:
        super().__init__(store_of(parent), dist.get_rank(), dist.get_process_group_ranks(parent))
        self.lock = threading.Lock()
        self.ranks: Ranks | None = None
        self._timeout = (group_timeout(parent) or _TIMEOUT) + GRACE

    def is_shared_by_all(self, call: str) -> bool:
        """Return whether all ranks still have the same group; perhaps only some of them know of a lost peer.

        Raises:
            LostPeerError: a rank did not post its message.
        """
        own = self.ranks.name if self.ranks is not None and not self.ranks.is_lost else ""
        try:
            with losing_peers(self._members, call):
                messages = self.exchange(own, self._timeout)
        except LostPeerError:
            raise
        except BaseException:
            self.ranks = None  # the others may make a new group without this rank
            raise
        return own != "" and set(messages) == {own}


#: By the user's group, as long as that is alive.
_seats: weakref.WeakKeyDictionary[ProcessGroup, _Seat] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def shared_ranks(process_group: ProcessGroup | Ranks | None = None, call: str = "this") -> Ranks:
    """Return our one group over ``process_group``. If a rank has lost a peer in it, make a new one. Collective.

    Without any process group this is one process, and each call returns ranks of its own.

    Args:
        process_group: our own group is returned as it is.
        call: the user's call, for the message of an error.

    Raises:
        TypeError, ValueError, LostPeerError: as :class:`Ranks`.
    """
    if isinstance(process_group, Ranks):
        return process_group
    if process_group is None and not (dist.is_available() and dist.is_initialized()):
        return OneProcess()
    parent = checked_group(process_group)
    with _making:
        seat = _seats.get(parent) or _seats.setdefault(parent, _Seat(parent))
    with seat.lock:
        if not seat.is_shared_by_all(call):
            seat.ranks = None
            seat.ranks = Ranks(process_group, f"swafast {parent.group_name} {seat.turn}", call=call)
        assert seat.ranks is not None
        return seat.ranks
