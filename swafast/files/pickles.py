"""Pickles of torch's files, read and written without torch. Nothing in them is imported, and none of it runs.

A pickle names classes and functions, and a load calls them. Here each name stands for an empty class, an ``Opaque``,
which keeps what it is called with. Only tensors, ordered dicts and sizes become more than that.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from ..torch_private import pickled as names
from .checkpoints import ITEMSIZES
from .strided import row_major

#: The dtypes of safetensors, by torch's names.
DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64", "bool": "BOOL"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8"},
    **{"uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"},
    **{"float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ"},
}
TORCH_NAMES = {dtype: name for name, dtype in DTYPES.items()}

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

    def __setstate__(self, state: Any) -> None:
        self.state = state

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


class _Unpickler(pickle._Unpickler):
    """Python's own, since the one in C takes memory for as many memo entries as a file claims."""

    dispatch: ClassVar = {
        opcode: load for opcode, load in pickle._Unpickler.dispatch.items() if bytes([opcode]) not in _FORBIDDEN
    }

    def __init__(self, data: bytes, allow: Sequence[str]) -> None:
        super().__init__(io.BytesIO(data))
        self.refused: list[str] = []
        self._allow = frozenset(allow)
        self._classes: dict[str, type[Opaque]] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # of Python 2, as old protocols have it
        full = f"{module}.{name}"
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
            raise ValueError(f"it names {pid!r} instead of a storage")
        stem = storage.global_name.rpartition(".")[2].removesuffix("Storage")
        return StorageKey(key, "untyped" if stem == "Untyped" else STORAGES.get(stem, stem), numel)


def _rebuild(storage: StorageKey, offset: int, sizes: Any, strides: Any, *rest: Any) -> StridedView:
    if not isinstance(storage, StorageKey):
        raise TypeError(f"a tensor has {type(storage).__name__} for its storage")
    dtype = storage.dtype
    if dtype == "untyped":
        dtype = rest[names.DTYPE_ARGUMENT - 4].global_name.removeprefix("torch.")
    numbers = (offset, *sizes, *strides)
    if len(sizes) != len(strides) or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError(f"a tensor has sizes {sizes}, strides {strides} and offset {offset}")
    if any(type(flags) is dict and (flags.get("conj") or flags.get("neg")) for flags in rest):
        raise ValueError("a tensor is to be conjugated or negated: save its resolve_conj().resolve_neg()")
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
    "collections.OrderedDict": OrderedDict,
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
            raise ValueError(
                f"{what} is damaged: its pickle cannot be read ({type(error).__name__}: {error})"
            ) from None
    if unpickler.refused:
        refused = list(dict.fromkeys(unpickler.refused))
        listed = ", ".join(map(repr, refused[:3])) + (f" and {len(refused) - 3} more" if len(refused) > 3 else "")
        raise ValueError(
            f"{what} must hold tensors and plain values, got the global {listed}: loading it with pickle would run "
            f"code of these names. To skip such objects, pass allow={refused[:3]!r} (--allow {refused[0]})"
        )
    return value


# Writing


@dataclass(frozen=True, eq=False)  # may be a key of a dict
class Call:
    """A global in a pickle, and what a load makes of it."""

    name: names.Global
    args: tuple[Any, ...] | None = None  # None: the global itself is meant, or with a state an object without a call
    items: Mapping[Any, Any] = field(default_factory=dict)
    state: Any = None


def pickled(value: Any) -> bytes:
    """Return the pickle, in protocol 2, of strings, numbers, tuples, lists, dicts, calls and storages."""
    out = [pickle.PROTO, b"\x02"]
    _write(value, out.append)
    return b"".join([*out, pickle.STOP])


def view_to_pickle(key: str, dtype: str, sizes: tuple[int, ...]) -> Call:
    """Return the call that makes a whole storage a row-major tensor; ``dtype`` is one of safetensors."""
    name, numel = TORCH_NAMES[dtype], math.prod(sizes)
    untyped = name not in STORAGES.values()
    storage = StorageKey(key, "untyped" if untyped else name, numel * ITEMSIZES[dtype] if untyped else numel)
    args = (storage, 0, sizes, row_major(sizes), False, Call(("collections", "OrderedDict"), ()))
    return Call(names.REBUILD_UNTYPED, (*args, Call(("torch", name)))) if untyped else Call(names.REBUILD_TENSOR, args)


def _write(value: Any, put: Callable[[bytes], object]) -> None:
    if value is None or isinstance(value, bool):
        put({None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value])
    elif isinstance(value, int):
        number = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        put(pickle.LONG1 + bytes([len(number)]) + number)
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        put(pickle.BINUNICODE + struct.pack("<I", len(text)) + text)
    elif isinstance(value, StorageKey):
        stems = {dtype: stem for stem, dtype in STORAGES.items()}
        kind = (
            ("torch.storage", "UntypedStorage")
            if value.dtype == "untyped"
            else ("torch", f"{stems[value.dtype]}Storage")
        )
        _write(("storage", Call(kind), value.key, "cpu", value.numel), put)
        put(pickle.BINPERSID)
    elif isinstance(value, tuple | list):
        put(pickle.MARK if isinstance(value, tuple) else pickle.EMPTY_LIST + pickle.MARK)
        for item in value:
            _write(item, put)
        put(pickle.TUPLE if isinstance(value, tuple) else pickle.APPENDS)
    elif isinstance(value, dict):
        put(pickle.EMPTY_DICT)
        _write_items(value, put)
    else:
        assert isinstance(value, Call), value
        _write_call(value, put)


def _write_items(items: Mapping[Any, Any], put: Callable[[bytes], object]) -> None:
    put(pickle.MARK)
    for key, item in items.items():
        _write(key, put)
        _write(item, put)
    put(pickle.SETITEMS)


def _write_call(call: Call, put: Callable[[bytes], object]) -> None:
    put(pickle.GLOBAL + "{}\n{}\n".format(*call.name).encode())
    if call.args is not None:
        _write(call.args, put)
        put(pickle.REDUCE)
    elif call.state is not None:
        put(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
    if call.items:
        _write_items(call.items, put)
    if call.state is not None:
        _write(call.state, put)
        put(pickle.BUILD)
