"""The kernel test (``tests/native``): built with the host's compiler, run under sanitizers, and shown to fail.

It fails with each bug of ``tests/plants/cpu.txt``.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from tests.native_build import SANITIZE, UNITS, Finished, Kit, needs_compiler, openmp_flags, said, two_at_a_time
from tests.planting import Plant, read_plants

pytestmark = needs_compiler

BUGS = read_plants("cpu")
VARIANTS = {"sanitized": ["-O1", *SANITIZE], "plain": ["-O3"]}


@pytest.fixture(scope="module")
def openmp(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return openmp_flags(tmp_path_factory.mktemp("openmp"))


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory, openmp: list[str]) -> Iterator[Kit]:
    units = {f"cpu/{unit}.cpp": flags for unit, flags in UNITS.items()}
    with two_at_a_time() as pool:
        yield Kit(tmp_path_factory.mktemp("kit"), pool, "kernel_test.cpp", units, VARIANTS, BUGS, flags=openmp)


@pytest.fixture(scope="module")
def healthy(kit: Kit) -> Future[Finished]:
    """What it says with every bug in the source, and none of them on."""
    return kit.start("switched sanitized")


@pytest.fixture(scope="module")
def with_bugs(kit: Kit, healthy: object) -> dict[str, Future[Finished]]:
    return {bug.name: kit.start_bug(bug, "--isa", bug.option.split()[0]) for bug in BUGS}


def test_kernels_pass(healthy: Future[Finished]) -> None:
    require_passed(healthy)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_pass_as_they_are(kit: Kit, variant: str) -> None:
    require_passed(kit.start(variant))


def require_passed(running: Future[Finished]) -> None:
    done = running.result()
    assert done.returncode == 0, said(done)
    assert "every check passed: generic " in done.stdout


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_seen(
    healthy: Future[Finished], with_bugs: dict[str, Future[Finished]], openmp: list[str], bug: Plant
) -> None:
    isa, *needs_openmp = bug.option.split()
    if f" {isa} " not in healthy.result().stdout:
        pytest.skip(f"needs a processor with {isa}")
    if needs_openmp and not openmp:
        pytest.skip("needs OpenMP")
    done = with_bugs[bug.name].result()
    assert done.returncode not in (0, 2), said(done)
    assert bug.expected in said(done)
