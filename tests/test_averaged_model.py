"""`FusedAveragedModel` in the place of torch's class: the same results, in all common uses."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, Rule
from swafast.terms.weight import KernelTerms
from tests.support import EveryKind, differing, drift, tensors_of, unchanged, update, updated_once

FUNCTIONS: list[dict[str, Any]] = [
    {},
    {"multi_avg_fn": get_swa_multi_avg_fn()},
    {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    {"avg_fn": get_ema_avg_fn(0.9)},
    {"avg_fn": get_swa_avg_fn()},
    {"avg_fn": lambda average, param, n: average + (param - average) / (n + 2)},
    {"multi_avg_fn": lambda averages, params, n: torch._foreach_lerp_(averages, params, 0.25)},
]


@pytest.mark.parametrize("functions", FUNCTIONS, ids=lambda f: "-".join(f) or "default")
@pytest.mark.parametrize("use_buffers", [False, True])
def test_gives_what_torchs_class_gives(
    every_kind: EveryKind, functions: dict[str, Any], use_buffers: bool, backend: str, small_chunks: int
) -> None:
    if use_buffers:
        # torch's own class raises here on bool and integer buffers; ours copies them.
        every_kind.norm.num_batches_tracked = every_kind.norm.num_batches_tracked.float()
        every_kind.mask = every_kind.mask.float()
    ours = FusedAveragedModel(every_kind, use_buffers=use_buffers, backend=backend, **functions)
    theirs = AveragedModel(every_kind, use_buffers=use_buffers, **functions)
    update(every_kind, ours, theirs, updates=8)
    assert ours.n_averaged.item() == theirs.n_averaged.item() == 8
    got, expected = tensors_of(ours.module), tensors_of(theirs.module)
    assert list(got) == list(expected)
    for name in expected:
        if expected[name].is_floating_point():
            torch.testing.assert_close(got[name], expected[name], rtol=2e-6, atol=2e-6)
        elif not use_buffers:
            assert torch.equal(got[name], expected[name])


def test_signature_attributes_and_keys_are_torchs(every_kind: EveryKind) -> None:
    ours, theirs = FusedAveragedModel(every_kind), AveragedModel(every_kind)
    assert isinstance(ours, AveragedModel)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]
    for attribute in ("avg_fn", "multi_avg_fn", "use_buffers"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert ours.n_averaged.dtype == theirs.n_averaged.dtype
    x = torch.randn(2, 7)
    ours.module.forward = ours.module.linear.forward  # type: ignore[method-assign]
    assert torch.equal(ours(x), every_kind.linear(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["float32", "exact", "mirrored"])
def test_every_format_holds_the_same_average(
    every_kind: EveryKind, dtype: torch.dtype, format: str, backend: str, small_chunks: int
) -> None:
    model = every_kind.to(dtype)
    plain = FusedAveragedModel(model, format="float32", backend="reference", use_buffers=True)
    other = FusedAveragedModel(model, format=format, backend=backend, use_buffers=True)
    update(model, plain, other, updates=6)
    stored = {"float32": torch.float32, "exact": torch.bfloat16, "mirrored": torch.float16}[format]
    assert other.module.long.dtype == stored
    truth, got = plain.averaged_state_dict(), other.averaged_state_dict()
    assert differing(truth, got) == []
    assert torch.equal(other.module.long, got["long"].to(stored)) or format == "exact"


def test_buffers_of_whole_numbers_are_copied_where_others_are_averaged(every_kind: EveryKind, backend: str) -> None:
    average = FusedAveragedModel(every_kind, use_buffers=True, backend=backend)
    update(every_kind, average, updates=4)
    for name in ("mask", "norm.num_batches_tracked"):
        assert torch.equal(average.module.get_buffer(name), every_kind.get_buffer(name))
    assert not torch.equal(average.module.scratch, every_kind.scratch)


def test_untying_the_model_is_an_error_and_tying_it_is_not(every_kind: EveryKind) -> None:
    average = updated_once(every_kind)
    every_kind.tied.weight = nn.Parameter(torch.randn(11, 7))
    with pytest.raises(ValueError, match=r"'linear\.weight' and 'tied\.weight'"):
        average.update_parameters(every_kind)
    other = FusedAveragedModel(every_kind)
    every_kind.tied.weight = every_kind.linear.weight
    other.update_parameters(every_kind)
    assert torch.equal(other.module.tied.weight, every_kind.linear.weight)


@pytest.mark.parametrize("format", ["compact", "half", "exact", "compensated"])
@pytest.mark.filterwarnings("ignore:format='half'")
def test_what_is_copied_is_never_rounded(format: str, backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.register_buffer("positions", torch.arange(1000.0, 1010.0))
    average = updated_once(model, format=format, backend=backend, include=lambda name, _: name.startswith("0."))
    expected = {name: value for name, value in tensors_of(model).items() if not name.startswith("0.")}
    exported = average.averaged_state_dict()
    with average.swapped_into(model):
        inside = tensors_of(model)
    average.copy_to(model)
    for got in (exported, inside, model.state_dict()):
        assert differing({name: got[name] for name in expected}, expected) == []


def test_include_picks_what_is_averaged(every_kind: EveryKind, backend: str) -> None:
    asked = []

    def include(name: str, param: nn.Parameter) -> bool:
        asked.append(name)
        return param.requires_grad and not name.startswith("linear")

    average = FusedAveragedModel(every_kind, include=include, backend=backend)
    every_kind.long.requires_grad_(False)  # after construction: no change
    frozen = [every_kind.frozen.clone()]
    for _ in range(3):
        every_kind.drift()
        frozen.append(every_kind.frozen.clone())
        average.update_parameters(every_kind)
    assert torch.equal(average.module.frozen, frozen[-1])
    assert torch.equal(average.module.linear.bias, every_kind.linear.bias)
    assert not torch.equal(average.module.long, every_kind.long)
    assert len(asked) == len(set(asked))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Sequential], Any]] = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "ddp": DistributedDataParallel,
    "inner": lambda model: nn.Sequential(model[0], torch.compile(model[1], backend="eager")),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("side", ["model", "average", "both"])
def test_wrappers_on_either_side_do_not_matter(wrap: str, side: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))
    plain, wrapped = FusedAveragedModel(model), WRAPPERS[wrap](model)
    of, updated = (model if side == "model" else wrapped), (model if side == "average" else wrapped)
    average, optimizer = FusedAveragedModel(of), torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        wrapped(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        plain.update_parameters(model)
        average.update_parameters(updated)
    assert list(average.state_dict()) == list(AveragedModel(of).state_dict())
    state = plain.averaged_state_dict()
    assert differing(state, average.averaged_state_dict()) == []
    with unchanged(model), average.swapped_into(updated):
        assert differing(model.state_dict(), state) == []


def test_a_child_called_module_keeps_its_name() -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.randn(2, 2))
    average = updated_once(model)
    assert set(average.averaged_state_dict()) == {"module.weight", "module.bias", "weight"}


def test_parametrizations_are_averaged_underneath() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    average, theirs = FusedAveragedModel(model), AveragedModel(model)
    for _ in range(3):
        drift(model)
        average.update_parameters(model)
        theirs.update_parameters(model)
    x = torch.randn(5, 4)
    torch.testing.assert_close(average(x), theirs(x))


def test_a_plan_follows_reallocated_params(every_kind: EveryKind, backend: str) -> None:
    average = FusedAveragedModel(every_kind, backend=backend)
    oracle = AveragedModel(every_kind)
    update(every_kind, average, oracle)
    changes = [
        lambda m: setattr(m.long, "data", m.long.data.clone()),
        lambda m: setattr(m, "long", nn.Parameter(torch.randn(1000))),
        lambda m: setattr(m.conv.weight, "data", m.conv.weight.data.contiguous()),
        lambda m: setattr(m.linear.weight, "data", m.linear.weight.data.contiguous()),
        lambda m: m.requires_grad_(False),
        lambda m: m.norm.register_buffer("running_mean", torch.randn(5)),
        lambda m: m.double().float(),
    ]
    for change in changes:
        change(every_kind)
        update(every_kind, average, oracle)
        got = tensors_of(average.module)
        for name, tensor in tensors_of(oracle.module).items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_view_of_other_shape_at_the_same_address_is_noticed() -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(3))])
    average = updated_once(model)
    address = model[0].data_ptr()
    model[0].data = model[0].data.view(8, 4)
    assert model[0].data_ptr() == address
    with pytest.raises(ValueError, match=r"'0' must have the average's shape \(4, 8\), got \(8, 4\)"):
        average.update_parameters(model)
    model[0].data = model[0].data.view(4, 8)
    average.update_parameters(model)
    square = nn.ParameterList([nn.Parameter(torch.randn(4, 4))])
    other = updated_once(square)
    square[0].data = square[0].data.t()
    expected = (other.module[0] + square[0]).detach() / 2
    other.update_parameters(square)
    torch.testing.assert_close(other.module[0].detach(), expected)


def test_params_added_on_both_sides_are_averaged_from_then_on() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    average = updated_once(model)
    model.add_module("head", nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"unexpected 'head\.weight', 'head\.bias'"):
        average.update_parameters(model)
    average.module.add_module("head", copy.deepcopy(model.head))
    average.update_parameters(model)
    del model.head, average.module.head
    average.update_parameters(model)
    assert average.n_averaged == 3


def test_other_rules_and_functions_may_be_set_later(every_kind: EveryKind) -> None:
    average = FusedAveragedModel(every_kind.bfloat16())
    assert average.rule == EqualAverage()
    average.update_parameters(every_kind)
    average.multi_avg_fn = get_ema_multi_avg_fn(0.5)
    assert average.rule == ExponentialAverage(0.5)
    every_kind.drift()
    expected = torch.lerp(average.averaged_state_dict()["long"], every_kind.long.detach().float(), 0.5)
    average.update_parameters(every_kind)
    assert torch.equal(average.averaged_state_dict()["long"], expected)
    average.multi_avg_fn = lambda averages, params, n: [a.copy_(p) for a, p in zip(averages, params, strict=True)]
    assert average.rule is None
    average.update_parameters(every_kind)
    assert torch.equal(average.module.long, every_kind.long)


class EveryThird(Rule):
    """A rule in Python alone."""

    def weight(self, num_averaged: int) -> float:
        return 1.0 if num_averaged == 0 else 1.0 / 3.0


def test_a_rule_of_ones_own(every_kind: EveryKind, backend: str) -> None:
    average = FusedAveragedModel(every_kind, rule=EveryThird(), backend=backend)
    expected = every_kind.long.detach().clone()
    for i in range(4):
        every_kind.drift()
        expected = every_kind.long.detach().clone() if i == 0 else torch.lerp(expected, every_kind.long.detach(), 1 / 3)
        average.update_parameters(every_kind)
    assert torch.equal(average.module.long, expected)


def test_subclasses_may_come_without_our_init() -> None:
    class Bare(FusedAveragedModel):
        def __init__(self, model: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = copy.deepcopy(model)
            self.register_buffer("n_averaged", torch.tensor(0))

    model = nn.Linear(3, 3).bfloat16()
    average = Bare(model)
    average.update_parameters(model)
    average.update_parameters(model)
    assert average.n_averaged == 2
    assert "remainder.weight" in average.state_dict()


def test_the_counter_may_be_edited_loaded_and_replaced(backend: str) -> None:
    model = nn.Linear(3, 3)
    average = FusedAveragedModel(model, backend=backend)
    for _ in range(3):
        average.update_parameters(model)
    average.n_averaged.zero_()
    drift(model)
    average.update_parameters(model)
    assert torch.equal(average.module.weight, model.weight)
    average.n_averaged = torch.tensor(9)
    drift(model)
    expected = torch.lerp(average.module.weight.detach(), model.weight.detach(), 0.1)
    average.update_parameters(model)
    assert torch.equal(average.module.weight, expected)
    assert average.n_averaged == 10


def test_writes_are_seen_by_autograd(backend: str) -> None:
    model = nn.Linear(3, 3)
    average = updated_once(model, backend=backend)
    out = average(torch.randn(2, 3, requires_grad=True)).sum()
    average.update_parameters(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_works_under_inference_and_autocast_modes(backend: str, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        inference = nn.Linear(3, 3)
    for model in (inference, nn.Linear(4, 4).to(dtype)):
        average = FusedAveragedModel(model, backend=backend)
        for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.no_grad(), nullcontext()):
            with context:
                average.update_parameters(model)
        assert average.n_averaged == 4
    average(torch.randn(2, 4).to(dtype)).sum().backward()  # a first update under inference mode leaves it trainable


def test_threads_lose_no_update(every_kind: EveryKind) -> None:
    average = FusedAveragedModel(every_kind)
    threads = [
        threading.Thread(target=lambda: [average.update_parameters(every_kind) for _ in range(200)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert average.n_averaged == 800
    assert torch.equal(average.module.long, every_kind.long)


def test_an_average_keeps_no_model_alive() -> None:
    model = nn.Linear(3, 3)
    average = FusedAveragedModel(model)
    average.update_parameters(model)
    gone, param = weakref.ref(model), weakref.ref(model.weight)
    del model
    gc.collect()
    assert gone() is None
    assert param() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pickle_torch_save_and_deepcopy_go_on_alike(every_kind: EveryKind, dtype: torch.dtype) -> None:
    model = every_kind.to(dtype)
    average = FusedAveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.9), include=lambda name, _: name != "frozen"
    )
    update(model, average, updates=3)
    file = io.BytesIO()
    torch.save(average, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(average)), copy.deepcopy(average), torch.load(file, weights_only=False)]
    file = io.BytesIO()
    torch.save(average, file, _use_new_zipfile_serialization=False)  # filled after its objects are made
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    update(model, average, *copies)
    for one in copies:
        assert one.n_averaged == 4
        assert differing(one.averaged_state_dict(), average.averaged_state_dict()) == []
        assert torch.equal(one.module.frozen, model.frozen)


def test_each_average_is_written_once() -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(1000)) for _ in range(50)])
    average = updated_once(model)
    held = 50 * 1000 * 4
    state, whole = io.BytesIO(), io.BytesIO()
    torch.save(average.state_dict(), state)
    torch.save(average, whole)
    assert len(pickle.dumps(average)) < 1.25 * held
    assert state.tell() < 1.25 * held
    assert whole.tell() < 1.25 * held


def test_shared_memory_stays_shared() -> None:
    model = nn.Linear(4, 4)
    average = FusedAveragedModel(model)
    average.share_memory()
    address = average.module.weight.data_ptr()
    average.update_parameters(model)
    assert average.module.weight.is_shared()
    assert average.module.weight.data_ptr() == address


def test_the_default_device_does_not_matter(backend: str) -> None:
    model = nn.Linear(300, 300)
    average = FusedAveragedModel(model, backend=backend)
    with torch.device("meta"):
        average.update_parameters(model)
        average.update_parameters(model)
    assert torch.equal(average.module.weight, model.weight)


class Tunable(Rule):
    """A rule whose terms change between updates."""

    decay = 0.5

    def weight(self, num_averaged: int) -> float:
        return 1.0 if num_averaged == 0 else 1.0 - self.decay

    def kernel_terms(self) -> KernelTerms:
        return KernelTerms.constant(1.0 - self.decay)


def test_a_rule_may_change_between_updates(backend: str) -> None:
    rule, model = Tunable(), nn.ParameterList([nn.Parameter(torch.zeros(2))])
    average = updated_once(model, rule=rule, backend=backend)
    with torch.no_grad():
        model[0].fill_(1.0)
    average.update_parameters(model)
    rule.decay = 1.0
    average.update_parameters(model)
    assert average.module[0].tolist() == [0.5, 0.5]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_is_not_held_up_by_a_thread_of_its_parent() -> None:
    model = nn.Linear(3, 3)
    average = updated_once(model)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with average._guard.hold("a test"):
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends the child, and so the test, where it would hang
        average.update_parameters(model)
        os._exit(0 if average.n_averaged == 2 else 1)
    release.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_planning_grows_with_the_number_of_tensors_and_no_faster() -> None:
    def seconds(count: int) -> float:
        model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(count)])
        average = FusedAveragedModel(model)
        start = time.thread_time()
        average.update_parameters(model)
        return time.thread_time() - start

    seconds(100)
    assert seconds(8000) < 4 * 8 * min(seconds(1000) for _ in range(3))
