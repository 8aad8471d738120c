"""Tensors of a state that no merge averages, whatever their dtype; this module does not import torch."""

from __future__ import annotations

#: BatchNorm's statistics with their counter, which fit one model alone, and further state, as the scales of fp8 layers.
_LEAVES = ("running_mean", "running_var", "num_batches_tracked", "_extra_state")


def is_unmerged(name: str) -> bool:
    """Return whether the tensor of this name is taken from one model, and never averaged."""
    return leaf_of(name) in _LEAVES


def is_statistic(name: str) -> bool:
    """Return whether this is the name of BatchNorm's statistics, for which ``update_bn`` is to be called."""
    return leaf_of(name) in ("running_mean", "running_var")


def leaf_of(name: str) -> str:
    """Return the last part of a tensor's name."""
    return name.rpartition(".")[2]
