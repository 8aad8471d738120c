"""The spread of an average in states, files, moves, casts and merges: kept whole, or refused by its first key."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import swafast
from swafast import (
    EqualAverage,
    FusedAveragedModel,
    FusedAverages,
    ShardedAveragedModel,
    ShardedAverages,
    Snapshots,
    Spread,
)
from swafast.average import planes as planes_module
from swafast.average.bindings import Bindings
from swafast.files.averaging import average
from swafast.files.combining import combine_files
from swafast.posthoc import merge, merge_over, merging
from swafast.terms import misfits
from tests.support import EveryKind, bits, differing, refused, require_same, same_bits, tensors_of, update

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Any]

#: By format: the dtype of the model, and of which the further planes are.
FORMATS = {"float32": torch.float32, "exact": torch.bfloat16, "mirrored": torch.float16, "compact": torch.bfloat16}


def made(
    deviations: Any = 3, updates: int = 5, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[EveryKind, FusedAveragedModel]:
    """Return a model, and its average after some updates."""
    model = EveryKind().to(dtype)
    averaged = FusedAveragedModel(model, deviations=deviations, **options)
    update(model, averaged, updates=updates)
    return model, averaged


def copied(state: State) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in state.items()}


def spread_in(state: State) -> State:
    return {key: value for key, value in state.items() if key.startswith(("variance.", "deviation."))}


def mean_in(state: State) -> State:
    return {key: value for key, value in state.items() if key not in spread_in(state)}


def spread_keys(names: list[str], deviations: int) -> set[str]:
    return {f"{plane}.{name}" for plane in Spread(deviations).columns for name in names} | {
        f"variance.{name}" for name in names
    }


def params_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


# Keys and bytes


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_spread_adds_its_own_keys_and_bytes_and_no_bit_of_the_mean_changes(fmt: str) -> None:
    (model, without), (_, averaged) = (
        (torch.manual_seed(1), made(deviations, dtype=FORMATS[fmt], format=fmt, seed=3))[1] for deviations in (None, 3)
    )
    state, names = averaged.state_dict(), params_of(model)
    require_same(mean_in(state), without.state_dict(), "the mean")
    assert spread_in(state).keys() == spread_keys(names, 3)
    assert {state[f"variance.{name}"].dtype for name in names} == {torch.float32}
    assert {state[f"deviation.2.{name}"].dtype for name in names} == {FORMATS[fmt]}
    assert all(state[f"deviation.0.{name}"].shape == param.shape for name, param in model.named_parameters())
    numel = sum(param.numel() for param in model.parameters())
    assert averaged.nbytes - without.nbytes == numel * (4 + 3 * FORMATS[fmt].itemsize)
    assert averaged.deviations == Spread(3)
    assert ", deviations=3, " in repr(averaged)
    exported = averaged.averaged_state_dict()
    require_same(exported, without.averaged_state_dict(), "the export")
    assert exported.keys() == model.state_dict().keys()


def test_without_deviations_nothing_is_there(every_kind: EveryKind) -> None:
    averaged, theirs = FusedAveragedModel(every_kind), AveragedModel(every_kind)
    assert list(averaged.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in averaged.named_children()] == ["module"]
    assert averaged.nbytes == sum(tensor.nbytes for tensor in (*every_kind.parameters(), *every_kind.buffers()))
    assert averaged.deviations is None
    assert "deviations" not in repr(averaged)
    assert "_deviations" not in vars(FusedAveragedModel.__new__(FusedAveragedModel))  # as in pickles from before


def test_the_column_of_the_last_update_is_its_deviation() -> None:
    model, averaged = made(3, updates=5)  # the last one is of 4 models: 4 % 3 = 1
    state = averaged.state_dict()
    assert torch.equal(state["deviation.1.long"], model.long.detach() - state["module.long"])


# Loads


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_state_comes_back_whole_and_goes_on(fmt: str, assign: bool) -> None:
    model, averaged = made(dtype=FORMATS[fmt], format=fmt, seed=3)
    other = FusedAveragedModel(model, deviations=3, format=fmt, seed=3)
    update(model, other)
    state = copied(averaged.state_dict())
    other.load_state_dict(state, assign=assign)
    require_same(other.state_dict(), state)
    update(model, averaged, other, updates=2)
    require_same(other.state_dict(), averaged.state_dict(), "goes on")
    assert differing(state, averaged.state_dict()), "the state shares memory with neither"


#: What the state has, and what the average has; then what the error says.
OTHERS = [
    (3, None, "deviations=None, got deviations=3: 'variance.gapped' is there"),
    (3, 0, "deviations=0, got deviations=3: 'deviation.0.gapped' is there"),
    (3, 2, "deviations=2, got deviations=3: 'deviation.2.gapped' is there"),
    (3, 4, "deviations=4, got deviations=3: 'deviation.3.gapped' is missing"),
    (0, 2, "deviations=2, got deviations=0: 'deviation.0.gapped' is missing"),
    (0, None, "deviations=None, got deviations=0: 'variance.gapped' is there"),
    (None, 0, "deviations=0, got deviations=None: 'variance.gapped' is missing"),
    (None, 2, "deviations=2, got deviations=None: 'variance.gapped' is missing"),
]


@pytest.mark.parametrize(("theirs", "own", "words"), OTHERS)
def test_a_state_with_another_spread_is_refused(theirs: Any, own: Any, words: str, tmp_path: Path) -> None:
    model, source = made(theirs, updates=2)
    target = FusedAveragedModel(model, deviations=own)
    several = FusedAverages(model, rules={"a": EqualAverage(), "b": EqualAverage()}, deviations={"a": theirs, "b": own})
    update(model, target, several, updates=2)
    state = source.state_dict()
    for options in ({}, {"strict": False}, {"assign": True}, {"strict": False, "assign": True}):
        with refused(RuntimeError, f"(?s)loading state_dict for FusedAveragedModel.*{words}", target):
            target.load_state_dict(state, **options)
    swafast.save(source, tmp_path / "file")
    with refused(RuntimeError, words, target):
        swafast.load(target, tmp_path / "file")
    both = {f"{name}.{key}": value for name in ("a", "b") for key, value in state.items()}
    within = words.replace("'variance", "'b.variance").replace("'deviation.", "'b.deviation.")
    with refused(RuntimeError, within, several):
        several.load_state_dict(both)
    sharded = ShardedAveragedModel(model, deviations=own)
    sharded.update_parameters(model)
    before = copied(sharded.full_state_dict())
    for load in (sharded.load_state_dict, sharded.load_full_state_dict):
        with pytest.raises(ValueError, match=words):
            load(state)
    require_same(sharded.full_state_dict(), before)


def test_states_of_torchs_class(every_kind: EveryKind) -> None:
    theirs, averaged = AveragedModel(every_kind), FusedAveragedModel(every_kind, deviations=2)
    update(every_kind, theirs, averaged, updates=3)
    with refused(RuntimeError, "deviations=2, got deviations=None: 'variance.gapped' is missing.*=None", averaged):
        averaged.load_state_dict(theirs.state_dict(), strict=False)
    again = AveragedModel(every_kind)
    missing, unexpected = again.load_state_dict(averaged.state_dict(), strict=False)
    assert (missing, {*unexpected}) == ([], spread_keys(params_of(every_kind), 2))
    require_same(again.state_dict(), mean_in(averaged.state_dict()))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_columns_of_another_dtype_are_cast(before: torch.dtype, after: torch.dtype, assign: bool) -> None:
    model, source = made(Spread(3, before))
    state = copied(source.state_dict())
    target = FusedAveragedModel(model, deviations=Spread(3, after))
    target.load_state_dict(state, assign=assign)
    sharded = ShardedAveragedModel(model, deviations=Spread(3, after))
    sharded.load_full_state_dict(state)
    want = {key: value.to(after) if key.startswith("deviation") else value for key, value in state.items()}
    for got in (target.state_dict(), sharded.full_state_dict()):
        require_same(spread_in(got), spread_in(want))
    with pytest.raises(ValueError, match=r"'deviation.0.gapped'.* must be .*: another format"):
        sharded.load_state_dict(state)
    update(model, target)
    assert target.state_dict()["deviation.2.long"].dtype == after


def test_what_is_left_out_has_no_spread_and_says_so() -> None:
    model, narrow = made(include=lambda name, _: not name.startswith("conv"), updates=2)
    assert not [key for key in spread_in(narrow.state_dict()) if "conv" in key]
    wide = FusedAveragedModel(model, deviations=3)
    update(model, wide, updates=2)
    with refused(RuntimeError, "spread of 'conv.weight', but 'variance.conv.weight' is missing: .* include=", wide):
        wide.load_state_dict(narrow.state_dict(), strict=False)
    with refused(RuntimeError, 'Unexpected key.*"variance.conv.weight"', narrow):
        narrow.load_state_dict(wide.state_dict())
    narrow.load_state_dict(wide.state_dict(), strict=False)
    kept = {key: value for key, value in spread_in(wide.state_dict()).items() if "conv" not in key}
    require_same(spread_in(narrow.state_dict()), kept)


def test_buffers_have_no_spread_and_frozen_params_stay_out() -> None:
    model, averaged = made(use_buffers=True, updates=3)
    assert spread_in(averaged.state_dict()).keys() == spread_keys(params_of(model), 3)
    other = FusedAveragedModel(model, use_buffers=True, deviations=3)
    other.load_state_dict(averaged.state_dict())
    require_same(other.state_dict(), averaged.state_dict())
    model, averaged = made(include=lambda _, param: param.requires_grad, updates=3)
    state = averaged.state_dict(frozen=False)
    assert not [key for key in state if "frozen" in key]
    other = FusedAveragedModel(model, include=lambda _, param: param.requires_grad, deviations=3)
    other.load_state_dict(state)
    require_same(other.state_dict(), averaged.state_dict())


def test_a_wrapped_models_state_has_the_same_planes() -> None:
    model = EveryKind()
    wrapped = nn.DataParallel(model)
    averaged = FusedAveragedModel(wrapped, deviations=2)
    for _ in range(3):
        model.drift()
        averaged.update_parameters(wrapped)
    state = averaged.state_dict()
    assert {"module.module.long", "variance.long", "deviation.1.long"} <= state.keys()
    plain = FusedAveragedModel(model, deviations=2)
    plain.load_state_dict(state)
    require_same(spread_in(plain.state_dict()), spread_in(state))
    averaged.load_state_dict(plain.state_dict())
    require_same(averaged.state_dict(), state)


# Copies, moves and casts


def test_copies_have_the_spread() -> None:
    model, averaged = made()
    several = FusedAverages(model, rules={"a": EqualAverage(), "b": EqualAverage()}, deviations={"b": Spread(2)})
    update(model, several, updates=3)
    assert [each.deviations for each in several.values()] == [None, Spread(2)]
    for source in (averaged, several):
        for copy_of in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
            other = copy_of(source)
            require_same(other.state_dict(), source.state_dict())
            update(model, source, other)
            require_same(other.state_dict(), source.state_dict(), "goes on")
    for _, _, fmt in made(dtype=torch.float64)[1]._each_average():
        assert copy.deepcopy(fmt) is fmt


def test_a_pickle_from_before_has_no_spread() -> None:
    model, averaged = made(None)
    state = averaged.__getstate__()
    del state["_deviations"]
    old = FusedAveragedModel.__new__(FusedAveragedModel)
    old.__setstate__(copy.deepcopy(state))
    assert old.deviations is None
    update(model, averaged, old)
    require_same(old.state_dict(), averaged.state_dict())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("deviations", [Spread(3), Spread(3, torch.bfloat16)])
def test_a_cast_keeps_the_variance_and_casts_columns_with_the_param(cast: str, deviations: Spread) -> None:
    model, averaged = made(deviations)
    before = copied(averaged.state_dict())
    model, averaged = getattr(model, cast)(), getattr(averaged, cast)()
    after = averaged.state_dict()
    wanted = deviations.dtype or {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[cast]
    assert spread_in(after).keys() == spread_in(before).keys()
    for key, value in spread_in(before).items():
        assert same_bits(after[key], value if key.startswith("variance") else value.to(wanted)), key
    update(model, averaged)
    again = FusedAveragedModel(model, deviations=deviations)
    again.load_state_dict(averaged.state_dict())
    require_same(again.state_dict(), averaged.state_dict())


def test_moves_take_the_spread_along() -> None:
    model, averaged = made()
    state = copied(averaged.state_dict())
    averaged.share_memory()
    assert all(tensor.is_shared() for tensor in averaged.state_dict().values() if tensor.numel())
    require_same(averaged.state_dict(), state)
    model.tied = nn.Linear(7, 11, bias=False)  # torch parts tied params that it moves to meta
    averaged = FusedAveragedModel(model, deviations=3)
    update(model, averaged, updates=4)
    state = copied(averaged.state_dict())
    averaged.to("meta")
    assert {tensor.device.type for tensor in averaged.state_dict().values()} == {"meta"}
    assert spread_in(averaged.state_dict()).keys() == spread_in(state).keys()
    with pytest.raises(RuntimeError, match=r"deviations=3, got deviations=None: 'variance.gapped' is missing"):
        averaged.load_state_dict(mean_in(state), assign=True)
    averaged.to_empty(device="cpu")
    assert int(averaged.n_averaged) == 0
    averaged.load_state_dict(state)
    require_same(averaged.state_dict(), state)
    averaged.to_empty(device="cpu")
    update(model, averaged, updates=2)
    fresh = FusedAveragedModel(model, deviations=3)
    fresh.load_state_dict(averaged.state_dict())
    samples = []
    for each in (averaged, fresh):
        each.sample_to(model, 0)
        samples.append(tensors_of(model))
    require_same(*samples, "no column is drawn from that no update has written")
    assert all(value.isfinite().all() for value in samples[0].values() if value.is_floating_point())


def test_what_cannot_have_a_spread_is_refused() -> None:
    _, averaged = made()
    words = r"deviations must be None for complex averages, got Spread\(3\) for 'gapped'"
    with warnings.catch_warnings(), refused(ValueError, words, averaged):
        warnings.simplefilter("ignore")  # torch's, of complex modules
        averaged.to(torch.complex64)
    with refused(AttributeError, r"deviations must stay Spread\(3\), got 5: construct another average", averaged):
        averaged.deviations = 5  # type: ignore[assignment]
    sharded = ShardedAveragedModel(nn.Linear(2, 2), deviations=2)
    with pytest.raises(AttributeError, match=r"deviations must stay Spread\(2\), got None"):
        sharded.deviations = None  # type: ignore[assignment]


def test_a_grown_model_begins_with_a_spread_of_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    averaged = FusedAveragedModel(model, deviations=2)
    for step in range(4):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(step + torch.rand(param.shape))
        averaged.update_parameters(model)
    before = copied(averaged.state_dict())
    grown = nn.Sequential(model[0], nn.Linear(4, 3), nn.Linear(3, 1))
    assert averaged.adapt_to(grown) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    after = averaged.state_dict()
    assert spread_in(after).keys() == spread_keys(params_of(grown), 2)
    for plane in ("variance", "deviation.0", "deviation.1"):
        assert same_bits(after[f"{plane}.0.weight"], before[f"{plane}.0.weight"])
        assert same_bits(after[f"{plane}.1.weight"][:2], before[f"{plane}.1.weight"])
        assert not after[f"{plane}.1.weight"][2:].any()
        assert not after[f"{plane}.2.weight"].any()
    averaged.update_parameters(grown)
    assert averaged.state_dict()["variance.2.bias"].shape == (1,)
    assert averaged.deviations == Spread(2)


def test_weights_that_are_loaded_without_a_spread_are_told_what_to_do() -> None:
    model = EveryKind()
    averaged = FusedAveragedModel(model, deviations=2)
    with pytest.raises(RuntimeError, match=r"call update_parameters first or load a state$"):
        averaged.copy_to(model)
    averaged.module.load_state_dict(EveryKind().state_dict())  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="to go on from n models, load a state, which has their variance"):
        averaged.update_parameters(model)


def test_an_attached_average_runs_beside_the_forward_as_in_it() -> None:
    states = []
    for options in ({}, {"overlap": True}, {"offload": "cpu"}):
        torch.manual_seed(3)
        model = nn.Linear(5, 3)
        averaged = FusedAveragedModel(model, deviations=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        averaged.attach(optimizer, every=2, **options)  # type: ignore[arg-type]
        for step in range(8):
            for param in model.parameters():
                param.grad = torch.full_like(param, step + 1.0)
            optimizer.step()
        states.append(averaged.state_dict())
    assert int(states[0]["n_averaged"]) == 4
    for state in states[1:]:
        require_same(state, states[0])


# Files and snapshots


def test_a_saved_file_comes_back_and_a_damaged_column_is_found(tmp_path: Path) -> None:
    model, averaged = made()
    path = tmp_path / "file"
    swafast.save(averaged, path)
    other = FusedAveragedModel(model, deviations=3)
    swafast.load(other, path)
    require_same(other.state_dict(), averaged.state_dict())
    for key in ("variance.long", "deviation.1.long"):
        whole = path.read_bytes()
        at = whole.index(bits(averaged.state_dict()[key]).numpy().tobytes())
        (tmp_path / "bad").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with refused(ValueError, f"the values of '{key}' have another checksum", other):
            swafast.load(other, tmp_path / "bad")


def test_snapshots_store_the_means_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    _, averaged = made()
    torch.manual_seed(1)
    _, without = made(None)
    for name, each in (("with", averaged), ("without", without)):
        Snapshots(tmp_path / name).save(each)
    states = [Snapshots(tmp_path / name).synthesize(EqualAverage()) for name in ("with", "without")]
    require_same(states[0], states[1])
    stored = [sum(file.stat().st_size for file in (tmp_path / name).rglob("*.distcp")) for name in ("with", "without")]
    assert stored[0] == stored[1]


# Merges


class Layers(nn.Module):
    """Two params of one name each, one tied, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.tied = nn.Linear(6, 5, bias=False)
        self.tied.weight = self.one.weight


def run(seed: int, updates: int, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, list[State]]:
    """Return an average of these many models, and the models' params in float64."""
    generator = torch.Generator().manual_seed(seed)
    model, models = Layers().to(dtype), []
    averaged = FusedAveragedModel(model, **options)
    centre = torch.randn(1, generator=generator)
    for _ in range(updates):
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(centre + 0.1 * torch.randn(param.shape, generator=generator))
        averaged.update_parameters(model)
        models.append({name: param.detach().double().clone() for name, param in model.named_parameters()})
    return averaged, models


def variances(models: list[State]) -> State:
    return {name: torch.stack([model[name] for model in models]).var(0, correction=0) for name in models[0]}


def require_variance(state: State, models: list[State], tolerance: float = 3e-6) -> None:
    for name, want in variances(models).items():
        assert torch.allclose(state[f"variance.{name}"].double(), want, rtol=tolerance, atol=0), name


@pytest.mark.parametrize("fmt", ["float32", "exact", "compensated"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_combined_files_have_the_variance_of_all_models(fmt: str, suffix: str, tmp_path: Path) -> None:
    dtype, tolerance = FORMATS.get(fmt, torch.float32), 3e-6
    runs = [run(seed, n, dtype, format=fmt, deviations=k) for seed, n, k in ((1, 4, 2), (2, 7, 3), (3, 2, 0))]
    paths = []
    for index, (averaged, _) in enumerate(runs):
        paths.append(tmp_path / f"{index}{suffix}")
        swafast.save(averaged, paths[-1]) if suffix != ".pt" else torch.save(averaged.state_dict(), paths[-1])
    done = combine_files(paths[::-1], tmp_path / f"out{suffix}")
    assert done.counts == {"": 13}
    assert (len(done.dropped) > 0, all(key.startswith("deviation.") for key in done.dropped)) == (True, True)
    merged = FusedAveragedModel(Layers().to(dtype), format=fmt, deviations=0)
    if suffix == ".pt":
        merged.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    else:
        swafast.load(merged, tmp_path / f"out{suffix}")
    require_variance(merged.state_dict(), [model for _, models in runs for model in models], tolerance)
    several = FusedAveragedModel(Layers().to(dtype), format=fmt, deviations=3)
    with refused(RuntimeError, "deviations=3, got deviations=0: 'deviation.0.one.weight' is missing", several):
        several.load_state_dict(merged.state_dict())


def test_a_window_has_the_variance_of_its_models(tmp_path: Path) -> None:
    (earlier, _), (later, models) = run(1, 3, deviations=2), run(1, 9, deviations=2)
    for name, averaged in (("3", earlier), ("9", later)):
        torch.save(averaged.state_dict(), tmp_path / f"{name}.pt")
    combine_files([tmp_path / "3.pt", tmp_path / "9.pt"], tmp_path / "out.pt", window=True)
    require_variance(torch.load(tmp_path / "out.pt", weights_only=True), models[3:], 1e-4)


def test_a_variance_cut_by_rounding_is_not_negative() -> None:
    means = [torch.full((3,), value) for value in (1.0, 1.0 + 1e-7)]
    found = merging.pooled_variance([torch.full((3,), 2e-16), torch.zeros(3)], means, means[1].double(), [-5, 6])
    assert (found == 0).all()


def test_a_variance_in_one_file_alone_or_not_finite_is_refused(tmp_path: Path) -> None:
    for name, deviations in (("with", 2), ("without", None), ("bad", 2)):
        averaged, _ = run(1, 3, deviations=deviations)
        state = averaged.state_dict()
        if name == "bad":
            state["variance.one.bias"][1] = float("nan")
        torch.save(state, tmp_path / f"{name}.pt")
    with pytest.raises(
        ValueError, match=r"without.pt must have a variance where .*with.pt has one, got 'variance.norm"
    ):
        combine_files([tmp_path / "with.pt", tmp_path / "without.pt"], tmp_path / "out.pt")
    with pytest.raises(ValueError, match=r"bad.pt must be finite, got a NaN or an infinity in 'variance.one.bias'"):
        combine_files([tmp_path / "with.pt", tmp_path / "bad.pt"], tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_a_worker_keeps_the_variance_and_drops_the_deviations() -> None:
    averaged, models = run(1, 5, deviations=3)
    model = Layers()
    several = FusedAverages(model, rules={"a": EqualAverage(), "b": EqualAverage()}, deviations={"a": 2, "b": None})
    sharded = ShardedAveragedModel(model, deviations=2)
    shards = ShardedAverages(model, rules={"a": EqualAverage()}, deviations=2)
    for each in (several, sharded, shards):
        each.update_parameters(model)
        each.update_parameters(model)
    before = copied(averaged.state_dict())
    columns = [each._planes["one.weight"][-1] for each in (sharded, shards["a"])]
    columns.append(several["a"].get_buffer("deviation.1.one.weight"))
    memory = [weakref.ref(column.untyped_storage()) for column in columns]
    for each in (averaged, several, sharded, shards):
        merge_over(each)
    after = averaged.state_dict()
    assert [key for key in before if key not in after] == [key for key in before if key.startswith("deviation.")]
    require_same(after, {key: before[key] for key in after})
    require_variance(after, models)
    assert [each.deviations for each in (averaged, sharded, *several.values())] == [Spread(0)] * 3 + [None]
    assert [key for key in (*sharded.state_dict(), *several.state_dict()) if "deviation." in key] == []
    for each in (averaged, several, sharded, shards):
        each.update_parameters(model)
    del columns
    gc.collect()
    assert [each() for each in memory] == [None] * 3, "their memory is free"
    with averaged.sampled_into(model, 0), pytest.raises(RuntimeError):
        averaged.update_parameters(model)
    again = FusedAveragedModel(model, deviations=0)
    again.load_state_dict(averaged.state_dict())
    samples = []
    for each in (averaged, again):
        each.sample_to(model, 7)
        samples.append(tensors_of(model))
    require_same(samples[0], samples[1], "drawn as SWAG-diagonal")
    sharded.sample_to(model, 0)


def test_single_planes_are_not_summed(tmp_path: Path) -> None:
    states = [run(seed, 3, deviations=2)[0].state_dict() for seed in (1, 2)]
    words = r"states\[0\] must be a model's own state, got one of an average with 'variance.one.weight' beside it"
    with pytest.raises(
        ValueError, match="states.0. must be a model's own state, got .*'variance.norm.weight'|" + words
    ):
        merge(states)
    exact = run(1, 3, torch.bfloat16)[0].state_dict()
    with pytest.raises(ValueError, match="got one of an average with 'remainder"):
        merge([exact])
    paths = []
    for index, state in enumerate(states):
        paths.append(tmp_path / f"{index}.pt")
        torch.save({"averaged": state, "step": index}, paths[-1])
    with pytest.raises(ValueError, match=r"with a spread in 'variance\..*swafast combine, or .* ends in 'module'"):
        average(paths, tmp_path / "out.pt", key="averaged")
    average(paths, tmp_path / "out.pt", key="averaged.module")
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.allclose(out["one.bias"], (states[0]["module.one.bias"] + states[1]["module.one.bias"]) / 2)


# Planted bugs, each with the test that must find it


PLANTS: dict[str, tuple[Any, str, Any, Callable[[Path], None]]] = {
    "assigned columns are not cast": (
        planes_module, "_cast_spread", lambda *_: None,
        lambda _: test_columns_of_another_dtype_are_cast(torch.float32, torch.bfloat16, True),
    ),
    "whole columns are not cast": (
        planes_module, "_cast_spread", lambda *_: None,
        lambda _: test_columns_of_another_dtype_are_cast(torch.float32, torch.bfloat16, False),
    ),
    "another spread is loaded": (
        misfits, "of_spreads", lambda *_: "",
        lambda path: test_a_state_with_another_spread_is_refused(*OTHERS[0], path),
    ),
    "a cast forgets the spread": (
        planes_module, "with_spread", lambda fmt, *_: fmt,
        lambda _: test_a_cast_keeps_the_variance_and_casts_columns_with_the_param("half", Spread(3)),
    ),
    "variances of one mean alone": (
        "swafast.files.combining", "pooled_variance",
        lambda each, means, mean, counts: sum(v.double() * n for v, n in zip(each, counts, strict=True)) / sum(counts),
        lambda path: test_combined_files_have_the_variance_of_all_models("float32", ".pt", path),
    ),
    "deviations stay in a combined file": (
        "swafast.files.combining", "_without_deviations", lambda each: each,
        lambda path: test_combined_files_have_the_variance_of_all_models("float32", ".pt", path),
    ),
    "an old plan goes on": (
        Bindings, "plan_anew", lambda self: None, lambda _: test_a_worker_keeps_the_variance_and_drops_the_deviations(),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("module", "name", "value", "test"), PLANTS.values(), ids=PLANTS)
def test_planted_bugs_are_found(
    module: Any, name: str, value: Any, test: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*((f"{module}.{name}", value) if isinstance(module, str) else (module, name, value)))
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError, RuntimeError)):
        test(tmp_path)
