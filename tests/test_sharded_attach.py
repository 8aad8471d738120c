"""`attach` for sharded models: the same bits as updates in the loop, also beside the next forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from swafast import EqualAverage, ExponentialAverage, ShardedAveragedModel, ShardedAverages
from swafast.loop import runners
from swafast.sharded import shard_matching
from tests.ranks import on_ranks, run_ranks
from tests.sharded_models import WIDTH, can_run, make_model, require, wrap
from tests.support import Held, differing, require_same

pytestmark = pytest.mark.distributed

ON_TWO = ("plain", "ddp", "fsdp2", "fsdp1", "fsdp1_orig", "tp")
ON_FOUR = ("hsdp", "fsdp2_tp")
FLAT = {"flatten_optimizer_state_dict": True}
SEVERAL = {"fast": ExponentialAverage(0.9), "mean": EqualAverage()}


class Run:
    """A training in one mode, the same each time; its forward pass writes BatchNorm's statistics."""

    def __init__(self, mode: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.model, self.dtype = wrap(make_model(mode, dtype), mode), dtype
        trained = [param for param in self.model.parameters() if param.requires_grad]
        self.optimizer = torch.optim.SGD(trained, 0.01, momentum=0.9, foreach=False)
        kind: Any = ShardedAverages if "rules" in options else ShardedAveragedModel
        self.averaged = kind(self.model, **options)
        self.generator = torch.Generator().manual_seed(5)

    def backward(self) -> None:
        x = torch.randn(4, WIDTH, generator=self.generator).to(self.dtype)
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()

    def state(self) -> dict[str, Tensor]:
        return self.averaged.full_state_dict()


def plainly(mode: str, steps: int, **options: Any) -> Run:
    run = Run(mode, **options)
    for step in range(1, steps + 1):
        run.backward()
        run.optimizer.step()
        if step >= 2:
            run.averaged.update_parameters(run.model)
    return run


@contextmanager
def holding() -> Iterator[Held]:
    """Hold each background update, before it takes any lock, until the next forward and backward have run."""
    with pytest.MonkeyPatch.context() as patch:
        yield Held(patch, runners.InThread, name="_run")


def _attached(mode: str, steps: int, stop_at: int, **options: Any) -> tuple[Run, bool]:
    """Train with updates beside the forward pass, stop, resume, and train on with updates in the hook."""
    run = Run(mode, **options)
    with holding() as held:
        run.averaged.attach(run.optimizer, start=2, overlap=True)
        for _ in range(stop_at):
            run.backward()
            held.let_go.set()
            run.averaged._guard.attachment.join()
            held.let_go.clear()
            run.optimizer.step()
        run.backward()
        held.let_go.set()
        run.averaged._guard.attachment.join()
    state = run.averaged._guard.attachment.state_dict(), run.averaged.state_dict()
    other = run.averaged  # of the same model; made anew as after a restart
    other._guard.attachment.detach()
    run.averaged = ShardedAveragedModel(run.model, **options)
    run.averaged.attach(run.optimizer).load_state_dict(state[0])
    run.averaged.load_state_dict(state[1])
    run.optimizer.step()
    for _ in range(steps - stop_at - 1):
        run.backward()
        run.optimizer.step()
    return run, held.begun.is_set()


def _train(modes: tuple[str, ...], options: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    for mode in modes:
        want = plainly(mode, 6, **options)
        got, was_held = _attached(mode, 6, 4, **options)
        found += [(mode, key) for key in differing(got.state(), want.state())]
        steps = got.averaged._guard.attachment.step
        if (was_held, steps) != (True, 6):
            found.append((mode, was_held, steps))
    return found


@pytest.mark.parametrize(
    ("world", "modes", "options"),
    [
        (2, ON_TWO, {"use_buffers": True}),
        (2, ("ddp", "fsdp2"), {"format": "compact", "deviations": 2}),
        (4, ON_FOUR, {}),
    ],
    ids=str,
)
def test_each_mode_has_the_bits_of_updates_in_the_loop(
    world: int, modes: tuple[str, ...], options: dict[str, Any]
) -> None:
    for mode in modes:
        require(mode, forward=True)
    assert run_ranks(world, _train, modes, options) == [[]] * world


def _swap(run: Run) -> None:
    with run.averaged.swapped_into(run.model):
        pass


USES: dict[str, Callable[[Run], object]] = {
    "swapped_into": _swap,
    "copy_to": lambda run: run.averaged.copy_to(run.model),
    "state_dict": lambda run: run.averaged.state_dict(),
    "full_state_dict": lambda run: run.averaged.full_state_dict(),
    "load_state_dict": lambda run: run.averaged.load_state_dict({}),
    "update_parameters": lambda run: run.averaged.update_parameters(run.model),
}


@on_ranks(2)
def test_whatever_uses_the_averages_waits() -> None:
    for name, use in USES.items():
        run = Run("ddp")
        with holding() as held:
            run.averaged.attach(run.optimizer, overlap=True)
            run.backward()
            run.optimizer.step()
            held.let_go_in(0.1)
            with contextlib.suppress(ValueError):  # of a state without keys
                use(run)
            assert held.ended.is_set(), name
            run.averaged._guard.attachment.join()


@pytest.mark.skipif(not can_run("fsdp2", forward=True), reason="needs a torch that can run fsdp2 on a CPU")
@on_ranks(2)
def test_several_averages_are_attached_together() -> None:
    run, want = Run("fsdp2", rules=SEVERAL), plainly("fsdp2", 4, rules=SEVERAL)
    attachment = run.averaged.attach(run.optimizer, start=2, overlap=True)
    for _ in range(4):
        run.backward()
        run.optimizer.step()
    require_same(run.state(), want.state())
    with pytest.raises(RuntimeError):  # one of them is attached already
        run.averaged["fast"].attach(run.optimizer)
    state = run.optimizer.state_dict()
    attachment.detach()
    run.averaged["fast"].attach(run.optimizer, run.model).detach()
    run.optimizer.load_state_dict(state)
    in_another_order = ShardedAverages(run.model, rules=dict(reversed(SEVERAL.items())))
    assert in_another_order.attach(run.optimizer, start=2).step == 4


def _resumed(mode: str) -> list[Any]:
    """Save and load by torch's tools, and return the ways that do not go on from the saved steps."""
    full = {"full_state_dict": True}
    on_first = {**full, "cpu_offload": True}  # the state is on the first rank alone
    found = []
    ways = [({}, {}), (full, full), (on_first, full | {"broadcast_from_rank0": True}), (FLAT, FLAT)]
    for got, loaded in ways[: 3 if mode == "ddp" else 4]:  # torch 2.6 flattens no state of tied params
        run = Run(mode)
        run.averaged.attach(run.optimizer, start=2)
        ShardedAveragedModel(run.model).attach(run.optimizer, start=7, step=10)
        run.backward()
        run.optimizer.step()
        state = get_optimizer_state_dict(run.model, run.optimizer, options=StateDictOptions(**got))
        for attach_first in (True, False) if got is not FLAT else (True,):
            other = Run(mode)
            averages = {7: ShardedAveragedModel(other.model), 2: other.averaged}  # in another order
            load = functools.partial(set_optimizer_state_dict, options=StateDictOptions(**loaded))
            if not attach_first:
                load(other.model, other.optimizer, state)
            attachments = [each.attach(other.optimizer, start=start) for start, each in averages.items()]
            if attach_first:
                load(other.model, other.optimizer, state)
            steps = [(each.step, each.schedule.start) for each in attachments]
            if steps != [(11, 7), (1, 2)]:
                found.append((got, attach_first, steps))
    return found


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_torchs_tools_keep_the_steps(mode: str) -> None:
    require(mode, forward=True)
    assert run_ranks(2, _resumed, mode) == [[], []]


def _refused() -> None:
    run, rank = Run("fsdp2"), dist.get_rank()
    skipping = ShardedAveragedModel(run.model, nonfinite="skip")
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    for averaged, options, kind, message in (
        (skipping, {"offload": "cpu"}, ValueError, "offload must be None with nonfinite='skip', got 'cpu'"),
        (skipping, {"overlap": True}, ValueError, "overlap must be False with nonfinite='skip', got True"),
        (run.averaged, {"optimizer": other}, ValueError, "optimizer must have params of the model"),
        (run.averaged, {"every": 0}, ValueError, "every must be at least one step, got 0"),
        # Another on each rank; none on the first.
        (run.averaged, {"every": 1 + rank}, ValueError, "the arguments of attach must be the same on every rank"),
        (run.averaged, {"every": rank}, (ValueError, RuntimeError), "every must be at least one step, got 0"),
    ):
        with pytest.raises(kind, match=message):
            averaged.attach(**({"optimizer": run.optimizer} | options))
    run.backward()
    run.optimizer.step()
    assert run.averaged.n_averaged == 0
    for options in ({"offload": "cpu"}, {"overlap": True}):
        with run.averaged.attach(run.optimizer, **options):
            run.averaged.nonfinite = "skip"
            run.backward()
            with pytest.raises(ValueError, match="with nonfinite='skip', got"):
                run.optimizer.step()
            run.averaged.nonfinite = "propagate"
    assert run.averaged.n_averaged == 0


def test_what_cannot_be_attached_is_named() -> None:
    require("fsdp2", forward=True)
    run_ranks(2, _refused)


def _read_too_late() -> None:
    shard_matching.Staging.take = lambda self, name, buffer: buffer  # type: ignore[method-assign]


def test_the_gate_sees_buffers_that_were_read_too_late() -> None:
    found = run_ranks(2, _train, ("ddp",), {"use_buffers": True}, plant=_read_too_late)
    assert ("ddp", "module.norm.running_mean") in found[0]


@pytest.mark.parametrize("options", [{}, {"rules": {"fast": ExponentialAverage(0.9), "mean": EqualAverage()}}])
@on_ranks(2)
def test_memory_may_move_in_its_storage_between_two_steps(options: dict[str, Any]) -> None:
    want, run = plainly("plain", 3, **options), Run("plain", **options)
    with holding() as held:
        run.averaged.attach(run.optimizer, start=2, overlap=True)
        for step in range(1, 4):
            run.backward()
            run.optimizer.step()
            if step == 2:  # an update waits, whose plan was made for the memory that this frees
                run.model.share_memory()
                for average in run.averaged.values() if options else [run.averaged]:
                    for planes in average._planes.values():
                        planes[0].share_memory_()
            held.let_go.set()
            run.averaged._guard.attachment.join()
            held.let_go.clear()
    assert differing(run.state(), want.state()) == []
