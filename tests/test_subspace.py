"""Subspaces of an average: against an SVD and closed forms in float64, what comes back, and what is refused."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swafast import EqualAverage, FusedAveragedModel, FusedAverages, Spread
from swafast.average import elliptical_slice as slices
from swafast.average import subspace, subspace_use
from swafast.average.subspace import Subspace
from swafast.backends import cpu
from swafast.op import drawing
from swafast.posthoc import curve_subspace, random_subspace
from tests.conftest import NO_LIBRARY
from tests.support import run_example

BACKENDS = ["reference", "cpu"]
T = torch.tensor([0.7, -1.5, 2.0], dtype=torch.float64)


def make_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return a net with a channels_last weight, an empty and a 0-dimensional param, a frozen one and BatchNorm."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    net[0].to(memory_format=torch.channels_last)
    net.register_parameter("none", nn.Parameter(torch.empty(0, 3)))
    net.register_parameter("gain", nn.Parameter(torch.tensor(1.0)))
    net.register_parameter("frozen", nn.Parameter(torch.ones(3), requires_grad=False))
    return net.to(dtype)


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


@torch.no_grad()
def move(net: nn.Module, generator: torch.Generator) -> None:
    for param in net.parameters():
        param.add_(torch.randn(param.shape, generator=generator).to(param.dtype) * 0.1)


def averaged_over(updates: int, count: int = 6, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    net, generator = make_net(dtype), torch.Generator().manual_seed(1)
    averaged = FusedAveragedModel(net, deviations=Spread(count, dtype=torch.float32), **options)
    for _ in range(updates):
        move(net, generator)
        averaged.update_parameters(net)
    return net, averaged


def columns_of(averaged: Any, net: nn.Module, count: int) -> Tensor:
    """Return the deviations by slot, (count, P), in float64."""
    state = averaged.state_dict()
    names = [name for name, _ in net.named_parameters()]
    return torch.stack([flat(state[f"deviation.{slot}.{name}"] for name in names) for slot in range(count)])


def mean_of(averaged: Any, net: nn.Module) -> Tensor:
    exported = averaged.averaged_state_dict()
    return flat(exported[name] for name, _ in net.named_parameters())


# The directions


@pytest.mark.parametrize("updates", [4, 6, 9])
def test_scales_and_directions_are_those_of_an_svd(updates: int) -> None:
    net, averaged = averaged_over(updates)
    count = min(updates, 6)
    columns = columns_of(averaged, net, count)
    _, singular, vectors = torch.linalg.svd(columns / math.sqrt(count - 1), full_matrices=False)
    made = averaged.subspace(3)
    assert made.scales.dtype == torch.float64
    assert float((made.scales - singular[:3]).abs().max() / singular[0]) < 1e-10
    directions = made._mixture.T @ columns
    alike = ((directions / made.scales[:, None]) @ vectors[:3].T).abs()
    torch.testing.assert_close(alike, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-7)
    # Projected on the directions, the deviations have the coordinates of the trajectory, the oldest first.
    oldest = updates % count
    projected = columns.roll(-oldest, 0) @ directions.T / made.scales.square()
    torch.testing.assert_close(made.trajectory, projected, rtol=0, atol=1e-7)
    assert made.rank == 3
    assert repr(made).startswith("Subspace(rank=3, scales=[")


def test_several_windows_and_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    net, averaged = averaged_over(7)
    expected = averaged.subspace(3)
    monkeypatch.setattr(subspace, "_WINDOW_NUMEL", 7)
    torch.testing.assert_close(averaged.subspace(3).scales, expected.scales, rtol=1e-12, atol=0)
    both = FusedAverages(net, rules={"a": EqualAverage(), "b": EqualAverage()}, deviations={"a": 3, "b": None})
    for _ in range(3):
        move(net, torch.Generator().manual_seed(2))
        both.update_parameters(net)
    with both["a"].subspace(1).placed_into(net, [1.0]) as placed:
        assert placed is net
    with pytest.raises(RuntimeError, match="without deviations"):
        both["b"].subspace(1)


# Points


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_points_are_the_mean_and_a_sum_of_directions(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and cpu.unavailable() is not None:
        pytest.skip(f"{NO_LIBRARY}: {cpu.unavailable()}")
    net, averaged = averaged_over(8, dtype=dtype, backend=backend)
    made, before = averaged.subspace(3), copy.deepcopy(net.state_dict())
    exact = mean_of(averaged, net) + T @ (made._mixture.T @ columns_of(averaged, net, 6))
    for t in (T, T.float(), T.tolist(), T.numpy(), T.clone().requires_grad_()):
        with made.placed_into(net, t) as placed:
            assert placed is net
            found = flat(net.parameters())
        largest = exact.abs().max()
        assert float((found - exact).abs().max() / largest) < (1e-6 if dtype == torch.float32 else 2**-8)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with made.placed_into(net, torch.zeros(3)), torch.no_grad():
        found = flat(net.parameters())
    assert torch.equal(found, flat(p.to(dtype) for p in mean_of(averaged, net).split(1)))


def test_params_buffers_and_gradients_come_back_whatever_raises() -> None:
    net, averaged = averaged_over(5)
    for param in net.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    before, gradients = copy.deepcopy(net.state_dict()), [param.grad for param in net.parameters()]
    made = averaged.subspace(3)
    images, labels = torch.randn(9, 2, 4, 4), torch.zeros(9, dtype=torch.long)

    def fail() -> None:
        with made.placed_into(net, T):
            assert all(param.grad is None for param in net.parameters())
            F.cross_entropy(net(images), labels).backward()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(param.grad is gradient for param, gradient in zip(net.parameters(), gradients, strict=True))
    with pytest.raises(RuntimeError, match="written"), made.placed_into(net, T), torch.no_grad():
        net.gain.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    # The gradients of DDP's buckets are views of one tensor, which it writes at the point too.
    bucket = torch.ones(net.gain.numel() + 3)
    net.gain.grad = bucket[0].view(())
    with made.placed_into(net, T):
        bucket.zero_()
    assert float(net.gain.grad) == 1


def test_a_point_is_read_at_the_call() -> None:
    net, averaged = averaged_over(5)
    made = averaged.subspace(3)
    point = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64)
    with made.placed_into(net, point):
        expected = flat(net.parameters())
    for t in (point.clone(), point.float(), point.numpy().copy(), point.tolist()):
        placing = made.placed_into(net, t)
        t[0] = 9.0
        with placing:
            assert torch.equal(flat(net.parameters()), expected)


@pytest.mark.parametrize("call", ["placed_into", "sampled_into", "swapped_into"])
def test_a_cast_inside_stays_with_the_models_own_values(call: str) -> None:
    net, averaged = averaged_over(5)
    for param in net.parameters():
        param.grad = torch.full_like(param, 0.1) if param.requires_grad else None
    before = {name: value.clone() for name, value in net.state_dict().items()}
    swaps = {
        "placed_into": lambda: averaged.subspace(3).placed_into(net, T),
        "sampled_into": lambda: averaged.sampled_into(net, 0),
        "swapped_into": lambda: averaged.swapped_into(net),
    }
    with swaps[call]():
        net.half()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name].half() if value.is_floating_point() else before[name]), name
    for param in net.parameters():
        if param.requires_grad:
            assert torch.equal(param.grad, torch.full_like(param, 0.1))
    assert averaged.module.gain.dtype == torch.float32


def test_a_point_of_float64_is_computed_in_float32() -> None:
    net, averaged = averaged_over(5, dtype=torch.float64)
    made = averaged.subspace(3)
    with made.placed_into(net, T):
        found = flat(net.parameters())
    exact = mean_of(averaged, net) + T @ (made._mixture.T @ columns_of(averaged, net, 5))
    assert 0 < float((found - exact).abs().max() / exact.abs().max()) < 1e-6


# Gradients


def test_gradient_is_that_of_autograd_in_float64() -> None:
    net, averaged = averaged_over(8)
    made = averaged.subspace(3)
    images, labels = torch.randn(40, 2, 4, 4), torch.randint(5, (40,))
    directions = made._mixture.T @ columns_of(averaged, net, 6)
    names = [name for name, _ in net.named_parameters()]
    sizes = [param.shape for param in net.parameters()]
    exact_net, t = copy.deepcopy(net).double(), T.clone().requires_grad_()
    point = mean_of(averaged, net) + t @ directions
    parts = [part.view(size) for part, size in zip(point.split([size.numel() for size in sizes]), sizes, strict=True)]
    logits = torch.func.functional_call(exact_net, dict(zip(names, parts, strict=True)), (images.double(),))
    F.cross_entropy(logits, labels).backward()
    with made.placed_into(net, T):
        F.cross_entropy(net(images), labels).backward()
        found = made.gradient(net)
        net[0].weight.grad = net[0].weight.grad.contiguous()  # another order of memory than the param's
        again = made.gradient(net)
    torch.testing.assert_close(found, t.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(again, found, rtol=1e-9, atol=0)


@pytest.mark.parametrize("tied_before", [True, False])
def test_tied_params_count_once(tied_before: bool) -> None:
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    untied = copy.deepcopy(net)
    net[1].weight = net[0].weight
    averaged = FusedAveragedModel(net if tied_before else untied, deviations=4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        move(net, generator)
        averaged.update_parameters(net)
    made = averaged.subspace(1)
    with made.placed_into(net, [1.0]):
        sum(param.sum() for param in net.parameters()).backward()
        found = made.gradient(net)
    columns = columns_of(averaged, net, 4)
    torch.testing.assert_close(found, made._mixture.T @ columns.sum(1), rtol=1e-9, atol=1e-12)


# Random directions and the plane of a curve


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_directions(dtype: torch.dtype) -> None:
    net, averaged = averaged_over(3, dtype=dtype)
    state = averaged.averaged_state_dict()
    made = random_subspace(net, state, 2, scale=3.0, seed=5)
    columns = columns_of(made._averaged, net, 2)
    directions = made._mixture.T @ columns
    torch.testing.assert_close(directions.norm(dim=1), torch.full((2,), 3.0, dtype=torch.float64), rtol=1e-12, atol=0)
    assert abs(float(columns.mean())) < 0.2
    assert abs(float(columns.std()) - 1) < 0.1
    assert abs(float(F.cosine_similarity(directions[0], directions[1], dim=0))) < 0.2
    assert made.scales.tolist() == [3.0, 3.0]
    assert made.trajectory.shape == (0, 2)
    with made.placed_into(net, [1.0, -1.0]):
        found = flat(net.parameters())
    exact = flat(state[name] for name, _ in net.named_parameters()) + directions[0] - directions[1]
    assert float((found - exact).abs().max() / exact.abs().max()) < (1e-6 if dtype == torch.float32 else 2**-8)
    again, other = random_subspace(net, state, 1, seed=5), random_subspace(net, state, 1, seed=6)
    assert torch.equal(columns_of(again._averaged, net, 1)[0], columns[0])
    assert not torch.equal(columns_of(other._averaged, net, 1)[0], columns[0])


def three_states() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    net, generator = make_net(), torch.Generator().manual_seed(3)
    states = []
    for _ in range(3):
        move(net, generator)
        states.append(copy.deepcopy(net.state_dict()))
    return net, states


def test_plane_of_a_curve() -> None:
    net, states = three_states()
    made = curve_subspace(net, states)
    names = [name for name, _ in net.named_parameters()]
    start, middle, end = (flat(state[name] for name in names) for state in states)
    along, mean = end - start, (start + middle + end) / 3
    height = middle - start
    height = height - along * (along @ height) / (along @ along)
    directions = torch.stack((along / math.sqrt(3), height / 1.5))
    torch.testing.assert_close(made.scales, directions.norm(dim=1), rtol=1e-6, atol=0)
    for t, exact in (*zip(made.trajectory, (start, middle, end), strict=True), (T[:2], mean + T[:2] @ directions)):
        with made.placed_into(net, t):
            assert float((flat(net.parameters()) - exact).abs().max()) < 1e-6


# Elliptical slices

PRIOR, NOISE, SEEN = 2.0, 0.5, torch.tensor([1.0, -2.0], dtype=torch.float64)


def log_likelihood(t: Tensor) -> float:
    return -0.5 * float((t - SEEN).square().sum()) / NOISE**2


def require_posterior() -> None:
    """Check the moments of a normal posterior, which are known."""
    start, generator = torch.zeros(2, dtype=torch.float64), torch.Generator().manual_seed(0)
    samples = slices.elliptical_slice(log_likelihood, start, PRIOR, 2500, generator)[100:]
    variance = 1 / (1 / PRIOR**2 + 1 / NOISE**2)
    # The samples are correlated: the deviations of the mean and of the variance are those of about 500 samples.
    assert float((samples.mean(0) - SEEN * variance / NOISE**2).abs().max()) < 4.5 * math.sqrt(variance / 500)
    assert float((samples.var(0) / variance - 1).abs().max()) < 4.5 * math.sqrt(2 / 500)
    assert samples.shape == (2400, 2)
    assert samples.dtype == torch.float64


def test_slices_have_the_moments_of_a_normal_posterior() -> None:
    require_posterior()


def test_slices_warn_of_a_density_that_changes() -> None:
    made, generator = averaged_over(5)[1].subspace(2), torch.Generator().manual_seed(0)
    plain = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    assert plain.training
    data = torch.ones(50, 2)

    def of_dropout(t: Tensor) -> float:
        with torch.no_grad():
            return -float(plain(data).square().sum())

    with pytest.warns(UserWarning, match="log_likelihood must be the same each time"):
        made.elliptical_slice(of_dropout, 1.0, 2, generator)
    plain.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.elliptical_slice(of_dropout, 1.0, 2, generator).shape == (2, 2)
    falls = iter(range(0, -100_000, -1000))
    with pytest.warns(UserWarning, match="each time"), pytest.raises(RuntimeError, match="got none above"):
        made.elliptical_slice(lambda t: next(falls, -1e9), 1.0, 3, generator)


# What is refused


@pytest.fixture(scope="module")
def ready() -> tuple[nn.Module, FusedAveragedModel, Subspace]:
    net, averaged = averaged_over(6)
    return net, averaged, averaged.subspace(3)


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        ([1.0, 2.0], ValueError, r"t must be of the shape \(3,\), got \(2,\)"),
        (torch.zeros(3, 1), ValueError, r"got \(3, 1\)"),
        ([0.0, math.nan, 0.0], ValueError, "t must be finite, got"),
        ([0.0, math.inf, 0.0], ValueError, "t must be finite, got"),
        ([1e300, 0.0, 0.0], ValueError, "small enough for float32"),
        ([10**400, 0.0, 0.0], ValueError, "small enough for float32"),
        ("abc", TypeError, "t must be 3 real numbers, got str"),
        (None, TypeError, "t must be 3 real numbers, got NoneType"),
        ([1j, 0.0, 0.0], TypeError, "t must be 3 real numbers"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "real numbers, got Tensor of complex numbers"),
        (np.zeros(3, dtype=np.complex64), TypeError, "real numbers, got ndarray of complex numbers"),
        ([np.complex64(1j), 0.0, 0.0], TypeError, "real numbers, got list of complex numbers"),
        (torch.zeros(3, device="meta"), TypeError, "t must be 3 real numbers, got Tensor"),
    ],
)
def test_points_that_are_none(ready: Any, t: Any, error: type[Exception], message: str) -> None:
    net, averaged, made = ready
    before, own = copy.deepcopy(net.state_dict()), copy.deepcopy(averaged.state_dict())
    with pytest.raises(error, match=message), made.placed_into(net, t):
        pass
    for now, then in ((net.state_dict(), before), (averaged.state_dict(), own)):
        assert all(torch.equal(value, then[key]) for key, value in now.items())


def test_ranks_that_are_none(ready: Any) -> None:
    net, averaged, _ = ready
    with pytest.raises(ValueError, match="rank must be at most 5, the number of independent deviations among the 6"):
        averaged.subspace(6)  # the first deviation of six updates is 0
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        averaged.subspace(0)
    for wrong in (2.5, "5", True, None):
        with pytest.raises(TypeError, match="rank must be an int"):
            averaged.subspace(wrong)
    for deviations, message in ((None, "without deviations"), (0, "keeps the variance alone")):
        with pytest.raises(RuntimeError, match=message):
            FusedAveragedModel(net, deviations=deviations).subspace(1)
    _, young = averaged_over(1)
    with pytest.raises(RuntimeError, match="two models are in the average, got 1"):
        young.subspace(1)
    bad, broken = averaged_over(4)
    with torch.no_grad():
        bad.gain.fill_(math.nan)
    broken.update_parameters(bad)
    with pytest.raises(ValueError, match="deviations must be finite"):
        broken.subspace(1)


def update(net: nn.Module, averaged: FusedAveragedModel) -> None:
    averaged.update_parameters(net)


def load(net: nn.Module, averaged: FusedAveragedModel) -> None:
    averaged.load_state_dict(averaged.state_dict())


def grow(net: nn.Module, averaged: FusedAveragedModel) -> None:
    averaged.adapt_to(net)


@pytest.mark.parametrize("change", [update, load, grow])
def test_a_subspace_ends_with_what_moves_its_average(change: Callable[..., None]) -> None:
    net, averaged = averaged_over(5)
    made = averaged.subspace(2)
    with averaged.swapped_into(net):
        pass  # this moves nothing
    with averaged.sampled_into(net, 0):
        pass
    with made.placed_into(net, [0.0, 1.0]):
        pass
    change(net, averaged)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="before an update or a load"), made.placed_into(net, [0.0, 1.0]):
        pass
    with pytest.raises(RuntimeError, match="before an update or a load"):
        made.elliptical_slice(lambda t: 0.0)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_gradients_that_are_none(ready: Any) -> None:
    net, averaged, made = ready
    with pytest.raises(RuntimeError, match="while the model is placed"):
        made.gradient(net)
    with averaged.swapped_into(net), pytest.raises(RuntimeError, match="while the model is placed"):
        made.gradient(net)
    with made.placed_into(net, T):
        with pytest.raises(RuntimeError, match="no gradients"):
            made.gradient(net)
        with pytest.raises(RuntimeError, match="leave placed_into first"):
            averaged.subspace(1)
        with pytest.raises(RuntimeError, match="leave placed_into first"), made.placed_into(net, T):
            pass


def test_slices_that_are_none(ready: Any) -> None:
    made = ready[2]
    for arguments, error, message in (
        ((5,), TypeError, "log_likelihood must be a function of t"),
        ((lambda t: None,), TypeError, "log_likelihood must return a number"),
        ((lambda t: math.nan,), ValueError, "got nan at t ="),
        ((lambda t: -math.inf,), ValueError, "finite where sampling starts"),
        ((lambda t: 0.0, 0.0), ValueError, "prior_std must be a positive number"),
        ((lambda t: 0.0, math.nan), ValueError, "prior_std must be a positive number"),
        ((lambda t: 0.0, 1.0, -1), ValueError, "count must be >= 0"),
        ((lambda t: 0.0, 1.0, 2.5), TypeError, "count must be an int"),
        ((lambda t: 0.0, 1.0, 1, 7), TypeError, "generator must be a torch.Generator"),
    ):
        with pytest.raises(error, match=message):
            made.elliptical_slice(*arguments)


def test_states_that_are_none() -> None:
    net, states = three_states()
    with pytest.raises(ValueError, match="states must be three"):
        curve_subspace(net, states[:2])
    with pytest.raises(ValueError, match="states must not lie on one line"):
        curve_subspace(net, [states[0], states[0], states[1]])
    lacking = {key: value for key, value in states[1].items() if key != "gain"}
    with pytest.raises(ValueError, match=r"state of the middle must have all names of model, got none for 'gain'"):
        curve_subspace(net, [states[0], lacking, states[2]])
    with pytest.raises(ValueError, match="state must have shape"):
        random_subspace(net, states[0] | {"3.bias": torch.zeros(4)}, 1)
    bad: list[tuple[Any, type[Exception], str]] = [
        (None, TypeError, "must be a state dict, got NoneType"),
        (3, TypeError, "must be a state dict, got int"),
        ({"3.bias": 3}, ValueError, "must have a tensor for '3.bias', got int"),
        (
            {"3.bias": torch.zeros(5, dtype=torch.complex64)},
            ValueError,
            "must have torch.float32 .* got torch.complex64",
        ),
        ({"1.num_batches_tracked": torch.tensor(0.5)}, ValueError, "must have torch.int64 .* got torch.float32"),
        ({"3.bias": torch.zeros(5, device="meta")}, ValueError, "must have values for '3.bias'"),
        ({"3.bias": torch.full((5,), math.nan)}, ValueError, "must have finite values in float32 for '3.bias'"),
        (
            {"gain": torch.tensor(1e306, dtype=torch.float64)},
            ValueError,
            "must have finite values in float32 for 'gain'",
        ),
        ({"other": torch.zeros(1)}, ValueError, "must have the names of model alone, got 'other'"),
    ]
    for other, error, message in bad:
        state = states[1] | other if isinstance(other, dict) else other
        with pytest.raises(error, match=f"^state {message}"):
            random_subspace(net, state, 2)
        with pytest.raises(error, match=f"^the state of the middle {message}"):
            curve_subspace(net, [states[0], state, states[2]])
    for what in (None, 3, iter(states), states[0]):
        with pytest.raises(TypeError, match="states must be a list of three states"):
            curve_subspace(net, what)  # type: ignore[arg-type]
    far = [{name: value * 0 + size for name, value in states[0].items()} for size in (-3, 1, 3)]
    far = [{name: v * 1e38 if v.is_floating_point() else v for name, v in state.items()} for state in far]
    with pytest.raises(ValueError, match="states must be near enough"):
        curve_subspace(net, far)
    with pytest.raises(ValueError, match="model must have parameters that are averaged"):
        random_subspace(nn.ReLU(), {}, 2)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        random_subspace(3, states[0], 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale must be a positive number"):
        random_subspace(net, states[0], 1, scale=0.0)
    with pytest.raises(TypeError, match="rank must be an int"):
        random_subspace(net, states[0], 1.5)  # type: ignore[arg-type]


# Planted bugs


def by_count(of_columns: Tensor, wanted: int, real: Any = subspace.principal_directions) -> tuple[Tensor, Tensor]:
    # K for K - 1.
    mixture, scales = real(of_columns, wanted)
    return mixture, scales * math.sqrt((len(of_columns) - 1) / len(of_columns))


def smallest(of_columns: Tensor, wanted: int, real: Any = subspace.principal_directions) -> tuple[Tensor, Tensor]:
    mixture, scales = real(of_columns, wanted + 1)
    return mixture[:, 1:], scales[1:]


def in_float32(columns_of: Any, count: int, real: Any = subspace.gram) -> Tensor:
    return real(([column.to(torch.float32) * (1 + 1e-7) for column in columns] for columns in columns_of), count)


def not_turned(averaged: Any, mixture: Tensor, scales: Tensor, num_averaged: int) -> Subspace:
    # The oldest deviation is not in slot 0 once slots are written again.
    return Subspace(averaged, mixture, scales, mixture * (len(mixture) - 1))


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("principal_directions", by_count),
        ("principal_directions", smallest),
        ("gram", in_float32),
        ("made_of_deviations", not_turned),
    ],
)
def test_planted_bugs_of_directions_are_found(monkeypatch: pytest.MonkeyPatch, name: str, bug: Any) -> None:
    monkeypatch.setattr(subspace_use, name, bug)
    with pytest.raises(AssertionError):
        test_scales_and_directions_are_those_of_an_svd(9)


def test_planted_bugs_of_points_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_fitting", lambda gradient, param: gradient)
    with pytest.raises(RuntimeError, match="grad"):
        test_a_cast_inside_stays_with_the_models_own_values("placed_into")
    monkeypatch.setattr(Subspace, "_taken", lambda self, t: torch.as_tensor(t, dtype=torch.float64))
    with pytest.raises(AssertionError):
        test_a_point_is_read_at_the_call()


def test_planted_bugs_of_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace_use, "in_order_of", lambda gradient, param: gradient.detach())
    with pytest.raises(AssertionError):
        test_gradient_is_that_of_autograd_in_float64()
    monkeypatch.undo()
    monkeypatch.setattr(
        subspace_use, "drawn_indices", lambda pairs: [i for i, pair in enumerate(pairs) if pair.name != "3.bias"]
    )
    with pytest.raises(AssertionError):
        test_gradient_is_that_of_autograd_in_float64()


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("log1p", lambda value: 4 * math.log1p(value)),
        ("cos", lambda angle: 1.0),
        ("sin", lambda angle: math.sin(angle) ** 3),
    ],
)
def test_planted_bugs_of_slices_are_found(monkeypatch: pytest.MonkeyPatch, name: str, bug: Any) -> None:
    broken = type("broken", (), {each: staticmethod(getattr(math, each)) for each in ("log1p", "cos", "sin", "isnan")})
    broken.pi, broken.inf = math.pi, math.inf
    setattr(broken, name, staticmethod(bug))
    monkeypatch.setattr(slices, "math", broken)
    with pytest.raises((AssertionError, RuntimeError)):
        require_posterior()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_examples_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """The subspace knows better than SWA how sure it may be, and better than random directions."""
    pytest.importorskip("torchmetrics")
    example = run_example("subspace", monkeypatch)
    nll = {method: scores["NLL"] for method, scores in example["means"](example["measure"]()).items()}
    print(nll)
    assert nll["subspace, slices"] <= nll["SWA"] - 0.04
    assert nll["subspace, slices"] < nll["random directions, slices"]
    if "subspace, NUTS" in nll:
        assert nll["subspace, NUTS"] <= nll["SWA"] - 0.04
