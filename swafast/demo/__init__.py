"""The demo: SGD, SWA and EMA of a small network on handwritten digits, and what an average costs.

Run it by ``swafast demo`` or :func:`run`. It needs the extra ``swafast[demo]`` (scikit-learn, matplotlib).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from .measurements import DemoResult, measure
from .picture import save_picture
from .report import print_report, to_json
from .task import Settings as Settings


def run(settings: Settings, out: Path, json_file: Path | None = None, *, console: Console | None = None) -> DemoResult:
    """Train, test and time; print the tables, and write the picture to ``out`` and the numbers to ``json_file``.

    The tables go to ``console``, by default stdout; progress goes to stderr. The demo runs on one CPU thread: a network
    this small gains nothing from a second one, and loses much on a busy machine. On one kind of CPU and one version of
    torch, the same settings give the same accuracies.

    Raises:
        OSError: a file cannot be written.
    """
    console = console or Console()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = measure(settings)
        print_report(result, console)
        save_picture(result, out)
        if json_file is not None:
            json_file.write_text(json.dumps(to_json(result), indent=1, default=asdict) + "\n", encoding="utf-8")
    finally:
        torch.set_num_threads(threads)
    console.print(f"Picture: {out}  (measured in {result.seconds:.0f} s)", highlight=False, soft_wrap=True)
    return result
