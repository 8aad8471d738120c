"""`swafast.integrations.accelerate` with Accelerate as it is: plain, DDP, and FSDP2 with sharded states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate import state as accelerate_state
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from swafast.integrations.accelerate import WeightAverage
from tests.frameworks.kit import (
    BATCH,
    STEPS_PER_EPOCH,
    EvaluationError,
    Framework,
    Job,
    Kit,
    Report,
    Resumes,
    State,
    of_net,
    optimizer_of,
    whole_state,
)

pytestmark = pytest.mark.frameworks


class Accelerate(Framework):
    """A user's loop with Accelerate: DDP on several ranks."""

    def accelerator(self, job: Job) -> Accelerator:
        accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True, gradient_accumulation_steps=job.accumulation)

    def train(self, job: Job) -> Report:
        accelerator = self.accelerator(job)
        assert accelerator.num_processes == job.world
        net = job.net()
        loader = DataLoader(TensorDataset(*job.train_set()), BATCH)
        sets = [DataLoader(TensorDataset(*job.eval_set(index)), BATCH) for index in range(job.eval_sets)]
        model, optimizer, loader, *sets = accelerator.prepare(net, optimizer_of(net.parameters()), loader, *sets)
        average = None
        for _ in range(job.installed):
            average = WeightAverage(**job.options).install(accelerator, model, optimizer)
        if job.resumes is not None:
            self.resume(accelerator, job, average)
        saved = None
        try:
            for epoch in range(job.before // STEPS_PER_EPOCH, job.epochs):
                self.epoch(accelerator, model, optimizer, loader)
                with average.swapped() if average else torch.no_grad():
                    self.evaluate(model, sets)
                accelerator.save_state(str(job.folder / f"epoch_{epoch}"))
        except EvaluationError:
            accelerator.save_state(str(job.folder / "broken"))
            accelerator.wait_for_everyone()
            saved = self.saved_model(job.folder / "broken", net)
        if average is None:
            return Report(whole_state(net), saved=saved)
        exported = None
        if average.has_models:
            average.save_model(job.folder / "exported")
            accelerator.wait_for_everyone()
            exported = of_net(load_file(job.folder / "exported" / "model.safetensors"))
        average.finish()
        states = average.averaged.full_state_dict if average.holds_shards else average.averaged.state_dict
        return Report(whole_state(net), states(), average.attachment.state_dict(), exported, saved)

    def resume(self, accelerator: Accelerator, job: Job, average: WeightAverage | None) -> None:
        assert job.resumes is not None
        accelerator.load_state(str(sorted(job.resumes.glob("epoch_*"))[-1]))
        if average is not None and average.attachment.step == 0:  # as the warning says
            average.attachment.step = job.before

    def epoch(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, loader: DataLoader) -> None:
        model.train()
        for inputs, classes in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(inputs), classes))
                optimizer.step()
                optimizer.zero_grad()

    def evaluate(self, model: nn.Module, sets: list[DataLoader]) -> None:
        model.eval()
        with torch.no_grad():
            for loader in sets:
                for inputs, _ in loader:
                    model(inputs)

    def saved_model(self, folder: Path, net: nn.Module) -> State:
        """Return the model in a checkpoint."""
        return of_net(load_file(folder / "model.safetensors"))

    def halve(self, folder: Path) -> None:
        (sorted(folder.glob("epoch_*"))[-1] / "swafast" / "attachment.json").unlink()


class Fsdp2(Accelerate):
    """Two ranks with shards, in states and in averages."""

    world = 2

    def accelerator(self, job: Job) -> Accelerator:
        accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="NO_WRAP", state_dict_type="SHARDED_STATE_DICT"
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=job.accumulation)
        # Accelerate has FSDP only on accelerators, and takes gloo's ranks for DDP.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        accelerate_state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        return accelerator

    def saved_model(self, folder: Path, net: nn.Module) -> State:
        # Whatever stands in the memory of this state is overwritten, or DCP raises.
        state = {"model": {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}}
        dcp.load(state, checkpoint_id=folder / "pytorch_model_fsdp_0")
        return of_net(state["model"])


class Ddp(Accelerate):
    """Two ranks, each with the whole model."""

    world = 2


class TestAccelerate(Kit):
    framework = Accelerate()


class TestDdp(Resumes):
    framework = Ddp()
    kinds = ("float32",)


class TestFsdp2(Resumes):
    framework = Fsdp2()

    test_a_checkpoint_without_averages_begins_a_fresh_one = Kit.test_a_checkpoint_without_averages_begins_a_fresh_one
