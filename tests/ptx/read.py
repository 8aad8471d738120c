"""PTX as text: its kernels, with what each declares and the statements of its body."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

#: Versions and targets of the PTX that this was written for.
VERSIONS, TARGETS = range(7, 10), ("sm_90", "sm_90a")

#: Lines that change nothing that a CPU could see, and have no other statement beside that.
_IGNORED = re.compile(r'\.(?:(?:loc|file)\s[^;]*|pragma\s+"[^"]*";|address_size\s+64|(?:minnctapersm|maxnreg)\s+\d+)')
#: What ends with its line, and not with a semicolon.
_LINES = re.compile(r"[{}()]|[\w$]+:|\.(?:version|target|maxntid|reqntid|visible|param)\b.*")


class PtxError(ValueError):
    """PTX that the translator does not know."""


@dataclass(eq=False)
class Kernel:
    """A kernel as its PTX declares it."""

    name: str
    num_threads: int = 0  # of a block
    params: dict[str, int] = field(default_factory=dict)  # -> bytes
    registers: dict[str, tuple[str, int]] = field(default_factory=dict)  # prefix -> type, number
    shared: dict[str, int] = field(default_factory=dict)  # -> offset
    shared_nbytes: int = 0
    targets: dict[str, list[str]] = field(default_factory=dict)  # label of a table -> labels
    lines: dict[int, list[str]] = field(default_factory=dict)  # number -> statements that begin there

    def add_shared(self, name: str, align: int, nbytes: int) -> None:
        self.shared[name] = -(-self.shared_nbytes // align) * align
        self.shared_nbytes = self.shared[name] + nbytes


def read_kernels(ptx: str, extern_nbytes: int = 0) -> list[Kernel]:
    """Return the kernels of a file, whose ``.extern .shared`` array has ``extern_nbytes`` at a launch.

    Raises:
        PtxError: the PTX is of another version or target, or has a directive that is not known.
    """
    reader = _Reader(extern_nbytes)
    for number, statement in _statements(ptx):
        reader.read(number, statement)
    if not reader.kernels:
        raise PtxError("no kernel is there")
    return reader.kernels


def _statements(ptx: str) -> Iterator[tuple[int, str]]:
    """Return (number of its first line, statement), without comments, debug information and hints."""
    begun, start, in_section = "", 0, False
    for number, line in enumerate(ptx.splitlines(), 1):
        text = line.partition("//")[0].strip()
        in_section |= text.startswith(".section")
        if in_section:
            in_section = "}" not in text
            continue
        if not begun and (not text or _IGNORED.fullmatch(text)):
            continue
        start = start if begun else number
        begun = f"{begun} {text}".strip()
        if _LINES.fullmatch(begun) or begun.endswith(";"):
            yield from ((start, part.strip()) for part in begun.split(";") if part.strip())
            begun = ""
    if begun:
        raise PtxError(f"line {start}: {begun!r} does not end")


class _Reader:
    """What has been read of a file."""

    def __init__(self, extern_nbytes: int) -> None:
        self.kernels: list[Kernel] = []
        self._extern, self._extern_nbytes = "", extern_nbytes
        self._depth, self._label = 0, ""  # of braces, and the last one

    def read(self, number: int, statement: str) -> None:
        if statement in ("{", "}"):
            self._depth += 1 if statement == "{" else -1
        elif not statement.startswith("."):
            self._label = statement.rstrip(":")
            if self._depth:
                self.kernels[-1].lines.setdefault(number, []).append(statement)
        elif not self._declare(" ".join(statement.split())):
            known = f"PTX {VERSIONS[0]} to {VERSIONS[-1]} for {' or '.join(TARGETS)} is known"
            raise PtxError(f"line {number}: unknown directive {statement!r}; {known}: see tests/ptx/read.py")

    def _declare(self, text: str) -> bool:
        """Take note of a directive; return whether it is known."""
        if found := re.fullmatch(r"\.version (\d+)\.\d+", text):
            return int(found[1]) in VERSIONS
        if found := re.fullmatch(r"\.target (\w+)(?:, debug)?", text):
            return found[1] in TARGETS
        if found := re.fullmatch(r"\.extern \.shared \.align 16 \.b8 (\w+)\[\]", text):
            self._extern = found[1]
        elif found := re.fullmatch(r"\.visible \.entry (\w+)\(", text):
            self.kernels.append(Kernel(found[1]))
            if self._extern:
                self.kernels[-1].add_shared(self._extern, 16, self._extern_nbytes)
        elif not self.kernels:
            return False
        elif found := re.fullmatch(r"\.(?:maxntid|reqntid) (\d+)(?:, 1)*", text):
            self.kernels[-1].num_threads = int(found[1])
        elif found := re.fullmatch(r"\.param (?:\.align \d+ )?\.\w(\d+) (?:\.ptr .* )?(\w+)(?:\[(\d+)\])?,?", text):
            self.kernels[-1].params[found[2]] = int(found[1]) // 8 * int(found[3] or 1)
        elif found := re.fullmatch(r"\.reg \.(pred|[busf]\d+) %([a-z]+)<(\d+)>", text):
            # The registers of an inner block would hide those of its outer one.
            if found[2] in self.kernels[-1].registers:
                return False
            self.kernels[-1].registers[found[2]] = found[1], int(found[3])
        elif found := re.fullmatch(r"\.shared (?:\.align (\d+) )?\.\w(\d+) (\w+)(?:\[(\d+)\])?", text):
            self.kernels[-1].add_shared(found[3], int(found[1] or 1), int(found[2]) // 8 * int(found[4] or 1))
        elif found := re.fullmatch(r"\.branchtargets (.*)", text):
            self.kernels[-1].targets[self._label] = re.split(r", ?", found[1])
        else:
            return False
        return True
