"""How exact an average is: closed form in float64 -> reference -> each backend. The bounds are promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, PowerAverage, Rule

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


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("updates", [1, 2, 10, 1_000, 10_000])
def test_equal_average_is_exact_to_float32(stream: str, updates: int, backend: str) -> None:
    if backend == "reference" and updates > 1_000:
        backend = "cpu"  # the same bits, by test_backends_agree
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


def test_where_torch_freezes_ours_moves() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(4, dtype=torch.bfloat16))])
    ours = FusedAveragedModel(model, rule=ExponentialAverage(0.999))
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    for average in (ours, theirs):
        average.update_parameters(model)
    with torch.no_grad():
        model[0].fill_(2.0)
    for _ in range(5_000):
        ours.update_parameters(model)
    for _ in range(100):
        theirs.update_parameters(model)
    assert theirs.module[0].tolist() == [1.0] * 4
    assert ours.averaged_state_dict()["0"] == pytest.approx(2.0 - 0.999**5_000, rel=1e-5)


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
