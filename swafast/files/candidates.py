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
from .checkpoints import RECORD
from .safetensors_files import INDEX_SUFFIX, OF_SHARD, STEMS, read_index
from .step_names import Counted, copies_among, has_step, stem_of

#: Reasons why a file or folder among checkpoints is none.
_HIDDEN, _OTHER, _SHARD = "hidden", "no checkpoint", "shards of a checkpoint"
_UNFINISHED, _STATE, _COPY = "unfinished", "states of a training, no weights", "copies or means of others"
_AVERAGE = "averages that swafast wrote"
_OWN = "weights of the folder itself"

_NAMES = {
    _UNFINISHED: re.compile(r".*\.(unfinished|incomplete|partial|part|tmp)|tmp|tmp[-_.].*|.*_tmp"),
    _STATE: re.compile(
        r"((lr_?)?schedulers?|samplers?|dl_state_dict|(grad_)?scaler|random_states?|training_args|train|args"
        r"|trainer_state)([-_]\d+)?"
        r"|rng(_states?)?([-_].*)?|optim(izer)?s?([-_.].*)?|.*optim(izer)?_states?|zero_pp_rank_.*"
    ),
}
#: Words of a name without a step, which mark a copy or a mean of other checkpoints.
_COPIES = {"last", "latest", "best", "final", "init", "avg", "average", "averaged", "mean", "swa"}
#: The name of a shard, and names of weights that have a folder of their own.
_ONLY_WEIGHTS = ("model", "pytorch_model", "adapter_model", "diffusion_pytorch_model")
#: In which an average has our key. 26 bytes come before it in safetensors, and 30 in a zip.
_BEGIN_NBYTES = 64


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
        ValueError: one is a folder of several checkpoints, or a part of a checkpoint.
    """
    found = []
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"inputs must exist, got {path!r}: {_advice(path)}")
        name = os.path.basename(path)
        if os.path.isdir(path):
            inside, _, is_checkpoint = _sorted_out(path)
            if len(inside) > 1 and not is_checkpoint:
                raise ValueError(
                    f"inputs must be checkpoints, or one folder of them, got the folder {path!r} with "
                    f"{few([each.name for each in inside])} among {len(paths)} inputs: give one folder of checkpoints, "
                    "or list the checkpoints"
                )
            # A folder that is not understood goes to whoever opens it, and is refused there.
            found.append(Candidate(_checkpoint_in(path) or path, path))
            continue
        shard = OF_SHARD.fullmatch(stem_of(name))
        if shard is not None and int(shard[2]) > 1:
            raise ValueError(
                f"inputs must be whole checkpoints, got {path!r}, which is one of {int(shard[2])} files of a "
                "checkpoint: give its folder or its index"
            )
        found.append(Candidate(path, os.path.dirname(os.path.abspath(path)) if has_own_folder(name) else path))
    return found


def _advice(path: str) -> str:
    """Return what may have been meant by a path at which there is nothing."""
    if re.fullmatch(r"-?\d*\.?\d+", path):
        return "weights are one text with commas, as in --weights 0.3,0.7"
    if re.search(r"[*?\[]", path):
        return "no name fits this pattern, or it is in quotes, so that the shell has not replaced it by names"
    return "there is nothing at this path"


def without_others(paths: Sequence[str], say: Callable[[str], object]) -> list[str]:
    """Return the paths without those that a folder of checkpoints would be read without. Say what is skipped."""
    skipped = defaultdict(list)
    names = {path: os.path.basename(os.path.abspath(path)) for path in paths}
    copies = copies_among([*names.values()])
    for path, name in names.items():
        reason = _COPY if name in copies else _reason(name, os.path.isdir(path))
        reason = reason or (_AVERAGE if is_average(path) else "")
        if reason in (_UNFINISHED, _STATE, _COPY, _AVERAGE):
            skipped[reason].append(path)
    kept = [path for path in paths if not any(path in others for others in skipped.values())]
    lines = [f"{few(others)} ({reason})" for reason, others in sorted(skipped.items())]
    if not kept:
        raise ValueError(f"inputs must have checkpoints to select from, got {'; '.join(lines)}")
    for line in lines:
        say(f"skipped: {line}")
    return kept


def children(parent: str, say: Callable[[str], object]) -> tuple[list[Candidate], bool]:
    """Return the checkpoints in a folder, and whether the folder is a checkpoint itself. Say what is skipped."""
    found, skipped, is_checkpoint = _sorted_out(parent)
    if not found and not is_checkpoint:
        lines = [f"{few(names)} ({reason})" for reason, names in sorted(skipped.items())]
        listed = ". List them to average them" if {_AVERAGE, _COPY} & {*skipped} else ""
        raise ValueError(
            f"inputs must have checkpoints, got {parent!r} without any: {'; '.join(lines) or 'it is empty'}{listed}"
        )
    for reason, names in sorted(skipped.items()):
        if found and reason != _HIDDEN:
            say(f"skipped in {parent}: {few(names)} ({reason})")
    return found, is_checkpoint


def _sorted_out(parent: str) -> tuple[list[Candidate], dict[str, list[str]], bool]:
    """Return the checkpoints in a folder, other names by reason, and whether the folder is a checkpoint itself."""
    skipped: dict[str, list[str]] = defaultdict(list)
    found = []
    own = _own_files(parent)
    for name in sorted(os.listdir(parent)):
        path = os.path.join(parent, name)
        if name in own:
            skipped[_OWN].append(name)
            continue
        reason, content = _reason(name, is_folder := os.path.isdir(path)), path
        if not reason and is_average(path):
            reason = _AVERAGE
        if not reason and is_folder:
            content = _checkpoint_in(path) or ""
            reason = "" if content else _OTHER
        if reason:
            skipped[reason].append(name)
        else:
            found.append(Candidate(content, path))
    for copy in copies_among([each.name for each in found]):
        skipped[_COPY].append(copy)
    found = [each for each in found if each.name not in skipped.get(_COPY, ())]
    return found, skipped, _OWN in skipped


def is_average(path: str) -> bool:
    """Return whether an average was written there: a folder has a record of it, and a file begins with its key."""
    if os.path.isdir(path):
        return os.path.isfile(os.path.join(path, f"{RECORD}.json"))
    if not os.path.isfile(path):
        return False  # a pipe would block
    with suppress(OSError), open(path, "rb") as file:
        return RECORD.encode() in file.read(_BEGIN_NBYTES)
    return False


def has_own_folder(name: str) -> bool:
    """Return whether a file is, by its name, the weights of the model of its folder."""
    return _reason(name, is_folder=False) == _OWN


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
    shard = OF_SHARD.fullmatch(stem)
    if not is_folder and not has_ending:
        return _OTHER
    if not is_folder and (shard[1] if shard is not None else stem) in _ONLY_WEIGHTS:
        return _OWN
    if shard is not None:
        return _SHARD
    return _COPY if _COPIES & {*re.split(r"[^a-z]+", stem)} and not has_step(name) else ""


def may_be_whole(name: str) -> bool:
    """Return whether a file in a folder may hold all weights of a checkpoint, by its name."""
    shard = OF_SHARD.fullmatch(stem_of(name))
    is_whole = shard is None or int(shard[2]) == 1
    return is_whole and _reason(name, is_folder=False) in ("", _OWN, _COPY)


def _checkpoint_in(folder: str, *, may_descend: bool = True) -> str | None:
    """Return the path of the one checkpoint that a folder is or has in it; None if there is none, or several."""
    names = sorted(os.listdir(folder))
    if ".metadata" in names or any(name.endswith((".safetensors", ".index.json")) for name in names):
        return folder
    paths = [path for name in names if may_be_whole(name) and os.path.isfile(path := os.path.join(folder, name))]
    if not paths and may_descend:  # OLMo-core has its weights one folder further down
        folders = [path for name in names if _reason(name, is_folder=True) in ("", _OWN, _COPY)
                   if os.path.isdir(path := os.path.join(folder, name))]  # fmt: skip
        paths = [found for each in folders if (found := _checkpoint_in(each, may_descend=False)) is not None]
    return paths[0] if len(paths) == 1 else None
