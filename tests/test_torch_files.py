"""Files of ``torch.save``: read and written without torch, and what torch then makes of them."""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from swafast import FusedAveragedModel
from swafast.files import archives, average, entries, strided, written_pickles
from swafast.files.archives import PartialChecksum
from swafast.files.checkpoints import OutputPlan
from swafast.files.opening import open_checkpoint
from swafast.files.torch_files import TorchCheckpoint, TorchOutput
from swafast.strict import pickles
from swafast.terms import formats
from swafast.torch_private import pickled as names
from tests.checkpoint_io import Exploit, plan_of, read_whole, require_holds, require_unharmed, write_pieces
from tests.support import EveryKind

ORACLES = Path(__file__).parent / "oracles" / "checkpoints.zip"


def tensors() -> dict[str, torch.Tensor]:
    """Return tensors of every dtype and of every way to lie in a storage."""
    base = torch.randn(6, 5, 4)
    return {
        "plain": torch.randn(3, 5),
        "transposed": torch.randn(7, 300).t(),
        "channels last": torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last),
        "expanded": torch.randn(5, 1).expand(5, 9),
        "expanded rows": torch.randn(6).expand(4, 6),
        "a part": base[1:4, ::2, 1],
        "another part": base[2],
        "far apart": torch.randn(2000)[::50],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "param": nn.Parameter(torch.randn(2)),
        **{
            str(dtype): torch.arange(5).to(dtype)
            for dtype in (
                *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
                *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64),
                *(torch.float8_e4m3fn, torch.float8_e5m2),
            )
        },
    }


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "a.pt")


# Reading


def test_every_dtype_and_layout_is_read_right(path: str) -> None:
    expected = tensors()
    torch.save(expected, path)
    require_holds(TorchCheckpoint(path), expected)


@pytest.mark.parametrize(("block", "read"), [(1 << 20, 4096), (64, 8), (256, 1 << 20), (8, 1)])
def test_strides_of_every_kind_are_read_right(
    path: str, block: int, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines that lie apart, together, inside one another and one on another, in blocks of any size."""
    monkeypatch.setattr(strided, "_BLOCK_NBYTES", block)
    monkeypatch.setattr(strided, "_READ_NBYTES", read)
    random = Random(3)
    expected = {}
    for index in range(60):
        sizes = [random.choice((1, 2, 3, 7, 20)) for _ in range(random.randrange(4))]
        strides = [random.choice((0, 1, 2, 7, 31, 300)) for _ in sizes]
        storage = torch.randn(7000, dtype=random.choice((torch.float32, torch.float64, torch.bfloat16)))
        expected[str(index)] = storage.as_strided(sizes, strides, random.randrange(50))
    torch.save(expected, path)
    checkpoint = TorchCheckpoint(path)
    whole = {name: torch.empty(view.shape, dtype=view.dtype).copy_(view) for name, view in expected.items()}
    require_holds(checkpoint, whole, (11, 1 << 17))


def test_lines_that_lie_apart_take_few_reads(path: str) -> None:
    """A column needs a read for each block of 1 MB, and not one for each element."""
    torch.save({"a": torch.randn(50_000, 20)[:, 3], "b": torch.randn(300, 200, 9).transpose(1, 2)}, path)
    checkpoint = TorchCheckpoint(path)
    for name in checkpoint.specs:
        region, reads = checkpoint._regions[name], []
        counted = replace(region, read_at=lambda offset, into, reads=reads: reads.append(len(into)))
        counted.read_run(0, 50_000, memoryview(bytearray(200_000)))
        assert len(reads) <= 5
        assert max(reads) <= 1 << 20


@pytest.mark.parametrize(
    ("name", "plant"),
    {
        "transposed": lambda view: view._replace(strides=strided.row_major(view.sizes)),
        "a part": lambda view: view._replace(offset=0),
        "expanded": lambda view: view._replace(strides=tuple(max(stride, 1) for stride in view.strides)),
    }.items(),
    ids=("transposed", "a part", "expanded"),
)
def test_planted_wrong_views_are_seen(path: str, name: str, plant: Callable[[Any], Any]) -> None:
    expected = tensors()
    torch.save(expected, path)
    checkpoint = TorchCheckpoint(path)
    region = checkpoint._regions[name]
    view = pickles.StridedView("0", "float32", region.offset // 4, region.sizes, region.strides)
    wrong = plant(view)
    checkpoint._regions[name] = strided.Region(region.read_at, wrong.offset * 4, 4, wrong.sizes, wrong.strides)
    with pytest.raises((AssertionError, ValueError)):
        require_holds(checkpoint, expected)


def test_tied_tensors_become_aliases(path: str) -> None:
    model = EveryKind()
    torch.save(model.state_dict(), path)
    checkpoint = TorchCheckpoint(path)
    assert checkpoint.aliases == {"tied.weight": "linear.weight"}
    require_holds(checkpoint, model.state_dict())


@pytest.mark.parametrize(
    ("saved", "key", "names"),
    [
        ({"state_dict": {"b": 1.0}, "model": {"c": 1.0}, "state_dict_ema": {"a": 1.0}}, None, ["a"]),
        ({"module": {"d": 1.0}, "model": {"version": 1}}, None, ["d"]),
        ({"model_state_dict": {"d": 1.0}, "optimizer_state_dict": {"e": 1.0}, "epoch": 1.0}, None, ["d"]),
        ({"module": {"d": 1.0}, "model": {"c": 1.0}}, "module", ["d"]),
        ({"model": 3, "module": {"d": 1.0}}, None, ["d"]),
        ({"a": 1.0, "model.b": 1.0}, None, ["a", "model.b"]),
        ({"n_averaged": 3.0, "module.a": 1.0, "remainder.b": 1.0}, None, ["a"]),
        ({"state": {"ema": {"a": 1.0}}, "model": {"c": 1.0}}, "state.ema", ["a"]),
        ({"state.ema": {"a": 1.0}, "state": {"ema": {"b": 1.0}}}, "state.ema", ["a"]),
        ({"state": {"em.a": {"b": 1.0}}}, "state.em.a", ["b"]),
        ({"module.a": 1.0, "modules": 1.0}, "module", ["a"]),
    ],
)
def test_the_part_that_is_averaged(path: str, saved: Any, key: str | None, names: list[str]) -> None:
    def as_tensors(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: as_tensors(entry) for name, entry in value.items()}
        return torch.tensor(value) if isinstance(value, float) else value

    torch.save(as_tensors(saved), path)
    assert list(TorchCheckpoint(path, key=key).specs) == names


@pytest.mark.parametrize("keys", list(itertools.combinations(entries.PARTS, 2)))
def test_a_file_with_several_states_is_not_guessed_at(path: str, keys: tuple[str, str]) -> None:
    torch.save({key: {"a": torch.tensor(float(place))} for place, key in enumerate(reversed(keys))}, path)
    words = f"key must say which of the states in {path} is averaged, got none for {keys[0]!r}, {keys[1]!r}: pass "
    with pytest.raises(ValueError, match=re.escape(words)):
        TorchCheckpoint(path)
    assert [*TorchCheckpoint(path, key=keys[1]).specs] == ["a"]
    state = {"a": torch.ones(1)}
    torch.save(dict.fromkeys(keys, state), path)  # the same under two names
    assert [*TorchCheckpoint(path).specs] == ["a"]


def test_what_is_chosen_and_left_out_is_said(path: str) -> None:
    torch.save({"model": {"module.a": torch.ones(1), "version": 3}, "epoch": 1, "optimizer": {}}, path)
    checkpoint = TorchCheckpoint(path, strip="module.")
    assert list(checkpoint.specs) == ["a"]
    assert checkpoint.notes == [
        f"{path}: averaging 'model', without 'epoch', 'optimizer'",
        f"{path}: left out 'version', which are no tensors",
    ]
    for key in ("optimizer", "models", "epoch"):
        with pytest.raises(ValueError, match=rf"a.pt.*{key}|a.pt.*must hold tensors by name"):
            TorchCheckpoint(path, key=key)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (
            None,
            "must hold tensors by name, got 'state', 'epoch': pass key='state.net' or 'state.ema' (--key state.net)",
        ),
        ("state", "must hold tensors by name, got 'net', 'optimizer', 'ema' and 1 more: pass key='state.net'"),
        ("state.nett", "got 'state.nett': pass key='state.net'"),
        ("optimizer", "got 'optimizer': pass key='state.net'"),
        ("state.optimizer", "got 'state', 'param_groups': pass key='state.net'"),
    ],
)
def test_the_dicts_that_hold_tensors_are_named_however_nested(path: str, key: str | None, words: str) -> None:
    one, moments = {"a": torch.ones(1)}, {0: {"exp_avg": torch.ones(1)}}
    state: dict[str, Any] = {"net": one, "optimizer": {"state": moments, "param_groups": []}, "ema": {**one}}
    state["itself"] = state
    torch.save({"state": state, "epoch": 1}, path)
    with pytest.raises(ValueError, match=re.escape(words)):
        TorchCheckpoint(path, key=key)


def test_a_key_where_none_is_needed(path: str) -> None:
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="got 'model': it holds tensors itself: pass no key"):
        TorchCheckpoint(path, key="model")


def test_a_prefix_that_no_name_has_is_said(path: str, tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1)}, path)
    save_file({"module.a": torch.ones(1)}, tmp_path / "a.safetensors")
    for each in (path, str(tmp_path / "a.safetensors")):
        for strip, notes in (("modul.", [f"{each}: no name begins with 'modul.'"]), ("module.", [])):
            opened = open_checkpoint(each, key=None, strip=strip, allow=())
            assert getattr(opened, "notes", None) == notes
            opened.close()


def test_two_names_must_not_become_one(path: str) -> None:
    torch.save({"module.a": torch.ones(1), "a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"strip must leave different names in .*a.pt, got two 'a'"):
        TorchCheckpoint(path, strip="module.")


def test_checkpoints_of_other_packages(tmp_path: Path) -> None:
    with zipfile.ZipFile(ORACLES) as packed:
        packed.extractall(tmp_path)
    for file, name, part in (("lightning.ckpt", "lightning", "state_dict"), ("last.pth.tar", "timm", "state_dict_ema")):
        checkpoint = TorchCheckpoint(str(tmp_path / file))
        require_holds(checkpoint, load_file(tmp_path / "expected" / f"{name}.safetensors"))
        assert checkpoint.notes[0].startswith(f"{tmp_path / file}: averaging {part!r}, without 'epoch'")
        assert checkpoint.module_versions["net.1" if name == "lightning" else "1"] == {"version": 2}


def test_a_sharded_folder_of_transformers_is_averaged_into_one_alike(tmp_path: Path) -> None:
    with zipfile.ZipFile(ORACLES) as packed:
        packed.extractall(tmp_path)
    expected = load_file(tmp_path / "expected" / "transformers.safetensors")
    average([tmp_path / "transformers"] * 2, tmp_path / "out", shard_size=4096)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    got = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert len(shards) > 1
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "transformers" / "config.json").read_bytes()
    require_holds(open_checkpoint(str(tmp_path / "out"), key=None, strip=None, allow=()), expected)


# What is refused


def save_exploit(path: str) -> None:
    torch.save({"extra": Exploit(), "model": {"a": torch.ones(2)}}, path)


def save_as(pickled: bytes) -> Callable[[str], None]:
    def save(path: str) -> None:
        torch.save({"a": torch.ones(2)}, path)
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in records.items():
                archive.writestr(name, pickled if name.endswith("data.pkl") else data)

    return save


def save_compressed(path: str) -> None:
    torch.save({"a": torch.ones(20)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def rebuilt(offset: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    view = written_pickles.view_to_pickle("0", "F32", (2,))
    assert view.args is not None
    return written_pickles.pickled(
        {"a": written_pickles.Call(view.name, (view.args[0], offset, sizes, strides, False, {}))}
    )


def save_legacy(path: str) -> None:
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def save_cut(path: str) -> None:
    torch.save({"a": torch.ones(2000)}, path)
    os.truncate(path, 5000)


def written(data: bytes) -> Callable[[str], object]:
    return lambda path: Path(path).write_bytes(data)


def saved(value: Any) -> Callable[[str], None]:
    return lambda path: torch.save(value, path)


def save_overlapping(path: str) -> None:
    """Have the second storage where the first one is."""
    torch.save({"a": torch.ones(2), "b": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"a/data/{key}").header_offset for key in (0, 1))
    data = bytearray(Path(path).read_bytes())
    at = data.rindex(b"PK\1\2", 0, data.rindex(b"a/data/1"))
    assert struct.unpack_from("<I", data, at + 42) == (second,)
    struct.pack_into("<I", data, at + 42, first)
    Path(path).write_bytes(data)


def save_flipped(path: str) -> None:
    torch.save({"a": torch.ones(2)}, path)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data.replace(b"cpu", b"gpu", 1))


def save_average(path: str) -> None:
    averaged = FusedAveragedModel(model := nn.Linear(2, 2).bfloat16(), format="exact")
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), path)


def in_place_of_sizes(value: bytes) -> bytes:
    """Return the pickle of a tensor with another value where its sizes are."""
    data = rebuilt(0, (2,), (1,))
    sizes = pickle.MARK + b"\x8a\x01\x02" + pickle.TUPLE
    assert data.count(sizes) == 1
    return data.replace(sizes, value)


#: A pair in a pair, and so on: its text and its hash end never. And tuples in tuples, more than the stack holds.
ENDLESS = b"K\1" + b"2\x86" * 40
DEEP = b")" + b"\x85" * 200_000
#: Gives our function for tensors other defaults.
CHANGED_FUNCTION = b"\x80\x02}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\0\0\0__defaults__(K\1tstbs."
LONG_MEMO = b"\x80\x02}r\xff\xff\xff\x7f."  # asks C's unpickler for 32 GB
BYTEARRAY = b"\x80\x05\x96\x00\x00\x00\x00\x20\x00\x00\x00."  # 128 GB

REFUSED: dict[str, tuple[Callable[[str], object], str]] = {
    "a command": (save_exploit, r"got the global 'posix.system'.*allow=\['posix.system'\]"),
    "a pickle that is no zip": (written(pickle.dumps(Exploit())), "must be a file of torch.save, got .* begins with"),
    "an old file": (save_legacy, r"torch 1.6 or later, got an older one.*torch.save\(torch.load\(path, weights_only=T"),
    "a cut file": (save_cut, "a.pt is damaged: it is not a whole archive"),
    "text": (written(b"hello"), "must be a file of torch.save, got one that begins with b'hell'"),
    "nothing": (written(b""), "must be a file of torch.save"),
    "compressed": (save_compressed, "got a/data.pkl compressed: save it anew"),
    "a whole model": (
        saved(nn.Linear(2, 2)),
        r"global 'torch.nn.modules.linear.Linear', .*: save model.state_dict",
    ),
    "a tensor": (saved(torch.ones(2)), "must hold a state dict, got StridedView: save model.state_dict()"),
    "no tensors": (saved({"epoch": 1}), "must hold tensors by name, got 'epoch'"),
    "another dict": (saved({"net": {"a": torch.ones(1)}}), r"got 'net': pass key='net' \(--key net\)"),
    "sparse": (saved({"a": torch.eye(2).to_sparse()}), "dense tensors, got for 'a' one of .*_rebuild_sparse_tensor"),
    "conjugated": (saved({"a": torch.ones(2, dtype=torch.complex64).conj()}), r"for 'a' .*resolve_conj\(\)"),
    "complex128": (
        saved({"a": torch.ones(2, dtype=torch.complex128)}),
        "dtypes that safetensors has, got ComplexDouble",
    ),
    "a view past its storage": (save_as(rebuilt(1, (2,), (1,))), "'a' is damaged: its storage has 8 bytes"),
    "strides past its storage": (save_as(rebuilt(0, (2,), (1 << 61,))), "'a' is damaged: its storage has 8 bytes"),
    "a negative offset": (
        save_as(rebuilt(-1, (2,), (1,))),
        "is damaged: its pickle cannot be read .* no sizes, strides and offset that",
    ),
    "a long memo": (save_as(LONG_MEMO), "must hold tensors by name, got nothing"),
    "a large bytearray": (save_as(BYTEARRAY), "is damaged: its pickle cannot be read"),
    "records that overlap": (save_overlapping, "is damaged: its records overlap"),
    "a flipped byte in the pickle": (save_flipped, "a/data.pkl is cut, or differs from its checksum"),
    "an average in two planes": (save_average, "whole averages, got 'module.weight' .* 'remainder.weight': .*combine"),
    "a tensor under a number": (saved({"a": torch.ones(1), 0: torch.ones(2)}), "by name, got one whose key is no text"),
    "endless sizes": (save_as(in_place_of_sizes(ENDLESS)), "no sizes, strides and offset"),
    "huge sizes": (save_as(rebuilt(0, (1 << 61,) * 40, (0,) * 40)), "no sizes, strides and offset"),
    "an endless key": (save_as(b"\x80\x02}" + ENDLESS + b"Ns."), "a dict has nested tuples for keys"),
    "a deep key": (save_as(b"\x80\x02}" + DEEP + b"Ns."), "a dict has nested tuples for keys"),
    "deep keys": (save_as(b"\x80\x02}(" + DEEP + b"Nu."), "a dict has nested tuples for keys"),
    "a deep key of an old dict": (save_as(b"\x80\x02(" + DEEP + b"Nd."), "a dict has nested tuples for keys"),
    "a deep key in a call": (
        save_as(b"\x80\x02ccollections\nOrderedDict\n(](" + DEEP + b"K\1\x86etR."),
        r"cannot be read \(TypeError\)",
    ),
    "a deep item of a set": (save_as(b"\x80\x04\x8f(" + DEEP + b"\x90."), "must hold a state dict"),
    "a deep item of a frozen set": (save_as(b"\x80\x04(" + DEEP + b"\x91."), "must hold a state dict"),
    "an endless storage": (save_as(b"\x80\x02" + ENDLESS + b"Q."), "its pickle cannot be read"),
    "a missing memo": (save_as(b"\x80\x02h\x05."), "its pickle cannot be read"),
    "a long name": (save_as(b"\x80\x02ca\n" + b"b" * 1000 + b"\n."), "one of more than 300 characters"),
    "many names": (save_as(b"\x80\x02" + b"".join(b"ctorch\nint%d\n" % i for i in range(1001)) + b"."), "1,000 names"),
    "another function": (save_as(CHANGED_FUNCTION), "it changes an object that has no state"),
    "an old file of protocol 4": (
        lambda path: torch.save({}, path, _use_new_zipfile_serialization=False, pickle_protocol=4),
        "torch 1.6 or later, got an older one",
    ),
    "half a pickle": (save_as(b"\x80\x02}("), "is damaged: its pickle cannot be read"),
}


@pytest.mark.parametrize(("save", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(
    path: str, save: Callable[[str], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(path)
    with pytest.raises(ValueError, match=message) as caught:
        TorchCheckpoint(path)
    assert path in str(caught.value)
    require_unharmed(tmp_path)


def test_allowed_globals_are_not_run_either(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_exploit(path)
    checkpoint = TorchCheckpoint(path, allow=["posix.system"])
    require_holds(checkpoint, {"a": torch.ones(2)})
    require_unharmed(tmp_path)
    with pytest.raises(ValueError, match=r"global 'posix.system'"):
        TorchCheckpoint(path, allow=["posix", "system", "builtins.eval"])


def test_a_planted_unpickler_that_imports_is_seen(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pickles._Unpickler, "find_class", pickle._Unpickler.find_class)
    save_exploit(path)
    with pytest.raises(ValueError, match="damaged"):  # torch's storages have no name of ours
        TorchCheckpoint(path)
    with pytest.raises(AssertionError):
        require_unharmed(tmp_path)


def test_a_pickle_cannot_change_what_was_read(path: str) -> None:
    """A pickle may set attributes of what it made: of a tensor, and of the dict whose items are read."""
    view = written_pickles.view_to_pickle("0", "F32", (2,))
    body = written_pickles.pickled({"a": view})[2:-1]
    changed = b"\x80\x02" + body[:-1] + b"}X\x06\0\0\0offsetK\x07sbu."  # BUILD on the tensor
    save_as(changed)(path)
    with pytest.raises(ValueError, match="damaged"):
        TorchCheckpoint(path)
    state = {"items": 3, "keys": 3, "get": 3, names.MODULE_VERSIONS: {"a": {"version": "x"}, "b": 3}}
    save_as(written_pickles.pickled(written_pickles.Call(("collections", "OrderedDict"), (), {"a": view}, state)))(path)
    checkpoint = TorchCheckpoint(path)
    require_holds(checkpoint, {"a": torch.ones(2)})
    assert checkpoint.module_versions == {}


def test_bytes_that_go_missing_while_it_is_open_are_seen(path: str) -> None:
    torch.save({"a": torch.ones(2000)}, path)
    checkpoint = TorchCheckpoint(path)
    os.truncate(path, 2000)
    with pytest.raises(ValueError, match=r"a.pt has changed since its header was read"):
        read_whole(checkpoint, "a")


def test_records_without_checksums_are_read(path: str) -> None:
    """As ``torch.serialization.set_crc32_options(False)`` writes them: torch 2.6 has no such option."""
    torch.save(expected := {"a": torch.randn(5)}, path)
    with zipfile.ZipFile(path) as archive:
        checksums = {struct.pack("<I", info.CRC) for info in archive.infolist()}
    data = Path(path).read_bytes()
    for checksum in checksums:
        data = data.replace(checksum, bytes(4))
    Path(path).write_bytes(data)
    require_holds(TorchCheckpoint(path), expected)


def test_a_pickle_has_not_endless_opcodes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2)}, path)
    monkeypatch.setattr(pickles._Opcodes, "left", 20)
    with pytest.raises(ValueError, match=r"damaged: .* opcodes"):
        TorchCheckpoint(path)


def test_tensors_beside_the_state_do_not_matter(path: str) -> None:
    """Conjugated ones too, and those under numbers, which are said."""
    conjugated = torch.ones(2, dtype=torch.complex64).conj()
    torch.save({"model": {"a": torch.ones(1), 3: "x"}, "other": conjugated, 0: torch.ones(1), (1, 2): 3}, path)
    checkpoint = TorchCheckpoint(path)
    require_holds(checkpoint, {"a": torch.ones(1)})
    without, left_out = checkpoint.notes
    assert without.endswith("averaging 'model', without 'other', 0, tuple")
    assert left_out.endswith("left out 3, which are no tensors")


def test_names_beside_a_dict_of_their_prefix_are_said(path: str) -> None:
    torch.save({"a.w": torch.ones(1), "a": {"v": torch.ones(2)}}, path)
    checkpoint = TorchCheckpoint(path, key="a")
    assert list(checkpoint.specs) == ["v"]
    assert checkpoint.notes[0].endswith("averaging 'a', without 'a.w'")
    torch.save({"a": {"b": {"w": torch.ones(1)}}, "a.b": {"v": torch.ones(2)}}, path)
    checkpoint = TorchCheckpoint(path, key="a.b")
    assert list(checkpoint.specs) == ["v"]
    assert checkpoint.notes[0].endswith("averaging 'a.b', without 'a'")


@pytest.mark.parametrize(
    ("files", "opened"),
    [
        (["pytorch_model-00001-of-00002.bin"], None),
        (["optimizer.pt", "pytorch_model-00001-of-00002.bin"], None),
        (["optimizer.pt"], None),
        (["training_args.bin"], None),
        (["pytorch_model-00001-of-00001.bin"], "pytorch_model-00001-of-00001.bin"),
        (["model.pt", "optim.pt"], "model.pt"),
    ],
)
def test_a_folder_is_read_only_if_a_file_has_all_weights(tmp_path: Path, files: list[str], opened: str | None) -> None:
    for name in files:
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    if opened is not None:
        assert open_checkpoint(str(tmp_path), key=None, strip=None, allow=()).path == str(tmp_path / opened)
        return
    with pytest.raises(ValueError, match=rf"must hold one file with all weights, got {files[0]}"):
        open_checkpoint(str(tmp_path), key=None, strip=None, allow=())


def test_the_planes_of_formats_are_known() -> None:
    assert entries.PLANES == formats.EXTRA_PLANES


# Writing


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_loads_what_is_written(path: str, mmap: bool) -> None:
    expected = {name: tensor.contiguous() for name, tensor in tensors().items()}
    output = TorchOutput(path, plan_of(expected, {"tied": "plain"}, swafast='{"inputs": 2}'))
    assert not os.path.exists(path)
    write_pieces(output, expected)
    output.commit()
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert loaded["tied"].data_ptr() == loaded["plain"].data_ptr()
    assert loaded.swafast_metadata == {"swafast": '{"inputs": 2}'}
    checkpoint = TorchCheckpoint(path)
    assert (checkpoint.aliases, checkpoint.metadata) == ({"tied": "plain"}, {"swafast": '{"inputs": 2}'})
    require_holds(checkpoint, {**expected, "tied": expected["plain"]})
    require_holds(checkpoint, loaded, (1 << 17,))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert os.listdir(os.path.dirname(path)) == ["a.pt"]


def test_a_model_loads_it_with_the_versions_of_its_modules(path: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    torch.save({"model": nn.ModuleDict({"module": model}).state_dict()}, path)
    checkpoint = TorchCheckpoint(path, strip="module.")
    state = model.state_dict()
    output = TorchOutput(path, OutputPlan(list(checkpoint.specs.values()), {}, {}), checkpoint)
    write_pieces(output, state)
    output.commit()
    loaded = torch.load(path, weights_only=True)
    assert loaded._metadata == state._metadata  # type: ignore[attr-defined]
    model.load_state_dict(loaded)


def test_what_is_given_up_leaves_nothing(path: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path)
    before = Path(path).read_bytes()
    output = TorchOutput(path, plan_of({"a": torch.ones(4)}))
    write_pieces(output, {"a": torch.ones(4)})
    output.discard()
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]
    assert Path(path).read_bytes() == before


def test_bytes_that_were_not_written_are_seen(path: str) -> None:
    output = TorchOutput(path, plan_of({"a": torch.ones(4)}))
    output.write("a", 0, memoryview(bytes(8)))
    with pytest.raises(AssertionError, match="bytes 8 to 16 were not written"):
        output.commit()
    output.discard()
    assert not os.path.exists(path)


def test_checksums_of_parts() -> None:
    data = os.urandom(10_007)
    for cuts in ([0, 10_007], [0, 1, 1, 9_000, 10_007], [*range(0, 10_007, 500), 10_007]):
        checksum = PartialChecksum()
        for start, stop in sorted(itertools.pairwise(cuts), key=lambda cut: -cut[1]):
            checksum.add(start, memoryview(data)[start:stop])
        assert checksum.value(len(data)) == zlib.crc32(data)
    checksum.add(3, memoryview(b"again"))
    with pytest.raises(AssertionError):
        checksum.value(len(data))


def test_a_planted_wrong_checksum_is_seen(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_power_of_x", lambda exponent: 1 << 31)
    with pytest.raises(AssertionError):
        test_checksums_of_parts()


def test_large_files_need_neither_memory_nor_torch(tmp_path: Path) -> None:
    """A sparse file of 6 GB, of which the last tensor is read, in a process that has no torch and 100 MB."""
    check = f"""
import os, resource, sys
sys.modules["torch"] = None
resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
from swafast.files.checkpoints import OutputPlan, TensorSpec
from swafast.files.torch_files import TorchCheckpoint, TorchOutput
from swafast.torch_private import pickled as names
from swafast.files import archives
archives.PartialChecksum.value = lambda self, nbytes: 0
path = {str(tmp_path / "large.pt")!r}
specs = [TensorSpec("large", "F32", (1500, 1 << 20)), TensorSpec("small", "F32", (2,))]
output = TorchOutput(path, OutputPlan(specs, {{}}, {{}}))
output.write("small", 0, memoryview(b"12345678"))
output.commit()
checkpoint = TorchCheckpoint(path)
got = bytearray(8)
checkpoint.read_into("small", 0, memoryview(got))
assert got == b"12345678", got
assert checkpoint.specs["large"].shape == (1500, 1 << 20)
"""
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[1], timeout=60)
    loaded = torch.load(tmp_path / "large.pt", weights_only=True, mmap=True)
    assert bytes(loaded["small"].view(torch.uint8).tolist()) == b"12345678"


def test_what_plain_values_hold_no_matter(path: str) -> None:
    """Values beside the state need no permission: of the dicts and arguments that training scripts keep."""
    kept = {"args": argparse.Namespace(lr=0.1), "root": Path("x"), "set": {1}, "complex": 1j, "bytes": b"x"}
    torch.save({"state_dict": {"a": torch.ones(2)}, **kept, "dtype": torch.float32, "size": torch.Size([3])}, path)
    require_holds(TorchCheckpoint(path), {"a": torch.ones(2)})


@pytest.mark.parametrize("is_first_tied", [True, False])
def test_tensors_that_are_tied_in_one_input_alone_keep_both_values(tmp_path: Path, is_first_tied: bool) -> None:
    both = torch.full((2,), 2.0)
    torch.save({"a": both, "b": both}, tmp_path / "tied.pt")
    torch.save({"a": torch.full((2,), 1.0), "b": torch.full((2,), 10.0)}, tmp_path / "untied.pt")
    inputs = [str(tmp_path / f"{name}.pt") for name in ("tied", "untied")]
    average(inputs if is_first_tied else inputs[::-1], str(tmp_path / "out.pt"), say=lambda line: None)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {name: value.tolist() for name, value in found.items()} == {"a": [1.5, 1.5], "b": [6.0, 6.0]}
