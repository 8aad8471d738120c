"""`attach`: update averages from hooks on the optimizer, also beside the next forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ..terms import hints
from ..terms.lazy import MadeOnUse
from ..terms.spelled import spell_rule
from ..terms.spread import Spread
from ..terms.warn import warn_user
from ..torch_private.modules import unnamed_tensors
from ..torch_private.optimizers import has_hooks
from . import swaps
from .attachment import Attachment
from .guard import Guard
from .hookable import (
    STATE_HOOKS,
    check_optimizers,
    in_order,
    refuse_unhooked,
    warn_of_frozen,
    warn_of_no_save,
    warn_of_others,
)
from .roster import Roster, state_holder
from .runners import Ready, check_modes
from .schedule import Schedule, Span, check_step
from .stand_in import StandIn


class Attachable(hints.WithHints):
    """Base class of the averaged models that can be attached to an optimizer."""

    _made_of: weakref.ref[Module] | None = None  # the model that was passed at construction
    _is_saved_apart = False  # whether an attachment that is being made is saved elsewhere than with the optimizer

    _guard = MadeOnUse[Guard](lambda self: self._make_guard())

    def _make_guard(self) -> Guard:
        return Guard()

    @hints.hinted
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
        offload: str | torch.device | None = None,
        name: str | None = None,
        step: int | None = None,
    ) -> Attachment:
        """Register hooks on the optimizer that update the averages after its steps.

        A span is an int, in steps, or a str as in Composer: ``"100ba"`` (steps), ``"2ep"`` (epochs, with
        ``steps_per_epoch``) or ``"0.75dur"`` (a share of ``duration``). Fractions of a step are rounded up. A step that
        raises or that a gradient scaler skips does not count, except with fused optimizers, which skip it on the
        device. Steps that torch takes to make an optimizer's state do not count either.

        The number of steps and the schedule are saved in the optimizer's state dict. A state that was loaded into the
        optimizer before is taken up; if steps were made and there is none, a warning says so.

        Args:
            optimizer: an optimizer of the model's params, or several. Several count a step once all have stepped, each
                at least once. The one whose first param is the model's last holds the attachment's state. Of a wrapper
                without a state of its own, such as Accelerate's, it is the optimizer inside.
            model: the model that the optimizer trains; default: the one that this average was made of.
            start: the step of the first update; 0, the default, starts at step ``every``.
            every: the span between updates.
            end: the last step with an update; default: ``duration``, or no end.
            duration: length of the whole training, in steps or epochs.
            steps_per_epoch: steps of the optimizer in one epoch.
            overlap: run each update beside the next forward and backward: on a side stream for a model on a GPU, in a
                thread for one on the CPU. The update ends before the optimizer's next step and before this averaged
                model is used, and the results are the same. Nothing else may write params between two steps.
            offload: ``"cpu"`` keeps the averages in the host's memory. Params, or of sharded ones each rank's own,
                are copied there on a side stream, and a thread averages them with the CPU kernels. The next step waits
                only for the copy, which takes pinned memory. ``overlap`` then changes nothing. With either of the two,
                trained params that no given optimizer has get a UserWarning.
            name: of the attachment's state, unlike that of any other average attached to the optimizer; default: its
                rule, or the names of several averages.
            step: number of steps made so far; default: as in the optimizer's state, or 0.

        Raises:
            TypeError: an argument has a wrong type, or the optimizer does not run torch's hooks.
            ValueError: a span cannot be read, or the start is after the end; ``optimizer`` has no params of the model;
                ``model`` does not fit the averages; ``model`` is not given and the original one is gone; or ``name``
                is taken.
            RuntimeError: the averaged model is attached already, or is swapped into a model.
        """
        with self._on_all_ranks("attach"):
            if self._guard.is_attached:
                raise RuntimeError(
                    f"the averaged model must not be attached already, got {self._guard.attachment}: call "
                    "averaged.attachment.detach() first. To follow several optimizers, attach([first, second])"
                )
            schedule = Schedule.of(start, every, end, duration=duration, steps_per_epoch=steps_per_epoch)
            _warn_of_close_deviations(self, schedule)
            optimizers, model = self._trained_by(optimizer, model)
            overlap, offload = check_modes(overlap, offload)
            step = None if step is None else check_step(step)
            roster = Roster.of(optimizers[-1])
            roster.check_name(name)
            own = roster.waiting()
        saved = {**self._of_any_rank(own), **own}
        default = None
        if name is None:
            default = default_name(self)
            name = roster.default_name(default, schedule, saved)
            alike = (each for each in roster.attachments if (each.default_name, each.schedule) == (default, schedule))
            if any(_are_of_one_kind(self, model, each) for each in alike if isinstance(each, Attachment)):
                warn_user(
                    f"the optimizer has another average with the rule and the schedule of {name!r}, and updates both: "
                    "detach that one if this one replaces it, else attach each with a name= of its own"
                )
        state = saved.get(name)
        given = {"schedule": schedule, "overlap": overlap, "offload": offload, "name": name, "step": step}
        self._agree({key: str(value) for key, value in {**given, "saved state": state}.items()})
        if not self._is_saved_apart:
            warn_of_no_save(state_holder(optimizers[-1]))
        if len(optimizers) > 1:
            warn_of_frozen(model, optimizers)
        if overlap or offload is not None:
            warn_of_others(model, optimizers)
        attachment = Attachment(self, optimizers, model, schedule, overlap, offload, name, default)
        if step is not None:
            attachment.step = step
        elif state is not None:
            attachment.resume(state)
        elif any(optimizer.state for optimizer in optimizers) or _has_models(self):
            _warn_of_no_state(name, saved)
            attachment.is_checked = True
        return attachment

    def _attach_apart(self, *args: Any, **options: Any) -> Attachment:
        """Attach, but leave the state out of the optimizer's: the caller saves and loads it in a place of its own."""
        self._is_saved_apart = True
        try:
            attachment = self.attach(*args, **options)
        finally:
            self._is_saved_apart = False
        attachment.leave_optimizer_state()
        return attachment

    @property
    def attachment(self) -> Attachment | None:
        """The attachment by which the averages follow an optimizer, or None."""
        return self._guard.attachment

    def _check_first_step(self, attachment: Attachment) -> None:
        """Warn at an attachment's first step if only one of the optimizer and the average was loaded."""
        before, schedule = attachment.step - 1, attachment.schedule
        watched = [each._uncounted for each in _members(self).values()]
        is_empty = all(each is not None and not each.is_updated for each in watched)
        if before == 0 and not is_empty:
            _warn_of_no_state(attachment.name, ())
        if is_empty and before >= (schedule.start or schedule.every):
            warn_user(
                f"the average {attachment.name!r} goes on at step {before + 1}, but holds no model: load the state "
                "that was saved with the optimizer's. Assign attachment.step before if it begins here"
            )

    def _trained_by(self, optimizer: object, model: object) -> tuple[list[Optimizer], Module]:
        """Return the optimizers and the model to average, for None the original one, or raise as :meth:`attach`."""
        optimizers = check_optimizers(optimizer)
        if model is None:
            model = self._made_of() if self._made_of is not None else None
            if model is None:
                raise ValueError("model must be given, got None: the model that this average was made of is not known")
        if not isinstance(model, Module):
            hint = hints.of_value("model", model)
            if isinstance(model, Optimizer):
                hint = ": to follow several optimizers, attach([first, second])"
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
        with self._guard.hold("attach"):
            self._bind(model)
            if swaps.in_force:
                swaps.refuse_model("attach", model)
        optimizers = in_order(optimizers, model)
        holder = state_holder(optimizers[-1])
        if not has_hooks(holder, *STATE_HOOKS):
            refuse_unhooked(holder)
        return optimizers, model

    def _on_all_ranks(self, action: str) -> AbstractContextManager[None]:
        """Return a context that raises on all ranks what one rank raises. Here there is one rank."""
        return nullcontext()

    def _of_any_rank(self, states: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the states that ranks have found, by name. Here there is one rank."""
        return states

    def _agree(self, described: Mapping[str, str]) -> None:
        """Raise on all ranks if their arguments differ. Here there is one rank."""

    def _beside(
        self, model: Module, device: torch.device | None = None, streams: Sequence[torch.cuda.Stream] = ()
    ) -> Ready:
        """Return a function that prepares an update to run beside the model's next forward and backward.

        Args:
            device: copy the params there, on ``streams``; None: read them where they are.
        """
        stand_in = StandIn(model, device, streams)

        def ready() -> tuple[Callable[[], None], list[object]]:
            root = stand_in.take()
            with self._guard.hold("update_parameters"):
                # In this thread, so that new planes are allocated on its streams.
                plan, params, planes = self._bind(root)
            return partial(self.update_parameters, root), [*plan.memory(params, planes), *stand_in.copied]

        return ready

    def _gpus(self, model: Module) -> list[torch.device]:
        """Return the GPUs that hold tensors of the model or of the averages now."""
        tensors = (*unnamed_tensors(model), *self._own_tensors())
        return [device for device in dict.fromkeys(tensor.device for tensor in tensors) if device.type == "cuda"]

    def _modules_run(self) -> list[Module]:
        """Return the averaged modules, whose forwards read the averages."""
        return [each.module for each in _members(self).values() if isinstance(each, AveragedModel)]

    def _own_tensors(self) -> Iterable[Tensor]:
        """Return the tensors of the averages."""
        return unnamed_tensors(self)  # type: ignore[arg-type]  # a module, unless a subclass says more

    def _move_to_host(self) -> None:
        """Move the averages to the host's memory, pinned if there is a GPU, for fast copies back.

        They go from a GPU straight into pinned memory: no pageable copy of them is made on the way.
        """
        for averaged in _members(self).values() if torch.cuda.is_available() else ():
            averaged._pin()
        self._apply(lambda tensor: tensor.cpu())  # what is left: counters and copied buffers

    if TYPE_CHECKING:

        def update_parameters(self, model: Module) -> None: ...
        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any: ...
        def _bind(self, model: Module) -> Any: ...


def _members(averaged: Any) -> dict[str, Any]:
    """Return the averaged models that are attached together, by name; a single one has none."""
    names = getattr(averaged, "keys", None)
    return {"": averaged} if names is None else {name: averaged[name] for name in names()}


def _spreads(averaged: object) -> list[Spread | None]:
    return [getattr(each, "deviations", None) for each in _members(averaged).values()]


def _warn_of_close_deviations(averaged: object, schedule: Schedule) -> None:
    """Warn before deviations are kept of models that are one step apart: they are nearly one and the same."""
    spreads = _spreads(averaged)
    if schedule.every == 1 and any(spread is not None and spread.count for spread in spreads):
        warn_user(
            "the deviations of an average that is updated at each step are nearly one vector: update it once an epoch, "
            "attach(optimizer, every=steps_per_epoch)"
        )


def _has_models(averaged: object) -> bool:
    counts = [each.n_averaged for each in _members(averaged).values()]
    return any(not count.is_meta and bool(count > 0) for count in counts)


def default_name(averaged: object) -> str:
    """Return what tells averages from others: the names of several, or the rule with what the user has set of it."""
    members = _members(averaged)
    if "" not in members:
        return ", ".join(sorted(members))
    rule = members[""].rule
    if rule is None:  # a function of the user's own
        function = members[""].multi_avg_fn or members[""].avg_fn
        return str(getattr(function, "__qualname__", type(function).__qualname__))
    return spell_rule(rule)


def _are_of_one_kind(averaged: object, model: Module, other: Attachment) -> bool:
    """Return whether an attachment averages the same model with the same options."""
    options = ("format", "include", "use_buffers")
    alike = all(getattr(other._averaged, name, None) == getattr(averaged, name, None) for name in options)
    return other.model is model and alike and _spreads(other._averaged) == _spreads(averaged)


def _warn_of_no_state(name: str, saved: Iterable[str]) -> None:
    others = ", ".join(map(repr, saved))
    warn_user(
        "attachment.step counts from 0, although the optimizer or the average is in use: no state of "
        f"{name!r} was loaded into the optimizer{others and ', only of '}{others}. If steps were made, pass their "
        "number as step=, or the name= that was saved. Pass step=0 if they count from here"
    )
