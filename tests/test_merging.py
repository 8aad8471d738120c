"""Merges after training: of states, greedy, of snapshots, windows between two means, and over workers."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from swafast import (
    EqualAverage,
    ExponentialAverage,
    FusedAveragedModel,
    FusedAverages,
    PowerAverage,
    ShardedAveragedModel,
    Snapshots,
)
from swafast.posthoc import greedy_merge, merge, merge_over, merging, stored_merges, worker_merges
from swafast.terms import coefficients, unmerged
from tests.ranks import run_ranks
from tests.sharded_models import outcome
from tests.support import differing, same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


class Net(nn.Module):
    """Tied params, an empty one, BatchNorm, integers, further state and float8."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(40, 50, generator=generator, dtype=torch.float64).to(dtype))
        self.tied = self.weight
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.norm = nn.BatchNorm1d(3)
        self.norm.running_mean.fill_(float(seed))
        self.norm.num_batches_tracked.fill_(seed)
        self.register_buffer("eighth", torch.ones(4).to(torch.float8_e4m3fn))

    def get_extra_state(self) -> Tensor:
        return torch.full((2,), float(self.norm.num_batches_tracked))

    def set_extra_state(self, state: Tensor) -> None: ...


def states_of(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    return [Net(seed, dtype).state_dict() for seed in range(count)]


def exact(states: Sequence[dict[str, Any]], weights: Sequence[float]) -> Tensor:
    tensors = [state["weight"].to(torch.promote_types(state["weight"].dtype, torch.float64)) for state in states]
    return sum(x * each for x, each in zip(weights, tensors, strict=True))  # type: ignore[return-value]


# States


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [None, "1-sqrt", (0.5, 0.75, -0.25)])
def test_a_merge_is_the_weighted_sum_rounded_once(dtype: torch.dtype, weights: Any) -> None:
    states = states_of(3, dtype)
    before = [copy.deepcopy(dict(state)) for state in states]
    merged = merge(states, weights)
    numbers = coefficients.coefficients_of(3, weights)
    expected = exact(states, numbers)
    got = merged["weight"]
    assert got.dtype == dtype
    if dtype.is_complex:
        assert torch.allclose(got.to(torch.complex128), expected, rtol=2e-7)
    else:
        error = (got.double() - expected).abs()
        for other in neighbours(got):  # none is nearer, up to the error of the sum
            assert not bool((error > (other.double() - expected).abs() * (1 + 1e-9) + 1e-15).any())
    assert all(differing(now, then) == [] for now, then in zip(states, before, strict=True))
    assert merged["tied"] is got
    assert merged["empty"].shape == (0, 3)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "_extra_state", "eighth"):
        assert same_bits(merged[name], states[-1][name]), name
        assert merged[name].data_ptr() != states[-1][name].data_ptr(), name
    assert merged._metadata["norm"] == {"version": 2}  # type: ignore[attr-defined]
    Net(5, dtype).load_state_dict(merged)


def neighbours(value: Tensor) -> list[Tensor]:
    bits = value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.itemsize])
    return [(bits + step).view(value.dtype) for step in (-1, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_near_a_tie_is_rounded_once(dtype: torch.dtype) -> None:
    half = torch.finfo(dtype).eps / 2
    for just_over in (2.0**-30, 2.0**-45):
        value = torch.tensor([1 + half + just_over, 1 + half - just_over, -1 - half - just_over], dtype=torch.float64)
        assert merging.rounded(value, dtype).tolist() == [1 + 2 * half, 1.0, -1 - 2 * half]
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0], dtype=torch.float64)
    assert str(merging.rounded(odd, dtype)) == str(odd.to(dtype))
    assert value[:1].to(dtype).item() == 1.0  # torch's own cast rounds twice


def test_a_param_that_never_changed_stays() -> None:
    state = Net(3).state_dict()
    for count in (3, 7, 10):
        for weights in (None, "1-sqrt"):
            assert differing(merge([state] * count, weights), state) == []


def test_a_mean_is_a_sum_that_is_divided() -> None:
    torch.manual_seed(0)
    states = [{"weight": torch.randn(100_000)} for _ in range(3)]
    exactly = (torch.stack([state["weight"].double() for state in states]).sum(0) / 3).float()
    assert torch.equal(merge(states)["weight"], exactly)  # a sum of thirds is off by a bit here and there


ONE = torch.ones(1)


def checkpoint() -> dict[str, Any]:
    """Return what a training script saves, with further tensors in dicts before and after the state."""
    moments = {0: {"step": torch.tensor(4.0), "exp_avg": torch.zeros(40, 50)}}
    return {"optimizer": {"state": moments}, "model": Net().state_dict(), "epoch": 3, "loss": torch.tensor(0.5)}


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no state": (lambda: merge([]), ValueError, "states must be at least one state dict, got none"),
    "one state": (lambda: merge(Net().state_dict()), TypeError, "a sequence of state dicts, got OrderedDict"),
    "a model": (lambda: merge([Net()]), TypeError, r"states\[0\] must be a mapping such as model.state_dict\(\)"),
    "names": (
        lambda: merge([{"a": ONE, "c": ONE}, {"b": ONE, "c": ONE}]),
        ValueError,
        r"states\[1\] must have the names of states\[0\], but it lacks 'a' and has 'b' besides",
    ),
    "a checkpoint": (
        lambda: merge([checkpoint(), checkpoint()]),
        ValueError,
        r"states\[0\] must hold tensors by name, got a dict of them at states\[0\]\['model'\]: pass that one",
    ),
    "the second is a checkpoint": (
        lambda: merge([Net().state_dict(), {"state": {"net": Net().state_dict()}, "loss": ONE}]),
        ValueError,
        r"got a dict of them at states\[1\]\['state'\]\['net'\]",
    ),
    "a soup of checkpoints": (
        lambda: greedy_merge([checkpoint()], lambda _: 1.0),
        ValueError,
        r"states\[0\]\['model'\]",
    ),
    "nothing to average": (lambda: merge([{"a": 1, "n": torch.tensor(3)}]), ValueError, "can be averaged, got none"),
    "scores": (
        lambda: greedy_merge(states_of(2), [1.0, 2.0]),
        TypeError,
        r"a function of a state dict .* got list",
    ),  # type: ignore[arg-type]
    "shapes": (
        lambda: merge([{"a": torch.ones(1, 4)}, {"a": torch.ones(1, 1)}]),
        ValueError,
        r"states\[0\]\['a'\] must be torch.float32 \(1, 1\), as in the last state, got torch.float32 \(1, 4\)",
    ),
    "dtypes": (lambda: merge([{"a": torch.ones(1)}, {"a": torch.ones(1).half()}]), ValueError, "must be torch.float16"),
    "meta": (lambda: merge([{"a": torch.ones(1, device="meta")}]), ValueError, "got a tensor on meta"),
    "sparse": (lambda: merge([{"a": torch.eye(2).to_sparse()}]), ValueError, "must be dense"),
    "float8": (
        lambda: merge([{"a": torch.ones(1).to(torch.float8_e5m2)}, {"a": torch.zeros(1).to(torch.float8_e5m2)}]),
        ValueError,
        "must be equal in all states, since torch.float8_e5m2 is not averaged",
    ),
    "weights": (lambda: merge(states_of(2), [1, 1]), ValueError, "weights must sum to 1"),
    "a NaN score": (lambda: greedy_merge(states_of(2), lambda state: float("nan")), ValueError, r"NaN for states\[0\]"),
    "no score": (lambda: greedy_merge(states_of(2), lambda state: "good"), TypeError, "a number, got 'good'"),  # type: ignore[arg-type, return-value]
}


@pytest.mark.parametrize(("call", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_is_refused(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


def test_a_greedy_merge_adds_what_does_not_lower_the_score() -> None:
    # The score is the distance to 10: 9 is best, 12 brings the mean to 10.5, 4 would bring it to 8.3, 11 to 10.67.
    states = [{"a": torch.tensor([value]), "n": torch.tensor(int(value))} for value in (4.0, 9.0, 12.0, 11.5)]
    asked: list[float] = []

    def score(state: dict[str, Any]) -> float:
        asked.append(state["a"].item())
        return -abs(state["a"].item() - 10)

    found = greedy_merge(states, score)
    # Sorted: 9, 11.5, 12, 4. The mean of 9 and 11.5 is 10.25; with 12 it is 10.83, refused; with 4 it is 8.17, refused.
    assert found.chosen == [1, 3]
    assert found.state["a"].item() == 10.25
    assert found.state["n"].item() == 9  # of the best
    assert found.score == -0.25
    assert asked[:4] == [4, 9, 12, 11.5]
    assert asked[4:] == pytest.approx([10.25, 32.5 / 3, 24.5 / 3])
    assert greedy_merge(states, lambda state: 1.0).chosen == [0, 1, 2, 3]  # it does not fall
    assert pickle.loads(pickle.dumps(found)).chosen == [1, 3]


# Snapshots


def train(folder: Path, counts: Sequence[int], dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
    """Store averages at counts, and return the sum of all models up to each count in float64."""
    model = nn.Linear(40, 30, bias=False)
    generator = torch.Generator().manual_seed(1)
    averaged = FusedAveragedModel(model, **options)
    snapshots, total, sums = Snapshots(folder), torch.zeros(30, 40, dtype=torch.float64), []
    for count in range(1, counts[-1] + 1):
        with torch.no_grad():
            model.weight.copy_(1 + torch.randn(30, 40, generator=generator))
        averaged.update_parameters(model)
        total += model.weight.detach()
        if count in counts:
            snapshots.save(averaged, dtype=dtype)
            sums.append(total.clone())
    return sums


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("fmt", "dtype"), [("float32", None), ("compensated", None), ("compensated", torch.float64)], ids=str
)
def test_windows_of_ten_thousand_models(tmp_path: Path, fmt: str, dtype: torch.dtype | None) -> None:
    counts = (9000, 9900, 9990, 10000)
    *earlier, last = train(tmp_path, counts, dtype, format=fmt)
    snapshots, errors = Snapshots(tmp_path), {}
    for count, before in zip(counts, earlier, strict=False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = snapshots.window(count)["weight"]
        gain = (10000 + count) / (10000 - count)
        expected = (last - before) / (10000 - count)
        errors[10000 - count] = float((got - expected).norm() / expected.norm())
        assert got.dtype == dtype or dtype is None
        assert (errors[10000 - count] <= (2e-7 if dtype is None else 1e-13) * gain) or fmt == "float32"
        assert len(caught) == (gain > 20 and dtype is None), caught
        assert all(warning.filename == __file__ for warning in caught)
    assert (errors[1000] > 2e-7 * 19) == (fmt == "float32")  # the bar can tell them apart
    spelled = ", ".join(f"{models} models {error:.0e}" for models, error in errors.items())
    print(f"\nerrors of windows, {fmt}, saved in {dtype or 'float32'}: {spelled}")
    assert torch.equal(snapshots.window(9000, 10000, average="average")["weight"], snapshots.window(9000)["weight"])


def test_snapshots_are_merged_with_weights_oldest_first(tmp_path: Path) -> None:
    sums = train(tmp_path, [1, 2, 3, 4], rule=ExponentialAverage(0.0))  # the models themselves
    models = [sums[0], *(b - a for a, b in pairwise(sums))]
    snapshots = Snapshots(tmp_path)
    for last, weights in ((4, "1-sqrt"), (3, None), (2, (0.25, 0.75)), (1, "equal"), (None, "linear")):
        numbers = coefficients.coefficients_of(last or 4, weights)
        expected = sum(x * each for x, each in zip(numbers, models[-(last or 4) :], strict=True))
        got = snapshots.merge(last, weights)["weight"]
        assert torch.allclose(got.double(), expected, rtol=1e-6, atol=1e-6), (last, weights)
    stored = [snapshots.merge(4, row)["weight"] for row in torch.eye(4).tolist()]
    for last in (3, 4):
        mean = torch.stack([each.double() for each in stored[-last:]]).sum(0) / last
        assert torch.equal(snapshots.merge(last)["weight"], mean.float()), last
    like = {"weight": torch.empty(30, 40)}
    assert same_bits(snapshots.merge(3, like=like)["weight"], snapshots.merge(last=3)["weight"])
    with pytest.raises(ValueError, match="last must be from 1 to 4, the number of snapshots, got 5"):
        snapshots.merge(5)
    with pytest.raises(ValueError, match="sum to 1"):
        snapshots.merge(2, [1, 1])
    with pytest.raises(ValueError, match=r"an average stored in .*, got 'ema': it has 'average' by ExponentialAverage"):
        snapshots.merge(2, average="ema")


def test_a_window_needs_two_stored_means(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    averages = FusedAverages(model, rules={"swa": EqualAverage(), "narrow": PowerAverage.from_sigma_rel(0.05)})
    snapshots = Snapshots(tmp_path)
    with pytest.raises(ValueError, match="folder must hold snapshots, got none"):
        snapshots.window(2, 3)
    models = []
    for _ in range(3):
        with torch.no_grad():
            model.bias.add_(1)
        averages.update_parameters(model)
        snapshots.save(averages)
        models.append(model.bias.detach().clone())
    assert torch.allclose(snapshots.window(1, 3)["bias"], torch.stack(models[1:]).mean(0))  # takes "swa" by itself
    for call, words in {
        lambda: snapshots.window(2, 2): "later must be of more models than earlier, 2, got 2",
        lambda: snapshots.window(3, 1): "later must be of more models than earlier, 3, got 1",
        lambda: snapshots.window(5): r"earlier must be a count that is stored, such as \[1, 2, 3\], got 5",
        lambda: snapshots.window(1, average="narrow"): "an equal mean .* stored in .*, got 'narrow': it has 'swa' by",
        lambda: snapshots.merge(2): "name an average stored in .*, got None: it has 'swa' by .*'narrow' by",
    }.items():
        with pytest.raises(ValueError, match=words):
            call()


def _merge_on_ranks(folder: Path) -> dict[str, Any]:
    snapshots, first = Snapshots(folder), dist.get_rank() == 0
    return {
        "merge": snapshots.merge(2, "1-sqrt"),
        "window": snapshots.window(1, 3),
        "last": outcome(lambda: snapshots.merge(2 if first else 3)),
        "weights": outcome(lambda: snapshots.merge(2, (0.5, 0.5) if first else (0.25, 0.75))),
        "one fails": outcome(lambda: snapshots.window(1 if first else 7)),
    }


@pytest.mark.distributed
def test_ranks_merge_to_the_bits_of_one_process_or_refuse_together(tmp_path: Path) -> None:
    train(tmp_path, [1, 2, 3])
    for told in run_ranks(2, _merge_on_ranks, tmp_path):
        assert differing(told["merge"], Snapshots(tmp_path).merge(2, "1-sqrt")) == []
        assert differing(told["window"], Snapshots(tmp_path).window(1, 3)) == []
        assert "must be the same on every rank" in told["last"]
        assert "must be the same on every rank" in told["weights"]
        assert "earlier must be a count that is stored" in told["one fails"]


# Workers


def worker(number: int, updates: int, **options: Any) -> tuple[FusedAveragedModel, nn.Module]:
    """Return an average of models that no other worker has."""
    torch.manual_seed(number)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(options.pop("dtype", torch.float32))
    model[2].requires_grad_(not options.pop("frozen", False))
    averaged = FusedAveragedModel(model, **options)
    for _ in range(updates):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn(param.shape).to(param), alpha=0.1)
            model[1].running_mean.add_(1 + number)
        averaged.update_parameters(model)
    return averaged, model


def full(averaged: FusedAveragedModel) -> dict[str, Tensor]:
    return averaged.averaged_state_dict(torch.float32)


class Scaled(nn.Linear):
    """A layer with an extra state, as of fp8 layers, and a mask with an infinity."""

    def __init__(self, scale: float) -> None:
        super().__init__(2, 2)
        self.scale, self.refuses = scale, False
        self.register_buffer("mask", torch.tensor([0.0, -float("inf")]))

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": torch.tensor(self.scale)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.scale = state["scale"].item()
        if self.refuses and self.scale == 0:
            raise OverflowError("a scale of 0")


def scaled(scale: float, **options: Any) -> FusedAveragedModel:
    model = nn.Sequential(Scaled(scale), Scaled(scale + 1))
    averaged = FusedAveragedModel(model, **options)
    averaged.update_parameters(model)
    return averaged


KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "exact": {"dtype": torch.bfloat16},
    "mirrored": {"dtype": torch.float16},
    "compensated": {"format": "compensated"},
    "compact": {"dtype": torch.bfloat16, "format": "compact"},
    "double": {"dtype": torch.float64},
    "buffers": {"use_buffers": True},
    "spread": {"deviations": 2},
    "exact spread": {"dtype": torch.bfloat16, "deviations": 0},
}


def _merge_workers(counts: list[int]) -> dict[str, Any]:
    """On each rank, merge the averages of a worker, and return what it had before and what it has."""
    rank, told = dist.get_rank(), {}
    for kind, options in KINDS.items():
        averaged, model = worker(rank, counts[rank], **options)
        before = full(averaged) | {name: x.clone() for name, x in averaged.state_dict().items() if "variance." in name}
        merge_over(averaged)
        state = {name: value.clone() for name, value in averaged.state_dict().items()}
        told[kind] = (before, full(averaged), state)
        averaged.update_parameters(model)  # it goes on
        assert int(averaged.n_averaged) == sum(counts) + 1
    several = FusedAverages(worker(rank, 0)[1], rules={"a": EqualAverage(), "b": ExponentialAverage(0.5)})
    model = worker(rank, 0)[1]
    for _ in range(counts[rank]):
        several.update_parameters(model)
    merge_over(several)
    told["several"] = [int(each.n_averaged) for each in several.values()]
    one = scaled(10.0 + rank, use_buffers=True)
    merge_over(one)
    assert one.module[0].mask.tolist() == [0.0, -math.inf]  # all workers have it
    two = FusedAverages(one.module, rules={"a": EqualAverage(), "b": EqualAverage()})
    two["b"].module[1].scale = 5.0 + rank
    two.update_parameters(one.module)
    two["b"].module[1].scale = 5.0 + rank
    merge_over(two)
    layers = (*one.module, *two["a"].module, *two["b"].module)
    told["extra"] = [layer.scale for layer in layers]
    return told


def require_pooled(
    name: str, counts: list[int], before: Sequence[dict[str, Tensor]], after: Any, state: dict[str, Tensor]
) -> None:
    """Check a variance by the mean of squares, which is not how it is merged."""
    param = name.removeprefix("variance.")
    squares = [each[name].double() + each[param].double() ** 2 for each in before]
    mean = sum(n * each[param].double() for n, each in zip(counts, before, strict=True)) / sum(counts)
    expected = sum(n * each for n, each in zip(counts, squares, strict=True)) / sum(counts) - mean**2
    assert torch.allclose(state[name].double(), expected, rtol=1e-5, atol=1e-7), name
    assert bool((state[name] > 0).any()) == (sum(counts) > 1), name


@pytest.mark.distributed
@pytest.mark.parametrize("counts", [[2], [1, 3], [4, 1, 2]])
def test_workers_get_the_mean_of_all_their_models(counts: list[int]) -> None:
    told = run_ranks(len(counts), _merge_workers, counts)
    for kind in KINDS:
        before, after, states = zip(*(each[kind] for each in told), strict=True)
        assert all(differing(state, states[0]) == [] for state in states), kind  # every plane, to the bit
        assert int(states[0]["n_averaged"]) == sum(counts)
        statistics = [name for name in before[0] if "running" in name]
        copied = {"1.num_batches_tracked", *(statistics if kind != "buffers" else ())}
        assert [name for name in states[0] if name.startswith("deviation.")] == []
        for name in before[0]:
            if name.startswith("variance."):
                require_pooled(name, counts, before, after, states[0])
            elif name not in copied:
                expected = sum(n * each[name].double() for n, each in zip(counts, before, strict=True)) / sum(counts)
                tolerance = 2e-5 if kind == "compact" else 3e-7
                assert torch.allclose(after[0][name].double(), expected, rtol=tolerance, atol=tolerance), (kind, name)
            else:
                assert same_bits(after[0][name], before[0][name]), (kind, name)
    assert told[0]["several"] == [sum(counts)] * 2
    assert [each["extra"] for each in told] == [[10.0, 11.0, 10.0, 11.0, 10.0, 5.0]] * len(counts)


def _parted(averaged: Any) -> tuple[dict[str, Tensor], str]:
    """Return a copy of the tensors of a state, and all else in it as text."""
    state = copy.deepcopy(averaged.state_dict())
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, str({name: value for name, value in state.items() if name not in tensors})


def _refuse(folder: str) -> dict[str, Any]:
    rank, told = dist.get_rank(), {}
    first = rank == 0

    def tried(averaged: Any, group: Any = None) -> str:
        state, extra = _parted(averaged)
        said = outcome(lambda: merge_over(averaged, group))
        after, extra_after = _parted(averaged)
        assert differing(after, state) == [], said
        assert extra_after == extra, said
        return said

    told["format"] = tried(worker(rank, 1, format="compensated" if first else None)[0])
    told["rule"] = tried(worker(rank, 1, rule=EqualAverage() if first else ExponentialAverage(0.9))[0])
    told["empty"] = tried(worker(rank, 0 if first else 1)[0])
    averaged = worker(rank, 1)[0]
    if not first:
        with torch.no_grad():
            averaged.module[2].bias[1] = float("nan")
    told["a NaN"] = tried(averaged)
    averaged = scaled(0.0)
    if not first:
        with torch.no_grad():
            averaged.module[1].weight.fill_(math.inf)
    told["an infinity"] = tried(averaged)
    averaged = scaled(float(rank))
    averaged.module[1].refuses = averaged.module[0].refuses = not first
    told["extra state"] = tried(averaged)
    told["one has an extra state"] = tried(scaled(1.0) if first else _linears())
    other = nn.Linear(2, 3 if first else 4)
    averaged = FusedAveragedModel(other)
    averaged.update_parameters(other)
    told["shape"] = tried(averaged)
    averaged, model = worker(rank, 1)
    if first:
        with averaged.swapped_into(model):
            told["swapped"] = outcome(lambda: merge_over(averaged))
    else:
        told["swapped"] = tried(averaged)
    told["class"] = outcome(lambda: merge_over(model))
    sharded = ShardedAveragedModel(_same_model())
    sharded.update_parameters(_same_model())
    told["own worker"] = outcome(lambda: merge_over(sharded))
    told["count"] = int(sharded.n_averaged)
    return told


def _linears() -> FusedAveragedModel:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in model:
        layer.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    averaged = FusedAveragedModel(model)
    averaged.update_parameters(model)
    return averaged


def _same_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 8)


@pytest.mark.distributed
def test_workers_that_differ_are_refused_on_every_rank_and_nothing_has_changed(tmp_path: Path) -> None:
    told = run_ranks(2, _refuse, str(tmp_path))
    for name, words in {
        "format": "must be the same on every rank, got for '0.weight'|'0.bias'",
        "rule": "must be the same on every rank, got for 'rule' EqualAverage",
        "empty": "must have been updated on every rank, got n_averaged = 0 on rank 0",
        "a NaN": r"averaged must be finite, got a NaN or an infinity in '2.bias' on rank 1",
        "an infinity": r"averaged must be finite, got a NaN or an infinity in '1.weight' on rank 1",
        "extra state": "a scale of 0",
        "one has an extra state": "'0._extra_state' an extra state on rank 0 and nothing on rank 1",
        "shape": r"must be the same on every rank, got for 'weight' .*\(3, 2\).*\(4, 2\)",
        "swapped": "must wait until the averages are swapped back out",
        "class": "averaged must be a FusedAveragedModel, .* got Sequential",
        "own worker": r"process_group must hold one rank of each worker, got ranks \[0, 1\] of one",
    }.items():
        for rank in told:
            assert re.search(words, rank[name]), (name, rank[name])
    assert [rank["count"] for rank in told] == [1, 1]


def _merge_sharded_workers() -> dict[str, Any]:
    """Two workers of two ranks each: ranks 0 and 1, 2 and 3. Each rank merges with the one that holds its part."""
    rank = dist.get_rank()
    workers = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    number, updates = rank // 2, (2, 3)[rank // 2]
    torch.manual_seed(number)
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 3))
    sharded = ShardedAveragedModel(model, process_group=workers[number], deviations=2)
    whole = FusedAveragedModel(model, deviations=3)
    for _ in range(updates):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn(param.shape), alpha=0.1)
        sharded.update_parameters(model)
        whole.update_parameters(model)
    told = {"bad": outcome(lambda: merge_over(sharded, workers[number]))}
    bad = ShardedAveragedModel(model, process_group=workers[number])
    bad.update_parameters(model)
    for planes in bad._planes.values() if number == 1 else ():
        planes[0].fill_(math.nan)  # one of the two ranks holds all elements
    told["a NaN"] = outcome(lambda: merge_over(bad, columns[rank % 2]))
    assert int(bad.n_averaged) == 1
    merge_over(sharded, columns[rank % 2])
    merge_over(whole, columns[rank % 2])
    return told | {"sharded": sharded.full_state_dict(), "whole": whole.state_dict(), "count": int(sharded.n_averaged)}


@pytest.mark.distributed
def test_workers_of_several_ranks_are_merged_part_by_part() -> None:
    for told in run_ranks(4, _merge_sharded_workers):
        assert told["count"] == 5
        assert "process_group must hold one rank of each worker" in told["bad"]
        assert "a NaN or an infinity" in told["a NaN"]  # on all ranks, also of those that hold no element
        assert "variance.0.weight" in told["whole"]
        assert differing(told["sharded"], told["whole"]) == []


def test_one_process_is_one_worker() -> None:
    averaged, _ = worker(1, 3)
    before = {name: value.clone() for name, value in averaged.state_dict().items()}
    merge_over(averaged)
    assert differing(averaged.state_dict(), before) == []


# Planted bugs, each with the test that must find it


PLANTS: dict[str, tuple[Any, str, Any, Callable[[Path], None]]] = {
    "weights reversed": (
        merging,
        "coefficients_of",
        lambda *given: coefficients.coefficients_of(*given)[::-1],
        lambda _: test_a_merge_is_the_weighted_sum_rounded_once(torch.float32, "1-sqrt"),
    ),
    "rounded twice": (
        merging,
        "rounded",
        lambda value, dtype: value.to(dtype),
        lambda _: test_a_sum_near_a_tie_is_rounded_once(torch.bfloat16),
    ),
    "integers averaged": (
        merging,
        "is_averaged",
        lambda name, value: True,
        lambda _: test_a_merge_is_the_weighted_sum_rounded_once(torch.float32, None),
    ),
    "statistics averaged": (
        unmerged,
        "_LEAVES",
        ("_extra_state",),
        lambda _: test_a_merge_is_the_weighted_sum_rounded_once(torch.float32, None),
    ),
    "stored weights reversed": (
        stored_merges,
        "coefficients_of",
        lambda *given: coefficients.coefficients_of(*given)[::-1],
        test_snapshots_are_merged_with_weights_oldest_first,
    ),
    "a window of the first models": (
        stored_merges,
        "window",
        lambda earlier, later: coefficients.window(earlier, later)[::-1],
        test_a_window_needs_two_stored_means,
    ),
    "any rule for a window": (
        stored_merges,
        "_is_equal_mean",
        lambda stored: True,
        test_a_window_needs_two_stored_means,
    ),
}


@pytest.mark.parametrize(("module", "name", "value", "test"), PLANTS.values(), ids=PLANTS)
def test_planted_bugs_are_found(
    module: Any, name: str, value: Any, test: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, value)
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError, RuntimeError)):
        test(tmp_path)


def _ignore_counts() -> None:
    real = worker_merges._merged_window
    worker_merges._merged_window = lambda ranks, merged, planes, counts: real(ranks, merged, planes, [1] * len(counts))


def _each_rank_its_own() -> None:
    real = worker_merges._merged_window

    def skewed(ranks: Any, *given: Any) -> tuple[Tensor, ...]:
        first, *further = real(ranks, *given)
        return (first * (1 + 0.125 * ranks.index), *further)

    worker_merges._merged_window = skewed


def _variances_of_their_own_means() -> None:
    real = worker_merges.pooled_variance
    worker_merges.pooled_variance = lambda each, means, mean, counts: real(each, [mean] * len(counts), mean, counts)


@pytest.mark.distributed
@pytest.mark.parametrize("plant", [_ignore_counts, _each_rank_its_own, _variances_of_their_own_means])
def test_planted_bugs_of_workers_are_found(plant: Callable[[], None]) -> None:
    from tests import ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "run_ranks", lambda *given: ranks.run_ranks(*given, plant=plant))
        with pytest.raises(AssertionError) as found:
            test_workers_get_the_mean_of_all_their_models([1, 3])
    assert "Traceback" not in str(found.value), "the plant itself has failed, on a rank"
