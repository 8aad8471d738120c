"""The op behind torch's dispatcher, the choice of backends, and compiled code."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.library import opcheck

from swafast import ExponentialAverage, FusedAveragedModel
from swafast.backends import cpu, library
from swafast.op import choice
from swafast.terms.formats import encode_exact
from tests.conftest import NO_LIBRARY
from tests.kernels import meet_at_each_line

EQUAL = (1, [0.0] * 4)  # kind and terms of the equal average


def arguments(format: str = "float32") -> tuple:
    params = [torch.randn(5, 3), torch.randn(7)]
    averages, remainders = [torch.randn(5, 3), torch.randn(7)], []
    if format == "exact":
        planes = [encode_exact(average) for average in averages]
        averages, remainders = [list(plane) for plane in zip(*planes, strict=True)]
    return averages, remainders, params, torch.tensor(3), format, *EQUAL


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{NO_LIBRARY}: {cpu.unavailable()}")
def test_two_threads_may_meet_at_each_line_of_the_op() -> None:
    """Both weights count, whichever of two updates of one launch comes first."""
    param, average, count = torch.ones(5), torch.zeros(5), torch.tensor(1)

    def update_by(weight: float) -> None:
        torch.ops.swafast.update_([average], [], [param], count, "float32", 0, [weight, 0.0, 0.0, 0.0])

    update_by(0.25)
    average.zero_()
    files = ("op/torch_op.py", "op/plan.py", "backends/cpu.py", "backends/rows.py")
    for line in meet_at_each_line(lambda: update_by(0.5), lambda: update_by(0.75), files):
        assert (average - 1 + 0.125).abs().max() < 1e-6, f"line {line}: {average}"
        average.zero_()


@pytest.mark.parametrize("format", ["float32", "exact"])
def test_the_op_keeps_its_schema(format: str) -> None:
    results = opcheck(torch.ops.swafast.update_.default, arguments(format))
    assert set(results.values()) == {"SUCCESS"}


def test_the_op_updates_and_counts() -> None:
    averages, remainders, params, count, *rest = arguments()
    expected = [torch.lerp(average, param, 0.25) for average, param in zip(averages, params, strict=True)]
    torch.ops.swafast.update_(averages, remainders, params, count, *rest)
    assert all(map(torch.equal, averages, expected))
    assert count == 4


def test_the_op_compiles_fullgraph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(averages, params, count):
        torch.ops.swafast.update_(averages, [], params, count, "float32", *EQUAL)
        return averages[0] * 2

    averages, _, params, count, *_ = arguments()
    expected = torch.lerp(averages[0], params[0], 0.25)
    assert torch.equal(step(averages, params, count), expected * 2)
    assert torch.equal(averages[0], expected)
    assert count == 4


def test_update_parameters_may_stand_in_compiled_code() -> None:
    model = nn.Linear(3, 3)
    average = FusedAveragedModel(model)

    @torch.compile(backend="eager")
    def step(x: torch.Tensor) -> torch.Tensor:
        y = model(x).sum()
        average.update_parameters(model)
        return y

    for _ in range(3):
        step(torch.randn(2, 3))
    assert average.n_averaged == 3


def test_a_library_that_does_not_load_warns_once_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path, every_kind: nn.Module
) -> None:
    broken = tmp_path / "libswafast.so"
    broken.write_bytes(b"not a library")
    monkeypatch.delenv("SWAFAST_LIBRARY", raising=False)
    monkeypatch.setattr(library, "_candidates", lambda: [broken])
    monkeypatch.setattr(choice, "_warned", set())
    library.load.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"reference backend: .*libswafast\.so did not load") as seen:
            average = FusedAveragedModel(every_kind)
        assert len(seen) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            average.update_parameters(every_kind)
        with pytest.raises(RuntimeError, match="backend='cpu' cannot run here"):
            FusedAveragedModel(every_kind, backend="cpu")
        monkeypatch.setattr(library, "_candidates", lambda: [tmp_path / "absent.so"])
        library.load.cache_clear()
        assert "no native library at" in str(cpu.unavailable())
    finally:
        library.load.cache_clear()


ZEROS, BF16_ZEROS, ONES = torch.zeros(8), torch.zeros(8).bfloat16(), torch.ones(8)
SHORT = torch.zeros(1, dtype=torch.int16)


@pytest.mark.parametrize(
    ("averages", "remainders", "params", "rule", "message"),
    [
        ([BF16_ZEROS], [], [ONES.bfloat16()], ("exact", *EQUAL), "have one length"),
        ([BF16_ZEROS], [SHORT], [ONES], ("exact", *EQUAL), "alike in shape and device"),
        ([BF16_ZEROS], [ZEROS], [ONES], ("exact", *EQUAL), "must have planes of"),
        ([ZEROS.double()], [], [ONES], ("float32", *EQUAL), "must have planes of"),
        ([BF16_ZEROS], [], [ONES], ("float32", *EQUAL), "must have planes of"),
        ([ZEROS], [], [ONES, ONES], ("float32", *EQUAL), "have one length"),
        ([ZEROS], [], [ONES[:1]], ("float32", *EQUAL), r"'0' must have the average's shape \(8,\), got \(1,\)"),
        ([ZEROS, ZEROS], [], [ONES, ONES], ("float32", *EQUAL), "averages must not overlap in memory"),
        ([ZEROS], [], [ONES], ("float33", *EQUAL), "format must be one of"),
        ([ZEROS], [], [ONES], ("float32", 99, [0.0] * 4), "^kind must be"),
        ([ZEROS], [], [ONES], ("float32", -1, [0.0] * 4), "^kind must be"),
        ([ZEROS], [], [ONES], ("float32", 0, [float("nan")] * 4), "^terms must be"),
        ([ZEROS], [], [ONES], ("float32", 0, [0.5]), "^terms must be"),
    ],
)
def test_the_op_refuses_what_does_not_match_and_changes_nothing(
    averages: list[torch.Tensor], remainders: list[torch.Tensor], params: list[torch.Tensor], rule: tuple, message: str
) -> None:
    averages, count = copy.deepcopy(averages), torch.tensor(1)  # one that is there twice stays one
    with pytest.raises(ValueError, match=message):
        torch.ops.swafast.update_(averages, remainders, params, count, *rule)
    assert count == 1
    assert not any(average.any() for average in averages)


def test_a_write_of_the_op_is_seen_by_autograd(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAFAST_BACKEND", backend)
    average, weight = torch.randn(5), torch.randn(5, requires_grad=True)
    loss = (weight * average).sum()
    torch.ops.swafast.update_([average], [], [torch.randn(5)], torch.tensor(1), "float32", *EQUAL)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_subclass_with_a_weight_of_its_own_is_asked_for_it(backend: str) -> None:
    class Quarter(ExponentialAverage):
        def weight(self, num_averaged: int) -> float:
            return 1.0 if num_averaged == 0 else 0.25

    model = nn.ParameterList([torch.zeros(3)])
    average = FusedAveragedModel(model, rule=Quarter(0.999), backend=backend)
    average.update_parameters(model)
    with torch.no_grad():
        model[0].fill_(1)
    average.update_parameters(model)
    assert torch.equal(average.module[0].detach(), torch.full((3,), 0.25))
