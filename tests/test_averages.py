"""Several averages of one model in one pass: each has the same bits as alone, and an update moves all or none."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages, PowerAverage, Rule
from swafast.backends import cpu, rows
from swafast.backends.contract import Update
from tests.support import EveryKind, differing, refused, tensors_of, unchanged, update

RULES: dict[str, Rule] = {
    "mean": EqualAverage(),
    "fast": ExponentialAverage(0.9),
    "warm": ExponentialAverage(0.999, warmup="power"),
    "power": PowerAverage(6.94),
}
FORMATS = [None, "float32", "exact", "mirrored", "compact", "compensated", "half"]


class Doubling(Rule):
    """A rule that only Python knows."""

    def weight(self, num_averaged: int) -> float:
        return 2.0**-num_averaged


def each_alone(model: nn.Module, rules: dict[str, Rule] = RULES, format: Any = None) -> dict[str, FusedAveragedModel]:
    """Make the average of each rule as one of its own; ``format`` as for several averages."""
    formats = format if isinstance(format, dict) else dict.fromkeys(rules, format)
    return {name: FusedAveragedModel(model, rule=rule, format=formats.get(name)) for name, rule in rules.items()}


def require_equal(averages: FusedAverages, alone: dict[str, FusedAveragedModel]) -> None:
    for name, each in alone.items():
        assert differing(tensors_of(averages[name]), tensors_of(each)) == []


@pytest.mark.parametrize("format", [*FORMATS, {"mean": "compensated", "fast": "compact", "warm": None}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_equals_one_that_is_updated_by_itself(
    every_kind: EveryKind, format: Any, dtype: torch.dtype, backend: str, small_chunks: int
) -> None:
    model = every_kind.to(dtype)
    averages = FusedAverages(model, rules=RULES, format=format, backend=backend)
    alone = each_alone(model, format=format)
    update(model, averages, *alone.values(), updates=4)
    require_equal(averages, alone)
    assert [int(each.n_averaged) for each in averages.values()] == [4] * len(RULES)


def test_rules_of_python_and_counts_of_their_own(every_kind: EveryKind) -> None:
    rules = {"mean": EqualAverage(), "doubling": Doubling()}
    averages, alone = FusedAverages(every_kind, rules=[*rules.items()]), each_alone(every_kind, rules)
    update(every_kind, averages, *alone.values(), updates=2)
    for one in (averages["mean"], alone["mean"]):
        one.update_parameters(every_kind)  # it alone
    update(every_kind, averages, *alone.values(), updates=2)
    require_equal(averages, alone)
    assert [int(each.n_averaged) for each in averages.values()] == [5, 4]


def test_as_many_as_one_launch_takes(every_kind: EveryKind) -> None:
    rules: dict[str, Rule] = {f"decay {i}": ExponentialAverage(i / 20) for i in range(16)}
    averages, alone = FusedAverages(every_kind, rules=rules), each_alone(every_kind, rules)
    update(every_kind, averages, *alone.values(), updates=3)
    require_equal(averages, alone)


def test_one_launch_and_one_read_of_the_params(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(7, 3))
    averages = FusedAverages(model, rules=RULES)
    averages.update_parameters(model)
    calls: list[rows.Rows] = []
    launched = cpu.NativeLaunch.update
    prepared = rows.Rows.__init__

    def launch(self: cpu.NativeLaunch, *args: Any, **options: Any) -> None:
        calls.append(made[-1])
        launched(self, *args, **options)

    made: list[rows.Rows] = []
    monkeypatch.setattr(rows.Rows, "__init__", lambda self, pairs: (prepared(self, pairs), made.append(self))[0])
    monkeypatch.setattr(cpu.NativeLaunch, "update", launch)
    averages._bindings._recent = []  # plan anew
    averages.update_parameters(model)
    (row,) = calls
    # Chunks, what a kernel walks over, are those of the params once; the other rows follow.
    chunked = row.runs()[:, [0, 2]].tolist()
    assert [numel for _, numel in chunked] == [10_000, 100, 21, 3]
    assert [row.table[first].followers for first, _ in chunked] == [3] * 4


def test_use_of_one_leaves_all_where_they_are(every_kind: EveryKind) -> None:
    averages = FusedAverages(every_kind, rules=RULES)
    update(every_kind, averages, updates=2)
    places = [tensor.data_ptr() for tensor in averages.state_dict().values()]
    plan = averages._bindings.latest
    with unchanged(every_kind), averages["fast"].swapped_into(every_kind):
        with pytest.raises(RuntimeError, match="swapped back"):
            averages.update_parameters(every_kind)
        with pytest.raises(RuntimeError, match="swapped back"):
            averages.state_dict()
    averages["power"].copy_to(every_kind)
    averages["mean"].update_parameters(every_kind)
    update(every_kind, averages, updates=1)
    assert [tensor.data_ptr() for tensor in averages.state_dict().values()] == places
    assert averages._bindings.latest is plan


@pytest.mark.parametrize("format", FORMATS)
def test_states_copies_and_pickles_go_on_bit_for_bit(every_kind: EveryKind, format: str | None) -> None:
    model = every_kind.bfloat16()
    averages = FusedAverages(model, rules=RULES, format=format, seed=3)
    update(model, averages, updates=3)
    loaded = FusedAverages(copy.deepcopy(model), rules=RULES, format=format, seed=3)
    state = copy.deepcopy(averages.state_dict())
    assert {key.partition(".")[0] for key in state} == set(RULES)
    assert "fast.n_averaged" in state
    assert "fast.module.linear.weight" in state
    loaded.load_state_dict(state)
    others = [loaded, copy.deepcopy(averages), pickle.loads(pickle.dumps(averages))]
    update(model, averages, *others, updates=3)
    for other in others:
        assert differing(tensors_of(averages), tensors_of(other)) == []


def test_a_failed_load_changes_no_average(every_kind: EveryKind) -> None:
    averages = FusedAverages(every_kind.bfloat16(), rules=RULES)
    update(every_kind, averages, updates=2)
    state = copy.deepcopy(averages.state_dict())
    for value in state.values():
        value.add_(1) if value.is_floating_point() else None
    for spoil in (
        lambda: state.pop("power.remainder.long"),
        lambda: state.update({"power.module.long": torch.zeros(3)}),
        lambda: state.update({"other.n_averaged": torch.tensor(1)}),
    ):
        spoil()
        with refused(RuntimeError, r"power|other", averages):
            averages.load_state_dict(state)


@pytest.mark.parametrize("bad", [3, "x", torch.zeros(16, 8, device="meta"), torch.eye(16, 8).to_sparse()], ids=str)
def test_a_plane_that_is_none_changes_no_average(bad: object) -> None:
    model = nn.Linear(8, 16)
    averages = FusedAverages(model, rules=RULES, format={"mean": "compact", "power": "compensated"})
    averages.update_parameters(model)
    state = {key: value + 1 for key, value in averages.state_dict().items()}
    for key in ("power.compensation.weight", "power.module.weight", "fast.module.weight"):
        with refused(RuntimeError, r"Error\(s\) in loading state_dict", averages):
            averages.load_state_dict(state | {key: bad})


def test_all_move_and_cast_together(every_kind: EveryKind) -> None:
    averages = FusedAverages(every_kind, rules=RULES)
    update(every_kind, averages, updates=2)
    params = dict(every_kind.named_parameters())
    full = {name: {p: each.averaged_state_dict()[p] for p in params} for name, each in averages.items()}
    averages.bfloat16()
    assert all(each.module.long.dtype == torch.bfloat16 for each in averages.values())
    for name, each in averages.items():
        assert differing(full[name], {p: each.averaged_state_dict()[p] for p in params}) == []


def test_it_is_a_mapping_and_says_where_a_models_methods_are(every_kind: EveryKind) -> None:
    averages = FusedAverages(every_kind, rules=RULES, use_buffers=True)
    assert list(averages) == averages.keys() == list(RULES)
    assert len(averages) == len(RULES)
    assert "fast" in averages
    assert "slow" not in averages
    assert averages["fast"].rule == RULES["fast"]
    assert averages["fast"].use_buffers
    with pytest.raises(KeyError, match="'slow' is none of the averages 'mean', 'fast'"):
        averages["slow"]
    with pytest.raises(AttributeError, match=r"averages\['mean'\].swapped_into"):
        averages.swapped_into(every_kind)
    with pytest.raises(NotImplementedError, match=r"averages\['mean'\]"):
        averages(torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("to", "of"), [(["fast"], "mean"), (["mean"], "fast"), (["fast", "warm", "power"], "mean")])
def test_averages_that_were_assigned_another_ones_tensors_have_memory_of_their_own(
    dtype: torch.dtype, to: list[str], of: str
) -> None:
    model = EveryKind().to(dtype)
    averages = FusedAverages(model, rules=RULES)
    update(model, averages, updates=2)
    state = averages[of].state_dict()
    alone = each_alone(model)
    for name, each in alone.items():
        each.load_state_dict(averages[of if name in to else name].state_dict())
    for name in to:
        averages[name].load_state_dict(state, assign=True)
    update(model, averages, *alone.values(), updates=2)
    require_equal(averages, alone)


@pytest.mark.parametrize(
    "change",
    [
        lambda averages, other: setattr(averages, "fast", other),
        lambda averages, other: setattr(averages, "extra", other),
        lambda averages, other: setattr(averages, "fast", 3),
        lambda averages, other: averages.add_module("fast", other),
        lambda averages, other: averages.register_module("fast", other),
        lambda averages, other: delattr(averages, "fast"),
    ],
)
def test_no_average_comes_or_goes(change: Callable[[FusedAverages, nn.Module], None]) -> None:
    averages = FusedAverages(model := nn.Linear(2, 2), rules=RULES)
    before = averages.values()
    with pytest.raises(AttributeError, match=r"must stay as they are, got a change of '\w+': make new FusedAverages"):
        change(averages, FusedAveragedModel(model))
    assert averages.values() == before
    averages.note = "ours"
    del averages.note


def test_a_copy_of_a_compiled_average_runs_on_its_own() -> None:
    averaged = FusedAveragedModel(nn.Linear(2, 2))
    averaged.compile(backend="eager")
    for copied in (copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged))):
        with torch.no_grad():
            copied.module.weight.fill_(100.0)
        x = torch.ones(1, 2)
        assert torch.equal(copied(x), copied.module(x))


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_what_cannot_be_averaged_moves_none(every_kind: EveryKind, nonfinite: str, backend: str) -> None:
    averages = FusedAverages(every_kind, rules=RULES, nonfinite=nonfinite, backend=backend)
    update(every_kind, averages, updates=2)
    with refused(ValueError, "model must have the parameters", averages):
        averages.update_parameters(nn.Linear(2, 2))
    with refused(TypeError, r"model must be a torch.nn.Module", averages):
        averages.update_parameters("model")  # type: ignore[arg-type]
    averages["power"].n_averaged.fill_(-1)
    with refused(ValueError, "n_averaged must be >= 0", averages):
        averages.update_parameters(every_kind)
    averages["power"].n_averaged.fill_(2)
    every_kind.long.data[500] = float("nan")
    refusal = unchanged(averages) if nonfinite == "skip" else refused(ValueError, "'long' must be finite", averages)
    with refusal:
        averages.update_parameters(every_kind)


# Each gate kills a bug


def drop_the_followers(patch: pytest.MonkeyPatch) -> None:
    init = rows.Rows.__init__

    def without(self: rows.Rows, pairs: Any) -> None:
        init(self, pairs)
        for row in self.table:
            row.followers = 0

    patch.setattr(rows.Rows, "__init__", without)


def one_pace_for_all(patch: pytest.MonkeyPatch) -> None:
    row = rows._row

    def paced(pair: Any) -> Any:
        made = row(pair)
        made.pace = 0
        return made

    patch.setattr(rows, "_row", paced)


def count_in_the_first_alone(patch: pytest.MonkeyPatch) -> None:
    update = cpu.NativeLaunch.update

    def launch(self: Any, params: Any, about: Update) -> None:
        update(self, params, about)
        for counter in about.counters[1:]:
            counter.sub_(about.advance)

    patch.setattr(cpu.NativeLaunch, "update", launch)


@pytest.mark.parametrize("plant", [drop_the_followers, one_pace_for_all, count_in_the_first_alone])
def test_the_gate_kills_the_bug(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = EveryKind()
    averages = FusedAverages(model, rules=RULES)
    alone = {name: FusedAveragedModel(model, rule=rule, backend="reference") for name, rule in RULES.items()}
    plant(monkeypatch)
    update(model, averages, *alone.values(), updates=4)
    counts = [int(each.n_averaged) for each in averages.values()]
    wrong = [name for name in RULES if differing(tensors_of(averages[name]), tensors_of(alone[name]))]
    assert wrong or counts != [4] * len(RULES)
