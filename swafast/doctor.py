"""The doctor: which backends run on this machine, and why the others do not."""

from __future__ import annotations

import os
import platform
import warnings

import torch

from . import __version__
from .backends import Unavailable
from .backends.contract import Pair
from .op import tree_check
from .op.choice import BACKENDS, choose_backends
from .terms.formats import FLOAT32

#: Linux has this file where the driver of NVIDIA's GPUs is loaded.
_NVIDIA = "/dev/nvidiactl"


def report() -> list[tuple[str, str]]:
    """Return (subject, finding) pairs: versions, where each backend was loaded from or why not, and those in use."""
    lines = [
        ("swafast", f"{__version__} at {os.path.dirname(os.path.abspath(__file__))}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    for backend in BACKENDS:
        missing = backend.unavailable()
        found = backend.describe() if missing is None else f"not available: {missing.reason}"
        lines.append((f"backend {backend.name}", found))
    lines.append(("checks of tensors", _checks()))
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        lines.append((f"in use on {kind}", _in_use(kind)))
    return [*lines, ("to do", _to_do([finding for _, finding in lines]))]


def _checks() -> str:
    try:
        found = tree_check.load()
    except ValueError as error:
        return f"none: {error}"
    if isinstance(found, Unavailable):
        return f"Python: {found.reason}"
    return f"native ({tree_check.library_path()}; {tree_check.CHECKS} is not set)"


def _in_use(device_type: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the report itself says why a backend did not load
            chosen = choose_backends(device_types={device_type})
    except (ValueError, RuntimeError) as error:
        return f"none: {error}"
    param, average = torch.zeros(2, 1, device=device_type)
    fitting = next(backend for backend in chosen if backend.serves(Pair("", param, (average,), FLOAT32)))
    asked = os.environ.get("SWAFAST_BACKEND")
    return f"{fitting.name} ({f'SWAFAST_BACKEND={asked}' if asked else 'SWAFAST_BACKEND is not set'})"


def _to_do(findings: list[str]) -> str:
    broken = [each.name for each in BACKENDS if (why := each.unavailable()) is not None and not why.expected]
    asked = os.environ.get("SWAFAST_BACKEND")
    if any(finding.startswith("none:") for finding in findings):
        return "correct or unset the variable that is named above: until then no average is updated"
    if broken:
        return f"mend backend {', '.join(broken)}, as its line says: until then updates take longer"
    checks = tree_check.load()
    if isinstance(checks, Unavailable) and not checks.expected:
        return "mend the checks of tensors, as their line says: until then each update takes the host longer"
    if asked:
        return f"unset SWAFAST_BACKEND, unless you want {asked}: swafast chooses the fastest one"
    if torch.version.cuda is None and torch.version.hip is None and os.path.exists(_NVIDIA):
        return "install torch for CUDA: this machine has an NVIDIA GPU, which this torch cannot use"
    return "nothing"


def main() -> int:
    """Print the report. Return 1 if a variable of the environment asks for what cannot run here, else 0."""
    lines = report()
    width = max(len(what) for what, _ in lines)
    for what, finding in lines:
        print(f"{what:<{width}}  {finding}")
    return int(any(finding.startswith("none:") for _, finding in lines))
