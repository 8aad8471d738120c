"""States and casts: no precision is lost, and after a failure nothing has changed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from swafast import FusedAveragedModel
from tests.support import EveryKind, differing, drift, refused, tensors_of, trained, update, updated_once

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def params_of(average: FusedAveragedModel) -> dict[str, torch.Tensor]:
    state = average.averaged_state_dict()
    return {name: state[name] for name, _ in average.module.named_parameters()}


def test_keys_of_each_format(every_kind: EveryKind) -> None:
    theirs = set(AveragedModel(every_kind).state_dict())
    params = {name for name, _ in every_kind.named_parameters()}
    assert set(trained(every_kind, torch.float32).state_dict()) == theirs
    exact = FusedAveragedModel(every_kind.bfloat16()).state_dict()
    assert set(exact) == theirs | {f"remainder.{name}" for name in params}
    assert all(exact[f"remainder.{name}"].dtype == torch.int16 for name in params)
    mirrored = FusedAveragedModel(every_kind.half()).state_dict()
    assert set(mirrored) == theirs | {f"average.{name}" for name in params}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("assign", [False, True])
def test_round_trip_and_going_on(every_kind: EveryKind, dtype: torch.dtype, assign: bool) -> None:
    average = trained(every_kind, dtype)
    other = FusedAveragedModel(every_kind)
    other.load_state_dict(copy.deepcopy(average.state_dict()), assign=assign)
    assert differing(params_of(other), params_of(average)) == []
    update(every_kind, average, other, updates=2)
    assert other.n_averaged == 6
    assert differing(other.averaged_state_dict(), average.averaged_state_dict()) == []


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", [*DTYPES, torch.float64])
def test_a_state_of_another_format_keeps_its_precision(
    every_kind: EveryKind, source: torch.dtype, target: torch.dtype
) -> None:
    average = trained(every_kind, source)
    other = FusedAveragedModel(every_kind.to(target))
    other.load_state_dict(average.state_dict())
    expected = {name: value.to(torch.promote_types(value.dtype, target)) for name, value in params_of(average).items()}
    assert differing(params_of(other), expected) == []
    assert other.module.long.dtype == target


FORMATS = [None, "float32", "exact", "mirrored", "compact", "compensated"]


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_a_model_of_many_dtypes_moves_between_formats(source: str | None, target: str | None) -> None:
    model = nn.Sequential(nn.Linear(3, 3).bfloat16(), nn.LayerNorm(3), nn.Linear(3, 3).half())
    average = updated_once(model, format=source)
    other = FusedAveragedModel(model, format=target)
    other.load_state_dict(average.state_dict())
    lossy = "compact" in (source, target)
    for name, value in average.averaged_state_dict().items():
        torch.testing.assert_close(other.averaged_state_dict()[name], value, rtol=2**-16 if lossy else 0, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_what_no_state_holds_has_no_planes_in_it(format: str | None) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("passing", torch.randn(3), persistent=False)
    model[0].register_buffer("staying", torch.randn(3))
    average = updated_once(model, use_buffers=True, format=format)
    assert [key for key in average.state_dict() if "passing" in key] == []
    for state in (FusedAveragedModel(model, use_buffers=True).state_dict(), AveragedModel(model).state_dict()):
        before = average.averaged_state_dict()
        average.load_state_dict(state)
        after = average.averaged_state_dict()
        assert after.keys() == before.keys()
    FusedAveragedModel(model, use_buffers=True).load_state_dict(average.state_dict())
    with average.swapped_into(model):
        assert model.get_buffer("passing").isfinite().all()


@pytest.mark.parametrize("assign", [False, True])
def test_states_go_both_ways_with_torchs_class(every_kind: EveryKind, assign: bool) -> None:
    ours, theirs = trained(every_kind, torch.float32), AveragedModel(every_kind)
    theirs.load_state_dict(ours.state_dict(), assign=assign)
    # torch unties here, ours does not.
    assert theirs.module.tied.weight is not theirs.module.linear.weight or not assign
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    assert theirs.n_averaged == 4
    back = FusedAveragedModel(every_kind)
    back.load_state_dict(copy.deepcopy(theirs.state_dict()), assign=assign)
    assert differing(tensors_of(back), tensors_of(ours)) == []


def test_a_state_without_remainders_zeroes_them(every_kind: EveryKind) -> None:
    theirs = AveragedModel(every_kind.bfloat16())
    ours = trained(every_kind, torch.bfloat16)
    assert any(tensor.any() for key, tensor in ours.state_dict().items() if key.startswith("remainder."))
    ours.load_state_dict(theirs.state_dict())
    assert not any(tensor.any() for key, tensor in ours.state_dict().items() if key.startswith("remainder."))


def _drop_a_key(state: OrderedDict) -> None:
    del state["module.long"]


SPOILED: dict[str, Callable[[OrderedDict], object]] = {
    "a key less": _drop_a_key,
    "a remainder less": lambda state: state.pop("remainder.long"),
    "a key more": lambda state: state.update({"module.surplus": torch.zeros(1)}),
    "a remainder more": lambda state: state.update({"remainder.surplus": torch.zeros(1, dtype=torch.int16)}),
    # torch 2.6 takes the first of a vector for a scalar.
    "another shape": lambda state: state.update({"module.scalar": torch.zeros(2, 2)}),
    "a remainder's shape": lambda state: state.update({"remainder.long": torch.zeros(3, dtype=torch.int16)}),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize("assign", [False, True])
def test_a_failed_load_changes_nothing(
    every_kind: EveryKind, spoil: Callable[[OrderedDict], object], assign: bool
) -> None:
    average = trained(every_kind, torch.bfloat16)
    state = copy.deepcopy(trained(EveryKind(), torch.bfloat16).state_dict())
    spoil(state)
    with refused(RuntimeError, r"long|surplus|scalar", average):
        average.load_state_dict(state, assign=assign)


def test_a_load_that_is_not_strict_takes_what_is_there(every_kind: EveryKind) -> None:
    average = trained(every_kind, torch.bfloat16)
    state = copy.deepcopy(average.state_dict())
    for key in ("remainder.long", "module.scalar", "remainder.scalar"):
        del state[key]
    other = trained(EveryKind(), torch.bfloat16)  # with remainders of its own
    result = other.load_state_dict(state, strict=False)
    assert "module.scalar" in result.missing_keys
    assert torch.equal(other.averaged_state_dict()["long"], average.module.long.float())
    assert torch.equal(other.averaged_state_dict()["linear.weight"], average.averaged_state_dict()["linear.weight"])


def test_an_average_inside_another_module_loads_with_it() -> None:
    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 3).bfloat16()
            self.ema = FusedAveragedModel(self.net)

    trainer, other = Trainer(), Trainer()
    for _ in range(3):
        drift(trainer.net)
        trainer.ema.update_parameters(trainer.net)
    other.load_state_dict(trainer.state_dict())
    assert differing(params_of(other.ema), params_of(trainer.ema)) == []
    plain = {key: value for key, value in trainer.state_dict().items() if ".remainder." not in key}
    other.load_state_dict(plain)
    assert torch.equal(params_of(other.ema)["weight"], trainer.ema.module.weight.float())


@pytest.mark.parametrize("start", DTYPES)
def test_casts_lose_nothing(every_kind: EveryKind, start: torch.dtype) -> None:
    average = trained(every_kind, start)
    truth = params_of(average)
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float32):
        average.to(dtype)
        assert average.module.long.dtype == dtype
        assert differing(params_of(average), truth) == []
    assert differing({name: p.detach() for name, p in average.module.named_parameters()}, truth) == []
    assert set(average.state_dict()) == set(AveragedModel(every_kind).state_dict())
    average.double()
    assert torch.equal(average.module.long, truth["long"].double())
    average.update_parameters(every_kind)


def test_an_inner_cast_behind_our_back_is_taken_up(every_kind: EveryKind) -> None:
    average = trained(every_kind, torch.float32)
    for cast in ("bfloat16", "half", "float", "double"):
        getattr(average.module, cast)()
        every_kind.drift()
        expected = torch.lerp(
            average.module.long.detach().double(), every_kind.long.detach().double(), 1 / (int(average.n_averaged) + 1)
        )
        average.update_parameters(every_kind)
        torch.testing.assert_close(average.averaged_state_dict()["long"].double(), expected, rtol=1e-6, atol=1e-7)


def test_channels_last_survives_every_format(every_kind: EveryKind) -> None:
    for dtype in DTYPES:
        average = trained(every_kind, dtype)
        assert average.module.conv.weight.stride() == every_kind.conv.weight.stride()


def test_averaged_state_dict_is_for_the_model_itself(every_kind: EveryKind) -> None:
    average = trained(every_kind, torch.bfloat16)
    state = average.averaged_state_dict()
    assert list(state) == list(every_kind.state_dict())
    assert state["long"].dtype == torch.float32
    assert state["norm.num_batches_tracked"].dtype == torch.int64
    fresh = EveryKind()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.long, state["long"])
    half = average.averaged_state_dict(torch.float16)
    assert half["long"].dtype == torch.float16
    assert half["mask"].dtype == torch.bool
    state["long"].zero_()
    assert average.averaged_state_dict()["long"].any()
    with pytest.raises(ValueError, match=r"^dtype must be a floating"):
        average.averaged_state_dict(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_to_casts_the_averages(every_kind: EveryKind, dtype: torch.dtype) -> None:
    average = trained(every_kind, dtype)
    for target in (dtype, torch.float32):
        model = EveryKind().to(target)
        average.copy_to(model)
        expected = {name: value.to(target) for name, value in params_of(average).items()}
        assert differing(dict(model.named_parameters()), expected) == []
        assert torch.equal(model.norm.running_mean.float(), every_kind.norm.running_mean.float())


def test_modules_that_look_at_values_while_loading_still_load() -> None:
    class Scaled(nn.Linear):
        def get_extra_state(self) -> torch.Tensor:
            return torch.tensor(7)

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.extra = int(state)

        def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
            assert float(state_dict[prefix + "bias"][0]) == 3.0
            super()._load_from_state_dict(state_dict, prefix, *args)

    model = Scaled(2, 2)
    nn.init.constant_(model.bias, 3.0)
    average, other = FusedAveragedModel(model), FusedAveragedModel(model)
    other.load_state_dict(average.state_dict())
    assert other.module.extra == 7


def test_checkpoint_wrappers_do_not_hide_a_state() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped = nn.Sequential(checkpoint_wrapper(nn.Linear(3, 3))).bfloat16()
    average = FusedAveragedModel(wrapped)
    plain = AveragedModel(wrapped)
    average.load_state_dict(plain.state_dict())
    average.load_state_dict(average.state_dict())
    single = FusedAveragedModel(copy.deepcopy(wrapped).float())
    average.load_state_dict(single.state_dict())
    single.load_state_dict(average.state_dict())


def test_torchs_checkpoint_library_saves_and_loads(every_kind: EveryKind, tmp_path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    for dtype in DTYPES:
        average = trained(every_kind, dtype)
        state = get_model_state_dict(average)
        dcp.save(state, checkpoint_id=tmp_path / str(dtype))
        other = FusedAveragedModel(every_kind)
        target = get_model_state_dict(other)
        dcp.load(target, checkpoint_id=tmp_path / str(dtype))
        set_model_state_dict(other, target)
        assert differing(params_of(other), params_of(average)) == []
