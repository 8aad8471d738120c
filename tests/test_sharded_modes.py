"""Sharded averages against unsharded ones: the same bits in every mode, no collective, no byte too many."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel
from swafast.backends import cuda, library
from swafast.op.plan import Launches, Plan
from swafast.sharded import ShardedAveragedModel, shard_matching, sharded_model
from swafast.sharded.parts import flat_order, shares
from tests import test_costs
from tests.ranks import on_ranks, planted, run_ranks
from tests.sharded_models import (
    TP_MODES,
    WIDTH,
    WORLDS,
    Beside,
    drift,
    fill,
    gather,
    local_of,
    make_model,
    plain_name,
    require,
    require_own_parts,
    wrap,
)
from tests.support import differing, require_same, tensors_of

pytestmark = pytest.mark.distributed

MODES_AND_WORLDS = [(mode, world) for mode, worlds in WORLDS.items() for world in worlds]
#: One number of ranks for each mode: uneven where torch allows it.
ONE_WORLD = {mode: 3 if 3 in worlds else worlds[-1] for mode, worlds in WORLDS.items()}

#: (dtype of the params, format asked for, bytes of an element's average)
FORMATS = [
    (torch.float32, None, 4),
    (torch.bfloat16, None, 4),
    (torch.bfloat16, "float32", 4),
    (torch.float16, None, 6),
    (torch.float64, None, 8),
]

#: Modes that stand for the others in how formats are laid out, each on one number of ranks. Everywhere else another
#: number of ranks has another format beside float32.
ALL_FORMATS = ("plain", "fsdp2", "fsdp1", "tp", "fsdp2_tp")

#: What a cut may be above an even part: it falls on multiples of this.
BORDER_NUMEL = 64


class Seen(TorchDispatchMode):
    """Record collectives, operations on DTensors and reads of a value by the host: whatever goes through torch."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, int]] = []  # (name, elements of the first tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket._qualified_op_name
        if name.startswith(("c10d", "_c10d", "aten::_local_scalar_dense")):
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            self.ops.append((name, tensors[0].numel() if tensors else 0))
        if any(issubclass(kind, DTensor) for kind in types):
            self.ops.append((f"DTensor {name}", 0))
            return NotImplemented  # so that the collectives of DTensor's own dispatch are seen
        return func(*args, **(kwargs or {}))

    @property
    def collectives(self) -> list[tuple[str, int]]:
        return [(name, numel) for name, numel in self.ops if "c10d" in name]

    @property
    def spread_out(self) -> list[tuple[str, int]]:
        """Collectives and operations on DTensors."""
        return [(name, numel) for name, numel in self.ops if "c10d" in name or "DTensor" in name]


# Bits, collectives and bytes


def averaged_beside(mode: str, cases: list[tuple[torch.dtype, str | None, str | None]]) -> list[dict[str, Any]]:
    """Average a model sharded and unsharded side by side; return for each case what was done and held."""
    told = []
    for index, (dtype, fmt, backend) in enumerate(cases):
        rule = EqualAverage() if index % 2 else ExponentialAverage(0.9)
        both = Beside(mode, dtype, rule=rule, format=fmt, backend=backend)
        require_own_parts(both.averaged, both.expected.state_dict())
        seen = Seen()
        for step in range(3):
            drift(both.reference, step)
            both.fill()
            both.expected.update_parameters(both.reference)
            with seen:
                both.averaged.update_parameters(both.sharded)
        require_own_parts(both.averaged, both.expected.state_dict())
        if not index:
            # That all parts together are the whole is the same for all formats, and each of its collectives takes
            # its time here.
            both.require_equal()
            # The oracle itself: what the ranks hold is the reference model.
            require_same(both.params(), tensors_of(both.reference), "params")
        buffers = [both.expected.module.get_buffer(name) for name in persistent_buffers(both.reference)]
        told.append(
            {
                "seen": seen.spread_out,
                "read": [op for op in seen.ops if op not in seen.spread_out],
                "nbytes": both.averaged.nbytes - sum(buffer.nbytes for buffer in buffers),
                "own": own_numel(both.sharded, mode),
                "cut": cut_numel(both.sharded, mode),
                "total": sum(param.numel() for param in both.reference.parameters()),
            }
        )
    return told


def persistent_buffers(root: nn.Module) -> list[str]:
    return [name for name, _ in root.named_buffers() if name in root.state_dict()]


def own_numel(sharded: nn.Module, mode: str) -> int | None:
    """Count the elements of this rank's shards by torch's own account; None where torch hides its padding."""
    if mode == "fsdp1_orig":
        return sum(param.numel() for param in sharded.parameters())
    if mode in ("fsdp1", "fsdp1_hybrid"):
        return None
    own = [param.to_local().numel() for param in sharded.parameters() if isinstance(param, DTensor)]
    # A single number is not cut: every rank has it.
    return sum(own) + sum(1 for param in sharded.parameters() if param.dim() == 0)


def cut_numel(sharded: nn.Module, mode: str) -> int:
    """Return the elements that each rank holds whole."""
    if mode in ("fsdp1", "fsdp1_orig", "fsdp1_hybrid"):
        return 0
    if mode == "fsdp1_no_shard":
        with FullyShardedDataParallel.summon_full_params(sharded):
            return sum(param.numel() for param in sharded.parameters())
    plain = [param for param in sharded.parameters() if not isinstance(param, DTensor)]
    return sum(param.numel() for param in plain if param.dim())


def check_nbytes(told: list[dict[str, Any]], mode: str, per_element: int) -> None:
    """Check that each rank keeps its shards, an even cut of what all hold whole, and nothing else."""
    world = len(told)
    numels = [rank["nbytes"] // per_element for rank in told]
    assert [numel * per_element for numel in numels] == [rank["nbytes"] for rank in told]
    if told[0]["own"] is None:
        replicas = 2 if mode == "fsdp1_hybrid" else 1
        assert sum(numels) == told[0]["total"] * replicas
        # A flat param is padded to even shards, so none has more than its even part of each of the four.
        assert max(numels) <= told[0]["total"] * replicas / world + 4
        return
    cuts = [numel - rank["own"] for numel, rank in zip(numels, told, strict=True)]
    whole = told[0]["cut"]
    assert sum(cuts) == whole
    assert max(cuts) <= -(-whole // world) + BORDER_NUMEL


def check_mode(mode: str, world: int, formats: Sequence[tuple[torch.dtype, str | None, int]] = FORMATS) -> None:
    require(mode, forward=False)
    cases = [(dtype, fmt, None) for dtype, fmt, _ in formats]
    ranks = run_ranks(world, averaged_beside, mode, cases)
    for index, (dtype, fmt, per_element) in enumerate(formats):
        told = [rank[index] for rank in ranks]
        assert [rank["seen"] for rank in told] == [[]] * world, (dtype, fmt)
        check_nbytes(told, mode, per_element)


@pytest.mark.parametrize(("mode", "world"), MODES_AND_WORLDS)
def test_every_rank_count_gives_the_bits_of_one(mode: str, world: int) -> None:
    all_of_them = mode in ALL_FORMATS and world == ONE_WORLD[mode]
    check_mode(mode, world, formats=FORMATS if all_of_them else [FORMATS[0], FORMATS[world]])


@pytest.mark.parametrize(("mode", "world"), [("plain", 2), ("fsdp2", 2), ("fsdp1", 3), ("tp", 2)])
def test_the_reference_backend_gives_the_same_bits(mode: str, world: int) -> None:
    cases = [(dtype, fmt, "reference") for dtype, fmt, _ in FORMATS[:-1]]
    assert all(case["seen"] == [] for told in run_ranks(world, averaged_beside, mode, cases) for case in told)


# After forward passes and in training


def trained_and_averaged(mode: str) -> None:
    """Train, evaluate and average, with an unsharded average of the gathered params by hand beside."""
    sharded, shadow = wrap(make_model(mode), mode), make_model(mode)
    rule = ExponentialAverage(0.75)
    averaged, by_hand = ShardedAveragedModel(sharded, rule=rule), FusedAveragedModel(shadow, rule=rule)
    optimizer = torch.optim.SGD([param for param in sharded.parameters() if param.requires_grad], lr=0.01)
    expected_grads: dict[str, Tensor] = {}
    before = gather(sharded, mode)
    for step in range(3):
        # Ranks that take no gradients of each other have the same data.
        own_data = mode not in ("plain", *TP_MODES)
        source = torch.Generator().manual_seed(step + (10 * dist.get_rank() if own_data else 0))
        data = torch.randn(6, WIDTH, generator=source)
        if step == 1:
            expected_grads = gradients(sharded, data)

        def update(before: dict[str, Tensor] = before) -> None:
            averaged.update_parameters(sharded)
            follow(by_hand, shadow, before, sharded)

        # An update then takes back what FSDP has gathered for the backward pass.
        grads = gradients(sharded, data, update if step == 1 else None)
        if step == 1 and mode != "ddp":  # which adds up in the order in which its buckets come to be full
            require_same(grads, expected_grads, "gradients")
        if step == 0:
            update()
        optimizer.step()
        if step > 0:
            with torch.no_grad():
                sharded.eval()(data)
        with Seen() as seen:
            averaged.update_parameters(sharded)
        assert seen.collectives == [], seen.collectives
        after = gather(sharded, mode)
        follow(by_hand, shadow, after, sharded)
        # All but the frozen params, the mask and the scratch buffer have moved.
        assert {name for name in after if name.partition(".")[0] not in ("frozen", "mask", "scratch")} <= {
            *differing(after, before)
        }
        assert all(value.isfinite().all() for value in after.values())
        before = after
    full, expected = averaged.full_state_dict(), by_hand.state_dict()
    if dist.get_rank() != 0:  # each rank has buffers of its own, and a state has the first rank's
        for name, _ in shadow.named_buffers():
            for state in (full, expected):
                state.pop(f"module.{name}", None)
    require_same(full, expected, "averages")


def gradients(sharded: nn.Module, data: Tensor, between: Callable[[], None] | None = None) -> dict[str, Tensor]:
    """Run a forward and a backward pass, ``between`` after the first, and return copies of this rank's gradients."""
    sharded.zero_grad()
    loss = sharded.train()(data).square().mean()
    if between is not None:
        between()
    loss.backward()
    grads = {name: param.grad for name, param in sharded.named_parameters() if param.grad is not None}
    return {name: local_of(grad).clone() for name, grad in grads.items()}


@torch.no_grad()
def follow(by_hand: FusedAveragedModel, shadow: nn.Module, values: dict[str, Tensor], sharded: nn.Module) -> None:
    """Update the unsharded average from gathered params, and from the buffers as they are."""
    buffers = {plain_name(name): buffer for name, buffer in sharded.named_buffers()}
    for name, tensor in [*shadow.named_parameters(), *shadow.named_buffers()]:
        tensor.copy_(buffers.get(name, values[name]))
    by_hand.update_parameters(shadow)


@pytest.mark.parametrize("mode", [mode for mode in WORLDS if mode not in ("fsdp2_tp", "fsdp1_no_shard")])
def test_training_is_averaged_as_it_goes(mode: str) -> None:
    require(mode, forward=True)
    run_ranks(ONE_WORLD[mode], trained_and_averaged, mode)


# NaNs and infinities


def averaged_past_nans(mode: str, nonfinite: str, names: list[str]) -> dict[str, Any]:
    """Update with a NaN in one param after the other, in its last element, which one shard or cut holds."""
    both = Beside(mode, nonfinite=nonfinite)
    both.expected.nonfinite = "skip"
    told: dict[str, Any] = {"seen": [], "counts": [], "errors": []}
    for step, name in enumerate([None, *names, None]):
        drift(both.reference, step)
        if name is not None:
            param = both.reference.get_parameter(name).data.view(-1)
            healthy, param[-1] = float(param[-1]), float("nan" if step % 2 else "inf")
        both.fill()
        both.expected.update_parameters(both.reference)
        try:
            with Seen() as seen:
                both.averaged.update_parameters(both.sharded)
            told["errors"].append(None)
        except ValueError as error:
            told["errors"].append(str(error))
        told["seen"].append(seen.collectives)
        told["counts"].append(int(both.averaged.n_averaged))
        both.require_equal(f"step {step}")
        if name is not None:
            param[-1] = healthy
    return told


#: Their last elements lie on the first rank or the last; that of ``short`` on the first where dimension 0 is sharded.
NAN_NAMES = ["blocks.0.outer.bias", "short", "long"]


@pytest.mark.parametrize("mode", ["plain", "fsdp2", "fsdp1", "tp", "fsdp2_tp"])
def test_a_nan_on_one_rank_is_skipped_on_all(mode: str) -> None:
    require(mode, forward=False)
    world = 4 if mode == "fsdp2_tp" else 2
    for told in run_ranks(world, averaged_past_nans, mode, "skip", NAN_NAMES):
        assert told["counts"] == [1, 1, 1, 1, 2]
        assert told["errors"] == [None] * 5
        assert told["seen"] == [[("c10d::allreduce_", 2)]] * 5


@pytest.mark.parametrize("mode", ["plain", "fsdp2", "fsdp1"])
def test_a_nan_on_one_rank_is_named_on_all(mode: str) -> None:
    for told in run_ranks(2, averaged_past_nans, mode, "raise", NAN_NAMES):
        assert told["counts"] == [1, 1, 1, 1, 2]
        first, *errors, last = told["errors"]
        assert (first, last) == (None, None)
        for name, error in zip(NAN_NAMES, errors, strict=True):
            assert error.startswith(f"{name!r} must be finite, got a NaN or an infinity on rank ")


@on_ranks(3)
def test_a_rank_without_elements_keeps_step() -> None:
    """Average one element on several ranks: all but one have nothing to do."""
    network = nn.ParameterList([torch.tensor([1.0])])
    sharded = fully_shard(network, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    averaged = ShardedAveragedModel(sharded, nonfinite="skip")
    for value, count in ((2.0, 1), (float("nan"), 1), (4.0, 2)):
        with torch.no_grad():
            sharded[0].to_local().fill_(value)
        averaged.update_parameters(sharded)
        assert averaged.n_averaged == count
    with averaged.swapped_into(sharded):
        assert sharded[0].full_tensor().item() == 3.0
    assert averaged.full_state_dict()["module.0"].item() == 3.0
    assert averaged.nbytes == (4 if dist.get_rank() == 0 else 0)


# The cuda backend, its source run on the processor


def averaged_by_cuda(shim: str, mode: str) -> dict[str, Any]:
    os.environ["SWAFAST_LIBRARY"] = shim
    cuda.device_types = frozenset({"cpu"})
    library.load.cache_clear()
    told: dict[str, Any] = averaged_beside(mode, [(torch.bfloat16, None, "cuda"), (torch.float32, None, "cuda")])[0]
    reference, sharded = make_model(mode), wrap(make_model(mode), mode)
    averaged = ShardedAveragedModel(sharded, nonfinite="skip", backend="cuda")
    told["backends"] = averaged._bindings.latest.plan.backends  # type: ignore[union-attr]
    told["skips"], told["counts"] = [], []
    for step in range(3):
        drift(reference, step)
        if step == 1:
            reference.short.data.view(-1)[-1] = float("nan")
        fill(sharded, mode, reference)
        reference.short.data.fill_(1.0)
        with Seen() as seen:
            averaged.update_parameters(sharded)
        told["skips"].append(seen.ops)
        told["counts"].append(int(averaged.n_averaged))
    with averaged.swapped_into(sharded):
        inside = gather(sharded, mode)
    full, names = averaged.full_state_dict(), [name for name, _ in reference.named_parameters()]
    require_same({name: inside[name] for name in names}, {name: full[f"module.{name}"] for name in names}, "inside")
    return told


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_the_cuda_backend_shares_its_flag_on_the_device(mode: str, shim_library: Path) -> None:
    for told in run_ranks(2, averaged_by_cuda, str(shim_library), mode):
        assert told["backends"] == ["cuda"]
        assert told["seen"] == told["read"] == []
        # One all-reduce of one element, and nothing read on the host.
        assert told["skips"] == [[("c10d::allreduce_", 2)]] * 3
        assert told["counts"] == [1, 1, 2]


# Each gate kills a bug


def forget_the_last_run() -> None:
    runs = flat_order.FlatOrder.runs
    flat_order.FlatOrder.runs = lambda self, start, stop: runs(self, start, stop)[:-1]  # type: ignore[method-assign]


def start_where_the_flat_param_does() -> None:
    find = shard_matching.Locator.local

    def local(self: Any, bases: Any, index: int) -> Tensor:
        base, run = self._locations[index]
        return bases[base].narrow(0, 0, run[1]) if run is not None else find(self, bases, index)

    shard_matching.Locator.local = local  # type: ignore[method-assign]


def ask_the_others() -> None:
    update = Plan.update

    def asking(self: Plan, *args: Any, **options: Any) -> None:
        dist.all_reduce(torch.zeros(1))
        update(self, *args, **options)

    Plan.update = asking  # type: ignore[method-assign]


def average_all_everywhere() -> None:
    share_out = sharded_model.share_out

    def uncut(holdings: Any, *args: Any, **options: Any) -> list[shares.Share]:
        return share_out([replace(holding, always_cut=False) for holding in holdings], *args, **options)

    sharded_model.share_out = uncut


def cut_unevenly() -> None:
    bounds = flat_order.FlatOrder.bounds

    def moved(self: flat_order.FlatOrder, part: int) -> tuple[int, int]:
        start, stop = bounds(self, part)
        return start and start + 128, stop if stop == self.numel else stop + 128

    flat_order.FlatOrder.bounds = moved  # type: ignore[method-assign]


def keep_copies() -> None:
    make = shard_matching.ShardBinding.__init__

    def with_copies(self: Any, model: Any, sides: Any, held: Any, *args: Any) -> None:
        make(self, model, sides, held, *args)
        self.copies = [found.local.detach().clone() for found in held.values()]

    shard_matching.ShardBinding.__init__ = with_copies  # type: ignore[method-assign]


def never_reshard() -> None:
    sharded_model.reshard = shard_matching.reshard = lambda model: None


def keep_the_flag() -> None:
    update = Launches.update
    Launches.update = lambda *args, reduce_flag=None, **options: update(*args, **options)  # type: ignore[method-assign]


#: The bug, the check that must fail, and how.
GATES: list[tuple[Callable[[], None], Callable[[], None], str]] = [
    (forget_the_last_run, partial(check_mode, "plain", 2, FORMATS[:2]), "own parts: |averages: "),
    (start_where_the_flat_param_does, partial(check_mode, "fsdp1", 2, FORMATS[:1]), "own parts: "),
    (ask_the_others, partial(check_mode, "fsdp2", 2, FORMATS[:1]), "c10d::allreduce"),
    (average_all_everywhere, partial(check_mode, "ddp", 2, FORMATS[:1]), "4680 == 2340"),
    (cut_unevenly, partial(check_mode, "ddp", 2, FORMATS[:1]), "1291 <= "),
    (
        keep_copies,
        partial(test_costs.test_no_phase_on_a_rank_takes_more_memory, "fsdp2"),
        r"'construction', 1.0, 0.5",
    ),
    (never_reshard, partial(test_training_is_averaged_as_it_goes, "fsdp2"), "got one whole tensor on each rank"),
    (
        keep_the_flag,
        partial(test_a_nan_on_one_rank_is_skipped_on_all, "fsdp2"),
        "needs the same n_averaged",
    ),
]


@pytest.mark.parametrize(("plant", "gate", "message"), GATES, ids=[plant.__name__ for plant, *_ in GATES])
def test_the_gate_kills_the_bug(plant: Callable[[], None], gate: Callable[[], None], message: str) -> None:
    with planted(plant), pytest.raises(AssertionError, match=message):  # of the checks, or of a rank
        gate()
