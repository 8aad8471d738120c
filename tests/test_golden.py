"""Golden files: states that were saved before the modules of ``swafast`` were moved load bit for bit.

`tests/golden/record.py` wrote the files, once. No change of the code is a reason to write one again.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swafast
from swafast import FusedAveragedModel, PowerAverage, Snapshots
from swafast.loop.schedule import Schedule
from swafast.posthoc.profiles import Profile
from tests.golden import cases
from tests.golden.models import fill, named_tensors
from tests.ranks import run_ranks
from tests.support import bits
from tests.support import differing as differing_tensors

State = Mapping[str, Tensor]

golden = cache(cases.read)

pytestmark = pytest.mark.filterwarnings("ignore:format='half':UserWarning")


# To compare


def differing(got: State, expected: State) -> list[str]:
    """Return the keys of tensors that differ in any bit; or all of them where keys or their order do."""
    return differing_tensors(got, expected) if list(got) == list(expected) else sorted({*got, *expected})


def with_a_bit_flipped(state: State, key: str) -> dict[str, Tensor]:
    """Copy a state and flip the lowest bit of the last element under ``key``."""
    flipped = {name: tensor.detach().clone() for name, tensor in state.items()}
    run = bits(flipped[key]).clone()
    run[-flipped[key].element_size()] ^= 1
    flipped[key] = run.view(flipped[key].dtype).view(flipped[key].shape)
    return flipped


def test_golden_files_are_small_and_none_is_missing() -> None:
    sizes = {path.name: path.stat().st_size for path in cases.FOLDER.iterdir() if path.suffix in (".gz", ".zip")}
    compressed = [
        f"{name}.pt.gz" for name in (*cases.CASES, "optimizer", "torchcontrib", "composer", "snapshots", "sharded")
    ]
    compressed += [f"{name}.safetensors.gz" for name in cases.FILES]
    assert sizes.keys() == {*compressed, "snapshots.zip", "sharded.zip"}
    assert {name: size for name, size in sizes.items() if size >= 50_000} == {}


# States of averages in one process


def elsewhere(case: cases.Case, **options: Any) -> Any:
    """Make an average in which every tensor has other values than the golden state."""
    model = case.model(cases.ELSEWHERE[0])
    averaged = case.make(model, **options)
    for step in cases.ELSEWHERE:
        averaged.update_parameters(case.model(step))
    return averaged


def loaded(name: str, state: State | None = None, **options: Any) -> Any:
    averaged = elsewhere(cases.CASES[name], **options)
    averaged.load_state_dict(copy.deepcopy(golden(name)["state"]) if state is None else state)
    return averaged


@pytest.mark.parametrize("name", cases.CASES)
def test_a_state_gives_the_averages_that_were_saved(name: str) -> None:
    before = cases.averages_of(elsewhere(cases.CASES[name]))
    averaged = loaded(name)
    assert differing(cases.averages_of(averaged), golden(name)["averages"]) == []
    assert differing(before, golden(name)["averages"]), "there was nothing to load"
    assert all(int(single.n_averaged) == cases.UPDATES for single in cases.singles_of(averaged).values())


@pytest.mark.parametrize("name", cases.FILES)
def test_a_file_gives_the_averages_that_were_saved(name: str, tmp_path: Path) -> None:
    averaged = elsewhere(cases.CASES[name])
    swafast.load(averaged, cases.unpack_file(name, tmp_path))
    assert differing(averaged.state_dict(), golden(name)["state"]) == []
    assert differing(cases.averages_of(averaged), golden(name)["averages"]) == []


@pytest.mark.parametrize("name", cases.CASES)
def test_a_state_is_saved_again_as_it_was(name: str) -> None:
    again = golden(name).get("again", golden(name)["state"])
    assert differing(loaded(name).state_dict(), again) == []
    assert differing(loaded(name, again).state_dict(), again) == []


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", cases.CASES)
def test_a_state_goes_on_as_it_did(name: str, backend: str | None) -> None:
    averaged = loaded(name, backend=backend)
    model = cases.CASES[name].model(cases.ELSEWHERE[0])
    fill(model, golden(name)["next"])
    averaged.update_parameters(model)
    assert differing(averaged.state_dict(), golden(name)["next_state"]) == []
    assert differing(cases.averages_of(averaged), golden(name)["next_averages"]) == []


@pytest.mark.parametrize("name", cases.CASES)
def test_a_bit_flipped_in_each_tensor_of_a_state_is_seen(name: str) -> None:
    state = golden(name)["state"]
    filled = [key for key, tensor in state.items() if tensor.numel()]
    flipped = {key: with_a_bit_flipped(state, key)[key] if key in filled else state[key] for key in state}
    averaged = loaded(name, flipped)
    seen = differing(averaged.state_dict(), golden(name).get("again", state))
    assert [key for key in filled if key not in seen] == []
    assert differing(cases.averages_of(averaged), golden(name)["averages"])


#: What is read by another format as well, without a loss.
READ_AS = [
    *(("exact", "float32"), ("exact", "compensated"), ("mirrored", "float32"), ("mirrored", "compensated")),
    *(("compact", "exact"), ("compact", "float32"), ("half", "exact"), ("half", "float32"), ("half", "compact")),
    ("float32", "compensated"),
]


@pytest.mark.parametrize(("name", "fmt"), READ_AS)
def test_a_state_is_read_by_a_wider_format(name: str, fmt: str) -> None:
    model = cases.CASES[name].model(cases.ELSEWHERE[0])
    averaged = FusedAveragedModel(model, format=fmt)
    averaged.load_state_dict(copy.deepcopy(golden(name)["state"]))
    expected = golden(name)["averages"]
    got = averaged.averaged_state_dict()
    assert differing({key: value.to(expected[key].dtype) for key, value in got.items()}, expected) == []


# Optimizers


def test_an_optimizer_takes_up_what_is_attached_to_it() -> None:
    saved = golden("optimizer")
    model, optimizer, averages, attachments = cases.attach_two(cases.ELSEWHERE[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no schedule is another one
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    for attachment in attachments:
        attachment.schedule = Schedule(0, 1)
    with pytest.warns(UserWarning, match="takes the place of"):
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    for averaged, state in zip(averages, saved["states"], strict=True):
        averaged.load_state_dict(state)
    again = json.loads(optimizer.state_dict()["param_groups"][0]["swafast"])
    assert list(again.values()) == saved["optimizer"]["swafast"]
    assert [each.step for each in attachments] == saved["steps"] == [7, 7]
    schedules = [(each.schedule.start, each.schedule.every, each.schedule.end) for each in attachments]
    assert schedules == saved["schedules"] == [(3, 2, None), (4, 4, 11)]
    cases.step_with(optimizer, model, range(7, 13))
    assert [int(averaged.n_averaged) for averaged in averages] == saved["next_counts"]


def test_torchcontribs_swa_goes_on() -> None:
    saved = golden("torchcontrib")
    model, swa, attachment = cases.make_swa(cases.ELSEWHERE[0])
    swa.load_state_dict(copy.deepcopy(saved["state"]))
    assert differing(cases.swa_buffers(model, swa), saved["averages"]) == []
    assert attachment.step == 7
    again = swa.state_dict()
    assert [*again, "opt_added"] == list(saved["state"])
    entry = json.loads(again["param_groups"][0]["swafast"])
    assert list(entry.values()) == saved["state"]["opt_added"]["swafast"]
    assert list(again["swa_state"]) == list(saved["state"]["swa_state"])
    for name in ("swa_state", "opt_state"):
        for key, state in saved["state"][name].items():
            assert differing(again[name][key], state) == []
    groups = saved["state"]["param_groups"]
    assert [(group["n_avg"], group["step_counter"]) for group in groups] == [(2, 7)]
    for got, group in zip(again["param_groups"], groups, strict=True):
        assert {key: got[key] for key in group} == group
    fill(model, saved["next"])
    swa.update_swa()
    assert differing(cases.swa_buffers(model, swa), saved["next_averages"]) == []


def test_torchcontribs_swa_is_exchanged_back_after_a_load() -> None:
    saved = golden("torchcontrib")
    model, swa, _ = cases.make_swa(cases.ELSEWHERE[0])
    fill(model, saved["swapped_params"])
    swa.load_state_dict(copy.deepcopy(saved["swapped_state"]))
    assert any("swa_kept" in state for state in swa.state_dict()["swa_state"].values())
    swa.swap_swa_sgd()
    assert differing(named_tensors(model), saved["params"]) == []
    assert differing(cases.swa_buffers(model, swa), saved["averages"]) == []


def test_composers_swa_goes_on_to_its_end() -> None:
    saved = golden("composer")
    model, optimizer, averaged, swa = cases.make_composer(cases.ELSEWHERE[0])
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    averaged.load_state_dict(saved["state"])
    again = json.loads(optimizer.state_dict()["param_groups"][0]["swafast"])
    assert list(again.values()) == saved["optimizer"]["swafast"]
    schedule = swa.attachment.schedule
    assert (schedule.start, schedule.every, schedule.end) == saved["schedule"]
    assert (swa.attachment.step, swa.is_completed) == (saved["step"], saved["is_completed"]) == (6, False)
    assert differing(averaged.state_dict(), saved["state"]) == []
    lrs = []
    for step in range(6, 12):
        cases.step_with(optimizer, model, range(step, step + 1))
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs == pytest.approx(saved["next_lrs"], rel=1e-12)
    assert (int(averaged.n_averaged), swa.is_completed) == (saved["next_count"], saved["next_is_completed"])


# Snapshots


def test_snapshots_are_listed_with_their_rules(tmp_path: Path) -> None:
    folder, saved = cases.unzip("snapshots", tmp_path), golden("snapshots")
    for name, rules, counts in (("power", cases.STORED, cases.SNAPSHOTS_AT), ("rules", cases.OTHER_STORED, (4,))):
        snapshots = Snapshots(folder / name)
        assert cases.listed(snapshots) == saved[name]
        assert len(snapshots) == len(saved[name]) == len(rules) * len(counts)
        snapshots = Snapshots(folder / name, rules=rules)
        given = [(each.name, each.num_averaged, each.rule) for each in snapshots]
        assert given == [(key, count, rule) for count in counts for key, rule in rules.items()]
        assert snapshots.profiles == [Profile(rule, count) for _, count, rule in given]


def test_snapshots_give_what_is_synthesized_from_them(tmp_path: Path) -> None:
    snapshots, saved = Snapshots(cases.unzip("snapshots", tmp_path) / "power"), golden("snapshots")
    for name, count in (("last", None), ("middle", cases.SNAPSHOTS_AT[1])):
        got, expected = snapshots.synthesize(cases.SYNTHESIZED, count), saved[name]
        # The coefficients' last bits are the processor's; float32 is rounded to far fewer.
        wide = [key for key, tensor in expected.items() if tensor.dtype == torch.float64]
        assert wide == ["wide"]
        torch.testing.assert_close(got["wide"], expected["wide"], rtol=1e-12, atol=1e-12)
        assert differing({**got, "wide": expected["wide"]}, expected) == []
    assert PowerAverage.from_sigma_rel(0.07) == cases.SYNTHESIZED


def test_snapshots_are_saved_again_as_they_were(tmp_path: Path) -> None:
    folder = cases.unzip("snapshots", tmp_path / "golden")
    cases.save_snapshots(tmp_path / "again")
    paths, again = (
        sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
        for root in (folder, tmp_path / "again")
    )
    assert again == paths
    sidecars = [path for path in paths if path.suffix == ".json"]
    assert len(sidecars) == len(cases.SNAPSHOTS_AT) + 1
    for path in sidecars:  # with the checksums of all tensors
        assert json.loads((folder / path).read_text()) == json.loads((tmp_path / "again" / path).read_text())


def test_a_run_goes_on_in_its_folder_of_snapshots(tmp_path: Path) -> None:
    folder = cases.unzip("snapshots", tmp_path) / "power"
    model = cases.whole_model("plain", 0)
    averages = {name: FusedAveragedModel(model, rule=rule) for name, rule in cases.STORED.items()}
    for _ in range(cases.SNAPSHOTS_AT[-1] + 1):
        for averaged in averages.values():
            averaged.update_parameters(model)
    Snapshots(folder).save(averages)
    rules = [(name, cases.SNAPSHOTS_AT[-1] + 1, rule) for name, rule in cases.STORED.items()]
    assert cases.listed(Snapshots(folder))[: -len(cases.STORED)] == golden("snapshots")["power"]
    assert list(Snapshots(folder))[-len(cases.STORED) :] == rules


# Ranks


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_any_number_of_ranks_loads_a_sharded_checkpoint(tmp_path: Path, world: int) -> None:
    folder, saved = cases.unzip("sharded", tmp_path), golden("sharded")
    everyone = run_ranks(world, cases.load_on_ranks, folder, {kind: saved[kind]["next"] for kind in cases.SHARDED})
    for rank, given in enumerate(everyone):
        for kind in cases.SHARDED:
            where = f"{kind} on rank {rank}"
            got, expected = given[kind], saved[kind]
            assert differing(got["full"], expected["full"]) == [], where
            assert got["keys"] == expected["keys"], where
            assert differing(got["seals"], expected["seals"]) == [], where
            assert differing(got["again"], got["loaded"]) == [], where
            assert differing(got["next_full"], expected["next_full"]) == [], where


@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_one_process_loads_the_whole_state_of_ranks(kind: str) -> None:
    saved = golden("sharded")[kind]
    averaged = FusedAveragedModel(cases.whole_model(kind, cases.ELSEWHERE[0]), rule=cases.STORED["wide"])
    averaged.load_state_dict(saved["full"])
    assert int(averaged.n_averaged) == cases.UPDATES
    again = averaged.state_dict()
    assert again.keys() == saved["full"].keys()
    assert differing({key: again[key] for key in saved["full"]}, saved["full"]) == []
