"""Where ranks tell each other a word before they share a process group of ours: through the store of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

from torch.distributed import Store


class Rendezvous:
    """Turns in which each of some ranks posts a word and reads those of all; no collective.

    A rank that gives up waiting stays in its turn, so that whoever came late finds it there. A rank that is interrupted
    after it has posted goes on to the next turn, since the others do.

    Args:
        store: of a process group that holds ``ranks``.
        rank: this one.
    """

    def __init__(self, store: Store, rank: int, ranks: Sequence[int]) -> None:
        self._store, self._rank, self._ranks = store, rank, tuple(ranks)
        self.turn = 0  # number of the next one

    def _key(self, rank: int, turn: int) -> str:
        return f"swafast/{turn}/{rank}"

    def exchange(self, word: str, timeout: timedelta) -> list[str]:
        """Post ``word`` and return the words of all ranks, in their order.

        Raises:
            RuntimeError: a rank did not come within ``timeout``.
        """
        keys = [self._key(rank, self.turn) for rank in self._ranks]
        has_posted = False
        try:
            self._store.set(self._key(self._rank, self.turn), word)
            has_posted = True
            self._store.wait(keys, timeout)
            words = self._read(keys)
        except RuntimeError:
            raise
        except BaseException:
            self.turn += has_posted
            raise
        self.turn += 1
        with suppress(RuntimeError):  # who posts in this turn has read what stood in the one before
            self._store.delete_key(self._key(self._rank, self.turn - 2))
        return words

    def _read(self, keys: Sequence[str]) -> list[str]:
        if getattr(self._store, "has_extended_api", lambda: False)():  # one round trip
            return [word.decode() for word in self._store.multi_get(list(keys))]
        return [self._store.get(key).decode() for key in keys]
