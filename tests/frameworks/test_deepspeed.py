"""`swafast.integrations.deepspeed` with DeepSpeed as it is: ZeRO stages 0 to 3, on gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tests.frameworks.kit import (
    BATCH,
    STEPS_PER_EPOCH,
    EvaluationError,
    Framework,
    Job,
    Kit,
    Net,
    Report,
    Resumes,
    State,
    Watch,
    of_net,
    optimizer_of,
    whole_state,
)
from tests.frameworks.shims import shim_deepspeed
from tests.ranks import run_ranks

shim_deepspeed()

import deepspeed  # noqa: E402
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # noqa: E402

from swafast.integrations.deepspeed import WeightAverage  # noqa: E402

pytestmark = pytest.mark.frameworks


def config_of(stage: int, dtype: torch.dtype = torch.float32, accumulation: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # By default its buffers have 500 million elements. These tests fill memory that nobody has written yet.
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 1000,
            "allgather_bucket_size": 1000,
            "stage3_param_persistence_threshold": 0,
        },
        "steps_per_print": 10**9,
        **more,
    }


class Zero(Framework):
    """A user's loop with an engine of DeepSpeed."""

    world = 2
    stage = 0
    tells_steps = True

    def run(self, job: Job) -> Report:
        return self.run_on(self.world, job)  # DeepSpeed wants a group of processes

    def train(self, job: Job) -> Report:
        net = job.net()
        engine, *_ = deepspeed.initialize(
            model=net,
            optimizer=optimizer_of(net.parameters()),
            config=config_of(self.stage, job.dtype, job.accumulation),
        )
        average = None
        for _ in range(job.installed):
            average = WeightAverage(**job.options).install(engine)
        if job.resumes is not None:
            engine.load_checkpoint(job.resumes)
        saved = None
        try:
            for _ in range(job.before, job.steps, STEPS_PER_EPOCH):
                self.epoch(job, engine)
                with average.swapped() if average else torch.no_grad():
                    self.evaluate(job, engine)
                engine.save_checkpoint(job.folder)
        except EvaluationError:
            engine.save_checkpoint(job.folder, "broken")
            saved = self.saved_model(job.folder)
        if average is None:
            return Report(whole_state(net), saved=saved)
        exported = None
        if average.has_models:
            if state := average.averaged_state_dict(job.dtype):
                save_file(state, job.folder / "model.safetensors")
            dist.barrier()
            exported = load_file(job.folder / "model.safetensors")
        average.finish()
        states = average.averaged.full_state_dict if average.holds_shards else average.averaged.state_dict
        return Report(whole_state(net), states(), average.attachment.state_dict(), exported, saved)

    def epoch(self, job: Job, engine: Any) -> None:
        engine.train()
        of_rank = torch.utils.data.DistributedSampler(range(len(job.train_set()[0])), shuffle=False)
        for inputs, classes in DataLoader(TensorDataset(*job.train_set()), BATCH, sampler=of_rank):
            engine.backward(cross_entropy(engine(inputs), classes))
            engine.step()
            if engine.was_step_applied():
                assert Watch.current is not None
                Watch.current.note_step()

    def evaluate(self, job: Job, engine: Any) -> None:
        engine.eval()
        with torch.no_grad():
            for index in range(job.eval_sets):
                for inputs, _ in DataLoader(TensorDataset(*job.eval_set(index)), BATCH):
                    engine(inputs)

    def saved_model(self, folder: Path) -> State:
        """Return the float32 params in a checkpoint, from which it would go on."""
        if self.stage:
            return of_net(get_fp32_state_dict_from_zero_checkpoint(folder, "broken"))
        return of_net(torch.load(folder / "broken/mp_rank_00_model_states.pt", weights_only=False)["module"])

    def halve(self, folder: Path) -> None:
        (folder / (folder / "latest").read_text() / "swafast" / "attachment.json").unlink()


class Zero1(Zero):
    stage = 1


class Zero2(Zero):
    stage = 2


class Zero3(Zero):
    stage = 3


class TestZero0(Resumes):
    framework = Zero()


class TestZero1(Resumes):
    framework = Zero1()


class TestZero2(Kit):
    framework = Zero2()


class TestZero3(Kit):
    framework = Zero3()
