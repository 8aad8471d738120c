"""The command line: ``python -m bench`` and its commands."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from bench import internals, machine, names
from bench.report import Report, count_text, item_line
from bench.workloads import QUICK, WORKLOADS

RESULTS = Path("bench/results")
# Where a run writes unless told otherwise: git ignores it, so a look at the speed leaves the committed report alone.
OUT = Path("build/bench")
CPU = torch.device("cpu")

# Seconds of timing for one workload and dtype. With gates and compilation, the twelve of a full run stay under ten
# minutes on 2 cores.
BUDGET_S, QUICK_BUDGET_S = 10.0, 3.0
# Where our own passes are compared with each other unless workloads are named: averages that fit no cache.
PASSES, QUICK_PASSES = ("gpt2_medium",), ("resnet50",)
# Where the cost of checks shows.
CHECKED = ("3000x64", "2000x64x64", "resnet50")
# A measuring process of a GPU run looks at the clock between providers, and takes so long for the samples of one.
PROVIDER_S = 0.4

app = typer.Typer(add_completion=False, help="Measure an update beside every other way of averaging a model.")
# The tables need about this many columns; a log has no width of its own.
LOG_COLUMNS = 150
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_COLUMNS)

Out = Annotated[Path, typer.Option(help="Folder for the report, its samples and its picture.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small workloads and budgets: two to three minutes.")]


def _command_line() -> str:
    """Return the command that repeats this run, without where it writes: a report holds no path of a machine."""
    return re.sub(r" --(?:out|library|mergekit|folder)[ =]\S+", "", " ".join(["python -m bench", *sys.argv[1:]]))


def _about() -> dict[str, object]:
    return {**machine.environment(CPU, _command_line()), "swafast_backend": internals.backend_in_use(CPU)}


def _write(report: Report, stem: Path, draw: Callable[[Report, Path], object] | None = None) -> None:
    """Write the report, its samples and its picture."""
    report.write(stem.with_suffix(".json"))
    report.write_samples(stem.with_suffix(".samples.jsonl"))
    console.print(f"wrote {stem.with_suffix('.json')}")
    if draw is not None and draw(report, stem.with_suffix(".png")) is not False:
        console.print(f"wrote {stem.with_suffix('.png')}")


def _fail(lines: list[str]) -> None:
    for line in lines:
        console.print(line, style="bold red")
    if lines:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    workload: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(WORKLOADS)}; repeatable.")] = None,
    quick: Quick = False,
    others: Annotated[bool, typer.Option(help="Measure every other way of averaging beside ours.")] = True,
    out: Out = OUT,
) -> None:
    """Measure every way of averaging and our own passes on this CPU. Print, and write OUT/cpu.json and OUT/cpu.png."""
    if context.invoked_subcommand is not None:
        return
    from bench import cases, lookup, measure, plot, tables

    for name in workload or ():
        if name not in WORKLOADS:
            raise typer.BadParameter(f"--workload must be one of {', '.join(WORKLOADS)}, got {name}")
    report, passes = Report(_about()), workload or (QUICK_PASSES if quick else PASSES)
    groups = {names.UPDATES: workload or (QUICK if quick else WORKLOADS), names.FORMATS: passes, names.SEVERAL: passes}
    for group, chosen in groups.items():
        for case in cases.cpu_cases(group, chosen) if others or group != names.UPDATES else ():
            start = len(report.rows)
            with console.status("measuring") as status:
                budget_s = QUICK_BUDGET_S if quick else BUDGET_S
                measure.Bench(measure.Setting(CPU, budget_s, report.rows.append, status.update)).run(case)
            if group == names.UPDATES:
                console.print(Markdown(tables.providers_table(report.rows[start:])), "")
        if group in (names.FORMATS, names.SEVERAL):
            console.print(Markdown(tables.passes_block(report, group)), "")
    _write(report, out / "cpu", plot.plot_speed)
    _fail(lookup.failures(report))


def _checked(report: Report, budget_s: float) -> None:
    """Measure what checks cost in whole updates, with the default threads and with one."""
    from bench import cases, measure

    threads = torch.get_num_threads()
    for group, count in ((names.CHECKED, threads), (names.CHECKED_ALONE, 1)):
        torch.set_num_threads(count)
        try:
            with console.status("measuring") as status:
                bench = measure.Bench(measure.Setting(CPU, budget_s, report.rows.append, status.update))
                for case in cases.cpu_cases(group, CHECKED):
                    bench.run(case)
        finally:
            torch.set_num_threads(threads)


@app.command("host")
def host_command(out: Out = OUT, quick: Quick = False) -> None:
    """Measure what an update costs the host beside its kernel, and what its checks cost: about two minutes."""
    from bench import bars, host, lookup, tables_of_checks

    with console.status("host") as status:
        report = Report(_about(), host.measure(quick=quick, progress=status.update))
    _checked(report, QUICK_BUDGET_S if quick else BUDGET_S)
    console.print(Markdown(tables_of_checks.host_block(report)), "")
    console.print(Markdown(tables_of_checks.checked_block(report)), "")
    console.print(Markdown(bars.bars_table(report, [*bars.host_bars(report), *bars.checked_bars(report)])), "")
    _write(report, out / "host")
    _fail(lookup.failures(report))


@app.command("pages")
def pages_command(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail where a page differs.")] = False,
) -> None:
    """Fill the tables of README and docs from the reports."""
    from bench import pages

    _fail(pages.fill(Path(), RESULTS, check=check))
    console.print("every table is what the reports give")


@app.command("sharded")
def sharded_command(out: Out = OUT) -> None:
    """Measure a model spread over two gloo ranks."""
    from bench import sharded, tables

    with console.status("two ranks"):
        report = Report(_about(), [*sharded.measure_updates(), *sharded.measure_swaps()])
    console.print(Markdown(tables.sharded_block(report)), "")
    _write(report, out / "sharded")


@app.command("loop")
def loop_command(out: Out = OUT, quick: Quick = False) -> None:
    """Measure what an average adds to a training step, updated in the loop or attached: about six minutes."""
    from bench import bars, loop, tables

    with console.status("every way") as status:
        report = Report(_about(), steps=loop.measure(quick=quick, progress=status.update))
    console.print(Markdown(tables.loop_block(report)), "")
    console.print(Markdown(bars.bars_table(report, bars.loop_bars(report))), "")
    _write(report, out / "loop")
    _fail(
        [f"averages differ from the plain ones in {count_text(report.differing, 'element')}"]
        if report.differing
        else []
    )


@app.command("frameworks")
def frameworks_command(quick: Quick = False) -> None:
    """Measure the drop-ins beside the classes of diffusers and timm, which must be installed. Print, write nothing."""
    from bench import drop_ins

    with console.status("drop-ins") as status:
        rows = drop_ins.measure(quick=quick, progress=status.update)
    console.print(Markdown(drop_ins.table(rows)), "")


@app.command("teacher")
def teacher_command(quick: Quick = False) -> None:
    """Measure an average that runs forward in each step, by torch's class and by ours. Print, write nothing."""
    from bench import teacher

    with console.status("a teacher") as status:
        rows = teacher.measure(quick=quick, progress=status.update)
    console.print(Markdown(teacher.table(rows)), "")


@app.command("files")
def files_command(
    out: Out = OUT,
    quick: Quick = False,
    mergekit: Annotated[Path | None, typer.Option(help="An environment with mergekit 0.1.5 in it.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where inputs of 2.5 GB are written and deleted.")] = None,
) -> None:
    """Average checkpoints in files by ours and by others: about five minutes."""
    from bench import files, plot_files, tables

    models, count = (files.QUICK_MODELS, files.QUICK_ROUNDS) if quick else (files.MODELS, files.ROUNDS)
    with tempfile.TemporaryDirectory(dir=folder) as place, console.status("files") as status:
        rows = files.measure(models, Path(place), mergekit, count=count, progress=status.update)
    report = Report(_about(), files=rows)
    console.print(Markdown(tables.files_block(report)), "")
    for work, limit, value in files.bars(rows):
        console.print(f"{'ok   ' if value <= limit else 'SHORT'} {work}: {value:.3g}, at most {limit:.3g}")
    _write(report, out / "files", plot_files.plot_files)
    _fail([f"{row.dtype}, {row.way}: {row.status}: {row.reason}" for row in rows if row.status in ("wrong", "failed")])


@app.command("swag")
def swag_command(out: Out = OUT, quick: Quick = False) -> None:
    """Measure a collect and a sample of SWAG, by the authors' algorithm, by careful torch and by ours."""
    from bench import swag, tables

    chosen = (swag.QUICK_WORKLOAD, swag.QUICK_DEVIATIONS) if quick else (swag.WORKLOAD, swag.DEVIATIONS)
    budget_s = swag.QUICK_BUDGET_S if quick else swag.BUDGET_S
    with console.status("swag") as status:
        report = Report(_about(), swag.measure(WORKLOADS[chosen[0]], chosen[1], budget_s, status.update))
    console.print(Markdown(tables.swag_block(report)), "")
    for what, least, value in swag.bars(report.rows):
        console.print(f"{'ok   ' if value >= least else 'SHORT'} {what}: {value:.3g}, at least {least:.3g}")
    _write(report, out / "swag")


@app.command("accuracy")
def accuracy_command(out: Out = OUT) -> None:
    """Follow the error of every format over 100,000 updates: about three minutes on one core."""
    from bench import accuracy
    from bench.plot_accuracy import plot_accuracy

    with console.status("every format") as status:
        report = accuracy.measure(_about(), progress=status.update)
    _write(report, out / "accuracy", plot_accuracy)


@app.command("pictures")
def pictures_command(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("docs/pictures"),
) -> None:
    """Draw the pictures of the documents: the front page's, errors, memory, calls. All have a form for phones.

    Nothing is timed: the reports in bench/results and the pictures of examples are read.
    """
    from bench import pictures

    for path in pictures.draw_all(out, RESULTS):
        console.print(f"wrote {path}")


@app.command("predict")
def predict_command() -> None:
    """Print what updates on an H200 should take, from a model of the kernels' loops: no measurement."""
    from bench.gpu import predictions

    console.print(Markdown(predictions.model_table()))


@app.command("gpu")
def gpu_command(
    out: Annotated[Path, typer.Option(help="Folder for gpu.json, gpu.png, samples and logs.")] = OUT,
    dry: Annotated[bool, typer.Option("--dry", help="Tiny workloads on the CPU, as dry.json.")] = False,
    library: Annotated[Path | None, typer.Option(help="A library to use where none can be built.")] = None,
) -> None:
    """Measure on one GPU beside a copy from device to device, and print which bars are met."""
    from bench import gpu

    raise typer.Exit(gpu.run(out, _command_line(), dry=dry, library=library))


@app.command("part", hidden=True)
def part_command(
    part: Annotated[str, typer.Argument(help="bits, loop, or the cases to time.")],
    device: str = "cuda",
    backend: Annotated[list[str] | None, typer.Option()] = None,
    seconds: Annotated[float, typer.Option(help="From the start of the process; of the loop: for samples.")] = 60.0,
    l2_bytes: int = 0,
    lines: Annotated[Path, typer.Option(help="Append what is found, one item a line.")] = Path(os.devnull),
    profile: Annotated[bool, typer.Option(help="Count launches, instead of taking times.")] = False,
) -> None:
    """Do one part of a GPU run, in a process of its own."""
    from bench import cases, loop, measure, smoke

    end, dry, backends = time.monotonic() + seconds, device == "cpu", backend or []
    if dry:
        torch.set_num_threads(1)  # a dry run times nothing that counts, and others may be at work on this machine
    with lines.open("a") as file:

        def emit(kind: str, item: object) -> None:
            file.write(item_line(kind, item))
            file.flush()

        if part == "bits":
            wrong, summary = smoke.compare(backends, device, partial(emit, "bits"))
        elif part == "loop":
            steps, summary = loop.measure_on(torch.device(device), backends, 0.0 if dry else seconds)
            for step in steps:
                emit("steps", step)
            wrong = any(step.differing for step in steps)
        else:
            say, wrong = partial(print, flush=True), False
            setting = measure.Setting(
                torch.device(device), 0.0 if dry else PROVIDER_S, partial(emit, "rows"), say, l2_bytes, end, profile
            )
            bench = measure.Bench(setting)
            chosen = cases.gpu_cases(part, backends, dry=dry)
            for case in chosen:
                bench.run(case)
            summary = count_text(len(chosen), "case")
    typer.echo(summary)
    raise typer.Exit(int(wrong))
