"""Workers of SWAP: what they must agree on before `merge_over`, and a worker that is lost."""

from __future__ import annotations

import copy
import re
import runpy
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swafast import EqualAverage, FusedAveragedModel, FusedAverages
from swafast.optim import LowPrecisionMean
from swafast.posthoc import merge_over, worker_merges
from swafast.sharded import LostPeerError
from swafast.sharded.parts.ranks import Ranks
from tests.ranks import planted, run_ranks
from tests.sharded_models import outcome
from tests.support import differing
from tests.test_sharded_faults import IN_TIME, TIMEOUT, VICTIM, at_once, fault, lose_myself, watch_collectives

ODD = 1  # the rank that differs


class Ordered(nn.Module):
    """Params, buffers and extra states, registered in a given order."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            layer = Stated()
            with torch.no_grad():
                layer.weight.fill_(ord(name))
            layer.written.fill_(ord(name))
            layer.state = name
            self.add_module(name, layer)


class Stated(nn.Module):
    """By name, its buffer comes after its param: the last that is merged."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))
        self.register_buffer("written", torch.empty(3))
        self.state = ""

    def get_extra_state(self) -> str:
        return self.state

    def set_extra_state(self, state: str) -> None:
        self.state = state


def averaged_once(model: nn.Module, **options: Any) -> FusedAveragedModel:
    averaged = FusedAveragedModel(model, **options)
    averaged.update_parameters(model)
    return averaged


def _merge_in_another_order() -> list[Any]:
    names = "abc" if dist.get_rank() == 0 else "cba"
    model = Ordered(names)
    averaged = averaged_once(model)
    rules = {"first": EqualAverage(), "second": EqualAverage()}
    several = FusedAverages(model, rules=dict(sorted(rules.items(), reverse=names != "abc")))
    several.update_parameters(model)
    with torch.no_grad():
        several["second"].module.a.weight.zero_()
    merge_over(averaged)
    merge_over(several)
    modules = (averaged.module, several["first"].module, several["second"].module)
    return [
        {name: (layer.weight.tolist(), layer.written.tolist(), layer.state) for name, layer in module.named_children()}
        for module in modules
    ]


@pytest.mark.distributed
def test_workers_may_register_their_layers_in_another_order() -> None:
    for averaged, first, second in run_ranks(2, _merge_in_another_order):
        for name in "abc":
            values = [float(ord(name))] * 3
            assert averaged[name] == first[name] == (values, values, name)
            assert second[name] == ([0.0] * 3 if name == "a" else values, values, name)


# Workers that disagree


def net(width: int = 4, layers: int = 2, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3 + dist.get_rank())
    inner = [nn.Linear(3, width, bias=bias), nn.BatchNorm1d(width)]
    return nn.Sequential(*inner, *(nn.Linear(width, width) for _ in range(layers - 1))).to(dtype)


def tied(model: nn.Sequential) -> nn.Sequential:
    model[3].weight = model[2].weight
    return model


def with_frozen(width: int) -> FusedAveragedModel:
    model = nn.Sequential(nn.Linear(width, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    return averaged_once(model, include=lambda name, param: param.requires_grad)


def first_of(average: Tensor, param: Tensor, num_averaged: Tensor | int) -> Tensor:
    return average


#: What the odd worker has, what all others have, and the difference that all of them are told.
DISAGREE: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "another architecture": (
        lambda: averaged_once(nn.Sequential(nn.Conv2d(1, 2, 3))),
        lambda: averaged_once(net()),
        r"'0.weight' torch.float32 \(4, 3\) float32 on rank 0 and torch.float32 \(2, 1, 3, 3\) float32 on rank 1",
    ),
    "a wider layer": (
        lambda: averaged_once(net(5)),
        lambda: averaged_once(net()),
        r"'0.weight' torch.float32 \(4, 3\) float32 on rank 0 and torch.float32 \(5, 3\) float32 on rank 1",
    ),
    "another dtype": (
        lambda: averaged_once(net(dtype=torch.float64)),
        lambda: averaged_once(net()),
        r"'0.weight' torch.float32 .* on rank 0 and torch.float64",
    ),
    "a lower dtype": (
        lambda: averaged_once(net(dtype=torch.bfloat16)),
        lambda: averaged_once(net()),
        r"'0.weight' torch.float32 .* on rank 0 and torch.bfloat16 .* exact on rank 1",
    ),
    "a param too few": (
        lambda: averaged_once(net(bias=False)),
        lambda: averaged_once(net()),
        r"'0.bias' torch.float32 \(4,\) float32 on rank 0 and nothing on rank 1",
    ),
    "a layer too many": (
        lambda: averaged_once(net(layers=3)),
        lambda: averaged_once(net()),
        r"'3.weight' nothing on rank 0 and torch.float32 \(4, 4\) float32 on rank 1",
    ),
    "tied weights": (
        lambda: averaged_once(tied(net(layers=3))),
        lambda: averaged_once(net(layers=3)),
        r"'3.weight' torch.float32 \(4, 4\) float32 on rank 0 and nothing on rank 1",
    ),
    "another frozen layer": (
        lambda: with_frozen(4),
        lambda: with_frozen(3),
        r"'0.weight' torch.float32 \(2, 3\) frozen on rank 0 and torch.float32 \(2, 4\) frozen on rank 1",
    ),
    "averaged buffers": (
        lambda: averaged_once(net(), use_buffers=True),
        lambda: averaged_once(net()),
        r"'1.running_mean' torch.float32 \(4,\) copied on rank 0 and torch.float32 \(4,\) float32 on rank 1",
    ),
    "another averaging function": (
        lambda: averaged_once(net(), multi_avg_fn=LowPrecisionMean(4)),
        lambda: averaged_once(net(), multi_avg_fn=LowPrecisionMean(9)),
        r"'rule' LowPrecisionMean\(bits=9, .* on rank 0 and LowPrecisionMean\(bits=4, ",
    ),
    "a function for a rule": (
        lambda: averaged_once(net(), avg_fn=first_of),
        lambda: averaged_once(net()),
        r"'rule' EqualAverage\(.*\) on rank 0 and <function first_of> on rank 1",
    ),
    "no model yet": (
        lambda: FusedAveragedModel(net()),
        lambda: averaged_once(net()),
        "averaged must have been updated on every rank, got n_averaged = 0 on rank 1",
    ),
}


def _disagree() -> dict[str, tuple[str, list[str]]]:
    """Return, for each case, what is raised on this rank, and what differs afterwards."""
    told = {}
    for name, (odd, others, _) in DISAGREE.items():
        averaged = odd() if dist.get_rank() == ODD else others()
        before = copy.deepcopy(dict(averaged.state_dict()))
        told[name] = outcome(lambda averaged=averaged: merge_over(averaged)), differing(averaged.state_dict(), before)
    good = averaged_once(net())
    expected = [torch.empty(4, 3) for _ in range(dist.get_world_size())]
    dist.all_gather(expected, good.module[0].weight.detach())
    merge_over(good)  # what was refused is no fault
    mean = (torch.stack(expected).double().sum(0) / len(expected)).float()
    told["afterwards"] = "", differing({"0": good.module[0].weight}, {"0": mean})
    return told


def require_told(answers: list[dict[str, tuple[str, list[str]]]]) -> None:
    for told in answers:
        assert {name: changed for name, (_, changed) in told.items() if changed} == {}
        for name, (_, _, words) in DISAGREE.items():
            said = told[name][0]
            assert re.search(words, said), (name, said)
            assert said.startswith("ValueError: averaged"), (name, said)
            assert said == answers[0][name][0], name  # the same on all ranks


@pytest.mark.distributed
def test_workers_that_disagree_are_told_the_difference_and_nothing_has_changed() -> None:
    require_told(run_ranks(3, _disagree))


# Workers that are one


def _merge_equal_workers() -> list[list[str]]:
    """Return the warnings of a merge of workers that trained in DDP, without it, and of one that has trained on."""
    told = []
    for in_ddp, alike in ((True, True), (False, False), (False, True)):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        trained = DistributedDataParallel(model) if in_ddp else model
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(3 if alike and not in_ddp else dist.get_rank())
        for _ in range(2):
            optimizer.zero_grad()
            trained(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            merge_over(averaged_once(model))
        told.append([f"{Path(each.filename).name}: {each.message}" for each in caught])
    return told


@pytest.mark.distributed
def test_workers_that_are_one_model_are_told_so() -> None:
    for in_ddp, alone, in_one_order in run_ranks(2, _merge_equal_workers):
        assert alone == []
        assert in_ddp == in_one_order
        assert len(in_ddp) == 1
        assert in_ddp[0].startswith("test_workers.py: merge_over found the same averages on all workers")


# A lost worker


def workers_average() -> FusedAverages:
    """Return averages with two planes, with buffers and extra states, of models that no other worker has."""
    torch.manual_seed(dist.get_rank())
    model = Ordered("ab")
    averages = FusedAverages(model, rules={"mean": EqualAverage(), "other": EqualAverage()}, deviations=2)
    for _ in range(2):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(torch.randn(tensor.shape))
        averages.update_parameters(model)
    model.a.state = averages["mean"].module.a.state = f"of rank {dist.get_rank()}"
    return averages


def state_of(averages: FusedAverages) -> tuple[dict[str, Tensor], list[str]]:
    states = {f"{name}.{key}": value for name, each in averages.items() for key, value in each.state_dict().items()}
    tensors = {key: value.clone() for key, value in states.items() if isinstance(value, Tensor)}
    return tensors, [f"{key}: {value}" for key, value in states.items() if key not in tensors]


def complaints_at(ranks: Ranks, at: int, lost: Callable[[], None] | None) -> list[str]:
    """Merge without one of the workers from collective ``at`` on, and return what is wrong on another one."""
    averages = workers_average()
    tensors, others = state_of(averages)
    began = monotonic()
    fault.arm(at, lost)
    try:
        merge_over(averages, ranks)  # type: ignore[arg-type]
    except LostPeerError as error:
        found = (
            [] if "merge_over must be called on all ranks, but one of [0, 1, 2] died" in str(error) else [str(error)]
        )
    else:
        found = ["no error"]
    finally:
        fault.disarm()
    if monotonic() - began > IN_TIME:
        found.append(f"took {monotonic() - began:.2f} s")
    after, others_after = state_of(averages)
    found += [*differing(after, tensors), *(other for other in others_after if other not in others)]
    try:
        merge_over(averages, ranks)  # type: ignore[arg-type]
        found.append("met a peer again")
    except LostPeerError:
        pass
    return [f"at {at}: {one}" for one in found]


def _lose_a_worker(loss: str) -> tuple[int, list[str]]:
    """Merge once without a fault, then lose a worker at each of these collectives, each in a thread of its own."""
    watch_collectives()
    unharmed = Ranks(None, "unharmed")
    fault.arm()
    merge_over(workers_average(), unharmed)  # type: ignore[arg-type]
    fault.disarm()
    count = fault.seen
    groups = [Ranks(None, f"lost at {at}") for at in range(count)]
    arrived = threading.Semaphore(0)

    def stay_away() -> None:
        arrived.release()
        threading.Event().wait()

    lost = stay_away if dist.get_rank() == VICTIM else None
    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(complaints_at, ranks, at, lost) for at, ranks in enumerate(groups)]
        if lost is not None:
            for _ in groups:
                arrived.acquire()
            lose_myself(loss)
        return count, [one for each in running for one in each.result()]


def lost_workers(*losses: str) -> dict[str, list[tuple[int, list[str]]]]:
    calls = {loss: partial(run_ranks, 3, _lose_a_worker, loss, timeout=TIMEOUT, expect=2) for loss in losses}
    return {loss: [*filter(None, answers)] for loss, answers in at_once(calls).items()}


def require_nothing_lost(answers: dict[str, list[tuple[int, list[str]]]]) -> None:
    found = {loss: [complaint for _, complaints in each for complaint in complaints] for loss, each in answers.items()}
    assert found == {loss: [] for loss in answers}, str(found)


@pytest.mark.distributed
def test_a_lost_worker_is_an_error_in_time_and_nothing_has_changed() -> None:
    answers = lost_workers("killed", "stopped")
    require_nothing_lost(answers)
    # Agreement 3; for each average, 2 layers with a mean, a variance and a buffer; extra states 2.
    assert [count for each in answers.values() for count, _ in each] == [3 + 2 * 2 * 3 + 2] * 4


# The recipe


def _run_example(seed: int) -> list[dict[str, float]]:
    folder = Path(__file__).parents[1] / "examples"
    sys.path.insert(0, str(folder))
    example = runpy.run_path(str(folder / "swap.py"))
    return [example["run"](seed, noise, torch.device("cpu")).finals() for noise in example["NOISES"].values()]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_examples_bars(seed: int) -> None:
    """The average is better than the workers, with right labels and with wrong ones, for each seed."""
    pytest.importorskip("sklearn")
    first, *others = run_ranks(4, _run_example, seed)
    assert others == [first] * 3  # to the bit, on all ranks
    for found in first:
        print({method: round(accuracy, 4) for method, accuracy in found.items()})
        assert found["SWAP: the workers' average"] >= found["a worker, mean of all"]


# Planted bugs, each in every rank's process


def merge_in_their_own_order() -> None:
    worker_merges.sorted = lambda each, **options: each  # type: ignore[attr-defined]


def overlook_what_is_frozen() -> None:
    worker_merges._unmerged_of = lambda side: []


def overlook_dtypes() -> None:
    worker_merges.describe_kind = lambda tensor: f"torch.float32 {tuple(tensor.shape)}"


def overlook_functions() -> None:
    worker_merges._spelled_rule = lambda side: worker_merges.spell(side.rule)


def write_at_once() -> None:
    mean = worker_merges._mean

    def eager(*given: Any) -> list[tuple[Tensor, Tensor]]:
        writes = mean(*given)
        worker_merges.write_all(writes)
        return writes

    worker_merges._mean = eager


def part_without_a_word() -> None:
    worker_merges._take_extra_states = lambda ranks, modules, packed: None


def never_warn() -> None:
    worker_merges._differ = lambda merged, writes: True


PLANTS: dict[Callable[[], None], tuple[Callable[[], object], str]] = {
    merge_in_their_own_order: (test_workers_may_register_their_layers_in_another_order, "assert"),
    overlook_what_is_frozen: (
        test_workers_that_disagree_are_told_the_difference_and_nothing_has_changed,
        "another frozen layer",
    ),
    overlook_dtypes: (
        test_workers_that_disagree_are_told_the_difference_and_nothing_has_changed,
        "another dtype",
    ),
    overlook_functions: (
        test_workers_that_disagree_are_told_the_difference_and_nothing_has_changed,
        "another averaging function",
    ),
    never_warn: (test_workers_that_are_one_model_are_told_so, "assert"),
    write_at_once: (lambda: require_nothing_lost(lost_workers("killed")), "module.a.weight"),
    part_without_a_word: (lambda: require_nothing_lost(lost_workers("killed")), "no error"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_planted_bugs_are_seen(plant: Callable[[], None]) -> None:
    test, words = PLANTS[plant]
    with planted(plant), pytest.raises(AssertionError, match=words):
        test()
