"""Subspaces that are not made of an average's own deviations: random ones, and the plane of a curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Module

from ..average.averaged_model import FusedAveragedModel
from ..average.subspace import Subspace, checked_rank, gram
from ..op.checks import checked_seed
from ..terms.converting import convert
from ..terms.copying import write_once
from ..terms.draws import make_random_key
from ..terms.layout import windows
from ..terms.normals import normals
from ..terms.numbers import checked_number
from ..terms.spread import Spread

#: Normal numbers made at a time: each takes about 100 bytes meanwhile.
_WINDOW_NUMEL = 2**16

State = Mapping[str, Tensor]


@torch.no_grad()
def random_subspace(model: Module, state: State, rank: int, *, scale: float = 1.0, seed: int = 0) -> Subspace:
    """Return a subspace through ``state`` of random directions: normal in each element, each of length ``scale``.

    It is what others are compared with. Choose ``scale`` as the scales of what it is compared with: the authors' code
    takes the mean of the first two of ``averaged.subspace(rank).scales``. The directions depend on the seed, the names
    and the shapes alone. They are kept, in float32: 4 bytes a param and direction.

    Args:
        model: the model that points are placed into, or one like it. It is not changed.
        state: what the subspace goes through, such as ``averaged.averaged_state_dict()``: a state of ``model``.
        rank: how many directions.

    Raises:
        TypeError: ``rank`` or ``seed`` is not an int, ``model`` is not a module, or ``state`` is not a mapping.
        ValueError: ``rank`` is less than 1; ``scale`` is not a positive number; ``model`` has no params that are
            averaged; or ``state`` does not fit ``model``: names, shapes and kinds of dtypes differ, or a param holds a
            NaN or a value that is infinite in float32.

    Paper: Izmailov et al. 2019, "Subspace Inference for Bayesian Deep Learning", arXiv:1907.07504.
    """
    wanted, number = checked_rank(rank), checked_seed(seed)
    length = checked_number("scale", scale, "a positive number", lambda value: 0 < value < math.inf)

    def draw(name: str, columns: Sequence[Tensor]) -> None:
        key = make_random_key(number, name)
        for which, column in enumerate(columns[:wanted]):
            flat = torch.empty(column.numel(), dtype=torch.float32, device="cpu")
            index = torch.arange(column.numel(), device="cpu")
            for to, at in windows((flat, index), _WINDOW_NUMEL):
                to.copy_(normals(key, which, at))
            column.copy_(flat.view(column.shape))

    averaged, columns = _averaged_at(model, state, wanted, draw)
    norms = gram(columns, wanted).diagonal().sqrt()
    mixture = torch.diag(length / norms)
    mixture = torch.cat((mixture, mixture.new_zeros(_columns_for(wanted) - wanted, wanted)))
    scales = torch.full((wanted,), float(length), dtype=torch.float64, device="cpu")
    return Subspace(averaged, mixture, scales, mixture.new_empty(0, wanted))


@torch.no_grad()
def curve_subspace(model: Module, states: Sequence[State]) -> Subspace:
    """Return the plane of a curve between two trained models: through both of its ends and a point in its middle.

    With ``mean`` of the three states, ``mean + t[0] * (end - start) / sqrt(3) + t[1] * height / 1.5``, where ``height``
    is ``middle - start`` without its part along ``end - start``, as in the authors' code. If the three are as far from
    each other, both directions have one length. The directions are kept, in float32: 8 bytes a param.
    ``trajectory`` has the coordinates of the three states.

    Args:
        model: the model that points are placed into, or one like it. It is not changed.
        states: three states of ``model``: the start, the middle and the end. Of a Bezier curve with the bend ``b`` the
            middle is ``start / 4 + b / 2 + end / 4``.

    Raises:
        TypeError: ``model`` is not a module, ``states`` is not a sequence, or a state is not a mapping.
        ValueError: there are not three states; one does not fit ``model``, as for :func:`random_subspace`; they lie on
            one line; or they are too far from each other for float32.

    Papers: Izmailov et al. 2019, arXiv:1907.07504; Garipov et al. 2018, "Loss Surfaces, Mode Connectivity, and Fast
    Ensembling of DNNs", arXiv:1802.10026.
    """
    if not isinstance(states, Sequence):
        kind = type(states).__name__
        raise TypeError(f"states must be a list of three states, got {kind}: pass [start, middle, end]")
    if len(states) != 3:
        raise ValueError(f"states must be three: the start, the middle and the end of a curve, got {len(states)}")
    start, middle, end = states

    def write(name: str, columns: Sequence[Tensor]) -> None:
        at = start[name].to(device=columns[0].device, dtype=torch.float64)
        for column, other in zip(columns, (end, middle), strict=True):
            column.copy_(other[name].to(device=at.device, dtype=torch.float64) - at)

    for which, other in zip(("start", "middle", "end"), states, strict=True):
        _check_state(model, other, f"the state of the {which}")
    mean = {
        name: torch.stack([state[name].double() for state in states]).mean(0) if value.is_floating_point() else value
        for name, value in start.items()
    }
    averaged, columns = _averaged_at(model, mean, 2, write)
    products = gram(columns, 2)
    if not bool(products.isfinite().all()):
        raise ValueError("states must be near enough to each other for float32, got a difference that is infinite")
    along = products[0, 1] / products[0, 0]
    squared_height = products[1, 1] - along * products[0, 1]
    # Each difference of float32 values is rounded to 6e-8 of itself, so a smaller height is none.
    if not float(squared_height) > 1e-12 * float(products[1, 1]):
        raise ValueError("states must not lie on one line, got three that do: the middle must be off the straight line")
    width, height = 1 / math.sqrt(3), 1 / 1.5
    mixture = torch.tensor([[width, -float(along) * height], [0.0, height]], dtype=torch.float64, device="cpu")
    scales = torch.stack((width * products[0, 0].sqrt(), height * squared_height.sqrt()))
    # In units of both columns the three states are (0, 0), (0, 1) and (1, 0), and their mean (1/3, 1/3).
    places = torch.tensor([[0, 0], [0, 1], [1, 0]], dtype=torch.float64, device="cpu") - 1 / 3
    return Subspace(averaged, mixture, scales, torch.linalg.solve(mixture, places.T).T.contiguous())


def _columns_for(rank: int) -> int:
    """Return how many columns hold ``rank`` directions: an average has none or at least two."""
    return max(2, rank)


def _check_state(model: Module, state: State, what: str) -> None:
    """Raise TypeError or ValueError unless a state has the names, shapes and kinds of dtypes of the model's.

    Its params must be finite in float32, in which points are computed.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"{what} must be a state dict, got {type(state).__name__}: pass averaged_state_dict()")
    expected = model.state_dict() if isinstance(model, Module) else state  # a wrong model is refused later
    for name in expected:
        if name not in state:
            raise ValueError(f"{what} must have all names of model, got none for {name!r}: pass averaged_state_dict()")
    for name in state:
        if name not in expected:
            raise ValueError(f"{what} must have the names of model alone, got {name!r} too: leave it out")
    params = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, Module) else {}
    for name, tensor in expected.items():
        if isinstance(tensor, Tensor):
            _check_value(state[name], tensor, f"{what} must have", name, name in params)


def _check_value(given: object, expected: Tensor, required: str, name: str, is_param: bool) -> None:
    """Raise ValueError unless a value of a state can stand for a tensor of the model."""
    if not isinstance(given, Tensor):
        raise ValueError(f"{required} a tensor for {name!r}, got {type(given).__name__}")
    if given.shape != expected.shape:
        raise ValueError(f"{required} shape {tuple(expected.shape)} for {name!r}, got {tuple(given.shape)}")
    if not torch.can_cast(given.dtype, expected.dtype):
        raise ValueError(f"{required} {expected.dtype} or what casts to it for {name!r}, got {given.dtype}")
    if given.is_meta:
        raise ValueError(f"{required} values for {name!r}, got a tensor on the meta device: load the state first")
    if is_param and expected.is_floating_point() and not bool(given.detach().to(torch.float32).isfinite().all()):
        raise ValueError(f"{required} finite values in float32 for {name!r}, got a NaN, an infinity or an overflow")


def _averaged_at(
    model: Module, state: State, rank: int, write: Callable[[str, Sequence[Tensor]], None]
) -> tuple[FusedAveragedModel, list[Sequence[Tensor]]]:
    """Return an average at ``state`` whose columns ``write`` has written, and the columns of each param."""
    count = _columns_for(rank)
    averaged = FusedAveragedModel(model, deviations=Spread(count, dtype=torch.float32))
    if next(averaged._planes(), None) is None:
        raise ValueError("model must have parameters that are averaged, got none: there is no direction to move in")
    _check_state(model, state, "state")
    for name, tensor, fmt in averaged._each_average():
        if fmt is None and name in state:
            write_once(tensor, state[name])
    for name, fmt, planes in averaged._planes():
        value = state[name].to(device=planes[0].device, dtype=fmt.value_dtype or planes[0].dtype)
        convert((value,), None, planes[: fmt.num_planes], fmt.mean)
        write(name, planes[fmt.num_planes + 1 :])
    averaged._count_from(count)
    return averaged, [planes[1 : 1 + rank] for planes in averaged._spread_planes()]
