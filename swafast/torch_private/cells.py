"""Where a Python tensor has torch's own object, for native code that reads tensors without torch's headers."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from types import MemberDescriptorType

import torch
from torch import Tensor


def impl_address(tensor: Tensor) -> int:
    """Return the address of torch's own object of a tensor."""
    return int(tensor._cdata)


@functools.cache
def cell_offset() -> int | None:
    """Return at which byte of a Python tensor the pointer to torch's own object stands, or None if that is unclear.

    It is looked for in some tensors. Whoever uses it compares it for each tensor again.
    """
    tensors = [torch.empty(0, device="cpu"), torch.nn.Parameter(torch.empty(0, device="cpu"))]
    word = ctypes.sizeof(ctypes.c_void_p)
    found = set(range(object.__basicsize__, Tensor.__basicsize__, word))
    try:
        for tensor in tensors:
            at = {i for i in found if ctypes.c_void_p.from_address(id(tensor) + i).value == impl_address(tensor)}
            found &= at
    except AttributeError:
        return None
    return found.pop() if len(found) == 1 else None


def slot_offset(tensor: Tensor, name: str) -> int | None:
    """Return at which byte of a Python tensor one of its class's ``__slots__`` stands, or None if that is unclear."""
    kind = type(tensor)
    if not isinstance(vars(kind).get(name), MemberDescriptorType):
        return None
    word = ctypes.sizeof(ctypes.c_void_p)
    held = id(getattr(tensor, name))
    places = range(Tensor.__basicsize__, kind.__basicsize__, word)
    found = [i for i in places if ctypes.c_void_p.from_address(id(tensor) + i).value == held]
    return found[0] if len(found) == 1 else None


def torch_library() -> Path:
    """Return the path of torch's library for the CPU, which holds what it exports for compiled code."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the local tensor of a DTensor, and any other as it is."""
    return getattr(tensor, "_local_tensor", tensor)
