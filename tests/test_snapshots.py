"""Snapshots in one process: synthesized averages against averages that ran along, and all kinds of damage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from swafast import ExponentialAverage, FusedAveragedModel, PowerAverage, Rule
from swafast.posthoc import folder as folder_module
from swafast.posthoc import snapshots as snapshots_module
from swafast.posthoc import sums
from swafast.posthoc.folder import SIDECAR, snapshot_paths
from swafast.posthoc.snapshots import Snapshots
from tests.support import differing, drift, limited_files, same_bits

ROOT = Path(__file__).parents[1]
STORED = {"narrow": PowerAverage.from_sigma_rel(0.05), "wide": PowerAverage.from_sigma_rel(0.10)}

#: Widths that are put together of those two. Measured with 32 snapshots at the end, and with 16 half-way: the params
#: are off by 4e-3 and 9e-3 of their norm at 0.25, by 2e-4 and 1e-3 at 0.20 and below; and by 9e-3 and 3e-2, 8e-4 and
#: 4e-3 of the way from the model's last params to their average.
WIDTHS = (0.05, 0.07, 0.10, 0.15, 0.20, 0.25)
UPDATES, EVERY = 768, 24


def digits_mlp() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))


@dataclass
class Run:
    """A recorded training: its snapshots, and averages that ran along."""

    folder: Path
    last: dict[int, dict[str, Tensor]]  # the model's own params, by count
    truth: dict[tuple[int, float], dict[str, Tensor]]  # by count and sigma_rel


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Run:
    from swafast.demo.task import Settings, digits_split

    split = digits_split(0, Settings())
    model = digits_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    averages = {name: FusedAveragedModel(model, rule=rule) for name, rule in STORED.items()}
    direct = {width: FusedAveragedModel(model, rule=PowerAverage.from_sigma_rel(width)) for width in WIDTHS}
    found = Run(tmp_path_factory.mktemp("run"), {}, {})
    snapshots = Snapshots(found.folder)
    order = torch.Generator().manual_seed(0)
    for count in range(1, UPDATES + 1):
        batch = torch.randint(len(split.train_images), (32,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(split.train_images[batch]), split.train_labels[batch]).backward()
        optimizer.step()
        for average in (*averages.values(), *direct.values()):
            average.update_parameters(model)
        if count % EVERY == 0:
            snapshots.save(averages)
        if count in (UPDATES // 2, UPDATES):
            found.last[count] = {name: value.clone() for name, value in model.state_dict().items()}
            found.truth |= {(count, width): each.averaged_state_dict() for width, each in direct.items()}
    return found


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the L2 distance of the params."""
    names = [name for name, _ in digits_mlp().named_parameters()]
    return float(torch.cat([(a[name] - b[name]).double().flatten() for name in names]).norm())


@pytest.mark.parametrize("count", [UPDATES // 2, UPDATES])
@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_synthesized_is_what_had_run_along(run: Run, width: float, count: int) -> None:
    truth, last = run.truth[count, width], run.last[count]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        given = Snapshots(run.folder).synthesize(PowerAverage.from_sigma_rel(width), count)
    zero = dict.fromkeys(truth, torch.tensor(0.0))
    off, moved = distance(given, truth), distance(last, truth)
    assert off < 0.01 * distance(truth, zero)
    assert off < 0.05 * moved
    assert given.keys() == last.keys()
    digits_mlp().load_state_dict(given)
    assert all(torch.equal(given[name], last[name]) for name in given if "running" in name or "num_batches" in name)


def test_a_stored_average_comes_back_to_the_last_bit_or_so(run: Run) -> None:
    given = Snapshots(run.folder).synthesize(STORED["wide"])
    for name, value in run.truth[UPDATES, 0.10].items():
        torch.testing.assert_close(given[name], value, rtol=2e-7, atol=1e-8)


def test_a_profile_that_is_missed_warns_once_with_the_number(run: Run) -> None:
    snapshots = Snapshots(run.folder)
    rule = PowerAverage.from_sigma_rel(0.25)
    residual = snapshots.fit(rule).residual
    assert residual > 0.01
    with pytest.warns(
        RuntimeWarning, match=f"misses the profile of .* after {UPDATES} updates by {residual:.1%}"
    ) as told:
        snapshots.synthesize(rule)
    assert len(told) == 1
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snapshots.synthesize(PowerAverage.from_sigma_rel(0.12))


def test_the_sum_does_not_depend_on_how_many_tensors_go_at_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = PowerAverage.from_sigma_rel(0.12)
    expected = Snapshots(run.folder).synthesize(rule, 25 * EVERY)
    monkeypatch.setattr(sums, "_WINDOW_NUMEL", 100)
    given = Snapshots(run.folder).synthesize(rule, 25 * EVERY)
    assert differing(given, expected) == []


# Small folders


class Tiny(nn.Module):
    """Tied and frozen params, buffers that are saved and one that is not."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, dtype=dtype)
        self.second = nn.Linear(3, 3, bias=False, dtype=dtype)
        self.second.weight = self.first.weight
        self.point = nn.Parameter(torch.tensor(0.5, dtype=dtype), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 2, dtype=dtype))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def updated(
    count: int, rule: Rule | None = None, dtype: torch.dtype = torch.float32, **options: object
) -> FusedAveragedModel:
    torch.manual_seed(7)
    model = Tiny(dtype)
    averaged = FusedAveragedModel(model, rule=rule or STORED["wide"], **options)
    for _ in range(count):
        drift(model)
        averaged.update_parameters(model)
    return averaged


def small(folder: Path, *counts: int, rule: Rule | None = None) -> Snapshots:
    snapshots = Snapshots(folder)
    for count in counts or (2, 4):
        snapshots.save(updated(count, rule))
    return snapshots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_stored_average_has_full_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    averaged = updated(5, dtype=dtype)
    snapshots = Snapshots(tmp_path)
    snapshots.save(averaged)
    given = snapshots.synthesize(STORED["wide"])
    assert differing(given, averaged.averaged_state_dict()) == []
    assert given.keys() == Tiny().state_dict().keys()
    assert given["first.weight"] is given["second.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_bytes_may_be_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    averaged = updated(5)
    snapshots = Snapshots(tmp_path)
    snapshots.save(averaged, dtype=dtype)
    expected = {
        name: value.to(dtype).float() if value.is_floating_point() else value
        for name, value in averaged.averaged_state_dict().items()
    }
    assert differing(snapshots.synthesize(STORED["wide"]), expected) == []


def test_only_what_is_asked_for_is_given_and_on_its_device_and_in_its_strides(tmp_path: Path) -> None:
    snapshots = small(tmp_path)
    like = {"second.weight": torch.empty(3, 3).t(), "mask": torch.empty(2)}
    given, expected = snapshots.synthesize(STORED["wide"], like=like), snapshots.synthesize(STORED["wide"])
    assert list(given) == list(like)
    assert all(torch.equal(given[name], expected[name]) for name in like)
    assert given["second.weight"].stride() == (1, 3)


class Own(PowerAverage):
    """A rule that looks like one of this package."""

    def weight(self, num_averaged: int) -> float:
        return 0.5

    def kernel_terms(self) -> None:
        return None


@pytest.mark.parametrize(
    "rule",
    [
        ExponentialAverage(0.9, schedule="cosine", updates=np.int64(30)),
        ExponentialAverage(np.float32(0.9), schedule="linear", updates=30),
        ExponentialAverage(0.9, warmup="ramp", tau=7),
    ],
    ids=repr,
)
def test_rules_of_every_kind_are_read_again(tmp_path: Path, rule: Rule) -> None:
    averaged = FusedAveragedModel(model := Tiny(), rule=rule)
    averaged.update_parameters(model)
    Snapshots(tmp_path).save(averaged)
    (stored,) = Snapshots(tmp_path)
    assert stored.rule == rule


def test_a_rule_of_the_users_own_is_to_be_given_again(tmp_path: Path) -> None:
    snapshots = small(tmp_path, 2, 4, rule=Own())
    assert [stored.rule for stored in snapshots] == [repr(Own())] * 2
    with pytest.raises(
        ValueError, match=r"rules must have the rule of the average 'average', stored as Own\(gamma=6.94\)"
    ):
        snapshots.synthesize(Own())
    again = Snapshots(tmp_path, rules={"average": Own()})
    assert torch.equal(again.synthesize(Own())["first.bias"], updated(4, Own()).averaged_state_dict()["first.bias"])
    with pytest.raises(TypeError, match=r"rules\['average'\] must be a swafast\.Rule, got float"):
        Snapshots(tmp_path, rules={"average": 0.5})  # type: ignore[dict-item]


@pytest.mark.parametrize("is_killed", [False, True], ids=["saved", "killed before it takes the first one away"])
def test_a_count_saved_again_takes_the_place_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    snapshots = small(tmp_path, 2, 3)
    if is_killed:
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    other = updated(3)
    with torch.no_grad():
        other.module.first.bias += 1
    snapshots.save(other)
    assert (len(snapshots), len(list(tmp_path.iterdir()))) == (2, 2 + is_killed)
    assert same_bits(snapshots.synthesize(STORED["wide"])["first.bias"], other.averaged_state_dict()["first.bias"])


def test_a_disk_that_is_full_once_a_file_has_begun_is_named(tmp_path: Path) -> None:
    snapshots, more = small(tmp_path, 2), updated(3)
    with limited_files(600), pytest.raises(RuntimeError, match="could not be written: File too large;") as raised:
        snapshots.save(more)
    assert "CheckpointException" not in str(raised.value)
    assert len(snapshots) == 1


@pytest.mark.parametrize(
    ("owner", "name", "error", "seen"),
    [
        (snapshots_module, "write", OSError, OSError),
        (snapshots_module, "write_sidecar", OSError, RuntimeError),
        (torch, "save", KeyboardInterrupt, KeyboardInterrupt),  # by which each tensor is written
    ],
)
def test_a_save_that_fails_leaves_the_earlier_ones(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    error: type[BaseException],
    seen: type[BaseException],
) -> None:
    snapshots = small(tmp_path, 2, 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*_: object, **__: object) -> None:
        raise error("no space left")

    monkeypatch.setattr(owner, name, fail)
    for count in (3, 4):
        with pytest.raises(seen, match="no space left" if error is OSError else None):
            snapshots.save(updated(count))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_another_run_has_left_is_warned_of_once(tmp_path: Path) -> None:
    small(tmp_path, 2, 6)
    snapshots = Snapshots(tmp_path)
    with pytest.warns(RuntimeWarning, match="holds snapshots up to 6 updates, more than the 3 of this one") as told:
        snapshots.save(updated(3))
    assert told[0].filename == __file__
    for count in (4, 5, 6):
        snapshots.save(updated(count))  # a warning would be an error here


def test_a_relative_folder_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snapshots = small(Path("run"), 2, 3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    snapshots.save(updated(4))
    assert [stored.num_averaged for stored in snapshots] == [2, 3, 4]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_damaged_snapshot_does_not_end_a_training(tmp_path: Path) -> None:
    snapshots = small(tmp_path, 2, 3)
    (snapshot_paths(tmp_path)[-1] / SIDECAR).write_text("{")
    snapshots.save(updated(4))
    snapshots.save(updated(3))  # takes the place of the damaged one
    assert [stored.num_averaged for stored in snapshots] == [2, 3, 4]


_KILLED = """
import os, sys, torch
from pathlib import Path
from tests.test_snapshots import updated
from swafast.posthoc import snapshots as module
module.write_sidecar = lambda snapshot: os._exit(9)
module.Snapshots(Path(sys.argv[1])).save(updated(int(sys.argv[2])))
"""


def test_a_process_killed_in_a_save_leaves_what_is_ignored(tmp_path: Path) -> None:
    snapshots = small(tmp_path, 2, 3)
    expected = snapshots.synthesize(STORED["wide"])
    ended = subprocess.run([sys.executable, "-c", _KILLED, tmp_path, "3"], cwd=ROOT, timeout=120)
    assert ended.returncode == 9
    shutil.copytree(tmp_path / "000000000003.1", tmp_path / "000000000005.0")
    assert len(list(tmp_path.iterdir())) == 4  # two of them are halves
    assert [stored.num_averaged for stored in snapshots] == [2, 3]
    assert differing(snapshots.synthesize(STORED["wide"]), expected) == []
    snapshots.save(updated(5))
    snapshots.save(updated(3))
    assert len(list(tmp_path.iterdir())) == 3  # the halves are gone


# What may be amiss


def test_without_snapshots_there_is_nothing_to_give(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert list(Snapshots(folder)) == []
        with pytest.raises(ValueError, match=f"folder must hold snapshots, got none in {folder}"):
            Snapshots(folder).synthesize(STORED["wide"])


@pytest.mark.parametrize("count", [1, 5])
def test_what_is_outside_of_the_snapshots_is_refused(tmp_path: Path, count: int) -> None:
    snapshots = small(tmp_path)
    for call in (snapshots.fit, snapshots.synthesize):
        with pytest.raises(ValueError, match=f"num_averaged must be from 2 to 4, as in the snapshots, got {count}"):
            call(STORED["wide"], count)
    with pytest.raises(ValueError, match="num_averaged must be an int >= 1, got 0"):
        snapshots.fit(STORED["wide"], 0)
    with pytest.raises(TypeError, match=r"rule must be a swafast\.Rule, got float"):
        snapshots.fit(0.1)  # type: ignore[arg-type]


def data_file(snapshot: Path) -> Path:
    return next(snapshot.glob("*.distcp"))


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_weight(snapshot: Path) -> None:
    """Flip a bit of the average's own numbers."""
    path = data_file(snapshot)
    at = path.read_bytes().index(updated(4).averaged_state_dict()["first.bias"].numpy().tobytes())
    flip(path, at + 1)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit_count(snapshot: Path) -> None:
    path = snapshot / SIDECAR
    told = json.loads(path.read_text())
    told["snapshot"]["averages"]["average"]["gamma"] = 3.0
    path.write_text(json.dumps(told))


def rename_a_dtype(snapshot: Path, dtype: object = "float9") -> None:
    """Have the sidecar name a dtype of another torch, with the digest of what it says."""
    path = snapshot / SIDECAR
    body = json.loads(path.read_text())["snapshot"]
    body["copies"][0]["dtype"] = dtype
    path.write_text(json.dumps({"sha256": folder_module._digest(body), "snapshot": body}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no data": (lambda path: data_file(path).unlink(), "must be whole and readable, got FileNotFoundError"),
    "no metadata": (lambda path: (path / ".metadata").unlink(), "must be whole and readable, got"),
    "half the data": (lambda path: cut_in_half(data_file(path)), "must be whole and readable, got"),
    "half the metadata": (lambda path: cut_in_half(path / ".metadata"), "must be whole and readable, got"),
    "half the sidecar": (lambda path: cut_in_half(path / SIDECAR), "must be whole, got JSONDecodeError"),
    "an edited sidecar": (edit_count, "must be what was saved, got other bytes"),
    "an empty sidecar": (lambda path: (path / SIDECAR).write_text("[]"), "must be whole, got TypeError"),
    "an unknown dtype": (
        rename_a_dtype,
        "must be readable here: dtype must be one of .*, got 'float9'",
    ),
    "a dtype that is no name": (lambda path: rename_a_dtype(path, ["float32"]), "must be readable here: .*list"),
    "data of another snapshot": (
        lambda path: shutil.copy(data_file(snapshot_paths(path.parent)[0]), data_file(path)),
        "must hold what was saved, got another checksum",
    ),
    "a flipped bit": (flip_a_weight, "must hold what was saved, got another checksum of 'average/first.bias'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_snapshot_is_named(tmp_path: Path, damage: str) -> None:
    snapshots = small(tmp_path)
    path = snapshot_paths(tmp_path)[-1]
    spoil, message = DAMAGES[damage]
    spoil(path)
    with pytest.raises(ValueError, match=f"{path}.* {message}"):
        snapshots.synthesize(STORED["wide"], 4)


def test_a_snapshot_under_another_count_is_named(tmp_path: Path) -> None:
    snapshots = small(tmp_path)
    path = snapshot_paths(tmp_path)[0]
    later = path.rename(path.with_name("000000000099.0"))
    with pytest.raises(ValueError, match=f"{later} must be named after its count, 2: rename it back"):
        snapshots.synthesize(STORED["wide"])


def test_another_model_is_refused(tmp_path: Path) -> None:
    snapshots = small(tmp_path / "a")
    model = digits_mlp()
    other = FusedAveragedModel(model, rule=STORED["wide"])
    for _ in range(3):
        other.update_parameters(model)
    with pytest.raises(
        ValueError, match=r"averages must be of the model in .*a/0+4\.0, got for 'point' nothing instead"
    ):
        snapshots.save(other)
    assert len(snapshots) == 2
    Snapshots(tmp_path / "b").save(other)
    os.rename(snapshot_paths(tmp_path / "b")[0], tmp_path / "a" / "000000000003.0")
    with pytest.raises(ValueError, match=r"0+3\.0 must be of the model in .*0+4\.0, got for 'point' nothing"):
        snapshots.synthesize(STORED["wide"])


def test_a_like_of_another_model_is_refused(tmp_path: Path) -> None:
    snapshots = small(tmp_path)
    for like, kind, message in (
        ({"third.weight": torch.empty(3)}, ValueError, "like must have names of the model in .*, got 'third.weight'"),
        ({"first.bias": torch.empty(4)}, ValueError, r"like\['first.bias'\] must have shape \(3,\), .*, got \(4,\)"),
        ({"first.bias": torch.empty(3, device="meta")}, ValueError, r"like\['first.bias'\] must be on a device that"),
        ({"first.bias": None}, TypeError, r"like\['first.bias'\] must be a tensor, got NoneType"),
        ([], TypeError, "like must be a mapping, got list"),
    ):
        with pytest.raises(kind, match=message):
            snapshots.synthesize(STORED["wide"], like=like)  # type: ignore[arg-type]


def test_what_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "new")
    by_function = FusedAveragedModel(model := Tiny(), avg_fn=lambda average, param, n: average)
    by_function.update_parameters(model)
    for averages, kind, message in (
        (Tiny(), TypeError, "averages must be an averaged model, or several by name, got Tiny"),
        ({}, ValueError, "averages must be at least one averaged model, got none"),
        ({"a/b": updated(1)}, ValueError, "averages must have .* strings without '/' for names, got 'a/b'"),
        ({"": updated(1)}, ValueError, "averages must have non-empty strings .* for names, got ''"),
        ({"a": AveragedModel(Tiny())}, TypeError, r"averages\['a'\] must be a Fused.*, got AveragedModel"),
        ({"a": updated(0)}, ValueError, r"averages\['a'\] must have been updated, got n_averaged = 0"),
        ({"a": updated(1), "b": updated(2)}, ValueError, "must have the same n_averaged, got {'a': 1, 'b': 2}"),
        ({"a": by_function}, ValueError, r"averages\['a'\] must be averaged by a Rule, got a function"),
        (
            {"a": updated(1), "b": updated(1, include=lambda name, _: "bias" in name)},
            ValueError,
            r"averages\['b'\] must have the params of 'a', .*, got others: \['empty', 'first.weight', 'point'\]",
        ),
    ):
        with pytest.raises(kind, match=message):
            snapshots.save(averages)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float32, .* or None, got torch.int8"):
        snapshots.save(updated(1), dtype=torch.int8)
    averaged = updated(1)
    with (
        averaged.swapped_into(Tiny()),
        pytest.raises(RuntimeError, match="save must wait until the averages are swapped back out of the model"),
    ):
        snapshots.save(averaged)
    assert not (tmp_path / "new").exists()
