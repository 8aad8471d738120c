"""`FusedAveragedModel`: torch's `AveragedModel`, updated in one fused pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel

from ..loop import swaps
from ..loop.guard import seamless
from ..loop.waiting import begun
from ..op import checks, choice
from ..op.exchange import Exchange
from ..terms.formats import OWN, Format, check_format, format_of, stored_dtype, with_spread
from ..terms.hints import hinted
from ..terms.names import named_params, unwrap
from ..terms.pickling import pickled_from
from ..terms.rules import Rule, warn_of_small_decay
from ..terms.spread import Spread, checked_spread
from ..torch_private.core import disable_dynamo
from ..torch_private.modules import ASSIGN, named_tensors, own_buffers, own_children
from .accepting import ask_include, check_device, check_model, refuse_sharded
from .bindings import Bound
from .functions import HasRule, choose_rule, refuse_format, update_by_function
from .growing import Adaptable
from .lending import lend_from_state, part_before_load
from .loading import load_whole
from .matching import ModuleSide, each_average
from .model_copy import ModelCopy
from .sampling import check_deviations, refuse_complex, refuse_spread
from .states import export, fill_in, leave_out, translate_load
from .subspace_use import Placed


@pickled_from("swafast")
class FusedAveragedModel(HasRule, Placed, Adaptable, AveragedModel):
    """A copy of a model that holds the running average of the model's parameters, updated in one fused pass.

    ``average = average + weight * (param - average)``, with ``weight = 1 / (n + 1)`` (SWA) by default.
    It replaces ``torch.optim.swa_utils.AveragedModel`` line for line: it has the same arguments, attributes and
    state-dict keys, and its first update copies. torch's own averaging functions run fused. A function of your own
    runs as in torch's class.

    Unlike torch's class, it matches parameters by name and refuses any difference, never averages in less than
    float32, and copies integer buffers. If an update or a load fails, nothing has changed.

    Args:
        model: the model to average. It may be wrapped (DDP, ``torch.compile``), here and at each update.
        device: the device of the averages; default: that of the model's parameters.
        avg_fn, multi_avg_fn: as in torch's class. ``multi_avg_fn`` also takes a :class:`~swafast.Rule`.
        use_buffers: average floating-point buffers too. By default all buffers are copied; integer ones always are.
        rule: sets the weight of the newest model; default: :class:`~swafast.EqualAverage`. It may be set later. For
            several averages of one model see :class:`~swafast.FusedAverages`.
        format: ``"float32"``, ``"exact"``, ``"mirrored"``, ``"compact"``, ``"compensated"`` or ``"half"``; default: by
            each parameter's dtype. See docs/formats.md.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; default: ``SWAFAST_BACKEND``, or the fastest
            that serves the tensors.
        include: ``include(name, param) -> bool`` picks the parameters to average. Of the others, those that are frozen
            share the model's memory, as under a LoRA, and the rest is copied. It is called once for each name, with the
            parameter of the model given here.
        nonfinite: ``"propagate"``, as torch does. ``"raise"`` and ``"skip"`` read what is averaged once more, and
            change nothing if it holds a NaN or an infinity.
        seed: any int, of random rounding (``"compact"``, ``"half"``) and of samples. States hold no seed and no rule.
        num_averaged: if ``model`` has averaged weights, such as a published EMA, of how many models. Updates go on from
            them. By default the first update copies.
        deviations: keep the variance and so many deviations too, of which :meth:`sampled_into` draws samples (SWAG):
            20 in the paper, 0 for the variance alone, or a :class:`~swafast.Spread`, which also has their dtype.

    Raises:
        TypeError: ``model`` is not a module, or another argument has a wrong type.
        NotImplementedError: a parameter's dtype, such as float8, cannot be averaged. ``include`` can leave it out.
        ValueError: an argument has a value not listed above; more than one of ``rule``, ``avg_fn`` and ``multi_avg_fn``
            is given; or the model has FSDP modules, a lazy or partitioned parameter or only empty ones, or cannot be
            copied.
        RuntimeError: ``backend`` cannot run on this machine, or it has no such ``device``.

    Paper: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407.

    Example::

        averaged = FusedAveragedModel(model, rule=ExponentialAverage(0.999))
        for batch in loader:
            step(model, batch)
            averaged.update_parameters(model)
        with averaged.swapped_into(model):
            evaluate(model)
    """

    # Defaults are on the class, because a subclass may not call our __init__.
    use_buffers: bool = False
    include: Callable[[str, Tensor], bool] | None = None
    nonfinite: str = "propagate"
    seed: int = 0
    _asked: dict[str, bool]  # the answers of ``include``, by name
    _any_device: bool = False  # the average may be on another device than the model

    @hinted
    def __init__(
        self,
        model: Module,
        device: int | str | torch.device | None = None,
        avg_fn: Callable[[Tensor, Tensor, Tensor | int], Tensor] | None = None,
        multi_avg_fn: Callable[..., None] | None = None,
        use_buffers: bool = False,
        *,
        rule: Rule | None = None,
        format: str | None = None,
        backend: str | None = None,
        include: Callable[[str, Tensor], bool] | None = None,
        nonfinite: str = "propagate",
        seed: int = 0,
        num_averaged: int = 0,
        deviations: int | Spread | None = None,
    ) -> None:
        spread = checked_spread(deviations)
        recognised = choose_rule(rule, avg_fn, multi_avg_fn)
        warn_of_small_decay(recognised)
        check_format(format)
        if recognised is None:
            refuse_format(format)
        checks.check_nonfinite(nonfinite)
        seed, num_averaged = checks.checked_seed(seed), checks.checked_num_averaged(num_averaged)
        check_deviations(spread, recognised, num_averaged)
        check_device(device)
        params = named_params(unwrap(check_model(model)), "model")
        choice.choose_backends(backend, {param.device.type for param in params.values()})
        refuse_sharded(model)
        asked = ask_include(include, params)
        refuse_complex(spread, {name: param for name, param in params.items() if asked.get(name, True)})
        stored = {n: stored_dtype(format, p.dtype, copied=not asked.get(n, True)) for n, p in params.items()}
        left_out = {name for name, is_averaged in asked.items() if not is_averaged}
        made = ModelCopy(model, params, stored, left_out, device)
        multi_avg_fn = rule if rule is not None else multi_avg_fn
        super().__init__(made, device, avg_fn, multi_avg_fn, use_buffers)  # type: ignore[arg-type]  # copied there
        self.__dict__["rule"] = recognised
        self.format, self.backend, self.include, self.nonfinite, self.seed = format, backend, include, nonfinite, seed
        self._deviations = spread
        self._any_device, self._made_of, self._asked = device is not None, weakref.ref(model), asked
        self._frozen_names = {name for name in left_out if not params[name].requires_grad}
        made.make_further_planes(self, self._each_average())
        copied = {id(tensor) for _, tensor, fmt in self._each_average() if fmt is None}
        self._apply(lambda tensor: tensor.to(stored_dtype(format, tensor.dtype, copied=id(tensor) in copied)))
        self._stay_home()
        where = next((p.device for _, p in named_tensors(self.module) if not p.is_meta), None)
        if device is None and where is not None:
            self.n_averaged = self.n_averaged.to(where)
        self._count_from(num_averaged)

    def _params(self) -> list[Tensor]:
        if not self.__dict__.get("_asked") and self.include is None:  # at once for the usual one
            return [param for _, param in named_tensors(self.module)]
        each = each_average(self.module)
        return [tensor for (name, *_), tensor, is_buffer in each if not is_buffer and self._includes(name, tensor)]

    def _each_average(self) -> Iterator[tuple[str, Tensor, Format | None]]:
        for names, tensor, is_buffer in each_average(self.module):
            yield names[0], tensor, self._format_of(names[0], tensor, is_buffer)

    def _format_of(self, name: str, average: Tensor, is_buffer: bool) -> Format | None:
        """Return the format of one average, or None for a tensor that is copied."""
        if (is_buffer and not self.use_buffers) or not (average.is_floating_point() or average.is_complex()):
            return None
        if is_buffer:
            checks.check_plain(f"{name!r} of the model, a buffer that use_buffers averages,", average)
        elif not self._includes(name, average):
            return None
        if self.rule is None:
            return OWN
        fmt = format_of(self.__dict__.get("format"), average.dtype)
        if fmt is None:
            raise NotImplementedError(f"{name!r} must have a dtype that can be averaged, got {average.dtype}")
        return fmt if is_buffer else with_spread(fmt, self._deviations, average.dtype)

    def _includes(self, name: str, param: Tensor) -> bool:
        asked = self.__dict__.setdefault("_asked", {})
        if name not in asked and self.include is not None:
            asked[name] = bool(self.include(name, param))
        return asked.get(name, True)

    # Updates

    @disable_dynamo
    def update_parameters(self, model: Module) -> None:
        """Move the average towards ``model``'s parameters in one pass, and count the update. The first one copies.

        With a rule of this package and the default ``nonfinite``, the host does not wait for a GPU.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError: names, shapes, dtypes or devices do not match; or, with ``nonfinite="raise"``, a parameter
                holds a NaN or an infinity. The message names the parameter, and nothing has changed.
            RuntimeError: the averages are swapped into a model; or a CUDA graph captures an update that needs the host.
        """
        with self._guard.hold("update_parameters", read=model):
            rule, nonfinite = self.rule, self.nonfinite
            if swaps.in_force and isinstance(model, Module):
                swaps.refuse_model("update_parameters", model)
            plan, params, planes = self._bind(model, rule is None)
            if nonfinite == "raise":
                plan.refuse_nonfinite(params)
            is_first = self._uncounted is not None and not self._uncounted.is_updated
            if is_first:
                self._warn_of_overwrite()
            if rule is not None:
                plan.update(params, planes, (rule,), skip_nonfinite=nonfinite == "skip")
            elif nonfinite != "skip" or plan.first_nonfinite(params) is None:
                pairs = plan.pairs(params, planes)
                update_by_function(pairs, plan.copies, self.avg_fn, self.multi_avg_fn, self.n_averaged)
            if is_first:
                self._note_update()

    def _bind(self, model: Module, by_function: bool | None = None) -> Bound:
        """Return the plan for ``model``. ``by_function``, if known: whether the user's own function runs updates."""
        config = self._config(self.rule is None if by_function is None else by_function)
        counters = (own_buffers(self)["n_averaged"],)
        return self._bindings.bind(self, self._sides, model, config, counters)

    def _config(self, by_function: bool) -> object:
        """Return what a plan depends on besides the tensors."""
        asked = self.__dict__.get
        if by_function:
            refuse_format(asked("format"))
            refuse_spread(self._deviations)
        return (by_function, self.use_buffers, asked("format"), asked("backend"), self._any_device, self.seed)

    def _sides(self) -> list[ModuleSide]:
        return [ModuleSide(self, self._format_of, self._any_device, self.__dict__.get("backend"), self.seed)]

    # Use of the average

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged module, after an update that is under way. Raises RuntimeError while it is swapped in."""
        self._prepare_forward()
        return own_children(self)["module"](*args, **kwargs)  # type: ignore[misc]  # found so, dynamo can trace it

    @seamless
    def swapped_into(self, model: Module) -> Iterator[Module]:
        """Run ``model`` on the averages: ``with averaged.swapped_into(model): evaluate(model)``.

        Params and buffers are exchanged with their averages in place if the dtypes agree (for ``exact`` with its
        bfloat16 plane). Other params are copied aside and overwritten. On leaving, after an exception too, all are
        put back, also into tensors that were moved, cast or replaced meanwhile. Copied buffers may be written in the
        body, params must not. Until then the averaged module holds the model's params, and must not be used.

        Swaps of several averages into one model may nest. One that is left before an inner one raises, and goes back
        when the inner one has left.

        Raises:
            TypeError, ValueError: as :meth:`update_parameters`; nothing has changed.
            RuntimeError: the averages are swapped in already; or, on leaving, a param or an averaged buffer was written
                or its memory was freed. The params are back then, and the message says what became of the averages.
        """
        swap = swaps.Swap(self._guard, self, model)
        try:
            try:
                with self._guard.hold("swapped_into", written=model):
                    if self._uncounted is not None:
                        self._warn_if_empty("swapped_into")
                    bound, ignored = self._bind(model), swaps.broadcasts_buffers(model)
                    swap.enter(Exchange(*bound, self._bindings.latest, ignore_buffers=ignored))
                yield model
            finally:
                swap.leave()
                self._note_own_writes()
        finally:
            swap.finish()  # whatever an interrupt has left

    def copy_to(self, model: Module) -> None:
        """Copy averages and buffers into ``model``. Each is rounded once, to the dtype of its param.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`update_parameters`; nothing has changed.
            RuntimeError: the average holds no model yet, but the values of its construction.
        """
        with self._guard.hold("copy_to", written=model):
            if self._uncounted is not None:
                self._refuse_if_empty("copy_to")
            plan, params, planes = self._bind(model)
            if swaps.in_force:
                swaps.refuse_model("copy_to", model)
            plan.copy_to(plan.writable_pairs(params, planes))

    def averaged_state_dict(self, dtype: torch.dtype | None = None, *, frozen: bool = True) -> dict[str, Any]:
        """Return copies of averages and buffers as plain tensors under the model's own names, for export.

        Args:
            dtype: the dtype to which floating tensors are cast; None keeps the averages' full precision, which is
                float32 for a bfloat16 or float16 model.
            frozen: whether frozen parameters that ``include`` leaves out are there, such as those under a LoRA.

        Raises:
            ValueError: ``dtype`` is not a floating dtype.
            RuntimeError: the averages are swapped into a model.
        """
        with self._guard.hold("averaged_state_dict"):
            if self._uncounted is not None:
                self._warn_if_empty("averaged_state_dict")
            return export(self, self.module, self._each_average(), dtype, set() if frozen else self._frozen())

    # State

    def state_dict(self, *args: Any, frozen: bool = True, **kwargs: Any) -> Any:
        """Return the state under torch's keys, and ``<plane>.<name>`` for each further plane of a format or a spread.

        Args:
            frozen: whether frozen parameters that ``include`` leaves out are there. A state without all of them loads
                too, and keeps those of the averaged module.

        Raises:
            RuntimeError: the averages are swapped into a model.
        """
        with self._guard.hold("state_dict"):
            if self._uncounted is not None:
                self._holds()
            state = super().state_dict(*args, **kwargs)
            if not frozen:
                prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
                leave_out(self.module, self._frozen(), state, f"{prefix}module.")
            return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state of this class or of torch's. Averages of another format are converted at full precision.

        It must have as many ``deviations``. If anything raises, also a hook, nothing has changed. Hooks run once.

        Raises:
            RuntimeError: keys, shapes or values do not fit, with torch's message; or the averages are swapped into a
                model.
        """
        with self._guard.hold("load_state_dict"):
            load = super().load_state_dict
            return load_whole(self, {"": self.module}, load, state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        self._guard.settle("load_state_dict") if begun else None  # it may be a part of the module that is loaded
        self._guard.refuse_while_swapped("load_state_dict")
        translate_load(self, self.module, state_dict, prefix, self._format_of, local_metadata)
        head, frozen = f"{prefix}module.", self._frozen()
        fill_in(self.module, frozen, state_dict, head)
        if local_metadata.get(ASSIGN, False):
            lend_from_state(self.module, frozen, state_dict, head)
        else:
            part_before_load(self.module, state_dict, head)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        self._note_load(state_dict.get(f"{prefix}n_averaged"))
