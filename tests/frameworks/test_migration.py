"""docs/frameworks/migration.md: its code runs, and its table agrees with the converters. Needs no framework."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import swafast
from swafast.convert import kinds
from tests.convert_cases import CASES, Loading, state_of
from tests.frameworks.record_states import Net, put
from tests.test_documents import blocks_of

PAGE = (Path(__file__).parents[2] / "docs/frameworks/migration.md").read_text()
TOOLS = {
    *("torch", "Lightning", "timm", "diffusers", "ema-pytorch", "torch_ema"),
    *("Composer", "mmengine", "ignite", "NeMo", "ultralytics"),
}


def rows(columns: int) -> list[list[str]]:
    cells = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in cells if len(row) == columns]


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = blocks_of(PAGE)[0]
    monkeypatch.chdir(tmp_path)
    torch.save(state_of("diffusers_ratio"), "ema.pt")
    model = Net()
    put(model, 0)
    space = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    with pytest.warns(UserWarning, match="replaces the average's"):
        exec(block, space)
    assert space["averaged"].attachment.step == 7  # type: ignore[attr-defined]


def test_a_state_that_does_not_tell_its_steps_is_attached_by_the_page_too() -> None:
    loading = Loading("torch_swa")
    conversion = loading.load(state_of("torch_swa"))
    assert conversion.steps is None
    optimizer = torch.optim.SGD(loading.model.parameters(), 0.1)
    (line,) = re.findall(r"^(averaged\.attach\(.*?\))  #", blocks_of(PAGE)[0], re.MULTILINE)
    exec(line, {"averaged": loading.averaged, "optimizer": optimizer, "conversion": conversion})
    assert loading.averaged.attachment is not None
    assert loading.averaged.attachment.step == 0


def test_the_count_of_ema_pytorch_is_that_of_the_page() -> None:
    loading = Loading("ema_pytorch")
    (formula,) = re.findall(r"`(max\(.*?\))`", PAGE)
    values = {"ceil": math.ceil, "update_after_step": 100, "update_every": 10}
    for step, count in {1000: 90, 101: 1, 100: 0, 7: 0}.items():
        assert eval(formula, {**values, "step": step}) == count
    with pytest.raises(ValueError, match=re.escape(formula)):
        loading.load({**state_of("ema_pytorch"), "step": torch.tensor([1000])}, num_averaged=None)


def lines() -> dict[str, list[tuple[str, str]]]:
    """Return, for each tool, the lines before and those after."""
    (block,) = re.findall(r"^```diff\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    tools = re.findall(r"^# (\S+)\n((?:[-+] .*\n)+)", block, re.MULTILINE)
    return {tool: re.findall(r"- ema = (.*)\n((?:\+ .*\n)+)", pairs) for tool, pairs in tools}


def test_each_tool_has_its_lines_and_its_kind() -> None:
    table = {row[0]: row[1:] for row in rows(4)[1:]}
    assert {*lines()} == {*table} == TOOLS
    assert {row[0].strip("`") for row in table.values()} == kinds.KINDS.keys()
    for tool, pairs in lines().items():
        kind = table[tool][0].strip("`")
        cases = [case for case in CASES.values() if case.kind == kind]
        assert pairs, tool
        for _, after in pairs:
            space: dict[str, Any] = {name: getattr(swafast, name) for name in swafast.__all__} | {"model": Net()}
            exec(re.sub(r"^\+ ", "", after, flags=re.MULTILINE), space)
            averaged = space["averaged"]
            alike = [case for case in cases if kind_of(case.rule) == kind_of(averaged.rule)]
            assert any(case.use_buffers == averaged.use_buffers for case in alike), after
        assert any("num_averaged" in case.options for case in cases) <= ("num_averaged=" in table[tool][2]), tool
        for entry in re.findall("`(.*?)`", table[tool][1]):
            assert any(has_entry(state_of(name), entry) for name, case in CASES.items() if case.kind == kind), entry


def kind_of(rule: object) -> tuple[type, object]:
    return type(rule), getattr(rule, "warmup", None)


def has_entry(state: dict[str, Any], entry: str) -> bool:
    inner = [value for value in state.values() if isinstance(value, dict)]
    keys = {key for each in (state, *inner) for key in each}
    return entry in keys or any(entry.endswith("*") and key.startswith(entry[:-1]) for key in keys)


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
