"""`swafast.integrations.accelerate` with Accelerate as it is: plain, DDP, and FSDP2 with sharded states."""

from __future__ import annotations

import re
import warnings
import weakref
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
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from swafast import ExponentialAverage, convert
from swafast.integrations.accelerate import WeightAverage
from tests.frameworks.kit import (
    AVERAGE,
    BATCH,
    STEPS_PER_EPOCH,
    EvaluationError,
    Framework,
    Job,
    Kit,
    Net,
    Report,
    Resumes,
    ResumesWithoutOptimizer,
    Shards,
    State,
    Watch,
    differing,
    of_net,
    optimizer_of,
    others_average,
    whole_state,
)
from tests.frameworks.shims import shim_fsdp1
from tests.test_documents import ROOT, blocks_of, reader

pytestmark = pytest.mark.frameworks


def fresh_state() -> None:
    """Have Accelerate forget the process's earlier accelerators."""
    accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)


class Accelerate(Framework):
    """A user's loop with Accelerate: DDP on several ranks."""

    def accelerator(self, job: Job) -> Accelerator:
        fresh_state()
        return Accelerator(cpu=True, gradient_accumulation_steps=job.accumulation)

    def train(self, job: Job) -> Report:
        accelerator = self.accelerator(job)
        assert accelerator.num_processes == job.world
        net = job.net()
        loader = DataLoader(TensorDataset(*job.train_set()), BATCH)
        sets = [DataLoader(TensorDataset(*job.eval_set(index)), BATCH) for index in range(job.eval_sets)]
        given = (net, optimizer_of(net.parameters()), loader, *sets)
        model, optimizer, loader, *sets = self.prepared(accelerator, *given)
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
            self.recover(model)
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

    def prepared(self, accelerator: Accelerator, *given: Any) -> Any:
        return accelerator.prepare(*given)

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

    def recover(self, model: nn.Module) -> None:
        """Do what users do after a forward that raised, before they save."""

    def saved_model(self, folder: Path, net: nn.Module) -> State:
        """Return the model in a checkpoint."""
        return of_net(load_file(folder / "model.safetensors"))

    def halve(self, folder: Path) -> None:
        (sorted(folder.glob("epoch_*"))[-1] / "swafast" / "attachment.json").unlink()


class Fsdp2(Accelerate):
    """Two ranks with shards, in states and in averages."""

    world = 2
    state_dict_type = "SHARDED_STATE_DICT"
    version = 2
    uses_orig_params = True

    def accelerator(self, job: Job) -> Accelerator:
        fresh_state()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=self.version,
            auto_wrap_policy="NO_WRAP",
            state_dict_type=self.state_dict_type,
            use_orig_params=self.uses_orig_params if self.version == 1 else None,
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=job.accumulation)
        # Accelerate has FSDP only on accelerators, and takes gloo's ranks for DDP.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        accelerate_state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        # FSDP1 wants the CPU as torch itself names it, and Accelerate calls it cpu:0.
        accelerator.state.device = accelerate_state.PartialState._shared_state["device"] = torch.device("cpu")
        return accelerator

    def saved_model(self, folder: Path, net: nn.Module) -> State:
        # Whatever stands in the memory of this state is overwritten, or DCP raises.
        state = {"model": {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}}
        dcp.load(state, checkpoint_id=folder / "pytorch_model_fsdp_0")
        return of_net(state["model"])


class Fsdp2Full(Fsdp2):
    state_dict_type = "FULL_STATE_DICT"

    def saved_model(self, folder: Path, net: nn.Module) -> State:
        return of_net(torch.load(folder / "pytorch_model_fsdp.bin", weights_only=True))


class Fsdp1(Fsdp2Full):
    """FSDP1: the params of the whole network are one flat param."""

    version = 1

    def accelerator(self, job: Job) -> Accelerator:
        shim_fsdp1()
        return super().accelerator(job)

    def recover(self, model: nn.Module) -> None:
        with torch.no_grad():
            model(torch.zeros(BATCH, 4))  # FSDP1 gathers no params for a state until a forward has come to its end
        assert Watch.current is not None
        Watch.current.seen.pop()

    def prepared(self, accelerator: Accelerator, *given: Any) -> Any:
        net, _, *rest = given
        model = accelerator.prepare(net)
        net.fsdp1 = weakref.ref(model)
        return model, *accelerator.prepare(optimizer_of(model.parameters()), *rest)


class Fsdp1Flat(Fsdp1):
    """The same, and the flat param is all that the optimizer sees."""

    uses_orig_params = False


class Fsdp1Sharded(Fsdp1Flat):
    """The same, with shards in states."""

    state_dict_type = "SHARDED_STATE_DICT"

    def saved_model(self, folder: Path, net: nn.Module) -> State:
        state = {"model": Net().state_dict()}
        dcp.load(state, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
        return of_net(state["model"])


class Ddp(Accelerate):
    """Two ranks, each with the whole model."""

    world = 2


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before, *after = blocks_of((ROOT / "docs/frameworks/accelerate.md").read_text())
    for blocks in ([before], after):
        fresh_state()
        scope = reader()
        exec("\n".join(blocks), scope)
    average, model = scope["average"], scope["model"]
    assert average.attachment.step == 3  # two of them before the checkpoint
    assert differing(load_file("exported/model.safetensors"), model.state_dict()) == []


def prepared(**options: Any) -> tuple[Accelerator, nn.Module, Any]:
    fresh_state()
    accelerator = Accelerator(cpu=True, **options)
    model = nn.Linear(4, 2)
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_wrong_installations_are_refused() -> None:
    accelerator, model, optimizer = prepared()
    installs: dict[str, tuple[Any, ...]] = {
        "accelerator must be an accelerate.Accelerator, got Linear": (model, model, optimizer),
        "optimizer must be a result of accelerator.prepare, got SGD": (accelerator, model, optimizer.optimizer),
        r"got list: write install\(accelerator, model, \*optimizers\)": (accelerator, model, [optimizer]),
        "model must be a result of accelerator.prepare": (accelerator, nn.Linear(4, 2), optimizer),
        "must have an optimizer for averages to follow, got none": (accelerator, model),
    }
    for message, given in installs.items():
        average = WeightAverage()
        with pytest.raises((TypeError, ValueError), match=message):
            average.install(*given)
        assert average.averaged is None
    with pytest.raises(ValueError, match="start"):
        WeightAverage(start="3 weeks").install(accelerator, model, optimizer)
    for use in (WeightAverage().swapped, WeightAverage().finish, lambda: WeightAverage().save_model("folder")):
        with pytest.raises(RuntimeError, match=r"must be installed first: call install\(accelerator, model, optimizer"):
            use()
    average = WeightAverage().install(accelerator, model, optimizer)  # none of the above has left anything
    with pytest.raises(ValueError, match="installed once, got a second call"):
        average.install(accelerator, model, optimizer)


def test_another_tools_average_is_taken_over_as_the_page_does() -> None:
    accelerator, model, optimizer = prepared()
    other = AveragedModel(model)
    other.update_parameters(nn.Linear(4, 2))
    average = WeightAverage(ExponentialAverage(0.9)).install(accelerator, model, optimizer)
    page = (ROOT / "docs/frameworks/migration.md").read_text()
    (line,) = re.findall(r"^`(convert\.load\(average\.evaluated, .*?\))`", page, re.MULTILINE)
    exec(line, {"convert": convert, "average": average, "state": other.state_dict()})
    assert differing(average.averaged.averaged_state_dict(), other.module.state_dict()) == []
    assert int(average.averaged.n_averaged) == 1


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, model, optimizer = prepared()
    monkeypatch.setattr(type(accelerator), "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(NotImplementedError, match=r"with DDP or with FSDP, got DistributedType\.DEEPSPEED"):
        WeightAverage().install(accelerator, model, optimizer)


def test_each_model_of_an_accelerator_has_its_average(tmp_path: Path) -> None:
    accelerator, *first = prepared()
    other = nn.Linear(4, 2)
    second = accelerator.prepare(other, torch.optim.SGD(other.parameters(), 0.1))
    averages = [WeightAverage().install(accelerator, *first)]
    with pytest.raises(
        ValueError, match="name must be one that no other average of the accelerator has, got 'swafast'"
    ):
        WeightAverage().install(accelerator, *second)
    averages.append(WeightAverage().install(accelerator, *second, name="other"))
    step(*first)
    step(*second)
    step(*second)
    accelerator.save_state(str(tmp_path / "saved"))
    step(*first)
    accelerator.load_state(str(tmp_path / "saved"))
    assert [average.attachment.step for average in averages] == [1, 2]
    assert [int(average.averaged.n_averaged) for average in averages] == [1, 2]
    assert sorted(path.name for path in tmp_path.glob("saved/*/attachment.json")) == ["attachment.json"] * 2


def test_a_swapped_model_is_not_saved_and_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared()
    average = WeightAverage().install(accelerator, model, optimizer)
    with pytest.raises(RuntimeError, match="must hold a model before it is saved"):
        average.save_model(tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    step(model, optimizer)
    step(model, optimizer)
    with average.swapped(), pytest.raises(RuntimeError, match="swapped"):
        accelerator.save_state(str(tmp_path / "swapped"))
    assert not list(tmp_path.glob("swapped/*.safetensors"))
    accelerator.save_state(str(tmp_path / "saved"))
    broken = torch.load(tmp_path / "saved/swafast/averaged.pt")
    torch.save({**broken, "module.weight": torch.zeros(7)}, tmp_path / "saved/swafast/averaged.pt")
    step(model, optimizer)
    before = average.averaged.state_dict(), whole_state(model)
    with pytest.raises(RuntimeError, match=r"weight"):
        accelerator.load_state(str(tmp_path / "saved"))
    assert differing(average.averaged.state_dict(), before[0]) == []
    assert differing(whole_state(model), before[1]) == []
    assert average.attachment.is_attached
    assert average.attachment.step == 3


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "/tmp", "a\0"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    accelerator, model, optimizer = prepared()
    with pytest.raises(ValueError, match="name must be that of one folder in a checkpoint, such as 'swafast', got "):
        WeightAverage().install(accelerator, model, optimizer, name=name)
    WeightAverage().install(accelerator, model, optimizer, name="my.average-2")


OWN_NAMES = [
    "optimizer.bin", "optimizer_0", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin",
    "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin", "scheduler.bin", "scheduler_1.bin", "sampler.bin", "scaler.pt",
    "random_states_0.pkl", "custom_checkpoint_0.pkl", "dl_state_dict.bin",
]  # fmt: skip


@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_name_of_accelerate_itself_is_refused(name: str) -> None:
    accelerator, model, optimizer = prepared()
    with pytest.raises(
        ValueError, match=r"name must be none of Accelerate's own in a checkpoint, got .*: pass another"
    ):
        WeightAverage().install(accelerator, model, optimizer, name=name)
    WeightAverage().install(accelerator, model, optimizer, name="models")


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_folder_of_somebody_else_is_not_written_into(tmp_path: Path, is_folder: bool) -> None:
    accelerator, model, optimizer = prepared()
    WeightAverage().install(accelerator, model, optimizer, name="mine")
    other = tmp_path / "mine" / "notes" if is_folder else tmp_path / "mine"
    other.parent.mkdir(exist_ok=True)
    other.write_text("x")
    with pytest.raises(ValueError, match=r"name must be that of a folder of averages, or a new one, got .*mine: pass"):
        accelerator.save_state(str(tmp_path))
    assert other.read_text() == "x"
    other.unlink()
    for _ in range(2):  # an empty folder, and one of ours
        accelerator.save_state(str(tmp_path))


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "cut": (
        "averaged.pt",
        lambda path: path.write_bytes(path.read_bytes()[:99]),
        "got a damaged one",
    ),
    "empty": ("averaged.pt", lambda path: path.write_bytes(b""), "whole file of a checkpoint, got a damaged one"),
    "a list": ("averaged.pt", lambda path: torch.save([1], path), "must have a dict as 'averaged', got list"),
    "another shape": (
        "averaged.pt",
        lambda path: torch.save({**torch.load(path), "module.weight": torch.zeros(7)}, path),
        "size mismatch for module.weight",
    ),
    "a number as a name": (
        "averaged.pt",
        lambda path: torch.save({**torch.load(path), 3: torch.zeros(7)}, path),
        "must have names as the keys of its states, got 3",
    ),
    "half a JSON": ("attachment.json", lambda path: path.write_text('{"step": 1'), "got a damaged one"),
    "a number": ("attachment.json", lambda path: path.write_text("3"), "must have a dict as 'attachment', got int"),
    "no step": ("attachment.json", lambda path: path.write_text("{}"), "must have numbers of steps in 'attachment'"),
    "null": ("attachment.json", lambda path: path.write_text("null"), "got none of 'attachment'"),
}


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_named_and_changes_no_average_and_no_model(
    tmp_path: Path, file: str, damage: Any, message: str
) -> None:
    accelerator, *first = prepared()
    other = nn.Linear(4, 2)
    second = accelerator.prepare(other, torch.optim.SGD(other.parameters(), 0.1))
    averages = [
        WeightAverage().install(accelerator, *each, name=name) for each, name in ((first, "one"), (second, "two"))
    ]
    step(*first)
    step(*second)
    accelerator.save_state(str(tmp_path))
    damage(tmp_path / "two" / file)
    step(*first)
    step(*second)
    before = [whole_state(first[0]), whole_state(other)]
    before += [{key: value.clone() for key, value in each.averaged.state_dict().items()} for each in averages]
    with pytest.raises((ValueError, RuntimeError), match=message) as raised:
        accelerator.load_state(str(tmp_path))
    assert str(tmp_path / "two") in str(raised.value)
    after = [whole_state(first[0]), whole_state(other), *(each.averaged.state_dict() for each in averages)]
    for one, same in zip(before, after, strict=True):
        assert differing(one, same) == []
    assert [each.attachment.step for each in averages] == [2, 2]
    assert int(averages[0].averaged.n_averaged) == 2


@pytest.mark.parametrize("lost", [".metadata", "__0_0.distcp"])
def test_damaged_shards_are_named_and_change_nothing(tmp_path: Path, lost: str) -> None:
    accelerator, model, optimizer = prepared()
    average = WeightAverage(sharded=True).install(accelerator, model, optimizer)
    step(model, optimizer)
    accelerator.save_state(str(tmp_path))
    (tmp_path / "swafast/averaged" / lost).unlink()
    step(model, optimizer)
    before = average.averaged.full_state_dict(), whole_state(model)
    with pytest.raises(RuntimeError, match=r"swafast/averaged must be whole and of the same averages, got errors"):
        accelerator.load_state(str(tmp_path))
    assert differing(average.averaged.full_state_dict(), before[0]) == []
    assert differing(whole_state(model), before[1]) == []
    assert average.attachment.step == 2


def test_a_save_after_the_end_is_told_if_the_model_has_the_average(tmp_path: Path) -> None:
    for copies in (True, False):
        accelerator, model, optimizer = prepared()
        average = WeightAverage(copy_at_end=copies).install(accelerator, model, optimizer)
        step(model, optimizer)
        accelerator.save_state(str(tmp_path / "before"))
        step(model, optimizer)
        average.finish()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            accelerator.save_state(str(tmp_path / "after"))
            told = len([each for each in caught if "copy_at_end=False" in str(each.message)])
            accelerator.load_state(str(tmp_path / "before"))  # with the trained params
            accelerator.save_state(str(tmp_path / "again"))
        assert told == copies
        assert len([each for each in caught if "copy_at_end=False" in str(each.message)]) == told


@pytest.mark.parametrize("number", [1, 2])
def test_a_load_that_fails_after_the_end_leaves_the_warning(tmp_path: Path, number: int) -> None:
    accelerator, *first = prepared()
    pairs = [first]
    for _ in range(1, number):
        other = nn.Linear(4, 2)
        pairs.append(accelerator.prepare(other, torch.optim.SGD(other.parameters(), 0.1)))
    averages = [
        WeightAverage().install(accelerator, *each, name=name)
        for each, name in zip(pairs, ("one", "two"), strict=False)
    ]
    for each in pairs:
        step(*each)
    accelerator.save_state(str(tmp_path / "saved"))
    step(*first)
    averages[0].finish()
    (tmp_path / "saved" / averages[-1]._name / "averaged.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="got a damaged one"):
        accelerator.load_state(str(tmp_path / "saved"))
    with pytest.warns(UserWarning, match="the model has the averages since the training has ended"):
        accelerator.save_state(str(tmp_path / "again"))


def test_a_load_that_does_not_fit_after_the_end_leaves_the_warning(tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared()
    average = WeightAverage().install(accelerator, model, optimizer)
    step(model, optimizer)
    accelerator.save_state(str(tmp_path))
    average.finish()
    path = tmp_path / "swafast/averaged.pt"
    torch.save({**torch.load(path), "module.weight": torch.zeros(7)}, path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        accelerator.load_state(str(tmp_path))
    with pytest.warns(UserWarning, match="the model has the averages since the training has ended"):
        accelerator.save_state(str(tmp_path / "again"))


def test_an_installation_after_the_load_is_told(tmp_path: Path) -> None:
    def trained_before() -> tuple[Accelerator, nn.Module, Any]:
        fresh_state()
        accelerator, model = Accelerator(cpu=True), nn.Linear(4, 2)
        return accelerator, *accelerator.prepare(model, torch.optim.Adam(model.parameters()))

    accelerator, model, optimizer = trained_before()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WeightAverage().install(accelerator, model, optimizer)
    step(model, optimizer)
    accelerator.save_state(str(tmp_path / "saved"))
    for options, count in (({}, 0), ({"step": 1}, 1)):
        accelerator, model, optimizer = trained_before()
        accelerator.load_state(str(tmp_path / "saved"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            average = WeightAverage().install(accelerator, model, optimizer, **options)
        told = [str(each.message) for each in caught]
        assert ["call install before load_state" in text for text in told] == [True] * (not options)
        assert average.attachment.step == count


class TestAccelerate(Kit):
    framework = Accelerate()


class TestDdp(Resumes):
    framework = Ddp()
    kinds = ("float32",)

    def test_whole_averages_go_on_as_shards_but_not_the_other_way(self) -> None:
        shards = {**AVERAGE, "sharded": True}
        whole = self.trained()
        second = self.trained(self.trained(steps=8), options=shards)
        assert whole.averaged is not None
        assert second.averaged is not None
        assert differing(of_net(second.averaged), of_net(whole.averaged)) == []
        assert int(second.averaged["n_averaged"]) == 24
        refusal = self.framework.refusal(self.job(self.trained(steps=8, options=shards)))
        assert refusal.startswith("ValueError: sharded must be True"), refusal


class TestFsdp2Full(Resumes):
    """States of whole tensors: the averages are shards all the same."""

    framework = Fsdp2Full()
    kinds = ("float32",)


class TestFsdp1(ResumesWithoutOptimizer):
    framework = Fsdp1()
    kinds = ("float32",)


class Early(Fsdp1Flat):
    """The optimizer is made before the flat param that replaces its params."""

    prepared = Accelerate.prepared


def test_an_optimizer_of_params_that_fsdp1_has_replaced_is_refused(tmp_path: Path) -> None:
    refusal = Early().refusal(Job(tmp_path))
    assert refusal.startswith("ValueError: optimizer must have params of the model, got one that has none of them")


class TestFsdp1Sharded(ResumesWithoutOptimizer):
    framework = Fsdp1Sharded()
    kinds = ("float32",)


class TestFsdp1Flat(Resumes):
    framework = Fsdp1Flat()
    kinds = ("float32",)


class TestFsdp2(Resumes):
    framework = Fsdp2()

    test_a_checkpoint_without_averages_begins_a_fresh_one = Kit.test_a_checkpoint_without_averages_begins_a_fresh_one


class TakesOver(Fsdp2):
    """As the page on migration says."""

    def epoch(self, accelerator: Accelerator, *given: Any) -> None:
        (average,) = vars(accelerator)["_swafast_averages"]
        if average.attachment.step == 0:
            assert Watch.current is not None
            convert.load(average.evaluated, others_average(Watch.current.job).state_dict())
        super().epoch(accelerator, *given)


class TakesOverFsdp1(TakesOver, Fsdp1Flat):
    """The same in a flat param."""


class TestShards(Shards):
    resumes = (Fsdp2, Fsdp2Full)
    takers = (TakesOver, TakesOverFsdp1)
