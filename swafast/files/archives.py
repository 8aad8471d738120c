"""The zip archives of ``torch.save``: where each storage's bytes lie, and archives of which the bytes come later.

An archive may be part of a file, as the entries of a distributed checkpoint are.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..strict.pickles import MOST_PICKLE_NBYTES, unpickled
from .descriptors import read_fully, write_fully

#: torch's: mapped storages begin at a multiple of it.
_ALIGNMENT = 64
_MANY = 0xFFFFFFFF  # stands for a number that is in the 64-bit field
_LOCAL, _CENTRAL = "<4s5H3I2H", "<4s6H3I5H2I"
_DATE = 1 << 5 | 1  # the first of January 1980, so that equal averages make equal files
_FOLDER = "archive"


#: What ``zipfile`` raises for damaged archives.
_DAMAGES = (
    *(zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError, OverflowError),
    *(UnicodeDecodeError, struct.error, zlib.error),
)


class _Window(io.RawIOBase):
    """A part of a file, as a file for ``zipfile``."""

    def __init__(self, descriptor: int, start: int, nbytes: int) -> None:
        self._descriptor, self._start, self._nbytes, self._at = descriptor, start, nbytes, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence]
        if self._at < 0:
            raise OSError("an offset is negative")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._nbytes - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        if size > MOST_PICKLE_NBYTES:
            raise zipfile.BadZipFile(f"a list of records or a pickle has {size:,} bytes")
        data = os.pread(self._descriptor, size, self._start + self._at)
        self._at += len(data)
        return data


class Archive:
    """An archive that is open for reading.

    Attributes:
        value: what was saved, as ``unpickled`` returns it.
        storages: for each storage's key, the offset of its first byte in the file and its number of bytes.
    """

    value: Any
    storages: Mapping[str, tuple[int, int]]

    def __init__(self, descriptor: int, start: int, nbytes: int, what: str, allow: Sequence[str] = ()) -> None:
        """Read the list of records and the pickle.

        Raises:
            ValueError: it is damaged, of another kind, or names globals that it may not.
        """
        try:
            with zipfile.ZipFile(_Window(descriptor, start, nbytes)) as archive:
                infos = {info.filename: info for info in archive.infolist()}
                found = [name for name in infos if name == "data.pkl" or name.endswith("/data.pkl")]
                if len(infos) != len(archive.infolist()) or len(found) != 1:
                    raise zipfile.BadZipFile(f"it has {len(found)} records data.pkl, and {len(infos)} names")
                prefix = found[0].removesuffix("data.pkl")
                if f"{prefix}constants.pkl" in infos:
                    raise ValueError(f"{what} must hold a state dict, got TorchScript: save its state_dict()")
        except _DAMAGES as error:
            raise ValueError(f"{what} is damaged: it is not a whole archive of torch.save ({error})") from None
        offsets = {name: _data_offset(descriptor, start, info, what) for name, info in infos.items()}
        _require_apart([(start + infos[name].header_offset, at, infos[name].file_size) for name, at in offsets.items()],
                       start + nbytes, what)  # fmt: skip

        def record(name: str) -> bytes:
            return _record(descriptor, offsets[name], infos[name], what)

        order = record(f"{prefix}byteorder") if f"{prefix}byteorder" in infos else b"little"
        if order != b"little":
            raise ValueError(f"{what} must be in little-endian order, got {order[:20]!r}: convert it with torch")
        self.value = unpickled(record(found[0]), what, allow)
        self.storages = {
            name.removeprefix(f"{prefix}data/"): (at, infos[name].file_size)
            for name, at in offsets.items()
            if name.startswith(f"{prefix}data/")
        }


def _require_apart(records: Iterable[tuple[int, int, int]], end: int, what: str) -> None:
    """Check records, as (offset of the header, offset of the data, bytes of it): they must not share bytes."""
    used = 0
    for header, data, nbytes in sorted(records):
        if header < used or data + nbytes > end:
            raise ValueError(f"{what} is damaged: its records overlap, or go beyond its end")
        used = data + nbytes


def _record(descriptor: int, offset: int, info: zipfile.ZipInfo, what: str) -> bytes:
    if info.file_size > MOST_PICKLE_NBYTES:
        raise ValueError(f"{what} must have small pickles, got {info.filename} of {info.file_size:,} bytes")
    data = bytearray(info.file_size)
    # Without checksums, by torch.serialization.set_crc32_options(False), they are 0.
    if not read_fully(descriptor, offset, memoryview(data)) or info.CRC not in (0, zlib.crc32(data)):
        raise ValueError(f"{what} is damaged: {info.filename} is cut, or differs from its checksum")
    return bytes(data)


def _data_offset(descriptor: int, start: int, info: zipfile.ZipInfo, what: str) -> int:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise ValueError(f"{what} must be as torch.save writes it, got {info.filename} compressed: save it anew")
    header = bytearray(struct.calcsize(_LOCAL))
    at = start + info.header_offset
    if info.header_offset < 0 or not read_fully(descriptor, at, memoryview(header)) or header[:4] != b"PK\3\4":
        raise ValueError(f"{what} is damaged: {info.filename} is not where its list of records says")
    *_, name_nbytes, extra_nbytes = struct.unpack(_LOCAL, header)
    return int(at + len(header) + name_nbytes + extra_nbytes)


class ArchiveLayout:
    """An archive that is being written, of which the bytes of storages come later and in any order.

    Attributes:
        start, end: of the archive in the file, in bytes.
        offsets: of each storage in the file.
    """

    def __init__(self, pickle: bytes, storage_nbytes: Sequence[int], start: int = 0, folder: str | None = None) -> None:
        self.start, self._prefix = start, f"{folder or _FOLDER}/"
        small = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
        sizes = {name: len(data) for name, data in small.items()}
        sizes |= {f"data/{key}": nbytes for key, nbytes in enumerate(storage_nbytes)}
        self._small = small
        self._records: dict[str, tuple[int, int, int]] = {}  # offsets of header and data in the archive, bytes
        at = 0
        for name, nbytes in sizes.items():
            data = at + struct.calcsize(_LOCAL) + len(self._prefix + name) + 20 + 4
            data += -data % _ALIGNMENT
            self._records[name] = (at, data, nbytes)
            at = data + nbytes
        self._tail = at
        self.offsets = [start + self._records[f"data/{key}"][1] for key in range(len(storage_nbytes))]
        self.end = start + at + len(self._list_of_records([0] * len(storage_nbytes)))

    def finish(self, descriptor: int, checksums: Sequence[int]) -> None:
        """Write all but the storages; ``checksums`` are their CRC-32."""
        crcs = self._crcs(checksums)
        for name, (at, data, nbytes) in self._records.items():
            full = (self._prefix + name).encode()
            padding = data - at - struct.calcsize(_LOCAL) - len(full) - 20 - 4
            extra = struct.pack("<2H2Q2H", 1, 16, nbytes, nbytes, 0x4246, padding) + bytes(padding)  # "FB", as torch
            fields = (b"PK\3\4", 45, 0, 0, 0, _DATE, crcs[name], _MANY, _MANY, len(full), len(extra))
            header = struct.pack(_LOCAL, *fields) + full + extra
            write_fully(descriptor, self.start + at, header + self._small.get(name, b""))
        write_fully(descriptor, self.start + self._tail, self._list_of_records(checksums))

    def _crcs(self, checksums: Sequence[int]) -> dict[str, int]:
        crcs = {name: zlib.crc32(data) for name, data in self._small.items()}
        return crcs | {f"data/{key}": crc for key, crc in enumerate(checksums)}

    def _list_of_records(self, checksums: Sequence[int]) -> bytes:
        crcs, parts = self._crcs(checksums), []
        for name, (at, _, nbytes) in self._records.items():
            full = (self._prefix + name).encode()
            extra = struct.pack("<2H3Q", 1, 24, nbytes, nbytes, at)
            fields = (b"PK\1\2", 45, 45, 0, 0, 0, _DATE, crcs[name], _MANY, _MANY, len(full), len(extra))
            parts += [struct.pack(_CENTRAL, *fields, 0, 0, 0, 0, _MANY), full, extra]
        listed, count, at = b"".join(parts), len(self._records), self._tail
        end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(listed), at)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, at + len(listed), 1)
        return (
            listed
            + end
            + locator
            + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *(min(count, 0xFFFF),) * 2, _MANY, _MANY, 0)
        )


# Checksums of parts


class PartialChecksum:
    """The CRC-32 of bytes that come in parts, in any order."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, int, int]] = []  # start, number of bytes, CRC-32

    def add(self, start: int, data: memoryview) -> None:
        self._parts.append((start, len(data), zlib.crc32(data)))

    def value(self, nbytes: int) -> int:
        """Return the checksum of so many bytes."""
        whole = at = 0
        for start, length, crc in sorted(self._parts):
            assert start == at, f"bytes {min(at, start)} to {max(at, start)} were written {2 * (start < at)} times"
            whole, at = _times(_power_of_x(8 * length), whole) ^ crc, start + length
        assert at == nbytes, f"bytes {at} to {nbytes} were not written"
        return whole


def _times(left: int, right: int) -> int:
    """Multiply polynomials modulo that of CRC-32; the highest bit is the lowest coefficient."""
    product = 0
    for bit in range(31, -1, -1):
        if left >> bit & 1:
            product ^= right
        right = right >> 1 ^ (0xEDB88320 if right & 1 else 0)
    return product


@functools.cache
def _power_of_x(exponent: int) -> int:
    power, square = 1 << 31, 1 << 30  # 1 and x
    while exponent:
        if exponent & 1:
            power = _times(power, square)
        square, exponent = _times(square, square), exponent >> 1
    return power
