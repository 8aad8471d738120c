"""States of averages in a folder of their own, beside what a framework saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..terms.replacing import replacing
from .weight_average import Contract

FILE = "averaged.pt"  # of averages that each rank has as a whole
SHARDS = "averaged"  # the folder of torch.distributed.checkpoint, of averages that are shards
ATTACHMENT = "attachment.json"  # written last: with it, the state is complete


def write_averages(average: Contract, folder: Path, *, writes: bool) -> None:
    """Write the state of averages and attachment. Collective if the averages are shards.

    Args:
        writes: whether this process writes what all have alike.
    """
    state = average.state()
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ATTACHMENT).unlink(missing_ok=True)  # of a state that is replaced
    if average.holds_shards:
        import torch.distributed.checkpoint as dcp

        dcp.save({"averaged": state["averaged"]}, checkpoint_id=folder / SHARDS)
    elif writes:
        with replacing(folder / FILE) as path:
            torch.save(state["averaged"], path)
    if writes:
        with replacing(folder / ATTACHMENT) as path:
            path.write_text(json.dumps(state["attachment"]))


def resume_from(average: Contract, folder: Path, where: object, *, step: int | None = None) -> None:
    """Load what :func:`write_averages` has written. If there is nothing, warn, and begin a fresh average.

    Averages that are shards also load a state of whole tensors.

    Args:
        where, step: as for :meth:`Contract.resume`.

    Raises:
        ValueError: one half of the state is missing, or it is of shards and the averages are not.
        RuntimeError: it does not fit the averages. Nothing has changed.
    """
    if not folder.exists():
        average.resume(None, where, step=step)
        return
    attachment = json.loads((folder / ATTACHMENT).read_text()) if (folder / ATTACHMENT).exists() else None
    averaged: Any = None
    if (folder / FILE).exists():
        averaged = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    elif (folder / SHARDS).exists():
        if not average.holds_shards:
            raise ValueError(f"sharded must be True, since {where} has averages in shards, got False or 'auto'")
        import torch.distributed.checkpoint as dcp

        read = {"averaged": average.averaged.state_dict()}
        dcp.load(read, checkpoint_id=folder / SHARDS)
        averaged = read["averaged"]
    is_whole = (folder / FILE).exists()
    average.resume({"averaged": averaged, "attachment": attachment}, where, is_whole=is_whole)
