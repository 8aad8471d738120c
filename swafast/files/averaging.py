"""`average`: one checkpoint of the averages of several, in memory that does not grow with them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..terms import coefficients
from ..terms.unmerged import is_statistic
from .agreement import INTEGERS, Agreed, agree
from .beside import beside, changed_texts
from .checkpoints import ITEMSIZES, RECORD, Checkpoint, Output, OutputPlan
from .choices import (
    asked_coefficients,
    check_choices,
    check_names,
    checked_paths,
    checked_threads,
    dtype_name,
    nbytes_of,
)
from .descriptors import interrupted_once
from .entries import AVERAGE_PART, require_one_plane
from .opening import create_output, open_checkpoint, output_form
from .placing import check_place, check_space
from .progress import size_text
from .selection import Selected, select
from .streaming import NBYTES_PER_THREAD, Pass
from .summing import TorchSumming, choose_summing


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
    notes: tuple[str, ...]  # lines on what was skipped, chosen and left out, and on what a user may not expect
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
        integers: ``"equal"``: integers must agree; ``"last"``, ``"first"``: those of one input are taken. BatchNorm's
            statistics and further state (``_extra_state``) are those of the last input, or of the first.
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
    check_choices(integers=(integers, INTEGERS), nonfinite=(nonfinite, ("error", "keep")))
    num_threads = checked_threads(threads)
    named_dtype, shard_nbytes = dtype_name(dtype), nbytes_of(shard_size)
    chosen = checked_paths(inputs, out)
    check_names(key=key, strip=strip, tied=tied)
    between = {"first_step": first_step, "last_step": last_step, "last": last, "min_gap": min_gap}
    notes: list[str] = []
    note = _keeping(notes, say)
    selected = select(chosen, **between, metric=metric, best=best, lower_is_better=lower_is_better, say=note)
    factors = asked_coefficients(len(selected), weights=weights, ema=ema, power=power, decay=decay)
    _note_surprises(selected, factors, ema, note)
    path, paths = os.fspath(out), [it.path for it in selected]
    form = output_form(path, shard_nbytes, paths[0])
    require_free = partial(check_place, Path(path), form, force, paths)
    require_free()
    with ExitStack() as stack:
        opened = _opened(stack, paths, key, strip, allow, note)
        tensors, aliases = agree(opened, tied=tied or {}, dtype=named_dtype, integers=integers)
        _note_statistics(paths, tensors, note)
        summing, summed_by = choose_summing()
        report = _report(selected, factors, path, tensors, num_threads, summed_by, notes)
        for line in report.lines():
            say(line)
        check_space(Path(path), report.nbytes_written)
        if not dry_run:
            record = {RECORD: _record(paths, factors)}
            metadata = {**record, "format": "pt", **opened[0].metadata, **record}  # in this order: see RECORD
            plan = OutputPlan([it.spec for it in tensors], aliases, metadata)
            copied = beside(paths[-1]) if form == "folder" else []
            if form == "folder" and not copied:
                say(f"copied no configuration: none is in a folder that {paths[-1]} has for itself")
            texts = changed_texts(copied, named_dtype)
            task = Pass(opened, tensors, factors, nonfinite == "keep", summing)
            with interrupted_once():
                output = create_output(
                    *(path, plan), form=form, shard_nbytes=shard_nbytes, copied=copied, texts=texts, like=opened[0],
                    last=paths[-1], new=not force,
                )  # fmt: skip
                _fill(output, task, num_threads, progress, report.nbytes_read + report.nbytes_written, require_free)
            report = replace(report, seconds=time.monotonic() - started)
    assert had_torch or summing is TorchSumming or "torch" not in sys.modules, "an average has imported torch"
    return report


def _keeping(lines: list[str], say: Callable[[str], object]) -> Callable[[str], object]:
    """Return a function that says a line and keeps it."""

    def note(line: str) -> None:
        lines.append(line)
        say(line)

    return note


def _note_surprises(
    selected: Sequence[Selected], factors: Sequence[float] | None, ema: float | None, note: Callable[[str], object]
) -> None:
    if factors is None:
        return
    steps = [it.step for it in selected if it.step is not None]
    if steps != sorted(steps):  # a shell lists checkpoint-1000 before checkpoint-500
        note("the weights go to the inputs in the order in which they are listed, which is not that of their steps")
    if ema is not None and len(factors) > 1 and factors[0] > max(factors[1:]):
        note(
            f"the oldest input has the largest weight, {factors[0]:.3f}: an EMA begins with it, and {ema:g} (--ema) is "
            f"large for {len(factors)} inputs"
        )


def _note_statistics(paths: Sequence[str], tensors: Sequence[Agreed], note: Callable[[str], object]) -> None:
    places = [it.copied_from for it in tensors if is_statistic(it.spec.name) and it.copied_from is not None]
    if places:
        note(f"BatchNorm's statistics are those of {paths[places[0]]}: call update_bn on the result")


def _fill(
    output: Output,
    task: Pass,
    threads: int,
    progress: Callable[[int], AbstractContextManager[Advancing]] | None,
    nbytes: int,
    require_free: Callable[[], None],
) -> None:
    """Run a pass, and put its output in its place or, if anything fails, away."""
    try:
        with nullcontext() if progress is None else progress(nbytes) as shown:
            task.run(output, threads, (lambda advanced: None) if shown is None else shown.advance)
            for each in task.inputs:
                each.require_unchanged()
            require_free()  # once more: what has come meanwhile is not ours
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
        require_one_plane([*checkpoint.specs, *checkpoint.aliases], path)
        for note in getattr(checkpoint, "notes", ()):
            say(note)
        opened.append(checkpoint)
    _check_keys(opened, key)
    return opened


def _check_keys(opened: Sequence[Checkpoint], asked: str | None) -> None:
    """Check the keys that were taken: an average and a model do not mix, and a key that nothing has is a mistake."""
    keys = {found: each.path for each in opened if (found := getattr(each, "key", ""))}
    if asked is not None and not any(hasattr(each, "key") for each in opened):
        raise ValueError(f"key (--key) is for files of torch.save and folders of DCP, got {asked!r} for safetensors")
    if asked is None and AVERAGE_PART in keys and len(keys) > 1:
        other = next(found for found in keys if found != AVERAGE_PART)
        raise ValueError(
            f"inputs must hold the same part, got {AVERAGE_PART!r} in {keys[AVERAGE_PART]} and {other!r} in "
            f"{keys[other]}: pass key={other!r} (--key {other})"
        )


def _report(
    selected: Sequence[Selected],
    factors: Sequence[float] | None,
    out: str,
    tensors: Sequence[Agreed],
    threads: int,
    summed_by: str,
    notes: Sequence[str],
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
        notes=tuple(notes),
    )


def _record(paths: Sequence[str], factors: Sequence[float] | None) -> str:
    """Return what the output says of itself, as JSON."""
    version = sys.modules[__name__.partition(".")[0]].__version__
    return json.dumps({"swafast": version, "inputs": [*paths], "coefficients": factors or "equal"})
