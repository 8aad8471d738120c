"""Settings of the documentation's site: ``sphinx-build -W --keep-going docs build/site``."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the clone's own `swafast`, and the folder `sources` here

from sources import frameworks  # noqa: E402

import swafast  # noqa: E402  # found by the line above

project = "swafast"
author = "the swafast authors"
copyright = author
version = release = swafast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
extensions += ["sources.marks", "sources.docstrings", "sources.links"]
extensions += ["sources.search", "sources.pictures"]
root_doc = "README"
exclude_patterns = ["sources"]
nitpicky = True
# Types of torch's and of Python's own: their pages are elsewhere, and a build needs no network.
nitpick_ignore_regex = [(r"py:.*", r"(?!swafast\.)(?!\.).*")]
#: Types in signatures that users never name.
INTERNAL = (
    "average.subspace.HasPoints",
    "files.averaging.Advancing",
    "loop.attach.Attachable",
    "loop.runners.Updating",
    "sharded.parts.ranks.Ranks",
    "terms.boxes.Box",
)
nitpick_ignore = [("py:class", f"swafast.{name}") for name in INTERNAL]

# Pages
myst_heading_anchors = 4  # GitHub's anchors
myst_enable_extensions = ["deflist"]


# Docstrings
default_role = "code"
autoclass_content = "class"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_mock_imports = frameworks.mocked()
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # one entry may have two names
napoleon_use_rtype = False
napoleon_custom_sections = [("Shapes", "params_style")]
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

# Looks
html_theme = "furo"
html_title = "swafast"
html_static_path = ["static"]
html_css_files = ["swafast.css"]
html_copy_source = False
html_search_scorer = str(HERE / "sources" / "scorer.js")
html_show_sphinx = False
html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": {
        "color-brand-primary": "#0b7285",
        "color-brand-content": "#0b7285",
        "color-brand-visited": "#0b7285",
        "color-api-name": "#0b7285",
        "color-api-pre-name": "#7b8794",
    },
    "dark_css_variables": {
        "color-brand-primary": "#66b2c4",
        "color-brand-content": "#66b2c4",
        "color-brand-visited": "#66b2c4",
        "color-api-name": "#66b2c4",
        "color-api-pre-name": "#9aa5b1",
    },
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"

# External links: `sphinx-build -b linkcheck docs build/links`, which needs the network.
linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]
