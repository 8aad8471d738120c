"""What the inputs of an average must agree on: names, shapes and dtypes. All is checked before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..terms.misfits import few
from ..terms.unmerged import is_unmerged
from .checkpoints import AVERAGED_DTYPES, Checkpoint, TensorSpec

#: How many names a message lists.
_FEW = 3
#: Dtypes of counters, masks and the like, of which one input's may be taken.
_COUNTED = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")
#: Bytes that are compared at a time.
_WINDOW = 1 << 20

INTEGERS = ("equal", "last", "first")


@dataclass(frozen=True)
class Agreed:
    """A tensor of the output, and what it is made of."""

    spec: TensorSpec  # of the output
    names: tuple[str, ...]  # in each input
    dtypes: tuple[str, ...]  # in each input
    #: The input that it is copied from; None: it is averaged.
    copied_from: int | None = None
    #: It is copied, and all inputs must have the same bytes.
    is_equal: bool = False

    @property
    def read_from(self) -> Sequence[int]:
        """The inputs that are read."""
        return range(len(self.names)) if self.copied_from is None or self.is_equal else (self.copied_from,)


def agree(
    inputs: Sequence[Checkpoint], *, tied: Mapping[str, str], dtype: str | None, integers: str
) -> tuple[list[Agreed], dict[str, str]]:
    """Return the output's tensors in the order of the first input, and further names of them.

    Args:
        inputs: open checkpoints.
        tied: names that are further names of others.
        dtype: of the averages. None: that of the inputs.
        integers: ``"equal"``, ``"last"`` or ``"first"``. Tensors that no merge averages, such as BatchNorm's
            statistics, need not agree: they are those of the last input, or of the first for ``"first"``.

    Raises:
        ValueError: a name is missing in an input, shapes or dtypes differ, or there is no value to average.
    """
    groups = _groups(tied)
    names = list(dict.fromkeys(name for each in inputs for name in (*each.specs, *each.aliases)))
    unknown = [name for name in groups if name not in names]
    if unknown:
        raise ValueError(f"tied must be of names in the inputs, got {few(unknown)}, which no input has")
    found = [_resolved(each, names, groups) for each in inputs]
    _check_names(inputs, names, found)
    _check_tied(inputs, groups)
    agreed: dict[tuple[str, ...], Agreed] = {}
    written: dict[tuple[str, ...], str] = {}
    aliases: dict[str, str] = {}
    differing: list[str] = []
    for name in (*(first for first, *_ in groups.values()), *names):
        written.setdefault(tuple(each[name] for each in found), name)
    for name in names:
        sources = tuple(each[name] for each in found)
        if written[sources] != name:
            aliases[name] = written[sources]
        if sources in agreed:
            continue
        specs = [each.specs[source] for each, source in zip(inputs, sources, strict=True)]
        difference = None if is_unmerged(name) else _difference(name, specs, inputs, dtype)
        if difference is not None:
            differing.append(difference)
        else:
            agreed[sources] = _agreed(written[sources], sources, specs, dtype, integers)
    if differing:
        raise ValueError(f"{len(differing)} tensors of the inputs differ: {'; '.join(differing[:_FEW])}")
    averaged = [each.spec for each in agreed.values() if each.copied_from is None]
    if averaged and not any(spec.numel for spec in averaged):
        raise ValueError(
            f"inputs must hold values to average, got only empty tensors in {inputs[0].path}, as ZeRO-3 leaves them in "
            "a model's state: save a gathered state"
        )
    return list(agreed.values()), aliases


def _groups(tied: Mapping[str, str]) -> dict[str, list[str]]:
    """Return, for each tied name, the names of its tensor, the one that is written first."""
    groups: dict[str, list[str]] = {}
    for name, of in tied.items():
        if of in tied or name == of:
            raise ValueError(f"tied must give each name another one that is not tied itself, got {name}={of}")
        groups.setdefault(of, [of]).append(name)
    return {name: group for group in groups.values() for name in group}


def _resolved(checkpoint: Checkpoint, names: Sequence[str], groups: Mapping[str, list[str]]) -> dict[str, str]:
    """Return the name of the tensor in ``specs`` that each name means in this checkpoint."""
    resolved = {}
    for name in names:
        for candidate in groups.get(name, (name,)):
            own = checkpoint.aliases.get(candidate, candidate)
            if own in checkpoint.specs:
                resolved[name] = own
                break
    return resolved


def _check_names(inputs: Sequence[Checkpoint], names: Sequence[str], found: Sequence[Mapping[str, str]]) -> None:
    for each, resolved in zip(inputs, found, strict=True):
        missing = [name for name in names if name not in resolved]
        if missing:
            which = next(other for other, has in zip(inputs, found, strict=True) if missing[0] in has)
            raise ValueError(
                f"{each.path} lacks {len(missing)} of the tensors, which {which.path} has: {few(missing)}. "
                "Leave that input out; for tied names pass --tied lm_head.weight=model.embed_tokens.weight; for a "
                "prefix pass --strip (tied=, strip=)"
            )
    if not names:
        raise ValueError(f"{inputs[0].path} holds no tensor")


def _check_tied(inputs: Sequence[Checkpoint], groups: Mapping[str, list[str]]) -> None:
    """Check that names which the user calls tied are of equal tensors, where an input has both."""
    for name, (first, *_) in groups.items():
        for each in inputs:
            own, other = (each.aliases.get(it, it) for it in (first, name))
            if own != other and own in each.specs and other in each.specs and not _same(each, own, other):
                raise ValueError(f"tied says that {name} is {first}, and in {each.path} they differ")


def _same(checkpoint: Checkpoint, first: str, second: str) -> bool:
    one, other = (checkpoint.specs[name] for name in (first, second))
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    windows = [memoryview(bytearray(_WINDOW)) for _ in range(2)]
    for start in range(0, one.nbytes, _WINDOW):
        size = min(_WINDOW, one.nbytes - start)
        for name, window in zip((first, second), windows, strict=True):
            checkpoint.read_into(name, start, window[:size])
        if windows[0][:size] != windows[1][:size]:
            return False
    return True


def _difference(name: str, specs: Sequence[TensorSpec], inputs: Sequence[Checkpoint], dtype: str | None) -> str | None:
    """Describe how an input's tensor differs from that of the first input."""
    first = specs[0]
    is_float = all(spec.dtype in AVERAGED_DTYPES for spec in specs)
    for spec, each in zip(specs, inputs, strict=True):
        if spec.shape != first.shape:
            return f"{name} has the shape {list(first.shape)} in {inputs[0].path} and {list(spec.shape)} in {each.path}"
        if spec.dtype != first.dtype and not (is_float and dtype is not None):
            advice = " (dtype='fp32' or --dtype fp32 says which one is written)" if is_float else ""
            return f"{name} is {first.dtype} in {inputs[0].path} and {spec.dtype} in {each.path}{advice}"
    return None


def _agreed(
    name: str, sources: tuple[str, ...], specs: Sequence[TensorSpec], dtype: str | None, integers: str
) -> Agreed:
    dtypes = tuple(spec.dtype for spec in specs)
    taken = len(specs) - 1 if is_unmerged(name) and integers != "first" else 0
    own = dtypes[taken]
    written = TensorSpec(name, dtype or own if own in AVERAGED_DTYPES else own, specs[taken].shape)
    if is_unmerged(name):
        return Agreed(written, sources, dtypes, taken)
    if own in AVERAGED_DTYPES:
        return Agreed(written, sources, dtypes)
    is_equal = integers == "equal" or own not in _COUNTED
    copied_from = len(specs) - 1 if integers == "last" else 0
    return Agreed(written, sources, dtypes, copied_from, is_equal)


def why_unequal(tensor: Agreed, first: str, other: str) -> str:
    """Describe a copied tensor that is not the same in two inputs, and what to do."""
    dtype = tensor.spec.dtype
    if dtype in _COUNTED:
        return (
            f"the {dtype} tensor {tensor.spec.name} differs between {first} and {other}, and integers are not "
            "averaged: integers='last' (--integers last) takes those of the last input"
        )
    return f"the {dtype} tensor {tensor.spec.name} differs between {first} and {other}, and {dtype} is not averaged"
