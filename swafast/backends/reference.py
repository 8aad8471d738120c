"""The definition of right, in plain torch: any device, dtype and layout, one tensor at a time.

It reads ``num_averaged`` on the host, so on a GPU each update waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..terms.converting import write_all
from ..terms.draws import Draws, box_views, random_bits
from ..terms.formats import Format
from ..terms.layout import windows
from ..terms.normals import fma, normals, square_root
from ..terms.samples import Sample
from . import Unavailable
from .contract import Pair, Update

name = "reference"
device_types = None
exchanges = False

#: Elements worked on at a time on a CPU where a dtype has to be converted, so that an update allocates under 1 MB:
#: `exact` makes 64 bytes of temporaries an element.
_CPU_WINDOW_NUMEL = 8 * 2**10


def unavailable() -> Unavailable | None:
    return None


def describe() -> str:
    return "plain torch, always there"


def serves(pair: Pair) -> bool:
    return True


class ReferenceLaunch:
    captured = False

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._planes = [tuple(plane.detach() for plane in pair.mean_planes) for pair in pairs]
        self._spreads = [tuple(plane.detach() for plane in pair.spread_planes) for pair in pairs]
        self._formats = [pair.format.mean if pair.format is not None else None for pair in pairs]
        self._draws = [pair.draws for pair in pairs]
        self._paces = [pair.pace for pair in pairs]

    @torch.no_grad()
    def update(self, params: Sequence[Tensor], update: Update) -> None:
        counts = [int(counter) for counter in update.counters]
        if min(counts) < 0:
            raise ValueError(f"n_averaged must be >= 0, got {min(counts)}")
        if update.skip_nonfinite and update.is_skipped(self.first_nonfinite(params) is not None):
            return
        weights = [terms.weight(n) for terms, n in zip(update.terms, counts, strict=True)]
        alike: dict[tuple[torch.device, torch.dtype, int], tuple[list[Tensor], list[Tensor]]] = {}
        rest = zip(self._planes, self._spreads, self._formats, self._draws, self._paces, strict=True)
        for param, (planes, spread, fmt, draws, pace) in zip(params, rest, strict=True):
            average, newest = planes[0], param.detach()
            if fmt is not None and spread:  # it needs the average before it moves
                _spread_(planes, spread, newest, fmt, weights[pace], counts[pace])
            if fmt is None:
                average.copy_(newest)
            elif draws is not None and fmt.num_random_bits:
                _move_at_random_(planes, newest, fmt, weights[pace], draws, counts[pace])
            elif not fmt.extra and (average.dtype, average.device) == (newest.dtype, newest.device):
                averages, group = alike.setdefault((average.device, average.dtype, pace), ([], []))
                averages.append(average)
                group.append(newest)
            else:
                for piece, *plane_pieces in windows((newest, *planes), _CPU_WINDOW_NUMEL):
                    new = fmt.encode(_moved(plane_pieces, piece, fmt, weights[pace]))
                    write_all(list(zip(plane_pieces, new, strict=True)))
        for (_, _, pace), (averages, group) in alike.items():
            _move_(averages, group, weights[pace])
        for counter in update.counters if update.advance else ():
            counter.add_(update.advance)

    @torch.no_grad()
    def draw(self, params: Sequence[Tensor], sample: Sample) -> None:
        drawn = zip(params, self._planes, self._spreads, self._formats, self._draws, strict=True)
        for param, planes, spread, fmt, draws in drawn:
            assert fmt is not None, "a sample is drawn of averages"
            assert draws is not None, "a draw has a key for each pair"
            variance, *columns = spread
            used = columns[: len(sample.coefficients)]
            for tensors, index_addends in box_views(draws, (param.detach(), variance, *planes, *used)):
                count = len(tensors)
                for window in windows((*tensors, *index_addends), _CPU_WINDOW_NUMEL):
                    index = sum(window[count:], torch.zeros((), dtype=torch.int64))
                    to, of_variance, *rest = window[:count]
                    mean = fmt.decode(tuple(rest[: len(planes)])).to(torch.float32)
                    to.copy_(_point(mean, of_variance, rest[len(planes) :], sample, draws.random_key, index))

    @torch.no_grad()
    def first_nonfinite(self, params: Sequence[Tensor]) -> int | None:
        for index, (param, fmt) in enumerate(zip(params, self._formats, strict=True)):
            if fmt is not None and not all(window.isfinite().all().item() for (window,) in windows((param.detach(),))):
                return index
        return None


prepare = ReferenceLaunch


def _move_(averages: list[Tensor], params: list[Tensor], weight: float) -> None:
    """``average += weight * (param - average)`` in place, as torch.lerp rounds it; at weight 1 an exact copy."""
    if averages[0].dtype not in (torch.float64, torch.complex128):
        weight = torch.tensor(weight, dtype=torch.float32, device="cpu").item()
    if weight == 1.0:
        torch._foreach_copy_(averages, params)
    else:
        torch._foreach_lerp_(averages, params, weight)


def _moved(planes: Sequence[Tensor], param: Tensor, fmt: Format, weight: float) -> Tensor:
    """Return the moved average, at the precision that its format works in."""
    value = fmt.decode(tuple(planes)).clone()
    newest = param.to(device=value.device, dtype=value.dtype)
    if fmt.value_dtype == torch.float64:
        # Product and sum rounded one by one, as every machine has them.
        return newest if weight == 1.0 else value + weight * (newest - value)
    _move_([value], [newest], weight)
    return value


def _spread_(
    planes: tuple[Tensor, ...],
    spread: tuple[Tensor, ...],
    param: Tensor,
    fmt: Format,
    weight: float,
    num_averaged: int,
) -> None:
    """Move the variance towards ``(param - old average) * (param - new average)``, and store the deviation.

    This is Welford's update as a lerp: the variance is the mean of squared distances, for any weights, and never
    negative. The new average is that before its rounding to planes.
    """
    variance, *columns = spread
    written = [variance, *([columns[num_averaged % len(columns)]] if columns else [])]
    if torch.tensor(weight, dtype=torch.float32, device="cpu").item() == 1.0:
        for plane in written:
            plane.zero_()
        return
    for newest, of_variance, *rest in windows((param, variance, *written[1:], *planes), _CPU_WINDOW_NUMEL):
        of_column, of_planes = rest[: len(written) - 1], rest[len(written) - 1 :]
        old = fmt.decode(tuple(of_planes))
        newest = newest.to(device=old.device, dtype=old.dtype)
        distance = (newest - old).to(torch.float32)
        deviation = (newest - _moved(of_planes, newest, fmt, weight)).to(torch.float32)
        _move_([of_variance], [distance * deviation], weight)
        for column in of_column:
            column.copy_(deviation)


def _point(
    value: Tensor, variance: Tensor, columns: Sequence[Tensor], sample: Sample, key: int, index: Tensor
) -> Tensor:
    for coefficient, column in zip(sample.coefficients, columns, strict=True):
        value = fma(column.to(torch.float32), coefficient, value)
    if sample.noise:
        index = index.to(value.device)
        value = fma(square_root(variance) * sample.noise, normals(key, sample.index, index), value)
    return value


def _move_at_random_(
    planes: tuple[Tensor, ...], param: Tensor, fmt: Format, weight: float, draws: Draws, num_averaged: int
) -> None:
    for tensors, index_addends in box_views(draws, (param, *planes)):
        count = len(tensors)
        for window in windows((*tensors, *index_addends), _CPU_WINDOW_NUMEL):
            (newest, *of_planes), index = window[:count], sum(window[count:], torch.zeros((), dtype=torch.int64))
            bits = random_bits(draws.random_key, num_averaged, index.to(newest.device)) >> (32 - fmt.num_random_bits)
            new = fmt.encode(_moved(of_planes, newest, fmt, weight), bits.to(of_planes[0].device))
            write_all(list(zip(of_planes, new, strict=True)))
