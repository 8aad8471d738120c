"""The command line: what it prints, how it refuses, and that it stays cheap until a command runs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import swafast
from swafast import cli


def run(*arguments: str) -> Result:
    # Wide enough that no message is wrapped, so that the tests may look for whole sentences.
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(cli.app, list(arguments))


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for word in ("demo", "doctor", "--version"):
        assert word in result.output


def test_help_of_demo_names_every_option() -> None:
    result = run("demo", "--help")
    assert result.exit_code == 0
    for option in ("--seeds", "--epochs", "--out", "--json"):
        assert option in result.output


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"swafast {swafast.__version__}"


def test_doctor_reports_the_backends(capfd: pytest.CaptureFixture[str]) -> None:
    result = run("doctor")
    assert result.exit_code == 0
    assert "backend reference" in result.output


def test_unknown_command_is_refused() -> None:
    assert run("dmeo").exit_code == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seeds", "0"),
        ("--seeds", "many"),
        ("--epochs", "3"),
        ("--out", "picture.jpg"),
        ("--out", "no-such-folder/picture.png"),
        ("--json", "no-such-folder/numbers.json"),
        ("--json", "."),
    ],
)
def test_bad_option_is_named_before_anything_runs(
    option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("demo", option, value)
    assert result.exit_code == 2
    assert option in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_missing_demo_package_gives_one_line(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package or name.startswith("swafast.demo")]:
        monkeypatch.delitem(sys.modules, name)
    # None in the table of modules is Python's own way to say that an import must fail.
    monkeypatch.setitem(sys.modules, package, None)
    result = run("demo", "--out", str(tmp_path / "picture.png"))
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1
    assert package in result.output
    assert "pip install '.[demo]'" in result.output
    assert "Traceback" not in result.output


def test_another_missing_module_is_not_blamed_on_the_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match="torch"):
        cli._explain_missing(ModuleNotFoundError("No module named 'torch'", name="torch"))


def test_defaults_are_those_of_the_demo() -> None:
    task = pytest.importorskip("swafast.demo.task")
    parameters = inspect.signature(cli.demo).parameters
    assert parameters["seeds"].default == task.Settings.num_seeds
    assert parameters["epochs"].default == task.Settings.epochs
    assert cli.MIN_EPOCHS == task.MIN_EPOCHS


def test_import_loads_nothing_of_the_demo() -> None:
    code = (
        "import sys, swafast.cli; print([name for name in ('sklearn', 'matplotlib', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
