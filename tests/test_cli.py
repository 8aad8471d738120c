"""The command line: what it prints, how it refuses, and that it stays cheap until a command runs."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.main import get_command
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
        (["average", "--help"], 0, ["--last", "--weights", "--dry-run", "--force", "--shard-size"]),
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


def test_the_package_as_a_script_runs_commands(tmp_path: Path) -> None:
    for number in (1.0, 3.0):
        save_file({"weight": np.full(2, number, np.float32)}, tmp_path / f"{number}.safetensors")
    inputs = map(str, sorted(tmp_path.iterdir()))
    command = [sys.executable, "-m", "swafast", "average", *inputs, "-o", str(tmp_path / "out.safetensors")]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    np.testing.assert_array_equal(load_file(tmp_path / "out.safetensors")["weight"], np.full(2, 2.0, np.float32))
    wrong = subprocess.run([*command[:3], "dmeo"], cwd=Path(__file__).parents[1], capture_output=True)
    assert wrong.returncode == 2


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


@pytest.mark.parametrize("command", ["average", "combine", "demo", "doctor"])
def test_help_cuts_no_name_in_a_narrow_terminal(command: str) -> None:
    result = CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}).invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert "…" not in result.output


@pytest.mark.parametrize("command", ["", "average", "combine", "demo", "doctor"])
def test_help_has_an_example_that_the_command_takes(command: str) -> None:
    result = CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}).invoke(
        cli.app, [*command.split(), "--help"]
    )
    assert "OPTIONS" not in result.output
    (example,) = (line.split()[2:] for line in result.output.splitlines() if "Example: swafast" in line)
    assert example[0] == (command or "average")
    commands: Any = get_command(cli.app)
    commands.commands[example[0]].make_context(example[0], example[1:])  # fails if an option is unknown or lacking


def test_average_takes_low_or_high_values_not_both() -> None:
    result = run("average", "a", "-o", "b", "--metric", "x", "--best", "1", "--lower-is-better", "--higher-is-better")
    assert result.exit_code == 2
    assert "pass one of them" in result.output


def test_average_passes_which_values_are_best(monkeypatch: pytest.MonkeyPatch) -> None:
    from swafast.files import averaging

    passed: list[object] = []
    monkeypatch.setattr(averaging, "average", lambda *_, lower_is_better, **__: passed.append(lower_is_better))
    for flags in ((), ("--lower-is-better",), ("--higher-is-better",)):
        assert run("average", "a", "-o", "b", *flags).exit_code == 0
    assert passed == [None, True, False]


def test_average_lists_writes_and_ends_with_2_for_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        save_file(
            {"x": np.full(2, step, np.float32), "y": np.ones(2, np.float32), "z": np.ones(2, np.float32)},
            f"step_{step}.safetensors",
        )
    inputs = ["step_1.safetensors", "step_2.safetensors"]
    dry = run("average", *inputs, "-o", "out.safetensors", "--dry-run")
    assert (dry.exit_code, Path("out.safetensors").exists()) == (0, False)
    assert "0.500000  step 2  step_2.safetensors" in dry.output
    done = run("average", *inputs, "-o", "out.safetensors", "--weights", "0.25,0.75", "--tied", "z=y", "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    assert {name: array.tolist() for name, array in load_file("out.safetensors").items()} == {
        "x": [1.75] * 2,
        "y": [1.0] * 2,
    }
    for arguments, message in (
        ([*inputs, "-o", "out.safetensors"], "--force"),
        ([*inputs, "-o", "new.safetensors", "--weights", "1,x"], "--weights"),
        ([*inputs, "-o", "new.safetensors", "--tied", "z"], "--tied"),
        ([*inputs, "-o", "new.safetensors", "--tied", "z=x", "--tied", "z=y"], "--tied"),
        ([*inputs, "-o", "new.safetensors", "--last", "50%"], "'--last': must be a whole number"),
        ([*inputs, "-o", "new.safetensors", "--from", "0.003k"], "got 3, and 'step_1.safetensors' has the step 1"),
        ([*inputs, "-o", "new.safetensors", "--ema", "1.5"], "ema must be in [0, 1]"),
        ([*inputs, "-o", "new.safetensors", "--ema", "0.5", "--power", "0.1"], "ema and power"),
        (["nothing.safetensors", "-o", "new.safetensors"], "nothing.safetensors"),
    ):
        result = run("average", *arguments)
        assert (result.exit_code, message in result.output) == (2, True), result.output
    monkeypatch.setattr("swafast.files.placing.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert run("average", *inputs, "-o", "new.safetensors").exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", *inputs]


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


@pytest.mark.parametrize("broken", ["stdout", "stderr", "stderr closed"])
def test_an_average_is_written_where_nobody_reads(broken: str, tmp_path: Path) -> None:
    save_file({"x": np.zeros(2)}, tmp_path / "a.safetensors")
    code = "from swafast.cli import app; app()"
    command = [sys.executable, "-c", code, *("average", "a.safetensors", "a.safetensors", "-o", "out.safetensors")]
    if broken == "stderr closed":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, broken.split()[0]: writing}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, **streams)  # type: ignore[call-overload]
    os.close(writing)
    assert (done.returncode, (tmp_path / "out.safetensors").exists()) == (0, True)


def test_a_pipe_among_the_inputs_is_bad_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    result = run("average", str(tmp_path / "a.safetensors"), "-o", str(tmp_path / "out.safetensors"))
    assert (result.exit_code, "a folder, a device or a pipe" in result.output) == (2, True)
