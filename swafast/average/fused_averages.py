"""`FusedAverages`: several averages of one model, updated in one pass over its parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Module

from ..backends.library import MAX_PACES
from ..loop import swaps
from ..loop.guard import Guard
from ..terms import hints
from ..terms.pickling import pickled_from
from ..terms.rules import Rule
from ..terms.spread import Spread
from ..torch_private.core import disable_dynamo
from ..torch_private.modules import own_buffers, own_children
from .averaged_model import FusedAveragedModel
from .bindings import Bound, WithBindings
from .described import describe_all
from .functions import DECAYS, refuse_decay
from .growing import OldName, adapt
from .loading import load_whole
from .states import leave_out


def named_rules(given: object) -> dict[str, Rule]:
    """Return the rules of several averages by name.

    Args:
        given: a mapping, or a sequence of (name, rule).

    Raises:
        TypeError: it is neither; or a name is not a string, or a rule is not a Rule.
        ValueError: there are no rules, or more than a launch takes; a name occurs twice; or a name cannot be part of a
            state's keys.
    """
    items = list(given.items()) if isinstance(given, Mapping) else given
    kinds = (list, tuple)
    if not isinstance(items, kinds) or any(not isinstance(item, kinds) or len(item) != 2 for item in items):
        raise TypeError(
            f"rules must be a mapping from names to rules, or (name, rule) pairs, got {given!r}"
            f"{hints.of_value('rules', given)}"
        )
    rules: dict[str, Rule] = {}
    for name, each in items:
        if not isinstance(name, str):
            raise TypeError(f"rules must have strings for names, got {name!r}")
        if not name or "." in name:
            raise ValueError(f"rules must have names without '.', which separates the keys of a state, got {name!r}")
        if name == "training":
            raise ValueError("rules must have names other than 'training', which every module has for its mode")
        if name in rules:
            raise ValueError(f"rules must have each name once, got {name!r} twice")
        if not isinstance(each, Rule):
            raise TypeError(
                f"rules[{name!r}] must be a Rule such as ExponentialAverage(0.999), got {each!r}"
                f"{hints.of_value('each rule', each)}"
            )
        rules[name] = each
    if not 1 <= len(rules) <= MAX_PACES:
        raise ValueError(f"rules must name 1 to {MAX_PACES} averages, got {len(rules)}")
    return rules


def by_name(argument: str, names: Sequence[str], given: Any) -> dict[str, Any]:
    """Return an argument of each average by name. It is one for all, or a mapping that may leave some out.

    Raises:
        ValueError: the mapping has a name that no average has.
    """
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)  # checked where each average is made
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"{argument} must name averages among {', '.join(map(repr, names))}, got {unknown[0]!r}")
    return {name: given.get(name) for name in names}


def refuse_own(averages: Iterable[str], kind: type, name: str) -> None:
    """Raise AttributeError if ``name`` is an attribute of each average, of class ``kind``, and not of all together."""
    name = "rule" if name == "rules" else name
    if hasattr(kind, name) and not hasattr(type(averages), name) and not name.startswith("_"):
        first = next(iter(averages))
        raise AttributeError(f"each of several averages has its own {name}: use averages[{first!r}].{name}")


@pickled_from("swafast")
class FusedAverages(WithBindings, Module):
    """Several averages of one model, updated together: ``FusedAverages(model, rules={"fast": ..., "slow": ...})``.

    Each one is a :class:`~swafast.FusedAveragedModel`, ``averages["fast"]``: evaluate it, swap it into the model,
    export it. An update moves all averages in one launch, which reads the parameters from memory once. Each key
    of the state begins with an average's name: ``fast.module.weight``.

    Args:
        model: the model to average.
        rules: up to 16 rules by name, as a mapping or as (name, rule) pairs. A name must not contain a dot.
        format: one format for all averages, or a mapping from their names; default: by each parameter's dtype.
        deviations: as for :class:`~swafast.FusedAveragedModel`, for all averages, or a mapping from their names.
        device, use_buffers, backend, include, nonfinite, seed, num_averaged: as for
            :class:`~swafast.FusedAveragedModel`, the same for all averages.

    Raises:
        TypeError, ValueError: names, rules or formats are not as above; and all that each average's class raises.

    Example::

        averages = FusedAverages(model, rules={"fast": ExponentialAverage(0.99), "slow": ExponentialAverage(0.9999)})
        averages.update_parameters(model)
        with averages["slow"].swapped_into(model):
            evaluate(model)
    """

    @hints.hinted
    def __init__(
        self,
        model: Module,
        device: int | str | torch.device | None = None,
        use_buffers: bool = False,
        *,
        rules: Mapping[str, Rule] | Sequence[tuple[str, Rule]],
        format: str | Mapping[str, str | None] | None = None,
        backend: str | None = None,
        include: Callable[[str, Tensor], bool] | None = None,
        nonfinite: str = "propagate",
        seed: int = 0,
        num_averaged: int = 0,
        deviations: int | Spread | Mapping[str, int | Spread | None] | None = None,
    ) -> None:
        super().__init__()
        self._made_of = weakref.ref(model)
        named = named_rules(rules)
        formats, spreads = by_name("format", list(named), format), by_name("deviations", list(named), deviations)
        for name, rule in named.items():
            # Write into the dict, since add_module refuses names that are attributes of this class.
            own_children(self)[name] = FusedAveragedModel(
                model,
                device,
                use_buffers=use_buffers,
                rule=rule,
                format=formats[name],
                backend=backend,
                include=include,
                nonfinite=nonfinite,
                seed=seed,
                num_averaged=num_averaged,
                deviations=spreads[name],
            )

    # A mapping from names to averages

    def __getitem__(self, name: str) -> FusedAveragedModel:
        averaged = own_children(self).get(name)
        if averaged is None:
            raise KeyError(f"{name!r} is none of the averages {', '.join(map(repr, self))}")
        assert isinstance(averaged, FusedAveragedModel)
        return averaged

    def __iter__(self) -> Iterator[str]:
        return iter(own_children(self))

    def __len__(self) -> int:
        return len(own_children(self))

    def __contains__(self, name: object) -> bool:
        return name in own_children(self)

    def keys(self) -> list[str]:
        return list(self)

    def values(self) -> list[FusedAveragedModel]:
        return list(own_children(self).values())  # type: ignore[arg-type]  # __setattr__ refuses other modules

    def items(self) -> list[tuple[str, FusedAveragedModel]]:
        return [(name, self[name]) for name in self]

    def __getattr__(self, name: str) -> Any:
        if name in own_children(self):
            return self[name]
        refuse_own(self, FusedAveragedModel, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in own_children(self) or isinstance(value, Module):
            self.add_module(name, value)
        refuse_own(self, FusedAveragedModel, name)
        if name in DECAYS:
            refuse_decay(self, name, value)
        super().__setattr__(name, value)

    def add_module(self, name: str, module: Module | None) -> NoReturn:
        raise AttributeError(f"averages must stay as they are, got a change of {name!r}: make new FusedAverages")

    def __delattr__(self, name: str) -> None:
        if name in own_children(self):
            self.add_module(name, None)
        super().__delattr__(name)

    def __repr__(self) -> str:
        return describe_all(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"several averages have no forward: call averages[{next(iter(self))!r}](...)")

    # All averages together

    @disable_dynamo
    def update_parameters(self, model: Module) -> None:
        """Move all averages towards ``model``'s parameters in one pass, and count the update in each.

        Raises:
            TypeError, ValueError, RuntimeError: as ``FusedAveragedModel.update_parameters``; nothing has changed.
        """
        with self._guard.hold("update_parameters", read=model):
            averages = self.values()
            rules = self._rules(averages)
            nonfinite = {averaged.nonfinite for averaged in averages}
            if swaps.in_force and isinstance(model, Module):
                swaps.refuse_model("update_parameters", model)
            plan, params, planes = self._bind_all(model, averages)
            if "raise" in nonfinite:
                plan.refuse_nonfinite(params)
            for averaged in averages:
                if averaged._uncounted is not None and not averaged._uncounted.is_updated:
                    averaged._warn_of_overwrite()
            plan.update(params, planes, rules, skip_nonfinite="skip" in nonfinite)
            for averaged in averages:
                if averaged._uncounted is not None and not averaged._uncounted.is_updated:
                    averaged._note_update()

    def adapt_to(self, model: Module, *, old_name: OldName | None = None) -> list[str]:
        """Take over a model that has changed, in all averages, as :meth:`~swafast.FusedAveragedModel.adapt_to`.

        Raises:
            TypeError, ValueError, RuntimeError: as there; nothing has changed in any average.
        """
        return adapt(self, self.values(), model, old_name)

    def _rules(self, averages: Sequence[FusedAveragedModel]) -> list[Rule]:
        rules = [averaged.rule for averaged in averages]
        for name, rule in zip(self, rules, strict=True):
            if rule is None:
                raise ValueError(f"averages[{name!r}] must have a Rule to be updated with others, got a function")
        return rules  # type: ignore[return-value]

    def _bind(self, model: Module) -> Bound:
        averages = self.values()
        self._rules(averages)
        return self._bind_all(model, averages)

    def _bind_all(self, model: Module, averages: Sequence[FusedAveragedModel]) -> Bound:
        return self._bindings.bind(
            self,
            lambda: [side for averaged in averages for side in averaged._sides()],
            model,
            [averaged._config(by_function=False) for averaged in averages],
            [own_buffers(averaged)["n_averaged"] for averaged in averages],  # type: ignore[misc]
            side_bindings=[averaged._bindings for averaged in averages],
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state of this class into all averages. If anything raises, nothing has changed in any of them.

        Raises:
            RuntimeError: keys, shapes or values do not fit, with torch's message; or one is swapped into a model.
        """
        with self._guard.hold("load_state_dict"):
            modules = {f"{name}.": averaged.module for name, averaged in self.items()}
            return load_whole(self, modules, super().load_state_dict, state_dict, strict=strict, assign=assign)

    def state_dict(self, *args: Any, frozen: bool = True, **kwargs: Any) -> Any:
        """Return the states of all averages. Each key begins with an average's name: ``fast.module.weight``.

        ``frozen`` is as for :class:`~swafast.FusedAveragedModel`.

        Raises:
            RuntimeError: one of the averages is swapped into a model.
        """
        with self._guard.hold("state_dict"):
            state = super().state_dict(*args, **kwargs)
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            for name, averaged in self.items() if not frozen else ():
                leave_out(averaged.module, averaged._frozen(), state, f"{prefix}{name}.module.")
            return state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedAverages:
        with self._guard.hold("a move or cast"):  # take all guards first, so that all averages move or none
            super()._apply(fn, recurse)
        return self

    def _make_guard(self) -> Guard:
        return Guard([averaged._guard for averaged in self.values()])
