"""Match tensors of a model to averages by name, and detect when a match is stale."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel

from ..backends.contract import Pair
from ..loop.attach import Attachable
from ..op import checks, choice
from ..op import torch_op as torch_op  # registers the op with the first average
from ..op.launches import draws_of
from ..op.plan import Plan
from ..op.report import log_plan
from ..terms import hints
from ..terms.formats import Format
from ..terms.lazy import MadeOnUse
from ..terms.names import named_buffers, named_params, require_same_names, unwrap
from ..torch_private.modules import Walk, named_tensors
from .accepting import check_model
from .planes import fit_planes, put_planes

#: Takes an average's name, its tensor and whether it is a buffer. Returns its format, or None if it is copied.
FormatOf = Callable[[str, Tensor, bool], Format | None]


def each_average(module: Module) -> Iterator[tuple[list[str], Tensor, bool]]:
    """Yield each distinct tensor of an averaged module: all its names, the tensor, and whether it is a buffer."""
    for is_buffer, find in ((False, named_params), (True, named_buffers)):
        tied: dict[int, tuple[list[str], Tensor]] = {}
        for name, tensor in find(unwrap(module), "averaged model").items():
            tied.setdefault(id(tensor), ([], tensor))[0].append(name)
        for names, tensor in tied.values():
            yield names, tensor, is_buffer


@dataclass(frozen=True)
class ModuleSide:
    """One of the averaged models that are updated together."""

    owner: AveragedModel  # its module holds planes 0; it holds the further planes and the counter itself
    format_of: FormatOf
    any_device: bool  # the averages may be on another device than the model
    backend: str | None
    seed: int


def _match(side: ModuleSide, model: Module, pace: int) -> list[Pair]:
    """Pair each distinct average with its param. Raise ValueError with the names that do not match."""
    module = side.owner.module
    theirs = {False: named_params(unwrap(model), "model"), True: named_buffers(unwrap(model), "model")}
    own = list(each_average(module))
    for is_buffer, kind in ((False, "parameters"), (True, "buffers")):
        names = [name for tied, _, buffer in own if buffer == is_buffer for name in tied]
        require_same_names(kind, names, theirs[is_buffer])
    matched = []
    for names, average, is_buffer in own:
        param = theirs[is_buffer][names[0]]
        for other in names[1:]:
            if theirs[is_buffer][other] is not param:
                raise ValueError(f"model must tie {names[0]!r} and {other!r} as the average does, got two tensors")
        fmt = side.format_of(names[0], average, is_buffer)
        matched.append(Pair(names[0], param, (average,), fmt, pace=pace, is_buffer=is_buffer))
    return matched


#: A plan, and the current params and planes, which it fits.
Bound = tuple[Plan, Sequence[Tensor], tuple[Tensor, ...]]


class ModuleBinding:
    """A plan, and the way to find its tensors again. It holds no param, so it keeps no model alive.

    Construction matches ``model`` with the averages of all sides, checks every pair, and plans the update. All checks
    come first. Then averages may move to other memory, but their values stay the same.

    Args:
        root: the module that contains all sides.
        homes: addresses of the planes that are in buckets already.

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
        matched = [(side, pair) for pace, side in enumerate(sides) for pair in _match(side, model, pace)]
        for side, pair in matched:
            checks.check_sides(pair, any_device=side.any_device)
        checks.check_overlap([pair for _, pair in matched])
        for device in {pair.average.device for _, pair in matched}:
            checks.refuse_capture(device, "the first update of a model, or of one whose tensors have moved,")
        taken: set[int] = set()
        pairs = [_with_planes(pair, side, taken) for side, pair in matched]
        counters = _place_counters(sides)
        backends = choice.choose_backends(sides[0].backend, choice.device_types(pairs))
        self.plan = Plan(pairs, backends, counters, homes)
        self.config, self._owner_walk, self._model_walk = config, Walk(root), Walk(unwrap(model))
        tied: dict[int, list[str]] = {}
        for name, tensor in (*named_params(unwrap(model), "model").items(), *named_buffers(unwrap(model), "").items()):
            tied.setdefault(id(tensor), []).append(name)
        self._names = [tied[id(pair.param)] for pair in pairs]
        self._num_planes = sum(len(pair.planes) for pair in pairs)
        self._planes = _picker([self._owner_walk.position(plane) for pair in pairs for plane in pair.planes])
        self._params = _picker([self._model_walk.position(pair.param) for pair in pairs])

    @property
    def root(self) -> Module | None:
        """The unwrapped model that was matched, or None if it is gone."""
        return self._model_walk.root

    def current(self, model: Module, config: object, counters: Sequence[Tensor]) -> Bound | None:
        """Return the plan with the current params and planes of both modules, or None if it no longer fits."""
        root = self._model_walk.root
        if config != self.config or (root is not model and root is not unwrap(model)):
            return None
        theirs, own = self._model_walk.tensors(), self._owner_walk.tensors()
        if theirs is None or own is None:
            return None
        params, planes = self._params(theirs), self._planes(own)
        return (self.plan, params, planes) if self.plan.fits(params, planes, counters) else None

    def now(self) -> Sequence[Tensor] | None:
        """Return the params and planes that both modules have now, or None if modules, names or ties have changed."""
        theirs, own = self._model_walk.tensors(), self._owner_walk.tensors()
        return None if theirs is None or own is None else [*self._params(theirs), *self._planes(own)]

    def places(self) -> Sequence[Sequence[Tensor]]:
        """Return, for each param and then for each plane, all tensors that have its names in the modules now."""
        root, own = self.root, self._owner_walk.tensors()
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


class Bindings:
    """The bindings of the last models used, and those that a CUDA graph holds, for as long as the averages live."""

    #: A training uses up to three in turn: the model, its stand-in for overlapped updates, and a copy to evaluate.
    _MOST = 3

    def __init__(self) -> None:
        self._recent: list[AnyBinding] = []  # most recently used first
        self._captured: list[AnyBinding] = []
        self._warned: set[int] = set()  # ids of the captured ones with a warning
        #: Addresses of planes that a plan of several averages has put into buckets.
        self.shared_homes: frozenset[int] = frozenset()
        #: Addresses of planes that are larger than a bucket. The averaged model has made them, so they stay.
        self.large_homes: frozenset[int] = frozenset()

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

    @property
    def homes(self) -> frozenset[int]:
        """Addresses of the planes that are in buckets, or are as large."""
        return self.shared_homes | self.large_homes | (self.latest.plan.homes if self._recent else frozenset())

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
            side_bindings: each side's own bindings. Their next plans leave planes in the buckets of this one.

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
        binding = ModuleBinding(root, averaged, model, config=config, homes=homes)
        self.use(binding)
        for each in side_bindings:
            each.shared_homes = binding.plan.homes
        current = self.current(model, config, [side.owner.n_averaged for side in averaged])
        assert current is not None, "a plan just made must fit"
        return current

    def use(self, binding: AnyBinding) -> None:
        """Put ``binding`` first. Drop those that no longer fit, and beyond ``_MOST`` the least recently used one."""
        if not self._recent:
            log_plan(binding.plan)
        kept: list[AnyBinding] = [binding]
        dropped: list[AnyBinding] = []
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
    _meant = hints.OF_MODULES

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process, and ``include``, which may be a lambda; its answers are kept."""
        with self._guard.hold("a copy"):
            own = {"_guard", "_bindings", "_made_of", "include"}
            state: Any = super().__getstate__()  # type: ignore[misc]  # that of a module, without its compiled call
            return {key: value for key, value in state.items() if key not in own}


def _with_planes(pair: Pair, side: ModuleSide, taken: set[int]) -> Pair:
    """Add the further planes to a pair. ``taken`` are the ids of planes of the pairs before it."""
    planes = fit_planes(side.owner, pair.name, pair.average, pair.format)
    if not taken.isdisjoint(map(id, planes)):  # a load by assignment gave two averages one tensor
        planes = (pair.average, *(plane.clone() for plane in planes[1:]))
        put_planes(side.owner, pair.name, pair.format, planes[1:])
    taken.update(map(id, planes))
    return replace(pair, planes=planes, draws=draws_of(side.seed, pair.name, pair.param, pair.format))


def _place_counters(sides: Sequence[ModuleSide]) -> list[Tensor]:
    """Return the counters, each a tensor of its own on the device of its averages, as kernels need them."""
    taken: set[int] = set()
    for side in sides:
        owner = side.owner
        where = next((p.device for _, p in named_tensors(owner.module)), owner.n_averaged.device)
        if owner.n_averaged.device not in (where, torch.device("meta")):
            owner.n_averaged = owner.n_averaged.to(where)
        if owner.n_averaged.data_ptr() in taken:  # after load_state_dict(assign=True)
            owner.n_averaged = owner.n_averaged.clone()
        taken.add(owner.n_averaged.data_ptr())
    counters = [side.owner.n_averaged for side in sides]
    if len({counter.device for counter in counters}) > 1:
        raise ValueError(
            f"averages that are updated together must be on one device, got {[str(c.device) for c in counters]}"
        )
    return counters


def _picker(positions: Collection[int]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """Return a function that picks these positions from a list: a fast ``itemgetter``, but always for a tuple."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda values: tuple(values[i] for i in positions)
