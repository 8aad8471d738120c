"""`average`: one checkpoint of the averages of several, in memory that does not grow with them."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..terms import coefficients
from ..terms.numbers import as_int
from .agreement import INTEGERS, Agreed, agree
from .checkpoints import ITEMSIZES, RECORD, Checkpoint, Output, OutputPlan
from .descriptors import interrupted_once
from .opening import create_output, open_checkpoint, output_form
from .places import check_place, check_space
from .progress import size_text
from .selection import Selected, select
from .streaming import NBYTES_PER_THREAD, Pass
from .summing import TorchSumming, choose_summing

#: What stands beside the weights in a folder and belongs to the model: configs, tokenizers, code.
_BESIDE = re.compile(r".+\.(json|txt|model|tiktoken|jinja|py)")
_NOT_BESIDE = re.compile(rf".+\.index\.json|trainer_state\.json|.+_results\.json|{RECORD}\.json|requirements\.txt")
#: The largest tokenizers have 40 MB.
_MOST_BESIDE_NBYTES = 100 * 10**6

_DTYPES = {
    **dict.fromkeys(("f64", "float64", "fp64", "double"), "F64"),
    **dict.fromkeys(("f32", "float32", "fp32", "float"), "F32"),
    **dict.fromkeys(("f16", "float16", "fp16", "half"), "F16"),
    **dict.fromkeys(("bf16", "bfloat16"), "BF16"),
}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Advancing(Protocol):
    """Shows the progress of a run."""

    def advance(self, nbytes: int) -> None: ...

    def phase(self, label: str) -> None: ...


@dataclass(frozen=True)
class AverageReport:
    """What one call of :func:`average` has done, or would do."""

    inputs: tuple[Selected, ...]  # the oldest first
    coefficients: tuple[float, ...]  # of the inputs
    out: str
    num_averaged: int  # tensors
    num_copied: int  # tensors
    nbytes_read: int
    nbytes_written: int
    nbytes_memory: int  # of the chunks that are in memory at once
    summing: str  # what sums them up
    seconds: float | None = None  # None: it was a dry run

    def lines(self) -> list[str]:
        """Return the inputs, one a line, and then what is read and written."""
        listed = [
            f"{coefficient:10.6f}  {'' if it.step is None else f'step {it.step}  '}"
            f"{'' if it.metric is None else f'{it.metric:g}  '}{it.path}"
            for it, coefficient in zip(self.inputs, self.coefficients, strict=True)
        ]
        copied = f", copies {self.num_copied}" if self.num_copied else ""
        return [
            *listed,
            f"averages {self.num_averaged} tensors{copied}: reads {size_text(self.nbytes_read)}, writes "
            f"{size_text(self.nbytes_written)} to {self.out}, {size_text(self.nbytes_memory)} in memory",
            f"summed by {self.summing}",
        ]


def average(
    inputs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    ema: float | None = None,
    power: float | None = None,
    decay: str | None = None,
    last: int | None = None,
    first_step: int | None = None,
    last_step: int | None = None,
    min_gap: int | None = None,
    metric: str | None = None,
    best: int | None = None,
    lower_is_better: bool | None = None,
    key: str | None = None,
    strip: str | None = None,
    allow: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
    integers: str = "equal",
    nonfinite: str = "error",
    dtype: Any = None,
    shard_size: int | str | None = None,
    force: bool = False,
    dry_run: bool = False,
    threads: int = 2,
    say: Callable[[str], object] = lambda line: None,
    progress: Callable[[int], AbstractContextManager[Advancing]] | None = None,
) -> AverageReport:
    """Average checkpoints into a new one, a chunk of 128 Ki elements at a time, in float64 with one rounding.

    Inputs are matched by name. They may be safetensors files, ``*.safetensors.index.json``, files of ``torch.save``,
    and folders of Hugging Face or of ``torch.distributed.checkpoint``. Torch is not imported. The output is written
    beside its place and renamed, so it is absent or whole at every moment.

    Args:
        inputs: the checkpoints, the oldest first; or one folder that has the checkpoints of a training in it.
        out: ``*.safetensors``, ``*.pt``, ``*.pth``, ``*.bin``, ``*.ckpt``, or a folder.
        weights: of the inputs; they sum to 1. Without this or one of the next three: the mean.
        ema: the decay of an exponential moving average over the inputs.
        power: ``sigma_rel`` of a power average over the inputs.
        decay: ``"linear"`` or ``"minus-sqrt"``: stands for this decay of the learning rate (WSM).
        last: average only so many of the last checkpoints of the folder.
        first_step, last_step: average only those between these steps, both included.
        min_gap: average only those that are so many steps apart, counted back from the last.
        metric, best, lower_is_better: average the ``best`` ones by this metric.
        key: where the state is in what ``torch.save`` has written, as in ``a.b``.
        strip: a prefix that names lose, such as ``module.``.
        allow: globals that files of ``torch.save`` may load beside tensors, as ``module.name``.
        tied: names that are further names of other tensors.
        integers: ``"equal"``: integers must agree; ``"last"``, ``"first"``: those of one input are taken.
        nonfinite: ``"error"``, or ``"keep"`` to write NaNs and infinities too.
        dtype: of the averages, such as ``"bf16"``. None: that of the inputs.
        shard_size: the most bytes of one file in a folder, such as ``"5GB"``.
        force: replace what stands at ``out``. A folder is replaced only if an average wrote all that is in it.
        dry_run: check names, shapes, dtypes and the space on the disk; read no tensor and write nothing.
        threads: that read, sum and write.
        say: is called with each line of the report before the run begins.
        progress: makes a context manager from the number of bytes to be read and written, as
            :class:`~swafast.files.progress.Progress`.

    Raises:
        TypeError, ValueError: an argument does not fit; an input is damaged; inputs do not agree in names, shapes,
            dtypes or integers; or a tensor holds NaN. Nothing is at ``out`` that was not there before.
        OSError: an input cannot be read, or ``out`` exists or cannot be written.
    """
    started, had_torch = time.monotonic(), "torch" in sys.modules
    _check_choices(integers=(integers, INTEGERS), nonfinite=(nonfinite, ("error", "keep")))
    num_threads = _checked_threads(threads)
    named_dtype, shard_nbytes = _dtype_name(dtype), _nbytes(shard_size)
    chosen = _checked_paths(inputs, out)
    _check_names(key=key, strip=strip, tied=tied)
    between = {"first_step": first_step, "last_step": last_step, "last": last, "min_gap": min_gap}
    selected = select(chosen, **between, metric=metric, best=best, lower_is_better=lower_is_better, say=say)
    factors = _coefficients(len(selected), weights=weights, ema=ema, power=power, decay=decay)
    path, paths = os.fspath(out), [it.path for it in selected]
    form = output_form(path, shard_nbytes, paths[0])
    is_folder = form in ("folder", "distributed")
    check_place(Path(path), is_folder, force, paths)
    with ExitStack() as stack:
        opened = _opened(stack, paths, key, strip, allow, say)
        tensors, aliases = agree(opened, tied=tied or {}, dtype=named_dtype, integers=integers)
        summing, summed_by = choose_summing()
        report = _report(selected, factors, path, tensors, num_threads, summed_by)
        for line in report.lines():
            say(line)
        check_space(Path(path), report.nbytes_written)
        if not dry_run:
            metadata = {"format": "pt", **opened[0].metadata, RECORD: _record(paths, factors)}
            plan = OutputPlan([it.spec for it in tensors], aliases, metadata)
            beside = _beside(paths[-1]) if form == "folder" else []
            task = Pass(opened, tensors, factors, nonfinite == "keep", summing)
            with interrupted_once():
                output = create_output(
                    *(path, plan), form=form, shard_nbytes=shard_nbytes, copied=beside, like=opened[0], last=paths[-1],
                    new=not force,
                )  # fmt: skip
                place = partial(check_place, Path(path), is_folder, force, paths)
                _fill(output, task, num_threads, progress, report.nbytes_read + report.nbytes_written, place)
            report = replace(report, seconds=time.monotonic() - started)
    assert had_torch or summing is TorchSumming or "torch" not in sys.modules, "an average has imported torch"
    return report


def _fill(
    output: Output,
    task: Pass,
    threads: int,
    progress: Callable[[int], AbstractContextManager[Advancing]] | None,
    nbytes: int,
    check_place: Callable[[], None],
) -> None:
    """Run a pass, and put its output in its place or, if anything fails, away."""
    try:
        with nullcontext() if progress is None else progress(nbytes) as shown:
            task.run(output, threads, (lambda advanced: None) if shown is None else shown.advance)
            for each in task.inputs:
                each.require_unchanged()
            check_place()  # once more: what has come meanwhile is not ours
            if shown is not None:
                shown.phase("syncing to the disk")
            output.commit()
    except BaseException:
        for each in task.inputs:
            each.close()  # a clean-up needs descriptors
        output.discard()
        raise


def _opened(
    stack: ExitStack,
    paths: Sequence[str],
    key: str | None,
    strip: str | None,
    allow: Sequence[str],
    say: Callable[[str], object],
) -> list[Checkpoint]:
    opened = []
    for path in paths:
        checkpoint = open_checkpoint(path, key=key, strip=strip, allow=allow)
        stack.callback(checkpoint.close)
        if "swafast" in checkpoint.metadata:
            raise ValueError(
                f"{path} is a state that swafast.save has written, with counts: average such states by swafast combine"
            )
        for note in getattr(checkpoint, "notes", ()):
            say(note)
        opened.append(checkpoint)
    return opened


def _coefficients(count: int, **asked: Any) -> list[float] | None:
    """Return the coefficients of the inputs, the oldest first. None: the mean."""
    chosen = {name: value for name, value in asked.items() if value is not None}
    if count < 1:
        raise ValueError("inputs must be at least one checkpoint, got none")
    if len(chosen) > 1:
        raise ValueError(f"only one of weights, ema, power and decay may be given, got {' and '.join(chosen)}")
    of: dict[str, Callable[[int, Any], list[float]]] = {
        **{"weights": coefficients.given, "ema": coefficients.ema},
        **{"power": coefficients.power, "decay": coefficients.decay},
    }
    return next((of[name](count, value) for name, value in chosen.items()), None)


def _report(
    selected: Sequence[Selected],
    factors: Sequence[float] | None,
    out: str,
    tensors: Sequence[Agreed],
    threads: int,
    summed_by: str,
) -> AverageReport:
    return AverageReport(
        inputs=tuple(selected),
        coefficients=tuple(factors or coefficients.equal(len(selected))),
        out=out,
        num_averaged=sum(it.copied_from is None for it in tensors),
        num_copied=sum(it.copied_from is not None for it in tensors),
        nbytes_read=sum(it.spec.numel * ITEMSIZES[it.dtypes[place]] for it in tensors for place in it.read_from),
        nbytes_written=sum(it.spec.nbytes for it in tensors),
        nbytes_memory=threads * NBYTES_PER_THREAD,
        summing=summed_by,
    )


def _record(paths: Sequence[str], factors: Sequence[float] | None) -> str:
    """Return what the output says of itself, as JSON."""
    version = sys.modules[__name__.partition(".")[0]].__version__
    return json.dumps({"swafast": version, "inputs": [*paths], "coefficients": factors or "equal"})


def _beside(path: str) -> list[Path]:
    """Return the config and tokenizer files of an input, for a folder."""
    folder = Path(path) if os.path.isdir(path) else None
    if folder is None and path.endswith(".index.json"):
        folder = Path(path).parent
    if folder is None:
        return []
    return [
        file
        for file in sorted(folder.iterdir())
        if _BESIDE.fullmatch(file.name) and not _NOT_BESIDE.fullmatch(file.name)
        if file.is_file() and file.stat().st_size <= _MOST_BESIDE_NBYTES
    ]


def _check_choices(**choices: tuple[object, Sequence[str]]) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _checked_paths(inputs: Any, out: Any) -> list[str]:
    """Return the paths of the inputs."""
    chosen = [*inputs] if isinstance(inputs, Iterable) and not isinstance(inputs, (str, bytes)) else [inputs]
    for name, path in (*(("inputs", path) for path in chosen), ("out", out)):
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"{name} must be a str or a Path, or several for inputs, got {path!r}")
    return [os.fspath(path) for path in chosen]


def _check_names(*, key: object, strip: object, tied: object) -> None:
    for name, value in (("key", key), ("strip", strip)):
        if not isinstance(value, str | None):
            raise TypeError(f"{name} must be a str, got {value!r}")
    pairs = {} if tied is None else tied
    if not isinstance(pairs, Mapping) or not all(isinstance(name, str) for pair in pairs.items() for name in pair):
        raise TypeError(f"tied must be a dict from names to names, got {tied!r}")


def _checked_threads(threads: object) -> int:
    number = as_int(threads)
    if number is None or not 1 <= number <= 256:
        raise ValueError(f"threads must be an int from 1 to 256, got {threads!r}")
    return number


def _dtype_name(dtype: Any) -> str | None:
    """Return the name in safetensors of a dtype of torch or numpy, or of its name."""
    if dtype is None:
        return None
    name = str(getattr(dtype, "__name__", dtype)).removeprefix("torch.").lower()
    if name not in _DTYPES:
        raise ValueError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype!r}")
    return _DTYPES[name]


def _nbytes(size: int | str | None) -> int | None:
    if size is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", str(size).strip().upper())
    unit = _UNITS.get(found[2] if found is None or found[2][-1:] in ("", "B") else f"{found[2]}B") if found else None
    if found is None or unit is None or not 1 <= float(found[1]) * unit < 2**63:
        raise ValueError(f"shard_size must be a number of bytes such as '5GB', got {size!r}")
    return int(float(found[1]) * unit)
