"""What frameworks need before they run on a CPU."""

from __future__ import annotations

import os

import torch

_kept: list[torch.library.Library] = []  # operators go with their library


def shim_torchvision() -> None:
    """Define two operators that a torchvision built for CUDA wants at its import, if torch is built without CUDA."""
    if torch.version.cuda is None and torch.version.hip is None and not _kept:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _kept.append(library)


def stay_offline() -> None:
    """Have no framework ask a server for a model, or report what it does."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
