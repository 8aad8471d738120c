"""Reads folders of ``torch.distributed.checkpoint`` as torch does, but unpickles nothing in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from ..strict.distributed_metadata import METADATA_FILE, ChunkedTensor, read_listing
from ..terms.formats import dtype_named
from ..torch_private.distributed import storage_info


class StrictReader(FileSystemReader):
    """Reads the tensors of a folder on this machine. The list of its chunks is read strictly, so no code in it runs.

    Args:
        path: the folder.
        metadata: its list, if it was read before.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Metadata | None = None) -> None:
        super().__init__(path)
        self._folder, self._listed = Path(path), metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the folder has.

        Raises:
            ValueError: ``.metadata`` is missing, damaged, or names globals that it may not.
        """
        if kwargs.get("rank") is not None:
            raise ValueError(f"{self._folder} must have one list of all ranks, got none that can be read")
        if self._listed is None:
            self._listed = read_metadata(self._folder)
        return self._listed

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read tensors into their places.

        Raises:
            ValueError: what is wanted is no tensor there, but a pickle.
        """
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                key = item.storage_index.fqn
                raise ValueError(f"{self._folder} must have a tensor as {key!r}, got an object, which is not unpickled")
        return super().read_data(plan, planner)


def read_metadata(folder: str | os.PathLike[str]) -> Metadata:
    """Return torch's description of the folder of a distributed checkpoint, of which nothing is unpickled.

    Raises:
        ValueError: ``.metadata`` is missing, damaged, or names globals that it may not.
    """
    listing = read_listing(os.path.join(folder, METADATA_FILE))
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for key, entry in listing.entries.items():
        described[key] = BytesStorageMetadata()
        if isinstance(entry, ChunkedTensor):
            chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box, _ in entry.chunks]
            properties = TensorProperties(dtype=dtype_named(entry.dtype))
            described[key] = TensorStorageMetadata(properties, torch.Size(entry.sizes), chunks)
    stored = {
        MetadataIndex(key, offsets if isinstance(listing.entries.get(key), ChunkedTensor) else None): storage_info(
            place.file, place.start, place.nbytes
        )
        for (key, offsets), place in listing.places.items()
    }
    return Metadata(described, storage_data=stored)
