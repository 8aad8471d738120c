"""Words by which the site's search finds pages. How it ranks what it finds is in ``scorer.js``.

GitHub has a search of its own, so nothing of this stands in the pages.
"""

from __future__ import annotations

from typing import Any

#: What readers search for, and the page that answers it although neither its title nor a heading says so. Every word is
#: on its page, since the search wants all words of a query there.
WORDS = {
    "README": ("cite", "citation"),
    "files": ("average checkpoints", "checkpoint averaging"),
    "frameworks/README": ("integrations", "Trainer", "callback"),
    "frameworks/migration": ("convert",),
    "frameworks/peft": ("LoRA", "adapters"),
    "loop": ("BatchNorm", "update_bn", "schedule", "optimizer"),
    "merging": ("model soup", "soups", "merge"),
    "recipes/teachers": ("BYOL", "DINO", "I-JEPA", "Mean Teacher", "teacher"),
    "security": ("pickle", "vulnerability"),
    "sharded": ("DDP", "FSDP", "HSDP", "ZeRO", "tensor parallel", "torchrun", "distributed"),
    "start": ("install", "pip"),
    "troubleshooting": ("error", "NaN"),
    "uncertainty": ("calibration", "ensembles"),
}


def entries(docname: str) -> str:
    """Return a directive with the index's main entries of a page, which the search ranks as it does titles."""
    words = ", ".join(f"! {word}" for word in WORDS.get(docname, ()))
    return f"```{{index}} {words}\n```\n\n" if words else ""


def add_entries(app: Any, docname: str, source: list[str]) -> None:
    """Put a page's entries below its first heading."""
    heading, rest = source[0].split("\n", 1)
    source[0] = f"{heading}\n\n{entries(docname)}{rest}"


def setup(app: Any) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.connect("source-read", add_entries)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
