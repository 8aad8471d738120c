"""`average`: what it writes, what it refuses and why, and that its output is absent or whole."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from swafast.files import agreement, average, averaging, descriptors, placing, safetensors_files, streaming, summing
from swafast.files.checkpoints import TensorSpec
from swafast.files.headers import header_bytes
from swafast.terms import replacing

Arrays = Mapping[str, np.ndarray]


def model(seed: int, **more: np.ndarray) -> dict[str, np.ndarray]:
    """Return tensors of several dtypes. One has two chunks."""
    generator = np.random.default_rng(seed)
    return {
        "wide.weight": generator.standard_normal((3, summing.CHUNK_NUMEL // 2)).astype(np.float32),
        "bias": generator.standard_normal(7).astype(np.float16),
        "precise": np.array(generator.standard_normal()),
        "none": np.empty((0, 4), np.float32),
        "count": np.array([3, 4]),
        **more,
    }


def written(folder: Path, models: Sequence[Arrays], **metadata: str) -> list[Path]:
    paths = [folder / f"m{place}.safetensors" for place in range(len(models))]
    for path, arrays in zip(paths, models, strict=True):
        save_file(dict(arrays), path, {"format": "pt", **metadata})
    return paths


def sharded(folder: Path, arrays: Arrays, parts: int = 2) -> Path:
    """Write a model as Hugging Face does: files, and an index of them."""
    folder.mkdir()
    names = {f"model-{part + 1:05}-of-{parts:05}.safetensors": list(arrays)[part::parts] for part in range(parts)}
    for name, keys in names.items():
        save_file({key: arrays[key] for key in keys}, folder / name, {"format": "pt"})
    weight_map = {key: name for name, keys in names.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def mean(models: Sequence[Arrays], coefficients: Sequence[float] | None = None) -> dict[str, np.ndarray]:
    found = {}
    for name, first in models[0].items():
        values = [each[name].astype(np.float64) for each in models]
        if coefficients is None:
            total = sum(values[1:], values[0]) / len(values)
        else:
            products = [value * coefficient for value, coefficient in zip(values, coefficients, strict=True)]
            total = sum(products[1:], products[0])
        found[name] = first if first.dtype.kind == "i" else np.asarray(total).astype(first.dtype)
    return found


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        is_same = found[name].tobytes() == array.tobytes()  # or pytest compares them byte by byte, for minutes
        assert is_same, name


MODELS = [model(seed) for seed in range(3)]


def test_the_mean_is_float64_rounded_once(tmp_path: Path) -> None:
    report = average(written(tmp_path, MODELS, note="of the first"), tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), mean(MODELS))
    assert (report.num_averaged, report.num_copied) == (4, 1)
    nbytes = sum(array.nbytes for array in MODELS[0].values())
    assert (report.nbytes_read, report.nbytes_written) == (3 * nbytes, nbytes)
    assert report.seconds is not None
    descriptor = os.open(tmp_path / "out.safetensors", os.O_RDONLY)
    metadata = safetensors_files.read_header(descriptor, "").metadata
    os.close(descriptor)
    record = json.loads(metadata.pop("swafast_average"))
    assert metadata == {"format": "pt", "note": "of the first"}
    assert record["inputs"] == [str(tmp_path / f"m{place}.safetensors") for place in range(3)]
    assert record["coefficients"] == "equal"
    assert len(list(tmp_path.iterdir())) == 4


WEIGHTED: tuple[dict[str, Any], list[float]] = ({"weights": [0.5, 0.3, 0.2]}, [0.5, 0.3, 0.2])


@pytest.mark.parametrize(
    ("option", "coefficients"),
    [
        WEIGHTED,
        ({"ema": 0.5}, [0.25, 0.25, 0.5]),
        ({"decay": "linear"}, [1 / 3, 1 / 3, 1 / 3]),
    ],
    ids=str,
)
def test_weights_are_those_of_the_inputs_in_order(
    option: dict[str, Any], coefficients: list[float], tmp_path: Path
) -> None:
    report = average(written(tmp_path, MODELS), tmp_path / "out.safetensors", **option)
    assert report.coefficients == pytest.approx(coefficients)
    assert_same(load_file(tmp_path / "out.safetensors"), mean(MODELS, report.coefficients))


def test_what_a_user_may_not_expect_is_said_and_reported(tmp_path: Path) -> None:
    for step in (900, 1000):
        save_file({"x": np.float32([step])}, tmp_path / f"step-{step}.safetensors")
    (tmp_path / "last.pt").touch()
    by_name = sorted(tmp_path.glob("step-*"))  # 1000 before 900
    out, disorder = (
        tmp_path / "out.safetensors",
        "in the order in which they are listed, which is not that of their steps",
    )
    for inputs, options, words in (
        (
            [tmp_path],
            {"ema": 0.9},
            ["skipped in", "oldest input has the largest weight, 0.900: an EMA"],
        ),
        ([tmp_path], {"ema": 0.5}, ["skipped in"]),
        (by_name, {"weights": [0.1, 0.9]}, [disorder]),
        (by_name[::-1], {"weights": [0.1, 0.9]}, []),
        (by_name, {}, []),
    ):
        lines: list[str] = []
        report = average(inputs, out, dry_run=True, say=lines.append, **options)
        assert report.notes == tuple(lines[: len(words)])
        assert [word in line for word, line in zip(words, report.notes, strict=True)] == [True] * len(words)


def test_the_dtype_in_a_config_follows_that_of_the_weights(tmp_path: Path) -> None:
    text = '{"hidden": 4, "torch_dtype": "float32", "text_config": {"dtype" : "float32", "quant_dtype": "float32"}}\n'
    folders = [sharded(tmp_path / f"h{place}", arrays) for place, arrays in enumerate(MODELS)]
    for folder in folders:
        (folder / "config.json").write_text(text)
        (folder / "tokenizer.json").write_text(text)
    changed = text.replace('torch_dtype": "float32', 'torch_dtype": "bfloat16')
    changed = changed.replace('"dtype" : "float32', '"dtype" : "bfloat16')
    for dtype, expected in ((None, text), ("bf16", changed)):
        average(folders, tmp_path / "out", dtype=dtype, force=True)
        assert (tmp_path / "out" / "config.json").read_text() == expected
        assert (tmp_path / "out" / "tokenizer.json").read_text() == text


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_result_does_not_depend_on_threads_or_forms(threads: int, tmp_path: Path) -> None:
    first, *_ = written(tmp_path, MODELS)
    folders = [sharded(tmp_path / f"h{place}", arrays, 2 + place) for place, arrays in enumerate(MODELS)]
    inputs = [first, folders[1], folders[2] / "model.safetensors.index.json"]
    (folders[2] / "config.json").write_text("{}")
    (folders[2] / "tokenizer.model").write_text("t")
    (folders[2] / "trainer_state.json").write_text("{}")
    (folders[2] / "optimizer.pt").write_text("o")
    average(inputs, tmp_path / "out", shard_size="0.5 kB", threads=threads)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert names - shards == {"model.safetensors.index.json", "swafast_average.json", "config.json", "tokenizer.model"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards == {f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)}
    found = {key: array for name in shards for key, array in load_file(tmp_path / "out" / name).items()}
    assert_same({key: found[key] for key in MODELS[0]}, mean(MODELS))
    average([tmp_path / "out"], tmp_path / "one.safetensors")
    assert_same(load_file(tmp_path / "one.safetensors"), mean(MODELS))


def test_symlinks_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    sharded(blobs, MODELS[0])
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "blobs", path.name))
    average([snapshot, *written(tmp_path, MODELS)[1:]], tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), mean(MODELS))


def test_dtype_and_prefixes_and_ties(tmp_path: Path) -> None:
    one = {"module.a": np.ones((2, 2), np.float32), "module.b": np.full((2, 2), 3, np.float32)}
    two = {"a": np.full((2, 2), 2, np.float16), "c": np.full((2, 2), 5, np.float16)}
    three = {"a": np.full((2, 2), 6, np.float16), "b": np.ones((2, 2), np.float16), "c": np.ones((2, 2), np.float16)}
    paths = written(tmp_path, [one, two, three])
    average(paths, tmp_path / "out.safetensors", strip="module.", dtype="bf16", tied={"c": "b"})
    found = (tmp_path / "out.safetensors").read_bytes()
    assert b'"c"' not in found
    assert found.endswith(np.array([3.0] * 8, np.float32).view(np.uint16)[1::2].tobytes())
    save_file({**three, "c": np.zeros((2, 2), np.float16)}, paths[2])
    with pytest.raises(ValueError, match=r"tied says that c is b, and in .*m2.safetensors they differ"):
        average(paths, tmp_path / "no.safetensors", strip="module.", dtype="bf16", tied={"c": "b"})


def test_integers_are_copied_never_averaged(tmp_path: Path) -> None:
    models = [model(0), model(1, count=np.array([3, 6]))]
    paths = written(tmp_path, models)
    with pytest.raises(ValueError, match=r"I64 tensor count differs between .*m0.safetensors and .*m1.safetensors"):
        average(paths, tmp_path / "out.safetensors")
    for choice, expected in (("first", [3, 4]), ("last", [3, 6])):
        average(paths, tmp_path / "out.safetensors", integers=choice, force=True)
        assert load_file(tmp_path / "out.safetensors")["count"].tolist() == expected


def test_statistics_of_batchnorm_are_copied_from_one_input(tmp_path: Path) -> None:
    norms = [
        {
            "n.weight": np.full(2, value, np.float32),
            "n.running_mean": np.full(2, value, np.float32),
            "n.running_var": np.full(2, 1e-8 + value, np.float32),
            "n.num_batches_tracked": np.array(int(100 * value)),
            "f._extra_state": np.full(3, int(value), np.uint8),
        }
        for value in (1.0, 3.0)
    ]
    paths = written(tmp_path, norms)
    for options, source in (({}, 1), ({"integers": "last"}, 1), ({"integers": "first"}, 0)):
        lines: list[str] = []
        report = average(paths, tmp_path / "out.safetensors", force=True, say=lines.append, **options)
        assert_same(load_file(tmp_path / "out.safetensors"), {**norms[source], "n.weight": np.full(2, 2, np.float32)})
        assert f"BatchNorm's statistics are those of {paths[source]}: call update_bn on the result" in lines
        assert (report.num_averaged, report.num_copied) == (1, 4)
    average(paths, tmp_path / "out.safetensors", force=True, weights=[0.75, 0.25], dtype="fp64")
    found = load_file(tmp_path / "out.safetensors")
    assert (found["n.weight"].tolist(), found["n.running_mean"].tolist()) == ([1.5] * 2, [3.0] * 2)
    norms[1]["n.running_var"][1] = np.inf
    with pytest.raises(ValueError, match=r"m1.safetensors: the tensor n.running_var holds inf at \[1\]"):
        average(written(tmp_path, norms), tmp_path / "out.safetensors", force=True)


def raw(path: Path, dtype: str, data: bytes, shape: tuple[int, ...]) -> Path:
    head, _ = header_bytes([TensorSpec("x", dtype, shape)], {})
    path.write_bytes(head + data)
    return path


def test_float8_is_refused_unless_it_is_equal(tmp_path: Path) -> None:
    paths = [raw(tmp_path / f"{n}.safetensors", "F8_E4M3", bytes([n // 2] * 4), (4,)) for n in range(3)]
    average(paths[:2], tmp_path / "out.safetensors", integers="last")
    with pytest.raises(ValueError, match=r"the F8_E4M3 tensor x differs between .*, and F8_E4M3 is not averaged"):
        average(paths, tmp_path / "out.safetensors", integers="last", force=True)
    assert (tmp_path / "out.safetensors").read_bytes().endswith(bytes(4))


def test_nan_is_reported_with_its_file(tmp_path: Path) -> None:
    bad = MODELS[1]["wide.weight"].copy()
    bad[2, 5] = np.nan
    paths = written(tmp_path, [MODELS[0], {**MODELS[1], "wide.weight": bad}])
    with pytest.raises(ValueError, match=r"m1.safetensors: the tensor wide.weight holds nan at \[2, 5\]"):
        average(paths, tmp_path / "out.safetensors")
    average(paths, tmp_path / "out.safetensors", nonfinite="keep")
    assert np.isnan(load_file(tmp_path / "out.safetensors")["wide.weight"]).sum() == 1
    large = {"wide.weight": np.full((2, 2), 1e6, np.float32)}
    paths = written(tmp_path, [large, large])
    with pytest.raises(ValueError, match=r"average of the tensor wide.weight is no finite F16 at \[0, 0\]: choose"):
        average(paths, tmp_path / "n.safetensors", dtype="fp16")


def test_a_float64_sum_that_overflows_is_said_and_weights_help(tmp_path: Path) -> None:
    paths = written(tmp_path, [{"a": np.array([1.5e308])}, {"a": np.array([1.4e308])}])
    with pytest.raises(ValueError, match=r"the sum of the tensor a is no finite float64 at \[0\]: pass weights"):
        average(paths, tmp_path / "out.safetensors")
    average(paths, tmp_path / "out.safetensors", weights=[0.5, 0.5])
    assert load_file(tmp_path / "out.safetensors")["a"].tolist() == [1.45e308]


WRONG_TYPES: tuple[dict[str, Any], ...] = (
    *({"inputs": b"a"}, {"inputs": [b"a"]}, {"inputs": 5}, {"inputs": [None]}, {"out": b"a"}, {"out": None}),
    *({"tied": ["a=b"]}, {"tied": {"a": 1}}, {"strip": 5}, {"key": 5}),
)


@pytest.mark.parametrize("change", WRONG_TYPES, ids=str)
def test_arguments_of_another_type_are_refused_by_name(change: dict[str, Any], tmp_path: Path) -> None:
    arguments = {"inputs": written(tmp_path, MODELS[:1]), "out": tmp_path / "out.safetensors", **change}
    with pytest.raises(TypeError, match=f"^{next(iter(change))} must be "):
        average(arguments.pop("inputs"), arguments.pop("out"), **arguments)


def test_many_small_tensors_are_taken_together(tmp_path: Path) -> None:
    models = [{f"{n}": np.full(n % 7, n + seed, np.float32) for n in range(1000)} for seed in (0, 2)]
    average(written(tmp_path, models), tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), mean(models))
    task = streaming.Pass([], [agreement.Agreed(TensorSpec("x", "F32", (3,)), (), ())] * 1000, None, False, object)  # type: ignore[arg-type]
    assert {len(some) for some in task._chunks()} == {100}
    large = [agreement.Agreed(TensorSpec("x", "F32", (summing.CHUNK_NUMEL * 2 // 3,)), (), ())] * 3
    assert [len(some) for some in streaming.Pass([], large, None, False, object)._chunks()] == [1, 1, 1]  # type: ignore[arg-type]


def disagreeing(change: dict[str, np.ndarray | None]) -> Callable[[Path], list[Path]]:
    other = {name: array for name, array in {**MODELS[1], **change}.items() if array is not None}
    return lambda folder: written(folder, [MODELS[0], other])


def with_index(weight_map: object, **files: Arrays) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for name, arrays in files.items():
            save_file(dict(arrays), folder / f"{name}.safetensors")
        return [folder / "model.safetensors.index.json"]

    return make


A, B = ({name: np.ones(2, np.float32)} for name in "ab")
Made = Callable[[Path], list[Path]]
BAD: dict[str, tuple[Made, dict[str, Any], str]] = {
    "missing": (disagreeing({"bias": None}), {}, r"m1.safetensors lacks 1 of the tensors, which .*m0.*: 'bias'\."),
    "further": (disagreeing({"z": np.ones(2)}), {}, r"m0.safetensors lacks 1 of the tensors, which .*m1.*: 'z'\."),
    "shape": (
        disagreeing({"bias": np.ones(8, np.float16)}),
        {},
        r"bias has the shape \[7\] in .*m0.* and \[8\] in",
    ),
    "dtype": (
        disagreeing({"bias": np.ones(7, np.float32)}),
        {},
        r"bias is F16 in .*m0.* and F32 in .*m1.*dtype='fp32' or --dtype fp32 says",
    ),
    "integer dtype": (disagreeing({"count": np.array([3, 4], np.int32)}), {"dtype": "bf16"}, "count is I64 in"),
    "no input": (lambda folder: [], {}, "inputs must have at least one checkpoint"),
    "not there": (lambda folder: [folder / "x.safetensors"], {}, "x.safetensors"),
    "another suffix": (lambda folder: [*written(folder, MODELS[:1]), Path(__file__)], {}, r"must end in \.safetensors"),
    "two files": (lambda folder: [written(folder / "f", MODELS[:2])[0].parent] * 2, {}, "name the file|one"),
    "outside": (
        with_index({"a": "../x.safetensors"}),
        {},
        r"must name files in its own folder, got '\.\./x",
    ),
    "absolute": (with_index({"a": "/x.safetensors"}), {}, "must name files in its own folder, got '/x.safetensors'"),
    "deeper outside": (with_index({"a": "s/../../x"}), {}, "must name files in its own folder"),
    "no map": (with_index([1]), {}, "its weight_map, which must give each tensor's file, is not JSON"),
    "an empty map": (with_index({}), {}, "has no weight_map of names"),
    "numbers in a map": (with_index({"a": 1}), {}, "has no string at byte"),
    "a surrogate in a map": (with_index({"a": "\ud800"}), {}, r"index.json is not an index .* is not JSON"),
    "an index that lies": (with_index({"a": "m.safetensors", "b": "m.safetensors"}, m=A), {}, "and it has not"),
    "in two shards": (
        with_index({"a": "m.safetensors", "b": "n.safetensors"}, m=A, n={**A, **B}),
        {},
        "the file n.safetensors has the tensor 'a', and the index says that m.safetensors has it",
    ),
    "beside an index": (with_index({"a": "m.safetensors"}, m={**A, **B}), {}, "'b', and the index does not name it"),
    "a missing shard": (
        with_index({"a": "m.safetensors", "b": "n.safetensors"}, m=A),
        {},
        "files that do not exist: 'n.s",
    ),
    "weights": (
        lambda folder: written(folder, MODELS),
        {"weights": [0.5, 0.5]},
        "must be one for each of the 3",
    ),
    "ema": (lambda folder: written(folder, MODELS), {"ema": 1.5}, r"^ema must be in \[0, 1\].* got 1.5"),
    "power": (lambda folder: written(folder, MODELS), {"power": 0.5}, r"^power must be in \(0, 0.28"),
    "decay": (lambda folder: written(folder, MODELS), {"decay": "x"}, "^decay must be one of 'linear', 'minus-sqrt'"),
    "two kinds": (lambda folder: written(folder, MODELS), {"ema": 0.5, "power": 0.1}, "got ema and power"),
    "integers": (
        lambda folder: written(folder, MODELS),
        {"integers": "mean"},
        "integers must be one of 'equal'",
    ),
    "nonfinite": (lambda folder: written(folder, MODELS), {"nonfinite": "skip"}, "nonfinite must be one of"),
    "dtype name": (lambda folder: written(folder, MODELS), {"dtype": "int8"}, "dtype must be float64"),
    "threads": (lambda folder: written(folder, MODELS), {"threads": 0}, "threads must be an int from 1"),
    "shard size": (lambda folder: written(folder, MODELS), {"shard_size": "5 Gb!"}, "shard_size must be a number"),
    "huge shards": (lambda folder: written(folder, MODELS), {"shard_size": "9" * 400}, "shard_size must be a number"),
    "ties": (lambda folder: written(folder, MODELS), {"tied": {"a": "b", "b": "c"}}, "tied must give each name"),
    "a state": (lambda folder: written(folder, MODELS, swafast="{}"), {}, "swafast combine"),
}


@pytest.mark.parametrize(("make", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_and_nothing_is_written(
    make: Made, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "out").mkdir()
    inputs = make(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        average(inputs, tmp_path / "out" / "x.safetensors", **options)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_stands_at_the_output_is_kept_unless_forced(tmp_path: Path) -> None:
    paths = written(tmp_path, MODELS)
    (tmp_path / "file.safetensors").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    for out, options, message in (
        ("file.safetensors", {}, r"force=True \(--force\) replaces it"),
        ("folder", {}, r"force=True"),
        ("folder", {"force": True}, "that an average was written to"),
        ("none/x.safetensors", {}, "make the folder first"),
        ("x.json", {}, "out must end in"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            average(paths, tmp_path / out, **options)
    assert (tmp_path / "file.safetensors").read_text() == (tmp_path / "folder" / "mine.txt").read_text() == "mine"
    average(paths, tmp_path / "file.safetensors", force=True)
    average(paths, tmp_path / "new")
    average(paths[:1], tmp_path / "new", force=True)
    assert_same(load_file(tmp_path / "new" / "model.safetensors"), MODELS[0])
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_dry_run_lists_and_writes_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    paths = written(tmp_path, MODELS)
    report = average(paths, tmp_path / "out.safetensors", dry_run=True, say=lines.append)
    assert report.seconds is None
    assert [line.split()[-1] for line in lines[:3]] == list(map(str, paths))
    assert "averages 4 tensors, copies 1: reads 2.36 MB, writes 786 kB" in lines[3]
    assert not (tmp_path / "out.safetensors").exists()


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"out needs 786 kB, and 10 B are free"):
        average(written(tmp_path, MODELS), tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_changes_meanwhile_is_seen(tmp_path: Path) -> None:
    paths = written(tmp_path, MODELS)

    def change(line: str) -> None:  # after the headers are read
        os.truncate(paths[1], 1000)

    with pytest.raises(ValueError, match=r"m1.safetensors has changed since its header was read"):
        average(paths, tmp_path / "out.safetensors", say=change)
    assert not list(tmp_path.glob("out*"))


def test_ctrl_c_leaves_nothing_and_no_thread(tmp_path: Path) -> None:
    class Interrupting:
        def __init__(self, nbytes: int) -> None: ...
        def __enter__(self) -> Interrupting:
            return self

        def __exit__(self, *_: object) -> None: ...
        def phase(self, label: str) -> None:
            raise KeyboardInterrupt

        def advance(self, nbytes: int) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        average(written(tmp_path, MODELS), tmp_path / "out.safetensors", progress=Interrupting)
    assert not list(tmp_path.glob("out*"))


IMPORTED = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\nfrom swafast.files import average\n"
PEAK = "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"


def peak_mib(inputs: Sequence[Path], out: Path, more: str = "") -> float:
    """Average in a new process, without torch. Return the largest memory that it had."""
    call = f"average({list(map(str, inputs))!r}, {str(out)!r}{more})"
    code = f"{IMPORTED}{call}\nassert not {{'torch', 'safetensors'}} & set(sys.modules)\n{PEAK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024


def test_no_torch_and_little_memory(tmp_path: Path) -> None:
    peaks = []
    for numel in (1000, 10_000_000):
        path = written(tmp_path, [{"x": np.zeros(numel, np.float32)}])[0]
        peaks.append(peak_mib([path] * 5, tmp_path / f"{numel}.safetensors"))
    assert peaks[1] < 64
    assert peaks[1] - peaks[0] < 12  # the file has 40 MB


@pytest.mark.slow
def test_a_sparse_file_of_4_gb_takes_no_more_memory(tmp_path: Path) -> None:
    head, _ = header_bytes([TensorSpec("x", "F32", (2**30,))], {})
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(head)
        file.truncate(len(head) + 2**32)
    out = tmp_path / "out.safetensors"
    try:
        assert peak_mib([tmp_path / "x.safetensors"] * 2, out, ", dtype='bf16'") < 64
        assert out.stat().st_size > 2**31
    finally:
        out.unlink(missing_ok=True)  # pytest keeps folders


@pytest.mark.parametrize("form", ["out.safetensors", "out"])
def test_kills_leave_the_output_absent_or_whole(form: str, tmp_path: Path) -> None:
    """Kill a process that writes the output over and over: a file that is forced, or a folder that is exchanged."""
    paths, out = written(tmp_path, MODELS[:2]), tmp_path / form
    size = None if out.suffix else 10**6
    call = f"average({list(map(str, paths))!r}, {str(out)!r}, force=True, shard_size={size})"
    expected, choose, whole = mean(MODELS[:2]), random.Random(3), 0
    for _ in range(10):
        command = [sys.executable, "-c", f"{IMPORTED}print(1, flush=True)\nwhile True: {call}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(choose.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        if out.exists():
            whole += 1
            files = [out] if out.suffix else sorted(out.glob("*.safetensors"))
            found = {name: array for file in files for name, array in load_file(file).items()}
            assert_same({name: found[name] for name in expected}, expected)
    assert whole > 0


@pytest.mark.parametrize("form", ["out.safetensors", "out"])
def test_the_output_is_synced_before_it_has_its_name(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments: (done.append(name), real(*arguments))[1]

    for name in ("fsync", "replace", "rename", "link"):
        monkeypatch.setattr(replacing.os, name, noted(name, getattr(os, name)))
    average(written(tmp_path, MODELS), tmp_path / form)
    naming = next(place for place, name in enumerate(done) if name != "fsync")
    assert "fsync" in done[:naming]


def patched(check: Callable[..., None], *arguments: object) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            check(*arguments, folder, patch)

    return run


PLANTED: dict[str, tuple[Any, str, Any, Callable[[Path], None]]] = {
    "weights reversed": (
        averaging,
        "asked_coefficients",
        lambda count, **asked: [0.2, 0.3, 0.5],
        lambda folder: test_weights_are_those_of_the_inputs_in_order(*WEIGHTED, folder),
    ),
    "an integer averaged": (
        agreement,
        "AVERAGED_DTYPES",
        (*agreement.AVERAGED_DTYPES, "I64"),
        test_integers_are_copied_never_averaged,
    ),
    "statistics averaged": (
        agreement,
        "is_unmerged",
        lambda name: False,
        test_statistics_of_batchnorm_are_copied_from_one_input,
    ),
    "a shard swapped": (
        safetensors_files.SafetensorsCheckpoint,
        "read_into",
        lambda self, name, start, into, real=safetensors_files.SafetensorsCheckpoint.read_into: real(
            self, name, 0, into
        ),
        test_the_mean_is_float64_rounded_once,
    ),
    "dtype ignored": (averaging, "dtype_name", lambda dtype: None, test_dtype_and_prefixes_and_ties),
    "equal is first": (streaming, "why_unequal", lambda *_: "", test_float8_is_refused_unless_it_is_equal),
    "no check of space": (
        averaging,
        "check_space",
        lambda *_: None,
        patched(test_a_full_disk_is_seen_before_anything_is_written),
    ),
    "a change unseen": (
        descriptors,
        "_identity",
        lambda found: (0, 0, 0, 0),
        test_a_file_that_changes_meanwhile_is_seen,
    ),
    "no sync": (
        replacing,
        "_sync",
        lambda path: None,
        patched(test_the_output_is_synced_before_it_has_its_name, "out"),
    ),
}


@pytest.mark.parametrize(("owner", "name", "wrong", "check"), PLANTED.values(), ids=PLANTED)
def test_planted_bugs_are_seen(
    owner: Any, name: str, wrong: Any, check: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, pytest.fail.Exception, KeyError, StopIteration, ValueError)):
        check(tmp_path)
