"""The command line: ``swafast combine``, ``swafast demo``, ``swafast doctor``, ``swafast --version``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

# The packages that only the demo needs, under their import names.
DEMO_PACKAGES = ("sklearn", "matplotlib")

# With fewer, no epoch is left to average after the first 75%. demo.task checks it too, but its import takes seconds.
MIN_EPOCHS = 4

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


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


@app.command()
def doctor() -> None:
    """Print which backends run on this machine, and why the others do not."""
    from . import doctor as found

    raise typer.Exit(found.main())


@app.command()
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


@app.command()
def combine(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Files of averages that hold their counts.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Write the result there.")],
    merge: Annotated[bool, typer.Option("--merge", help="The mean of all models in all inputs.")] = False,
    window: Annotated[
        bool, typer.Option("--window", help="The mean of the models in the second input that the first one lacks.")
    ] = False,
    key: Annotated[str | None, typer.Option(metavar="A.B", help="The entry of a checkpoint that is the state.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Combine averages in files by their counts: --merge A B..., or --window EARLIER LATER."""
    if merge == window:
        raise typer.BadParameter("pass one of them", param_hint="--merge or --window")
    import warnings

    from .files.combining import combine_files

    console = Console(stderr=True)
    bad_input = (ValueError, TypeError, FileExistsError, FileNotFoundError, IsADirectoryError)
    with warnings.catch_warnings(record=True) as warned:
        try:
            done = combine_files(inputs, out, window=window, key=key, force=force)
        except (*bad_input, OSError) as error:
            console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2 if isinstance(error, bad_input) else 1) from None
    for each in warned:
        console.print(f"warning: {each.message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    for prefix, count in done.counts.items():
        name = prefix.rstrip(".") or "the mean"
        typer.echo(f"{out}: {name} of {count} models, if the inputs are equal means (SWA), which no file tells")
    if done.copied:
        typer.echo("BatchNorm statistics are those of the last input: call update_bn")


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
