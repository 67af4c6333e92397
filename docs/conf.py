"""Sphinx's configuration: `make docs` builds the pages of this folder into build/docs."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import fusedrnn  # noqa: E402

project = "fusedrnn"
author = "fusedrnn contributors"
project_copyright = author
version = release = fusedrnn.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "api_docs",
    "repository_links",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_ext"]

# Anchors as on GitHub: a page reads the same there.
myst_heading_anchors = 3

# Docstrings have names in single backticks, as Markdown has.
default_role = "code"
smartquotes_action = "D"  # dashes alone
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88  # longer signatures take a line for each argument

nitpicky = True

html_theme = "furo"
html_title = f"fusedrnn {version}"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "source_repository": "https://github.com/fusedrnn/fusedrnn/",
    "source_branch": "main",
    "source_directory": "docs/",
}
repository_url = "https://github.com/fusedrnn/fusedrnn"
repository_branch = "main"

# For `make docs-links`. arXiv and GitHub turn away many requests in a row.
linkcheck_retries = 2
linkcheck_timeout = 20
linkcheck_anchors_ignore_for_url = ["https://github.com/.*"]
