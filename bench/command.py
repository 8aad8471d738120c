"""The command line: ``python -m bench``, ``python -m bench plot FILE``, ``python -m bench readme``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.status import Status

from bench import machine, passes, training
from bench.memory import available_bytes
from bench.readme import SHARDED_BEGIN, SHARDED_END, put_between, rewrite, rewrite_loop, rewrite_passes, sharded_table
from bench.report import ALL_OURS, Report, Row, TrainingRow
from bench.suite import measure
from bench.tables import accuracy_table, numbers_table, passes_table, training_table, workload_table
from bench.workloads import QUICK, WORKLOADS

RESULTS = Path("bench/results")
# Where a run writes unless told otherwise: git ignores it, so a look at the speed leaves the committed report alone.
OUT = Path("build/bench")

# Seconds of timing for one workload and dtype, and for one model of the training part. With gates and compilation, the
# twelve and the four of a full run stay under ten minutes on 2 cores.
BUDGET_S, QUICK_BUDGET_S = 10.0, 3.0
# Where our own passes are compared with each other unless workloads are named: averages that fit no cache.
PASSES, QUICK_PASSES = ("gpt2_medium",), ("resnet50",)
TRAINING = training.Budget(8.0)
QUICK_TRAINING = training.Budget(2.0, min_rounds=1)
# A run leaves the rest of the memory to whatever else the machine is doing.
MEMORY_SHARE = 0.6
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

app = typer.Typer(add_completion=False, help="Measure an update beside every other way of averaging a model.")
# The tables need about this many columns; a log has no width of its own.
LOG_COLUMNS = 150
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_COLUMNS)


def _check_names(argument: str, given: list[str], known: list[str]) -> None:
    for name in given:
        if name not in known:
            raise typer.BadParameter(f"{argument} must be one of {', '.join(known)}, got {name}")


def _command_line(arguments: list[str]) -> str:
    """Give the command that repeats this run, less where it writes: a report holds no path of a machine."""
    kept, skip = ["python -m bench"], False
    for argument in arguments:
        if not skip and not argument.startswith("--out"):
            kept.append(argument)
        skip = argument == "--out"
    return " ".join(kept)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    workload: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(WORKLOADS)}; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Params: float32, bfloat16; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small workloads and budgets: about a minute.")] = False,
    train: Annotated[bool | None, typer.Option(help="Measure the share of a training step; quick: not.")] = None,
    others: Annotated[bool, typer.Option(help="Measure every other way of averaging beside ours.")] = True,
    own: Annotated[bool, typer.Option(help="Compare our formats, and several averages in one pass with one.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the picture.")] = OUT,
    device: Annotated[str, typer.Option(help="Where to measure.")] = "cpu",
    memory_gib: Annotated[float | None, typer.Option(help="Memory to use. Default: 60 % of what is free.")] = None,
) -> None:
    """Measure, print, and write OUT/<device>.json and OUT/<device>.png."""
    if context.invoked_subcommand is not None:
        return
    names = workload or list(QUICK if quick else WORKLOADS)
    dtypes = dtype or list(DTYPES)
    _check_names("--workload", names, list(WORKLOADS))
    _check_names("--dtype", dtypes, list(DTYPES))
    where = _device(device)
    about = machine.environment(where, _command_line(sys.argv[1:]))
    memory = available_bytes(where) * MEMORY_SHARE if memory_gib is None else memory_gib * 2**30
    budget_s = QUICK_BUDGET_S if quick else BUDGET_S
    rows = _measure_all(names, dtypes, where, budget_s, memory) if others else []
    compared = (workload or list(QUICK_PASSES if quick else PASSES)) if own else []
    formats = _compare(passes.measure_formats, compared, dtypes, where, budget_s, memory)
    several = _compare(passes.measure_several, compared, dtypes, where, budget_s, memory)
    wanted = not quick if train is None else train
    training_rows = _train(QUICK_TRAINING if quick else TRAINING) if wanted else []
    _finish(Report(about, rows, training_rows, formats=formats, several=several), out / where.type)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"--device must be one that this torch can use, got {name}: {reason}") from None
    return device


def _measure_all(
    names: list[str],
    dtypes: list[str],
    device: torch.device,
    budget_s: float,
    memory: float,  # bytes
) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        for dtype in dtypes:
            label = f"{WORKLOADS[name].title}, {dtype}"
            with console.status(label) as status:
                progress = _progress(status, label)
                measured = measure(WORKLOADS[name], DTYPES[dtype], device, budget_s, memory, progress)
            rows += measured
            console.print(workload_table(measured), "")
    return rows


def _compare(
    measure_passes: passes.Measure,
    names: list[str],
    dtypes: list[str],
    device: torch.device,
    budget_s: float,
    memory: float,  # bytes
) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        for dtype in dtypes:
            label = f"our own passes on {WORKLOADS[name].title}, {dtype}"
            with console.status(label) as status:
                progress = _progress(status, label)
                measured = measure_passes(WORKLOADS[name], DTYPES[dtype], device, budget_s, memory, progress)
            rows += measured
            console.print(passes_table(measured), "")
    return rows


def _progress(status: Status, label: str) -> Callable[[str], None]:
    return lambda step: status.update(f"{label}: {step}")


def _train(budget: training.Budget) -> list[TrainingRow]:
    with console.status("training alone") as status:
        rows = training.measure_alone(budget)
        status.update(f"training under {training.DDP_SETTING}")
        rows += training.measure_ddp(budget)
    console.print(training_table(rows), "")
    return rows


def _finish(report: Report, stem: Path) -> None:
    """Write the report and its picture, print the bars, and fail when one of our own rows is wrong."""
    from bench.plot import plot

    report.write(stem.with_suffix(".json"))
    console.print(numbers_table(report), "")
    console.print(f"wrote {stem.with_suffix('.json')}")
    if plot(report, stem.with_suffix(".png")):
        console.print(f"wrote {stem.with_suffix('.png')}")
    wrong = [row for row in report.rows if row.provider in ALL_OURS and row.wrong]
    wrong += [row for row in (*report.formats, *report.several) if row.wrong]
    for row in wrong:
        console.print(f"{row.provider} on {row.title}, {row.dtype}: {row.status}: {row.reason}", style="bold red")
    if wrong:
        raise typer.Exit(1)


@app.command("plot")
def plot_command(file: Annotated[Path, typer.Argument(help="A report, as a run writes it.")]) -> None:
    """Draw the picture of FILE anew, beside it."""
    from bench.plot import plot

    picture = file.with_suffix(".png")
    if not plot(Report.read(file), picture):
        console.print(f"{file} holds no workload that was timed for us and for what it is compared with", style="red")
        raise typer.Exit(1)
    console.print(f"wrote {picture}")


@app.command("readme")
def readme_command(
    file: Annotated[Path, typer.Argument(help="A report, as a run writes it.")] = RESULTS / "cpu.json",
    readme: Annotated[Path, typer.Option(help="The file with the two markers.")] = Path("README.md"),
) -> None:
    """Rewrite the README's table from FILE, and that of sharded updates from the sharded.json beside it.

    The tables of docs/formats.md and docs/averages.md too, as far as FILE compares our own passes, and that of
    docs/loop.md from the loop.json beside it.
    """
    from bench import loop, sharded

    rewrite(readme, json.loads(file.read_text()))
    console.print(f"rewrote the table of {readme} from {file}")
    for page in rewrite_passes(Report.read(file), readme.parent):
        console.print(f"rewrote the table of {page} from {file}")
    beside = file.with_name("sharded.json")
    if beside.exists():
        put_between(readme, SHARDED_BEGIN, SHARDED_END, sharded_table(sharded.Report.read(beside)))
        console.print(f"rewrote the table of sharded updates from {beside}")
    beside = file.with_name("loop.json")
    if beside.exists():
        console.print(f"rewrote the table of {rewrite_loop(loop.Report.read(beside), readme.parent)} from {beside}")


@app.command("sharded")
def sharded_command(out: Annotated[Path, typer.Option(help="Folder for sharded.json.")] = OUT) -> None:
    """Measure a model spread over two gloo ranks, and plan one for 1024."""
    from bench import sharded

    about = machine.environment(torch.device("cpu"), _command_line(sys.argv[1:]))
    with console.status("two ranks"):
        report = sharded.measure(about)
    report.write(out / "sharded.json")
    console.print(sharded.times_table(report), "", sharded.bars_table(report), "")
    console.print(f"wrote {out / 'sharded.json'}")


@app.command("loop")
def loop_command(
    out: Annotated[Path, typer.Option(help="Folder for loop.json.")] = OUT,
    quick: Annotated[bool, typer.Option("--quick", help="A small decoder and few samples: under a minute.")] = False,
) -> None:
    """Measure what an average adds to a training step, updated in the loop or attached: about six minutes."""
    from bench import loop

    about = machine.environment(torch.device("cpu"), _command_line(sys.argv[1:]))
    with console.status("every way") as status:
        report = loop.measure(about, quick=quick, progress=_progress(status, "every way"))
    report.write(out / "loop.json")
    console.print(loop.loop_table(report), "")
    console.print(f"wrote {out / 'loop.json'}")
    if report.differing:
        console.print(f"{report.differing} elements are not those of the plain updates", style="bold red")
        raise typer.Exit(1)


@app.command("accuracy")
def accuracy_command(
    out: Annotated[Path, typer.Option(help="Folder for accuracy.json and accuracy.png.")] = OUT,
) -> None:
    """Follow the error of every format over 100,000 updates: about three minutes on one core."""
    from bench import accuracy
    from bench.accuracy_plot import plot

    about = machine.environment(torch.device("cpu"), _command_line(sys.argv[1:]))
    with console.status("every format") as status:
        report = accuracy.measure(about, progress=_progress(status, "every format"))
    report.write(out / "accuracy.json")
    plot(report, out / "accuracy.png")
    console.print(accuracy_table(report), "")
    console.print(f"wrote {out / 'accuracy.json'}", f"wrote {out / 'accuracy.png'}", sep="\n")


@app.command("gpu")
def gpu_command(
    out: Annotated[Path, typer.Option(help="Folder for gpu.json, gpu.png and the logs.")] = OUT,
    checks: Annotated[
        bool, typer.Option("--checks", help="First build the library, run the GPU tests and the memory checkers.")
    ] = False,
    dry: Annotated[
        bool, typer.Option("--dry", help="Tiny workloads on the CPU, as dry.json; so it is without a GPU.")
    ] = False,
    seconds: Annotated[float | None, typer.Option(help="Time of the whole run. Default: under eight minutes.")] = None,
) -> None:
    """Measure on one GPU beside a copy from device to device, and say which bars are met."""
    from bench.gpu import run as gpu_run

    command = _command_line(sys.argv[1:])
    limit = gpu_run.TOTAL_S if seconds is None else seconds
    raise typer.Exit(gpu_run.run(out, command, dry, with_parts=checks, seconds=limit))
