"""Block floating point: the authors' formula, bit for bit, and rounding in a model's forward and backward."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swafast.optim import BlockRounding, block_quantize

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = ((), (1,), (7,), (3, 5), (1, 9), (2, 3, 4, 5))


def uniform_numbers(x: Tensor, seed: int) -> Tensor:
    return torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))


def quantized(x: Tensor, bits: int, rounding: str, seed: int = 0) -> Tensor:
    return block_quantize(x, bits, rounding=rounding, generator=torch.Generator().manual_seed(seed))


def authors(x: Tensor, bits: int, u: Tensor | None) -> Tensor:
    """The formula of the authors' code, in its operations. ``u`` None: to the nearest. An all-zero row gives NaN."""
    if x.dim() <= 1:
        exponent = torch.tensor(float(math.floor(math.log2(x.abs().max().item()))))
    else:
        exponent = x.abs().flatten(1).amax(1).log2().floor().view(-1, *[1] * (x.dim() - 1))
    exponent = exponent.clamp(-128, 127)
    i = x * 2 ** (bits - 2 - exponent)
    i = i.round() if u is None else (i + u).floor()
    return i.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * 2 ** (exponent - (bits - 2))


def exactly(x: float, bits: int) -> float:
    """One number of its own block, to the nearest, in exact arithmetic."""
    exponent = min(max(math.frexp(abs(x))[1] - 1, -128), 127)
    i = round(math.ldexp(x, bits - 2 - exponent))
    return math.ldexp(min(max(i, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1), exponent - (bits - 2))


def same_bits(one: Tensor, other: Tensor) -> bool:
    integers = {4: torch.int32, 8: torch.int64}[one.itemsize]
    return one.dtype == other.dtype and torch.equal(one.view(integers), other.view(integers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_the_authors_formula_bit_for_bit(bits: int, rounding: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    for shape in SHAPES:
        for power in (-20, -1, 0, 3, 20):
            x = torch.randn(shape, generator=generator, dtype=dtype) * 2.0**power
            u = uniform_numbers(x, 3) if rounding == "stochastic" else None
            assert same_bits(quantized(x, bits, rounding, 3), authors(x, bits, u)), (shape, power)


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_numbers_beside_powers_of_two_have_the_exact_exponent(bits: int) -> None:
    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    values = torch.cat([powers.float(), powers.float().nextafter(torch.tensor(0.0)), powers[:-1].float() * 1.75])
    values = torch.cat([values, -values])[:, None]
    expected = [exactly(value, bits) for value in values.flatten().tolist()]
    assert torch.equal(quantized(values, bits, "nearest"), torch.tensor(expected)[:, None])
    # A logarithm in float32 rounds up to the next exponent here, and its values are twice as coarse.
    step = 2.0 ** (4 - bits)  # of a largest number below 8
    below = torch.tensor([[8.0 - 2**-21, step]])
    assert quantized(below, bits, "nearest")[0, 1] == step
    assert authors(below, bits, None)[0, 1] == 0


def test_a_row_of_zeros_stays_0_where_the_authors_formula_has_nan() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.3]])
    assert authors(x, 8, None)[0].isnan().all()
    for rounding in ("stochastic", "nearest"):
        assert quantized(x, 8, rounding)[0].tolist() == [0.0, 0.0]
        assert quantized(torch.zeros(3), 8, rounding).tolist() == [0.0] * 3
    assert quantized(torch.zeros(0, 4), 8, "stochastic").shape == (0, 4)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_nan_and_others_are_not(wrong: float) -> None:
    x = torch.tensor([[1.0, wrong], [1.0, 0.5]])
    assert quantized(x, 8, "stochastic").isnan().tolist() == [[True, True], [False, False]]


def test_stochastic_rounding_is_unbiased() -> None:
    x = torch.tensor([1.0, 0.3, -0.3, 0.01, -0.77]).repeat(20_000, 1)
    step = 2.0**-3
    off = (quantized(x, 5, "stochastic") - x).double()
    assert float(off.abs().max()) < step
    # 5 standard errors: those of a number rounded up or down are step / 2 at most.
    assert float(off.mean(0).abs().max()) < 5 * step / 2 / math.sqrt(len(x))
    biased = (quantized(x, 5, "nearest") - x).double()
    assert float(biased.mean(0).abs().max()) > 5 * step / 2 / math.sqrt(len(x))


def test_random_numbers_do_not_depend_on_the_memory_format() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(
        quantized(x, 5, "stochastic"), quantized(x.to(memory_format=torch.channels_last), 5, "stochastic")
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_have_the_values_of_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6).to(dtype)
    for rounding in ("stochastic", "nearest"):
        assert torch.equal(quantized(x, 8, rounding), quantized(x.float(), 8, rounding).to(dtype))


BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "1 bit": (torch.ones(2), {"bits": 1}, ValueError, "bits must be from 2 to 16, got 1"),
    "17 bits": (torch.ones(2), {"bits": 17}, ValueError, "bits must be from 2 to 16, got 17"),
    "bits of no int": (torch.ones(2), {"bits": 8.0}, TypeError, "bits must be an int from 2 to 16, got 8.0"),
    "a bool": (torch.ones(2), {"bits": True}, TypeError, "bits must be an int"),
    "rounding": (
        torch.ones(2),
        {"bits": 8, "rounding": "up"},
        ValueError,
        "rounding must be 'stochastic' or 'nearest'",
    ),
    "complex": (torch.ones(2) * 1j, {"bits": 8}, TypeError, "got torch.complex64: quantise torch.view_as_real of it"),
    "integers": (torch.ones(2).long(), {"bits": 8}, TypeError, "tensor must be float16, .*, got torch.int64"),
    "sparse": (torch.ones(2).to_sparse(), {"bits": 8}, ValueError, "tensor must be dense, got layout torch.sparse_coo"),
    "no generator": (
        torch.ones(2),
        {"bits": 8, "generator": 3},
        TypeError,
        "generator must be a torch.Generator, got 3",
    ),
    "never used": (torch.ones(2), {"bits": 8, "rounding": "nearest", "generator": 3}, TypeError, "generator must be a"),
    "a list": ([1.0], {"bits": 8}, TypeError, "tensor must be a tensor, got list"),
}


@pytest.mark.parametrize(("tensor", "options", "kind", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_named(tensor: Any, options: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        block_quantize(tensor, **options)


# In a model


def test_activations_and_errors_have_one_exponent_a_tensor() -> None:
    x = torch.tensor([[8.0, 0.6], [0.4, -0.3]], requires_grad=True)
    error = torch.tensor([[0.02, 5.0], [1.3, -0.7]])
    y = BlockRounding(4, error_bits=3, rounding="nearest")(x)
    y.backward(error)
    # Steps of 8 / 4 and of 4 / 2.
    assert y.tolist() == [[8.0, 0.0], [0.0, 0.0]]
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 4.0], [2.0, 0.0]]


def test_bits_of_none_pass_values_and_errors() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    layer = BlockRounding(None)
    layer(x).backward(torch.full((3, 4), 0.3))
    assert torch.equal(layer(x), x)
    assert x.grad is not None
    assert bool((x.grad == 0.3).all())
    rounding = BlockRounding(4)
    assert (rounding.bits, rounding.error_bits) == (4, 4)
    assert not torch.equal(rounding(x), x)
    rounding.bits = None  # as an average is evaluated
    assert torch.equal(rounding.eval()(x), x)
    assert "bits=None, error_bits=4, rounding='stochastic'" in repr(rounding)


def test_rounding_follows_torchs_seed_and_refuses_other_bits() -> None:
    layer, x = nn.Sequential(nn.ReLU(), BlockRounding(4)), torch.randn(50)
    torch.manual_seed(1)
    one = layer(x)
    torch.manual_seed(1)
    assert torch.equal(one, layer(x))
    assert not torch.equal(one, layer(x))
    with pytest.raises(ValueError, match="error_bits must be from 2 to 16, got 32"):
        BlockRounding(8, error_bits=32)
    with pytest.raises(TypeError, match="bits must be an int"):
        BlockRounding("8")  # type: ignore[arg-type]


def test_rounding_can_be_switched_off() -> None:
    model, x = nn.Sequential(BlockRounding(4), nn.Sequential(BlockRounding(None, error_bits=5))), torch.randn(9)
    before = repr(model)
    with suppress(KeyError), BlockRounding.switched_off(model):
        assert torch.equal(model(x), x)
        raise KeyError
    assert repr(model) == before
    assert not torch.equal(model.eval()(x), x)
    with pytest.raises(TypeError, match=r"model must be a .*, got int"):
        BlockRounding.switched_off(3)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_rounding_in_torch_func_and_in_traces() -> None:
    layer, x = BlockRounding(4, rounding="nearest"), torch.tensor([1.0, 0.3, -0.2])
    assert torch.func.grad(lambda x: layer(x).square().sum())(x).tolist() == [2.0, 0.5, -0.5]
    with pytest.raises(NotImplementedError, match=r"BlockRounding cannot run in .*vmap"):
        torch.func.vmap(layer)(x[:, None])
    model = nn.Sequential(nn.Linear(3, 3), layer)
    with pytest.raises(NotImplementedError, match=r"trace within BlockRounding.switched_off\(model\)"):
        torch.jit.trace(model, x)
    with BlockRounding.switched_off(model):
        assert torch.equal(torch.jit.trace(model, x)(x), model[0](x))
