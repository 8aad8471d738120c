"""The doctor: what swafast found on this machine, and what it does without."""

from __future__ import annotations

import os
import platform
import sys
import warnings

import torch

from . import __version__
from .backends import native
from .ops import BACKENDS, choose_backends


def report() -> list[tuple[str, str]]:
    """Give (what, finding) lines: versions, each backend with where it loaded from or why not, and the choice."""
    lines = [
        ("swafast", f"{__version__} at {os.path.dirname(os.path.abspath(__file__))}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    for backend in BACKENDS:
        reason = backend.unavailable()
        found = native.describe() if backend is native else "plain torch, always there"
        lines.append((f"backend {backend.name}", found if reason is None else f"not available: {reason}"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the lines above say why a backend did not load
            chosen = choose_backends()
    except (ValueError, RuntimeError) as error:
        lines.append(("in use", f"none: {error}"))
    else:
        lines.append(("in use", f"{chosen[0].name} (SWAFAST_BACKEND={os.environ.get('SWAFAST_BACKEND', '')!r})"))
    return lines


def main() -> int:
    """Print the report; 1 if ``SWAFAST_BACKEND`` asks for what cannot run."""
    lines = report()
    width = max(len(what) for what, _ in lines)
    for what, finding in lines:
        sys.stdout.write(f"{what:<{width}}  {finding}\n")
    return int(lines[-1][1].startswith("none:"))
