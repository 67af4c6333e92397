"""The pages of docs/: their Python runs, and the files and names that they mention are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NEW_CELL = ROOT / "docs" / "new_cell.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks(page: Path) -> None:
    """In order, in one namespace. A block that is not to run is no ```python block."""
    text = page.read_text()
    names: dict[str, object] = {"__name__": page.stem}
    blocks = [block for block in FENCE.finditer(text) if block[1] == "python"]
    assert blocks
    for block in blocks:
        before = text.count("\n", 0, block.start(2))  # so that a traceback has the page's lines
        exec(compile("\n" * before + block[2], page, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`([\w./*]+\.(?:py|md|h|cpp|cu|cuh))`", text):
        assert list(ROOT.glob(name)), name


def test_names_in_the_list_of_files() -> None:
    """A row of the list names one file, and what is to be found there."""
    rows = re.findall(r"^\| `([\w./*]+)` \| (.*) \|$", NEW_CELL.read_text(), re.M)
    assert len(rows) > 15
    for pattern, what in rows:
        files = sorted(ROOT.glob(pattern))
        assert files, pattern
        for name in re.findall(r"`([^`]+)`", what):
            if "mgu" not in name.lower():
                for file in files:
                    assert name in file.read_text(), f"{file} has no {name}"
