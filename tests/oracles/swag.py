"""Writes swag.safetensors: what SWAG's authors' code makes of a short training, for tests/test_swag.py to be held to.

    git clone https://github.com/wjmaddox/swa_gaussian && git -C swa_gaussian checkout 82c96926
    pip install '.[swag]'
    python tests/oracles/swag.py swa_gaussian

The stream has the weights after each of 60 epochs at a constant rate: of every eighth hidden unit of a network with
4,810 params, which is a network of its own with 610. In the samples, their random numbers are ours.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from swafast.demo.task import NUM_CLASSES, Settings, digits_split
from swafast.terms.draws import make_random_key
from swafast.terms.normals import COLUMNS, normals

COMMIT = "82c96926c2c11b0e470861c9d16282e098d9b430"
COLUMN_COUNT = 20  # K
#: At this rate sqrt(variance) is 6 % of a weight, in the median, and their variance of two weights is 0 or less.
SETTINGS = Settings(learning_rate=0.003, weight_decay=1e-3)
WARM_UP, UPDATES = 20, 60  # epochs
#: Samples by their name: updates before, index, scale, and whether with deviations. 15 are fewer than the columns.
SAMPLES = {
    "swag after 60": (60, 3, 0.5, True),
    "swag after 15": (15, 4, 0.5, True),
    "diagonal after 60": (60, 5, 1.0, False),
}


def make_net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES))


def make_stream() -> list[nn.Sequential]:
    """Train the large network, and return one small network for each update."""
    torch.manual_seed(0)
    net, split = make_net(64), digits_split(0, SETTINGS)
    images, options = split.train_images.flatten(1), {"momentum": SETTINGS.momentum}
    rate, decay = SETTINGS.learning_rate, SETTINGS.weight_decay
    optimizer = torch.optim.SGD(net.parameters(), rate, weight_decay=decay, **options)
    stream = []
    for epoch in range(WARM_UP + UPDATES):
        for batch in torch.randperm(len(images)).split(SETTINGS.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), split.train_labels[batch]).backward()
            optimizer.step()
        if epoch >= WARM_UP:
            first, second = net[0], net[2]
            small = make_net(8)
            values = first.weight[::8], first.bias[::8], second.weight[:, ::8], second.bias
            with torch.no_grad():
                for param, value in zip(small.parameters(), values, strict=True):
                    param.copy_(value)
            stream.append(small)
    return stream


def load_original(folder: Path) -> Any:
    """Return their class, without GPyTorch and tqdm, which nothing that runs here needs."""
    for name in ("gpytorch", "gpytorch.lazy", "gpytorch.distributions", "tqdm"):
        sys.modules.setdefault(name, mock.MagicMock())
    for name in ("swag", "swag.posteriors"):  # without their __init__.py, which import all else
        module = ModuleType(name)
        module.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = module
    return importlib.import_module("swag.posteriors.swag").SWAG


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def sample(theirs: Any, net: nn.Module, count: int, index: int, scale: float, deviations: bool) -> Tensor:
    """Return their sample with our random numbers: those of seed 0 and the params' names."""
    numbers = [
        normals(make_random_key(0, name), index, torch.arange(param.numel())) for name, param in net.named_parameters()
    ]
    of_columns = normals(make_random_key(0, ""), index, torch.arange(min(count, COLUMN_COUNT)), COLUMNS)
    with (
        mock.patch.object(torch, "randn_like", return_value=torch.cat(numbers)),
        mock.patch.object(Tensor, "normal_", lambda self: self.copy_(of_columns)),
        mock.patch.object(Tensor, "cuda", lambda self: self),
    ):
        theirs.sample(scale, cov=deviations)
    return flat([getattr(module, name) for module, name in theirs.params])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    stream, recorded = make_stream(), {}
    theirs = load_original(folder)(make_net, no_cov_mat=False, max_num_models=COLUMN_COUNT, width=8)
    for count, net in enumerate(stream, 1):
        theirs.collect_model(net)
        for name, (after, *options) in SAMPLES.items():
            if count == after:
                recorded[name] = sample(theirs, net, count, *options)
    recorded["stream"] = torch.stack([flat(list(net.parameters())) for net in stream])
    for key in ("mean", "sq_mean"):
        recorded[key] = flat([getattr(module, f"{name}_{key}") for module, name in theirs.params])
    recorded["deviations"] = torch.cat([getattr(module, f"{name}_cov_mat_sqrt") for module, name in theirs.params], 1)
    about = {"about": f"swa_gaussian {COMMIT}, torch {torch.__version__}"}
    tensors = {key: value.contiguous() for key, value in recorded.items()}
    save_file(tensors, Path(__file__).with_suffix(".safetensors"), about)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
