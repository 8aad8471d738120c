"""Triton's own launch path on a CUDA driver that runs nothing: launches are counted, grids seen, modules loaded once.

``tests/null_driver.py`` makes the launches, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.native_build import ROOT, needs_compiler
from tests.null_driver import PROGRAMS, VALUES, build_null_driver

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
from swafast.backends.triton.launch import KERNELS, SPREAD_KERNELS

pytestmark = [pytest.mark.kernels, needs_compiler]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("driver")
    build_null_driver(folder)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "tests.null_driver", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def launched(kernel: str, launches: int, blocks: int, modules: int = 0) -> dict[str, object]:
    return {"launches": launches, "modules": modules, "kernel": f"{kernel}_kernel", "blocks": blocks, "threads": 256}


def test_all_kernels_are_loaded_before_the_first_update(seen: dict[str, Any]) -> None:
    assert seen["usable"] == launched(KERNELS[-1], len(KERNELS), 1, modules=len(KERNELS))
    count = len(SPREAD_KERNELS)
    assert seen["usable with spreads"] == launched(SPREAD_KERNELS[-1], count, 1, modules=count)
    assert seen["loaded in a capture"] == 0


@pytest.mark.parametrize(("case", "blocks", "paces"), [("one", 1, 1), ("many", PROGRAMS, 1), ("several", PROGRAMS, 2)])
def test_an_update_is_one_launch_and_one_for_each_new_pace(
    seen: dict[str, Any], case: str, blocks: int, paces: int
) -> None:
    assert seen[f"{case}, first"] == launched("update", 1 + paces, blocks)
    assert seen[f"{case}, second"] == launched("update", 1, blocks)


def test_an_update_of_spreads_is_one_launch_and_so_is_a_draw(seen: dict[str, Any]) -> None:
    assert seen["spreads, first"] == launched("spread", 2, PROGRAMS)  # and one that writes its pace
    assert seen["spreads, second"] == launched("spread", 1, PROGRAMS)
    assert seen["draw"] == launched("draw", 1, PROGRAMS)


def test_an_exchange_is_one_launch_and_a_search_for_nonfinite_values_two(seen: dict[str, Any]) -> None:
    assert seen["exchange"] == launched("exchange", 1, PROGRAMS)
    assert seen["nonfinite"] == launched("nonfinite", 2, PROGRAMS)


@pytest.mark.parametrize("kernel", [*KERNELS, *SPREAD_KERNELS])
def test_a_kernel_is_compiled_once_whatever_its_arguments_are(seen: dict[str, Any], kernel: str) -> None:
    assert seen[f"{kernel} with all values"] == launched(kernel, len(VALUES), 1)


def test_a_launch_takes_no_longer_than_a_call_of_python(seen: dict[str, Any]) -> None:
    # 5 to 20 on an idle machine: a wait or a compilation takes more.
    assert seen["microseconds of a launch"] < 100


def test_a_kernel_that_is_compiled_for_values_is_seen(seen: dict[str, Any]) -> None:
    assert seen["specialised"]["modules"] == 2
