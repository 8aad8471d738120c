"""What only a CUDA device shows: no sync, graphs, streams, memory, pickles. By ``pytest -m gpu``."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.optim.swa_utils import AveragedModel

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, FusedAverages, PowerAverage
from swafast.backends import cuda
from swafast.backends.contract import Pair
from swafast.backends.triton import launch as triton_launch
from swafast.terms.formats import FLOAT32, encode_exact
from swafast.terms.rules import Rule
from swafast.terms.weight import KernelTerms
from tests.conftest import EveryKind, differing, tensors_of
from tests.kernels import check_captured_paces
from tests.support import drift
from tests.test_documents import TEXTS, blocks_of

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    missing = {"cuda": cuda, "triton": triton_launch}[request.param].unavailable()
    assert missing is None, missing
    return str(request.param)


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Make any wait of the host for the device an error; a test enters it after its first update."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 300), nn.BatchNorm1d(300), nn.Linear(300, 17))
    return model.to("cuda", dtype)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SEVERAL: dict[str, Rule] = {
    "mean": EqualAverage(),
    "fast": ExponentialAverage(0.9),
    "power": PowerAverage(6.94),
    "warm": ExponentialAverage(0.999, warmup="power"),
}
MIXED = {"fast": "compact", "power": "compensated", "warm": "half"}


def counts_of(averages: Any) -> list[int]:
    return [int(each.n_averaged) for each in (averages.values() if isinstance(averages, FusedAverages) else [averages])]


def one_or_several(model: nn.Module, backend: str, several: bool, **options: Any) -> Any:
    """Return an averaged model, or several of mixed formats, after a first update."""
    if several:
        averages: Any = FusedAverages(model, rules=SEVERAL, format=MIXED, backend=backend, **options)
    else:
        averages = FusedAveragedModel(model, backend=backend, **options)
    averages.update_parameters(model)
    return averages


@DTYPES
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("several", [False, True])
def test_an_update_never_waits_and_allocates_nothing(
    backend: str, no_sync: None, dtype: torch.dtype, nonfinite: str, several: bool
) -> None:
    model = small_model(dtype)
    averages = one_or_several(model, backend, several, nonfinite=nonfinite)
    averages.update_parameters(model)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(5):
        averages.update_parameters(model)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert set(counts_of(averages)) == {7}


def test_the_mode_that_forbids_waiting_sees_torchs_class_wait(no_sync: None) -> None:
    model = small_model()
    average = AveragedModel(model)
    average.update_parameters(model)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError):
        average.update_parameters(model)


def test_a_rule_of_python_alone_works_and_says_that_it_waits(backend: str) -> None:
    class Halving(Rule):
        def weight(self, num_averaged: int) -> float:
            return 1.0 if num_averaged == 0 else 0.5

    model = small_model()
    average = FusedAveragedModel(model, backend=backend, rule=Halving())
    with pytest.warns(RuntimeWarning, match="Halving has no kernel_terms"):
        average.update_parameters(model)
    assert average.n_averaged == 1


@pytest.mark.parametrize(
    ("dtype", "format"),
    [
        *((dtype, None) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        (torch.bfloat16, "compact"),
        (torch.bfloat16, "half"),
        (torch.float32, "compensated"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", [EqualAverage(), PowerAverage(6.94)], ids=str)
def test_a_thousand_replays_are_a_thousand_updates(
    backend: str, dtype: torch.dtype, format: str | None, rule: Rule
) -> None:
    model = small_model(dtype)
    deltas = [torch.randn_like(param) * 1e-3 for param in model.parameters()]
    twin = copy.deepcopy(model)
    eager = FusedAveragedModel(twin, backend=backend, rule=rule, format=format)
    graphed = FusedAveragedModel(model, backend=backend, rule=rule, format=format)
    eager.update_parameters(twin)
    graphed.update_parameters(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        torch._foreach_add_(list(model.parameters()), deltas)
        graphed.update_parameters(model)
    for _ in range(1000):
        graph.replay()
        with torch.no_grad():
            torch._foreach_add_(list(twin.parameters()), deltas)
        eager.update_parameters(twin)
    assert graphed.n_averaged == eager.n_averaged == 1001
    assert differing(graphed.averaged_state_dict(), eager.averaged_state_dict()) == []


@DTYPES
def test_replays_are_updates_of_all_averages(backend: str, dtype: torch.dtype) -> None:
    model = small_model(dtype)
    graphed, eager = (one_or_several(model, backend, True) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.update_parameters(model)
    for _ in range(100):
        drift(model)
        graph.replay()
        eager.update_parameters(model)
    assert counts_of(graphed) == counts_of(eager) == [101] * len(SEVERAL)
    assert differing(tensors_of(graphed), tensors_of(eager)) == []


def test_replays_skip_all_averages_or_none(backend: str) -> None:
    model = small_model()
    averages = one_or_several(model, backend, True, nonfinite="skip")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        averages.update_parameters(model)
    (param, *_) = model.parameters()
    kept, before = param.detach().clone(), tensors_of(averages)
    with torch.no_grad():
        param[-1, -1] = float("nan")
    graph.replay()
    assert differing(tensors_of(averages), before) == []
    with torch.no_grad():
        param.copy_(kept)
    graph.replay()
    assert counts_of(averages) == [2] * len(SEVERAL)


def test_replays_go_by_the_rules_that_were_captured(backend: str) -> None:
    prepare = {"cuda": cuda, "triton": triton_launch}[backend].prepare
    param, graph = torch.randn(5000, device="cuda"), torch.cuda.CUDAGraph()
    pairs = [Pair("param", param, (torch.zeros(5000, device="cuda"),), FLOAT32, pace=pace) for pace in range(3)]
    check_captured_paces(prepare, pairs, torch.cuda.graph(graph), graph.replay)


def launches_of(update: Callable[[], None]) -> list[str]:
    """Return the names of the kernels that an update launches."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        update()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_several_averages_are_one_launch(backend: str) -> None:
    model = small_model(torch.bfloat16)
    averages = one_or_several(model, backend, True, use_buffers=True)
    averages.update_parameters(model)
    assert len(launches_of(lambda: averages.update_parameters(model))) == 1


def test_a_first_update_in_a_capture_is_refused(backend: str) -> None:
    model = small_model()
    average = FusedAveragedModel(model, backend=backend)
    before = tensors_of(average.module)
    with (
        pytest.raises(RuntimeError, match=r"the first update .* must not be captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        average.update_parameters(model)
    assert differing(tensors_of(average.module), before) == []
    average.update_parameters(model)
    assert average.n_averaged == 1


@pytest.mark.parametrize("way", ["overlap", "offload"])
def test_an_update_beside_the_step_breaks_no_capture(backend: str, way: str) -> None:
    """A capture begins while the update still waits for the GPU, and while its thread, if it has one, waits too."""
    model = small_model()
    average = FusedAveragedModel(model, backend=None if way == "offload" else backend, rule=ExponentialAverage(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attachment = average.attach(optimizer, overlap=way == "overlap", offload="cpu" if way == "offload" else None)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    x, graph, side = torch.ones(5, device="cuda"), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    optimizer.step()
    attachment.join()
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # a quarter of a second
    optimizer.step()
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="global")
        y = x * 2
        with pytest.raises(RuntimeError, match=r"attachment.join\(\), before you capture"):
            average.state_dict()
        time.sleep(0.5)  # the update ends meanwhile
        graph.capture_end()
    graph.replay()
    attachment.join()
    torch.cuda.synchronize()
    assert y.sum() == 10
    assert average.n_averaged == 2


def test_a_captured_plan_outlives_its_place(backend: str) -> None:
    model = small_model()
    average = one_or_several(model, backend, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        average.update_parameters(model)
    other = copy.deepcopy(model)
    average.update_parameters(other)  # plans anew
    for _ in range(50):  # whatever was freed is handed out again
        average.update_parameters(other)
        torch.randn(1000, device="cuda")
    drift(model)
    graph.replay()
    assert average.n_averaged == 53
    average.double().float()  # moves the averages
    with pytest.warns(RuntimeWarning, match="capture it again"):
        average.update_parameters(model)
    state = average.averaged_state_dict()
    graph.replay()  # into the old averages, which still have their memory
    torch.cuda.synchronize()
    assert differing(average.averaged_state_dict(), state) == []


def test_the_python_of_the_page_on_gpus_runs(backend: str) -> None:
    model = small_model()
    average = FusedAveragedModel(model, backend=backend)
    (block,) = (block for block in blocks_of(TEXTS["docs/gpu.md"]) if "torch.cuda" in block)
    exec(block, {"torch": torch, "model": model, "averaged": average})
    assert average.n_averaged == 2


def test_it_runs_on_the_current_stream(backend: str) -> None:
    model = small_model()
    average = FusedAveragedModel(model, backend=backend, rule=ExponentialAverage(0.5))
    average.update_parameters(model)
    expected = {name: param.detach().clone() for name, param in model.named_parameters()}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(20_000_000)  # the update must wait for what stands before it on its stream
        for param in model.parameters():
            param.add_(1)
        average.update_parameters(model)
    stream.synchronize()
    state = average.averaged_state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value + 0.5)


def test_threads_update_models_of_their_own(backend: str) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            model = small_model(torch.bfloat16)
            average = FusedAveragedModel(model, backend=backend)
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(200):
                    average.update_parameters(model)
                assert int(average.n_averaged) == 200
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_an_update_is_one_launch(backend: str) -> None:
    model = EveryKind().bfloat16().cuda()
    del model.gapped  # strided: the reference backend serves it
    average = FusedAveragedModel(model, backend=backend, use_buffers=True)
    average.update_parameters(model)
    assert len(launches_of(lambda: average.update_parameters(model))) == 1


def test_each_average_is_written_once(backend: str) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).cuda()
    average = one_or_several(model, backend, False)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    nbytes = sum(param.nbytes for param in model.parameters())
    assert file.tell() < 1.25 * nbytes
    again = pickle.loads(pickle.dumps(average))
    assert differing(tensors_of(again), tensors_of(average)) == []
    again.update_parameters(model)
    assert copy.deepcopy(average).n_averaged == 1


def test_a_write_is_seen_by_autograd(backend: str) -> None:
    model = small_model()
    average = one_or_several(model, backend, False)
    loss = average.module(torch.randn(4, 64, device="cuda")).square().sum()
    average.update_parameters(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_averages_may_live_on_the_cpu(backend: str) -> None:
    model = small_model(torch.bfloat16)
    away = FusedAveragedModel(model, device=torch.device("cpu"))
    here = FusedAveragedModel(model, backend=backend)
    for _ in range(3):
        drift(model)
        away.update_parameters(model)
        here.update_parameters(model)
    assert differing(away.averaged_state_dict(), {k: v.cpu() for k, v in here.averaged_state_dict().items()}) == []


def test_a_state_goes_from_one_device_to_the_other(backend: str) -> None:
    model = small_model(torch.bfloat16)
    average = one_or_several(model, backend, False)
    on_cpu = FusedAveragedModel(copy.deepcopy(model).cpu())
    on_cpu.load_state_dict(average.state_dict())
    drift(model)
    average.update_parameters(model)
    on_cpu.update_parameters(copy.deepcopy(model).cpu())
    assert differing(on_cpu.state_dict(), {k: v.cpu() for k, v in average.state_dict().items()}) == []


@pytest.mark.parametrize("backend_name", ["cuda", "triton"])
def test_the_op_passes_opcheck_and_compiles_fullgraph(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAFAST_BACKEND", backend_name)
    averages, remainders = zip(*(encode_exact(torch.randn(n, device="cuda")) for n in (5, 4097)), strict=True)
    params = [torch.randn(n, device="cuda", dtype=torch.bfloat16) for n in (5, 4097)]
    counter = torch.tensor(3, device="cuda")
    terms = KernelTerms.constant(0.25)
    arguments = (list(averages), list(remainders), params, counter, "exact", terms.kind, list(terms.terms))
    opcheck(torch.ops.swafast.update_, arguments)

    @torch.compile(fullgraph=True)
    def step(scale: torch.Tensor) -> torch.Tensor:
        torch.ops.swafast.update_(*arguments)
        return scale * 2

    before = counter.clone()
    step(torch.ones(3, device="cuda"))
    assert counter == before + 1


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="one GPU is all there is")
def test_one_launch_for_each_device(backend: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8).to("cuda:0"), nn.Linear(8, 8).to("cuda:1"))
    average = FusedAveragedModel(model, backend=backend)
    averages, alone = one_or_several(model, backend, True), {}
    for name, rule in SEVERAL.items():
        alone[name] = FusedAveragedModel(model, backend="reference", rule=rule, format=MIXED.get(name))
        alone[name].update_parameters(model)
    for _ in range(3):
        average.update_parameters(model)
        averages.update_parameters(model)
        for each in alone.values():
            each.update_parameters(model)
    assert average.n_averaged == 3
    for name, each in alone.items():
        assert differing(tensors_of(averages[name]), tensors_of(each)) == []
    state = average.averaged_state_dict()
    assert all(torch.equal(state[name], param) for name, param in model.named_parameters())


def test_more_than_two_to_the_31_elements(backend: str) -> None:
    numel = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 8 * numel:
        pytest.skip("this GPU has too little memory for 2**31 elements and their averages")
    param = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    model = nn.ParameterList([param])
    average = FusedAveragedModel(model, backend=backend, rule=ExponentialAverage(0.5))
    average.update_parameters(model)
    for place in (0, 2**31 - 1, 2**31, numel - 1):
        param[place] = 1.0
    average.update_parameters(model)
    (kept,) = average.module.parameters()
    assert [float(kept[place]) for place in (0, 1, 2**31 - 1, 2**31, numel - 2, numel - 1)] == [
        0.5,
        0,
        0.5,
        0.5,
        0,
        0.5,
    ]
    assert int(torch.count_nonzero(kept[: 2**30])) == 1
