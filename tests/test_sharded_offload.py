"""`attach(offload="cpu")` for sharded models: the bits of a plain attachment, whatever comes between two updates."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from swafast import ShardedAverages
from swafast.sharded import hosting, updating
from tests.ranks import on_ranks, run_ranks
from tests.sharded_models import WIDTH, can_run, gather
from tests.support import differing
from tests.test_sharded_attach import SEVERAL, Run, holding

pytestmark = pytest.mark.distributed

BFLOAT16 = {"dtype": torch.bfloat16, "format": "exact"}
#: Modes, and options of the model and its average.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ddp", {"format": "compact", "deviations": 2, "use_buffers": True}),
    ("fsdp2", BFLOAT16),
    ("fsdp1", {"rules": SEVERAL, "format": {"fast": "compact"}}),
]
MORE: list[tuple[str, dict[str, Any]]] = [
    ("ddp", {"rules": SEVERAL, "format": {"fast": "compact"}}),
    ("ddp", BFLOAT16),
    ("fsdp2", {"use_buffers": True}),
    ("fsdp2", {"format": "compact"}),
    ("fsdp2", {**BFLOAT16, "rules": SEVERAL}),
    ("fsdp1", BFLOAT16),
    ("fsdp1_orig", {"format": "compact", "use_buffers": True}),
    ("fsdp1_no_shard", {"share_replicas": True}),
    ("plain", {**BFLOAT16, "rules": SEVERAL}),
    ("tp", {"share_replicas": True}),
]
OF_FOUR: list[tuple[str, dict[str, Any]]] = [
    ("hsdp", {"share_replicas": True}),
    ("hsdp", {}),
    ("fsdp2_tp", BFLOAT16),
    ("fsdp1_hybrid", {"share_replicas": True}),
]


def runnable(cases: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    return [case for case in cases if can_run(case[0], forward=True)]


def _one(run: Run) -> Any:
    return run.averaged["mean"] if isinstance(run.averaged, ShardedAverages) else run.averaged


def _swapped(run: Run) -> dict[str, Tensor]:
    run.model.eval()
    with _one(run).swapped_into(run.model), torch.no_grad():
        output = run.model(torch.ones(3, WIDTH, dtype=run.dtype))
    run.model.train()
    return {"output": output}


def _drawn(run: Run) -> dict[str, Tensor]:
    if _one(run).deviations is None:
        return {}
    with _one(run).sampled_into(run.model, 3):
        return gather(run.model, "ddp")


def _loaded(run: Run) -> dict[str, Tensor]:
    """Load an earlier state, by parts and whole, and go on from it."""
    run.averaged.load_state_dict(run.averaged.state_dict())
    run.averaged.load_full_state_dict(run.averaged.full_state_dict(), from_rank0=True)
    return run.state()


#: What comes after each step, in turn.
USES: list[Callable[[Run], dict[str, Tensor]]] = [_swapped, _loaded, _drawn, Run.state]


def _follow(case: tuple[str, dict[str, Any]], seed: int) -> list[Any]:
    """Train twice, and return what differs after a step where updates are made in a thread, from copies."""
    mode, options = case
    want, got = Run(mode, **options), Run(mode, **options)
    want.averaged.attach(want.optimizer, start=2, every=2)
    attachment = got.averaged.attach(got.optimizer, start=2, every=2, offload="cpu")
    found: list[Any] = []
    with holding() as held:
        for step in range(1, 8):
            for run in (want, got):
                run.backward()  # an update waits while buffers are written here, and after every second step params
                if step % 2 == 0:
                    held.let_go.set()
                    attachment.join()
                    held.let_go.clear()
                run.optimizer.step()
            if step % 2 == 1:
                held.let_go.set()
                use = USES[(seed + step // 2) % len(USES)]
                found += [(mode, step, use.__name__, key) for key in differing(use(got), use(want))]
                held.let_go.clear()
        held.let_go.set()
    attachment.detach()
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("swafast")]
    found += [(mode, key) for key in differing(got.state(), want.state())] + threads
    if attachment.step != 7 or not held.begun.is_set():
        found.append((mode, attachment.step))
    return found


def _follow_all(cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    return [each for seed, case in enumerate(cases) for each in _follow(case, seed)]


@pytest.mark.filterwarnings("ignore:.* uses an average that holds no model yet")
@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, CASES),
        pytest.param(2, MORE, marks=pytest.mark.slow),
        pytest.param(4, OF_FOUR, marks=pytest.mark.slow),
    ],
    ids=["2", "2 more", "4"],
)
def test_offload_has_the_bits_of_updates_in_the_hook(world: int, cases: list[Any]) -> None:
    assert run_ranks(world, _follow_all, runnable(cases)) == [[]] * world


def _without_copies() -> None:
    hosting.HostStaging.take_parts = lambda self, parts: [part for _, part in parts]  # type: ignore[method-assign]


def _buffers_too_late() -> None:
    copy = hosting.HostStaging.take_parts

    def take(self: Any, parts: Any) -> Any:
        copies = copy(self, parts)
        return [part if share.holding.is_buffer else mine for (share, part), mine in zip(parts, copies, strict=True)]

    hosting.HostStaging.take_parts = take  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "name"),
    [(_without_copies, "module.blocks.0.inner.weight"), (_buffers_too_late, "module.norm.running_mean")],
)
def test_the_gate_sees_what_was_read_too_late(plant: Callable[[], None], name: str) -> None:
    found = run_ranks(2, _follow_all, CASES[:1], plant=plant)
    assert any(each[-1] == name for each in found[0])


@on_ranks(2)
def test_an_error_in_one_ranks_thread_is_raised_on_all_ranks_by_the_next_call() -> None:
    run, rank = Run("ddp"), dist.get_rank()
    uses: dict[str, Callable[[], object]] = {
        "state_dict": run.averaged.state_dict,
        "swapped_into": lambda: run.averaged.swapped_into(run.model).__enter__(),
        "copy_to": lambda: run.averaged.copy_to(run.model),
    }
    with run.averaged.attach(run.optimizer, every=2, offload="cpu") as attachment:
        for use in uses:
            run.backward()
            run.optimizer.step()
            run.backward()
            with pytest.MonkeyPatch.context() as patch:
                if rank == 0:
                    patch.setattr(updating, "_on_its_memory", lambda *_: 1 / 0)
                run.optimizer.step()
                attachment._runner.wait()
            kind, told = (ZeroDivisionError, "") if rank == 0 else (RuntimeError, f"{use} failed on rank 0")
            with pytest.raises(kind, match=told):
                uses[use]()
            # On the other rank the update was made: the user loads a state.
            run.averaged.n_averaged.fill_(1)
            run.averaged.state_dict()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("swafast")]


@on_ranks(2)
def test_a_rank_without_room_leaves_all_averages_where_they_were() -> None:
    run, rank = Run("ddp", rules=SEVERAL), dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(hosting, "new_in_buckets", lambda _: 1 / 0)
        kind, told = (ZeroDivisionError, "") if rank == 1 else (RuntimeError, "attach failed on rank 1")
        with pytest.raises(kind, match=told):
            run.averaged.attach(run.optimizer, offload="cpu")
    assert not any(averaged._any_device for averaged in run.averaged.values())
    run.averaged.attach(run.optimizer, offload="cpu").detach()


@on_ranks(2)
def test_what_an_average_holds_may_move_between_two_updates_of_it_and_others() -> None:
    """Plans of several averages must not write where one of them was."""
    run, want = Run("ddp", rules=SEVERAL), Run("ddp", rules=SEVERAL)
    for each in (run, want):
        each.averaged.update_parameters(each.model)
        each.averaged.update_parameters(each.model)
    with pytest.MonkeyPatch.context() as patch:
        # As on a machine with a GPU: into other memory.
        patch.setattr(hosting, "is_at_home", lambda plane, pinned: False)
        run.averaged["fast"].attach(run.optimizer, run.model, offload="cpu").detach()
    for each in (run, want):
        each.backward()
        each.optimizer.step()
        each.averaged.update_parameters(each.model)
    assert differing(run.state(), want.state()) == []
    run.averaged["mean"].adapt_to(run.model)
    for each in (run, want):
        each.averaged.update_parameters(each.model)
    assert differing(run.state(), want.state()) == []


@on_ranks(2)
def test_averages_that_take_over_another_model_stay_on_the_host() -> None:
    run, want = Run("ddp"), Run("ddp")
    want.averaged.attach(want.optimizer)
    run.averaged.attach(run.optimizer, offload="cpu")
    moved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosting, "is_at_home", lambda plane, pinned: moved.append(plane) or False)
        for each in (run, want):
            for step in range(3):
                each.backward()
                each.optimizer.step()
                if step == 1:
                    moved.clear()
                    each.averaged.adapt_to(each.model)
                    assert bool(moved) == (each is run)
    assert differing(run.state(), want.state()) == []


@on_ranks(2)
def test_a_rank_copies_its_own_part_alone_params_on_side_streams_and_buffers_before() -> None:
    run, seen = Run("ddp", rules=SEVERAL), []
    copy = hosting.HostStaging._copy

    @contextlib.contextmanager
    def on_side(streams: Any) -> Iterator[None]:
        seen.append(("on", 0))
        yield
        seen.append(("off", 0))

    def copied(self: hosting.HostStaging, key: Any, part: Tensor) -> None:
        seen.append((key[0], part.numel()))
        copy(self, key, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosting, "on_side", on_side)
        patch.setattr(hosting.HostStaging, "_copy", copied)
        with run.averaged.attach(run.optimizer, offload="cpu"):
            for _ in range(2):
                seen.clear()
                run.backward()
                run.optimizer.step()
    names = [name for name, _ in seen]
    buffers = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "mask"]
    assert sorted(names[: names.index("on")]) == sorted(buffers)
    assert names[-1] == "off"
    own = sum(numel for name, numel in seen if name not in buffers)
    assert own < sum(param.numel() for param in run.model.parameters())
    total = torch.tensor(own)
    dist.all_reduce(total)
    assert total == sum(param.numel() for param in run.model.parameters()) + 1  # both have that without dimensions
