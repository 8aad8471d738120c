"""Which checkpoints are averaged: steps from the names of real programs, and metrics from where they leave them."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from swafast import cli
from swafast.files import average, metrics, selection, step_names
from swafast.files.metrics import is_lower_better
from swafast.files.selection import Selected, select
from swafast.files.step_names import counts_of

HF_FILES = ("model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")


def put(folder: Path, *names: str) -> Path:
    """Make files, the last in order first in time: by their times they would be averaged the wrong way round."""
    for age, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (10**9 - age, 10**9 - age))
    return folder


def named(found: Sequence[Selected], folder: Path) -> list[str]:
    return [os.path.relpath(each.path, folder) for each in found]


def trainer_folder(folder: Path, losses: dict[int, float | None]) -> Path:
    """Make the folder of a Hugging Face training, with a state of all evaluations so far in each checkpoint."""
    log: list[dict[str, Any]] = []
    for step, loss in losses.items():
        put(folder / f"checkpoint-{step}", *HF_FILES)
        log += [{"step": step, "loss": 9.0 - step}, *([] if loss is None else [{"step": step, "eval_loss": loss}])]
        state = {"best_metric": 1.0, "global_step": step, "log_history": log}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    return folder


# Steps


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["checkpoint-500", "checkpoint-1000", "checkpoint-20000"], [500, 1000, 20000]),  # Hugging Face
        (["epoch=3-step=1000.ckpt", "epoch=10-step=900.ckpt"], [1000, 900]),  # Lightning
        (["epoch=9-val_loss=0.23.ckpt", "epoch=10-val_loss=0.2.ckpt"], [9, 10]),
        (["epoch=9-val_loss=1e-05.ckpt", "epoch=10-val_loss=2.ckpt"], [9, 10]),
        (["iter_0001000", "iter_0010000"], [1000, 10000]),  # Megatron
        (["global_step1000", "global_step900"], [1000, 900]),  # DeepSpeed
        (["checkpoint9.pt", "checkpoint12.pt"], [9, 12]),  # fairseq
        (["checkpoint_12_34000.pt", "checkpoint_13_35000.pt"], [34000, 35000]),
        (["checkpoint_12_34000.pt"], [34000]),
        (["ep3-ba1000-rank0.pt", "ep4-ba2000-rank0.pt"], [1000, 2000]),  # Composer
        (["model_000500.safetensors", "model_001000.safetensors"], [500, 1000]),
        (["checkpoint-9.pth.tar", "checkpoint-12.pth.tar"], [9, 12]),  # timm
        (["step1000-tokens4B", "step2000-tokens8B"], [1000, 2000]),  # OLMo
        (["step-500", "step-10k"], [500, 10000]),
        (["resnet50-a1_7.pt", "resnet50-a1_12.pt"], [7, 12]),
        (["llama-7b-ckpt500", "llama-7b-ckpt600"], [500, 600]),
        (["500.pt", "0600.pt"], [500, 600]),
        (["run2_step=500.bin", "run2_step=700.safetensors"], [500, 700]),
        (["step_7.safetensors.index.json"], [7]),
        (["resnet_batch32_epoch1.pt", "resnet_batch32_epoch2.pt"], [1, 2]),  # constants are not the step
        (["timestep1000_epoch1.pt", "timestep1000_epoch2.pt"], [1, 2]),
        (["epoch_1_batch_500.pt", "epoch_2_batch_100.pt"], [1, 2]),  # batches start again in each epoch
        (["step32_epoch1.pt"], [32]),
        (["writer3-500.pt", "writer3-1000.pt"], [500, 1000]),  # a word that ends in another
        (["epoch=0-val_loss=nan.ckpt", "epoch=1-val_loss=0.5.ckpt", "epoch=2-val_loss=-inf.ckpt"], [0, 1, 2]),
        (["epoch=0-elbo=-0.5.ckpt", "epoch=1-elbo=0.5.ckpt", "epoch=2-elbo=-3.ckpt"], [0, 1, 2]),
        (["epoch_0_elbo_-0.5.ckpt", "epoch_1_elbo_nan.ckpt"], [0, 1]),
        (["nanogpt-500.pt", "nanogpt-600.pt"], [500, 600]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
def test_steps_are_read_from_names(names: list[str], steps: list[int]) -> None:
    assert [each.step for each in counts_of(names)] == steps


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["first.pt", "second.pt"], "named in two ways"),
        (["weights.pt"], "no number that is a step"),
        (["checkpoint9.pt", "checkpoint_12_34000.pt"], "named in two ways"),  # an epoch and an update
        (["model_500.pt", "ema_1000.pt"], "named in two ways"),  # would mix models with their averages
        (["step1000", "step2000-unsharded"], "named in two ways"),
        (["recovery-3-500.pth.tar", "recovery-4-100.pth.tar"], "several numbers"),  # a batch within an epoch
        (["2026-01-31.pt", "2026-02-01.pt"], "several numbers"),
        (["acc=91.ckpt", "acc=92.ckpt"], "no number that is a step"),
        (["v0.5.pt", "v0.6.pt"], "no number that is a step"),
        (["step-1e+400k.pt", "step-2e+400k.pt"], "no number that is a step"),
        (["step=-5.pt", "step=-5k.pt"], "no number that is a step"),
        (["nanogpt-500.pt", "infogpt-600.pt"], "named in two ways"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_names_that_do_not_tell_are_refused(names: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        counts_of(names)
    put(tmp_path, *names)
    with pytest.raises(ValueError, match=r"list the checkpoints to average, the oldest first") as error:
        select([tmp_path / name for name in names], last=1)
    assert repr(names[0]) in str(error.value)


def test_a_named_epoch_is_kept_beside_the_step() -> None:
    assert [each.epoch for each in counts_of(["epoch=3-step=1000.ckpt", "epoch=4-step=2000.ckpt"])] == [3, 4]
    assert [each.kind for each in counts_of(["step_1"]) + counts_of(["ep1"]) + counts_of(["c1"])] == [
        "step",
        "epoch",
        "",
    ]


# What is selected


def test_the_order_is_that_of_numbers_not_of_text_or_time(tmp_path: Path) -> None:
    put(tmp_path, "checkpoint-10.pt", "checkpoint-9.pt", "checkpoint-100.pt")
    found = select([tmp_path])
    assert [each.step for each in found] == [9, 10, 100]
    assert named(select([tmp_path], last=2), tmp_path) == ["checkpoint-10.pt", "checkpoint-100.pt"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"first_step": 300}, [300, 350, 400, 500]),
        ({"last_step": 300}, [100, 200, 300]),
        ({"first_step": 200, "last_step": 350, "last": 2}, [300, 350]),
        ({"min_gap": 100}, [100, 200, 300, 400, 500]),
        ({"min_gap": 101}, [200, 350, 500]),
        ({"min_gap": 200, "last": 2}, [300, 500]),
        ({"min_gap": 1}, [100, 200, 300, 350, 400, 500]),
    ],
    ids=str,
)
def test_options_select_by_step(options: dict[str, int], steps: list[int], tmp_path: Path) -> None:
    names = [f"step_{step}.pt" for step in (100, 200, 300, 350, 400, 500)]
    put(tmp_path, *names)
    assert [each.step for each in select([tmp_path], **options)] == steps  # type: ignore[arg-type]
    listed = [tmp_path / name for name in reversed(names)]
    assert [each.step for each in select(listed, **options)] == steps  # type: ignore[arg-type]


def test_what_is_no_checkpoint_is_skipped_and_said(tmp_path: Path) -> None:
    put(
        tmp_path,
        *("step_500.pt", "step_1000.pt", "optimizer.pt", "optim_500.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"),
        *(
            "rng_state_0.pth",
            "training_args.bin",
            "log.txt",
            "trainer_state.json",
            "events.out.tfevents.1",
            ".hidden.pt",
        ),
        *("step_1500.pt.unfinished", "step_1500.a1b2.unfinished/step_1500.pt", "tmp-checkpoint-7/model.safetensors"),
        *(
            "last.pt",
            "model_best.pth.tar",
            "latest-rank0.pt",
            "checkpoint.best_bleu_27.5.pt",
            "init.pt",
            "version_0/x.txt",
        ),
        *("model.safetensors", "pytorch_model-00001-of-00002.bin", "step_9-00001-of-00002.safetensors"),
    )
    lines: list[str] = []
    assert named(select([tmp_path], last=2, say=lines.append), tmp_path) == ["step_500.pt", "step_1000.pt"]
    said = "\n".join(lines).replace(str(tmp_path), "run")
    for words in (
        "skipped in run: 'optim_500.pt', 'optimizer.pt', 'rng_state.pth' and 4 more (states of a training, no weights)",
        "'step_1500.a1b2.unfinished', 'step_1500.pt.unfinished', 'tmp-checkpoint-7' (unfinished)",
        "'checkpoint.best_bleu_27.5.pt', 'init.pt', 'last.pt' and 2 more (copies or means of others)",
        "'model.safetensors', 'pytorch_model-00001-of-00002.bin' (weights of the folder itself)",
        "'step_9-00001-of-00002.safetensors' (shards of a checkpoint)",
        "'events.out.tfevents.1', 'log.txt', 'trainer_state.json' and 1 more (no checkpoint)",
    ):
        assert words in said
    assert "hidden" not in said


@pytest.mark.parametrize("name", ["checkpoint_9.safetensors", "checkpoint_9.pt", "checkpoint_9", "x.pt"])
def test_averages_in_the_folder_of_a_training_are_skipped(name: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save_file({"a": np.float32([step])}, tmp_path / f"checkpoint_{step}.safetensors")
    average([tmp_path], tmp_path / name, last=2)
    lines: list[str] = []
    assert [each.step for each in select([tmp_path], last=2, say=lines.append)] == [1, 2]
    assert lines == [f"skipped in {tmp_path}: {name!r} (averages that swafast wrote)"]
    listed = sorted(tmp_path.iterdir())
    assert [each.step for each in select(listed, last=2, say=lines.append)] == [1, 2]
    assert lines[1] == f"skipped: {str(tmp_path / name)!r} (averages that swafast wrote)"
    assert len(select(listed)) == 3  # listed without an option, it is averaged
    for step in (1, 2):
        (tmp_path / f"checkpoint_{step}.safetensors").unlink()
    with pytest.raises(ValueError, match=r"without any: .*that swafast wrote\). List them"):
        select([tmp_path])
    with pytest.raises(ValueError, match=r"to select from, got .*that swafast wrote"):
        select([tmp_path / name] * 2, last=1)


def test_a_file_that_is_listed_twice_is_said(tmp_path: Path) -> None:
    put(tmp_path, "s1.pt", "s2.pt")
    lines: list[str] = []
    assert len(select([tmp_path / name for name in ("s1.pt", "s2.pt", "s1.pt")], say=lines.append)) == 3
    assert lines == [f"listed more than once, and counted as often: {str(tmp_path / 's1.pt')!r}"]


def test_copies_in_a_list_are_skipped_where_an_option_selects(tmp_path: Path) -> None:
    put(tmp_path, "s1.pt", "s2.pt", "best.pt", "optimizer.pt")
    lines: list[str] = []
    assert named(select(sorted(tmp_path.iterdir()), last=2, say=lines.append), tmp_path) == ["s1.pt", "s2.pt"]
    assert [line.rpartition(" (")[2] for line in lines] == [
        "copies or means of others)",
        "states of a training, no weights)",
    ]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (
            ["a", "b"],
            "got the folder 'a' with 's1.pt', 's2.pt' among 2 inputs: give one folder",
        ),
        (["a/s1.pt", "0.7"], "got '0.7': weights are one text with commas, as in --weights 0.3,0.7"),
        (["a/*.pth"], "got 'a/*.pth': no name fits this pattern, or it is in quotes"),
        (["a/none.pt"], "got 'a/none.pt': there is nothing at this path"),
        (["model-00001-of-00002.safetensors"], "which is one of 2 files of a checkpoint: give its folder or its index"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_inputs_that_were_meant_otherwise(
    inputs: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a/s1.pt", "a/s2.pt", "b/s1.pt", "b/s2.pt", "model-00001-of-00002.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        select(inputs)


def test_names_of_a_series_with_best_are_checkpoints(tmp_path: Path) -> None:
    put(tmp_path, "best-epoch=3-step=50.ckpt", "best-epoch=4-step=60.ckpt", "last.ckpt")
    assert [each.step for each in select([tmp_path])] == [50, 60]


@pytest.mark.parametrize(
    ("names", "copies"),
    [
        (["epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt"], ["epoch=1-step=20-v1.ckpt"]),  # Lightning
        (["m--val_loss=0.10-epoch=1.ckpt"], ["m--val_loss=0.30-epoch=2-last.ckpt"]),  # NeMo
        (["m-step=100.ckpt"], ["m-step=100-EMA.ckpt"]),
        (["step-100/model.safetensors"], ["step-100-best/model.safetensors"]),
        (["m-step=100-EMA.ckpt", "m-step=200-EMA.ckpt"], []),
        (["step_100_v1.pt", "step_200_v1.pt"], []),
    ],
    ids=lambda value: value[0] if value else "none",
)
def test_copies_of_a_step_are_skipped_and_said(names: list[str], copies: list[str], tmp_path: Path) -> None:
    lines: list[str] = []
    put(tmp_path, *names, *copies)
    found = select([tmp_path], last=len(names), say=lines.append)
    assert [os.path.basename(each.path) for each in found] == [name.partition("/")[0] for name in names]
    said = [f"{name.partition('/')[0]!r} (copies or means of others)" for name in copies]
    assert [line.partition(": ")[2] for line in lines] == said
    paths = [tmp_path / name.partition("/")[0] for name in (*copies, *names)]
    assert len(select(paths, last=len(names), say=lines.append)) == len(names)  # as by the pattern run/*


@pytest.mark.parametrize(
    ("files", "opened"),
    [
        (["step_1/.metadata", "step_1/__0_0.distcp"], "step_1"),
        (["step_1/model-00001-of-00002.safetensors", "step_1/model.safetensors.index.json"], "step_1"),
        (["step_1/pytorch_model.bin", "step_1/optimizer.bin"], "step_1/pytorch_model.bin"),
        (["step_1/model.pt", "step_1/optim.pt", "step_1/train.pt"], "step_1/model.pt"),
        (["step_1/mp_rank_00_model_states.pt", "step_1/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
         "step_1/mp_rank_00_model_states.pt"),
        (["step_1/model_and_optim/.metadata", "step_1/train/rank0.pt"], "step_1/model_and_optim"),  # OLMo-core
        (["step_1/pytorch_model-00001-of-00002.bin", "step_1/optimizer.pt"], None),
        (["step_1/optimizer.pt"], None),
        (["step_1/model_and_optim/.metadata", "step_1/config.json"], "step_1/model_and_optim"),
        (["step_1/pytorch_model_fsdp_0/.metadata", "step_1/optimizer_0/.metadata"], "step_1/pytorch_model_fsdp_0"),
        (["step_1/pytorch_model.bin", "step_1/sampler.bin", "step_1/sampler_1.bin", "step_1/dl_state_dict.bin"],
         "step_1/pytorch_model.bin"),  # accelerate
        (["step_1/a/weights.pt", "step_1/b/weights.pt"], None),
        (["step_1/mp_rank_00_model_states.pt", "step_1/mp_rank_01_model_states.pt"], None),
        (["step_1/a/b/model.safetensors"], None),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_the_checkpoint_in_a_folder_is_found(files: list[str], opened: str | None, tmp_path: Path) -> None:
    put(tmp_path, *files)
    if opened is None:
        with pytest.raises(ValueError, match=r"without any: 'step_1' \(no checkpoint\)"):
            select([tmp_path])
    else:
        assert named(select([tmp_path]), tmp_path) == [opened]
        assert select([tmp_path])[0].step == 1


def test_a_folder_that_is_a_checkpoint_is_one(tmp_path: Path) -> None:
    alone = put(tmp_path / "alone", *HF_FILES)
    assert select([alone]) == [Selected(str(alone))]
    with pytest.raises(ValueError, match="which is one checkpoint: give the folder that it lies in"):
        select([alone], last=1)
    both = put(trainer_folder(tmp_path / "both", {500: 1.0, 1000: 2.0}), "model.safetensors")
    with pytest.raises(ValueError, match="is a checkpoint itself and has 2 in it: add --last N"):
        select([both])
    assert named(select([both], last=2), both) == ["checkpoint-500", "checkpoint-1000"]


def test_listed_files_are_taken_as_they_are(tmp_path: Path) -> None:
    put(tmp_path, "b.pt", "a.pt", "last.ckpt")
    paths = [tmp_path / name for name in ("b.pt", "a.pt", "last.ckpt")]
    assert select(paths) == [Selected(str(path)) for path in paths]
    put(tmp_path, "checkpoint-1000.pt", "checkpoint-500.pt")
    text_order = sorted(str(path) for path in tmp_path.glob("checkpoint-*"))
    assert [each.step for each in select(text_order)] == [1000, 500]
    assert select(text_order[::-1])[0].step == 500


def test_a_listed_file_without_a_number_has_the_step_of_its_folder(tmp_path: Path) -> None:
    trainer_folder(tmp_path, {500: 2.0, 1000: 1.0})
    paths = sorted(tmp_path.glob("*/model.safetensors"))
    assert [each.step for each in select(paths, last=2)] == [500, 1000]
    assert [each.metric for each in select(paths, metric="eval_loss", best=2)] == [2.0, 1.0]


def test_a_step_that_two_have_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "step_5.pt", "step_05.pt")
    with pytest.raises(ValueError, match=r"step_05.pt' and '.*step_5.pt' have the same step"):
        select([tmp_path], last=1)
    ranks = put(tmp_path / "ranks", "ep0-ba10-rank0.pt", "ep0-ba10-rank1.pt")
    with pytest.raises(ValueError, match="have the same step"):
        select([ranks], last=1)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"last": 0}, ValueError, "last must be at least 1"),
        ({"last": True}, TypeError, "last must be an int"),
        (
            {"last": 4},
            ValueError,
            "last must be at most the 3 checkpoints that there are, got 4: 's1.pt', 's2.pt'",
        ),
        ({"min_gap": 0}, ValueError, "min_gap must be at least 1"),
        ({"first_step": -1}, ValueError, "first_step (--from) must be at least 0"),
        (
            {"first_step": 3, "last_step": 2},
            ValueError,
            "first_step (--from) must be at most last_step (--to)",
        ),
        (
            {"first_step": 9},
            ValueError,
            "first_step (--from) must leave a checkpoint, got 9, and 's1.pt' has the step 1 and 's3.pt' has the step 3",
        ),
        ({"metric": "loss"}, ValueError, "metric and best must be given together"),
        ({"best": 1}, ValueError, "metric and best must be given together"),
        ({"metric": " ", "best": 1}, ValueError, "metric must be the name of a field"),
        ({"metric": "loss", "best": 1, "last": 1}, ValueError, "last and best must not be given together"),
        ({"lower_is_better": True}, ValueError, "lower_is_better must be given with metric"),
        ({"metric": "loss", "best": 1}, ValueError, "'loss', without one for 's1.pt', 's2.pt', 's3.pt'"),
        ({"metric": "quality", "best": 1}, ValueError, "--lower-is-better or --higher-is-better"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options: dict[str, Any], kind: type, words: str, tmp_path: Path) -> None:
    put(tmp_path, "s1.pt", "s2.pt", "s3.pt")
    with pytest.raises(kind, match=re.escape(words)):
        select([tmp_path], **options)


def test_inputs_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        select([])
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        select([tmp_path / "nothing.pt"])
    with pytest.raises(ValueError, match="without any: it is empty"):
        select([tmp_path])


# Metrics


def test_the_log_of_hugging_faces_trainer_is_read(tmp_path: Path) -> None:
    trainer_folder(tmp_path, {100: 3.0, 200: 1.0, 300: 2.0, 1000: 1.5})
    found = select([tmp_path], metric="eval_loss", best=2)
    assert [(each.step, each.metric) for each in found] == [(200, 1.0), (1000, 1.5)]
    with pytest.raises(
        ValueError,
        match=r"'eval_bleu', without one for 'checkpoint-100', 'checkpoint-200', .* and 1 more",
    ):
        select([tmp_path], metric="eval_bleu", best=1)
    put(tmp_path / "checkpoint-2000", *HF_FILES)
    with pytest.raises(ValueError, match="without one for 'checkpoint-2000'"):
        select([tmp_path], metric="eval_loss", best=1)


def test_the_fields_that_exist_are_named(tmp_path: Path) -> None:
    put(tmp_path, "epoch_1.pt", "epoch_2.pt")
    table = tmp_path / "metrics.csv"
    with pytest.raises(ValueError, match=r"no JSON, CSV or YAML beside .* first line epoch,val-loss; or list"):
        select([tmp_path], metric="val-loss", best=1)
    table.write_text("epoch,val_loss,valid_acc\n1,0.5,0.9\n2,0.4,0.9\n")
    with pytest.raises(ValueError, match=r"metrics.csv has epoch, val_loss, valid_acc. Values in the checkpoints"):
        select([tmp_path], metric="val-loss", best=1)
    (tmp_path / "epoch_1.json").write_text(json.dumps(dict.fromkeys(map("f{}".format, range(20)), 1)))
    with pytest.raises(ValueError, match=r"epoch_1.json has f0, f1, .*, f11 and others; metrics.csv has epoch,"):
        select([tmp_path], metric="val-loss", best=1)


def test_timms_summary_is_read_by_epoch(tmp_path: Path) -> None:
    put(tmp_path, *(f"checkpoint-{epoch}.pth.tar" for epoch in (8, 9, 10)), "last.pth.tar", "model_best.pth.tar")
    rows = [f"{epoch},{epoch / 10},{top1}" for epoch, top1 in ((8, 70.5), (9, 70.1), (9, 71.0), (10, 69.0))]
    (tmp_path / "summary.csv").write_text("\n".join(["epoch,train_loss,eval_top1", *rows]))
    found = select([tmp_path], metric="eval_top1", best=2)
    assert [(each.step, each.metric) for each in found] == [(8, 70.5), (9, 71.0)]  # the later row of epoch 9


def test_lightnings_names_and_table_are_read(tmp_path: Path) -> None:
    folder = put(tmp_path / "checkpoints", *(f"epoch={e}-step={s}-val_loss={v}.ckpt" for e, s, v in
                 ((1, 100, 0.3), (2, 200, 0.1), (10, 1000, 0.2))))  # fmt: skip
    # Lightning logs the step before: 99, not 100. The epoch is that of the name.
    (tmp_path / "metrics.csv").write_text("epoch,step,val_acc\n1,99,0.5\n1,99,\n2,199,0.7\n10,999,0.6\n")
    assert [each.step for each in select([folder], metric="val_loss", best=2)] == [200, 1000]
    found = select([folder], metric="val_acc", best=1)
    assert [(each.step, each.metric) for each in found] == [(200, 0.7)]
    with pytest.raises(ValueError, match="without one for"):
        select([folder], metric="loss", best=1)  # not the loss of val_loss


def test_files_beside_a_checkpoint_are_read(tmp_path: Path) -> None:
    put(tmp_path, "step_1.pt", "step_2.pt", "step_3/model.safetensors")
    (tmp_path / "step_1.json").write_text('{"valid": {"loss": 0.5}, "done": true}')
    (tmp_path / "step_2.yaml").write_text("epoch: 2\nvalid:\n  acc: 0.1\n  loss: 0.25\n")  # wenet
    (tmp_path / "step_3" / "eval_results.json").write_text('{"valid": {"loss": 0.75}}')
    found = select([tmp_path], metric="valid.loss", best=3)
    assert [each.metric for each in found] == [0.5, 0.25, 0.75]


def test_rows_of_lightning_are_those_of_the_step_before(tmp_path: Path) -> None:
    folder = put(tmp_path / "checkpoints", *(f"epoch={e}-step={s}.ckpt" for e, s in
                 ((0, 500), (0, 1000), (1, 1500), (1, 2000))))  # fmt: skip
    table = tmp_path / "metrics.csv"
    table.write_text("epoch,step,val_loss,train_loss\n0,499,0.1,\n0,999,0.5,\n1,1499,0.2,\n1,1999,0.6,\n")
    found = select([folder], metric="val_loss", best=2)
    assert [(each.step, each.metric) for each in found] == [(500, 0.1), (1500, 0.2)]
    # A row of an epoch is that of no checkpoint if there are two.
    table.write_text("epoch,val_loss\n0,0.5\n1,0.6\n")
    with pytest.raises(ValueError, match=r"'val_loss', without one for 'epoch=0-step=500\.ckpt'"):
        select([folder], metric="val_loss", best=2)
    table.write_text("epoch,step,val_loss\n0,500,9\n0,1000,1\n1,1500,2\n1,2000,3\n1,1999,0\n")  # not mixed
    assert [each.metric for each in select([folder], metric="val_loss", best=2)] == [1.0, 2.0]


def test_a_named_epoch_is_not_looked_up_as_a_step(tmp_path: Path) -> None:
    put(tmp_path, "epoch=1.ckpt", "epoch=2.ckpt")
    table = tmp_path / "metrics.csv"
    table.write_text("epoch,step,loss\n" + "".join(f"{step // 10},{step},{step}\n" for step in range(30)))
    assert [each.metric for each in select([tmp_path], metric="loss", best=2)] == [19.0, 29.0]
    table.write_text("step,loss\n1,1\n2,2\n")
    with pytest.raises(ValueError, match="without one for"):
        select([tmp_path], metric="loss", best=2)


def test_a_number_alone_that_may_be_a_step_or_an_epoch_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "checkpoint-1.pt", "checkpoint-2.pt")
    table = tmp_path / "metrics.csv"
    table.write_text("epoch,step,loss\n" + "".join(f"{step // 10},{step},{step}\n" for step in range(30)))
    with pytest.raises(ValueError, match=r"'loss' with values for 'checkpoint-1.pt' both as a step and as an epoch"):
        select([tmp_path], metric="loss", best=2)
    table.write_text("epoch,step,loss\n1,1,5\n2,2,nan\n")  # the same row
    assert [each.metric for each in select([tmp_path], metric="loss", best=1)] == [5.0]


def test_a_step_that_starts_again_in_each_epoch_is_no_step(tmp_path: Path) -> None:
    put(tmp_path, "step_100.pt", "step_200.pt")
    rows = ["epoch,step,global_step,loss", "0,100,100,0.1", "0,200,200,0.5", "1,100,1100,0.9"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    assert [each.metric for each in select([tmp_path], metric="loss", best=2)] == [0.1, 0.5]
    (tmp_path / "metrics.csv").write_text("epoch,batch,loss\n0,100,0.1\n0,200,0.5\n1,100,0.9\n")
    with pytest.raises(ValueError, match="without one for"):
        select([tmp_path], metric="loss", best=2)


def test_epochs_of_ultralytics_are_not_those_of_the_names(tmp_path: Path) -> None:
    put(tmp_path, "epoch10.pt", "epoch20.pt")  # the rows 11 and 21
    rows = (f"{epoch},{epoch}" for epoch in range(1, 30))
    (tmp_path / "results.csv").write_text("\n".join(["epoch,train/box_loss", *rows]))
    with pytest.raises(ValueError, match="without one for"):
        select([tmp_path], metric="train/box_loss", best=2)


def test_a_folder_with_a_slash_at_its_end_has_its_name(tmp_path: Path) -> None:
    put(tmp_path, "step=1-loss=5/model.safetensors", "step=2-loss=6/model.safetensors")
    paths = [f"{tmp_path / name}/" for name in ("step=1-loss=5", "step=2-loss=6")]
    assert [each.metric for each in select(paths, metric="loss", best=2)] == [5.0, 6.0]


def test_yaml_is_read_by_the_lines_of_a_field(tmp_path: Path) -> None:
    put(tmp_path, "1.pt", "2.pt", "3.pt")
    texts = ["loss: .nan", "loss: 1.5  # of the validation", "loss: -.Inf"]
    for step, text in enumerate(texts, 1):
        (tmp_path / f"{step}.yaml").write_text(f"valid:\n  {text}\n  acc: 0.5\ntrain:\n  acc: 0.25\n")
    lines: list[str] = []
    assert select([tmp_path], metric="loss", best=1, say=lines.append)[0].metric == 1.5
    assert lines[-1] == "left out, since loss is not finite: '1.pt', '3.pt'"
    assert select([tmp_path], metric="train.acc", best=1)[0].metric == 0.25
    for field in ("acc", "test.acc", "train.loss"):  # two lines, or that of another
        with pytest.raises(ValueError, match=r"without one for .*1\.yaml has valid\.loss, valid\.acc, train\.acc"):
            select([tmp_path], metric=field, best=1, lower_is_better=True)


def test_an_error_lists_the_fields_of_few_files(tmp_path: Path) -> None:
    put(tmp_path, *(f"{step}.pt" for step in range(100)))
    for step in range(100):
        (tmp_path / f"{step}.json").write_text('{"acc": 1}')
    with pytest.raises(ValueError, match="without one for") as error:
        select([tmp_path], metric="loss", best=1)
    assert str(error.value).count("has acc") == 3


def test_a_table_with_a_mark_of_its_encoding_is_read(tmp_path: Path) -> None:
    put(tmp_path, "step_1.pt")
    (tmp_path / "metrics.csv").write_text("\ufeffstep,loss\n1,2\n")
    assert select([tmp_path], metric="loss", best=1)[0].metric == 2.0


def test_a_last_line_that_is_not_whole_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, "step_1.pt", "step_2.pt")
    table = tmp_path / "metrics.jsonl"
    table.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    assert [each.metric for each in select([tmp_path], metric="loss", best=2)] == [1.0, 2.0]
    table.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}')
    assert [each.metric for each in select([tmp_path], metric="loss", best=2)] == [1.0, 2.0]
    table.write_text('{"step": 1, "lo\n{"step": 2, "loss": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl must hold JSON"):
        select([tmp_path], metric="loss", best=2)


def test_a_csv_that_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    put(tmp_path, "step_1.pt", "step_2.pt")
    (tmp_path / "metrics.csv").write_text('step,loss\n1,"' + "2,3\n" * 60_000)
    arguments = ["average", str(tmp_path), "--metric", "loss", "--best", "1", "-o", str(tmp_path / "out.pt")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert "metrics.csv must hold CSV, but field larger than field limit" in " ".join(result.output.split())


def test_lines_of_json_are_read_and_mixed_counts_are_not(tmp_path: Path) -> None:
    put(tmp_path, "1.pt", "2.pt")
    table = tmp_path / "metrics.jsonl"
    table.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"epoch": 1, "loss": 9}\n')
    assert [each.metric for each in select([tmp_path], metric="loss", best=2)] == [1.0, 2.0]
    table.write_text('{"step": 1, "loss": 1}\n{"epoch": 2, "loss": 2}\n')
    with pytest.raises(ValueError, match="without one for"):
        select([tmp_path], metric="loss", best=2)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"loss": 1'])
def test_a_damaged_file_of_metrics_is_named(text: str, tmp_path: Path) -> None:
    put(tmp_path, "1.pt")
    (tmp_path / "1.json").write_text(text)
    with pytest.raises(ValueError, match=r"1\.json must hold JSON"):
        select([tmp_path], metric="loss", best=1)


def test_values_that_are_not_finite_are_never_the_best(tmp_path: Path) -> None:
    lines: list[str] = []
    trainer_folder(tmp_path, {1: float("nan"), 2: float("-inf"), 3: 5.0, 4: 4.0})
    assert [each.step for each in select([tmp_path], metric="eval_loss", best=1, say=lines.append)] == [4]
    assert lines == ["left out, since eval_loss is not finite: 'checkpoint-1', 'checkpoint-2'"]
    with pytest.raises(ValueError, match="best must be at most the 2"):
        select([tmp_path], metric="eval_loss", best=3)


def test_of_equal_values_the_newer_is_taken_and_said(tmp_path: Path) -> None:
    lines: list[str] = []
    trainer_folder(tmp_path, {1: 2.0, 2: 1.0, 3: 2.0, 4: 2.0})
    found = select([tmp_path], metric="eval_loss", best=3, say=lines.append)
    assert [each.step for each in found] == [2, 3, 4]
    assert lines == ["'checkpoint-1', 'checkpoint-3', 'checkpoint-4' have the same eval_loss: the newer are taken"]
    select([tmp_path], metric="eval_loss", best=4, say=lines.append)
    assert len(lines) == 1


def test_the_direction_follows_from_the_field_or_the_argument(tmp_path: Path) -> None:
    assert [is_lower_better(field) for field in ("eval_loss", "val/Perplexity", "wer")] == [True] * 3
    assert [is_lower_better(field) for field in ("eval_accuracy", "eval_top1", "BLEU")] == [False] * 3
    trainer_folder(tmp_path, {1: 1.0, 2: 2.0})
    assert select([tmp_path], metric="eval_loss", best=1, lower_is_better=False)[0].step == 2
    for field in ("quality", "accuracy_loss", "neg_mean_squared_error", "negative_loss", "loss_reduction"):
        with pytest.raises(ValueError, match="lower_is_better="):
            is_lower_better(field)


# The page and the command

PAGE = (Path(__file__).parents[1] / "docs" / "files.md").read_text()


def flags_of(page: str) -> set[str]:
    """The options of ours on a page: those of other programs are in the first columns of its last part."""
    own, _, others = page.partition("## From other scripts")
    cells = [row.split("|")[2] for row in others.splitlines() if row.startswith("|")]
    return {*re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join([own, *cells]))}


def test_every_option_on_the_page_is_one_of_the_command() -> None:
    command = typer.main.get_command(cli.app).commands["average"]  # type: ignore[attr-defined]
    options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    known = {option for option in options if option.startswith("--")}
    assert flags_of(PAGE) - known == {"--mergekit"}  # of the benchmark
    assert known - flags_of(PAGE) - {"--out"} == set()
    assert flags_of(PAGE.replace("`--to 50`", "`--until 50`")) - known == {"--mergekit", "--until"}


def commands_of(page: str) -> list[list[str]]:
    lines = "\n".join(re.findall(r"^```\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("swafast average")]


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {7500: 1.0, 8000: 2.0, 8500: 3.0, 9000: 5.0, 9500: 4.0, 10000: 7.0}
    trainer_folder(Path("run"), {step: 10.0 - value for step, value in values.items()})
    for step, value in values.items():
        save_file({"a": np.float32([value])}, f"run/checkpoint-{step}/model.safetensors")
    save_file({"a": np.float32([1.0])}, "a.safetensors")
    save_file({"a": np.float32([4.0])}, "b.safetensors")
    for arguments in commands_of(PAGE):
        result = CliRunner().invoke(cli.app, [*arguments, "--threads", "1"])
        assert result.exit_code == 0, result.output
    found = {path.name: float(load_file(path)["a"][0]) for path in tmp_path.glob("*.safetensors")}
    # The last five; two files; those with the lowest losses; and 8000, 9000, 10000 as a rate that decays as 1 - sqrt.
    assert found == {"a.safetensors": 1.0, "b.safetensors": 4.0, "averaged.safetensors": pytest.approx(4.2),
                     "soup.safetensors": 2.5, "best.safetensors": pytest.approx(16 / 3)}  # fmt: skip
    (merged,) = Path("merged").glob("*.safetensors")
    thirds = [1 - math.sqrt(index / 3) for index in range(4)]
    weights = [1 - thirds[1], thirds[1] - thirds[2], thirds[2]]
    assert load_file(merged)["a"][0] == pytest.approx(sum(w * v for w, v in zip(weights, (2, 5, 7), strict=True)))


# Form


def test_selecting_imports_no_torch() -> None:
    code = "import sys; import swafast.files.selection, swafast.files.progress; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Planted bugs


def test_a_reader_without_fairseqs_names_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_names, "_EPOCH_AND_UPDATE", "")
    with pytest.raises(ValueError, match="several numbers"):
        test_steps_are_read_from_names(["checkpoint_12_34000.pt", "checkpoint_13_35000.pt"], [34000, 35000])


def test_an_order_by_time_or_text_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_time(found: list[selection.Candidate]) -> list[selection.Candidate]:
        return sorted(found, key=lambda each: os.stat(each.path).st_mtime)

    for wrong in (by_time, lambda found: sorted(found, key=lambda each: each.name)):
        with monkeypatch.context() as patch:
            patch.setattr(selection, "_ordered", wrong)
            with pytest.raises(AssertionError):
                test_the_order_is_that_of_numbers_not_of_text_or_time(tmp_path / wrong.__name__)


@pytest.mark.parametrize(
    ("field", "name", "value"),
    [
        ("loss", "val_loss=0.5.ckpt", None),
        ("loss", "epoch=0-train-loss=0.1-val-loss=0.9.ckpt", None),
        ("loss", "train.loss=0.1.ckpt", None),
        ("val-loss", "epoch=0-train-loss=0.1-val-loss=0.9.ckpt", 0.9),
        ("loss", "m--loss=0.5-epoch=1.ckpt", 0.5),
        ("loss", "epoch_3_loss_0.5.ckpt", 0.5),
        ("loss", "epoch3-loss0.5.ckpt", 0.5),
        ("loss", "loss=-0.5.ckpt", -0.5),
        ("loss", "loss=-inf.ckpt", -math.inf),
        ("loss", "loss=0.5-v1.ckpt", 0.5),
        ("val/loss", "epoch=1-val_loss=1e-05.ckpt", 1e-5),
        ("acc", "acc1=0.1.ckpt", None),
        ("acc", "acc_1=0.1.ckpt", None),
        ("acc", "acc1_0.5.ckpt", None),
        ("acc", "acc_1_0.5.ckpt", None),
        ("acc", "acc1-5.ckpt", None),
        ("acc", "epoch_3_acc_91.ckpt", 91.0),
        ("acc", "acc=91-epoch=3.ckpt", 91.0),
        ("acc1", "acc1=0.1-acc5=0.9.ckpt", 0.1),
    ],
)
def test_a_field_that_is_a_part_of_another_is_told_apart(field: str, name: str, value: float | None) -> None:
    assert metrics.Metrics(field)._in_name(name) == value


def test_a_name_with_two_values_of_a_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'loss', which 'level1_loss=0\.1-loss=0\.5\.ckpt' has several of"):
        metrics.Metrics("loss")._in_name("level1_loss=0.1-loss=0.5.ckpt")
