"""The native pass under sanitizers, on every change, and shown to fail with each bug of ``tests/plants/trees.txt``."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.native_build import COMPILER, NATIVE, ROOT, SANITIZE, needs_compiler, run
from tests.planting import Plant, read_plants, switch_on, write_sources

pytestmark = needs_compiler

BUGS = read_plants("trees")
SOURCE = ROOT / "csrc" / "python" / "trees.cpp"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How the pass ends without a bug, and with each."""
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        pytest.skip("needs Python's headers")
    # The second too: the first looks for what throws when it is loaded.
    runtime = [run([*COMPILER, f"-print-file-name={name}"]).stdout.strip() for name in ("libasan.so", "libstdc++.so.6")]
    if not Path(runtime[0]).is_absolute():
        pytest.skip(f"needs a sanitizer that can be preloaded, and {COMPILER[0]} has none")
    folder = tmp_path_factory.mktemp("trees")
    write_sources(folder, switch_on({SOURCE.name: SOURCE.read_text()}, BUGS, "(planted_bug == {})"))
    library = folder / "libswafast_trees.so"
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", *SANITIZE, "-include", str(NATIVE / "planted.h")]
    headers = ["-isystem", sysconfig.get_paths()["include"]]
    run([*COMPILER, *flags, *headers, str(folder / SOURCE.name), "-o", str(library), "-ldl"])
    environment = {
        "LD_PRELOAD": ":".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "PYTHONMALLOC": "malloc",  # Python's own allocator hides what is freed
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.tree_bugs", str(library), str(len(BUGS))],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_pass_is_right_under_sanitizers(outcomes: list[str]) -> None:
    assert outcomes[0].startswith("0: 0 "), outcomes[0]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_seen(outcomes: list[str], bug: Plant) -> None:
    said = outcomes[BUGS.index(bug) + 1]
    assert not said.startswith(f"{BUGS.index(bug) + 1}: 0 "), said
    assert bug.expected in said
