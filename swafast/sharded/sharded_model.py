"""`ShardedAveragedModel`: the average of a model under DDP, FSDP, HSDP or tensor parallelism, a part on each rank."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from ..average.accepting import ask_include
from ..average.functions import DECAYS, ByRuleAlone, choose_rule, refuse_decay
from ..average.sampling import check_deviations, refuse_complex
from ..average.settings import SETTINGS
from ..loop.guard import Guard
from ..op import checks
from ..terms import hints
from ..terms.copying import duplicate
from ..terms.pickling import pickled_from
from ..terms.rules import Rule, warn_of_small_decay
from ..terms.spread import Spread, checked_spread
from . import checkpoint, construction
from .full_states import HasFullStates
from .parts.finding import copied_by_torch, find_holdings
from .parts.holdings import Held, reshard
from .parts.ranks import Ranks
from .parts.shares import share_out
from .regrowing import AdaptableShards
from .shard_side import ShardSide, check_sharded_model
from .shard_subspaces import PlaceableShards


@pickled_from("swafast")
class ShardedAveragedModel(HasFullStates, PlaceableShards, AdaptableShards, ShardSide):
    """The running average of a model that is spread over ranks. Each rank averages its own part of the model.

    ``average = average + weight * (param - average)``, bit for bit as :class:`~swafast.FusedAveragedModel` computes it,
    in one fused pass over this rank's part and without a collective. There is no copy of the module: evaluate with
    :meth:`swapped_into`, or load :meth:`full_state_dict` into a plain model.

    The part of each rank is:

    - of params that each rank holds whole (DDP, or a plain model): an even cut, 1/world of the bytes and the time;
    - of DTensors (FSDP2, HSDP, tensor parallelism, on 1-D and 2-D meshes) and FSDP1's flat params: its shard. If
      several ranks hold the same shard (HSDP), each averages all of it, or with ``share_replicas`` an even cut;
    - of params that DeepSpeed's ZeRO-3 has partitioned: its run of each float32 master, or of a frozen param. Pass the
      engine's module. A swap puts the averages into the runs that a forward pass gathers.

    Construction is collective: all ranks of ``process_group`` construct it, with the same arguments. An error on one
    rank raises on all of them.

    Args:
        model: the model as it trains, wrapped and sharded.
        rule: sets the weight of the newest model; default: :class:`~swafast.EqualAverage`. It may be set later, on all
            ranks alike. For several averages of one model see :class:`~swafast.ShardedAverages`.
        format, seed, backend: as for :class:`~swafast.FusedAveragedModel`. Random bits do not depend on the shards.
        include: ``include(name, param) -> bool`` picks the parameters to average. The others are not stored, saved or
            exchanged.
        process_group: the ranks over which the model is spread; default: all, or this process alone if there is no
            process group. All averages of one group share one process group of ours, so all ranks must make their
            collective calls in the same order.
        use_buffers: average floating-point buffers too. By default all buffers are copied; integer ones always are.
            Each rank averages its own buffers; a state has those of the first rank.
        share_replicas: cut shards that several ranks hold alike, evenly over these ranks.
        nonfinite: ``"propagate"``. ``"raise"`` and ``"skip"`` change nothing on any rank if a parameter holds a NaN or
            an infinity on one of them. This reads the params once more, and all-reduces one flag.
        num_averaged, deviations: as for :class:`~swafast.FusedAveragedModel`. Samples do not depend on the shards.

    Raises:
        TypeError: ``model`` is not a module, or another argument has a wrong type.
        ValueError: there are several processes and no process group; an argument has a value not listed above; or
            ranks differ in names, shapes, placements, arguments, or bits that they should hold alike. The message names
            the difference.
        NotImplementedError: a parameter's dtype, such as float8, cannot be averaged. ``include`` can leave it out. Or
            ZeRO-3 keeps a parameter where it cannot be averaged, such as on NVMe; the message says why.
        RuntimeError: construction failed on another rank, which the message names; or a rank was lost.

    Paper: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407.

    Example::

        averaged = ShardedAveragedModel(model, rule=ExponentialAverage(0.999))
        for batch in loader:
            step(model, batch)
            averaged.update_parameters(model)
        with averaged.swapped_into(model):
            evaluate(model)
        torch.distributed.checkpoint.save({"averaged": averaged.state_dict()}, checkpoint_id=folder)
    """

    @hints.hinted
    def __init__(
        self,
        model: Module,
        *,
        rule: Rule | None = None,
        format: str | None = None,
        include: Callable[[str, Tensor], bool] | None = None,
        process_group: ProcessGroup | Ranks | None = None,
        use_buffers: bool = False,
        share_replicas: bool = False,
        nonfinite: str = "propagate",
        backend: str | None = None,
        seed: int = 0,
        num_averaged: int = 0,
        deviations: int | Spread | None = None,
    ) -> None:
        self._ranks = construction.ranks_over(process_group, "ShardedAveragedModel")
        self._number = self._ranks.next_number()
        asked = {"format": format, "backend": backend, "nonfinite": nonfinite, "seed": seed, "include": include}
        asked |= {"use_buffers": use_buffers, "share_replicas": share_replicas}
        with self._ranks.lock:
            self._construct(model, rule, asked, num_averaged, deviations)

    nonfinite: str
    seed: int
    share_replicas: bool
    include: Callable[[str, Tensor], bool] | None

    # Construction

    def _construct(
        self,
        model: Module,
        rule: Rule | None,
        asked: Mapping[str, Any],
        num_averaged: int,
        deviations: object,
    ) -> None:
        """Construct the average in steps that all ranks take together. Collective."""
        with self._ranks.settled("ShardedAveragedModel"):
            for name, value in asked.items():
                setattr(self, name, value)  # checked there
            num_averaged = checks.checked_num_averaged(num_averaged)
            self.rule, self._deviations = rule, checked_spread(deviations)
            check_deviations(self._deviations, self.rule, num_averaged)
            warn_of_small_decay(rule)
            check_sharded_model(model)
            self._made_of = weakref.ref(model)
            reshard(model)
        self._meshes = construction.gather_meshes(model, self._ranks)
        with self._ranks.settled("ShardedAveragedModel"):
            held = self._set_up(model, asked["include"])
        options = ("rule", "nonfinite", "use_buffers", "share_replicas", "seed", "deviations")
        spelled = {"format": self.__dict__["format"]} | {option: getattr(self, option) for option in options}
        described = {option: construction.spell(value) for option, value in spelled.items()}
        described["num_averaged"] = str(num_averaged)
        described |= {names[0]: "copied by torch" for names in self._copied}
        self._ranks.agree("the model and the arguments", described | construction.describe(self._shares))
        construction.require_same_bits(self._shares, held, self._ranks)
        self._all_gathers = construction.make_all_gathers(self._shares, self._ranks)
        with self._ranks.settled("ShardedAveragedModel"):
            plan, params, planes = self._bind(model)
            plan.update(params, planes, [self.rule])  # the first update copies; do not count it
            self._count_from(num_averaged)

    def _set_up(self, model: Module, include: Callable[[str, Tensor], bool] | None) -> dict[str, Held]:
        """Find what this rank holds, share it out, and make the planes. Return what it holds, by name."""
        found = {held.holding.name: held for held in find_holdings(model, self._ranks.ranks, self._meshes)}
        # Pass `include` the tensors that the user finds in the model, but of a flat param this rank's shard.
        params = {name: held.shown for name, held in found.items() if not held.holding.is_buffer}
        self._left_alone = {name for name, included in ask_include(include, params).items() if not included}
        held = {name: found[name] for name in found if name not in self._left_alone}
        self._anew: dict[str, str] = {}
        self._copied = {names: duplicate(tensor) for names, tensor in copied_by_torch(model).items()}
        for (name, *_), tensor in self._copied.items():
            if self.use_buffers and tensor.is_floating_point():
                checks.check_plain(f"{name!r} of the model", tensor)
        refuse_complex(self._deviations, {name: each.local for name, each in held.items() if name in params})
        asked, spread = self.__dict__["format"], self._deviations
        holdings = [each.holding for each in held.values()]
        formats = {
            each.name: construction.format_of_average(each, asked, self.use_buffers, spread) for each in holdings
        }
        self._shares = share_out(holdings, formats, self._ranks.rank, share_replicas=self.share_replicas)
        self._planes = construction.make_planes(self._shares, held, asked)
        device = holdings[0].device if holdings else torch.device("cpu")
        self.n_averaged = torch.zeros((), dtype=torch.int64, device=device)
        self._bind(model)
        return held

    def __setattr__(self, name: str, value: object) -> None:
        if name in DECAYS:
            refuse_decay(self, name, value)
        if name in SETTINGS:
            value = SETTINGS[name](name, value)
        super().__setattr__(name, value)

    def _set_rule(self, rule: Rule | None) -> None:
        chosen = choose_rule(rule, takes_functions=False)
        self._guard.settle()  # an update under way goes by the rule before
        self._rule = chosen

    #: The rule in use, or to be used from the next update on. Set it on all ranks alike.
    rule = property(attrgetter("_rule"), _set_rule)  # attrgetter is in C: an update asks for it
    avg_fn, multi_avg_fn = ByRuleAlone(), ByRuleAlone()

    def _make_guard(self) -> Guard:
        return Guard(number=self._number)

    @property
    def _updated(self) -> list[ShardedAveragedModel]:
        return [self]

    # State

    @hints.hinted
    def state_dict(self, *, checksums: bool = True) -> dict[str, Tensor]:
        """Return copies of this rank's averages, ready for ``torch.distributed.checkpoint``. Collective.

        Keys are those of :class:`~swafast.FusedAveragedModel`: ``n_averaged``, ``module.<name>`` and
        ``<plane>.<name>``. Sharded params are DTensors. Cut params and FSDP1's are :class:`PartTensor`, with original
        names and shapes, so that any number of ranks can load them. Tensors without dimensions are whole on each rank.
        With ``checksum.<key>`` and ``save_id``, :meth:`load_state_dict` verifies the values. Buffers that are sparse,
        quantised or of a tensor subclass are left out.

        Args:
            checksums: pass False to load a checkpoint without checksums, such as one of an unsharded average. Then
                nobody sees if it was saved with more ``deviations`` than this average has.

        Raises:
            RuntimeError: the averages are swapped into a model, here or on another rank; ranks have made different
                numbers of updates; or a rank was lost.
        """
        with self._guard.hold("state_dict", self._saving), self._ranks.in_lockstep():
            return checkpoint.make_state(self._entries(), self.n_averaged, self._ranks, checksums=checksums)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state: take this rank's parts, verify them with all ranks, then write them. Collective.

        Pass a result of :meth:`state_dict` that ``torch.distributed.checkpoint.load`` has filled, or whole tensors, as
        of :meth:`full_state_dict` and :class:`~swafast.FusedAveragedModel`. If it has no ``checksum.<key>``, values are
        not verified.

        Raises:
            TypeError, ValueError: keys, shapes, dtypes or placements do not match, or the values are not those that
                were saved. The message names the key, and nothing has changed on any rank.
            RuntimeError: the load failed on another rank; the averages are swapped into a model; or a rank was lost.
        """
        with self._guard.hold("load_state_dict", self._ranks):
            with self._ranks.settled("load_state_dict"):
                pending = checkpoint.prepare_load(self._entries(), self._copied, state_dict)
            with self._ranks.settled("load_state_dict"):  # ranks may have been given different checksums
                checkpoint.verify(pending, self._ranks, self.n_averaged.device)
            checkpoint.commit([(pending, self.n_averaged)])
            self._count_from(int(pending.count), is_loaded=True)

    def _entries(self) -> list[checkpoint.Entry]:
        return list(checkpoint.entries(self._shares, self._planes))
