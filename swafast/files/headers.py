"""The header of a safetensors file, read strictly: 8 bytes of length, JSON, and then the tensors' bytes without a gap.

A header may come from anywhere. So the text is read entry by entry, and nothing that is nested, doubled or long is
built before it is checked.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checkpoints import ITEMSIZES, TensorSpec

#: The entry of a header that is no tensor.
METADATA_KEY = "__metadata__"
#: Of a header and of an index: 200,000 tensors have 30 MB. safetensors allows 100 MB, which would take 400 MB to read.
MOST_HEADER_NBYTES = 50_000_000
#: Of a name, and of one tensor's description. 64 dimensions of 20 digits are 1,300.
_MOST_ENTRY_NBYTES = 8192
#: Of the metadata, with 64 for each of its entries. Text takes four times its size while it is read.
_MOST_METADATA_NBYTES = 10_000_000
#: Of one file or index. Large models have 100,000.
MOST_TENSORS = 200_000
_MOST_NUMEL = 2**63 - 1
_BLANKS = re.compile(rb"[ \t\r\n]*")
_FIELDS = {"dtype", "shape", "data_offsets"}
_DECODER = json.JSONDecoder()
_BLANK_BYTES = (b" ", b"\t", b"\r", b"\n")
#: Dtypes of safetensors with elements of less than a byte.
_PACKED = ("F4", "F6_E2M3", "F6_E3M2")


class PackedError(ValueError):
    """Tensors of a whole file have elements of less than a byte, which are not read."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds, and where."""

    specs: dict[str, TensorSpec]  # in the order of their bytes
    offsets: dict[str, int]  # of a tensor's first byte in the file
    metadata: dict[str, str]
    nbytes: int  # of the file


def read_header(descriptor: int, path: str) -> Header:
    """Read and check the header of an open file.

    Raises:
        ValueError: it is not a whole safetensors file. The message has the path and the reason.
    """
    nbytes = os.fstat(descriptor).st_size
    try:
        return _parse(_read_text(descriptor, nbytes), nbytes)
    except PackedError as error:
        raise ValueError(f"{path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def _read_text(descriptor: int, nbytes: int) -> bytes:
    if nbytes < 8:
        raise ValueError(f"it has {nbytes} bytes, and a header's length alone takes 8")
    (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
    if length > MOST_HEADER_NBYTES:
        raise ValueError(f"its header would have {length:,} bytes, more than {MOST_HEADER_NBYTES:,}")
    if length > nbytes - 8:
        raise ValueError(f"its header would have {length:,} bytes, and only {nbytes - 8:,} follow: it is cut short")
    return os.pread(descriptor, length, 8)


def _parse(text: bytes, nbytes: int) -> Header:
    found: dict[str, tuple[TensorSpec, int, int]] = {}
    metadata: dict[str, str] | None = None
    scanner = Scanner(text, 8)
    for name in scanner.keys("the header"):
        if name == METADATA_KEY:
            if metadata is not None:
                raise ValueError("it has two entries of metadata")
            metadata = {} if scanner.null() else dict(_pairs_of_text(scanner))
        elif name in found:
            raise ValueError(f"it names the tensor {name!r} twice")
        else:
            found[name] = _described(name, scanner.flat_object(name))
            if len(found) > MOST_TENSORS:
                raise ValueError(f"it names more than {MOST_TENSORS:,} tensors")
    scanner.end()
    base = 8 + len(text)
    _check_places(found.values(), nbytes - base)
    ordered = sorted(found, key=lambda name: found[name][1:])
    specs = {name: found[name][0] for name in ordered}
    return Header(specs, {name: base + found[name][1] for name in ordered}, metadata or {}, nbytes)


class Scanner:
    """Reads the text of a JSON object whose values are flat; ``start`` is the text's place in its file."""

    def __init__(self, text: bytes, start: int = 0) -> None:
        self._text, self._at, self._start = text, 0, start

    def keys(self, what: str) -> Iterator[str]:
        """Yield each key of the object that begins here. Its value is to be read before the next key."""
        self._take(b"{", what)
        if self._next() == b"}":
            self._at += 1
            return
        while True:
            key = self.string()
            self._take(b":", f"the key {key[:100]!r}")
            self._next()
            yield key
            if self._next() == b"}":
                self._at += 1
                return
            self._take(b",", f"the entry {key[:100]!r}")
            self._next()

    def null(self) -> bool:
        """Return whether a null begins here, which is read then."""
        is_null = self._text.startswith(b"null", self._at)
        self._at += 4 if is_null else 0
        return is_null

    def skip(self, what: str) -> None:
        """Skip the small JSON value that begins here."""
        text = self._text[self._at : self._at + _MOST_ENTRY_NBYTES].decode("latin-1")  # a byte is a character
        try:
            self._at += _DECODER.raw_decode(text)[1]
        except (ValueError, RecursionError):
            raise ValueError(f"{what} is not JSON of at most {_MOST_ENTRY_NBYTES:,} bytes") from None

    def string(self, most: int = _MOST_ENTRY_NBYTES) -> str:
        """Read the JSON string that begins here and has at most so many bytes."""
        start = self._at
        if self._next() != b'"':
            raise ValueError(f"it has no string at byte {self._start + self._at}, where a name or a text must be")
        last = start + most + 2
        end = self._text.find(b'"', start + 1, last)
        while end >= 0 and self._is_escaped(end):
            end = self._text.find(b'"', end + 1, last)
        if end < 0:
            what = f"of more than {most:,} bytes" if last < len(self._text) else "without an end"
            raise ValueError(f"it has a string {what} at byte {self._start + start}")
        self._at = end + 1
        try:
            value = str(_DECODER.decode(self._text[start : end + 1].decode()))
            value.encode()  # half a surrogate pair can be read, and not written
        except ValueError:
            raise ValueError(f"it has a string that is not JSON at byte {self._start + start}") from None
        return value

    def flat_object(self, name: str) -> Any:
        """Read the object that begins here and holds no other object."""
        start = self._at
        end = self._text.find(b"}", start, start + _MOST_ENTRY_NBYTES)
        if self._next() != b"{" or end < 0:
            raise ValueError(f"its entry {name[:100]!r} does not describe a tensor")
        self._at = end + 1
        try:
            return _STRICT_DECODER.decode(self._text[start : end + 1].decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its entry {name[:100]!r} is not JSON of a tensor: {error}") from None

    def end(self) -> None:
        if self._next():
            raise ValueError(f"it goes on after its end, at byte {self._start + self._at}")

    def _is_escaped(self, quote: int) -> bool:
        before = quote
        while self._text[before - 1 : before] == b"\\":
            before -= 1
        return (quote - before) % 2 == 1

    def _next(self) -> bytes:
        found = self._text[self._at : self._at + 1]
        if found in _BLANK_BYTES:
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]  # it always matches
            found = self._text[self._at : self._at + 1]
        return found

    def _take(self, expected: bytes, what: str) -> None:
        if self._next() != expected:
            raise ValueError(f"{what} is not JSON: {expected.decode()!r} must be at byte {self._start + self._at}")
        self._at += 1


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object; a key that stands twice has two meanings, and is an error."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:100]!r} stands twice")
    return made


_STRICT_DECODER = json.JSONDecoder(object_pairs_hook=without_doubles)


def _pairs_of_text(scanner: Scanner) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    left = _MOST_METADATA_NBYTES
    for key in scanner.keys("its metadata"):
        if key in seen:
            raise ValueError(f"its metadata has the key {key[:100]!r} twice")
        seen.add(key)
        value = scanner.string(max(left, 0))
        left -= 64 + len(key) + len(value)
        yield key, value


def _described(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    """Return a tensor, and where its bytes begin and end behind the header."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ValueError(f"its entry {name[:100]!r} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype in _PACKED:
        raise PackedError(f"the tensor {name!r} is {dtype}, which is not averaged: average before you quantise")
    if not isinstance(dtype, str) or dtype not in ITEMSIZES:
        raise ValueError(f"its tensor {name!r} has the unknown dtype {str(dtype)[:100]!r}")
    if not (_are_counts(shape) and _are_counts(place) and len(place) == 2):
        raise ValueError(f"its tensor {name!r} has a shape or offsets that are no counts")
    spec = TensorSpec(name, dtype, tuple(shape))
    begin, end = place
    if spec.nbytes != end - begin:
        raise ValueError(
            f"its tensor {name!r} of {dtype} with the shape {shape} has {spec.nbytes:,} bytes, and its offsets "
            f"{begin:,} to {end:,} are of another number"
        )
    return spec, begin, end


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MOST_NUMEL for value in values)


def _check_places(found: Iterable[tuple[TensorSpec, int, int]], nbytes: int) -> None:
    """Check that the tensors fill the bytes behind the header, in some order, each once."""
    reached = 0
    for spec, begin, end in sorted(found, key=lambda entry: entry[1:]):
        if begin != reached:
            what = "overlaps the tensor before it" if begin < reached else f"leaves {begin - reached:,} bytes unused"
            raise ValueError(f"its tensor {spec.name!r} {what}: it begins at {begin:,}, not at {reached:,}")
        reached = end
    if reached > nbytes:
        raise ValueError(f"its tensors take {reached:,} bytes, and only {nbytes:,} follow the header: it is cut short")
    if reached < nbytes:
        raise ValueError(f"{nbytes - reached:,} bytes follow its last tensor")


def header_bytes(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the beginning of a safetensors file, and the offset of each tensor in that file.

    The tensors with the largest elements come first. So each of them is aligned, which readers want that map the file.
    """
    if any(spec.name == METADATA_KEY for spec in specs):
        raise ValueError(f"a safetensors file has no tensor of the name {METADATA_KEY!r}: write a .pt file")
    described: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    relative, reached = {}, 0
    for spec in sorted(specs, key=lambda spec: -ITEMSIZES[spec.dtype]):
        relative[spec.name] = reached
        place = [reached, reached := reached + spec.nbytes]
        described[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": place}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MOST_HEADER_NBYTES:
        raise ValueError(f"the header would have {len(text):,} bytes, more than {MOST_HEADER_NBYTES:,}: write a folder")
    base = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: base + offset for name, offset in relative.items()}
