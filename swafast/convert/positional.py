"""States without names: one tensor for each param, in the order in which their tool was given the params."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ..terms.misfits import few
from ..terms.names import canonical, unwrap
from ..terms.rules import ExponentialAverage, raised_to
from .reading import Reading, Source, count_in, entry, flag_in, list_in

_NO_BUFFERS = "buffers, which the state does not have: the average keeps its own"


def read_diffusers(source: Source) -> Reading:
    decay, min_decay = entry(source, "decay"), entry(source, "min_decay")
    after, steps = count_in(source, "update_after_step"), count_in(source, "optimization_step")
    if flag_in(source, "use_ema_warmup"):
        gamma, power = entry(source, "inv_gamma"), entry(source, "power")
        rule = ExponentialAverage(decay, "power", inv_gamma=gamma, power=power)
    else:
        rule = ExponentialAverage(decay, "ratio")
    waits = f"update_after_step: the average is a copy up to step {after + 1}, so attach(optimizer, start={after + 1})"
    lost = [waits] if steps <= after else []
    weights: Mapping[str, Tensor] | Sequence[Tensor]
    named = {str(key): value for key, value in source.items() if isinstance(value, Tensor)}
    if "shadow_params" in source or not named:  # else it is a config.json with the tensors beside it
        if not named and "shadow_params" not in source:
            raise ValueError(
                "source must have 'shadow_params', or the tensors of the saved model beside the entries of its "
                f"config.json, got {few(source)}"
            )
        weights = list_in(source, "shadow_params")
        lost.append(_NO_BUFFERS)
    else:
        weights = named
    count = max(0, steps - after)
    return Reading(
        weights, "shadow_params", count=count, rule=raised_to(min_decay, rule), steps=steps, lost=tuple(lost)
    )


def read_torch_ema(source: Source) -> Reading:
    decay, weights, lost = entry(source, "decay"), list_in(source, "shadow_params"), [_NO_BUFFERS]
    if source.get("collected_params") is not None:
        lost.append("collected_params: the params that store() had put aside")
    if entry(source, "num_updates") is None:
        rule, steps = ExponentialAverage(decay), None
    else:
        rule, steps = ExponentialAverage(decay, "ratio"), count_in(source, "num_updates")
    count = None if steps is None else steps + 1  # the initial model is the first
    return Reading(weights, "shadow_params", count=count, begins_as_copy=True, rule=rule, steps=steps, lost=tuple(lost))


def read_nemo(source: Source) -> Reading:
    weights, rule = list_in(source, "ema"), ExponentialAverage(entry(source, "decay"))
    steps, every = count_in(source, "current_step"), count_in(source, "every_n_steps", least=1)
    lost = [_NO_BUFFERS, "opt: the optimizer's own state, which it loads itself"]
    if every > 1:
        lost.append(f"every_n_steps: attach(optimizer, start=1, every={every})")
    opt = source["opt"]
    groups = opt.get("param_groups", [None]) if isinstance(opt, Mapping) else [None]
    return Reading(
        weights,
        "ema",
        count=-(-steps // every) + 1,  # the initial model is the first
        begins_as_copy=True,
        rule=rule,
        steps=steps,
        num_groups=len(groups),
        follows_optimizer=True,
        lost=tuple(lost),
    )


def in_names(reading: Reading, model: Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Return the weights of a state without names under the names that their params have in ``model``.

    Tied names have one tensor. If the state has as many tensors as the model has trainable params, it is of these.

    Args:
        optimizer: if the state has the order of its params.

    Raises:
        ValueError: the number of tensors, their shapes or their dtypes are not those of the params.
    """
    params: dict[int, tuple[list[str], Tensor]] = {}
    for raw, each in unwrap(model).named_parameters(remove_duplicate=False):
        params.setdefault(id(each), ([], each))[0].append(canonical(raw))
    ordered = list(params.values()) if optimizer is None else _as_in(optimizer, params)
    if optimizer is None and reading.num_groups > 1:
        raise ValueError(
            f"optimizer must be given, got None: source[{reading.key!r}] has the order of its params, and it has "
            f"{reading.num_groups} param groups"
        )
    given = list(reading.weights)
    trainable = [each for each in ordered if each[1].requires_grad]
    if len(given) == len(trainable):
        ordered = trainable
    if len(given) != len(ordered):
        also = f", or {len(trainable)}, one for each trainable one" if len(trainable) < len(ordered) else ""
        raise ValueError(
            f"source[{reading.key!r}] must have {len(ordered)} tensors, one for each param{also}, got {len(given)}: "
            "the state is of another model"
        )
    weights: dict[str, Tensor] = {}
    for index, (tensor, (names, param)) in enumerate(zip(given, ordered, strict=True)):
        assert isinstance(tensor, Tensor)
        if tensor.shape != param.shape:
            raise ValueError(
                f"source[{reading.key!r}][{index}] must have the shape {tuple(param.shape)} of {names[0]!r}, got "
                f"{tuple(tensor.shape)}: the state is of another model, or has its params in another order"
            )
        weights |= dict.fromkeys(names, tensor)
    return weights


def _as_in(optimizer: Optimizer, params: Mapping[int, tuple[list[str], Tensor]]) -> list[tuple[list[str], Tensor]]:
    """Return the names and params in the order of an optimizer."""
    held: list[Tensor] = [param for group in optimizer.param_groups for param in group["params"]]
    for param in held:
        if id(param) not in params:
            shape = tuple(param.shape)
            raise ValueError(f"optimizer must hold params of the model only, got one of the shape {shape} besides")
    return [params[id(param)] for param in held]
