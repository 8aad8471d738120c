"""`swafast.integrations.deepspeed` with DeepSpeed as it is: ZeRO stages 0 to 3, on gloo ranks."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from swafast import ExponentialAverage, FusedAveragedModel
from tests.frameworks.kit import (
    BATCH,
    KINDS,
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
    differing,
    of_net,
    optimizer_of,
    whole_state,
)
from tests.frameworks.shims import shim_deepspeed
from tests.ranks import RankFailedError, planted, run_ranks
from tests.test_documents import ROOT, blocks_of, reader

shim_deepspeed()

import deepspeed  # noqa: E402
from accelerate import Accelerator, DeepSpeedPlugin  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # noqa: E402

from swafast.integrations import deepspeed_engine  # noqa: E402
from swafast.integrations.accelerate import WeightAverage as AccelerateAverage  # noqa: E402
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
            "stage3_prefetch_bucket_size": 0,  # a forward of the kit gathers all params, so none may be on its way
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
    kinds = ("float32", "compact", "accumulation")

    def test_in_bfloat16_the_masters_are_averaged(self) -> None:
        whole = self.trained(**KINDS["exact"])
        first, second = self.stopped(**KINDS["exact"])
        for one, other in zip(whole.steps[1:], first.steps[1:] + second.steps[1:], strict=True):
            assert differing(one, other) == []
        assert whole.averaged is not None
        assert second.averaged is not None
        assert differing(second.averaged, whole.averaged) == []
        assert whole.averaged["module.first.weight"].dtype == torch.float32
        assert whole.exported is not None
        last = [seen.state for seen in whole.seen if seen.step == 24]
        assert last
        for state in last:
            assert differing(state, whole.exported) == []


# Beside the kit


def engine_of(stage: int, dtype: torch.dtype = torch.float32, net: Any = None, **more: Any) -> Any:
    torch.manual_seed(3)
    net = Net().to(dtype) if net is None else net
    return deepspeed.initialize(
        model=net, optimizer=optimizer_of(net.parameters()), config=config_of(stage, dtype, **more)
    )[0]


def step(engine: Any, scale: float = 1.0) -> None:
    rank = dist.get_rank()
    inputs = torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(rank))
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(inputs.to(dtype)).square().sum() * scale)
    engine.step()


def on_ranks(body: Any, *args: Any, world: int = 2) -> Any:
    return run_ranks(world, functools.partial(in_environment, body, *args))[0]


def in_environment(body: Any, *args: Any) -> Any:
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # unused: the group is there
    return body(*args)


def goes_on_from_the_average(stage: int, dtype: torch.dtype, folder: Path) -> None:
    engine = engine_of(stage, dtype)
    average = WeightAverage(ExponentialAverage(0.5)).install(engine)
    for _ in range(3):
        step(engine)
    trained, averages = whole_state(engine.module), average.averaged_state_dict(dtype)
    average.finish()
    with pytest.warns(UserWarning, match="the averages since the training has ended"):
        engine.save_checkpoint(folder, "ended")
    if dist.get_rank() == 0:
        assert differing(whole_state(engine.module) if stage < 3 else averages, averages) == []
    copied = whole_state(engine.module)
    assert {"first.weight", "second.weight"} <= {*differing(copied, trained)}
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    step(engine)  # writes the float32 copies into the model
    assert differing(without_buffers(whole_state(engine.module)), without_buffers(copied)) == []
    again = engine_of(stage, dtype)
    again.load_checkpoint(folder, "ended")
    assert differing(whole_state(again.module), copied) == []


def without_buffers(state: State) -> State:
    return {name: value for name, value in state.items() if name != "batches"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_engine_goes_on_from_the_average(stage: int, dtype: torch.dtype, tmp_path: Path) -> None:
    on_ranks(goes_on_from_the_average, stage, dtype, tmp_path)


def skips_overflows(stage: int) -> None:
    engine = engine_of(stage, torch.bfloat16, accumulation=2, bf16={"enabled": True, "check_grad_overflow": True})
    average = WeightAverage(ExponentialAverage(0.5)).install(engine)
    counted = []
    for scale in (1.0, 1.0, 1.0, float("inf"), 1.0, 1.0):
        step(engine, scale)
        counted.append((engine.was_step_applied(), average.attachment.step, int(average.averaged.n_averaged)))
    assert counted == [(False, 0, 0), (True, 1, 1), (False, 1, 1), (False, 1, 1), (False, 1, 1), (True, 2, 2)]
    assert (engine.global_steps, engine.skipped_steps) == (3, 1)


@pytest.mark.parametrize("stage", [2, 3])
def test_steps_that_overflow_and_batches_between_do_not_count(stage: int) -> None:
    on_ranks(skips_overflows, stage, world=1)


def refused_on_one_rank() -> None:
    engine = engine_of(2)
    average = WeightAverage()
    if dist.get_rank() == 1:
        with pytest.raises(TypeError, match=r"engine must be that of deepspeed\.initialize, got NoneType"):
            average.install(None)  # type: ignore[arg-type]
    else:
        with pytest.raises(RuntimeError, match=r"install .*rank 1.*engine must be that of deepspeed\.initialize"):
            average.install(engine)
    average.install(engine)  # nothing is left of it


def test_what_one_rank_refuses_is_refused_on_all() -> None:
    on_ranks(refused_on_one_rank, world=2)


def is_refused() -> None:
    for stage, options in ((3, {"overlap": True}), (3, {"offload": "cpu"})):
        with pytest.raises(NotImplementedError, match="overlap must be False and offload None with ZeRO stage 3"):
            WeightAverage(**options).install(engine_of(stage))
    engine = engine_of(2)
    for wrong in (Net(), engine.optimizer, None):
        with pytest.raises(TypeError, match=r"engine must be that of deepspeed\.initialize, got "):
            WeightAverage().install(wrong)
    with pytest.raises(ValueError, match="must have an optimizer for averages to follow, got none"):
        WeightAverage().install(deepspeed.initialize(model=Net(), config=config_of(0))[0])
    for use in (WeightAverage().swapped, WeightAverage().finish, WeightAverage().averaged_state_dict):
        with pytest.raises(RuntimeError, match=r"must be installed first: call install\(engine\)"):
            use()
    net = Net()
    optimizer = optimizer_of(net.parameters())
    attachment = FusedAveragedModel(net).attach(optimizer)
    attached = deepspeed.initialize(model=net, optimizer=optimizer, config=config_of(1))[0]
    with pytest.raises(ValueError, match=r"optimizer that no average is attached to, .*attachment\.detach\(\) first"):
        WeightAverage().install(attached)
    with pytest.raises(ValueError, match=r"must have params of the model, as when it was attached to, .*deepspeed"):
        step(attached)
    attachment.detach()
    WeightAverage().install(attached)
    for name, found in {"has_moe_layers": True, "mp_world_size": 2, "zenflow": True}.items():
        before = getattr(engine, name)
        setattr(engine, name, found)
        with pytest.raises(NotImplementedError, match="engine must train the same params on all ranks, got "):
            WeightAverage().install(engine)
        setattr(engine, name, before)
    local = engine_of(2, checkpoint={"use_node_local_storage": True})
    with pytest.raises(NotImplementedError, match="use_node_local_storage must be false for averages in shards"):
        WeightAverage().install(local)
    WeightAverage(sharded=False).install(local)
    average = WeightAverage().install(engine)  # none of the above has left anything
    with pytest.raises(RuntimeError, match="must hold a model before it is exported, got none"):
        average.averaged_state_dict()
    with pytest.raises(ValueError, match="installed once, got a second call"):
        average.install(engine)
    with pytest.raises(ValueError, match="model must be the engine, or its module, got another Net"):
        average.swapped(Net())
    step(engine)
    folder = Path(tempfile.mkdtemp())
    with average.swapped(engine):
        for name, use in {
            "a step of the optimizer": engine.step,
            "state_dict": lambda: engine.save_checkpoint(folder, "swapped"),
            "load_checkpoint": lambda: engine.load_checkpoint(folder),
        }.items():
            with pytest.raises(RuntimeError, match=f"{name} must wait until the averages are swapped back"):
                use()
    assert not [*folder.iterdir()]
    step(engine)
    assert average.attachment.step == 2
    late = engine_of(0)
    step(late)
    with pytest.warns(UserWarning, match=r"the engine has made 1 steps already.*call install before load_checkpoint"):
        average = WeightAverage().install(late)
    assert average.attachment.step == 1


def test_wrong_uses_are_refused() -> None:
    on_ranks(is_refused, world=1)


def pipeline_is_refused() -> None:
    deepspeed.init_distributed("gloo")
    net = deepspeed.pipe.PipelineModule([torch.nn.Linear(4, 4)], num_stages=1, loss_fn=torch.nn.MSELoss())
    engine = deepspeed.initialize(model=net, optimizer=optimizer_of(net.parameters()), config=config_of(0))[0]
    with pytest.raises(NotImplementedError, match="got pipeline parallelism, where each rank has other layers"):
        WeightAverage().install(engine)


def test_a_pipeline_is_refused() -> None:
    on_ranks(pipeline_is_refused, world=1)


def saves(stage: int, folder: Path) -> State:
    engine = engine_of(stage)
    average = WeightAverage(ExponentialAverage(0.5)).install(engine)
    for _ in range(3):
        step(engine)
    engine.save_checkpoint(folder)
    return average.averaged.full_state_dict() if stage else average.averaged.state_dict()


def loads(stage: int, folder: Path, saved: State) -> None:
    engine = engine_of(stage)
    average = WeightAverage(ExponentialAverage(0.5)).install(engine)
    if stage:
        with pytest.raises(Exception, match=r"DP world size of \d but the current world size is"):
            engine.load_checkpoint(folder)
    engine.load_checkpoint(folder, load_optimizer_states=stage == 0)
    assert average.attachment.step == 3
    found = average.averaged.full_state_dict() if stage else average.averaged.state_dict()
    assert differing(found, saved) == []
    step(engine)
    assert int(average.averaged.n_averaged) == 4


def loads_what_was_saved(stage: int, folder: Path) -> None:
    saved = saves(stage, folder)
    engine = engine_of(stage)
    average = WeightAverage(ExponentialAverage(0.5)).install(engine)
    engine.load_checkpoint(folder)
    assert differing(average.averaged.full_state_dict(), saved) == []


@pytest.mark.parametrize(("stage", "before", "after"), [(0, 2, 1), (1, 2, 1), (2, 1, 2)])
def test_averages_load_on_another_number_of_ranks(stage: int, before: int, after: int, tmp_path: Path) -> None:
    on_ranks(loads, stage, tmp_path, on_ranks(saves, stage, tmp_path, world=before), world=after)


def loads_converted(folder: Path, saved: State) -> None:
    engine = engine_of(2, checkpoint={"load_universal": True})
    average = WeightAverage(ExponentialAverage(0.5)).install(engine)
    engine.load_checkpoint(folder)
    assert differing(average.averaged.full_state_dict(), saved) == []
    assert average.attachment.step == engine.global_steps == 3


def test_a_converted_checkpoint_goes_on_on_another_number_of_ranks(tmp_path: Path) -> None:
    saved = on_ranks(saves, 2, tmp_path)
    given, made = tmp_path / "global_step3", tmp_path / "global_step3_universal"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(given), "--output_folder", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    shutil.copytree(given / "swafast", made / "swafast")  # as the page says
    on_ranks(loads_converted, tmp_path, saved, world=1)


def runs_beside(stage: int, mode: dict[str, Any]) -> None:
    found = []
    for options in ({}, mode):
        engine = engine_of(stage)
        average = WeightAverage(ExponentialAverage(0.5), **options).install(engine)
        for _ in range(4):
            step(engine)
        found.append(average.averaged.full_state_dict() if average.holds_shards else average.averaged.state_dict())
    assert differing(*found) == []


@pytest.mark.parametrize("mode", [{"overlap": True}, {"offload": "cpu"}], ids=str)
@pytest.mark.parametrize("stage", [0, 2])
def test_updates_beside_the_forward_have_the_same_bits(stage: int, mode: dict[str, Any]) -> None:
    on_ranks(runs_beside, stage, mode)


def loads_after_an_update(folder: Path) -> None:
    engine = engine_of(0)
    average = WeightAverage(ExponentialAverage(0.5), overlap=True).install(engine)
    seen = []
    load = engine._load_checkpoint
    engine._load_checkpoint = lambda *args, **options: (
        seen.append(average.attachment.is_under_way) or load(*args, **options)
    )
    step(engine)
    engine.save_checkpoint(folder)
    # The update ends once somebody waits for it: it is as short as the model is small.
    attachment, let_go = average.attachment, threading.Event()
    run, join = attachment._runner._run, attachment.join
    attachment._runner._run = lambda *args: let_go.wait(60) and run(*args)
    attachment.join = lambda: (let_go.set(), join())
    step(engine)
    assert attachment.is_under_way
    try:
        engine.load_checkpoint(folder, load_module_only=True)
    finally:
        let_go.set()
    assert seen == [False]


def test_a_load_waits_for_an_update_beside_the_forward(tmp_path: Path) -> None:
    on_ranks(loads_after_an_update, tmp_path, world=1)


def prepared_engine(stage: int) -> tuple[Accelerator, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    plugin = DeepSpeedPlugin(hf_ds_config={**config_of(stage), "gradient_accumulation_steps": 1})
    accelerator = Accelerator(deepspeed_plugin=plugin)
    torch.manual_seed(3)
    net = Net()
    loader = DataLoader(torch.randn(BATCH, 4), BATCH)
    return accelerator, *accelerator.prepare(net, optimizer_of(net.parameters()), loader)[:2]


def follows_accelerate(stage: int, folder: Path) -> None:
    accelerator, engine, optimizer = prepared_engine(stage)
    with pytest.raises(NotImplementedError, match=r"install swafast\.integrations\.deepspeed\.WeightAverage in the"):
        AccelerateAverage().install(accelerator, engine, optimizer)
    average = WeightAverage(ExponentialAverage(0.5)).install(engine)

    def steps(count: int) -> None:
        for _ in range(count):
            accelerator.backward(engine(torch.ones(BATCH, 4)).square().sum())
            optimizer.step()
            optimizer.zero_grad()

    steps(2)
    assert (average.attachment.step, int(average.averaged.n_averaged)) == (2, 2)
    saved = average.averaged.full_state_dict()
    accelerator.save_state(str(folder))
    steps(1)
    assert differing(average.averaged.full_state_dict(), saved) != []
    accelerator, engine, optimizer = prepared_engine(stage)
    average = WeightAverage(ExponentialAverage(0.5)).install(engine)
    accelerator.load_state(str(folder))
    assert differing(average.averaged.full_state_dict(), saved) == []
    steps(1)
    assert (average.attachment.step, int(average.averaged.n_averaged)) == (3, 3)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_engine_of_accelerate_is_followed(stage: int, tmp_path: Path) -> None:
    on_ranks(follows_accelerate, stage, tmp_path)


def page_runs(folder: Path) -> None:
    os.chdir(folder)
    before, *after = blocks_of((ROOT / "docs/frameworks/deepspeed.md").read_text())
    config = {
        **config_of(2),
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
    }
    for blocks in ([before], after):
        scope = {**reader(), "config": config, "save_file": save_file}
        scope["evaluate"] = lambda engine, scope=scope: engine(scope["loader"][0])
        exec("\n".join(blocks), scope)
    average, engine = scope["average"], scope["engine"]
    assert average.attachment.step == 3  # two of them before the checkpoint
    assert differing(load_file("average.safetensors"), engine.module.state_dict()) == []


def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    on_ranks(page_runs, tmp_path, world=1)


# Bugs


def averages_are_right(stage: int) -> None:
    engine = engine_of(stage)
    average = WeightAverage(ExponentialAverage(0.5)).install(engine)
    expected: State = {}
    for _ in range(3):
        step(engine)
        newest = without_buffers(whole_state(engine.module))
        expected = {name: torch.lerp(expected.get(name, value), value, 0.5) for name, value in newest.items()}
    found = without_buffers(of_net(average.averaged.full_state_dict()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@contextlib.contextmanager
def counts_before_the_step(self: Any, *_: Any) -> Iterator[None]:
    if self._engine.is_gradient_accumulation_boundary():
        self._counted.step()
    yield


@contextlib.contextmanager
def counts_all_steps(self: Any, *_: Any) -> Iterator[None]:
    yield
    self._counted.step()


def does_nothing(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def plant(name: str, bug: Any) -> None:
    setattr(WeightAverage if hasattr(WeightAverage, name) else deepspeed_engine, name, bug)


#: A method or function, what takes its place, the test that must fail, and its arguments.
BUGS: dict[str, tuple[str, Any, Any, tuple[Any, ...]]] = {
    "the average is a step behind": ("_stepping", counts_before_the_step, averages_are_right, (2,)),
    "skipped steps count": ("_stepping", counts_all_steps, skips_overflows, (2,)),
    "masters keep the trained params": ("refresh_masters", does_nothing, goes_on_from_the_average, (2, torch.float32)),
    "a load leaves the average alone": ("_loading", does_nothing, loads_what_was_saved, (2,)),
    "every engine is taken": ("check_engine", does_nothing, is_refused, ()),
}


@pytest.mark.parametrize(("name", "bug", "body", "given"), BUGS.values(), ids=BUGS)
def test_planted_bugs_are_found(name: str, bug: Any, body: Any, given: tuple[Any, ...], tmp_path: Path) -> None:
    args = (*given, *([tmp_path] if "folder" in inspect.signature(body).parameters else []))
    world = 2 if body in (goes_on_from_the_average, averages_are_right) else 1
    on_ranks(body, *args, world=world)
    with planted(functools.partial(plant, name, bug)), pytest.raises(RankFailedError):
        on_ranks(body, *args, world=world)
