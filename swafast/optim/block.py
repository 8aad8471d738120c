"""Block floating point: numbers of a few bits that share an exponent, as in SWALP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..op.checks import check_plain
from ..terms.numbers import as_int
from ..terms.pickling import pickled_from

#: An exponent has 8 bits, as in the paper.
MIN_EXPONENT, MAX_EXPONENT = -128, 127
MIN_BITS, MAX_BITS = 2, 16
ROUNDINGS = ("stochastic", "nearest")


@torch.no_grad()
def block_quantize(
    tensor: Tensor,  # any shape; float16, bfloat16, float32 or float64
    bits: int,
    *,
    rounding: str = "stochastic",
    generator: torch.Generator | None = None,
) -> Tensor:  # shape, dtype and device of ``tensor``
    """Return the values of a tensor in block floating point: integers of ``bits`` bits, times a power of two.

    The elements of one first index share an exponent; those of a tensor with at most one dimension share one for all::

        e = clip(floor(log2(max(abs(x)))), -128, 127)
        i = clip(floor(x * 2^(bits-2-e) + u), -2^(bits-1), 2^(bits-1) - 1)        u uniform in [0, 1)
        value = i * 2^(e-(bits-2))

    ``rounding="nearest"`` rounds ``x * 2^(bits-2-e)`` to an integer instead, and halves to even. Stochastic rounding is
    unbiased but for the clip. Rows of zeros stay 0, and rows with a NaN or an infinity become NaN. It computes in
    float32, for float64 in float64, and rounds the values of float16 and bfloat16 to that dtype once more. No gradient
    flows through: use :class:`BlockRounding` in a model. The device is not waited for.

    Args:
        bits: of an integer, its sign included.
        generator: of u, on the tensor's device; default: torch's own.

    Raises:
        TypeError: ``tensor`` is not a tensor of real floats, or ``bits`` not an int.
        ValueError: ``bits`` is not from 2 to 16, ``rounding`` neither ``"stochastic"`` nor ``"nearest"``, or ``tensor``
            is sparse, quantised or sharded.

    Paper: Yang et al. 2019, "SWALP: Stochastic Weight Averaging in Low-Precision Training", arXiv:1904.11943, and its
    authors' code, https://github.com/stevenygd/SWALP.
    """
    width, rounding = checked_bits("bits", bits), checked_rounding(rounding)
    check_real("tensor", tensor)
    x = tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    if x.numel() == 0:
        return tensor.detach().clone()
    rows = x.reshape(x.shape[0], -1) if x.dim() > 1 else x.reshape(1, -1)
    largest = rows.abs().amax(1, keepdim=True)  # NaN if one is
    exponents = (torch.frexp(largest).exponent - 1).clamp(MIN_EXPONENT, MAX_EXPONENT)
    shift = width - 2 - exponents
    scaled = _times_power_of_two(rows, shift)
    if rounding == "nearest":
        scaled = scaled.round()
    else:
        scaled = (scaled + torch.rand(rows.shape, dtype=x.dtype, device=x.device, generator=generator)).floor()
    values = _times_power_of_two(scaled.clamp(-(2 ** (width - 1)), 2 ** (width - 1) - 1), -shift)
    return torch.where(largest.isfinite(), values, torch.nan).view(x.shape).to(tensor.dtype)


def _times_power_of_two(x: Tensor, exponents: Tensor) -> Tensor:
    """Return ``x * 2^exponents``, which is exact. In two factors: 2^142 is no float32, but the product may be."""
    half = exponents // 2
    return x * _power_of_two(half, x.dtype) * _power_of_two(exponents - half, x.dtype)


def _power_of_two(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return powers of two of normal exponents, made of their bits: a device's ``exp2`` may be off by an ulp."""
    if dtype == torch.float64:
        return ((exponents.long() + 1023) << 52).view(torch.float64)
    return ((exponents + 127) << 23).view(torch.float32)


@pickled_from("swafast.optim")
class BlockRounding(nn.Module):
    """Round activations in the forward pass, and their gradients, the errors, in the backward pass, to a few bits.

    Each tensor has one exponent, as in :func:`block_quantize`. Put one after each activation function. It rounds in
    evaluation too; set ``bits`` to None to evaluate in full precision, as the authors do for the average. Random
    numbers come from torch's own generator, as those of dropout do.

    Args:
        bits: of the activations, any shape and real float dtype; None: they pass as they are.
        error_bits: of the errors; default: ``bits``. None: they pass as they are.
        rounding: ``"stochastic"`` or ``"nearest"``.

    Raises:
        TypeError: ``bits`` or ``error_bits`` is neither an int nor None; in a forward, the input is not of real floats.
        ValueError: they are not from 2 to 16, or ``rounding`` is another.

    Paper: Yang et al. 2019, "SWALP: Stochastic Weight Averaging in Low-Precision Training", arXiv:1904.11943.
    """

    def __init__(
        self, bits: int | None = 8, *, error_bits: int | str | None = "bits", rounding: str = "stochastic"
    ) -> None:
        super().__init__()
        given = {"bits": bits, "error_bits": bits if error_bits == "bits" else error_bits}
        checked = {name: None if value is None else checked_bits(name, value) for name, value in given.items()}
        self.bits, self.error_bits = checked["bits"], checked["error_bits"]
        self.rounding = checked_rounding(rounding)

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = _Rounding.apply(x, self.bits, self.error_bits, self.rounding)
        return rounded

    def extra_repr(self) -> str:
        return f"bits={self.bits}, error_bits={self.error_bits}, rounding={self.rounding!r}"


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int | None, error_bits: int | None, rounding: str) -> Tensor:
        ctx.error_bits, ctx.rounding = error_bits, rounding
        return _in_one_block(x, bits, rounding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, None, None, None]:
        return _in_one_block(error, ctx.error_bits, ctx.rounding), None, None, None


def _in_one_block(x: Tensor, bits: int | None, rounding: str) -> Tensor:
    return x.view_as(x) if bits is None else block_quantize(x.reshape(-1), bits, rounding=rounding).view(x.shape)


def checked_bits(argument: str, value: object) -> int:
    """Return a number of bits as an int.

    Raises:
        TypeError: it is not an int. ValueError: it is not from 2 to 16.
    """
    bits = as_int(value)
    if bits is None:
        raise TypeError(f"{argument} must be an int from {MIN_BITS} to {MAX_BITS}, got {value!r}")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{argument} must be from {MIN_BITS} to {MAX_BITS}, got {bits}: 8 is the paper's")
    return bits


def checked_rounding(value: object) -> str:
    """Return a way to round, or raise ValueError if there is none of that name."""
    if value not in ROUNDINGS:
        raise ValueError(f"rounding must be {' or '.join(map(repr, ROUNDINGS))}, got {value!r}")
    return str(value)


def check_real(what: str, tensor: object) -> None:
    """Raise unless this is a plain tensor of real floats.

    Raises:
        TypeError: it is no tensor, or not of real floats. ValueError: it is sparse, quantised or of a subclass.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        hint = ": quantise torch.view_as_real of it" if tensor.is_complex() else ""
        raise TypeError(f"{what} must be float16, bfloat16, float32 or float64, got {tensor.dtype}{hint}")
    check_plain(what, tensor)
