"""The private names that stand in files of `torch.save` and `torch.distributed.checkpoint`. It imports no torch."""

from __future__ import annotations

#: The module and the name of a global in a pickle.
Global = tuple[str, str]

#: Makes a tensor of a storage; for dtypes that have a storage class, and for the others, of bytes.
REBUILD_TENSOR: Global = ("torch._utils", "_rebuild_tensor_v2")
REBUILD_UNTYPED: Global = ("torch._utils", "_rebuild_tensor_v3")

#: Functions of which the first four arguments are (storage, offset, sizes, strides). The third takes the dtype too,
#: after two more arguments, and its storage has bytes.
REBUILT_TENSORS = (
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
)
#: The place of the dtype among the arguments of the third.
DTYPE_ARGUMENT = 6
#: Functions of which the first argument is a tensor, and the result too.
REBUILT_PARAMS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
#: The function that rebuilds a tensor with attributes: (function, class, its arguments, attributes).
REBUILT_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
#: Tensors that are not dense, or have no values in the file.
OTHER_TENSORS = r"torch\._utils\._rebuild_\w+"

#: The layout of dense tensors, as pickled: a function and its argument.
LAYOUT: Global = ("torch.serialization", "_get_layout")
STRIDED = "torch.strided"

#: The place of one entry in the files of a checkpoint: a path, an offset and a number of bytes.
STORAGE_INFO: Global = ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
#: The enumeration of memory formats; 0 is row-major.
MEMORY_FORMAT: Global = ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")
#: What else a checkpoint's `.metadata` names: classes for its chunks, also those of older releases.
DISTRIBUTED = r"torch\.distributed\.(checkpoint|_shard)\.[\w.]+"

#: The attribute of a state dict that holds the version of each module.
MODULE_VERSIONS = "_metadata"
