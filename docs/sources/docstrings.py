"""Docstrings as the reference shows them."""

from __future__ import annotations

import importlib
import inspect
import io
import re
import tokenize
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def add_shapes(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Add the comments of a signature, which tell shapes and dtypes, as a section of the docstring."""
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # a comment: napoleon takes a first line with a colon for a type and what it means
    if not inspect.isfunction(obj) or obj.__code__.co_filename.startswith("<"):  # those that dataclasses make
        return
    shapes = comments_of(inspect.getsource(inspect.unwrap(obj)))
    if shapes:
        at = next((i for i, line in enumerate(lines) if line in ("Args:", "Raises:", "Example::")), len(lines))
        lines[at:at] = ["Shapes:", *(f"    {name}: {shape}" for name, shape in shapes.items()), ""]


def link_pages(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make links of the pages and papers that a docstring names."""
    for at, line in enumerate(lines):
        line = re.sub(r"\bdocs/([\w/]+)\.md\b", r":doc:`docs/\1.md </\1>`", line)
        lines[at] = re.sub(r"\barXiv:(\d+\.\d+)", r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", line)


def module_of(app: Any, module: str | None, attribute: str) -> str | None:
    """Return the module whose source has a name: a class is documented under the package that it is imported from."""
    found = importlib.import_module(module) if module else None
    for name in attribute.split("."):
        found = getattr(found, name, None)
    if not (inspect.isfunction(found) or inspect.isclass(found)):
        return None
    path = Path(inspect.getfile(inspect.unwrap(found))).resolve()
    return ".".join(path.relative_to(ROOT).with_suffix("").parts) if path.is_relative_to(ROOT / "swafast") else None


def skip_others(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Skip members that a class has from torch or from Python."""
    is_code = inspect.isroutine(obj) or inspect.isgetsetdescriptor(obj)
    return True if is_code and not is_ours(obj) else None


def is_ours(member: Any) -> bool:
    """Return whether a function is one of this package."""
    return (getattr(member, "__module__", None) or "").startswith("swafast")


def comments_of(source: str) -> dict[str, str]:
    """Return the comment beside each parameter of a function, and that beside its result as ``returns``."""
    found, name, depth = dict[str, str](), "", 0
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc("\n" + source)).readline):
        if token.type == tokenize.OP and token.string in "([{":
            depth += 1
        elif token.type == tokenize.OP and token.string in ")]}":
            depth -= 1
            name = "returns" if depth == 0 else name
        elif token.type == tokenize.NAME and depth == 1 and token.line.split(":")[0].strip() == token.string:
            name = token.string
        elif token.type == tokenize.COMMENT and name and not token.string.startswith("# noqa"):
            found[name] = token.string.lstrip("# ")
        elif token.type == tokenize.INDENT:  # the body begins
            break
    return found


def setup(app: Any) -> dict[str, Any]:
    """Connect to Sphinx, before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", add_shapes, priority=100)
    app.connect("autodoc-process-docstring", link_pages)
    app.connect("viewcode-follow-imported", module_of)
    app.connect("autodoc-skip-member", skip_others)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
