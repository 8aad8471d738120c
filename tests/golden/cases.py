"""The averages in the golden files, and how they are made: for `record.py` and for the tests that load them."""

from __future__ import annotations

import dataclasses
import gzip
import io
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from swafast import (
    EqualAverage,
    ExponentialAverage,
    FusedAveragedModel,
    FusedAverages,
    PowerAverage,
    Rule,
    ShardedAveragedModel,
    ShardedAverages,
    Snapshots,
    Spread,
)
from swafast.optim import SWA, ComposerSWA
from swafast.sharded import PartTensor
from tests.golden.models import fill, make_model, values_of

FOLDER = Path(__file__).parent

State = dict[str, Tensor]

#: Updates before a state is saved; the one after it has this number as its step.
UPDATES = 5

#: Steps whose values nothing in a file has.
ELSEWHERE = (90, 91)


# Averages in one process


@dataclasses.dataclass(frozen=True)
class Case:
    """An average with its state in ``<name>.pt.gz``.

    Attributes:
        make: the average of a model, whose state it is; takes ``backend``.
        saved_by: makes what has saved the state, where that is another class.
    """

    dtype: torch.dtype
    make: Callable[..., Any]
    saved_by: Callable[..., Any] | None = None

    def model(self, step: int) -> nn.Module:
        return make_model(step, self.dtype)


RULES = {"fast": ExponentialAverage(0.75), "slow": PowerAverage(6.94)}

CASES = {
    "float32": Case(torch.float32, FusedAveragedModel),
    "exact": Case(torch.bfloat16, partial(FusedAveragedModel, rule=ExponentialAverage(0.9, warmup="ratio"))),
    "exact_buffers": Case(torch.bfloat16, partial(FusedAveragedModel, use_buffers=True)),
    "mirrored": Case(torch.float16, partial(FusedAveragedModel, rule=PowerAverage.from_sigma_rel(0.1))),
    "compact": Case(torch.bfloat16, partial(FusedAveragedModel, format="compact")),
    "compact_of_float32": Case(torch.float32, partial(FusedAveragedModel, format="compact", seed=11)),
    "compensated": Case(
        torch.float32,
        partial(FusedAveragedModel, format="compensated", rule=ExponentialAverage(0.9, "power", 1.0, 0.75, 0.5)),
    ),
    "half": Case(torch.bfloat16, partial(FusedAveragedModel, format="half", rule=ExponentialAverage(0.99), seed=7)),
    "include": Case(torch.float32, partial(FusedAveragedModel, include=lambda name, _: not name.startswith("second"))),
    "spread": Case(torch.float32, partial(FusedAveragedModel, deviations=Spread(2, torch.bfloat16))),
    "several": Case(torch.bfloat16, partial(FusedAverages, rules=RULES, format={"slow": "compact"})),
    "torch_float32": Case(torch.float32, FusedAveragedModel, AveragedModel),
    "torch_bfloat16": Case(
        torch.bfloat16,
        partial(FusedAveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    ),
}


#: The cases that are also in a file of `swafast.save`.
FILES = ("float32", "several")


def singles_of(averaged: Any) -> dict[str, FusedAveragedModel]:
    """Return each average by the prefix of its keys: empty, or its name where there are several."""
    if isinstance(averaged, FusedAveragedModel):
        return {"": averaged}
    return {f"{name}.": averaged[name] for name in RULES}


def averages_of(averaged: Any) -> State:
    """Return the averages at full precision, several ones with their prefixes."""
    return {
        f"{prefix}{key}": value
        for prefix, single in singles_of(averaged).items()
        for key, value in single.averaged_state_dict().items()
    }


def copied(state: Mapping[str, Tensor]) -> State:
    return {key: value.detach().clone() for key, value in state.items()}


# Recipes and optimizers: grads are given, so that nothing depends on how a forward pass rounds


def step_with(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> None:
    """Make steps of the optimizer, each with grads of its own."""
    for step in steps:
        values = values_of(model, step, "grad of ")
        for name, param in model.named_parameters():
            param.grad = values[name] if param.requires_grad else None
        optimizer.step()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.125, momentum=0.5)


def attach_two(step: int) -> tuple[nn.Module, torch.optim.Optimizer, list[FusedAveragedModel], list[Any]]:
    """Make a model and its optimizer with two averages attached, each with its own schedule."""
    model = make_model(step)
    optimizer = make_optimizer(model)
    averages = [FusedAveragedModel(model), FusedAveragedModel(model, rule=ExponentialAverage(0.75))]
    attachments = [
        averages[0].attach(optimizer, start=3, every=2),
        averages[1].attach(optimizer, start="0.25dur", every="1ep", end=11, duration="4ep", steps_per_epoch=4),
    ]
    return model, optimizer, averages, attachments


def make_swa(step: int) -> tuple[nn.Module, SWA, Any]:
    """Make torchcontrib's SWA over a model of all dtypes, with an average attached to the optimizer inside."""
    model = make_model(step, mixed=True)
    base = make_optimizer(model)
    swa = SWA(base, swa_start=2, swa_freq=2, swa_lr=0.0625)
    return model, swa, FusedAveragedModel(model).attach(base, every=3)


def swa_buffers(model: nn.Module, swa: SWA) -> State:
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    return {name: swa.state[param]["swa_buffer"] for name, param in params.items() if param.numel()}


def make_composer(step: int) -> tuple[nn.Module, torch.optim.Optimizer, FusedAveragedModel, ComposerSWA]:
    model = make_model(step)
    optimizer = make_optimizer(model)
    averaged = FusedAveragedModel(model)
    swa = ComposerSWA(
        averaged, optimizer, max_duration="4ep", steps_per_epoch=3, swa_start="0.25dur", swa_end="0.75dur",
        update_interval="2ba", schedule_swa_lr=True, anneal_steps=3, swa_lr=0.03125,
    )  # fmt: skip
    return model, optimizer, averaged, swa


# Snapshots

SNAPSHOTS_AT = (12, 14, 16)  # near each other, so that widths between those stored are met to under 1%
STORED = {"narrow": PowerAverage.from_sigma_rel(0.05), "wide": PowerAverage.from_sigma_rel(0.10)}
SYNTHESIZED = PowerAverage.from_sigma_rel(0.07)


class Halving(Rule):
    """A user's own rule: a snapshot stores only its repr."""

    def weight(self, num_averaged: int) -> float:
        return 0.5 if num_averaged else 1.0

    def __repr__(self) -> str:
        return "Halving()"


OTHER_STORED = {"equal": EqualAverage(), "ema": ExponentialAverage(0.9, "power", 2.0, 0.75, 0.25), "own": Halving()}


def listed(snapshots: Snapshots) -> list[tuple[str, int, dict[str, Any] | str]]:
    """Return name, count and rule of each stored average as plain data."""
    found = []
    for stored in snapshots:
        rule: Any = stored.rule
        if isinstance(rule, str):
            spelled: Any = rule
        else:  # an option by keyword only was added later, and these rules do not use it
            options = [each.name for each in dataclasses.fields(rule) if not each.kw_only]
            spelled = {"rule": type(rule).__name__, **{name: getattr(rule, name) for name in options}}
        found.append((stored.name, stored.num_averaged, spelled))
    return found


def save_snapshots(folder: Path) -> None:
    """Save two folders of snapshots: of two widths along a run, and one snapshot of other rules."""
    for name, rules, counts in (("power", STORED, SNAPSHOTS_AT), ("rules", OTHER_STORED, (4,))):
        snapshots = Snapshots(folder / name)
        model = make_model(0, mixed=True)
        averages = {key: FusedAveragedModel(model, rule=rule) for key, rule in rules.items()}
        for step in range(1, max(counts) + 1):
            fill(model, values_of(model, step))
            for averaged in averages.values():
                averaged.update_parameters(model)
            if step in counts:
                snapshots.save(averages)


# Ranks


SHARDED = ("plain", "fsdp2", "several")


def make_sharded(kind: str, step: int) -> tuple[nn.Module, Any]:
    """Make a model spread over all ranks, and its average. Collective."""
    model = make_model(step, shardable=kind == "fsdp2", mixed=True)
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (model.first, model.second, model):
            fully_shard(module, mesh=mesh)
    if kind == "several":
        return model, ShardedAverages(model, rules=RULES, format={"slow": "compact"})
    return model, ShardedAveragedModel(model, rule=RULES["slow"])


def whole_model(kind: str, step: int) -> nn.Module:
    return make_model(step, shardable=kind == "fsdp2", mixed=True)


def load_on_ranks(folder: Path, following: Mapping[str, State]) -> dict[str, dict[str, Any]]:
    """Load the checkpoint of each kind, train on, and return the averages. Collective.

    Args:
        following: what the model has at the update after that, by kind.
    """
    given: dict[str, dict[str, Any]] = {}
    for kind in SHARDED:
        model, averaged = make_sharded(kind, ELSEWHERE[0])
        averaged.update_parameters(model)
        state = averaged.state_dict()
        dcp.load({"averaged": state}, checkpoint_id=folder / kind)
        averaged.load_state_dict(state)
        again = averaged.state_dict()
        given[kind] = {"keys": list(again), "seals": seals_of(again), "full": copied(averaged.full_state_dict())}
        given[kind]["loaded"], given[kind]["again"] = parts_of(state), parts_of(again)
        fill(model, following[kind])
        averaged.update_parameters(model)
        given[kind]["next_full"] = copied(averaged.full_state_dict())
    return given


def seals_of(state: Mapping[str, Tensor]) -> State:
    """Return the checksums in a state, which do not depend on the number of ranks."""
    return {key: value for key, value in state.items() if "checksum." in key}


def parts_of(state: Mapping[str, Tensor]) -> State:
    """Return this rank's part under each key, without the id of the save, which differs each time."""
    parts: State = {}
    for key, value in state.items():
        if isinstance(value, PartTensor):
            parts |= {f"{key} {i}": view.clone() for i, (_, view) in enumerate(value.parts()) if "save_id" not in key}
        else:
            parts[key] = value.to_local().clone() if isinstance(value, DTensor) else value.clone()
    return parts


# Files


def read(name: str) -> Any:
    with gzip.open(FOLDER / f"{name}.pt.gz") as file:
        return torch.load(io.BytesIO(file.read()), weights_only=True)


def write(name: str, golden: Any) -> None:
    """Write a user's file, compressed: torch's files have hundreds of bytes around each tensor."""
    file = io.BytesIO()
    torch.save(golden, file)
    (FOLDER / f"{name}.pt.gz").write_bytes(gzip.compress(file.getvalue(), mtime=0))


def pack_file(name: str, file: Path) -> None:
    (FOLDER / f"{name}.safetensors.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))


def unpack_file(name: str, folder: Path) -> Path:
    """Unpack a golden file of `swafast.save`."""
    file = folder / f"{name}.safetensors"
    file.write_bytes(gzip.decompress((FOLDER / f"{file.name}.gz").read_bytes()))
    return file


def unzip(name: str, folder: Path) -> Path:
    """Unpack a golden folder; it is kept packed because torch's format takes over 100 kB."""
    with zipfile.ZipFile(FOLDER / f"{name}.zip") as archive:
        archive.extractall(folder)
    return folder
