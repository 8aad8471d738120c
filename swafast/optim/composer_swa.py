"""Composer's ``SWA`` algorithm for a training loop of your own."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.swa_utils import SWALR

from ..loop.attach import Attachable
from ..loop.schedule import Span, at_least_one, parse
from ..terms import hints
from ..terms.numbers import checked_number
from ..terms.pickling import pickled_from
from ..terms.warn import warn_user

_OF_ATTACH = ("overlap", "offload", "name", "step")
_STRATEGIES = {"linear": "linear", "lin": "linear", "cos": "cos", "cosine": "cos"}


@pickled_from("swafast.optim")
class ComposerSWA:
    """Composer's ``SWA`` algorithm, run by hooks on the optimizer.

    From ``swa_start`` on, the averages are updated every ``update_interval``. At ``swa_end`` they are copied into the
    model, which then trains on without SWA.

    The clock is Composer's. It is read after each epoch if ``update_interval`` is in epochs, else after each step, and
    only whole epochs count. Updates and the end come at the first reading at or after the given time. BatchNorm needs
    new statistics at the end: train one more epoch, or call :func:`~swafast.update_bn`.

    The number of steps and the schedule are saved in the optimizer's state dict, as by
    :meth:`~swafast.FusedAveragedModel.attach`.

    Args:
        averaged: the averaged model to update, a :class:`~swafast.FusedAveragedModel` or a sharded one.
        optimizer, model: as for ``attach``.
        max_duration: length of the training, in epochs (``"90ep"``) or steps.
        steps_per_epoch: steps of the optimizer in one epoch.
        swa_start, swa_end: both in ``"ep"``, or both in ``"dur"``.
        update_interval: in ``"ep"`` or ``"ba"``.
        schedule_swa_lr: anneal the learning rate to ``swa_lr`` by torch's ``SWALR``, one step at each update. Stop your
            own scheduler at the start: it would write the rate too.
        anneal_strategy: ``"linear"`` or ``"cos"``.
        anneal_steps: number of updates that annealing takes.
        swa_lr: the rate to anneal to; default: the rate at the start, which Composer 0.32 always takes.
        options: ``overlap``, ``offload``, ``name`` and ``step`` of ``attach``.

    Raises:
        TypeError, ValueError: an argument is none of the above, the end is not after the start, or ``attach`` raises.

    Paper: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407.

    Example::

        swa = ComposerSWA(FusedAveragedModel(model), optimizer, max_duration="90ep", steps_per_epoch=len(loader))
        for epoch in range(90):
            for batch in loader:
                step(model, batch, optimizer)
    """

    @hints.hinted
    def __init__(
        self,
        averaged: Attachable,
        optimizer: Optimizer,
        model: Module | None = None,
        *,
        max_duration: Span,
        steps_per_epoch: int,
        swa_start: str = "0.7dur",
        swa_end: str = "0.97dur",
        update_interval: str = "1ep",
        schedule_swa_lr: bool = False,
        anneal_strategy: str = "linear",
        anneal_steps: int = 10,
        swa_lr: float | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(averaged, Attachable) or not hasattr(averaged, "copy_to"):
            raise TypeError(f"averaged must be one averaged model, got {type(averaged).__name__}")
        with averaged._on_all_ranks("ComposerSWA"):
            hints.refuse_others(ComposerSWA.__init__, options, _OF_ATTACH)
            if not isinstance(anneal_strategy, str) or anneal_strategy not in _STRATEGIES:
                raise ValueError(f"anneal_strategy must be one of {', '.join(_STRATEGIES)}, got {anneal_strategy!r}")
            anneal_steps = at_least_one("anneal_steps", anneal_steps)
            if swa_lr is not None:
                checked_number("swa_lr", swa_lr, ">= 0", lambda rate: rate >= 0)
            clock = _Clock(max_duration, steps_per_epoch, update_interval)
            start, end = clock.first(swa_start, swa_end)
            self.averaged, self._optimizer = averaged, optimizer
            averaged._trained_by([optimizer], model)
        if end > clock.duration:
            warn_user(f"swa_end={swa_end!r} is after the end of max_duration={max_duration!r}: it replaces no model")
        self.attachment = averaged.attach(optimizer, model, start=start, every=clock.interval, end=end, **options)
        self._scheduler: SWALR | None = None
        self._swa_lr = swa_lr
        if schedule_swa_lr:
            strategy: Any = _STRATEGIES[anneal_strategy]
            before = [group.get("swa_lr") for group in optimizer.param_groups]  # set if the optimizer was resumed
            self._scheduler = SWALR(optimizer, 0.0, anneal_epochs=anneal_steps, anneal_strategy=strategy)
            for group, rate in zip(optimizer.param_groups, before, strict=True):
                group["swa_lr"] = rate
        self.attachment.then.append(self._after_step)

    def __repr__(self) -> str:
        swa_lr = f", swa_lr={self._swa_lr if self._swa_lr is not None else 'rate at the start'}"
        end = ", completed" if self.is_completed else ""
        return f"ComposerSWA({self.attachment!r}{swa_lr if self._scheduler is not None else ''}{end})"

    @property
    def is_completed(self) -> bool:
        """Whether the averages have replaced the model."""
        end = self.attachment.schedule.end
        return end is not None and self.attachment.step >= end

    def _after_step(self) -> None:
        step, schedule = self.attachment.step, self.attachment.schedule
        if schedule.is_due(step) and self._scheduler is not None:
            done = (step - schedule.start) // schedule.every
            for group in self._optimizer.param_groups:
                if self._swa_lr is not None:
                    group["swa_lr"] = self._swa_lr
                elif done == 0 or group.get("swa_lr") is None:  # at the start, or a newer group
                    group["swa_lr"] = group["lr"]
            if self._scheduler.last_epoch != done:  # the training was resumed
                self._scheduler.load_state_dict({"last_epoch": done, "_step_count": done + 1})
            self._scheduler.step()
        if step == schedule.end:  # of the attachment's schedule, which a resumed training has loaded
            self.averaged.copy_to(self.attachment.model)

    def detach(self) -> None:
        """Remove the hooks from the optimizer.

        Raises:
            RuntimeError: it was detached before.
        """
        self.attachment.detach()


class _Clock:
    """Composer's clock: after which steps it is read, and what time it shows then."""

    def __init__(self, max_duration: Span, steps_per_epoch: int, update_interval: str) -> None:
        steps_per_epoch = at_least_one("steps_per_epoch", steps_per_epoch)
        self._whole, self._unit = parse("max_duration", max_duration)
        if self._unit == "dur" or self._whole < 1 or self._whole.denominator != 1:
            raise ValueError(f"max_duration must be whole epochs or steps, such as '90ep', got {max_duration!r}")
        self._steps_per_epoch = steps_per_epoch
        self.duration = int(self._whole) * (steps_per_epoch if self._unit == "ep" else 1)
        number, unit = parse("update_interval", update_interval)
        if unit == "dur" or number < 1 or number.denominator != 1:
            raise ValueError(f"update_interval must be whole epochs or steps, at least one, got {update_interval!r}")
        self._after_epochs = unit == "ep"
        #: Steps from one update to the next.
        self.interval = int(number) * (steps_per_epoch if self._after_epochs else 1)

    def first(self, swa_start: str, swa_end: str) -> tuple[int, int]:
        """Return the steps after which the start and the end come."""
        (start, unit), (end, end_unit) = parse("swa_start", swa_start), parse("swa_end", swa_end)
        if unit not in ("ep", "dur") or unit != end_unit:
            raise ValueError(f"swa_start and swa_end must both be in 'ep' or 'dur', got {swa_start!r} and {swa_end!r}")
        if start >= end:
            raise ValueError(f"swa_end must be after swa_start={swa_start!r}, got {swa_end!r}")
        by_epochs = unit == "ep" or self._unit == "ep"
        scale = self._whole if unit == "dur" else Fraction(1)
        return self._moment(math.ceil(start * scale), by_epochs), self._moment(math.ceil(end * scale), by_epochs)

    def _moment(self, count: int, by_epochs: bool) -> int:
        """Return the first step after which the clock is read and shows at least ``count`` epochs, or steps."""
        per_epoch = self._steps_per_epoch
        if not by_epochs:
            return per_epoch * max(1, math.ceil(Fraction(count, per_epoch))) if self._after_epochs else max(1, count)
        # After the last step of an epoch the clock does not count the epoch yet; after the next step it does.
        return per_epoch * max(1, count) if self._after_epochs else per_epoch * count + 1
