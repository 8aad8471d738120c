"""Triton's own launch path without a GPU: its binder, launcher and loader, on a CUDA driver that runs nothing.

``python -m tests.null_driver FOLDER`` launches the kernels through ``tests/native/null_driver.cpp``, which
:func:`build_null_driver` has built in the folder, and prints what the driver saw as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from tests.native_build import COMPILER, FLAGS, NATIVE, run

#: Programs of a launch, where there are as many chunks.
PROGRAMS = 528


def build_null_driver(folder: Path) -> Path:
    """Build ``folder/libcuda.so.1`` with the header that Triton brings along."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    flags = [*FLAGS, "-O1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", "-I", str(include)]
    run([*COMPILER, *flags, str(NATIVE / "null_driver.cpp"), "-o", str(library), "-ldl"])
    (folder / "libcuda.so").symlink_to(library)  # older releases link with it
    return library


class NullDriver:
    """The driver, in the place of Triton's, for device 0 and its default stream."""

    def __init__(self, folder: Path) -> None:
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self._library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver

        active: Any = CudaDriver()
        active.get_current_device = lambda: 0
        active.get_current_stream = lambda device: 0
        active.get_device_capability = lambda device=None: (9, 0)
        active.set_current_device = lambda device: None
        driver.set_active(active)

    def __getattr__(self, name: str) -> int:
        return ctypes.c_longlong.in_dll(self._library, f"null_{name}").value

    @property
    def kernel(self) -> str:
        """The name of the kernel that was launched last."""
        return (ctypes.c_char * 64).in_dll(self._library, "null_kernel").value.decode()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        flag = ctypes.c_int.in_dll(self._library, "null_capturing")
        flag.value = 1
        try:
            yield
        finally:
            flag.value = 0

    def seen(self, work: Callable[[], object]) -> dict[str, object]:
        """Return launches and newly loaded modules of some work, and kernel, blocks and threads of the last launch."""
        launches, modules = self.launches, self.modules
        work()
        counted = {"launches": self.launches - launches, "modules": self.modules - modules}
        return {**counted, "kernel": self.kernel, "blocks": self.blocks, "threads": self.threads}


#: Values that Triton would compile kernels for one by one: 1, multiples of 16, and those of 32 bits.
VALUES = (0, 1, 16, -3, 2**31, 2**62 + 1, 2**62)


def launch_with(values: Iterable[int], kernel: Any, options: Any) -> None:
    for value in values:
        kernel[(1,)](*[value] * len(kernel.arg_names), **options)


def main(folder: Path) -> None:
    driver = NullDriver(folder)
    import torch

    from swafast import EqualAverage, ExponentialAverage
    from swafast.backends.contract import Pair, Update
    from swafast.backends.triton import launch as backend
    from swafast.terms.draws import Draws
    from swafast.terms.formats import FLOAT32, with_spread
    from swafast.terms.rules import terms_of
    from swafast.terms.samples import Sample
    from swafast.terms.spread import Spread
    from tests.planting import Plant
    from tests.triton_source import import_kernels, read_kernels

    options, found = backend.launch_options("cuda"), {}
    # The addresses of CPU tensors serve: nothing follows them.
    with mock.patch.object(torch.cuda, "current_stream", mock.MagicMock()):
        for case, names in (("usable", backend.KERNELS), ("usable with spreads", backend.SPREAD_KERNELS)):
            found[case] = driver.seen(partial(backend._is_usable, torch.device("cpu"), names))
    with mock.patch.object(backend, "_INTERPRETED_PROGRAMS", PROGRAMS), driver.capturing():
        for name, count, paces in (("one", 1, 1), ("many", 4000, 1), ("several", 4000, 2)):
            planes = [(torch.zeros(8),) for _ in range(count)]
            pairs = [Pair(f"p{i}", each[0], each, FLOAT32, pace=i % paces) for i, each in enumerate(planes)]
            counters = [torch.zeros((), dtype=torch.int64) for _ in range(paces)]
            launch, rules = backend.TritonLaunch(pairs), (EqualAverage(), ExponentialAverage(0.9))[:paces]
            update = Update(tuple(map(terms_of, rules)), tuple(counters))
            for turn in ("first", "second"):
                found[f"{name}, {turn}"] = driver.seen(partial(launch.update, (), update))
        spread, planes = with_spread(FLOAT32, Spread(2), torch.float32), tuple(torch.zeros(4, 8).unbind())
        draws, counter = Draws(1, (8,)), torch.zeros((), dtype=torch.int64)
        pairs = [Pair(f"p{i}", planes[0], planes, spread, draws) for i in range(4000)]
        moved, update = backend.TritonLaunch(pairs), Update((terms_of(EqualAverage()),), (counter,))
        for turn in ("first", "second"):
            found[f"spreads, {turn}"] = driver.seen(partial(moved.update, (), update))
        found["draw"] = driver.seen(lambda: moved.draw((), Sample(3, (0.5,), 0.25)))
        found["exchange"] = driver.seen(lambda: launch.exchange(True))
        table = launch._tables[0]
        found["nonfinite"] = driver.seen(lambda: launch.start_first_nonfinite(table, 0))
        for name in (*backend.KERNELS, *backend.SPREAD_KERNELS):
            kernel = getattr(backend._kernels(), f"{name}_kernel")
            found[f"{name} with all values"] = driver.seen(partial(launch_with, VALUES, kernel, options))
    found["loaded in a capture"] = driver.loaded_in_capture
    spoiled = Plant("specialised", "launched", "=list(", "=[] and list(", "").apply(read_kernels())
    pace = import_kernels(folder / "specialised", spoiled)["paces"].pace_kernel
    found["specialised"] = driver.seen(partial(launch_with, VALUES[-2:], pace, options))
    times = []
    for _ in range(1000):
        begun = time.perf_counter()
        launch._start("exchange", table, state=table.head.state, wanted=1)
        times.append(time.perf_counter() - begun)
    found["microseconds of a launch"] = median(times) * 1e6
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
