"""The test loss on a plane through three solutions, as in section 3.3 of Izmailov et al. 2018 (arXiv:1803.05407)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from .training import SeedResult, score

# The plane's edge lies this share of the solutions' extent beyond them.
MARGIN = 0.45


@dataclass(frozen=True)
class Plane:
    """A rectangular slice of the loss surface; distances are Euclidean, over all params."""

    x: list[float]  # columns
    y: list[float]  # rows
    loss: list[list[float]]  # [row][column], mean cross-entropy on the test images
    points: dict[str, tuple[float, float]]  # where each solution lies, exactly in the plane
    seed: int


def loss_plane(
    result: SeedResult,
    methods: tuple[str, str, str],
    num_points: int,
    on_row: Callable[[], object] | None = None,  # called after each of the num_points rows
) -> Plane:
    """Test the models on a ``num_points`` x ``num_points`` grid through the solutions of three methods.

    The first is the origin and x points to the second. BatchNorm's statistics are taken anew at each point.
    """
    vectors = [parameters_to_vector(result.models[method].parameters()).detach() for method in methods]
    origin, second, third = vectors
    x_axis = _unit(second - origin)
    y_axis = _unit(third - origin - torch.dot(third - origin, x_axis) * x_axis)
    points = {
        method: (torch.dot(vector - origin, x_axis).item(), torch.dot(vector - origin, y_axis).item())
        for method, vector in zip(methods, vectors, strict=True)
    }
    x, y = _grid(points, num_points)
    model = copy.deepcopy(result.models[methods[0]])
    loss = []
    for b in y:
        loss.append([_loss_at(model, result, origin + a * x_axis + b * y_axis) for a in x])
        if on_row is not None:
            on_row()
    return Plane(x, y, loss, points, result.seed)


def _unit(vector: Tensor) -> Tensor:
    length = vector.norm()
    # Two solutions in one place (an average of a single model) leave a direction of length 0, and the plane a line.
    return vector / length if length > 0 else vector


def _grid(points: dict[str, tuple[float, float]], num_points: int) -> tuple[list[float], list[float]]:
    """Cover the points and a margin by a square; as many points in y as in x."""
    axes = []
    extent = max(max(values) - min(values) for values in zip(*points.values(), strict=True)) or 1.0
    for values in zip(*points.values(), strict=True):
        centre = (max(values) + min(values)) / 2
        half = extent * (0.5 + MARGIN)
        axes.append(torch.linspace(centre - half, centre + half, num_points).tolist())
    return axes[0], axes[1]


def _loss_at(model: nn.Module, result: SeedResult, vector: Tensor) -> float:
    vector_to_parameters(vector, model.parameters())
    return score(model, result.split, epoch=0).loss
