"""Where this rank's tensors of a model are, found again at each update, and the params of a plan that lie in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from ..op.copies import Copies
from ..op.plan import Fingerprint
from ..op.tree_check import TreeCheck
from ..terms.copying import are_alike, duplicate
from ..terms.names import canonical, unwrap
from ..torch_private import distributed as private
from ..torch_private.modules import Walk, named_tensors
from .parts.finding import copied_by_torch
from .parts.holdings import Held
from .parts.shares import Share
from .parts.zero import Masters
from .staging import Staging


class Locator:
    """Finds this rank's tensors in a model again, or detects that they must be matched by name again.

    It holds no params, so it keeps no model alive.

    Args:
        held: what this rank holds of the model, by name.
        for_use: find what a forward pass reads, also where an update reads the masters of ZeRO-3.
    """

    def __init__(self, model: Module, shares: Sequence[Share], held: Mapping[str, Held], for_use: bool = False) -> None:
        found_in = {share.name: held[share.name].place(for_use)[0] for share in shares}
        self._walk = Walk(unwrap(model))
        #: Indices of the buffers that torch copies, by their names.
        self._by_torch = {names: self._walk.position(each) for names, each in copied_by_torch(model).items()}
        kinds = (DTensor, Tensor)
        #: In the order of find(): DTensors, plain tensors, then shards of flat params.
        self.shares = sorted(shares, key=lambda share: [not isinstance(found_in[share.name], kind) for kind in kinds])
        tensors = [found for share in self.shares if isinstance(found := found_in[share.name], Tensor)]
        self._positions = [self._walk.position(tensor) for tensor in tensors]
        dtensors = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
        self._num_dtensors, self._specs = len(dtensors), private.specs(dtensors)
        flats = {id(flat): flat for flat in found_in.values() if not isinstance(flat, Tensor)}
        self._flats = list(flats.values())
        # For each share, the index of its base tensor, and the (offset, numel) of a flat shard in it.
        bases = {key: len(tensors) + i for i, key in enumerate(flats)}
        self._locations: list[tuple[int, tuple[int, int] | None]] = [(i, None) for i in range(len(tensors))]
        for share in self.shares[len(tensors) :]:
            run = (held[share.name].place(for_use)[1], share.holding.numel)
            self._locations.append((bases[id(found_in[share.name])], run))
        #: Under ZeRO-3, where the masters of these shares lie: a step of the optimizer writes them.
        of_updates = {id(each.found_in): (name, each.found_in) for name, each in held.items()}.values()
        self._masters = [(name, each) for name, each in of_updates if isinstance(each, Masters)]
        self.for_use = for_use

    @property
    def root(self) -> Module | None:
        """The unwrapped model whose tensors it finds, or None if it is gone."""
        return self._walk.root

    def masters(self) -> list[tuple[str, Tensor]]:
        """Return the masters of ZeRO-3, of which a forward pass reads copies, each with the name of a param in it."""
        return [(name, each.local) for name, each in self._masters] if self.for_use else []

    def runs(self, bases: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Return the bases that are in no module, each with the name of a share in it."""
        first = len(self._positions)
        return [(self.share_in(first + index).name, base) for index, base in enumerate(bases[first:])]

    def is_of(self, model: Module) -> bool:
        """Return whether it finds the tensors of ``model``."""
        root = self._walk.root
        return root is model or root is unwrap(model)

    def find(self, model: Module) -> list[Tensor] | None:
        """Return the model's current tensors that hold the shares, or None if they must be matched by name again."""
        if not self.is_of(model):
            return None
        found = self._walk.tensors()
        if found is None or not all(each.is_current() for _, each in self._masters):
            return None
        tensors = [found[i] for i in self._positions]
        try:
            specs = private.specs(tensors[: self._num_dtensors])  # type: ignore[arg-type]
        except AttributeError:  # no longer a DTensor, for instance gathered by a forward pass
            return None
        return tensors if specs == self._specs else None

    def by_torch(self) -> dict[tuple[str, ...], Tensor | None] | None:
        """Return the buffers that torch copies, by their names, or None if the model must be matched again."""
        found = self._walk.tensors()
        return None if found is None else {names: found[i] for names, i in self._by_torch.items()}

    def copies(self, copied: Sequence[dict[tuple[str, ...], Tensor]], staging: Staging | None) -> Copies | None:
        """Return what torch copies of the model into each side's ``copied``, made anew where it differs in kind."""
        for names, tensor in (self.by_torch() or {}).items():
            for of_side in copied:
                if tensor is not None and not are_alike(tensor, of_side[names]):
                    of_side[names] = duplicate(tensor).to(of_side[names].device)

        def find() -> list[tuple[Tensor, Tensor]] | None:
            theirs = staging.by_torch if staging is not None else self.by_torch()
            if theirs is None:
                return None
            return [(tensor, of_side[names]) for of_side in copied for names, tensor in theirs.items()]  # type: ignore[misc]

        return Copies([names[0] for _ in copied for names in self._by_torch], find) if self._by_torch else None

    def check(self, found: Sequence[Tensor]) -> TreeCheck:
        """Return a check that the bases stand.

        Raises:
            ValueError: there is none for this model.
        """
        if self._flats:
            raise ValueError("flat params are in no module")
        return TreeCheck([self.root], [found], shard_type=DTensor)

    def bases(self, found: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors that the shares lie in: local ones of DTensors, then plain and flat ones."""
        local = private.local_tensors(found[: self._num_dtensors])  # type: ignore[arg-type]
        return [*local, *found[self._num_dtensors :], *(flat.local for flat in self._flats)]

    def places(self) -> list[list[Tensor]]:
        """Return for each base the tensors that have its names in the model now, whatever became of its modules."""
        found: dict[str, Tensor] = {}
        for is_buffer in (False, True) if self.root is not None else ():
            for name, tensor in named_tensors(self.root, buffers=is_buffer):  # type: ignore[arg-type]
                found[canonical(name)] = tensor
        places: list[list[Tensor]] = [[] for _ in self._positions]
        for share, (base, _) in zip(self.shares, self._locations, strict=True):
            if base < len(places):
                now = [found[name] for name in share.holding.names if name in found]
                places[base] = private.local_tensors(now) if all(isinstance(t, DTensor) for t in now) else now  # type: ignore[arg-type]
        return [*places, *([flat.local] if flat.is_current() else [] for flat in self._flats)]

    def share_in(self, base: int) -> Share:
        """Return a share that lies in the base of this index."""
        return self.shares[next(index for index, (at, _) in enumerate(self._locations) if at == base)]

    def local(self, bases: Sequence[Tensor], index: int) -> Tensor:
        """Return this rank's tensor of the share at ``index``; ``bases`` is a result of :meth:`bases`."""
        base, run = self._locations[index]
        return bases[base] if run is None else bases[base].narrow(0, *run)


class Views(Sequence[Tensor]):
    """The params of a plan. A view is made on access, since most backends use addresses and need no view.

    Args:
        bases: a result of :meth:`Locator.bases`.
        fingerprint: of the bases, and of more tensors after them.
    """

    def __init__(
        self,
        locator: Locator,
        chosen: Sequence[tuple[int, Share]],
        bases: Sequence[Tensor],
        fingerprint: Fingerprint,
    ) -> None:
        self.locator, self._chosen, self.bases, self._fingerprint = locator, chosen, bases, fingerprint

    def on(self, bases: Sequence[Tensor]) -> Views:
        """Return the same params on other bases."""
        return Views(self.locator, self._chosen, bases, self._fingerprint)

    @property
    def base_views(self) -> list[tuple[Any, ...]]:
        """The views of the bases, as in :class:`Fingerprint`."""
        return self._fingerprint.views[: len(self.bases)]

    @property
    def shares(self) -> list[Share]:
        """The share of each param."""
        return [share for _, share in self._chosen]

    @property
    def averaged(self) -> set[str]:
        """The names of the params that are averaged, not copied, on this rank or on others."""
        return {share.name for share in self.locator.shares if share.format is not None}

    def held(self) -> dict[str, Held]:
        """Return what this rank holds of the model, by name, on the memory that it has now."""
        located = ((share, self.locator.local(self.bases, i).detach()) for i, share in enumerate(self.locator.shares))
        return {share.name: Held(share.holding, local, local) for share, local in located}

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, position):  # type: ignore[no-untyped-def]  # an int only; Sequence also has slices
        index, share = self._chosen[position]
        return share.of(self.locator.local(self.bases, index).detach())


class StagedViews(Views):
    """The params of a plan that reads copies on the host. The bases are these copies, one for each param."""

    def __getitem__(self, position):  # type: ignore[no-untyped-def]  # as in Views
        return self.bases[position]
