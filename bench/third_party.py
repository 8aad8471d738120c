"""The averaging classes of timm, ema-pytorch and diffusers, where they are installed, each with its own defaults.

For bf16 params each keeps a float32 average, in the way of its own documentation. Their warm-ups are set aside, so that
the gate knows the weights.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from bench.providers import BF16, DECAY, FP32, Ema, OfModule


class ThirdParty(Ema, OfModule):
    """Base: an EMA from a package that may be missing."""

    param_dtypes = (FP32, BF16)
    package: ClassVar[str]
    ema: Any

    @classmethod
    def missing(cls) -> str | None:
        if importlib.util.find_spec(cls.package.partition(".")[0]) is None:
            return f"no module named {cls.package.partition('.')[0]}"
        try:
            cls.library()
        # A package whose own dependencies are absent or do not match raises whatever it likes.
        except Exception as error:
            return f"does not import: {error}".splitlines()[0]
        return None

    @classmethod
    def library(cls) -> Any:
        return importlib.import_module(cls.package)


class TimmEma(ThirdParty):
    name, package = "timm ModelEmaV3", "timm"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # By default the average of bf16 params is bf16, rounded at random. ``dtype`` asks for the float32 one.
        self.ema = self.library().ModelEmaV3(model, decay=DECAY, dtype=FP32, exclude_buffers=True)

    @classmethod
    def library(cls) -> Any:
        """Load the one file that is needed: all of timm imports torchvision, which this file does not."""
        package = importlib.util.find_spec("timm")
        assert package is not None
        assert package.origin is not None
        path = Path(package.origin).parent / "utils" / "model_ema.py"
        spec = importlib.util.spec_from_file_location("timm_model_ema", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def update(self) -> None:
        self.ema.update(self.model)

    def weight(self, num_averaged: int) -> float:
        return 1 - DECAY

    def module(self) -> nn.Module:
        return self.ema.module


class EmaPytorch(ThirdParty):
    name, package = "ema-pytorch EMA", "ema_pytorch"
    note = "averages float buffers too"
    copies_buffers = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        other = None if next(model.parameters()).dtype == FP32 else deepcopy(model).float()
        options: dict[str, Any] = {"beta": DECAY, "min_value": DECAY, "update_after_step": 0, "update_every": 1}
        self.ema = self.library().EMA(model, ema_model=other, coerce_dtype=other is not None, **options)

    def update(self) -> None:
        self.ema.update()

    def module(self) -> nn.Module:
        return self.ema.ema_model


class DiffusersEma(ThirdParty):
    name, package = "diffusers EMAModel", "diffusers.training_utils"
    note = "leaves buffers out"
    copies_buffers = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.ema = self.library().EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY)
        self.ema.to(dtype=FP32)

    def update(self) -> None:
        self.ema.step(self.model.parameters())

    def each(self) -> Iterable[Tensor]:
        return self.ema.shadow_params

    def adopt(self, averages: list[Tensor]) -> None:
        self.ema.shadow_params = averages
