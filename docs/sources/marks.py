"""Marks in pages: comments such as ``<!-- reference: swafast.save -->``, which GitHub hides and the site fills.

``contents``                the entries of the sidebar, made of the tables of the page, under its headings
``reference: NAMES``        the documentation of these names, from their docstrings
``reference of frameworks`` the same of the classes of integrations
``glossary``                the words of the code, from the docstring of ``swafast.terms``
``page: PATH``              another document of the repository
``code: NAME.py``           the code of an example, folded away
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

from . import frameworks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
KINDS = ("contents", "reference", "reference of frameworks", "glossary", "page", "code")
MARK = re.compile(rf"^<!-- ({'|'.join(KINDS)})(?:: ([^>]*?))? -->$", re.M)
#: Public names that are other packages', and where they have them.
OF_OTHERS = {"swafast.optim.SWALR": "``torch.optim.swa_utils.SWALR``"}
#: Base classes whose members are not ours, or stand with the base class.
BASES = ("Module", "AveragedModel", "Optimizer", "Exception", "Tensor", "FusedAveragedModel", "Contract", "_Theirs")
#: Classes of which users call a few members alone.
MEMBERS = {"swafast.integrations.weight_average.Contract": "evaluated, has_models, swapped, finish"}
#: Pages of the site that have a document of the repository, or show it.
PLACES = {
    "README.md": "start.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}


def fill(app: Any, docname: str, source: list[str]) -> None:
    """Fill the marks of a page, and lead its links out of ``docs`` to pages of the site."""
    page = f"{docname}.md"
    text = source[0]
    source[0] = with_site_links(MARK.sub(lambda mark: _filled(app, page, text, mark), text), page)


def _filled(app: Any, page: str, text: str, mark: re.Match[str]) -> str:
    kind, given = mark[1], (mark[2] or "").split()
    if kind == "contents":
        return contents(text)
    if kind == "reference":
        return "\n".join(documented(name) for name in given)
    if kind == "reference of frameworks":
        return "\n".join(
            f"## {module.rpartition('.')[2]}\n\n`from {module} import {name}`\n\n{documented(f'{module}.{name}')}"
            for module, name in frameworks.public_classes()
        )
    if kind == "code":
        return "\n".join(code(name) for name in given)
    (path,) = given or ["swafast/terms/__init__.py"]
    app.env.note_dependency(str(ROOT / path))
    if kind == "glossary":
        return glossary(importlib.import_module("swafast.terms").__doc__ or "")
    return _moved((ROOT / path).read_text().partition("\n")[2], path, page)  # the page has a heading already


def contents(text: str) -> str:
    """Return a toctree for each section of a page, of the pages that its tables link first."""
    seen, trees = set[str](), []
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        heading, _, body = section.partition("\n")
        links = re.findall(r"^\| \[[^\]]*\]\(([\w/]+)\.md\)", body, re.M)
        entries = [link for link in dict.fromkeys(links) if link not in seen]
        seen |= {*entries}
        if entries:
            trees.append("\n".join(["```{toctree}", ":hidden:", f":caption: {heading}", "", *entries, "```", ""]))
    return "\n".join(trees)


def documented(name: str) -> str:
    """Return the directive that documents a name from its docstring."""
    if name in OF_OTHERS:
        lines = [f".. py:class:: {name}", "", f"   {OF_OTHERS[name]}, unchanged."]
    elif name.rpartition(".")[2][0].isupper():
        lines = [f".. autoclass:: {name}", f"   :members: {MEMBERS.get(name, '')}"]
        lines += [] if name in MEMBERS else [f"   :inherited-members: {', '.join(BASES)}"]
    else:
        lines = [f".. autofunction:: {name}"]
    return "\n".join(["```{eval-rst}", *lines, "```", ""])


def code(name: str) -> str:
    """Return the code of an example, which a click unfolds."""
    include = f"```{{literalinclude}} ../examples/{name}\n:language: python\n```"
    return f"<details><summary>The code of {name}</summary>\n\n{include}\n\n</details>\n"


def sections(text: str) -> dict[str, str]:
    """Return the anchor of the section of each example, by the file that a section's text links first."""
    found = re.findall(r"^## (.+)\n\n\[(\w+\.py)\]", text, re.M)
    return {name: re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading, name in found}


def glossary(docstring: str) -> str:
    """Return the words of a glossary as tables, one for each of its parts."""
    lines = []
    for line in docstring.splitlines()[1:]:
        if entry := re.match(r"^    (\S.*?)  +(\S.*)$", line):
            word, meaning = entry[1], entry[2].replace("``", "`")
            lines.append(f"| {word} | {meaning} |")
        elif heading := re.match(r"^(\S+): (.*)$", line):
            lines += ["", f"## `{heading[1]}`: {heading[2]}", "", "| word | meaning |", "|---|---|"]
        elif line.strip():
            lines += ["", line.replace("``", "`")]
    return "\n".join(lines)


def _moved(text: str, path: str, page: str) -> str:
    """Return the text of a document with its relative links as a page of the site writes them."""

    def lead(link: re.Match[str]) -> str:
        target = ROOT / Path(path).parent / link[1]
        return f"]({os.path.relpath(target, (DOCS / page).parent)}{link[2] or ''})"

    return re.sub(r"\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)", lead, text)


def with_site_links(text: str, page: str) -> str:
    """Return a page whose links to documents and examples of the repository lead to the pages that show them."""
    here, of_examples = (DOCS / page).parent, sections((DOCS / "examples.md").read_text())

    def lead(link: re.Match[str]) -> str:
        target = os.path.normpath(here / link[1])
        path, anchor = os.path.relpath(target, ROOT), link[2] or ""
        if path in PLACES:
            path = f"docs/{PLACES[path]}"
        elif path.startswith("examples/") and (section := of_examples.get(Path(path).name)) and page != "examples.md":
            path, anchor = "docs/examples.md", f"#{section}"
        else:
            return link[0]
        return f"]({os.path.relpath(ROOT / path, here)}{anchor})"

    return re.sub(r"(?<!!)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)", lead, text)


def setup(app: Any) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
