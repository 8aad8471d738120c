"""A subspace through an average: points of few coordinates, placed in a model, and gradients by these coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from ..terms.layout import windows
from ..terms.normals import float32
from ..terms.numbers import as_int
from ..terms.samples import Sample
from .elliptical_slice import elliptical_slice

#: A direction is used if it has more than this share of the largest scale. From a Gram matrix in float64 the scales are
#: known to 1.5e-8 of the largest, the root of its epsilon, and deviations in float32 to 6e-8.
_LEAST_SCALE = 1e-7
#: Elements of each column that are multiplied at a time: 20 columns of them take 10 MB in float64.
_WINDOW_NUMEL = 2**16
#: Scales in a print.
_PRINTED = 6


class HasPoints(Protocol):
    """What a subspace needs of the averaged model whose columns span it."""

    def _spans(self) -> object: ...
    def _placed_into(
        self, model: Module, sample: Callable[[], Sample], spelled: str
    ) -> AbstractContextManager[Module]: ...
    def _products_with_gradients(self, model: Module, count: int) -> Tensor: ...


class Subspace:
    """A plane, or a space of a few more dimensions, through the average: ``averaged.subspace(5)`` makes one.

    ``params = average + sum over i of t[i] * direction[i]``, with as many coordinates ``t`` as there are directions.
    Directions are sums of the average's columns, which kernels add up where a point is placed: there is no matrix of
    params times directions. The columns stay those of the averaged model, so a subspace ends with its next update.

    Attributes:
        scales: (rank,) float64, the length of each direction over all params.
        trajectory: (count, rank) float64, the coordinates of what the directions were made of: of the deviations, the
            oldest first; of the three states of a curve; nothing if they are random.

    Paper: Izmailov et al. 2019, "Subspace Inference for Bayesian Deep Learning", arXiv:1907.07504.
    """

    def __init__(
        self,
        averaged: HasPoints,
        mixture: Tensor,  # (columns, rank) float64, on the CPU: how much of each column is in each direction
        scales: Tensor,
        trajectory: Tensor,
    ) -> None:
        self.scales, self.trajectory = scales, trajectory
        self._averaged, self._mixture, self._spanned = averaged, mixture, averaged._spans()

    @property
    def rank(self) -> int:
        """The number of directions."""
        return self._mixture.shape[1]

    def placed_into(self, model: Module, t: Tensor | Sequence[float]) -> AbstractContextManager[Module]:
        """Run ``model`` at a point: ``with subspace.placed_into(model, t) as placed: loss(placed).backward()``.

        Params are written by the kernels that draw samples, each rounded once to its dtype, the same bits on every
        backend and on any number of ranks. As with :meth:`~swafast.FusedAveragedModel.sampled_into`, buffers begin with
        those of the average and may be written, params must not, and on leaving, after an exception too, all are back.
        If the body casts or moves the model, the dtype or device stays, and the values and gradients are cast to it.
        Params have no ``grad`` on entering, and get back on leaving what they had. Gradients do not flow to ``t``: use
        :meth:`gradient`. On several ranks it is collective.

        A point is computed in float32, also if params are float64. A value too large for float32 becomes infinite.

        Args:
            t: (rank,) coordinates, a real tensor on any device or numbers, read when this is called. 0 is the average.

        Raises:
            TypeError: ``t`` is not a tensor or sequence of real numbers, or ``model`` is not a module.
            ValueError: ``t`` has another shape, a NaN, an infinity or a number too large, or ``model`` does not fit the
                averages.
            RuntimeError: the average has moved on since the subspace was made, or is swapped in already; or, on
                leaving, a param was written. The params are back then.
        """
        taken = self._taken(t)
        spelled = taken.tolist() if isinstance(taken, Tensor) else type(t).__name__
        return self._averaged._placed_into(model, lambda: self._sample(taken), f"t={spelled}")

    def gradient(self, model: Module) -> Tensor:
        """Return the gradient by ``t`` of the losses that were propagated back since ``model`` was placed.

        ``gradient[i] = sum over params of <param.grad, direction[i]>``, in float64. Call it inside the ``with`` of
        :meth:`placed_into`, after ``loss.backward()``. Params without a ``grad`` count as 0. On several ranks it is
        collective, and the gradients are those that DDP or FSDP2 leave: of the mean over the ranks.

        Returns:
            (rank,) float64, on the CPU.

        Raises:
            RuntimeError: the model is not placed, no param has a gradient, or the average has moved on.
            NotImplementedError: the model is an FSDP1 model.
        """
        self._refuse_if_moved("gradient")
        return self._averaged._products_with_gradients(model, len(self._mixture)) @ self._mixture

    def elliptical_slice(
        self,
        log_likelihood: Callable[[Tensor], object],
        prior_std: float = 1.0,
        count: int = 30,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return samples of the posterior over ``t`` by elliptical slice sampling: (count, rank) float64, on the CPU.

        The density is ``exp(log_likelihood(t)) * N(t; 0, prior_std^2)``. The first sample is drawn from 0, the average.

        Args:
            log_likelihood: takes ``t``, (rank,) float64 on the CPU. It returns a number: the log-likelihood of all data
                at this point, divided by a temperature. It must be the same each time: set BatchNorm's statistics
                anew from the same batches, and evaluate in eval mode.
            prior_std: the standard deviation of the prior in each coordinate.
            generator: of the random numbers; default: torch's own. On several ranks, seed it alike on all.

        Raises:
            TypeError, ValueError: an argument is not as above; or ``log_likelihood`` returns no number, a NaN, or at 0
                an infinity.
            RuntimeError: ``log_likelihood`` changes so much that no sample is found. A small change is warned of.

        Papers: Izmailov et al. 2019, arXiv:1907.07504; Murray, Adams and MacKay 2010, "Elliptical Slice Sampling",
        arXiv:1001.0175.
        """
        self._refuse_if_moved("elliptical_slice")
        start = torch.zeros(self.rank, dtype=torch.float64, device="cpu")
        return elliptical_slice(log_likelihood, start, prior_std, count, generator)

    def _refuse_if_moved(self, action: str) -> None:
        if self._averaged._spans() != self._spanned:
            raise RuntimeError(
                f"{action} must use a subspace of the average as it is, got one from before an update or a load: make "
                f"it again by averaged.subspace({self.rank})"
            )

    def _sample(self, t: Tensor | TypeError | ValueError) -> Sample:
        """Return the point at ``t`` as a sample without noise, or raise what was wrong with ``t``."""
        self._refuse_if_moved("placed_into")
        if not isinstance(t, Tensor):
            raise t
        if t.shape != (self.rank,):
            raise ValueError(f"t must be of the shape ({self.rank},), got {tuple(t.shape)}")
        if not bool(t.isfinite().all()):
            raise ValueError(f"t must be finite, got {t.tolist()}")
        coefficients = tuple(map(float32, (self._mixture @ t).tolist()))
        if not all(map(math.isfinite, coefficients)):
            raise ValueError(f"t must be small enough for float32, got {t.tolist()}")
        return Sample(0, coefficients)

    def _taken(self, t: object) -> Tensor | TypeError | ValueError:
        """Return a copy of ``t`` in float64 on the CPU, or the error to raise once all ranks are there."""
        expected = f"t must be {self.rank} real numbers, got {type(t).__name__}"
        try:
            given = t.detach() if isinstance(t, Tensor) else t
            parts = given if isinstance(given, (list, tuple)) else [given]
            if any("complex" in str(getattr(part, "dtype", "")) for part in parts):  # torch would drop a part of them
                return TypeError(f"{expected} of complex numbers: pass their real parts")
            # On the CPU, since the user's default device may be another one.
            values = torch.as_tensor(given, dtype=torch.float64, device="cpu")
            return values.to_dense().clone() if values.layout != torch.strided else values.clone()
        except OverflowError as error:
            return ValueError(f"t must be small enough for float32: {error}")
        except (TypeError, ValueError, RuntimeError) as error:
            return TypeError(f"{expected}: {error}")

    def __repr__(self) -> str:
        scales = [f"{scale:.3g}" for scale in self.scales[:_PRINTED].tolist()]
        more = ["..."] * (self.rank > _PRINTED)
        return f"Subspace(rank={self.rank}, scales=[{', '.join(scales + more)}])"


@torch.no_grad()
def gram(columns_of: Iterable[Sequence[Tensor]], count: int) -> Tensor:  # (count, count) float64, on the CPU
    """Return the inner products of columns over all params, ``D^T D``, in float64.

    Args:
        columns_of: the columns of each param, dense, in one order of memory.
    """
    total = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    for columns in columns_of:
        for piece in _pieces(columns):
            rows = torch.stack([each.to(torch.float64) for each in piece])
            total += (rows @ rows.T).cpu()
    return total


@torch.no_grad()
def products(
    gradients_of: Iterable[tuple[Tensor, Sequence[Tensor]]], count: int
) -> Tensor:  # (count,) float64, on the CPU
    """Return the inner product of the gradients with each column, over all params, in float64.

    Args:
        gradients_of: of each param, the gradient in the order of memory of the columns, and the columns.
    """
    total = torch.zeros(count, dtype=torch.float64, device="cpu")
    for gradient, columns in gradients_of:
        for first, *rest in _pieces((gradient, *columns)):
            rows = torch.stack([each.to(torch.float64) for each in rest])
            total += (rows @ first.to(device=rows.device, dtype=torch.float64)).cpu()
    return total


def _pieces(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield windows of dense tensors of one order of memory, 1-D."""
    flat = tuple(tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in tensors)
    return windows(flat, _WINDOW_NUMEL) if flat and flat[0].numel() else iter(())


def in_order_of(gradient: Tensor, param: Tensor) -> Tensor:
    """Return a gradient with the strides of its param."""
    if gradient.stride() == param.stride() and gradient.layout == param.layout:
        return gradient.detach()
    return torch.empty_like(param, dtype=gradient.dtype).copy_(gradient.detach())


def principal_directions(of_columns: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Return how much of each column is in each direction, (count, wanted), and the directions' scales, (wanted,).

    ``D / sqrt(count - 1) = U S V^T`` with a row of D for each column. Direction i is ``s_i v_i``, which is
    ``u_i^T D / sqrt(count - 1)``. So the eigenvectors ``u_i`` of the Gram matrix tell all, and no V is needed.

    Args:
        of_columns: (count, count) float64, the Gram matrix of the columns.

    Raises:
        ValueError: ``wanted`` is more than the number of independent columns, or the matrix is not finite.
    """
    count = len(of_columns)
    if not bool(of_columns.isfinite().all()):
        raise ValueError("the deviations must be finite for a subspace, got a NaN, an infinity or an overflow in them")
    squares, vectors = torch.linalg.eigh(of_columns / (count - 1))
    scales, vectors = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    independent = int((scales > _LEAST_SCALE * scales[0]).sum())
    if wanted > independent:
        raise ValueError(
            f"rank must be at most {independent}, the number of independent deviations among the {count} that are "
            f"there, got {wanted}: average more models, or construct the average with more deviations"
        )
    # An eigenvector has two signs; this one does not depend on the library that computes it.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    return vectors[:, :wanted] / math.sqrt(count - 1), scales[:wanted]


def made_of_deviations(averaged: Any, mixture: Tensor, scales: Tensor, num_averaged: int) -> Subspace:
    """Return the subspace of directions from :func:`principal_directions`."""
    count = len(mixture)
    # D = sqrt(count - 1) U S V^T, so row k of D has the coordinates sqrt(count - 1) U[k].
    oldest = num_averaged % count
    return Subspace(averaged, mixture, scales, (mixture * (count - 1)).roll(-oldest, 0))


def refuse_without_gradients(found: bool) -> None:
    """Raise RuntimeError if no param has a gradient."""
    if not found:
        raise RuntimeError(
            "gradient must be called after loss.backward(), got a model whose params have no gradients: call "
            "model.requires_grad_() before, if they are frozen"
        )


def checked_rank(rank: object) -> int:
    """Raise TypeError or ValueError unless ``rank`` is an int of 1 or more."""
    number = as_int(rank)
    if number is None:
        raise TypeError(f"rank must be an int, got {rank!r}")
    if number < 1:
        raise ValueError(f"rank must be at least 1, got {number}")
    return number
