"""The kernel test (``tests/native``): built with the host's compiler, run under sanitizers, and shown to fail.

It fails with each way of spoiling what the library is handed (``--plant``), and with each bug of
``tests/plants/cpu.txt``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from tests.native_build import NATIVE, SANITIZE, UNITS, Finished, Kit, needs_compiler, openmp_flags, said, two_at_a_time
from tests.planting import Plant, read_plants

pytestmark = needs_compiler

#: What the test says of a call that is spoiled this way, a regular expression.
WRONG = "is wrong at weight"
OUTSIDE = "AddressSanitizer|wrote beside a buffer|ended with -(7|11):"
SPOILED = {
    **dict.fromkeys(("long-chunk", "wrong-format", "truncated-far"), OUTSIDE),
    "shifted-plane": f"AddressSanitizer|{WRONG}",
    **dict.fromkeys(("short-chunk", "dropped-chunk", "doubled-chunk", "wrong-dtype", "swapped-planes"), WRONG),
    **dict.fromkeys(("stale-weight", "wrong-key", "wrong-first-index", "wrong-index-step", "another-pace"), WRONG),
    "shifted-index": "the checksum is",
    "dropped-follower": "an update took rows of which one has another param",
}
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
def healthy(kit: Kit) -> dict[str, Future[Finished]]:
    """What each program says when nothing is spoiled."""
    return {variant: kit.start(variant) for variant in (*VARIANTS, "switched sanitized")}


@pytest.fixture(scope="module")
def with_bugs(kit: Kit, healthy: object) -> dict[str, Future[Finished]]:
    return {bug.name: kit.start_bug(bug, "--isa", bug.option.split()[0]) for bug in BUGS}


@pytest.mark.parametrize("variant", [*VARIANTS, "switched sanitized"])
def test_kernels_pass(healthy: dict[str, Future[Finished]], variant: str) -> None:
    done = healthy[variant].result()
    assert done.returncode == 0, said(done)
    assert "every check passed: generic " in done.stdout


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plant", SPOILED)
def test_a_spoiled_call_is_seen(kit: Kit, variant: str, plant: str) -> None:
    done = kit.start(variant, "--plant", plant).result()
    assert done.returncode not in (0, 2), said(done)
    assert re.search(SPOILED[plant], said(done)), said(done)


def test_every_way_to_spoil_a_call_is_tried() -> None:
    names = re.search(r"kPlants\[\] = \{(.*?)\}", (NATIVE / "tensors.h").read_text(), re.DOTALL)
    assert names is not None
    assert set(re.findall(r'"([\w-]+)"', names[1])) == SPOILED.keys()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_seen(
    healthy: dict[str, Future[Finished]], with_bugs: dict[str, Future[Finished]], openmp: list[str], bug: Plant
) -> None:
    isa, *needs_openmp = bug.option.split()
    if f" {isa} " not in healthy["plain"].result().stdout:
        pytest.skip(f"needs a processor with {isa}")
    if needs_openmp and not openmp:
        pytest.skip("needs OpenMP")
    done = with_bugs[bug.name].result()
    assert done.returncode not in (0, 2), said(done)
    assert bug.expected in said(done)
