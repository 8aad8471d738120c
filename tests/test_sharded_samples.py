"""Spreads and samples of sharded averages: the bits of one process on every rank, and params that come back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, ShardedAveragedModel, Spread
from swafast.average.sampling import HasSamples
from swafast.op import drawing
from swafast.op.drawing import DrawsSample
from swafast.op.plan import Launches
from swafast.sharded import checkpoint, regrowing, shard_use
from swafast.sharded.parts import all_gather
from tests.ranks import RankFailedError, on_ranks, planted, run_ranks
from tests.sharded_models import WORLDS, Beside, drift, locals_of, make_model, outcome, planes_of, require, wrap
from tests.support import differing, require_same, tensors_of
from tests.test_sharded_modes import Seen

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:the deviations have:UserWarning"),  # these params do drift
]

#: How a model is spread and its options, dtype of the params, format asked for, deviations.
Case = tuple[str, dict[str, Any], torch.dtype, str | None, int | Spread]

#: With fewer columns than updates, so that the first ones are written again.
FORMATS: list[tuple[torch.dtype, str | None, int | Spread]] = [
    (torch.float32, None, 3),
    (torch.bfloat16, None, Spread(4, dtype=torch.float32)),
    (torch.bfloat16, "compact", 2),
    (torch.float16, None, Spread(3, dtype=torch.bfloat16)),
    (torch.float32, "compensated", 0),
]
SHARED = {"share_replicas": True}
SHARED_MODES = ("hsdp", "fsdp1_hybrid", "tp", "fsdp2_part_tp")

#: By the number of ranks: every format, and every way in which params lie.
FEW: dict[int, list[Case]] = {
    1: [("plain", {}, *FORMATS[0])],
    2: [
        ("ddp", {"use_buffers": True}, *FORMATS[2]),
        ("fsdp2", {}, *FORMATS[1]),
        ("fsdp1", {}, *FORMATS[3]),
        ("tp", {}, *FORMATS[4]),
    ],
    4: [("hsdp", SHARED, *FORMATS[0])],
}
#: Of a sample: its index, and what is given besides.
SAMPLES: list[tuple[int, dict[str, Any]]] = [(0, {}), (2**32 - 1, {"scale": 2.0, "seed": 9})]


# Bits


def drawn_beside(cases: list[Case]) -> None:
    """Draw samples of a sharded model and of the unsharded one; compare spreads, params, and what comes back."""
    all_gather.WINDOW_NBYTES = 400  # several windows
    for mode, options, dtype, fmt, spread in cases:
        both = Beside(mode, dtype, format=fmt, deviations=spread, seed=5, **options)
        about = mode, options, dtype, fmt
        for step in range(5):
            both.train()
            if step in (1, 4):
                require_drawn(both, (*about, step), *SAMPLES[step % 2])
        both.require_equal(about)
        both.averaged.sample_to(both.sharded, 3)
        both.expected.sample_to(both.reference, 3)
        require_same(both.params(), tensors_of(both.reference), f"{about}, for good")
        both.train()
        both.require_equal(f"{about}, afterwards")


def require_drawn(both: Beside, about: object, index: int = 0, given: dict[str, Any] | None = None) -> None:
    """Check that both models have the same sample, and come back, by bits; and that averages stay. Collective."""
    before, own, planes = both.params(), locals_of(both.sharded), planes_of(both.averaged)
    with (
        both.averaged.sampled_into(both.sharded, index, **given or {}) as sample,
        both.expected.sampled_into(both.reference, index, **given or {}),
    ):
        assert sample is both.sharded
        inside, expected = both.params(), tensors_of(both.reference)
    require_same(inside, expected, f"{about}, inside")
    assert {name for name in before if "weight" in name} <= {*differing(inside, before)}
    require_same(locals_of(both.sharded), own, f"{about}, own after")
    require_same(both.params(), before, f"{about}, after")
    require_same(planes_of(both.averaged), planes, f"{about}, averages after")


def check_drawn(world: int, cases: list[Case]) -> None:
    for mode in {case[0] for case in cases}:
        require(mode, forward=False)
    run_ranks(world, drawn_beside, cases)


@pytest.mark.parametrize("world", FEW)
def test_samples_have_the_bits_of_one_process(world: int) -> None:
    check_drawn(world, FEW[world])


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "world"), [(mode, world) for mode, worlds in WORLDS.items() for world in worlds])
def test_samples_of_every_mode_and_format_have_the_bits_of_one_process(mode: str, world: int) -> None:
    shared = SHARED if mode in SHARED_MODES else {}
    check_drawn(world, [(mode, options, *each) for each in FORMATS for options in ([{}, shared] if shared else [{}])])


@on_ranks(2)
def test_a_collect_meets_no_rank_and_a_skipped_one_moves_no_column() -> None:
    for mode, nonfinite in (("fsdp2", "skip"), ("ddp", "propagate")):
        both = Beside(mode, updates=2, deviations=2, nonfinite=nonfinite)
        with Seen() as seen:
            both.averaged.update_parameters(both.sharded)
        assert seen.collectives == ([("c10d::allreduce_", 2)] if nonfinite == "skip" else [])
        both.expected.update_parameters(both.reference)
        if nonfinite == "skip":
            planes, element = planes_of(both.averaged), both.reference.get_parameter("short").data.view(-1)
            healthy, element[-1] = float(element[-1]), float("nan")  # on one rank
            both.fill()
            both.update()
            require_same(planes_of(both.averaged), planes, "a skipped update")
            element[-1] = healthy
        both.train()
        both.require_equal(nonfinite)


# States


def _save(folder: Path, modes: list[str]) -> None:
    for mode in modes:
        both = Beside(mode, kind="fsdp2", updates=3, deviations=2)
        dcp.save({"averaged": both.averaged.state_dict()}, checkpoint_id=folder / mode)


@on_ranks(2)
def test_some_columns_out_of_more_are_no_state(tmp_path: Path) -> None:
    """DCP loads the keys that it is asked for, and those of fewer deviations, or of none, are among those of four."""
    saved = Beside("ddp", updates=5, deviations=4)
    dcp.save({"averaged": saved.averaged.state_dict()}, checkpoint_id=tmp_path)
    for deviations in (3, 0, None):
        other = Beside("ddp", updates=2, deviations=deviations)
        before, state = planes_of(other.averaged), {"averaged": other.averaged.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path)
        told = outcome(partial(other.averaged.load_state_dict, state["averaged"]))
        assert f"must have been saved with deviations={deviations}, got deviations=4" in told, told
        require_same(planes_of(other.averaged), before)


def _load(folder: Path, modes: list[str], sources: list[str]) -> None:
    """Go on from each save, as an unsharded average that was not interrupted."""
    for mode in modes:
        for source in sources:
            both = Beside(mode, kind="fsdp2", updates=1, deviations=2)
            state = {"averaged": both.averaged.state_dict()}
            dcp.load(state, checkpoint_id=folder / source)
            both.averaged.load_state_dict(state["averaged"])
            both.expected = FusedAveragedModel(both.reference, deviations=2)
            both.reference.load_state_dict(make_model("fsdp2").state_dict())
            for step in range(3):
                drift_alone(both, step)
            both.fill()
            both.require_equal(f"{mode} from {source}")
            require_drawn(both, f"{mode} from {source}")
            both.train(3, 4)
            both.require_equal(f"{mode} from {source}, two updates later")


def drift_alone(both: Beside, step: int) -> None:
    drift(both.reference, step)
    both.expected.update_parameters(both.reference)


def test_what_two_ranks_saved_three_load_and_go_on_with(tmp_path: Path) -> None:
    run_ranks(2, _save, tmp_path, ["ddp"])
    run_ranks(3, _load, tmp_path, ["fsdp2"], ["ddp"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, _save, folder, ["ddp", "fsdp2", "fsdp1"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3, 4])
def test_what_two_ranks_saved_others_load_in_every_way(saved: Path, world: int) -> None:
    modes = ["ddp", "fsdp2", "fsdp1", "tp", *(["hsdp"] if world == 4 else [])]
    run_ranks(world, _load, saved, modes, ["ddp", "fsdp2", "fsdp1"])


@on_ranks(2)
def test_states_of_another_spread_are_refused_and_full_ones_go_both_ways() -> None:
    told_of: dict[int | None, str] = {
        4: "got deviations=4: 'deviation.3.long' is there",
        2: "got deviations=2: 'deviation.2.long' is missing",
        0: "got deviations=0: 'deviation.0.long' is missing",
        None: "got deviations=None: 'variance.long' is missing",
    }
    for mode, spreads in (("ddp", (4, None)), ("fsdp2", (2, 0, None))):
        both = Beside(mode, updates=3, deviations=3)
        before = planes_of(both.averaged)
        for spread in spreads:
            other = Beside(mode, updates=2, deviations=spread)
            parts, fulls = other.averaged.state_dict(), other.expected.state_dict()
            for load in (
                partial(both.averaged.load_state_dict, parts),
                partial(both.averaged.load_full_state_dict, fulls),
                partial(both.averaged.load_full_state_dict, fulls if dist.get_rank() == 0 else None, from_rank0=True),
            ):
                told = outcome(load)
                at_fault = load.keywords == {} or dist.get_rank() == 0
                assert f"the state must have the average's deviations=3, {told_of[spread]}" in told, (
                    mode,
                    spread,
                    told,
                )
                assert at_fault == told.startswith("ValueError"), told
                require_same(planes_of(both.averaged), before, "a refused load")
            if spread is None:
                told = outcome(partial(other.averaged.load_state_dict, both.averaged.state_dict()))
                assert "deviations=None, got deviations=3: 'variance.long' is there" in told, told
        cast = Beside(mode, deviations=Spread(3, dtype=torch.bfloat16))
        told = outcome(partial(cast.averaged.load_state_dict, both.averaged.state_dict()))
        assert "state_dict['deviation.0.long'] must be torch.bfloat16, got torch.float32" in told, told
        cast.averaged.load_full_state_dict(both.expected.state_dict())
        cast.expected.load_state_dict(both.averaged.full_state_dict())
        cast.require_equal("full states are cast")
        other = Beside(mode, updates=2, deviations=3)
        other.expected.load_state_dict(both.averaged.full_state_dict())
        other.averaged.load_full_state_dict(both.expected.state_dict(), from_rank0=mode == "ddp")
        other.require_equal("full states")
        require_drawn(other, "of a full state")


# Several averages


@on_ranks(2)
def test_one_of_several_averages_has_a_spread() -> None:
    rules = {"fast": ExponentialAverage(0.9), "mean": EqualAverage()}
    for mode in ("fsdp1",):  # others: tests/test_sharded_averages.py
        both = Beside(mode, updates=4, rules=rules, deviations={"mean": 3})
        both.require_equal(mode)
        assert not any(key.startswith(("fast.variance", "fast.deviation")) for key in both.averaged.full_state_dict())
        of_mean = Beside(mode, models=(both.reference, both.sharded), rule=EqualAverage())
        of_mean.averaged, of_mean.expected = both.averaged["mean"], both.expected["mean"]
        require_drawn(of_mean, mode)
        with pytest.raises(RuntimeError, match="a sample must be drawn of an average with a spread"):
            both.averaged["fast"].sampled_into(both.sharded, 0).__enter__()
        assert [both.averaged[name].deviations for name in rules] == [None, Spread(3)]


@on_ranks(2)
def test_a_model_that_has_grown_keeps_its_spread_in_another_dtype() -> None:
    """The bits of `adapt_to` in one dtype are compared in tests/test_growing.py."""
    both = Beside("fsdp2", updates=3, deviations=2)
    before = both.averaged.full_state_dict()
    grown = wrap(make_model("fsdp1").bfloat16(), "fsdp1")
    assert both.averaged.adapt_to(grown) == ["conv.weight", "conv.bias"]
    after = both.averaged.full_state_dict()
    for key, value in before.items():
        if key.startswith(("variance.", "deviation.")):
            wanted = value.to(torch.float32 if key.startswith("variance.") else torch.bfloat16)
            assert torch.equal(after[key], wanted), key
    assert not after["variance.conv.weight"].any()
    assert not after["deviation.1.conv.weight"].any()
    with both.averaged.sampled_into(grown, 0):
        pass


# What is restored


class BodyError(Exception):
    pass


def raised_in_body(mode: str) -> None:
    """Leave the body by errors on all ranks and on one; what stands in the model then is as before, by bits."""
    both = Beside(mode, updates=3, deviations=2)
    before, own, planes = both.params(), locals_of(both.sharded), planes_of(both.averaged)
    for kind in (BodyError, KeyboardInterrupt):
        for ranks in ((0, 1), (1,)):
            try:
                with both.averaged.sampled_into(both.sharded, 0):
                    for buffer in both.sharded.buffers():  # as update_bn does
                        buffer.zero_()
                    if dist.get_rank() in ranks:
                        raise kind
            except kind:
                assert dist.get_rank() in ranks
            require_same(locals_of(both.sharded), own, (mode, kind, ranks))
            require_same(planes_of(both.averaged), planes, (mode, kind, ranks))
    require_same(both.params(), before, mode)
    require_not_begun(both, own)


def require_not_begun(both: Beside, own: dict[str, Tensor]) -> None:
    """Fail on one rank where the others begin: no rank has begun."""
    put, is_victim = DrawsSample._put, dist.get_rank() == 1

    def fail(self: DrawsSample) -> None:
        put(self)
        raise MemoryError("none left")

    DrawsSample._put = fail if is_victim else put  # type: ignore[method-assign]
    with pytest.raises(MemoryError if is_victim else RuntimeError, match="none left"):
        both.averaged.sampled_into(both.sharded, 0).__enter__()
    DrawsSample._put = put  # type: ignore[method-assign]
    require_same(locals_of(both.sharded), own, "not begun")
    require_drawn(both, "after an error of one rank")


@on_ranks(2)
def test_everything_comes_back_after_an_error() -> None:
    for mode in ("ddp", "fsdp2"):
        raised_in_body(mode)


@on_ranks(2)
def test_autograd_learns_of_a_sample_for_good() -> None:
    both = Beside("plain", updates=2, deviations=2)
    param = both.sharded.get_parameter("long")
    loss = param.square().sum()
    both.averaged.sample_to(both.sharded, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", [FusedAveragedModel, ShardedAveragedModel])
def test_a_sample_has_what_torch_copies(kind: Any) -> None:
    """In one process, without a group."""
    model = nn.Linear(3, 2)
    model.register_buffer("edges", torch.eye(3).to_sparse())
    averaged = kind(model, deviations=2)
    for _ in range(2):
        with torch.no_grad():
            model.weight.mul_(2)
        averaged.update_parameters(model)
    model.edges = torch.zeros(3, 3).to_sparse()
    with averaged.sampled_into(model, 0):
        assert torch.equal(model.edges.to_dense(), torch.eye(3))
    assert not model.edges.to_dense().any()
    averaged.sample_to(model, 0)
    assert torch.equal(model.edges.to_dense(), torch.eye(3))


# Bad input


def asked_otherwise() -> None:
    rank, mode = dist.get_rank(), "fsdp2"  # no param is cut: nothing but the call itself has ranks meet
    both = Beside(mode, updates=1, deviations=2)
    averaged, model, own = both.averaged, both.sharded, locals_of(both.sharded)
    alone = ShardedAveragedModel(model)

    def told(index: object = 0, of: Any = averaged, **given: Any) -> list[str]:
        found = [
            outcome(lambda: of.sampled_into(model, index, **given).__enter__()),
            outcome(lambda: of.sample_to(model, index, **given)),
        ]
        require_same(locals_of(model), own, f"{index}, {given}")
        return found

    def require_told(found: list[str], *words: str) -> None:
        assert [all(word in one for word in words) for one in found] == [True, True], (found, words)

    require_told(told(), "RuntimeError", "a sample must wait until two models are in the average, got 1")
    both.train()
    own = locals_of(model)
    calls = "all ranks must make the same call, got", " on rank 0, ", f"of average {averaged._number} on rank 1"
    require_told(told(rank), "RuntimeError", *calls, "(index=1, seed=0, scale=None)")
    require_told(told(scale=torch.tensor(0.5 + 1e-6 * rank)), *calls, "(index=0, seed=0, scale=0.500001")
    require_told(told(seed=rank), *calls, "(index=0, seed=1, scale=None)")
    averaged.seed = rank
    require_told(told(), *calls, "(index=0, seed=1, scale=None)")
    averaged.seed = 0
    one, half = (0, 0.5) if rank else (np.int64(0), torch.tensor(0.5))
    with averaged.sampled_into(model, one, scale=half, seed=one):  # type: ignore[arg-type]  # equal by value
        pass
    require_told(told(-1), "ValueError: index must be from 0 to 2^32 - 1, got -1")
    require_told(told(object()), "TypeError: index must be an int")
    require_told(told(scale=-1.0), "ValueError: scale must be finite in float32 and >= 0, got -1.0")
    require_told(told(seed=0.5), "TypeError: seed must be an int, got 0.5")
    require_told(told(of=alone), "RuntimeError: a sample must be drawn of an average with a spread")
    if rank == 0:
        averaged.update_parameters(model)
    require_told(told(), "needs the same n_averaged on every rank, got 3 on rank 0 and 2 on rank 1")
    if rank == 1:
        averaged.update_parameters(model)
    both.expected.update_parameters(both.reference)
    require_drawn(both, "after all these")


@on_ranks(2)
def test_what_ranks_ask_otherwise_raises_on_all() -> None:
    asked_otherwise()


@on_ranks(2)
def test_a_spread_that_cannot_be_raises_on_all() -> None:
    model = make_model("plain")
    for deviations, error in (
        (1, "ValueError: deviations must be 0 for the variance alone, or from 2 to"),
        ("many", "TypeError: deviations must be a whole number"),
        (2 + dist.get_rank(), "ValueError: the model and the arguments must be the same on every rank, got for 'devia"),
    ):
        assert error in outcome(partial(ShardedAveragedModel, model, deviations=deviations))  # type: ignore[arg-type]
    waves = nn.ParameterDict({"wave": nn.Parameter(torch.zeros(2, dtype=torch.complex64))})
    assert "deviations must be None for complex parameters" in outcome(
        partial(ShardedAveragedModel, waves, deviations=2)
    )
    assert "num_averaged must be 0 with deviations" in outcome(
        partial(ShardedAveragedModel, model, deviations=2, num_averaged=3)
    )


@on_ranks(2)
def test_meanwhile_nothing_may_touch_the_averages() -> None:
    both = Beside("ddp", updates=2, deviations=2)
    averaged, model, before = both.averaged, both.sharded, both.params()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    planes = planes_of(averaged)
    with averaged.sampled_into(model, 0):
        for call in (
            lambda: averaged.update_parameters(model),
            lambda: averaged.sampled_into(model, 1).__enter__(),
            lambda: averaged.sample_to(model, 1),
            averaged.state_dict,
            optimizer.step,
        ):
            assert "swapped back out of the model" in outcome(call)
    require_same(both.params(), before)
    require_same(planes_of(averaged), planes)
    written = pytest.raises(RuntimeError, match="must not be written while swapped")
    with written, averaged.sampled_into(model, 0), torch.no_grad():
        next(model.parameters()).add_(1)
    require_same(both.params(), before, "after a write")


# Each gate kills a bug


def count_from_each_part() -> None:
    """Each rank draws by the indices in its own part."""

    shard_use.UsableShards._draws_of = HasSamples._draws_of  # type: ignore[method-assign]


def draw_columns_by_rank() -> None:
    right = shard_use.UsableShards._drawing

    def of_rank(self: Any, index: Any, scale: Any, seed: Any) -> Any:
        return right(self, index, scale, self.seed + dist.get_rank())

    shard_use.UsableShards._drawing = of_rank  # type: ignore[method-assign]


def keep_no_copy() -> None:
    put = DrawsSample._put

    def forget(self: Any) -> None:
        put(self)
        self._stash.clear()

    DrawsSample._put = forget  # type: ignore[method-assign]


def gather_no_sample() -> None:
    shard_use.DrawsShards.gather = lambda self: self.watch()  # type: ignore[method-assign]


def compare_no_arguments() -> None:
    shard_use.UsableShards._spelled = lambda self, **asked: "it"  # type: ignore[method-assign]


def save_no_columns() -> None:
    entries = checkpoint.entries

    def without(*args: Any) -> Any:
        return (entry for entry in entries(*args) if not entry.keys[0].startswith("deviation.1"))

    checkpoint.entries = without  # type: ignore[assignment]


def begin_the_spread_again() -> None:
    keep = regrowing._keep

    def without(share: Any, planes: Any, old: Any, old_planes: Any, ranks: Any) -> None:
        kept = [plane.clone() for plane in planes[share.format.num_planes :]]
        keep(share, planes, old, old_planes, ranks)
        for plane, value in zip(planes[share.format.num_planes :], kept, strict=True):
            plane.copy_(value)

    regrowing._keep = without  # type: ignore[assignment]


def bump_nothing() -> None:
    drawing.bump_versions = lambda tensors: None  # type: ignore[assignment]


def seal_no_number() -> None:
    checkpoint._PER_DEVIATION = 0


def load_some_columns() -> None:
    with tempfile.TemporaryDirectory() as folder:
        test_some_columns_out_of_more_are_no_state(Path(folder))


def skip_nothing() -> None:
    update = Launches.update
    Launches.update = lambda *args, skip_nonfinite=False, **options: update(*args, **options)  # type: ignore[method-assign]


GATES: list[tuple[Callable[[], None], Callable[[], object], str]] = [
    (count_from_each_part, partial(check_drawn, 2, FEW[2][1:2]), "inside: "),
    (draw_columns_by_rank, partial(check_drawn, 2, FEW[2][1:2]), "inside: "),
    (gather_no_sample, partial(check_drawn, 2, FEW[2][:1]), "inside: "),
    (keep_no_copy, test_everything_comes_back_after_an_error, r"own after|BodyError"),
    (compare_no_arguments, test_what_ranks_ask_otherwise_raises_on_all, r"[01], \{\}: \['blocks"),
    (save_no_columns, test_states_of_another_spread_are_refused_and_full_ones_go_both_ways, "deviation.1"),
    (begin_the_spread_again, test_a_model_that_has_grown_keeps_its_spread_in_another_dtype, "variance"),
    (seal_no_number, load_some_columns, "no error"),
    (skip_nothing, test_a_collect_meets_no_rank_and_a_skipped_one_moves_no_column, "allreduce|a skipped update"),
    (bump_nothing, test_autograd_learns_of_a_sample_for_good, "DID NOT RAISE"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("plant", "gate", "message"), GATES, ids=[plant.__name__ for plant, *_ in GATES])
def test_the_gate_kills_the_bug(plant: Callable[[], None], gate: Callable[[], object], message: str) -> None:
    with planted(plant), pytest.raises(RankFailedError, match=message):
        gate()
