"""What `update_bn` takes of a layer is what the layer normalises, whatever it receives."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from swafast import update_bn
from swafast.optim import moments, watch
from tests.support import differing

T = C = 4  # so that statistics over the wrong dimension have the right shape


def batches(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Make batches (batch, channels, time) whose means differ in every dimension."""
    generator = torch.Generator().manual_seed(7)
    apart = torch.arange(C)[:, None] + 10.0 * torch.arange(T)
    return [(torch.randn(n, C, T, generator=generator) * (1 + i) + apart + i).to(dtype) for i, n in enumerate(sizes)]


UNEVEN = (8, 6, 2)

#: What was normalised with the statistics of each name.
seen: dict[str, list[Tensor]] = {}


def noted(name: str, values: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        seen.setdefault(name, []).append(values.detach().clone())
    return values


class Plain(nn.BatchNorm1d):
    name = ""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(noted(self.name, x))


class TimeLast(Plain):
    """Takes (batch, time, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Split(Plain):
    """Normalises each half of a batch with statistics of its own, as timm's SplitBatchNorm2d."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.other = Plain(features)
        self.other.name = "other"

    def forward(self, x: Tensor) -> Tensor:
        first, other = x.chunk(2)
        return torch.cat([super().forward(first), self.other(other)])


class Masked(Plain):
    def forward(self, x: Tensor) -> Tensor:
        mask = x[:, 0] > 1.0  # (batch, time)
        out = x.transpose(1, 2).clone()
        out[mask] = super().forward(out[mask])
        return out.transpose(1, 2)


class Direct(Plain):
    def forward(self, x: Tensor) -> Tensor:
        half = noted("", x[:, :, 1:])
        momentum = 1.0 / float(self.num_batches_tracked.add_(1)) if self.momentum is None else self.momentum
        args = (self.weight, self.bias, self.running_mean, self.running_var)
        return torch.batch_norm(half, *args, self.training, momentum, self.eps, False)


class Keywords(Plain):
    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        args = {"weight": self.weight, "bias": self.bias, "training": self.training, "momentum": 0.1}
        return F.batch_norm(running_var=var, running_mean=mean, input=noted("", x[:, :, 2:]), **args)


class Ghost(nn.BatchNorm1d):
    """Has statistics for each half of a batch, in one tensor."""

    def __init__(self, features: int) -> None:
        super().__init__(2 * features, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        halves = noted("", torch.cat(x.chunk(2), 1))
        return torch.cat(super().forward(halves).chunk(2, 1))


class Chunks(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Chunks, self).forward(part) for part in x.split(2)])


class Replacing(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.running_mean = self.running_mean + 1
        return super().forward(x)


class Threads(Split):
    """Runs in threads, as layers under DataParallel."""

    def forward(self, x: Tensor) -> Tensor:
        first, other = x.chunk(2)
        threads = [threading.Thread(target=nn.Module.__call__, args=(self.at, part)) for part in (first, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10.0)
        return x

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.at = Masked(features)
        self.at.name = "at"


class Checkpointed(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.inner = Masked(features)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            out = checkpoint(self.inner, x.clone().requires_grad_(), use_reentrant=False)
            out.square().sum().backward()
        seen[""].pop()  # noted again in the backward
        return out


class Function(nn.Module):
    """Calls the function with buffers of its own."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.full((features,), 7.0))
        self.register_buffer("spread", torch.full((features,), 7.0))
        self.linear = Plain(features)
        self.linear.name = "linear"

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.batch_norm(noted("", x), self.center, self.spread, training=self.training))


class ByHand(nn.BatchNorm1d):
    """Normalises a part of its input without torch's function."""

    old, new = 1.0, 0.0  # of the momentum: old - momentum, or as others count it

    def forward(self, x: Tensor) -> Tensor:
        x = noted("", x[:, :, 1:])
        var, mean = torch.var_mean(x, (0, 2))
        with torch.no_grad():
            share = abs(self.new - self.momentum)
            self.running_mean += share * (mean - self.running_mean)
            self.running_var = torch.lerp(self.running_var, var, share)
        return (x - mean[:, None]) / (var[:, None] + self.eps).sqrt()


class OtherWay(ByHand):
    new = 1.0


class Copies(ByHand):
    """Hands copies of its statistics to torch's function, as layers in half precision do."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean.double(), self.running_var.double()
        out = F.batch_norm(noted("", x[:, :, 1:]).double(), mean, var, training=True, momentum=self.momentum)
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        return out


def run(layer: nn.Module, loader: Sequence[Tensor]) -> None:
    """Call `update_bn` for a model with the layer inside."""
    seen.clear()
    update_bn(loader, nn.Sequential(nn.Identity(), layer))


def require(mean: Tensor, var: Tensor, parts: Sequence[Tensor], tolerance: float) -> None:
    """Compare with the statistics in float64 of all parts, (samples, channels, ...)."""
    whole = torch.cat([part.double().transpose(0, 1).flatten(1) for part in parts], 1)
    for got, want in ((mean, whole.mean(1)), (var, whole.var(1))):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


EXACT = (Plain, TimeLast, Split, Masked, Direct, Keywords, Ghost, Chunks, Replacing, Threads)


@pytest.mark.parametrize("kind", [*EXACT, Checkpointed, Function])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_statistics_are_those_of_what_is_normalised(kind: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    layer = kind(C).to(dtype)
    run(layer, batches(*UNEVEN, dtype=dtype))
    layers = {module.name: module for module in layer.modules() if isinstance(module, Plain)}
    for name, parts in seen.items():
        own: Any = layers.get(name, layer)
        mean, var = (own.center, own.spread) if isinstance(own, Function) else (own.running_mean, own.running_var)
        require(mean, var, parts, 2**-7 if dtype == torch.bfloat16 else 2e-7)
        assert isinstance(own, Function) or own.num_batches_tracked == len(parts)


@pytest.mark.parametrize("kind", [TimeLast, Split, Masked, Direct, Ghost])
def test_one_batch_gives_what_torchs_function_gives(kind: Callable[..., nn.Module]) -> None:
    ours, theirs = kind(C), kind(C)
    run(ours, batches(8))
    swa_utils.update_bn(batches(8), theirs)
    for got, want in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
@pytest.mark.parametrize("kind", [ByHand, OtherWay, Copies])
def test_a_layer_with_code_of_its_own_tells_by_what_it_writes(
    kind: Callable[..., nn.BatchNorm1d], momentum: float | None
) -> None:
    layer = kind(C, momentum=momentum)
    with pytest.warns(UserWarning, match="the statistics of '1' may be inexact") as told:
        run(layer, batches(6, 6))
    assert len(told) == 1
    require(layer.running_mean, layer.running_var, seen[""], 1e-2)
    whole = torch.cat([part.double() for part in seen[""]])
    torch.testing.assert_close(layer.running_mean.double(), whole.mean((0, 2)), rtol=1e-5, atol=1e-5)
    assert layer.momentum == momentum


class Whole(Plain):
    """Normalises its whole input by arithmetic of its own."""

    correction, share = 1, 0.1  # not by its momentum

    def shares(self) -> float:
        return self.share

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(noted("", x), (0, 2), correction=self.correction)
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = self.shares()
            self.running_mean.mul_(1 - share).add_(mean.to(x.dtype), alpha=share)
            self.running_var.mul_(1 - share).add_(var.to(x.dtype), alpha=share)
        return (x - mean[:, None]) / (var[:, None] + self.eps).sqrt()


class Biased(Whole):
    correction, share = 0, 1.0


class Cumulative(Whole):
    def shares(self) -> float:
        return 1 / self.num_batches_tracked.item()


class Aten(Plain):
    def forward(self, x: Tensor) -> Tensor:
        args = (self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.1, self.eps, False)
        return torch.ops.aten.batch_norm(noted("", x[:, :, 1:]), *args)


class Updates(Whole):
    """Normalises with its statistics, and writes them itself."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, training=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Whole, Biased, Cumulative, Aten, Updates])
def test_whatever_a_layer_takes_for_its_momentum_does_not_matter(
    kind: Callable[..., nn.Module], dtype: torch.dtype, recwarn: pytest.WarningsRecorder
) -> None:
    layer: Any = kind(C).to(dtype)
    run(layer, batches(*UNEVEN, dtype=dtype))
    require(layer.running_mean, layer.running_var, seen[""], 2**-7 if dtype == torch.bfloat16 else 2e-7)
    assert layer.num_batches_tracked == len(UNEVEN)
    assert not recwarn.list


def test_a_patched_layer_that_takes_a_part_by_itself_is_asked_what_it_wrote() -> None:
    layer: Any = nn.BatchNorm1d(C)
    layer.forward = types.MethodType(ByHand.forward, layer)
    layer.new = 0.0
    with pytest.warns(UserWarning, match="'1' may be inexact"):
        run(layer, batches(6))
    require(layer.running_mean, layer.running_var, seen[""], 1e-5)


class CumulativePart(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        self.momentum, momentum = 1 / self.num_batches_tracked.item(), self.momentum
        out = super().forward(x)
        self.momentum = momentum
        return out


def test_a_mean_of_batches_by_hand_is_followed() -> None:
    layer = CumulativePart(C)
    with pytest.warns(UserWarning, match="'1' may be inexact"):
        run(layer, batches(6, 6))
    require(layer.running_mean, layer.running_var, seen[""], 1e-2)


# Passes that are not tracked


class Twice(nn.Module):
    """Runs its layer a second time with other settings, which turn tracking off."""

    def __init__(self, norm: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__()
        self.norm: Any = norm
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(x)
        before = {name: getattr(self.norm, name) for name in self.settings}
        for name, value in self.settings.items():
            setattr(self.norm, name, value)
        self.norm(x + 100)
        for name, value in before.items():
            setattr(self.norm, name, value)
        return out


class KeepsInCall(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        args = (self.running_mean, self.running_var, self.weight, self.bias, True)
        F.batch_norm(x + 100, *args, 0.0)
        return F.batch_norm(x, *args, 0.1)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize(
    "settings",
    [
        {"track_running_stats": False},  # as in virtual adversarial training
        {"momentum": 0.0},  # as for sharpness-aware minimisation
        {"running_mean": None, "running_var": None},
        {"training": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_pass_that_is_not_tracked_is_not_counted(norm: Callable[[int], nn.Module], settings: dict[str, Any]) -> None:
    model = Twice(norm(C), settings)
    run(model, batches(*UNEVEN))
    require(model.norm.running_mean, model.norm.running_var, batches(*UNEVEN), 2e-7)
    assert model.norm.num_batches_tracked == len(UNEVEN)


def test_a_call_with_a_momentum_of_0_is_not_counted() -> None:
    layer = KeepsInCall(C)
    run(layer, batches(*UNEVEN))
    require(layer.running_mean, layer.running_var, batches(*UNEVEN), 2e-7)
    assert layer.num_batches_tracked == len(UNEVEN)


# Views of statistics


class Slim(nn.BatchNorm1d):
    """Normalises as many channels as it gets."""

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        return F.batch_norm(x, self.running_mean[:width], self.running_var[:width], training=self.training)


class SlimByHand(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        var, mean = torch.var_mean(x, (0, 2))
        self.running_mean[:width].lerp_(mean, self.momentum)
        self.running_var[:width].lerp_(var, self.momentum)
        return x


class Striding(nn.BatchNorm1d):
    """Has its channels in every other element, last first."""

    def __init__(self, features: int) -> None:
        super().__init__(2 * features)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        return F.batch_norm(x, self.running_mean[1::2][:width], self.running_var[1::2][:width], training=self.training)


@pytest.mark.parametrize("kind", [Slim, SlimByHand, Striding])
@pytest.mark.filterwarnings("ignore:the statistics of '1' may be inexact")
def test_channels_that_a_call_does_not_write_do_not_count(kind: Callable[..., nn.BatchNorm1d]) -> None:
    layer = kind(C)
    layer.running_mean.fill_(7.0)
    layer.running_var.fill_(7.0)
    wide, narrow, last = batches(8, 8, 8)
    loader = [wide[:, : C - 1], narrow[:, :1], last[:, : C - 1]]
    run(layer, loader)
    mean, var = (s[1::2] if kind is Striding else s for s in (layer.running_mean, layer.running_var))
    tolerance = 1e-5 if kind is SlimByHand else 2e-7
    require(mean[:1], var[:1], [x[:, :1] for x in loader], tolerance)
    require(mean[1 : C - 1], var[1 : C - 1], [loader[0][:, 1:], loader[2][:, 1:]], tolerance)
    assert mean[C - 1] == var[C - 1] == 7.0
    assert layer.num_batches_tracked == 3


class Detached(Plain):
    def forward(self, x: Tensor) -> Tensor:
        half = noted("", x[:, :, 1:])
        return F.batch_norm(half, self.running_mean.detach(), self.running_var.data, training=True)


class Domains(nn.Module):
    """Has statistics for each domain in one buffer."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(2, features))
        self.register_buffer("variances", torch.ones(2, features))

    def forward(self, x: Tensor) -> Tensor:
        domain = len(x) % 2
        return F.batch_norm(noted(str(domain), x), self.means[domain], self.variances[domain], training=True)


def test_statistics_are_found_by_their_memory() -> None:
    layer = Detached(C)
    run(layer, batches(*UNEVEN))
    require(layer.running_mean, layer.running_var, seen[""], 2e-7)
    domains: Any = Domains(C)
    run(nn.Sequential(domains, nn.BatchNorm1d(C)), batches(8, 5, 2, 7))
    for domain in (0, 1):
        require(domains.means[domain], domains.variances[domain], seen[str(domain)], 2e-7)


class Unused(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return x


class InEvaluation(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False)


class NoMomentum(nn.Module):
    """Normalises with a batch's statistics, and keeps others."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=True, momentum=0.0)


@pytest.mark.parametrize("kind", [Unused, InEvaluation, NoMomentum])
def test_what_normalises_nothing_keeps_its_statistics(kind: Callable[..., nn.Module]) -> None:
    layer: Any = kind(C)
    layer.running_mean.fill_(3.0)
    run(nn.Sequential(layer, nn.BatchNorm1d(C)), batches(6, 6))
    assert layer.running_mean.tolist() == [3.0] * C


def test_other_norms_are_as_after_torchs_function() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        norms = (nn.InstanceNorm1d(C, track_running_stats=True), nn.GroupNorm(2, C), nn.BatchNorm1d(C))
        untracked, was_tracked = nn.BatchNorm1d(C, track_running_stats=False), nn.BatchNorm1d(C)
        was_tracked.track_running_stats = False
        return nn.Sequential(*norms, untracked, was_tracked)

    ours, theirs = make(), make()
    update_bn(batches(6, 6), ours)
    swa_utils.update_bn(batches(6, 6), theirs)
    assert [name for name in differing(ours.state_dict(), theirs.state_dict()) if not name.startswith("2.")] == []


def test_layers_with_the_same_statistics_share_them() -> None:
    first, second = nn.BatchNorm1d(C), nn.BatchNorm1d(C)
    second.running_mean, second.running_var = first.running_mean, first.running_var
    loader = batches(6, 3)
    update_bn(loader, nn.ModuleList([first, second]), call=lambda both, x: (both[0](x), both[1](2 * x)))
    require(first.running_mean, first.running_var, [*loader, *(2 * x for x in loader)], 2e-7)
    assert second.running_mean is first.running_mean


def test_a_mean_is_rounded_once() -> None:
    layer = nn.BatchNorm1d(C)
    loader = batches(500, 3)
    loader[0][0] = 1e4  # float32 would round the deviations from it
    update_bn(loader, layer)
    whole = torch.cat(loader).double()
    assert torch.equal(layer.running_mean, whole.mean((0, 2)).float())
    assert torch.equal(layer.running_var, whole.var((0, 2)).float())


@pytest.mark.parametrize("shape", [(6, C, 3, 5), (6, C, 2, 3, 5)], ids=len)
def test_memory_order_and_pieces_do_not_matter(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_PIECE", 64)
    x = torch.randn(shape) + 2
    layer: Any = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm3d)(C)
    order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    update_bn([x.to(memory_format=order)], layer)
    require(layer.running_mean, layer.running_var, [x], 2e-7)
    assert layer.num_batches_tracked == 1


def test_layers_under_vmap_are_left_to_their_own() -> None:
    """Under vmap a layer has no running statistics, or those that it was given."""

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.BatchNorm1d(C, track_running_stats=False), nn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.vmap(self.norm)(torch.stack(x.split(2))).flatten(0, 1))

    model, loader = Mapped(), batches(6, 4)
    update_bn(loader, model)
    with torch.no_grad():
        parts = [torch.cat([model.norm(part) for part in x.split(2)]) for x in loader]
    require(model.last.running_mean, model.last.running_var, parts, 1e-6)


def test_threads_leave_no_watch_behind() -> None:
    seen.clear()
    model = Threads(C)
    update_bn(batches(*UNEVEN), model)
    assert torch.overrides._get_current_function_mode() is None
    assert [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) if hooks] == []


# A gate sees its bug


def taking_inputs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(watch, "_argument_names", lambda _: ())
    patch.setattr(watch.Watch, "_take_written", lambda self, visit, _, inputs: self._take(visit.layer, inputs))


@pytest.mark.parametrize("kind", [TimeLast, Split, Masked, Direct, Keywords])
def test_the_gate_kills_a_watch_of_inputs(kind: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    taking_inputs(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        test_statistics_are_those_of_what_is_normalised(kind, torch.float32)
