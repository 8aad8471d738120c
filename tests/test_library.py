"""The C interface as ``backends/library.py`` declares it, against the header that states it."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest

from swafast.backends import library
from tests.native_build import CSRC

HEADER = (CSRC / "swafast.h").read_text()
STRUCTURES = {
    "swafast_rule": library.KernelRule,
    "swafast_pace": library.Pace,
    "swafast_tensor": library.TensorRow,
    "swafast_table": library.TableHead,
    "swafast_grid": library.LaunchGrid,
    "swafast_sample": library.SamplePoint,
    "swafast_box": library.BoxWords,
}
#: How C spells them. An address may be of anything.
SPELLINGS: dict[Any, str] = {
    None: "void",
    ctypes.c_int32: "int32_t",
    ctypes.c_int64: "int64_t",
    ctypes.c_uint32: "uint32_t",
    ctypes.c_uint64: "uint64_t",
    ctypes.c_float: "float",
    ctypes.c_double: "double",
    ctypes.c_char_p: r"char\*",
    ctypes.c_void_p: r"\w+\*",
    ctypes.POINTER(ctypes.c_int32): r"int32_t\*",
    ctypes.POINTER(ctypes.c_int64): r"u?int64_t\*",
    **{structure: name for name, structure in STRUCTURES.items()},
    **{ctypes.POINTER(structure): rf"{name}\*" for name, structure in STRUCTURES.items()},
}


def is_spelled(kind: Any, text: str) -> bool:
    """Return whether a type of ctypes is this one of C, as in ``const int64_t*`` or ``double[4]``."""
    if isinstance(kind, type) and issubclass(kind, ctypes.Array):
        element, _, length = text.partition("[")
        return length == f"{kind._length_}]" and is_spelled(kind._type_, element)
    return re.fullmatch(SPELLINGS[kind], text.removeprefix("const ")) is not None


def declarations(text: str) -> list[tuple[str, str]]:
    """Return (name, type) of each declaration in a body or in a list of arguments."""
    found = re.findall(r"((?:const )?\w+\*?) (\w+)(\[\d+\])?", " ".join(text.split()))
    return [(name, kind + length) for kind, name, length in found]


def disagreements(header: str) -> list[str]:
    """Return the structures and functions that Python and this header declare differently."""
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    stated = {name: declarations(body) for body, name in re.findall(r"struct \{([^}]*)\} (\w+);", header)}
    ours = {name: list(structure._fields_) for name, structure in STRUCTURES.items()}
    for result, name, arguments in re.findall(r"SWAFAST_EXPORT ((?:const )?\w+\*?) (\w+)\(([^)]*)\)", header):
        stated[name] = [*declarations(arguments), ("result", result)]
    for name, signature in library.FUNCTIONS.items():
        ours[name] = [*signature.arguments.items(), ("result", signature.result)]
    return [
        name
        for name, items in ours.items()
        if [key for key, _ in items] != [key for key, _ in stated.get(name, [])]
        or not all(is_spelled(kind, text) for (_, kind), (_, text) in zip(items, stated[name], strict=True))
    ]


def test_python_declares_what_the_header_states() -> None:
    assert disagreements(HEADER) == []


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("int64_t wanted, const swafast_grid*", "int32_t wanted, const swafast_grid*", "swafast_cuda_exchange"),
        (
            "nonfinite(const swafast_table* table, const swafast_grid* grid, void* stream)",
            "nonfinite(const swafast_table* table, void* stream, const swafast_grid* grid)",
            "swafast_cuda_first_nonfinite",
        ),
        ("double swafast_weight", "float swafast_weight", "swafast_weight"),
        ("double terms[4]", "double terms[5]", "swafast_rule"),
        ("int32_t pace;", "int64_t pace;", "swafast_tensor"),
        ("int32_t num_threads;\n}", "int64_t num_threads;\n}", "swafast_grid"),
        ("swafast_cuda_blocks", "swafast_cuda_grid", "swafast_cuda_blocks"),
    ],
)
def test_a_changed_header_is_seen(old: str, new: str, name: str) -> None:
    assert old in HEADER
    assert disagreements(HEADER.replace(old, new)) == [name]


def test_numbers_of_the_header_stand_in_python_too() -> None:
    assert f"#define SWAFAST_MAX_PACES {library.MAX_PACES}\n" in HEADER
    assert f"#define SWAFAST_ABI {library._ABI}\n" in HEADER
