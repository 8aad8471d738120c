"""torchcontrib's ``SWA``: an optimizer around another one that also averages its params."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ..loop import swaps
from ..loop.attachment import wait_for_readers
from ..loop.guard import finished
from ..loop.roster import STATE_KEY, Roster
from ..op import torch_op  # noqa: F401  # registers it
from ..op.checks import check_cast, check_plain, refuse_partitioned
from ..terms import habits, hints
from ..terms.misfits import few
from ..terms.numbers import as_number, checked_number
from ..terms.pickling import pickled_from
from ..terms.rules import EqualAverage
from ..terms.warn import warn_user
from ..torch_private.optimizers import is_making_state
from . import batchnorm

_RULE = EqualAverage().kernel_terms()


@pickled_from("swafast.optim")
class SWA(hints.WithHints, Optimizer):
    """torchcontrib's ``SWA`` for today's torch: an optimizer around another one that also averages its params.

    In automatic mode, with ``swa_start`` and ``swa_freq``, the averages are updated after every step whose number is
    above ``swa_start`` and divisible by ``swa_freq``. From step ``swa_start`` on, every group trains with ``swa_lr``.
    In manual mode, call :meth:`update_swa`. The average of a bfloat16 or float16 param is float32. In new code, prefer
    ``FusedAveragedModel(model).attach(optimizer)``, which also handles buffers and shards.

    Args:
        optimizer: the optimizer that trains.
        swa_start: number of steps before the first update, in automatic mode.
        swa_freq: number of steps from one update to the next, in automatic mode.
        swa_lr: the learning rate from ``swa_start`` on; default: the rate is not changed.

    Raises:
        TypeError: ``optimizer`` is not an optimizer.
        ValueError: ``swa_start`` or ``swa_lr`` is negative, or ``swa_freq`` is below 1.

    Paper: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407.

    Example::

        optimizer = SWA(torch.optim.SGD(model.parameters(), lr=0.1), swa_start=10, swa_freq=5, swa_lr=0.05)
        for batch in loader:
            ...
            optimizer.step()
        optimizer.swap_swa_sgd()
        update_bn(loader, model)
    """

    _meant = habits.OF_SWA

    @hints.hinted
    def __init__(
        self,
        optimizer: Optimizer,
        swa_start: int | None = None,
        swa_freq: int | None = None,
        swa_lr: float | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        start, freq = _whole("swa_start", swa_start, 0), _whole("swa_freq", swa_freq, 1)
        self._auto_mode = start is not None and freq is not None
        if not self._auto_mode and (start, freq, swa_lr) != (None, None, None):
            warn_user("swa_start or swa_freq is None: give both, else all three are ignored")
        if swa_lr is not None:
            checked_number("swa_lr", swa_lr, ">= 0", lambda rate: rate >= 0)
        self.optimizer = optimizer
        self._is_making = True
        super().__init__(optimizer.param_groups, dict(optimizer.defaults))  # for hooks and profiling
        self._is_making = False
        self.swa_start = start if self._auto_mode else None
        self.swa_freq = freq if self._auto_mode else None
        self.swa_lr = swa_lr if self._auto_mode else None
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group["n_avg"] = group["step_counter"] = 0

    # Groups and state are read from the inner optimizer each time, since its load replaces them.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        for group in self.optimizer.param_groups:  # some may have been added to the inner optimizer directly
            group.setdefault("n_avg", 0)
            group.setdefault("step_counter", 0)
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if not self._is_making:
            self.optimizer.param_groups = groups

    @property
    def _state_holder(self) -> Optimizer:
        """The optimizer whose groups hold the states of attachments, for :class:`~swafast.loop.roster.Roster`."""
        return self.optimizer

    @property
    def opt_state(self) -> Mapping[Tensor, Any]:
        """The state of the inner optimizer."""
        return self.optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of params to train and to average. It has its own counts of steps and of averaged models."""
        if not self._is_making:
            param_group["n_avg"] = param_group["step_counter"] = 0
            self.optimizer.add_param_group(param_group)

    # Steps and averages

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Run a step of the inner optimizer and return its loss. In automatic mode, update averages that are due."""
        if is_making_state():
            return self.optimizer.step(closure)
        if self.swa_lr is not None:
            for group in self.param_groups:
                if group["step_counter"] >= self.swa_start:
                    group["lr"] = self.swa_lr
        loss = self.optimizer.step(closure)
        for group in self.param_groups:
            group["step_counter"] += 1
            steps = group["step_counter"]
            if self.swa_start is not None and steps > self.swa_start and steps % self.swa_freq == 0:
                self.update_swa_group(group)
        return loss

    def update_swa(self) -> None:
        """Update the averages of all params."""
        for group in self.param_groups:
            self.update_swa_group(group)

    @torch.no_grad()
    def update_swa_group(self, group: dict[str, Any]) -> None:
        """Update the averages of one of ``param_groups``.

        Raises:
            ValueError: a param is partitioned, as by ZeRO-3.
            RuntimeError: averages are swapped into a model of these params.
        """
        if swaps.in_force:
            swaps.refuse("update_swa", group["params"])
        _refuse_partitioned(group["params"])
        alike: defaultdict[tuple[torch.device, str], list[Tensor]] = defaultdict(list)  # the params of each launch
        for param in group["params"]:
            if param.numel():
                dtype = _average_dtype(param)
                if "swa_buffer" not in self.state[param]:
                    self.state[param]["swa_buffer"] = torch.zeros_like(param, dtype=dtype)
                alike[param.device, "float32" if dtype == torch.float32 else "own"].append(param)
        for (device, format_name), params in alike.items():
            averages = [self.state[param]["swa_buffer"] for param in params]
            counter = torch.tensor(group["n_avg"], device=device)
            torch.ops.swafast.update_(averages, [], params, counter, format_name, _RULE.kind, list(_RULE.terms))
        group["n_avg"] += 1

    @torch.no_grad()
    def swap_swa_sgd(self) -> None:
        """Exchange params and averages in place, or exchange them back. Warn of params that have no average yet.

        Raises:
            ValueError: a param is partitioned, as by ZeRO-3.
            RuntimeError: averages are swapped into a model of these params.
        """
        if swaps.in_force:
            swaps.refuse("swap_swa_sgd", self._params())
        _refuse_partitioned(self._params())
        wait_for_readers(self._params())
        lacking = sum(bool(param.numel()) for param in self._params() if "swa_buffer" not in self.state.get(param, {}))
        todo = [(param, state) for param in self._params() if "swa_buffer" in (state := self.state.get(param, {}))]
        plan: list[Any] = [None]  # what becomes of the pair at the end of the list, worked out before it is written

        def exchange() -> None:
            while todo:
                param, state = todo[-1]
                average = state["swa_buffer"]
                if plan[0] is None or plan[0][0] is not param:
                    own, mean, kept = param.detach().clone(), average.clone(), state.get("swa_kept")
                    # Keep the float32 average that was rounded to a narrower param; restore it if that is unchanged.
                    is_back = kept is not None and _same_bits(kept.to(own.dtype), own)
                    keep = mean if average.dtype != param.dtype and not is_back else None
                    plan[0] = (param, mean, kept if is_back else own, keep)
                _, mean, other, keep = plan[0]
                param.copy_(mean)
                average.copy_(other)
                state.pop("swa_kept", None)
                if keep is not None:
                    state["swa_kept"] = keep
                todo.pop()

        finished(exchange)
        if lacking:
            # stacklevel 3: torch.no_grad adds a frame.
            warnings.warn(f"{lacking} params have no average yet and are not exchanged", stacklevel=3)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return torchcontrib's three entries: ``opt_state``, ``swa_state`` and ``param_groups``.

        The states of attached averages are in the first group. Entries that other hooks add stand beside the three;
        those that hooks add to the inner optimizer's state are under ``opt_added``.
        """
        packed, own = super().state_dict(), self.optimizer.state_dict()
        state = {"opt_state": own.pop("state"), "swa_state": packed.pop("state"), **packed}
        state["param_groups"] = own.pop("param_groups")
        return {**state, "opt_added": own} if own else state

    def _params(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class or of torchcontrib's.

        Raises:
            TypeError, ValueError: it is not such a state, lacks an entry, or is of other params; or a hook raises. If
                loading fails, nothing has changed.
        """
        averages = self._read(state_dict)
        added = {key: value for key, value in state_dict.items() if key not in (*_ENTRIES, "opt_added")}
        groups = state_dict["param_groups"]
        own = {**state_dict.get("opt_added", {}), "state": state_dict["opt_state"], "param_groups": groups}
        listed = [each.pop(STATE_KEY) for each in (added, own) if isinstance(each.get(STATE_KEY), list)]
        if listed:  # as it once was, of averages attached to this optimizer and to the inner one
            own[STATE_KEY] = list(chain.from_iterable(listed))
        before = self.optimizer.state, self.optimizer.param_groups, self.state
        roster = Roster.of(self)
        names, states = [each.name for each in roster.attachments], roster.states()
        try:
            self.optimizer.load_state_dict(own)
            super().load_state_dict({**added, "state": {}, "param_groups": groups})  # only to run its hooks
            self.state = averages
        except BaseException:
            self.optimizer.state, self.optimizer.param_groups, self.state = before
            roster.put_back(names, states)
            raise

    def _read(self, state_dict: Mapping[str, Any]) -> defaultdict[Any, Any]:
        """Return the averages of a state by param, or raise as :meth:`load_state_dict`."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        lacking = [key for key in _ENTRIES if key not in state_dict]
        if lacking:
            raise ValueError(f"state_dict must have {lacking[0]!r}, got {few(state_dict) or 'nothing'}")
        for key, kind in (("opt_state", Mapping), ("swa_state", Mapping), ("param_groups", list)):
            if not isinstance(state_dict[key], kind):
                raise TypeError(f"state_dict[{key!r}] must be a {kind.__name__}, got {state_dict[key]!r}")
        for group in state_dict["param_groups"]:
            counts = [group.get(name) for name in ("n_avg", "step_counter")]
            if "params" not in group or not all(isinstance(count, int) and count >= 0 for count in counts):
                given = {"n_avg": counts[0], "step_counter": counts[1]}
                got = str(given) if "params" in group else f"one without params, of {few(group)}"
                raise ValueError(
                    f"state_dict['param_groups'] must have params, and ints >= 0 as n_avg and step_counter, got {got}"
                )
        _refuse_partitioned(self._params())
        ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        params = list(self._params())
        if len(ids) != len(params):
            raise ValueError(f"state_dict must be of {len(params)} params, got {len(ids)}")
        swa_state = state_dict["swa_state"]
        if len(swa_state) == len(ids) and not set(swa_state) & set(ids):
            # torchcontrib keys averages by address, while torch since 1.5 numbers params; both keep the params' order.
            swa_state = dict(zip(ids, swa_state.values(), strict=True))
        surplus = sorted(set(swa_state) - set(ids), key=str)
        if surplus:
            raise ValueError(f"state_dict['swa_state'] must have keys of the params, got {few(surplus)}")
        averages: defaultdict[Any, Any] = defaultdict(dict)
        for key, param in zip(ids, params, strict=True):
            for name, value in swa_state.get(key, {}).items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
                check_plain(f"state_dict['swa_state'][{key!r}][{name!r}]", value)
                if value.shape != param.shape:
                    raise ValueError(f"{name} must have shape {tuple(param.shape)}, got {tuple(value.shape)}")
                check_cast(f"state_dict['swa_state'][{key!r}][{name!r}]", value, _average_dtype(param))
                averages[param][name] = torch.empty_like(param, dtype=_average_dtype(param)).copy_(value)
        return averages

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in _OF_A_COPY}

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = state.pop("param_groups", None)  # during a load; the groups belong to the inner optimizer
        super().__setstate__(state)
        if groups is not None:
            state["param_groups"] = groups

    @staticmethod
    def bn_update(loader: Iterable[Any], model: Module, device: torch.device | None = None) -> None:
        """Call :func:`swafast.update_bn`. Unlike torchcontrib's function, it weighs each batch by its size."""
        batchnorm.update_bn(loader, model, device)


_ENTRIES = ("opt_state", "swa_state", "param_groups")
_OF_A_COPY = ("optimizer", "state", "defaults", "swa_start", "swa_freq", "swa_lr", "_auto_mode", "_is_making")


def _refuse_partitioned(params: Iterable[Tensor]) -> None:
    refuse_partitioned("optimizer", {f"param {index}": param for index, param in enumerate(params)})


def _average_dtype(param: Tensor) -> torch.dtype:
    return torch.float32 if param.dtype in (torch.bfloat16, torch.float16) else param.dtype


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Compare bfloat16 or float16 tensors bit by bit, so that equal NaNs count as equal."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def _whole(name: str, value: object, least: int) -> int | None:
    if value is None:
        return None
    number = as_number(value)
    if number is None or not least <= number < math.inf or number != int(number):
        raise ValueError(f"{name} must be a whole number of steps >= {least} or None, got {value!r}")
    return int(number)
