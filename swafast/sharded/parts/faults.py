"""A rank that is lost: its error, and why no more collectives may run then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ...terms.pickling import pickled_from


@pickled_from("swafast.sharded")
class LostPeerError(RuntimeError):
    """A collective of ours failed: a rank died, or did not arrive within the process group's timeout.

    Later calls that need other ranks raise this at once. Updates without a collective still work.
    """


@contextmanager
def losing_peers(ranks: Sequence[int], call: str) -> Iterator[None]:
    """Raise LostPeerError if the body, a collective in a user's ``call``, raises RuntimeError or ValueError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # a ValueError: the process group was destroyed
        raise LostPeerError(
            f"{call} must be called on all ranks, but one of {list(ranks)} died, or did not come within the process "
            f"group's timeout ({error})"
        ) from error


class Fault:
    """Why no more collectives may run in a group of ours and its subgroups.

    Args:
        call: the user's call that is under way, which runs collectives. Each call of another name sets it.
    """

    reason: str | None = None

    def __init__(self, call: str) -> None:
        self.call = call

    def refuse(self) -> None:
        if self.reason is not None:
            raise LostPeerError(self.reason)

    @contextmanager
    def noted(self, ranks: Sequence[int]) -> Iterator[None]:
        """Run a body that all ``ranks`` run alike, and note an error in it, which leaves peers waiting."""
        self.refuse()
        try:
            yield
        except BaseException as error:
            if len(ranks) > 1 and self.reason is None:
                self.reason = (
                    f"ranks {list(ranks)} went out of lockstep before, with {type(error).__name__}: {error}; local "
                    "calls still work, for all others make a new averaged model"
                )
            raise
