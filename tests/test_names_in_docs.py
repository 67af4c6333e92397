"""Pages on the code: what they name is in the sources, and what they print is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import cuda_plan

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "docs/design.md", "docs/cuda.md")]
FENCE = re.compile(r"^```\w*\n.*?^```$", re.M | re.S)
NOT_OURS = {"NVCC_APPEND_FLAGS", "manylinux", "pmaddwd"}
IDENTIFIER = re.compile(r"`((?:\w+(?:::|\.))*\w+)(?:\(\))?`")


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def sources() -> set[str]:
    """Every word of the code, without this file."""
    suffixes = {".py", ".h", ".cpp", ".cu", ".cuh", ".yml"}
    files = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "setup.py"]
    for folder in (".github", "csrc", "fusedrnn", "benchmarks", "tests", "tools"):
        found = (ROOT / folder).rglob("*")
        files += [f for f in found if f.suffix in suffixes and f != Path(__file__)]
    return set().union(*(words(f.read_text(encoding="utf-8")) for f in files))


def unknown(text: str, known: set[str]) -> list[str]:
    """Names between backticks with a part that no source has; files are not names."""
    names = [n for n in IDENTIFIER.findall(FENCE.sub("", text)) if not re.search(r"\.\w{1,4}$", n)]
    return [name for name in names if not words(name) <= known | NOT_OURS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page: Path) -> None:
    assert not unknown(page.read_text(encoding="utf-8"), sources())


def test_a_wrong_name_is_found() -> None:
    text = "`Layer`, `torch.absent_one`, `AbsentTwo::forward`, `a/file.py`, `make it`"
    assert unknown(text, sources()) == ["torch.absent_one", "AbsentTwo::forward"]


def test_printed_plans(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/cuda.md shows what the command that it names prints first."""
    text = PAGES[-1].read_text(encoding="utf-8")
    shown = re.search(r"tools\.cuda_plan ([^`]*)`.*?^```text\n(.*?)^```$", text, re.M | re.S)
    assert shown
    cuda_plan.main(shown[1].split())
    assert capsys.readouterr().out.startswith(shown[2])
