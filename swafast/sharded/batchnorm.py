"""BatchNorm's statistics of what several ranks have seen, each batches of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..batchnorm import Layer, Moments
from .ranks import Ranks

#: The groups that statistics have gone round in: to make one anew at each call would pile up connections.
_groups: WeakKeyDictionary[ProcessGroup, Ranks] = WeakKeyDictionary()


def run_on_all(run: Callable[[], int], layers: Mapping[str, Layer], process_group: ProcessGroup | None) -> int:
    """Run the model on each rank's batches, and put the moments of all together; give the number of all batches.

    In the ranks' order: the same bits on each. Collective.

    Raises:
        ValueError: the models differ, or what ``run`` raises. RuntimeError: it failed on another rank.
    """
    ranks = _ranks_of(process_group)
    with ranks.settled("update_bn"):
        num_batches = run()
    ranks.agree("model", {name: layer.module.num_features for name, layer in layers.items()})
    told = ranks.gather((num_batches, [layer.moments.to("cpu") for layer in layers.values()]))
    for index, layer in enumerate(layers.values()):
        layer.moments = Moments()
        for _, of_rank in told:
            layer.moments.merge(of_rank[index])
    return sum(count for count, _ in told)


def _ranks_of(process_group: ProcessGroup | None) -> Ranks:
    parent = process_group if process_group is not None else dist.group.WORLD
    known = _groups.get(parent) if isinstance(parent, ProcessGroup) else None
    if known is not None and not known.is_lost:
        return known
    ranks = Ranks(process_group)
    assert parent is not None
    _groups[parent] = ranks
    return ranks
