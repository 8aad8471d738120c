"""Averages on the host of shards on another device: the bits of averages beside their shards, in all that uses them.

There is no GPU here. ``tests/native/second_device.cpp`` is a device of its own in the host's memory, and the ranks'
collectives take its tensors alone, as NCCL does those of GPUs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from swafast import ShardedAveragedModel, ShardedAverages
from swafast.sharded import PartTensor, regrowing
from swafast.sharded.parts import ranks
from swafast.torch_private import distributed as private
from tests.native_build import COMPILER, NATIVE, needs_compiler, run
from tests.ranks import run_ranks
from tests.sharded_models import local_of
from tests.support import differing
from tests.test_sharded_attach import SEVERAL

pytestmark = [pytest.mark.distributed, pytest.mark.slow, needs_compiler]

SECOND = "privateuseone"
CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("whole", torch.float32, {"format": "compact", "deviations": 3, "use_buffers": True}),
    ("whole", torch.bfloat16, {"format": "exact"}),
    ("whole", torch.float32, {"rules": SEVERAL, "format": {"fast": "compact"}}),
    ("dtensor", torch.bfloat16, {"format": "exact"}),
    ("dtensor", torch.float32, {"deviations": 3}),
    ("dtensor", torch.float32, {"rules": SEVERAL}),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("second") / "second_device.so"
    of_torch = Path(torch.__file__).parent
    headers = [of_torch / "include", of_torch / "include" / "torch" / "csrc" / "api" / "include"]
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", *(part for each in headers for part in ("-I", str(each)))]
    linked = ["-L", str(of_torch / "lib"), "-ltorch", "-ltorch_cpu", "-lc10"]
    run([*COMPILER, *flags, str(NATIVE / "second_device.cpp"), "-o", str(built), *linked])
    return built


def _use_second_device(library: Path) -> None:
    torch.ops.load_library(str(library))
    stream = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda _: None)
    module: Any = SimpleNamespace(current_device=lambda: 0, is_available=lambda: True, device_count=lambda: 1)
    module.current_stream, module.stream, module._is_in_bad_fork = lambda *_: stream, nullcontext, lambda: False
    torch._register_device_module(SECOND, module)

    def there(collective: Callable[..., object]) -> Callable[..., None]:
        def through_host(*tensors: Tensor, **options: Any) -> None:
            assert {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)} == {SECOND}
            on_host = [each.cpu() if isinstance(each, Tensor) else each for each in tensors]
            collective(*on_host, **options)
            for tensor, value in zip(tensors, on_host, strict=True):
                if isinstance(tensor, Tensor):
                    tensor.copy_(value)

        return through_host

    ranks.taken_devices = lambda group: [SECOND]
    ranks._all_gather = there(ranks._all_gather)
    for name in ("all_reduce", "reduce", "broadcast"):
        setattr(dist, name, there(getattr(dist, name)))


class Run:
    """A model whose values are set from outside, on a device, and its average, attached."""

    def __init__(self, kind: str, dtype: torch.dtype, device: str, options: dict[str, Any]) -> None:
        torch.manual_seed(4)
        self.model = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Linear(10, 7)).to(device, dtype)
        if kind == "dtensor":
            self._shard()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, foreach=False)
        several = "rules" in options
        self.averaged: Any = (ShardedAverages if several else ShardedAveragedModel)(self.model, **options)
        self.members = list(self.averaged.values()) if several else [self.averaged]
        self.one, self.step_made = self.members[-1], 0
        assert {member.n_averaged.device.type for member in self.members} == {device}
        self.averaged.attach(self.optimizer, offload="cpu" if device == SECOND else None)

    def _shard(self) -> None:
        mesh, rank, world = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank(), dist.get_world_size()
        for module in self.model:
            for name, param in list(module._parameters.items()):
                assert param is not None
                size = -(-len(param) // world)  # as torch cuts
                local = param.detach()[rank * size : (rank + 1) * size].clone()
                spread = private.on_mesh(local, mesh, [Shard(0)], param.shape, param.stride())
                module._parameters[name] = nn.Parameter(spread)

    @torch.no_grad()
    def step(self) -> Run:
        self.step_made += 1
        for index, tensor in enumerate((*self.model.parameters(), *self.model.buffers())):
            own = 100 * dist.get_rank() if isinstance(tensor, DTensor) else 0
            source, local = torch.Generator().manual_seed(1000 * self.step_made + index + own), local_of(tensor)
            local.add_((torch.rand(local.shape, generator=source) * 9).to(local.dtype).to(local.device))
        self.optimizer.step()
        return self

    def tensors(self) -> dict[str, Tensor]:
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        return {name: local_of(tensor).detach().cpu().clone() for name, tensor in named}

    def there_and_back(self, context: Any) -> dict[str, Tensor]:
        with context:
            inside = self.tensors()
        return inside | {f"{name}, back": tensor for name, tensor in self.tensors().items()}


def _on_host(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's part of a state, of which all is on the host."""
    parts = {key: value.run if isinstance(value, PartTensor) else local_of(value) for key, value in state.items()}
    return {key: part.cpu() for key, part in parts.items() if not key.endswith("save_id")}


def _drawn(run: Run) -> dict[str, Tensor]:
    return run.there_and_back(run.one.sampled_into(run.model, 3)) if run.one.deviations is not None else {}


def _placed(run: Run) -> dict[str, Tensor]:
    if run.one.deviations is None:
        return {}
    subspace = run.one.subspace(1)
    found = run.there_and_back(subspace.placed_into(run.model, [0.5]))
    with subspace.placed_into(run.model, [0.5]):
        for param in run.model.parameters():
            param.grad = torch.ones_like(param)
        found["gradient"] = subspace.gradient(run.model)
    run.optimizer.zero_grad()
    return found


def _gone_back(run: Run) -> dict[str, Tensor]:
    parts, whole = run.averaged.state_dict(), run.averaged.full_state_dict()
    run.step().averaged.load_state_dict(parts)
    by_parts = run.averaged.full_state_dict()
    run.step().averaged.load_full_state_dict(whole, from_rank0=True)
    return by_parts | {f"{key}, whole": value for key, value in run.averaged.full_state_dict().items()}


def _read(run: Run) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders)
        dcp.save(dict(run.averaged.state_dict()), checkpoint_id=folders[0])
        state = run.step().averaged.state_dict()
        dcp.load(state, checkpoint_id=folders[0])
        run.averaged.load_state_dict(state)
        dist.barrier()
    return run.averaged.full_state_dict()


def _adapted(run: Run) -> dict[str, Tensor]:
    run.averaged.adapt_to(run.model)
    return run.step().averaged.full_state_dict()


def _by_hand(run: Run) -> dict[str, Tensor]:
    """Update without the attachment, from the params on their device, and skip a NaN of one rank."""
    run.averaged.attachment.detach()
    run.step().averaged.update_parameters(run.model)
    for each in {id(each): each for each in (run.averaged, *run.members)}.values():
        each.__dict__["nonfinite"] = "skip"
    run.step().averaged.update_parameters(run.model)
    if dist.get_rank() == 1:
        local_of(next(run.model.parameters())).detach().fill_(float("nan"))
    run.averaged.update_parameters(run.model)
    return run.averaged.full_state_dict()


def _copied(run: Run) -> dict[str, Tensor]:
    run.one.copy_to(run.model)
    return run.tensors()


USES: dict[str, Callable[[Run], Mapping[str, Tensor]]] = {
    "swapped_into": lambda run: run.there_and_back(run.one.swapped_into(run.model)),
    "state_dict": lambda run: run.averaged.state_dict(),
    "on the first rank": lambda run: run.averaged.full_state_dict(rank0_only=True),
    "export": lambda run: run.one.averaged_state_dict(torch.float16),
    "sampled_into": _drawn,
    "placed_into": _placed,
    "load": _gone_back,
    "checkpoint": _read,
    "adapt_to": _adapted,
    "update_parameters": _by_hand,
    "copy_to": _copied,
}


def _use_all(library: Path) -> list[Any]:
    _use_second_device(library)
    found: list[Any] = []
    for kind, dtype, options in CASES:
        want, got = (Run(kind, dtype, device, options) for device in ("cpu", SECOND))
        for trained in (want, got) * 3:
            trained.step()
        for name, use in USES.items():
            found += [(kind, dtype, name, key) for key in differing(_on_host(use(got)), _on_host(use(want)))]
            planes = [plane for member in got.members for planes in member._planes.values() for plane in planes]
            away = {tensor.device.type for tensor in (*planes, *(member.n_averaged for member in got.members))}
            found += [] if away == {"cpu"} else [(kind, name, away)]
            for trained in (want, got):
                trained.step()
    return found


def test_averages_on_the_host_have_the_bits_of_those_beside_their_shards(library: Path) -> None:
    assert run_ranks(2, _use_all, library) == [[], []]


def _left_on_the_device() -> None:
    regrowing.moved_to_host = lambda sides: []


def test_the_gate_sees_averages_that_are_left_on_the_device(library: Path) -> None:
    found = run_ranks(2, _use_all, library, plant=_left_on_the_device)[0]
    assert ("whole", "adapt_to", {SECOND, "cpu"}) in found
