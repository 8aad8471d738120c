"""The arguments of `WeightAverage`, which are checked where it is constructed. Needs no framework."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from swafast import EqualAverage, ExponentialAverage
from swafast.integrations.weight_average import Contract
from tests.test_documents import ROOT, blocks_of

RULE = ExponentialAverage(0.999)


class WeightAverage(Contract):
    """As that of a framework."""


#: Arguments that somebody gives, and what the error must have.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a decay": ({"decay": 0.99}, "WeightAverage() got an unexpected keyword argument 'decay': write rule=Exponential"),
    "decays": ({"decay": [0.9, 0.99]}, 'write rules={"fast": ExponentialAverage(0.9), "slow": ExponentialAverage(0.99'),
    "a half-life": ({"half_life": "9ba"}, "write rule=ExponentialAverage.from_half_life(9), and every=1"),
    "mmengine's momentum": ({"momentum": 0.001}, "write rule=ExponentialAverage(0.999)"),
    "timm's warm-up": ({"use_warmup": True}, 'write rule=ExponentialAverage(0.9999, warmup="power")'),
    "a start": ({"start_step": 3}, "write start=3"),
    "Lightning's start": ({"update_starting_at_step": 10}, "write start=11, as steps are counted from 1"),
    "Lightning's epoch": ({"update_starting_at_epoch": 4}, 'write start="5ep", every="1ep"'),
    "Lightning's interval": ({"update_every_n_steps": 4}, "write every=4"),
    "diffusers' start": ({"update_after_step": 9}, "write start=10"),
    "a cycle": ({"cycle_start": 5}, 'write start="5ep", every="1ep", steps_per_epoch=len(loader)'),
    "a mesh": ({"mesh": 1}, "write sharded=True"),
    "a model by name": ({"model": nn.Linear(2, 2)}, "leave it out: the framework gives it"),
    "foreach": ({"foreach": True}, "leave it out"),
    "a misspelt name": ({"copy_at_ends": True}, "did you mean copy_at_end=?"),
    "a share as a float": ({"start": 0.5}, "start must be an int of steps or a str such as '100ba'"),
    "a span that is none": ({"start": "3 weeks"}, "start must be an int of steps or a str such as '100ba'"),
    "an interval of 0": ({"every": 0}, "every must be at least one step, got 0"),
    "an interval of no epoch": ({"every": "0ep"}, "every must be at least one step, got '0ep'"),
    "an end before the start": ({"start": 5, "end": 3}, "start must not be after the end 3, step 3, got 5"),
    "a share of a known length": ({"start": "0.9dur", "duration": 10, "end": 3}, "got '0.9dur', step 9"),
    "no epoch": ({"steps_per_epoch": 0}, "steps_per_epoch must be an int >= 1"),
    "a format": ({"format": "bf16"}, 'write format="half"'),
    "a format of one": ({"rules": {"a": RULE}, "format": {"a": "bf16"}}, 'write format="half"'),
    "a format of none": ({"rules": {"a": RULE}, "format": {"b": "exact"}}, "format must name averages among 'a', got"),
    "a decay as the rule": ({"rule": 0.99}, "write rule=ExponentialAverage(0.99)"),
    "a decay by name": ({"rules": {"a": 0.9}}, "rules['a'] must be a Rule such as ExponentialAverage(0.999), got 0.9"),
    "a list of decays": ({"rules": [0.9, 0.99]}, 'write rules={"fast": ExponentialAverage(0.9), "slow"'),
    "no average of that name": ({"rules": {"a": RULE}, "evaluate": "b"}, "evaluate must be a name among 'a', got 'b'"),
    "a word for a bool": ({"copy_at_end": "no"}, "copy_at_end must be True or False, got 'no'"),
    "a word for the shards": ({"sharded": "yes"}, "sharded must be True, False or 'auto', got 'yes'"),
    "an offload": ({"offload": "disk"}, "offload must be 'cpu' or None, got 'disk'"),
    "a spread": ({"deviations": 1}, "deviations must be 0 for the variance alone"),
    "names to average": ({"include": ["a"]}, "write include=lambda name, param: name in {...}"),
    "a backend": ({"backend": "gpu"}, "backend must be one of 'cuda', 'cpu', 'triton', 'reference', got 'gpu'"),
    "a backend of several": ({"rules": {"a": RULE}, "backend": 3}, "backend must be one of 'cuda', 'cpu'"),
    "two rules": ({"rule": RULE, "multi_avg_fn": RULE}, "only one of rule, avg_fn and multi_avg_fn must be given"),
    "no function": ({"avg_fn": 3}, "avg_fn must be"),
    "a format of a function": ({"avg_fn": max, "format": "exact"}, "format must be None with an averaging function"),
    "a spread of models before": ({"deviations": 0, "num_averaged": 3}, "num_averaged must be 0 with deviations, got"),
    "a device": ({"device": "gpu0"}, "device must be one of this machine, such as 'cpu', got 'gpu0'"),
    "a seed": ({"seed": "x"}, "seed must be"),
    "a count": ({"num_averaged": -1}, "num_averaged must be"),
    "a way with NaNs": ({"nonfinite": "ignore"}, "nonfinite must be one of"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_argument_is_refused_at_once_with_the_line_that_was_meant(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=re.escape(message)) as raised:
        WeightAverage(**given)
    assert "Contract" not in str(raised.value)
    assert "FusedAveragedModel" not in str(raised.value)


@pytest.mark.parametrize("given", [(nn.Linear(2, 2), RULE), (RULE, nn.Linear(2, 2)), (nn.Linear(2, 2), 0.999)])
def test_a_model_by_position_is_refused(given: tuple[Any, ...]) -> None:
    written = re.escape("WeightAverage takes one argument by position, the rule, got ")
    with pytest.raises(TypeError, match=written + r".*: write WeightAverage\(ExponentialAverage\((decay=)?0\.999\)\)"):
        WeightAverage(*given)


@pytest.mark.parametrize(
    "given",
    [
        {"start": "0.5dur", "every": "1ep", "end": "1dur"},  # the framework tells the lengths
        {"start": "0.5dur", "every": 100, "end": 50},
        {"start": "2ep", "duration": "10ep", "steps_per_epoch": 5},
        {"rules": [("fast", RULE), ("slow", EqualAverage())], "evaluate": "slow", "format": {"fast": "exact"}},
        {"offload": "cpu", "overlap": True, "use_buffers": True, "device": "cpu", "seed": 3},
        {"share_replicas": True},  # of shards
        {"use_buffers": 1, "num_averaged": 0},  # as torch's class, and so ours, takes it
        {"multi_avg_fn": EqualAverage()},
    ],
)
def test_what_the_training_may_accept_is_accepted(given: dict[str, Any]) -> None:
    average = WeightAverage(**given)
    assert average.averaged is None
    assert average.evaluated_name == given.get("evaluate")


def test_an_argument_of_shards_alone_is_refused_of_whole_averages() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'share_replicas'"):
        WeightAverage(sharded=False, share_replicas=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'device'"):
        WeightAverage(sharded=True, device="cpu")


def test_a_swap_without_a_model_names_the_line() -> None:
    with pytest.raises(TypeError, match=re.escape("got None: write average.swapped(module)")):
        WeightAverage().swapped()


def test_the_shards_are_imported_on_use_alone() -> None:
    code = (
        "import sys; from swafast.integrations.weight_average import Contract; Contract(format='exact')\n"
        "assert 'swafast.sharded.sharded_model' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def made(**given: Any) -> WeightAverage:
    model = nn.Linear(2, 2)
    average = WeightAverage(**given)
    average.make(model)
    average.follow([torch.optim.SGD(model.parameters(), 0.1)], model)
    return average


def test_a_state_of_one_average_and_one_of_several_are_told_apart() -> None:
    one, several = made(rule=RULE), made(rules={"fast": RULE, "slow": RULE})
    one_again, several_again = made(rule=RULE), made(rules={"slow": RULE, "fast": RULE})
    with pytest.raises(
        RuntimeError, match=r"averages 'fast', 'slow' of rules=, got one .* construct WeightAverage\(rule"
    ):
        several.load(one.state())
    with pytest.raises(RuntimeError, match=r"got several, 'fast', 'slow': .* WeightAverage\(rules=\{name: rule\}\)"):
        one.load(several.state())
    one_again.load(one.state())
    several_again.load(several.state())


def test_the_code_of_the_common_page_runs() -> None:
    bn, other = blocks_of((ROOT / "docs/frameworks/README.md").read_text())
    average = made(rules={"fast": RULE, "slow": EqualAverage()}, evaluate="slow")
    model = average.averaged._made_of()
    for _ in range(3):
        model(torch.ones(4, 2)).sum().backward()
        average._followed[0].step()
    fast, seen = average.averaged["fast"].averaged_state_dict(), []
    scope: dict[str, Any] = {"model": model, "average": average, "loader": [torch.ones(4, 2)]}
    scope["evaluate"] = lambda model: seen.append(model.weight.detach().clone())
    exec(bn, scope)
    exec(other, scope)
    assert torch.equal(seen[0], fast["weight"])
    assert not torch.equal(seen[0], average.averaged["slow"].module.weight)
    assert torch.equal(scope["weights"]["weight"], fast["weight"])
