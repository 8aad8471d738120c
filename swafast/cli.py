"""The command line: ``swafast average``, ``combine``, ``demo``, ``doctor`` and ``swafast --version``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

# The packages that only the demo needs, under their import names.
DEMO_PACKAGES = ("sklearn", "matplotlib")

# With fewer, no epoch is left to average after the first 75%. demo.task checks it too, but its import takes seconds.
MIN_EPOCHS = 4

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    options_metavar="",
    subcommand_metavar="COMMAND ...",
    epilog="Example: swafast average checkpoints/ --last 5 -o mean.safetensors",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"swafast {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Average a model's weights during training, in one fused pass."""


@app.command(options_metavar="[--help]", epilog="Example: swafast doctor")
def doctor() -> None:
    """Print which backends run on this machine, and why the others do not."""
    from . import doctor as found

    raise typer.Exit(found.main())


@app.command(options_metavar="[--seeds N, ...]", epilog="Example: swafast demo --seeds 1 --epochs 20")
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds; each trains every method.")] = 5,
    epochs: Annotated[int, typer.Option(min=MIN_EPOCHS, help="Number of epochs for each seed.")] = 60,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Write the picture there.")] = Path("swafast-demo.png"),
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every number there.")] = None,
) -> None:
    """Train a small network on handwritten digits with SGD, SWA and EMA, and measure what an average costs."""
    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"must end in .png, got {str(out)!r}", param_hint="--out")
    _check_writable(out, "--out")
    if json is not None:
        _check_writable(json, "--json")
    try:
        from .demo import Settings, run
    except ModuleNotFoundError as error:
        _explain_missing(error)
    run(Settings(num_seeds=seeds, epochs=epochs), out, json)


def _whole(text: str) -> int:
    """Parse a whole number, as names of checkpoints have it: ``2k`` too."""
    from .files.step_names import whole_number

    number = whole_number(text.lower())
    if number is None:
        raise typer.BadParameter(f"must be a whole number such as 2000 or 2k, got {text!r}")
    return number


# What `average` and `combine` share
_Allow = Annotated[list[str] | None, typer.Option(metavar="GLOBAL", help="A global that *.pt may name.")]
_Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
_Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


@app.command(
    "average",
    options_metavar="-o OUT [--last K, ...]",
    epilog="Example: swafast average checkpoints/ --last 5 -o mean.safetensors",
)
def average_checkpoints(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="Checkpoints, oldest first, or one folder of checkpoints.")
    ],
    out: Annotated[str, typer.Option("-o", "--out", metavar="OUT", help="*.safetensors, *.pt, or a folder.")],
    last: Annotated[int | None, typer.Option(metavar="K", parser=_whole, help="The last K.")] = None,
    first_step: Annotated[
        int | None, typer.Option("--from", metavar="STEP", parser=_whole, help="This step and later.")
    ] = None,
    last_step: Annotated[
        int | None, typer.Option("--to", metavar="STEP", parser=_whole, help="This step and earlier.")
    ] = None,
    min_gap: Annotated[int | None, typer.Option(metavar="N", parser=_whole, help="Steps at least N apart.")] = None,
    metric: Annotated[str | None, typer.Option(metavar="FIELD", help="Choose by this metric, with --best.")] = None,
    best: Annotated[int | None, typer.Option(metavar="K", parser=_whole, help="The best K by --metric.")] = None,
    lower_is_better: Annotated[
        bool, typer.Option("--lower-is-better", help="Low values of --metric are best.")
    ] = False,
    higher_is_better: Annotated[bool, typer.Option("--higher-is-better", help="High ones are best.")] = False,
    weights: Annotated[str | None, typer.Option(metavar="W,W,...", help="Weights of the inputs; sum 1.")] = None,
    ema: Annotated[float | None, typer.Option(metavar="DECAY", help="As an EMA over them: smooths a training.")] = None,
    power: Annotated[float | None, typer.Option(metavar="SIGMA", help="A power average of the inputs.")] = None,
    decay: Annotated[
        str | None, typer.Option(metavar="KIND", help="After a constant learning rate: linear, minus-sqrt.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the averages: fp32, bf16, fp16 or fp64.")] = None,
    integers: Annotated[str, typer.Option(help="equal: they must agree; last, first: those of one input.")] = "equal",
    nonfinite: Annotated[str, typer.Option(help="error, or keep: write NaNs and infinities too.")] = "error",
    key: Annotated[str | None, typer.Option(metavar="A.B", help="Where the state is in a *.pt or DCP input.")] = None,
    strip: Annotated[str | None, typer.Option(metavar="PREFIX", help="A prefix that names lose.")] = None,
    tied: Annotated[list[str] | None, typer.Option(metavar="A=B", help="A is a further name of B.")] = None,
    allow: _Allow = None,
    shard_size: Annotated[str | None, typer.Option(metavar="5GB", help="Of each file in a folder, at most.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read, sum and write.")] = 2,
    force: _Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be averaged, and stop.")] = False,
    quiet: _Quiet = False,
) -> None:
    """Average checkpoints in files into one, in little memory and without torch."""
    if lower_is_better and higher_is_better:
        raise typer.BadParameter("pass one of them", param_hint="--lower-is-better or --higher-is-better")
    from .files import averaging, progress

    with _failing_with_a_line():
        averaging.average(
            inputs, out, weights=_numbers(weights), ema=ema, power=power, decay=decay, last=last, first_step=first_step,
            last_step=last_step, min_gap=min_gap, metric=metric, best=best,
            lower_is_better=lower_is_better or (False if higher_is_better else None), key=key,
            strip=strip, allow=allow or (), tied=_pairs(tied or []), integers=integers, nonfinite=nonfinite,
            dtype=dtype, shard_size=shard_size, force=force, dry_run=dry_run, threads=threads,
            say=(lambda line: None) if quiet else _say,
            progress=lambda nbytes: progress.Progress(nbytes, quiet=quiet),
        )  # fmt: skip


def _say(line: str) -> None:
    """Print a line, unless nobody reads any more, as after ``| head -1``."""
    try:
        typer.echo(line)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"must be numbers with commas between, got {text!r}", param_hint="--weights") from None


def _pairs(texts: list[str]) -> dict[str, str]:
    for text in texts:
        if text.count("=") != 1:
            raise typer.BadParameter(f"must be of the form A=B, got {text!r}", param_hint="--tied")
    pairs = [text.split("=") for text in texts]
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise typer.BadParameter(f"must give each name once, got {twice!r} twice", param_hint="--tied")
    return dict(pairs)


@contextmanager
def _failing_with_a_line() -> Iterator[None]:
    """End with one line of the error: 2 for bad input, 1 for all else that the system refuses."""
    bad_input = (ValueError, TypeError, FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
    try:
        yield
    except (*bad_input, OSError, RuntimeError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, bad_input) else 1) from None


@app.command(
    options_metavar="-o OUT [--merge | --window]",
    epilog="Example: swafast combine --merge a.safetensors b.safetensors -o c.safetensors",
)
def combine(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Files of averages that hold their counts.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Write the result there.")],
    merge: Annotated[bool, typer.Option("--merge", help="The mean of all models in all inputs.")] = False,
    window: Annotated[
        bool, typer.Option("--window", help="The mean of the models in the second input that the first one lacks.")
    ] = False,
    key: Annotated[str | None, typer.Option(metavar="A.B", help="Where the state is in a *.pt input.")] = None,
    allow: _Allow = None,
    copied: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A tensor that is copied from the last input.")
    ] = None,
    force: _Force = False,
    quiet: _Quiet = False,
) -> None:
    """Combine averages in files by their counts: --merge A B..., or --window EARLIER LATER."""
    if merge == window:
        raise typer.BadParameter("pass one of them", param_hint="--merge or --window")
    import warnings

    from .files.combining import combine_files

    with warnings.catch_warnings(record=True) as warned, _failing_with_a_line():
        done = combine_files(inputs, out, window=window, key=key, allow=allow or (), copied=copied or (), force=force)
    if quiet:
        return
    for each in warned:
        Console(stderr=True).print(
            f"warning: {each.message}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )
    for prefix, count in done.counts.items():
        name = prefix.rstrip(".") or "the mean"
        typer.echo(f"{out}: {name} of {count} models, if the inputs are equal means (SWA), which no file tells")
    if done.copied:
        typer.echo("BatchNorm statistics are those of the last input: call update_bn")
    if done.dropped:
        typer.echo("deviations are left out, since they are from other means: load it with deviations=0")


def _check_writable(path: Path, option: str) -> None:
    """Fail before the training rather than after it if ``path`` cannot be written."""
    if path.is_dir():
        raise typer.BadParameter(f"must be a file, got the folder {str(path)!r}", param_hint=option)
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"must be in a folder that exists, got {str(path)!r}", param_hint=option)
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise typer.BadParameter(f"must be writable, got {str(path)!r}", param_hint=option)


def _explain_missing(error: ModuleNotFoundError) -> NoReturn:
    missing = (error.name or "").partition(".")[0]
    if missing not in DEMO_PACKAGES:
        raise error
    message = f"swafast demo needs {missing}, which is not installed: pip install '.[demo]' in the clone"
    Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)
