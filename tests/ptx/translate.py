"""PTX, as nvcc and Triton write it for sm_90, turned into C++ that runs on a CPU.

Each kernel becomes a function that one thread of a block runs, and each line of it a line of the function.
``tests/native/shim`` has the threads, the blocks and the memory. An instruction that is not known is an error; only
debug information and hints are skipped.

What this does not show: the code that ptxas makes of the PTX, the caches, and the order in which blocks that run at
once see each other's writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tests.ptx.instructions import ACCESS, ATOMIC, MEANINGS, Meaning

#: PTX of these versions, for these targets, has been read.
_VERSIONS, _TARGETS = range(7, 10), ("sm_90", "sm_90a")

_SPECIAL = {"%tid.x": "threadIdx.x", "%ntid.x": "blockDim.x", "%ctaid.x": "blockIdx.x", "%nctaid.x": "gridDim.x"}
#: Lines, or statements, that change nothing that a CPU could see.
_IGNORED = re.compile(r"\.(?:loc|file|pragma|address_size|minnctapersm|maxnreg)\b")
_LABEL = re.compile(r"([\w$]+):")


class PtxError(ValueError):
    """PTX that the translator does not know."""


@dataclass
class Kernel:
    """A kernel as its PTX declares it."""

    name: str
    threads: int = 0  # of a block
    params: dict[str, int] = field(default_factory=dict)  # -> bytes
    registers: dict[str, str] = field(default_factory=dict)  # prefix -> type
    shared: dict[str, int] = field(default_factory=dict)  # -> offset
    shared_nbytes: int = 0
    targets: dict[str, list[str]] = field(default_factory=dict)  # label of a table -> labels
    lines: dict[int, list[str]] = field(default_factory=dict)  # number -> statements that begin there
    used: dict[str, str] = field(default_factory=dict)  # register -> type

    def declare(self, statement: str) -> bool:
        """Take note of a declaration; return whether it is one."""
        found = re.fullmatch(r"\.reg \.(\w+)\s+%([a-z]+)<\d+>", statement)
        if found:
            self.registers[found[2]] = found[1]
            return True
        found = re.fullmatch(r"\.shared (?:\.align (\d+) )?\.\w(\d+) (\w+)(?:\[(\d+)\])?", statement)
        if found:
            self.add_shared(found[3], int(found[1] or 1), int(found[2]) // 8 * int(found[4] or 1))
        return bool(found)

    def add_shared(self, name: str, align: int, nbytes: int) -> None:
        self.shared[name] = -(-self.shared_nbytes // align) * align
        self.shared_nbytes = self.shared[name] + nbytes


def read_kernels(ptx: str, extern_nbytes: int = 0) -> list[Kernel]:
    """Return the kernels of a file, whose ``.extern .shared`` array has ``extern_nbytes`` at a launch.

    Raises:
        PtxError: the PTX is of another version or target, or has a directive that is not known.
    """
    made: list[Kernel] = []
    extern, kernel, label, depth = "", None, "", 0
    for number, statement in _statements(ptx):
        try:
            if statement == "{":
                depth += 1
            elif statement == "}":
                depth -= 1
                kernel = kernel if depth else None
            elif kernel is None or depth == 0:
                kernel, extern = _read_head(statement, kernel, extern)
                if kernel is not None and kernel not in made:
                    made.append(kernel)
                    if extern:
                        kernel.add_shared(extern, 16, extern_nbytes)
            elif statement.startswith(".branchtargets"):
                kernel.targets[label] = [target.strip() for target in statement.split(maxsplit=1)[1].split(",")]
            elif not kernel.declare(statement):
                label = statement.rstrip(":")
                kernel.lines.setdefault(number, []).append(statement)
        except PtxError as error:
            raise PtxError(f"line {number}: {error}") from None
    if not made:
        raise PtxError("no kernel is there")
    return made


def _statements(ptx: str) -> Iterator[tuple[int, str]]:
    """Return (number of its first line, statement) without comments, debug information and hints."""
    begun, start, skipped = "", 0, False
    for number, line in enumerate(ptx.splitlines(), 1):
        text = line.partition("//")[0].strip()
        if text.startswith(".section"):
            skipped = True
        if skipped:
            skipped = "}" not in text
            continue
        if not begun and (not text or _IGNORED.match(text)):
            continue
        start = start if begun else number
        begun = f"{begun} {text}".strip()
        # Directives about a kernel or a file end with their line, and so do labels and braces.
        if re.fullmatch(r"[{}()]|[\w$]+:|\.(?:version|target|maxntid|reqntid|visible|param)\b.*", begun):
            yield start, begun
            begun = ""
        elif begun.endswith(";"):
            yield from ((start, part.strip()) for part in begun.split(";") if part.strip())
            begun = ""
    if begun:
        raise PtxError(f"line {start}: {begun!r} does not end")


def _read_head(statement: str, kernel: Kernel | None, extern: str) -> tuple[Kernel | None, str]:
    """Read a line outside the kernels' bodies; return the kernel that it is about and the extern array's name."""
    if statement in ("(", ")"):
        return kernel, extern
    found = re.fullmatch(r"\.version (\d+)\.\d+", statement)
    if found and int(found[1]) in _VERSIONS:
        return kernel, extern
    found = re.fullmatch(r"\.target (\w+)(?:, debug)?", statement)
    if found and found[1] in _TARGETS:
        return kernel, extern
    found = re.fullmatch(r"\.extern \.shared \.align 16 \.b8 (\w+)\[\]", statement)
    if found:
        return kernel, found[1]
    found = re.fullmatch(r"\.visible \.entry (\w+)\(", statement)
    if found:
        return Kernel(found[1]), extern
    found = re.fullmatch(r"\.(?:maxntid|reqntid) (\d+)(?:, 1)*", statement)
    if found and kernel is not None:
        kernel.threads = int(found[1])
        return kernel, extern
    found = re.fullmatch(r"\.param (?:\.align \d+ )?\.\w(\d+) (?:\.ptr .* )?(\w+)(?:\[(\d+)\])?,?", statement)
    if found and kernel is not None:
        kernel.params[found[2]] = int(found[1]) // 8 * int(found[3] or 1)
        return kernel, extern
    raise PtxError(f"unknown directive {statement!r}; PTX {_VERSIONS[0]} to {_VERSIONS[-1]} for {_TARGETS} is known")


class _Operand:
    """An operand, which a format string of an expression turns into a C++ value of some type."""

    def __init__(self, kernel: Kernel, text: str, type_: str) -> None:
        self._kernel, self._text, self._type = kernel, text, type_

    def __format__(self, type_: str) -> str:
        return _value(self._kernel, self._text, type_ or self._type)


def _register(kernel: Kernel, text: str) -> str:
    """Return the C++ variable of a register."""
    found = re.fullmatch(r"%([a-z]+)(\d+)", text)
    if not found or found[1] not in kernel.registers:
        raise PtxError(f"unknown operand {text!r}")
    name = f"{found[1]}_{found[2]}"
    kernel.used[name] = kernel.registers[found[1]]
    return name


def _bits(kernel: Kernel, text: str) -> str:
    if text in _SPECIAL:
        return _SPECIAL[text]
    if text in kernel.shared:
        return str(kernel.shared[text])
    if text in kernel.params:
        return f"address_of(params[{list(kernel.params).index(text)}])"
    if re.fullmatch(r"0f[\dA-Fa-f]{8}", text):
        return f"0x{text[2:]}u"
    if re.fullmatch(r"0d[\dA-Fa-f]{16}", text):
        return f"0x{text[2:]}ull"
    if re.fullmatch(r"-?(?:0x[\dA-Fa-f]+|\d+)U?", text):
        return f"{int(text.rstrip('U'), 0) % 2**64}ull"
    return _register(kernel, text)


def _value(kernel: Kernel, text: str, type_: str) -> str:
    """Return a C++ value of this type. An operand that has it stands as it is, which g++ reads in half of the time."""
    bits = _bits(kernel, text)
    if type_ in ("u32", "u64") and bits.endswith("ull"):
        return f"{int(bits[:-3], 0) % 2 ** int(type_[1:])}u" + "ll" * (type_ == "u64")
    is_it = type_ == _variable_type(kernel.used.get(bits, ""))
    return bits if is_it else f"get<{type_}>({bits})"


def _assigned(kernel: Kernel, text: str, type_: str, value: str) -> str:
    register = _register(kernel, text)
    is_it = type_ == _variable_type(kernel.used[register])
    return f"{register} = {value};" if is_it else f"put<{type_}>({register}, {value});"


def _variable_type(type_: str) -> str:
    """Return the C++ type of a register's variable: an unsigned integer, whatever it holds."""
    return type_ if type_ in ("pred", "") else f"u{type_[1:]}"


def _place(kernel: Kernel, text: str, space: str, nbytes: int) -> str:
    """Return a C++ pointer to the memory that ``[text]`` names."""
    found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+)\s*)?\]", text)
    if not found:
        raise PtxError(f"unknown address {text!r}")
    base, offset = found[1], int(found[2] or 0)
    if space.startswith("shared"):
        return f"shared_at(shared, {kernel.shared_nbytes}, {_value(kernel, base, 'u32')}, {offset}, {nbytes})"
    if (space == "param") != (base in kernel.params) and space != "param":
        raise PtxError(f"{text!r} is not in {space} memory")
    return f"pointer({_value(kernel, base, 'u64')}, {offset})"


def _split(text: str) -> list[str]:
    """Return operands: those in braces or brackets are one."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


def _several(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{} ").split(",")]


def _access(kernel: Kernel, found: re.Match[str], operands: Sequence[str]) -> str:
    type_, numel = found["type"].replace("b", "u"), int(found["numel"] or 1)
    at, values = operands[found["op"] == "ld"], _several(operands[found["op"] != "ld"])
    hints = len(operands) - 2
    if len(values) != numel or hints != (1 if "L2::cache_hint" in found[0] else 0):
        raise PtxError(f"{found[0]} of {operands}")
    place = _place(kernel, at, found["space"], int(type_[1:]) // 8 * numel)
    if found["op"] == "ld":
        puts = (_assigned(kernel, value, type_, f"v[{i}]") for i, value in enumerate(values))
        return f"{{ const auto v = load<{type_}, {numel}>({place}); {' '.join(puts)} }}"
    return f"store<{type_}>({place}, {{{', '.join(_value(kernel, value, type_) for value in values)}}});"


def _atomic(kernel: Kernel, found: re.Match[str], operands: Sequence[str]) -> str:
    type_ = found["type"].replace("b", "u")
    *result, at, value = operands
    place = _place(kernel, at, "global", int(type_[1:]) // 8)
    made = f"atomic<{type_}>({place}, {_value(kernel, value, type_)}, {found['op']}_of)"
    return _assigned(kernel, result[0], type_, made) if result else f"{made};"


def _pack(kernel: Kernel, type_: str, result: str, value: str) -> str:
    """Return C++ for a ``mov`` that joins registers to a wider one, or takes one apart."""
    parts = _several(value if value.startswith("{") else result)
    nbits = int(type_[1:]) // len(parts)
    if value.startswith("{"):
        joined = (f"u64{{{_value(kernel, part, f'u{nbits}')}}} << {nbits * i}" for i, part in enumerate(parts))
        return _assigned(kernel, result, type_, " | ".join(joined))
    puts = (_assigned(kernel, part, f"u{nbits}", f"v >> {nbits * i}") for i, part in enumerate(parts) if part != "_")
    return f"{{ const u64 v = {_value(kernel, value, type_)}; {' '.join(puts)} }}"


def _jump(kernel: Kernel, mnemonic: str, operands: Sequence[str]) -> str | None:
    """Return C++ for what goes elsewhere or waits, or None."""
    match [mnemonic, *operands]:
        case ["bra" | "bra.uni", target]:
            return f"goto {target.replace('$', '')};"
        case ["brx.idx", index, table] if table in kernel.targets:
            cases = (f"case {i}: goto {to.replace('$', '')};" for i, to in enumerate(kernel.targets[table]))
            return f"switch ({_value(kernel, index, 'u32')}) {{ {' '.join(cases)} default: no_target(); }}"
        case ["bar.sync", "0"]:
            return "shim::wait_at_barrier();"
        case ["ret"]:
            return "return;"
    return None


def translate_statement(kernel: Kernel, statement: str) -> str:
    """Return C++ for a label or an instruction.

    Raises:
        PtxError: it is not known.
    """
    label = _LABEL.fullmatch(statement)
    if label:
        return f"{label[1].replace('$', '')}:;"
    guard, _, rest = re.fullmatch(r"((@!?%p\d+)\s+)?(.*)", statement).groups()  # type: ignore[union-attr]
    mnemonic, _, text = rest.partition(" ") if " " in rest else rest.partition("\t")
    mnemonic, operands = mnemonic.strip(), _split(text)
    return (_guard(kernel, guard) if guard else "") + _instruction(kernel, mnemonic, operands)


def _guard(kernel: Kernel, guard: str) -> str:
    sign, register = re.fullmatch(r"@(!?)(%p\d+)\s+", guard).groups()  # type: ignore[union-attr]
    return f"if ({sign}{_register(kernel, register)}) "


def _instruction(kernel: Kernel, mnemonic: str, operands: Sequence[str]) -> str:
    jump = _jump(kernel, mnemonic, operands)
    if jump is not None:
        return jump
    for pattern, translate in ((ACCESS, _access), (ATOMIC, _atomic)):
        found = pattern.fullmatch(mnemonic)
        if found:
            return translate(kernel, found, operands)
    if mnemonic in ("mov.b32", "mov.b64") and "{" in "".join(operands):
        return _pack(kernel, f"u{mnemonic[5:]}", *operands)
    meaning: Meaning | None = MEANINGS.get(mnemonic)
    if meaning is None:
        raise PtxError(f"unknown instruction {mnemonic!r}: add what it does to tests/ptx/instructions.py")
    result, *values = operands
    given = [_Operand(kernel, value, meaning.operand) for value in values]
    if len(set(re.findall(r"\{(\d)", meaning.expression))) not in (0, len(values)):
        raise PtxError(f"{mnemonic} of {operands}")
    return _assigned(kernel, result, meaning.result, meaning.expression.format(*given))


def translate(kernels: Sequence[Kernel], *, has_source: bool, edits: Sequence[Mapping[int, str]] = ()) -> str:
    """Return a C++ file with these kernels.

    Args:
        has_source: Whether the file is linked with the kernels that a host compiler made of their source. Their names
            then find them, and a launch of one of those runs the one here.
        edits: Lines by their numbers, for bugs that can be switched on: ``shim_bug`` is 1 for the first.
    """
    parts = ['#include "ptx.h"', "using namespace ptx;", 'extern "C" SHIM_SETTING int shim_bug = 0;']
    rows = []
    for index, kernel in enumerate(kernels):
        body = [_line(kernel, number, edits) for number in kernel.lines]
        registers = (f"{_variable_type(type_)} {name};" for name, type_ in kernel.used.items())
        parts += [f"static void run_{index}(char* const* params) {{"]
        if kernel.shared_nbytes:
            parts += [f"alignas(16) __shared__ char shared[{kernel.shared_nbytes}];"]
        parts += [*registers, *body, "}"]
        source = "nullptr"
        if has_source:
            parts.append(f'extern "C" void {kernel.name}();')
            source = f"reinterpret_cast<const void*>(&{kernel.name})"
        parts.append(f"static const size_t sizes_{index}[] = {{{', '.join(map(str, kernel.params.values()))}}};")
        about = f"{kernel.threads}, {len(kernel.params)}, sizes_{index}"
        rows.append(f'{{"{kernel.name}", {source}, run_{index}, {about}}},')
    table = "const shim::Translated shim::translated[] = {"
    return "\n".join([*parts, table, *rows, "{}};", ""])


def _line(kernel: Kernel, number: int, edits: Sequence[Mapping[int, str]]) -> str:
    def code(statements: Sequence[str]) -> str:
        try:
            return " ".join(translate_statement(kernel, statement) for statement in statements)
        except PtxError as error:
            raise PtxError(f"{kernel.name}, line {number}: {error}") from None

    made = code(kernel.lines[number])
    for bug, lines in enumerate(edits, 1):
        if number in lines:
            planted = code([part.strip() for part in lines[number].split(";") if part.strip()])
            made = f"if (shim_bug == {bug}) {{ {planted} }} else {{ {made} }}"
    return made
