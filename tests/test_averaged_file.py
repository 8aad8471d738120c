"""One file of an averaged model: it comes back bit for bit, a flipped bit is found, and a kill leaves it whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import swafast
from swafast import ExponentialAverage, FusedAveragedModel, FusedAverages, ShardedAveragedModel
from swafast.terms.replacing import replacing
from tests.support import EveryKind, differing, drift, limited_files, refused, tensors_in, trained, update

RULES = {"fast": ExponentialAverage(0.5), "slow": ExponentialAverage(0.9)}
FORMATS = [None, "float32", "exact", "mirrored", "compact", "compensated", "half"]


class Stateful(nn.Linear):
    """Has an extra state, by default of JSON."""

    def __init__(self, extra: Any = None) -> None:
        super().__init__(2, 2)
        self.extra = {"steps": [1, 2.5, None, "é\x1f"]} if extra is None else extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def every_kind(dtype: torch.dtype) -> EveryKind:
    model = EveryKind().to(dtype)
    model.add_module("stateful", Stateful())
    model.register_buffer("whole", torch.randn(4, 4, dtype=torch.complex64))
    model.register_buffer("part", model.get_buffer("whole")[1:])
    model.register_parameter("two_words", nn.Parameter(torch.randn(3, dtype=torch.complex128)))
    return model


@pytest.mark.filterwarnings("ignore:format='half'")
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_comes_back_bit_for_bit(several: bool, format: str | None, tmp_path: Path) -> None:
    model = every_kind(torch.bfloat16 if format is None else torch.float32)

    def make() -> FusedAveragedModel | FusedAverages:
        return FusedAverages(model, rules=RULES, format=format) if several else FusedAveragedModel(model, format=format)

    averaged, other = make(), make()
    for _ in range(3):
        drift(model)
        averaged.update_parameters(model)
    for module in averaged.modules():
        if isinstance(module, Stateful):
            module.extra = {"steps": [3]}
    swafast.save(averaged, tmp_path / "averaged.safetensors")
    swafast.load(other, str(tmp_path / "averaged.safetensors"))
    state, loaded = averaged.state_dict(), other.state_dict()
    assert differing(tensors_in(state), tensors_in(loaded)) == []
    extra = [key for key in state if key.endswith("_extra_state")]
    assert {key: loaded[key] for key in extra} == {key: {"steps": [3]} for key in extra}
    for each in other.values() if several else [other]:
        assert int(each.n_averaged) == 3
        assert each.module.tied.weight is each.module.linear.weight


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_a_file_of_another_format_is_converted_and_others_can_read_it(source: torch.dtype, tmp_path: Path) -> None:
    averaged = trained(EveryKind(), source)
    swafast.save(averaged, tmp_path / "file")
    other = FusedAveragedModel(EveryKind().half(), rule=ExponentialAverage(0.5))
    swafast.load(other, tmp_path / "file")
    params = {name for name, _ in averaged.module.named_parameters()}
    exports = [each.averaged_state_dict() for each in (averaged, other)]
    assert differing(*({name: export[name] for name in params} for export in exports)) == []
    read = load_file(tmp_path / "file")
    assert differing(read, {key: averaged.state_dict()[key] for key in read}) == []
    assert averaged.state_dict().keys() - read.keys() == {"module.tied.weight"}


def test_versions_of_modules_are_kept(tmp_path: Path) -> None:
    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            assert metadata.get("version") == 7
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    averaged = FusedAveragedModel(Versioned(2, 2))
    swafast.save(averaged, tmp_path / "file")
    swafast.load(averaged, tmp_path / "file")


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, FusedAveragedModel]:
    """Return a small file, and an average of other values that fits it."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).bfloat16()
    averaged = FusedAveragedModel(model)
    averaged.update_parameters(model)
    swafast.save(averaged, tmp_path / "file")
    drift(model)
    averaged.update_parameters(model)
    return tmp_path / "file", averaged


def test_a_flipped_bit_is_found_wherever_it_is(file: tuple[Path, FusedAveragedModel]) -> None:
    path, averaged = file
    good = path.read_bytes()
    keys = tensors_in(averaged.state_dict())
    head = 8 + int.from_bytes(good[:8], "little")
    draw = random.Random(0)
    # Half of the flips in the header, half in the values, which are shorter.
    places = [draw.randrange(*((0, head) if i % 2 else (head, len(good)))) for i in range(200)]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        named = "its (header|metadata)" if place < head else f"the values of '({'|'.join(keys)})' have"
        with refused(ValueError, rf"must be what swafast.save has written, but {named}", averaged):
            swafast.load(averaged, path)
    path.write_bytes(good)
    swafast.load(averaged, path)
    assert int(averaged.n_averaged) == 1


def test_a_file_that_is_too_short_or_too_long_is_refused(file: tuple[Path, FusedAveragedModel]) -> None:
    path, averaged = file
    good = path.read_bytes()
    for bad in (b"", good[:7], good[:100], good[:-1], good + b"\0", good[: len(good) // 2]):
        path.write_bytes(bad)
        with refused(ValueError, "its header is not that of a whole file", averaged):
            swafast.load(averaged, path)


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path, draw = tmp_path / "file", random.Random(0)
    averaged = FusedAveragedModel(nn.ParameterList([nn.Parameter(torch.zeros(2000)) for _ in range(4)]))
    swafast.save(averaged, path)

    def write(number: int) -> None:
        for value in averaged.state_dict().values():
            value.fill_(number)
        swafast.save(averaged, path)

    seen = set()
    for _ in range(20):
        first = int(averaged.n_averaged)
        reader, writer = os.pipe()
        if not (child := os.fork()):
            try:
                for number in range(first + 1, first + 1000):
                    write(number)
                    os.write(writer, b".")
            finally:
                os._exit(1)
        os.close(writer)
        os.read(reader, 1)
        time.sleep(draw.uniform(0, 0.003))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        os.close(reader)
        swafast.load(averaged, path)
        number = int(averaged.n_averaged)
        assert number > first
        assert all((value == number).all() for value in averaged.state_dict().values())
        seen.add(number)
    assert len(seen) == 20
    for left in tmp_path.glob("file.*.unfinished"):
        shutil.rmtree(left)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("fails", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_alone(fails: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")

    def fail() -> None:
        with replacing(tmp_path / "link") as unfinished:
            unfinished.write_text("half")
            raise fails

    with pytest.raises(fails):
        fail()
    assert (tmp_path / "file").read_text() == "old"
    with replacing(tmp_path / "link") as one, replacing(tmp_path / "file") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one"
    (tmp_path / "plain").touch()
    swafast.save(FusedAveragedModel(nn.Linear(2, 2)), tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "plain"]


def test_a_failed_save_says_why_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averaged = FusedAveragedModel(nn.Linear(2, 2))
    path = tmp_path / "nowhere" / "file"
    with pytest.raises(FileNotFoundError, match=f"^path must be in a folder that exists, got {str(path)!r}: make"):
        swafast.save(averaged, path)
    with pytest.raises(FileNotFoundError):
        swafast.load(averaged, tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_once_a_file_has_begun_is_named(file: tuple[Path, FusedAveragedModel]) -> None:
    path, averaged = file
    before = path.read_bytes()
    with limited_files(2000), pytest.raises(OSError, match=f"{path} could not be written: .*File too large") as raised:
        swafast.save(averaged, path)
    assert raised.value.errno == errno.EFBIG
    assert path.read_bytes() == before


def test_a_dtype_that_this_torch_has_not_is_named(
    file: tuple[Path, FusedAveragedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, averaged = file
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda value: dumps(value).replace('"bfloat16"', '"float9"'))
    swafast.save(averaged, path)
    with refused(ValueError, f"{path} must be readable here, .*, got 'float9'", averaged):
        swafast.load(averaged, path)


def sharded() -> Any:
    return ShardedAveragedModel.__new__(ShardedAveragedModel)


def meta() -> FusedAveragedModel:
    return FusedAveragedModel(nn.Linear(2, 2)).to("meta")


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a model": (lambda: nn.Linear(2, 2), TypeError, "averaged must be a FusedAveragedModel or FusedAverages, got Lin"),
    "sharded": (sharded, TypeError, r"got Sharded\w+: save .* torch.distributed.checkpoint.*full_state_dict"),
    "meta": (meta, ValueError, "'n_averaged' of the average must hold data"),
    **{
        f"an extra state of {type(extra).__name__}": (
            lambda extra=extra: FusedAveragedModel(Stateful(extra)),
            TypeError,
            "averaged must have only tensors and JSON .* the extra state 'module._extra_state'.*torch.save",
        )
        for extra in (object(), (1, 2), {1: 2}, b"bytes")
    },
}


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_file_can_hold_is_refused(
    make: Callable[[], Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        swafast.save(make(), tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_files_of_others_and_of_another_class_are_refused(file: tuple[Path, FusedAveragedModel]) -> None:
    path, averaged = file
    several = FusedAverages(nn.Linear(2, 2), rules=RULES)
    with refused(ValueError, r"averaged must have what .* has, one average, got 'fast', 'slow'", several):
        swafast.load(several, path)
    swafast.save(several, path)
    with refused(ValueError, r"has, the averages 'fast', 'slow', got one: load it into the class", averaged):
        swafast.load(averaged, path)
    with refused(RuntimeError, "size mismatch|Missing key", averaged):
        swafast.save(several["fast"], path)
        swafast.load(averaged, path)
    for legacy in (False, True):
        torch.save(averaged.state_dict(), path, _use_new_zipfile_serialization=not legacy)
        with refused(ValueError, f"{path} must be a file of swafast.save, got one of torch.save: load it by", averaged):
            swafast.load(averaged, path)
    save_file(averaged.averaged_state_dict(), path)
    with refused(ValueError, "must be a file that swafast.save has written", averaged):
        swafast.load(averaged, path)
    with pytest.raises(TypeError, match="averaged must be a FusedAveragedModel"):
        swafast.load(sharded(), path)


@pytest.mark.parametrize("act", [swafast.save, swafast.load])
def test_what_is_no_file_is_refused(act: Callable[[Any, Any], None], tmp_path: Path) -> None:
    averaged = FusedAveragedModel(EveryKind())
    with refused(IsADirectoryError, f"^path must be that of a file, got the folder '{tmp_path}'", averaged):
        act(averaged, tmp_path)
    for path, message in (("", "not be empty"), (os.fsdecode(b"mod\xe8le"), "be in UTF-8")):
        with refused(ValueError, f"^path must {message}", averaged):
            act(averaged, path)
    with refused(IsADirectoryError, "^path must be that of a file, got the folder", averaged):
        act(averaged, f"{tmp_path}/new/")
    with open(tmp_path / "file", "wb") as file, refused(TypeError, "^path must be .* got BufferedWriter", averaged):
        act(averaged, file)


def test_a_pipe_is_not_replaced_and_permissions_stay(tmp_path: Path) -> None:
    averaged = FusedAveragedModel(EveryKind())
    os.mkfifo(tmp_path / "pipe")
    for act in (swafast.save, swafast.load):
        with refused(OSError, "^path must be that of a file, got .* a device", averaged):
            act(averaged, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    path = tmp_path / ("long" * 60)
    swafast.save(averaged, path)
    path.chmod(0o640)
    swafast.save(averaged, path)
    assert path.stat().st_mode & 0o777 == 0o640


#: What another program may write as the description: for a key, or for one of a tensor.
FORGED: list[tuple[tuple[str, ...], object]] = [
    *(((key,), value) for key in ("tensors", "tied", "extra") for value in (None, 3, ["x"])),
    *(((key,), value) for key in ("averages", "versions") for value in (3, "x")),
    *((("tensors", "module.weight", key), value) for key in ("dtype", "shape", "checksum") for value in (["x"], 3)),
    *((("tied",), {"module.bias": ["x"]}), (("versions",), {"": 3}), (("tensors", "module.weight"), None)),
    *(((key,), ...) for key in ("version", "averages", "tensors", "tied", "extra", "versions")),
    *((("tensors", "module.weight", key), ...) for key in ("dtype", "shape", "checksum")),
]


@pytest.mark.parametrize(("where", "value"), FORGED)
def test_a_description_of_another_form_is_a_value_error(where: tuple[str, ...], value: object, tmp_path: Path) -> None:
    averaged, path = FusedAveragedModel(nn.Linear(3, 2)), tmp_path / "file"
    swafast.save(averaged, path)
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["swafast"])
        tensors = {key: file.get_tensor(key) for key in described["tensors"]}
    inner = described
    for key in where[:-1]:
        inner = inner[key]
    inner.update({where[-1]: value}) if value is not ... else inner.pop(where[-1])
    text = json.dumps(described)
    save_file(tensors, path, {"format": "pt", "swafast": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    with refused(ValueError, re.escape(str(path)), averaged):
        swafast.load(averaged, path)


def test_a_swapped_average_is_not_saved(tmp_path: Path) -> None:
    model = EveryKind()
    averaged = FusedAveragedModel(model)
    update(model, averaged)
    with averaged.swapped_into(model), pytest.raises(RuntimeError, match="save must wait"):
        swafast.save(averaged, tmp_path / "file")
    assert os.listdir(tmp_path) == []
