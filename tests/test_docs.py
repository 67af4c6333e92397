"""Pages in docs/: their Python runs, and the files and names in them exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NEW_CELL = ROOT / "docs" / "new_cell.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda page: page.name
)
def test_python_blocks(page: Path) -> None:
    """Runs a page's ```python blocks in order, in one namespace."""
    text = page.read_text()
    names: dict[str, object] = {"__name__": page.stem}
    blocks = [block for block in FENCE.finditer(text) if block[1] == "python"]
    assert blocks
    for block in blocks:
        before = text.count("\n", 0, block.start(2))  # for the page's line numbers in tracebacks
        exec(compile("\n" * before + block[2], page, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`([\w./*]+\.(?:py|md|h|cpp|cu|cuh))`", text):
        assert list(ROOT.glob(name)), name


def test_names_in_the_list_of_files() -> None:
    """Each row in the list has a file and names found in the file."""
    rows = re.findall(r"^\| `([\w./*]+)` \| (.*) \|$", NEW_CELL.read_text(), re.M)
    assert len(rows) > 4
    for pattern, what in rows:
        files = sorted(ROOT.glob(pattern))
        assert files, pattern
        for name in re.findall(r"`([^`]+)`", what):
            if "mgu" not in name.lower():
                for file in files:
                    assert name in file.read_text(), f"{file} has no {name}"
