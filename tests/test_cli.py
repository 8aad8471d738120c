"""The command line: what it prints, how it refuses, and that it stays cheap until a command runs."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import swafast
from swafast import cli


def run(*arguments: str) -> Result:
    # Wide enough that no message is wrapped, so that the tests may look for whole sentences.
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(cli.app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, ["demo", "doctor", "--version"]),
        (["demo", "--help"], 0, ["--seeds", "--epochs", "--out", "--json"]),
        (["--version"], 0, [f"swafast {swafast.__version__}"]),
        (["doctor"], 0, []),
        (["dmeo"], 2, []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_commands_answer(arguments: list[str], code: int, words: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert [word for word in words if word not in result.output] == []


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
