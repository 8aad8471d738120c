"""The command line: ``python -m bench`` and its commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.status import Status

from bench import machine, names
from bench.report import Report, Row
from bench.workloads import QUICK, WORKLOADS

RESULTS = Path("bench/results")
# Where a run writes unless told otherwise: git ignores it, so a look at the speed leaves the committed report alone.
OUT = Path("build/bench")

# Seconds of timing for one workload and dtype, and for one model of the training part. With gates and compilation, the
# twelve and the four of a full run stay under ten minutes on 2 cores.
BUDGET_S, QUICK_BUDGET_S = 10.0, 3.0
TRAINING_S, QUICK_TRAINING_S = 8.0, 2.0
# Where our own passes are compared with each other unless workloads are named: averages that fit no cache.
PASSES, QUICK_PASSES = ("gpt2_medium",), ("resnet50",)
# A run leaves the rest of the memory to whatever else the machine is doing.
MEMORY_SHARE = 0.6
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

app = typer.Typer(add_completion=False, help="Measure an update beside every other way of averaging a model.")
# The tables need about this many columns; a log has no width of its own.
LOG_COLUMNS = 150
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_COLUMNS)

Out = Annotated[Path, typer.Option(help="Folder for the report, its samples and its picture.")]


def _check_names(argument: str, given: list[str], known: list[str]) -> None:
    for name in given:
        if name not in known:
            raise typer.BadParameter(f"{argument} must be one of {', '.join(known)}, got {name}")


def _command_line() -> str:
    """Return the command that repeats this run, without where it writes: a report holds no path of a machine."""
    kept, skip = ["python -m bench"], False
    for argument in sys.argv[1:]:
        where = ("--out", "--library")
        if not skip and not argument.startswith(where):
            kept.append(argument)
        skip = argument in where
    return " ".join(kept)


def _about(device: str = "cpu") -> dict[str, object]:
    return machine.environment(torch.device(device), _command_line())


def _write(report: Report, stem: Path, draw: Callable[[Report, Path], object] | None = None) -> None:
    """Write the report, its samples and its picture."""
    report.write(stem.with_suffix(".json"))
    report.write_samples(stem.with_suffix(".samples.jsonl"))
    console.print(f"wrote {stem.with_suffix('.json')}")
    if draw is not None and draw(report, stem.with_suffix(".png")) is not False:
        console.print(f"wrote {stem.with_suffix('.png')}")


def _progress(status: Status, label: str) -> Callable[[str], None]:
    return lambda step: status.update(f"{label}: {step}")


def _fail(lines: list[str]) -> None:
    for line in lines:
        console.print(line, style="bold red")
    if lines:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    workload: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(WORKLOADS)}; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Params: float32, bfloat16; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small workloads and budgets: about a minute.")] = False,
    train: Annotated[bool | None, typer.Option(help="Measure the share of a training step; quick: not.")] = None,
    others: Annotated[bool, typer.Option(help="Measure every other way of averaging beside ours.")] = True,
    own: Annotated[bool, typer.Option(help="Compare our formats, and several averages in one pass with one.")] = True,
    out: Out = OUT,
    device: Annotated[str, typer.Option(help="Where to measure.")] = "cpu",
    memory_gib: Annotated[float | None, typer.Option(help="Memory to use. Default: 60 % of what is free.")] = None,
) -> None:
    """Measure, print, and write OUT/<device>.json and OUT/<device>.png."""
    if context.invoked_subcommand is not None:
        return
    from bench import measure, tables
    from bench.bars import bars_table, cpu_bars
    from bench.plot import plot_speed

    chosen, dtypes = workload or list(QUICK if quick else WORKLOADS), dtype or list(DTYPES)
    _check_names("--workload", chosen, list(WORKLOADS))
    _check_names("--dtype", dtypes, list(DTYPES))
    where = _device(device)
    memory = machine.available_bytes(where) * MEMORY_SHARE if memory_gib is None else memory_gib * 2**30
    budget_s = QUICK_BUDGET_S if quick else BUDGET_S
    compared = (workload or list(QUICK_PASSES if quick else PASSES)) if own else []
    works = [("every provider", measure.measure, tables.workload_table, chosen if others else [])]
    for group in (names.FORMATS, names.SEVERAL):
        works.append((f"our {group}", partial(measure.measure_passes, group), tables.passes_table, compared))
    report = Report(_about(device))
    for what, measured_by, table, on in works:
        for name in on:
            for kind in dtypes:
                label = f"{what} on {WORKLOADS[name].title}, {kind}"
                with console.status(label) as status:
                    progress = _progress(status, label)
                    rows = measured_by(WORKLOADS[name], DTYPES[kind], where, budget_s, memory, progress)
                report.rows += rows
                console.print(table(rows), "")
    if not quick if train is None else train:
        report.training = _train(quick)
        console.print(tables.training_table(report), "")
    console.print(bars_table(report, cpu_bars(report)), "")
    _write(report, out / where.type, plot_speed)
    _fail([_wrong_line(row) for row in report.rows if row.wrong and (row.provider in names.ALL_OURS or row.is_ours)])


def _wrong_line(row: Row) -> str:
    return f"{row.provider} on {row.title}, {row.dtype}: {row.status}: {row.reason}"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"--device must be one that this torch can use, got {name}: {reason}") from None
    return device


def _train(quick: bool) -> list:
    from bench import training

    budget = training.Budget(QUICK_TRAINING_S, min_rounds=1) if quick else training.Budget(TRAINING_S)
    with console.status("training alone") as status:
        rows = training.measure_alone(budget)
        status.update(f"training under {training.DDP_SETTING}")
        return rows + training.measure_ddp(budget)


@app.command("plot")
def plot_command(file: Annotated[Path, typer.Argument(help="A report, as a run writes it.")]) -> None:
    """Draw the picture of FILE anew, beside it."""
    from bench.plot import plot_accuracy, plot_speed

    report, picture = Report.read(file), file.with_suffix(".png")
    if report.curves:
        plot_accuracy(report, picture)
    elif not plot_speed(report, picture):
        _fail([f"{file} holds no workload that was timed for us and for what it is compared with"])
    console.print(f"wrote {picture}")


@app.command("pages")
def pages_command(
    results: Annotated[Path, typer.Option(help="Folder of the reports.")] = RESULTS,
    root: Annotated[Path, typer.Option(help="Folder of README.md and docs/.")] = Path(),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail where a page differs.")] = False,
) -> None:
    """Fill the tables of README and docs from the reports."""
    from bench import pages

    _fail(pages.fill(root, results, check=check))
    console.print("every table is what the reports give")


@app.command("sharded")
def sharded_command(out: Out = OUT) -> None:
    """Measure a model spread over two gloo ranks, and plan one for 1024."""
    from bench import sharded, tables
    from bench.bars import bars_table, sharded_bars

    with console.status("two ranks"):
        rows = [*sharded.measure_updates(), *sharded.measure_swaps()]
        report = Report(_about(), rows, planned=sharded.plan_405b())
    console.print(tables.sharded_table(report), "", bars_table(report, sharded_bars(report)), "")
    _write(report, out / "sharded")


@app.command("loop")
def loop_command(
    out: Out = OUT,
    quick: Annotated[bool, typer.Option("--quick", help="A small decoder and few samples: under a minute.")] = False,
) -> None:
    """Measure what an average adds to a training step, updated in the loop or attached: about six minutes."""
    from bench import loop, tables

    with console.status("every way") as status:
        report = Report(_about(), steps=loop.measure(quick=quick, progress=_progress(status, "every way")))
    console.print(tables.steps_table(report), "")
    _write(report, out / "loop")
    _fail([f"{report.differing} elements are not those of the plain updates"] if report.differing else [])


@app.command("accuracy")
def accuracy_command(out: Out = OUT) -> None:
    """Follow the error of every format over 100,000 updates: about three minutes on one core."""
    from bench import accuracy, tables
    from bench.plot import plot_accuracy

    with console.status("every format") as status:
        report = accuracy.measure(_about(), progress=_progress(status, "every format"))
    console.print(tables.accuracy_table(report), "")
    _write(report, out / "accuracy", plot_accuracy)


@app.command("gpu")
def gpu_command(
    out: Annotated[Path, typer.Option(help="Folder for gpu.json, gpu.png, samples and logs.")] = OUT,
    checks: Annotated[
        bool, typer.Option("--checks", help="First build the library, run the GPU tests and the memory checkers.")
    ] = False,
    dry: Annotated[bool, typer.Option("--dry", help="Tiny workloads on the CPU, as dry.json.")] = False,
    library: Annotated[Path | None, typer.Option(help="A library to use where none can be built.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time of the whole run. Default: under nine minutes.")] = None,
) -> None:
    """Measure on one GPU beside a copy from device to device, and print which bars are met."""
    from bench import gpu

    limit = gpu.TOTAL_S if seconds is None else seconds
    raise typer.Exit(gpu.run(out, _command_line(), dry=dry, checks=checks, library=library, seconds=limit))
