"""docs/frameworks/peft.md with the real PEFT: adapters are averaged alone, exported, resumed and merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from swafast import FusedAveragedModel
from tests.test_documents import blocks_of

pytestmark = pytest.mark.frameworks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/frameworks/peft.md").read_text()


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(batch).relu())


def train_step(model: nn.Module, batch: torch.Tensor) -> None:
    model(batch).square().mean().backward()
    with torch.no_grad():
        for param in model.parameters():
            if param.grad is not None:
                param -= 0.1 * param.grad
                param.grad = None


@pytest.fixture
def scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page leaves behind, and the adapters that it has exported."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    loader = [torch.randn(3, 4) for _ in range(3)]
    scope: dict[str, Any] = {"base_model": Base(), "modules": ["first"], "loader": loader, "train_step": train_step}
    scope |= {"evaluate": lambda model: model.eval()(loader[0])}
    for number, block in enumerate(blocks_of(PAGE)):
        exec(compile(block, f"block {number}", "exec"), scope)
    return scope


def test_the_code_of_the_page_runs(scope: dict[str, Any]) -> None:
    averaged, adapted = scope["averaged"], scope["adapted"]
    assert int(averaged.n_averaged) == 3
    trained = {name for name, param in adapted.named_parameters() if param.requires_grad}
    assert len(trained) == 2
    saved = torch.load("adapters_average.pt")
    assert {key.removeprefix("module.") for key in saved} == trained | {"n_averaged"}
    # The average shares the base model, and holds the adapters alone.
    live, held = dict(adapted.named_parameters()), dict(averaged.module.named_parameters())
    assert {name for name in live if live[name].data_ptr() != held[name].data_ptr()} == trained


def test_exported_adapters_are_the_average(scope: dict[str, Any]) -> None:
    averages = scope["averaged"].averaged_state_dict(frozen=False)
    exported = load_file("adapters/adapter_model.safetensors")
    assert len(exported) == len(averages) == 2
    for name, value in exported.items():
        assert torch.equal(value, averages[name.replace(".weight", ".default.weight")]), name
        assert not torch.equal(value, scope["adapted"].state_dict()[name.replace(".weight", ".default.weight")])
    loaded = PeftModel.from_pretrained(Base(), "adapters")
    inputs = scope["loader"][0]
    torch.testing.assert_close(loaded(inputs), scope["averaged"].module.eval()(inputs))


def test_a_merge_of_a_copy_leaves_the_base_alone(scope: dict[str, Any]) -> None:
    inputs, base = scope["loader"][0], copy.deepcopy(Base().state_dict())
    torch.testing.assert_close(scope["merged"](inputs), scope["averaged"].module.eval()(inputs))
    own = scope["adapted"].state_dict()
    for name, value in base.items():
        layer, _, kind = name.partition(".")
        inner = f"{layer}.base_layer.{kind}" if layer == "first" else name
        assert torch.equal(own[f"base_model.model.{inner}"], value), name


def test_an_average_of_the_base_takes_adapters_later() -> None:
    model = Base()
    averaged = FusedAveragedModel(model)
    averaged.update_parameters(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["first"]))
    scope: dict[str, Any] = {"averaged": averaged, "model": adapted}
    (block,) = (each for each in blocks_of((ROOT / "docs/growing.md").read_text()) if "removeprefix" in each)
    exec(block, scope)
    assert int(averaged.n_averaged) == 1
