"""States of sharded averages: other ranks load them bit for bit, or refuse them and nothing has changed."""

from __future__ import annotations

import dataclasses
import io
import itertools
import random
import re
import resource
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from swafast import FusedAveragedModel, ShardedAveragedModel
from swafast.op.checksum import checksum
from swafast.sharded import LostPeerError, PartTensor, checkpoint
from swafast.sharded.parts.ranks import Ranks
from swafast.sharded.parts.shares import Share
from tests.ranks import RankFailedError, on_ranks, run_ranks
from tests.sharded_models import Beside, Net, can_run, drift, local_of, make_model, planes_of, wrap, wrong_parts
from tests.support import any_bits, differing, require_same

T = TypeVar("T")
State = dict[str, Tensor]
#: A folder of checkpoints by way, and what the checksums in each are by key.
Saved = tuple[Path, dict[str, dict[str, list[int]]]]

#: Updates before a save.
SAVED_AT = 3


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model is spread over ranks, and its average."""

    mode: str
    kind: str = "fsdp2"  # what the model has: one of these is the same in all modes that it serves
    share_replicas: bool = False


#: These share one kind of model, so that each loads what any other saved.
WAYS = {
    "cut": Way("ddp"),
    "fsdp2": Way("fsdp2"),
    "fsdp1": Way("fsdp1"),
    "fsdp1_orig": Way("fsdp1_orig"),
    "tp": Way("tp"),
    "hsdp": Way("hsdp"),
    "hsdp_shared": Way("hsdp", share_replicas=True),
    "fsdp1_hybrid": Way("fsdp1_hybrid"),
    "fsdp2_tp": Way("fsdp2_tp"),
    "part_tp": Way("fsdp2_part_tp"),
    "part_tp_shared": Way("fsdp2_part_tp", share_replicas=True),
    # Params that are channels_last, without dimensions or not dense.
    "fsdp1_conv": Way("fsdp1", "fsdp1"),
    "cut_conv": Way("ddp", "fsdp1"),
    "cut_plain": Way("plain", "plain"),
}
WAYS = {name: way for name, way in WAYS.items() if can_run(way.mode, forward=False)}
_FOUR_RANKS = ("hsdp", "hsdp_shared", "fsdp1_hybrid", "fsdp2_tp", "part_tp", "part_tp_shared")


def ways_on(world: int) -> list[str]:
    return [name for name in WAYS if world == 4 or name not in _FOUR_RANKS]


# A sharded average, and the unsharded one that it has to be equal to


def in_every_format(model: Net) -> Net:
    """Cast parts of ``model``, so that its averages are float32, exact, mirrored and OWN float64."""
    model.blocks[0].bfloat16()
    model.blocks[1].half()
    model.frozen.double()
    return model


class Twin(Beside):
    """A sharded average and an unsharded one of the same model, in every format unless ``dtype`` is given."""

    def __init__(self, way: str, *, dtype: torch.dtype | None = None, **options: Any) -> None:
        self.way = WAYS[way]
        models = self._make(dtype), wrap(self._make(dtype), self.way.mode)
        super().__init__(self.way.mode, models=models, share_replicas=self.way.share_replicas, **options)

    def _make(self, dtype: torch.dtype | None) -> Net:
        return in_every_format(make_model(self.way.kind)) if dtype is None else make_model(self.way.kind, dtype)

    def wanted(self) -> State:
        return {key: value.clone() for key, value in self.expected.state_dict().items()}

    def require(self, truth: Mapping[str, Tensor] | int, about: object = "") -> None:
        """Check this rank's part by bits, against whole tensors or those after so many updates. Collective."""
        wanted = truth_after(self.way.kind, truth) if isinstance(truth, int) else truth
        found = wrong_parts(self.averaged, wanted)
        assert found == [], f"{about or self.way}: {found}"


@cache
def truth_after(kind: str, updates: int) -> State:
    """Return the state of the unsharded average after ``updates`` updates."""
    reference = in_every_format(make_model(kind))
    truth = FusedAveragedModel(reference)
    for step in range(updates):
        drift(reference, step)
        truth.update_parameters(reference)
    return dict(truth.state_dict())


@torch.no_grad()
def put_back(averaged: ShardedAveragedModel, planes: State) -> None:
    for name, of_name in averaged._planes.items():
        for i, plane in enumerate(of_name):
            plane.copy_(planes[f"{name} {i}"])
    averaged.n_averaged.copy_(planes["n_averaged"])


def save(state: Any, folder: Path) -> None:
    # To have each file on the disk itself before going on would take most of the time.
    dcp.save({"averaged": state}, storage_writer=FileSystemWriter(folder, sync_files=False))


def load(averaged: ShardedAveragedModel, folder: Path, **options: bool) -> None:
    state = averaged.state_dict(**options)
    dcp.load({"averaged": state}, checkpoint_id=folder)
    averaged.load_state_dict(state)


# Saved by four ranks, loaded by others


def _save_all(folder: Path, ways: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Save each way's average, and return the checksums in its state."""
    sealed = {}
    for way in ways:
        averaged = Twin(way).train(*range(SAVED_AT)).averaged
        # Half of them as states, half as what has a state.
        save(averaged if len(sealed) % 2 else averaged.state_dict(), folder / way)
        sealed[way] = checksums_of(averaged.state_dict())
    return sealed


def checksums_of(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {key: value.tolist() for key, value in state.items() if key.startswith(checkpoint.CHECKSUM)}


def kinds() -> set[str]:
    return {way.kind for way in WAYS.values()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A folder of checkpoints of equal averages: of four ranks in every way, and unsharded ones by kind of model."""
    folder = tmp_path_factory.mktemp("saved")
    sealed = run_ranks(4, _save_all, folder, ways_on(4))
    assert all(theirs == sealed[0] for theirs in sealed)
    for kind in kinds():
        with pytest.warns(UserWarning, match="single process"):
            save(truth_after(kind, SAVED_AT), folder / f"fused_{kind}")
    return folder, sealed[0]


def _load_all(folder: Path, sources: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list[int]]]:
    """Load each way's average from each of its sources, train on from the last, and return the checksums."""
    sealed = {}
    for way, names in sources.items():
        kind = WAYS[way].kind
        twin = Twin(way).train(90, 91)
        elsewhere = planes_of(twin.averaged)
        for index, name in enumerate(names):
            put_back(twin.averaged, elsewhere)
            if index % 2:
                dcp.load({"averaged": twin.averaged}, checkpoint_id=folder / name)
            else:
                load(twin.averaged, folder / name)
            twin.require(SAVED_AT, f"{way} from {name}")
        assert differing(planes_of(twin.averaged), elsewhere), "there was nothing to load"
        sealed[way] = checksums_of(twin.averaged.state_dict())
        if dist.get_world_size() < 4 or way in _FOUR_RANKS:
            put_back(twin.averaged, elsewhere)
            load(twin.averaged, folder / f"fused_{kind}", checksums=False)
            twin.require(SAVED_AT, f"{way} from an unsharded average")
        _go_on(twin)
    return sealed


def _go_on(twin: Twin) -> None:
    """Train on, as without a break."""
    twin.reference.load_state_dict(in_every_format(make_model(twin.way.kind)).state_dict())
    for step in range(SAVED_AT):
        drift(twin.reference, step)
    twin.train(*range(SAVED_AT, SAVED_AT + 2)).require(SAVED_AT + 2)


def others_of(way: str) -> list[str]:
    """Return the other ways with the same kind of model, those after this one first."""
    alike = [name for name in WAYS if WAYS[name].kind == WAYS[way].kind]
    after = alike.index(way) + 1
    return [*alike[after:], *alike[: after - 1]]


def some_sources(world: int) -> dict[str, list[str]]:
    """Return the sources that each way loads on so many ranks: itself, and a few others or all."""
    sources = {}
    for way in ways_on(world):
        # On two ranks it takes the least time.
        if world == 2 and way in ("cut", "fsdp2"):
            sources[way] = [way, *others_of(way)]
        elif world < 3 or way in _FOUR_RANKS:
            sources[way] = [way, *others_of(way)[:1]]
        elif way != "cut_conv" and not (world == 3 and way in ("fsdp1_orig", "fsdp1_conv")):
            sources[way] = [way]
    return sources


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_what_four_ranks_saved_any_number_of_ranks_loads_and_trains_on(saved: Saved, world: int) -> None:
    folder, sealed = saved
    sources = some_sources(world)
    for loaded in run_ranks(world, _load_all, folder, sources):
        assert loaded == {way: sealed[way] for way in sources}, "checksums depend on the cut"


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_way_loads_what_every_other_saved(saved: Saved, world: int) -> None:
    sources = {way: [way, *others_of(way)] for way in ways_on(world)}
    run_ranks(world, _load_all, saved[0], sources)


@pytest.mark.distributed
def test_checksums_do_not_depend_on_the_cut(saved: Saved) -> None:
    _, sealed = saved
    for kind in kinds():
        alike = [sealed[way] for way in WAYS if WAYS[way].kind == kind]
        assert all(sums == alike[0] for sums in alike), kind
        assert alike[0].keys() == {checkpoint.CHECKSUM + key for key in truth_after(kind, SAVED_AT)}
        assert len({seal for seal, _ in alike[0].values()}) > len(alike[0]) // 2


@pytest.mark.distributed
@pytest.mark.parametrize("way", ["cut", "fsdp2", "fsdp1_conv", "hsdp"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_an_unsharded_average_loads_what_ranks_saved(saved: Saved, way: str) -> None:
    folder, _ = saved
    reference = in_every_format(make_model(WAYS[way].kind))
    fused = FusedAveragedModel(reference)
    state = fused.state_dict()
    dcp.load({"averaged": state}, checkpoint_id=folder / way)
    fused.load_state_dict(state)
    assert differing(dict(fused.state_dict()), truth_after(WAYS[way].kind, SAVED_AT)) == []


# Whole tensors


def _through_whole_tensors(way: str, dtype: torch.dtype, strict: bool) -> None:
    twin = Twin(way, dtype=dtype).train(*range(SAVED_AT))
    wanted, full = twin.wanted(), twin.averaged.full_state_dict()
    require_same(full, wanted)

    fused = FusedAveragedModel(make_model(twin.way.kind, dtype))
    fused.load_state_dict(full)
    require_same(fused.state_dict(), wanted)

    theirs = AveragedModel(make_model(twin.way.kind, dtype))
    result = theirs.load_state_dict(full, strict=strict)
    further = {key for key in wanted if not key.startswith(("module.", "n_averaged"))}
    assert (result.missing_keys, set(result.unexpected_keys)) == ([], further)
    assert not (strict and further)
    require_same(theirs.state_dict(), {key: wanted[key] for key in wanted.keys() - further})

    for state in (fused.state_dict(), theirs.state_dict())[: 1 + strict]:
        twin.train(40)
        assert wrong_parts(twin.averaged, wanted)
        require_same(full, wanted, "an update has changed what was given before")
        twin.averaged.load_state_dict(state)
        twin.require(wanted)


@pytest.mark.distributed
@on_ranks(2)
def test_whole_states_go_to_and_from_the_unsharded_classes() -> None:
    for way in ("cut_plain", "fsdp2", "fsdp1_conv"):
        _through_whole_tensors(way, torch.float32, strict=True)
        _through_whole_tensors(way, torch.bfloat16, strict=False)


@pytest.mark.distributed
@on_ranks(2)
def test_full_state_dict_goes_to_all_ranks_or_to_the_first() -> None:
    for way in ("cut_plain", "fsdp2", "fsdp1", "tp"):
        twin = Twin(way).train(0)
        wanted, first = twin.wanted(), dist.get_rank() == 0
        for rank0_only, cpu_offload in itertools.product((False, True), repeat=2):
            full = twin.averaged.full_state_dict(rank0_only=rank0_only, cpu_offload=cpu_offload)
            require_same(full, wanted if first or not rank0_only else {})
            for value in full.values():
                assert type(value) is Tensor
                assert value.device.type == "cpu"
                value.zero_()
        twin.require(wanted, "what was given is the average itself")


def _load_one_file(file: Path, ways: Sequence[str]) -> None:
    for way in ways:
        twin = Twin(way).train(0)
        whole = torch.load(file)["averaged"]
        before = planes_of(twin.averaged)
        twin.averaged.load_state_dict(whole)
        twin.require(SAVED_AT)
        put_back(twin.averaged, before)
        whole["module.table"][5, 1] += 1
        with refused_on_all_ranks(twin.averaged, "module.table", "another checksum"):
            twin.averaged.load_state_dict(whole)


@pytest.mark.distributed
def test_a_checkpoint_made_one_file_loads_and_is_verified(saved: Saved, tmp_path: Path) -> None:
    dcp_to_torch_save(saved[0] / "hsdp", tmp_path / "whole.pt")
    run_ranks(2, _load_one_file, tmp_path / "whole.pt", ["cut", "fsdp2", "fsdp1"])


def whole_values(kind: str) -> State:
    """Return whole values of any bits."""
    truth = truth_after(kind, SAVED_AT)
    values = {key: any_bits(value.shape, value.dtype, seed) for seed, (key, value) in enumerate(truth.items())}
    # Of the same tensor under two names.
    values["module.tied.weight"] = values["module.encoder.weight"].clone()
    values["n_averaged"] = torch.tensor(2**62 + 1)
    return values


def _hold_any_bits(folder: Path, ways: Sequence[str], action: str) -> None:
    for way in ways:
        twin = Twin(way)
        values = whole_values(twin.way.kind)
        if action == "save":
            twin.averaged.load_state_dict(values)
            save(twin.averaged, folder / way)
        else:
            load(twin.averaged, folder / way)
        twin.require(values)
        require_same(twin.averaged.full_state_dict(), values)


@pytest.mark.distributed
def test_no_bit_pattern_is_changed_on_the_way(tmp_path: Path) -> None:
    ways = ["cut_plain", "fsdp2", "fsdp1_conv"]
    run_ranks(2, _hold_any_bits, tmp_path, ways, "save")
    run_ranks(3, _hold_any_bits, tmp_path, ways, "load")


# What a state is made of


def part_of(value: Tensor) -> Tensor:
    """Return this rank's part of a tensor in a state."""
    return value.run if isinstance(value, PartTensor) else local_of(value)


@pytest.mark.distributed
@on_ranks(3)
def test_a_state_is_made_of_copies() -> None:
    for way, kind in (("cut_plain", PartTensor), ("fsdp1", PartTensor), ("fsdp2", DTensor)):
        twin = Twin(way).train(0)
        expected = twin.wanted()
        state = twin.averaged.state_dict()
        assert state.keys() == {*expected, *(checkpoint.CHECKSUM + key for key in expected), checkpoint.SAVE_ID}
        params = {f"module.{name}" for name, _ in twin.reference.named_parameters(remove_duplicate=False)}
        params |= {key for key in expected if not key.startswith(("module.", "n_averaged"))}
        for key, value in state.items():
            if key in expected:
                assert (value.shape, value.dtype) == (expected[key].shape, expected[key].dtype), key
            wanted = kind if key in params and value.dim() else PartTensor if key == checkpoint.SAVE_ID else Tensor
            assert type(value) is wanted, (way, key)
        local = {key: part_of(value) for key, value in state.items()}
        before = {key: value.clone() for key, value in local.items()}
        twin.train(1, 2)
        require_same(local, before, "an update has changed a state")
        planes = planes_of(twin.averaged)
        for value in local.values():
            value.zero_()
        require_same(planes_of(twin.averaged), planes, "a state is the average itself")
        again, once = twin.averaged.state_dict(), twin.averaged.state_dict()
        assert set(again[checkpoint.SAVE_ID].run.tolist()) != set(once[checkpoint.SAVE_ID].run.tolist())
        assert checksums_of(again) == checksums_of(once)


@pytest.mark.distributed
@pytest.mark.parametrize("use_buffers", [False, True])
@on_ranks(3)
def test_a_state_has_the_first_ranks_buffers(tmp_path: Path, use_buffers: bool) -> None:
    for way in ("cut", "fsdp2", "fsdp1"):
        twin = Twin(way, use_buffers=use_buffers)
        rank = dist.get_rank()
        for step in (0, 1):
            drift(twin.reference, step)
            twin.fill()
            twin.expected.update_parameters(twin.reference)  # with the first rank's buffers
            for buffer in twin.sharded.buffers():
                buffer.copy_(buffer + rank if buffer.dtype != torch.bool else buffer ^ bool(rank))
            twin.averaged.update_parameters(twin.sharded)
        expected = twin.wanted()
        buffers = {f"module.{name}" for name, _ in twin.reference.named_buffers()} & expected.keys()
        assert len(buffers) == 4
        save(twin.averaged.state_dict(), tmp_path / way)
        require_same(twin.averaged.full_state_dict(), expected)
        own = sorted(f"{name}, box 0" for name in buffers) if rank else []
        assert wrong_parts(twin.averaged, expected) == own
        load(twin.averaged, tmp_path / way)
        twin.require(expected)


class Buffers(nn.Module):
    """A buffer of any bits in every dtype, some that do not lie in memory row by row, and complex params."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        waves = torch.arange(150.0).view(50, 3) * (1 - 0.5j)
        self.wave, self.long_wave = nn.Parameter(waves), nn.Parameter(waves.to(torch.complex128) / 3)
        chance = torch.Generator().manual_seed(seed)
        self.register_buffer("turned", torch.randn(5, 2, 3, generator=chance).permute(2, 0, 1))
        self.register_buffer("gapped", torch.randn(5, 4, generator=chance)[:, ::2])
        for name in checkpoint._DTYPES:
            dtype = getattr(torch, name, None)
            if dtype is not None:
                self.register_buffer(f"of_{name}", any_bits((2, 3), dtype, seed))


def _hold_buffers(folder: Path, action: str) -> None:
    # Each rank has others: a state has the first one's.
    averaged = ShardedAveragedModel(Buffers(dist.get_rank()))
    expected = {f"module.{name}": value for name, value in Buffers(0).state_dict().items()}
    expected["n_averaged"] = torch.tensor(0)
    if action == "save":
        save(averaged.state_dict(), folder)
    else:
        other = Buffers(dist.get_rank() + 5)
        other.wave.data.zero_()
        other.long_wave.data.zero_()
        averaged = ShardedAveragedModel(other)
        load(averaged, folder)
        assert wrong_parts(averaged, expected) == []
    assert differing(averaged.full_state_dict(), expected) == []


@pytest.mark.distributed
def test_buffers_of_every_dtype_and_complex_params_are_saved_and_loaded(tmp_path: Path) -> None:
    run_ranks(2, _hold_buffers, tmp_path, "save")
    run_ranks(3, _hold_buffers, tmp_path, "load")


@pytest.mark.parametrize("size", [1, 3, 4, 255, 1000, 1024])
def test_each_of_many_ranks_has_its_part_of_the_save_id(size: int) -> None:
    ranks = [SimpleNamespace(size=size, index=index, gather=lambda value: [7]) for index in range(size)]
    parts = [checkpoint._save_id_part(each) for each in ranks]  # type: ignore[arg-type]
    assert all(part.run.numel() > 0 and part.run.eq(7).all() for part in parts)
    places = [box.offsets[0] for part in parts for box in part.boxes] + [parts[0].numel()]
    assert places[0] == 0
    assert [part.run.numel() for part in parts] == [after - at for at, after in itertools.pairwise(places)]


@pytest.mark.distributed
@on_ranks(3)
def test_some_of_the_ranks_save_and_load_by_themselves(tmp_path: Path) -> None:
    ranks = [1, 2] if torch.__version__ >= (2, 7) else [0, 2]  # torch 2.6 saves in groups with rank 0 only
    group = dist.new_group(ranks)
    if dist.get_rank() not in ranks:
        return
    reference = in_every_format(make_model("ddp"))
    averaged, truth = ShardedAveragedModel(reference, process_group=group), FusedAveragedModel(reference)
    for averages in (averaged, truth):
        averages.update_parameters(reference)
    expected = {key: value.clone() for key, value in truth.state_dict().items()}
    dcp.save({"averaged": averaged}, checkpoint_id=tmp_path, process_group=group)
    drift(reference, 1)
    averaged.update_parameters(reference)
    assert wrong_parts(averaged, expected)
    dcp.load({"averaged": averaged}, checkpoint_id=tmp_path, process_group=group)
    assert wrong_parts(averaged, expected) == []
    assert differing(averaged.full_state_dict(), expected) == []


# Damage

Change = Callable[[bytes], bytes | None]


@dataclasses.dataclass(frozen=True)
class Flip:
    """A bit that a disk or a network has changed."""

    file: str
    position: int
    bit: int
    what: str

    def __call__(self, content: bytes) -> bytes:
        changed = bytearray(content)
        changed[self.position] ^= 1 << self.bit
        return bytes(changed)


def kind_of(key: str) -> str:
    """Return the kind of a checkpoint's key."""
    key = key.removeprefix("averaged.")
    if key.startswith("module.") and key.rpartition(".")[2] in ("running_mean", "num_batches_tracked", "mask"):
        return "buffer"
    return key.split(".")[0]


def some_flips(folder: Path, count: int, seed: int) -> list[Flip]:
    """Pick bits in turn from elements of each kind of key, from all that is saved with them, and from the metadata."""
    chance = random.Random(seed)
    items: dict[str, list[tuple[str, Any]]] = {}
    for index, info in FileSystemReader(folder).read_metadata().storage_data.items():
        items.setdefault(kind_of(index.fqn), []).append((index.fqn, info))
    flips = []
    for turn in range(count):
        bit = chance.randrange(8)
        if turn % 4 == 3:
            size = (folder / ".metadata").stat().st_size
            flips.append(Flip(".metadata", chance.randrange(size), bit, "metadata"))
            continue
        kind = sorted(items)[turn % len(items)]
        key, info = chance.choice(items[kind])
        item = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        elements = elements_in(item)
        within = turn % 4 < 2 and len(elements) > 0
        position = info.offset + (chance.choice(elements) if within else chance.randrange(len(item)))
        flips.append(Flip(info.relative_path, position, bit, f"{'elements' if within else 'item'} of {key}"))
    return flips


def elements_in(item: bytes) -> range:
    """Return where the elements are in a saved tensor, which is a zip file."""
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        (info,) = [info for info in archive.infolist() if re.search(r"/data/\d+$", info.filename)]
    lengths = item[info.header_offset + 26 : info.header_offset + 30]  # of the name and of what else is in the header
    start = info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return range(start, start + info.file_size)


@contextmanager
def damaged(path: Path, change: Change) -> Iterator[None]:
    """Change or remove a file on the ranks' disk, and put it back afterwards. Collective."""
    dist.barrier()
    content = path.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        changed = change(content)
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
    dist.barrier()
    yield
    dist.barrier()
    if dist.get_rank() == 0:
        path.write_bytes(content)


def from_all(mine: T) -> list[T]:
    """Return what each rank has. Collective."""
    told = [mine] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return told


def outcome(averaged: ShardedAveragedModel, load_it: Callable[[], None], good: Sequence[State], about: object) -> str:
    """Load, and return the outcome on all ranks: ``"refused"`` and nothing changed, or ``"loaded"``. Collective."""
    before = planes_of(averaged)
    error: BaseException | None = None
    try:
        load_it()
    except (Exception, dcp.CheckpointException) as raised:  # torch's is no Exception
        error = raised
    now = planes_of(averaged)
    if error is not None:
        changed = differing(now, before)
        came_to = f"refused and changed {changed}" if changed else "refused"
        came_to = f"waited, then {came_to}" if isinstance(error, LostPeerError) else came_to
    else:
        # All ranks have to have the same of several good ones.
        fitting = [index for index, planes in enumerate(good) if differing(now, planes) == []]
        came_to = f"loaded {fitting[0]}" if fitting else f"loaded what nobody saved: {differing(now, good[0])}"
    told = from_all(came_to)
    ways_out = {"refused", *(f"loaded {index}" for index in range(len(good)))}
    assert len(set(told)) == 1, f"{about}: {told}, {error!r}"
    assert told[0] in ways_out, f"{about}: {told[0]}, {error!r}"
    put_back(averaged, before)
    return told[0].split(" ")[0]


def _limit_memory() -> None:
    # One flipped bit in the metadata can have pickle ask for all of a machine's memory (25 GB, ran), and get it.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _flip_in_files(folder: Path, way: str, count: int, seed: int) -> Counter[str]:
    _limit_memory()
    twin = Twin(way).train(*range(60, 62))
    good = _load_good(twin, folder)
    found: Counter[str] = Counter()
    for turn, flip in enumerate(some_flips(folder, count, seed)):
        with damaged(folder / flip.file, flip):
            found[f"{flip.what.split()[0]} {outcome(twin.averaged, _loader(twin, folder, turn), [good], flip)}"] += 1
    # And whole it still loads.
    assert outcome(twin.averaged, _loader(twin, folder, 0), [good], "nothing") == "loaded"
    return found


def _load_good(twin: Twin, folder: Path) -> State:
    """Load a checkpoint that is whole, return what came, and put back what was there."""
    before = planes_of(twin.averaged)
    load(twin.averaged, folder)
    twin.require(SAVED_AT)
    good = planes_of(twin.averaged)
    put_back(twin.averaged, before)
    return good


def _loader(twin: Twin, folder: Path, turn: int) -> Callable[[], None]:
    """Return a load, in both styles in turn."""
    if turn % 2:
        return lambda: dcp.load({"averaged": twin.averaged}, checkpoint_id=folder)
    return lambda: load(twin.averaged, folder)


@pytest.mark.distributed
@pytest.mark.parametrize("way", ["cut", "fsdp2", "fsdp1"])
def test_a_flipped_bit_is_refused_or_does_not_matter(saved: Saved, tmp_path: Path, way: str) -> None:
    folder = shutil.copytree(saved[0] / way, tmp_path / way)
    found, *_ = run_ranks(2, _flip_in_files, folder, way, 24, 1)
    assert found.total() == 24
    # Elements are sealed, each. But of what is saved twice, under tied names, one is loaded over the other, and in a
    # byte that is a bool any bit means the same.
    assert found["elements refused"] >= 9


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("way", "world"), [("cut", 3), ("fsdp2", 1), ("fsdp1", 2), ("hsdp", 4), ("cut_plain", 2)])
def test_many_flipped_bits_are_refused_or_do_not_matter(
    saved: Saved, tmp_path: Path, way: str, world: int, seed: int
) -> None:
    folder = shutil.copytree(saved[0] / way, tmp_path / way)
    count = 480 // (world + 1)  # the more ranks the slower, and 4 of them have two processors
    found, *_ = run_ranks(world, _flip_in_files, folder, way, count, 100 + seed)
    assert found.total() == count
    assert found["elements refused"] >= count * 2 // 5


SHORTER: dict[str, Change] = {
    "gone": lambda content: None,
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "half": lambda content: content[: len(content) // 2],
    "most": lambda content: content[: len(content) * 9 // 10],
    "without its last 100 bytes": lambda content: content[:-100],
    "without its last byte": lambda content: content[:-1],
    "longer": lambda content: content + content[-1000:],
}


def _shorten_files(folder: Path, way: str) -> Counter[str]:
    twin = Twin(way).train(*range(60, 62))
    good = _load_good(twin, folder)
    found: Counter[str] = Counter()
    for turn, (what, change) in enumerate(SHORTER.items()):
        for name in (".metadata", "__0_0.distcp", "__3_0.distcp"):
            with damaged(folder / name, change):
                came_to = outcome(twin.averaged, _loader(twin, folder, turn), [good], (name, what))
                found[f"{what}: {came_to}"] += 1
    return found


@pytest.mark.distributed
def test_a_truncated_or_missing_file_is_refused(saved: Saved, tmp_path: Path) -> None:
    folder = shutil.copytree(saved[0] / "fsdp2", tmp_path / "damaged")
    found, *_ = run_ranks(2, _shorten_files, folder, "fsdp2")
    refused = [what for what in SHORTER if what not in ("longer", "without its last byte")]
    assert {what: found[f"{what}: refused"] for what in refused} == dict.fromkeys(refused, 3)


def _mix_saves(folder: Path, way: str) -> Counter[str]:
    world = dist.get_world_size()
    twin = Twin(way).train(*range(SAVED_AT))
    save(twin.averaged.state_dict(), folder / "a")
    good = [planes_of(twin.averaged)]
    twin.train(SAVED_AT)
    save(twin.averaged.state_dict(), folder / "b")
    good.append(planes_of(twin.averaged))
    twin.train(SAVED_AT + 1)
    found: Counter[str] = Counter()
    files = [f"__{rank}_0.distcp" for rank in range(world)]
    mixtures = [(of, ranks) for of in "ab" for ranks in itertools.product("ab", repeat=world)]
    for turn, (of, ranks) in enumerate(mixtures):
        mixed = folder / f"mixed {turn}"
        if dist.get_rank() == 0:
            mixed.mkdir()
            shutil.copy(folder / of / ".metadata", mixed)
            for origin, file in zip(ranks, files, strict=True):
                shutil.copy(folder / origin / file, mixed)
        dist.barrier()
        came_to = outcome(twin.averaged, _loader(twin, mixed, turn), good, (of, ranks))
        found[f"{'mixed' if len(set(ranks)) > 1 else 'one'} {came_to}"] += 1
    for first, second in itertools.combinations(files, 2):
        exchanged = folder / f"exchanged {first} {second}"
        if dist.get_rank() == 0:
            shutil.copytree(folder / "a", exchanged)
            shutil.copy(folder / "a" / first, exchanged / second)
            shutil.copy(folder / "a" / second, exchanged / first)
        dist.barrier()
        found[f"exchanged {outcome(twin.averaged, _loader(twin, exchanged, 0), good, exchanged)}"] += 1
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("way", "world"), [("cut", 3), ("fsdp2", 2)])
def test_a_mixture_of_two_saves_is_refused(tmp_path: Path, way: str, world: int) -> None:
    found, *_ = run_ranks(world, _mix_saves, tmp_path, way)
    # The metadata of one save over all the rank files of the other: those of a save that fits.
    pairs = world * (world - 1) // 2
    assert found == {"mixed refused": 2 * (2**world - 2), "one loaded": 4, "exchanged refused": pairs}


# A state that is damaged, or wrong, by the time it comes to load_state_dict


@contextmanager
def refused_on_all_ranks(averaged: ShardedAveragedModel, *named: str) -> Iterator[None]:
    """Check that the body raises on every rank, names what is ``named``, and changes nothing on any. Collective."""
    before = planes_of(averaged)
    message = "nothing raised"
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
    told = from_all((message, differing(planes_of(averaged), before)))
    assert all(changed == [] for _, changed in told), told
    assert all(name in message for message, _ in told for name in named), (named, told)
    assert not any(message.startswith(("nothing", "LostPeerError")) for message, _ in told), told


def flip_in_memory(value: Tensor, chance: random.Random) -> bool:
    """Flip a bit of this rank's part of ``value``; return False if it has none."""
    local = part_of(value)
    if local.numel() == 0:
        return False
    content = local.contiguous().reshape(-1)
    if content.dtype == torch.bool:
        content.logical_not_()
    else:
        content.view(torch.uint8)[chance.randrange(content.nbytes)] ^= 1 << chance.randrange(8)
    local.copy_(content.view(local.shape))
    return True


def some_keys(state: Mapping[str, Tensor], chance: random.Random) -> list[str]:
    """Pick keys of every kind, the checksums of every kind of key among them."""
    by_kind: dict[str, list[str]] = {}
    for key in state:
        sealed = key.removeprefix(checkpoint.CHECKSUM)
        by_kind.setdefault(f"{sealed == key} {kind_of(sealed)}", []).append(key)
    return [key for keys in by_kind.values() for key in chance.sample(keys, min(2, len(keys)))]


def _flip_in_memory(ways: Sequence[str], seed: int) -> int:
    chance = random.Random(seed)
    tried = 0
    for way in ways:
        twin = Twin(way).train(*range(SAVED_AT))
        state = twin.averaged.state_dict()
        twin.train(70)
        for key in some_keys(state, chance):
            victim = chance.randrange(dist.get_world_size())
            damaged_state = dict(state)
            has_it = False
            if dist.get_rank() == victim:
                damaged_state[key] = state[key].clone()
                has_it = flip_in_memory(damaged_state[key], random.Random(tried))
            # Of a whole tensor that is cut, as those without dimensions are, the others' part is not read.
            if any(from_all(has_it)) and key != "module.scalar":
                sealed = "saves" if key == checkpoint.SAVE_ID else key.removeprefix(checkpoint.CHECKSUM)
                with refused_on_all_ranks(twin.averaged, sealed):
                    twin.averaged.load_state_dict(damaged_state)
                tried += 1
        twin.averaged.load_state_dict(state)
        twin.require(SAVED_AT)
    return tried


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "ways"),
    [(2, ["cut_plain", "fsdp2", "fsdp1_conv"]), (4, ["hsdp", "hsdp_shared"])],
)
def test_a_bit_flipped_in_the_memory_of_one_rank_is_refused_on_all(world: int, ways: list[str]) -> None:
    tried = run_ranks(world, _flip_in_memory, ways, 5)
    assert min(tried) >= 15 * len(ways)


def _changed(state: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a state with other values for some keys, written with ``__`` for ``.``; None leaves the key out."""
    new = dict(state)
    for name, value in changes.items():
        key = name.replace("__", ".")
        new.pop(key)
        new |= {key: value} if value is not None else {}
    return new


def _freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def _on_meta(part: Tensor) -> Tensor:
    """Return a rank's part without values."""
    if isinstance(part, PartTensor):
        return PartTensor(part.run.to("meta"), tuple(part.shape), part.boxes)
    return part.to("meta")


def _wrong_states(twin: Twin) -> list[tuple[Any, tuple[str, ...]]]:
    """Return states that do not fit, and the words that the error must have."""
    good = twin.averaged.state_dict()
    plain = twin.averaged.state_dict(checksums=False)
    whole = twin.averaged.full_state_dict()
    count = good["n_averaged"]
    seal = good["checksum.module.long"]
    return [
        (_changed(good, module__long=None), ("module.long", "1 missing")),
        (_changed(whole, module__long=None), ("module.long", "1 missing")),
        (good | {"module.surplus": torch.zeros(3)}, ("module.surplus", "1 unexpected")),
        (whole | {"module.surplus": torch.zeros(3)}, ("module.surplus", "1 unexpected")),
        (_changed(whole, module__long=torch.zeros(1008)), ("module.long", "(1009,)", "(1008,)")),
        (_changed(whole, module__table=torch.zeros(3, 7)), ("module.table", "(7, 3)", "(3, 7)")),
        (_changed(whole, module__norm__running_mean=torch.zeros(3)), ("module.norm.running_mean", "(10,)")),
        (_changed(good, n_averaged=torch.tensor(-1)), ("n_averaged", "int64 >= 0")),
        (_changed(whole, n_averaged=torch.tensor(-1)), ("n_averaged", "int64 >= 0")),
        (_changed(whole, n_averaged=count.float()), ("n_averaged", "int64 >= 0")),
        (_changed(whole, n_averaged=torch.tensor([3, 3])), ("n_averaged", "int64 >= 0")),
        (_changed(whole, n_averaged=3), ("n_averaged", "must be a tensor, got int")),
        (_changed(whole, n_averaged=count.to("meta")), ("n_averaged", "must hold data")),
        (_changed(whole, module__long=whole["module.long"].to("meta")), ("module.long", "must hold data")),
        (_changed(whole, module__long=whole["module.long"].to_sparse()), ("module.long", "must be dense")),
        (_changed(whole, module__long=_freed(whole["module.long"])), ("module.long", "must have memory")),
        (_changed(plain, module__long=_on_meta(plain["module.long"])), ("module.long", "must hold data")),
        (_changed(good, module__long=_on_meta(good["module.long"])), ("module.long", "must hold data")),
        (_changed(good, module__long="weights"), ("module.long", "must be a tensor, got str")),
        (_changed(whole, module__long=[0.0] * 1009), ("module.long", "must be a tensor, got list")),
        ([*whole.items()], ("must be a mapping, got list",)),
        (None, ("must be a mapping, got NoneType",)),
        (_changed(good, checksum__module__long=None), ("checksum.module.long", "1 missing")),
        (_changed(good, checksum__n_averaged=None), ("checksum.n_averaged", "1 missing")),
        (_changed(good, checksum__module__long=seal[:1]), ("checksum.module.long", "two int64")),
        (_changed(good, checksum__module__long=seal.float()), ("checksum.module.long", "two int64")),
        (_changed(good, save_id=None), ("save_id", "1 missing")),
        (plain | {"save_id": good["save_id"]}, ("save_id", "1 unexpected")),
        (plain | {"checksum.module.long": seal}, ("checksum.n_averaged", "missing")),
        (_changed(whole, module__tied__weight=whole["module.tied.weight"] + 1), ("module.tied.weight", "tied")),
        (_changed(good, checksum__module__tied__weight=seal), ("module.tied.weight", "tied")),
        ({}, ("n_averaged", "missing")),
    ]


@pytest.mark.distributed
@on_ranks(2)
def test_states_that_do_not_fit_are_refused_on_all_ranks() -> None:
    rank = dist.get_rank()
    for way in ("cut", "fsdp2", "fsdp1"):
        twin = Twin(way).train(*range(SAVED_AT))
        good = twin.averaged.state_dict()
        wrong = _wrong_states(twin)
        plain_keys = [key for key in good if not key.startswith((checkpoint.CHECKSUM, checkpoint.SAVE_ID))]
        twin.train(80)
        for state, named in wrong:
            with refused_on_all_ranks(twin.averaged, *named):
                twin.averaged.load_state_dict(state)
        # And with a good one on all ranks but one.
        for index, (state, named) in enumerate(wrong):
            one = index % dist.get_world_size()
            with refused_on_all_ranks(twin.averaged, *named):
                twin.averaged.load_state_dict(state if rank == one else good)
        with refused_on_all_ranks(twin.averaged, "checksums on all ranks or on none"):
            twin.averaged.load_state_dict({key: good[key] for key in plain_keys} if rank else good)
        twin.averaged.load_state_dict(good)
        twin.require(SAVED_AT)


def _load_another_format(folder: Path, ways: Sequence[str]) -> None:
    formats = {"float32": torch.float32, "exact": torch.bfloat16, "mirrored": torch.float16, "own": torch.float64}
    for way in ways:
        twins = {name: Twin(way, dtype=dtype).train(0) for name, dtype in formats.items()}
        kept = {name: twin.averaged.state_dict() for name, twin in twins.items()}
        for name, state in kept.items():
            save(state, folder / way / name)
        for mine, other in itertools.permutations(formats, 2):
            averaged = twins[mine].averaged
            named = ("state_dict['module.", str(formats[mine]), str(formats[other]), "another format")
            with refused_on_all_ranks(averaged, *named):
                averaged.load_state_dict(kept[other])
            # DCP casts to whatever it is asked for: the values that come are no longer those saved.
            state = averaged.state_dict()
            if state.keys() == kept[other].keys() or mine in ("float32", "own"):
                dcp.load({"averaged": state}, checkpoint_id=folder / way / other)
                with refused_on_all_ranks(averaged, *named):
                    averaged.load_state_dict(state)
            else:
                before = planes_of(averaged)
                with pytest.raises(dcp.CheckpointException, match=r"Missing key.*averaged\.(remainder|average)\."):
                    dcp.load({"averaged": averaged}, checkpoint_id=folder / way / other)
                assert differing(planes_of(averaged), before) == []


@pytest.mark.distributed
def test_a_state_of_another_format_is_refused_by_the_dtypes(tmp_path: Path) -> None:
    run_ranks(2, _load_another_format, tmp_path, ["fsdp2"])


@pytest.mark.distributed
@on_ranks(4)
def test_a_state_spread_in_another_way_is_refused() -> None:
    ways = ["cut", "fsdp2", "tp", "hsdp_shared"]
    twins = {way: Twin(way).train(0) for way in ways}
    kept = {way: twin.averaged.state_dict() for way, twin in twins.items()}
    for mine, other in itertools.permutations(ways, 2):
        refused = "another cut" if isinstance(kept[other]["module.long"], PartTensor) else "must be spread"
        if {mine, other} == {"fsdp2", "tp"}:
            # They hold most of their params in the same boxes, but on meshes of other names.
            refused = "module."
        with refused_on_all_ranks(twins[mine].averaged, "state_dict['module.", refused):
            twins[mine].averaged.load_state_dict(kept[other])


@pytest.mark.distributed
@on_ranks(1)
def test_a_state_in_another_order_of_memory_is_put_in_order() -> None:
    # One rank has all of each param: only the order in memory tells the two apart.
    for order, other in (
        (torch.channels_last, torch.contiguous_format),
        (torch.contiguous_format, torch.channels_last),
    ):
        models = [nn.Conv2d(4, 5, 3).to(memory_format=memory_format) for memory_format in (order, other)]
        model, source = (FullyShardedDataParallel(each, device_id=torch.device("cpu")) for each in models)
        averaged = ShardedAveragedModel(source)
        expected = averaged.full_state_dict()
        loader = ShardedAveragedModel(model)
        loader.load_state_dict(averaged.state_dict())
        require_same(loader.full_state_dict(), expected)


# Each gate kills a bug: planted on every rank, and the test that guards against it must fail


def skip_verification() -> None:
    checkpoint.verify = lambda *args: None  # type: ignore[assignment]


def tell_nobody() -> None:
    @contextmanager
    def alone(self: Ranks, what: str, number: int | None = None) -> Iterator[None]:
        yield

    Ranks.settled = alone  # type: ignore[method-assign]


def write_while_staging() -> None:
    stage = checkpoint.prepare_load

    def hasty(entries: Sequence[checkpoint.Entry], copied: Any, state: Any) -> checkpoint.PendingLoad:
        staged = stage(entries, copied, state)
        for entry, run in staged.runs:
            entry.plane.detach().copy_(run.view(entry.plane.shape))
        return staged

    checkpoint.prepare_load = hasty


def forget_the_save() -> None:
    verify = checkpoint.verify
    checkpoint.verify = lambda staged, *rest: verify(dataclasses.replace(staged, save_ids=frozenset()), *rest)


def sum_without_places() -> None:
    checkpoint.checksum_of_run = lambda run, share: sum(checksum(box.of_run(run)) for box in share.boxes) % 2**62


def count_replicas_again() -> None:
    Share.counts_on = lambda self, rank: True  # type: ignore[method-assign]


def keep_own_buffers() -> None:
    Ranks.broadcast_ = lambda self, tensor: None  # type: ignore[method-assign]


def give_the_average_itself() -> None:
    copied = checkpoint.part_of

    def shared(entry: checkpoint.Entry) -> Tensor:
        part = copied(entry)
        return PartTensor(entry.run, part.shape, part.boxes) if isinstance(part, PartTensor) else part

    checkpoint.part_of = shared


def believe_the_first_of_ties() -> None:
    def run_of_first(state: Mapping[str, Tensor], entry: checkpoint.Entry, seals: Any) -> Tensor:
        return checkpoint._run_from(state[entry.keys[0]], entry.keys[0], entry, seals)

    checkpoint._run_of_ties = run_of_first


def let_formats_be_cast() -> None:
    checkpoint._require_saved_as = lambda *args: None  # type: ignore[assignment]


def _flip_in_files_of_its_own(folder: Path) -> None:
    save(Twin("cut").train(*range(SAVED_AT)).averaged.state_dict(), folder / "cut")
    _flip_in_files(folder / "cut", "cut", 8, 3)


def _seal_in_two_ways() -> None:
    one, other = (checksums_of(Twin(way).averaged.state_dict()) for way in ("cut", "fsdp2"))
    assert one == other, "checksums depend on the cut"


_IN_MEMORY = (_flip_in_memory, (["cut"], 5))
#: The bug, the ranks, the test's function, its arguments after its folder, and how it fails.
GATES: list[tuple[Callable[[], None], int, Callable[..., Any], tuple[Any, ...], str]] = [
    (skip_verification, 2, *_IN_MEMORY, "nothing raised"),
    (skip_verification, 2, _flip_in_files_of_its_own, (Path(),), "loaded what nobody saved"),
    (tell_nobody, 2, *_IN_MEMORY, "nothing raised"),
    (write_while_staging, 2, *_IN_MEMORY, "assert all.changed == "),
    (forget_the_save, 2, *_IN_MEMORY, "nothing raised"),
    (sum_without_places, 2, _seal_in_two_ways, (), "checksums depend on the cut"),
    (count_replicas_again, 4, _flip_in_memory, (["hsdp"], 5), "another checksum"),
    (
        keep_own_buffers,
        3,
        test_a_state_has_the_first_ranks_buffers,
        (Path(), False),
        r"\['module.mask', 'module.norm.num",
    ),
    (
        give_the_average_itself,
        3,
        test_a_state_is_made_of_copies,
        (),
        "an update has changed a state",
    ),
    (give_the_average_itself, 2, _flip_in_files_of_its_own, (Path(),), "refused and changed"),
    (believe_the_first_of_ties, 2, test_states_that_do_not_fit_are_refused_on_all_ranks, (), "nothing raised"),
    (let_formats_be_cast, 2, _load_another_format, (Path(), ["cut"]), "AssertionError"),
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("plant", "world", "function", "args", "message"),
    GATES,
    ids=[f"{gate[0].__name__}{i}" for i, gate in enumerate(GATES)],
)
def test_the_gate_kills_the_bug(
    tmp_path: Path,
    plant: Callable[[], None],
    world: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    message: str,
) -> None:
    given = [tmp_path if arg == Path() else arg for arg in args]
    with pytest.raises(RankFailedError, match=message):
        run_ranks(world, function, *given, timeout=timedelta(seconds=15), plant=plant)
