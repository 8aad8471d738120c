"""A rank's part of a tensor: torch.distributed.checkpoint saves it, loads it under any other cut, and stages copies."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import math
import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import staging, state_dict_saver
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from swafast.sharded.parts.part_tensor import PartTensor
from swafast.terms.boxes import Box, boxes_of_run
from tests.ranks import run_ranks
from tests.support import any_bits, same_bits

DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int16, torch.int32, torch.int64, torch.uint8),
)
WORLD = 5
#: What a target holds before a load: no value of any case, in no dtype.
UNWRITTEN = 0x5A

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


# Cases


def part_of(whole: Tensor, start: int, stop: int, order: Sequence[int] | None = None) -> PartTensor:
    """Return elements ``start`` to ``stop`` of ``whole`` in the memory order ``order``."""
    dims = tuple(range(whole.dim())) if order is None else tuple(order)
    run = whole.permute(dims).reshape(-1)[start:stop].clone()
    return PartTensor(run, whole.shape, boxes_of_run(whole.shape, start, stop, order=dims))


def unwritten(part: PartTensor) -> PartTensor:
    empty = torch.empty_like(part)
    empty.run.view(torch.uint8).fill_(UNWRITTEN)
    return empty


@dataclasses.dataclass(frozen=True)
class Case:
    """A tensor, how it is cut when it is saved and when it is loaded, and which rank has which part."""

    whole: Tensor
    orders: tuple[tuple[int, ...], tuple[int, ...]]
    cuts: tuple[list[int], list[int]]
    ranks: tuple[list[int], list[int]]

    def part(self, which: int, rank: int) -> PartTensor:
        bounds = [(0, 0)] * WORLD
        for place, pair in zip(self.ranks[which], itertools.pairwise(self.cuts[which]), strict=False):
            bounds[place] = pair
        return part_of(self.whole, *bounds[rank], self.orders[which])


def make_case(seed: int) -> Case:
    chance = random.Random(seed)
    shape = [chance.randint(1, 7) for _ in range(seed % 5)]
    if shape and seed % 11 == 0:
        shape[chance.randrange(len(shape))] = 0

    def cut() -> list[int]:
        numel = math.prod(shape)
        return [0, *sorted(chance.randint(0, numel) for _ in range(chance.randint(0, WORLD - 1))), numel]

    def order() -> tuple[int, ...]:
        return tuple(chance.sample(range(len(shape)), len(shape)))

    def ranks() -> list[int]:
        return chance.sample(range(WORLD), WORLD)

    whole = any_bits(shape, DTYPES[seed % len(DTYPES)], seed)
    return Case(whole, (order(), order()), (cut(), cut()), (ranks(), ranks()))


CASES = range(60)


# What it is


@pytest.mark.parametrize("seed", CASES)
def test_parts_are_views_of_the_whole(seed: int) -> None:
    case = make_case(seed)
    met = torch.zeros(case.whole.shape, dtype=torch.int64)
    for rank in range(WORLD):
        part = case.part(0, rank)
        assert part.shape == case.whole.shape
        assert part.dtype == case.whole.dtype
        for box, view in part.parts():
            assert same_bits(view, box.of_whole(case.whole))
            assert view.untyped_storage().data_ptr() == part.run.untyped_storage().data_ptr()
            box.of_whole(met).add_(1)
    assert met.eq(1).all(), "parts of a cut overlap, or leave a gap"


def test_it_has_the_attributes_of_the_whole() -> None:
    part = part_of(torch.arange(24.0).view(2, 3, 4), 5, 18)
    assert "shape=(2, 3, 4)" in repr([part])
    assert (part.numel(), part.dim(), part.device) == (24, 3, torch.device("cpu"))
    assert part.data_ptr() == 0, "torch's stager takes tensors without data of their own apart by their attributes"
    assert set(vars(part)) == {"run", "boxes"}


COPIES: dict[str, Callable[[PartTensor], PartTensor]] = {
    "clone": lambda part: part.clone(),
    "clone in a format": lambda part: part.clone(memory_format=torch.channels_last),
    "deepcopy": copy.deepcopy,
    "deepcopy in a dict": lambda part: copy.deepcopy({"part": part})["part"],
    "to a copy": lambda part: part.to(part.dtype, copy=True),
    "copy_": lambda part: unwritten(part).copy_(part),
    "copy_ from another dtype": lambda part: unwritten(part).copy_(part.double()),
    "by process": lambda part: _through_a_pipe(part),
}


def _through_a_pipe(part: PartTensor) -> PartTensor:
    ours, theirs = torch.multiprocessing.get_context("spawn").Pipe()
    ours.send(part)
    return theirs.recv()


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(("start", "stop"), [(5, 18), (0, 60), (7, 7)])
def test_copies_have_values_and_memory_of_their_own(how: str, start: int, stop: int) -> None:
    part = part_of(torch.randn(3, 4, 5), start, stop, (2, 0, 1))
    expected = part.run.clone()
    made = COPIES[how](part)
    part.run.fill_(-1.0)
    assert type(made) is PartTensor
    assert (made.shape, made.boxes, made.dtype) == (part.shape, part.boxes, part.dtype)
    assert same_bits(made.run, expected)
    made.run.fill_(2.0)
    assert part.run.eq(-1.0).all(), "the copy writes into the part"


def test_a_part_in_a_slice_of_a_storage_stays_there_when_sent() -> None:
    bucket = torch.arange(10.0)
    run = torch.empty(0).set_(bucket.untyped_storage()[8:24], 0, (4,), (1,))
    part = PartTensor(run, (4,), boxes_of_run((4,), 0, 4))
    sent = _through_a_pipe(part)
    bucket[3] = 99.0
    assert part.run.tolist() == [2.0, 99.0, 4.0, 5.0]
    assert sent.run.tolist() == [2.0, 3.0, 4.0, 5.0]


def test_tied_parts_stay_tied_in_a_deep_copy() -> None:
    part = part_of(torch.randn(6), 1, 4)
    made = copy.deepcopy([part, part, part.detach()])
    assert made[0] is made[1]
    made[0].run.fill_(3.0)
    assert made[2].run.eq(3.0).all()


def test_detach_and_moves_without_a_change_keep_the_memory() -> None:
    part = part_of(torch.randn(6), 1, 4)
    assert part.detach().run.data_ptr() == part.run.data_ptr()
    assert part.data.run.data_ptr() == part.run.data_ptr()
    for same in (part.cpu(), part.to("cpu"), part.float(), part.contiguous()):
        assert same is part


def test_empties_of_the_same_boxes_and_of_other_dtypes_and_devices() -> None:
    part = part_of(torch.randn(3, 4), 2, 9)
    made = {
        "like": torch.empty_like(part),
        "meta": torch.empty_like(part, device="meta"),
        "new": part.new_empty(part.shape, dtype=torch.int16),
        "half": part.half(),
        "to": part.to(torch.bfloat16),
        "zeros": torch.zeros_like(part),
    }
    for like in made.values():
        assert (like.shape, like.boxes, like.run.shape) == (part.shape, part.boxes, part.run.shape)
        assert (like.dtype, like.device) == (like.run.dtype, like.run.device)
    assert made["meta"].device.type == "meta"
    assert made["new"].dtype == torch.int16
    assert same_bits(made["half"].run, part.run.half())
    assert same_bits(made["to"].run, part.run.bfloat16())
    assert made["zeros"].run.eq(0).all()


# What it is not


REFUSED: dict[str, Callable[[PartTensor], object]] = {
    "add": lambda part: part + 1,
    "radd": lambda part: torch.ones(6) + part,
    "sum": lambda part: part.sum(),
    "index": lambda part: part[0],
    "iterate": lambda part: list(part),
    "eq": lambda part: part == part,
    "equal": lambda part: torch.equal(part, part),
    "view": lambda part: part.view(-1),
    "fill_": lambda part: part.fill_(0.0),
    "foreach": lambda part: torch._foreach_copy_([part], [part]),
    "new_empty of another shape": lambda part: part.new_empty((3,)),
    "copy_ of other boxes": lambda part: part.copy_(part_of(torch.randn(6), 0, 3)),
    "copy_ of another shape": lambda part: part.copy_(part_of(torch.randn(2, 3), 1, 4)),
    "copy_ of the whole": lambda part: part.copy_(torch.randn(6)),
    "copy_ of a part into the whole": lambda part: torch.randn(6).copy_(part),
    "numpy": lambda part: part.numpy(),
    "tolist": lambda part: part.tolist(),
    "dlpack": lambda part: part.__dlpack__(),
    "storage": lambda part: part.untyped_storage(),
    "share_memory_": lambda part: part.share_memory_(),
    "torch.save": lambda part: torch.save({"part": part}, io.BytesIO()),
    "copy.copy": copy.copy,
}


@pytest.mark.parametrize("how", REFUSED)
def test_other_operations_say_where_the_data_is(how: str) -> None:
    part = part_of(torch.arange(6.0), 1, 4)
    with pytest.raises(NotImplementedError, match=r"`run`.*`parts\(\)`.*full_state_dict\(\)"):
        REFUSED[how](part)
    assert part.run.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("run", "shape", "numel", "error", "message"),
    [
        (nn.Parameter(torch.ones(2)), (2,), 2, TypeError, "run must be a plain"),
        (torch.ones(2, 1), (2,), 2, ValueError, "run must be 1-D and contiguous"),
        (torch.ones(4)[::2], (2,), 2, ValueError, "run must be 1-D and contiguous"),
        (torch.ones(4)[:2], (2,), 2, ValueError, "got 8 of 16 bytes"),
        (torch.ones(2), (2, 1), 2, ValueError, "boxes must have at least"),
        (torch.ones(2), (1,), 2, ValueError, "boxes must have at least"),
        (torch.ones(3), (3,), 2, ValueError, "run's 3 elements, got 2"),
        (torch.ones(3), (3,), 0, ValueError, "run's 3 elements, got 0"),
        (torch.ones(1), (2,), 2, ValueError, "within the run's 1"),
        (torch.ones(0), (3,), None, ValueError, "at least one element"),
    ],
)
def test_bad_parts_are_refused(
    run: Tensor, shape: tuple[int, ...], numel: int | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PartTensor(run, shape, [Box((0,), (0,), 0, (0,))] if numel is None else _boxes(numel))


def _boxes(numel: int) -> tuple[Box, ...]:
    return boxes_of_run((numel,), 0, numel)


def test_an_unknown_box_is_named() -> None:
    part = part_of(torch.arange(12.0).view(3, 4), 2, 9)
    assert part.__get_tensor_shard__(MetadataIndex("a", (1, 0), 17)).tolist() == [[4.0, 5.0, 6.0, 7.0]]
    with pytest.raises(ValueError, match=r"offset of 'a' must be .* \[\(0, 2\), \(1, 0\), \(2, 0\)\], got \(0, 0\)"):
        part.__get_tensor_shard__(MetadataIndex("a", (0, 0)))
    with pytest.raises(ValueError, match="got None"):
        part.__get_tensor_shard__(MetadataIndex("a"))


# Saved and loaded, one process


def wholes() -> dict[str, Tensor]:
    shapes = ((3, 4, 5), (17,), (), (0, 4), (2, 1, 3, 2))
    return {
        f"{dtype}".removeprefix("torch.") + f".{index}": any_bits(shape, dtype, index)
        for dtype in DTYPES
        for index, shape in enumerate(shapes)
    }


def as_parts(tensors: dict[str, Tensor]) -> dict[str, PartTensor]:
    return {name: part_of(whole, 0, whole.numel()) for name, whole in tensors.items()}


@pytest.mark.distributed
def test_a_meta_part_is_loaded(tmp_path: Path) -> None:
    whole = any_bits((3, 4), torch.float32, 1)
    dcp.save({"a": part_of(whole, 0, 12)}, checkpoint_id=tmp_path)
    # On a rank: torch asks the group what stands in for the meta device.
    run_ranks(1, _load_meta, tmp_path, whole)


def _load_meta(folder: Path, whole: Tensor) -> None:
    state = {"a": torch.empty_like(part_of(whole, 2, 9), device="meta")}
    dcp.load(state, checkpoint_id=folder)
    assert same_bits(state["a"].run, whole.view(-1)[2:9])


def test_plain_tensors_and_parts_load_each_other(tmp_path: Path) -> None:
    tensors = wholes()
    dcp.save(as_parts(tensors), checkpoint_id=tmp_path / "parts")
    plain = {name: torch.full_like(whole, 1) for name, whole in tensors.items()}
    dcp.load(plain, checkpoint_id=tmp_path / "parts")
    dcp.save(dict(tensors), checkpoint_id=tmp_path / "plain")
    parts = {name: unwritten(part_of(whole, whole.numel() // 3, whole.numel())) for name, whole in tensors.items()}
    dcp.load(parts, checkpoint_id=tmp_path / "plain")
    dcp_to_torch_save(tmp_path / "parts", tmp_path / "whole.pt")
    exported = torch.load(tmp_path / "whole.pt")
    for name, whole in tensors.items():
        assert same_bits(plain[name], whole), name
        assert same_bits(exported[name], whole), name
        assert same_bits(parts[name].run, whole.reshape(-1)[whole.numel() // 3 :]), name


def test_another_shape_is_not_loaded(tmp_path: Path) -> None:
    dcp.save({"a": part_of(torch.ones(3, 4), 0, 12)}, checkpoint_id=tmp_path)
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        dcp.load({"a": part_of(torch.ones(4, 3), 0, 12)}, checkpoint_id=tmp_path)


def test_goes_through_get_model_state_dict() -> None:
    model = nn.Linear(3, 4)
    part = part_of(model.weight.detach(), 2, 9)
    model.register_state_dict_post_hook(lambda module, state, prefix, meta: state.update({f"{prefix}weight": part}))
    for options in (StateDictOptions(), StateDictOptions(cpu_offload=True)):
        given = get_model_state_dict(model, options=options)["weight"]
        assert isinstance(given, PartTensor)
        assert same_bits(given.run, part.run)


# Saved and loaded by ranks


def _save_and_load(folder: Path) -> None:
    rank = dist.get_rank()
    cases = {f"{seed}": make_case(seed) for seed in CASES}
    state: dict[str, Any] = {name: case.part(0, rank) for name, case in cases.items()}
    mesh = init_device_mesh("cpu", (WORLD,))
    sheet = any_bits((7, 6), torch.int32, 99)
    state |= {"plain": sheet, "dtensor": distribute_tensor(sheet, mesh, [Shard(0)]), "part": part_of(sheet, *_even(42))}
    metadata = dcp.save({"averaged": state}, checkpoint_id=folder)
    for name, case in cases.items():
        held = metadata.state_dict_metadata[f"averaged.{name}"]
        assert isinstance(held, TensorStorageMetadata)
        assert held.size == case.whole.shape
        assert sum(math.prod(chunk.sizes) for chunk in held.chunks) == case.whole.numel()

    targets: dict[str, Any] = {name: unwritten(case.part(1, rank)) for name, case in cases.items()}
    # Each kind from each other one.
    targets |= {
        "plain": unwritten(part_of(sheet, *_even(42))),
        "dtensor": unwritten(part_of(sheet, *_even(42), (1, 0))),
        "part": distribute_tensor(torch.zeros_like(sheet), mesh, [Shard(1)]),
    }
    dcp.load({"averaged": targets}, checkpoint_id=folder)
    for name, case in cases.items():
        assert same_bits(targets[name].run, case.part(1, rank).run), (name, case)
    assert same_bits(targets["plain"].run, part_of(sheet, *_even(42)).run)
    assert same_bits(targets["dtensor"].run, part_of(sheet, *_even(42), (1, 0)).run)
    assert torch.equal(targets["part"].full_tensor(), sheet)


def _even(numel: int) -> tuple[int, int]:
    rank = dist.get_rank()
    return numel * rank // WORLD, numel * (rank + 1) // WORLD


@pytest.mark.distributed
def test_ranks_load_under_other_cuts_what_ranks_saved(tmp_path: Path) -> None:
    run_ranks(WORLD, _save_and_load, tmp_path)
    # And one process what five saved, under a third cut and whole.
    cases = {f"{seed}": make_case(seed) for seed in CASES}
    for start, stop in ((0, 1), (1, 4), (0, 4)):
        parts = {
            name: unwritten(part_of(case.whole, case.whole.numel() * start // 4, case.whole.numel() * stop // 4))
            for name, case in cases.items()
        }
        dcp.load({"averaged": parts}, checkpoint_id=tmp_path)
        for name, case in cases.items():
            numel = case.whole.numel()
            assert same_bits(parts[name].run, case.whole.reshape(-1)[numel * start // 4 : numel * stop // 4]), name


# Staged


# torch 2.6 stages tensors on the CPU without a copy, whatever their class; 2.7 every one as a plain tensor.
stages_parts = pytest.mark.skipif(torch.__version__ < (2, 8), reason="needs torch 2.8's stager")


def _default_stager(*, share: bool = False, thread: bool = False) -> Any:
    if not hasattr(staging, "DefaultStager"):
        pytest.skip("needs a torch with DefaultStager")
    return staging.DefaultStager(
        staging.StagingOptions(
            use_pinned_memory=False, use_shared_memory=share, use_async_staging=thread, use_non_blocking_copy=False
        )
    )


def _kept_stager(**options: bool) -> Any:
    stager = _default_stager(**options)
    stager.stage({})
    try:
        stager.stage({})
    except KeyError:
        pytest.skip("needs a torch whose stager serves twice, unlike 2.11's")
    return stager


def bucket_parts() -> tuple[Tensor, dict[str, PartTensor]]:
    """Make parts side by side in one bucket, on slices of its storage; one part has no boxes."""
    bucket = torch.randn(600)
    shapes = {"a": (4, 5, 6), "b": (7, 9), "nothing": (3, 3), "c": (240,)}
    parts, at = {}, 0
    for name, shape in shapes.items():
        start, stop = (0, 0) if name == "nothing" else (3, math.prod(shape))
        nbytes = (stop - start) * 4
        run = torch.empty(0).set_(bucket.untyped_storage()[at * 4 : at * 4 + nbytes], 0, (stop - start,), (1,))
        parts[name] = PartTensor(run, shape, boxes_of_run(shape, start, stop))
        at += stop - start
    return bucket, parts


STAGINGS: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "deepcopy": lambda: copy.deepcopy,
    "blocking": lambda: staging.BlockingAsyncStager().stage,
    "blocking, kept": lambda: staging.BlockingAsyncStager(cache_staged_state_dict=True).stage,
    "default": lambda: _default_stager().stage,
    "shared memory": lambda: _default_stager(share=True).stage,
    "its own thread": lambda: lambda state: _default_stager(thread=True).stage(state).result(60),
}


def check_staged(stage: Callable[[Any], Any]) -> None:
    """Check that staged parts share memory neither with their source nor with each other."""
    bucket, parts = bucket_parts()
    staged = stage({"averaged": parts})["averaged"]
    expected = {name: part.run.clone() for name, part in parts.items()}
    spans = []
    for name, part in staged.items():
        assert type(part) is PartTensor
        assert (part.shape, part.boxes) == (parts[name].shape, parts[name].boxes)
        assert part.run.untyped_storage().nbytes() == part.run.nbytes, "a stage took the whole bucket along"
        spans.append((part.run.data_ptr(), part.run.data_ptr() + part.run.nbytes))
    spans = sorted(span for span in [*spans, (bucket.data_ptr(), bucket.data_ptr() + bucket.nbytes)] if span[0])
    assert len(spans) == 4
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), "staged memory overlaps"
    bucket.fill_(-1.0)
    for name, part in staged.items():
        assert same_bits(part.run, expected[name]), name


@stages_parts
@pytest.mark.parametrize("how", STAGINGS)
def test_an_async_save_has_what_was_there_at_the_call(how: str) -> None:
    check_staged(STAGINGS[how]())


def test_a_stage_without_copies_would_be_seen() -> None:
    with pytest.raises(AssertionError, match="staged memory overlaps"):
        check_staged(lambda state: state)


@pytest.mark.parametrize("share", [False, True])
def test_a_kept_stager_stages_each_state_anew(share: bool) -> None:
    stager = _kept_stager(share=share)
    for turn in range(20):
        # Parts of changing sizes that die each turn: their ids and addresses are handed out again.
        wanted = [torch.randn(5 + (turn * 7 + index * 3) % 11) for index in range(8)]
        parts = [PartTensor(run.clone(), run.shape, _boxes(run.numel())) for run in wanted]
        staged = stager.stage({"averaged": dict(enumerate(parts)), "again": parts})
        for index, run in enumerate(wanted):
            assert same_bits(staged["averaged"][index].run, run), (turn, index)
            assert staged["again"][index] is staged["averaged"][index]
        del parts, staged
    stager.close()


def test_a_kept_stager_follows_a_part_that_stays() -> None:
    stager = _kept_stager()
    bucket, parts = bucket_parts()
    for turn in range(3):
        bucket.fill_(float(turn))
        staged = stager.stage(parts)
        assert all(part.run.eq(turn).all() for part in staged.values())
    stager.close()


@stages_parts
def test_a_stager_that_makes_plain_tensors_says_so() -> None:
    assert type(torch.tensor(0.0).copy_(part_of(torch.tensor(3.0), 0, 1))) is Tensor
    scalar, none = part_of(torch.tensor(3.0), 0, 1), part_of(torch.tensor(3.0), 0, 0)
    # It has the whole of this one ...
    assert staging.BlockingAsyncStager().stage({"a": scalar})["a"].item() == 3.0
    # ... and nothing of that: what it made in its place would be saved as if it were the value.
    with pytest.raises(NotImplementedError, match=r"0 of 1 elements.* into a plain tensor.*DefaultStager"):
        staging.BlockingAsyncStager().stage({"a": none})


def _save_by_process(folder: Path) -> None:
    # torch's checkpoint process is a child of this one, which a daemon may not have.
    multiprocessing.current_process().daemon = False
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    rank = dist.get_rank()
    stagers: list[dict[str, Any]] = [{}, {"async_stager": _default_stager(share=True)}]
    for turn, options in enumerate(stagers):
        whole = any_bits((6, 7, 5), torch.bfloat16, turn)
        part = part_of(whole, 97 * rank, 97 if rank == 0 else 210)
        state = {
            "averaged": {
                "a": part,
                "one": part_of(torch.tensor(turn), 0, 1 - rank),
                "none": part_of(torch.zeros(0, 2), 0, 0),
            }
        }
        saving = dcp.async_save(
            state,
            checkpoint_id=folder / f"{turn}",
            async_checkpointer_type=state_dict_saver.AsyncCheckpointerType.PROCESS,
            **options,
        )
        part.run.fill_(-1.0)
        saving.result(100)
        loaded = {"a": unwritten(part_of(whole, 0, 30 + 180 * rank, (2, 1, 0))), "one": part_of(torch.tensor(9), 0, 1)}
        dcp.load({"averaged": loaded}, checkpoint_id=folder / f"{turn}")
        assert same_bits(loaded["a"].run, whole.permute(2, 1, 0).reshape(-1)[: 30 + 180 * rank]), turn
        assert loaded["one"].run.item() == turn


@pytest.mark.distributed
def test_async_save_by_a_process_writes_what_was_there_at_the_call(tmp_path: Path) -> None:
    if not hasattr(state_dict_saver, "AsyncCheckpointerType"):
        pytest.skip("needs a torch with a checkpoint process")
    run_ranks(2, _save_by_process, tmp_path)
