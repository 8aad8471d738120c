"""Links from the code in sentences to the reference, and ``index.html``."""

from __future__ import annotations

import importlib
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import desc, pending_xref

from .docstrings import is_ours

#: The class whose methods each variable has in one process, and on ranks. Code without a variable may be a method of
#: the first one, too.
CLASSES = {
    "averaged": ("swafast.FusedAveragedModel", "swafast.ShardedAveragedModel"),
    "averages": ("swafast.FusedAverages", "swafast.ShardedAverages"),
    "attachment": ("swafast.loop.attachment.Attachment",) * 2,
    "snapshots": ("swafast.Snapshots",) * 2,
    "subspace": ("swafast.average.subspace.Subspace",) * 2,
}
ON_RANKS = ("sharded", "reference/sharded")
#: Names that are words too: they are code of the page's own.
WORDS = {"load", "save", "merge", "average", "format", "backend", "attachment", "forward", "deviations", "subspace"}
WORDS |= {"state_dict", "load_state_dict"}  # of whatever the page is about


def link_code(app: Any, doctree: nodes.document) -> None:
    """Make references of code in sentences that is a public name, once in each section."""
    if app.env.docname.startswith("contributing") or app.env.docname == "changelog":
        return  # where names are those of files, and of changes
    names = _names(app.env.docname in ON_RANKS)
    for section in doctree.findall(nodes.section):
        seen = set[str]()
        for literal in list(section.findall(nodes.literal)):
            if _owner(literal) is not section:
                continue
            target = names.get(literal.astext().removesuffix("()"))
            if target and target not in seen:
                seen.add(target)
                reference = pending_xref("", refdomain="py", reftype="obj", reftarget=target, refwarn=False)
                reference["refdoc"] = app.env.docname
                literal.replace_self(reference)
                reference += literal


def _owner(node: nodes.Node) -> nodes.Node | None:
    """Return the section of a piece of code in a sentence; None in headings, links and the reference's own text."""
    parent = node.parent
    while parent is not None and not isinstance(parent, nodes.section):
        if isinstance(parent, (nodes.title, nodes.reference, pending_xref, desc)):
            return None
        parent = parent.parent
    return parent


@cache
def _names(on_ranks: bool) -> dict[str, str]:
    """Return what code in a sentence may be, and the full name that it means; ``on_ranks``: of sharded classes."""
    full = sorted({name for text in _reference() for name in re.findall(r"swafast\.[\w.]+\w", text)})
    names = {name.rpartition(".")[2]: name for name in full} | {name: name for name in full}
    for variable, (alone, sharded) in CLASSES.items():
        owner = sharded if on_ranks else alone
        module, _, attribute = owner.rpartition(".")
        members = methods_of(getattr(importlib.import_module(module), attribute))
        names |= {f"{variable}.{member}": f"{owner}.{member}" for member in members}
        if variable == "averaged":
            names |= {member: f"{owner}.{member}" for member in members if member not in names}
    return {name: target for name, target in names.items() if name not in WORDS}


def methods_of(owner: type) -> set[str]:
    """Return the documented methods that a class has from this package."""
    members = ((name, getattr(owner, name, None)) for name in dir(owner) if not name.startswith("_"))
    return {name for name, member in members if callable(member) and is_ours(member) and member.__doc__}


def _reference() -> list[str]:
    """Return the marks of all pages of the reference."""
    pages = (Path(__file__).parents[1] / "reference").glob("*.md")
    return [mark for page in pages for mark in re.findall(r"<!-- reference: ([^>]*) -->", page.read_text())]


def copy_front_page(app: Any, error: Exception | None) -> None:
    """Write ``index.html``, which servers send for the site's address. GitHub wants the front page to be a README."""
    if error is None and app.builder.name == "html":
        shutil.copyfile(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app: Any) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.connect("doctree-read", link_code)
    app.connect("build-finished", copy_front_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
