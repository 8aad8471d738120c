"""Writes recipes.json: what other packages' SWA does to a short training, for tests/test_recipes.py to be held to.

    pip install torchcontrib==0.0.2 mosaicml==0.32.1
    python tests/oracles/record.py

Every case has the stream of weights, those of the model after each step of the optimizer, and what became of it.
"""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from composer import Algorithm, ComposerModel, Trainer
from composer.algorithms import SWA as ComposerSWA
from composer.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchcontrib.optim import SWA as TorchcontribSWA

STEPS_PER_EPOCH = 4

TORCHCONTRIB: list[dict[str, Any]] = [
    {"swa_start": 5, "swa_freq": 3, "swa_lr": 0.02},
    {"swa_start": 0, "swa_freq": 1, "swa_lr": None},
    {"swa_start": 4, "swa_freq": 2, "swa_lr": None},
]

COMPOSER: list[dict[str, Any]] = [
    {"max_duration": "8ep"},
    {"max_duration": "8ep", "swa_start": "2ep", "swa_end": "6ep", "update_interval": "3ba"},
    {"max_duration": "6ep", "swa_start": "0.5dur", "swa_end": "0.8dur", "update_interval": "1ba"},
    {"max_duration": "22ba", "swa_start": "0.25dur", "swa_end": "0.7dur", "update_interval": "1ep"},
    {"max_duration": "22ba", "swa_start": "0.25dur", "swa_end": "0.95dur", "update_interval": "1ep"},
    {"max_duration": "22ba", "swa_start": "0.3dur", "swa_end": "0.9dur", "update_interval": "2ba"},
    {"max_duration": "9ep", "swa_start": "2ep", "swa_end": "7ep", "update_interval": "2ep"},
    {"max_duration": "5ep", "swa_start": "0dur", "swa_end": "1dur", "update_interval": "5ba"},
    {
        "max_duration": "8ep", "swa_start": "3ep", "swa_end": "7ep", "update_interval": "1ep",
        "schedule_swa_lr": True, "anneal_strategy": "cos", "anneal_steps": 3,
    },
]  # fmt: skip


def make_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))


def flat(net: nn.Module) -> list[float]:
    return [float(x) for x in torch.cat([param.detach().flatten() for param in net.parameters()])]


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(6, 2, generator=generator) for _ in range(count)]


def of_torchcontrib(options: dict[str, Any]) -> dict[str, Any]:
    net = make_net()
    optimizer = TorchcontribSWA(torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), **options)
    stream, rates = [], []
    for x in batches(16):
        net.zero_grad()  # its own zero_grad fails on a torch of today
        (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        stream.append(flat(net))
        rates.append(optimizer.param_groups[0]["lr"])
    optimizer.swap_swa_sgd()
    return {"options": options, "stream": stream, "lr": rates, "average": flat(net)}


class Regression(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, batch: list[Tensor]) -> Tensor:
        return self.net(batch[0])

    def loss(self, outputs: Tensor, batch: list[Tensor]) -> Tensor:
        return (outputs - batch[0].sum(1, keepdim=True)).square().mean()


class Recording(ComposerSWA):
    """Notes each update and when the model was replaced."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.updates: list[int] = []
        self.replaced: int | None = None

    def apply(self, event: Any, state: Any, logger: Logger) -> None:
        before = int(self.swa_model.n_averaged) if self.swa_started else 0
        super().apply(event, state, logger)
        if self.swa_started and int(self.swa_model.n_averaged) > before:
            self.updates.append(int(state.timestamp.batch))
        if self.swa_completed and self.replaced is None:
            self.replaced = int(state.timestamp.batch)


def of_composer(options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    model = Regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    stream, rates = [], []

    def note(*_: object) -> None:
        stream.append(flat(model.net))
        rates.append(optimizer.param_groups[0]["lr"])

    optimizer.register_step_post_hook(note)
    swa = Recording(**{key: value for key, value in options.items() if key != "max_duration"})
    algorithms: list[Algorithm] = [swa]
    data = torch.cat(batches(STEPS_PER_EPOCH))
    Trainer(
        model=model,
        train_dataloader=DataLoader(TensorDataset(data), batch_size=6),
        max_duration=options["max_duration"],
        optimizers=optimizer,
        # Composer takes its scheduler's last rate for swa_lr, whatever it was given.
        schedulers=torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.5),
        algorithms=algorithms,
        device="cpu",
        progress_bar=False,
        step_schedulers_every_batch=False,
    ).fit()
    return {
        "options": options,
        "steps_per_epoch": STEPS_PER_EPOCH,
        "stream": stream,
        "lr": rates,
        "swa_lr": swa.swa_lr,
        "updates": swa.updates,
        "replaced": swa.replaced,
        "average": flat(swa.swa_model.module.net),
        "model": flat(model.net),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    recorded = {
        "versions": {name: version(name) for name in ("torch", "torchcontrib", "mosaicml")},
        "torchcontrib": [of_torchcontrib(options) for options in TORCHCONTRIB],
        "composer": [of_composer(options) for options in COMPOSER],
    }
    # A case a line.
    text = json.dumps(recorded).replace('{"options"', '\n{"options"')
    Path(__file__).with_name("recipes.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
