"""What frameworks need before they run on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch

_kept: list[torch.library.Library] = []  # operators go with their library


def shim_torchvision() -> None:
    """Define two operators that a torchvision built for CUDA wants at its import, if torch is built without CUDA."""
    if torch.version.cuda is None and torch.version.hip is None and not _kept:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _kept.append(library)


def shim_fsdp1() -> None:
    """Have FSDP1 keep a flat param that it moves to the CPU for a whole state, if it is there: else it frees it."""
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    moves = FlatParamHandle.to_cpu
    if moves.__module__ != __name__:
        setattr(FlatParamHandle, "to_cpu", _to_cpu(moves))  # noqa: B010  # mypy sees a method


def _to_cpu(moves: Callable[..., AbstractContextManager[None]]) -> Callable[..., AbstractContextManager[None]]:
    def to_cpu(handle: Any) -> AbstractContextManager[None]:
        return nullcontext() if handle.flat_param.device.type == "cpu" else moves(handle)

    return to_cpu


def shim_deepspeed() -> None:
    """Have DeepSpeed run on the CPU, and build no operator of its own for gloo."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # it reads this at its import
    backend: Any = import_module("deepspeed.comm.torch")  # as an attribute, that name is torch
    backend.build_shm_op = lambda: None


def stay_offline() -> None:
    """Have no framework ask a server for a model, report what it does, or look for a GPU."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
