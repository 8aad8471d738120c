"""The CUDA source on a CPU: ``csrc/cuda`` compiled through ``tests/native/shim``, run under sanitizers, shown to fail.

It fails with each bug of ``tests/plants/cuda.txt``. Nothing here needs a GPU or CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from tests.native_build import SANITIZE, Finished, Kit, needs_compiler, said, two_at_a_time
from tests.planting import Plant, read_plants

pytestmark = needs_compiler

#: Flags of the kernels. The plain ones take 2^31 elements: there a call for each fmaf would cost a minute.
VARIANTS = {"sanitized": ["-O1", *SANITIZE], "plain": ["-O2", "-march=native"]}
#: Names of kLarge in tests/native/large.h.
LARGE = ("exact", "one-chunk")
BUGS = read_plants("cuda")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    with two_at_a_time() as pool:
        folder = tmp_path_factory.mktemp("kit")
        yield Kit(folder, pool, "cuda_test.cpp", {"cuda/launch.cu": []}, VARIANTS, BUGS, switched=tuple(VARIANTS))


@pytest.fixture(scope="module")
def healthy(kit: Kit) -> dict[str, Future[Finished]]:
    """What each program says when nothing is spoiled."""
    return {variant: kit.start(variant) for variant in (*VARIANTS, "switched sanitized")}


@pytest.fixture(scope="module")
def large(kit: Kit, healthy: object) -> dict[str, Future[Finished]]:
    return {name: kit.start("plain", "--large", name) for name in LARGE}


@pytest.fixture(scope="module")
def with_bugs(kit: Kit, large: object) -> dict[str, Future[Finished]]:
    variant = {bug.name: "plain" if bug.option else "sanitized" for bug in BUGS}
    more = {bug.name: ["--large", bug.option] if bug.option in LARGE else [] for bug in BUGS}
    return {bug.name: kit.start_bug(bug, *more[bug.name], variant=variant[bug.name]) for bug in BUGS}


@pytest.mark.parametrize("variant", [*VARIANTS, "switched sanitized"])
def test_kernels_pass(healthy: dict[str, Future[Finished]], variant: str) -> None:
    done = healthy[variant].result()
    assert done.returncode == 0, said(done)
    assert "every check passed: CUDA" in done.stdout


@pytest.mark.parametrize("name", LARGE)
def test_more_elements_than_32_bits_count(large: dict[str, Future[Finished]], name: str) -> None:
    done = large[name].result()
    assert done.returncode == 0, said(done)
    assert f"every check passed: {name}" in done.stdout


@pytest.mark.slow
def test_more_bytes_than_32_bits_count_in_float32_too(kit: Kit) -> None:
    done = kit.start("plain", "--large", "float32").result()
    assert done.returncode == 0, said(done)
    assert "every check passed: float32" in done.stdout


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_seen(with_bugs: dict[str, Future[Finished]], bug: Plant) -> None:
    done = with_bugs[bug.name].result()
    assert done.returncode not in (0, 2), said(done)
    assert bug.expected in said(done)
