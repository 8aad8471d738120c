"""SWALP: training in a few bits, by hooks on the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..loop.attachment import Attachment, check_step, wait_for_readers
from ..loop.hookable import check_optimizers
from ..loop.roster import state_holder
from ..op.checks import checked_bool, checked_seed
from ..terms.copying import overlaps_itself
from ..terms.lazy import Checked
from ..terms.pickling import pickled_from
from ..terms.warn import warn_user
from ..torch_private.optimizers import is_making_state, is_step, owners_of_step_hooks
from .block import Noise, block_quantize, check_real, checked_bits, checked_rounding

#: Keys in the optimizer's state of a param: a full-precision accumulator, and the weights that a step made of it.
ACCUMULATOR, WRITTEN = "accumulator", "quantised"


class LowPrecision:
    """Train with weights, gradients, momentum and accumulator of a few bits: the steps of SWALP.

    Hooks on the optimizer quantise the gradients before each of its steps, and the momentum and the weights after it,
    by :func:`~swafast.optim.block_quantize`, in place. The step itself computes in the params' dtype. The paper's
    accumulator is what the step adds to. It has ``bits`` bits too, and then it is the weights themselves; or it keeps
    full precision, in the optimizer's state, and the weights are made of it anew after each step.

    Make it after the optimizer and before ``attach``, so that averages get the quantised weights. Activations and
    errors are rounded by :class:`~swafast.optim.BlockRounding` in the model. Params without a gradient are left as they
    are. Of the optimizer's state, ``momentum_buffer`` is quantised, which SGD, RMSprop and Muon have. It simulates:
    tensors keep their dtype and memory, and the device is not waited for. A copy or pickle of it is detached.

    You may write the weights between steps, also with ``full_accumulator``: elements that you have changed go into the
    accumulator. If a step raises, its weights are in full precision until the next step.

    Args:
        optimizer: an optimizer of params that are float16, bfloat16, float32 or float64. Gradients must be dense.
        bits: of each number, its sign included.
        rounding: ``"stochastic"`` or ``"nearest"``.
        full_accumulator: keep the accumulator in full precision, and the weights that the last step has made of it. It
            takes the memory of the params twice more.
        seed: of the random numbers, an int. They depend on it and on :attr:`step`.

    Attributes:
        step: number of steps so far. You may assign another. It counts a step that a fused optimizer skips on the
            device, since a gradient is not finite. Such a step changes nothing else.

    Warns:
        UserWarning: the optimizer has made steps at the first step here, and the number of steps was neither loaded
            nor assigned.

    Raises:
        TypeError: an argument has a wrong type, the optimizer does not run torch's hooks, or a param has another dtype.
        ValueError: ``bits`` is not from 2 to 16, ``rounding`` is another, a param is sparse or sharded, or the
            optimizer is differentiable.
        RuntimeError: the optimizer is wrapped already, or an average is attached to it.

    In a step, also TypeError or ValueError: a gradient is sparse, or a closure is given. Nothing has changed then.

    Paper: Yang et al. 2019, "SWALP: Stochastic Weight Averaging in Low-Precision Training", arXiv:1904.11943.

    Example::

        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        low_precision = LowPrecision(optimizer, bits=8)
        averaged = FusedAveragedModel(model)  # in full precision
        averaged.attach(optimizer, start="0.75dur", every=len(loader), duration=total_steps)
    """

    bits = Checked(checked_bits)
    rounding = Checked(lambda name, value: checked_rounding(value))
    full_accumulator = Checked(checked_bool)
    seed = Checked(lambda name, value: checked_seed(value))

    def __init__(
        self,
        optimizer: Optimizer,
        bits: int = 8,
        *,
        rounding: str = "stochastic",
        full_accumulator: bool = False,
        seed: int = 0,
    ) -> None:
        self._optimizer = _checked_optimizer(optimizer)
        self.bits, self.rounding = bits, rounding
        self.full_accumulator, self.seed, self._step = full_accumulator, seed, 0
        for what, param in _places(self._optimizer):
            check_real(what, param)
        _refuse_differentiable(self._optimizer)
        self._noise = Noise(self.seed, 0)
        self._repeats_steps = _has_stepped(self._optimizer)
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
            self._optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step, self._repeats_steps = check_step(value), False

    @property
    def is_attached(self) -> bool:
        """Whether steps of the optimizer are still those of SWALP."""
        return bool(self._hooks)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or pickle has: settings and steps. It is detached, since torch copies no hooks."""
        return {**vars(self), "_hooks": [], "_optimizer": None, "_noise": None}

    def detach(self) -> None:
        """Remove the hooks: steps are those of the optimizer again. Params keep their quantised values.

        Accumulators of full precision leave the optimizer's state.

        Raises:
            RuntimeError: it was detached before.
        """
        if not self._hooks:
            raise RuntimeError("LowPrecision must have an optimizer to be detached, got one that was detached before")
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for state in self._optimizer.state.values():
            for key in (ACCUMULATOR, WRITTEN) if self.full_accumulator else ():
                state.pop(key, None)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs besides the states of model and optimizer, as plain values.

        Accumulators of full precision are in the optimizer's state.
        """
        settings = {"bits": self.bits, "rounding": self.rounding, "full_accumulator": self.full_accumulator}
        return {**settings, "seed": self.seed, "step": self.step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the steps and the seed of a state. The next steps have the same bits as without the stop.

        Raises:
            ValueError: it is not a state of this class, or has other settings. Nothing has changed.
        """
        own = self.state_dict()
        if not isinstance(state_dict, Mapping) or state_dict.keys() != own.keys():
            raise ValueError(f"state_dict must have {', '.join(own)}, got {state_dict!r}")
        for name in ("bits", "rounding", "full_accumulator"):
            if state_dict[name] != own[name]:
                raise ValueError(
                    f"{name} must be that of the state, {state_dict[name]!r}, got {own[name]!r}: construct "
                    f"LowPrecision(optimizer, {name}={state_dict[name]!r})"
                )
        try:
            seed, step = checked_seed(state_dict["seed"]), check_step(state_dict["step"])
        except TypeError as error:
            raise ValueError(f"state_dict must be a state of LowPrecision, got {state_dict!r}: {error}") from error
        self.seed, self.step = seed, step  # also says that the step is known

    def __repr__(self) -> str:
        full = ", full_accumulator=True" if self.full_accumulator else ""
        end = f"seed={self.seed}, step={self.step}{'' if self._hooks else ', detached'}"
        return f"LowPrecision(bits={self.bits}, rounding={self.rounding!r}{full}, {end})"

    # Steps

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not self._hooks or not is_step(optimizer):  # a step of torch's own, or one inside another
            return
        given = [each for each in args if each is not optimizer]  # torch passes what ``step`` was called on, too
        if next(iter(given), options.get("closure")) is not None:
            raise TypeError(
                "step must be called without a closure, got one: it would compute gradients after the hook that "
                "quantises them. Call loss.backward() and then optimizer.step()"
            )
        _refuse_differentiable(optimizer)
        trained = self._trained()
        for what, param in trained:
            check_real(what, param)
            check_real(f"the gradient of {what}", param.grad)
        if self._repeats_steps:
            warn_user(
                "LowPrecision counts steps from 0, but its optimizer has made steps before: random numbers repeat. "
                "Load low_precision.state_dict() too, or assign low_precision.step, 0 if steps count from here"
            )
            self._repeats_steps = False
        self._noise = Noise(self.seed, self.step)
        if self.full_accumulator:
            wait_for_readers([param for _, param in trained])
        for _, param in trained:
            self._round_gradient(param)
            if self.full_accumulator and ACCUMULATOR in self._optimizer.state.get(param, {}):
                self._put_accumulator(param)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *arguments: object) -> None:
        if not self._hooks or not is_step(optimizer):
            if self._hooks and is_making_state():
                self._add_accumulators()
            return
        skipped = getattr(optimizer, "found_inf", None)  # on the device: a scaler sets it for a fused optimizer
        for _, param in self._trained():
            momentum = self._optimizer.state.get(param, {}).get("momentum_buffer")
            if isinstance(momentum, Tensor):
                self._round(momentum, momentum, skipped)
            if not self.full_accumulator:
                self._round(param, param, skipped)
                continue
            before = self._optimizer.state[param].get(WRITTEN, param)
            self._accumulate(param)
            self._round(param, before, skipped)
            self._optimizer.state[param][WRITTEN].copy_(param)
        self._step += 1

    def _after_load(self, optimizer: Optimizer) -> None:
        self._repeats_steps |= not self._step and _has_stepped(optimizer)

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(what, param) for what, param in _places(self._optimizer) if param.grad is not None]

    def _rounded(self, tensor: Tensor) -> Tensor:
        generator = self._noise.on(tensor.device) if self.rounding == "stochastic" and tensor.numel() else None
        return block_quantize(tensor, self.bits, rounding=self.rounding, generator=generator)

    def _round(self, tensor: Tensor, before: Tensor, skipped: Tensor | None) -> None:
        """Round a tensor in place. If its step was skipped, it gets the values of ``before``."""
        rounded = self._rounded(tensor)
        if skipped is not None:
            rounded = torch.where(skipped.to(tensor.device) != 0, before, rounded)
        tensor.copy_(rounded)

    def _round_gradient(self, param: Tensor) -> None:
        assert param.grad is not None
        rounded = self._rounded(param.grad)
        if overlaps_itself(param.grad) or param.grad.is_inference():  # an expanded one cannot be written
            param.grad = rounded
        else:
            param.grad.copy_(rounded)

    def _put_accumulator(self, param: Tensor) -> None:
        """Make a param its accumulator again, in which elements that are not those of the last step are replaced."""
        state = self._optimizer.state[param]
        for key in (ACCUMULATOR, WRITTEN):  # ``model.double()`` leaves the optimizer's state as it is
            state[key] = state.get(key, param).detach().to(param, copy=key not in state)
        is_own = (param == state[WRITTEN]) | (param.isnan() & state[WRITTEN].isnan())
        state[ACCUMULATOR].copy_(torch.where(is_own, state[ACCUMULATOR], param))
        state[WRITTEN].copy_(param)
        param.copy_(state[ACCUMULATOR])

    def _accumulate(self, param: Tensor) -> None:
        """Keep what the step has made of a param. The optimizer's own state must be there: some ask if it is empty."""
        state = self._optimizer.state[param]
        for key in (ACCUMULATOR, WRITTEN):
            if key not in state:
                state[key] = param.detach().clone()
        state[ACCUMULATOR].copy_(param)

    def _add_accumulators(self) -> None:
        """Add what a checkpoint is loaded into, where torch makes the optimizer's state for that."""
        if self.full_accumulator:
            for _, param in self._trained():
                self._accumulate(param)


def _checked_optimizer(optimizer: object) -> Optimizer:
    """Return the optimizer to put hooks on, or raise as :class:`LowPrecision`."""
    if isinstance(optimizer, Sequence):
        raise TypeError(f"optimizer must be one optimizer, got {len(optimizer)}: call LowPrecision for each")
    holder = state_holder(*check_optimizers(optimizer))
    for owner in owners_of_step_hooks(holder):
        if isinstance(owner, LowPrecision):
            raise RuntimeError(f"optimizer must not be wrapped already, got one with {owner}: call its detach() first")
        if isinstance(owner, Attachment) and owner.is_attached:
            raise RuntimeError(
                f"optimizer must be wrapped before an average is attached, got one with {owner}: its hooks would "
                "average weights before they are quantised. Detach it, call LowPrecision, and attach again"
            )
    return holder


def _refuse_differentiable(optimizer: Optimizer) -> None:
    if any(group.get("differentiable", False) for group in optimizer.param_groups):
        raise ValueError("optimizer must have differentiable=False, got True: hooks write its params in place")


def _has_stepped(optimizer: Optimizer) -> bool:
    """Return whether an optimizer has state of steps. Adagrad has some before its first one, with ``step`` 0."""
    steps = [state.get("step", 1) for state in optimizer.state.values() if state]
    return any(bool(step) for step in steps)


def _places(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield the params of an optimizer, each with its name for an error."""
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or range(len(group["params"]))
        for name, param in zip(names, group["params"], strict=True):
            yield f"param {name!r} of the optimizer's group {number}", param


@pickled_from("swafast.optim")
@dataclass(frozen=True)
class LowPrecisionMean:
    """The equal mean, kept in a few bits: ``FusedAveragedModel(model, multi_avg_fn=LowPrecisionMean(9))``.

    average = block_quantize(average + (param - average) / (n + 1)), in plain torch. The first update copies the params
    as they are. Its random numbers depend on the seed and on the number of models in the average.

    Args:
        bits: of each number, its sign included.
        rounding: ``"stochastic"`` or ``"nearest"``. To the nearest, an average stops moving once its steps are short.
        seed: of the random numbers.

    Raises:
        TypeError: ``bits`` or ``seed`` is not an int.
        ValueError: ``bits`` is not from 2 to 16, or ``rounding`` is another.

    Paper: Yang et al. 2019, "SWALP: Stochastic Weight Averaging in Low-Precision Training", arXiv:1904.11943.
    """

    bits: int
    rounding: str = "stochastic"
    seed: int = 0

    def __post_init__(self) -> None:
        checked_bits("bits", self.bits)
        checked_rounding(self.rounding)
        checked_seed(self.seed)

    @torch.no_grad()
    def __call__(self, averages: Sequence[Tensor], params: Sequence[Tensor], num_averaged: Tensor | int) -> None:
        """Move the averages, dense float tensors, towards the params. Reads ``num_averaged``: on a GPU, it waits."""
        count = int(num_averaged)
        noise = Noise(self.seed, count)
        for average, param in zip(averages, params, strict=True):
            generator = noise.on(average.device) if self.rounding == "stochastic" else None
            mean = average + (param - average) / (count + 1)
            average.copy_(block_quantize(mean, self.bits, rounding=self.rounding, generator=generator))
