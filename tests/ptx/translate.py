"""PTX, as nvcc and Triton write it for sm_90, turned into C++ that runs on a CPU.

Each kernel becomes a function that one thread of a block runs, and each line of it a line of the function.
``tests/native/shim`` has the threads, the blocks and the memory. An instruction that is not known is an error; only
debug information and hints are skipped.

What this does not show: the code that ptxas makes of the PTX, the caches, and the order in which blocks that run at
once see each other's writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tests.ptx.instructions import ACCESS, ATOMIC, MEANINGS
from tests.ptx.read import Kernel, PtxError

_SPECIAL = {"%tid.x": "threadIdx.x", "%ntid.x": "blockDim.x", "%ctaid.x": "blockIdx.x", "%nctaid.x": "gridDim.x"}


def translate(kernels: Sequence[Kernel], *, has_source: bool, edits: Sequence[Mapping[int, str]] = ()) -> str:
    """Return a C++ file with these kernels.

    Args:
        has_source: Whether the file is linked with the kernels that a host compiler made of their source. Their names
            then find them, and a launch of one of those runs the one here.
        edits: Lines by their numbers, for bugs that can be switched on: ``shim_bug`` is 1 for the first.

    Raises:
        PtxError: an instruction is not known.
    """
    parts = ['#include "ptx.h"', "using namespace ptx;", 'extern "C" SHIM_SETTING int shim_bug = 0;']
    rows = []
    for index, kernel in enumerate(kernels):
        function = _Function(kernel)
        body = [function.line(number, edits) for number in kernel.lines]
        parts.append(f"static void run_{index}(char* const* params) {{")
        if kernel.shared_nbytes:
            parts.append(f"alignas(16) __shared__ char shared[{kernel.shared_nbytes}];")
        parts += [*function.variables(), *body, "}"]
        source = "nullptr"
        if has_source:
            parts.append(f'extern "C" void {kernel.name}();')
            source = f"reinterpret_cast<const void*>(&{kernel.name})"
        parts.append(f"static const size_t sizes_{index}[] = {{{', '.join(map(str, kernel.params.values()))}}};")
        about = f"{kernel.num_threads}, {len(kernel.params)}, sizes_{index}"
        rows.append(f'{{"{kernel.name}", {source}, run_{index}, {about}}},')
    table = "const shim::Translated shim::translated[] = {"
    return "\n".join([*parts, table, *rows, "{}};", ""])


class _Function:
    """A kernel's body in C++. Each register has a variable, an unsigned integer of its size, whatever it holds."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._variables: dict[str, str] = {}  # -> type

    def variables(self) -> list[str]:
        """Return the declarations of all registers that the lines so far have used."""
        return [f"{type_} {name};" for name, type_ in self._variables.items()]

    def line(self, number: int, edits: Sequence[Mapping[int, str]]) -> str:
        """Return what a line of the PTX does, with the bugs that are planted there."""
        made = self._statements(number, self._kernel.lines[number])
        for bug, lines in enumerate(edits, 1):
            if number in lines:
                planted = self._statements(number, lines[number].split(";"))
                made = f"if (shim_bug == {bug}) {{ {planted} }} else {{ {made} }}"
        return made

    def _statements(self, number: int, statements: Sequence[str]) -> str:
        try:
            return " ".join(self._statement(text.strip()) for text in statements if text.strip())
        except PtxError as error:
            raise PtxError(f"{self._kernel.name}, line {number}: {error}") from None

    def _statement(self, text: str) -> str:
        if label := re.fullmatch(r"([\w$]+):", text):
            return f"{_label(label[1])}:;"
        parts = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", text)
        if parts is None:
            raise PtxError(f"{text!r} is no statement")
        guard = f"if ({parts[1]}{self.value(parts[2], 'pred')}) " if parts[2] else ""
        # What stands in braces or brackets is one operand.
        operands = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", parts[4])
        return guard + self._instruction(parts[3], [operand.strip() for operand in operands])

    def _instruction(self, mnemonic: str, operands: Sequence[str]) -> str:
        """Return C++ for an instruction.

        Raises:
            PtxError: it is not known, or not with these operands.
        """
        try:
            match [mnemonic, *operands]:
                case ["bra" | "bra.uni", target]:
                    return f"goto {_label(target)};"
                case ["brx.idx", index, table]:
                    return self._branch(index, self._kernel.targets[table])
                case ["bar.sync", "0"]:
                    return "shim::wait_at_barrier();"
                case ["cp.async.ca.shared.global", to, of, "16"]:
                    place, source = self._place(to, "shared", 16), self._place(of, "global", 16)
                    return f"shim::copy_later({place}, {source});"
                case ["cp.async.wait_all"]:
                    return "shim::make_copies();"
                case ["ret"]:
                    return "return;"
                case ["mov.b32" | "mov.b64", result, value] if "{" in result + value:
                    return self._pack(f"u{mnemonic[5:]}", result, value)
            if found := ACCESS.fullmatch(mnemonic):
                return self._access(found, *operands)
            if found := ATOMIC.fullmatch(mnemonic):
                return self._atomic(found, *operands)
            if mnemonic in MEANINGS:
                return self._result_of(mnemonic, *operands)
        except (TypeError, KeyError):  # of another number of operands, or of a table that is not there
            pass
        at = ", ".join(operands)
        raise PtxError(f"unknown instruction {f'{mnemonic} {at}'.strip()!r}: say in tests/ptx what it does")

    def _result_of(self, mnemonic: str, result: str, *operands: str) -> str:
        meaning = MEANINGS[mnemonic]
        if meaning.num_operands != len(operands):
            raise TypeError(mnemonic)
        is_conversion = mnemonic.startswith("cvt.")
        values = [_Operand(self, operand, meaning.operand, is_conversion) for operand in operands]
        return self._assigned(result, meaning.result, meaning.expression.format(*values), is_conversion)

    def _branch(self, index: str, targets: Sequence[str]) -> str:
        cases = (f"case {i}: goto {_label(target)};" for i, target in enumerate(targets))
        return f"switch ({self.value(index, 'u32')}) {{ {' '.join(cases)} default: no_target(); }}"

    def _pack(self, type_: str, result: str, value: str) -> str:
        """Join registers to a wider value, or take one apart."""
        parts = _several(value if value.startswith("{") else result)
        nbits = int(type_[1:]) / len(parts)
        if nbits not in (16, 32):
            raise TypeError(type_)
        nbits = int(nbits)
        if value.startswith("{"):
            shifted = (f"u64{{{self.value(part, f'u{nbits}')}}} << {nbits * i}" for i, part in enumerate(parts))
            return self._assigned(result, type_, " | ".join(shifted))
        puts = (self._assigned(part, f"u{nbits}", f"v >> {nbits * i}") for i, part in enumerate(parts) if part != "_")
        return f"{{ const u64 v = {self.value(value, type_)}; {' '.join(puts)} }}"

    def _access(self, found: re.Match[str], first: str, second: str, hint: str | None = None) -> str:
        """Load or store one value or several."""
        type_, numel, loads = found["type"].replace("b", "u"), int(found["numel"] or 1), found["op"] == "ld"
        at, values = (second, _several(first)) if loads else (first, _several(second))
        nbytes, is_param = int(type_[1:]) // 8 * numel, found["space"] == "param"
        has_hint = "L2::cache_hint" in found[0]
        if len(values) != numel or (hint is not None) != has_hint or nbytes > 16 or (is_param and not loads):
            raise TypeError(found[0])
        place = self._place(at, found["space"], nbytes)
        if loads:
            puts = (self._assigned(value, type_, f"v[{i}]", True) for i, value in enumerate(values))
            return f"{{ const auto v = load<{type_}, {numel}>({place}); {' '.join(puts)} }}"
        return f"store<{type_}>({place}, {{{', '.join(self.value(value, type_, True) for value in values)}}});"

    def _atomic(self, found: re.Match[str], *operands: str) -> str:
        *result, at, value = operands
        if len(result) != (found["name"] == "atom"):
            raise TypeError(found[0])
        type_ = found["type"].replace("b", "u")
        place = self._place(at, "global", int(type_[1:]) // 8)
        made = f"atomic<{type_}>({place}, {self.value(value, type_)}, {found['op']}_of)"
        return self._assigned(result[0], type_, made) if result else f"{made};"

    def _place(self, text: str, space: str, nbytes: int) -> str:
        """Return a C++ pointer to the memory that ``[text]`` names."""
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+)\s*)?\]", text)
        if not found or (found[1] in self._kernel.params and space != "param"):
            raise PtxError(f"unknown address {text!r} of {space} memory")
        base, offset = found[1], int(found[2] or 0)
        if base in self._kernel.params and not 0 <= offset <= self._kernel.params[base] - nbytes:
            raise PtxError(f"{text!r} is outside its param")
        if space.startswith("shared"):
            start = self.value(base, "u32", True)
            return f"shared_at(shared, {self._kernel.shared_nbytes}, {start}, {offset}, {nbytes})"
        return f"pointer({self.value(base, 'u64')}, {offset})"

    def value(self, text: str, type_: str, may_be_wider: bool = False) -> str:
        """Return a C++ value of this type.

        Where the operand has the type, it stands as it is: g++ takes half of the time.

        Raises:
            PtxError: it has another width. Loads, stores and conversions take the lower bits of a wider register.
        """
        # Not octal or binary ones; an integer for a float would be converted.
        if re.fullmatch(r"-?(?:0x[\dA-Fa-f]+|[1-9]\d*|0)U?", text) and type_ not in ("f32", "f64"):
            number = int(text.rstrip("U"), 0)
            if not -(2**63) <= number < 2**64:
                raise PtxError(f"{text!r} has more than 64 bits")
            number %= 2**64
            exact = {"u32": f"{number % 2**32}u", "u64": f"{number}ull"}
            return exact.get(type_) or f"get<{type_}>({number}ull)"
        bits, own = self._bits(text, type_)
        _require_width(text, own, type_, may_be_wider)
        return bits if type_ == self._variables.get(bits) else f"get<{type_}>({bits})"

    def _bits(self, text: str, type_: str) -> tuple[str, str]:
        """Return C++ for the bits of an operand, and its own type."""
        if text in _SPECIAL:
            return _SPECIAL[text], "u32"
        if text in self._kernel.shared:
            return str(self._kernel.shared[text]), "u64" if type_ == "u64" else "u32"
        if text in self._kernel.params:
            return f"address_of(params[{list(self._kernel.params).index(text)}])", "u64"
        if found := re.fullmatch(r"0f([\dA-Fa-f]{8})|0d([\dA-Fa-f]{16})", text):
            return (f"0x{found[1]}u", "u32") if found[1] else (f"0x{found[2]}ull", "u64")
        name = self._register(text)
        return name, self._variables[name]

    def _register(self, text: str) -> str:
        """Return the variable of a register."""
        found = re.fullmatch(r"%([a-z]+)(\d+)", text)
        type_, number = self._kernel.registers.get(found[1], ("", 0)) if found else ("", 0)
        if not found or int(found[2]) >= number:
            raise PtxError(f"unknown operand {text!r}")
        name = f"{found[1]}_{found[2]}"
        self._variables[name] = type_ if type_ == "pred" else f"u{type_[1:]}"
        return name

    def _assigned(self, register: str, type_: str, value: str, may_be_wider: bool = False) -> str:
        name = self._register(register)
        _require_width(register, self._variables[name], type_, may_be_wider)
        is_of_type = type_ == self._variables[name]
        return f"{name} = {value};" if is_of_type else f"put<{type_}>({name}, {value});"


class _Operand:
    """An operand, which the format string of an expression makes a C++ value of some type."""

    def __init__(self, function: _Function, text: str, type_: str, may_be_wider: bool) -> None:
        self._function, self._text, self._type, self._may_be_wider = function, text, type_, may_be_wider

    def __format__(self, type_: str) -> str:
        return self._function.value(self._text, type_ or self._type, self._may_be_wider)


def _require_width(text: str, own: str, type_: str, may_be_wider: bool) -> None:
    has, asked = (1 if each == "pred" else int(each[1:]) for each in (own, type_))
    if has != asked and not (may_be_wider and has > asked > 1):
        raise PtxError(f"{text!r} has {has} bits, and the instruction asks for {asked}")


def _label(text: str) -> str:
    return text.replace("$", "")


def _several(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{} ").split(",")]
