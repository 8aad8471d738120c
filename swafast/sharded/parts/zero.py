"""What DeepSpeed's ZeRO-3 holds of a model on this rank: a run of each param, and one of its fp32 master.

DeepSpeed is not imported: ``partitioned.py`` in ``terms/`` reads what it notes on its params. A *working run* is what a
forward pass gathers, in the dtype of the model. The *master* is what the optimizer steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...terms import partitioned


class WorkingRun:
    """Where the working run of one param lies. It keeps no param alive."""

    def __init__(self, param: Tensor) -> None:
        self._param = weakref.ref(param)

    @property
    def local(self) -> Tensor:
        """The partition, with the elements that pad it."""
        param: Any = self._param()
        assert param is not None, "a binding asks is_current first"
        return partitioned.partition_of(param)

    def is_current(self) -> bool:
        """Return whether the param lives, and is still partitioned."""
        return partitioned.is_partitioned(self._param())


class Masters:
    """Where the masters of one group of params lie, one after another. It keeps no engine alive.

    Args:
        param: one of the group.
    """

    def __init__(self, param: Tensor, optimizer: object, group: int) -> None:
        self._param, self._optimizer, self._group = weakref.ref(param), weakref.ref(optimizer), group

    @property
    def local(self) -> Tensor:
        """This rank's flat masters."""
        optimizer: Any = self._optimizer()
        assert optimizer is not None, "a binding asks is_current first"
        return optimizer.fp32_partitioned_groups_flat[self._group]

    def is_current(self) -> bool:
        """Return whether the engine lives, and the params are not of a new one."""
        optimizer = self._optimizer()
        return optimizer is not None and partitioned.zero_optimizer(self._param()) is optimizer


@dataclass(frozen=True)
class ZeroRun:
    """This rank's run of one param."""

    names: tuple[str, ...]  # the param's own, then those tied to it
    param: Tensor  # as the module has it: empty unless it is gathered
    start: int  # in elements of the whole param, which is row-major
    stop: int
    working: WorkingRun
    master: WorkingRun | Masters  # what an update reads: of a frozen param, which has no master, the working run
    offset: int  # of the run, in the master's flat tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return partitioned.whole_shape(self.param)

    @property
    def shown(self) -> Tensor:
        """The param for ``include``: its whole shape and its attributes, but no values."""
        whole = torch.empty(self.shape, dtype=self.param.dtype, device="meta").requires_grad_(self.param.requires_grad)
        vars(whole).update(vars(self.param))
        return whole


def zero_runs(params: Mapping[str, Tensor], ranks: Sequence[int]) -> Iterator[ZeroRun]:
    """Yield this rank's run of each distinct param.

    Args:
        params: all params of the model, by name.
        ranks: the ranks of the averaged model's process group.

    Raises:
        ValueError: params are of different engines, or not over these ranks.
        NotImplementedError: a param is kept in a way that an update cannot read. The message names it and says why.
    """
    tied: dict[int, list[str]] = {}
    for name, param in params.items():
        tied.setdefault(id(param), []).append(name)
    optimizer, groups = None, dict[int, Masters]()
    for names in tied.values():
        param = params[names[0]]
        _require_partitioned(names[0], param)
        optimizer = _optimizer_of(names[0], param, optimizer)
        _refuse_unread(names[0], param, optimizer)
        yield _run_of(tuple(names), param, optimizer, groups, ranks)


def _run_of(
    names: tuple[str, ...], param: Any, optimizer: Any, groups: dict[int, Masters], ranks: Sequence[int]
) -> ZeroRun:
    owners = dist.get_process_group_ranks(partitioned.partition_group(param))
    if set(owners) != set(ranks):
        raise ValueError(
            f"process_group must be the ranks that {names[0]!r} is partitioned over, {owners}, got {list(ranks)}: pass "
            "the engine's data-parallel group. Experts on a group of their own (MoE, MiCS) cannot be averaged: leave "
            "them in a model of their own"
        )
    (start, stop), working = _bounds(param), WorkingRun(param)
    position = optimizer.grad_position.get(optimizer.get_param_id(param))
    if position is None:
        return ZeroRun(names, param, start, stop, working, working, 0)
    index, offset, _ = position
    masters = groups.setdefault(index, Masters(param, optimizer, index))
    return ZeroRun(names, param, start, stop, working, masters, offset)


def _bounds(param: Any) -> tuple[int, int]:
    """Return where this rank's run begins and ends in the whole param. Its partition also has elements that pad it."""
    whole, size = partitioned.whole_numel(param), partitioned.partition_of(param).numel()
    rank = dist.get_rank(partitioned.partition_group(param))
    return min(whole, size * rank), min(whole, size * (rank + 1))


def _require_partitioned(name: str, param: Tensor) -> None:
    if not partitioned.is_partitioned(param):
        raise ValueError(
            f"{name!r} must be partitioned by ZeRO-3 as the other params are, got one that no DeepSpeed engine "
            "has: add it to the model before deepspeed.initialize"
        )


def _optimizer_of(name: str, param: Any, of_others: object) -> Any:
    """Return the ZeRO-3 optimizer of a param, which all params must share."""
    optimizer = partitioned.zero_optimizer(param)
    if optimizer is None or not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        raise ValueError(
            f"{name!r} must belong to a DeepSpeed engine with an optimizer, which has its master, got none: call "
            "deepspeed.initialize with an optimizer first, and average engine.module"
        )
    if of_others is not None and optimizer is not of_others:
        raise ValueError(
            f"model must be of one DeepSpeed engine, got {name!r} of another: average the module of each engine apart"
        )
    return optimizer


#: What keeps a param where an update cannot read it, or where a forward pass does not read what a swap writes.
_UNREAD: tuple[tuple[str, Callable[[Any, Any], bool]], ...] = (
    (
        "secondary partitions, which a forward pass reads instead: set zero_hpz_partition_size to 1",
        lambda param, _: partitioned.has_second_partition(param),
    ),
    (
        "params offloaded to NVMe: set the device of offload_param to 'cpu' or 'none'",
        lambda param, _: partitioned.is_on_disk(param),
    ),
    (
        "masters offloaded to NVMe: set the device of offload_optimizer to 'cpu' or 'none'",
        lambda _, optimizer: bool(getattr(optimizer, "swap_optimizer", False)),
    ),
    ("MiCS: use ZeRO-3 without mics_shard_size", lambda param, _: partitioned.is_of_mics(param)),
    (
        "quantized weights: set zero_quantized_weights and zero_quantized_nontrainable_weights to false",
        lambda param, optimizer: (
            partitioned.is_quantized_partition(param)
            or bool(getattr(getattr(optimizer, "parameter_offload", None), "zero_quantized_weights", False))
        ),
    ),
    (
        "ZenFlow, which steps masters beside the next forward: leave zenflow out of the config",
        lambda _, optimizer: bool(getattr(optimizer, "zenflow", False)),
    ),
    (
        "SuperOffload, which steps masters in another process: set super_offload to false",
        lambda _, optimizer: hasattr(optimizer, "superoffload_cpu_optimizer"),
    ),
)


def _refuse_unread(name: str, param: Any, optimizer: Any) -> None:
    """Raise NotImplementedError if this rank's part of a param cannot be averaged where it lies; say why."""
    for reason, applies in _UNREAD:
        if applies(param, optimizer):
            raise NotImplementedError(f"{name!r} must lie in this rank's memory as plain ZeRO-3 keeps it, got {reason}")


# Gathered params


def free(params: Iterable[Any]) -> None:
    """Free all params that a forward pass has gathered or fetches ahead, so that the next one reads the working runs.

    Small params too, which ZeRO-3 keeps gathered. Otherwise a forward pass runs on what it gathered before.
    """
    optimizers = (partitioned.zero_optimizer(param) for param in params)
    for optimizer in {id(each): each for each in optimizers if each is not None}.values():
        optimizer.empty_partition_cache()


def is_written(param: Any) -> bool:
    """Return whether a gathered param has other values than this rank's working run."""
    if not partitioned.is_gathered(param):
        return False
    start, stop = _bounds(param)
    gathered = param.detach().reshape(-1)[start:stop]
    working = partitioned.partition_of(param).detach()[: stop - start].to(device=gathered.device, dtype=gathered.dtype)
    return not torch.equal(gathered.view(torch.uint8), working.view(torch.uint8))
