"""Everything that the bench uses of swafast beside its public names, in one place."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swafast import FusedAveragedModel, FusedAverages
from swafast.backends import Unavailable, cpu, library
from swafast.op import tree_check
from swafast.op.choice import BACKENDS, choose_backends
from swafast.sharded.construction import format_of_average
from swafast.sharded.parts import all_gather
from swafast.sharded.parts.finding import find_holdings
from swafast.sharded.parts.shares import share_out
from swafast.terms.formats import get_format
from swafast.terms.grids import SIDE as SIDE
from swafast.terms.grids import Grid as Grid
from swafast.terms.grids import use_grid as use_grid
from swafast.terms.layout import GPU_CHUNK_NUMELS as GPU_CHUNK_NUMELS
from swafast.terms.layout import cut_chunks as cut_chunks
from swafast.terms.layout import gpu_chunk_numel as gpu_chunk_numel
from swafast.terms.layout import whole_runs as whole_runs

Averaged = FusedAveragedModel | FusedAverages

# How many averages one launch moves at most.
MOST_AVERAGES = library.MAX_PACES
# Elements decoded at once: on the way each takes up to 40 bytes.
DECODED_NUMEL = 1 << 25


def planes_nbytes(format: str) -> int:
    """Return the bytes that an average in this format takes per param."""
    nbytes = get_format(format).nbytes
    assert nbytes is not None
    return nbytes


def planes(averaged: FusedAveragedModel, model: nn.Module) -> list[Tensor]:
    """Return the tensors that hold the averages of params. Buffers are left out."""
    names = {name for name, _ in model.named_parameters()}
    # A key is the name of a plane, a dot, and the param's name.
    return [value for key, value in averaged.state_dict().items() if key.partition(".")[2] in names]


def decoded(averaged: FusedAveragedModel, format: str, model: nn.Module) -> Iterator[Tensor]:
    """Yield the averages in float32, in the order of ``model.parameters()``, one at a time.

    A whole export of Llama-3-8B would not fit beside its averages, so each tensor is decoded in pieces.
    """
    fmt, state = get_format(format), averaged.state_dict()
    keys = ("module", *(key for key, _ in fmt.extra))
    for name, param in model.named_parameters():
        if not fmt.extra and fmt.dtype == torch.float32:
            yield state[f"module.{name}"]
            continue
        pieces = [state[f"{key}.{name}"].reshape(-1).split(DECODED_NUMEL) for key in keys]
        whole = torch.empty(param.numel(), dtype=torch.float32, device=param.device)
        for piece, *parts in zip(whole.split(DECODED_NUMEL), *pieces, strict=True):
            piece.copy_(fmt.decode(tuple(parts)))
        yield whole.view(param.shape)


def backend_missing(name: str | None) -> str | None:
    """Return why a backend cannot run here, or None; the default one runs everywhere."""
    why = next((each.unavailable() for each in BACKENDS if each.name == name), None)
    return None if why is None else why.reason


def exchanges_in_place(backend: str) -> bool:
    """Return whether ``swapped_into`` exchanges bits in place on this backend. The others cast."""
    return next(each for each in BACKENDS if each.name == backend).exchanges


def backend_in_use(device: torch.device) -> str:
    """Return the name of the backend that updates run on, with the CPU's instruction set."""
    chosen = choose_backends(device_types={device.type})[0]
    return f"{chosen.name}, {cpu.current_isa()}" if chosen is cpu else chosen.name


def native_build() -> dict[str, str]:
    """Return how the native library in use was built, or why there is none."""
    native = library.load()
    if isinstance(native, Unavailable):
        return {"missing": native.reason}
    found = {"library": _text(native.swafast_build)}
    if library.has_cuda(native):
        found["cuda"] = _text(native.swafast_cuda_build)
    return found


def _text(function: Callable[[], bytes]) -> str:
    function.restype = ctypes.c_char_p  # type: ignore[attr-defined]
    return function().decode()


def set_window(nbytes: int) -> None:
    """Set the window of ``swapped_into`` on replicated params of a CPU."""
    all_gather.CPU_WINDOW_NBYTES = nbytes


def plan_shares(model: nn.Module, rank: int, ranks: int, *, share_replicas: bool = False) -> int:
    """Plan which params one rank averages, without building averages. Return their number of elements."""
    holdings = [held.holding for held in find_holdings(model, tuple(range(ranks)))]
    formats = {each.name: format_of_average(each, None, False) for each in holdings}
    return sum(share.numel for share in share_out(holdings, formats, rank, share_replicas=share_replicas))


# The checks before an update

tell = tree_check.tell
# The groups that the check of an average looks up: params and planes.
NUM_FOUND = 2


def native_pass_missing() -> str | None:
    """Return why tensors are not checked by a native pass here, or None."""
    found = tree_check.load()
    return found.reason if isinstance(found, Unavailable) else None


def _checks_of(averaged: Averaged) -> tree_check.Checks:
    """Return what checks the model of the last update."""
    binding: Any = averaged._bindings.latest
    return binding._checks


def native_pass(averaged: Averaged) -> tree_check.TreeCheck:
    """Return the check of the last update.

    Raises:
        RuntimeError: that update was checked in Python.
    """
    check = _checks_of(averaged)._check
    if check is None:
        reason = native_pass_missing() or "no pass fits its trees"
        raise RuntimeError(f"the last update was checked in Python: {reason}")
    return check


def check_in_python(averaged: Averaged) -> None:
    """Have the model of the last update checked in Python from now on, as where no native pass can be used."""
    checks = _checks_of(averaged)
    checks._check, checks.make = None, lambda make: None  # type: ignore[method-assign]


def written(averaged: Averaged, model: nn.Module) -> list[Tensor]:
    """Return the tensors that an update of ``model`` writes."""
    _, _, planes = averaged._bind(model)
    counters = [value for name, value in averaged.named_buffers() if name.rpartition(".")[2] == "n_averaged"]
    return [*planes, *counters]


def c_call(averaged: Averaged) -> Callable[[], object]:
    """Return the last update's call of C, with nothing checked before it and nothing told to autograd."""
    plan = averaged._bindings.latest.plan
    (work,), (update,) = plan._work, plan._described[1]

    def call() -> None:
        work.launch.update((), update)

    call.holds = averaged  # type: ignore[attr-defined]  # a launch has addresses only: its memory must live as long
    return call


@contextmanager
def stubbed_c_call() -> Iterator[None]:
    """Have the kernel of an update on a CPU do nothing, not even count: what is left is the host's."""
    native: Any = library.loaded()
    kernel = native.swafast_cpu_update
    native.swafast_cpu_update = lambda *arguments: 0
    try:
        yield
    finally:
        native.swafast_cpu_update = kernel


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Count calls of the native library's kernels, by launches that are prepared in the body."""
    counter: Counter[str] = Counter()
    native, loaded = library.loaded(), library.loaded

    class Counting:
        def __getattr__(self, name: str) -> Any:
            function = getattr(native, name)
            if name.rpartition("_")[2] not in ("update", "exchange", "draw", "nonfinite", "checksum"):
                return function

            def count(*args: Any) -> Any:
                counter[name] += 1
                return function(*args)

            return count

    library.loaded = lambda: Counting()  # type: ignore[assignment,return-value]
    try:
        yield counter
    finally:
        library.loaded = loaded
