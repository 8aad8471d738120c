"""Which releases of frameworks the tests run with, and what is not among them."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from swafast.integrations.installed import framework

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
INTEGRATIONS = ROOT / "swafast" / "integrations"

#: The tools of the tests, which need no pin.
TOOLS = {"pytest", "pytest-xdist"}


def lines_of(name: str) -> list[str]:
    lines = (FOLDER / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


PINNED = dict(line.split("==") for line in lines_of("versions.txt"))
#: Composer asks for an older torch, so it and what it needs are installed apart.
APART = dict(line.split("==") for line in lines_of("composer.txt"))
ABSENT = dict(line.split(": ", 1) for line in lines_of("absent.txt"))


def extra(name: str) -> dict[str, str]:
    """Return the packages of an extra and the oldest release of each; "" where any will do."""
    found = re.search(rf"^{name} = \[(.*?)\n?\]$", PROJECT, re.DOTALL | re.MULTILINE)
    assert found is not None, f"pyproject.toml has no extra {name}"
    packages = {}
    for wanted in re.findall(r'"(.*?)"', found[1]):
        own = re.fullmatch(r"swafast\[(.*)\]", wanted)
        for other in own[1].split(",") if own else ():
            packages |= extra(other)
        if own is None:
            package, _, least = wanted.partition(">=")
            packages[package] = least
    return packages


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def test_each_framework_is_pinned_once() -> None:
    asked = extra("frameworks")
    assert asked.keys() - TOOLS == PINNED.keys()
    for package, version in PINNED.items():
        assert release(asked[package]) <= release(version), package
    for package, least in extra("composer").items():
        assert release(least) <= release(APART[package]), package
    assert not PINNED.keys() & APART.keys()


def test_integrations_ask_for_what_their_extras_install() -> None:
    asked = {}
    for path in INTEGRATIONS.glob("*.py"):
        found = re.findall(r'framework\("([\w.]+)", "([\d.]+)"(?:, package="([\w.]+)")?', path.read_text())
        for name, least, package in found:
            asked[name] = least
            assert extra(name)[package or name] == least, path.name
    assert "accelerate" in asked


def test_a_missing_or_old_framework_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ImportError,
        match=re.escape("integrations.lacking needs lacking >= 1.2, which is not installed: pip install '.[lacking]'"),
    ):
        framework("lacking", "1.2")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.3rc1")
    assert framework("json", "2.9.3") is importlib.import_module("json")
    with pytest.raises(
        ImportError,
        match=re.escape("integrations.json needs json >= 2.10, got 2.9.3rc1: pip install '.[json]' in the clone"),
    ):
        framework("json", "2.10")


def test_what_is_not_tested_stands_in_the_docs() -> None:
    page = (ROOT / "docs" / "frameworks" / "README.md").read_text()
    for name, reason in ABSENT.items():
        assert f"| {name} | {reason} |" in page
    assert not {name.lower() for name in ABSENT} & {name.lower() for name in PINNED}


def test_each_page_is_run_by_the_tests_of_its_framework() -> None:
    for page in (ROOT / "docs" / "frameworks").glob("*.md"):
        if "```python" in page.read_text():
            name = "arguments" if page.stem == "README" else page.stem  # needs no framework
            own = FOLDER / f"test_{name}.py"
            tests = own if own.exists() else FOLDER / "test_pages.py"  # of frameworks that need no class of ours
            assert f"docs/frameworks/{page.name}" in tests.read_text()


def test_the_classes_are_short() -> None:
    for path in INTEGRATIONS.glob("*.py"):
        if "class WeightAverage(" in path.read_text():
            assert len(path.read_text().splitlines()) <= 200, path.name


@pytest.mark.frameworks
def test_a_framework_is_imported_on_use_alone() -> None:
    code = """
import sys
import swafast.integrations.state_folder
assert swafast.FusedAveragedModel
print(*{name.partition(".")[0] for name in sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {name.replace("_", "-") for name in done.stdout.split()}
    assert "swafast" in imported
    assert not imported & {*PINNED, "composer", "pytorch-lightning", "ignite"}


@pytest.mark.frameworks
@pytest.mark.parametrize(("package", "version"), {**PINNED, **APART}.items())
def test_the_pinned_release_is_installed(package: str, version: str) -> None:
    assert release(importlib.metadata.version(package)) == release(version)
