"""Write golden files for tests/test_golden.py: states of averages, and the averages that each must load as.

    python -m tests.golden.record

It was run once, with the code of the commit before the modules of ``swafast`` were moved, and for the files of
`swafast.save` when that came. A file that is here is never written again, least of all to make a test pass: it stands
for the states that users have. A new format gets a new file, by a case in ``cases.py``. What wrote the files of
optimizers, snapshots and ranks is in this module at commit b942c4d.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import swafast
from tests.golden import cases
from tests.golden.models import fill, values_of


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


def main() -> None:
    for name, case in cases.CASES.items():
        if not (cases.FOLDER / f"{name}.pt.gz").exists():
            cases.write(name, record_case(case))
            print(f"{name} is written")
    for name in cases.FILES:
        if not (cases.FOLDER / f"{name}.safetensors.gz").exists():
            record_file(name)
            print(f"the file of {name} is written")


if __name__ == "__main__":
    main()
