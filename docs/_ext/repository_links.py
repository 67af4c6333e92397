"""Links from a page to files of the repository: addresses on its public site.

A page links to a file by its path, `../examples/word_lm.py`, which also works on GitHub and in an
editor. A link to a file that does not exist is a warning, and so an error of the build.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger(__name__)


class RepositoryLinks(SphinxTransform):
    """Resolves the links that MyST found to be no page of the same folder."""

    default_priority = 100

    def apply(self, **_: Any) -> None:
        """Changes the document's links in place."""
        for kind in (addnodes.pending_xref, addnodes.download_reference):
            for link in list(self.document.findall(kind)):
                if link.get("reftype") == "myst" and not link["reftarget"].startswith("#"):
                    self.resolve(link)

    def resolve(self, link: nodes.Element) -> None:
        """Makes a link to a file outside of the pages' folder an external one."""
        name, _, anchor = link["reftarget"].partition("#")
        if link.get("refdomain") == "doc":
            # MyST takes any Markdown file for a page, and drops its suffix.
            if name in self.env.found_docs:
                return
            path, anchor = self.env.doc2path(name), link["reftargetid"] or ""
        else:
            # The text may be included from a file in another folder.
            path = Path(link.source or self.env.doc2path(self.env.docname)).parent / name
        path = path.resolve()
        if (page := self.env.path2doc(path)) in self.env.found_docs:
            link["refdomain"], link["reftarget"], link["reftargetid"] = "doc", page, anchor or None
            return
        if not path.is_relative_to(ROOT) or not path.exists():
            LOG.warning("link to a file that does not exist: %s", name, location=link)
            link.replace_self(link.children)  # or MyST would warn once more
            return
        kind = "tree" if path.is_dir() else "blob"
        address = f"{self.config.repository_url}/{kind}/{self.config.repository_branch}"
        target = f"{address}/{path.relative_to(ROOT).as_posix()}" + (anchor and f"#{anchor}")
        link.replace_self(nodes.reference("", "", *link.children, refuri=target, internal=False))


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_config_value("repository_url", "", "env", str)
    app.add_config_value("repository_branch", "main", "env", str)
    app.add_transform(RepositoryLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
