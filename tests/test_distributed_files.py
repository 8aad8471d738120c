"""Folders of ``torch.distributed.checkpoint``: what 4 ranks save is read, and what is written is loaded."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from swafast import ShardedAveragedModel
from swafast.files import distributed_files, entries
from swafast.files.averaging import average
from swafast.files.distributed_files import DistributedCheckpoint, DistributedOutput
from swafast.files.torch_files import TorchCheckpoint
from swafast.terms.boxes import Box
from tests.checkpoint_io import Exploit, plan_of, read_whole, require_holds, require_unharmed, write_pieces
from tests.ranks import run_ranks
from tests.sharded_models import Net, can_run, make_model, wrap
from tests.support import require_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning", "ignore:TypedStorage:UserWarning")

#: Rows over 4 ranks, rows and columns over 2 by 2, columns alone, replicas, and a flat param of FSDP1.
MODES = ("fsdp2", "fsdp2_tp", "tp", "hsdp", "fsdp1_orig")
GOLDEN = Path(__file__).parent / "golden" / "sharded.zip"


def model_for(mode: str) -> Net:
    # FSDP1 saves no shards of a model that has a channels_last param.
    return make_model("fsdp2" if mode == "fsdp1_orig" else mode)


def can_save(mode: str) -> bool:
    # torch 2.6 does not save FSDP1's shards where a rank has none.
    return can_run(mode, forward=False) and (mode != "fsdp1_orig" or hasattr(torch.cpu.Stream, "record_event"))


def save_all(folder: Path) -> None:
    """Save each mode's model beside an optimizer's state and bytes, and an average. Collective."""
    for mode in MODES:
        if can_save(mode):
            model = wrap(model_for(mode), mode)
            optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "lr": 0.1}
            state = {"model": get_model_state_dict(model), "optimizer": optimizer, "rng": io.BytesIO(b"bytes")}
            dcp.save(state, checkpoint_id=folder / mode)
    average = ShardedAveragedModel(model := wrap(make_model("fsdp1_orig"), "fsdp1_orig"))
    average.update_parameters(model)
    dcp.save(average.state_dict(), checkpoint_id=folder / "average")


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four_ranks")
    run_ranks(4, save_all, folder)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a checkpoint of one process: two tensors of a model, and an optimizer's."""
    path = tmp_path / "saved"
    state = {"model": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int64)}}
    dcp.save({**state, "optimizer": {"a": torch.zeros(2)}}, checkpoint_id=path)
    return path


# Reading


@pytest.mark.distributed
@pytest.mark.parametrize("mode", MODES)
def test_what_four_ranks_save_is_read_right(four_ranks: Path, mode: str) -> None:
    if not can_save(mode):
        pytest.skip("needs a torch that can save the mode on a CPU")
    path = str(four_ranks / mode)
    checkpoint = DistributedCheckpoint(path)
    assert checkpoint.notes == [f"{path}: averaging 'model', without 'optimizer', 'rng'"]
    chunks = [len(tensor.chunks) for tensor in checkpoint._tensors.values()]
    assert max(chunks) >= (2 if mode == "hsdp" else 4)
    require_holds(checkpoint, model_for(mode).state_dict(), (7, 1 << 17))
    checkpoint.close()


@pytest.mark.distributed
def test_averages_of_four_ranks_are_read_right(four_ranks: Path) -> None:
    checkpoint = DistributedCheckpoint(str(four_ranks / "average"))
    assert "averaging 'module', without 'n_averaged', 'save_id'" in checkpoint.notes[0]
    require_holds(checkpoint, make_model("fsdp1_orig").state_dict())


@pytest.mark.distributed
@pytest.mark.parametrize("bug", ["columns as rows", "another shard", "a shard left out"])
def test_planted_bugs_of_chunks_are_seen(four_ranks: Path, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = DistributedCheckpoint(str(four_ranks / "tp"))
    if bug == "columns as rows":
        overlap = Box.overlap
        monkeypatch.setattr(Box, "overlap", lambda box, other: overlap(box, other) and (overlap(box, other)[0],) * 2)
    for name, tensor in checkpoint._tensors.items():
        boxes, places = zip(*tensor.chunks, strict=True)
        if bug == "another shard" and len({box.sizes for box in boxes}) == 1:
            places = (*places[1:], places[0])
        elif bug == "a shard left out":
            boxes, places = boxes[1:], places[1:]
        chunks = tuple(zip(boxes, places, strict=True))
        checkpoint._tensors[name] = distributed_files.ChunkedTensor(tensor.dtype, tensor.sizes, chunks)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        require_holds(checkpoint, make_model("tp").state_dict())


def test_checkpoints_of_earlier_releases_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(GOLDEN) as packed:
        packed.extractall(tmp_path)
    for folder, key in (("fsdp2", "averaged.module"), ("plain", "averaged"), ("several", "averaged.slow.module")):
        with pytest.raises(
            ValueError, match=rf"{folder} must hold whole averages, .* with further bits in '(slow|rem)"
        ):
            DistributedCheckpoint(str(tmp_path / folder), key=key)
    monkeypatch.setattr(entries, "PLANES", ("none",))
    checkpoint = DistributedCheckpoint(str(tmp_path / "fsdp2"), key="averaged.module")
    loaded = {name: torch.empty(spec.shape) for name, spec in checkpoint.specs.items() if spec.dtype == "F32"}
    dcp.load(
        keyed := {f"averaged.module.{name}": value for name, value in loaded.items()}, checkpoint_id=tmp_path / "fsdp2"
    )
    assert len(keyed) > 5
    for name, value in loaded.items():
        assert torch.equal(read_whole(checkpoint, name, 7), value), name


@pytest.mark.parametrize(("key", "names"), [(None, ["a", "b"]), ("model", ["a", "b"]), ("optimizer", ["a"])], ids=str)
def test_the_part_that_is_averaged(saved: Path, key: str | None, names: list[str]) -> None:
    assert list(DistributedCheckpoint(str(saved), key=key).specs) == names


def test_a_model_that_is_called_model_is_whole(tmp_path: Path) -> None:
    """Names with dots, as of transformers' models, are not the keys of nested dicts."""
    state = {"model.layer.weight": torch.ones(2), "lm_head.weight": torch.ones(3)}
    dcp.save(state, checkpoint_id=tmp_path / "saved")
    require_holds(DistributedCheckpoint(str(tmp_path / "saved")), state)
    stripped = DistributedCheckpoint(str(tmp_path / "saved"), strip="model.")
    assert list(stripped.specs) == ["layer.weight", "lm_head.weight"]


# What is refused


def rewrite(change: Callable[[Metadata], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        (path / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))

    return apply


def info_of(metadata: Metadata, name: str) -> Any:
    return metadata.storage_data[MetadataIndex(name, (0,) * (2 if name == "model.a" else 1))]


def with_info(**changes: Any) -> Callable[[Path], None]:
    return rewrite(lambda metadata: info_of(metadata, "model.a").__dict__.update(changes))


def harmful_entry(path: Path) -> None:
    """Put a pickle that runs a command in the place of an entry."""
    data = path / "__0_0.distcp"
    start = data.stat().st_size
    torch.save(Exploit(), buffer := io.BytesIO())
    data.write_bytes(data.read_bytes() + buffer.getvalue())
    with_info(offset=start, length=len(buffer.getvalue()))(path)


def twice(metadata: Metadata) -> None:
    """Have one chunk twice, with other offsets, and so a hole."""
    chunks = metadata.state_dict_metadata["model.a"].chunks
    corners = (((0, 0), (1, 3)), ((0, 0), (1, 2)), ((1, 0), (1, 1)))
    chunks[:] = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in corners]
    metadata.storage_data[MetadataIndex("model.a", (1, 0))] = info_of(metadata, "model.a")


def endless() -> tuple[Any, ...]:
    """Return a value of 100 bytes in a pickle, of which the text, the hash and a comparison end never."""
    value: tuple[Any, ...] = ("a", "a")
    for _ in range(40):
        value = (value, value)
    return value


def overlapping(metadata: Metadata) -> None:
    """Have two chunks that share an element, and so a hole of one: each is as the file has it."""
    of_a, of_b = (metadata.state_dict_metadata[f"model.{name}"] for name in "ab")
    of_a.properties, of_a.size = of_b.properties, torch.Size([6])
    of_a.chunks[:] = [ChunkStorageMetadata(torch.Size([at]), torch.Size([3])) for at in (0, 2)]
    for at in (0, 2):
        metadata.storage_data[MetadataIndex("model.a", (at,))] = info_of(metadata, "model.b")


def with_sizes(sizes: Any) -> Callable[[Path], None]:
    def change(metadata: Metadata) -> None:
        of_a = metadata.state_dict_metadata["model.a"]
        of_a.size = of_a.chunks[0].sizes = sizes

    return rewrite(change)


def with_paths(**paths: Any) -> Callable[[Path], None]:
    return rewrite(lambda m: m.planner_data.update({f"model.{name}": path for name, path in paths.items()}))


def outside(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.a"].chunks[0].sizes = torch.Size([3, 2])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a command": (lambda path: (path / ".metadata").write_bytes(pickle.dumps(Exploit())), "global 'posix.system'"),
    "a command among the values": (rewrite(lambda m: setattr(m, "planner_data", Exploit())), "global 'posix.system'"),
    "a command in an entry": (harmful_entry, "__0_0.distcp, at 'a', must hold .* global 'posix.system'"),
    "no .metadata": (lambda path: (path / ".metadata").unlink(), "metadata is missing.* save was not finished"),
    "an empty .metadata": (lambda path: (path / ".metadata").write_bytes(b""), "metadata is damaged: its pickle"),
    "half a .metadata": (lambda path: os.truncate(path / ".metadata", 300), "metadata is damaged: its pickle"),
    "another pickle": (rewrite(lambda metadata: {"a": 1}), "metadata is damaged: it does not describe a checkpoint"),
    "no file": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing, which holds 'a'"),
    "a cut file": (lambda path: os.truncate(path / "__0_0.distcp", 100), "__0_0.distcp is damaged: it ends before 'a'"),
    "a file above": (with_info(relative_path="../saved/__0_0.distcp"), "must name files in its own folder"),
    "an absolute file": (
        with_info(relative_path="/etc/passwd"),
        "must name files in its own folder, got '/etc/passwd'",
    ),
    "a negative offset": (with_info(offset=-1), "no offset or length that a file can have"),
    "a length of text": (with_info(length="x"), "no offset or length that a file can have"),
    "another offset": (with_info(offset=8), "at 'a', is damaged: (it is not a whole archive|.* is not where)"),
    "transformed": (
        with_info(transform_descriptors=["zstd"]),
        "is compressed or otherwise transformed: save it without",
    ),
    "another entry": (
        rewrite(lambda m: info_of(m, "model.a").__dict__.update(info_of(m, "model.b").__dict__)),
        r"'a' it must have a chunk of float32 \(2, 3\), got int64 \(3,\)",
    ),
    "chunks with a hole": (rewrite(twice), "do not cover it once"),
    "chunks that overlap": (rewrite(overlapping), "do not cover it once"),
    "a chunk outside": (rewrite(outside), "is not in"),
    "float sizes": (with_sizes((2.0, 3.0)), "'model.a' has no sizes that a tensor can have"),
    "negative sizes": (with_sizes((0, -5)), "'model.a' has no sizes"),
    "huge sizes": (with_sizes((1 << 61,) * 40), "'model.a' has no sizes"),
    "endless sizes": (with_sizes(endless()), "'model.a' has no sizes"),
    "an endless path": (with_paths(a=(endless(), "a")), "no path of names"),
    "an endless file": (with_info(relative_path=endless()), "an entry has no file"),
    "an endless offset": (with_info(offset=endless()), "no offset or length"),
    "an endless transformation": (with_info(transform_descriptors=endless()), "compressed or otherwise transformed"),
    "one path twice": (with_paths(a=("model", "x"), b=("model", "x")), "'model.b' has the place of another"),
    "a path in another": (with_paths(a=("model", "x", "y"), b=("model", "x")), "'model.b' has the place of another"),
    "a path through another": (with_paths(a=("model", "x"), b=("model", "x", "y")), "'model.b' has the place of an"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(
    saved: Path, damage: Callable[[Path], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved)
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        read_whole(DistributedCheckpoint(str(saved)), "a")
    assert str(saved) in str(caught.value)
    require_unharmed(saved)


def mutated(data: bytes, random: Random) -> bytes:
    """Change, insert or delete some bytes."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 3))):
        at = random.randrange(len(changed))
        some = random.choice(
            (random.randbytes(random.randrange(9)), b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4))
        )
        changed[at : at + random.choice((0, 1, len(some)))] = some
    return bytes(changed)


@pytest.mark.parametrize("count", [120, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_bytes_give_an_error_that_names_the_file(saved: Path, count: int) -> None:
    state = {"model": {"a": torch.ones(2, 3)}, "epoch": 3, "optimizer": {0: torch.ones(2)}}
    torch.save(state, saved / "a.pt")
    good = {name: (saved / name).read_bytes() for name in ("a.pt", ".metadata", "__0_0.distcp")}
    random, errors = Random(5), list[str]()
    for index in range(count):
        name = list(good)[index % 3]
        (saved / name).write_bytes(mutated(good[name], random))
        try:
            checkpoint = TorchCheckpoint(str(saved / "a.pt")) if name == "a.pt" else DistributedCheckpoint(str(saved))
            try:
                for key, spec in checkpoint.specs.items():
                    checkpoint.read_into(key, 0, memoryview(bytearray(min(spec.nbytes, 64))))
            finally:
                checkpoint.close()
        except ValueError as error:
            errors.append(str(error))
        (saved / name).write_bytes(good[name])
    assert len(errors) > count // 2
    assert [error for error in errors if str(saved) not in error] == []


# Writing


@pytest.mark.parametrize("reread", [False, True])
def test_torch_loads_what_is_written(tmp_path: Path, reread: bool) -> None:
    tensors = {
        **{"a": torch.randn(5, 3), "b.c": torch.randn(7).bfloat16(), "n": torch.tensor(3), "empty": torch.empty(0, 2)},
        **{"mask": torch.tensor([True, False]), "small": torch.randn(4).to(torch.float8_e4m3fn)},
    }
    output = DistributedOutput(tmp_path / "out", plan_of(tensors, {"tied": "a"}, swafast="{}"))
    assert not (tmp_path / "out").exists()
    write_pieces(output, tensors)
    output.commit()
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == [".metadata", "__0_0.distcp"]
    expected = {**tensors, "tied": tensors["a"]}
    if reread:
        checkpoint = DistributedCheckpoint(str(tmp_path / "out"))
        assert (checkpoint.aliases, checkpoint.metadata, checkpoint.notes) == ({"tied": "a"}, {"swafast": "{}"}, [])
        require_holds(checkpoint, expected)
        return
    loaded = {name: torch.full_like(tensor.float(), 9).to(tensor.dtype) for name, tensor in expected.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "out")
    for name, tensor in expected.items():
        assert torch.equal(loaded[name].float(), tensor.float()), name


def load_on_ranks(path: Path) -> None:
    state = get_model_state_dict(model := wrap(make_model("fsdp2"), "fsdp2"))
    for value in state.values():
        value.detach().zero_()
    dcp.load(state, checkpoint_id=path)
    expected = make_model("fsdp2").state_dict()
    for name, value in state.items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert torch.equal(whole, expected[name]), name
    del model


@pytest.mark.distributed
def test_ranks_load_what_is_written(tmp_path: Path) -> None:
    if not can_run("fsdp2", forward=False):
        pytest.skip("needs a torch that can run FSDP2 on a CPU")
    tensors = {name: value.detach().clone() for name, value in make_model("fsdp2").state_dict().items()}
    output = DistributedOutput(tmp_path / "out", plan_of(tensors))
    write_pieces(output, tensors)
    output.commit()
    run_ranks(2, load_on_ranks, tmp_path / "out")


def test_what_is_given_up_leaves_the_old_folder(saved: Path) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    output = DistributedOutput(saved, plan_of({"a": torch.ones(4)}))
    write_pieces(output, {"a": torch.ones(4)})
    output.discard()
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert os.listdir(saved.parent) == ["saved"]
    output = DistributedOutput(saved, plan_of({"a": torch.ones(4)}))
    write_pieces(output, {"a": torch.ones(4)})
    output.commit()
    require_holds(DistributedCheckpoint(str(saved)), {"a": torch.ones(4)})
    shutil.rmtree(saved)


# All forms together


@pytest.mark.parametrize("out", ["out.pt", "out", "out.safetensors"])
def test_forms_are_averaged_together(tmp_path: Path, out: str) -> None:
    def state(value: float) -> dict[str, torch.Tensor]:
        tied = torch.full((3, 5), value).t()
        return {"a": tied, "b": torch.full((7,), -value, dtype=torch.bfloat16), "n": torch.tensor(4), "tied": tied}

    dcp.save({"model": state(1.0)}, checkpoint_id=tmp_path / "1")
    torch.save({"state_dict": state(2.0), "epoch": 3}, tmp_path / "2.ckpt")
    save_file({name: value.contiguous() for name, value in state(6.0).items()}, tmp_path / "3.safetensors")
    inputs = [str(tmp_path / name) for name in ("1", "2.ckpt", "3.safetensors")]
    average(inputs, str(tmp_path / out))
    expected = {name: value.contiguous() for name, value in state(3.0).items()}
    if out == "out":
        loaded = {name: torch.zeros_like(value) for name, value in expected.items()}
        dcp.load({"model": loaded}, checkpoint_id=tmp_path / out)  # as the first input was saved
    else:
        loaded = torch.load(tmp_path / out, weights_only=True) if out == "out.pt" else load_file(tmp_path / out)
    require_same(loaded, expected)


@pytest.mark.parametrize("form", ["pt", "dcp"])
def test_an_average_takes_neither_torch_nor_much_memory(tmp_path: Path, form: str) -> None:
    """Two inputs of 48 MB. The bar is 400 MB for inputs of any size; 30 MB are Python and numpy."""
    inputs = [str(tmp_path / f"{index}.{form}") for index in range(2)]
    for path in inputs:
        state = {"a": torch.zeros(12 << 20)}
        if form == "pt":
            torch.save(state, path)
        else:
            dcp.save(state, checkpoint_id=path)
    check = f"""
import sys
from swafast.files.averaging import average
average({inputs!r}, {str(tmp_path / ("out.pt" if form == "pt" else "out"))!r})
assert "torch" not in sys.modules
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
assert peak < 64 << 10, peak
"""
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[1], timeout=60)
