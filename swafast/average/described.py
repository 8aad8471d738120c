"""What an averaged model says of itself: the format and backend that were chosen, its size, and its line in a print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from ..loop.attach import default_name
from ..op.choice import choose_backends
from ..op.report import spell_bytes
from ..terms.copying import bytes_of
from ..terms.formats import Format
from ..terms.rules import Rule
from ..terms.spelled import spell_rule
from ..terms.spread import Spread
from .lending import is_lent
from .planes import find_planes


class Chosen:
    """An attribute that says what was chosen, whatever the user asked for.

    The instance's dict holds what was asked for, also in pickles. Code of ours reads it there, or by :func:`asked_of`.
    """

    def __init__(self, choose: Callable[[Any], str]) -> None:
        self._choose = choose

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Chosen: ...
    @overload
    def __get__(self, instance: object, owner: type) -> str: ...
    def __get__(self, instance: object | None, owner: type) -> Chosen | str:
        if instance is None:
            return self
        return self._choose(instance)

    def __set__(self, instance: object, asked: str | None) -> None:
        instance.__dict__[self._name] = asked


def asked_of(averaged: object, name: str) -> Any:
    """Return an attribute as the user has asked for it: None if the choice was left to us."""
    chosen = isinstance(getattr(type(averaged), name, None), Chosen)
    return vars(averaged).get(name) if chosen else getattr(averaged, name)


class Described:
    """Base class of one averaged model, which describes itself in one line.

    Attributes:
        format: the format of its averages; of a model with several dtypes, all of them, with commas.
        backend: the backends of the last plan, with commas; before the first update, the one that is preferred.
    """

    format = Chosen(lambda self: self._formats())
    backend = Chosen(lambda self: self._backends())

    def _stored(self) -> Iterator[tuple[Format | None, Sequence[Tensor]]]:
        """Yield the format and the planes of each average, and of each copied tensor None and the tensor.

        Params that the model lends are left out.
        """
        for name, average, fmt in self._each_average():
            if fmt is None and is_lent(average):
                continue
            yield fmt, (average, *(plane for plane in find_planes(self, name, average, fmt) if plane is not None))  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """The bytes of all averages and buffers, on a rank of its own part."""
        return sum(bytes_of(plane) for _, planes in self._stored() for plane in planes)

    def _formats(self) -> str:
        return ", ".join(dict.fromkeys(fmt.name for fmt, _ in self._stored() if fmt is not None)) or "none"

    def _backends(self) -> str:
        names = self._bindings.backends
        if not names:
            device_types = {plane.device.type for _, planes in self._stored() for plane in planes}
            names = [choose_backends(self.__dict__.get("backend"), device_types)[0].name]
        return ", ".join(dict.fromkeys(names))

    def __repr__(self) -> str:
        """Return one line, without waiting for a GPU: it leaves the number of updates there unread."""
        count = self.n_averaged
        updates = f"updates={int(count)}" if count.device.type == "cpu" else f"updates counted on {count.device}"
        rule = spell_rule(self.rule, always=1) if self.rule is not None else default_name(self)
        kept = () if (spread := self._spell_spread()) is None else (f"deviations={spread}",)
        parts = (f"rule={rule}", f"format={self.format!r}", *kept, f"backend={self.backend!r}", updates)
        return f"{type(self).__name__}({', '.join((*self._head(), *parts, self._spell_size()))})"

    def _spell_size(self) -> str:
        """Return how many tensors are averaged, of how many elements and on which devices, and all bytes."""
        averages = [planes[0] for fmt, planes in self._stored() if fmt is not None]
        numel = sum(average.numel() for average in averages)
        devices = ", ".join(dict.fromkeys(str(average.device) for average in averages))
        held = f"{len(averages)} tensor{'s' * (len(averages) != 1)} of {numel:,} elements{devices and ' on '}{devices}"
        return f"{held}, {spell_bytes(self.nbytes)}"

    def _spell_spread(self) -> str | None:
        """Return how many deviations are kept, and their dtype unless it is that of the averages."""
        spread: Spread | None = getattr(self, "deviations", None)
        if spread is None:
            return None
        averages = {planes[0].dtype for fmt, planes in self._stored() if fmt is not None and fmt.spread is not None}
        is_told = spread.count and spread.dtype is not None and averages != {spread.dtype}
        return f"{spread.count} ({str(spread.dtype).removeprefix('torch.')})" if is_told else str(spread.count)

    def _head(self) -> Iterable[str]:
        """Return what else stands in the line, first."""
        return ()

    if TYPE_CHECKING:
        rule: Rule | None
        n_averaged: Tensor
        _bindings: Any

        def _each_average(self) -> Iterator[tuple[str, Tensor, Format | None]]: ...


def describe_all(averages: Any) -> str:
    """Return the lines of several averages, each after its name."""
    lines = "".join(f"\n  {name!r}: {averages[name]!r}" for name in averages)
    return f"{type(averages).__name__}({lines}\n)"
