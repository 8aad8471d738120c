"""What an average holds, known on the host: the values of its construction, loaded weights, or counted models.

The count is in the memory of the model's device. Reading it there would wait for a GPU, so this goes by the versions
that torch gives to tensors. Each write raises them, also that of a CUDA graph's capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..terms.warn import warn_user
from ..torch_private.core import versions
from .described import Described

if TYPE_CHECKING:
    from ..loop.guard import Guard

#: What an average holds. These words are in pickles.
INITIAL, WEIGHTS, MODELS = "initial values", "weights", "models"

_EMPTY = "holds no model yet, only the values of its construction"
_OR = "these values are an average of n models, construct it with num_averaged=n"


class Uncounted:
    """Watches an average without a counted model, to see what is written into it.

    Args:
        counter: the average's ``n_averaged``.
        params: the tensors into which other code may load weights without counting them.
        has_weights: whether it has.
        is_loaded: whether a state without a model was loaded.
    """

    def __init__(
        self, counter: Tensor, params: Sequence[Tensor] = (), *, has_weights: bool = False, is_loaded: bool = False
    ) -> None:
        self.has_weights, self.is_loaded = has_weights, is_loaded
        self.is_updated = False  # whether an update was launched
        self.note(counter, params)

    def note(self, counter: Tensor, params: Sequence[Tensor]) -> None:
        """Disregard what has been written so far."""
        self._counter, self._params = _stamps([counter]), _stamps(params)

    def holds(self, counter: Tensor, params: Sequence[Tensor]) -> str:
        """Return what the average holds now. If the counter has been written, this decides, since it tells of params.

        On a CPU it is read. On a GPU what has been written is taken for a count.
        """
        if self.is_updated or _stamps([counter]) != self._counter:
            self.is_loaded = self.is_loaded or not self.is_updated
            return MODELS if not is_on_host(counter) or int(counter) > 0 else INITIAL
        self.has_weights = self.has_weights or (bool(self._params) and _stamps(params) != self._params)
        return WEIGHTS if self.has_weights else INITIAL


def is_on_host(tensor: Tensor) -> bool:
    """Return whether a tensor can be read without waiting."""
    return tensor.device.type == "cpu"


def _stamps(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return list(zip(map(id, tensors), versions(tensors), strict=True))


class HoldsModels(Described):
    """Base class of one averaged model, which says so where it is used before it holds a model."""

    _uncounted: Uncounted | None = None  # None: models are counted, or it is an old pickle, which does not tell

    if TYPE_CHECKING:
        _guard: Guard

    def _params(self) -> Sequence[Tensor]:
        """Return the tensors into which other code may load weights."""
        return ()

    def _count_from(self, num_averaged: int, *, is_loaded: bool = False) -> None:
        """Begin with values that are an average of this many models: of none if they are those of a construction."""
        self.n_averaged.fill_(num_averaged)
        self._uncounted = None if num_averaged else Uncounted(self.n_averaged, self._params(), is_loaded=is_loaded)

    def _holds(self) -> str:
        if self._uncounted is None:
            return MODELS
        found = self._uncounted.holds(self.n_averaged, self._params())
        if found == MODELS:
            self._uncounted = None
        return found

    def _note_own_writes(self) -> None:
        """Disregard what we have written since the last :meth:`_holds`."""
        if self._uncounted is not None:
            self._uncounted.note(self.n_averaged, self._params())

    def _warn_if_empty(self, action: str) -> None:
        if self._holds() == INITIAL:
            warn_user(f"{action} uses an average that {self._lack()}")

    def _lack(self) -> str:
        """Return what the average lacks, and what to do."""
        attachment = self._guard.attachment
        if attachment is not None:
            return f"{_EMPTY}: its first update comes by the schedule of {attachment!r}"
        if self._uncounted is not None and self._uncounted.is_loaded:
            return f"{_EMPTY}, since the state that was loaded has a count of 0: call update_parameters first"
        return f"{_EMPTY}: call update_parameters first or load a state; or if {_OR}"

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
            warn_user(
                "the first update overwrites weights that were loaded into the average, which counts no model: to go "
                "on from n models, construct it with num_averaged=n, or call averaged.n_averaged.fill_(n) before"
            )

    def _note_update(self) -> None:
        """Note that an update was launched. On a CPU the count will tell whether a NaN has stopped it."""
        if self._uncounted is not None and is_on_host(self.n_averaged):
            self._uncounted.is_updated = True
        else:
            self._uncounted = None

    def _note_load(self, count: object) -> None:
        """Note a load of a state that had ``count``; None: a state without it, of which the versions of params tell."""
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
            self._uncounted = Uncounted(self.n_averaged, self._params(), has_weights=held == WEIGHTS)

    if TYPE_CHECKING:
        n_averaged: Tensor
