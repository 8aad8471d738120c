"""What frameworks need before they run on a CPU."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

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
        "YOLO_OFFLINE": "true",
        "YOLO_AUTOINSTALL": "false",
        "YOLO_VERBOSE": "false",
        "YOLO_CONFIG_DIR": tempfile.mkdtemp(),
    }


def shim_megatron() -> None:
    """Have Megatron take the CPU for the GPU that it asks for by name. For a process of its own: it changes torch."""
    cpu, kind = torch.device("cpu"), torch.Tensor.type
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    for name in ("tensor", "zeros"):
        setattr(torch, name, _on_the_cpu(getattr(torch, name)))

    def named_cuda(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        of_dtype = kind(tensor, *args, **options)
        return of_dtype if args or options else of_dtype.replace("torch.", "torch.cuda.")

    torch.Tensor.type = named_cuda  # type: ignore[assignment]


def _on_the_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, **options: Any) -> torch.Tensor:
        return make(*args, **{name: value for name, value in options.items() if (name, value) != ("device", "cuda")})

    return made


def shim_torchtitan() -> None:
    """Have torchtitan train on CPUs: it asks for the accelerator at its import, and takes none for CUDA.

    Its release 0.3 is made for a later torch than 2.13, which lacks one function.
    """
    if not hasattr(torch.distributed, "set_timeout"):
        from torch.distributed.distributed_c10d import _set_pg_timeout

        setattr(torch.distributed, "set_timeout", _set_pg_timeout)  # noqa: B010  # mypy knows no such name
    with (
        mock.patch("torch._utils._get_available_device_type", return_value="cpu"),
        mock.patch("torch._utils._get_device_module", return_value=Cpu),
    ):
        import torchtitan.trainer

    class Time:
        """Its Trainer sleeps at the end, while other ranks end."""

        perf_counter = staticmethod(time.perf_counter)
        sleep = staticmethod(lambda seconds: None)

    torchtitan.trainer.time = Time


class Cpu:
    """The CPU as a module such as ``torch.cuda``, for torchtitan."""

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_device_name(device: object) -> str:
        return "CPU"

    @staticmethod
    def get_device_properties(device: object) -> SimpleNamespace:
        return SimpleNamespace(total_memory=1)

    @staticmethod
    def memory_stats(device: object) -> dict[str, int]:
        return {}

    @staticmethod
    def set_device(device: object) -> None:
        """Do nothing: there is one."""

    reset_peak_memory_stats = empty_cache = synchronize = staticmethod(lambda *_: None)
