"""Which part of its holdings a rank averages: a whole shard, or a part of a param that several ranks hold alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ...terms.boxes import Box, boxes_of_run
from ...terms.formats import Format
from .flat_order import FlatOrder
from .holdings import Holding


@dataclass(frozen=True)
class Cut:
    """Params that the same ranks hold alike, in a flat order that is cut evenly over these ranks."""

    replicas: tuple[int, ...]
    names: tuple[str, ...]
    flat: FlatOrder  # of the params' runs


@dataclass(frozen=True)
class Share:
    """The part of a holding that this rank averages: a run of its elements."""

    holding: Holding
    format: Format | None  # None: copied, not averaged
    start: int  # in the holding's run
    stop: int
    cut: Cut | None  # None: this rank averages the whole holding

    @property
    def name(self) -> str:
        return self.holding.name

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes of the whole tensor that make up the run."""
        holding = self.holding
        if holding.order is None:  # not dense, so never cut: its average is row-major
            return boxes_of_run(holding.sizes, 0, self.numel, holding.offsets)
        return boxes_of_run(
            holding.sizes, holding.start + self.start, holding.start + self.stop, holding.offsets, holding.order
        )

    @property
    def multiplicity(self) -> int:
        """The number of ranks that average each element."""
        return 1 if self.cut is not None else len(self.holding.replicas)

    def counts_on(self, rank: int) -> bool:
        """Return whether ``rank`` contributes these elements to a sum that takes each element once."""
        return self.cut is not None or rank == self.holding.replicas[0]

    def of(self, local: Tensor) -> Tensor:
        """Return the view of the share in this rank's tensor: 1-D if that is dense, else the tensor itself."""
        return view_of_run(self.holding, local, self.start, self.stop)


def view_of_run(holding: Holding, local: Tensor, start: int, stop: int) -> Tensor:
    """Return the view of a run of a holding's elements in this rank's tensor."""
    if holding.order is None:
        assert (start, stop) in ((0, local.numel()), (0, 0), (local.numel(), local.numel())), "never cut"
        return local if stop > start else local.new_empty(0)
    return local.as_strided((stop - start,), (1,), local.storage_offset() + start)


def share_out(
    holdings: Sequence[Holding], formats: Mapping[str, Format | None], rank: int, *, share_replicas: bool
) -> list[Share]:
    """Return this rank's share of each holding, in the order of holdings.

    Args:
        formats: the formats of the averages, by name; None for a buffer that is copied.
        share_replicas: cut all params that several ranks hold alike, not only whole ones.
    """
    shares: dict[str, Share] = {}
    cuts: dict[object, list[Holding]] = {}
    for holding in holdings:
        fmt = formats[holding.name]
        wanted = holding.always_cut or (share_replicas and not holding.is_buffer)
        # A 0-dimensional tensor stays whole, since some of torch's stagers for checkpoints cannot take parts of one.
        if wanted and holding.shape and len(holding.replicas) > 1:
            # Cut each combination evenly, so that buckets of averages have equal sizes on all ranks.
            key = (holding.replicas, holding.device.type, str(holding.dtype), fmt.name if fmt else None)
            cuts.setdefault(key, []).append(holding)
        else:
            shares[holding.name] = Share(holding, fmt, 0, holding.numel, None)
    for alike in cuts.values():
        replicas = alike[0].replicas
        whole = [holding.order is None for holding in alike]
        flat = FlatOrder([holding.numel for holding in alike], len(replicas), whole)
        cut = Cut(replicas, tuple(holding.name for holding in alike), flat)
        bounds = cut.flat.bounds(cut.replicas.index(rank))
        runs = {run.index: (run.start, run.stop) for run in cut.flat.runs(*bounds)}
        for index, holding in enumerate(alike):
            start, stop = runs.get(index, (0, 0))
            shares[holding.name] = Share(holding, formats[holding.name], start, stop, cut)
    return [shares[holding.name] for holding in holdings]
