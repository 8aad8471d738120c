"""The instructions of PTX that the kernels' compilers use, and what each means in C++.

``tests/native/shim/ptx.h`` has the functions that the expressions call. An instruction that is not here is an error.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

#: In the patterns below, a name in braces is any of these types; other names in braces are themselves alternatives.
_KINDS = {
    "B": "b16 b32 b64",
    "U": "u16 u32 u64",
    "S": "s16 s32 s64",
    "I": "u16 s16 b16 u32 s32 b32 u64 s64 b64",
    "F": "f32 f64",
    "X": "u8 s8 u16 s16 u32 s32 u64 s64",  # what integers are converted from and to
    "Y": "u16 s16 b16 u32 s32 b32 u64 s64 b64 f32 f64",
}

#: Mnemonic -> C++, with the operands after the result as {0}, {1} and {2}. An operand has the mnemonic's last type,
#: or the one after its colon.
_EXPRESSIONS = {
    "mov.{Y pred}": "{0}",
    "cvta.to.global.u64": "{0}",
    "add.{I}": "{0} + {1}",
    "add.rn.{F}": "{0} + {1}",
    "sub.{I}": "{0} - {1}",
    "sub.rn.{F}": "{0} - {1}",
    "mul.lo.{I}": "{0} * {1}",
    "mul.hi.u32": "(u64({0}) * {1}) >> 32",
    "mul.rn.{F}": "{0} * {1}",
    "mul.wide.u16 -> u32": "u32({0}) * {1}",
    "mul.wide.u32 -> u64": "u64({0}) * {1}",
    "mul.wide.s32 -> s64": "s64({0}) * {1}",
    "mad.lo.{I}": "{0} * {1} + {2}",
    "mad.wide.s16 -> s32": "s32({0}) * {1} + {2:s32}",
    "mad.wide.u32 -> u64": "u64({0}) * {1} + {2:u64}",
    "mad.wide.s32 -> s64": "s64({0}) * {1} + {2:s64}",
    "fma.rn.{F}": "std::fma({0}, {1}, {2})",
    "div.rn.{F}": "{0} / {1}",
    "rcp.rn.{F}": "1 / {0}",
    "sqrt.rn.{F}": "std::sqrt({0})",
    "rem.{U S}": "{0} % {1}",
    "neg.{S F}": "-{0}",
    "min.{U S}": "{0} < {1} ? {0} : {1}",
    "max.{U S}": "{0} > {1} ? {0} : {1}",
    # Of a number and a NaN both give the number.
    "min.{F}": "std::fmin({0}, {1})",
    "max.{F}": "std::fmax({0}, {1})",
    "and.{B pred}": "{0} & {1}",
    "or.{B pred}": "{0} | {1}",
    "xor.{B pred}": "{0} ^ {1}",
    "not.{B}": "~{0}",
    "not.pred": "!{0}",
    "shl.{B}": "shift_left({0}, {1:u32})",
    "shr.{U S}": "shift_right({0}, {1:u32})",
    "shf.l.wrap.b32": "shift_pair_left({0}, {1}, {2:u32})",
    "selp.{Y}": "{2:pred} ? {0} : {1}",
    "setp.eq.{Y} -> pred": "{0} == {1}",
    "setp.ne.{I} -> pred": "{0} != {1}",
    "setp.lt.{U S F} -> pred": "{0} < {1}",
    "setp.le.{U S F} -> pred": "{0} <= {1}",
    "setp.gt.{U S F} -> pred": "{0} > {1}",
    "setp.ge.{U S F} -> pred": "{0} >= {1}",
    # With a NaN every comparison is false, but for those with a u.
    "setp.ne.{F} -> pred": "{0} < {1} || {0} > {1}",
    "setp.equ.{F} -> pred": "!({0} < {1} || {0} > {1})",
    "setp.neu.{F} -> pred": "{0} != {1}",
    "setp.ltu.{F} -> pred": "!({0} >= {1})",
    "setp.leu.{F} -> pred": "!({0} > {1})",
    "setp.gtu.{F} -> pred": "!({0} <= {1})",
    "setp.geu.{F} -> pred": "!({0} < {1})",
    "setp.nan.{F} -> pred": "{0} != {0} || {1} != {1}",
    "setp.num.{F} -> pred": "{0} == {0} && {1} == {1}",
    "cvt.{X}.{X}": "{0}",
    "cvt.f64.{f16 f32}": "{0}",
    "cvt.f32.f16": "{0}",
    "cvt.rn.f16.{F}": "{0}",
    "cvt.rn.f32.f64": "{0}",
    "cvt.rn.{F}.{U S}": "{0}",
    "cvt.rn.f16x2.f32 -> b32": "pair_of_halves({0}, {1})",
    "cvt.rmi.f32.f32": "std::floor({0})",
    "cvt.rmi.f64.f64": "std::floor({0})",
    "cvt.rzi.s32.{F}": "truncate<s32>({0})",
    "cvt.rzi.s64.{F}": "truncate<s64>({0})",
    "prmt.b32": "permute_bytes({0}, {1}, {2})",
    "brev.b32": "reverse_bits({0})",
    "bfe.{u32 u64 s32 s64}": "bit_field({0}, {1:u32}, {2:u32})",
    "bfi.{b32 b64}": "insert_bits({0}, {1}, {2:u32}, {3:u32})",
    # A hint of how long to stay in a cache. Nobody reads it here.
    "createpolicy.fractional.L2::evict_first.b64": "0",
    # Between the threads of a warp.
    "shfl.sync.bfly.b32": "exchange_lanes<__COUNTER__>({0}, {1:u32}, {2:u32}, {3:u32})",
    "redux.sync.add.{u32 s32}": "reduce_lanes<__COUNTER__>({0}, {1:u32}, add_of)",
    "redux.sync.min.{u32 s32}": "reduce_lanes<__COUNTER__>({0}, {1:u32}, min_of)",
    "redux.sync.max.{u32 s32}": "reduce_lanes<__COUNTER__>({0}, {1:u32}, max_of)",
}

#: What reads or writes memory. How it is cached, and in which order other blocks see it, is not looked at here.
ACCESS = re.compile(
    r"(?P<op>ld|st)\.(?P<space>global|shared|shared::cta|param)"
    r"(?:\.(?:nc|cs|cg|L1::evict_first|L2::cache_hint))*(?:\.v(?P<numel>[24]))?"
    r"\.(?P<type>[bus](?:8|16|32|64)|f(?:32|64))"
)
ATOMIC = re.compile(
    r"(?P<name>atom|red)(?:\.(?:global|gpu|acq_rel|relaxed))+\.(?P<op>add|inc|min|max|exch)\.(?P<type>[bus](?:32|64))"
)


#: What these do to integers does not depend on their sign, and to move a number is to move its bits.
_UNSIGNED = re.compile(
    r"(?:(?:add|sub|mul\.lo|mad\.lo|setp\.(?:eq|ne))\.[sb]|(?:mov|selp|and|or|xor|not|shl)\.[sbf])\d+"
)


@dataclass(frozen=True)
class Meaning:
    """What an instruction does: C++ for its result, the type of that, and the type of its operands."""

    expression: str
    result: str
    operand: str
    num_operands: int


def _expanded(pattern: str) -> Iterator[str]:
    """Return the mnemonics of a pattern: ``{S F}`` is any type of either."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [
        [part] if index % 2 == 0 else [one for kind in part.split() for one in _KINDS.get(kind, kind).split()]
        for index, part in enumerate(parts)
    ]
    return map("".join, itertools.product(*choices))


def _meanings() -> Iterator[tuple[str, Meaning]]:
    for row, expression in _EXPRESSIONS.items():
        pattern, _, result = row.partition(" -> ")
        for mnemonic in _expanded(pattern):
            types = [part for part in mnemonic.split(".") if re.fullmatch(r"[busf]\d+|pred", part)]
            if _UNSIGNED.fullmatch(mnemonic):
                types = [f"u{part[1:]}" for part in types]
            num_operands = max(map(int, re.findall(r"\{(\d)", expression)), default=0) + 1
            yield mnemonic, Meaning(expression, result or types[0], types[-1], num_operands)


MEANINGS = dict(_meanings())
