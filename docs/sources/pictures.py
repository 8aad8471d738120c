"""Pictures on phones: the narrow form of a picture, where ``docs/pictures/narrow`` has one, and links to the pictures.

A page names the wide picture alone, as GitHub shows it. ``swafast.css`` chooses by the window's width.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from docutils import nodes

NARROW = Path(__file__).parents[1] / "pictures" / "narrow"


def narrow_form(uri: str) -> Path | None:
    """Return the narrow form of a picture, which has its name."""
    return next(iter(sorted(NARROW.glob(f"{Path(uri).stem}.*"))), None)


def add_narrow_forms(app: Any, doctree: nodes.document) -> None:
    """Put the narrow form of each picture beside it."""
    page = Path(app.srcdir) / app.env.docname
    for image in list(doctree.findall(nodes.image)):
        narrow = narrow_form(image["uri"])
        image["loading"] = "lazy"
        if narrow is None:
            image["classes"].append("only-form")
            continue
        image["classes"].append("wide-form")
        beside = image.deepcopy()
        beside["uri"] = os.path.relpath(narrow, page.parent)
        beside["classes"] = ["narrow-form"]
        image.parent.insert(image.parent.index(image) + 1, beside)


def setup(app: Any) -> dict[str, Any]:
    """Connect to Sphinx, before it collects the pictures of a page."""
    app.connect("doctree-read", add_narrow_forms, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
