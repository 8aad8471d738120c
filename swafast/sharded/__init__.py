"""Averages of models that are spread over ranks. Of this package alone `torch.distributed` is known to."""

from .averages import ShardedAverages
from .model import ShardedAveragedModel
from .part_tensor import PartTensor
from .ranks import LostPeerError
from .snapshots import Snapshots

__all__ = ["LostPeerError", "PartTensor", "ShardedAveragedModel", "ShardedAverages", "Snapshots"]
