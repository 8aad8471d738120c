"""The averaging classes of timm, ema-pytorch and diffusers, each with its own defaults, where they are installed.

For bf16 params each keeps a float32 average, in the way its own documentation gives. Their warm-ups are set aside, so
that the weights are known to the gate.
"""

from __future__ import annotations

import importlib
import importlib.util
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.provider import DECAY, Provider, adopt_params


class ThirdParty(Provider):
    """Base: an EMA whose first update copies, from a package that may not be there."""

    param_dtypes = (torch.float32, torch.bfloat16)
    package: ClassVar[str]

    @classmethod
    def missing(cls) -> str | None:
        if importlib.util.find_spec(cls.package) is None:
            return f"no module named {cls.package}"
        try:
            cls.library()
        # A package whose own dependencies are absent or do not match raises whatever it likes.
        except Exception as error:
            return f"does not import: {error}".splitlines()[0]
        return None

    @classmethod
    def library(cls) -> Any:
        return importlib.import_module(cls.package)

    def weight(self, num_averaged: int) -> float:
        return 1.0 if num_averaged == 0 else 1 - DECAY


class TimmEma(ThirdParty):
    name = "timm ModelEmaV3"
    package = "timm"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # The average of bf16 params is a stochastically rounded bf16 by default; dtype gives the float32 one.
        self.ema = self.library().ModelEmaV3(model, decay=DECAY, dtype=torch.float32, exclude_buffers=True)

    @classmethod
    def library(cls) -> ModuleType:
        """Load the one file that is needed: importing all of timm asks for torchvision, which this file does not."""
        package = importlib.util.find_spec("timm")
        if package is None or package.origin is None:
            raise ImportError("timm has no file")
        path = Path(package.origin).parent / "utils" / "model_ema.py"
        spec = importlib.util.spec_from_file_location("timm_model_ema", path)
        if spec is None or spec.loader is None:
            raise ImportError("timm/utils/model_ema.py cannot be loaded")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def update(self) -> None:
        self.ema.update(self.model)

    def weight(self, num_averaged: int) -> float:
        return 1 - DECAY

    def averages(self) -> list[Tensor]:
        return list(self.ema.module.parameters())

    def buffers(self) -> list[Tensor]:
        return list(self.ema.module.buffers())

    def adopt(self, averages: list[Tensor]) -> None:
        adopt_params(self.ema.module, averages)


class EmaPytorch(ThirdParty):
    name = "ema-pytorch EMA"
    package = "ema_pytorch"
    note = "averages float buffers too"
    copies_buffers = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        same = next(model.parameters()).dtype == torch.float32
        self.ema = self.library().EMA(
            model,
            ema_model=None if same else deepcopy(model).float(),
            coerce_dtype=not same,
            beta=DECAY,
            min_value=DECAY,
            update_after_step=0,
            update_every=1,
        )

    def update(self) -> None:
        self.ema.update()

    def averages(self) -> list[Tensor]:
        return list(self.ema.ema_model.parameters())

    def adopt(self, averages: list[Tensor]) -> None:
        adopt_params(self.ema.ema_model, averages)


class DiffusersEma(ThirdParty):
    name = "diffusers EMAModel"
    package = "diffusers"
    note = "leaves buffers out"
    copies_buffers = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.ema = self.library().EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY)
        self.ema.to(dtype=torch.float32)

    @classmethod
    def library(cls) -> ModuleType:
        return importlib.import_module("diffusers.training_utils")

    def update(self) -> None:
        self.ema.step(self.model.parameters())

    def averages(self) -> list[Tensor]:
        return self.ema.shadow_params

    def adopt(self, averages: list[Tensor]) -> None:
        self.ema.shadow_params = averages
