"""Write golden files for tests/test_golden.py: states of averages, and the averages that each must load as.

    python -m tests.golden.record

It was run once, with the code of the commit before the modules of ``swafast`` were moved, and for the files of
`swafast.save` when that came. A file that is here is never written again, least of all to make a test pass: it stands
for the states that users have. A new format gets a new file.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import swafast
from swafast import Snapshots
from tests.golden import cases
from tests.golden.models import fill, named_tensors, values_of
from tests.ranks import run_ranks


def record_case(case: cases.Case) -> dict[str, Any]:
    """Record a state and its averages, and both after one more update."""
    model = case.model(0)
    source = (case.saved_by or case.make)(model)
    for step in range(cases.UPDATES):
        fill(model, values_of(model, step))
        source.update_parameters(model)
    state = source.state_dict()
    averaged = source if case.saved_by is None else case.make(model)
    golden = {"state": copy.deepcopy(state)}
    if case.saved_by is not None:
        averaged.load_state_dict(state)
        golden["again"] = copy.deepcopy(averaged.state_dict())
    golden["averages"] = cases.averages_of(averaged)
    following = values_of(model, cases.UPDATES)
    fill(model, following)
    averaged.update_parameters(model)
    golden |= {"next": following, "next_state": averaged.state_dict()}
    return {**golden, "next_averages": cases.averages_of(averaged)}


def record_file(name: str) -> None:
    """Record a file of the averages whose state is in ``<name>.pt.gz``."""
    averaged = cases.CASES[name].make(cases.CASES[name].model(0))
    averaged.load_state_dict(cases.read(name)["state"])
    with tempfile.TemporaryDirectory() as folder:
        swafast.save(averaged, Path(folder) / "file")
        cases.pack_file(name, Path(folder) / "file")


def record_optimizer() -> dict[str, Any]:
    model, optimizer, averages, attachments = cases.attach_two(0)
    cases.step_with(optimizer, model, range(7))
    golden = {
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "states": [copy.deepcopy(averaged.state_dict()) for averaged in averages],
        "steps": [each.step for each in attachments],
        "schedules": [(each.schedule.start, each.schedule.every, each.schedule.end) for each in attachments],
    }
    cases.step_with(optimizer, model, range(7, 13))
    return {**golden, "next_counts": [int(averaged.n_averaged) for averaged in averages]}


def record_torchcontrib() -> dict[str, Any]:
    model, swa, _ = cases.make_swa(0)
    cases.step_with(swa, model, range(7))
    golden = {"state": copy.deepcopy(swa.state_dict()), "averages": cases.copied(cases.swa_buffers(model, swa))}
    golden["params"] = cases.copied(named_tensors(model))
    swa.swap_swa_sgd()
    golden |= {"swapped_state": copy.deepcopy(swa.state_dict()), "swapped_params": cases.copied(named_tensors(model))}
    swa.swap_swa_sgd()
    following = values_of(model, cases.UPDATES)
    fill(model, following)
    swa.update_swa()
    return {**golden, "next": following, "next_averages": cases.swa_buffers(model, swa)}


def record_composer() -> dict[str, Any]:
    model, optimizer, averaged, swa = cases.make_composer(0)
    cases.step_with(optimizer, model, range(6))
    schedule = swa.attachment.schedule
    golden = {
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "state": copy.deepcopy(averaged.state_dict()),
        "step": swa.attachment.step,
        "schedule": (schedule.start, schedule.every, schedule.end),
        "is_completed": swa.is_completed,
        "next_lrs": [],
    }
    for step in range(6, 12):
        cases.step_with(optimizer, model, range(step, step + 1))
        golden["next_lrs"].append(optimizer.param_groups[0]["lr"])
    return {**golden, "next_count": int(averaged.n_averaged), "next_is_completed": swa.is_completed}


def record_snapshots() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        cases.save_snapshots(Path(name))
        power, rules = Snapshots(Path(name) / "power"), Snapshots(Path(name) / "rules")
        golden = {
            "power": cases.listed(power),
            "rules": cases.listed(rules),
            "last": power.synthesize(cases.SYNTHESIZED),
            "middle": power.synthesize(cases.SYNTHESIZED, cases.SNAPSHOTS_AT[1]),
        }
        leave_out_places(Path(name))
        cases.zip_folder("snapshots", Path(name))
    return golden


def record_sharded() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        golden = run_ranks(2, cases.save_on_ranks, Path(name))[0]
        leave_out_places(Path(name))
        cases.zip_folder("sharded", Path(name))
    return golden


def leave_out_places(folder: Path) -> None:
    """Remove the checkpoint's path from torch's metadata: nothing reads it."""
    for path in folder.rglob(".metadata"):
        metadata = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(dataclasses.replace(metadata, storage_meta=None)))


def main() -> None:
    records: dict[str, Callable[[], Any]] = {name: partial(record_case, case) for name, case in cases.CASES.items()}
    records |= {"optimizer": record_optimizer, "torchcontrib": record_torchcontrib, "composer": record_composer}
    records |= {"snapshots": record_snapshots, "sharded": record_sharded}
    for name, record in records.items():
        if not (cases.FOLDER / f"{name}.pt.gz").exists():
            cases.write(name, record())
            print(f"{name} is written")
    for name in cases.FILES:
        if not (cases.FOLDER / f"{name}.safetensors.gz").exists():
            record_file(name)
            print(f"the file of {name} is written")


if __name__ == "__main__":
    main()
