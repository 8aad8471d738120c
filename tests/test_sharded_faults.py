"""Ranks that die, stop or are interrupted: every other rank gets an error in time and keeps its own part whole."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from swafast import Rule
from swafast.op.exchange import Exchange
from swafast.sharded import LostPeerError, ShardedAveragedModel
from swafast.sharded.parts import all_gather
from swafast.sharded.parts.all_gather import AllGather
from swafast.sharded.parts.ranks import Ranks
from swafast.sharded.swap import NOT_WHOLE
from tests.ranks import on_ranks, run_ranks
from tests.sharded_models import WIDTH, Beside, can_run, drift, fill, locals_of, make_model, planes_of, wrap
from tests.support import differing, require_same, tensors_of, unchanged

#: Of the process group where a peer is lost; the contract has an error come within two seconds more.
TIMEOUT = timedelta(seconds=2)
IN_TIME = TIMEOUT.total_seconds() + 2.0

#: Less than one wait: what has lost its peers before is not waited for again.
AT_ONCE = 0.9 * TIMEOUT.total_seconds()

VICTIM = 1


# What is looked at


@dataclass
class Case:
    """An averaged model on one rank, and what it was before the fault."""

    averaged: ShardedAveragedModel
    model: nn.Module
    state: dict[str, Tensor] | None = None  # other values than the averages', to load

    def __post_init__(self) -> None:
        self.params, self.own, self.averages = locals_of(self.model), self.own_now(), planes_of(self.averaged)
        self.sampled: dict[str, Tensor] = {}
        if self.averaged.deviations is not None:
            with self.averaged.sampled_into(self.model, 0):
                self.sampled = self.own_now()

    def own_now(self) -> dict[str, Tensor]:
        """Return copies of this rank's own part of the params."""
        held = self.averaged._find_held(self.model)
        return {share.name: share.of(held[share.name].local).detach().clone() for share in self.averaged._shares}

    def own_averages(self) -> dict[str, Tensor]:
        """Return this rank's own part of the params with the averages in it, or the sample if there is one."""
        if self.sampled:
            return self.sampled
        averages = {}
        for share in self.averaged._shares:
            planes = self.averaged._planes[share.name]
            value = share.format.decode(planes) if share.format is not None else planes[0]
            averages[share.name] = value.to(share.holding.dtype).view_as(self.own[share.name])
        return averages

    def complaints(self, *, own_is_average: bool = False, params: bool = False) -> list[str]:
        """Return what differs from before: averages, this rank's own part, and with ``params`` all of them."""
        found = [f"average {name}" for name in differing(self.averages, planes_of(self.averaged))]
        expected = self.own_averages() if own_is_average else self.own
        found += [f"own {name}" for name in differing(expected, self.own_now())]
        if params:
            found += [f"param {name}" for name in differing(self.params, locals_of(self.model))]
        return found


class Small(nn.Module):
    """Two cuts, of several small windows each, one param with gaps and one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(37, 30))
        self.gapped = nn.Parameter(torch.randn(6, 10)[:, ::2])
        self.narrow = nn.Parameter(torch.randn(1500).bfloat16())
        self.register_buffer("mean", torch.zeros(3))


_cases = itertools.count()


def make_case(mode: str = "small", *, with_state: bool = False, **options: Any) -> Case:
    """Make an average of a model after two updates. Collective."""
    torch.manual_seed(3)
    reference = Small() if mode == "small" else make_model(mode)
    model = reference if mode == "small" else wrap(make_model(mode), mode)
    # Cases break off each for itself, so each has ranks of its own; a user's averages share theirs.
    averaged = ShardedAveragedModel(model, process_group=Ranks(None, f"case {next(_cases)}"), **options)
    state = None
    for step in range(3):
        drift(reference, step)
        if model is not reference:
            fill(model, mode, reference)
        if step < 2:
            averaged.update_parameters(model)
        if with_state and step == 0:
            state = averaged.state_dict()
    return Case(averaged, model, state)


# Faults at any collective


class Fault(threading.local):
    """A fault of this thread in place of its collective number ``at``, counted while it is armed."""

    at: int | None = None
    act: Callable[[], None] | None = None
    armed = False
    seen = 0

    def arm(self, at: int | None = None, act: Callable[[], None] | None = None) -> None:
        self.at, self.act, self.armed, self.seen = at, act, True, 0

    def disarm(self) -> None:
        self.armed = False

    def pass_collective(self) -> None:
        if self.armed:
            if self.act is not None and self.seen == self.at:
                self.act()
            self.seen += 1


fault = Fault()


def watch_collectives() -> None:
    """Have ``fault`` see every collective of ours in this process."""
    heard = Ranks._heard

    @contextmanager
    def watched(self: Ranks) -> Iterator[None]:
        with heard(self):
            fault.pass_collective()
            yield

    Ranks._heard = watched  # type: ignore[method-assign]


Action = Callable[[Case, Callable[[], None]], None]


def enter(case: Case, arm: Callable[[], None]) -> None:
    arm()
    with case.averaged.swapped_into(case.model):
        fault.disarm()


def leave(case: Case, arm: Callable[[], None]) -> None:
    with case.averaged.swapped_into(case.model):
        arm()


def enter_sample(case: Case, arm: Callable[[], None]) -> None:
    arm()
    with case.averaged.sampled_into(case.model, 0):
        fault.disarm()


def leave_sample(case: Case, arm: Callable[[], None]) -> None:
    with case.averaged.sampled_into(case.model, 0):
        arm()


def armed(act: Callable[[Case], object]) -> Action:
    def action(case: Case, arm: Callable[[], None]) -> None:
        arm()
        act(case)

    return action


update = armed(lambda case: case.averaged.update_parameters(case.model))
ACTIONS: dict[str, tuple[Action, dict[str, Any]]] = {
    "enter": (enter, {}),
    "leave": (leave, {}),
    "copy_to": (armed(lambda case: case.averaged.copy_to(case.model)), {}),
    "enter a sample": (enter_sample, {"deviations": 2}),
    "leave a sample": (leave_sample, {"deviations": 2}),
    "sample_to": (armed(lambda case: case.averaged.sample_to(case.model, 0)), {"deviations": 2}),
    "state_dict": (armed(lambda case: case.averaged.state_dict()), {}),
    "load_state_dict": (armed(lambda case: case.averaged.load_state_dict(case.state or {})), {"with_state": True}),
    "full_state_dict": (armed(lambda case: case.averaged.full_state_dict()), {}),
    "skip": (update, {"nonfinite": "skip"}),
    "raise": (update, {"nonfinite": "raise"}),
}


#: The user's calls that an error names, where these are no actions of that name.
CALLS = {"enter": "swapped_into", "leave": "swapped_into", "skip": "update_parameters", "raise": "update_parameters"}
CALLS |= {"enter a sample": "sampled_into", "leave a sample": "sampled_into"}
#: Actions that write into the model for good.
FOR_GOOD = ("copy_to", "sample_to")


def points_of(mode: str, names: Iterable[str], **options: Any) -> list[tuple[str, int]]:
    """Return (action, collective) for every collective of these actions. Collective."""
    points = []
    for name in names:
        action, more = ACTIONS[name]
        action(make_case(mode, **options, **more), fault.arm)
        fault.disarm()
        # Whoever broadcasts the last buffer needs nothing from the others.
        points += [(name, at) for at in range(fault.seen - (name == "full_state_dict"))]
    return points


def is_torn(name: str, at: int) -> bool:
    """Return whether params of other ranks may have been written when an action breaks off at its collective ``at``.

    The first one of an entry is to agree on it, and with the second comes the first window.
    """
    if name in FOR_GOOD:
        return at >= 1
    return name in ("leave", "leave a sample") or (name in ("enter", "enter a sample") and at >= 2)


def complaints_at(
    case: Case, name: str, at: int, act: Callable[[], None] | None, *, needs_all: bool = True
) -> tuple[list[str], float]:
    """Run an action that a fault breaks off; return what is wrong afterwards, and the seconds until the error.

    Args:
        act: what happens to this rank; None: to another one.
        needs_all: whether the action cannot succeed here without the rank that is lost.
    """
    began = 0.0

    def arm() -> None:
        nonlocal began
        began = monotonic()
        fault.arm(at, act)

    action, options = ACTIONS[name]
    try:
        action(case, arm)
    except (LostPeerError, KeyboardInterrupt) as raised:
        took, error = monotonic() - began, raised
    else:
        copied = name in FOR_GOOD
        return ["no error"] if needs_all else case.complaints(own_is_average=copied, params=not copied), 0.0
    fault.disarm()
    torn = is_torn(name, at)
    found = case.complaints(own_is_average=name in FOR_GOOD and torn, params=not torn)
    if took > IN_TIME:
        found.append(f"took {took:.2f} s")
    if isinstance(error, LostPeerError) != (act is None):
        found.append(f"raised {error!r}")
    if act is None and not re.search(rf"{CALLS.get(name, name)}(\(.*\))? must be called on all ranks", str(error)):
        found.append(f"does not name the call: {error}")
    if (NOT_WHOLE in str(error)) != torn:
        found.append(f"torn: {torn}, but says {error}")
    return found + complaints_after(case, options.get("nonfinite")), took


def complaints_after(case: Case, nonfinite: str | None) -> list[str]:
    """Return what does not work any more although it is local, or waits for peers again."""
    found = []
    began = monotonic()
    for ask in (case.averaged.state_dict, case.averaged.full_state_dict, lambda: case.averaged.copy_to(case.model)):
        with suppress(LostPeerError):
            ask()
            found.append("met a peer again")
    if nonfinite is None:
        case.averaged.update_parameters(case.model)
        if int(case.averaged.n_averaged) != int(case.averages["n_averaged"]) + 1:
            found.append("an update does not count")
    else:
        with suppress(LostPeerError):
            case.averaged.update_parameters(case.model)
            found.append("met a peer again")
        found += case.complaints()
    if monotonic() - began > AT_ONCE:
        found.append(f"waited {monotonic() - began:.2f} s for what is lost")
    return found


Answer = tuple[list[str], float]  # what is wrong, and the seconds until the last error


def break_off(loss: str, mode: str, names: Iterable[str], options: dict[str, Any]) -> Answer:
    """Break off some actions at each of their collectives, all at once, each on an average and in a thread of its own.

    Args:
        loss: what happens there to the victim: ``"killed"``, ``"stopped"`` or ``"interrupted"``.
    """
    watch_collectives()
    all_gather.WINDOW_NBYTES = 768 * dist.get_world_size()
    points = points_of(mode, names, **options)
    cases = {point: make_case(mode, **options, **ACTIONS[point[0]][1]) for point in points}
    is_victim = dist.get_rank() == VICTIM
    arrived = threading.Semaphore(0)

    def interrupt() -> None:
        raise KeyboardInterrupt

    def wait_for_the_end() -> None:
        arrived.release()
        threading.Event().wait()

    act = None if not is_victim else interrupt if loss == "interrupted" else wait_for_the_end
    with ThreadPoolExecutor(len(points)) as pool:
        running = {
            (name, at): pool.submit(complaints_at, case, name, at, act, needs_all=needs_victim(case, name, at))
            for (name, at), case in cases.items()
        }
        if act is wait_for_the_end:
            for _ in points:
                arrived.acquire()
            lose_myself(loss)
        done = {point: future.result() for point, future in running.items()}
    return [f"{point}: {one}" for point, (found, _) in done.items() for one in found], max(t for _, t in done.values())


def keep_step() -> None:
    """Wait for every rank, so that a rank that is lost next is lost here and not before."""
    with suppress(RuntimeError):  # it may be lost before all others have heard of it
        dist.barrier()


def lose_myself(loss: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL if loss == "killed" else signal.SIGSTOP)


def needs_victim(case: Case, name: str, at: int) -> bool:
    """Return whether all ranks agree at this collective, or the victim averages part of what is held here."""
    agrees = at == 0 and not name.startswith("leave")
    return agrees or any(VICTIM in share.cut.replicas for share in case.averaged._shares if share.cut is not None)


def at_once(calls: dict[Any, Callable[[], list[Any]]]) -> dict[Any, list[Any]]:
    """Run several calls of `run_ranks` at once, which mostly wait, and return their results."""
    with ThreadPoolExecutor(len(calls)) as pool:
        running = {key: pool.submit(call) for key, call in calls.items()}
        return {key: future.result() for key, future in running.items()}


@pytest.mark.distributed
def test_an_action_that_breaks_off_at_any_collective() -> None:
    # What is killed is heard of sooner than what stops, and for the rest is no other case.
    names = {"stopped": list(ACTIONS), "killed": ["enter", "leave", "leave a sample", "load_state_dict"]}
    names["interrupted"] = ["enter", "leave", "copy_to", "enter a sample", "sample_to", "state_dict", "skip"]
    calls = {
        loss: partial(
            *(run_ranks, 3, break_off, loss, "small", names[loss], {}),
            timeout=TIMEOUT,
            expect=3 if loss == "interrupted" else 2,
        )
        for loss in names
    }
    found = {loss: [wrong for wrong, _ in filter(None, answers)] for loss, answers in at_once(calls).items()}
    assert found == {"stopped": [[], []], "killed": [[], []], "interrupted": [[], [], []]}


@pytest.mark.distributed
def test_a_lost_replica_of_a_shard_that_others_do_not_need() -> None:
    names, options = ["enter", "leave"], {"share_replicas": True}
    answers = run_ranks(4, break_off, "killed", "hsdp", names, options, timeout=TIMEOUT, expect=3)
    assert [found for found, _ in filter(None, answers)] == [[]] * 3


def forget_finished_cuts() -> None:
    AllGather.torn = property(lambda self: False, lambda self, value: None)  # type: ignore[assignment]


def keep_the_averages() -> None:
    Exchange.back = lambda self: setattr(self, "is_back", True)  # type: ignore[method-assign]


def wait_twice() -> None:
    heard = Ranks.all_gather

    def patient(self: Ranks, received: Tensor, sent: Tensor) -> None:
        try:
            heard(self, received, sent)
        except LostPeerError:
            threading.Event().wait(TIMEOUT.total_seconds())
            raise

    Ranks.all_gather = patient  # type: ignore[method-assign]


@pytest.mark.distributed
def test_planted_bugs_are_seen() -> None:
    plants = {
        forget_finished_cuts: "torn: True, but says",
        keep_the_averages: "own weight",
        wait_twice: "took",
    }
    calls = {
        plant: partial(run_ranks, 2, break_off, "interrupted", "small", ["enter"], {}, timeout=TIMEOUT, plant=plant)
        for plant in plants
    }
    for plant, answers in at_once(calls).items():
        assert any(plants[plant] in one for found, _ in answers for one in found), plant


def construct(at: int, loss: str) -> list[str]:
    """Lose a rank at a collective of the construction; return what is wrong afterwards."""
    watch_collectives()
    model = Small()
    before = locals_of(model)
    keep_step()
    fault.arm(at, partial(lose_myself, loss) if dist.get_rank() == VICTIM else None)
    began = monotonic()
    try:
        ShardedAveragedModel(model)
        return ["no error"]
    except LostPeerError as error:
        if "ShardedAveragedModel must be called on all ranks" not in str(error):
            return [str(error)]
    took = monotonic() - began
    found = [f"param {name}" for name in differing(before, locals_of(model))]
    return found + ([f"took {took:.2f} s"] if took > IN_TIME else [])


@pytest.mark.distributed
def test_a_rank_lost_during_construction() -> None:
    points = [*((at, "stopped") for at in range(5)), (0, "killed"), (2, "killed")]
    calls = {point: partial(run_ranks, 2, construct, *point, timeout=TIMEOUT, expect=1) for point in points}
    assert {point: answers[0] for point, answers in at_once(calls).items()} == {point: [] for point in points}


# Faults in the body


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["fsdp2", "fsdp1", "fsdp1_orig"])
@on_ranks(2, expect=1)
def test_what_is_sharded_changes_places_without_peers(mode: str) -> None:
    """Lose the only peer of a sharded model: its averages and shards need no peer."""
    case = make_case(mode)
    with case.averaged.swapped_into(case.model):
        inside = case.own_now()
        keep_step()
        if dist.get_rank() == VICTIM:
            lose_myself("killed")
    assert case.complaints(params=True) == []
    with case.averaged.swapped_into(case.model):
        again = case.own_now()
    require_same(again, inside, "swapped")
    assert case.complaints(params=True) == []
    case.averaged.copy_to(case.model)
    assert case.complaints(own_is_average=True) == []
    case.averaged.update_parameters(case.model)
    assert case.averaged.n_averaged == 3


class BodyError(Exception):
    pass


def raise_in_forward(case: Case, error: type[BaseException]) -> None:
    """Evaluate, and raise from within the forward pass of an inner module."""

    def raise_it(*args: object) -> None:
        raise error

    inner = [module for name, module in case.model.named_modules() if name.endswith("inner")][-1]
    hook = inner.register_forward_pre_hook(raise_it)
    try:
        evaluate(case.model)
    finally:
        hook.remove()


@torch.no_grad()
def evaluate(model: nn.Module) -> Tensor:
    return model.eval()(torch.linspace(-1.0, 1.0, 3 * WIDTH).view(3, WIDTH))


def raise_in_the_body(mode: str, options: dict[str, Any]) -> list[str]:
    """Leave the body by errors on one rank and on all; return what is not restored."""
    case = make_case(mode, **options)
    output = evaluate(case.model)
    first = dist.get_rank() == 0
    found = []

    def swap(what: str, error: type[BaseException] | None, body: Callable[[], object]) -> None:
        raised = None
        try:
            with case.averaged.swapped_into(case.model):
                body()
        except BaseException as caught:
            raised = caught
        if error is not (None if raised is None else type(raised)):
            found.append(f"{what}: {raised!r}")
        found.extend(f"{what}: {one}" for one in case.complaints(params=True))

    def raise_it(error: type[BaseException]) -> None:
        raise error

    swap("an interrupt on all", KeyboardInterrupt, partial(raise_it, KeyboardInterrupt))
    swap("in the forward pass on all", BodyError, partial(raise_in_forward, case, BodyError))
    if not torch.equal(evaluate(case.model), output):
        found.append("the model computes something else")
    swap("nothing", None, partial(evaluate, case.model))
    swap("an error on one", BodyError if first else None, partial(raise_it, BodyError) if first else lambda: None)
    # The others then wait for it in the user's group, in vain. (Groups of a 2-D mesh have timeouts of their own.)
    began = monotonic()
    in_vain = partial(evaluate, case.model) if mode == "fsdp2" else partial(dist.all_reduce, torch.ones(1))
    error = KeyboardInterrupt if first else RuntimeError
    swap("an interrupt on one", error, partial(raise_it, KeyboardInterrupt) if first else in_vain)
    if monotonic() - began > IN_TIME:
        found.append(f"took {monotonic() - began:.2f} s")
    swap("nothing again", None, lambda: None)
    return found


@pytest.mark.distributed
def test_errors_in_the_body_leave_everything_as_it_was() -> None:
    modes = [("plain", 2), ("ddp", 3), ("fsdp2", 2), ("fsdp1", 2), ("fsdp1_orig", 2), ("tp", 2), ("hsdp", 4)]
    modes = [(mode, world) for mode, world in modes if can_run(mode, forward=True)]
    calls = {
        mode: partial(run_ranks, world, raise_in_the_body, mode, {"share_replicas": mode == "hsdp"}, timeout=TIMEOUT)
        for mode, world in modes
    }
    assert at_once(calls) == {mode: [[]] * world for mode, world in modes}


@pytest.mark.distributed
@on_ranks(3)
def test_what_one_rank_cannot_begin_no_rank_begins() -> None:
    """Fail on one rank where the others begin to swap."""
    case, there, is_victim = make_case(), Exchange.there, dist.get_rank() == VICTIM

    def fail(self: Exchange) -> None:
        there(self)
        raise MemoryError("none left")

    if is_victim:
        Exchange.there = fail  # type: ignore[method-assign]
    told = "none left" if is_victim else "swapped_into failed on rank 1, and so on every rank: MemoryError: none left"
    began = monotonic()
    with pytest.raises(MemoryError if is_victim else RuntimeError, match=told):
        case.averaged.swapped_into(case.model).__enter__()
    assert monotonic() - began < AT_ONCE
    assert case.complaints(params=True) == []
    Exchange.there = there  # type: ignore[method-assign]
    with case.averaged.swapped_into(case.model):
        pass
    assert case.complaints(params=True) == []


# What must not disturb one another


def beside(model: nn.Module, **options: Any) -> Beside:
    """Return averages of one model, over ranks and by itself."""
    return Beside("small", models=(model, model), **options)


@pytest.mark.distributed
@on_ranks(4)
def test_stages_of_a_pipeline_average_by_themselves() -> None:
    """Average the two stages of a pipeline, each on two ranks, and then something on all four."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    dist.new_group([0, 3])  # as for tied embeddings: ranks are in unlike numbers of groups from here on
    stage = dist.get_rank() // 2
    one = beside(nn.Linear(30 + stage, 40 + stage), process_group=groups[stage])
    for step in range(3 + 4 * stage):  # the stages do not keep step
        drift(one.reference, 10 * stage + step)
        one.update()
        if stage == 0:
            with one.averaged.swapped_into(one.sharded):
                pass
    one.require_equal()
    torch.manual_seed(3)
    everywhere = beside(Small())
    everywhere.update()
    everywhere.require_equal()


class Halves(Rule):
    """A rule with a ``__repr__`` like Python's own: with an address, another one on each rank."""

    def __repr__(self) -> str:
        return f"<Halves object at 0x7f{dist.get_rank():010x}>"

    def weight(self, num_averaged: int) -> float:
        return 1.0 if num_averaged == 0 else 0.5


@pytest.mark.distributed
@on_ranks(2)
def test_two_averages_of_one_model_take_turns() -> None:
    """Take two averages of one model by turns, and have them in the model one within the other."""
    torch.manual_seed(3)
    model = Small()
    both = [beside(model, rule=Halves()), beside(model, format="mirrored", use_buffers=True)]
    for step in range(4):
        drift(model, step)
        for one in both[: 1 + step % 2]:
            one.update()
        with unchanged(model), both[0].averaged.swapped_into(model):
            with unchanged(model):
                first = tensors_of(model)
                with both[1].averaged.swapped_into(model):
                    second = tensors_of(model)
            assert differing(first, second)
    for one in both:
        one.require_equal()


@pytest.mark.distributed
@on_ranks(2)
def test_threads_update_averages_of_their_own() -> None:
    """Update averages from a thread each, two of them with a flag that goes round at every update.

    Ranks may take the threads' updates in different orders, so those with a flag have process groups of their own.
    """
    torch.manual_seed(3)
    kinds = ("propagate", "propagate", "skip", "skip")
    groups = [dist.new_group() if kind == "skip" else None for kind in kinds]
    pairs = [beside(Small(), nonfinite=kind, process_group=group) for kind, group in zip(kinds, groups, strict=True)]
    start = threading.Barrier(len(pairs))

    def run(index: int) -> None:
        start.wait()
        for step in range(20):
            drift(pairs[index].reference, 100 * index + step)
            pairs[index].update()

    with ThreadPoolExecutor(len(pairs)) as pool:
        list(pool.map(run, range(len(pairs))))
    for each in pairs:
        each.require_equal()
