"""The recipes, on the same streams of weights as torchcontrib's and Composer's own results."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, Rule
from swafast.optim import SWA, ComposerSWA
from swafast.optim.composer_swa import _Clock
from tests.support import differing

RECORDED = json.loads(Path(__file__).with_name("oracles").joinpath("recipes.json").read_text())
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def named(case: dict[str, Any]) -> str:
    return ",".join(map(str, case["options"].values()))


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))


def flat(net: nn.Module) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in net.parameters()])


@torch.no_grad()
def put(net: nn.Module, values: list[float]) -> None:
    """Copy the weights that the recorded net had after a step."""
    rest = torch.tensor(values)
    for param in net.parameters():
        param.copy_(rest[: param.numel()].view_as(param))
        rest = rest[param.numel() :]


@pytest.mark.parametrize(
    ("rule", "function"),
    [(EqualAverage(), get_swa_multi_avg_fn()), (ExponentialAverage(0.9), get_ema_multi_avg_fn(0.9))],
    ids=["swa", "ema"],
)
def test_torchs_results_bit_for_bit(rule: Rule, function: Callable[..., Any]) -> None:
    """As torch documents SWA: a decaying rate, then SWALR's, and an update after each epoch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 9))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    swa = SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)
    theirs, ours = AveragedModel(net, multi_avg_fn=function), FusedAveragedModel(net, rule=rule)
    ours.attach(optimizer, start="0.5dur", every="1ep", duration="12ep", steps_per_epoch=4)
    for epoch in range(1, 13):
        for _ in range(4):
            x = torch.randn(8, 9)
            optimizer.zero_grad()
            (net(x) - x).square().mean().backward()
            optimizer.step()
        if epoch >= 6:
            theirs.update_parameters(net)
        (decay if epoch < 6 else swa).step()
    assert theirs.n_averaged == 7
    assert differing(ours.state_dict(), theirs.state_dict()) == []


@pytest.mark.parametrize("case", RECORDED["torchcontrib"], ids=named)
def test_torchcontribs_results(case: dict[str, Any]) -> None:
    net = make_net()
    optimizer = SWA(torch.optim.SGD(net.parameters(), lr=0.05), **case["options"])
    for values, lr in zip(case["stream"], case["lr"], strict=True):
        put(net, values)
        optimizer.step()  # without gradients it moves nothing
        assert optimizer.param_groups[0]["lr"] == lr
    optimizer.swap_swa_sgd()
    torch.testing.assert_close(flat(net), torch.tensor(case["average"]), **CLOSE)


class Replay:
    """A training whose weights are those of a recorded one."""

    def __init__(self, case: dict[str, Any], **options: Any) -> None:
        self.case, self.net = case, make_net()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=case["lr"][0])
        self.averaged = FusedAveragedModel(self.net)
        arguments = case["options"] | {"steps_per_epoch": case["steps_per_epoch"]} | options
        self.swa = ComposerSWA(self.averaged, self.optimizer, **arguments)
        self.updates: list[int] = []
        self.replaced: int | None = None
        self.step = 0

    def run(self, until: int) -> Replay:
        for values in self.case["stream"][self.step : until]:
            put(self.net, values)
            before, count = flat(self.net), int(self.averaged.n_averaged)
            self.optimizer.step()
            self.step += 1
            self.swa.attachment.join()  # the next weights are written between two steps
            if self.averaged.n_averaged > count:
                self.updates.append(self.step)
            if not torch.equal(flat(self.net), before):
                self.replaced = self.step
        return self


@pytest.mark.filterwarnings("ignore:swa_end=.* does not come within")
@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"offload": "cpu"}], ids=str)
@pytest.mark.parametrize("case", RECORDED["composer"], ids=named)
def test_composers_results(case: dict[str, Any], options: dict[str, Any]) -> None:
    replay = Replay(case, **options).run(len(case["stream"]))
    assert (replay.updates, replay.replaced) == (case["updates"], case["replaced"])
    torch.testing.assert_close(flat(replay.averaged), torch.tensor(case["average"]), **CLOSE)
    if case["replaced"] == len(case["stream"]):
        torch.testing.assert_close(flat(replay.net), torch.tensor(case["model"]), **CLOSE)
    assert replay.swa.is_completed == (case["replaced"] is not None)


def test_a_recorded_end_that_never_comes_is_warned_of() -> None:
    case = next(case for case in RECORDED["composer"] if case["replaced"] is None)
    with pytest.warns(UserWarning, match=r"swa_end='0\.95dur' is after the end of max_duration='22ba'"):
        Replay(case)


@pytest.mark.parametrize("swa_lr", [0.01, None])
@pytest.mark.parametrize("stop_at", [None, 3, 12, 14, 16, 18, 30])
def test_the_learning_rate_is_annealed_and_resumes(swa_lr: float | None, stop_at: int | None) -> None:
    case = RECORDED["composer"][-1]
    assert case["options"]["schedule_swa_lr"]
    rates = []
    replay = Replay(case, swa_lr=swa_lr)
    truth = torch.optim.SGD(make_net().parameters(), lr=case["lr"][0])
    swalr = SWALR(truth, 0.01, anneal_epochs=3, anneal_strategy="cos")
    expected = []
    for step in range(1, 33):
        truth.step()
        if swa_lr is not None and step in case["updates"]:
            swalr.step()
        expected.append(truth.param_groups[0]["lr"])
        replay.run(step)
        rates.append(replay.optimizer.param_groups[0]["lr"])
        if step == stop_at:
            file = io.BytesIO()
            torch.save([each.state_dict() for each in (replay.optimizer, replay.averaged)], file)
            replay = Replay(case, swa_lr=swa_lr)
            states = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            for each, state in zip((replay.optimizer, replay.averaged), states, strict=True):
                each.load_state_dict(state)
            replay.step = step
    assert rates == pytest.approx(expected)
    assert replay.averaged.n_averaged == len(case["updates"])
    assert replay.swa.is_completed


def test_a_model_trains_on_after_the_end_as_a_plain_one() -> None:
    torch.manual_seed(0)
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    options: dict[str, Any] = {"max_duration": "6ep", "steps_per_epoch": 2, "swa_start": "1ep", "swa_end": "3ep"}
    swa = ComposerSWA(FusedAveragedModel(net), optimizer, **options)
    x = torch.randn(5, 2)
    for _ in range(12):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    assert swa.is_completed
    assert not torch.equal(flat(net), flat(swa.averaged))
    swa.detach()
    with pytest.raises(RuntimeError, match="detached before"):
        swa.detach()


@pytest.mark.parametrize("swa_lr", [0.01, None])
def test_annealing_needs_nothing_of_the_state_that_is_loaded(swa_lr: float | None) -> None:
    """One from before annealing, or of other groups; a group may come later."""
    case = RECORDED["composer"][-1]
    plain, replay = Replay(case, schedule_swa_lr=False).run(4), Replay(case, swa_lr=swa_lr)
    replay.optimizer.load_state_dict(plain.optimizer.state_dict())
    replay.run(14)
    replay.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.04})
    replay.run(32)
    assert [group["lr"] for group in replay.optimizer.param_groups] == pytest.approx(
        [swa_lr, swa_lr] if swa_lr is not None else [case["lr"][0], 0.04]
    )


def test_a_rate_that_is_given_takes_the_place_of_one_that_was_not() -> None:
    case = RECORDED["composer"][-1]
    first = Replay(case, swa_lr=None).run(4)
    second = Replay(case, swa_lr=0.01)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.run(32)
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_detached_recipe_leaves_the_model_alone() -> None:
    case = RECORDED["composer"][-1]
    replay = Replay(case).run(28)
    assert replay.swa.is_completed
    replay.swa.attachment.detach()  # and not its own
    before = replay.replaced
    assert replay.run(32).replaced == before == 28


def test_a_resumed_recipe_ends_when_the_first_one_would_have() -> None:
    case = RECORDED["composer"][1]
    first = Replay(case).run(10)
    second = Replay(case, swa_end="7ep")
    with pytest.warns(UserWarning, match="takes the place of"):
        second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.averaged.load_state_dict(first.averaged.state_dict())
    second.step = 10
    second.run(32)
    assert second.replaced == case["replaced"]
    torch.testing.assert_close(flat(second.averaged), torch.tensor(case["average"]), **CLOSE)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"swa_start": "3ep", "swa_end": "3ep"}, ValueError, "swa_end must be after swa_start='3ep', got '3ep'"),
        ({"swa_start": "3ep"}, ValueError, "must both be in 'ep' or 'dur', got '3ep' and '0.97dur'"),
        ({"swa_start": "30ba", "swa_end": "40ba"}, ValueError, "must both be in 'ep' or 'dur'"),
        ({"update_interval": "0ba"}, ValueError, "must be whole epochs or steps, at least one, got '0ba'"),
        ({"update_interval": "0.5dur"}, ValueError, "update_interval must be whole epochs or steps"),
        ({"max_duration": "1dur"}, ValueError, "must be whole epochs or steps, such as '90ep', got '1dur'"),
        ({"max_duration": 0}, ValueError, "max_duration must be whole"),
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch must be an int >= 1, got 0"),
        ({"anneal_strategy": "exp"}, ValueError, "anneal_strategy must be one of linear, lin, cos, cosine, got 'exp'"),
        ({"anneal_strategy": ["cos"]}, ValueError, "anneal_strategy must be one of"),
        ({"anneal_steps": 0}, ValueError, "anneal_steps must be an int >= 1, got 0"),
        ({"swa_lr": -1.0}, ValueError, r"swa_lr must be >= 0, got -1\.0"),
        ({"swa_lr": "0.1"}, ValueError, r"swa_lr must be >= 0, got '0\.1'"),
        ({"anneal_epochs": 3}, TypeError, r"argument 'anneal_epochs': write anneal_steps=3$"),
        ({"start": 3}, TypeError, r"argument 'start': did you mean swa_start=\?$"),
        ({"averaged": nn.Linear(1, 1)}, TypeError, "averaged must be one averaged model, got Linear"),
        ({"offload": "disk"}, ValueError, "offload must be 'cpu' or None, got 'disk'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_and_nothing_is_attached(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    averaged = FusedAveragedModel(net)
    good: dict[str, Any] = {"averaged": averaged, "optimizer": optimizer, "max_duration": "9ep", "steps_per_epoch": 3}
    with pytest.raises(kind, match=message):
        ComposerSWA(**(good | options))
    swa = ComposerSWA(**good, schedule_swa_lr=True)
    assert repr(swa) == f"ComposerSWA({swa.attachment!r}, swa_lr=rate at the start)"
    optimizer.step()


def test_the_gate_sees_an_epoch_counted_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = _Clock._moment
    monkeypatch.setattr(_Clock, "_moment", lambda clock, count, by: max(1, moment(clock, count, by) - 1))
    with pytest.raises(AssertionError):
        test_composers_results(RECORDED["composer"][1], {})
