"""`Snapshots`: store averages during training, and synthesize any other average from them afterwards."""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..average.fused_averages import FusedAverages
from ..loop.guard import Guard
from ..sharded.construction import spell
from ..sharded.parts.ranks import Counting
from ..sharded.parts.rendezvous import shared_ranks
from ..sharded.sharded_model import ShardedAveragedModel
from ..terms import habits, hints
from ..terms.pickling import pickled_from
from ..terms.rules import Rule
from .folder import (
    Snapshot,
    StoredAverage,
    key_of,
    new_path,
    outdated_paths,
    read_sidecar,
    require_same_model,
    snapshot_paths,
    write_sidecar,
)
from .profiles import Fit, Profile, fit
from .stored_merges import HasMerges
from .sums import agree_on, sum_all, wanted_tensors
from .written import Averaged, StoredPart, named_averages, reporting, stored_in, stored_parts, write

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: A larger residual of a synthesized profile gets a warning.
_FAR_OFF = 0.01


@pickled_from("swafast")
class Snapshots(HasMerges):
    """A folder of averages stored during training, from which an average by any rule can be synthesized afterwards.

    Keep two :class:`~swafast.PowerAverage`, for instance with sigma_rel 0.05 and 0.10, and store both now and then.
    After training, a sum of the stored averages approximates the average by another rule. Averages by every
    :class:`~swafast.Rule` can be stored, from one process or from sharded models. The number of ranks may differ
    between saving and synthesizing.

    :meth:`merge` adds up the last ones with given weights, and :meth:`window` is the mean of the models between two.

    With a process group, construction and all calls that read or write averages are collective: all ranks make the same
    calls on one shared folder, and an error on one raises on all. Iteration and :meth:`fit` are not collective.

    Args:
        folder: the folder; it need not exist yet.
        process_group: the ranks that save and synthesize together; default: all ranks, or this process alone if
            ``torch.distributed`` is not initialised.
        rules: your own rules by name of the average, as they were when stored. swafast stores its own rules itself.

    Raises:
        TypeError: ``rules`` is not a mapping of names to rules.
        ValueError: ``process_group`` does not hold this rank.

    Paper: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696,
    section 3.2.

    Example::

        snapshots = Snapshots("snapshots")
        for step, batch in enumerate(loader):
            ...
            if step % 1000 == 999:
                snapshots.save({"narrow": narrow, "wide": wide})
        model.load_state_dict(snapshots.synthesize(PowerAverage.from_sigma_rel(0.15)))
    """

    _meant = habits.OF_SNAPSHOTS

    @hints.hinted
    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        process_group: ProcessGroup | None = None,
        rules: Mapping[str, Rule] | None = None,
    ) -> None:
        self.folder = folder
        self._has_warned = False  # of later snapshots in the folder
        self._ranks = shared_ranks(process_group, "Snapshots")
        with self._ranks.settled("Snapshots"):
            if rules is not None and not isinstance(rules, Mapping):
                raise TypeError(f"rules must be a mapping of names to rules or None, got {type(rules).__name__}")
            self._rules = dict(rules or {})
            for name, rule in self._rules.items():
                if not isinstance(name, str):
                    raise TypeError(f"rules must have strings for names, got {name!r}")
                if not isinstance(rule, Rule):
                    raise TypeError(f"rules[{name!r}] must be a swafast.Rule, got {type(rule).__name__}")

    def _set_folder(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder).absolute()  # the working directory may change

    #: Where the snapshots are.
    folder = property(attrgetter("_folder"), _set_folder)  # attrgetter is in C: no call of Python

    # Listing

    def __repr__(self) -> str:
        """Return the folder and how many snapshots it has. No file is read."""
        count = len(snapshot_paths(self.folder))
        return f"Snapshots({str(self.folder)!r}, {count} snapshot{'s' * (count != 1)})"

    def __iter__(self) -> Iterator[StoredAverage]:
        """Yield the name, count and rule of each stored average, in the order of counts.

        Raises:
            ValueError: a ``snapshot.json`` is damaged; the message names it.
        """
        for snapshot in self._read():
            yield from self._averages_of(snapshot)

    def __len__(self) -> int:
        """Return the number of stored averages over all snapshots."""
        return sum(len(snapshot.rules) for snapshot in self._read())

    @property
    def profiles(self) -> list[Profile]:
        """The profile of each stored average, in the order of iteration.

        Raises:
            ValueError: a ``snapshot.json`` is damaged, or ``rules`` lacks a user's own rule.
        """
        return [stored.profile(self.folder) for stored in self]

    def _read(self) -> list[Snapshot]:
        return [read_sidecar(path) for path in snapshot_paths(self.folder)]

    def _warn_of_later(self, later: int, count: int) -> None:
        """Warn once that the folder holds later snapshots, of another training or from before going back."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self.folder} holds snapshots up to {later} updates, more than the {count} of this one: synthesize() "
                "would mix two trainings. Save a new training to another folder, or if you have gone back, delete the "
                "later snapshots",
                RuntimeWarning,
                stacklevel=4,
            )

    def _latest(self) -> Snapshot | None:
        """Return the latest snapshot that is not damaged, since a damaged one should not stop a training."""
        for path in reversed(snapshot_paths(self.folder)):
            with suppress(ValueError):
                return read_sidecar(path)
        return None

    def _averages_of(self, snapshot: Snapshot) -> list[StoredAverage]:
        own = self._rules
        return [
            StoredAverage(name, snapshot.num_averaged, own.get(name, rule) if isinstance(rule, str) else rule)
            for name, rule in snapshot.rules.items()
        ]

    # Saving

    def save(
        self, averages: Averaged | Mapping[str, Averaged] | FusedAverages, *, dtype: torch.dtype | None = None
    ) -> None:
        """Store averages of one model, all after the same number of updates. Collective.

        The snapshot becomes visible when it is complete, and replaces an earlier one of the same count. A killed
        process leaves a subfolder that is ignored. Tensors that are not averaged, such as buffers, are stored once.
        Of averages with ``deviations`` the means alone are stored: synthesized averages have no variance.
        Whole float32 averages are written from their own memory; everything else is copied first.

        Args:
            averages: :class:`~swafast.FusedAveragedModel` or :class:`~swafast.ShardedAveragedModel` by name, or one.
            dtype: float32, bfloat16, float16 or float64, to which floating averages are rounded; default: float32, but
                float64 for float64 params. Complex averages keep their dtype. float64 is for ``compensated`` averages,
                of which it keeps all bits.

        Warns:
            RuntimeWarning: the folder holds later snapshots, of another training or from before this one went back;
                once, on the first rank.

        Raises:
            TypeError, ValueError: ``averages`` or ``dtype`` is none of the above, an average has not been updated yet,
                averages differ in counts, names or shapes, the folder holds another model, or ranks disagree. The
                folder has not changed.
            RuntimeError: averages are swapped into a model, a file cannot be written, or another rank failed.
        """
        with self._ranks.settled("save"):
            named = named_averages(averages)
        ranks = Counting(self._ranks, [average.n_averaged for average in named.values()])
        with Guard([average._guard for average in named.values()]).hold("save", ranks):
            with self._ranks.settled("save"):
                rules, count = self._check(named, dtype)
            spelled = {name: spell(rule) for name, rule in rules.items()}
            self._ranks.agree("averages", {**spelled, "n_averaged": count, "dtype": dtype})
            with self._ranks.in_lockstep():
                parts = {name: stored_parts(average, self._ranks, dtype) for name, average in named.items()}
            self._write(count, rules, parts)

    def _check(self, named: Mapping[str, Averaged], dtype: torch.dtype | None) -> tuple[dict[str, Rule], int]:
        """Check the averages and return their rules and their count."""
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))} or None, got {dtype!r}")
        rules, counts = {}, {}
        for name, average in named.items():
            if average.rule is None:
                raise ValueError(f"averages[{name!r}] must be averaged by a Rule, got a function, without a profile")
            ranks = average._ranks.ranks if isinstance(average, ShardedAveragedModel) else self._ranks.ranks
            if ranks != self._ranks.ranks:
                ours = list(self._ranks.ranks)
                raise ValueError(f"averages[{name!r}] must be spread over ranks {ours}, got {list(ranks)}")
            rules[name], counts[name] = average.rule, int(average.n_averaged)
            if counts[name] < 1:
                raise ValueError(f"averages[{name!r}] must have been updated, got n_averaged = {counts[name]}")
        if len(set(counts.values())) > 1:
            raise ValueError(f"averages must have the same n_averaged, got {counts}")
        return rules, next(iter(counts.values()))

    def _write(self, count: int, rules: Mapping[str, Rule], parts: Mapping[str, list[StoredPart]]) -> None:
        # Each average has the tensors that are not averaged; those of the last one are stored.
        by_key = {
            key_of("" if part.is_copy else average, part.stored.names[0]): part
            for average, of_average in parts.items()
            for part in of_average
        }
        sums = self._ranks.sums(part.checksum for part in by_key.values())
        first, path = self._ranks.index == 0, None
        with self._ranks.settled("save"):
            params, copies = stored_in(parts)
            snapshot = Snapshot(self.folder, count, rules, params, copies, dict(zip(by_key, sums, strict=True)))
            present = self._latest()
            if present is not None:
                require_same_model(present, "averages", snapshot)
                if first and present.num_averaged > count:
                    self._warn_of_later(present.num_averaged, count)
        try:
            with (
                self._ranks.settled("save"),
                reporting(RuntimeError, f"a snapshot in {self.folder} could not be written"),
            ):
                path = new_path(self.folder, count) if first else None
            path = self._ranks.gather(path)[0]
            assert path is not None
            with self._ranks.settled("save"):
                write(path, {key: part.value for key, part in by_key.items()}, self._ranks)
            with self._ranks.settled("save"):
                if first:
                    with reporting(RuntimeError, f"snapshot {path} could not be written"):
                        write_sidecar(dataclasses.replace(snapshot, path=path))
        except BaseException:
            if first and path is not None:
                shutil.rmtree(path, ignore_errors=True)
            raise
        for other in outdated_paths(path) if first else ():
            shutil.rmtree(other, ignore_errors=True)

    # Synthesis

    def fit(self, rule: Rule, num_averaged: int | None = None) -> Fit:
        """Return how close :meth:`synthesize` would come to the average by ``rule``, without reading tensors.

        Raises:
            TypeError, ValueError: as :meth:`synthesize`.
        """
        return self._fit(self._read(), rule, num_averaged)[0]

    def _fit(self, snapshots: list[Snapshot], rule: Rule, num_averaged: int | None) -> tuple[Fit, int]:
        if not snapshots:
            raise ValueError(f"folder must hold snapshots, got none in {self.folder}")
        counts = [snapshot.num_averaged for snapshot in snapshots]
        wanted = Profile(rule, counts[-1] if num_averaged is None else num_averaged)
        if not counts[0] <= wanted.num_averaged <= counts[-1]:
            raise ValueError(
                f"num_averaged must be from {counts[0]} to {counts[-1]}, as in the snapshots, got {num_averaged}"
            )
        stored = [each.profile(self.folder) for snapshot in snapshots for each in self._averages_of(snapshot)]
        return fit(stored, wanted), wanted.num_averaged

    def synthesize(
        self, rule: Rule, num_averaged: int | None = None, *, like: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Approximate the average by ``rule`` after ``num_averaged`` updates by a sum of stored ones. Collective.

        Returns a state dict under the model's own names. Params are float32; float64 and complex ones keep their dtype.
        Buffers are those of the last snapshot up to ``num_averaged``. BatchNorm statistics among them do not fit the
        average: call :func:`~swafast.update_bn`. Sums are float64. Beside the result this takes 12 bytes for each of
        2^22 elements, or of the largest tensor if that has more. Each snapshot is read once.

        Args:
            num_averaged: from the smallest to the largest stored count; default: the largest.
            like: tensors by name, such as ``model.state_dict()`` of an FSDP2 model. Only these are returned: a DTensor
                for a DTensor, of which each rank reads its part, and a whole tensor on the same device for a plain one.
                Default: all tensors, whole, on the CPU.

        Warns:
            RuntimeWarning: ``fit(...).residual`` is above 1%; on the first rank.

        Raises:
            TypeError: an argument is none of the above.
            ValueError: there is no snapshot, none covers ``num_averaged``, a snapshot is damaged or of another model
                than the others or ``like``, or ranks disagree. The message names the snapshot or the tensor.
            RuntimeError: the call failed on another rank, or a rank was lost.
        """
        with self._ranks.lock:
            with self._ranks.settled("synthesize"):
                snapshots = self._read()
                found, count = self._fit(snapshots, rule, num_averaged)
                for snapshot in snapshots:
                    require_same_model(snapshots[-1], f"snapshot {snapshot.path}", snapshot)
                wanted = wanted_tensors(snapshots[-1], like)
            agree_on(self._ranks, snapshots, wanted, {"rule": spell(rule), "num_averaged": count})
            # Use the first rank's coefficients, since another processor may round differently.
            coefficients = iter(self._ranks.gather(found.coefficients.tolist())[0])
            if found.residual > _FAR_OFF and self._ranks.index == 0:
                warnings.warn(
                    f"the synthesized average misses the profile of {rule!r} after {count} updates by "
                    f"{found.residual:.1%}: store more snapshots, or averages by more similar rules",
                    RuntimeWarning,
                    stacklevel=2,
                )
            weights = [(each, dict(zip(each.rules, coefficients, strict=False))) for each in snapshots]
            used = [(each, {name: x for name, x in of_each.items() if x}) for each, of_each in weights]
            latest = [each for each in snapshots if each.num_averaged <= count][-1]
            return sum_all(wanted, used, latest, self._ranks)
