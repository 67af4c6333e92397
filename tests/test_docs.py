"""Pages in docs/: their Python runs, and the files and names in them exist."""

from __future__ import annotations

import re
from pathlib import Path
from types import CodeType

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NEW_CELL, RECIPES = ROOT / "docs" / "new_cell.md", ROOT / "docs" / "recipes.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def python_blocks(page: Path) -> list[CodeType]:
    """A page's ```python blocks, with the page's line numbers for tracebacks."""
    text = page.read_text()
    blocks = [block for block in FENCE.finditer(text) if block[1] == "python"]
    assert blocks
    return [
        compile("\n" * text.count("\n", 0, block.start(2)) + block[2], page, "exec")
        for block in blocks
    ]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda page: page.name
)
def test_python_blocks(page: Path) -> None:
    """Runs a page's ```python blocks in order, in one namespace."""
    names: dict[str, object] = {"__name__": page.stem}
    for block in python_blocks(page):
        exec(block, names)


@pytest.mark.parametrize("block", python_blocks(RECIPES))
def test_recipes_stand_alone(block: CodeType) -> None:
    """Each block of the recipes runs by itself, with the imports that it has."""
    exec(block, {"__name__": "recipe"})


def test_recipes_links_to_its_sections() -> None:
    text = RECIPES.read_text()
    titles = re.findall(r"^## (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


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
