"""Composer: the kit, and its page."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import composer
import pytest
import torch

import swafast
from swafast.integrations.composer import WeightAverage
from tests.frameworks.composer_kit import Composer, Ddp, Fsdp2, Model, Sharded, loader
from tests.frameworks.kit import Job, Kit, Net, Resumes, Shorter, check_another_world, differing, optimizer_of
from tests.test_documents import ROOT, blocks_of

pytestmark = pytest.mark.frameworks


class TestComposer(Kit):
    framework = Composer()


class TestDdp(Shorter):
    framework = Ddp()
    kinds = ("float32",)


class TestFsdp2(Resumes):
    framework = Fsdp2()
    kinds = ("float32",)

    test_half_a_state_is_refused = Kit.test_half_a_state_is_refused


class TestSharded(Shorter):
    framework = Sharded()
    kinds = ("compact",)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_shards_go_on_on_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    check_another_world(Fsdp2(), tmp_path, before, after)


PAGE = (ROOT / "docs/frameworks/composer.md").read_text()


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = {"progress_bar": False, "log_to_console": False, "auto_log_hparams": False, "device": "cpu"}
    trainer = composer.Trainer
    monkeypatch.setattr(composer, "Trainer", lambda **options: trainer(**{**quiet, **options}))
    job = Job(tmp_path)
    scope: dict[str, Any] = {"train_loader": loader(job.train_set()), "eval_loader": loader(job.eval_set(0))}
    names = ("model", "fresh_model", "another_model")
    before, *after = blocks_of(PAGE)
    for blocks in ([before], after):
        for name in names:
            scope[name] = Model(Net())
            scope[name.replace("model", "optimizer")] = optimizer_of(scope[name].parameters())
        steps, averages = [], []
        for block in blocks:
            exec(block, scope)
            average = scope.get("average")
            if average is not None:
                steps.append((average.attachment.step, int(average.averaged.n_averaged)))
                averages.append(copy.deepcopy(average.evaluated.averaged_state_dict()))
        if blocks == [before]:
            Path("checkpoints").rename("ema")
    assert steps == [(8, 8), (12, 12), (12, 12), (12, 9 + 4)]
    exported = torch.load("model.pt", weights_only=True)
    assert differing(exported, scope["fresh_model"].state_dict()) == []
    assert differing({f"net.{name}": each for name, each in torch.load("average.pt").items()}, exported) == []
    assert differing(scope["weights"], averages[0]) == []


def test_the_lines_of_the_page_for_swa_run() -> None:
    (line,) = re.findall(r"^\+ (WeightAverage.*)$", PAGE, re.MULTILINE)
    space = {name: getattr(swafast, name) for name in swafast.__all__}
    assert isinstance(eval(line, {**space, "WeightAverage": WeightAverage}), WeightAverage)
