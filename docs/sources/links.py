"""Links from the code in sentences to the reference, and ``index.html``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def copy_front_page(app: Any, error: Exception | None) -> None:
    """Write ``index.html``, which servers send for the site's address. GitHub wants the front page to be a README."""
    if error is None and app.builder.name == "html":
        shutil.copyfile(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app: Any) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.connect("build-finished", copy_front_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
