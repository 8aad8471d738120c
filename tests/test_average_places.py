"""Where averages of files are written: nothing else is lost, inputs that change are seen, and few files are open."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from swafast.files import average, descriptors
from swafast.files.checkpoints import RECORD_FILE
from swafast.terms import replacing
from tests.test_average_files import IMPORTED, sharded

ONE, TWO = {"a": np.full(3, 1, np.float32)}, {"a": np.full(3, 3, np.float32)}
FORMS = ["out.safetensors", "out.pt", "out", "distributed"]


def saved(folder: Path, form: str = "out") -> list[Path]:
    """Write two inputs: folders of torch.distributed.checkpoint for an output of this form."""
    paths = []
    for number, arrays in enumerate((ONE, TWO), 1):
        path = folder / f"m{number}.safetensors"
        save_file(arrays, path)
        if form == "distributed":
            from torch.distributed import checkpoint as dcp

            path = folder / f"m{number}"
            state = {name: torch.from_numpy(array) for name, array in arrays.items()}
            dcp.save(state, checkpoint_id=path)
        paths.append(path)
    return paths


def content(out: Path) -> dict[str, bytes]:
    files = out.rglob("*") if out.is_dir() else [out]
    return {str(file.relative_to(out.parent)): file.read_bytes() for file in files if file.is_file()}


def test_an_output_that_holds_an_input_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    average(saved(tmp_path), out)
    for number in (1, 2):
        shutil.copytree(out, out / f"checkpoint-{number}", ignore=shutil.ignore_patterns("checkpoint*"))
    before = content(out)
    inputs = [out / "checkpoint-1", out / "checkpoint-2"]
    with pytest.raises(FileExistsError, match=r"out must not hold an input, got .*out' with .*checkpoint-1: choose"):
        average(inputs, out, force=True)
    assert content(out) == before


@pytest.mark.parametrize("form", ["out", "distributed"])
def test_only_what_an_average_wrote_is_replaced(form: str, tmp_path: Path) -> None:
    paths, out = saved(tmp_path, form), tmp_path / form
    average(paths, out)
    average(paths[:1], out, force=True)
    assert set(json.loads((out / RECORD_FILE).read_text())["files"]) == set(os.listdir(out))
    (out / "notes.txt").write_text("mine")
    before = content(out)
    with pytest.raises(FileExistsError, match=r"only what an average has written, got .*with 'notes.txt': move"):
        average(paths, out, force=True)
    assert content(out) == before


@pytest.mark.parametrize("form", FORMS)
def test_what_appears_during_a_run_is_kept(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, out = saved(tmp_path, form), tmp_path / form

    def made(line: str) -> None:
        if not out.exists():
            average(paths[:1], out)

    with pytest.raises(FileExistsError, match=r"out must not exist"):
        average(paths, out, say=made)
    monkeypatch.setattr("swafast.files.averaging.check_place", lambda *arguments: None)  # it came after the check
    before = content(out)
    with pytest.raises(FileExistsError, match=r"somebody else has made meanwhile"):
        average(paths, out)
    assert content(out) == before
    assert not list(tmp_path.glob("*.unfinished"))


def test_what_appears_in_a_folder_that_is_replaced_is_kept(tmp_path: Path) -> None:
    paths, out = saved(tmp_path), tmp_path / "out"
    average(paths, out)
    with pytest.raises(FileExistsError, match=r"with 'notes.txt'"):
        average(paths, out, force=True, say=lambda line: (out / "notes.txt").write_text("mine"))
    assert (out / "notes.txt").read_text() == "mine"


def test_a_file_system_without_links_is_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(replacing.os, "link", refuse)
    average(saved(tmp_path), tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["a"].tolist() == [2, 2, 2]
    with pytest.raises(FileExistsError), replacing.replacing(tmp_path / "out.safetensors", new=True):
        pass


@pytest.mark.parametrize("form", ["out.pt", "out", "distributed"])
def test_an_input_that_is_written_in_place_is_seen(form: str, tmp_path: Path) -> None:
    paths, out = saved(tmp_path, form), tmp_path / form
    if form == "out.pt":
        torch.save({"a": torch.ones(3)}, tmp_path / "m.pt")
        paths[0] = tmp_path / "m.pt"
    file = next(paths[0].glob("*.distcp")) if paths[0].is_dir() else paths[0]

    def change(line: str) -> None:
        file.write_bytes(file.read_bytes())
        os.utime(file, ns=(0, 0))

    with pytest.raises(ValueError, match=rf"{file.name} has changed since its header was read"):
        average(paths, out, say=change)
    assert not list(tmp_path.glob(f"{form}*"))


def test_an_output_is_no_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(FileExistsError, match="must not be a device or a pipe that exists"):
        average(saved(tmp_path), tmp_path / "pipe.safetensors", force=True)


def test_the_space_is_that_of_a_links_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (asked.append(str(path)), usage(path))[1])
    (tmp_path / "other").mkdir()
    (tmp_path / "out.safetensors").symlink_to(tmp_path / "other" / "x.safetensors")
    average(saved(tmp_path), tmp_path / "out.safetensors", dry_run=True)
    assert asked == [str(tmp_path / "other")]


# Names


def test_the_files_of_a_folder_are_named_as_their_loader_looks_for_them(tmp_path: Path) -> None:
    for name, expected in (
        ("adapter_model.safetensors", "adapter_model"),
        ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model"),
        ("adapter_model.bin", "adapter_model"),
        ("pytorch_model.bin", "model"),
        ("other.safetensors", "model"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        arrays = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}
        if name.endswith(".bin"):
            torch.save({key: torch.from_numpy(array) for key, array in arrays.items()}, folder / name)
        else:
            save_file(arrays, folder / name)
        average([folder] * 2, tmp_path / f"{name}-out")
        assert (tmp_path / f"{name}-out" / f"{expected}.safetensors").exists()
        average([folder] * 2, tmp_path / f"{name}-shards", shard_size=12)
        names = {path.name for path in (tmp_path / f"{name}-shards").iterdir()}
        assert {f"{expected}.safetensors.index.json", f"{expected}-00002-of-00002.safetensors"} < names


def test_a_folder_with_an_index_and_one_file_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "h", {"a": np.zeros(1), "b": np.zeros(1)})
    save_file({"a": np.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors.index.json or model.safetensors, got both: name the file"):
        average([folder], tmp_path / "out")


def test_a_tied_name_is_never_written(tmp_path: Path) -> None:
    head, embedding = "lm_head.weight", "model.embed.weight"
    both = {head: ONE["a"], embedding: ONE["a"]}
    for place, arrays in enumerate((both, {embedding: TWO["a"]})):
        save_file(arrays, tmp_path / f"{place}.safetensors")
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for inputs in (paths, paths[::-1], paths[:1] * 2):
        average(inputs, tmp_path / "out.safetensors", tied={head: embedding}, force=True)
        assert set(load_file(tmp_path / "out.safetensors")) == {embedding}
    average(paths, tmp_path / "out.pt", tied={head: embedding})
    assert set(torch.load(tmp_path / "out.pt")) == {head, embedding}
    with pytest.raises(ValueError, match=r"tied must be of names in the inputs, got 'lm_haed', which no input has"):
        average(paths, tmp_path / "new.safetensors", tied={"lm_haed": embedding})


def test_a_name_that_safetensors_keeps_for_itself_is_refused(tmp_path: Path) -> None:
    save_file({"module.__metadata__": np.zeros(1), "module.a": np.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"no tensor of the name '__metadata__': write a .pt file"):
        average([tmp_path / "m.safetensors"], tmp_path / "out.safetensors", strip="module.")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


# Open files and interrupts


def test_hundreds_of_inputs_need_few_open_files(tmp_path: Path) -> None:
    paths = []
    for number in range(150):
        paths.append(tmp_path / f"{number:03}.safetensors")
        save_file({"a": np.full(3, number, np.float32), "b": np.zeros(3, np.float32)}, paths[-1])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + descriptors.MOST_OPEN + 20, before[1]))
    try:
        average(paths, tmp_path / "out.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert load_file(tmp_path / "out.safetensors")["a"].tolist() == [74.5] * 3
    assert len(os.listdir("/proc/self/fd")) <= used + 1
    assert not descriptors.InputFile._open


def test_a_damaged_input_is_closed(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    (tmp_path / "bad.pt").write_bytes(b"12345678")
    for name in ("bad.safetensors", "bad.pt"):
        with pytest.raises(ValueError, match="bad"):
            average([tmp_path / name], tmp_path / "out.safetensors")
    assert not descriptors.InputFile._open


SLOW = """
import signal, time
from swafast.terms import replacing
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its jobs in the background ignore it
real = replacing.shutil.rmtree
def slow(*arguments, **options):
    print("cleans", flush=True)
    time.sleep(0.3)
    real(*arguments, **options)
replacing.shutil.rmtree = slow
class Shown:
    def __init__(self, nbytes): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def advance(self, nbytes): pass
    def phase(self, label):
        print("ready", flush=True)
        time.sleep(9)
"""


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_a_second_ctrl_c_does_not_stop_the_clean_up(out: str, tmp_path: Path) -> None:
    paths = saved(tmp_path)
    call = f"average({list(map(str, paths))!r}, {str(tmp_path / out)!r}, progress=Shown)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{IMPORTED}{SLOW}{call}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleans\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


def test_a_handler_of_the_caller_is_left_alone(tmp_path: Path) -> None:
    seen: list[object] = []
    handlers: list[Callable[..., object] | int | None] = [signal.getsignal(signal.SIGINT)]
    try:
        signal.signal(signal.SIGINT, lambda *_: None)
        own = signal.getsignal(signal.SIGINT)
        average(saved(tmp_path), tmp_path / "out.safetensors", say=lambda line: seen.append(line))
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, handlers[0])
    average(saved(tmp_path), tmp_path / "out.safetensors", force=True)
    assert signal.getsignal(signal.SIGINT) is handlers[0]


# What is said


def test_a_prefix_that_is_nowhere_is_said(tmp_path: Path) -> None:
    paths, lines = saved(tmp_path), list[str]()
    torch.save({"module.a": torch.ones(3), "step": 1}, tmp_path / "m.pt")
    average([*paths, tmp_path / "m.pt"], tmp_path / "out.safetensors", strip="module.", say=lines.append)
    said = [line for line in lines if "no name begins with 'module.'" in line]
    assert [line.partition(":")[0] for line in said] == list(map(str, paths))


@pytest.mark.parametrize("parts", [["consolidated.safetensors"], ["part1.safetensors", "part2.safetensors"]])
def test_a_model_with_further_files_is_one_checkpoint(parts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "h"
    folder.mkdir()
    if len(parts) == 1:
        save_file(ONE, folder / "model.safetensors")
        save_file(ONE, folder / parts[0])
    else:
        for key, name in zip("ab", parts, strict=True):
            save_file({key: ONE["a"]}, folder / name)
        weight_map = dict(zip("ab", parts, strict=True))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    average(folder, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("is_listed", [False, True])
def test_the_configuration_of_the_last_input_is_copied(name: str, is_listed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "h"
    arrays = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}
    if name.endswith(".index.json"):
        sharded(folder, arrays)
    else:
        folder.mkdir()
    if name.endswith(".bin"):
        torch.save({key: torch.from_numpy(array) for key, array in arrays.items()}, folder / name)
    elif name == "model.safetensors":
        save_file(arrays, folder / name)
    beside = {"config.json", "source.spm", "target.spm", "bpe.codes", "vocab.bpe"}
    for other in (*beside, "optimizer.pt"):
        (folder / other).write_text("{}")
    average([folder / name if is_listed else folder] * 2, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == beside | {"model.safetensors", RECORD_FILE}


def test_a_file_of_another_name_has_no_configuration_and_this_is_said(tmp_path: Path) -> None:
    paths, lines = saved(tmp_path), list[str]()
    (tmp_path / "mine.py").write_text("")
    average(paths, tmp_path / "out", say=lines.append)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", RECORD_FILE}
    assert any("copied no configuration" in line for line in lines)
