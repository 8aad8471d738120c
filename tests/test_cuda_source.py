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
LARGE = ("float32", "exact", "one-chunk")
BUGS = read_plants("cuda")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    with two_at_a_time() as pool:
        folder = tmp_path_factory.mktemp("kit")
        yield Kit(folder, pool, "cuda_test.cpp", {"cuda/launch.cu": []}, VARIANTS, BUGS, switched=tuple(VARIANTS))


@pytest.fixture(scope="module")
def large(kit: Kit) -> Future[Finished]:
    return kit.start("switched plain", "--large", "one-chunk")


@pytest.fixture(scope="module")
def with_bugs(kit: Kit, large: object) -> dict[str, Future[Finished]]:
    variant = {bug.name: "plain" if bug.option else "sanitized" for bug in BUGS}
    more = {bug.name: ["--large", bug.option] if bug.option in LARGE else [] for bug in BUGS}
    return {bug.name: kit.start_bug(bug, *more[bug.name], variant=variant[bug.name]) for bug in BUGS}


def test_kernels_pass(kit: Kit) -> None:
    """With every bug in the source, and none of them on."""
    require_passed(kit.start("switched sanitized"), "CUDA")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_pass_as_they_are_with_every_weight(kit: Kit, variant: str) -> None:
    require_passed(kit.start(variant, "--all"), "CUDA")


def test_more_bytes_than_32_bits_count(large: Future[Finished]) -> None:
    require_passed(large, "one-chunk")


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_more_elements_than_32_bits_count(kit: Kit, name: str) -> None:
    require_passed(kit.start("plain", "--large", name), name)


def require_passed(running: Future[Finished], what: str) -> None:
    done = running.result()
    assert done.returncode == 0, said(done)
    assert f"every check passed: {what}" in done.stdout


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_seen(with_bugs: dict[str, Future[Finished]], bug: Plant) -> None:
    done = with_bugs[bug.name].result()
    assert done.returncode not in (0, 2), said(done)
    assert bug.expected in said(done)
