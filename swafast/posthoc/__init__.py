"""Averages made after training: from averages that were stored during it, from states, from workers."""

from typing import TYPE_CHECKING

from ..terms.lazy import imported_on_use

if TYPE_CHECKING:
    from .merging import GreedyMerge, greedy_merge, merge
    from .subspaces import curve_subspace, random_subspace
    from .worker_merges import merge_over
else:
    _merging = dict.fromkeys(("GreedyMerge", "greedy_merge", "merge"), "merging")
    _subspaces = dict.fromkeys(("curve_subspace", "random_subspace"), "subspaces")
    __getattr__ = imported_on_use(__name__, {"merge_over": "worker_merges", **_merging, **_subspaces})

__all__ = ["GreedyMerge", "curve_subspace", "greedy_merge", "merge", "merge_over", "random_subspace"]


def __dir__() -> list[str]:
    return __all__
