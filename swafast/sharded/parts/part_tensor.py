"""A rank's part of a tensor, in the form that ``torch.distributed.checkpoint`` (DCP) saves and loads.

DCP asks a tensor for what it holds by three methods (``torch.distributed._checkpointable``): what to write, which boxes
there are to read into, and the tensor of one box.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ...terms.boxes import Box
from ...torch_private.core import make_wrapper

aten = torch.ops.aten

#: What is done to a part by doing it to its run.
_ON_THE_RUN = frozenset(
    {aten.detach.default, aten.clone.default, aten._to_copy.default, aten.empty_like.default, aten.zeros_like.default}
)

#: What never reaches ``__torch_dispatch__`` and would read the memory that a wrapper does not have.
_PAST_DISPATCH = frozenset(
    {
        *(Tensor.__array__, Tensor.__dlpack__, Tensor.numpy, Tensor.share_memory_, Tensor.storage, Tensor.tolist),
        Tensor.untyped_storage,
    }
)


class PartTensor(Tensor):
    """This rank's part of a tensor that is cut along a flat order: the shape of the whole, the data of a few boxes.

    For checkpoints only: it can be saved, loaded into, copied and moved, and nothing else.

    Args:
        run: (n,) contiguous, with a storage of its own: the elements of the boxes, none besides.
        shape: of the whole tensor.
        boxes: of this rank, each viewed by ``box.of_run(run)``; none where the rank has no part.

    Raises:
        TypeError: ``run`` is not a plain tensor.
        ValueError: ``run`` or ``boxes`` differ from the above.
    """

    run: Tensor  # (n,)
    boxes: tuple[Box, ...]

    @staticmethod
    def __new__(cls: type[PartTensor], run: Tensor, shape: Sequence[int], boxes: Sequence[Box]) -> PartTensor:
        _check_run(run)
        _check_boxes(boxes, shape, run.numel())
        part = make_wrapper(cls, tuple(shape), dtype=run.dtype, device=run.device)
        # In __dict__, and as objects that live as long as the part: torch's stager copies what it finds there, and
        # remembers it by its id.
        part.run = run
        part.boxes = tuple(boxes)
        return part

    def parts(self) -> list[tuple[Box, Tensor]]:
        """Give each box with the view of its elements."""
        return [(box, box.of_run(self.run)) for box in self.boxes]

    def _with_run(self, run: Tensor) -> PartTensor:
        return PartTensor(run, self.shape, self.boxes)

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        """Give DCP what to write under the name ``fqn``: one item a box."""
        properties = TensorProperties.create_from_tensor(self.run)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Give DCP the boxes that are here."""
        if self.numel() == 0:
            # No rank has a box of an empty tensor, and still a checkpoint must know it, or it loads as a missing key.
            # So every rank has the same one, of which DCP writes one.
            return [ChunkStorageMetadata(torch.Size([0] * self.dim()), self.shape)]
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Give DCP the view of a box, by its offsets.

        Raises:
            ValueError: no box of this rank begins there.
        """
        # The hint ``index.index`` counts boxes of all ranks when it comes from a save, and of this one from a load.
        if self.numel() == 0:
            return self.run.view(self.shape)
        for box, view in self.parts():
            if index.offset is not None and box.offsets == tuple(index.offset):
                return view
        here = [box.offsets for box in self.boxes]
        wanted = None if index.offset is None else tuple(index.offset)
        raise ValueError(f"offset of '{index.fqn}' must be that of a box of this rank {here}, got {wanted}")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PAST_DISPATCH:
            _refuse(func.__name__)
        # As plain tensors have it: a subclass's own would make every result a PartTensor, without boxes.
        return Tensor.__torch_function__(func, (), args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has no cls
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A run is 1-D: it has no memory format to change.
        options = {name: value for name, value in (kwargs or {}).items() if name != "memory_format"}
        if func in _ON_THE_RUN:
            return args[0]._with_run(func(args[0].run, **options))
        if func is aten.new_empty.default and tuple(args[1]) == tuple(args[0].shape):
            return args[0]._with_run(args[0].run.new_empty(args[0].run.shape, **options))
        if func is aten.copy_.default:
            return _copy(*args, **options)
        return _refuse(str(func))

    def __deepcopy__(self, memo: dict[int, Any]) -> PartTensor:
        return self._with_run(copy.deepcopy(self.run, memo))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("pickle, torch.save, copy.copy")

    def __repr__(self) -> str:  # type: ignore[override]  # there is nothing to pass
        return (
            f"PartTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', "
            f"{self.run.numel()} of {self.numel()} elements, in {len(self.boxes)} boxes)"
        )


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"{what}: a PartTensor holds part of a tensor, for torch.distributed.checkpoint; the elements that are here "
        "are its attribute `run`, box by box its `parts()`, and full_state_dict() gives plain tensors"
    )


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, PartTensor) and isinstance(source, PartTensor):
        if target.shape == source.shape and target.boxes == source.boxes:
            target.run.copy_(source.run, non_blocking)
            return target
    elif isinstance(source, PartTensor) and source.run.numel() == source.numel() and source.shape == target.shape:
        for box, view in source.parts():
            box.of_whole(target).copy_(view, non_blocking)
        return target
    source_is, target_is = (repr(x) if isinstance(x, PartTensor) else "a plain tensor" for x in (source, target))
    # BlockingAsyncStager makes a plain tensor for one of 0 dimensions, and torch 2.7's for every one.
    _refuse(f"copy_ of {source_is} into {target_is} (in async_save: take DefaultStager, or one that deep-copies)")


def _check_run(run: Tensor) -> None:
    if type(run) is not Tensor:
        raise TypeError(f"run must be a plain tensor, got {type(run).__name__}")
    if run.dim() != 1 or not run.is_contiguous():
        raise ValueError(f"run must be 1-D and contiguous, got shape {tuple(run.shape)}, strides {run.stride()}")
    storage_nbytes = run.untyped_storage().nbytes()
    # A stager copies storages whole, and a view of a bucket would take the bucket along.
    if storage_nbytes != run.nbytes:
        raise ValueError(
            f"run must be a tensor with a storage of its own, got {run.nbytes} of a storage's {storage_nbytes} bytes"
        )


def _check_boxes(boxes: Sequence[Box], shape: Sequence[int], numel: int) -> None:
    for box in boxes:
        if len(box.offsets) != len(shape) or any(
            offset < 0 or size < 1 or offset + size > extent
            for offset, size, extent in zip(box.offsets, box.sizes, shape, strict=True)
        ):
            raise ValueError(f"boxes must be boxes of at least one element in {tuple(shape)}, got {box}")
        if box.start < 0 or box.start + box.numel > numel:
            raise ValueError(f"boxes must lie within the run's {numel} elements, got {box}")
    total = sum(box.numel for box in boxes)
    if total != numel:
        raise ValueError(f"boxes must have the run's {numel} elements, got {total}")


def _reduce(part: PartTensor) -> tuple[Any, ...]:
    # Sending a tensor moves its storage into shared memory. A storage that is a slice of another would leave it by
    # that, and an average's state would no longer be the average's; a stager's copies are shared already, or cheap.
    run = part.run if part.run.is_shared() else part.run.clone()
    return PartTensor, (run, tuple(part.shape), part.boxes)


# Between processes only: DCP's checkpoint process gets what is staged through a pipe. torch.save asks __reduce_ex__.
ForkingPickler.register(PartTensor, _reduce)
