"""Whether all tensors of a plan still stand where they stood: one native pass over the modules that hold them.

``csrc/python/trees.cpp`` compares keys and children by identity, and each tensor's address, sizes, strides, dtype and
device. What it cannot vouch for is left to the checks in Python. It goes by what a class was when the check was made: a
class must not get a ``_parameters`` or a ``__getattribute__`` of its own later.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sysconfig
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..backends import Unavailable, library
from ..torch_private.cells import cell_offset, impl_address, local_tensor, slot_offset, torch_library
from ..torch_private.modules import named_modules

#: Of the whole package. It is silent unless the user has set its level to INFO.
LOGGER = logging.getLogger("swafast")

#: Set to ``python``, before the first update, to have tensors checked in Python, without the native pass.
CHECKS = "SWAFAST_CHECKS"
#: Changes with any function of csrc/python/trees.cpp.
_ABI = 3
_PLAIN_TYPES = (Tensor, Parameter)


class Functions(NamedTuple):
    """The functions of csrc/python/trees.cpp."""

    make: Callable[..., tuple[object, object]]
    find: Callable[[object, int], tuple[list[Tensor], ...] | None]
    tell: Callable[[Sequence[Tensor]], bool]
    read: Callable[[Tensor, int], tuple[Any, ...] | None]


class TreeCheck:
    """A check that the tensors of several module trees have the memory, and the view of it, that they have now.

    It holds no tensor of a tree and no module, so it keeps no model alive.

    Args:
        roots: of the trees.
        groups: the tensors that are compared, each of which must be in a tree. A DTensor stands for its local tensor.
        shard_type: the class of DTensors, if there are any.

    Raises:
        ValueError: a pass cannot vouch for these trees. The message says why.
    """

    def __init__(
        self,
        roots: Sequence[Module | None],
        groups: Sequence[Sequence[Tensor]],
        *,
        shard_type: type[Tensor] | None = None,
    ) -> None:
        functions = load()
        if isinstance(functions, Unavailable):
            raise ValueError(functions.reason)
        compared = {id(tensor): tensor for group in groups for tensor in group}
        for tensor in compared.values():
            _verify(functions, local_tensor(tensor))
        modules: list[Module] = []
        references: list[weakref.ref[Module] | None] = []
        known: set[int] = set()
        for root in roots:
            if root is None:
                raise ValueError("a root of the trees is gone")
            for _, module in named_modules(root, distinct=True):
                if id(module) not in known:
                    known.add(id(module))
                    _refuse_class(type(module))
                    modules.append(module)
                    references.append(weakref.ref(module) if module is root else None)
        self._functions = functions
        self._trees, self._kept = functions.make(
            modules,
            references,
            tuple(map(list, groups)),
            shard_type,
            *_shard_slots(shard_type, compared.values()),
        )

    def find(self, count: int) -> tuple[list[Tensor], ...] | None:
        """Return the tensors that are now in the places of the first groups, or None if not all of the trees stand.

        Of a DTensor it is the local tensor.

        Hold them as long as a launch goes by their addresses.
        """
        return self._functions.find(self._trees, count)


class Checks:
    """The check of one plan, if there can be one, made again after what only the checks in Python see through."""

    #: So many are made in a row if none of them stands later, as where a model has other tensors at each update. Then
    #: one is made after so many updates more.
    _MOST, _PAUSE = 8, 64

    def __init__(self) -> None:
        goes_by_python()  # an unknown setting is an error before anything is written
        self._check: TreeCheck | None = None
        self._num_vain = 0

    def find(self, count: int) -> tuple[list[Tensor], ...] | None:
        """Return what the check finds: see :meth:`TreeCheck.find`. None if there is no check."""
        found = self._check.find(count) if self._check is not None else None
        if found is not None:
            self._num_vain = 0
        return found

    def make(self, make: Callable[[], TreeCheck]) -> None:
        """Make a check of what the checks in Python have just compared."""
        self._check = None
        self._num_vain += 1
        if self._num_vain > self._MOST and self._num_vain % self._PAUSE:
            return
        try:
            self._check = make()
        except (ValueError, RuntimeError) as reason:
            LOGGER.debug("swafast checks the tensors of an average in Python: %s", reason)


def tell(tensors: Sequence[Tensor]) -> bool:
    """Tell autograd that tensors are written, by a native call. Return whether it could; else nothing is told."""
    functions = load()
    return not isinstance(functions, Unavailable) and functions.tell(tensors)


def _shard_slots(shard_type: type[Tensor] | None, tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Return where a DTensor has its local tensor and its spec, if any of these is one."""
    example = next((tensor for tensor in tensors if type(tensor) is shard_type), None)
    if example is None:
        return 0, 0
    local, spec = slot_offset(example, "_local_tensor"), slot_offset(example, "_spec")
    if local is None or spec is None:
        raise ValueError("a DTensor does not show where its local tensor is")
    return local, spec


def _refuse_class(kind: type[Module]) -> None:
    """Raise ValueError if modules of this class may keep their tensors elsewhere than in their own dicts."""
    if kind.__getattribute__ is not object.__getattribute__:
        raise ValueError(f"{kind.__name__} has a __getattribute__ of its own")
    for name in ("_parameters", "_buffers", "_modules"):
        if hasattr(kind, name):
            raise ValueError(f"{kind.__name__} has {name} of its own")


def _verify(functions: Functions, tensor: Tensor) -> None:
    """Raise ValueError unless a pass reads of a tensor what torch says of it."""
    if type(tensor) not in _PLAIN_TYPES or tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested one" if tensor.is_nested else f"a {type(tensor).__name__} with {tensor.layout}"
        raise ValueError(f"a pass reads plain tensors only, got {kind}")
    expected = (
        *(tensor.data_ptr(), tuple(tensor.shape), tensor.stride()),
        *_codes_of(tensor.dtype, tensor.device),
        *(tensor.is_neg(), tensor.is_conj()),
    )
    found = functions.read(tensor, impl_address(tensor))
    if found != expected:
        raise ValueError(f"a pass reads {found} of a tensor, and torch says {expected}")


@functools.cache
def _codes_of(dtype: torch.dtype, device: torch.device) -> tuple[int, int, int]:
    """Return the numbers that torch's C functions have for a dtype and a device."""
    functions, example = load(), torch.empty(0, dtype=dtype, device=device)
    assert isinstance(functions, Functions)
    read = functions.read(example, impl_address(example))
    if read is None:
        raise ValueError(f"a pass cannot read a tensor of {dtype} on {device}")
    return read[3:6]


def goes_by_python() -> bool:
    """Return whether the user has asked for checks in Python.

    Raises:
        ValueError: the setting is unknown.
    """
    asked = os.environ.get(CHECKS) or None
    if asked not in (None, "python"):
        raise ValueError(f"{CHECKS} must be 'python' or not be set, got {asked!r}")
    return asked is not None


@functools.cache
def load() -> Functions | Unavailable:
    """Return the functions of the native pass, or why it cannot be used."""
    if goes_by_python():
        return Unavailable(f"{CHECKS}=python", expected=True)
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return Unavailable("this Python has no global lock, and tensors are read under it", expected=True)
    path = library_path()
    if not path.is_file():
        return Unavailable(f"{path} is not there: install Python's headers, then swafast again")
    offset = cell_offset()
    if offset is None:
        return Unavailable("a tensor of this torch does not show where its own object is")
    try:
        native = ctypes.PyDLL(str(path))
        native.swafast_trees_abi.restype = ctypes.c_int32
        abi = native.swafast_trees_abi()
        if abi != _ABI:
            return Unavailable(f"{path} has interface {abi}, this swafast needs {_ABI}: install it again")
        find = native.swafast_trees_functions
        find.restype = ctypes.py_object
        find.argtypes = (ctypes.c_char_p, ctypes.c_ssize_t, ctypes.py_object, ctypes.py_object)
        found = find(os.fsencode(torch_library()), offset, *_PLAIN_TYPES)
    except (OSError, AttributeError) as error:
        return Unavailable(f"{path} did not load: {error}")
    if isinstance(found, str):
        return Unavailable(found)
    functions = Functions(*found)
    return functions if _reads_right(functions) else Unavailable("what a pass reads of a tensor is not what torch says")


def library_path() -> Path:
    """Return where the library is: beside that of the kernels."""
    return library.path().with_name("libswafast_trees.so")


def _reads_right(functions: Functions) -> bool:
    """Return whether tensors that differ in one thing alone are told apart."""
    base = torch.empty(2, 3, dtype=torch.complex64, device="cpu")
    others = (base.view(3, 2), base.as_strided((2, 3), (1, 2)), base.view(torch.float64)[:, :3], base[:1], base[1:])
    several = (base, *others, base.conj(), base.imag, base.conj().imag, base.to(torch.complex128), base.to("meta"))
    read = [functions.read(each, impl_address(each)) for each in several]
    return None not in read and len(set(read)) == len(read) and functions.read(base, impl_address(base) + 8) is None
