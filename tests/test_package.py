"""The package as a whole: the doctor, the commands that the documents promise, and what a wheel may hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import swafast
from swafast import doctor
from swafast.backends import Unavailable, cpu, library, reference
from swafast.op import tree_check
from swafast.op.choice import BACKENDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def run_doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "swafast"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_doctor_finds_the_library_from_a_clone() -> None:
    done = run_doctor()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    backends = [f"backend {backend.name}" for backend in BACKENDS]
    for what in ("swafast", "python", "torch", *backends, "in use on cpu", "to do"):
        assert re.search(rf"^{what} ", done.stdout, re.MULTILINE), what
    if cpu.unavailable() is None:
        assert re.search(r"^backend cpu .*libswafast\S+ \(.*(avx512|avx2|generic)\)$", done.stdout, re.MULTILINE)
        assert re.search(r"^in use on cpu +cpu ", done.stdout, re.MULTILINE)


def test_the_doctor_says_why_not(tmp_path: Path) -> None:
    done = run_doctor(SWAFAST_LIBRARY=str(tmp_path / "absent.so"))
    assert done.returncode == 1  # what the user has named does not load
    reason = r"SWAFAST_LIBRARY: no native library at .*absent\.so: install swafast again"
    assert re.search(f"^backend cpu +not available: {reason}$", done.stdout, re.MULTILINE)
    assert re.search(f"^in use on cpu +none: {reason}. Set SWAFAST_LIBRARY to a", done.stdout, re.MULTILINE)
    refused = run_doctor(SWAFAST_LIBRARY=str(tmp_path / "absent.so"), SWAFAST_BACKEND="cpu")
    assert refused.returncode == 1
    assert "SWAFAST_BACKEND='cpu' cannot run here" in refused.stdout


def test_the_doctor_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def to_do() -> str:
        return dict(doctor.report())["to do"]

    monkeypatch.setattr(doctor, "BACKENDS", [cpu, reference])
    monkeypatch.setattr(doctor, "_NVIDIA", str(tmp_path / "absent"))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cpu, "unavailable", lambda: None)
    monkeypatch.setattr(cpu, "describe", lambda: "")
    monkeypatch.setattr(tree_check, "load", lambda: Unavailable("asked for", expected=True))
    assert to_do() == "nothing"
    monkeypatch.setattr(doctor, "_NVIDIA", str(tmp_path))
    assert to_do().startswith("install torch for CUDA: ")
    monkeypatch.setenv("SWAFAST_BACKEND", "reference")
    assert to_do().startswith("unset SWAFAST_BACKEND, unless you want reference")
    monkeypatch.setattr(tree_check, "load", lambda: Unavailable("no headers"))
    assert to_do().startswith("mend the checks of tensors, as their line says")
    monkeypatch.setattr(cpu, "unavailable", lambda: Unavailable("no compiler"))
    assert to_do() == "mend backend cpu, as its line says: until then updates take longer"
    monkeypatch.setenv("SWAFAST_BACKEND", "cdua")
    assert to_do().startswith("correct or unset the variable that is named above")


def test_a_library_of_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.unavailable() is not None:
        pytest.skip(f"needs the native library: {cpu.unavailable()}")
    monkeypatch.setattr(library, "_ABI", 999)
    library.load.cache_clear()
    try:
        assert re.search(r"has interface \d+, this swafast needs 999: install it again", str(cpu.unavailable()))
    finally:
        library.load.cache_clear()


def test_one_version_everywhere() -> None:
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert swafast.__version__ == declared[1]
    assert f"## {declared[1]}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {declared[1]}\n" in (ROOT / "CITATION.cff").read_text()
    assert doctor.report()[0][1].startswith(declared[1])


def test_one_interface_number_in_c_and_python() -> None:
    declared = re.search(r"#define SWAFAST_ABI (\d+)", (ROOT / "csrc" / "swafast.h").read_text())
    assert declared is not None
    assert int(declared[1]) == library._ABI


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for command in ("pip install '.[demo]' && swafast demo", "pip install '.[test]' && pytest"):
        assert command in README
        install, _, use = command.partition(" && ")
        assert install.replace("pip install", "pip install --quiet") in script
        assert use in script


@pytest.mark.parametrize(
    ("reason", "is_needless"),
    [
        ("needs nvcc", True),
        ("needs a C++ compiler", True),
        ("needs the native library: it is not built", True),
        ("needs Triton", True),
        ("needs cuobjdump", True),
        ("needs an nvcc that knows sm_120", False),
        ("needs an nvdisasm that decodes sm_120", False),
        ("needs a C++ compiler whose -fsanitize=thread works", False),
        ("needs a processor with avx512", False),
    ],
)
def test_ci_fails_where_a_tool_is_there_and_its_check_was_skipped(
    reason: str, is_needless: bool, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text(f"SKIPPED [3] tests/test_machine_code.py:84: {reason}\n1 passed, 3 skipped in 1.00s\n")
    functions = """eval "$(sed -n '/^here()/,/^}/p' .ci/run)"; here() { true; }; no_needless_skip "$0" """
    done = subprocess.run(["bash", "-euc", functions, str(log)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == int(is_needless), done.stderr
    assert (reason in done.stderr) == is_needless
