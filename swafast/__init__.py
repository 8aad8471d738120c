"""Average a model's weights during training, in one fused pass: ``average += weight * (param - average)``.

    from swafast import ExponentialAverage, FusedAveragedModel

    averaged = FusedAveragedModel(model, rule=ExponentialAverage(0.999))
    averaged.attach(optimizer)  # or call averaged.update_parameters(model) after each step
    ...
    with averaged.swapped_into(model):
        evaluate(model)

FusedAveragedModel    one average; without a rule, that of SWA
FusedAverages         several averages of one model in one pass
ShardedAveragedModel  an average of a model on several ranks, and ShardedAverages several
Snapshots             averages of any width, computed after the training
save, load            an averaged model in one safetensors file
update_bn             BatchNorm statistics that fit averaged weights
swafast.optim         recipes, learning rates, training in a few bits
swafast.posthoc       merges, soups and subspaces
swafast.files         checkpoints averaged in files, also by the command ``swafast average``
swafast.convert       states of other tools' averages
swafast.integrations  Lightning, Transformers, Accelerate and other frameworks

``python -m swafast`` prints which backends run on this machine. Guides are in the folder docs of the repository.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import moved as _moved  # noqa: F401  # explains the failed import of a module that has moved
from .terms.lazy import imported_on_use

if TYPE_CHECKING:
    from . import convert as convert
    from . import files as files
    from . import optim as optim
    from . import posthoc as posthoc
    from . import sharded as sharded
    from .average.averaged_model import FusedAveragedModel
    from .average.fused_averages import FusedAverages
    from .files.averaged_file import load, save
    from .optim.batchnorm import update_bn
    from .posthoc.snapshots import Snapshots
    from .sharded.sharded_averages import ShardedAverages
    from .sharded.sharded_model import ShardedAveragedModel
    from .terms.rules import EqualAverage, ExponentialAverage, PowerAverage, Rule
    from .terms.spread import Spread

__version__ = "0.1.0"

__all__ = [
    "EqualAverage",
    "ExponentialAverage",
    "FusedAveragedModel",
    "FusedAverages",
    "PowerAverage",
    "Rule",
    "ShardedAveragedModel",
    "ShardedAverages",
    "Snapshots",
    "Spread",
    "__version__",
    "load",
    "save",
    "update_bn",
]

#: The module of each public name. It is imported on first use, so `import swafast` does not load torch.
_PUBLIC = {
    "EqualAverage": "terms.rules",
    "ExponentialAverage": "terms.rules",
    "FusedAveragedModel": "average.averaged_model",
    "FusedAverages": "average.fused_averages",
    "PowerAverage": "terms.rules",
    "Rule": "terms.rules",
    "ShardedAveragedModel": "sharded.sharded_model",
    "ShardedAverages": "sharded.sharded_averages",
    "Snapshots": "posthoc.snapshots",
    "Spread": "terms.spread",
    "load": "files.averaged_file",
    "save": "files.averaged_file",
    "update_bn": "optim.batchnorm",
}
#: Names that only pickles look up.
_PICKLED = {
    "FixedWeight": "terms.rules",
    "KernelTerms": "terms.weight",
    "PlaneTree": "average.planes",
    "Schedule": "loop.schedule",
    "StoredAverage": "posthoc.folder",
    "get_format": "terms.formats",
}
_PACKAGES = ("convert", "files", "optim", "posthoc", "sharded")

if not TYPE_CHECKING:  # an editor that sees __getattr__ accepts any name
    _import = imported_on_use(__name__, {**_PUBLIC, **_PICKLED, **{name: name for name in _PACKAGES}})

    def __getattr__(name: str) -> Any:
        value = globals()[name] = _import(name)
        if name != "files":  # which are averaged without torch
            importlib.import_module(".op.torch_op", __name__)  # registers torch.ops.swafast
        return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
