"""How exact an average is: closed form in float64 -> reference -> each backend. The bounds are promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, PowerAverage, Rule
from swafast.backends import cpu
from swafast.backends.contract import Pair
from swafast.terms.draws import Draws, make_random_key, random_bits
from swafast.terms.formats import COMPACT, get_format
from tests.kernels import update

ULP = 2.0**-24
NUMEL = 512

# What a stream of params may look like, as a function of n and the fixed noise of that update.
STREAMS: dict[str, Callable[[int, Tensor], Tensor]] = {
    "zero-mean": lambda n, noise: noise,
    "drifting": lambda n, noise: 1.0 + 1e-3 * n + 0.1 * noise,
    "jumping": lambda n, noise: (100.0 if (n // 50) % 2 else -1.0) + noise,
    "constant": lambda n, noise: torch.full_like(noise, 0.1),
}


def params_of(stream: str, updates: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [STREAMS[stream](n, torch.randn(NUMEL, generator=generator)).float() for n in range(updates)]


def averaged(params: list[Tensor], backend: str, **options: object) -> FusedAveragedModel:
    model = nn.ParameterList([nn.Parameter(params[0].clone())])
    average = FusedAveragedModel(model, backend=backend, **options)  # type: ignore[arg-type]
    for param in params:
        with torch.no_grad():
            model[0].copy_(param)
        average.update_parameters(model)
    return average


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.detach().double() - truth).norm() / truth.norm())


LONG = (10_000, "cpu")  # the bits of the other backends are the same: test_backends.py


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("updates", "backend"),
    [*((n, name) for n in (1, 2, 10, 1_000) for name in ("cpu", "cuda", "reference")), LONG],
    indirect=["backend"],
)
def test_equal_average_is_exact_to_float32(stream: str, updates: int, backend: str) -> None:
    params = params_of(stream, updates)
    truth = torch.stack([param.double() for param in params]).mean(0)
    error = relative_error(averaged(params, backend).module[0], truth)
    assert error <= max(1.0, 0.2 * updates) * ULP
    if stream == "zero-mean":
        assert error <= max(1.0, 0.6 * updates**0.5) * ULP


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("decay", [0.5, 0.99, 0.999, 0.9999])
def test_exponential_average_is_unbiased(stream: str, decay: float) -> None:
    params = params_of(stream, 3_000)
    truth = params[0].double()
    for param in params[1:]:
        truth = truth + (1.0 - decay) * (param.double() - truth)
    assert relative_error(averaged(params, "cpu", rule=ExponentialAverage(decay)).module[0], truth) <= 5e-6


@pytest.mark.parametrize(
    "rule",
    [EqualAverage(), ExponentialAverage(0.999), ExponentialAverage(0.999, warmup="ratio"), PowerAverage(6.94)],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_constant_model_stays_constant_to_the_bit(rule: Rule, dtype: torch.dtype, backend: str) -> None:
    specials = torch.tensor([0.1, -3.0, 1e-30, 1e30, 2.0**-149, 0.0])
    model = nn.ParameterList([nn.Parameter(torch.cat([specials, torch.randn(200)]).to(dtype))])
    average = FusedAveragedModel(model, rule=rule, backend=backend)
    for _ in range(50):
        average.update_parameters(model)
    finite = model[0].isfinite()
    assert torch.equal(average.averaged_state_dict()["0"][finite], model[0].float()[finite])
    assert torch.equal(average.module[0][finite], model[0][finite])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_averaged_in_float32(dtype: torch.dtype, backend: str) -> None:
    params = [param.to(dtype) for param in params_of("drifting", 600)]
    truth = torch.stack([param.double() for param in params]).mean(0)
    average = averaged(params, backend)
    assert average.module[0].dtype == dtype
    assert relative_error(average.averaged_state_dict()["0"], truth) <= 0.2 * 600 * ULP


def frozen_and_moving(updates: int = 5_000) -> tuple[float, float, float]:
    """An EMA of a bfloat16 param that starts at 1 and is then 2: the right result, ours and torch's."""
    model = nn.ParameterList([nn.Parameter(torch.ones(4, dtype=torch.bfloat16))])
    ours = FusedAveragedModel(model, rule=ExponentialAverage(0.999))
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    for average in (ours, theirs):
        average.update_parameters(model)
    with torch.no_grad():
        model[0].fill_(2.0)
    for _ in range(updates):
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert len({*theirs.module[0].tolist()}) == len({*ours.averaged_state_dict()["0"].tolist()}) == 1
    return 2.0 - 0.999**updates, ours.averaged_state_dict()["0"][0].item(), theirs.module[0][0].item()


def test_where_torch_freezes_ours_moves() -> None:
    right, ours, theirs = frozen_and_moving()
    print(f"right: {right:.4f}, swafast: {ours:.4f}, torch's AveragedModel: {theirs:.4f}")
    assert theirs == 1.0
    assert ours == pytest.approx(right, rel=1e-5)


def test_float64_and_complex_are_averaged_in_their_own_dtype() -> None:
    model = nn.ParameterList(
        [nn.Parameter(torch.randn(5, dtype=torch.float64)), nn.Parameter(torch.randn(5, dtype=torch.cfloat))]
    )
    average = FusedAveragedModel(model)
    seen = []
    for _ in range(20):
        with torch.no_grad():
            for param in model:
                param.copy_(torch.randn(5, dtype=param.dtype))
        seen.append([param.detach().clone() for param in model])
        average.update_parameters(model)
    for i, (dtype, tolerance) in enumerate(((torch.float64, 1e-14), (torch.complex64, 1e-6))):
        mean = torch.stack([params[i] for params in seen]).mean(0)
        assert average.module[i].dtype == dtype
        assert (average.module[i] - mean).norm() / mean.norm() <= tolerance


def test_huge_values_beside_small_ones_are_copied_at_first() -> None:
    # A lerp at weight 1 would lose the 1 beside 1e8, and give NaN for an average that was infinite.
    model = nn.ParameterList([nn.Parameter(torch.tensor([1e8, float("inf")]))])
    average = FusedAveragedModel(model)
    with torch.no_grad():
        model[0].fill_(1.0)
    average.update_parameters(model)
    assert average.module[0].tolist() == [1.0, 1.0]


# Formats that keep more or less than float32, by the kernels themselves: a model would take longer than its updates.


def error_of(format: str, stream: str, updates: int, rule: Rule | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Average a stream; return (average, plane 0, truth), float64 of NUMEL elements each.

    The truth of the mean is summed with what each addition loses, so it is good to the last bit of float64.
    """
    fmt, rule = get_format(format), rule or EqualAverage()
    generator = torch.Generator().manual_seed(7)
    param = torch.empty(NUMEL)
    planes = tuple(torch.empty(NUMEL, dtype=dtype) for dtype in (fmt.dtype, *(dtype for _, dtype in fmt.extra)))
    pair = Pair("w", param, planes, fmt, Draws(make_random_key(0, "w"), (NUMEL,)))
    launch, counter = cpu.prepare([pair]), torch.tensor(0)
    total, lost, ema = (torch.zeros(NUMEL, dtype=torch.float64) for _ in range(3))
    for n in range(updates):
        param.copy_(STREAMS[stream](n, torch.randn(NUMEL, generator=generator)))
        update(launch, [pair], [rule], [counter])
        newest = param.double()
        if isinstance(rule, EqualAverage):
            after = total + newest
            part = after - total
            lost += (total - (after - part)) + (newest - part)
            total = after
        else:
            ema += rule.weight(n) * (newest - ema) if n else newest
    truth = (total + lost) / updates if isinstance(rule, EqualAverage) else ema
    return fmt.decode(planes).double(), planes[0].double(), truth


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("updates", [1, 10, 20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_compensated_is_float64_rounded_once(stream: str, updates: int) -> None:
    value, plane, truth = error_of("compensated", stream, updates)
    assert (value - truth).norm() <= 1e-11 * truth.norm()  # 48 bits, not 24
    assert (plane - truth).norm() <= 6e-8 * truth.norm()
    ulp = torch.nextafter(plane.float().abs(), torch.tensor(torch.inf)).double() - plane.abs()
    away_from_zero = truth.abs() >= 1e-3 * truth.norm() / NUMEL**0.5
    assert ((plane - truth).abs() <= 0.51 * ulp)[away_from_zero].all()  # promised: 1 ulp


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("updates", [1, 100, 10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_compact_keeps_the_mean(stream: str, updates: int) -> None:
    value, _, truth = error_of("compact", stream, updates)
    assert (value - truth).norm() <= 1e-5 * max(updates, 4) ** 0.5 * truth.norm()


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("decay", "updates"),
    [
        *((decay, 5_000) for decay in (0.5, 0.99, 0.9999)),
        *(pytest.param(0.9999, updates, marks=pytest.mark.slow) for updates in (10_000, 40_000, 100_000)),
    ],
)
def test_compact_keeps_an_ema(stream: str, decay: float, updates: int) -> None:
    value, _, truth = error_of("compact", stream, updates, ExponentialAverage(decay))
    # While an EMA of zero-mean params forgets its first model, it is smaller than what its units in the last place were
    # made for: each update rounds by 0.29 units, 5.8e-6 of the average, and these stay for 1 / weight updates.
    forgets = stream == "zero-mean" and updates == 40_000
    assert (value - truth).norm() <= (1.4e-3 if forgets else 1e-3) * truth.norm()


@pytest.mark.parametrize("stream", ["drifting", "jumping", "constant"])
def test_half_is_right_on_the_whole(stream: str) -> None:
    """Off by percents element by element, but not to one side: the sum over the elements is much closer."""
    value, _, truth = error_of("half", stream, 3_000)
    assert (value - truth).norm() <= 0.05 * truth.norm()
    assert abs(float((value - truth).sum())) <= 4 * float((value - truth).norm())
    assert abs(float((value - truth).mean())) <= 0.005 * float(truth.abs().mean())


def test_stratified_bits_halve_the_squared_error() -> None:
    """Against bits that updates draw by themselves, in plain torch."""

    def squared_error(bits_of: Callable[[int], Tensor]) -> float:
        generator = torch.Generator().manual_seed(7)
        average, truth = torch.zeros(NUMEL), torch.zeros(NUMEL, dtype=torch.float64)
        for n in range(3_000):
            param = 1.0 + torch.randn(NUMEL, generator=generator)
            truth += (param.double() - truth) / (n + 1)
            moved = torch.lerp(average, param, 1 / (n + 1)) if n else param
            average = COMPACT.decode(COMPACT.encode(moved, bits_of(n) >> 24))
        return float((average.double() - truth).square().sum())

    index, free = torch.arange(NUMEL), torch.Generator().manual_seed(8)
    stratified = squared_error(lambda n: random_bits(make_random_key(0, "w"), n, index))
    independent = squared_error(lambda n: torch.randint(0, 2**32, (NUMEL,), generator=free))
    assert 0.35 <= stratified / independent <= 0.65
