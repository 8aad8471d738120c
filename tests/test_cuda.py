"""The ``cuda`` backend's host side, on the shim: graphs, errors, choice, devices. No GPU is needed, and none is used.

``tests/test_backends.py`` holds its bits to the reference; ``tests/test_gpu_device.py`` is for a real device.
"""

from __future__ import annotations

import copy
import ctypes
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from swafast import ExponentialAverage, FusedAveragedModel, FusedAverages, PowerAverage, doctor
from swafast.backends import Unavailable, cpu, cuda, gpu, library
from swafast.backends.contract import Pair, Update
from swafast.backends.rows import Rows
from swafast.backends.triton import launch as triton_launch
from swafast.loop import runners
from swafast.op import choice, plan, torch_op
from swafast.terms import capturing
from swafast.terms.formats import FLOAT32, encode_exact
from swafast.terms.grids import SIDE, WHOLE, Grid, current_grid, use_grid
from swafast.terms.layout import GPU_CHUNK_NUMELS, cut_chunks
from swafast.terms.rules import EqualAverage, Rule
from swafast.terms.weight import KernelTerms
from tests.conftest import EveryKind, differing, tensors_of
from tests.kernels import averages_of, check_captured_paces, clone, make_pair, meet_at_each_line, update
from tests.kernels import differing as differing_pairs
from tests.support import drift, refused


class Shim:
    """What the shim lets a test set and see."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def get(self, name: str) -> int:
        return ctypes.c_longlong.in_dll(self._library, f"shim_{name}").value

    @contextmanager
    def capture(self) -> Iterator[None]:
        self._capture(True)
        yield
        self._capture(False)
        refused = ctypes.c_char_p.in_dll(self._library, "shim_refused").value
        assert refused is None, f"the capture has failed for {refused!r}"

    def _capture(self, on: bool) -> None:
        ctypes.c_int.in_dll(self._library, "shim_capturing").value = int(on)

    def replay(self) -> None:
        self._library.shim_replay()

    def fail(self, function: str | None) -> None:
        self._failing = ctypes.c_char_p(None if function is None else function.encode())  # the shim keeps a pointer
        ctypes.c_void_p.in_dll(self._library, "shim_failing").value = ctypes.cast(self._failing, ctypes.c_void_p).value

    def unload_kernels(self) -> None:
        self._library.shim_unload_kernels()

    def reset(self) -> None:
        self._capture(False)
        self.fail(None)
        self._library.shim_forget_captured()


@pytest.fixture
def shim(cuda_on_cpu: ctypes.CDLL) -> Iterator[Shim]:
    shim = Shim(cuda_on_cpu)
    shim.reset()
    yield shim
    shim.reset()


def a_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(5, 70), torch.nn.BatchNorm1d(70), torch.nn.Linear(70, 3))


def updated(**options: Any) -> tuple[torch.nn.Module, FusedAveragedModel]:
    """Return a model and its average after a first update."""
    model = a_model()
    average = FusedAveragedModel(model, **options)
    average.update_parameters(model)
    return model, average


def captured(shim: Shim, **options: Any) -> tuple[torch.nn.Module, FusedAveragedModel]:
    """Return the same after the capture of a second one."""
    model, average = updated(**options)
    with shim.capture():
        average.update_parameters(model)
    return model, average


def plan_of(average: FusedAveragedModel) -> plan.Plan:
    assert average._bindings.latest is not None
    return average._bindings.latest.plan


def test_an_update_is_one_launch_for_everything(shim: Shim) -> None:
    model = EveryKind().bfloat16()
    del model.gapped  # strided: the reference backend serves it
    average = FusedAveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    assert plan_of(average).backends == ["cuda"]
    before = shim.get("num_launches")
    average.update_parameters(model)
    assert shim.get("num_launches") == before + 1
    assert average.n_averaged == 2


SEVERAL = {"mean": EqualAverage(), "fast": ExponentialAverage(0.9), "power": PowerAverage(6.94)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        *({"rule": rule} for rule in (EqualAverage(), PowerAverage(6.94), ExponentialAverage(0.9, warmup="power"))),
        {"rule": ExponentialAverage(0.9, schedule="cosine", updates=20)},
        {"rules": SEVERAL, "format": {"fast": "compact", "power": "compensated"}},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_replays_are_updates(shim: Shim, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model, kind = a_model().to(dtype), FusedAverages if "rules" in options else FusedAveragedModel
    graphed, eager = kind(model, **options), kind(model, **options)
    for average in (graphed, eager):
        average.update_parameters(model)
    assert not plan_of(graphed).captured
    before, state = shim.get("num_launches"), tensors_of(graphed)
    with shim.capture():
        graphed.update_parameters(model)
    assert plan_of(graphed).captured
    assert shim.get("num_launches") == before + 1
    assert differing(tensors_of(graphed), state) == []  # captured is not run
    for _ in range(30):
        drift(model)
        shim.replay()
        eager.update_parameters(model)
    counts = [int(value) for key, value in graphed.state_dict().items() if key.endswith("n_averaged")]
    assert counts == [31] * len(options.get("rules", [None]))
    assert differing(graphed.state_dict(), eager.state_dict()) == []


# Grids


def launched(shim: Shim, launch: cuda.CudaLaunch, pairs: Sequence[Pair], counter: Tensor, grid: Grid) -> list[int]:
    """Update in this grid, and return how many blocks of how many threads there were."""
    with use_grid(grid):
        update(launch, pairs, [EqualAverage()], [counter])
    return [shim.get("last_blocks"), shim.get("last_threads")]


def check_grids(shim: Shim, grids: Sequence[tuple[Grid, list[int]]]) -> None:
    """Launch one table in all of these grids in turn, and compare blocks and bits with launches in the whole one."""
    pairs = averages_of(1, (9, 3 * GPU_CHUNK_NUMELS[0] + 7))
    launch, expected = cuda.prepare(pairs), clone(pairs)
    one, counters = cuda.prepare(expected), [torch.tensor(0), torch.tensor(0)]
    for grid, blocks in grids:
        assert launched(shim, launch, pairs, counters[0], grid) == blocks
        update(one, expected, [EqualAverage()], counters[1:])
    assert counters[0] == counters[1] == len(grids)
    assert differing_pairs(pairs, expected) == []


def test_one_table_is_launched_in_any_grid(shim: Shim) -> None:
    """The shim's device holds 6 blocks of 256 threads or 3 of 1024."""
    grids = [(WHOLE, [6, 256]), (Grid(1024), [3, 1024]), (Grid(256, 0.5), [3, 256]), (SIDE, [1, 1024])]
    check_grids(shim, [*grids, *reversed(grids)])


def test_a_replay_in_one_grid_between_updates_in_another(shim: Shim) -> None:
    model, average = updated()
    with shim.capture(), use_grid(SIDE):
        average.update_parameters(model)
    for _ in range(3):
        average.update_parameters(model)
        shim.replay()
    assert average.n_averaged == 7


def test_an_update_on_side_streams_leaves_multiprocessors_free(shim: Shim) -> None:
    model, average = updated()
    runner = runners.OnStreams(average._beside(model), ())
    before = shim.get("num_launches")
    runner.update()
    assert shim.get("num_launches") == before + 1
    assert [shim.get("last_blocks"), shim.get("last_threads")] == [1, 1024]
    average.update_parameters(model)
    assert shim.get("last_threads") == 256
    assert current_grid() == WHOLE
    assert SIDE.num_blocks(132) == 24  # an H200


@pytest.mark.parametrize("numel", [None, 64])
def test_a_grid_may_ask_for_another_size_of_chunks(shim: Shim, numel: int | None) -> None:
    with use_grid(Grid(chunk_numel=numel)):
        launch = cuda.prepare([make_pair(1000, torch.float32, FLOAT32)])
    assert launch._tables[0].head.num_chunks == (1 if numel is None else 16)


@pytest.mark.parametrize("num_paces", [1, 3])
def test_a_descriptor_holds_all_of_its_chunk(num_paces: int) -> None:
    pairs = averages_of(num_paces, (9, 200))
    rows = Rows(pairs)
    chunks = cut_chunks(rows.runs(), 64)
    described, seen = rows.descriptors(chunks).tolist(), set()
    for tensor, offset, numel, first_index, step in chunks.tolist():
        at = len(seen & set(range(len(chunks))))
        for row in range(tensor, tensor + rows.table[tensor].followers + 1):
            pair, word = pairs[rows.order[row]], described[at]
            seen.add(at)
            arrays = [pair.param, *pair.planes, None][:3]
            # Of copied pairs, offsets count bytes.
            starts = [
                0 if one is None else one.data_ptr() + offset * (1 if pair.format is None else one.element_size())
                for one in arrays
            ]
            assert word[:6] == [*starts, numel, first_index, signed(rows.table[row].key)]
            assert (word[6] & 0xFFFFFFFF, word[6] >> 32) == (row, step)
            kinds = rows.table[row].dtype | rows.table[row].format << 8 | pair.pace << 16
            assert word[7] & 0xFFFFFFFF == kinds
            at = word[7] >> 32
        assert at == 0
    assert seen == set(range(len(described)))


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def plan_anew_after_a_capture(shim: Shim) -> tuple[FusedAveragedModel, weakref.ref[plan.Plan]]:
    model, average = captured(shim, rule=ExponentialAverage(0.5))
    plan_in_graph = weakref.ref(plan_of(average))
    for other in [copy.deepcopy(model) for _ in range(3)]:  # as many models as have a plan at a time
        average.update_parameters(other)
    assert plan_of(average) is not plan_in_graph()
    return average, plan_in_graph


def test_a_captured_plan_is_kept_when_another_takes_its_place(shim: Shim) -> None:
    average, plan_in_graph = plan_anew_after_a_capture(shim)
    assert (
        plan_in_graph() is not None
    )  # and with it its tables and the memory of its params, which nobody else holds now
    for _ in range(20):  # whatever was freed is handed out again, and overwritten
        average.update_parameters(a_model())
        torch.full((500,), 7.0)
    count = int(average.n_averaged)
    shim.replay()
    assert average.n_averaged == count + 1


def test_a_plan_that_is_let_go_while_a_graph_holds_it_is_seen(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.Plan, "captured", False)
    _, plan_in_graph = plan_anew_after_a_capture(shim)
    assert plan_in_graph() is None


def test_averages_that_move_after_a_capture_keep_their_memory_and_warn(shim: Shim) -> None:
    model, average = captured(shim)
    average.double().float()
    with pytest.warns(RuntimeWarning, match="capture it again"):
        average.update_parameters(model)
    drift(model)
    state = average.averaged_state_dict()
    shim.replay()
    assert differing(average.averaged_state_dict(), state) == []


def test_what_cannot_be_captured_is_refused_before_anything_changes(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model()
    average = FusedAveragedModel(model)
    with monkeypatch.context() as context:
        context.setattr(capturing, "is_capturing", lambda gpu: True)
        with refused(RuntimeError, r"the first update of a model, .* must not be captured", average.module):
            average.update_parameters(model)
    average.update_parameters(model)
    with monkeypatch.context() as context:
        context.setattr(capturing, "is_capturing", lambda gpu: True)
        with pytest.raises(RuntimeError, match="swapped_into must not be captured"), average.swapped_into(model):
            pass
        average.update_parameters(model)
    assert average.n_averaged == 2


WAITING = [({"nonfinite": "raise"}, "nonfinite='raise'"), ({"avg_fn": lambda a, p, n: p}, "an averaging function")]


@pytest.mark.parametrize(("options", "what"), WAITING)
def test_what_waits_for_the_device_is_refused_in_a_capture(
    shim: Shim, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], what: str
) -> None:
    model, average = updated(**options)
    monkeypatch.setattr(capturing, "is_capturing", lambda gpu: True)
    with pytest.raises(RuntimeError, match=f"{what}.* must not be captured"):
        average.update_parameters(model)
    assert average.n_averaged == 1


def test_a_failing_launch_says_why_and_changes_nothing(shim: Shim) -> None:
    model, average = updated()
    drift(model)
    shim.fail("cudaLaunchKernelEx")
    with refused(RuntimeError, "a CUDA launch of swafast failed: cudaErrorLaunchOutOfResources", average):
        average.update_parameters(model)
    shim.fail(None)
    average.update_parameters(model)
    assert average.n_averaged == 2


def test_a_device_that_cannot_run_the_kernels_warns_once_and_goes_without(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim.fail("cudaOccupancyMaxActiveBlocksPerMultiprocessor")
    gpu.warn_unusable.cache_clear()
    model = a_model()
    average = FusedAveragedModel(model)
    with pytest.warns(RuntimeWarning, match=r"CUDA kernels do not run on cpu: cudaErrorLaunchOutOf") as seen:
        average.update_parameters(model)
    assert len(seen) == 1
    assert plan_of(average).backends == ["cpu"]
    assert average.n_averaged == 1


def test_a_failure_that_passes_does_not_change_the_backend_of_later_averages(shim: Shim) -> None:
    shim.unload_kernels()
    gpu.warn_unusable.cache_clear()
    model = a_model()
    average = FusedAveragedModel(model)
    shim.fail("cudaFuncGetAttributes")
    with pytest.warns(RuntimeWarning, match="do not run on cpu: cudaErrorLaunchOutOfResources"):
        average.update_parameters(model)
    shim.fail(None)
    assert plan_of(average).backends == ["cpu"]
    model, average = updated()
    assert plan_of(average).backends == ["cuda"]


def test_kernels_are_loaded_while_another_thread_captures(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread in the relaxed mode may do what the capture of another one forbids."""
    mode = 0

    def exchange_mode(given: Any) -> int:
        nonlocal mode
        mode, given._obj.value = given._obj.value, mode
        shim._capture(mode == 0)
        return 0

    monkeypatch.setattr(capturing, "_exchange_mode", lambda: exchange_mode)
    shim.unload_kernels()
    with warnings.catch_warnings(), shim.capture():
        warnings.simplefilter("error")
        _, average = updated()
    assert plan_of(average).backends == ["cuda"]


def test_a_table_is_copied_and_a_nan_read_while_another_thread_captures(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, waits = 0, []

    @contextmanager
    def allowed_to_wait() -> Iterator[None]:
        nonlocal allowed
        allowed += 1
        yield
        allowed -= 1

    class Stream:
        def synchronize(self) -> None:
            waits.append(allowed)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)  # type: ignore[assignment]

        def to(self, device: torch.device) -> Tensor:  # type: ignore[override]
            waits.append(allowed)
            return self

        def __int__(self) -> int:
            waits.append(allowed)
            return 0

    monkeypatch.setattr(gpu, "allowed_to_wait", allowed_to_wait)
    monkeypatch.setattr(gpu, "current_raw_stream", lambda _: 0)
    monkeypatch.setattr(gpu, "refuse_capture", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    made = Rows.descriptors
    monkeypatch.setattr(Rows, "descriptors", lambda rows, chunks: made(rows, chunks).as_subclass(OnGpu))
    pair = averages_of(1, (9,))[0]
    on_gpu = replace(pair, param=pair.param.as_subclass(OnGpu))
    launch = SimpleNamespace(_tables=[gpu.make_table([on_gpu], [0], 3)], _stream=lambda _: 0)
    launch.start_first_nonfinite = lambda *_: None
    assert waits == [1, 1]
    assert gpu.DeviceLaunch.first_nonfinite(launch, ()) is None  # type: ignore[arg-type]
    assert waits == [1, 1, 1]


def test_a_failing_launch_on_the_way_back_still_gives_back_what_was_set_aside(shim: Shim) -> None:
    model = torch.nn.ParameterDict({"a": torch.zeros(9), "b": torch.zeros(9, dtype=torch.float64)})
    average = FusedAveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        model["b"].fill_(5)

    def body() -> None:
        with average.swapped_into(model):
            assert model["b"].sum() == 0
            shim.fail("cudaLaunchKernelEx")

    with pytest.raises(RuntimeError, match="a CUDA launch of swafast failed"):
        body()
    shim.fail(None)
    assert torch.equal(model["b"].detach(), torch.full((9,), 5.0, dtype=torch.float64))


@pytest.mark.parametrize("change", ["plans between", "counter"])
def test_every_captured_plan_is_watched(shim: Shim, change: str) -> None:
    model, average = captured(shim)
    if change == "counter":
        average.n_averaged = torch.tensor(7)
    else:
        average.update_parameters(copy.deepcopy(model))
        average.double().float()
    with pytest.warns(RuntimeWarning, match="capture it again"):
        average.update_parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average.update_parameters(copy.deepcopy(model))


def put_elsewhere(launch: cuda.CudaLaunch, elsewhere: torch.device) -> gpu.Table:
    """Let the one table of ``launch`` be on another device than it is on, as far as the launch can tell."""
    (table,) = launch._tables
    table.device = elsewhere
    return table


def on_two_devices(pairs: Sequence[Pair], at: int) -> cuda.CudaLaunch:
    """Prepare the pairs from ``at`` on for a second device, as far as the launch can tell, which comes first."""
    elsewhere = torch.device("cpu", 0)
    launch, other = cuda.prepare(pairs[:at]), cuda.prepare(pairs[at:])
    there = put_elsewhere(other, elsewhere)
    there.indices = tuple(index + at for index in there.indices)
    launch._tables.insert(0, there)
    return launch


@pytest.mark.parametrize("num_paces", [1, 3])
def test_counters_elsewhere_are_counted_only_if_the_update_was(shim: Shim, num_paces: int) -> None:
    pairs = averages_of(num_paces, (30,))  # a launch goes by addresses, and keeps nothing alive
    launch, rules = cuda.prepare(pairs), [EqualAverage()] * num_paces
    put_elsewhere(launch, torch.device("cpu", 0))  # the counters are on another device, as far as it can tell
    counters = [torch.tensor(n) for n in range(num_paces)]
    update(launch, pairs, rules, counters)
    assert list(map(int, counters)) == [n + 1 for n in range(num_paces)]
    counters[-1].fill_(-2)
    before = clone(pairs)
    with pytest.raises(ValueError, match="n_averaged must be >= 0, got -2"):
        update(launch, pairs, rules, counters)
    assert list(map(int, counters)) == [*range(1, num_paces), -2]
    assert differing_pairs(pairs, before) == []


@pytest.mark.parametrize("num_paces", [1, 3, library.MAX_PACES])
def test_devices_share_the_counters(shim: Shim, num_paces: int) -> None:
    # The counters have to be brought to the second device, and counted once.
    both = [averages_of(num_paces, (size,)) for size in (300, 33)]
    pairs = [pair for each in both for pair in each]
    launch, expected = on_two_devices(pairs, len(both[0])), clone(pairs)
    one = cuda.prepare(expected)
    counters = [[torch.tensor(2 + 3 * k) for k in range(num_paces)] for _ in range(2)]
    rules: list[Rule] = [EqualAverage(), PowerAverage(6.94), ExponentialAverage(0.9, warmup="power")]
    rules = [rules[k % 3] for k in range(num_paces)]
    for _ in range(3):
        update(launch, pairs, rules, counters[0])
        update(one, expected, rules, counters[1])
    for counted in counters:
        assert list(map(int, counted)) == [5 + 3 * k for k in range(num_paces)]
    assert differing_pairs(pairs, expected) == []
    for pair in pairs:
        if pair.format is not None:
            pair.param.normal_()
    pairs[0].param[0] = float("nan")
    before = clone(pairs)
    update(launch, pairs, rules, counters[0], skip_nonfinite=True)
    assert list(map(int, counters[0])) == [5 + 3 * k for k in range(num_paces)]
    assert differing_pairs(pairs, before) == []


def test_a_search_on_two_devices_is_not_captured(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [pair for size in (300, 33) for pair in averages_of(1, (size,))]
    launch, counter, before = on_two_devices(pairs, 1), torch.tensor(2), clone(pairs)
    launches = shim.get("num_launches")
    monkeypatch.setattr(capturing, "is_capturing", lambda gpu: True)
    with pytest.raises(RuntimeError, match="a search for NaNs whose result the host reads must not be captured"):
        update(launch, pairs, [EqualAverage()], [counter], skip_nonfinite=True)
    assert (int(counter), shim.get("num_launches")) == (2, launches)
    assert differing_pairs(pairs, before) == []


def test_the_first_capture_of_a_process_finds_its_kernels_loaded(shim: Shim) -> None:
    shim.unload_kernels()
    model, average = updated()  # which launches no search for NaNs
    average.nonfinite = "skip"
    with shim.capture():
        average.update_parameters(model)
    shim.replay()
    assert average.n_averaged == 2


@pytest.mark.parametrize("backend", ["cuda", "another"])
def test_memory_that_another_stream_uses_is_kept_for_it(
    shim: Shim, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    launch = cuda.prepare(averages_of(1, (30,)))
    table = put_elsewhere(launch, torch.device(backend if backend == "cuda" else "cpu"))
    told: list[object] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda words, stream: told.append((words.data_ptr(), stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    for stream in (table.stream, 7, 7, table.stream):
        monkeypatch.setattr(gpu, "current_raw_stream", lambda device, stream=stream: stream)
        assert launch._stream(table) == stream
    assert told == ([(table.words.data_ptr(), "current")] * 2 if backend == "cuda" else [])


def test_replays_go_by_the_rules_that_were_captured(shim: Shim) -> None:
    check_captured_paces(cuda.prepare, averages_of(3, (33,)), shim.capture(), shim.replay)


def test_the_op_prepares_once_and_keeps_what_a_graph_holds(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make_table = gpu.make_table
    monkeypatch.setattr(gpu, "make_table", lambda *args: made.append(1) or make_table(*args))
    monkeypatch.setattr(torch_op, "_captured", [])
    average, remainder = encode_exact(torch.randn(100))
    param, counter = torch.randn(100).bfloat16(), torch.tensor(1)
    terms = KernelTerms.constant(0.25)

    def update() -> None:
        torch.ops.swafast.update_([average], [remainder], [param], counter, "exact", terms.kind, list(terms.terms))

    for _ in range(3):
        update()
    assert len(made) == 1
    assert torch_op._captured == []
    with shim.capture():
        update()
    assert len(torch_op._captured) == 1
    shim.replay()
    assert counter.item() == 5


# Which backend serves which device, and who hears of one that does not load


@pytest.fixture
def all_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every backend seem to run, ``cuda`` and ``triton`` on GPUs."""
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.delenv("SWAFAST_BACKEND", raising=False)
    for backend in (cuda, cpu, triton_launch):
        monkeypatch.setattr(backend, "unavailable", lambda: None)
    for backend in (cuda, triton_launch):
        monkeypatch.setattr(backend, "device_types", frozenset({"cuda"}))


def chosen(*device_types: str, name: str | None = None) -> list[str]:
    return [backend.name for backend in choice.choose_backends(name, device_types)]


@pytest.mark.parametrize(
    ("missing", "has_triton", "expected", "warning"),
    [
        (None, True, ["cuda", "triton", "reference"], None),
        (Unavailable("built without nvcc", expected=True), True, ["triton", "reference"], None),
        (Unavailable("not a library"), True, ["triton", "reference"], "triton backend: cuda: not a library"),
        (Unavailable("no nvcc", expected=True), False, ["reference"], "reference backend: cuda: no nvcc"),
    ],
)
def test_what_is_missing_warns_once_unless_a_gpu_backend_is_left_as_expected(
    all_backends: None,
    monkeypatch: pytest.MonkeyPatch,
    missing: Unavailable | None,
    has_triton: bool,
    expected: list[str],
    warning: str | None,
) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda: missing)
    if not has_triton:
        monkeypatch.setattr(triton_launch, "device_types", frozenset({"xpu"}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert [chosen("cuda") for _ in range(2)] == [expected] * 2
    told = [str(each.message) for each in seen]
    assert told == [] if warning is None else (len(told) == 1 and told[0].endswith(warning))


def test_backends_come_by_device_and_the_others_are_not_asked(
    all_backends: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen("cpu", "cuda") == ["cuda", "cpu", "triton", "reference"]
    for backend in (cuda, triton_launch):
        monkeypatch.setattr(backend, "unavailable", lambda: pytest.fail("asked"))
    assert chosen("cpu") == ["cpu", "reference"]


def test_one_asked_for_by_name_stands_alone_or_raises(all_backends: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("cuda", name="triton") == ["triton", "reference"]
    monkeypatch.setenv("SWAFAST_BACKEND", "cuda")
    assert chosen("cuda") == ["cuda", "reference"]
    monkeypatch.setattr(cuda, "unavailable", lambda: Unavailable("no CUDA device", expected=True))
    with pytest.raises(RuntimeError, match="SWAFAST_BACKEND='cuda' cannot run here: no CUDA device"):
        chosen("cuda")
    monkeypatch.setenv("SWAFAST_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"SWAFAST_BACKEND must be one of .*, got 'tpu'"):
        chosen("cuda")


def test_the_doctor_shows_the_kernels_and_how_they_were_built(shim: Shim) -> None:
    found = dict(doctor.report())
    assert "shim" in found["backend cuda"]
    assert "blocks on device 0: " in found["backend cuda"]
    assert found["in use on cpu"].startswith("cuda ")


def test_a_library_whose_nvcc_did_not_work_is_worth_a_warning(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    class Built:
        _name = "libswafast.so"

        def swafast_build(self) -> bytes:
            return b"gcc 12, OpenMP, no CUDA: nvcc was there and did not work"

    monkeypatch.setattr(library, "load", Built)
    missing = cuda.unavailable()
    assert missing is not None
    assert not missing.expected


def test_a_library_built_without_cuda_is_no_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device_types", frozenset({"cpu"}))
    monkeypatch.setattr(library, "has_cuda", lambda loaded: False)
    missing = cuda.unavailable()
    assert missing is not None
    assert missing.expected == (not isinstance(library.load(), Unavailable))


# Each gate kills a bug


def count_twice(patch: pytest.MonkeyPatch) -> None:
    start = cuda.CudaLaunch.start_update
    patch.setattr(
        cuda.CudaLaunch,
        "start_update",
        lambda self, table, paces, advance, *rest: start(self, table, paces, 2 * advance, *rest),
    )


def bring_one_counter_for_all(patch: pytest.MonkeyPatch) -> None:
    counters = gpu.Table.counters.fget
    patch.setattr(gpu.Table, "counters", property(lambda table: counters(table)[:1] * library.MAX_PACES))


def count_blocks_of_one_grid(patch: pytest.MonkeyPatch) -> None:
    grid = cuda.CudaLaunch.grid
    held: dict[int, Any] = {}
    patch.setattr(cuda.CudaLaunch, "grid", lambda self, table: held.setdefault(id(table), grid(self, table)))


def keep_the_captured_rules(patch: pytest.MonkeyPatch) -> None:
    start = cuda.CudaLaunch.start_update
    held: dict[int, Any] = {}

    def same_rules(self: Any, table: Any, paces: Any, *rest: Any) -> None:
        if not self.captured:
            held[id(self)] = paces
        start(self, table, held[id(self)], *rest)

    patch.setattr(cuda.CudaLaunch, "start_update", same_rules)


@pytest.mark.parametrize(
    ("plant", "gate", "says"),
    [
        (count_twice, lambda shim: test_devices_share_the_counters(shim, 1), r"\[8\] == \[5"),
        (bring_one_counter_for_all, lambda shim: test_devices_share_the_counters(shim, 3), "pace"),
        (count_blocks_of_one_grid, test_one_table_is_launched_in_any_grid, r"\[6, 256\] == \[3, 1024\]"),
        (keep_the_captured_rules, test_replays_go_by_the_rules_that_were_captured, "a replay is wrong"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_gate_kills_the_bug(shim: Shim, plant: Any, gate: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=says):
        gate(shim)


@pytest.mark.usefixtures("shim")
def test_two_threads_may_meet_at_each_line_of_an_update() -> None:
    """Both weights count, whichever of two updates of one launch comes first."""
    (pair,) = averages_of(1, (17,))[:1]
    launch, counter = cuda.prepare([pair]), torch.tensor(1)
    pair.param.fill_(1.0)
    one, other = (
        partial(launch.update, [pair.param], Update((KernelTerms.constant(weight),), (counter,)))
        for weight in (0.5, 0.75)
    )
    other()
    pair.average.zero_()
    for line in meet_at_each_line(one, other, ("backends/gpu.py", "backends/cuda.py")):
        assert (pair.average - 0.875).abs().max() < 1e-6, f"line {line}: {pair.average}"
        pair.average.zero_()
