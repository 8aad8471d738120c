"""Pickles of torch's files, written without torch."""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..strict.pickles import DTYPES, STORAGES, StorageKey
from ..torch_private import pickled as names
from .checkpoints import ITEMSIZES
from .strided import row_major

TORCH_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
