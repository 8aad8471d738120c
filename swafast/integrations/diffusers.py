"""`EMAModel` of diffusers, updated in one fused pass."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..terms import hints
from ..terms.converting import convert, full_precision
from ..terms.formats import format_of_planes
from .installed import explained, framework
from .param_lists import PositionalAverages, own_format

framework("diffusers", "0.30")
_theirs: Any = importlib.import_module("diffusers.training_utils")
_Theirs: Any = _theirs.EMAModel
_ARGUMENTS = inspect.signature(_Theirs.__init__).parameters.keys() - {"self", "kwargs"}

__getattr__ = explained(__name__)

#: The key of the further planes in a state. diffusers' class takes no notice of it.
_FURTHER = "swafast_planes"


class EMAModel(_Theirs):
    """diffusers' ``EMAModel`` with the same arguments, attributes, methods, states and files: replace its import.

    A step is one fused pass, with ``foreach`` and without. ``shadow_params`` of bfloat16 and float16 keep a remainder
    beside them, so their averages are those of float32. diffusers' own stand still at a decay near 1. ``state_dict``
    has the remainders under a key of its own.

    A list of another length or with other shapes is an error. diffusers' class stops at the end of the shorter one.

    What no kernel takes, such as a ``DTensor`` or the partitioned parameters of DeepSpeed's ZeRO-3, is updated by
    diffusers' own code, as before.

    Raises:
        TypeError: ``parameters`` holds something else than tensors, or an argument is none of diffusers' class.
        ValueError: it is empty, as an iterator is after its first use; or ``decay`` is not in [0, 1].

    Example::

        ema = EMAModel(unet.parameters(), decay=0.9999, model_cls=UNet2DModel, model_config=unet.config)
        for batch in loader:
            train_step(unet, batch)
            ema.step(unet.parameters())
        ema.save_pretrained("unet_ema")
    """

    shadow_params: list[Tensor]
    temp_stored_params: list[Tensor] | None
    optimization_step: int
    _shows_further = True  # in states

    def __init__(self, parameters: Iterable[Tensor] | Module, *args: Any, **kwargs: Any) -> None:
        self._positional = PositionalAverages()
        if "rule" in kwargs:
            decay = getattr(kwargs["rule"], "decay", 0.9999)
            raise TypeError(f"EMAModel() takes no rule, as diffusers' class: write EMAModel(parameters, decay={decay})")
        # diffusers takes any name, and these are those that it reads.
        hints.refuse_others(_Theirs.__init__, kwargs, {*_ARGUMENTS, "max_value", "min_value", "device"})
        if not isinstance(parameters, Module):
            parameters = _tensors(parameters)
        super().__init__(parameters, *args, **kwargs)
        _check_decay(self.decay)

    def __repr__(self) -> str:
        tensors = f"{len(self.shadow_params)} tensors of {sum(each.numel() for each in self.shadow_params):,} elements"
        return f"EMAModel(decay={self.decay}, optimization_step={self.optimization_step}, {tensors})"

    # The average

    @torch.no_grad()
    def step(self, parameters: Iterable[Tensor] | Module) -> None:
        """Move the averages towards ``parameters``, and count the step. Those that are not trained are copied.

        Raises:
            TypeError, ValueError: ``parameters`` do not fit ``shadow_params``, and nothing has changed.
            NotImplementedError: a parameter that is trained has a dtype that cannot be averaged.
            RuntimeError: averages of swafast are swapped into the model, or a CUDA graph is being captured.
        """
        if isinstance(parameters, Module):
            _theirs.deprecate(
                "passing a `torch.nn.Module` to `ExponentialMovingAverage.step`",
                "1.0.0",
                "Pass model.parameters() to step instead of the model.",
                standard_warn=False,
            )
            parameters = parameters.parameters()
        params = _tensors(parameters)
        self._check_count(params)
        step = self.optimization_step + 1
        decay = self.get_decay(step)
        _check_decay(decay)
        if _is_zero3() or not self._positional.update(params, self.shadow_params, 1 - decay):
            self._positional.put_further([], [])  # they would not follow
            super().step(params)
        self.optimization_step, self.cur_decay_value = step, decay

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Tensor]) -> None:
        """Copy the averages into ``parameters``. Each is rounded once.

        Raises:
            TypeError, ValueError: ``parameters`` do not fit ``shadow_params``, and nothing has changed.
        """
        params = _tensors(parameters)
        self._check_fit(params, self.shadow_params)
        alike: list[tuple[Tensor, Tensor]] = []
        for param, planes in zip(params, self._each_planes(), strict=True):
            average = planes[0]
            if len(planes) > 1 and param.dtype != average.dtype:
                convert(planes, own_format(average), (param.data,), None)
            else:
                alike.append((param.data, average))
        _copy_all(alike)

    @torch.no_grad()
    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Put back what :meth:`store` has kept, and free it.

        Raises:
            TypeError, ValueError: ``parameters`` are others than those that were stored, and nothing has changed.
            RuntimeError: nothing was stored.
        """
        params, stored = _tensors(parameters), self.temp_stored_params
        if stored is None:
            raise RuntimeError("restore must have parameters to put back, got none: call store(parameters) first")
        self._check_fit(params, stored)
        _copy_all([(param.data, kept) for param, kept in zip(params, stored, strict=True)])
        self.temp_stored_params = None

    # Where it is

    def to(self, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False) -> None:
        """Move the averages, or cast them at full precision."""
        planes = self._each_planes()
        super().to(device=device, dtype=dtype, non_blocking=non_blocking)
        further: list[tuple[Tensor, ...]] = []
        for index, (average, *rest) in enumerate(planes):
            moved = self.shadow_params[index]
            if rest and moved.dtype != average.dtype:
                full = full_precision((average, *rest), own_format(average))
                self.shadow_params[index] = full.to(device, dtype, non_blocking=non_blocking)
                rest = []
            further.append(tuple(plane.to(device, non_blocking=non_blocking) for plane in rest))
        self._positional.put_further(self.shadow_params, further)

    def pin_memory(self) -> None:
        """Move the averages into pinned memory of the host."""
        planes = self._each_planes()
        super().pin_memory()
        further = [tuple(plane.pin_memory() for plane in rest) for _, *rest in planes]
        self._positional.put_further(self.shadow_params, further)

    # States

    def state_dict(self) -> dict[str, Any]:
        """Return diffusers' state, and the remainders of averages that have some."""
        state: dict[str, Any] = super().state_dict()
        planes = self._each_planes()
        if self._shows_further and any(len(each) > 1 for each in planes):
            state[_FURTHER] = [_named(each) for each in planes]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class or of diffusers': all of it, or nothing has changed.

        Raises:
            ValueError: a value is none that this class can have; or the averages are those of another model.
        """
        state = dict(state_dict)
        given = state.pop(_FURTHER, None)
        probe = _Theirs.__new__(_Theirs)  # diffusers' checks write as they go, so they run on an object of their own
        probe.__dict__.update({**self.__dict__, "shadow_params": None})
        _Theirs.load_state_dict(probe, state)
        _check_decay(probe.decay)
        averages = probe.shadow_params
        if averages is not None:
            self._check_state(averages)
            self._positional.put_further(averages, _checked_further(averages, given))
        self.__dict__.update({**probe.__dict__, "shadow_params": averages or self.shadow_params})

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Write the averages as a model of ``model_cls``, and the settings into its ``config.json``."""
        self._shows_further = False  # a config holds no tensors
        try:
            super().save_pretrained(path)
        finally:
            del self._shows_further

    # What it is made of

    def _each_planes(self) -> list[tuple[Tensor, ...]]:
        further = self._positional.further(self.shadow_params)
        return [(average, *rest) for average, rest in zip(self.shadow_params, further, strict=True)]

    def _check_count(self, params: Sequence[Tensor], wanted: Sequence[Tensor] | None = None) -> None:
        count = len(self.shadow_params if wanted is None else wanted)
        if len(params) != count:
            raise ValueError(
                f"parameters must be the {count} tensors that are averaged, got {len(params)}: pass "
                "model.parameters() of the same model"
            )

    def _check_fit(self, params: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
        self._check_count(params, wanted)
        for index, (param, average) in enumerate(zip(params, wanted, strict=True)):
            if param.shape != average.shape:
                raise ValueError(
                    f"parameters[{index}] must have the average's shape {tuple(average.shape)}, got "
                    f"{tuple(param.shape)}: pass model.parameters() of the same model"
                )

    def _check_state(self, averages: Sequence[Tensor]) -> None:
        """Raise ValueError unless averages of a state are of this model, as far as shapes can tell."""
        before = [tuple(average.shape) for average in self.shadow_params]
        after = [tuple(average.shape) for average in averages]
        if len(before) != len(after):
            raise ValueError(f"shadow_params must have {len(before)} tensors, got {len(after)}: a state of this model")
        for index, (own, other) in enumerate(zip(before, after, strict=True)):
            if own != other:
                raise ValueError(
                    f"shadow_params[{index}] must have the shape {own}, got {other}: load a state of this model, with "
                    "its parameters in the same order"
                )


def _tensors(parameters: Any) -> list[Tensor]:
    """Return the tensors of an iterable, or raise."""
    if isinstance(parameters, (Tensor, Mapping, Module)):
        raise TypeError(f"parameters must be model.parameters(), got a {type(parameters).__name__}")
    tensors = [*parameters]
    if not tensors:
        raise ValueError("parameters must hold tensors, got none: call model.parameters() anew for each use")
    for each in tensors if not {*map(type, tensors)} <= {Parameter, Tensor} else ():
        if not isinstance(each, Tensor):
            raise TypeError(f"parameters must hold tensors alone, got a {type(each).__name__}: pass model.parameters()")
    return tensors


def _check_decay(decay: float) -> None:
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must be in [0, 1], the share that the old average keeps, got {decay}")


def _is_zero3() -> bool:
    """Return whether DeepSpeed partitions params. Only transformers' module can have told so."""
    deepspeed = sys.modules.get("transformers.integrations.deepspeed")
    return deepspeed is not None and bool(deepspeed.is_deepspeed_zero3_enabled())


def _copy_all(writes: Sequence[tuple[Tensor, Tensor]]) -> None:
    near = [pair for pair in writes if pair[0].device == pair[1].device]
    if near:
        torch._foreach_copy_([target for target, _ in near], [source for _, source in near])
    for target, source in writes:  # one by one, so that no device holds a second copy of all
        if target.device != source.device:
            target.copy_(source)


def _named(planes: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the further planes of an average by name."""
    fmt = own_format(planes[0])
    return {name: plane for (name, _), plane in zip(fmt.extra if fmt else (), planes[1:], strict=False)}


def _checked_further(averages: Sequence[Tensor], given: Any) -> list[tuple[Tensor, ...]]:
    """Return copies of the further planes in a state, or raise ValueError if they are not those of the averages."""
    if given is None:
        return [()] * len(averages)
    if len(given) != len(averages):
        raise ValueError(f"{_FURTHER} must have {len(averages)} entries, one for each average, got {len(given)}")
    further = []
    for index, (average, named) in enumerate(zip(averages, given, strict=True)):
        fmt = own_format(average)
        if named and (fmt is None or format_of_planes(average, named) is not fmt):
            raise ValueError(f"{_FURTHER}[{index}] must be of shadow_params[{index}], got {', '.join(named)}")
        further.append(tuple(named[name].clone() for name, _ in fmt.extra) if fmt is not None and named else ())
    return further
