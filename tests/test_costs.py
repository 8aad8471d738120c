"""No call takes more than docs/costs.md says: gates that the load of the machine cannot move."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch import nn

from swafast import FusedAveragedModel
from swafast.backends import cpu
from swafast.loop.guard import Guard
from swafast.op import launches
from swafast.op.plan import Plan
from swafast.terms.rules import EqualAverage
from tests import costs
from tests.conftest import NO_LIBRARY
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{NO_LIBRARY}: {cpu.unavailable()}")


def hold(measured: dict[str, costs.Cost]) -> None:
    """Hold calls to their rows of the page."""
    names, *_ = (table := costs.read_table("costs")).values()
    found = [
        f"{call}: {value} {name}, at most {limit}"
        for call, cost in measured.items()
        for name, limit in zip(names, table[call], strict=True)
        if (value := asdict(cost)[name]) > int(limit)
    ]
    assert not found, "; ".join(found)


def hold_peaks(column: str, measured: dict[str, float]) -> None:
    """Hold phases to a column of the page."""
    columns, *_ = (table := costs.read_table("peaks")).values()
    limits = {phase: float(table[phase][columns.index(column)]) for phase in measured}
    assert [(phase, peak, limits[phase]) for phase, peak in measured.items() if peak > limits[phase]] == []


def test_no_call_takes_more_than_its_row() -> None:
    hold(costs.costs())


def test_averages_that_others_attached_cost_nothing() -> None:
    model = costs.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachments = [FusedAveragedModel(model).attach(optimizer) for _ in range(3)]
    hold(costs.costs())
    assert len(attachments) == 3  # alive until here


@pytest.mark.distributed
@pytest.mark.parametrize("mode", costs.MODES)
def test_no_call_on_a_rank_takes_more_than_its_row(mode: str) -> None:
    for measured in run_ranks(2, costs.rank_costs, mode):
        hold(measured)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_phase_takes_more_memory(dtype: torch.dtype) -> None:
    hold_peaks(str(dtype).removeprefix("torch."), costs.peaks(dtype))


@pytest.mark.distributed
@pytest.mark.parametrize("mode", costs.MODES)
def test_no_phase_on_a_rank_takes_more_memory(mode: str) -> None:
    for measured in run_ranks(2, costs.rank_peaks, mode):
        hold_peaks(f"{mode.upper()}, 2 ranks", measured)


def test_an_update_takes_as_few_calls_as_was_asked() -> None:
    calls, files, *_ = costs.read_table("costs")["update_parameters"]
    assert int(calls) <= 30
    assert int(files) <= 7


def test_a_swap_of_many_params_takes_a_few_calls_for_each() -> None:
    counts = []
    for number in (200, 400):
        model = nn.ParameterList([nn.Parameter(torch.zeros(4)) for _ in range(number)])
        averaged = FusedAveragedModel(model)
        averaged.update_parameters(model)
        counts.append([costs.python_calls(lambda: costs.swap(averaged, model)) for _ in range(2)])  # noqa: B023
    (first, again), (first_of_twice, again_of_twice) = counts
    assert first_of_twice - first <= 200 * 40
    assert again_of_twice - again <= 200 * 4


def test_a_binding_is_kept_for_each_of_three_models(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Plan] = []
    plan = Plan.__init__
    monkeypatch.setattr(Plan, "__init__", lambda self, *args: (planned.append(self), plan(self, *args))[1])
    models = [costs.make_model() for _ in range(4)]
    averaged = FusedAveragedModel(models[0])
    for _ in range(3):
        for model in models[:3]:
            averaged.update_parameters(model)
            with averaged.swapped_into(model):
                pass
    assert len(planned) == 3
    averaged.update_parameters(models[3])  # takes the place of the one that was longest out of use
    for model in (models[2], models[1], models[3]):
        averaged.update_parameters(model)
    assert len(planned) == 4
    averaged.update_parameters(models[0])
    assert len(planned) == 5


def test_a_binding_that_no_longer_fits_keeps_no_memory() -> None:
    model = nn.BatchNorm1d(4)
    models = [model, *(copy.deepcopy(model) for _ in range(2))]
    averaged = FusedAveragedModel(model, backend="reference")  # this backend keeps the tensors that it writes
    replaced = []
    for each in models:
        averaged.module.running_mean = torch.zeros(4)
        replaced.append(weakref.ref(averaged.module.running_mean.untyped_storage()))
        averaged.update_parameters(each)
    averaged.module.running_mean = torch.zeros(4)
    averaged.update_parameters(model)
    assert [storage() for storage in replaced] == [None] * 3


# Each gate kills a bug


def settle_twice(patch: pytest.MonkeyPatch) -> None:
    refuse = Guard.refuse_while_swapped
    patch.setattr(Guard, "refuse_while_swapped", lambda self, action: (self.settle(action), refuse(self, action))[1])


def prepare_each_exchange(patch: pytest.MonkeyPatch) -> None:
    exchange = Plan.exchange

    def anew(self: Plan, *args: object) -> object:
        self._exchange = None
        return exchange(self, *args)  # type: ignore[arg-type]

    patch.setattr(Plan, "exchange", anew)


def copy_the_params(patch: pytest.MonkeyPatch) -> None:
    update = Plan.update

    def copied(self: Plan, params: object, *args: object, **options: object) -> None:
        update(self, [param.clone() for param in params], *args, **options)  # type: ignore[arg-type,attr-defined]

    patch.setattr(Plan, "update", copied)


def one_launch_for_each_pair(patch: pytest.MonkeyPatch) -> None:
    def prepare(pairs: object, backends: object) -> list[launches.Work]:
        return [launches.Work(cpu, (i,), cpu.prepare([pair])) for i, pair in enumerate(pairs)]  # type: ignore[arg-type,var-annotated]

    patch.setattr(launches, "prepare", prepare)


def ask_the_rule_twice(patch: pytest.MonkeyPatch) -> None:
    terms = EqualAverage.kernel_terms
    patch.setattr(EqualAverage, "kernel_terms", lambda self: (terms(self), terms(self))[1])


@pytest.mark.parametrize(
    ("plant", "seen"),
    [
        (settle_twice, "calls"),
        (prepare_each_exchange, "swapped_into, there and back: .* calls"),
        (copy_the_params, "update_parameters: 20 allocations"),
        (one_launch_for_each_pair, "update_parameters: 20 launches"),
        (ask_the_rule_twice, "update_parameters: .* calls"),
    ],
)
def test_the_gate_kills_the_bug(
    plant: Callable[[pytest.MonkeyPatch], None], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=seen):
        test_no_call_takes_more_than_its_row()
