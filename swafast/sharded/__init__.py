"""Averages of models that are spread over ranks. `torch.distributed` is known here and above, nowhere below."""

from .parts.part_tensor import PartTensor
from .parts.ranks import LostPeerError
from .sharded_averages import ShardedAverages
from .sharded_model import ShardedAveragedModel

__all__ = ["LostPeerError", "PartTensor", "ShardedAveragedModel", "ShardedAverages"]
