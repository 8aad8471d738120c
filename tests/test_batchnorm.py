"""`update_bn`: the moments of the whole data set; nothing else in the model changes."""

from __future__ import annotations

import copy
import types
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from swafast import (
    EqualAverage,
    FusedAveragedModel,
    FusedAverages,
    ShardedAveragedModel,
    ShardedAverages,
    update_bn,
)
from swafast.loop.attach import Attachable
from swafast.optim import batchnorm, moments
from swafast.optim.watch import Layer, Watch
from swafast.sharded.parts.holdings import is_sharded
from swafast.terms.names import unwrap
from tests.ranks import run_ranks
from tests.support import Held, differing, tensors_of

SIZES = (64, 3, 17, 128, 2)  # of batches: 214 samples, a mean weighed alike is far off


class Net(nn.Module):
    """A batch norm of the inputs, whose statistics are known, and one after it."""

    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first if first is not None else nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 3)
        self.second = nn.BatchNorm1d(3, momentum=None)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.second(self.linear(self.first(x * scale)))


def batches(sizes: Sequence[int] = SIZES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Make batches whose means lie far apart."""
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 4, generator=generator) * (1 + index) + 10 * index).to(dtype)
        for index, size in enumerate(sizes)
    ]


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], list[object]]:
    """Copy what a failed call must leave as it was."""
    flags = [(m.training, getattr(m, "momentum", None), len(m._forward_pre_hooks)) for m in model.modules()]
    return tensors_of(model), flags


def require_as_before(model: nn.Module, before: tuple[dict[str, Tensor], list[object]]) -> None:
    tensors, flags = state_of(model)
    assert differing(tensors, before[0]) == []
    assert flags == before[1]


def require_statistics(layer: Any, inputs: Tensor, tolerance: float = 1e-5) -> None:
    """Compare a layer with the mean and variance of ``inputs``, (samples, channels, ...), in float64."""
    over = [dim for dim in range(inputs.ndim) if dim != 1]
    variance, mean = torch.var_mean(inputs.double(), over)
    for got, want in ((layer.running_mean, mean), (layer.running_var, variance)):
        assert ((got.double() - want).abs() / want.abs().clamp(min=1e-3)).max() <= tolerance


# What the statistics are


@pytest.mark.parametrize("sizes", [SIZES, [214], [107, 107], [200, 14], [2] * 107], ids=len)
def test_unequal_batches_give_the_statistics_of_the_whole_set(sizes: Sequence[int]) -> None:
    model, whole = Net(), torch.cat(batches())
    update_bn(whole.split(sizes), model)
    require_statistics(model.first, whole)
    assert model.first.num_batches_tracked == model.second.num_batches_tracked == len(sizes)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("size", [50, 10])
def test_one_batch_and_means_of_equal_ones_are_those_of_torchs_function(scale: float, size: int) -> None:
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    loader = (scale * torch.randn(50, 4) + 1.0).split(size)
    update_bn(loader, ours)
    swa_utils.update_bn(loader, theirs)
    for (name, got), want in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        if size == 50 or not name.endswith("running_var"):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(
    "loader",
    [batches(dtype=torch.bfloat16), [torch.randn(size, 4) + 1e4 for size in (100, 7)]],
    ids=["half inputs, as under autocast", "a large mean"],
)
def test_statistics_in_float32_are_as_exact_as_they_can_be(loader: list[Tensor]) -> None:
    layer = nn.BatchNorm1d(4)
    update_bn(loader, layer)
    require_statistics(layer, torch.cat(loader))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm1d(4), (4, 7)),
        (nn.BatchNorm2d(4, momentum=None), (4, 5, 3)),
        (nn.BatchNorm3d(4, affine=False), (4, 2, 3, 2)),
        (nn.SyncBatchNorm(4), (4, 5, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_kind_of_layer(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    loader = [(torch.randn(size, *shape) + index).to(dtype) for index, size in enumerate((9, 2, 30))]
    kept = copy.deepcopy(layer).to(dtype)
    update_bn(loader, kept)
    require_statistics(kept, torch.cat(loader), 2**-8 if dtype == torch.bfloat16 else 1e-5)


def test_a_layer_that_runs_several_times_counts_each_of_them() -> None:
    layer = nn.BatchNorm1d(4)
    twice = [torch.randn(6, 4), torch.randn(5, 4) + 3]

    def call(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        model(2 * batch)

    update_bn(twice, layer, call=call)
    require_statistics(layer, torch.cat([*twice, *(2 * batch for batch in twice)]))
    assert layer.num_batches_tracked == 4


# Models


def test_flags_and_momenta_of_all_modules_stay() -> None:
    model = Net()
    model.linear.eval()
    model.second.eval()  # frozen by the user: torch's function would leave it in training
    before = state_of(model)[1]
    update_bn(batches(), model)
    assert state_of(model)[1] == before
    model.eval()
    before = state_of(model)[1]
    update_bn(batches(), model)
    assert state_of(model)[1] == before


def test_nothing_runs_without_statistics_to_take() -> None:
    def loader() -> Iterator[Tensor]:
        raise AssertionError("the loader was asked")
        yield

    update_bn(loader(), nn.Linear(2, 2))
    update_bn(loader(), nn.BatchNorm1d(2, track_running_stats=False))


def test_a_layer_out_of_reach_keeps_its_own() -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm1d(4), "other": nn.BatchNorm1d(4)})
    model["other"].running_mean.fill_(3.0)
    update_bn(batches(), model, call=lambda model, batch: model["used"](batch))
    require_statistics(model["used"], torch.cat(batches()))
    assert model["other"].running_mean.tolist() == [3.0] * 4


@pytest.mark.parametrize("format", [None, "exact", "compact", "compensated"])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_takes_them(format: str | None, use_buffers: bool) -> None:
    dtype = torch.bfloat16 if format in ("exact", "compact") else torch.float32
    model = Net().to(dtype)
    averaged = FusedAveragedModel(model, format=format, use_buffers=use_buffers)
    averaged.update_parameters(model)
    update_bn(batches(dtype=dtype), averaged)
    first: Any = averaged.module.first
    tolerance = 1e-5 if first.running_mean.dtype == torch.float32 else 2**-8
    require_statistics(first, torch.cat(batches(dtype=dtype)), tolerance)
    exported = averaged.averaged_state_dict()
    torch.testing.assert_close(exported["first.running_var"].float(), first.running_var.float(), rtol=2**-8, atol=0)


def test_a_compiled_model_is_run_as_it_was_written() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    compiled(batches()[0])  # compiled without the hooks
    before = model.second.num_batches_tracked.item()
    update_bn(batches(), compiled)
    require_statistics(model.first, torch.cat(batches()))
    assert before == 1
    assert model.second.num_batches_tracked == len(SIZES)


# Batches


class Named(NamedTuple):
    x: Tensor
    label: int


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, 1),
        lambda x: [x, None],
        lambda x: {"x": x},
        lambda x: {"x": x / 2, "scale": 2.0},
        lambda x: Named(x, 1),
    ],
    ids=["tensor", "tuple", "list", "dict", "keywords", "named tuple"],
)
@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_batches_of_many_kinds(wrap: Callable[[Tensor], Any], device: Any) -> None:
    model = Net()
    update_bn(map(wrap, batches()), model, device)
    require_statistics(model.first, torch.cat(batches()))


def test_batches_are_moved_with_all_they_hold() -> None:
    seen: list[Any] = []
    batch = {"a": torch.zeros(2), "b": [torch.zeros(2), (Named(torch.zeros(2), 1),)], "c": "text"}
    model = nn.BatchNorm1d(4)
    update_bn([batch], model, "meta", call=lambda model, batch: seen.append(batch) or model(torch.randn(3, 4)))
    (got,) = seen
    assert got["a"].is_meta
    assert got["b"][0].is_meta
    assert isinstance(got["b"][1][0], Named)
    assert got["b"][1][0].x.is_meta
    assert got["c"] == "text"


def test_progress_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    update_bn(batches(), Net())
    assert capsys.readouterr() == ("", "")
    update_bn(batches(), Net(), progress=True)
    assert "BatchNorm" in capsys.readouterr().out


# What may be amiss


def breaking_off(error: BaseException) -> Iterator[Tensor]:
    yield from batches()[:2]
    raise error


@pytest.mark.parametrize(
    ("loader", "kind", "message"),
    [
        (lambda: [], ValueError, "loader must give at least one batch, got none"),
        (
            lambda: [*batches(), torch.zeros(5, 3)],
            RuntimeError,
            r"for batch 5, a tensor \(5, 3\) of torch.float32; call=",
        ),
        (lambda: [batches()[0][:1]], ValueError, "Expected more than 1 value per channel"),
        (lambda: [{"y": torch.zeros(2, 4)}], TypeError, "for batch 0, a dict with 'y'; call="),
        (lambda: [()], ValueError, "loader must give batches with an input, got an empty tuple"),
        (lambda: ["text"], TypeError, "for batch 0, a str; call="),
        (lambda: breaking_off(OSError("no such file")), OSError, "no such file"),
        (lambda: breaking_off(KeyboardInterrupt("now")), KeyboardInterrupt, "now"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_what_fails_leaves_the_model_as_it_was(
    loader: Callable[[], Any], kind: type[BaseException], message: str, training: bool
) -> None:
    model = Net().train(training)
    update_bn(batches(), model)
    before = state_of(model)
    with pytest.raises(kind, match=message):
        update_bn(loader(), model)
    require_as_before(model, before)


class CustomError(RuntimeError): ...


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mine"),
        CustomError("timed out"),
        NotImplementedError(),
        LookupError("mine"),
        OverflowError("mine"),
        torch.OutOfMemoryError("mine"),
        torch.distributed.DistBackendError("mine"),
    ],
    ids=repr,
)
def test_the_models_own_exception_comes_through(error: Exception) -> None:
    def call(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        if len(batch) == SIZES[1]:
            raise error

    model = Net()
    before = state_of(model)
    with pytest.raises(type(error)) as raised:
        update_bn(batches()[:2], model, call=call)
    assert raised.value is error
    assert raised.value.__cause__ is None
    assert "for batch 1, a tensor (3, 4) of torch.float32; call= runs" in raised.value.__notes__[0]
    require_as_before(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a device")], ids=repr)
@pytest.mark.parametrize("after", [1, 2])
def test_a_failed_write_leaves_all_statistics(
    error: BaseException, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics go back all or none, also if an interrupt comes while they go back."""
    model, puts, copies = Net(), [], []
    put, copy_ = Layer.put, Tensor.copy_

    def failing(layer: Layer) -> None:
        put(layer)
        puts.append(layer)
        if len(puts) == after:
            monkeypatch.setattr(Tensor, "copy_", interrupted)
            raise error

    def interrupted(self: Tensor, *args: Any, **options: Any) -> Tensor:
        copies.append(self)
        if len(copies) == 2:
            raise KeyboardInterrupt
        return copy_(self, *args, **options)

    monkeypatch.setattr(Layer, "put", failing)
    before = state_of(model)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        update_bn(batches()[:1], model)
    assert len(copies) > 2
    monkeypatch.undo()
    require_as_before(model, before)


def expanded() -> Tensor:
    return torch.arange(4.0).expand(3, 4)


def made_for_inference() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(3)


@pytest.mark.parametrize("make", [expanded, made_for_inference, lambda: torch.zeros(3)])
@pytest.mark.parametrize(
    "change", [lambda buffer: None, lambda buffer: buffer[:1].fill_(5), lambda buffer: buffer.resize_(7)]
)
def test_a_buffer_that_torch_does_not_write_hinders_nothing(
    make: Callable[[], Tensor], change: Callable[[Tensor], object]
) -> None:
    class First(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                change(self.other[0] if self.other.ndim == 2 else self.other)
            return super().forward(x)

    first = First(4)
    first.register_buffer("other", make())
    model = Net(first)
    before = state_of(model)
    error = LookupError("mine")

    def call(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        raise error

    for _ in range(2):
        with pytest.raises(LookupError) as raised:
            update_bn(batches(), model, call=call)
        assert raised.value is error
        assert len(raised.value.__notes__) == 1  # once, although the exception was raised before
        require_as_before(model, before)


class OtherStatistics(Net):
    """Has further modules that write while they run, and a layer that replaces its buffers."""

    def __init__(self) -> None:
        instances = nn.InstanceNorm1d(2, track_running_stats=True)
        super().__init__(nn.Sequential(nn.BatchNorm1d(4), nn.Unflatten(1, (2, 2)), instances, nn.Flatten()))
        self.linear = nn.utils.parametrizations.spectral_norm(self.linear)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.second.running_mean = self.second.running_mean + 1
        return super().forward(x, scale)


def test_what_fails_leaves_other_modules_as_they_were() -> None:
    model = OtherStatistics()
    update_bn(batches(), model)
    before, mean = state_of(model), model.second.running_mean
    with pytest.raises(RuntimeError, match="for batch 5, a tensor"):
        update_bn([*batches(), torch.zeros(5, 3)], model)
    require_as_before(model, before)
    assert model.second.running_mean is mean


class Forces(Net):
    """Turns gradients on in its forward pass, as models of forces do, and recomputes part of it in a backward pass."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            out = checkpoint(super().forward, x, scale, use_reentrant=False)
            (force,) = torch.autograd.grad(out.square().sum(), x)
        return force


def test_a_model_that_takes_gradients_keeps_no_graph_and_counts_once() -> None:
    model, plain = Forces(), Net()
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        update_bn([batch.clone() for batch in batches()], each)
    assert differing(model.state_dict(), plain.state_dict()) == []
    layer = Layer(nn.BatchNorm1d(4))
    with Watch(layer.module, {("", "running_mean", "running_var"): layer}).watching():
        layer.module(batches()[0].requires_grad_())
    assert layer.moments.mean is not None
    assert not layer.moments.mean.requires_grad


class Folding(nn.BatchNorm1d):
    """Has statistics for each half of a batch, and takes their mean into evaluation, as GhostBatchNorm does."""

    def __init__(self) -> None:
        super().__init__(8, affine=False)

    def train(self, mode: bool = True) -> Folding:
        if self.training and not mode:
            self.running_mean = self.running_mean.view(2, -1).mean(0).repeat(2)
            self.running_var = self.running_var.view(2, -1).mean(0).repeat(2)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = (s if self.training else s[:4] for s in (self.running_mean, self.running_var))
        out = F.batch_norm(x.view(-1, 8 if self.training else 4), mean, var, training=self.training)
        return out.view_as(x)


@pytest.mark.parametrize("of_class", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_module_hears_that_its_mode_returns(of_class: bool, training: bool) -> None:
    layer = Folding()
    if not of_class:
        layer.train = types.MethodType(Folding.train, layer)
    model = Net(layer).train(training)
    loader = [torch.randn(6, 4), torch.randn(8, 4) + 2]
    halves = torch.cat([batch.view(-1, 8) for batch in loader]).double()
    before = state_of(model)
    with pytest.raises(ValueError, match="mine"):
        update_bn(loader, model, call=lambda model, batch: (model(batch), raise_(ValueError("mine"))))
    require_as_before(model, before)
    update_bn(loader, model)
    assert layer.training == training
    want = halves.mean(0)
    want = want if training else want.view(2, -1).mean(0).repeat(2)
    torch.testing.assert_close(layer.running_mean.double(), want, rtol=1e-6, atol=1e-6)
    assert layer.eval().running_mean[:4].equal(layer.running_mean[4:])


def raise_(error: Exception) -> None:
    raise error


class Frozen(Net):
    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.first.eval()
        return self


def test_a_layer_that_stays_frozen_keeps_its_statistics() -> None:
    model = Frozen()
    model.first.running_mean.fill_(3.0)
    update_bn(batches(), model)
    assert model.first.running_mean.tolist() == [3.0] * 4
    with torch.no_grad():
        require_statistics(model.second, model.linear((torch.cat(batches()) - 3.0) / (1 + 1e-5) ** 0.5))


@pytest.mark.parametrize("loader", [[torch.zeros(0, 4)], [torch.zeros(0, 4)] * 3])
def test_layers_that_have_seen_nothing_are_told_of(loader: list[Tensor]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    before = state_of(model)
    with pytest.warns(UserWarning, match="none of 1 BatchNorm layers has seen a value") as told:
        update_bn(loader, model, call=lambda model, batch: None)
    assert told[0].filename == __file__
    require_as_before(model, before)


def test_a_failure_beside_an_update_leaves_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    averaged, optimizer = FusedAveragedModel(model), torch.optim.SGD(model.parameters(), 0.1)
    held = Held(monkeypatch)
    averaged.attach(optimizer, overlap=True)
    optimizer.step()
    held.let_go_in(0.1)
    with pytest.raises(RuntimeError, match="for batch 0, a tensor"):
        update_bn([torch.zeros(5, 3)], averaged)
    assert averaged.n_averaged == 1


class OnRanks(Attachable): ...


class SeveralOnRanks(OnRanks, dict): ...


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (OnRanks(), TypeError, r"got OnRanks: pass the model, inside swapped_into\(model\)"),
        (SeveralOnRanks(a=1), TypeError, r"OnRanks: pass the model, inside averages\['a'\]\.swapped_into\(model\)"),
        (
            FusedAverages(Net(), rules={"fast": EqualAverage()}),
            TypeError,
            r"model must be one model, got FusedAverages: call update_bn\(loader, averages\['fast'\]\)",
        ),
        ([], TypeError, r"model must be a torch\.nn\.Module, got list"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d()),
            ValueError,
            "must be initialised, got the lazy layer '1'",
        ),
    ],
    ids=["on ranks", "several on ranks", "several", "none", "lazy"],
)
def test_what_has_no_statistics_to_take_is_refused(model: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        update_bn(batches(), model)


class Encoding(UserDict):
    """As a tokenizer returns: a mapping with attributes that can move itself."""

    def to(self, device: torch.device) -> Encoding:
        return Encoding({key: value.to(device) for key, value in self.items()})

    def __getattr__(self, name: str) -> Tensor:
        return self.data[name]


def test_batches_that_can_move_themselves_do() -> None:
    model = Net()
    update_bn([Encoding(x=x) for x in batches()], model, "cpu", call=lambda model, batch: model(batch.x))
    require_statistics(model.first, torch.cat(batches()))
    with pytest.raises(TypeError, match="for batch 0, a str; call= runs"):
        update_bn(["text"], model, "cpu")


# Ranks


def _on_ranks(world: int, empty: Sequence[int] = ()) -> dict[str, Tensor]:
    rank = torch.distributed.get_rank()
    torch.manual_seed(1)
    model = Net()
    full = [index for index in range(world) if index not in empty]
    own = batches((40, 7, 3, 90, 5, 11, 2, 31))[full.index(rank) :: len(full)] if rank in full else []
    update_bn(own, model, process_group=torch.distributed.group.WORLD)
    update_bn(own, model, process_group=torch.distributed.group.WORLD)  # goes round in the same group
    return dict(model.state_dict())


@pytest.mark.distributed
@pytest.mark.parametrize("empty", [(), (0,), (1, 2, 3)])
def test_four_ranks_give_what_one_gives(empty: tuple[int, ...]) -> None:
    (alone,) = run_ranks(1, _on_ranks, 1)
    together = run_ranks(4, _on_ranks, 4, empty)
    for state in together:
        assert differing(state, together[0]) == []
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)


def _failing(what: str) -> str:
    rank = torch.distributed.get_rank()
    model = Net(nn.BatchNorm1d(4 if what != "model" or rank == 0 else 5))
    before = state_of(model)
    loader = {"empty": [], "batch": [torch.zeros(5, 4 if rank else 2)], "model": []}[what]
    try:
        update_bn(loader, model, process_group=torch.distributed.group.WORLD)
    except (ValueError, RuntimeError) as error:
        require_as_before(model, before)
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("what", "messages"),
    [
        ("empty", ["ValueError: loader must give at least one batch, got none"] * 2),
        (
            "batch",
            ["RuntimeError: running_mean should contain 2", "RuntimeError: update_bn failed on rank 0, and so on"],
        ),
        (
            "model",
            ["ValueError: model must be the same on every rank, got for 'first' 4 on rank 0 and 5 on rank 1"] * 2,
        ),
    ],
)
def test_what_fails_on_one_rank_fails_on_all(what: str, messages: list[str]) -> None:
    for told, message in zip(run_ranks(2, _failing, what), messages, strict=True):
        assert told.startswith(message)


def _alone_or_together() -> tuple[list[float], list[float]]:
    """Return what rank 0 gets alone, and what ranks get together, each as the mean of the first layer."""
    rank = torch.distributed.get_rank()
    loader = [torch.full((4, 4), 10.0 * rank) + torch.randn(4, 4) * 1e-3]
    alone, together = [], []

    def mean(model: Any) -> float:
        return round(unwrap(model).first.running_mean.mean().item(), 1)

    models = [Net(), ddp := DistributedDataParallel(Net())]
    averaged = [FusedAveragedModel(model) for model in models]
    for each in averaged:
        each.update_parameters(each._made_of())
    if rank == 0:
        for model in (*models, *averaged):
            update_bn(loader, model)
        alone = [mean(models[0]), mean(ddp), *(mean(each.module) for each in averaged)]
    assert ddp.require_forward_param_sync
    torch.distributed.barrier()

    update_bn(loader, models[0], process_group=torch.distributed.group.WORLD)
    together.append(mean(models[0]))
    sharded = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    update_bn(loader, sharded)
    together.append(mean(sharded.module))
    assert is_sharded(fully_shard(Net(), mesh=init_device_mesh("cpu", (2,))))  # torch 2.6 runs it on a GPU only
    of_ranks = ShardedAveragedModel(ddp)
    of_ranks.update_parameters(ddp)
    several = ShardedAverages(ddp, rules={"fast": EqualAverage()})
    several.update_parameters(ddp)
    for each in (of_ranks, several["fast"]):
        with each.swapped_into(ddp):
            update_bn(loader, ddp)
            together.append(mean(ddp))
    # One rank leaves by an exception, while the other makes a call that needs all ranks.
    before = tensors_of(ddp)
    action = partial(update_bn, loader, ddp) if rank == 0 else partial(raise_, LookupError("mine"))
    message = "mine" if rank else "got update_bn on rank 0, leaving swapped_into of average . on rank 1"
    with pytest.raises((RuntimeError, LookupError), match=message), of_ranks.swapped_into(ddp):
        action()
    assert differing(tensors_of(ddp), before) == []
    with pytest.raises(
        TypeError, match=r"got ShardedAverages: pass the model, inside averages\['fast'\]\.swapped_into"
    ):
        update_bn(loader, several)
    return alone, together


@pytest.mark.distributed
def test_a_rank_is_alone_unless_others_must_come() -> None:
    first, second = run_ranks(2, _alone_or_together, timeout=timedelta(seconds=20))
    assert first == ([0.0] * 4, [5.0] * 4)
    assert second == ([], [5.0] * 4)


# Each gate sees its bug


def means_weighed_alike(patch: pytest.MonkeyPatch) -> None:
    merge = moments.Moments.merge

    def alike(self: Any, other: Any) -> None:
        if self.count is not None and other.count is not None:
            other = moments.Moments(other.calls, self.count, other.mean, other.squares)
        merge(self, other)

    patch.setattr(moments.Moments, "merge", alike)


def distance_of_means_left_out(patch: pytest.MonkeyPatch) -> None:
    merge = moments.Moments.merge

    def without(self: Any, other: Any) -> None:
        squares = None if self.squares is None else self.squares + other.squares
        merge(self, other)
        self.squares = squares if squares is not None else self.squares

    patch.setattr(moments.Moments, "merge", without)


@pytest.mark.parametrize("plant", [means_weighed_alike, distance_of_means_left_out])
def test_the_gate_kills_the_bug(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test_unequal_batches_give_the_statistics_of_the_whole_set(SIZES)


def test_statistics_left_behind_by_a_failed_pass_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchnorm, "_restoring", lambda _: lambda *_: None)
    with pytest.raises(AssertionError):
        test_what_fails_leaves_the_model_as_it_was(
            lambda: [*batches(), torch.zeros(5, 3)], RuntimeError, "batch 5", True
        )
