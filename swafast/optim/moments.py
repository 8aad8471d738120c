"""The moments of what a layer normalises, and those that follow from the running statistics that it has written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements that are taken at a time, as float64: 128 MiB.
_PIECE = 1 << 24

#: A momentum below this is none: a layer that writes less has not followed its whole input.
_LEAST = 1e-3


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of what a layer normalises, per channel, in float64."""

    calls: int = 0
    count: Tensor | None = None  # (channels,), of values
    mean: Tensor | None = None  # (channels,)
    squares: Tensor | None = None  # (channels,)

    def take(self, inputs: Tensor, part: range | None = None, channels: int = 0) -> None:
        """Add the values of one call, (batch, channels, ...).

        Args:
            part: which of ``channels`` channels the values are of; default: of all.
        """
        if inputs.numel() == 0:
            return
        self.calls += 1
        over = [dim for dim in range(inputs.ndim) if dim != 1]
        for piece in inputs.split(max(1, _PIECE * len(inputs) // inputs.numel())):
            count = piece.numel() // piece.shape[1]
            variance, mean = torch.var_mean(piece.double(), over, correction=0)
            found = [torch.full_like(mean, count), mean, variance * count]
            if part is not None and part != range(channels):
                places = torch.tensor(part, device=mean.device)
                found = [values.new_zeros(channels).index_copy_(0, places, values) for values in found]
            self.merge(Moments(0, *found))

    def merge(self, other: Moments) -> None:
        """Add the moments of further values, by the formula of Chan, Golub and LeVeque.

        Paper: Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance".
        """
        if other.count is None or other.mean is None or other.squares is None:
            return
        if self.count is None or self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = other.count, other.mean, other.squares
        else:
            other = other.to(self.mean.device)  # under DataParallel from another GPU
            assert other.count is not None
            assert other.mean is not None
            assert other.squares is not None
            total = self.count + other.count
            share = other.count / total.clamp(min=1)
            apart = other.mean - self.mean
            self.mean = self.mean + apart * share
            self.squares = self.squares + (other.squares + apart.square() * (self.count * share))
            self.count = total
        self.calls += other.calls

    def to(self, device: str | torch.device) -> Moments:
        found = [None if each is None else each.to(device) for each in (self.count, self.mean, self.squares)]
        return Moments(self.calls, *found)


def have_moved(before: tuple[Tensor, ...], after: tuple[Tensor, ...], batch: Moments, epsilon: float) -> bool:
    """Return whether statistics have moved towards those of a batch, in all channels by the same share of the way.

    The share is the momentum, whatever the layer takes for it. The variance may be the biased one.

    Args:
        epsilon: that of the batch's dtype.
    """
    assert batch.count is not None
    assert batch.mean is not None
    assert batch.squares is not None
    tolerance = max(1e-5, 4 * epsilon)
    power = batch.mean.square() + batch.squares / batch.count
    scales = torch.cat([before[0].abs() + power.sqrt(), before[1].abs() + power]).clamp(min=1e-30)
    moved = (torch.cat(after) - torch.cat(before)) / scales
    for correction in (1, 0):
        variance = batch.squares / (batch.count - correction).clamp(min=1)
        way = (torch.cat([batch.mean, variance]) - torch.cat(before)) / scales
        share = moved.dot(way) / way.dot(way)
        if _LEAST <= float(share) <= 1 + tolerance and float((moved - share * way).abs().max()) <= tolerance:
            return True
    return False


def infer(before: tuple[Tensor, ...], after: tuple[Tensor, ...], values: int, momentum: float) -> Moments:
    """Return the moments of a batch whose mean and unbiased variance were written with this momentum.

    Channels that were not written get none. The others share all ``values`` of the layer's input.
    """
    written = (after[0] != before[0]) | (after[1] != before[1])
    mean, var = ((new - (1 - momentum) * old) / momentum for new, old in zip(after, before, strict=True))
    count = written * max(1, values // int(written.sum()))
    return Moments(1, count.double(), written * mean, written * var * (count - 1).clamp(min=1))
