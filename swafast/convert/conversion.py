"""`load`: a state of another tool, loaded into an averaged model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ..average.averaged_model import FusedAveragedModel
from ..average.matching import each_average
from ..op.checks import checked_num_averaged
from ..sharded.sharded_model import ShardedAveragedModel
from ..terms.misfits import few
from ..terms.names import canonical, unwrap
from ..terms.rules import EqualAverage, Rule, terms_of
from ..terms.spelled import spell_rule
from ..terms.warn import warn_user
from ..terms.weight import KernelTerms
from .kinds import Kind, recognised
from .positional import in_names
from .reading import Reading, Source


@dataclass(frozen=True)
class Conversion:
    """What an average goes on with after :func:`load`."""

    #: The averaged model's rule from now on; None: a function of the user's own.
    rule: Rule | None
    num_averaged: int
    #: How many steps the training had made, for ``attach(optimizer, step=...)``; None: the state does not tell.
    steps: int | None
    #: What the state has and the average does not take, and what the average needs and the state does not have.
    lost: tuple[str, ...]


def load(
    averaged: FusedAveragedModel | ShardedAveragedModel,
    source: Source,
    model: Module | None = None,
    *,
    kind: str = "auto",
    num_averaged: int | None = None,
    optimizer: Optimizer | None = None,
) -> Conversion:
    """Load a state that another tool has written into an averaged model, all of it or nothing.

    Tensors are copied. Averages in another dtype are converted. If the state tells the rule, the average takes it over.
    Nothing is unpickled: load a file before, with ``torch.load(path, weights_only=True)``. Collective if the averages
    are shards: all ranks pass the same state, with whole tensors.

    Args:
        averaged: one averaged model; of several, ``averages["name"]``.
        source: the state, as its tool has written it: the average alone, or a whole checkpoint with it.
        model: whose params a state without names lists; default: the model that the average was made of.
        kind: ``"torch"``, ``"timm"``, ``"ema_pytorch"``, ``"diffusers"``, ``"torch_ema"``, ``"lightning"``,
            ``"mmengine"``, ``"ignite"``, ``"composer"``, ``"nemo"`` or ``"ultralytics"``; by default the one kind that
            the entries of the state fit.
        num_averaged: how many models the average holds, where the state does not tell, or not rightly.
        optimizer: if a state without names lists the params as this optimizer does. The average keeps its own values
            of params that the optimizer does not hold, and ``lost`` names them.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the state is of no kind or of several, lacks an entry or has a wrong one; it is of another model,
            lacks params that are trained, or lists params in another order; or ``num_averaged`` is needed.
        RuntimeError: its keys or shapes are not the average's, with torch's message; or the averages are swapped into a
            model. In all cases nothing has changed.
    """
    _check_types(averaged, source, model, optimizer)
    counted = None if num_averaged is None else checked_num_averaged(num_averaged)
    root = _model_of(averaged, model)
    own = [canonical(name) for name, _ in unwrap(root).named_parameters(remove_duplicate=False)]
    found = recognised(source, own, kind)
    reading = _with_count(found, found.read(source), counted, averaged.rule)
    weights, lacking = reading.weights, reading.of_model
    if not isinstance(weights, Mapping):
        named = in_names(reading, root, optimizer)
        lacking = tuple(name for name in _held(averaged) if name not in named)
        weights, reading = named, replace(reading, follows_optimizer=reading.follows_optimizer or optimizer is not None)
    lost = (*reading.lost, *_lost_params(found, reading, averaged, root, lacking), *_lost_bits(averaged, root, weights))
    if not isinstance(reading.weights, Mapping):  # what may raise has, on all ranks alike: the call is collective
        weights = {**_own_weights(averaged), **weights}
    assert reading.count is not None
    state = {
        "n_averaged": torch.tensor(reading.count),
        **{f"module.{name}": value for name, value in weights.items()},
        **reading.planes,
    }
    _take(averaged, state)
    if reading.rule is not None:
        _take_rule(averaged, found, reading.rule)
    return Conversion(averaged.rule, reading.count, reading.steps, lost)


def _check_types(averaged: object, source: object, model: object, optimizer: object) -> None:
    if not isinstance(averaged, (FusedAveragedModel, ShardedAveragedModel)):
        raise TypeError(
            f"averaged must be one averaged model of swafast, got {type(averaged).__name__}{_meant_by(averaged)}"
        )
    if not isinstance(source, Mapping):
        how = ""
        if isinstance(source, (str, PathLike)):
            how = ": load the file before, with torch.load(path, weights_only=True)"
        elif hasattr(source, "state_dict"):
            how = ": pass its state_dict()"
        raise TypeError(f"source must be a state, a mapping, got {type(source).__name__}{how}")
    if model is not None and not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")


def _meant_by(averaged: object) -> str:
    """Return the end of an error about something else than an averaged model: what was meant."""
    if hasattr(averaged, "averaged") and hasattr(averaged, "attachment"):  # a WeightAverage, or what looks like one
        if averaged.averaged is not None:
            return ": pass its averaged model, average.evaluated"
        return (
            ": pass average.evaluated, once the training has begun. docs/frameworks/migration.md has the place for it "
            "in each framework"
        )
    if averaged is None:
        return (
            ": the averaged model of a WeightAverage is made when the training begins. docs/frameworks/migration.md "
            "has the lines that load into it"
        )
    if isinstance(averaged, Mapping) and not hasattr(averaged, "swapped_into") and not _has_members(averaged):
        return ": write convert.load(averaged, state), the state last"
    if _has_members(averaged):
        return ': pass one of them, averages["name"]'
    if isinstance(averaged, Module):
        return ": write averaged = FusedAveragedModel(model) first, and pass that"
    return ""


def _has_members(averaged: object) -> bool:
    return hasattr(averaged, "keys") and hasattr(averaged, "update_parameters")


def _model_of(averaged: Any, model: Module | None) -> Module:
    """Return the model whose params a state lists."""
    if model is None and averaged._made_of is not None:
        model = averaged._made_of()
    if model is None and isinstance(averaged, FusedAveragedModel):
        model = averaged.module
    if model is None:
        raise ValueError("model must be given, got None: the model that this average was made of is not known")
    return model


def _with_count(kind: Kind, reading: Reading, given: int | None, rule: Rule | None) -> Reading:
    """Return a reading with the count that the average goes on with."""
    if given is not None:
        if given < 1 and reading.begins_as_copy:
            raise ValueError(
                f"num_averaged must be >= 1 for a state of {kind.writer}, whose average begins as a copy of the model, "
                f"got {given}: the next update would overwrite it"
            )
        return replace(reading, count=given)
    if reading.count is not None:
        return reading
    rule = rule if reading.rule is None else reading.rule
    needed = f"num_averaged must be given for a state of {kind.writer}, which does not tell it"
    if reading.may_be_copy:
        raise ValueError(
            f"{needed}, as the average is a copy of the model up to update_after_step, got None: pass {reading.advice}"
        )
    if _goes_by_count(rule):
        raise ValueError(
            f"{needed}, as the average's rule {_spell(rule)} depends on it, got None: pass {reading.advice}, or set "
            "the rule of that average first"
        )
    unknown = "the number of models, which the state does not have: it is counted from 1, and the rule is constant"
    if reading.zero_if:
        unknown = f"{unknown}. Pass num_averaged=0 if {reading.zero_if}"
    return replace(reading, count=1, lost=(*reading.lost, unknown))


def _goes_by_count(rule: Rule | None) -> bool:
    """Return whether the weight of the newest model depends on how many are in the average, or may do so."""
    terms = terms_of(rule) if rule is not None else None
    return terms is None or terms.kind != KernelTerms.CONSTANT


def _spell(rule: Rule | None) -> str:
    return "a function of yours" if rule is None else spell_rule(rule)


def _own_weights(averaged: Any) -> dict[str, Any]:
    """Return what the average holds itself, for what a state without names lacks: buffers. Collective for shards."""
    if isinstance(averaged, FusedAveragedModel):
        return {canonical(name): value for name, value in unwrap(averaged.module).state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it holds no model yet
        whole = averaged.full_state_dict()
    head = "module."
    return {name[len(head) :]: value for name, value in whole.items() if name.startswith(head)}


def _held(averaged: Any) -> dict[str, bool]:
    """Return the names of the params that an average holds, and whether it averages them: ``include`` may say no."""
    held: dict[str, bool] = {}
    if isinstance(averaged, FusedAveragedModel):
        for names, tensor, is_buffer in each_average(averaged.module):
            held |= {} if is_buffer else dict.fromkeys(names, averaged._includes(names[0], tensor))
    else:
        for share in averaged._shares:
            held |= {} if share.holding.is_buffer else dict.fromkeys(share.holding.names, True)
    return held


def _lost_params(kind: Kind, reading: Reading, averaged: Any, model: Module, lacking: Sequence[str]) -> list[str]:
    """Return what is lost as the average in a state lacks params.

    Raises:
        ValueError: it lacks params that are trained, and its tool would not leave them out.
    """
    params = {canonical(name): param for name, param in unwrap(model).named_parameters(remove_duplicate=False)}
    held = _held(averaged)
    left_out = [name for name in lacking if not held.get(name, True)]
    frozen = [name for name in lacking if name in params and not params[name].requires_grad and name not in left_out]
    buffers = [name for name in lacking if name not in params and name not in held]
    trained = [name for name in lacking if name not in {*left_out, *frozen, *buffers}]
    if trained and not reading.follows_optimizer:
        raise ValueError(
            f"source must have an average of each param that is trained, got none of {few(trained)}: leave them out "
            f"of this average by include=, or freeze them, if {kind.writer} has not averaged them"
        )
    named = {"params that the optimizer does not hold": trained, "frozen params": frozen}
    named |= {"params that include= leaves out": left_out, "buffers": buffers}
    origin = "the trained model" if reading.of_model else "the average"
    return [
        f"{what}, which the state does not have: {origin} has {few(names)}" for what, names in named.items() if names
    ]


def _lost_bits(averaged: Any, model: Module, weights: Mapping[str, Any]) -> list[str]:
    """Return what is lost as a state has its tensors in other dtypes.

    Raises:
        ValueError: it has integers, bools or complex numbers for a param of another kind.
    """
    owner = averaged.module if isinstance(averaged, FusedAveragedModel) else model
    kept: dict[str, list[str]] = {}
    for raw, param in unwrap(owner).named_parameters(remove_duplicate=False):
        name = canonical(raw)
        value = weights.get(name)
        if not isinstance(value, Tensor):
            continue
        if _class_of(value) != _class_of(param):
            raise ValueError(f"the state must have {name!r} as {_class_of(param)}, got {value.dtype}")
        if value.is_floating_point() and value.dtype.itemsize < 4:
            kept.setdefault(f"all but {value.dtype}, in which the state has ", []).append(name)
        elif value.is_floating_point() and value.dtype.itemsize > 4 and param.dtype != value.dtype:
            kept.setdefault(f"{value.dtype}, from which are rounded ", []).append(name)
    return [what + few(names) for what, names in kept.items()]


def _class_of(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex numbers"
    return "floating-point numbers" if tensor.is_floating_point() else str(tensor.dtype)


def _take(averaged: Any, state: Mapping[str, Any]) -> None:
    if isinstance(averaged, FusedAveragedModel):
        averaged.load_state_dict(state)
    else:
        averaged.load_full_state_dict(state)


def _take_rule(averaged: Any, kind: Kind, rule: Rule) -> None:
    """Set the rule of a state that is loaded."""
    before = averaged.rule
    if before not in (rule, EqualAverage()):  # the latter is the default
        own = _spell(before)
        warn_user(f"the rule {_spell(rule)} of the state of {kind.writer} replaces the average's, {own}")
    if before != rule:
        averaged.rule = rule
