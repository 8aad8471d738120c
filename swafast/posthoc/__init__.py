"""Averages made after training: from averages that were stored during it, from states, from workers."""

from typing import TYPE_CHECKING

from ..terms.lazy import imported_on_use

if TYPE_CHECKING:
    from .merging import GreedyMerge, greedy_merge, merge
    from .worker_merges import merge_over
else:
    _merging = dict.fromkeys(("GreedyMerge", "greedy_merge", "merge"), "merging")
    __getattr__ = imported_on_use(__name__, {"merge_over": "worker_merges", **_merging})

__all__ = ["GreedyMerge", "greedy_merge", "merge", "merge_over"]


def __dir__() -> list[str]:
    return __all__
