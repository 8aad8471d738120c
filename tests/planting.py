"""Bugs planted in sources: a pattern inside a named definition, which must be there exactly once.

The tables of ``tests/plants`` have one bug a line: ``name :: scope :: old :: new :: expected``. A line that begins with
a space continues the one before. In the definition of ``scope``, a function or a class, ``old`` becomes ``new``; then a
test fails with a message that has ``expected`` in it.

``old`` is code, and its spaces, line breaks and comments do not count. ``$name`` in it stands for any name, also of a
member. In ``new``, ``$name`` is what was found there, and ``$0`` is all of it. So a plant survives new formatting, new
comments, renamed variables and code that moves to another file. What it does not survive, it reports.

``ON`` in ``new`` is whether this bug is the one to run with, where one build has all of them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "plants"

_TOKEN = re.compile(r"\$\w+|\w+|\S")
_GAP = r"(?:\s|//[^\n]*\n|/\*.*?\*/|#[^\n]*\n)*"
_NAME = r"\w+(?:(?:\.|->)\w+)*"


@dataclass(frozen=True)
class Plant:
    """One bug. An empty scope is the whole of each file."""

    name: str
    scope: str
    old: str
    new: str
    expected: str
    option: str = ""  # what a table has in a sixth column

    def matches(self, sources: Mapping[str, str]) -> list[tuple[str, re.Match[str]]]:
        """Return (path, match) for each place where the pattern is."""
        found: dict[tuple[str, int], re.Match[str]] = {}
        for path, source in sources.items():
            for start, stop in _extents(source, self.scope, path.endswith(".py")):
                found |= {(path, match.start()): match for match in _compile(self.old).finditer(source, start, stop)}
        return [(path, match) for (path, _), match in found.items()]

    def apply(self, sources: Mapping[str, str], switch: str = "true") -> dict[str, str]:
        """Return the sources, by path, with the bug in them, ``ON`` being ``switch``.

        Raises:
            AssertionError: the pattern is not there exactly once.
        """
        found = self.matches(sources)
        where = f"{self.old!r} in {self.scope or 'any file'}"
        assert len(found) == 1, f"{self.name}: {where} is there {len(found)} times, not once: plant it another way"
        ((path, match),) = found
        new = re.sub(r"\bON\b", switch, self._put_in(match))
        return {**sources, path: sources[path][: match.start()] + new + sources[path][match.end() :]}

    def apply_everywhere(self, code: str) -> str:
        """Return the code with the bug in each place where the pattern is, and the scope left aside."""
        return _compile(self.old).sub(self._put_in, code)

    def _put_in(self, match: re.Match[str]) -> str:
        return re.sub(r"\$(\w+)", lambda hole: match[int(hole[1]) if hole[1].isdigit() else hole[1]], self.new)


def read_plants(table: str) -> list[Plant]:
    """Return the bugs of ``tests/plants/<table>.txt``."""
    text = (FOLDER / f"{table}.txt").read_text()
    lines = text.replace("\n ", " ").splitlines()
    rows = [re.split(r" ::(?= |$)", line) for line in lines if line and not line.startswith("#")]
    plants = [Plant(*(field.strip() for field in row)) for row in rows]
    assert len({plant.name for plant in plants}) == len(plants), f"two bugs of {table}.txt have one name"
    return plants


def read_sources(folder: Path, *suffixes: str) -> dict[str, str]:
    """Return the files below ``folder`` with one of these suffixes, by their paths from there."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in suffixes)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def write_sources(folder: Path, sources: Mapping[str, str]) -> Path:
    for path, source in sources.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source)
    return folder


def switch_on(sources: Mapping[str, str], plants: Sequence[Plant], switch: str) -> dict[str, str]:
    """Return the sources with all of these bugs in them: each with its number, from 1 on, in ``switch``."""
    made = dict(sources)
    for number, plant in enumerate(plants, 1):
        assert "ON" in plant.new, f"{plant.name} cannot be switched on"
        plant.apply(sources)  # there once, whatever the others have put beside it
        made = plant.apply(made, switch.format(number))
    return made


@cache
def _compile(code: str) -> re.Pattern[str]:
    parts, seen = [], set()
    for token in _TOKEN.findall(code):
        if token.startswith("$"):
            name = token[1:]
            parts.append(f"(?P={name})" if name in seen else rf"(?<!\w)(?P<{name}>{_NAME})")
            seen.add(name)
        elif token[0].isalnum() or token[0] == "_":
            parts.append(rf"(?<!\w){re.escape(token)}(?!\w)")
        else:
            parts.append(re.escape(token))
    return re.compile(_GAP.join(parts), re.DOTALL)


@cache
def _extents(source: str, scope: str, is_python: bool) -> list[tuple[int, int]]:
    if not scope:
        return [(0, len(source))]
    return _python_extents(source, scope) if is_python else _c_extents(source, scope)


def _python_extents(source: str, scope: str) -> list[tuple[int, int]]:
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds) and node.name == scope]
    return [(starts[node.lineno - 1], starts[node.end_lineno or -1]) for node in nodes]


def _c_extents(source: str, scope: str) -> list[tuple[int, int]]:
    """Find definitions: of a function, which no statement begins, or of a struct."""
    name = re.escape(scope)
    statement = r"(?!\s*(?:\} *)?(?:if|for|while|switch|return|else)\b)"
    function = rf"^{statement}[^\n;={{}}#]*(?<![\w.>]){name}\([^;{{}}]*\{{"
    struct = rf"^[^\n;={{}}#]*\b(?:struct|class) {name}\b[^;{{}}]*\{{"
    heads = re.finditer(f"{function}|{struct}", source, re.MULTILINE)
    return [(head.start(), _closing(source, head.end())) for head in heads]


def _closing(source: str, start: int) -> int:
    depth = 1
    for place in re.finditer(r"//[^\n]*|[{}]", source[start:]):
        depth += {"{": 1, "}": -1}.get(place[0], 0)
        if depth == 0:
            return start + place.end()
    raise AssertionError("a brace that is not closed")
