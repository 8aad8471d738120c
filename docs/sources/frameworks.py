"""The integrations, whose docstrings are read although no framework is installed."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "swafast" / "integrations"
#: What integrations import beside the framework of their own name.
OTHERS = ("composer", "deepspeed", "keras", "megatron", "mmengine", "nemo", "pytorch_lightning", "ultralytics")


def mocked() -> list[str]:
    """Return the packages in whose place autodoc has mocks. Integrations take each for a release that they support."""
    from swafast.integrations import installed

    installed.framework = lambda name, *_, **__: importlib.import_module(name)
    return sorted({*OTHERS, *(path.stem for path in _modules())} | {"ignite", "torchtitan"})


def public_classes() -> list[tuple[str, str]]:
    """Return the modules and the names of the classes that users of frameworks import."""
    found = []
    for path in _modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.append((f"swafast.integrations.{path.stem}", node.name))
    return found


def _modules() -> list[Path]:
    """Return the modules that have a page of their own among those of frameworks."""
    pages = sorted((ROOT / "docs" / "frameworks").glob("*.md"))
    return [module for page in pages if (module := PACKAGE / f"{page.stem}.py").exists()]
