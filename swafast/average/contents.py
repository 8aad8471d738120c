"""What an average holds, known on the host: the values of its construction, loaded weights, or counted models.

The count is in the memory of the model's device. Reading it there would wait for a GPU, so this goes by the versions
that torch gives to tensors. Each write raises them, also that of a CUDA graph's capture. Code that goes around them
(``param.data = ...``, ``param.data.copy_(...)``) is seen by a few elements of each param on a CPU. On a GPU it is seen
only if the memory is another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Module

from ..terms.warn import warn_user
from ..torch_private.core import disable_dynamo, versions
from .described import Described
from .planes import extra_planes, renew_planes

if TYPE_CHECKING:
    from ..loop.guard import Guard
    from ..terms.formats import Format

#: What an average holds. These words are in pickles.
INITIAL, WEIGHTS, MODELS = "initial values", "weights", "models"

_EMPTY = "holds no model yet, only the values of its construction"
_OR = "these values are an average of n models, construct it with num_averaged=n"


class Uncounted:
    """Watches an average without a counted model, to see what is written into it.

    Args:
        counter: the average's ``n_averaged``.
        params: the tensors into which other code may load weights without counting them.
        extra: the further planes of these.
        has_weights: whether it has.
        is_loaded: whether a state without a model was loaded.
    """

    def __init__(
        self,
        counter: Tensor,
        params: Sequence[Tensor] = (),
        extra: Sequence[Tensor] = (),
        *,
        has_weights: bool = False,
        is_loaded: bool = False,
    ) -> None:
        self.has_weights, self.is_loaded = has_weights, is_loaded
        self.is_updated = False  # whether an update was launched
        self.note(counter, params, extra)

    def note(self, counter: Tensor, params: Sequence[Tensor], extra: Sequence[Tensor]) -> None:
        """Disregard what has been written so far."""
        self._counter, self._params, self._extra = _stamps([counter]), _stamps(params), _stamps(extra)
        self._contents = [*map(_content, params)]

    def holds(self, counter: Tensor, params: Sequence[Tensor]) -> str:
        """Return what the average holds now. If the counter has been written, this decides, since it tells of params.

        On a CPU it is read. On a GPU what has been written is taken for a count.
        """
        if is_on_host(counter) and counter.numel() == 1 and int(counter) > 0:
            return MODELS  # whether or not its version tells of a write
        if self.is_updated or _stamps([counter]) != self._counter:
            self.is_loaded = self.is_loaded or not self.is_updated
            return INITIAL if is_on_host(counter) else MODELS
        self.has_weights = self.has_weights or bool(self._written(params))
        return WEIGHTS if self.has_weights else INITIAL

    def _written(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return those of the params that other code has written."""
        if len(params) != len(self._params):
            return [*params] if self._params else []
        states = zip(params, _stamps(params), self._params, map(_content, params), self._contents, strict=True)
        # After a move or a cast of the module alone, contents cannot be compared.
        return [p for p, a, b, (now, x), (then, y) in states if a != b or (now == then and x != y)]

    def parted(self, params: Sequence[Tensor], extra: Sequence[Tensor]) -> list[Tensor]:
        """Return the params that other code has written without their further planes, of which it may not know."""
        return self._written(params) if self._extra and _stamps(extra) == self._extra else []


def is_on_host(tensor: Tensor) -> bool:
    """Return whether a tensor can be read without waiting."""
    return tensor.device.type == "cpu"


def _stamps(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return list(zip(map(id, tensors), versions(tensors), strict=True))


#: The most elements of a param that are compared: its first ones along the last dimension.
_FIRST = 4


def _content(tensor: Tensor) -> tuple[object, object]:
    """Return how a tensor is stored, and what tells of other values: some of them, or the address if it is on a GPU."""
    try:
        shape, stride = tensor.shape, tensor.stride()
        stored = (tensor.device, tensor.dtype, stride)
        if not (tensor.numel() and is_on_host(tensor)):
            return stored, tensor.data_ptr()
        first = tensor.detach().as_strided((min(_FIRST, shape[-1]),) if shape else (), stride[-1:])
        return stored, str(first.tolist())  # NaNs would not be equal
    except (RuntimeError, NotImplementedError):  # a sparse one, or one without memory of its own
        return None, None


class HoldsModels(Described):
    """Base class of one averaged model, which says so where it is used before it holds a model."""

    _times_set = 0  # how often the count was set, with other values, where an update adds to it
    _uncounted: Uncounted | None = None  # None: models are counted, or it is an old pickle, which does not tell

    if TYPE_CHECKING:
        _guard: Guard

    def _params(self) -> Sequence[Tensor]:
        """Return the tensors into which other code may load weights."""
        return ()

    def _extra_planes(self) -> Sequence[Tensor]:
        """Return the further planes of these."""
        return extra_planes(self) if isinstance(self, Module) else ()

    def _count_from(self, num_averaged: int, *, is_loaded: bool = False) -> None:
        """Begin with values that are an average of this many models: of none if they are those of a construction."""
        self._times_set += 1
        self.n_averaged.fill_(num_averaged)
        watched = (self.n_averaged, self._params(), self._extra_planes())
        self._uncounted = None if num_averaged else Uncounted(*watched, is_loaded=is_loaded)

    def _holds(self) -> str:
        if self._uncounted is None:
            return MODELS
        params = self._params()
        found = self._uncounted.holds(self.n_averaged, params)
        parted = self._uncounted.parted(params, self._extra_planes())
        if parted:
            self._uncounted.has_weights = True
            renew_planes(self, parted, self._each_average())  # type: ignore[arg-type]  # a module, as it has planes
            self._note_own_writes()
        if found == MODELS:
            self._uncounted = None
        return found

    def _note_own_writes(self) -> None:
        """Disregard what we have written since the last :meth:`_holds`."""
        if self._uncounted is not None:
            self._uncounted.note(self.n_averaged, self._params(), self._extra_planes())

    def _warn_if_empty(self, action: str) -> None:
        if self._holds() == INITIAL:
            warn_user(f"{action} uses an average that {self._lack()}")

    @disable_dynamo
    def _prepare_forward(self) -> None:
        """Wait for an update under way and refuse during a swap, each time: a compiled graph would leave this out."""
        self._guard.settle()
        self._guard.refuse_while_swapped("forward")
        if self._uncounted is not None:
            self._warn_if_empty("forward")

    def _lack(self) -> str:
        """Return what the average lacks, and what to do."""
        attachment = self._guard.attachment
        if attachment is not None:
            return f"{_EMPTY}: its first update comes by the schedule of {attachment!r}"
        if self._uncounted is not None and self._uncounted.is_loaded:
            return f"{_EMPTY}, since the state that was loaded has a count of 0: call update_parameters first"
        alone = f"{_EMPTY}: call update_parameters first or load a state"
        return alone if self._has_spread else f"{alone}; or if {_OR}"

    @property
    def _has_spread(self) -> bool:
        """Whether weights alone are not all that an average is."""
        return getattr(self, "deviations", None) is not None

    def _refuse_if_empty(self, action: str) -> None:
        """Raise RuntimeError before ``action`` loses a model for an average without one; warn if that was loaded."""
        if self._holds() != INITIAL or self._uncounted is None:
            return
        if self._uncounted.is_loaded:  # somebody has chosen its values
            self._warn_if_empty(action)
        else:
            raise RuntimeError(f"{action} must not replace a model by an average that {self._lack()}")

    def _warn_of_overwrite(self) -> None:
        """Warn before an update that copies, because it counts no model, over weights that were loaded."""
        if self._holds() == WEIGHTS:
            how = "load a state, which has their variance"
            if not self._has_spread:
                how = "construct it with num_averaged=n, or call averaged.n_averaged.fill_(n) before"
            warn_user(
                "the first update overwrites weights that were loaded into the average, which counts no model: to go "
                f"on from n models, {how}"
            )

    def _note_update(self) -> None:
        """Note that an update was launched. On a CPU the count will tell whether a NaN has stopped it."""
        if self._uncounted is not None and is_on_host(self.n_averaged):
            self._uncounted.is_updated = True
        else:
            self._uncounted = None

    def _note_load(self, count: object) -> None:
        """Note a load of a state that had ``count``; None: a state without it, of which the versions of params tell."""
        self._times_set += 1
        if isinstance(count, Tensor) and is_on_host(count) and count.numel() == 1 and int(count) == 0:
            # Its params are still to be loaded, so do not watch them.
            self._uncounted = Uncounted(self.n_averaged, is_loaded=True)
        elif count is not None:
            self._uncounted = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave a word for what the average holds, since the tensors of a copy have versions of their own."""
        held = self._holds()
        return {**super().__getstate__(), "_uncounted": None if held == MODELS else held}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = state.get("_uncounted")
        super().__setstate__({**state, "_uncounted": None})  # type: ignore[misc]
        if held is not None:
            watched = (self.n_averaged, self._params(), self._extra_planes())
            self._uncounted = Uncounted(*watched, has_weights=held == WEIGHTS)

    if TYPE_CHECKING:
        n_averaged: Tensor

        def _each_average(self) -> Iterator[tuple[str, Tensor, Format | None]]: ...
