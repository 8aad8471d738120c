"""Hints: for what users of other packages write out of habit, the line that they meant.

They stand at the end of errors that are raised in any case, so a hint changes no behaviour. The tables know names of
torch's `AveragedModel`, timm's `ModelEmaV3`, diffusers' `EMAModel`, torch_ema, Lightning and Composer.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def _each(table: Mapping[tuple[str, ...], str]) -> dict[str, str]:
    return {name: meant for names, meant in table.items() for name in names}


_UPDATE = "write averaged.update_parameters(model)"
_SWAP = "write `with averaged.swapped_into(model):`, which also puts the params back"
_SCHEDULE = "write averaged.attach(optimizer, start=..., every=...)"
_INCLUDE = "write include=lambda name, param: ..., which returns whether to average the parameter"

#: Names that the packages `swafast`, `swafast.optim` and `swafast.sharded` do not have.
NAMES = _each(
    {
        (
            *("EMA", "Ema", "ema", "EMAModel", "ModelEma", "ModelEMA", "ModelEmaV2", "ModelEmaV3", "LitEma"),
            *("ExponentialMovingAverage", "EMACallback", "EMAWeightAveraging", "WeightAveraging", "FusedEMA"),
        ): "write from swafast import ExponentialAverage, FusedAveragedModel, and "
        "FusedAveragedModel(model, rule=ExponentialAverage(0.999))",
        ("AveragedModel", "SWAModel", "StochasticWeightAveraging"): "write from swafast import FusedAveragedModel",
        ("get_ema_avg_fn", "get_ema_multi_avg_fn"): "write rule=ExponentialAverage(decay)",
        ("get_swa_avg_fn", "get_swa_multi_avg_fn"): "write rule=EqualAverage(), which is the default",
        ("KarrasEMA", "PowerEMA", "PostHocEMA"): "write rule=PowerAverage.from_sigma_rel(0.1), and see Snapshots",
        ("SWA", "SWALR", "ComposerSWA", "cyclical_lr"): "write from swafast.optim import {name}",
        ("LostPeerError", "PartTensor"): "write from swafast.sharded import {name}",
        ("bn_update", "update_batchnorm"): "write from swafast import update_bn",
        ("attach", "swapped_into", "update_parameters"): "it is a method: write averaged.{name}(...)",
        (
            *("FusedAveragedModel", "FusedAverages", "ShardedAveragedModel", "ShardedAverages", "Snapshots"),
            *("EqualAverage", "ExponentialAverage", "PowerAverage", "Rule", "load", "save", "update_bn"),
        ): "write from swafast import {name}",
    }
)

#: Attributes that averaged models do not have.
_ATTRIBUTES = _each(
    {
        (
            *("update", "step", "update_average", "update_averages", "update_ema", "update_model", "update_params"),
            *("ema_step", "accumulate", "update_swa", "on_after_backward", "on_train_batch_end"),
        ): _UPDATE,
        (
            *("swap", "swap_params", "swap_parameters", "swap_swa_sgd", "average_parameters", "apply_ema", "ema_scope"),
            *("apply_shadow", "apply_averages", "store", "restore", "swap_model_weights", "swapped", "swap_into"),
        ): _SWAP,
        ("decay", "decays", "beta", "momentum", "get_decay", "cur_decay_value", "current_decay"): "read averaged.rule",
        (
            *("num_updates", "n_updates", "updates", "num_averaged", "n_average", "optimization_step"),
            *("num_averages", "step_count"),
        ): "read averaged.n_averaged",
        ("transfer_weights", "copy_params_to", "assign_to", "copy_into"): "write averaged.copy_to(model)",
        ("detach", "join"): "write attachment = averaged.attach(optimizer), and attachment.{name}()",
        ("reset", "reset_parameters"): "write averaged.n_averaged.zero_(), and the next update copies",
        ("bn_update", "update_bn", "update_batchnorm"): "write swafast.update_bn(loader, model) in a swap",
    }
)
#: Those of a :class:`~swafast.FusedAveragedModel` and of several.
OF_MODULES = _ATTRIBUTES | _each(
    {
        (
            *("shadow", "shadow_params", "ema", "ema_model", "model_ema", "model", "averaged_model", "avg_model"),
            *("averaged_params", "averages", "ema_weights", "get_model"),
        ): "read averaged.module",
        ("ema_state_dict", "get_ema_state_dict", "model_state_dict", "full_state_dict"): (
            "write averaged.averaged_state_dict() for an export, averaged.state_dict() to resume"
        ),
        ("save", "save_pretrained"): "write swafast.save(averaged, path), or save the model in a swap",
        ("load", "from_pretrained"): "write swafast.load(averaged, path)",
    }
)
_NO_MODULE = (
    "a sharded average is no module and holds no copy of one: run the model in `with averaged.swapped_into(model):`; "
    "its state is averaged.state_dict(), or gathered averaged.full_state_dict()"
)
#: Those of averages of shards.
OF_SHARDS = _ATTRIBUTES | _each(
    {
        (
            *("module", "modules", "named_modules", "children", "named_children", "forward", "train", "eval"),
            *("parameters", "named_parameters", "buffers", "named_buffers", "requires_grad_", "apply", "get_submodule"),
            *("shadow", "shadow_params", "ema", "ema_model", "model", "averaged_model", "avg_model", "averages"),
        ): _NO_MODULE,
        ("to", "cpu", "cuda", "float", "half", "bfloat16", "double"): (
            "averages stay where their params are: construct it after the model was moved or cast"
        ),
        ("save", "save_pretrained"): "write torch.distributed.checkpoint.save(averaged.state_dict(), ...)",
        ("load", "from_pretrained"): "write state = averaged.state_dict(), torch.distributed.checkpoint.load(state, "
        "...), averaged.load_state_dict(state)",
        ("ema_state_dict", "get_ema_state_dict", "model_state_dict"): "write averaged.full_state_dict()",
    }
)
OF_ATTACHMENTS = _each({("remove", "close", "stop", "unregister"): "write attachment.detach()"})
OF_SNAPSHOTS = _each(
    {
        ("load", "get", "average", "reconstruct"): "write snapshots.synthesize(rule)",
        ("add", "append", "store", "update", "write"): "write snapshots.save(averages)",
    }
)

#: Arguments that stand for a rule, and the rule. ``{}`` is the given value.
_RULES = _each(
    {
        (
            *("decay", "ema_decay", "beta", "momentum", "alpha", "smoothing", "model_ema_decay", "max_decay", "decays"),
        ): "ExponentialAverage({})",
        ("use_warmup", "use_ema_warmup", "warmup", "ema_warmup"): 'ExponentialAverage(0.9999, warmup="power")',
        ("inv_gamma", "power", "min_decay", "warmup_gamma", "warmup_power"): (
            'ExponentialAverage(0.9999, warmup="power", inv_gamma=1.0, power=2 / 3, min_decay=0.0)'
        ),
        ("half_life",): "ExponentialAverage.from_half_life({})",
        ("sigma_rel", "sigma_rels", "std", "stds"): "PowerAverage.from_sigma_rel({})",
        ("gamma", "gammas"): "PowerAverage(gamma={})",
        ("multi_avg_fn", "avg_fn", "averaging_fn"): "EqualAverage(), or a Rule of your own",
    }
)
#: Other arguments.
_ARGUMENTS = _each(
    {
        (
            *("exclude_buffers", "include_buffers", "copy_buffers", "update_buffers", "average_buffers"),
        ): "buffers are copied by default, and use_buffers=True averages floating ones",
        (
            *("update_every", "update_freq", "update_interval", "interval", "every_n_steps", "swa_freq", "freq"),
            *("update_after_step", "start_step", "swa_start", "ema_start", "swa_epoch_start", "warmup_steps"),
            *("update_starting_at_step", "begin", "start_iter", "after"),
        ): _SCHEDULE,
        ("exclude", "ignore", "filter", "param_filter", "skip", "ignore_names", "param_names", "only"): _INCLUDE,
        ("params", "parameters", "module"): "write model: the module itself, not its parameters",
        ("dtype", "precision", "ema_dtype"): 'write format="float32", or leave it out: averages have that precision',
        ("rules",): "write FusedAverages(model, rules=...), or ShardedAverages of a sharded model",
        ("rule",): 'write rules={{"name": {value}}}',
        ("process_group", "share_replicas", "mesh"): "write ShardedAveragedModel(model, ...) for a sharded model",
        ("device", "cpu_device"): "averages of shards are where their params are: leave it out",
        ("swa_lr", "swa_lrs", "anneal_epochs"): "write SWALR(optimizer, ...), from swafast.optim",
        ("foreach", "fused", "use_foreach", "use_fused"): "averages are always updated in one pass: leave it out",
        ("model_cls", "model_config"): "leave it out: a state holds values alone",
        ("rank0", "rank_0_only", "rank0only", "only_rank0"): "write rank0_only={value}",
        ("offload_to_cpu", "cpu", "to_cpu"): "write cpu_offload={value}",
    }
)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_rule(value: object) -> bool:
    return hasattr(value, "kernel_terms") and not isinstance(value, type)


def _word(*words: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value.lower() in words


def _is_iterator(value: object) -> bool:
    return isinstance(value, Iterable) and not hasattr(value, "named_parameters")


def _has(*names: str) -> Callable[[object], bool]:
    return lambda value: all(hasattr(value, name) for name in names)


#: Values: the argument, what they look like, and what was meant.
_VALUES: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("rule", lambda value: _is_number(value), "write rule=ExponentialAverage({value})"),
    ("rule", _word("ema", "exponential"), "write rule=ExponentialAverage(0.999)"),
    ("rule", _word("swa", "equal", "mean", "average"), "write rule=EqualAverage()"),
    ("rule", _word("power", "karras", "edm2"), "write rule=PowerAverage.from_sigma_rel(0.1)"),
    ("rule", lambda value: isinstance(value, type), "write an instance: rule={name}(...)"),
    ("device", lambda value: _is_number(value), (
        "pass a decay in a rule: write FusedAveragedModel(model, rule=ExponentialAverage({value}))"
    )),
    ("device", lambda value: _is_rule(value), "pass a rule as rule="),
    ("device", lambda value: isinstance(value, Mapping), "write FusedAverages(model, rules=...)"),
    ("device", _has("param_groups"), "write averaged.attach(optimizer)"),
    ("device", callable, "write avg_fn= or multi_avg_fn="),
    ("rules", lambda value: _is_number(value), "write ExponentialAverage({value})"),
    ("rules", lambda value: isinstance(value, (list, tuple, set)) or _is_rule(value), (
        'write rules={{"fast": ExponentialAverage(0.99), "slow": ExponentialAverage(0.999)}}'
    )),
    ("model", lambda value: isinstance(value, type), "write an instance of it"),
    ("model", lambda value: isinstance(value, Mapping), "pass the model, not its state"),
    ("model", _has("param_groups"), "pass the model, and then write averaged.attach(optimizer)"),
    ("model", _has("swapped_into"), "pass the model, inside swapped_into"),
    ("model", _has("dataset"), "write update_bn(loader, model)"),
    ("model", lambda value: _is_iterator(value), "pass the model itself, not its parameters"),
    ("format", lambda value: "float16" in str(value), 'write format="half", or leave it out for float32 precision'),
    ("format", lambda value: "float32" in str(value), 'write format="float32"'),
    ("format", _word("fp32", "float"), 'write format="float32"'),
    ("format", _word("bf16", "fp16"), 'write format="half", or leave it out for float32 precision'),
    ("optimizer", _has("optimizer", "last_epoch"), "pass the optimizer of the scheduler"),
    ("optimizer", _has("parameters"), "write attach(optimizer, model)"),
    ("include", callable, _INCLUDE),
    ("include", lambda value: isinstance(value, Iterable), "write include=lambda name, param: name in {{...}}"),
)  # fmt: skip


def of_name(name: str) -> str:
    """Return the end of an error about a name that a package lacks: the line that was meant, or nothing."""
    return f": {NAMES[name].format(name=name)}" if name in NAMES else ""


def of_value(argument: str, value: object) -> str:
    """Return the end of an error about an argument's value."""
    for about, looks_so, meant in _VALUES:
        if about == argument and looks_so(value):
            return f": {meant.format(value=repr(value), name=getattr(value, '__name__', ''))}"
    return ""


def hinted(function: F) -> F:
    """Have a function end the error about arguments that it does not take with the line that was meant."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:  # the function had begun
                raise
            raise TypeError(f"{error}{_of_call(function, args, options)}") from None

    return call  # type: ignore[return-value]


def _of_call(function: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> str:
    parameters = inspect.signature(function).parameters
    own = list(parameters)
    for name, value in options.items():
        if name in own:
            continue
        if name in _RULES:
            rule = _RULES[name].format(repr(value))
            return f': write rules={{"ema": {rule}}}' if "rules" in own else f": write rule={rule}"
        if name in _ARGUMENTS:
            return f": {_ARGUMENTS[name].format(value=repr(value))}"
        for close in difflib.get_close_matches(name, own, 1):
            return f": did you mean {close}=?"
    if "model" not in own:
        return ""
    positional = [each for each in parameters.values() if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    about = "rules" if "rules" in own else "rule"
    for value in args[len(positional) :] if about == "rule" else args[2:]:
        if _is_rule(value) or (about == "rules" and isinstance(value, Mapping)):
            return f": write {about}={value!r}"
        if hint := of_value(about, value):
            return hint
    return ""


class WithHints:
    """Base class whose errors about attributes that it lacks end with the line that was meant."""

    _meant: Mapping[str, str] = {}

    if not TYPE_CHECKING:  # an editor that sees __getattr__ accepts any name

        def __getattr__(self, name: str) -> Any:
            find = getattr(super(), "__getattr__", None)
            try:
                return find(name) if find is not None else object.__getattribute__(self, name)
            except AttributeError as error:
                if name not in self._meant:
                    raise
                raise AttributeError(f"{error}: {self._meant[name].format(name=name)}", name=name, obj=self) from None


# States


def of_state(state: object, names: Iterable[str], *, several: bool = False) -> str:
    """Return the end of an error about a state that does not fit.

    Args:
        names: the names of the model's own params and buffers.
        several: it was loaded into several averages.
    """
    if not isinstance(state, Mapping) or not state:
        return ""
    keys = list(map(str, state))
    if "shadow_params" in state:
        return (
            ": this is a state of diffusers' EMAModel or of torch_ema, which has no names: load it there, copy_to() "
            "the model, and write FusedAveragedModel(model, num_averaged=n)"
        )
    for key, value in state.items():
        if isinstance(value, Mapping) and (any(str(each).endswith("n_averaged") for each in value)):
            return f": this is a whole checkpoint: write averaged.load_state_dict(state[{key!r}])"
    if any(isinstance(value, Mapping) for value in state.values()):
        return f": this is a whole checkpoint, of {', '.join(map(repr, keys[:3]))}: pass the entry of the average"
    if any(key.startswith("checksum.") for key in keys):
        return ": this is a sharded state, for torch.distributed.checkpoint: save full_state_dict() for this class"
    if "n_averaged" not in state and all(key.startswith("module.") for key in keys):
        return (
            ": this state has no count, like one of timm's ModelEmaV3. If it averages n models, write "
            'averaged.load_state_dict({**state, "n_averaged": torch.tensor(n)})'
        )
    if several:
        return (
            ': this is a state of one average: write averages["name"].load_state_dict(state)'
            if "n_averaged" in state
            else ""
        )
    prefixes = {key.removesuffix("n_averaged") for key in keys if key.endswith(".n_averaged")}
    if prefixes:
        first = min(prefixes)
        return (
            f": this is a state of several averages, {', '.join(repr(each[:-1]) for each in sorted(prefixes)[:3])}: "
            f"load it into FusedAverages, or keys that begin with {first!r}, without that, into one average"
        )
    if not {*names}.isdisjoint(keys):
        return (
            ": this state has the model's own names, as of averaged_state_dict(), which is for exports: to resume, "
            "save averaged.state_dict(). To go on from it as an average of n models, write "
            "model.load_state_dict(state), and FusedAveragedModel(model, num_averaged=n)"
        )
    return ""


_KEYS = re.compile(r'("[^"\n]*", "[^"\n]*", "[^"\n]*"), ("[^"\n]*"(?:, "[^"\n]*")*)')
_SIZE = "\tsize mismatch for "


def shortened(message: str) -> str:
    """Return a message of torch's loader whose lists of keys, and of other shapes, end after three."""
    message = _KEYS.sub(lambda found: f"{found[1]} and {len(found[2].split(', '))} more", message)
    lines = message.split("\n")
    sizes = [line for line in lines if line.startswith(_SIZE)]
    if len(sizes) > 3:
        lines = [line for line in lines if line not in sizes[3:]] + [f"\tand {len(sizes) - 3} more size mismatches"]
    return "\n".join(lines).rstrip().removesuffix(".")
