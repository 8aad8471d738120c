"""The form for phones of pictures that programs have drawn: their title, and their panels below each other.

They cost minutes of training, so they are cut here and not drawn again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image

WIDTH, COLOURS = 640, 128
# Of a panel: as wide as if the whole picture had so many columns. Its letters then have about the size of a page's.
MOST_COLUMNS = 1200


@dataclass(frozen=True)
class Cut:
    """Where a picture is cut, as parts of its height and width."""

    title: float  # the title ends there
    top: float  # the panels begin there
    columns: tuple[float, ...]  # between panels


CUTS = {
    "demo": Cut(0.095, 0.185, (0.4065, 0.61)),
    "gallery/merging": Cut(0.08, 0.12, (0.665,)),
    "gallery/sqwa": Cut(0.1, 0.145, (0.5,)),
    "gallery/subspace": Cut(0.1, 0.22, (0.695,)),
    "gallery/swag": Cut(0.1, 0.2, (0.455,)),
    "gallery/swalp": Cut(0.1, 0.19, (0.472,)),
    "gallery/swap": Cut(0.1, 0.2, (0.499,)),
}


def stack_all(pictures: Path, out: Path) -> list[Path]:
    """Cut every picture of a folder whose cuts are known. Return the files, which lie in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, cut in CUTS.items():
        with Image.open(pictures / f"{name}.png") as image:
            stacked = stack(image.convert("RGB"), cut)
        files.append(out / f"{Path(name).name}.png")
        stacked.quantize(COLOURS).save(files[-1], optimize=True)
    return files


def stack(image: Image.Image, cut: Cut) -> Image.Image:
    """Return the title and the panels of a picture below each other, each as wide as the new picture if that fits."""
    width, height = image.size
    title = image.crop((0, 0, width, round(cut.title * height)))
    ends = [0, *(round(part * width) for part in cut.columns), width]
    panels = [image.crop((left, round(cut.top * height), right, height)) for left, right in pairwise(ends)]
    parts = [_scaled(part, MOST_COLUMNS / width) for part in (title, *panels)]
    stacked = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        stacked.paste(part, ((WIDTH - part.width) // 2, top))
        top += part.height
    return stacked


def _scaled(part: Image.Image, most: float) -> Image.Image:
    """Return a part of a picture in the new width, or at most ``most`` times as large."""
    scale = min(WIDTH / part.width, most)
    return part.resize((round(part.width * scale), round(part.height * scale)), Image.Resampling.LANCZOS)
