"""Bad input: an error names the parameter, and nothing has changed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages, Rule
from swafast.backends.reference import ReferenceLaunch
from swafast.optim import SWA, ComposerSWA, cyclical_lr
from swafast.posthoc.profiles import Profile
from tests.support import EveryKind, refused, unchanged, updated_once


def _change(name: str, make: Callable[[nn.Parameter], torch.Tensor]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        param = getattr(model, name)
        value = make(param.detach())
        setattr(model, name, nn.Parameter(value, requires_grad=value.is_floating_point()))

    return change


def _subclass(param: torch.Tensor) -> torch.Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(param, param.clone())


SPOILED: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "missing": (lambda m: delattr(m, "long"), r"missing 'long'"),
    "surplus": (lambda m: m.register_parameter("surplus", nn.Parameter(torch.zeros(3))), r"unexpected 'surplus'"),
    "renamed": (lambda m: setattr(m, "width", m._parameters.pop("long")), r"missing 'long'; unexpected 'width'"),
    "missing buffer": (lambda m: delattr(m, "mask"), r"buffers .* missing 'mask'"),
    "shape": (_change("long", lambda p: p[:999].clone()), r"'long' must have the average's shape \(1000,\)"),
    "broadcastable shape": (_change("long", lambda p: p[:1].clone()), r"'long' must have .* got \(1,\)"),
    "extra dimension": (_change("long", lambda p: p[None].clone()), r"'long' must have .* got \(1, 1000\)"),
    "integer": (_change("long", lambda p: p.int()), r"'long' must have a dtype like .*float32, got torch.int32"),
    "complex": (_change("long", lambda p: p.cfloat()), r"'long' must have a dtype like .*float32, got torch.complex64"),
    "meta": (_change("long", lambda p: p.to("meta")), r"'long' of the model must hold data"),
    "sparse": (_change("long", lambda p: p.to_sparse()), r"'long' of the model must be dense"),
    "quantised": (
        _change("long", lambda p: torch.quantize_per_tensor(p, 0.1, 0, torch.qint8)),
        r"'long' of the model must not be quantised",
    ),
    "subclass": (_change("long", _subclass), r"'long' of the model must be a plain tensor, got TwoTensor"),
    "None": (lambda m: setattr(m, "long", None), r"missing 'long'"),
    "nested": (_change("long", lambda p: torch.nested.nested_tensor([p[:2], p[2:]])), r"'long'"),
    "memory taken away": (
        lambda m: m.long.untyped_storage().resize_(0),
        r"'long' of the model must have memory for its elements",
    ),
    "lazy": (lambda m: setattr(m, "long", nn.UninitializedParameter()), r"lazy parameter 'long'"),
    "empty": (
        lambda m: [setattr(p, "data", torch.empty(0)) for p in m.parameters()],
        r"model must hold its parameters",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "first"])
def test_a_model_that_does_not_match_changes_nothing(
    every_kind: EveryKind, case: str, planned: bool, backend: str
) -> None:
    spoil, message = SPOILED[case]
    average = FusedAveragedModel(every_kind, backend=backend)
    if planned:
        average.update_parameters(every_kind)
    good = copy.deepcopy(every_kind)
    spoil(every_kind)
    with refused(ValueError, message, average):
        average.update_parameters(every_kind)
    average.update_parameters(good)


@pytest.mark.parametrize("several", [True, False])
def test_an_average_is_not_averaged_into_itself(several: bool) -> None:
    model = nn.Linear(2, 2)
    root = FusedAverages(model, rules={"fast": EqualAverage()}) if several else FusedAveragedModel(model)
    averaged = root["fast"] if isinstance(root, FusedAverages) else root
    for itself in (root, averaged, averaged.module, nn.DataParallel(averaged.module)):
        with refused(ValueError, "model must be the one that is trained, got the averaged model itself", root):
            root.update_parameters(itself)
        with refused(ValueError, "model must be the one that is trained", root), averaged.swapped_into(averaged.module):
            pass


def test_an_average_that_overlaps_another_or_itself_is_refused() -> None:
    model = nn.ParameterDict({"a": nn.Parameter(torch.randn(4)), "b": nn.Parameter(torch.randn(4))})
    memory = torch.zeros(6)
    average = FusedAveragedModel(model)
    average.module["a"].data, average.module["b"].data = memory[:4], memory[2:]
    with pytest.raises(ValueError, match="averages must not overlap in memory, got 'a' and 'b'"):
        average.update_parameters(model)
    average.module["a"].data, average.module["b"].data = torch.zeros(1).expand(4), memory[:4]
    with pytest.raises(ValueError, match="average 'a' must not overlap itself"):
        average.update_parameters(model)
    assert not memory.any()
    assert average.n_averaged == 0


def test_an_expanded_param_of_the_model_is_averaged() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(1).expand(5))])
    average = updated_once(model)
    model[0] = nn.Parameter(torch.full((1,), 3.0).expand(5))
    average.update_parameters(model)
    assert average.module[0].tolist() == [2.0] * 5


def test_averages_assigned_from_the_models_own_tensors_get_memory_of_their_own() -> None:
    model = nn.Linear(3, 3)
    average = FusedAveragedModel(model)
    average.module.load_state_dict(model.state_dict(), assign=True)
    assert average.module.weight.data_ptr() == model.weight.data_ptr()
    average.n_averaged.fill_(1)
    average.update_parameters(model)
    assert average.module.weight.data_ptr() != model.weight.data_ptr()


RULES = {"mean": EqualAverage(), "fast": ExponentialAverage(0.9)}


def one(model: Any = None, **options: Any) -> object:
    return FusedAveragedModel(nn.Linear(2, 2) if model is None else model, **options)


def several(**options: Any) -> object:
    return FusedAverages(nn.Linear(2, 2), **options)


def swa(optimizer: Any = None, **options: Any) -> object:
    return SWA(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1) if optimizer is None else optimizer, **options)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (one, {"avg_fn": lambda a, p, n: p, "multi_avg_fn": lambda a, p, n: None}, ValueError, "only one of"),
        (one, {"rule": EqualAverage(), "multi_avg_fn": lambda a, p, n: None}, ValueError, "only one of"),
        (one, {"rule": 0.999}, TypeError, r"rule must be a Rule such as ExponentialAverage\(0.999\), got float 0.999"),
        (one, {"rule": ExponentialAverage}, TypeError, "rule must be a Rule .* got the class ExponentialAverage"),
        (one, {"device": ExponentialAverage(0.9)}, TypeError, "device must be .* pass a rule as rule="),
        (one, {"device": 0.999}, TypeError, "device must be .* got 0.999: pass a rule as rule="),
        (several, {"device": 0.999, "rules": RULES}, TypeError, "device must be .* got 0.999: pass a rule as rule="),
        (one, {"device": True}, TypeError, "device must be a torch.device, got True"),
        (one, {"device": -1}, RuntimeError, "device must be one of this machine, such as 'cpu', got -1"),
        (
            several,
            {"device": "cpuu", "rules": RULES},
            RuntimeError,
            "device must be one of this machine.* got 'cpuu': .*cuda",
        ),
        (one, {"multi_avg_fn": "ema"}, TypeError, "multi_avg_fn must be callable, got str"),
        (one, {"include": "lora"}, TypeError, "include must be a function"),
        (one, {"include": lambda name, param: "lora" in name}, ValueError, "include must pick a parameter"),
        (one, {"format": "bfloat16"}, ValueError, "format must be one of 'float32', 'exact', .*or None"),
        (one, {"format": "exact", "avg_fn": lambda a, p, n: p}, ValueError, "format must be None"),
        (one, {"backend": "gpu"}, ValueError, "backend must be one of 'cuda', 'cpu', 'triton', 'reference', got 'gpu'"),
        (one, {"nonfinite": "ignore"}, ValueError, "nonfinite must be one of .*got 'ignore'"),
        (one, {"model": {}}, TypeError, r"model must be a torch\.nn\.Module, got dict"),
        (one, {"model": nn.Sequential(nn.LazyLinear(3))}, ValueError, r"lazy parameter '0\.weight'"),
        (one, {"model": nn.ParameterList([nn.Parameter(torch.zeros(0))])}, ValueError, "ZeRO-3"),
        (one, {"rule": [EqualAverage()]}, TypeError, r"rule must be one Rule, got a list.* FusedAverages\("),
        (one, {"rule": {}}, TypeError, r"rule must be one Rule, got a dict.* FusedAverages\("),
        (several, {"rules": {}}, ValueError, "rules must name 1 to 16 averages, got 0"),
        (several, {"rules": {str(i): EqualAverage() for i in range(17)}}, ValueError, "rules must name .*got 17"),
        (several, {"rules": {"a": 0.9}}, TypeError, r"rules\['a'\] must be a Rule .*got 0.9"),
        (several, {"rules": {"a": EqualAverage}}, TypeError, r"rules\['a'\] must be a Rule"),
        (several, {"rules": {1: EqualAverage()}}, TypeError, "rules must have strings for names, got 1"),
        (several, {"rules": {"a.b": EqualAverage()}}, ValueError, "names without '.'.*got 'a.b'"),
        (several, {"rules": {"": EqualAverage()}}, ValueError, "got ''"),
        (several, {"rules": {"training": EqualAverage()}}, ValueError, "names other than 'training'"),
        (several, {"rules": [("a", EqualAverage())] * 2}, ValueError, "each name once, got 'a' twice"),
        (several, {"rules": [("a", EqualAverage(), 1)]}, TypeError, r"\(name, rule\) pairs"),
        (several, {"rules": [EqualAverage(), EqualAverage()]}, TypeError, r"\(name, rule\) pairs, got \[EqualAverage"),
        (several, {"rules": RULES, "format": "int4"}, ValueError, "format must be one of .*got 'int4'"),
        (several, {"rules": RULES, "format": {"slow": "exact"}}, ValueError, "format must name .*got 'slow'"),
        (several, {"rules": RULES, "format": {"fast": "int4"}}, ValueError, "format must be one of .*got 'int4'"),
        (several, {"rules": RULES, "seed": 0.5}, TypeError, "seed must be an int, got 0.5"),
        (several, {"rules": "fast"}, TypeError, "rules must be a mapping .*got 'fast'"),
        (several, {"rules": EqualAverage()}, TypeError, "rules must be a mapping .*got EqualAverage"),
        (swa, {"optimizer": nn.Linear(1, 1)}, TypeError, r"optimizer must be a torch\.optim\.Optimizer, got Linear"),
        (swa, {"swa_start": -1, "swa_freq": 1}, ValueError, "swa_start must be a whole number of steps >= 0 .*got -1"),
        (swa, {"swa_start": 1, "swa_freq": 0}, ValueError, "swa_freq must be a whole number of steps >= 1 .*got 0"),
        (swa, {"swa_start": 1.5, "swa_freq": 1}, ValueError, "swa_start must be a whole number"),
        (swa, {"swa_start": 1, "swa_freq": 1, "swa_lr": -0.1}, ValueError, "swa_lr must be >= 0, got -0.1"),
    ],
)
def test_bad_arguments_are_named(
    make: Callable[..., object], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_a_dtype_that_cannot_be_averaged_can_be_left_out() -> None:
    model = nn.ParameterDict(
        {"w": nn.Parameter(torch.randn(4)), "f8": nn.Parameter(torch.randn(4).to(torch.float8_e4m3fn), False)}
    )
    with pytest.raises(NotImplementedError, match=r"'f8' must have a dtype that can be averaged, got torch.float8"):
        FusedAveragedModel(model)
    average = updated_once(model, include=lambda name, param: name != "f8")
    assert torch.equal(average.module["f8"].view(torch.uint8), model["f8"].view(torch.uint8))


def test_a_bad_counter_is_refused(every_kind: EveryKind, backend: str) -> None:
    average = updated_once(every_kind, backend=backend)
    every_kind.drift()
    for counter, message in (
        (torch.tensor(-1), "n_averaged must be >= 0"),
        (torch.tensor(1, device="meta"), "n_averaged must hold a number"),
    ):
        average.n_averaged = counter
        with refused(ValueError, message, average.module):
            average.update_parameters(every_kind)
    with refused(ValueError, r"n_averaged must be one int64, got torch\.float32", average.module):
        average.n_averaged = torch.tensor(1.0)
    average.n_averaged = torch.tensor(1)
    average.update_parameters(every_kind)
    average.n_averaged.data = average.n_averaged.data.double()
    with refused(ValueError, "n_averaged must be one int64", average):
        average.update_parameters(every_kind)


class Broken(Rule):
    def weight(self, num_averaged: int) -> float:
        return float("nan")


def test_a_rule_that_gives_no_weight_is_refused(every_kind: EveryKind, backend: str) -> None:
    average = updated_once(every_kind, rule=Broken(), backend=backend)
    every_kind.drift()
    with refused(ValueError, r"weight\(\d+\) of the rule .*Broken.* must be in \[0, 1\], got nan", average):
        average.update_parameters(every_kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_params(every_kind: EveryKind, dtype: torch.dtype, value: float, backend: str) -> None:
    every_kind.to(dtype)
    policies = ("propagate", "raise", "skip")
    averages = {p: FusedAveragedModel(every_kind, nonfinite=p, backend=backend) for p in policies}
    for average in averages.values():
        average.update_parameters(every_kind)
    every_kind.drift()
    every_kind.long.data[500] = value
    averages["propagate"].update_parameters(every_kind)
    assert not averages["propagate"].module.long[500].isfinite()
    with unchanged(averages["skip"]):
        averages["skip"].update_parameters(every_kind)
    with refused(ValueError, "'long' must be finite", averages["raise"]):
        averages["raise"].update_parameters(every_kind)
    every_kind.long.data[500] = 0.0
    averages["skip"].update_parameters(every_kind)
    assert averages["skip"].n_averaged == 2


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_nan_is_seen_wherever_it_is(use_buffers: bool, several: bool, backend: str) -> None:
    """The rows of a launch's table begin at 0, and what is copied keeps its values too."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    mean = {"rules": {"mean": EqualAverage()}} if several else {}
    kind: Any = FusedAverages if several else FusedAveragedModel
    options = {"use_buffers": use_buffers, "backend": backend, **mean}
    skipping, raising = (kind(model, nonfinite=nonfinite, **options) for nonfinite in ("skip", "raise"))
    for averages in (skipping, raising):
        averages.update_parameters(model)
    bad = [*dict(model.named_parameters()), *(["1.running_mean", "1.running_var"] if use_buffers else [])]
    for name in bad:
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.add_(1)
        value = model.state_dict()[name].view(-1)
        for index in (0, -1):
            healthy = value[index].item()
            value[index] = float("nan")
            with unchanged(skipping):
                skipping.update_parameters(model)
            with refused(ValueError, f"{name!r} must be finite", raising):
                raising.update_parameters(model)
            value[index] = healthy
    model[1].running_mean[0] = float("inf")
    one = skipping["mean"] if several else skipping
    skipping.update_parameters(model)
    assert one.n_averaged == (1 if use_buffers else 2)
    assert one.module[1].running_mean[0].isinf() == (not use_buffers)


def test_a_failing_backend_is_seen_before_it_counts(every_kind: EveryKind, monkeypatch: pytest.MonkeyPatch) -> None:
    average = updated_once(every_kind, rule=ExponentialAverage(0.9))

    def fail(*args: object, **options: object) -> None:
        raise MemoryError("out of memory")

    monkeypatch.setattr(ReferenceLaunch, "update", fail)  # it serves 'gapped', and runs before the native launch
    every_kind.drift()
    with refused(MemoryError, "out of memory", average):
        average.update_parameters(every_kind)


def test_nobody_takes_the_memory_of_an_average_away() -> None:
    average = updated_once(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="not resizable"):
        average.module.weight.untyped_storage().resize_(0)


def test_a_negated_view_at_the_same_address_is_averaged_with_its_sign() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(4))])
    average = updated_once(model)
    model[0].data = torch._neg_view(model[0].data)
    average.update_parameters(model)
    assert average.module[0].tolist() == [0.0] * 4


class Raising(Rule):
    """A rule with one weight and then none: an update must ask once."""

    def __init__(self) -> None:
        self.asked = 0

    def weight(self, num_averaged: int) -> float:
        self.asked += 1
        if self.asked > 1:
            raise RuntimeError("asked twice")
        return 0.5


def test_a_rule_is_asked_once_however_many_backends_are_at_work() -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4, dtype=torch.float64))])
    average = updated_once(model, rule=Raising())
    with torch.no_grad():
        for param in model:
            param.fill_(1.0)
    average.update_parameters(model)
    assert [p.tolist() for p in average.module] == [[0.5] * 4] * 2


# Integers of numpy and torch


def _attached(step: Any = None, **spans: Any) -> object:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    FusedAveragedModel(model).attach(optimizer, step=step, **spans)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)["param_groups"]


def _composer(**options: Any) -> object:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    swa = ComposerSWA(FusedAveragedModel(model), optimizer, **({"max_duration": "4ep", "steps_per_epoch": 2} | options))
    return swa.attachment.schedule


def _rates(**options: Any) -> object:
    schedule = cyclical_lr(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), max_lr=0.5, min_lr=0.1, **options)
    return [schedule._rate(step) for step in range(9)]


def _rounded(**options: Any) -> object:
    torch.manual_seed(0)
    averaged = FusedAveragedModel(nn.Linear(9, 9), format="compact", rule=EMA, num_averaged=3, **options)
    averaged.update_parameters(nn.Linear(9, 9))
    return averaged.averaged_state_dict()["weight"].tolist()


EMA = ExponentialAverage(0.9)
#: Every call that takes integers, with some, and what it gives.
INTEGERS: list[tuple[Callable[..., object], dict[str, int]]] = [
    (_attached, {"start": 3, "every": 2, "end": 9, "duration": 12, "steps_per_epoch": 3, "step": 4}),
    (_attached, {"steps_per_epoch": 3}),
    (_composer, {"steps_per_epoch": 3, "anneal_steps": 5}),
    (_composer, {"max_duration": 12}),
    (_rates, {"cycle": 4}),
    (_rounded, {"seed": 7}),
    (lambda num_averaged: int(one(num_averaged=num_averaged).n_averaged), {"num_averaged": 5}),  # type: ignore[attr-defined]
    (lambda num_averaged: int(several(rules=RULES, num_averaged=num_averaged)["fast"].n_averaged), {"num_averaged": 5}),  # type: ignore[index]
    (lambda **options: [vars(swa(**options))[name] for name in options], {"swa_start": 3, "swa_freq": 2}),
    (lambda num_averaged: Profile(EMA, num_averaged), {"num_averaged": 5}),
]


@pytest.mark.parametrize(("call", "integers"), INTEGERS)
def test_integers_of_numpy_and_torch_are_pythons(call: Callable[..., object], integers: dict[str, int]) -> None:
    expected = repr(call(**integers))
    for kind in (np.int64, np.uint8, np.array, torch.tensor):
        assert repr(call(**{name: kind(value) for name, value in integers.items()})) == expected


@pytest.mark.parametrize(("call", "integers"), INTEGERS)
@pytest.mark.parametrize("bad", [np.True_, torch.tensor(True), np.array([2, 4]), np.float32(4.5), "four"], ids=repr)
def test_what_is_no_integer_is_named(call: Callable[..., object], integers: dict[str, int], bad: Any) -> None:
    for name in integers:
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be .*, got "):
            call(**(integers | {name: bad}))
