"""Pairs, rules and counters as the structures of ``csrc/swafast.h``, for native kernels and Triton's."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..terms.draws import runs_of
from ..terms.formats import COMPACT, COMPENSATED, EXACT, FLOAT32, HALF, MIRRORED, Format
from ..terms.layout import is_dense, same_order, whole_runs
from ..terms.weight import KernelTerms
from .contract import Pair
from .library import MAX_PACES, KernelRule, Pace, TensorRow

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BYTES = 3
_FORMATS = {FLOAT32: 0, EXACT: 1, MIRRORED: 2, COMPACT: 4, COMPENSATED: 5, HALF: 6}
_COPIED, _SPREAD = 3, 7


def _plane_bytes(fmt: Format) -> tuple[int, int]:
    further = sum(dtype.itemsize for _, dtype in fmt.extra)
    return (fmt.nbytes or 0) - further, further


#: Bytes of an element, by number: of a param, and of an average's planes.
_PARAM_BYTES = {**{number: dtype.itemsize for dtype, number in _DTYPES.items()}, _BYTES: 1}
_PLANE_BYTES = {**{number: _plane_bytes(fmt) for fmt, number in _FORMATS.items()}, _COPIED: (1, 0), _SPREAD: (4, 0)}


def make_paces(terms: Sequence[KernelTerms], counters: Sequence[Tensor]) -> ctypes.Array[Pace]:
    """Return rules and counters as a kernel takes them: with the counters' addresses."""
    paces = [
        Pace(KernelRule(each.kind, each.terms), counter.data_ptr())
        for each, counter in zip(terms, counters, strict=True)
    ]
    return (Pace * len(paces))(*paces)


def kernels_serve(pair: Pair, device_types: Collection[str]) -> bool:
    """Return whether kernels take this pair: one device, a known dtype, both sides aligned and dense in one order."""
    param, average = pair.param, pair.average
    if param.device.type not in device_types or any(plane.device != param.device for plane in pair.planes):
        return False
    if any(tensor.is_conj() or tensor.is_neg() for tensor in (param, average)):
        return False
    if pair.format is None:
        if param.dtype != average.dtype:
            return False
    elif pair.format.mean not in _FORMATS or param.dtype not in _DTYPES:
        return False
    if any(tensor.data_ptr() % tensor.element_size() for tensor in (param, *pair.planes)):
        return False
    return is_dense(param.shape, param.stride()) and all(
        same_order(param.shape, param.stride(), plane.stride()) for plane in pair.planes
    )


class Rows:
    """Pairs as the kernels take them: a row each, those of one param one after the other.

    Only the first row of a param has runs, and so chunks: a kernel takes the rows that follow it along. A spread has a
    row of its own before that of its average, which an update moves after it has read it.

    Args:
        device: where the tensors are, and so the rings.
    """

    def __init__(self, pairs: Sequence[Pair], device: torch.device | None = None) -> None:
        rows = [_row(pair) for pair in pairs]
        together: dict[object, list[int]] = {}
        for index, (pair, row) in enumerate(zip(pairs, rows, strict=True)):
            together.setdefault((pair.name, row.param, row.numel, row.dtype, pair.param.stride()), []).append(index)
        groups = [
            group[start : start + MAX_PACES] for group in together.values() for start in range(0, len(group), MAX_PACES)
        ]
        rings = [_ring(pair) if pair.spread_planes else [] for pair in pairs]
        #: (words,) int64, in which the rings of all pairs lie. The rows have their addresses.
        self.rings = torch.tensor([word for ring in rings for word in ring], dtype=torch.int64, device="cpu")
        if len(self.rings) > 0:  # without a spread a device has nothing to do
            self.rings = self.rings.to(device or "cpu")
        starts = [0, *itertools.accumulate(8 * len(ring) for ring in rings)]
        #: Indices of the pairs, in the order of the rows.
        self.order: list[int] = []
        made: list[TensorRow] = []
        self._firsts: list[tuple[int, int, list[Pair]]] = []
        for group in groups:
            count = len(group) + sum(bool(rings[index]) for index in group)
            self._firsts.append((rows[group[0]].numel, count, [pairs[index] for index in group]))
            for index in group:
                if rings[index]:
                    made.append(_spread_row(pairs[index], rows[index], self.rings.data_ptr() + starts[index]))
                made.append(rows[index])
                self.order += [index] * (2 if rings[index] else 1)
            for followers, row in enumerate(reversed(made[-count:])):
                row.followers = followers
        self.table = (TensorRow * len(made))(*made)
        self.most_followers = max((count - 1 for _, count, _ in self._firsts), default=0)

    @property
    def numel(self) -> int:
        """Elements that an update reads."""
        return sum(numel for numel, _, _ in self._firsts)

    def runs(self) -> Tensor:
        """Return the runs of memory that :func:`layout.cut_chunks` cuts into chunks."""
        lengths = torch.tensor([count for _, count, _ in self._firsts], dtype=torch.int64, device="cpu")
        runs = whole_runs([numel for numel, _, _ in self._firsts])
        runs[:, 0] = lengths.cumsum(0) - lengths
        drawn = [next((pair for pair in group if pair.draws is not None), None) for _, _, group in self._firsts]
        if not any(drawn):
            return runs
        drawn_runs = []
        for run, pair in zip(runs, drawn, strict=True):
            if pair is None or pair.draws is None:
                drawn_runs.append(run[None])
                continue
            of_pair = runs_of(pair.draws, pair.param.stride())
            drawn_runs.append(torch.cat((run[:1].expand(len(of_pair), 1), of_pair), dim=1))
        return torch.cat(drawn_runs)

    def descriptors(self, chunks: Tensor) -> Tensor:
        """Return (count, 8) int64, each row a ``swafast_descriptor``: one for each chunk, then those of followers."""
        # Name the CPU everywhere: the user's default device may be another one.
        words = torch.frombuffer(self.table, dtype=torch.int64).view(len(self.table), -1)
        firsts, count = chunks[:, 0], len(chunks)
        followers = words[firsts, 6] >> 32
        led_by = torch.repeat_interleave(torch.arange(count, device="cpu"), followers)
        places = torch.arange(count, count + len(led_by), device="cpu")
        starts = count + followers.cumsum(0) - followers
        ordinals = places - starts[led_by] + 1
        tensors = torch.cat((firsts, firsts[led_by] + ordinals))
        following = torch.cat(
            (torch.where(followers > 0, starts, 0), torch.where(ordinals < followers[led_by], places + 1, 0))
        )
        assert count + len(led_by) < 2**32, "descriptors and claims are counted in 32 bits"
        row, chunk = words[tensors], chunks[torch.cat((torch.arange(count, device="cpu"), led_by))]
        dtypes, formats = row[:, 4] & 0xFFFFFFFF, row[:, 4] >> 32
        itemsizes = torch.tensor(
            [(_PARAM_BYTES[it.dtype], *_PLANE_BYTES[it.format]) for it in self.table], dtype=torch.int64, device="cpu"
        )
        addresses = row[:, :3] + chunk[:, 1:2] * itemsizes[tensors]
        about = tensors | chunk[:, 4] << 32
        kinds = dtypes | formats << 8 | (row[:, 6] & 0xFF) << 16 | following << 32
        # A ring is one for all chunks of its tensor, so a kernel needs the offset of each.
        first_index = torch.where(formats == _SPREAD, chunk[:, 1], chunk[:, 3])
        rest = torch.stack((chunk[:, 2], first_index, row[:, 5], about, kinds), dim=1)
        return torch.cat((addresses, rest), dim=1)


def _row(pair: Pair) -> TensorRow:
    planes = tuple(plane.data_ptr() for plane in pair.mean_planes)
    row = TensorRow(param=pair.param.data_ptr(), planes=(*planes, *(None,) * (2 - len(planes))), pace=pair.pace)
    if pair.format is None:
        row.numel, row.dtype, row.format = pair.param.nbytes, _BYTES, _COPIED
    else:
        row.numel, row.dtype, row.format = pair.param.numel(), _DTYPES[pair.param.dtype], _FORMATS[pair.format.mean]
        row.key = pair.draws.random_key if pair.draws is not None else 0
    return row


def _spread_row(pair: Pair, row: TensorRow, ring: int) -> TensorRow:
    planes = (pair.spread_planes[0].data_ptr(), ring)
    return TensorRow(row.param, planes, row.numel, row.dtype, _SPREAD, 0, row.pace)


def _ring(pair: Pair) -> list[int]:
    """Return the words of a ``swafast_ring`` and the addresses of its columns."""
    _, *columns = pair.spread_planes
    dtype = _DTYPES[columns[0].dtype] if columns else 0
    return [len(columns) | dtype << 32, *(column.data_ptr() for column in columns)]
