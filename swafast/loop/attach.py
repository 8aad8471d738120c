"""`attach`: an average that follows an optimizer's steps by itself, if need be beside the next forward and backward."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ..terms.lazy import MadeOnUse
from .attachment import Attachment
from .guard import Guard
from .runners import Ready
from .schedule import Schedule, Span
from .stand_in import StandIn


class Attachable:
    """What can be attached: a base of the averaged models."""

    _made_of: weakref.ref[Module] | None = None  # the model that it was made of

    _guard = MadeOnUse[Guard](lambda self: self._make_guard())

    def _make_guard(self) -> Guard:
        return Guard()

    def attach(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        model: Module | None = None,
        *,
        start: Span = 0,
        every: Span = 1,
        end: Span | None = None,
        duration: Span | None = None,
        steps_per_epoch: int | None = None,
        overlap: bool = False,
        offload: str | None = None,
    ) -> Attachment:
        """Update the averages after the optimizer's steps from now on: no more calls in the loop.

        Spans are ints, in steps, or as Composer writes them: ``"100ba"`` (steps), ``"2ep"`` (epochs, with
        ``steps_per_epoch``) and ``"0.75dur"`` (a share of ``duration``), rounded up to a step. A step that a gradient
        scaler skips is none, but for fused optimizers, which skip it themselves, on the device.

        Args:
            optimizer: of the model's params; several of them, where each trains a part: the last one's steps count, and
                its state dict then holds the attachment's state too.
            model: the model that it trains; default: the one that this average was made of.
            start: the step of the first update; 0, the default: that of ``every``.
            every: how far updates are apart.
            end: the last step that an update may follow; default: ``duration``, or none.
            duration: of the whole training, in steps or epochs.
            steps_per_epoch: of the optimizer.
            overlap: let each update run beside the next forward and backward, on a side stream for a model on a GPU, in
                a thread for one on the CPU. It ends before the optimizer's next step begins, and before anything of
                this averaged model is used; the results are the same. Between two steps nothing else may write params:
                a warning tells of trained params that no optimizer here has.
            offload: ``"cpu"`` keeps the averages in the host's memory. Params are copied there, on a side stream, and
                averaged by the CPU's kernels in a thread, beside whatever the device does; only the copy has to be done
                by the next step. Takes a copy of the params in pinned memory.

        Raises:
            TypeError: an argument is none of the above.
            ValueError: a span cannot be read or lies after the end, ``optimizer`` has none of the model's params, the
                model is not the averaged one, or it is gone and none was given.
            RuntimeError: it is attached already, or swapped into a model.
        """
        with self._on_all_ranks("attach"):
            if self._guard.is_attached:
                raise RuntimeError("the averaged model must not be attached already: detach it before it is again")
            schedule = Schedule.of(start, every, end, duration=duration, steps_per_epoch=steps_per_epoch)
            optimizers = check_optimizers(optimizer)
            model = self._model_for(optimizers, model)
        self._agree({"schedule": str(schedule), "overlap": str(overlap), "offload": str(offload)})
        if overlap or offload is not None:
            _warn_of_others(model, optimizers)
        return Attachment(self, optimizers, model, schedule, overlap, offload)

    def _model_for(self, optimizers: Sequence[Optimizer], model: object) -> Module:
        """Give the model that optimizers of its params are to be followed for, or raise."""
        if model is None:
            model = self._made_of() if self._made_of is not None else None
            if model is None:
                raise ValueError("model must be given, got None: this average does not know (any more) of which it is")
        if not isinstance(model, Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        with self._guard.hold("attach"):
            self._bind(model)
        own = set(map(id, model.parameters()))  # after FSDP's shards are back in their places
        for optimizer in optimizers:
            if not any(id(param) in own for group in optimizer.param_groups for param in group["params"]):
                raise ValueError("optimizer must have params of the model, got one that has none of them")
        return model

    def _on_all_ranks(self, action: str) -> AbstractContextManager[None]:
        """Raise on all ranks what is raised on one; there is one."""
        return nullcontext()

    def _agree(self, described: Mapping[str, str]) -> None:
        """Raise on all ranks where their arguments differ."""

    def _beside(
        self, model: Module, device: torch.device | None = None, streams: Sequence[torch.cuda.Stream] = ()
    ) -> Ready:
        """Give what makes ready an update that may run beside the model's next forward and backward.

        Args:
            device: where to copy the params to, on ``streams``; None: they are read where they are.
        """
        stand_in = StandIn(model, device, streams)

        def ready() -> Callable[[], None]:
            root = stand_in.take()
            with self._guard.hold("update_parameters"):
                self._bind(root)  # what is made anew for it belongs to this thread and its streams
            return partial(self.update_parameters, root)

        return ready

    def _move_to_host(self) -> None:
        """Move the averages to where ``offload`` keeps them: pinned, so that a GPU gets them back at full speed."""
        pin = torch.cuda.is_available()
        self._apply(lambda tensor: tensor.cpu().pin_memory() if pin else tensor.cpu())

    if TYPE_CHECKING:

        def update_parameters(self, model: Module) -> None: ...
        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any: ...
        def _bind(self, model: Module) -> Any: ...


def check_optimizers(given: object) -> list[Optimizer]:
    """Give one optimizer, or several, as a list.

    Raises:
        TypeError: it is none, or does not run torch's hooks. ValueError: there is none in it.
    """
    every: Sequence[object] = given if isinstance(given, Sequence) else [given]
    if not every:
        raise ValueError("optimizer must be one, or several, got none")
    optimizers = []
    for optimizer in every:
        name = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {name}")
        try:
            optimizer.register_step_post_hook(lambda *_: None).remove()
        except AttributeError:
            raise TypeError(f"optimizer must run torch's hooks, got {name}: pass the one that it wraps") from None
        optimizers.append(optimizer)
    return optimizers


def _warn_of_others(model: Module, optimizers: Sequence[Optimizer]) -> None:
    """Warn of params that another optimizer may write while an update reads them."""
    waiting = {id(param) for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]}
    names = [name for name, param in model.named_parameters() if param.requires_grad and id(param) not in waiting]
    if names:
        warnings.warn(
            f"{len(names)} trained params, {names[0]!r} the first, are in no optimizer given: where another one steps "
            "them beside an update, the average is of neither model. Attach to all: attach([first, second])",
            stacklevel=3,
        )
