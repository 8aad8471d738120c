"""Stand-ins: copies of a model's module tree, for an update beside the model's next forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..terms.copying import copy_into, duplicate, is_plain
from ..terms.layout import lay_out
from ..terms.names import unwrap
from ..torch_private.modules import named_modules, own_buffers, own_children, own_params

Tensors = dict[str, Tensor | None]


class StandIn:
    """A module tree that an update in the background reads instead of the model.

    Each :meth:`take` copies the buffers, since the next forward writes them. The params are the model's own, which
    nothing writes before the next step; with ``device`` they are copied too.

    Args:
        model: wrapped or not. Its modules and tensors may change between two calls of :meth:`take`.
        device: where to copy all tensors to. On the host they are pinned if there is a GPU.
        streams: side streams to copy params on. Buffers are copied on the current streams, ahead of the next forward.
    """

    def __init__(
        self, model: Module, device: torch.device | None = None, streams: Sequence[torch.cuda.Stream] = ()
    ) -> None:
        self._model, self._device, self._streams = model, device, streams
        self._tree: list[tuple[str, Module]] = []
        self._nodes: dict[str, Module] = {}
        self._staged: dict[int, Tensor] = {}  # copies, by the id of the original
        #: The memory of the params that the last take() has copied on side streams, which may still read it.
        self.copied: list[torch.UntypedStorage] = []

    @torch.no_grad()
    def take(self) -> Module:
        """Copy the tensors and return the root of the stand-in."""
        tree = list(named_modules(unwrap(self._model)))
        if [(name, id(module)) for name, module in tree] != [(name, id(module)) for name, module in self._tree]:
            self._tree, self._nodes = tree, _skeleton(tree)
        before, self._staged, self.copied = self._staged, {}, []
        if self._device is not None and self._device.type == "cpu" and torch.cuda.is_available():
            before |= self._pinned(before)
        for name, module in tree:
            self._fill(own_buffers(self._nodes[name]), own_buffers(module), before)
        with on_side(self._streams):
            for name, module in tree:
                params = own_params(module)
                self._fill(own_params(self._nodes[name]), params, None if self._device is None else before)
                if self._device is not None:
                    plain = [param for param in params.values() if param is not None and is_plain(param)]
                    self.copied += [param.untyped_storage() for param in plain]
        return self._nodes[""]

    def _fill(self, place: Tensors, tensors: Tensors, before: dict[int, Tensor] | None) -> None:
        """Put ``tensors`` into ``place``; if ``before`` is given, put copies that reuse the memory of those."""
        place.clear()
        for name, tensor in tensors.items():
            place[name] = tensor if tensor is None or before is None else self._copy(tensor, before)

    def _copy(self, tensor: Tensor, before: dict[int, Tensor]) -> Tensor:
        if id(tensor) in self._staged:  # tied
            return self._staged[id(tensor)]
        device = self._device or tensor.device
        if not is_plain(tensor):
            staged = duplicate(tensor).to(device)
        elif (reused := self._copy_of(tensor, before)) is not None:
            staged = reused
        else:
            staged = torch.empty_like(tensor, device=device)
        if isinstance(tensor, Parameter) and not isinstance(staged, Parameter):
            staged = Parameter(staged, requires_grad=False)
        # Of other devices there are no streams and events here that say when the copy has ended.
        copy_into(staged, tensor, non_blocking=tensor.device.type == "cuda")
        self._staged[id(tensor)] = staged
        return staged

    def _copy_of(self, tensor: Tensor, before: Mapping[int, Tensor]) -> Tensor | None:
        """Return that of the copies ``before`` whose memory a copy of ``tensor`` can have, if there is one."""
        staged, device = before.get(id(tensor)), self._device or tensor.device
        if staged is None or (staged.shape, staged.dtype, staged.device) != (tensor.shape, tensor.dtype, device):
            return None
        return staged

    def _pinned(self, before: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return pinned memory for the copies of tensors that have none ``before``, by the id of the original."""
        modules = [module for _, module in self._tree]
        parts = (part for module in modules for part in (own_buffers(module), own_params(module)))
        tensors = {id(each): each for part in parts for each in part.values() if each is not None}
        new = [each for each in tensors.values() if is_plain(each) and self._copy_of(each, before) is None]
        return {id(new[index]): copy for index, copy in pinned_like(new)}


def pinned_like(tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield, by the index of each plain tensor, pinned memory for a copy of it: dense, without values.

    It is a view of a bucket. So torch, which knows a bucket by its storage, does not hand it out again while a GPU
    writes into it.
    """
    for bucket in lay_out([tensor.nbytes for tensor in tensors], [None] * len(tensors), pinned=[None]):
        memory = torch.empty(bucket.numel, dtype=torch.uint8, device="cpu", pin_memory=True)
        for slot in bucket.slots:
            tensor = tensors[slot.index]
            shape, strides = tensor.shape, torch.empty_like(tensor, device="meta").stride()
            flat = memory[slot.offset : slot.offset + slot.numel].view(tensor.dtype)
            yield slot.index, flat.as_strided(shape, strides, flat.storage_offset())


@contextmanager
def on_side(streams: Sequence[torch.cuda.Stream]) -> Iterator[None]:
    """Return a context that launches on these streams, one per GPU, after all work on the current streams."""
    with ExitStack() as entered:
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            entered.enter_context(torch.cuda.stream(stream))
        yield


def _skeleton(tree: list[tuple[str, Module]]) -> dict[str, Module]:
    """Return bare modules in the same tree, by name; a shared module stands under each of its names."""
    by_module: dict[int, Module] = {}
    nodes: dict[str, Module] = {}
    for name, module in tree:
        node = nodes[name] = by_module.setdefault(id(module), Module())
        parent, _, leaf = name.rpartition(".")
        if name:
            own_children(nodes[parent])[leaf] = node
    return nodes
