"""Headers of safetensors files: what is written is read, also by safetensors, and whatever is wrong is refused."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save

from swafast.files import headers
from swafast.files.checkpoints import TensorSpec
from swafast.files.headers import header_bytes, read_header


def read(path: Path, data: bytes) -> headers.Header:
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_header(descriptor, str(path))
    finally:
        os.close(descriptor)


def with_header(text: bytes | str, nbytes: int = 24, length: int | None = None) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(nbytes)


def entry(dtype: str = "F32", shape: object = (2,), begin: object = 0, end: object = 8) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


GOOD = f'{{"a":{entry()},"b":{entry(shape=(4,), begin=8, end=24)}}}'
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it has 0 bytes"),
    "no header": (struct.pack("<Q", 0), "must be at byte 8"),
    "longer than the file": (with_header(GOOD, length=10_000), "it is cut short"),
    "longer than 50 MB": (with_header(GOOD, length=50_000_001), "more than 50,000,000"),
    "of the largest length": (with_header(GOOD, length=2**64 - 1), "more than 50,000,000"),
    "cut short": (with_header(GOOD)[:-1], "only 23 follow the header: it is cut short"),
    "bytes behind": (with_header(GOOD, 25), "1 bytes follow its last tensor"),
    "offsets by 8": (with_header(GOOD.replace("[0, 8]", "[8, 16]").replace("[8, 24]", "[16, 32]"), 32), "leaves 8 byt"),
    "a hole": (with_header(GOOD.replace("[8, 24]", "[16, 32]"), 32), "leaves 8 bytes unused"),
    "an overlap": (with_header(GOOD.replace("[8, 24]", "[4, 20]")), "'b' overlaps the tensor before it"),
    "outside": (with_header(GOOD.replace("[8, 24]", "[1000, 1016]")), "leaves 992 bytes unused"),
    "of another number": (
        with_header(GOOD.replace("[8, 24]", "[8, 23]")),
        "'b' of F32 with the shape [4] has 16",
    ),
    "backwards": (with_header(GOOD.replace("[0, 8]", "[8, 0]")), "are of another number"),
    "a negative offset": (with_header(GOOD.replace("[0, 8]", "[-8, 0]")), "that are no counts"),
    "a negative size": (with_header(GOOD.replace("[2]", "[-2]")), "that are no counts"),
    "a huge size": (with_header(GOOD.replace("[2]", "[4294967296, 4294967296]")), "are of another number"),
    "a larger size": (with_header(GOOD.replace("[2]", "[9223372036854775808]")), "that are no counts"),
    "a size of many digits": (with_header(GOOD.replace("[2]", f"[{'9' * 5000}]")), "is not JSON of a tensor"),
    "a fraction": (with_header(GOOD.replace("[2]", "[2.0]")), "that are no counts"),
    "a truth": (with_header(GOOD.replace("[2]", "[true, 2]")), "that are no counts"),
    "three offsets": (with_header(GOOD.replace("[0, 8]", "[0, 8, 8]")), "that are no counts"),
    "an unknown dtype": (with_header(GOOD.replace("F32", "F33", 1)), "the unknown dtype 'F33'"),
    "a dtype that is a list": (with_header(GOOD.replace('"F32"', "[1]", 1)), "the unknown dtype"),
    "another field": (with_header(GOOD.replace('"shape"', '"strides": [1], "shape"', 1)), "and nothing else"),
    "no shape": (with_header(GOOD.replace('"shape"', '"form"', 1)), "and nothing else"),
    "a field twice": (with_header(GOOD.replace('"shape"', '"dtype": "F16", "shape"', 1)), "'dtype' stands twice"),
    "a name twice": (with_header(GOOD.replace('"b"', '"a"')), "names the tensor 'a' twice"),
    "a name twice, escaped": (with_header(GOOD.replace('"b"', r'"\u0061"')), "names the tensor 'a' twice"),
    "metadata twice": (with_header(f'{{"__metadata__":{{}},"__metadata__":{{}},{GOOD[1:]}'), "two entries of metadata"),
    "metadata key twice": (with_header(f'{{"__metadata__":{{"k":"1","k":"2"}},{GOOD[1:]}'), "the key 'k' twice"),
    "a number in metadata": (with_header(f'{{"__metadata__":{{"k":1}},{GOOD[1:]}'), "no string at byte"),
    "metadata that is no object": (with_header(f'{{"__metadata__":"k",{GOOD[1:]}'), "its metadata is not JSON"),
    "a long name": (with_header(GOOD.replace('"a"', f'"{"a" * 9000}"')), "a string of more than 8,192 bytes"),
    "deep nesting": (with_header(f'{{"a":{{"shape":{"[" * 4000}{"]" * 4000}}}}}'), "is not JSON of a tensor"),
    "deeper nesting": (with_header("[" * 100_000), "the header is not JSON"),
    "nested objects": (with_header('{"a":' * 50_000 + "1"), "does not describe a tensor"),
    "text behind": (with_header(f"{GOOD}x"), "goes on after its end"),
    "a NUL behind": (with_header(f"{GOOD}\0"), "goes on after its end"),
    "no end": (with_header(GOOD[:-1]), "must be at byte"),
    "a string without an end": (with_header('{"a'), "a string without an end"),
    "an escaped quote at the end": (with_header(r'{"a\"'), "a string without an end"),
    "a list": (with_header(f"[{GOOD}]"), "the header is not JSON"),
    "no UTF-8": (with_header(GOOD.encode().replace(b'"a"', b'"\xff"')), "a string that is not JSON"),
    "half a surrogate pair": (with_header(GOOD.replace('"a"', r'"\ud800"')), "a string that is not JSON"),
    "a bare line break": (with_header(GOOD.replace('"a"', '"a\n"')), "a string that is not JSON"),
    "a zip file": (b"PK\x03\x04" + bytes(100), "more than 50,000,000"),
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_header_is_refused_with_its_reason(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="is not a whole safetensors file") as caught:
        read(path, data)
    assert str(caught.value).startswith(str(path))
    assert reason in str(caught.value)


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    found = read(tmp_path / "x", with_header(f'{{"__metadata__":{{"k":"v\\n"}},{GOOD[1:]} \n '))
    base = found.nbytes - 24
    assert found.metadata == {"k": "v\n"}
    assert found.specs == {"a": TensorSpec("a", "F32", (2,)), "b": TensorSpec("b", "F32", (4,))}
    assert found.offsets == {"a": base, "b": base + 8}
    assert read(tmp_path / "x", with_header("{}", 0)).specs == {}
    assert read(tmp_path / "x", with_header(f'{{"__metadata__":null,{GOOD[1:]}')).metadata == {}


def test_every_dtype_is_read_or_said(tmp_path: Path) -> None:
    for dtype in ("F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        assert read(tmp_path / "x", with_header(f'{{"a":{entry(dtype, (8,))}}}', 8)).specs["a"].dtype == dtype
    for dtype in ("F4", "F6_E2M3", "F6_E3M2"):
        with pytest.raises(ValueError, match=rf"x: the tensor 'a' is {dtype}, which is not averaged"):
            read(tmp_path / "x", with_header(f'{{"a":{entry(dtype, (16,))}}}', 8))


def test_what_is_written_is_read_by_safetensors(tmp_path: Path) -> None:
    specs = [
        TensorSpec("flag", "BOOL", (3,)),
        TensorSpec('ä"\\\n', "F32", (2, 3)),
        TensorSpec("none", "F64", (0, 5)),
        TensorSpec("count", "I64", ()),
    ]
    head, offsets = header_bytes(specs, {"format": "pt", "ü": '"'})
    data = bytearray(head + bytes(sum(spec.nbytes for spec in specs)))
    for spec in specs:
        assert offsets[spec.name] % max(1, spec.nbytes // max(spec.numel, 1)) == 0
        data[offsets[spec.name] : offsets[spec.name] + spec.nbytes] = bytes([1, 0, 1, 0, 1, 0, 1, 0] * 3)[: spec.nbytes]
    loaded = load(bytes(data))
    assert {name: array.shape for name, array in loaded.items()} == {spec.name: spec.shape for spec in specs}
    assert loaded["flag"].tolist() == [True, False, True]
    found = read(tmp_path / "x", bytes(data))
    assert found.offsets == offsets
    assert found.metadata == {"format": "pt", "ü": '"'}
    assert set(found.specs.values()) == set(specs)


def mutated(data: bytes, choose: random.Random) -> bytes:
    """Change a file: bits, bytes, numbers, parts of the header that move, double or go, and the end."""
    changed, length = bytearray(data), len(data) - 48
    for _ in range(choose.randint(1, 3)):
        at, other = choose.randrange(length), choose.randrange(length)
        lengths = [struct.pack("<Q", number) for number in (0, 1, length - 8, 2**24, 2**63)]
        start, end, new = choose.choice(
            [
                (at, at + 1, bytes([choose.randrange(256)])),
                (at, at + 1, bytes([data[at] ^ 1 << choose.randrange(8)])),
                (at, at, bytes(changed[other : other + choose.randrange(40)])),
                (at, at + choose.randrange(20), b""),
                (at, at + 1, choose.choice([b"0", b"9" * 20, b"-1", b"}", b"{", b"[" * 50])),
                (choose.randrange(len(changed) + 1), len(changed), b""),
                (0, 8, choose.choice(lengths)),
            ]
        )
        changed[start:end] = new
    if choose.random() < 0.7 and len(changed) > 8:  # or nearly all would fail at the length
        changed[:8] = struct.pack("<Q", max(len(changed) - 8 - 48, 0))
    return bytes(changed)


def check_mutations(path: Path, count: int, seed: int) -> tuple[int, int]:
    """Read mutated files: each is refused, or safetensors reads the same. Return how many of each there were."""
    arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3), "empty": np.zeros((0, 2))}
    data = save(arrays, {"format": "pt", "k": "v"})
    choose, refused, taken = random.Random(seed), 0, 0
    tracemalloc.start()
    try:
        for _ in range(count):
            changed = mutated(data, choose)
            try:
                found = read(path, changed)
            except ValueError:
                refused += 1
                continue
            taken += 1
            expected = load(changed)
            assert {name: spec.shape for name, spec in found.specs.items()} == {n: x.shape for n, x in expected.items()}
            for name, array in expected.items():
                start = found.offsets[name]
                assert changed[start : start + array.nbytes] == array.tobytes()
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()
    return refused, taken


def test_mutated_headers_are_refused_or_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    refused, taken = check_mutations(tmp_path / "x", 500, 1)
    assert min(refused, taken) > 20


@pytest.mark.slow
def test_ten_thousand_mutated_headers(tmp_path: Path) -> None:
    refused, taken = check_mutations(tmp_path / "x", 10_000, 2)
    assert min(refused, taken) > 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "I64", "X"]) | JSON},
    optional={"shape": st.lists(st.integers(-1, 3), max_size=3) | JSON, "data_offsets": st.lists(st.integers(0, 24))},
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    described=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ENTRY | JSON, max_size=4),
    nbytes=st.integers(0, 24),
)
def test_json_of_any_kind_is_refused_or_read_as_safetensors_reads_it(
    described: dict[str, object], nbytes: int, tmp_path: Path
) -> None:
    data = with_header(json.dumps(described), nbytes)
    try:
        found = read(tmp_path / "x", data)
    except ValueError:
        return
    assert found.specs.keys() == load(data).keys()


#: Each is made when its test runs: together they are 250 MB.
HOSTILE: dict[str, Callable[[], bytes]] = {
    "one text": lambda: b'{"__metadata__":{"k":"' + b"x" * 49_000_000 + b'"}}',
    "escaped text": lambda: b'{"__metadata__":{"k":"' + rb"\"" * 24_000_000 + b'"}}',
    "many texts": lambda: b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in range(1_000_000)) + b"}}",
    "many tensors": lambda: (
        b"{%s}" % b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(500_000))
    ),
    "long names": lambda: (
        b"{%s}"
        % b",".join(
            b'"%s%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % (b"n" * 180, n) for n in range(199_999)
        )
    ),
    "many files": lambda: b'{"weight_map":{%s}}' % b",".join(b'"%d":"%d"' % (n, n) for n in range(2_500_000)),
    "empty lists": lambda: b'{"metadata":%s%s,"weight_map":{"a":"b"}}' % (b"[" * 900, b",[]" * 5_000_000 + b"]" * 900),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_or_index_takes_little_memory_and_time(name: str, tmp_path: Path) -> None:
    """Read each in a process of its own, whose memory is measured: the interpreter has 20 MB of it."""
    text = HOSTILE[name]()
    (tmp_path / "x").write_bytes(text)
    (tmp_path / "x.safetensors").write_bytes(with_header(text, 0))
    code = (
        "import os, resource, sys; from pathlib import Path\n"
        "from swafast.files import headers, safetensors_files\n"
        "for read in (lambda: safetensors_files.read_index(Path('x')),\n"
        "             lambda: headers.read_header(os.open('x.safetensors', os.O_RDONLY), 'x')):\n"
        "    try: read()\n"
        "    except ValueError: pass\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print([line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line][0], used.ru_utime)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    peak, seconds = done.stdout.split()
    assert (int(peak) < 200 * 1024, float(seconds) < 20) == (True, True), (peak, seconds)


@pytest.mark.parametrize("text", [b"{" + b" " * 3_000_000, b'{"' + rb"\"" * 1_000_000], ids=["blanks", "quotes"])
def test_a_header_of_many_blanks_or_quotes_is_read_at_once(text: bytes, tmp_path: Path) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match="x is not a whole"):
        read(tmp_path / "x", with_header(text, 0))
    assert time.process_time() - started < 5  # 0.1 and 0.4; a quadratic walk takes minutes


def test_safetensors_agrees_on_what_is_refused() -> None:
    """safetensors refuses these too, but for what it overlooks: doubled keys, and blanks."""
    lenient = {"a field twice", "a name twice", "a name twice, escaped", "metadata twice", "metadata key twice"}
    taken = set()
    for name, (data, _) in REFUSED.items():
        try:
            load(data)
        except (SafetensorError, ValueError, KeyError, TypeError):
            continue
        taken.add(name)
    assert taken <= lenient | {"another field", "a number in metadata", "a long name"}


PLANTED = {
    "an offset by 8": ("_check_places", lambda found, nbytes: None, "offsets by 8"),
    "a doubled key": ("_STRICT_DECODER", json.JSONDecoder(), "a field twice"),
    "any count": ("_are_counts", lambda values: True, "a negative offset"),
}


@pytest.mark.parametrize(("name", "planted", "row"), PLANTED.values(), ids=PLANTED)
def test_planted_bugs_are_seen(
    name: str, planted: object, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, name, planted)
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        test_a_wrong_header_is_refused_with_its_reason(*REFUSED[row], tmp_path)
