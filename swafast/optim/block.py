"""Block floating point: numbers of a few bits that share an exponent, as in SWALP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
        generator: of u, on the tensor's device; default: torch's own. ``rounding="nearest"`` makes no use of it.

    Raises:
        TypeError: ``tensor`` is not a tensor of real floats, ``bits`` not an int, or ``generator`` no generator.
        ValueError: ``bits`` is not from 2 to 16, ``rounding`` neither ``"stochastic"`` nor ``"nearest"``, ``tensor`` is
            sparse, quantised or sharded, or ``generator`` on another device.

    Paper: Yang et al. 2019, "SWALP: Stochastic Weight Averaging in Low-Precision Training", arXiv:1904.11943, and its
    authors' code, https://github.com/stevenygd/SWALP.
    """
    width, rounding = checked_bits("bits", bits), checked_rounding(rounding)
    check_real("tensor", tensor)
    _check_generator(generator, tensor.device)
    return _quantized(tensor, width, rounding, generator)


def _quantized(tensor: Tensor, width: int, rounding: str, generator: torch.Generator | None) -> Tensor:
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


def _check_generator(generator: object, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    if generator.device.type != device.type:
        raise ValueError(f"generator must be on the tensor's device, {device}, got one on {generator.device}")


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
    evaluation too: evaluate within :meth:`switched_off`, or set ``bits`` and ``error_bits`` to None, as the authors do
    for the average. Random numbers come from torch's own generator, as those of dropout do.

    Args:
        bits: of the activations, any shape and real float dtype; None: they pass as they are.
        error_bits: of the errors; default: ``bits``. None: they pass as they are.
        rounding: ``"stochastic"`` or ``"nearest"``.

    Raises:
        TypeError: ``bits`` or ``error_bits`` is neither an int nor None; in a forward, the input is not of real floats.
        ValueError: they are not from 2 to 16, or ``rounding`` is another.
        NotImplementedError: in a forward, ``torch.vmap`` or ``torch.jit.trace`` runs it.

    Paper: Yang et al. 2019, "SWALP: Stochastic Weight Averaging in Low-Precision Training", arXiv:1904.11943.
    """

    def __init__(
        self, bits: int | None = 8, *, error_bits: int | str | None = "bits", rounding: str = "stochastic"
    ) -> None:
        super().__init__()
        self.bits, self.error_bits = bits, bits if error_bits == "bits" else error_bits
        self.rounding = rounding

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("bits", "error_bits") and value is not None:
            value = checked_bits(name, value)
        elif name == "rounding":
            value = checked_rounding(value)
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is None and (self.error_bits is None or not (torch.is_grad_enabled() and x.requires_grad)):
            return x
        if torch.jit.is_tracing():
            raise NotImplementedError("BlockRounding cannot be traced: trace within BlockRounding.switched_off(model)")
        rounded: Tensor = _Rounding.apply(x, self.bits, self.error_bits, self.rounding)
        return rounded

    @staticmethod
    def switched_off(model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which no ``BlockRounding`` of a model rounds, such as for its evaluation.

        Raises:
            TypeError: ``model`` is not a module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        return _switched_off([layer for layer in model.modules() if isinstance(layer, BlockRounding)])

    def extra_repr(self) -> str:
        return f"bits={self.bits}, error_bits={self.error_bits}, rounding={self.rounding!r}"


@contextmanager
def _switched_off(layers: list[BlockRounding]) -> Iterator[None]:
    bits = [(layer.bits, layer.error_bits) for layer in layers]
    try:
        for layer in layers:
            layer.bits = layer.error_bits = None
        yield
    finally:
        for layer, own in zip(layers, bits, strict=True):
            layer.bits, layer.error_bits = own


class _Rounding(torch.autograd.Function):
    # With ``setup_context``, torch.func can differentiate it.
    @staticmethod
    def forward(x: Tensor, bits: int | None, error_bits: int | None, rounding: str) -> Tensor:
        return _in_one_block(x, bits, rounding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.error_bits, ctx.rounding = inputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, None, None, None]:
        return _in_one_block(error, ctx.error_bits, ctx.rounding), None, None, None

    @staticmethod
    def vmap(*arguments: Any) -> Any:
        raise NotImplementedError(
            "BlockRounding cannot run in torch.vmap, where each sample would have an exponent of its own: call it on "
            "whole batches, or within BlockRounding.switched_off(model)"
        )


@torch.no_grad()
def _in_one_block(x: Tensor, bits: int | None, rounding: str) -> Tensor:
    if bits is None:
        return x.view_as(x)
    width = checked_bits("bits", bits)
    check_dtype("x", x)  # not its memory: tensors of torch.func have none
    return _quantized(x.reshape(-1), width, rounding, None).view(x.shape)


class Noise:
    """Random numbers that depend on a seed and a step alone, from one generator for each device."""

    def __init__(self, seed: int, step: int) -> None:
        # torch's generator on a CPU takes 32 bits. The odd factor makes them differ for 2^32 steps.
        if not 0 <= seed < 2**32:
            seed = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "big")
        self._seed = (seed * 0x85EBCA6B + step * 0x9E3779B1) % 2**32
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def checked_bits(argument: str, value: object) -> int:
    """Return a number of bits as an int.

    Raises:
        TypeError: it is not an int. ValueError: it is not from 2 to 16.
    """
    bits = as_int(value)
    if bits is None:
        raise TypeError(f"{argument} must be an int from {MIN_BITS} to {MAX_BITS}, got {value!r}")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{argument} must be from {MIN_BITS} to {MAX_BITS}, got {bits}")
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
    check_dtype(what, tensor)
    check_plain(what, tensor)


def check_dtype(what: str, tensor: Tensor) -> None:
    """Raise TypeError unless a tensor has real floats."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        hint = ": quantise torch.view_as_real of it" if tensor.is_complex() else ""
        raise TypeError(f"{what} must be float16, bfloat16, float32 or float64, got {tensor.dtype}{hint}")
