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

from ._torch import disable_dynamo
from .locks import ForkSafeLock
from .runners import Ready, runner_for
from .schedule import Schedule, Span
from .shadow import Shadow

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

#: The key of our entry in an optimizer's state dict: a list, in the order in which averages were attached.
STATE_KEY = "swafast"


class Attachable:
    """What can be attached: a base of the averaged models."""

    _attachment: Attachment | None = None
    _source: weakref.ref[Module] | None = None  # the model that it was made of

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
            if any(part._attachment is not None for part in self._attached()):
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
            model = self._source() if self._source is not None else None
            if model is None:
                raise ValueError("model must be given, got None: this average does not know (any more) of which it is")
        if not isinstance(model, Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        with self._alone("attach"):
            self._bind(model)
        own = set(map(id, model.parameters()))  # after FSDP's shards are back in their places
        for optimizer in optimizers:
            if not any(id(param) in own for group in optimizer.param_groups for param in group["params"]):
                raise ValueError("optimizer must have params of the model, got one that has none of them")
        return model

    def _settle(self) -> None:
        """Wait for an update under way, unless this is it.

        Who holds the lock that the update may be waiting for is in an action that has waited before it took the lock.
        """
        if self._attachment is None:
            return
        lock: ForkSafeLock | None = getattr(self, "_lock", None)
        if lock is None or not lock.is_mine:
            self._attachment.join()

    def _on_all_ranks(self, action: str) -> AbstractContextManager[None]:
        """Raise on all ranks what is raised on one; there is one."""
        return nullcontext()

    def _agree(self, described: Mapping[str, str]) -> None:
        """Raise on all ranks where their arguments differ."""

    def _attached(self) -> list[Attachable]:
        """Give all that an attachment of this one keeps busy."""
        return [self]

    def _beside(
        self, model: Module, device: torch.device | None = None, streams: Sequence[torch.cuda.Stream] = ()
    ) -> Ready:
        """Give what makes ready an update that may run beside the model's next forward and backward.

        Args:
            device: where to copy the params to, on ``streams``; None: they are read where they are.
        """
        shadow = Shadow(model, device, streams)

        def ready() -> Callable[[], None]:
            root = shadow.take()
            with self._alone("update_parameters"):
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
        def _alone(self, action: str) -> Any: ...
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


class Attachment:
    """An averaged model that follows an optimizer, until it is detached: what ``averaged.attach(optimizer)`` gives.

    Its state, the number of steps and the schedule, goes into the optimizer's state dict and comes back with it, as
    long as averages are attached in the same order. Where another tool makes that dict of its own
    (``get_optimizer_state_dict``, say), save :meth:`state_dict` beside it.

    Attributes:
        step: how many steps of the optimizer it has seen.
        schedule: after which of them it updates.
    """

    def __init__(
        self,
        averaged: Attachable,
        optimizers: Sequence[Optimizer],
        model: Module,
        schedule: Schedule,
        overlap: bool,
        offload: str | None,
    ) -> None:
        self.step, self.schedule = 0, schedule
        self._averaged = averaged
        self._runner = runner_for(averaged, model, overlap, offload)
        self._loaded: Mapping[str, Any] | None = None
        optimizer = optimizers[-1]
        self._hooks: list[RemovableHandle] = [
            *(each.register_step_pre_hook(self._before_step) for each in optimizers),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._check_load),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]
        self._fellows = _followers.setdefault(optimizer, [])
        self._fellows.append(self)
        for part in averaged._attached():
            part._attachment = self

    @property
    def is_attached(self) -> bool:
        return bool(self._hooks)

    def detach(self) -> None:
        """Leave the optimizer alone from now on, once an update under way has ended.

        Raises:
            RuntimeError: it was detached before.
        """
        if not self._hooks:
            raise RuntimeError("the attachment must be attached to be detached, got one that was detached before")
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._fellows.remove(self)
        for part in self._averaged._attached():
            part._attachment = None
        self._runner.close()

    def join(self) -> None:
        """Wait for an update under way: on the device where it runs on one, else in this thread.

        Whatever is done with the averaged model does it by itself; only what reads ``averaged.module`` directly, or
        writes the model's params between two steps, has to ask for it.

        Raises:
            TypeError, ValueError, RuntimeError: what went wrong in that update.
        """
        self._runner.join()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._hooks:
            self.detach()

    # Steps

    @disable_dynamo
    def _before_step(self, *_: object) -> None:
        self._runner.before_step()

    @disable_dynamo
    def _after_step(self, *_: object) -> None:
        self.step += 1
        if self.schedule.is_due(self.step):
            self._runner.update()

    # State

    def state_dict(self) -> dict[str, Any]:
        """Give the state: plain numbers."""
        return {"step": self.step, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state: its steps, and its schedule in the place of this one's.

        Raises:
            ValueError: it is no state of an attachment; nothing has changed.
        """
        self.step, self.schedule = _read(state_dict)

    def _save(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict.setdefault(STATE_KEY, []).append(self.state_dict())

    def _check_load(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        self._loaded = None
        states = state_dict.get(STATE_KEY)
        if states is None:  # it was saved before anything was attached
            return
        if not isinstance(states, list) or len(states) != len(self._fellows):
            got = len(states) if isinstance(states, list) else type(states).__name__
            raise ValueError(
                f"state_dict[{STATE_KEY!r}] must have a state for each of {len(self._fellows)} attached averages, "
                f"got {got}"
            )
        state = states[self._fellows.index(self)]
        _read(state)
        self._loaded = state

    def _load(self, _: Optimizer) -> None:
        if self._loaded is None:
            return
        given = self.schedule
        self.load_state_dict(self._loaded)
        self._loaded = None
        if self.schedule != given:
            warnings.warn(
                f"{self.schedule}, which was saved, takes the place of {given}: assign attachment.schedule to go by "
                "another",
                stacklevel=5,  # under two frames of torch's
            )


#: Those attached to each optimizer, in order.
_followers: weakref.WeakKeyDictionary[Optimizer, list[Attachment]] = weakref.WeakKeyDictionary()


def _read(state: object) -> tuple[int, Schedule]:
    try:
        step, schedule = state["step"], Schedule(**state["schedule"])  # type: ignore[index]
        good = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"state_dict must be of an attachment, got {state!r}: {error}") from error
    if not good:
        raise ValueError(f"state_dict['step'] must be an int >= 0, got {step!r}")
    return step, schedule
