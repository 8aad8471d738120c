"""What DeepSpeed's ZeRO-3 notes on a param that it has partitioned, read without DeepSpeed.

It replaces the param's values by an empty tensor and sets attributes, whose names stand here alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

#: On each param of a model that it partitions. The small ones may stay whole.
_MARKS = ("ds_shape", "ds_numel", "ds_id", "ds_status", "ds_tensor")

# The functions below a check take Any, since mypy knows no attributes that DeepSpeed sets.


def mark_of_emptied(param: Tensor) -> str | None:
    """Return a mark of an empty param whose values are partitioned; None if it has no values anywhere."""
    if getattr(param, "ds_numel", None) == 0:
        return None
    return next((mark for mark in _MARKS if hasattr(param, mark)), None)


def is_partitioned(param: Tensor | None) -> bool:
    """Return whether a param is partitioned. It may be gathered at the moment."""
    return hasattr(param, "ds_tensor") and hasattr(param, "ds_id")


def partition_of(param: Any) -> Tensor:
    """Return this rank's partition, flat, with the elements that pad it."""
    partition: Tensor = param.ds_tensor
    return partition


def whole_shape(param: Any) -> tuple[int, ...]:
    return tuple(param.ds_shape)


def whole_numel(param: Any) -> int:
    return int(param.ds_numel)


def partition_group(param: Any) -> Any:
    """Return the process group of the ranks that have a partition each."""
    return param.ds_process_group


def zero_optimizer(param: Tensor | None) -> Any:
    """Return the ZeRO-3 optimizer that steps a param; None if there is none."""
    return getattr(param, "_z3_optimizer", None)


def is_gathered(param: Any) -> bool:
    """Return whether a partitioned param has all of its values at the moment."""
    return param.ds_status.name == "AVAILABLE" and param.numel() == param.ds_numel


def has_second_partition(param: Tensor) -> bool:
    """Return whether a param also has partitions over fewer ranks (hpZ), which a forward pass gathers instead."""
    names = ("ds_secondary_tensor", "ds_zero_param_process_group")
    return any(getattr(param, name, None) is not None for name in names)


def is_on_disk(param: Tensor) -> bool:
    """Return whether partitions of a param are swapped to NVMe."""
    return getattr(param, "nvme_swapper", None) is not None


def is_of_mics(param: Tensor) -> bool:
    return hasattr(param, "comm")


def is_quantized_partition(param: Any) -> bool:
    """Return whether the partition has quantized values, and scales beside them."""
    return hasattr(param.ds_tensor, "ds_quant_scale")
