"""Averages of models that are spread over ranks. Only this package and those above it use `torch.distributed`."""

from typing import TYPE_CHECKING

from ..terms.lazy import imported_on_use

if TYPE_CHECKING:
    from .parts.faults import LostPeerError
    from .parts.part_tensor import PartTensor
    from .sharded_averages import ShardedAverages
    from .sharded_model import ShardedAveragedModel
else:
    __getattr__ = imported_on_use(
        __name__,
        {
            "LostPeerError": "parts.faults",
            "PartTensor": "parts.part_tensor",
            "ShardedAveragedModel": "sharded_model",
            "ShardedAverages": "sharded_averages",
        },
    )

__all__ = ["LostPeerError", "PartTensor", "ShardedAveragedModel", "ShardedAverages"]


def __dir__() -> list[str]:
    return __all__
