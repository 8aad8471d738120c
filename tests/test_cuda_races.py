"""The CUDA kernels with all blocks at once under ThreadSanitizer: no race, while each of ``races.txt`` is seen.

On a GPU a race may give right results for years. Nothing here needs a GPU or CUDA, but a compiler whose
``-fsanitize=thread`` works.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from tests.native_build import (
    AT_ONCE,
    COMPILER,
    CSRC,
    SUFFIXES,
    Finished,
    Kit,
    needs_compiler,
    said,
    two_at_a_time,
)
from tests.planting import Plant, read_plants, read_sources

pytestmark = [pytest.mark.kernels, needs_compiler]

FLAGS = ["-fsanitize=thread", "-g"]
BUGS = read_plants("races")


def sources_for_blocks_at_once() -> dict[str, str]:
    """Return the sources of csrc with shared memory in words that C++ has, and tiles of 8 threads in place of 256."""
    narrow = Plant("fewer threads", "", "kTileThreads = 256;", "kTileThreads = 8;", "")
    sources = narrow.apply(read_sources(CSRC, *SUFFIXES))
    declared = 0

    def of_block(match: re.Match[str]) -> str:
        nonlocal declared
        declared += 1
        return f"{match[1]}& {match[2]} = shim::shared<{match[1]}, {declared - 1}>();"

    return {path: re.sub(r"__shared__ (\w+) (\w+);", of_block, source) for path, source in sources.items()}


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    folder = tmp_path_factory.mktemp("races")
    works = folder / "works.cpp"
    works.write_text("int main() {}\n")
    tried = subprocess.run([*COMPILER, *FLAGS, str(works), "-o", str(folder / "works")], capture_output=True)
    if tried.returncode or subprocess.run([folder / "works"], capture_output=True).returncode:
        pytest.skip("needs a C++ compiler whose -fsanitize=thread works")
    with two_at_a_time() as pool:
        yield Kit(
            folder,
            pool,
            "race_test.cpp",
            {"cuda/launch.cu": []},
            {"at once": ["-O1"]},
            BUGS,
            switched=("at once",),
            flags=[*FLAGS, "-I", str(AT_ONCE)],
            sources=sources_for_blocks_at_once(),
        )


@pytest.fixture(scope="module")
def with_bugs(kit: Kit) -> dict[str, Future[Finished]]:
    # At the first race, where the results are wrong: threads that disagree on a count may wait at a barrier for ever.
    ends = {bug.name: "halt_on_error=0" if bug.option == "right" else "halt_on_error=1" for bug in BUGS}
    return {bug.name: kit.start_bug(bug, variant="at once", TSAN_OPTIONS=ends[bug.name]) for bug in BUGS}


def test_no_two_threads_race(kit: Kit, with_bugs: object) -> None:
    done = kit.start("at once").result()
    assert done.returncode == 0, said(done)
    assert done.stdout == "every check passed: CUDA, blocks at once\n"
    assert done.stderr == ""


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_race_is_seen(with_bugs: dict[str, Future[Finished]], bug: Plant) -> None:
    done = with_bugs[bug.name].result()
    assert done.returncode not in (0, 2), said(done)
    assert bug.expected in done.stderr, said(done)
    if bug.option == "right":
        assert "every check passed" in done.stdout, said(done)


def test_some_races_are_seen_by_nothing_else() -> None:
    assert sum(bug.option == "right" for bug in BUGS) >= 2
