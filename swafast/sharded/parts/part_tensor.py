"""A rank's part of a tensor, in the form that ``torch.distributed.checkpoint`` (DCP) saves and loads.

DCP calls three methods of such a tensor (``torch.distributed._checkpointable``): one returns what to write, one the
boxes to read, and one the view of a box.
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

#: Operators that are applied to the run.
_ON_THE_RUN = frozenset(
    {aten.detach.default, aten.clone.default, aten._to_copy.default, aten.empty_like.default, aten.zeros_like.default}
)

#: Functions that bypass ``__torch_dispatch__`` and would read memory, of which a wrapper has none.
_PAST_DISPATCH = frozenset(
    {
        *(Tensor.__array__, Tensor.__dlpack__, Tensor.numpy, Tensor.share_memory_, Tensor.storage, Tensor.tolist),
        Tensor.untyped_storage,
    }
)


class PartTensor(Tensor):
    """This rank's part of a tensor that is cut in a flat order, with the whole shape but only the data of some boxes.

    It is for checkpoints only: it can be saved, loaded into, copied and moved, and nothing else.

    Args:
        run: (n,) contiguous, with its own storage: exactly the elements of the boxes.
        shape: the shape of the whole tensor.
        boxes: the boxes of this rank, each viewed by ``box.of_run(run)``; none if the rank has no part.

    Raises:
        TypeError: ``run`` is not a plain tensor.
        ValueError: ``run`` or ``boxes`` are not as above.
    """

    run: Tensor  # (n,)
    boxes: tuple[Box, ...]

    @staticmethod
    def __new__(cls: type[PartTensor], run: Tensor, shape: Sequence[int], boxes: Sequence[Box]) -> PartTensor:
        _check_run(run)
        _check_boxes(boxes, shape, run.numel())
        part = make_wrapper(cls, tuple(shape), dtype=run.dtype, device=run.device)
        # Keep both in __dict__ for the life of the part: torch's stager copies __dict__ and remembers objects by id.
        part.run = run
        part.boxes = tuple(boxes)
        return part

    def parts(self) -> list[tuple[Box, Tensor]]:
        """Return each box with the view of its elements."""
        return [(box, box.of_run(self.run)) for box in self.boxes]

    def _with_run(self, run: Tensor) -> PartTensor:
        return PartTensor(run, self.shape, self.boxes)

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        """Return DCP's write items under the name ``fqn``, one per box."""
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
        """Return this rank's boxes for DCP."""
        if self.numel() == 0:
            # No rank has a box of an empty tensor, but the checkpoint needs the key. So every rank returns the same
            # empty box, and DCP writes it once.
            return [ChunkStorageMetadata(torch.Size([0] * self.dim()), self.shape)]
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Return the view of a box by its offsets, for DCP.

        Raises:
            ValueError: no box of this rank has these offsets.
        """
        # Ignore ``index.index``: in a save it counts the boxes of all ranks, in a load those of this rank.
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
        # Call Tensor's, without the subclass: otherwise every result would become a PartTensor without boxes.
        return Tensor.__torch_function__(func, (), args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has no cls
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A 1-D run has no memory format.
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

    def __repr__(self) -> str:  # type: ignore[override]  # it takes no arguments
        return (
            f"PartTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', "
            f"{self.run.numel()} of {self.numel()} elements, in {len(self.boxes)} boxes)"
        )


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"{what}: a PartTensor is only for torch.distributed.checkpoint. Read this rank's elements from its attribute "
        "`run`, or box by box from its `parts()`, or get plain tensors from full_state_dict()"
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
    # BlockingAsyncStager makes a plain tensor of a 0-dimensional one, and in torch 2.7 of every tensor.
    _refuse(f"copy_ of {source_is} into {target_is} (in async_save, use DefaultStager or one that deep-copies)")


def _check_run(run: Tensor) -> None:
    if type(run) is not Tensor:
        raise TypeError(f"run must be a plain tensor, got {type(run).__name__}")
    if run.dim() != 1 or not run.is_contiguous():
        raise ValueError(f"run must be 1-D and contiguous, got shape {tuple(run.shape)}, strides {run.stride()}")
    storage_nbytes = run.untyped_storage().nbytes()
    # A stager copies whole storages, so a view of a bucket would copy the bucket.
    if storage_nbytes != run.nbytes:
        raise ValueError(
            f"run must be a tensor with its own storage, got {run.nbytes} of {storage_nbytes} bytes: pass run.clone()"
        )


def _check_boxes(boxes: Sequence[Box], shape: Sequence[int], numel: int) -> None:
    for box in boxes:
        if len(box.offsets) != len(shape) or any(
            offset < 0 or size < 1 or offset + size > extent
            for offset, size, extent in zip(box.offsets, box.sizes, shape, strict=True)
        ):
            raise ValueError(f"boxes must have at least one element each and lie in {tuple(shape)}, got {box}")
        if box.start < 0 or box.start + box.numel > numel:
            raise ValueError(f"boxes must lie within the run's {numel} elements, got {box}")
    total = sum(box.numel for box in boxes)
    if total != numel:
        raise ValueError(f"boxes must have the run's {numel} elements, got {total}")


def _reduce(part: PartTensor) -> tuple[Any, ...]:
    # Sending a tensor moves its storage into shared memory. A storage that is a slice of a bucket would then leave the
    # bucket, so send a copy. A stager's copies are in shared memory already, or cheap to copy.
    run = part.run if part.run.is_shared() else part.run.clone()
    return PartTensor, (run, tuple(part.shape), part.boxes)


# For pipes between processes only, such as to DCP's checkpoint process. torch.save calls __reduce_ex__ instead.
ForkingPickler.register(PartTensor, _reduce)
