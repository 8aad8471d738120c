"""timm's `ModelEmaV3`, updated in one fused pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module

from ..average.averaged_model import FusedAveragedModel
from ..terms.formats import HALF
from ..terms.rules import ExponentialAverage, FixedWeight, Rule, raised_to
from ..torch_private.modules import metadata_of, named_tensors, set_metadata
from .installed import explained, framework

framework("timm", "1.0.9")

__getattr__ = explained(__name__)

#: In a state's metadata, which timm's class takes no notice of: the number of models in the average.
_COUNT = "num_averaged"
_FORMATS = {torch.float32: "float32", torch.bfloat16: "exact", torch.float16: "mirrored"}
#: The attributes from which a decay follows. They may be set at any time, as in timm.
_OF_DECAYS = ("decay", "min_decay", "use_warmup", "warmup_gamma", "warmup_power")


class ModelEma(FusedAveragedModel):
    """timm's ``ModelEmaV3`` with the same arguments, methods and states: replace its import.

    ``update`` is one fused pass, with ``foreach`` and without, and equals timm's bit for bit for a float32 model.
    Averages of a bfloat16 model are rounded at random, as timm's, with other random bits. With
    ``stochastic_rounding=False`` torch rounds them to the nearest, as timm does: they have its bits, and stand still at
    a decay near 1. If the model has floats of another dtype too, or ``dtype`` differs from its dtype, bfloat16 averages
    keep a remainder in the state: they have other bits and further keys. ``format="exact"`` asks for a remainder, and
    averages of a float16 model have one.

    Tensors are matched by name, and a difference is an error. timm's class goes by their order. It moves a tensor that
    has two names twice in each update, unless ``exclude_buffers`` is set; here each tensor moves once.

    Args:
        model, decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power, device: as in timm.
        dtype: of the averaged module: float32, bfloat16 or float16; default: the model's.
        stochastic_rounding, stochastic_rounding_seed: how bfloat16 averages are rounded.
        foreach: has no effect.
        exclude_buffers: copy buffers instead of averaging them.
        format: as of :class:`~swafast.FusedAveragedModel`, instead of what ``dtype`` and the rounding ask for.

    Raises:
        TypeError, ValueError, NotImplementedError: as of :class:`~swafast.FusedAveragedModel`.

    Example::

        ema = ModelEma(model, decay=0.9998, use_warmup=True)
        for step, batch in enumerate(loader, 1):
            train_step(model, batch)
            ema.update(model, step=step)
        evaluate(ema.module)
    """

    decay: float
    min_decay: float
    use_warmup: bool
    warmup_gamma: float
    warmup_power: float
    update_after_step: int
    _rounds_to_nearest: bool  # averages in bfloat16, as timm's without random rounding

    def __init__(
        self,
        model: Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: Any = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
        *,
        format: str | None = None,
        backend: str | None = None,
    ) -> None:
        if dtype is not None and dtype not in _FORMATS:
            raise ValueError(f"dtype must be torch.float32, bfloat16, float16 or None, got {dtype}")
        settings = dict(zip(_OF_DECAYS, (decay, min_decay, use_warmup, warmup_gamma, warmup_power), strict=True))
        dtypes, rule = _dtypes_of(model, dtype), _rule_of(settings)
        is_half = format is None and dtypes == {torch.bfloat16}
        # Of a model in another dtype, bfloat16 averages need a format of their own.
        self.__dict__["_rounds_to_nearest"] = is_half and not stochastic_rounding and _dtypes_of(model) == dtypes
        if is_half and stochastic_rounding:
            format = HALF.name
        elif format is None and dtype is not None and not self._rounds_to_nearest:
            format = _FORMATS[dtype]
        super().__init__(
            model,
            device,
            use_buffers=not exclude_buffers,
            multi_avg_fn=self._moving_by(rule),
            format=format,
            backend=backend,
            seed=stochastic_rounding_seed,
            num_averaged=1,  # timm's averages begin as the initial model
        )
        self.module.eval()
        self.__dict__.update(settings)
        self.update_after_step, self.exclude_buffers, self.foreach = update_after_step, exclude_buffers, foreach
        self.device, self.dtype = device, dtype
        self.stochastic_rounding, self.stochastic_rounding_seed = stochastic_rounding, stochastic_rounding_seed

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_DECAYS:
            settings = {each: self.__dict__[each] for each in _OF_DECAYS} | {name: value}
            self.multi_avg_fn = self._moving_by(_rule_of(settings))  # of an attachment; it refuses what is no decay
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def get_decay(self, step: int | None = None) -> float:
        """Return the share that the average keeps at this step: ``decay`` without one, 0 until averaging begins."""
        if step is None:
            return self.decay
        count = self._count_at(step)
        if not count:
            return 0.0
        if not self.use_warmup:
            return self.decay
        # timm's operations in their order, so that the weight has the same bits.
        warmed: float = 1 - (1 + count / self.warmup_gamma) ** -self.warmup_power
        return max(min(warmed, self.decay), self.min_decay)

    def _count_at(self, step: int) -> int:
        """Return how many models are in the average before the update of this step."""
        return max(0, step - self.update_after_step - 1)

    def update(self, model: Module, step: int | None = None) -> None:
        """Move the averages towards ``model``. Up to step ``update_after_step + 1`` they are copies of it.

        Args:
            step: the number of this update in the training, from 1. Without it the decay is ``decay``, even with
                ``use_warmup``, as in timm.

        Raises:
            TypeError, ValueError, RuntimeError: as ``update_parameters``; nothing has changed.
        """
        with self._weighing(1.0 - self.get_decay(step)):
            self.update_parameters(model)
        if step is not None:
            self.n_averaged.fill_(self._count_at(step) + 1)

    def set(self, model: Module) -> None:
        """Replace the averages by ``model``.

        Raises:
            TypeError, ValueError, RuntimeError: as ``update_parameters``; nothing has changed.
        """
        with self._weighing(1.0):
            self.update_parameters(model)
        self.n_averaged.fill_(1)

    @contextmanager
    def _weighing(self, weight: float) -> Iterator[None]:
        """Have updates in the body move by this weight."""
        before = self.multi_avg_fn if self.rule is None else self.rule
        self.multi_avg_fn = self._moving_by(FixedWeight(weight))
        try:
            yield
        finally:
            self.multi_avg_fn = before

    def _moving_by(self, rule: Rule) -> Callable[..., None]:
        """Return what moves the averages: the rule, or a function with torch's own arithmetic, in their dtype."""
        return rule.__call__ if self._rounds_to_nearest else rule

    # States

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state under timm's keys, and the further planes of a format that has some.

        The number of models is in its metadata.
        """
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        count, metadata = state.pop(f"{prefix}n_averaged", None), metadata_of(state)
        if count is not None and metadata is not None:
            metadata.setdefault(prefix[:-1], {})[_COUNT] = int(count)
            set_metadata(state, metadata)
        return state

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        # An average without a model would be overwritten by the next update, which timm's is not.
        given = state_dict.get(f"{prefix}n_averaged")
        count = int(given) if given is not None else int(local_metadata.get(_COUNT, 1))
        state_dict[f"{prefix}n_averaged"] = torch.tensor(max(1, count), device=self.n_averaged.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def _rule_of(settings: Mapping[str, Any]) -> Rule:
    """Return the rule of updates without a step, such as those of an attachment.

    Each setting is checked for itself, so they may be set in any order.
    """
    if not settings["use_warmup"]:
        return ExponentialAverage(settings["decay"])
    rule = ExponentialAverage(settings["decay"], "power", settings["warmup_gamma"], settings["warmup_power"])
    return raised_to(settings["min_decay"], rule)


def _dtypes_of(model: Module, dtype: torch.dtype | None = None) -> set[torch.dtype]:
    """Return the dtypes of a model's floating-point tensors, or of its averages in a module of ``dtype``."""
    if not isinstance(model, Module):
        return set()  # refused with a message of its own
    tensors = (tensor for buffers in (False, True) for _, tensor in named_tensors(model, buffers=buffers))
    return {dtype or tensor.dtype for tensor in tensors if tensor.is_floating_point()}
