"""States with the model's own names, behind a prefix or in an entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.nn import Module

from .reading import Reading, Source, count_in, entry, section, under


def read_torch(source: Source) -> Reading:
    planes = {key: value for key, value in source.items() if key != "n_averaged" and not key.startswith("module.")}
    return Reading(under(source, "module."), planes=planes, count=count_in(source, "n_averaged"))


def read_timm(source: Source) -> Reading:
    lost = ["decay and warm-up, which the state does not have: the average keeps its rule"]
    weights = section(source, "state_dict_ema") if "state_dict_ema" in source else under(source, "module.")
    if "state_dict_ema" in source and "state_dict" in source:
        lost.append("state_dict: the trained model, which it loads itself")
    return Reading(
        weights,
        advice="the number of updates less update_after_step, or 0 if that is below 0",
        zero_if="the average is still a copy, as update(step=) has not passed update_after_step",
        lost=tuple(lost),
    )


def read_ema_pytorch(source: Source) -> Reading:
    steps = count_in(source, "step")
    lost = [
        "beta, inv_gamma, power, min_value, update_after_step and update_every, which the state does not have: the "
        "average keeps its rule"
    ]
    if any(str(key).startswith("online_model.") for key in source):
        lost.append("online_model: the trained model, which it loads itself")
    return Reading(
        under(source, "ema_model."),
        count=None if steps else 0,
        advice=(
            "max(0, ceil(step / update_every) - update_after_step // update_every); "
            f"step is {steps}, so with the defaults 10 and 100 it is {max(0, -(-steps // 10) - 10)}"
        ),
        may_be_copy=True,
        steps=steps,
        lost=tuple(lost),
    )


def read_lightning(source: Source) -> Reading:
    own = section(source, "averaging_state")
    planes = {key: value for key, value in own.items() if key != "n_averaged"}
    lost = ["decay and schedule, which the state does not have: the average keeps its rule"]
    if "current_model_state" in source:
        lost.append("current_model_state: the trained model, which it loads itself")
    steps = count_in(source, "global_step") if "global_step" in source else None
    count = count_in(own, "n_averaged", name="source['averaging_state']")
    return Reading(section(source, "state_dict"), planes=planes, count=count, steps=steps, lost=tuple(lost))


def read_mmengine(source: Source) -> Reading:
    lost = [
        "the kind of average with momentum, gamma and interval, which the state does not have: the average keeps its "
        "rule. With an interval pass num_averaged=ceil(steps / interval)"
    ]
    if "ema_state_dict" not in source:
        count = count_in(source, "steps")
        return Reading(under(source, "module."), count=count, steps=count, lost=tuple(lost))
    lost.append("ema_state_dict: the trained model, as EMAHook exchanges both in its files")
    count = count_in(section(source, "ema_state_dict"), "steps", name="source['ema_state_dict']")
    meta = source.get("meta")
    steps = count_in(meta, "iter", name="source['meta']") if isinstance(meta, Mapping) and "iter" in meta else None
    return Reading(section(source, "state_dict"), count=count, steps=steps, lost=tuple(lost))


def read_ignite(source: Source) -> Reading:
    lost = ("momentum, which the state does not have: the average keeps its rule",)
    return Reading(source, advice="the number of updates and one more", begins_as_copy=True, lost=lost)


def read_composer(source: Source) -> Reading:
    state = section(source, "state") if "state" in source else source
    model, algorithms = section(state, "model", "source['state']"), dict(each_algorithm(state))
    if "EMA" not in algorithms:
        swa = algorithms["SWA"]
        own = section(swa, "swa_model", "the state of SWA")
        started = bool(entry(swa, "swa_started", "the state of SWA"))
        models = count_in(own, "n_averaged", name="the state of SWA") if started else 0
        schedule = "swa_start, swa_end and the learning rates, which the state does not have"
        return Reading(under(own, "module."), count=models, steps=_batches(state), lost=(schedule,))
    ema = entry(algorithms, "EMA", "source['state']['algorithms']")
    weights: dict[str, Any] = dict(model)
    of_model: tuple[str, ...] = ()
    if not entry(ema, "ema_weights_active", "the state of EMA"):
        own = section(ema, "ema_model", "the state of EMA")
        parts = [own[key] for key in ("named_parameters_dict", "named_buffers_dict") if key in own] or [own]
        averages = {name: value for part in parts for name, value in part.items()}  # before 0.13 it was a state dict
        of_model, weights = tuple(name for name in weights if name not in averages), weights | averages
    lost = (
        "smoothing or half_life and the schedule, which the state does not have: the average keeps its rule",
        "the trained model, which Composer exchanges with the average when it saves",
    )
    started = bool(entry(ema, "ema_started", "the state of EMA"))
    advice = "the number of updates and one more"
    count = None if started else 0
    steps = _batches(state)
    return Reading(
        weights, count=count, advice=advice, begins_as_copy=started, steps=steps, of_model=of_model, lost=lost
    )


def each_algorithm(state: Source) -> Iterator[tuple[str, Any]]:
    """Yield the algorithms in a state of Composer, each with its state. Older releases have a mapping, others pairs."""
    algorithms = state["algorithms"]
    for each in algorithms.items() if isinstance(algorithms, Mapping) else algorithms:
        if isinstance(each, (tuple, list)) and len(each) == 2 and isinstance(each[1], Mapping):
            yield each[0], each[1]


def _batches(state: Source) -> int | None:
    timestamp = state.get("timestamp")
    inner = timestamp.get("Timestamp", timestamp) if isinstance(timestamp, Mapping) else {}
    return count_in(inner, "batch", name="the timestamp") if isinstance(inner, Mapping) and "batch" in inner else None


def read_ultralytics(source: Source) -> Reading:
    ema, steps = entry(source, "ema"), count_in(source, "updates")
    weights = ema.state_dict() if isinstance(ema, Module) else section(source, "ema")
    lost = ("decay and tau, which the state does not have: the average keeps its rule",)
    count = steps + 1  # the initial model is the first
    return Reading(weights, count=count, begins_as_copy=True, steps=steps, lost=lost)
