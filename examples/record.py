"""Run the examples, and put what they print into ``docs/examples.md``: ``python examples/record.py [NAME...]``.

Each section of the page has a command. The block below it gets what the command prints, and ``docs/pictures/gallery``
the picture that it draws, smaller. Times differ from one machine and run to the next: they become ``…``. Run it on an
idle machine, with what the examples need installed; those that use a framework may be recorded in an environment of
their own, by their names. It takes some minutes.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "examples.md"
PICTURES = ROOT / "docs" / "pictures" / "gallery"
#: A section of the page: from the command to what it prints.
RECORDED = re.compile(
    r"^```bash\n(?P<command>[^\n]*examples/(?P<name>\w+)\.py[^\n]*)\n```\n\n```text\n.*?^```$", re.M | re.S
)
SCALE, COLOURS = 0.6, 64  # of pictures: 40 KB each
#: Times in sentences, and what depends on them.
TIMES = re.compile(r"\b\d[\d.,]*(?= (?:ms|s)\b|% of a step)")


def record(command: str, name: str) -> str:
    """Run a command of the page in an empty folder, keep its picture, and return what it prints."""
    *variables, program = re.split(r"\s+(?=python|torchrun)", f" {command}")
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in shlex.split(program)]
    launcher = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
    given = dict(pair.split("=") for text in variables for pair in text.split())
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **given, "PYTHONPATH": path, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *launcher, *words[1:]], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            sys.exit(f"{command}: ended with {done.returncode}")
        for picture in Path(folder).glob("*.png"):
            shrink(picture, PICTURES / f"{name}.png")
    return folded(without_times("\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())))


def shrink(picture: Path, out: Path) -> None:
    from PIL import Image  # here, since most examples draw nothing

    out.parent.mkdir(exist_ok=True)
    with Image.open(picture) as image:
        size = round(SCALE * image.width), round(SCALE * image.height)
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).quantize(COLOURS).save(out, optimize=True)


def folded(text: str) -> str:
    """Return a text with its long lines folded, since lines of documents end before column 120."""
    lines = (
        textwrap.wrap(line, 116, subsequent_indent="  ") if len(line) > 116 else [line] for line in text.splitlines()
    )
    return "\n".join(part for each in lines for part in each)


def without_times(text: str) -> str:
    """Return a text with ``…`` for times: in sentences, and in each column of a table whose heading has times."""
    times: list[int] = []
    lines = []
    for line in text.splitlines():
        if line.startswith("┃"):
            times = [place for place, cell in enumerate(line.split("┃")) if re.search(r"\b(ms|s|time)\b", cell)]
        cells = TIMES.sub("…", line).split("│")
        if line.startswith("│"):
            for place in times:
                cells[place] = re.sub(r"\d[\d.,]*", lambda number: "…".rjust(len(number[0])), cells[place])
        lines.append("│".join(cells))
    return "\n".join(lines)


def main(names: list[str]) -> None:
    found = {match["name"]: match["command"] for match in RECORDED.finditer(PAGE.read_text())}
    if unknown := sorted({*names} - {*found}):
        sys.exit(f"NAME must be one of {', '.join(found)}, got {', '.join(unknown)}")
    for name in names or found:
        print(found[name], flush=True)
        printed = record(found[name], name)
        block = f"```bash\n{found[name]}\n```\n\n```text\n{printed}\n```"
        text = PAGE.read_text()  # again, since somebody may write it during a long run
        PAGE.write_text(RECORDED.sub(lambda each: block if each["name"] == name else each[0], text))  # noqa: B023


if __name__ == "__main__":
    main(sys.argv[1:])
