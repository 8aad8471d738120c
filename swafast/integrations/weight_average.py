"""What the ``WeightAverage`` of every framework has in common: its arguments, and what it does when."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from ..average.averaged_model import FusedAveragedModel
from ..average.fused_averages import FusedAverages
from ..loop.attachment import Attachment
from ..loop.schedule import Schedule, Span
from ..terms.names import named_params, unwrap
from ..terms.rules import Rule
from ..terms.warn import warn_user
from . import arguments
from .saved_states import (
    check_began,
    check_one_or_several,
    checked_parts,
    naming,
    warn_of_copied,
    warn_of_no_average,
    warn_of_steps,
)


class Contract:
    """Averages that follow the optimizers of a framework, are evaluated in place of the model, and end in it.

    Args:
        rule: sets the weight of the newest model; default: :class:`~swafast.EqualAverage`.
        rules: several averages by name, instead of ``rule``.
        evaluate: which of several averages is evaluated and copied at the end; default: the first one.
        start, every, end, duration: the steps after which averages are updated, as for ``attach``. Its arguments
            ``steps_per_epoch``, ``overlap`` and ``offload`` may be given too. In a second training, they count from its
            first step. At a resume they replace the schedule that was saved.
        copy_at_end: whether the model has the averages after the training.
        sharded: whether the averages are shards, a part on each rank; ``"auto"``: if a parameter is.
        options: further arguments of :class:`~swafast.FusedAveragedModel` and its kin, such as ``format``.

    Attributes:
        averaged: the averaged model, from the beginning of the training on. With ``rules`` it is of several averages.
        attachment: the averages' attachment to the optimizers, from then on.

    As long as no model is in the averages, nothing is swapped, exported or copied: the framework does as without us.
    """

    averaged: Any = None
    attachment: Attachment | None = None

    _schedule = Schedule(0, 1)  # of the arguments, in steps from the beginning of this training
    _began = 0  # the attachment's step at that beginning: not 0 in a second training
    _has_copied = False  # the averages into the model, at the end of a training
    _before = (0, 0)  # the step and the number of averaged models when this process began or resumed it

    @arguments.explaining_positions
    def __init__(
        self,
        rule: Rule | None = None,
        *,
        rules: Mapping[str, Rule] | Sequence[tuple[str, Rule]] | None = None,
        evaluate: str | None = None,
        start: Span = 0,
        every: Span = 1,
        end: Span | None = None,
        duration: Span | None = None,
        copy_at_end: bool = True,
        sharded: bool | str = "auto",
        **options: Any,
    ) -> None:
        self._rules = arguments.checked_rules(rule, rules, evaluate)
        if sharded not in (True, False, "auto"):
            raise ValueError(f"sharded must be True, False or 'auto', got {sharded!r}")
        self._rule, self._evaluate = rule, evaluate
        self._when = {"start": start, "every": every, "end": end, "duration": duration}
        self._when |= {name: options.pop(name) for name in arguments.OF_ATTACH if name in options}
        arguments.check_spans(self._when)
        several, own = self._rules is not None, inspect.signature(Contract).parameters
        classes = (
            class_of(bool(each), several=several) for each in ((False, True) if sharded == "auto" else [sharded])
        )
        names = None if self._rules is None else [*self._rules]
        arguments.check_options(type(self), options, own, classes, names, rule)
        self._copies_at_end, self._sharded = arguments.checked_bool("copy_at_end", copy_at_end), sharded
        self._options = options
        self._swap: AbstractContextManager[Module] | None = None
        self._followed: list[Optimizer] = []

    __repr__ = arguments.spell_average

    # The averages

    def make(self, model: Module) -> Any:
        """Make the averages of a model, once: wrapped and sharded as it trains. Collective if they are shards."""
        if self.averaged is None:
            sharded = has_shards(model) if self._sharded == "auto" else bool(self._sharded)
            chosen = {"rules": self._rules} if self._rules is not None else {"rule": self._rule}
            self.averaged = class_of(sharded, several=self._rules is not None)(model, **chosen, **self._options)
        return self.averaged

    def follow(
        self, optimizers: Sequence[Optimizer], model: Module, *, step: int | None = None, **lengths: Span
    ) -> Attachment:
        """Have the averages follow the framework's raw optimizers, unless they do. Those that they followed they leave.

        Args:
            lengths: ``duration`` and ``steps_per_epoch`` where the framework knows them. The user's own go before.
            step: the number of steps so far, where the framework counts them. A state that is loaded later replaces it.
                Averages that have followed optimizers go on from their own number; this training began in between.
        """
        if not optimizers:
            raise ValueError("the trainer must have an optimizer for averages to follow, got none")
        if self.attachment is not None and self.attachment.is_attached:
            if [*map(id, optimizers)] == [*map(id, self._followed)]:
                return self.attachment
            self.attachment.detach()  # a training that raised has left it with optimizers that are used no more
        began = 0
        if self.attachment is not None:
            began = max(0, self.attachment.step - (step or 0))  # the framework also counts steps that are skipped
            step = self.attachment.step
        given = {name: value for name, value in self._when.items() if value is not None}
        self.attachment = self.averaged._attach_apart([*optimizers], model, step=step, **{**lengths, **given})
        self.attachment.when_told.append(self._take_step)
        self._schedule, self._began, self._has_copied = self.attachment.schedule, began, False
        self.attachment.schedule = self._schedule.later(began)
        self._followed = [*optimizers]
        self._note_before()
        return self.attachment

    def _take_step(self, before: int) -> None:
        """Count anew where this training began, if the user has assigned a step before that."""
        attachment: Any = self.attachment
        began, self._before = self._began, (attachment.step, self._before[1])
        if attachment.step < began:
            self._began = max(0, attachment.step - (before - began))
            if attachment.schedule == self._schedule.later(began):  # the user has assigned no other one
                attachment.schedule = self._schedule.later(self._began)

    def _note_before(self) -> None:
        assert self.attachment is not None
        self._before = (self.attachment.step, int(self.evaluated.n_averaged))

    def unfollow(self) -> None:
        """Follow the optimizers no more, if the averages do. The number of steps stays."""
        if self.attachment is not None and self.attachment.is_attached:
            self.attachment.detach()

    def end(self) -> None:
        """Follow the optimizers no more. Warn if they have stepped, and no update was made. Waits for a GPU."""
        attachment, (step, count) = self.attachment, self._before
        if attachment is None or not attachment.is_attached:
            return
        attachment.detach()
        if attachment.step == step or int(self.evaluated.n_averaged) > count:
            return
        schedule = attachment.schedule
        cause = f"start={schedule.start}" if schedule.start > attachment.step else f"every={schedule.every}"
        cause = f"end={schedule.end}" if schedule.end is not None and schedule.end <= step else cause
        kept = f", {step} of them before. The average is of models from before" if count else ""
        warn_user(f"no update was made: {cause}, and the training had {attachment.step} steps{kept}")

    @property
    def evaluated(self) -> Any:
        """The averaged model that is evaluated: one of several, if there are."""
        if self.averaged is None or self._rules is None:
            return self.averaged
        return self.averaged[self.evaluated_name]

    @property
    def evaluated_name(self) -> str | None:
        """The name of the average that is evaluated; None if there is only one."""
        return None if self._rules is None else self._evaluate or next(iter(self._rules))

    @property
    def holds_shards(self) -> bool:
        """Whether the averages are shards: a part on each rank."""
        return hasattr(self.averaged, "full_state_dict")

    @property
    def has_models(self) -> bool:
        """Whether a model is in the averages. Waits for a GPU."""
        return self.evaluated is not None and int(self.evaluated.n_averaged) > 0

    # Their use

    def swapped(self, model: Module | None = None) -> AbstractContextManager[Any]:
        """Return a context in which ``model`` has the averages, if there are any."""
        if model is None:
            raise TypeError("model must be the module that was trained, got None: write average.swapped(module)")
        return self.evaluated.swapped_into(model) if self.has_models else nullcontext()

    def swap_in(self, model: Module) -> None:
        """Put the averages into ``model``, if there are any and they are not in it."""
        if self._swap is None and self.has_models:
            swap = self.evaluated.swapped_into(model)
            swap.__enter__()
            self._swap = swap

    def swap_out(self) -> None:
        """Put the model's own params back, if the averages are in it."""
        swap, self._swap = self._swap, None
        if swap is not None:
            swap.__exit__(None, None, None)

    def finish(self, model: Module) -> None:
        """End the training: follow the optimizers no more, and leave the averages in ``model`` if asked to."""
        self.swap_out()
        self.end()
        if self._copies_at_end and self.has_models:
            self.evaluated.copy_to(model)
            self._has_copied = True

    # States

    def state(self) -> dict[str, Any]:
        """Return the state of averages and attachment: tensors, numbers and strings alone. Collective with shards."""
        # The framework saves frozen params with the model, or not at all, as those under a LoRA. Shards lack them.
        options = {} if self.holds_shards else {"frozen": False}
        return {"averaged": self.averaged.state_dict(**options), "attachment": self.steps()}

    def steps(self) -> dict[str, Any] | None:
        """Return the state of the attachment, and the step at which this training began."""
        if self.attachment is None:
            return None
        return {**self.attachment.state_dict(), "began": min(self._began, self.attachment.step)}

    def warn_if_copied(self) -> None:
        """Warn, at a save, if the training has ended, and the model that is saved has the averages since."""
        if self._has_copied:
            warn_of_copied()

    def load_steps(self, state: Mapping[str, Any]) -> None:
        """Load a result of :meth:`steps`, but keep the schedule of the arguments. Warn if another one was saved.

        Raises:
            ValueError: it is not such a state. Nothing has changed.
        """
        assert self.attachment is not None
        began = check_began(state)
        self.attachment.load_state_dict(state)
        saved, used = self.attachment.schedule, self._schedule.later(began)
        self._began, self.attachment.schedule = began, used
        self._note_before()
        if saved != used:
            warn_user(f"the checkpoint has {saved}, but this training's arguments and length give {used}: that is used")

    def compare_steps(self, where: object, counted: int, *, may_skip: bool) -> None:
        """Warn if the steps that were loaded are not those that the framework counts in this training.

        Args:
            may_skip: whether the framework counts steps that the averages do not, as those that a scaler skips.
        """
        if self.attachment is not None:
            made = self.attachment.step - self._began
            if made > counted or (made < counted and not may_skip):
                warn_of_steps(where, made, counted, self.attachment.step)

    def load(self, state: Mapping[str, Any], *, is_whole: bool = False) -> None:
        """Load a result of :meth:`state`, all of it or nothing. Collective with shards.

        Args:
            is_whole: whether averages that are shards load a state of whole tensors.

        Raises:
            ValueError: a part of it is missing, or of another type.
            RuntimeError: it does not fit the averages.
        """
        averaged, steps = checked_parts(state)
        check_one_or_several(averaged, None if self._rules is None else [*self._rules])
        before = self.attachment.state_dict() if self.attachment is not None else {}
        try:
            if self.attachment is not None:
                self.attachment.load_state_dict(steps)
            loads = "load_full_state_dict" if is_whole and self.holds_shards else "load_state_dict"
            getattr(self.averaged, loads)(averaged)
        except BaseException:
            if self.attachment is not None:
                self.attachment.load_state_dict(before)
            raise
        if self.attachment is not None:
            self.load_steps(steps)

    def resume(
        self, state: Mapping[str, Any] | None, where: object, *, step: int | None = None, is_whole: bool = False
    ) -> None:
        """Load a result of :meth:`state` from a checkpoint. If it has none, warn, and begin a fresh average.

        Args:
            where, is_whole: the checkpoint, for the warning; and as for :meth:`load`.
            step: the number of steps that were made before the checkpoint, for a fresh average.

        Raises:
            ValueError, RuntimeError: as :meth:`load`.
        """
        if state is not None:
            with naming(where):
                self.load(state, is_whole=is_whole)
            self._has_copied = False
            return
        if self.attachment is not None:
            # Assigned in any case: the optimizer's state need not have it then.
            step = self.attachment.step = self.attachment.step if step is None else step
        for each in self.averaged.values() if self._rules is not None else [self.averaged]:
            each._count_from(0)  # whatever it has averaged of a run that is left here
        self._before, self._has_copied = (step or 0, 0), False
        warn_of_no_average(where, step)


def refuse_second(installed: Sequence[object], where: str) -> None:
    """Raise if several ``WeightAverage`` are installed in one place.

    Raises:
        ValueError: there are several.
    """
    if len(installed) > 1:
        raise ValueError(
            f"only one WeightAverage may be installed in {where}, got {len(installed)}: for several averages of one "
            "model give one WeightAverage their rules={name: rule}"
        )


def class_of(sharded: bool, *, several: bool) -> Any:
    """Return the class of averages."""
    if not sharded:
        return FusedAverages if several else FusedAveragedModel
    from ..sharded.sharded_averages import ShardedAverages
    from ..sharded.sharded_model import ShardedAveragedModel

    return ShardedAverages if several else ShardedAveragedModel


def has_shards(model: Module) -> bool:
    """Return whether a parameter is a DTensor, or in a module of FSDP1."""
    parts = (*named_params(unwrap(model), "model").values(), *model.modules())
    kinds = {kind.__name__ for part in parts for kind in type(part).__mro__}
    return not kinds.isdisjoint({"DTensor", "FullyShardedDataParallel"})


def raw_optimizers(optimizers: Iterable[Any]) -> list[Optimizer]:
    """Return the optimizers of torch in a framework's wrappers."""
    return [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
