"""Pages of frameworks that need no class of ours: their code runs in the real package, and does what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import EMAHandler
from torch import Tensor, nn

from swafast import ExponentialAverage
from tests.frameworks.kit import differing
from tests.test_documents import ROOT, blocks_of, reader

pytestmark = pytest.mark.frameworks

State = dict[str, Tensor]


def state_of(module: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.fixture(autouse=True)
def _alone(one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Ignite


IGNITE = blocks_of((ROOT / "docs/frameworks/ignite.md").read_text())


def ignite_scope() -> dict[str, Any]:
    scope = reader()
    scope["seen"] = []

    def metric(model: nn.Module, batch: Tensor) -> None:
        scope["seen"].append(state_of(model))

    return scope | {"metric": metric}


def test_ignites_page_evaluates_the_average_and_resumes() -> None:
    before, after, resume, warm_up = IGNITE
    exec(before, theirs := ignite_scope())
    exec(after, ours := ignite_scope())
    # Theirs begins as the initial model, and ours as that of the first step: the rest is the same training.
    assert differing(state_of(theirs["model"]), state_of(ours["model"])) == []
    assert len(ours["seen"]) == 4  # two batches in each of two epochs
    assert differing(ours["seen"][-1], ours["averaged"].averaged_state_dict()) == []
    assert differing(ours["seen"][-1], state_of(ours["model"])) != []
    assert int(ours["averaged"].n_averaged) == 4
    # Stopped after two epochs, made anew and resumed: as three epochs without a stop.
    setup, run = after.rsplit("trainer.run", 1)
    assert run == "(loader, max_epochs=2)\n"
    exec(setup, resumed := ignite_scope())
    exec(resume, resumed)
    exec(setup + "trainer.run(loader, max_epochs=3)\n", straight := ignite_scope())
    for name in ("model", "averaged"):
        assert differing(state_of(resumed[name]), state_of(straight[name])) == []


def test_ignites_warm_up_is_that_of_its_handler() -> None:
    scope = ignite_scope()
    begins = "averaged.update_parameters(model)\naveraged.attach(optimizer, step=0)"
    setup, _ = IGNITE[1].replace("averaged.attach(optimizer)", begins).rsplit("trainer.run", 1)
    exec(setup, scope)
    handlers = {name: EMAHandler(scope["model"], 0.001, 0.2, 100) for name in ("ema_momentum", "other")}
    seen: dict[str, list[float]] = {name: [] for name in handlers}
    trainer = scope["trainer"]
    for name, handler in handlers.items():
        handler.attach(trainer, name=name)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: [seen[name].append(getattr(trainer.state, name)) for name in seen]
    )
    exec(IGNITE[3], scope)
    assert seen["ema_momentum"][:2] == [0.2, 0.2 + (0.001 - 0.2) / 99]
    assert {*seen["other"]} == {0.001}  # it has no warm-up, as the page says
    assert int(scope["averaged"].n_averaged) == 1 + 8
    for name, value in handlers["ema_momentum"].ema_model.state_dict().items():
        torch.testing.assert_close(scope["averaged"].averaged_state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_a_save_inside_an_evaluation_is_refused() -> None:
    exec(IGNITE[1].replace("Events.EPOCH_COMPLETED, saver", "Events.STARTED, saver"), scope := ignite_scope())
    scope["evaluator"].add_event_handler(Events.COMPLETED, scope["saver"])
    with pytest.raises(RuntimeError, match="swapped"):
        scope["trainer"].run(scope["loader"], max_epochs=3)
