"""Pickles of torch's files, read without torch. Nothing in them is imported, and none of it runs.

A pickle names classes and functions, and a load calls them. Here each name stands for an empty class, an ``Opaque``,
which keeps what it is called with. Only tensors, ordered dicts and sizes become more than that.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..terms.boxes import are_sizes
from ..torch_private import pickled as names

#: No pickle is larger: those of 100,000 tensors have 20 MB.
MOST_PICKLE_NBYTES = 100_000_000

#: The dtypes of safetensors, by torch's names.
DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64", "bool": "BOOL"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8"},
    **{"uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"},
    **{"float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ"},
}

#: The storages of torch, by the dtype of their elements. Newer dtypes have storages of bytes.
STORAGES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "ComplexFloat": "complex64"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"},
}

#: Opcodes that files of torch never have: each takes memory, objects or modules from elsewhere.
_FORBIDDEN = (
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.INST, pickle.OBJ, pickle.PERSID),
)

#: Opcodes that hash values: where those lie in the stack.
_KEYS = {
    pickle.SETITEM: slice(-2, -1),
    **dict.fromkeys((pickle.SETITEMS, pickle.DICT), slice(None, None, 2)),
}
#: A byte of a pickle takes up to 100 bytes of memory. The list of 180,000 chunks of tensors has so many opcodes.
_MOST_OPCODES = 20_000_000
#: Each name takes 2 KB of memory as a class. Longer names are no names.
_MOST_NAMES, _MOST_NAME = 1000, 300

#: What a file may name without being refused: torch's tensors and dtypes, and classes that only hold values.
_KNOWN = re.compile(
    "|".join(
        (
            r"torch(\.cuda|\.sparse)*\.\w+(Storage|Tensor)|torch\.storage\.\w+Storage|torch\.(Size|Tensor|device)",
            r"torch\.(q?u?int|b?float|complex|bool|bits|per_)\w*|torch\.serialization\._get_layout",
            r"torch\.nn\.parameter\.\w+|torch\.distributed\.tensor\.[\w.]+",
            names.OTHER_TENSORS,
            re.escape(names.REBUILT_FROM_TYPE),
            names.DISTRIBUTED,
            r"collections\.(OrderedDict|Counter|defaultdict|deque)|builtins\.(set|frozenset|complex|bytearray|slice)",
            r"_codecs\.encode|argparse\.Namespace|types\.SimpleNamespace|datetime\.\w+",
            r"pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path",
            r"numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray)|numpy\.dtypes\.\w+",
        )
    )
)


class Opaque:
    """An object in a pickle that is not made: the name of its class, and what a load would give it."""

    global_name = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def get(self, name: str) -> Any:
        """Return an attribute that the state sets; None if it does not."""
        return self.state.get(name) if isinstance(self.state, dict) else None

    # An object may also get items, as a list or a dict of its own kind does.
    def append(self, item: Any) -> None: ...
    def extend(self, items: Any) -> None: ...
    def add(self, item: Any) -> None: ...
    def __setitem__(self, key: Any, item: Any) -> None: ...


# Tuples, since a pickle can set the attributes of other objects.


class StridedView(NamedTuple):
    """A dense tensor in a file of ``torch.save``: elements of a storage."""

    storage: str  # the key of the storage
    dtype: str  # in torch's names
    offset: int  # of the first element, in elements
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


class StorageKey(NamedTuple):
    """A storage that a pickle names."""

    key: str
    dtype: str  # of its elements; "untyped" for bytes
    numel: int


# Reading


class _Opcodes(dict[int, Callable[[Any], None]]):
    """What each opcode does, for so many of them."""

    left = _MOST_OPCODES

    def __getitem__(self, opcode: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"it has more than {_MOST_OPCODES:,} opcodes")
        return super().__getitem__(opcode)


def _may_be_key(value: Any, depth: int = 3) -> bool:
    """Return whether a value may be hashed. Nested tuples would take all of the stack, or for ever."""
    if isinstance(value, tuple):
        return depth > 0 and len(value) <= 64 and all(_may_be_key(item, depth - 1) for item in value)
    return True


def _with_checked_keys(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    def checked(unpickler: Any) -> None:
        if not all(map(_may_be_key, unpickler.stack[keys])):
            raise pickle.UnpicklingError("a dict has nested tuples for keys")
        load(unpickler)

    return checked


class _Unpickler(pickle._Unpickler):
    """Python's own, since the one in C takes memory for as many memo entries as a file claims."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes, allow: Sequence[str]) -> None:
        super().__init__(io.BytesIO(data))
        self.dispatch = _Opcodes(_LOADS)  # type: ignore[misc]
        self.refused: list[str] = []
        self._allow = frozenset(allow)
        self._classes: dict[str, type[Opaque]] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # of Python 2, as old protocols have it
        full = f"{module}.{name}"
        if len(full) > _MOST_NAME or len(self._classes) >= _MOST_NAMES:
            raise pickle.UnpicklingError(
                f"it has more than {_MOST_NAMES:,} names, or one of more than {_MOST_NAME} characters"
            )
        if full in _MADE:
            return _MADE[full]
        if not _KNOWN.fullmatch(full) and full not in self._allow:
            self.refused.append(full)
        if full not in self._classes:
            self._classes[full] = type(name, (Opaque,), {"global_name": full})
        return self._classes[full]

    def persistent_load(self, pid: Any) -> StorageKey:
        kind, storage, key, _, numel = pid[:5]
        if kind != "storage" or not isinstance(key, str):
            raise pickle.UnpicklingError("it names something else instead of a storage")
        stem = storage.global_name.rpartition(".")[2].removesuffix("Storage")
        return StorageKey(key, "untyped" if stem == "Untyped" else STORAGES.get(stem, stem), numel)

    def load_build(self) -> None:
        """Set the state of an object, and of nothing else: a function of ours would keep it."""
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Opaque):
            made.state = state
        elif isinstance(made, OrderedDict) and isinstance(state, dict):
            vars(made).update(state)
        else:
            raise pickle.UnpicklingError("it changes an object that has no state")

    def load_set(self) -> None:
        self.append(Opaque())

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Opaque())


#: What the opcodes do. A set becomes an ``Opaque``, so that its items are not hashed.
_LOADS: dict[int, Callable[[Any], None]] = {
    opcode: load for opcode, load in pickle._Unpickler.dispatch.items() if bytes([opcode]) not in _FORBIDDEN
}
_LOADS |= {code[0]: _with_checked_keys(_LOADS[code[0]], keys) for code, keys in _KEYS.items()}
_LOADS[pickle.BUILD[0]] = _Unpickler.load_build
_LOADS[pickle.EMPTY_SET[0]] = _Unpickler.load_set
_LOADS[pickle.FROZENSET[0]] = _Unpickler.load_frozenset


def _ordered() -> OrderedDict[Any, Any]:
    """Return an empty dict: items that a call gives it would be hashed."""
    return OrderedDict()


def _rebuild(storage: StorageKey, offset: int, sizes: Any, strides: Any, *rest: Any) -> StridedView | Opaque:
    if not isinstance(storage, StorageKey):
        raise pickle.UnpicklingError(f"a tensor has {type(storage).__name__} for its storage")
    dtype = storage.dtype
    if dtype == "untyped":
        dtype = rest[names.DTYPE_ARGUMENT - 4].global_name.removeprefix("torch.")
    lies = are_sizes(sizes) and isinstance(strides, tuple | list) and len(strides) == len(sizes)
    if not lies or not all(type(number) is int and 0 <= number < 1 << 62 for number in (offset, *strides)):
        raise pickle.UnpicklingError("a tensor has no sizes, strides and offset that a tensor can have")
    if any(type(flags) is dict and (flags.get("conj") or flags.get("neg")) for flags in rest):
        made = Opaque()
        made.global_name = f"{names.REBUILT_TENSORS[1]}, conjugated or negated"
        return made
    return StridedView(storage.key, dtype, offset, tuple(sizes), tuple(strides))


def _rebuild_from_type(function: Callable[..., Any], kind: Any, args: Sequence[Any], state: Any) -> Any:
    return function(*args)


def _first(value: Any, *rest: Any) -> Any:
    return value


def _size(numbers: Sequence[int] = ()) -> tuple[int, ...]:
    return tuple(numbers)


#: The globals that become more than an ``Opaque``.
_MADE: dict[str, Any] = {
    **dict.fromkeys(names.REBUILT_TENSORS, _rebuild),
    **dict.fromkeys(names.REBUILT_PARAMS, _first),
    names.REBUILT_FROM_TYPE: _rebuild_from_type,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
}


def unpickled(data: bytes, what: str, allow: Sequence[str] = ()) -> Any:
    """Return the value in a pickle, with a ``StridedView`` for each dense tensor and an ``Opaque`` for other objects.

    Args:
        what: the file, for errors.
        allow: further globals that the pickle may name. They become an ``Opaque`` too.

    Raises:
        ValueError: the pickle is damaged, or names other globals.
    """
    unpickler = _Unpickler(data, allow)
    try:
        value = unpickler.load()
    except Exception as error:
        if not unpickler.refused:
            # The text of another error may have values, and that of a value of a few bytes may take all memory.
            reason = str(error) if isinstance(error, pickle.UnpicklingError) else type(error).__name__
            raise ValueError(f"{what} is damaged: its pickle cannot be read ({reason})") from None
    if unpickler.refused:
        refused = list(dict.fromkeys(unpickler.refused))
        listed = ", ".join(map(repr, refused[:3])) + (f" and {len(refused) - 3} more" if len(refused) > 3 else "")
        raise ValueError(
            f"{what} must hold tensors and plain values, got the global {listed}, whose code pickle would run: "
            f"save model.state_dict(). To skip such objects, pass allow={refused[:3]!r} (--allow {refused[0]})"
        )
    return value
