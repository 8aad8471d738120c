"""`sampled_into` and `sample_to` in one process: what a sample is, and that all comes back to the bit."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages, Spread
from swafast.average import sampling
from swafast.backends import cpu
from swafast.op import drawing
from swafast.optim.batchnorm import update_bn
from swafast.terms.draws import make_random_key
from swafast.terms.normals import normals
from tests.conftest import NO_LIBRARY
from tests.costs import memory_events, peak_of
from tests.spreads import sample_in_closed_form
from tests.support import EveryKind, differing, drift, is_interrupted, refused, same_bits, tensors_of, unchanged, update

#: Dtypes of the params, formats and spreads. `pytest -m slow` has all of them.
CASES: list[Any] = [
    (torch.float32, None, 4),
    (torch.bfloat16, None, Spread(4, torch.float32)),
    (torch.float16, "mirrored", 0),
    (torch.float32, "compact", Spread(4, torch.bfloat16)),
    (torch.bfloat16, "compensated", 7),
    (torch.float64, None, 4),
    *(
        pytest.param(dtype, format, spread, marks=pytest.mark.slow)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        for format in (None, "float32", "exact", "mirrored", "compact", "compensated", "half")
        for spread in (0, 4, Spread(4, torch.bfloat16))
    ),
]
BACKENDS = (
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(cpu.unavailable() is not None, reason=NO_LIBRARY)),
)
pytestmark = pytest.mark.filterwarnings("ignore:the deviations have", "ignore:format='half'")


def collected(model: nn.Module, updates: int = 5, deviations: Any = 4, **options: Any) -> FusedAveragedModel:
    """Return an average with a spread after so many updates, of which the model has left the last."""
    averaged = FusedAveragedModel(model, deviations=deviations, **options)
    for _ in range(updates):
        drift(model)
        averaged.update_parameters(model)
    drift(model)
    return averaged


def sample_of(averaged: FusedAveragedModel, model: nn.Module, index: int = 3, **options: Any) -> dict[str, Tensor]:
    """Return what ``sampled_into`` shows, params and buffers. It leaves both sides as they were."""
    with unchanged(model, averaged), averaged.sampled_into(model, index, **options) as sample:
        assert sample is model
        return tensors_of(model)


# What a sample is


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("updates", "scale"), [(2, None), (3, 2.0), (9, None)])
def test_a_sample_is_the_formula(backend: str, updates: int, scale: float | None) -> None:
    model = nn.ParameterDict({"a": torch.randn(7, 3), "b": torch.randn(5)})
    averaged = FusedAveragedModel(model, deviations=4, seed=11, backend=backend)
    seen: dict[str, list[Tensor]] = {"a": [], "b": []}
    for _ in range(updates):
        drift(model)
        averaged.update_parameters(model)
        for name, param in model.items():
            seen[name].append(param.detach().clone())
    models = {name: torch.stack(params) for name, params in seen.items()}
    exact = sample_in_closed_form(models, 4, 6, 0.5 if scale is None else scale, seed=11)
    got = sample_of(averaged, model, 6, scale=scale)
    for name, expected in exact.items():
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_without_deviations_the_scale_is_one() -> None:
    model = nn.Linear(4, 3)
    averaged = collected(model, deviations=0)
    got, one = sample_of(averaged, model), sample_of(averaged, model, scale=1.0)
    assert differing(got, one) == []
    state = averaged.state_dict()
    z = normals(make_random_key(0, "weight"), 3, torch.arange(12)).view(3, 4)
    expected = state["module.weight"] + state["variance.weight"].sqrt() * z
    torch.testing.assert_close(got["weight"], expected)


@pytest.mark.parametrize(("dtype", "format", "spread"), CASES, ids=str)
def test_all_backends_draw_the_same_and_scale_0_gives_the_average_rounded_once(
    dtype: torch.dtype, format: str | None, spread: Any, small_chunks: int
) -> None:
    model, results = EveryKind().to(dtype), []
    backends = ("reference",) if cpu.unavailable() is not None else ("reference", "cpu")
    averages = [FusedAveragedModel(model, deviations=spread, format=format, backend=each) for each in backends]
    update(model, *averages, updates=5)
    for averaged in averages:
        average, got = averaged.averaged_state_dict(), sample_of(averaged, model, scale=0)
        for name, param in model.named_parameters():
            assert same_bits(got[name], average[name].float().to(param.dtype)), name
        results.append((averaged.state_dict(), sample_of(averaged, model)))
    for state, sample in results[1:]:
        assert differing(results[0][0], state) == []
        assert differing(results[0][1], sample) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_do_not_depend_on_the_order_of_memory(backend: str) -> None:
    results = []
    for lay in (Tensor.contiguous, lambda w: w.contiguous(memory_format=torch.channels_last), _gapped):
        torch.manual_seed(3)
        model = nn.Conv2d(5, 7, 3)
        model.weight = nn.Parameter(lay(model.weight.detach()))
        averaged = FusedAveragedModel(model, deviations=3, backend=backend)
        for _ in range(4):
            drift(model)
            averaged.update_parameters(model)
        results.append(sample_of(averaged, model))
    assert differing(results[0], results[1]) == differing(results[0], results[2]) == []


def _gapped(weight: Tensor) -> Tensor:
    return torch.stack((weight, weight), dim=-1)[..., 0]


@pytest.mark.parametrize("deviations", [0, 4])
def test_seeds_and_indices_give_other_samples_and_the_default_is_the_constructions(deviations: int) -> None:
    model = nn.Linear(4, 3)
    averaged = collected(model, deviations=deviations, seed=5)
    own = sample_of(averaged, model)
    assert differing(own, sample_of(averaged, model, seed=5)) == []
    for options in ({"seed": 6}, {"index": 4}, {"scale": 0.6}):
        assert differing(own, sample_of(averaged, model, **{"index": 3, **options})) == ["bias", "weight"]
    assert differing(own, sample_of(averaged, model)) == []  # the work of another seed is not kept for this one


def test_sample_to_gives_what_sampled_into_shows(every_kind: EveryKind) -> None:
    averaged = FusedAveragedModel(every_kind, deviations=4)
    update(every_kind, averaged, updates=5)
    shown = sample_of(averaged, every_kind)
    with unchanged(averaged):
        averaged.sample_to(every_kind, 3)
    assert differing(shown, tensors_of(every_kind)) == []


def test_a_sample_does_not_depend_on_what_the_params_held(every_kind: EveryKind) -> None:
    averaged = FusedAveragedModel(every_kind, deviations=4)
    update(every_kind, averaged, updates=5)
    shown = sample_of(averaged, every_kind)
    every_kind.drift()
    with torch.no_grad():
        for param in every_kind.parameters():
            param.fill_(math.nan)
    assert differing(shown, sample_of(averaged, every_kind)) == []


def test_a_tied_param_has_one_spread_and_a_model_may_tie_what_the_average_does_not() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    averaged = collected(model)
    free = sample_of(averaged, model)
    model[1].weight = model[0].weight
    assert same_bits(sample_of(averaged, model)["0.weight"], free["0.weight"])  # the first average
    averaged = collected(model)
    assert [key for key in averaged.state_dict() if key.startswith("variance")] == ["variance.0.weight"]


def test_include_leaves_params_without_a_spread() -> None:
    model = nn.Linear(4, 3)
    averaged = collected(model, include=lambda name, param: name == "weight")
    assert not [key for key in averaged.state_dict() if key.endswith("bias") and not key.startswith("module")]
    assert same_bits(sample_of(averaged, model)["bias"], averaged.module.bias)


def test_the_mean_has_the_bits_that_it_has_without_a_spread(every_kind: EveryKind) -> None:
    for format in (None, "exact", "compact", "compensated"):
        averages = [FusedAveragedModel(every_kind, deviations=spread, format=format) for spread in (None, 0, 4)]
        update(every_kind, *averages, updates=6)
        without, *others = (averaged.state_dict() for averaged in averages)
        for state in others:
            assert {key.split(".")[0] for key in differing(without, state)} <= {"variance", "deviation"}


# What comes back


class Net(nn.Module):
    """BatchNorm's float and integer buffers, params that are tied, and one that is left as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.norm(self.first(inputs)))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_batchnorm_is_estimated_anew_in_the_body_and_comes_back(use_buffers: bool) -> None:
    model = Net()
    averaged = collected(model, use_buffers=use_buffers)
    averaged.module.norm.running_mean.fill_(7.0)
    averaged.module.norm.num_batches_tracked.fill_(70)
    batches = [torch.randn(16, 4) for _ in range(3)]
    model.train()
    with unchanged(model, averaged), averaged.sampled_into(model, 0) as sample:
        assert model.norm.running_mean.tolist() == [7.0] * 4  # those of the average
        assert model.norm.num_batches_tracked == 70
        update_bn(batches, sample)
        assert model.norm.num_batches_tracked == 3
        assert abs(model.norm.running_mean).max() < 7.0


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_is_back_after_an_exception(every_kind: EveryKind, dtype: torch.dtype, error: type[BaseException]) -> None:
    averaged = FusedAveragedModel(every_kind.to(dtype), deviations=4)
    update(every_kind, averaged, updates=4)
    with refused(error, "evaluation failed", every_kind, averaged), averaged.sampled_into(every_kind, 0):
        every_kind.norm.running_mean.fill_(3.0)
        every_kind.norm.num_batches_tracked.fill_(3)
        raise error("evaluation failed")
    averaged.update_parameters(every_kind)


#: Where an interrupt may come. Not the guard: see test_interrupts.py.
FILES = (
    *(f"/swafast/average/{name}.py" for name in ("sampling", "bindings", "contents")),
    *(f"/swafast/op/{name}.py" for name in ("drawing", "exchange", "copies", "plan", "launches")),
    *(f"/swafast/terms/{name}.py" for name in ("samples", "copying", "converting")),
    "/swafast/backends/reference.py",
    "/swafast/loop/swaps.py",
)


@pytest.mark.parametrize("every", [None, pytest.param(1, marks=pytest.mark.slow)], ids=["some lines", "each line"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupt_at_any_line_changes_nothing(backend: str, every: int | None) -> None:
    every = every or 97
    model = Net()
    averaged = collected(model, deviations=2, backend=backend)

    def sample() -> None:
        with averaged.sampled_into(model, 1):
            pass

    line, num_averaged = -every, 5
    while True:
        line += every
        averaged._bindings.forget()  # also of what is prepared
        with unchanged(model, averaged):
            ended = not is_interrupted(sample, line, *FILES)
        assert torch.is_grad_enabled()
        if ended:
            break
        if line % (10 * every) == 0:
            averaged.update_parameters(model)
            num_averaged += 1
    assert line > 200
    assert averaged.n_averaged == num_averaged
    sample_of(averaged, model)


def test_an_interrupt_in_sample_to_lets_the_average_be() -> None:
    model = Net()
    averaged, line = collected(model, deviations=2), -61
    while True:
        line += 61
        averaged._bindings.forget()
        with unchanged(averaged):
            if not is_interrupted(lambda: averaged.sample_to(model, 1), line, *FILES):
                break
    assert line > 100
    shown = sample_of(averaged, model, 1)
    assert differing(shown, tensors_of(model)) == []


MOVES: dict[str, Callable[[nn.Linear], object]] = {
    "moved": lambda model: setattr(model.weight, "data", model.weight.data.clone()),
    "cast": lambda model: model.double(),
    "cast there and back": lambda model: model.double().float(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_params_that_move_in_the_body_have_their_values_back(move: Callable[[nn.Linear], object]) -> None:
    model = nn.Linear(4, 3)
    averaged = collected(model)
    own = tensors_of(model)
    with unchanged(averaged), averaged.sampled_into(model, 2):
        move(model)
    assert differing(own, tensors_of(model.float())) == []
    sample_of(averaged, model)


def test_a_param_that_is_replaced_in_the_body_is_named_and_has_its_values_back() -> None:
    model = nn.Linear(4, 3)
    averaged = collected(model)
    own = tensors_of(model)
    with refused(RuntimeError, "writes into 'weight': .*written is gone", averaged), averaged.sampled_into(model, 2):
        model.weight = nn.Parameter(torch.zeros(3, 4))
    assert differing(own, tensors_of(model)) == []
    sample_of(averaged, model)


def test_writes_in_the_body_are_named_with_what_becomes_of_them() -> None:
    model = nn.Linear(4, 3)
    averaged = collected(model)
    gone = "into 'weight': the model has its own values again, and what was written is gone"
    with refused(RuntimeError, gone, model, averaged), averaged.sampled_into(model, 2):
        nn.init.zeros_(model.weight)
    own = tensors_of(model)
    with (
        pytest.raises(RuntimeError, match="into the average of 'bias': averages keep what was written"),
        averaged.sampled_into(model, 2),
    ):
        nn.init.zeros_(averaged.module.bias)
    assert differing(own, tensors_of(model)) == []
    assert averaged.module.bias.tolist() == [0.0] * 3


def test_an_embedding_that_norms_its_rows_in_the_body_is_no_write() -> None:
    model = nn.Embedding(9, 4, max_norm=0.1)
    averaged = collected(model)
    with unchanged(model, averaged), averaged.sampled_into(model, 2):
        model(torch.arange(9))


# What is refused in the body


def test_meanwhile_nothing_may_touch_averages_or_train_the_model(every_kind: EveryKind) -> None:
    averaged, other = FusedAveragedModel(every_kind, deviations=4), FusedAveragedModel(every_kind)
    update(every_kind, averaged, other, updates=4)
    optimizer = torch.optim.SGD(every_kind.parameters(), lr=0.1)
    state, inside = averaged.state_dict(), {}
    with unchanged(every_kind, averaged, other), averaged.sampled_into(every_kind, 0):
        inside = tensors_of(every_kind)
        for action in (
            lambda: averaged.update_parameters(every_kind),
            lambda: averaged.copy_to(every_kind),
            lambda: averaged.sample_to(every_kind, 1),
            lambda: averaged.load_state_dict(state),
            lambda: averaged.state_dict(),
            lambda: averaged.averaged_state_dict(),
            lambda: averaged.half(),
            lambda: averaged(torch.zeros(1, 3, 5, 5)),
            lambda: averaged.swapped_into(every_kind).__enter__(),
            lambda: averaged.sampled_into(every_kind, 1).__enter__(),
        ):
            with pytest.raises(RuntimeError, match=r"must wait until the averages .* leave sampled_into first$"):
                action()
        for action in (
            optimizer.step,
            lambda: other.update_parameters(every_kind),
            lambda: other.copy_to(every_kind),
        ):
            with pytest.raises(
                RuntimeError, match=r"must wait until averages are swapped back out.* leave sampled_into"
            ):
                action()
        with pytest.raises(RuntimeError, match=r"must not be used while .* leave sampled_into first"):
            averaged.module.state_dict()
        assert differing(inside, tensors_of(every_kind)) == []
    with averaged.swapped_into(every_kind), pytest.raises(RuntimeError, match=r"leave swapped_into first$"):
        averaged.state_dict()


@pytest.mark.parametrize("outer", ["sample", "average"])
def test_samples_nest_with_swaps_of_other_averages(outer: str) -> None:
    model = Net()
    averaged, other = collected(model), collected(model, rule=ExponentialAverage(0.5), deviations=None)
    own, of_other, of_sample = tensors_of(model), {}, sample_of(averaged, model)
    with other.swapped_into(model):
        of_other = tensors_of(model)
    contexts = [averaged.sampled_into(model, 3), other.swapped_into(model)]
    inside = [of_sample, of_other]
    if outer == "average":
        contexts.reverse()
        inside.reverse()
    with unchanged(averaged, other):
        with contexts[0]:
            with contexts[1]:
                assert differing(inside[1], tensors_of(model)) == []
            assert differing(inside[0], tensors_of(model)) == []
        assert differing(own, tensors_of(model)) == []


def test_a_sample_that_is_left_before_an_inner_swap_goes_back_later() -> None:
    model = Net()
    averaged, other = collected(model), collected(model, deviations=None)
    own = tensors_of(model)
    outer, inner = averaged.sampled_into(model, 0), other.swapped_into(model)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(RuntimeError, match="sampled_into must be left in reverse order"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert differing(own, tensors_of(model)) == []


# Bad input

DEVIATIONS: list[tuple[object, type[Exception], str]] = [
    (1, ValueError, "deviations must be 0 .* or from 2 to 4096, got 1: one deviation has no covariance"),
    (-1, ValueError, "deviations must be .*, got -1"),
    (5000, ValueError, "deviations must be .*, got 5000"),
    (True, TypeError, "deviations must be a whole number, a Spread or None, got True"),
    (2.5, TypeError, "deviations must be .*, got 2.5"),
    ("20", TypeError, "deviations must be .*, got '20'"),
]


@pytest.mark.parametrize(("deviations", "kind", "message"), DEVIATIONS, ids=lambda value: str(value)[:8])
def test_bad_deviations_are_refused(deviations: Any, kind: type[Exception], message: str) -> None:
    model = nn.Linear(2, 2)
    with refused(kind, message, model):
        FusedAveragedModel(model, deviations=deviations)
    with refused(kind, message, model):
        FusedAverages(model, rules={"a": EqualAverage()}, deviations={"a": deviations})


def test_deviations_that_an_average_cannot_have_are_refused() -> None:
    model = nn.Linear(2, 2)
    with refused(ValueError, "deviations must be None with an averaging function of your own", model):
        FusedAveragedModel(model, deviations=2, avg_fn=lambda average, param, count: param)
    with refused(ValueError, "num_averaged must be 0 with deviations, got 3", model):
        FusedAveragedModel(model, deviations=2, num_averaged=3)
    with refused(ValueError, "deviations must be one for all averages|deviations must name|deviations must be", model):
        FusedAverages(model, rules={"a": EqualAverage()}, deviations={"b": 2})
    model.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with refused(ValueError, "deviations must be None for complex parameters.*'phase' of torch.complex64", model):
        FusedAveragedModel(model, deviations=2)
    averaged = FusedAveragedModel(model, deviations=2, include=lambda name, param: not param.is_complex())
    assert averaged.deviations == Spread(2)


CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"index": -1}, ValueError, "index must be from 0 to 2\\^32 - 1, got -1"),
    ({"index": 2**32}, ValueError, "index must be from 0 .*, got 4294967296"),
    ({"index": 1.0}, TypeError, "index must be an int, got 1.0"),
    ({"index": True}, TypeError, "index must be an int, got True"),
    ({"index": nn.Linear(4, 3)}, TypeError, r"index must be an int, got Linear: write sampled_into\(model, index\)$"),
    ({"index": torch.zeros(3)}, TypeError, "index must be an int, got Tensor$"),
    ({"scale": torch.zeros(3)}, TypeError, "scale must be a number or None, got Tensor$"),
    ({"scale": -0.1}, ValueError, "scale must be finite .* >= 0, got -0.1"),
    ({"scale": math.nan}, ValueError, "scale must be finite .*, got nan"),
    ({"scale": math.inf}, ValueError, "scale must be finite .*, got inf"),
    ({"scale": 1e39}, ValueError, "scale must be finite in float32 .*, got 1e\\+39"),
    ({"scale": True}, TypeError, "scale must be a number or None, got True"),
    ({"scale": "1"}, TypeError, "scale must be a number or None, got '1'"),
    ({"seed": 1.5}, TypeError, "seed must be an int, got 1.5"),
    ({"seed": "1"}, TypeError, "seed must be an int, got '1'"),
    ({"model": nn.Linear(4, 2)}, ValueError, "'weight' must have the average's shape"),
    ({"model": nn.Linear(4, 3, bias=False)}, ValueError, "missing 'bias'"),
    ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
]


def refuse_samples(
    averaged: FusedAveragedModel, model: Any, kind: type[Exception], message: str, index: Any = 0, **options: Any
) -> None:
    """Check that neither a sample for a while nor one for good is drawn, and that nothing is left of the try."""
    watched = [averaged, *([model] if isinstance(model, nn.Module) else [])]
    with refused(kind, message, *watched):
        averaged.sampled_into(model, index, **options).__enter__()
    with refused(kind, message, *watched):
        averaged.sample_to(model, index, **options)
    assert averaged._guard.model is None


@pytest.mark.parametrize(("arguments", "kind", "message"), CALLS, ids=lambda value: str(value)[:24])
def test_a_sample_of_bad_arguments_is_refused(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = nn.Linear(4, 3)
    averaged = collected(model)
    refuse_samples(averaged, **{"model": model, "kind": kind, "message": message, **arguments})
    averaged.update_parameters(model)


def test_a_sample_that_there_is_not_is_refused() -> None:
    model = nn.Linear(4, 3)
    refuse_samples(collected(model, deviations=None), model, RuntimeError, "spread, got one without.*deviations=20")
    for updates in (0, 1):
        message = f"two models .*, got {updates}: one has no variance. Call update_parameters.*start=$"
        refuse_samples(collected(model, updates), model, RuntimeError, message)
    averaged = collected(model)
    model.bias = nn.Parameter(torch.zeros(1).expand(3))
    refuse_samples(averaged, model, ValueError, "'bias' of the model must have memory of its own for each element")


def test_a_draw_that_fails_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    averaged = collected(model)
    draw = drawing.draw

    def failing(*args: Any) -> None:
        draw(*args)
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(drawing, "draw", failing)
    with refused(RuntimeError, "the device is lost", model, averaged):
        averaged.sampled_into(model, 0).__enter__()
    monkeypatch.undo()
    sample_of(averaged, model)


# Costs


def test_a_collect_allocates_nothing_and_a_sample_one_copy_of_the_model() -> None:
    # Of the drift, 2^16 elements are looked at; here there are fewer.
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(40)), nn.BatchNorm1d(64))
    averaged = collected(model)
    assert [nbytes for nbytes in memory_events(lambda: averaged.update_parameters(model)) if nbytes > 0] == []
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))

    def sample() -> None:
        with averaged.sampled_into(model, 0):
            pass

    sample()
    assert own <= peak_of(sample) <= own + 2**14
    assert peak_of(lambda: averaged.sample_to(model, 0)) <= 2**14


# A run that is resumed


def test_a_resumed_run_is_one_that_was_not() -> None:
    def run(resumed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(4)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        averaged = FusedAveragedModel(model, deviations=3)
        averaged.attach(optimizer, every=2, start=3)
        data = torch.randn(24, 8, 4)
        for step, batch in enumerate(data):
            if resumed and step == 13:
                kept = [copy.deepcopy(each.state_dict()) for each in (model, optimizer, averaged)]
                model = Net()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
                averaged = FusedAveragedModel(model, deviations=3)
                averaged.attach(optimizer, every=2, start=3)
                for each, state in zip((model, optimizer, averaged), kept, strict=True):
                    each.load_state_dict(state)
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        sample = sample_of(averaged, model)
        return dict(averaged.state_dict()), sample

    for one, other in zip(run(False), run(True), strict=True):
        assert differing(one, other) == []


# Warnings


def stream_of(kind: str) -> Callable[[int], Tensor]:
    direction = torch.randn(3000)
    if kind == "moves":
        return lambda step: 0.1 * step * direction + torch.randn(3000)
    return lambda step: direction + torch.randn(3000)


@pytest.mark.parametrize("columns", [2, 20])
@pytest.mark.parametrize("kind", ["stands", "moves"])
def test_a_stream_that_moves_is_warned_of_once_and_one_that_stands_is_not(kind: str, columns: int) -> None:
    model = nn.ParameterList([torch.zeros(3000)])
    averaged, stream, found = FusedAveragedModel(model, deviations=columns), stream_of(kind), []
    for step in range(60):
        with torch.no_grad():
            model[0].copy_(stream(step))
        averaged.update_parameters(model)
        if step in (1, 2, 5, 20, 40, 59):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                averaged.sample_to(model, 0)
                averaged.sample_to(model, 1)
            found += [str(warning.message) for warning in caught]
    assert len(found) == (kind == "moves"), found
    assert all("the weights were still moving one way" in message for message in found)
    told = r"of the FusedAveragedModel have [1-3]\.\d times its variance, where weights that stand still have about 1 t"
    assert all(re.search(told, message) for message in found)


def test_the_scale_that_a_drift_asks_for_gives_samples_the_variance_of_the_models() -> None:
    model = nn.ParameterList([torch.zeros(3000)])
    averaged, stream, columns = FusedAveragedModel(model, deviations=20), stream_of("moves"), 20
    for step in range(60):
        with torch.no_grad():
            model[0].copy_(stream(step))
        averaged.update_parameters(model)
    with pytest.warns(UserWarning, match="of the FusedAveragedModel have") as caught:
        averaged.sample_to(model, 0)
    (asked,) = re.findall(r"draw with scale=(\S+) or less", str(caught[0].message))
    state = averaged.state_dict()
    variance = state["variance.0"].sum().item()
    squares = sum(value.square().sum().item() for key, value in state.items() if key.startswith("deviation."))
    assert float(asked) < 0.45
    assert float(asked) * (variance + squares / (columns - 1)) == pytest.approx(variance, rel=0.06)


def test_a_copy_keeps_a_sample_and_the_model_keeps_the_mode_of_the_body() -> None:
    model = Net()
    averaged, own = collected(model), tensors_of(model)
    with averaged.sampled_into(model, 3) as sample:
        kept = copy.deepcopy(sample.eval())
    assert not model.training
    assert differing(own, tensors_of(model)) == []
    assert differing(tensors_of(kept), sample_of(averaged, model)) == []
    with averaged.swapped_into(model) as sample:
        assert sample is model
        kept = copy.deepcopy(sample)
    assert differing(tensors_of(kept), sample_of(averaged, model, scale=0)) == []


def test_the_variance_of_a_swag_may_be_used_alone() -> None:
    model, alone = Net(), Net()
    averaged, diagonal = collected(model), FusedAveragedModel(alone, deviations=0)
    state = {key: value for key, value in averaged.state_dict().items() if not key.startswith("deviation.")}
    diagonal.load_state_dict(state)
    together = FusedAverages(
        model, rules={"swag": EqualAverage(), "diagonal": EqualAverage()}, deviations={"swag": 5, "diagonal": 0}
    )
    together["diagonal"].load_state_dict(state)
    assert diagonal.n_averaged == averaged.n_averaged > 1
    assert differing(sample_of(diagonal, alone), sample_of(together["diagonal"], model)) == []
    assert differing(sample_of(diagonal, alone), sample_of(averaged, model)) != []


def test_a_drift_of_no_equal_mean_is_not_warned_of() -> None:
    model = nn.ParameterList([torch.zeros(3000)])
    averaged = FusedAveragedModel(model, deviations=4, rule=ExponentialAverage(0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            with torch.no_grad():
                model[0].normal_()
            averaged.update_parameters(model)
        averaged.sample_to(model, 0)  # deviations of 4.5 variances: the variance weighs the first model most


def test_a_drift_is_estimated_of_params_of_any_size_and_dtype() -> None:
    for numel in (0, 1, 70000):
        spreads = [[torch.full((n,), 2.0), *(torch.full((n,), 3.0, dtype=torch.float16),) * 4] for n in (numel, 5)]
        assert sampling.drift(spreads, 3) == pytest.approx(4.5, rel=1e-5)
    assert sampling.drift([[torch.zeros(5)]], 3) == sampling.drift([[torch.zeros(5), torch.zeros(5)]], 2) == 0.0


def test_deviations_of_each_step_are_warned_of() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="updated at each step are nearly one vector"):
        FusedAveragedModel(model, deviations=4).attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedAveragedModel(model, deviations=4).attach(optimizer, every=5)
        for deviations in (0, None):
            FusedAveragedModel(model, deviations=deviations).attach(torch.optim.SGD(model.parameters(), lr=0.1))
