"""Plans for the models that an average was used with last, and how their tensors are found again."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Sequence, Set
from operator import is_, itemgetter
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Module

from ..backends.contract import Pair
from ..loop.attach import Attachable
from ..op import checks, choice
from ..op import torch_op as torch_op  # registers the op with the first average
from ..op.copies import Copies, is_for_torch
from ..op.plan import Plan
from ..op.report import log_plan
from ..op.tree_check import Checks, TreeCheck
from ..terms import habits, hints
from ..terms.capturing import refuse_capture
from ..terms.lazy import MadeOnUse
from ..terms.names import named_buffers, named_params, unwrap
from ..torch_private.modules import Walk
from . import lending
from .accepting import check_model
from .contents import HoldsModels
from .following import made_anew, put_buffers
from .matching import ModuleSide, match, place_counters, with_planes

#: The groups of a check of both modules. After them comes what is lent.
_PARAMS, _PLANES, _COUNTERS, _FROZEN = range(4)
#: A plan, and the current params and planes, which it fits.
Bound = tuple[Plan, Sequence[Tensor], Sequence[Tensor]]


class ModuleBinding:
    """A plan, and the way to find its tensors again. It holds no param, so it keeps no model alive.

    Construction matches ``model`` with the averages of all sides, checks every pair, and plans the update. All checks
    come first. Then averages may move to other memory, but their values stay the same.

    Args:
        root: the module that contains all sides.
        homes: addresses of the planes that are at home.

    Raises:
        ValueError: names, shapes, dtypes, devices or memory layouts do not fit. The message names the parameter.
        RuntimeError: a CUDA graph is being captured.
    """

    def __init__(
        self,
        root: Module,
        sides: Sequence[ModuleSide],
        model: Module,
        *,
        config: object,
        homes: frozenset[int],
    ) -> None:
        check_model(model)
        for side in sides:
            if any(unwrap(model) is each for each in (root, side.owner, unwrap(side.owner.module))):
                raise ValueError("model must be the one that is trained, got the averaged model itself")
        anew = [
            made_anew(
                side.owner.module, model, side.format_of, side.owner.n_averaged.device if side.any_device else None
            )
            for side in sides
        ]
        matched: list[tuple[ModuleSide, Pair]] = []
        lent: list[Pair] = []
        for pace, (side, buffers) in enumerate(zip(sides, anew, strict=True)):
            updated, of_side = match(side, model, pace, buffers)
            matched += [(side, pair) for pair in updated]
            lent += of_side
        for side, pair in matched:
            checks.check_sides(pair, any_device=side.any_device)
        checks.check_overlap([pair for _, pair in matched])
        for device in {tensor.device for _, pair in matched for tensor in (pair.param, pair.average)}:
            refuse_capture(device, "the first update of a model, or of one whose tensors have moved,")
        for side, buffers in zip(sides, anew, strict=True):
            put_buffers(side.owner.module, model, buffers)
        for side, pair in matched:
            lending.part(pair.average)  # an update will write it
            if pair.param.requires_grad and isinstance(side.owner, WithBindings):
                side.owner._frozen_names -= {pair.name}
        taken: set[int] = set()
        pairs = [with_planes(pair, side, taken) for side, pair in matched if not is_for_torch(pair)]
        counters = place_counters(sides)
        backends = choice.choose_backends(sides[0].backend, choice.device_types(pairs))
        self.plan = Plan(pairs, backends, counters, homes)
        self.config, self._root = config, weakref.ref(unwrap(model))
        self._owner_walk, self._model_walk = Walk(root), Walk(unwrap(model))
        tied: dict[int, list[str]] = {}
        for name, tensor in (*named_params(unwrap(model), "model").items(), *named_buffers(unwrap(model), "").items()):
            tied.setdefault(id(tensor), []).append(name)
        self._names = [tied.get(id(pair.param), [pair.name]) for pair in pairs]
        self._num_planes = sum(len(pair.planes) for pair in pairs)
        self._planes = _picker([self._owner_walk.position(plane) for pair in pairs for plane in pair.planes])
        self._params = _picker([self._model_walk.position(pair.param) for pair in pairs])
        if copied := [pair for _, pair in matched if is_for_torch(pair)]:
            self.plan.copies = _copies(copied, self._model_walk, self._owner_walk)
        left_out = [each.param for each in (*(pair for _, pair in matched), *lent) if _is_left_out(each)]
        frozen = [param for param in left_out if not param.requires_grad]
        self._loan = self._lend(lent, frozen) if frozen else None
        self._checks = Checks()
        self._num_repeats = _repeats([pair.param for pair in pairs], len(sides))

    def lent(self) -> Sequence[tuple[str, Tensor]]:
        """Return the names and tensors of the params that the model lends."""
        theirs = self._model_walk.tensors()
        return self._loan.lent(theirs) if self._loan is not None and theirs is not None else []

    def _lend(self, lent: Sequence[Pair], frozen: Sequence[Tensor]) -> lending.Loan:
        params, averages = [pair.param for pair in lent], [pair.average for pair in lent]
        find_params, find_frozen = (_picker(list(map(self._model_walk.position, each))) for each in (params, frozen))
        find_averages = _picker(list(map(self._owner_walk.position, averages)))
        return lending.Loan([pair.name for pair in lent], params, averages, find_params, find_averages, find_frozen)

    @property
    def root(self) -> Module | None:
        """The unwrapped model that was matched, or None if it is gone."""
        return self._root()

    def current(self, model: Module, config: object, counters: Sequence[Tensor]) -> Bound | None:
        """Return the plan with the current params and planes of both modules, or None if it no longer fits."""
        root = self._root()
        if self.plan.is_retired or config != self.config or (root is not model and root is not unwrap(model)):
            return None
        found = self._checks.find(_PLANES + 1 if self._loan is None else _FROZEN + 1)
        if found is not None and (self._loan is None or lending.are_frozen(found[_FROZEN])) and self._copies_fit():
            return self.plan, found[_PARAMS] * self._num_repeats, found[_PLANES]
        theirs, own = self._model_walk.tensors(), self._owner_walk.tensors()
        if theirs is None or own is None or (self._loan is not None and not self._loan.stands(theirs, own)):
            return None
        params, planes = self._params(theirs), self._planes(own)
        if not self._copies_fit() or not self.plan.fits(params, planes, counters):
            return None
        frozen, lent = self._loan.tensors(theirs, own) if self._loan is not None else ((), ())
        groups = (params[: len(params) // self._num_repeats], planes, counters, frozen, lent)
        self._checks.make(lambda: self._checked(groups))
        return self.plan, params, planes

    def _checked(self, groups: Any) -> TreeCheck:
        check = TreeCheck((self._owner_walk.root, self._root()), groups)
        if self.plan.fits(groups[_PARAMS] * self._num_repeats, groups[_PLANES], groups[_COUNTERS]):
            return check
        raise ValueError("a tensor has moved while the check was made")  # by another thread

    def _copies_fit(self) -> bool:
        return self.plan.copies is None or self.plan.copies.fit()

    def now(self) -> Sequence[Tensor] | None:
        """Return the params and planes that both modules have now, or None if modules, names or ties have changed."""
        theirs, own = self._model_walk.tensors(), self._owner_walk.tensors()
        return None if theirs is None or own is None else [*self._params(theirs), *self._planes(own)]

    def places(self) -> Sequence[Sequence[Tensor]]:
        """Return, for each param and then for each plane, all tensors that have its names in the modules now."""
        root, own = self._root(), self._owner_walk.tensors()
        found = named_params(root, "model") | named_buffers(root, "model") if root is not None else {}
        params = [[found[name] for name in names if name in found] for names in self._names]
        return [*params, *([[plane] for plane in self._planes(own)] if own is not None else [[]] * self._num_planes)]


class AnyBinding(Protocol):
    """What :class:`Bindings` needs of a binding: a plan, and the way to find its tensors again."""

    @property
    def plan(self) -> Plan: ...
    @property
    def root(self) -> Module | None: ...
    @property
    def config(self) -> object: ...
    def current(self, model: Module, config: object, counters: Sequence[Tensor]) -> Bound | None: ...
    def now(self) -> Sequence[Tensor] | None: ...
    def places(self) -> Sequence[Sequence[Tensor]]: ...
    def lent(self) -> Sequence[tuple[str, Tensor]]: ...


class Bindings:
    """The bindings of the last models used, and those that a CUDA graph holds, for as long as the averages live."""

    #: A training uses up to three in turn: the model, its stand-in for overlapped updates, and a copy to evaluate.
    _MOST = 3

    def __init__(self) -> None:
        self._recent: list[AnyBinding] = []  # most recently used first
        self._captured: list[AnyBinding] = []
        self._warned: set[int] = set()  # ids of the captured ones with a warning
        self._said = ""  # the last line in the log
        #: Addresses of the planes that are at home: in buckets, or where the averaged model itself has put them.
        self.homes: frozenset[int] = frozenset()

    def current(self, model: Module, config: object, counters: Sequence[Tensor]) -> Bound | None:
        """Return a plan that fits ``model``, with its params and planes, or None."""
        for binding in self._recent:
            bound = binding.current(model, config, counters)
            if bound is not None:
                if binding is not self._recent[0]:
                    self._recent = [binding, *(other for other in self._recent if other is not binding)]
                return bound
        return None

    @property
    def latest(self) -> AnyBinding:
        """The binding that was used last. There must be one."""
        return self._recent[0]

    @property
    def backends(self) -> list[str]:
        """The names of the backends of the plan that was used last; none before the first."""
        return self.latest.plan.backends if self._recent else []

    def bind(
        self,
        root: Module,
        sides: Callable[[], Sequence[ModuleSide]],
        model: Module,
        config: object,
        counters: Sequence[Tensor],
        *,
        side_bindings: Sequence[Bindings] = (),
    ) -> Bound:
        """Return a plan for ``model`` with the tensors of both sides: one made before if it fits, else a new one.

        Args:
            root: the module that contains all sides.
            sides: returns the averaged models that are updated together; called for a new plan only.
            config: what a plan depends on besides the tensors.
            counters: the counters of the sides.
            side_bindings: each side's own bindings, which know the homes of its planes.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError, RuntimeError: as :class:`ModuleBinding`.
        """
        if not isinstance(model, Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}{hints.of_value('model', model)}"
            )
        current = self.current(model, config, counters)
        if current is not None:
            return current
        for counter in counters:
            checks.check_counter(counter)
        averaged = sides()
        homes = self.homes.union(*(each.homes for each in side_bindings))
        owners = [side.owner for side in averaged if isinstance(side.owner, HoldsModels)]
        for owner in owners:
            owner._holds()
        binding = ModuleBinding(root, averaged, model, config=config, homes=homes)
        for owner in owners:
            owner._note_own_writes()  # a new plan moves averages, which is no load
        self.use(binding)
        for each in (self, *side_bindings):
            each.homes = binding.plan.homes
        current = self.current(model, config, [side.owner.n_averaged for side in averaged])
        if current is None:
            raise RuntimeError("model and averages must stay as they are in a call, but a thread has replaced a tensor")
        return current

    def forget(self) -> None:
        """Drop all bindings but those that a CUDA graph holds, since the averages are others."""
        self._captured += [binding for binding in self._recent if binding.plan.captured]
        self._recent, self.homes = [], frozenset()

    def plan_anew(self) -> None:
        """Drop them as :meth:`forget` does, but leave the planes where they are."""
        homes = self.homes
        self.forget()
        self.homes = homes

    def after(self, before: Bindings) -> Bindings:
        """Return these, of averages that replace others, with what a CUDA graph holds of those."""
        if before is not self:
            before.forget()
            self._captured += before._captured
            self._warned |= before._warned
        return self

    def use(self, binding: AnyBinding) -> None:
        """Put ``binding`` first. Drop those that no longer fit, and beyond ``_MOST`` the least recently used one."""
        if not self._recent:
            self._said = log_plan(binding.plan, self._said)
        kept, dropped = [binding], list[AnyBinding]()
        for other in self._recent:
            # A plan that writes to other addresses is from before the averages moved, and may keep their old memory.
            replaced = other.root is binding.root and other.config == binding.config
            fits = other.root is not None and not replaced and other.plan.writes == binding.plan.writes
            (kept if fits and len(kept) < self._MOST else dropped).append(other)
        self._recent = kept
        self._captured += [other for other in dropped if other.plan.captured]
        captured = [*self._captured, *(other for other in kept if other.plan.captured)]
        stale = {id(other) for other in captured if not other.plan.writes <= binding.plan.writes}
        if stale - self._warned:
            self._warned |= stale
            warnings.warn(
                "the averages or n_averaged have moved since a CUDA graph captured their update, and the graph still "
                "updates their old memory: capture it again",
                RuntimeWarning,
                stacklevel=4,
            )


class WithBindings(Attachable):
    """Base class of the averaged models that are modules. Copies leave out what belongs to this process."""

    _bindings = MadeOnUse[Bindings](lambda self: Bindings())
    _meant = habits.OF_MODULES
    _frozen_names: Set[str] = frozenset()  # of params that are left out of the average, those that the model freezes

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process, and ``include``, which may be a lambda; its answers are kept."""
        with self._guard.hold("a copy"):
            own = {"_guard", "_bindings", "_made_of", "include"}
            state: Any = super().__getstate__()  # type: ignore[misc]  # that of a module, without its compiled call
            return {key: value for key, value in state.items() if key not in own}


def _copies(pairs: Sequence[Pair], model_walk: Walk, owner_walk: Walk) -> Copies:
    """Return what torch copies besides the planned pairs."""
    params = _picker([model_walk.position(pair.param) for pair in pairs])
    copied = _picker([owner_walk.position(pair.average) for pair in pairs])

    def find() -> list[tuple[Tensor, Tensor]] | None:
        theirs, own = model_walk.tensors(), owner_walk.tensors()
        return None if theirs is None or own is None else [*zip(params(theirs), copied(own), strict=True)]

    return Copies([pair.name for pair in pairs], find)


def _repeats(params: list[Tensor], most: int) -> int:
    """Return how often the same params follow one another: as often as there are sides, if these average them all."""
    first = params[: len(params) // most]
    return most if len(params) == most * len(first) and all(map(is_, params, first * most)) else 1


def _is_left_out(pair: Pair) -> bool:
    return pair.format is None and not pair.is_buffer


def _picker(positions: Collection[int]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """Return a function that picks these positions from a list: a fast ``itemgetter``, but always for a tuple."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda values: tuple(values[i] for i in positions)
