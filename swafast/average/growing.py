"""`adapt_to`: an average takes over a model that has grown. Names that stay keep their averages, new ones begin."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from ..loop import swaps
from ..loop.guard import finished
from ..terms.converting import convert
from ..terms.formats import EXTRA_PLANES, Format
from ..terms.plane_names import DEVIATION, VARIANCE
from ..torch_private.modules import named_tensors, own_children
from .bindings import WithBindings
from .described import asked_of
from .homes import HoldsPlanes
from .matching import each_average
from .planes import fit_planes

#: Takes the name of a model's param now. Returns its name before, or None for a new param.
OldName = Callable[[str], str | None]


class Adaptable(HoldsPlanes):
    """Base class of one averaged model that can take over a model that has grown."""

    def adapt_to(self, model: Module, *, old_name: OldName | None = None) -> list[str]:
        """Take over a model that has changed: LoRA added, embeddings resized, a layer replaced.

        Names that stay keep their averages bit for bit. New names begin with the values that ``model`` has now. If a
        shape has changed in its sizes alone, the elements at indices that both shapes have keep their averages, such as
        the rows of embeddings. What is only copied is copied from ``model``. Count, rule, formats, answers of
        ``include`` and an attachment stay; ``include`` is asked about new names. If anything raises, nothing has
        changed.

        Args:
            model: the model from now on, the same object or another one.
            old_name: ``old_name(name)`` returns the name that a parameter or buffer had before, or None if it is new;
                default: the same name. Use it if names have changed, or if a layer was replaced under its old name.

        Returns:
            the names whose averages have begun with this call, in whole or in part.

        Raises:
            TypeError: ``model`` is not a module, or ``old_name`` returns neither a string nor None.
            ValueError: no name has stayed, or ``model`` cannot be averaged.
            RuntimeError: the averages are swapped into a model, or others are swapped into this one.
        """
        return adapt(self, [self], model, old_name)

    def _made_like(self, model: Module, include: Callable[[str, Tensor], bool] | None) -> Any:
        """Construct an average of ``model`` with the options of this one."""
        where = next((tensor.device for _, tensor in named_tensors(self.module)), None)
        rule, functions = self.rule, {"avg_fn": self.avg_fn, "multi_avg_fn": self.multi_avg_fn}
        given: dict[str, Any] = dict.fromkeys(functions) if rule is not None else functions
        given |= {"rule": rule, "include": include, "device": where if self._any_device else None}
        return made_like(self, Adaptable, model, given)

    if TYPE_CHECKING:
        module: Module
        rule: Any
        avg_fn: Any
        multi_avg_fn: Any
        n_averaged: Tensor
        include: Callable[[str, Tensor], bool] | None
        _asked: dict[str, bool]
        _any_device: bool


def made_like(averaged: Any, base: type, model: Module, given: Mapping[str, Any]) -> Any:
    """Construct an average of ``model`` with the arguments ``given``, and the others as attributes of ``averaged`` say.

    Args:
        base: the base class by which its class is known, since the constructor of a subclass may take other arguments.
    """
    kind: Any = next(kind for kind in type(averaged).__mro__ if base in kind.__bases__)
    _, *names = inspect.signature(kind).parameters
    own = {name: asked_of(averaged, name) for name in names if hasattr(kind, name) or name in vars(averaged)}
    return kind(model, **own | {**given})


def adapt(root: WithBindings, averages: Sequence[Any], model: Module, old_name: OldName | None) -> list[str]:
    """Have ``averages``, those in ``root``, take over ``model`` together, as :meth:`Adaptable.adapt_to` says."""
    with root._guard.hold("adapt_to"):
        if isinstance(model, Module) and swaps.in_force:
            swaps.refuse_model("adapt_to", model)
        adapted = [_adapted(averaged, model, old_name or (lambda name: name)) for averaged in averages]
        finished(partial(_take_over, root, averages, [each.made for each in adapted], model))
        return adapted[0].begun


@dataclass(frozen=True)
class Adapted:
    """A new average of the grown model, which has taken the averages of an old one."""

    made: Any
    begun: list[str]


@torch.inference_mode(False)
@torch.no_grad()
def _adapted(averaged: Any, model: Module, old_name: OldName) -> Adapted:
    averaged._holds()  # before the params that it watches are others
    before = list(averaged._each_average())
    kept = {
        other: (names[0], tensor, fmt)
        for (names, _, _), (_, tensor, fmt) in zip(each_average(averaged.module), before, strict=True)
        for other in names
    }

    def old_of(names: Iterable[str]) -> str | None:
        return next((old for name in names if (old := before_of(old_name, name)) in kept), None)

    def includes(name: str, param: Tensor) -> bool:
        old = old_of([name])
        if old is not None:
            return bool(averaged.__dict__.get("_asked", {}).get(kept[old][0], True))
        return averaged.include is None or bool(averaged.include(name, param))

    has_asked = averaged.include is not None or bool(averaged.__dict__.get("_asked"))
    made = averaged._made_like(model, includes if has_asked else None)
    stays = {names[0]: kept[old] for names, _, _ in each_average(made.module) if (old := old_of(names)) is not None}
    _cast_alike(made, {name: average for name, (_, average, fmt) in stays.items() if fmt is not None})
    begun: list[str] = []
    trained = any(tensor.requires_grad for _, tensor, _ in before)
    for name, tensor, fmt in made._each_average():
        if not trained:
            tensor.requires_grad_(False)
        if fmt is None:
            continue
        first, average, old_format = stays.get(name, (name, tensor, None))
        if old_format is not None:
            tensor.requires_grad_(average.requires_grad)
            ours, theirs = fit_planes(made, name, tensor, fmt), fit_planes(averaged, first, average, old_format)
            if keep(ours, fmt, theirs, old_format):
                continue
        begun.append(name)
    require_stayed(len(stays), kept, [name for name, _, _ in made._each_average()])
    if not averaged.training:
        made.eval()
    return Adapted(made, begun)


def _cast_alike(made: Any, before: Mapping[str, Tensor]) -> None:
    """Cast and pin new averages as the old ones of these names were, after their construction."""
    same = [(tensor, before[name]) for name, tensor, fmt in made._each_average() if fmt is not None and name in before]
    casts = {tensor.dtype: old.dtype for tensor, old in same if tensor.dtype != old.dtype}
    if casts:
        made._apply(lambda tensor: tensor.to(casts.get(tensor.dtype, tensor.dtype)))
    if any(old.is_pinned() for _, old in same):
        made._pin()


def before_of(old_name: OldName, name: str) -> str | None:
    """Return what the user's ``old_name`` returns. Raise TypeError if it is neither a string nor None."""
    old = old_name(name)
    if old is not None and not isinstance(old, str):
        raise TypeError(f"old_name must return a string or None, got {old!r} for {name!r}")
    return old


def require_stayed(stayed: int, before: Collection[str], now: Sequence[str]) -> None:
    """Raise ValueError if no name of an average has stayed."""
    if before and not stayed:
        raise ValueError(
            f"model must have names that the average has, got none ({now[:1]} for {[*before][:1]}): pass old_name=, "
            "which returns the name that a parameter had before, or None if it is new"
        )


def keep(ours: Sequence[Tensor], fmt: Format, theirs: Sequence[Tensor], old_format: Format) -> bool:
    """Copy an old average, at the indices that both shapes have, over a new one. Return whether that is all of it."""
    shape, old_shape = ours[0].shape, theirs[0].shape
    if len(shape) != len(old_shape):
        return False
    both = tuple(slice(0, min(sizes)) for sizes in zip(shape, old_shape, strict=True))
    parts, old_parts = [plane.detach()[both] for plane in ours], [plane.detach()[both] for plane in theirs]
    if fmt is old_format:
        for part, old_part in zip(parts, old_parts, strict=True):
            part.copy_(old_part)
    elif parts[0].numel():
        convert(old_parts, old_format, parts, fmt)
    return all(size <= old for size, old in zip(shape, old_shape, strict=True))


def _take_over(root: WithBindings, averages: Sequence[Any], made: Sequence[Any], model: Module) -> None:
    """Put new averages into the place of the old ones."""
    for averaged, new in zip(averages, made, strict=True):
        children, new_children = own_children(averaged), own_children(new)
        children["module"] = new.module
        for plane in (*EXTRA_PLANES, VARIANCE, DEVIATION):
            children.pop(plane, None)
            if plane in new_children:
                children[plane] = new_children[plane]
        for attribute in ("_asked", "_passing", "_frozen_names"):
            averaged.__dict__.pop(attribute, None)
            if attribute in new.__dict__:
                averaged.__dict__[attribute] = new.__dict__[attribute]
        averaged._disregard_drift()
        averaged._made_of = weakref.ref(model)
        averaged._bindings = new._bindings.after(averaged._bindings)
        averaged._note_own_writes()
    root._made_of = weakref.ref(model)
    if all(root is not averaged for averaged in averages):
        root._bindings.forget()
    if root._guard.attachment is not None:
        root._guard.attachment.retarget(model)
