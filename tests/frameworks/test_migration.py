"""docs/frameworks/migration.md: its code runs, and its table agrees with the converters. Needs no framework."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import swafast
from swafast import FusedAveragedModel
from swafast.convert import kinds
from tests.convert_cases import CASES, Loading, state_of
from tests.frameworks.record_states import Net, put

PAGE = (Path(__file__).parents[2] / "docs/frameworks/migration.md").read_text()
TOOLS = "torch Lightning timm diffusers ema-pytorch torch_ema Composer mmengine ignite NeMo ultralytics".split()


def rows(columns: int) -> list[list[str]]:
    cells = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in cells if len(row) == columns]


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    torch.save(state_of("diffusers_ratio"), "ema.pt")
    model = Net()
    put(model, 0)
    space = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    with pytest.warns(UserWarning, match="replaces the average's"):
        exec(block, space)
    assert space["averaged"].attachment.step == 7  # type: ignore[attr-defined]


def test_each_tool_has_its_lines_and_kinds() -> None:
    table = rows(5)[1:]
    assert {row[0] for row in table} == {*TOOLS}
    assert {row[3].strip("`") for row in table} == kinds.KINDS.keys()
    for _, _, after, kind, count in table:
        line = re.findall("`(.*?)`", after)[0]
        averaged = eval(line, {**vars(swafast), "FusedAveragedModel": FusedAveragedModel, "model": Net()} | public())
        assert isinstance(averaged, FusedAveragedModel)
        cases = [case for case in CASES.values() if case.kind == kind.strip("`")]
        assert any(type(case.rule) is type(averaged.rule) for case in cases)
        assert all(case.use_buffers == averaged.use_buffers for case in cases if case.rule == averaged.rule)
        assert ("num_averaged=" in count) == (kind.strip("`") in ("timm", "ema_pytorch", "composer", "ignite")) or (
            "SWA" in line or "FusedAveragedModel(model)" in line
        )


def public() -> dict[str, object]:
    return {name: getattr(swafast, name) for name in swafast.__all__}


def test_the_lines_have_the_buffers_and_warm_ups_of_the_recorded_tools() -> None:
    for _, _, after, kind, _ in rows(5)[1:]:
        warm_up = re.findall('warmup="(.*?)"', after)
        cases = [case for case in CASES.values() if case.kind == kind.strip("`")]
        warm_ups = {getattr(case.rule, "warmup", None) for case in cases}
        assert (warm_up[0] if warm_up else None) in warm_ups, after
        assert ("use_buffers=True" in after) in {case.use_buffers for case in cases}, after


def test_same_bits_are_those_of_the_page() -> None:
    exact = {case.kind for case in CASES.values() if case.difference == 0.0}
    (row,) = [row for row in rows(2) if row[1] == "all others"]
    for kind, name in {
        "torch": "torch's SWA",
        "timm": "timm V3",
        "mmengine": "mmengine",
        "ultralytics": "ultra",
    }.items():
        assert name in row[0]
        exact.remove(kind)
    assert not exact


def test_a_whole_checkpoint_of_nemo_names_its_entry() -> None:
    loading = Loading("nemo")
    with pytest.raises(ValueError, match=re.escape("source['optimizer_states'][0] is of the kind 'nemo', pass that")):
        loading.load({"epoch": 1, "optimizer_states": [state_of("nemo")]})
