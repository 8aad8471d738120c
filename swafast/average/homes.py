"""Where the planes of an averaged model lie. They stay where they come into being, so that states of them stay live."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.nn import Module

from ..op.buckets import pin, stay
from ..terms.formats import Format, format_of
from ..torch_private.modules import named_tensors
from .bindings import WithBindings
from .contents import HoldsModels
from .lending import part
from .matching import each_average
from .planes import Recast, find_planes, fit_planes, works_in_place

T = TypeVar("T", bound="HoldsPlanes")


class HoldsPlanes(HoldsModels, WithBindings, Module):
    """Base class of one averaged model that is a module: moves, casts and copies of its planes."""

    if TYPE_CHECKING:
        module: Module
        _any_device: bool

        def _each_average(self) -> Iterator[tuple[str, Tensor, Format | None]]: ...

    def _frozen(self) -> set[int]:
        """Return the ids of params that ``include`` leaves out and that the model does not train."""
        if not self._frozen_names:
            return set()
        return {id(param) for (name, *_), param, _ in each_average(self.module) if name in self._frozen_names}

    def _planes(self) -> Iterator[tuple[str, Format, tuple[Tensor, ...]]]:
        """Yield name, format and planes of each average, without planes that are to be made."""
        for name, average, fmt in self._each_average():
            if fmt is not None:
                further = find_planes(self, name, average, fmt)
                yield name, fmt, (average, *(plane for plane in further if plane is not None))

    def _stay_home(self, own: Collection[int] | None = None) -> None:
        """Have no plan move the planes from where they lie, if their memory was made for them: all, or at ``own``."""
        planes = [plane for _, _, planes in self._planes() for plane in planes if not plane.is_meta]
        at_home = [plane for plane in planes if own is None or plane.data_ptr() in own]
        self._bindings.homes = stay(at_home, self._bindings.homes)

    def _addresses(self) -> dict[tuple[str, int], int]:
        """Return the address of each plane, by the average's name and the plane's index; 0 for one on meta."""
        return {
            (name, index): 0 if plane.is_meta else plane.data_ptr()
            for name, _, planes in self._planes()
            for index, plane in enumerate(planes)
        }

    def _apply(self: T, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> T:
        """Move or cast as any module does. A cast keeps full precision, and ``to_empty`` leaves a count of 0."""
        with self._guard.hold("a move or cast"):
            self._holds()
            for _, param in named_tensors(self.module) if works_in_place(fn) else ():
                part(param)
            before = self._addresses()
            recast = Recast(self, self._each_average(), fn, lambda dtype: format_of(self.__dict__.get("format"), dtype))
            try:
                try:
                    super()._apply(recast, recurse)
                finally:
                    self._finish_move(recast, before)
            finally:
                self._finish_move(recast, before)  # whatever an interrupt has left
            return self

    def _finish_move(self, recast: Recast, before: Mapping[tuple[str, int], int]) -> None:
        """Complete a move or cast, as far as torch has come. Do nothing once that is done.

        Args:
            before: the addresses of the planes before it.
        """
        if recast.is_finished:
            return
        recast.finish()
        if not recast.keeps_values:
            self._count_from(0)
        self._any_device |= recast.moved
        for average in self._each_average():
            fit_planes(self, *average)
        # What has moved lies in memory that was made for it. What has not may lie in somebody else's.
        moved = {address for key, address in self._addresses().items() if address != before.get(key)}
        self._stay_home(moved | self._bindings.homes)
        self._note_own_writes()
        recast.is_finished = True

    def _pin(self) -> None:
        """Move the planes into pinned memory of the host."""
        with self._guard.hold("a move or cast"):
            self._holds()
            planes = [plane for _, _, planes in self._planes() for plane in planes if not plane.is_meta]
            self._any_device |= any(plane.device.type != "cpu" for plane in planes)
            pin(planes)
            self._stay_home()
            self._note_own_writes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stay_home()
