"""Where ranks come to share one process group of ours: through the user's store they tell each other what they have."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup, Store

from ...torch_private.distributed import group_timeout, store_of
from .ranks import GRACE, LostPeerError, Ranks, checked_group, losing_peers

#: How long ranks wait for each other where their process group does not say.
_TIMEOUT = timedelta(minutes=30)


class Rendezvous:
    """Turns in which each of some ranks posts a message and reads those of all; no collective.

    A rank that gives up waiting stays in its turn, so that whoever came late finds it there. A rank that is interrupted
    after it has posted goes on to the next turn, since the others do.

    Args:
        store: of a process group that holds ``ranks``; None: there are no peers.
        rank: this one.
    """

    def __init__(self, store: Store | None, rank: int, ranks: Sequence[int]) -> None:
        self._store, self._rank, self._members = store, rank, tuple(ranks)
        self.turn = 0  # number of the next one

    def _key(self, rank: int, turn: int) -> str:
        return f"swafast/{turn}/{rank}"

    def exchange(self, message: str, timeout: timedelta) -> list[str]:
        """Post ``message`` and return the messages of all ranks, in their order.

        Raises:
            RuntimeError: a rank did not come within ``timeout``.
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
        with suppress(RuntimeError):  # who posts in this turn has read what stood in the one before
            self._store.delete_key(self._key(self._rank, self.turn - 2))
        return messages

    def _read(self, store: Store, keys: Sequence[str]) -> list[str]:
        if getattr(store, "has_extended_api", lambda: False)():  # one round trip
            return [message.decode() for message in store.multi_get(list(keys))]
        return [store.get(key).decode() for key in keys]


class _Seat(Rendezvous):
    """What this rank knows of the groups of ours over one of the user's, and where it meets the others for them."""

    def __init__(self, parent: ProcessGroup) -> None:
        super().__init__(store_of(parent), dist.get_rank(), dist.get_process_group_ranks(parent))
        self.lock = threading.Lock()
        self.ranks: Ranks | None = None
        self._timeout = (group_timeout(parent) or _TIMEOUT) + GRACE

    def is_shared_by_all(self) -> bool:
        """Return whether every rank still has the group that this one has: one rank alone may have seen a loss.

        Raises:
            LostPeerError: a rank did not come.
        """
        own = self.ranks.name if self.ranks is not None and not self.ranks.is_lost else ""
        try:
            with losing_peers(self._members):
                messages = self.exchange(own, self._timeout)
        except LostPeerError:
            raise
        except BaseException:
            self.ranks = None  # the others may go on without this rank
            raise
        return own != "" and set(messages) == {own}


#: By the user's group, as long as that lives.
_seats: weakref.WeakKeyDictionary[ProcessGroup, _Seat] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def shared_ranks(process_group: ProcessGroup | None = None) -> Ranks:
    """Return the one group of ours over ``process_group``, made anew where any rank has lost a peer in it. Collective.

    Raises:
        TypeError, ValueError, LostPeerError: as for :class:`Ranks`.
    """
    parent = checked_group(process_group)
    with _making:
        seat = _seats.get(parent) or _seats.setdefault(parent, _Seat(parent))
    with seat.lock:
        if not seat.is_shared_by_all():
            seat.ranks = None
            seat.ranks = Ranks(process_group, f"swafast {parent.group_name} {seat.turn}")
        assert seat.ranks is not None
        return seat.ranks
