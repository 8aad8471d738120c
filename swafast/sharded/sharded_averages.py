"""`ShardedAverages`: several averages of one model that is spread over ranks, updated in one pass on each rank."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from ..average.described import describe_all
from ..average.functions import DECAYS, refuse_decay
from ..average.fused_averages import by_name, named_rules, refuse_own
from ..average.growing import OldName
from ..average.settings import SETTINGS
from ..loop.guard import Guard
from ..terms import hints, misfits
from ..terms.pickling import pickled_from
from ..terms.rules import Rule
from ..terms.spread import Spread
from . import checkpoint, full_states
from .construction import ranks_over, spell
from .parts.ranks import Ranks
from .regrowing import adapt_shards
from .sharded_model import ShardedAveragedModel
from .updating import AttachableShards


@pickled_from("swafast")
class ShardedAverages(AttachableShards, Mapping[str, ShardedAveragedModel]):
    """Several averages of one model, updated together: ``ShardedAverages(model, rules={"fast": ..., "slow": ...})``.

    Each one is a :class:`ShardedAveragedModel`, ``averages["fast"]``. An update moves all averages in one launch, which
    reads this rank's parameters from memory once. Construction is collective.

    Args:
        model: the model as it trains, wrapped and sharded.
        rules: up to 16 rules by name, as a mapping or as (name, rule) pairs. A name must not contain a dot.
        format: one format for all averages, or a mapping from their names; default: by each parameter's dtype.
        include, process_group, use_buffers, share_replicas, nonfinite, backend, seed, num_averaged: as for
            :class:`ShardedAveragedModel`, the same for all averages.

    Raises:
        TypeError, ValueError: names, rules or formats are not as above, or differ between ranks; and all that each
            average's class raises.
    """

    @hints.hinted
    def __init__(
        self,
        model: Module,
        *,
        rules: Mapping[str, Rule] | Sequence[tuple[str, Rule]],
        format: str | Mapping[str, str | None] | None = None,
        include: Callable[[str, Tensor], bool] | None = None,
        process_group: ProcessGroup | Ranks | None = None,
        use_buffers: bool = False,
        share_replicas: bool = False,
        nonfinite: str = "propagate",
        backend: str | None = None,
        seed: int = 0,
        num_averaged: int = 0,
        deviations: int | Spread | Mapping[str, int | Spread | None] | None = None,
    ) -> None:
        self._ranks = ranks_over(process_group, "ShardedAverages")
        self._number = self._ranks.next_number()
        with self._ranks.lock:
            with self._ranks.settled("ShardedAverages"):
                named = named_rules(rules)
                formats = by_name("format", list(named), format)
                spreads = by_name("deviations", list(named), deviations)
            described = {"names": ", ".join(named), "rules": spell(named), "formats": spell(formats)}
            described["deviations"] = spell(spreads)
            self._ranks.agree("the averages", described)
            self._averages = {
                name: ShardedAveragedModel(
                    model,
                    rule=rule,
                    format=formats[name],
                    include=include,
                    process_group=self._ranks,
                    use_buffers=use_buffers,
                    share_replicas=share_replicas,
                    nonfinite=nonfinite,
                    backend=backend,
                    seed=seed,
                    num_averaged=num_averaged,
                    deviations=spreads[name],
                )
                for name, rule in named.items()
            }
        self.nonfinite, self._made_of = nonfinite, weakref.ref(model)

    def __getitem__(self, name: str) -> ShardedAveragedModel:
        if name not in self._averages:
            raise KeyError(f"{name!r} is none of the averages {', '.join(map(repr, self))}")
        return self._averages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._averages)

    def __len__(self) -> int:
        return len(self._averages)

    # Compare and hash by identity, as other averaged models. A Mapping would compare its items and have no hash.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        averages = self.__dict__.get("_averages", {})
        if name in averages:
            return averages[name]
        refuse_own(self, ShardedAveragedModel, name)
        others: Any = super()
        return others.__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_averages", {}):
            raise AttributeError(f"averages must stay as they are, got a change of {name!r}: make new ShardedAverages")
        refuse_own(self, ShardedAveragedModel, name)
        if name in DECAYS:
            refuse_decay(self, name, value)
        if name in SETTINGS:
            value = SETTINGS[name](name, value)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return describe_all(self)

    @property
    def _updated(self) -> list[ShardedAveragedModel]:
        return list(self.values())

    def adapt_to(self, model: Module, *, old_name: OldName | None = None) -> list[str]:
        """Take over a model that has changed, in all averages, as ``ShardedAveragedModel.adapt_to``. Collective.

        Raises:
            TypeError, ValueError, RuntimeError: as there; nothing has changed in any average on any rank.
        """
        return adapt_shards(self, self._updated, model, old_name, self._ranks)

    @hints.hinted
    def state_dict(self, *, checksums: bool = True) -> dict[str, Tensor]:
        """Return the states of all averages, each key after its average's name: ``fast.module.weight``. Collective.

        Raises:
            RuntimeError: an average is swapped into a model, here or on another rank; or a rank was lost.
        """
        return self._joined("state_dict", checksums=checksums)

    @hints.hinted
    def full_state_dict(self, *, rank0_only: bool = False, cpu_offload: bool = False) -> dict[str, Tensor]:
        """Return whole tensors under the keys of :class:`~swafast.FusedAverages`. Collective.

        Raises:
            RuntimeError: as :meth:`state_dict`.
        """
        return self._joined("full_state_dict", rank0_only=rank0_only, cpu_offload=cpu_offload)

    def _joined(self, action: str, **options: bool) -> dict[str, Tensor]:
        with self._guard.hold(action, self._ranks):
            states = {name: getattr(averaged, action)(**options) for name, averaged in self.items()}
        return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the states of all averages: take and verify all of them, then write. Collective.

        Raises:
            TypeError, ValueError, RuntimeError: as ``ShardedAveragedModel.load_state_dict``. The message names the key,
                and nothing has changed in any average on any rank.
        """
        with self._guard.hold("load_state_dict", self._ranks):
            pending: dict[str, checkpoint.PendingLoad] = {}
            with self._ranks.settled("load_state_dict"):
                states = self._states_of(state_dict)
            for name, averaged in self.items():
                with self._ranks.settled("load_state_dict"), _about(name):
                    pending[name] = checkpoint.prepare_load(averaged._entries(), averaged._copied, states[name])
                with self._ranks.settled("load_state_dict"), _about(name):
                    checkpoint.verify(pending[name], self._ranks, averaged.n_averaged.device)
            self._commit(pending)

    @hints.hinted
    def load_full_state_dict(self, state_dict: Mapping[str, Any] | None, *, from_rank0: bool = False) -> None:
        """Load whole tensors, as of :class:`~swafast.FusedAverages`, into all averages. Collective.

        Raises:
            TypeError, ValueError, RuntimeError: as ``ShardedAveragedModel.load_full_state_dict``; nothing has changed
                in any average on any rank.
        """
        call = full_states.loading_call(from_rank0)
        with self._guard.hold(call, self._ranks):
            with self._ranks.settled(call):
                states = self._states_of({} if from_rank0 and self._ranks.index > 0 else state_dict)
            pending = {}
            for name, averaged in self.items():
                with _about(name):
                    pending[name] = averaged._take_whole(states[name], call)
            self._commit(pending)

    def _commit(self, pending: Mapping[str, checkpoint.PendingLoad]) -> None:
        checkpoint.commit((pending[name], averaged.n_averaged) for name, averaged in self.items())
        for name, averaged in self.items():
            averaged._count_from(int(pending[name].count), is_loaded=True)

    def _states_of(self, state_dict: object) -> dict[str, dict[str, Any]]:
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        states: dict[str, dict[str, Any]] = {name: {} for name in self}
        for key, value in state_dict.items():
            name, _, rest = str(key).partition(".")
            if name not in states:
                names = {name for averaged in self.values() for each in averaged._shares for name in each.holding.names}
                raise ValueError(
                    f"state_dict must have keys of the averages {', '.join(map(repr, self))}, got {key!r}"
                    f"{misfits.of_state(state_dict, names, 'ShardedAverages')}"
                )
            states[name][rest] = value
        return states

    def _make_guard(self) -> Guard:
        return Guard([averaged._guard for averaged in self.values()], self._number)


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Begin the messages of TypeErrors and ValueErrors of the body with the average's name."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"averages[{name!r}]: {error}") from error
