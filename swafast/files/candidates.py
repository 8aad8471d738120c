"""What may be averaged: listed checkpoints, or those in the folder of a training, and what is none there."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..terms.misfits import few
from .safetensors_files import INDEX_SUFFIX, STEMS, read_index
from .step_names import Counted, has_step, stem_of

#: Reasons why a file or folder among checkpoints is none.
_HIDDEN, _OTHER, _SHARD = "hidden", "no checkpoint", "shards of a checkpoint"
_UNFINISHED, _STATE, _COPY = "unfinished", "states of a training, no weights", "copies or means of others"
_OWN = "weights of the folder itself"

_NAMES = {
    _UNFINISHED: re.compile(r".*\.(unfinished|incomplete|partial|part|tmp)|tmp|tmp[-_.].*|.*_tmp"),
    _STATE: re.compile(
        r"((lr_?)?schedulers?|(grad_)?scaler|random_states?|training_args|train|args|trainer_state)([-_]\d+)?"
        r"|rng(_states?)?([-_].*)?|optim(izer)?s?([-_.].*)?|.*optim(izer)?_states?|zero_pp_rank_.*"
    ),
}
#: Words of a name without a step, which mark a copy or a mean of other checkpoints.
_COPIES = {"last", "latest", "best", "final", "init", "avg", "average", "averaged", "mean", "swa"}
#: The name of a shard, and names of weights that have a folder of their own.
_OF_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}")
_ONLY_WEIGHTS = ("model", "pytorch_model", "adapter_model", "diffusion_pytorch_model")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that may be selected."""

    path: str  # of what is read
    place: str  # whose name has the step: the same, or the folder that it lies in
    counted: Counted | None = None
    metric: float | None = None

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.place))

    @property
    def step(self) -> int | None:
        return None if self.counted is None else self.counted.step


def listed(paths: Sequence[str]) -> list[Candidate]:
    """Return a candidate for each path.

    Raises:
        FileNotFoundError: there is nothing at one of them.
    """
    found = []
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"inputs must exist, got {path!r}: there is nothing at this path")
        if os.path.isdir(path):
            # A folder that is not understood goes to whoever opens it, and is refused there.
            found.append(Candidate(_checkpoint_in(path) or path, path))
        else:
            has_own_folder = _reason(os.path.basename(path), is_folder=False) == _OWN
            found.append(Candidate(path, os.path.dirname(os.path.abspath(path)) if has_own_folder else path))
    return found


def children(parent: str, say: Callable[[str], object]) -> tuple[list[Candidate], bool]:
    """Return the checkpoints in a folder, and whether the folder is a checkpoint itself. Say what is skipped."""
    skipped: dict[str, list[str]] = defaultdict(list)
    found = []
    own = _own_files(parent)
    for name in sorted(os.listdir(parent)):
        path = os.path.join(parent, name)
        if name in own:
            skipped[_OWN].append(name)
            continue
        reason, content = _reason(name, is_folder := os.path.isdir(path)), path
        if not reason and is_folder:
            content = _checkpoint_in(path) or ""
            reason = "" if content else _OTHER
        if reason:
            skipped[reason].append(name)
        else:
            found.append(Candidate(content, path))
    is_checkpoint = _OWN in skipped
    if not found and not is_checkpoint:
        lines = [f"{few(names)} ({reason})" for reason, names in sorted(skipped.items())]
        raise ValueError(
            f"inputs must have checkpoints, got {parent!r} without any: {'; '.join(lines) or 'it is empty'}"
        )
    for reason, names in sorted(skipped.items()):
        if found and reason != _HIDDEN:
            say(f"skipped in {parent}: {few(names)} ({reason})")
    return found, is_checkpoint


def _own_files(folder: str) -> set[str]:
    """Return the files that an index names, and the copy of them that Mistral has beside it."""
    names = os.listdir(folder)
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    own: set[str] = set()
    for index in indexes:
        with suppress(ValueError, OSError):  # whoever opens it says what is wrong
            own |= {*read_index(Path(folder, index)).values()}
    is_own = own or any(f"{stem}.safetensors" in names for stem in STEMS)
    return own | {name for name in names if is_own and name.startswith("consolidated.")}


def _reason(name: str, is_folder: bool) -> str:
    """Return why something of this name is no checkpoint among others; "" if it may be one."""
    stem = stem_of(name).lower()
    has_ending = stem != name.lower()
    if name == ".metadata":
        return _OWN  # of a folder of torch.distributed.checkpoint
    if name.startswith("."):
        return _HIDDEN
    for reason, pattern in _NAMES.items():
        if pattern.fullmatch(stem):
            return reason
    shard = _OF_SHARD.fullmatch(stem)
    if not is_folder and not has_ending:
        return _OTHER
    if not is_folder and (shard[1] if shard is not None else stem) in _ONLY_WEIGHTS:
        return _OWN
    if shard is not None:
        return _SHARD
    return _COPY if _COPIES & {*re.split(r"[^a-z]+", stem)} and not has_step(name) else ""


def _checkpoint_in(folder: str, *, may_descend: bool = True) -> str | None:
    """Return the path of the one checkpoint that a folder is or has in it; None if there is none, or several."""
    names = sorted(os.listdir(folder))
    if ".metadata" in names or any(name.endswith((".safetensors", ".index.json")) for name in names):
        return folder
    paths = [path for name in names if _reason(name, is_folder=False) in ("", _OWN, _COPY)
             if os.path.isfile(path := os.path.join(folder, name))]  # fmt: skip
    if not paths and may_descend:  # OLMo-core has its weights one folder further down
        folders = [path for name in names if os.path.isdir(path := os.path.join(folder, name))]
        paths = [found for each in folders if (found := _checkpoint_in(each, may_descend=False)) is not None]
    return paths[0] if len(paths) == 1 else None
